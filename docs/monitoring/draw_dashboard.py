"""Draws the panels of dashboard.json from what a Prometheus answers: a picture for people without a Grafana at hand.

    python3 -m venv venv && venv/bin/pip install -r docs/monitoring/requirements.txt
    venv/bin/python docs/monitoring/draw_dashboard.py http://127.0.0.1:9090 dashboard.svg --minutes 10

The layout, titles, units and queries are the dashboard's; the drawing is this script's, not Grafana's. A panel without data
says so.
"""
import argparse
import json
import pathlib
import re
import time
import urllib.parse
import urllib.request

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator  # noqa: E402

STEPS = 120
LEGEND_MAX = 4


def answer(server, path, **query):
    with urllib.request.urlopen(f"{server}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30) as reply:
        return json.load(reply)["data"]["result"]


def expand(expr, step):
    """What Grafana puts into a query: every job and instance, and four scrapes as the interval of a rate."""
    expr = expr.replace("$job", ".*").replace("$instance", ".*")
    return expr.replace("$__rate_interval", f"{max(step, 20)}s")


def legend(template, labels):
    return re.sub(r"\{\{(\w+)\}\}", lambda name: labels.get(name.group(1), ""), template).strip() or "value"


def shown(value, unit):
    if unit in ("bytes", "Bps"):
        base, names = (1024, ["B", "KiB", "MiB", "GiB", "TiB"]) if unit == "bytes" else (1000, ["B/s", "kB/s", "MB/s", "GB/s", "TB/s"])
        while abs(value) >= base and len(names) > 1:
            value, names = value / base, names[1:]
        return f"{value:.3g} {names[0]}"
    if unit == "percentunit":
        return f"{value * 100:.3g} %"
    if unit == "s":
        return f"{value * 1000:.3g} ms" if 0 < abs(value) < 1 else f"{value:.3g} s"
    return f"{value:.3g}" + {"ops": "/s", "reqps": "/s"}.get(unit, "")


def draw_stat(axes, panel, server, end):
    unit = panel["fieldConfig"]["defaults"]["unit"]
    result = answer(server, "query", query=expand(panel["targets"][0]["expr"], 60), time=end)
    value = float(result[0]["value"][1]) if result else None
    color = "#8c959f"
    text = "-"
    if value is not None:
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]:
            if step["value"] is None or value >= step["value"]:
                color = {"green": "#1a7f37", "yellow": "#bf8700", "red": "#cf222e"}[step["color"]]
        text = shown(value, unit)
        for mapping in panel["fieldConfig"]["defaults"]["mappings"]:
            text = mapping["options"].get(text, {}).get("text", text)
    axes.set_facecolor(color)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=15, color="white", weight="bold")


def draw_series(axes, panel, server, begin, end):
    defaults = panel["fieldConfig"]["defaults"]
    step = max(1, round((end - begin) / STEPS))
    lines = []
    for target in panel["targets"]:
        query = dict(query=expand(target["expr"], step), start=begin, end=end, step=step)
        for series in answer(server, "query_range", **query):
            points = [((float(at) - end) / 60, float(value)) for at, value in series["values"]]
            lines.append((legend(target["legendFormat"], series["metric"]), points))
    axes.set_xlim((begin - end) / 60, 0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: shown(value, defaults["unit"])))
    axes.tick_params(labelsize=6, length=0)
    axes.grid(color="#d0d7de", linewidth=0.4)
    if not lines:
        axes.text(0.5, 0.5, "no data", transform=axes.transAxes, ha="center", va="center", fontsize=8, color="#8c959f")
        axes.set_yticks([])
        return
    for name, points in lines:
        axes.plot(*zip(*points), linewidth=1, label=name)
    if "min" in defaults:
        axes.set_ylim(bottom=defaults["min"])
    if "max" in defaults:
        axes.set_ylim(top=defaults["max"] * 1.05)
    handles, names = axes.get_legend_handles_labels()
    more = len(names) - LEGEND_MAX
    if more > 0:
        names[LEGEND_MAX - 1] += f" (+{more})"
    axes.legend(handles[:LEGEND_MAX], names[:LEGEND_MAX], fontsize=5.5, loc="upper left", frameon=True, framealpha=0.7, borderpad=0.3)


def main():
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("server", help="where Prometheus answers")
    words.add_argument("picture", help="the SVG to write")
    words.add_argument("--minutes", type=float, default=60, help="how far back to look")
    words.add_argument("--dashboard", default=pathlib.Path(__file__).with_name("dashboard.json"), type=pathlib.Path)
    args = words.parse_args()
    panels = json.loads(args.dashboard.read_text())["panels"]
    end = time.time()
    begin = end - args.minutes * 60

    plt.rcParams.update({"font.family": "sans-serif", "svg.fonttype": "none", "svg.hashsalt": "modelfs", "axes.edgecolor": "#8c959f"})
    lines = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    inch = 0.19  # of a line of Grafana's grid
    figure = plt.figure(figsize=(13, lines * inch + 0.4))
    for panel in panels:
        at = panel["gridPos"]
        left, bottom = at["x"] / 24, 1 - (at["y"] + at["h"]) / lines
        width, height = at["w"] / 24, at["h"] / lines
        if panel["type"] == "row":
            figure.text(0.008, bottom + height / 2, panel["title"], fontsize=10, weight="bold", va="center")
            continue
        pad = (0.042, 1.1 / lines, 0.008, 1.4 / lines) if panel["type"] == "timeseries" else (0.01, 0.2 / lines, 0.005, 1.3 / lines)
        axes = figure.add_axes((left + pad[0], bottom + pad[1], width - pad[0] - pad[2], height - pad[1] - pad[3]))
        axes.set_title(panel["title"], fontsize=7.5, loc="left", pad=3)
        if panel["type"] == "stat":
            draw_stat(axes, panel, args.server, end)
        else:
            draw_series(axes, panel, args.server, begin, end)
    figure.text(0.992, 0.001, "minutes before the picture; drawn by docs/monitoring/draw_dashboard.py, not by Grafana", fontsize=6, ha="right", va="bottom")
    figure.savefig(args.picture, format="svg", metadata={"Date": None})
    # A tenth of a point is finer than any screen, and no viewer has the fonts that are named one after the other.
    picture = pathlib.Path(args.picture)
    text = re.sub(r' (?:d|x|y|points|transform)="[^"]*"', lambda at: re.sub(r"(\d+\.\d)\d+", r"\1", at[0]), picture.read_text())
    text = re.sub(r"'DejaVu Sans',.*?sans-serif", "sans-serif", text)
    # Nothing refers to groups, and marks of no length show nothing.
    text = re.sub(r"<use [^>]*/>", "", re.sub(r'<g id="[^"]*">', "<g>", text))
    text = re.sub(r"<g>\s*(<g>\s*</g>\s*)*</g>\s*", "", text)
    picture.write_text(re.sub(r"\n\s+", "\n", text))


if __name__ == "__main__":
    main()
