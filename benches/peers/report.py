"""Turns the numbers of a run into one JSON value, and that into tables of ratios and the chart of the README."""

from __future__ import annotations

import json
import re
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from contenders import Contender, Data
    from suite import Numbers

PLAIN_GETS = "plain GETs, thrown away"
MEMCPY = "memcpy"
TMPFS = "tmpfs"

# key, heading, how its cells are made: a ratio of rates to a reference's column, of times, or the number itself.
COLUMNS: list[tuple[str, str, str, str | None, str]] = [
    ("cold", "cold read", "rate", PLAIN_GETS, "cold"),
    ("cold load", "cold load to torch", "rate", PLAIN_GETS, "cold"),
    ("first", "first 4 KiB, ms", "number", None, ""),
    ("cpu", "client CPU s/GB", "number", None, ""),
    ("memory", "MiB beyond plaintext", "number", None, ""),
    ("warm", "warm read", "rate", TMPFS, "warm"),
    ("mmap", "warm mmap", "rate", TMPFS, "mmap"),
    ("direct", "warm O_DIRECT", "rate", TMPFS, "direct"),
    ("random", "warm 4 KiB random", "time", TMPFS, "random"),
    ("many", "4 processes", "rate", TMPFS, "many"),
    ("warm load", "warm load to torch", "rate", TMPFS, "warm load"),
]
UNITS = {
    "first": "ms",
    "cpu": "s/GB",
    "server cpu": "s/GB",
    "memory": "MiB",
    "random": "us",
    "stored": "of the source",
    "narrow link": "of plain GETs",
}


def short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.0995 or value == 0 else 3}f}"


def cell(numbers: Numbers, data: str, who: str, column: tuple[str, str, str, str | None, str]) -> dict[str, Any] | None:
    key, _, kind, against, key_against = column
    # A loader's own memory is the only kind it has.
    if key == "memory" and not numbers.of(data, who, key):
        key = "load memory"
    if key == "cpu" and not numbers.of(data, who, key):
        key = "cold load cpu"
    value = numbers.median(data, who, key)
    if value is None:
        return None
    made: dict[str, Any] = {
        "value": round(value, 4),
        "unit": UNITS.get(key.removeprefix("load ").removeprefix("cold load "), "GB/s"),
    }
    if against:
        ratio = numbers.ratio(data, who, against, key, key_against)
        made["ratio"] = None if ratio is None else round(1 / ratio if kind == "time" else ratio, 4)
    made["rounds"] = [round(value, 3) for value in numbers.of(data, who, key)]
    return made


def collect(
    numbers: Numbers,
    about: dict[str, Any],
    one_core: dict[str, float],
    data: dict[str, Data],
    seen: dict[str, list[Contender]],
    everyone: dict[str, Contender],
) -> dict[str, Any]:
    """Everything that the tables and the chart show, in plain values."""
    kinds = []
    for name, contenders in seen.items():
        rows = []
        floors = [
            who
            for (of, who, what) in numbers.values
            if of == name and what == "cold" and who.startswith("plain GETs, ") and who != PLAIN_GETS
        ]
        for who in [MEMCPY, PLAIN_GETS, *(contender.name for contender in contenders)]:
            cells = {column[0]: made for column in COLUMNS if (made := cell(numbers, name, who, column))}
            for extra in (
                "server cpu",
                "stored",
                "cold load seconds",
                "warm load seconds",
                "cold load cpu",
                "narrow link",
            ):
                value = numbers.median(name, who, extra)
                if value is not None:
                    cells[extra] = {"value": round(value, 3), "unit": UNITS.get(extra, "s")}
            if cells:
                group = everyone[who].group if who in everyone else "floor"
                rows.append({"who": who, "group": group, "cells": cells})
        kinds.append(
            {
                "data": name,
                "file_bytes": data[name].bytes,
                "all_bytes": data[name].all_bytes,
                "whole_model": data[name].whole,
                "plain_gets_gb_per_s": {
                    who.removeprefix("plain GETs, "): round(numbers.median(name, who, "cold") or 0, 3) for who in floors
                },
                "rows": rows,
            }
        )
    proofs = {what: numbers.of(of, who, what)[0] for (of, who, what) in numbers.values if of == "proofs"}
    notes = {who: contender.note for who, contender in everyone.items() if contender.note}
    return {
        **about,
        "one_core_gb_per_s": one_core,
        "kinds": kinds,
        "proofs": proofs,
        "about_contenders": notes,
        "notes": numbers.notes,
    }


# ---- text ------------------------------------------------------------------------------------------------------------


def table(heads: list[str], rows: list[list[str]]) -> str:
    """As Markdown, its columns aligned."""
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) + " |"

    return "\n".join([line(heads), "|" + "|".join("-" * (width + 2) for width in widths) + "|", *map(line, rows)])


def value_of(kind: dict[str, Any], who: str, key: str, field: str = "value") -> float | None:
    for row in kind["rows"]:
        if row["who"] == who and key in row["cells"]:
            found = row["cells"][key].get(field)
            return None if found is None else float(found)
    return None


def main_table(kind: dict[str, Any]) -> str:
    columns = [column for column in COLUMNS if any(column[0] in row["cells"] for row in kind["rows"])]
    heads = ["", *(column[1] for column in columns)]
    reference = ["1.00 is"]
    for _, _, _, against, key_against in columns:
        value = value_of(kind, against, key_against) if against else None
        unit = UNITS.get(key_against, "GB/s")
        reference.append(
            "" if value is None else f"{short(value)} {unit}, {'tmpfs' if against == TMPFS else 'plain GETs'}"
        )
    rows = [reference]
    for row in kind["rows"]:
        words = [row["who"]]
        for key, _, _, against, _ in columns:
            found = row["cells"].get(key)
            words.append("-" if not found else short(found["ratio"] if against else found["value"]))
        rows.append(words)
    return table(heads, rows)


def kinds_table(kinds: list[dict[str, Any]]) -> str:
    names = ("modelfs", "modelfs, open=whole", "modelfs, whole, no codec", "mountpoint-s3", "rclone crypt")
    shown = [who for who in names if any(value_of(kind, who, "cold") for kind in kinds)]
    link = any(row["cells"].get("narrow link") for kind in kinds for row in kind["rows"])
    heads = ["data", "size", "stored / source", "plain GETs, GB/s", *shown, *(["link of 1 Gb/s"] if link else [])]
    rows = []
    for kind in kinds:
        coded = (value_of(kind, who, "stored") for who in ("modelfs", "modelfs, open=whole"))
        stored = next((share for share in coded if share is not None), None)
        rows.append(
            [
                kind["data"],
                f"{kind['file_bytes'] / (1 << 20):.0f} MiB",
                "-" if stored is None else f"{stored:.3f}",
                short(value_of(kind, PLAIN_GETS, "cold")),
                *(short(value_of(kind, who, "cold", "ratio")) for who in shown),
                *([short(value_of(kind, "modelfs, open=whole", "narrow link"))] if link else []),
            ]
        )
    return table(heads, rows)


def models_table(kind: dict[str, Any]) -> str:
    rows = []
    timed = [row for row in kind["rows"] if "cold load seconds" in row["cells"] or "warm load seconds" in row["cells"]]
    plain = [
        row["cells"]["cold load seconds"]["value"]
        for row in timed
        if row["group"] == "plain" and "cold load seconds" in row["cells"]
    ]
    tmpfs = value_of(kind, TMPFS, "warm load seconds")
    for row in timed:
        cold, warm = (row["cells"].get(f"{when} load seconds", {}).get("value") for when in ("cold", "warm"))
        rows.append(
            [
                row["who"],
                short(cold),
                short(cold / min(plain)) if cold and plain else "-",
                short(warm),
                short(warm / tmpfs) if warm and tmpfs else "-",
                short(row["cells"].get("cold load cpu", {}).get("value")),
            ]
        )
    return table(["", "cold, s", "of the best plain", "warm, s", "of tmpfs", "CPU s/GB, cold"], rows)


def text(result: dict[str, Any]) -> str:
    """The whole of what a run prints."""
    kinds = result["kinds"]
    single = [kind for kind in kinds if not kind["whole_model"]]
    out = [opening(result)]
    if result["one_core_gb_per_s"]:
        rates = (f"{what} {short(rate)}" for what, rate in result["one_core_gb_per_s"].items())
        out.append(f"One core, GB/s: {', '.join(rates)}.")
    if single:
        first = single[0]
        out += server_limit(first, result)
        size = first["file_bytes"] / (1 << 20)
        out.append(
            f"{first['data']}, {size:.0f} MiB; ratios of rates, more is better; dashes as below\n\n{main_table(first)}"
        )
    if len(kinds) > 1 or not single:
        heading = "By kind of data: what modelfs stores; cold reads against plain GETs of the plain bytes"
        out.append(f"{heading}\n\n{kinds_table(kinds)}")
    for kind in kinds:
        if kind["whole_model"]:
            size = kind["all_bytes"] / 1e9
            out.append(f"The whole model, {size:.2f} GB in shards, to torch by transformers\n\n{models_table(kind)}")
    if "bytes read" in result["proofs"]:
        read, spent = result["proofs"]["bytes read"] / 1e9, result["proofs"]["daemon cpu"]
        out.append(f"While {read:.1f} GB are read warm, the daemon of modelfs uses {spent:.2f} s of processor time.")
    out.append("\n".join(f"- {who}: {note}" for who, note in result["about_contenders"].items()))
    out.append(
        "- a dash: tmpfs and what loads from it are never cold; loaders that are no mounts load and do nothing else\n"
        "- memory: of a mount, daemon, page cache and shared memory together beyond the file's size; of a loader, its\n"
        "  process beyond its tensors\n"
        "- client CPU: the reading or loading process and everything below it but the server"
    )
    if result["notes"]:
        out.append("\n".join(f"- {note}" for note in result["notes"]))
    return "\n\n".join(out)


def opening(result: dict[str, Any]) -> str:
    about = result["machine"]
    model = f"{about['cpu']} (family {about['cpu_family']}, model {about['cpu_model']})"
    kind = "virtual, " if about["virtual"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return (
        f"modelfs against its peers, {result['date']}: {about['cores']} cores of {model}, {kind}"
        f"{about['memory_gib']:.0f} GiB, Linux {about['kernel']}; {result['rounds']} rounds, "
        f"{result['minutes']} minutes.\n"
        f"{versions}."
    )


def server_limit(kind: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """What both servers give to the plainest client, and whether the server is the limit of the cold columns."""
    said = []
    if rates := kind["plain_gets_gb_per_s"]:
        listed = "; ".join(f"{who} {short(rate)}" for who, rate in rates.items())
        said.append(f"Plain range GETs of 8 MiB, thrown away ({result['plain_gets_by']}), GB/s: {listed}.")
    served, spent = value_of(kind, PLAIN_GETS, "server cpu"), value_of(kind, PLAIN_GETS, "cpu")
    if served and spent:
        cores = result["machine"]["cores"]
        said.append(
            f"The S3 server spends {short(served)} and the plainest client {short(spent)} processor seconds a GB, on "
            f"the same {cores} cores:\nnobody gets more than {short(cores / (served + spent))} GB/s from it here, "
            f"and who spends s seconds a GB no more than {cores} / ({short(served)} + s)."
        )
    return said


def as_json(result: dict[str, Any]) -> str:
    """Indented, and the values of the rounds on one line each."""
    indented = json.dumps(result, indent=1, ensure_ascii=False)
    return re.sub(r"\[\s+([-\d.,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", indented) + "\n"


# ---- the chart -------------------------------------------------------------------------------------------------------

WIDTH, LEFT, BAR, GAP = 800, 230, 18, 6
# The table has them; in the chart they would hide the others.
NOT_IN_CHART = (MEMCPY, "modelfs, open=lazy", "modelfs, whole, no codec")

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
  .title { font-weight: 600; font-size: 15px; } .small { font-size: 11px; fill: #59636e; }
  .modelfs { fill: #0969da; } .encrypts { fill: #bc4c00; } .plain { fill: #8c959f; } .memory, .floor { fill: #c8d1da; }
  .line { stroke: #59636e; stroke-dasharray: 3 3; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; } .small { fill: #9198a1; } .modelfs { fill: #4493f8; } .encrypts { fill: #db6d28; }
    .plain { fill: #6e7681; } .memory, .floor { fill: #484f58; } .line { stroke: #9198a1; }
  }
"""


def panel(
    top: float, title: str, under: str, bars: list[tuple[str, str, float, str]], line: float | None
) -> tuple[list[str], float]:
    """One group of bars from `top` down: name, group, length and label each; `line` is where 1.00 stands."""
    most = max([length for *_, length, _ in bars] + ([line] if line else []))
    scale = (WIDTH - LEFT - 90) / most
    out = [
        f'<text class="title" x="16" y="{top + 16:.0f}">{escape(title)}</text>',
        f'<text class="small" x="16" y="{top + 34:.0f}">{escape(under)}</text>',
    ]
    y = top + 46
    first = y
    for who, group, length, label in bars:
        out.append(f'<text x="{LEFT - 8}" y="{y + 14:.0f}" text-anchor="end">{escape(who)}</text>')
        out.append(
            f'<rect class="{group}" x="{LEFT}" y="{y:.0f}" width="{max(1, length * scale):.1f}" height="{BAR}" rx="2"/>'
        )
        out.append(f'<text x="{LEFT + max(1.0, length * scale) + 6:.1f}" y="{y + 14:.0f}">{escape(label)}</text>')
        y += BAR + GAP
    if line:
        x = LEFT + line * scale
        out.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{first - 4:.0f}" y2="{y - 2:.0f}"/>')
    return out, y + 18


def chart(result: dict[str, Any]) -> str:
    """Bars of the first kind of data: cold against plain GETs, warm against tmpfs; and the whole-model loads."""
    parts: list[str] = []
    y = 12.0
    first = next((kind for kind in result["kinds"] if not kind["whole_model"]), None)

    def ratios(kind: dict[str, Any], key: str, leave_out: tuple[str, ...]) -> list[tuple[str, str, float, str]]:
        rows = [
            (row["who"], row["group"], row["cells"][key].get("ratio"))
            for row in kind["rows"]
            if key in row["cells"] and row["who"] not in leave_out
        ]
        return sorted(
            ((who, group, ratio, short(ratio)) for who, group, ratio in rows if ratio), key=lambda bar: -bar[2]
        )

    if first and (bars := ratios(first, "cold", NOT_IN_CHART)):
        rate = short(value_of(first, PLAIN_GETS, "cold"))
        more, y = panel(
            y,
            "Cold read from S3",
            f"{first['data']}; 1.00 = the plain file by parallel range GETs, thrown away ({rate} GB/s)",
            bars,
            1.0,
        )
        parts += more
    if first and (bars := ratios(first, "mmap", NOT_IN_CHART)):
        rate = short(value_of(first, TMPFS, "mmap"))
        more, y = panel(y, "Warm, through mmap", f"1.00 = an ordinary tmpfs ({rate} GB/s)", bars, 1.0)
        parts += more
    model = next((kind for kind in result["kinds"] if kind["whole_model"]), None)
    if model:
        bars = []
        for row in model["rows"]:
            for when in ("cold", "warm"):
                seconds = row["cells"].get(f"{when} load seconds", {}).get("value")
                if seconds:
                    bars.append((f"{row['who']}, {when}", row["group"], seconds, f"{short(seconds)} s"))
        if bars:
            bars.sort(key=lambda bar: bar[2])
            size = f"{model['all_bytes'] / 1e9:.1f} GB of bf16"
            under = f"{size} from S3 (cold) or from memory (warm) to torch; seconds, less is better"
            more, y = panel(y, "A whole model by transformers", under, bars, None)
            parts += more
    about = result["machine"]
    legend = [
        ("modelfs", "modelfs (encrypted, verified)"),
        ("encrypts", "others that encrypt"),
        ("plain", "without encryption"),
        ("floor", "floors, memory"),
    ]
    x = 16
    for group, words in legend:
        parts.append(
            f'<rect class="{group}" x="{x}" y="{y:.0f}" width="12" height="12" rx="2"/>'
            f'<text class="small" x="{x + 18}" y="{y + 10:.0f}">{words}</text>'
        )
        x += 36 + len(words) * 6
    cores = f"{about['cores']} cores for client and server together"
    kernel = about["kernel"].split("-")[0]
    words = f"{result['date']}, {cores}, Linux {kernel}, medians of {result['rounds']} rounds; benches/run.sh peers"
    parts.append(f'<text class="small" x="16" y="{y + 32:.0f}">{escape(words)}</text>')
    height = y + 44
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" '
        f'width="{WIDTH}" height="{height:.0f}" role="img">'
        f"<title>modelfs against its peers: cold reads, warm reads, whole models</title><style>{STYLE}</style>\n"
        + "\n".join(parts)
        + "\n</svg>\n"
    )
