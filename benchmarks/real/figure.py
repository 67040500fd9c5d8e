"""The share of the teacher's gain against updates and CPU seconds, as an SVG that a diff can show."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape
from statistics import fmean

from benchmarks.real.curves import rising
from benchmarks.real.report import Group
from benchmarks.real.store import Row
from benchmarks.svg import STYLE, Axis, points

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 34, 46
LEGEND_ROW, LEGEND_COLUMNS = 18, 2
COLOURS = {True: ("#d55e00", "#e69f00", "#882255"), False: ("#0072b2", "#009e73", "#56b4e9", "#cc79a7")}
"""Of reinforcement learning, and of distillation; told apart also without red or green (Okabe and Ito)."""
SHARES = (0.0, 0.25, 0.5, 0.8, 0.9, 1.0)


def curves(found: Sequence[Group]) -> str:
    """The SVG's text: the mean of the seeds of every arm, and the range between the lowest and the highest."""
    measures: list[tuple[str, Callable[[Group], float]]] = [
        ("updates", lambda g: 1.0),
        ("CPU seconds", lambda g: g.seconds),
    ]
    legend = -(-len(found) // LEGEND_COLUMNS) * LEGEND_ROW + 10
    title = "Share of the teacher's gain: mean of the seeds, and the range between the lowest and the highest"
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(measures) * WIDTH} {HEIGHT + legend}" role="img" '
        'aria-label="Share of the teacher\'s gain against updates and CPU seconds">',
        f"<style>{STYLE}</style>",
        f'<text class="t" x="{LEFT}" y="18">{escape(title)}</text>',
    ]
    for place, (name, factor) in enumerate(measures):
        out += [f'<g transform="translate({place * WIDTH},0)">', *_panel(found, name, factor), "</g>"]
    for place, group in enumerate(found):
        x = LEFT + (place % LEGEND_COLUMNS) * len(measures) * WIDTH / LEGEND_COLUMNS
        y = HEIGHT + (place // LEGEND_COLUMNS) * LEGEND_ROW + 8
        out.append(
            f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" style="{_stroke(found, group)};stroke-width:2.5"/>'
        )
        out.append(f'<text x="{x + 28}" y="{y}">{escape(group.title)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def _panel(found: Sequence[Group], name: str, factor: Callable[[Group], float]) -> Iterable[str]:
    last = max(factor(g) * max(len(row.series("rewards")) - 1 for row in g.rows) for g in found)
    x = Axis(min(factor(g) for g in found), last * 1.1, LEFT, WIDTH - RIGHT)
    for tick in x.ticks():
        yield f'<line x1="{x.at(tick):.1f}" x2="{x.at(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        yield f'<text class="s" text-anchor="middle" x="{x.at(tick):.1f}" y="{HEIGHT - BOTTOM + 15}">{tick:g}</text>'
    for share in SHARES:
        yield f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_height(share):.1f}" y2="{_height(share):.1f}"/>'
        yield f'<text class="s" text-anchor="end" x="{LEFT - 6}" y="{_height(share) + 4:.1f}">{share:g}</text>'
    yield f'<text class="s" text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}">{name}</text>'
    for group in found:
        yield from _drawn(
            _stroke(found, group), _colour(found, group), group, lambda update, g=group: x.at(update * factor(g))
        )


def _drawn(stroke: str, colour: str, group: Group, at: Callable[[float], float]) -> Iterable[str]:
    seeds = [shares(row) for row in group.rows]
    updates = range(1, min(map(len, seeds)))
    values = [[seed[update] for seed in seeds] for update in updates]
    over = [(at(u), _height(max(v))) for u, v in zip(updates, values, strict=True)]
    under = [(at(u), _height(min(v))) for u, v in zip(updates, values, strict=True)]
    middle = [(at(u), _height(fmean(v))) for u, v in zip(updates, values, strict=True)]
    yield f'<polygon points="{points([*over, *reversed(under)])}" style="fill:{colour};fill-opacity:.15;stroke:none"/>'
    yield f'<polyline points="{points(middle)}" style="fill:none;{stroke};stroke-width:2"/>'


def shares(row: Row) -> list[float]:
    """By update, from the rising curve of the rewards."""
    base, teacher = row.number("base_accuracy"), row.number("teacher_accuracy")
    return [(value - base) / (teacher - base) for value in rising(row.series("rewards"))]


def _colour(found: Sequence[Group], group: Group) -> str:
    alike = [g.kind for g in found if g.reinforced == group.reinforced]
    colours = COLOURS[group.reinforced]
    return colours[alike.index(group.kind) % len(colours)]


def _stroke(found: Sequence[Group], group: Group) -> str:
    return f"stroke:{_colour(found, group)}" + (";stroke-dasharray:6 3" if group.reinforced else "")


def _height(share: float) -> float:
    return HEIGHT - BOTTOM - max(-0.02, min(1.15, share)) / 1.15 * (HEIGHT - BOTTOM - TOP)
