"""Time against peak memory of every variant, one panel per workload and loss, as an SVG that a diff can show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from benchmarks.kernels.cases import Row, Workload
from benchmarks.kernels.report import SHORT, Summary, Table
from benchmarks.svg import STYLE, Axis

PANELS = {"A": ("reverse_kl", "generalized_jsd"), "B": ("reverse_kl", "generalized_jsd"), "C": ("forward_kl",)}
WIDTH, HEIGHT = 470, 320
LEFT, RIGHT, TOP, BOTTOM = 62, 18, 34, 46
LABEL_HEIGHT, LABEL_GAP, LABEL_DROP = 13, 9, 4  # LABEL_DROP: from a dot's centre to its label's baseline
RADIUS = 4.5
CHARACTER = 6.3  # width of a label's character in pixels, on average
COLOURS = {"products": "#6e7781", "ours": "#0969da", "ours minimal": "#0969da"}
OTHERS = "#bc4c00"


def figure(rows: Sequence[Row], loads: Mapping[str, Workload]) -> str:
    """The SVG's text; empty panels are left out."""
    panels = []
    for name, divergences in PANELS.items():
        if name in loads:
            table = Table(rows, loads[name])
            panels += [(table, d, s) for d in divergences if (s := _points(table, d))]
    columns = 2
    height = math.ceil(len(panels) / columns) * HEIGHT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * WIDTH} {height}" role="img" '
        'aria-label="Processor time and peak memory of the loss from hidden states">',
        f"<style>{STYLE}</style>",
    ]
    for i, (table, divergence, points) in enumerate(panels):
        x, y = i % columns * WIDTH, i // columns * HEIGHT
        lines += [f'<g transform="translate({x},{y})">', *_panel(table, divergence, points), "</g>"]
    return "\n".join([*lines, "</svg>"]) + "\n"


def _points(table: Table, divergence: str) -> list[Summary]:
    names = {s.variant for s in table.summaries() if s.divergence == divergence}
    floor = [] if table.floor is None else [table.floor]
    return floor + [s for s in table.summaries() if s.variant in names and s.divergence == divergence and s.valid]


def _panel(table: Table, divergence: str, points: Sequence[Summary]) -> Iterable[str]:
    times, peaks = [s.cpu_ms for s in points], [s.peak_mib for s in points]
    x = Axis(min(times) / 1.15, max(times) * 1.9, LEFT, WIDTH - RIGHT)
    y = Axis(max(min(peaks), 0.01) / 1.5, max(peaks) * 1.5, HEIGHT - BOTTOM, TOP)
    load = table.load
    yield f'<text class="t" x="{LEFT}" y="18">{load.name}, {SHORT[divergence]}: {escape(load.shape)}</text>'
    for tick in x.ticks():
        yield f'<line x1="{x.at(tick):.1f}" x2="{x.at(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        yield f'<text class="s" text-anchor="middle" x="{x.at(tick):.1f}" y="{HEIGHT - BOTTOM + 15}">{tick:g}</text>'
    for tick in y.ticks():
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y.at(tick):.1f}" y2="{y.at(tick):.1f}"/>'
        yield f'<text class="s" text-anchor="end" x="{LEFT - 6}" y="{y.at(tick) + 4:.1f}">{tick:g}</text>'
    middle = (TOP + HEIGHT - BOTTOM) / 2
    yield f'<text class="s" text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}">CPU ms</text>'
    yield f'<text class="s" text-anchor="middle" transform="translate(14,{middle}) rotate(-90)">peak MiB beyond the inputs</text>'
    yield from _marks(table, points, x, y)


def _marks(table: Table, points: Sequence[Summary], x: Axis, y: Axis) -> Iterable[str]:
    """Dots, and labels to their right, moved down where one would cover another or a dot."""
    dots = [(x.at(s.cpu_ms), y.at(s.peak_mib)) for s in points]
    taken = [(px - RADIUS, px + RADIUS, py + LABEL_DROP) for px, py in dots]
    for summary in sorted(points, key=lambda s: -s.peak_mib):
        name = f"{table.load.products} products" if summary.variant == "products" else summary.variant
        colour = COLOURS.get(summary.variant, OTHERS)
        px, py = x.at(summary.cpu_ms), y.at(summary.peak_mib)
        width = CHARACTER * len(name)
        label_x = px + LABEL_GAP if px + LABEL_GAP + width < WIDTH else px - LABEL_GAP - width
        label_y = py + LABEL_DROP
        while any(
            abs(label_y - b) < LABEL_HEIGHT and label_x < end and start < label_x + width for start, end, b in taken
        ):
            label_y += 1
        taken.append((label_x, label_x + width, label_y))
        yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{RADIUS}" fill="{colour}"/>'
        if label_y - py > LABEL_HEIGHT:
            yield f'<line class="a" x1="{px:.1f}" y1="{py:.1f}" x2="{label_x - 2:.1f}" y2="{label_y - LABEL_DROP:.1f}"/>'
        yield f'<text style="fill:{colour}" x="{label_x:.1f}" y="{label_y:.1f}">{escape(name)}</text>'
