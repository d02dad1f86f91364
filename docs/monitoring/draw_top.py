"""Draws a frame of `modelfs top` as an SVG: standard input is what it printed, standard output the picture.

    modelfs top /mnt/models --once --color always --size 100x36 | python3 docs/monitoring/draw_top.py >docs/top.svg

Nothing is added and nothing left out: each run of one colour becomes a text, blocks of the map become rectangles of the
same shade. Python's own library is enough.
"""
import html
import re
import sys

CELL_WIDTH, LINE_HEIGHT, MARGIN = 8.4, 18, 12
# The colours of a dark terminal.
COLORS = {
    30: "#1b1f24", 31: "#f85149", 32: "#3fb950", 33: "#d29922", 34: "#58a6ff", 35: "#bc8cff", 36: "#39c5cf", 37: "#b1bac4",
    90: "#6e7681", 91: "#ff7b72", 92: "#56d364", 93: "#e3b341", 94: "#79c0ff", 95: "#d2a8ff", 96: "#56d4dd", 97: "#ffffff",
}
PLAIN = "#c9d1d9"
# Opacity, and where in the line it begins.
BLOCKS = {"█": (1.0, 0.0), "▓": (0.7, 0.0), "▒": (0.45, 0.0), "░": (0.25, 0.0), "▄": (1.0, 0.5)}


def runs(line):
    """(column, text, color, bold) of each run of one style."""
    color, bold, column = PLAIN, False, 0
    for piece in re.split(r"(\x1b\[[0-9;]*m)", line):
        if not piece:
            continue
        if piece.startswith("\x1b"):
            color, bold = PLAIN, False
            for code in (int(code) for code in piece[2:-1].split(";") if code):
                color = COLORS.get(code, color)
                bold = bold or code == 1
            continue
        yield column, piece, color, bold
        column += len(piece)


def draw(lines):
    columns = max((sum(len(text) for _, text, _, _ in runs(line)) for line in lines), default=1)
    width, height = columns * CELL_WIDTH + 2 * MARGIN, len(lines) * LINE_HEIGHT + 2 * MARGIN
    yield (
        f'<svg xml:space="preserve" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" '
        'role="img"><title>modelfs top on a mount that is being read</title>\n'
        "<!-- Drawn by docs/monitoring/draw_top.py from a frame of a real mount; docs/MONITORING.md says how. -->\n"
        "<style>text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre; }</style>\n"
        f'<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n'
    )
    for number, line in enumerate(lines):
        top = MARGIN + number * LINE_HEIGHT
        for column, text, color, bold in runs(line):
            for part in re.finditer(r"([█▓▒░▄])\1*|[^█▓▒░▄]+", text):
                left, shown = MARGIN + (column + part.start()) * CELL_WIDTH, part.group()
                if shown[0] in BLOCKS:
                    opacity, begins = BLOCKS[shown[0]]
                    yield (
                        f'<rect x="{left:.1f}" y="{top + 2 + begins * (LINE_HEIGHT - 4):.1f}" '
                        f'width="{len(shown) * CELL_WIDTH:.1f}" height="{(1 - begins) * (LINE_HEIGHT - 4):.1f}" '
                        f'fill="{color}"' + ("" if opacity == 1 else f' opacity="{opacity}"') + "/>\n"
                    )
                elif shown.strip():
                    lead = len(shown) - len(shown.lstrip())
                    shown = shown.strip()
                    weight = ' font-weight="bold"' if bold else ""
                    # The columns stay columns whatever font there is.
                    yield (
                        f'<text x="{left + lead * CELL_WIDTH:.1f}" y="{top + 13}" fill="{color}"{weight} '
                        f'textLength="{len(shown) * CELL_WIDTH:.1f}" lengthAdjust="spacingAndGlyphs">'
                        f"{html.escape(shown)}</text>\n"
                    )
    yield "</svg>\n"


if __name__ == "__main__":
    frame = sys.stdin.read().rstrip("\n").split("\n")
    if not "".join(frame).strip():
        sys.exit("draw_top.py: nothing came on standard input; give it the output of modelfs top --once --color always")
    sys.stdout.writelines(draw(frame))
