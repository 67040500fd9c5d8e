"""Two runs or more, side by side: results, differences, recipes, and what must not be compared. Without the page; see compare_page.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from opd.errors import RunFolderError, printable
from opd.reporting.differences import (
    Difference,
    compared_steps,
    difference,
    spread_interval,
    why_not_comparable,
)
from opd.reporting.record import MetricsRecord
from opd.reporting.runs import NOT_THE_MATHEMATICS, Group, Run, mathematics
from opd.reporting.summary import NO_VALUE, Interval

NOT_SET = "not set"


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One group's numbers: of a group of several seeds, means over the seeds with t intervals. Accuracies are shares."""

    group: Group
    steps: str
    status: str
    metric: Mapping[str, float]
    """Metric of the last evaluation → value."""
    interval: Mapping[str, Interval]
    before: float | None
    """Accuracy before the first step."""
    before_interval: Interval | None
    tokens: float | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RecipeRow:
    """One key of the recipe that differs: its value in every group, and whether that is the default."""

    key: str
    values: tuple[str, ...]
    are_default: tuple[bool, ...]
    matters: bool
    """False for keys that do not change the mathematics."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the terminal and the page say about the groups."""

    groups: tuple[Group, ...]
    results: tuple[ResultRow, ...]
    differences: tuple[Difference, ...]
    """Of every group against the first, metric by metric."""
    recipe: tuple[RecipeRow, ...]
    notes: tuple[str, ...]


def compare(groups: Sequence[Group], defaults: Mapping[str, object] | None = None) -> Comparison:
    """`defaults` are those of the recipe's keys. Raises RunFolderError when no two runs recorded one metric."""
    runs = [run for group in groups for run in group.runs]
    names = [{(r.who, name) for r in run.metrics for name in r.metrics} for run in runs]
    if not any(one & two for one, two in combinations(names, 2)):
        raise RunFolderError(
            f"{' and '.join(run.name for run in runs)} have nothing in common: no metric was recorded by two of them. Give runs that "
            "have recorded at least a step each."
        )
    base, *others = groups
    metrics = _compared_metrics(runs)
    found = [d for other in others for m in metrics if (d := difference(base, other, m)) is not None]
    return Comparison(
        groups=tuple(groups),
        results=tuple(_result(group) for group in groups),
        differences=tuple(found),
        recipe=tuple(_recipe_rows(groups, defaults or {})),
        notes=tuple(_notes(groups, found)),
    )


def _compared_metrics(runs: Sequence[Run]) -> list[str]:
    """Accuracies, then reverse KL, of the evaluations."""
    names = dict.fromkeys(name for run in runs for r in run.evaluations.values() for name in r.metrics)
    first = [name for name in names if name == "accuracy" or name.startswith("accuracy_")]
    return sorted(first, key=lambda name: name != "accuracy") + [n for n in names if n == "reverse_kl"]


def _result(group: Group) -> ResultRow:
    runs, metric, interval = group.runs, {}, {}
    for name in _compared_metrics(runs):
        steps = compared_steps(runs, name)
        measured = [run.evaluations[steps[run.name]] for run in runs if run.name in steps]
        if measured:
            metric[name], bounds = _mean_of(measured, name)
            interval |= {} if bounds is None else {name: bounds}
    starts = [run.evaluations[0] for run in runs if 0 in run.evaluations]
    starts = [record for record in starts if "accuracy" in record.metrics]
    before, before_interval = _mean_of(starts, "accuracy") if starts else (None, None)
    tokens, seconds = zip(*(run.totals for run in runs), strict=True)
    return ResultRow(
        group=group,
        steps=_joined(_steps(run) for run in runs),
        status=_joined(run.status for run in runs),
        metric=metric,
        interval=interval,
        before=before,
        before_interval=before_interval,
        tokens=_mean_of_all(tokens),
        seconds=_mean_of_all(seconds),
    )


def _mean_of_all(values: Sequence[float | None]) -> float | None:
    """None where one of them is not known."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def _mean_of(records: Sequence[MetricsRecord], name: str) -> tuple[float, Interval | None]:
    """Of one run its own interval; of several the t interval over the runs."""
    values = [record.metrics[name] for record in records]
    if len(values) == 1:
        return values[0], records[0].intervals.get(name)
    bounds = spread_interval(values)
    if bounds is not None and name.startswith("accuracy") and all(0 <= value <= 1 for value in values):
        bounds = max(bounds[0], 0.0), min(bounds[1], 1.0)
    return fmean(values), bounds


def _steps(run: Run) -> str:
    asked = run.steps_asked
    return f"{run.steps:,}" if asked is None or asked == run.steps else f"{run.steps:,} of {asked:,}"


def _joined(words: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(words))


def _recipe_rows(groups: Sequence[Group], defaults: Mapping[str, object]) -> list[RecipeRow]:
    known = [[run for run in group.runs if run.recipe is not None] for group in groups]
    keys = dict.fromkeys(key for runs in known for run in runs for key in run.recipe or {})
    # Files of the same name in folders of their own make no difference, nor does one file by two names.
    plain, moved = ([[of(run) for run in runs] for runs in known] for of in (_recipe, lambda run: run.portable))
    rows = []
    for key in keys:
        if key == "run_dir" or any(other.startswith(f"{key}.") for other in keys):  # a section that some runs lack
            continue
        own, portable = (
            [list(dict.fromkeys(_held(recipe, key, defaults) for recipe in recipes)) for recipes in side]
            for side in (plain, moved)
        )
        if min(len({value for values in side for value in values}) for side in (own, portable)) < 2:
            continue
        held = [there if len(there) < len(here) else here for here, there in zip(own, portable, strict=True)]
        default = _default(key, defaults)
        rows.append(
            RecipeRow(
                key=printable(key),
                values=tuple(", ".join(values) or NO_VALUE for values in held),
                are_default=tuple(bool(values) and set(values) == {default} for values in held),
                matters=not key.startswith(NOT_THE_MATHEMATICS),
            )
        )
    return sorted(rows, key=lambda row: (row.key == "seed", not row.matters))


def _recipe(run: Run) -> Mapping[str, object]:
    return run.recipe or {}


def _held(recipe: Mapping[str, object], key: str, defaults: Mapping[str, object]) -> str:
    """The value in a run's recipe, as text; of a key that is younger than the run, its default."""
    if key in recipe:
        return _said(recipe[key])
    parts = key.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts))]
    return NOT_SET if any(name in recipe for name in above) else _default(key, defaults)


def _default(key: str, defaults: Mapping[str, object]) -> str:
    section, *rest = key.split(".")
    name = ".".join(["teacher", *rest[1:]]) if section == "teachers" and len(rest) > 1 else key
    return _said(defaults[name]) if name in defaults else NOT_SET


def _said(value: object) -> str:
    """A value as a recipe would have it."""
    words = {"None": "null", "True": "true", "False": "false"}
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_said, value))}]"
    return printable(value if isinstance(value, str) else words.get(repr(value), repr(value)))


def _notes(groups: Sequence[Group], differences: Sequence[Difference]) -> list[str]:
    runs = [run for group in groups for run in group.runs]
    notes = [
        f"{d.other.mark} and {d.base.mark}, {d.metric.replace('_', ' ')}: not compared. {d.note}"
        for d in differences
        if d.value is None
    ]
    going = [run for run in runs if not run.has_ended]
    if going:
        names = ", ".join(run.name for run in going)
        notes.append(f"Not finished: {names}. Such a run is compared at the last evaluation that both sides have.")
    lengths = {run.steps for run in runs if run.has_ended}
    if len(lengths) > 1:
        notes.append("The runs have different numbers of steps; each is compared at its own last evaluation.")
    versions = {run.name: run.about.versions.get("opd") for run in runs if run.about and run.about.versions.get("opd")}
    if len(set(versions.values())) > 1:
        notes.append(f"Written by different versions of opd: {', '.join(f'{n} by {v}' for n, v in versions.items())}.")
    bare = [run.name for run in runs if run.recipe is None]
    if bare:
        notes.append(f"Without a readable config.yaml: {', '.join(bare)}. Their recipes cannot be compared.")
    for group in groups:
        if any(why_not_comparable(group.runs[0], run, "accuracy") for run in group.runs[1:]):
            notes.append(
                f"The seeds of {group.name} were evaluated on different prompts, so its band holds their spread too."
            )
    by_seed: dict[object, list[str]] = {}
    for group in groups:
        if not group.is_many and group.runs[0].recipe is not None:
            by_seed.setdefault((group.runs[0].seed, mathematics(group.runs[0].recipe)), []).append(group.name)
    notes += [
        f"{' and '.join(same)} have one recipe and one seed; they stay apart."
        for same in by_seed.values()
        if len(same) > 1
    ]
    return [printable(note) for note in dict.fromkeys(notes)]
