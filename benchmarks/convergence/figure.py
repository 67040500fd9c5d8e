"""Accuracy against steps, rollouts and CPU seconds, and the map of step ratios, as SVGs that a diff can show."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median

from benchmarks.convergence.report import Arm, Group, Seconds, is_rl
from benchmarks.convergence.store import Row
from benchmarks.svg import STYLE, Axis, points

WIDTH, HEIGHT = 380, 330
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 34, 46
LEGEND_ROW, LEGEND_COLUMNS = 18, 2
COLOURS = ("#e69f00", "#d55e00", "#882255", "#56b4e9", "#0072b2", "#009e73", "#cc79a7", "#6e7781", "#44aa99")
"""Told apart also without red or green (Okabe and Ito); methods of reinforcement learning are dashed besides."""
SHARES = (0.0, 0.25, 0.5, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Line:
    """One arm: the median of its seeds, and the range between the lowest and the highest."""

    group: Group
    colour: str

    @property
    def dash(self) -> str:
        return "stroke-dasharray:6 3" if is_rl(self.group.method) else ""


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
    column = len(measures) * WIDTH / LEGEND_COLUMNS
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(measures) * WIDTH} {HEIGHT + legend}" role="img" '
        'aria-label="Share of the teacher\'s gain against updates, rollouts and CPU seconds">',
        f"<style>{STYLE}</style>",
    ]
    title = "Share of the teacher's gain: median of the seeds, and the range between the lowest and the highest"
    out.append(f'<text class="t" x="{LEFT}" y="18">{escape(title)}</text>')
    for i, (name, factor) in enumerate(measures):
        out += [f'<g transform="translate({i * WIDTH},0)">', *_panel(lines, name, factor), "</g>"]
    for i, line in enumerate(lines):
        x = LEFT + (i % LEGEND_COLUMNS) * column
        y = HEIGHT + (i // LEGEND_COLUMNS) * LEGEND_ROW + 8
        out.append(
            f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" style="stroke:{line.colour};stroke-width:2.5;{line.dash}"/>'
        )
        out.append(f'<text x="{x + 28}" y="{y}">{escape(line.group.title)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(lines: Sequence[Line], name: str, factor: Callable[[Group], float]) -> Iterable[str]:
    last = max(factor(line.group) * row.curve.steps[-1] for line in lines for row in line.group.rows)
    first = min(factor(line.group) for line in lines)
    x = Axis(first, last * 1.1, LEFT, WIDTH - RIGHT)
    for tick in x.ticks():
        yield f'<line x1="{x.at(tick):.1f}" x2="{x.at(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        if _leading(tick) in "15" or x.high / x.low < 100:
            yield f'<text class="s" text-anchor="middle" x="{x.at(tick):.1f}" y="{HEIGHT - BOTTOM + 15}">{tick:g}</text>'
    for share in SHARES:
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_height(share):.1f}" y2="{_height(share):.1f}"/>'
        yield f'<text class="s" text-anchor="end" x="{LEFT - 6}" y="{_height(share) + 4:.1f}">{share:g}</text>'
    yield f'<text class="s" text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}">{name}</text>'
    for line in lines:
        yield from _drawn(line, lambda step, g=line.group: x.at(step * factor(g)))


def _leading(tick: float) -> str:
    return f"{tick:e}"[0]


def _height(share: float) -> float:
    return HEIGHT - BOTTOM - max(-0.02, min(1.05, share)) / 1.05 * (HEIGHT - BOTTOM - TOP)


def _drawn(line: Line, at: Callable[[float], float]) -> Iterable[str]:
    """The range of the seeds as a band, and their median in front of it."""
    steps = sorted({step for row in line.group.rows for step in row.curve.steps if step >= 1})
    shares = [sorted(_share(row, step) for row in line.group.rows) for step in steps]
    places = [at(step) for step in steps]
    around = [(px, _height(seeds[0])) for px, seeds in zip(places, shares, strict=True)]
    around += [(px, _height(seeds[-1])) for px, seeds in reversed(list(zip(places, shares, strict=True)))]
    middle = [(px, _height(median(seeds))) for px, seeds in zip(places, shares, strict=True)]
    yield f'<polygon points="{points(around)}" style="fill:{line.colour};fill-opacity:.15;stroke:none"/>'
    yield f'<polyline points="{points(middle)}" style="fill:none;stroke:{line.colour};stroke-width:2;{line.dash}"/>'


def _share(row: Row, step: float) -> float:
    """Share of the teacher's gain that a seed has at a step; after its last measurement it keeps that."""
    base, span = row.number("base_accuracy"), row.number("teacher_accuracy") - row.number("base_accuracy")
    steps, values = row.curve.steps, row.curve.values
    after = bisect_left(steps, step)
    if after == len(steps):
        return (values[-1] - base) / span
    if steps[after] == step or after == 0:
        return (values[after] - base) / span
    part = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
    return (values[after - 1] + part * (values[after] - values[after - 1]) - base) / span


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
