"""Accuracy against steps, rollouts and CPU seconds, and the map of step ratios, as SVGs that a diff can show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.convergence.report import Arm, Group, Seconds
from benchmarks.convergence.store import Row
from benchmarks.svg import STYLE, Axis

WIDTH, HEIGHT = 380, 330
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 34, 46
LEGEND_ROW, LEGEND_COLUMNS = 18, 3
COLOURS = ("#e5a100", "#bc4c00", "#8b0000", "#54aeff", "#0a3069", "#1a7f37", "#8250df", "#6e7781", "#bf3989")
SHARES = (0.0, 0.25, 0.5, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Line:
    """One arm; every seed is drawn."""

    group: Group
    colour: str


def curves(found: Sequence[Group], arms: Sequence[Arm], seconds: Seconds) -> str:
    """The SVG's text; arms that are not there are left out."""
    here = [g for arm in arms for g in found if g.arm == arm]
    lines = [Line(g, COLOURS[i % len(COLOURS)]) for i, g in enumerate(here)]
    measures: list[tuple[str, Callable[[Group], float]]] = [
        ("updates", lambda g: 1.0),
        ("rollouts", lambda g: float(g.rollouts)),
        ("CPU seconds", lambda g: seconds[g.cell, g.method, g.optimizer]),
    ]
    legend = math.ceil(len(lines) / LEGEND_COLUMNS) * LEGEND_ROW + 10
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(measures) * WIDTH} {HEIGHT + legend}" role="img" '
        'aria-label="Share of the teacher\'s gain against updates, rollouts and CPU seconds">',
        f"<style>{STYLE}</style>",
    ]
    for i, (name, factor) in enumerate(measures):
        out += [f'<g transform="translate({i * WIDTH},0)">', *_panel(lines, name, factor), "</g>"]
    for i, line in enumerate(lines):
        x = LEFT + (i % LEGEND_COLUMNS) * WIDTH
        y = HEIGHT + (i // LEGEND_COLUMNS) * LEGEND_ROW + 8
        out.append(
            f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" style="stroke:{line.colour};stroke-width:2.5"/>'
        )
        out.append(f'<text x="{x + 28}" y="{y}">{escape(line.group.title)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(lines: Sequence[Line], name: str, factor: Callable[[Group], float]) -> Iterable[str]:
    last = max(factor(line.group) * row.curve.steps[-1] for line in lines for row in line.group.rows)
    first = min(factor(line.group) for line in lines)
    x = Axis(first, last * 1.1, LEFT, WIDTH - RIGHT)
    yield f'<text class="t" x="{LEFT}" y="18">Share of the teacher\'s gain</text>'
    for tick in x.ticks():
        yield f'<line x1="{x.at(tick):.1f}" x2="{x.at(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        if _leading(tick) in "15" or x.high / x.low < 100:
            yield f'<text class="s" text-anchor="middle" x="{x.at(tick):.1f}" y="{HEIGHT - BOTTOM + 15}">{tick:g}</text>'
    for share in SHARES:
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_height(share):.1f}" y2="{_height(share):.1f}"/>'
        yield f'<text class="s" text-anchor="end" x="{LEFT - 6}" y="{_height(share) + 4:.1f}">{share:g}</text>'
    yield f'<text class="s" text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}">{name}</text>'
    for line in lines:
        for row in line.group.rows:
            yield _path(row, line.colour, lambda step, g=line.group: x.at(step * factor(g)))


def _leading(tick: float) -> str:
    return f"{tick:e}"[0]


def _height(share: float) -> float:
    return HEIGHT - BOTTOM - max(-0.02, min(1.05, share)) / 1.05 * (HEIGHT - BOTTOM - TOP)


def _path(row: Row, colour: str, at: Callable[[float], float]) -> str:
    base, span = row.number("base_accuracy"), row.number("teacher_accuracy") - row.number("base_accuracy")
    curve = row.curve
    points = [(at(s), _height((v - base) / span)) for s, v in zip(curve.steps, curve.values, strict=True) if s >= 1]
    line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    return f'<polyline points="{line}" style="fill:none;stroke:{colour};stroke-width:1.3;opacity:.75"/>'


def ratio_map(cells: Sequence[tuple[str, str, str, str, float]]) -> str:
    """(column, row, first line, second line, ratio) of every cell; the darker, the larger the ratio."""
    columns, rows = list(dict.fromkeys(c[0] for c in cells)), list(dict.fromkeys(c[1] for c in cells))
    width, height, left, top = 190, 62, 190, 56
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width * len(columns) + 10} {top + height * len(rows) + 10}" '
        'role="img" aria-label="How many times fewer updates distillation needs than GRPO">',
        f"<style>{STYLE}</style>",
        f'<text class="t" x="{left}" y="18">GRPO\'s updates over distillation\'s, to 80 % of the teacher\'s gain</text>',
    ]
    for i, name in enumerate(columns):
        out.append(
            f'<text class="s" text-anchor="middle" x="{left + (i + 0.5) * width}" y="{top - 8}">{escape(name)}</text>'
        )
    for i, name in enumerate(rows):
        out.append(
            f'<text class="s" text-anchor="end" x="{left - 8}" y="{top + (i + 0.5) * height + 4}">{escape(name)}</text>'
        )
    for column, row, first, second, value in cells:
        x, y = left + columns.index(column) * width, top + rows.index(row) * height
        shade = 0.08 + 0.6 * min(1.0, max(0.0, math.log(max(value, 1.0)) / math.log(30)))
        out.append(
            f'<rect x="{x + 2}" y="{y + 2}" width="{width - 4}" height="{height - 4}" style="fill:#0969da;fill-opacity:{shade:.2f}"/>'
        )
        out.append(f'<text class="t" text-anchor="middle" x="{x + width / 2}" y="{y + 27}">{escape(first)}</text>')
        out.append(f'<text class="s" text-anchor="middle" x="{x + width / 2}" y="{y + 45}">{escape(second)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"
