"""Charts and tables of a page: inline SVG, no script, no font, colours by the page's style, legible on a phone."""

import re
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 400, 200  # as drawn; a page shows it as wide as there is room
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 10, 34
LABELS = 9  # at most, along an axis
_NUMBER = re.compile(r"([\d.,]+ ?(%|[KMBT]|kB|MB)?)?")

Point = tuple[float, float]


def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], about: str, x_label: str) -> str:
    """Shares of 0 to 1 as bars, those of each name side by side."""
    most = max((value for values in series.values() for value in values), default=0) or 1
    top = _round_up(100 * most)
    width = (WIDTH - LEFT - RIGHT) / max(1, len(names))
    each = 0.84 * width / max(1, len(series))
    parts = [_frame([(part * top / 4, f"{part * top / 4:g}%") for part in range(5)], top)]
    for number, (name, values) in enumerate(series.items()):
        for place, value in enumerate(values):
            height = (HEIGHT - TOP - BOTTOM) * 100 * value / top
            x, y = LEFT + place * width + 0.08 * width + number * each, HEIGHT - BOTTOM - height
            told = escape(f"{names[place]}: {100 * value:.2f}% of {name}")
            shape = f'x="{x:.1f}" y="{y:.1f}" width="{each:.1f}" height="{height:.1f}"'
            parts.append(f'<rect class="s{number}" {shape}><title>{told}</title></rect>' if value else "")
    every = -(-len(names) // LABELS)
    middles = {place: LEFT + (place + 0.5) * width for place in range(0, len(names), every)}
    parts += [_text(x, HEIGHT - BOTTOM + 14, names[place], "middle") for place, x in middles.items()]
    return _svg(parts, about, x_label) + _legend(list(series))


def curve(points: Sequence[Point], about: str, x_label: str, x_ticks: Mapping[float, str], y_ticks: Mapping[float, str]) -> str:
    """A line through points, and ticks at their places; both axes begin at the least tick."""
    x0, x1, y0, y1 = min(x_ticks), max(max(x_ticks), *(x for x, _ in points)), min(y_ticks), max(y_ticks)

    def place(x: float, y: float) -> Point:
        across = (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT)
        return LEFT + across, HEIGHT - BOTTOM - (y - y0) / ((y1 - y0) or 1) * (HEIGHT - TOP - BOTTOM)

    parts = [_frame([(y - y0, name) for y, name in y_ticks.items()], (y1 - y0) or 1)]
    sides = {x1: "end"}  # what is at the edge stays inside
    parts += [_text(place(x, y0)[0], HEIGHT - BOTTOM + 14, name, sides.get(x, "middle")) for x, name in x_ticks.items()]
    parts.append(f'<polyline class="line" points="{" ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)}"/>')
    return _svg(parts, about, x_label)


def strip(parts: Sequence[tuple[str, float]]) -> str:
    """One bar in parts of different shades, with a legend of the shares; the parts are counts."""
    total = sum(count for _, count in parts) or 1
    shown = [(number, name, count) for number, (name, count) in enumerate(parts) if count]
    spans = "".join(
        f'<span class="p{number}" style="width:{100 * count / total:.3f}%" title="{escape(name)}"></span>'
        for number, name, count in shown
    )
    legend = " ".join(
        f'<span class=key><span class="dot p{number}"></span>{escape(name)} {100 * count / total:.1f}%</span>'
        for number, name, count in shown
    )
    return f"<div class=strip>{spans}</div><p class=legend>{legend}</p>"


def share_bar(share: float) -> str:
    """A share as a bar in a table's cell."""
    return f'<span class=bar><span style="width:{100 * min(1.0, share):.2f}%"></span></span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are markup already; columns of numbers stand to the right."""
    right = [bool(rows) and all(_NUMBER.fullmatch(cell) for cell in column) for column in zip(*rows, strict=True)]
    aligned = [" class=share" if each else "" for each in right] or [""] * len(head)
    lines = [
        "".join(f"<{tag}{where}>{cell}</{tag}>" for cell, where in zip(cells, aligned, strict=True))
        for tag, cells in [("th", [escape(name) for name in head]), *(("td", row) for row in rows)]
    ]
    return f"<div class=wide><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def beside(*charts_and_captions: tuple[str, str]) -> str:
    """Figures side by side where there is room, else below each other."""
    made = "".join(f"<figure>{chart}<figcaption>{escape(says)}</figcaption></figure>" for chart, says in charts_and_captions)
    return f"<div class=figures>{made}</div>"


def short(number: int) -> str:
    """1, 64, 1K, 512K, 1M: powers of two and of ten in few characters."""
    for size, sign in ((2**30, "G"), (2**20, "M"), (2**10, "K")):
        if number >= size and number % size == 0:
            return f"{number // size}{sign}"
    for size, sign in ((10**9, "G"), (10**6, "M"), (10**3, "K")):
        if number >= size and number % size == 0:
            return f"{number // size}{sign}"
    return f"{number}"


def _svg(parts: list[str], about: str, x_label: str) -> str:
    label = _text(WIDTH - RIGHT, HEIGHT - 4, x_label, "end")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(about)}">'
    return f"{head}{''.join(parts)}{label}</svg>"


def _frame(ticks: Sequence[tuple[float, str]], top: float) -> str:
    lines = []
    for value, name in ticks:
        y = HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(_text(LEFT - 5, y + 4, name, "end"))
    return "".join(lines)


def _text(x: float, y: float, what: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(what)}</text>'


def _legend(names: list[str]) -> str:
    if len(names) < 2:
        return ""
    keys = (f'<span class=key><span class="dot s{number}"></span>{escape(name)}</span>' for number, name in enumerate(names))
    return f"<p class=legend>{' '.join(keys)}</p>"


def _round_up(value: float) -> float:
    """The least of 1, 2, 4, 8, 10, 20, ... that is at least `value`: a quarter of it is a short number."""
    unit = 1e-3
    while True:
        for step in (1, 2, 4, 8):
            if step * unit >= value:
                return step * unit
        unit *= 10


STYLE = """
svg{width:100%;height:auto;display:block}svg text{font-size:12px;fill:var(--faint)}
.grid{stroke:var(--line)}.line{fill:none;stroke:rgb(var(--shade));stroke-width:2}
.s0{fill:rgb(var(--shade));background:rgb(var(--shade))}.s1{fill:var(--second);background:var(--second)}
:root{--second:#b8640f;--third:#3a7d55;--fourth:#8350a3}
@media(prefers-color-scheme:dark){:root{--second:#e9a04f;--third:#6dbd8d;--fourth:#c39bdb}}
.p0{background:var(--faint)}.p1{background:var(--fourth)}.p2{background:var(--second)}.p3{background:rgb(var(--shade))}
.p4{background:var(--third)}
.strip{display:flex;height:1.25rem;border-radius:.35rem;overflow:hidden;margin:.5rem 0}
.legend{margin:.25rem 0;font-size:.875rem;color:var(--faint)}.key{margin-right:.75rem;white-space:nowrap}
.dot{display:inline-block;width:.7rem;height:.7rem;border-radius:.2rem;margin-right:.3rem}
.bar{display:block;min-width:2.5rem;height:.7rem;margin-top:.45rem;background:var(--chip);border-radius:.2rem;overflow:hidden}
.bar span{display:block;height:100%;background:rgb(var(--shade))}
"""
