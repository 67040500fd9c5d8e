"""Skill against the distance from the original, a point for every model, as an SVG that a diff can show."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from benchmarks.real.recovery.plan import DAMAGED, ORIGINAL, mean
from benchmarks.real.recovery.report import Group
from benchmarks.svg import STYLE, Axis

WIDTH, HEIGHT = 640, 340
LEFT, RIGHT, TOP, BOTTOM = 50, 16, 34, 46
LEGEND_ROW = 18
COLOURS = {
    DAMAGED: "#59636e",
    "opd": "#0072b2",
    "two_teachers": "#009e73",
    "off_policy": "#cc79a7",
    "sft": "#d55e00",
    "mixing": "#e69f00",
}
"""Distillation on own samples in blue and green, learning from the original's answers in red and orange (Okabe and Ito)."""
KL_GOAL, SKILL_GOAL = 0.1, 0.9
SHARES = (0, 20, 40, 60, 80, 100)


def scatter(found: Mapping[str, Group]) -> str:
    """The SVG's text."""
    drawn = {arm: group for arm, group in found.items() if arm != ORIGINAL}
    distances = [mean(row, "reverse_kl") for group in drawn.values() for row in group.rows]
    x = Axis(min(distances) / 1.5, max(distances) * 1.5, LEFT, WIDTH - RIGHT)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT + LEGEND_ROW * len(drawn) + 8}" role="img" '
        'aria-label="Skill against the reverse KL to the original">',
        f"<style>{STYLE}</style>",
        f'<text class="t" x="{LEFT}" y="18">Skill kept, and distance from the original: a point for every seed</text>',
        *_goal(drawn[DAMAGED], x),
    ]
    for tick in x.ticks():
        out.append(
            f'<line x1="{x.at(tick):.1f}" x2="{x.at(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text class="s" text-anchor="middle" x="{x.at(tick):.1f}" y="{HEIGHT - BOTTOM + 15}">{tick:g}</text>'
        )
    for share in SHARES:
        out.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{_height(share):.1f}" y2="{_height(share):.1f}"/>'
            f'<text class="s" text-anchor="end" x="{LEFT - 6}" y="{_height(share) + 4:.1f}">{share} %</text>'
        )
    out.append(
        f'<text class="s" text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}">reverse KL to the original, nats per token '
        "(to the left is nearer)</text>"
    )
    for place, (arm, group) in enumerate(drawn.items()):
        dot = f'r="5" style="fill:{COLOURS[arm]};fill-opacity:.75;stroke:#fff"'
        for row in group.rows:
            out.append(
                f'<circle cx="{x.at(mean(row, "reverse_kl")):.1f}" cy="{_height(100 * row.number("skill")):.1f}" {dot}/>'
            )
        y = HEIGHT + place * LEGEND_ROW
        out.append(
            f'<circle cx="{LEFT + 6}" cy="{y}" {dot}/><text x="{LEFT + 18}" y="{y + 4}">{escape(group.title)}</text>'
        )
    return "\n".join([*out, "</svg>"]) + "\n"


def _goal(damaged: Group, x: Axis) -> list[str]:
    """The corner with at most a tenth of the damaged model's distance and nine tenths of its skill."""
    right = x.at(KL_GOAL * sum(mean(row, "reverse_kl") for row in damaged.rows) / len(damaged.rows))
    below, above = _height(100 * SKILL_GOAL * float(damaged.skill().mean())), _height(SHARES[-1])
    return [
        f'<rect x="{LEFT}" y="{above:.1f}" width="{right - LEFT:.1f}" height="{below - above:.1f}" style="fill:#009e73;fill-opacity:.12"/>',
        f'<text class="s" x="{right + 8:.1f}" y="{(above + below) / 2 + 4:.1f}">the goal</text>',
    ]


def _height(share: float) -> float:
    return HEIGHT - BOTTOM - share / 105 * (HEIGHT - BOTTOM - TOP)
