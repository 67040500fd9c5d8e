"""Differences between runs, with intervals that say what was paired: seeds, prompts, or nothing.

Two evaluations may be compared where their `measure` is the same: it is a hash of the held-out prompts, the reward, and how answers are
drawn. Reverse KL needs the same teacher too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from opd.errors import printable
from opd.reporting.intervals import mean_interval, paired_share_interval, unpaired_interval, welch_interval
from opd.reporting.record import MetricsRecord, SampleRecord
from opd.reporting.runs import Group, Run
from opd.reporting.summary import Interval, column_title

MEASURED_BY = (
    "prompts.eval_path",
    "prompts.eval_split",
    "eval.prompts",
    "eval.samples_per_prompt",
    "eval.temperature",
    "eval.reward",
    "rollout.max_new_tokens",
)
"""Keys of a recipe that decide what an evaluation measures."""
TEACHER_IS = ("model", "revision", "url", "served_model", "source", "ema_decay", "chat_template_kwargs", "load_options")
"""Keys of a teacher that decide which distribution it gives."""
OVER_PROMPTS = "The interval is over the prompts; what another seed would change is not in it."


@dataclass(frozen=True, kw_only=True)
class Difference:
    """`other` minus `base` of one metric, at the student's last evaluations."""

    metric: str
    base: Group
    other: Group
    value: float | None = None
    """None where the two must not be compared; `note` says why."""
    interval: Interval | None = None
    """95 % confidence; None where nothing supports one, and `note` says why."""
    pairs: str = ""
    """Such as "3 seeds" or "256 prompts"; empty where nothing was paired."""
    note: str = ""
    """Sentences."""


def difference(base: Group, other: Group, metric: str) -> Difference | None:
    """None where one side never measured `metric`."""
    runs = [*base.runs, *other.runs]
    steps = compared_steps(runs, metric)
    found = _difference(base, other, metric, steps)
    if found is None or found.value is None or all(run.has_ended for run in runs):
        return found
    step = max(steps.values())
    when = (
        f"At step {step}, the last evaluation that both have."
        if step
        else "Before the first step, the only evaluation that both have."
    )
    return replace(found, note=f"{when} {found.note}".strip())


def _difference(base: Group, other: Group, metric: str, steps: Mapping[str, int]) -> Difference | None:
    values = [_values(group, metric, steps) for group in (base, other)]
    if not all(values):
        return None
    empty = Difference(metric=metric, base=base, other=other)
    shared = sorted(base.seeds.keys() & other.seeds.keys()) if base.is_many and other.is_many else []
    if len(shared) >= 2:
        pairs = [(base.seeds[seed], other.seeds[seed]) for seed in shared]
    else:
        pairs = [(one, two) for one in base.runs for two in other.runs]
    if refusal := next((why for one, two in pairs if (why := why_not_comparable(one, two, metric))), None):
        return replace(empty, note=refusal)
    if len(shared) >= 2:
        return _over_seeds(empty, shared, values[0], values[1])
    value = fmean(values[1].values()) - fmean(values[0].values())
    if base.is_many and other.is_many:
        one, two = (list(side.values()) for side in values)
        interval = welch_interval(one, two) if len(set(one)) > 1 or len(set(two)) > 1 else None
        note = "Unpaired, over the seeds of each: the two groups do not share two seeds."
        return replace(empty, value=value, interval=interval, note=note)
    return _over_prompts(empty, value, steps)


def compared_steps(runs: Sequence[Run], metric: str) -> dict[str, int]:
    """The step at which each run, by its name, is compared: its last evaluation, or the last that all of them have while one has not
    ended. Runs that did not measure `metric` there are left out."""
    if all(run.has_ended for run in runs):
        steps = {run.name: max(run.evaluations, default=-1) for run in runs}
    else:
        shared = set.intersection(*(set(run.evaluations) for run in runs))
        steps = {run.name: max(shared, default=-1) for run in runs}
    found = {run.name: run.evaluations.get(steps[run.name]) for run in runs}
    return {
        name: r.step for name, r in found.items() if r is not None and math.isfinite(r.metrics.get(metric, math.nan))
    }


def spread_interval(values: Sequence[float]) -> Interval | None:
    """The t interval of the mean over seeds; None for one, and for equal values, whose spread of 0 would claim certainty."""
    return mean_interval(values) if len(set(values)) > 1 else None


def why_not_comparable(one: Run, two: Run, metric: str) -> str | None:
    """A sentence when evaluations of the two runs must not be compared, None when they may be."""
    return _other_measure(one, two) or (_other_teacher(one, two) if "reverse_kl" in metric else None)


def metric_title(metric: str) -> str:
    """accuracy, T = 0.5; reverse KL"""
    return "reverse KL" if metric == "reverse_kl" else printable(column_title(metric))


def differing(one: Run, two: Run, keys: Sequence[str]) -> list[str]:
    """Those of the keys whose values differ, each with both."""
    return [
        printable(f"{key} is {one.key(key)} in {one.name} and {two.key(key)} in {two.name}")
        for key in keys
        if one.key(key) != two.key(key)
    ]


def _other_measure(one: Run, two: Run) -> str | None:
    measures = [next((r.measure for r in reversed(run.evaluations.values())), None) for run in (one, two)]
    if measures[0] is not None and measures[0] == measures[1]:
        return None
    changed = differing(one, two, MEASURED_BY)
    if changed:
        return f"The evaluations measure different things: {'; '.join(changed)}."
    if None not in measures:
        return f"{one.name} and {two.name} were evaluated on different held-out prompts or with another reward."
    prompts = [asked_prompts(run) for run in (one, two)]
    shared = prompts[0].keys() & prompts[1].keys()
    if shared and all(prompts[0][key] == prompts[1][key] for key in shared):
        return None
    return (
        f"An older version of opd recorded {one.name if measures[0] is None else two.name}, and no recorded prompt shows that both "
        "were asked the same."
    )


def asked_prompts(run: Run) -> dict[int, str]:
    """Texts of the held-out prompts that were recorded, by their row."""
    asked = [s for s in run.samples if s.phase == "eval" and s.who == "student"]
    return {index if s.prompt_index is None else s.prompt_index: s.prompt for index, s in enumerate(asked)}


def _other_teacher(one: Run, two: Run) -> str | None:
    if one.recipe is None or two.recipe is None:
        return "A run without config.yaml does not say which teacher its reverse KL is to."
    identities = [_teacher_identity(run.recipe or {}) for run in (one, two)]
    if identities[0] == identities[1]:
        if any(key.endswith("source") and value in ("ema", "student") for key, value in identities[0].items()):
            return "Each student is its own teacher, so that the two values of reverse KL are to different models."
        return None
    if _answer_alike(one, two):
        return None
    if _teacher_identity(one.portable) == _teacher_identity(two.portable):
        return "Each run has a teacher in its own folder, and no evaluation shows that the two answer alike."
    keys = sorted({*identities[0], *identities[1]})
    return f"The reverse KL is to different teachers: {'; '.join(differing(one, two, keys))}."


def _teacher_identity(recipe: Mapping[str, object]) -> dict[str, object]:
    found = {}
    for key, value in recipe.items():
        section, *rest = key.split(".")
        name = rest[1:] if section == "teachers" else rest
        if section in ("teacher", "teachers") and name and name[0] in TEACHER_IS:
            found[key] = value
        if section == "mixture" or key in ("prompts.teacher_prompt", "objective.teacher_logp_floor"):
            found[key] = value
        if key.endswith("source") and section.startswith("teacher") and value == "adapter_off":
            found["student.model"] = recipe.get("student.model")
    return found


def _answer_alike(one: Run, two: Run) -> bool:
    """Whether the two teachers, asked the same with the same seed, gave answers of the same reward and length."""
    first, second = one.teacher_evaluation, two.teacher_evaluation
    if first is None or second is None or one.seed != two.seed or one.seed is None or first.measure != second.measure:
        return False
    names = first.metrics.keys() & second.metrics.keys() & {"accuracy", "response_length", "truncated"}
    alike = all(first.metrics[name] == second.metrics[name] for name in names)
    return bool(names) and alike and first.per_prompt.get("accuracy") == second.per_prompt.get("accuracy")


def _values(group: Group, metric: str, steps: Mapping[str, int]) -> dict[str, float]:
    """The compared value of every run that has one, by the run's name."""
    return {run.name: run.evaluations[steps[run.name]].metrics[metric] for run in group.runs if run.name in steps}


def _over_seeds(
    empty: Difference, seeds: Sequence[int], base: Mapping[str, float], other: Mapping[str, float]
) -> Difference:
    runs = [(empty.base.seeds[seed].name, empty.other.seeds[seed].name) for seed in seeds]
    apart = [other[two] - base[one] for one, two in runs if one in base and two in other]
    if not apart:
        return replace(empty, note="No seed has this measurement on both sides.")
    left_out = sorted((empty.base.seeds.keys() | empty.other.seeds.keys()) - set(seeds))
    note = f"Seeds that one side alone has are left out: {', '.join(map(str, left_out))}." if left_out else ""
    interval = spread_interval(apart)
    if interval is None:
        note = f"No interval: the pairs of seeds do not differ from each other. {note}".strip()
    return replace(empty, value=fmean(apart), interval=interval, pairs=f"{len(apart)} seeds", note=note)


def _over_prompts(empty: Difference, value: float, steps: Mapping[str, int]) -> Difference:
    """Between two runs, or a run and the mean over the seeds of a group."""
    groups = (empty.base, empty.other)
    rows = [_rows_of_group(group, empty.metric, steps) for group in groups]
    if all(rows) and rows[0].keys() == rows[1].keys():
        before, after = ([row[key] for key in rows[0]] for row in rows)
        interval = _paired_interval(before, after)
        return replace(empty, value=value, interval=interval, pairs=f"{len(before)} prompts", note=OVER_PROMPTS)
    records = [group.runs[0].evaluations[steps[group.runs[0].name]] for group in groups if not group.is_many]
    bounds = [record.intervals.get(empty.metric) for record in records]
    some = len(rows[0].keys() & rows[1].keys())
    why = (
        f"Unpaired: {some} of the prompts were recorded by both."
        if some
        else "Unpaired: no answers were recorded prompt by prompt."
    )
    if len(bounds) == 2 and all(bound and all(map(math.isfinite, bound)) for bound in bounds):
        one, two = ((record.metrics[empty.metric], record.intervals[empty.metric]) for record in records)
        return replace(empty, value=value, interval=unpaired_interval(one, two), note=f"{why} {OVER_PROMPTS}")
    return replace(
        empty, value=value, note="No interval: there is one seed each, and no value was recorded prompt by prompt."
    )


def _paired_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    if {*before, *after} <= {0.0, 1.0}:
        gained = sum(b == 0 and a == 1 for b, a in zip(before, after, strict=True))
        lost = sum(b == 1 and a == 0 for b, a in zip(before, after, strict=True))
        return paired_share_interval(gained, lost, len(before))
    return mean_interval([a - b for b, a in zip(before, after, strict=True)])


def _rows_of_group(group: Group, metric: str, steps: Mapping[str, int]) -> dict[object, float]:
    """Prompt → the value of the group, where every run of it has all its prompts."""
    rows = [_rows(run, run.evaluations[steps[run.name]], metric) for run in group.runs if run.name in steps]
    keys = rows[0].keys() if rows else set()
    if not rows or any(row.keys() != keys for row in rows):
        return {}
    return {key: fmean(row[key] for row in rows) for key in keys}


def _rows(run: Run, evaluation: MetricsRecord, metric: str) -> dict[object, float]:
    """Prompt → value: from the evaluation, or from the recorded answers where these are all there were."""
    recorded = evaluation.per_prompt.get(metric)
    if recorded is not None:
        return dict(enumerate(recorded))
    values: dict[object, list[float]] = {}
    samples = [s for s in run.samples if s.phase == "eval" and s.who == "student" and s.step == evaluation.step]
    for sample in samples:
        value = _of_sample(sample, metric)
        if value is None:
            return {}
        values.setdefault(sample.prompt if sample.prompt_index is None else sample.prompt_index, []).append(value)
    return {key: fmean(row) for key, row in values.items()} if _all_recorded(run, len(samples)) else {}


def _of_sample(sample: SampleRecord, metric: str) -> float | None:
    if metric == "accuracy":
        return sample.reward
    if metric == "reverse_kl" and sample.reverse_kl:
        return fmean(sample.reverse_kl)
    return None


def _all_recorded(run: Run, samples: int) -> bool:
    """Whether so many answers are all that the evaluation drew, as the recipe tells."""
    kept, prompts, each = (run.key(key) for key in ("log.samples", "eval.prompts", "eval.samples_per_prompt"))
    if not samples or not isinstance(kept, int) or not isinstance(prompts, int) or not isinstance(each, int):
        return False
    return samples < kept or samples == prompts * each
