"""The page of a comparison, one file that needs no other file and no network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd.errors import RunFolderError, printable
from opd.reporting.compare import Comparison
from opd.reporting.compare_answers import MAX_TOKENS, same_prompts
from opd.reporting.compare_charts import COLORS, chart_groups
from opd.reporting.compare_words import (
    MINUS,
    explained,
    intervals_are_over,
    paired_over,
    result_cells,
    signed,
    unit,
    versus,
)
from opd.reporting.differences import Difference, metric_title
from opd.reporting.files import explain_os_errors, write_atomically
from opd.reporting.header import moment
from opd.reporting.page import render_page, slug
from opd.reporting.plots import ChartGroup
from opd.reporting.runs import Group, Run
from opd.reporting.tokens import KL_EDGES, level_labels

OURS = b'<meta name="generator" content="opd compare">'
HEAD = 4096  # bytes; the mark of these pages is in the first lines
BANDS = "Band of a group of seeds: from its lowest to its highest seed, around the mean. Band of a single run: 95% confidence."


@dataclass(frozen=True, kw_only=True)
class Card:
    """What one group is, in words."""

    mark: str
    color: int
    name: str
    models: tuple[str, str] | None
    """Student and teacher, where they differ between the groups."""
    facts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Bar:
    """A difference with its place on an axis, in percent of the width."""

    pair: str
    color: int
    text: str
    over: str
    at: float | None
    """None where nothing can be drawn."""
    low: float | None
    high: float | None
    is_clear: bool
    """Whether the interval excludes zero."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The differences of one metric on an axis of their own."""

    title: str
    unit: str
    better: str
    """Which side is the better one."""
    zero: float
    ticks: tuple[tuple[float, str], ...]
    """Places and labels of round values."""
    bars: tuple[Bar, ...]


def check_place(out: str | Path) -> None:
    """Raise RunFolderError for a place that is a folder, or a file that is no earlier comparison."""
    path = Path(out)
    if path.is_dir():
        raise RunFolderError(
            f"{path} is a folder, and the page is a file. Name one in it, e.g. {path / 'compare.html'}."
        )
    with explain_os_errors("read", path):
        if not path.exists():
            return
        with path.open("rb") as file:
            head = file.read(HEAD)
    if head and OURS not in head:
        raise RunFolderError(
            f"{path} is there already, and opd compare did not write it. Give another place with --out FILE."
        )


def write_page(comparison: Comparison, out: str | Path) -> Path:
    """Write the page to `out`, in place of an older one. Raises RunFolderError."""
    path = Path(out)
    check_place(path)
    page = render(comparison)
    with explain_os_errors("create", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode("utf-8", "replace"))
    return path


def render(comparison: Comparison) -> str:
    """The page as HTML text."""
    groups = comparison.groups
    titles, cells = result_cells(comparison)
    prompts = same_prompts(groups)
    charts = chart_groups(groups, {found.metric for found in comparison.differences if found.value is None})
    answers = {
        "prompts": prompts,
        "groups": [{"mark": g.mark, "name": g.title, "color": i % COLORS} for i, g in enumerate(groups)],
        "limit": MAX_TOKENS,
    }
    return render_page(
        "compare.html.jinja",
        {
            "title": _title(groups),
            "subtitle": _subtitle(groups),
            "cards": [_card(groups, index) for index in range(len(groups))],
            "notes": comparison.notes,
            "column_titles": titles,
            "rows": list(zip([(g.mark, i % COLORS, g.title) for i, g in enumerate(groups)], cells, strict=True)),
            "intervals": intervals_are_over(comparison),
            "base": groups[0],
            "axes": _axes(comparison),
            "explained": explained(comparison),
            "recipe": comparison.recipe,
            "groups": charts,
            "bands": BANDS,
            "legend": level_labels(KL_EDGES),
            "prompts": prompts,
            "answers_data": answers,
            "contents": _contents(comparison, charts, bool(prompts)),
        },
    )


def _contents(comparison: Comparison, charts: Sequence[ChartGroup], answers: bool) -> list[tuple[str, str]]:
    """Id and title of every section."""
    open_ones, closed = (
        [(slug(c.title), c.title) for c in charts if c.collapsed is wanted] for wanted in (False, True)
    )
    found = [("result", "Result")]
    found += [("differences", "Differences")] if comparison.differences else []
    found += [("recipes", "Recipes")] if comparison.recipe else []
    return [*found, *open_ones, *([("answers", "Side by side")] if answers else []), *closed]


def _title(groups: Sequence[Group]) -> str:
    names = [group.name for group in groups]
    if len(names) == 1:
        return f"{names[0]}: {len(groups[0].runs)} seeds"
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) <= 3 else f"{names[0]} and {len(names) - 1} others"


def _subtitle(groups: Sequence[Group]) -> str:
    runs = sum(len(group.runs) for group in groups)
    seeds = any(group.is_many for group in groups)
    count = f"{runs} runs of {len(groups)} recipe{'s' if len(groups) > 1 else ''}" if seeds else f"{runs} runs"
    models = {_models(group.runs[0]) for group in groups}
    shared = models.pop() if len(models) == 1 else None
    return count if shared is None else f"{shared[0]} ← {shared[1]} · {count}"


def _card(groups: Sequence[Group], index: int) -> Card:
    group = groups[index]
    run = group.runs[0]
    models = _models(run) if len({_models(g.runs[0]) for g in groups}) > 1 else None
    seeds = ", ".join(map(str, group.seeds))
    facts = [f"seed{'s' if group.is_many else ''} {seeds}" if seeds else "seed unknown"]
    facts += [f"{run.steps:,} steps" if len({r.steps for r in group.runs}) == 1 else "different numbers of steps"]
    facts += list(dict.fromkeys(r.status for r in group.runs))
    about = run.about
    if about is not None:
        version = about.versions.get("opd")
        facts += [about.objective, about.data, about.device, moment(about.started), f"opd {version}" if version else ""]
        facts += [f"commit {about.commit[:12]}"] if about.commit else []
    facts += [r.name for r in group.runs if r.name != group.name]
    said = tuple(printable(fact) for fact in facts if fact)
    return Card(mark=group.mark, color=index % COLORS, name=group.name, models=models, facts=said)


def _models(run: Run) -> tuple[str, str] | None:
    if run.about is not None and run.about.student:
        return printable(run.about.student), printable(run.about.teacher)
    student, teacher = (
        run.key("student.model"),
        run.key("teacher.model") or run.key("teacher.url") or run.key("teacher.source"),
    )
    return (_short(student), _short(teacher or "several teachers")) if student else None


def _short(model: object) -> str:
    """A hub name, or the last two parts of a path."""
    return printable("/".join(str(model).split("/")[-2:]))


def _axes(comparison: Comparison) -> list[Axis]:
    colors = {group.mark: index % COLORS for index, group in enumerate(comparison.groups)}
    metrics = dict.fromkeys(found.metric for found in comparison.differences)
    return [_axis(metric, [d for d in comparison.differences if d.metric == metric], colors) for metric in metrics]


def _axis(metric: str, found: Sequence[Difference], colors: dict[str, int]) -> Axis:
    values = [v for d in found for v in (d.value, *(d.interval or ())) if v is not None and math.isfinite(v)]
    low, high = min([0.0, *values]), max([0.0, *values])
    margin = 0.06 * (high - low) or 1.0
    low, high = low - margin, high + margin
    place = lambda v: round(100 * (v - low) / (high - low), 3)  # noqa: E731
    bars = []
    for d in found:
        bounds = d.interval if d.interval and all(map(math.isfinite, d.interval)) else None
        bars.append(
            Bar(
                pair=versus(d),
                color=colors[d.other.mark],
                text=signed(d),
                over=paired_over(d),
                at=None if d.value is None else place(d.value),
                low=place(bounds[0]) if bounds else None,
                high=place(bounds[1]) if bounds else None,
                is_clear=bounds is not None and (bounds[0] > 0 or bounds[1] < 0),
            )
        )
    accuracy = metric.startswith("accuracy")
    scale = 100 if accuracy else 1
    return Axis(
        title=metric_title(metric),
        unit=unit(metric),
        better="more is better" if accuracy else "less is better",
        zero=place(0.0),
        ticks=tuple(
            (place(v / scale), f"{v:+g}".replace("-", MINUS) if v else "0")
            for v in _round_values(scale * low, scale * high)
        ),
        bars=tuple(bars),
    )


def _round_values(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten in the range, three to six of them."""
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough)
    return [float(f"{n * step:.6g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
