"""Run folders that are read to be compared, and the groups that they make: the seeds of one recipe are one group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, RunFolderError, printable
from opd.reporting.about import About, State, read_about, read_state
from opd.reporting.configuration import parsed
from opd.reporting.files import CONFIG_FILE, explain_os_errors, refuse_other_folders
from opd.reporting.record import MetricsRecord, SampleRecord, comparable, read_metrics, read_samples
from opd.reporting.series import Curves
from opd.reporting.summary import read_summary

NOT_THE_MATHEMATICS = ("run_dir", "log.", "checkpoint.")
"""Keys, and beginnings of keys, of a recipe that change neither what a run learns nor what is measured."""
OWN_FOLDER = "<run_dir>"
MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    name: str
    folder: Path
    recipe: Mapping[str, object] | None
    """By dotted keys; None for a folder without a readable config.yaml."""
    metrics: Sequence[MetricsRecord]
    """Those that may be compared with the last evaluation."""
    samples: Sequence[SampleRecord]
    about: About | None
    state: State | None
    summary: Mapping[str, Any] | None

    @cached_property
    def curves(self) -> Curves:
        return Curves(self.metrics)

    @cached_property
    def evaluations(self) -> dict[int, MetricsRecord]:
        """Evaluations of the student, by the updates completed before each, in that order."""
        found = {r.step: r for r in self.metrics if r.kind == "eval" and r.who == "student"}
        return {step: found[step] for step in sorted(found)}

    @cached_property
    def teacher_evaluation(self) -> MetricsRecord | None:
        return next((r for r in reversed(self.metrics) if r.kind == "eval" and r.who == "teacher"), None)

    @cached_property
    def steps(self) -> int:
        """Updates completed."""
        return max((r.step + 1 for r in self.metrics if r.kind == "step"), default=0)

    @property
    def steps_asked(self) -> int | None:
        asked = self.state.steps if self.state and self.state.steps else self.key("train.steps")
        return asked if isinstance(asked, int) else None

    @property
    def has_ended(self) -> bool:
        """False for a run that goes on, or was interrupted and may be resumed."""
        return self.summary is not None if self.state is None else self.state.name == "finished"

    @property
    def status(self) -> str:
        """One or two words."""
        if self.has_ended:
            return "finished"
        if self.state is None or not self.state.alive:
            return "not finished"
        return self.state.name

    @property
    def seed(self) -> int | None:
        seed = self.key("seed")
        return seed if isinstance(seed, int) else None

    @cached_property
    def totals(self) -> tuple[float | None, float | None]:
        """Response tokens trained on, and seconds of training and evaluation; None where no record has them."""
        tokens = [r.metrics["tokens"] for r in self.metrics if r.kind == "step" and "tokens" in r.metrics]
        seconds = [r.metrics[n] for r in self.metrics for n in ("time/step", "time/eval") if n in r.metrics]
        return (sum(tokens) if tokens else None), (sum(seconds) if seconds else None)

    @cached_property
    def portable(self) -> Mapping[str, object]:
        """The recipe, with paths in the run's own folder as `OWN_FOLDER/…`."""
        own = str(self.key("run_dir") or "").rstrip("/")
        recipe = {key: value for key, value in (self.recipe or {}).items() if key != "run_dir"}
        return {key: _without_own_folder(value, own) for key, value in recipe.items()}

    def key(self, name: str) -> object:
        return None if self.recipe is None else self.recipe.get(name)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs of one recipe that differ in their seed, or one run."""

    mark: str
    """A letter that stands for the group."""
    name: str
    runs: tuple[Run, ...]

    @property
    def seeds(self) -> dict[int, Run]:
        """Empty for a single run of an unknown seed."""
        return {run.seed: run for run in self.runs if run.seed is not None}

    @property
    def is_many(self) -> bool:
        return len(self.runs) > 1

    @property
    def title(self) -> str:
        return f"{self.name} ({len(self.runs)} seeds)" if self.is_many else self.name


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs, in the order given.

    Raises ConfigError for fewer than two and for one folder twice, RunFolderError for a folder that is no run or cannot be read.
    """
    paths = [Path(folder) for folder in folders]
    for path in paths:
        _refuse_other_folders(path)
    places: dict[Path, Path] = {}
    for path in paths:
        place = path.resolve()
        if place in places:
            raise ConfigError(f"{path} and {places[place]} are the same folder. Give every run once.")
        places[place] = path
    if len(paths) < 2:
        raise ConfigError("One run has nothing to be compared with. Give two run folders or more, or use opd report.")
    return [read_run(path, name) for path, name in zip(paths, names_of(list(places)), strict=True)]


def read_run(folder: Path, name: str) -> Run:
    """Read one run folder, finished or not. Raises RunFolderError."""
    return Run(
        name=name,
        folder=folder,
        recipe=_read_recipe(folder),
        metrics=comparable(read_metrics(folder)),
        samples=read_samples(folder),
        about=read_about(folder),
        state=read_state(folder),
        summary=read_summary(folder),
    )


def names_of(places: Sequence[Path]) -> list[str]:
    """The last part of each path, with as many parts before it as tell all of them apart; nothing in them moves a cursor."""
    depth = 1
    deepest = max(len(place.parts) for place in places)
    while depth < deepest and len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return [printable("/".join(place.parts[-depth:])) for place in places]


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs whose recipes differ in the seed alone make one group; two runs of one seed stay apart, as does a run without a recipe."""
    buckets: list[tuple[set[object], list[Run]]] = []
    for run in runs:
        # Two runs of one recipe name the same files, or files of the same name in their own folders.
        marks = set() if run.recipe is None else {mathematics(run.recipe), mathematics(run.portable)}
        known, members = next((bucket for bucket in buckets if bucket[0] & marks), (set[object](), list[Run]()))
        if not members:
            buckets.append((known, members))
        known |= marks
        members.append(run)
    found: list[tuple[Run, ...]] = []
    for _, members in buckets:
        own_seeds = len({run.seed for run in members}) == len(members)
        in_order = tuple(sorted(members, key=lambda run: run.seed or 0))
        found += [in_order] if own_seeds else [(run,) for run in members]
    found.sort(key=lambda members: min(map(runs.index, members)))
    names = [_group_name(members) for members in found]
    names = [name if names.count(name) == 1 else members[0].name for name, members in zip(names, found, strict=True)]
    return [
        Group(mark=MARKS[i] if i < len(MARKS) else str(i + 1), name=name, runs=members)
        for i, (name, members) in enumerate(zip(names, found, strict=True))
    ]


def mathematics(recipe: Mapping[str, object]) -> tuple[tuple[str, str], ...]:
    """The part of a recipe that says what is learnt and measured, without the seed."""
    return tuple(
        sorted((k, repr(v)) for k, v in recipe.items() if k != "seed" and not k.startswith(NOT_THE_MATHEMATICS))
    )


def flat(data: object, prefix: str = "") -> dict[str, object]:
    """Nested sections as dotted keys."""
    if not isinstance(data, Mapping) or not data:
        return {prefix[:-1]: data}
    return {key: value for name, part in data.items() for key, value in flat(part, f"{prefix}{name}.").items()}


def _group_name(members: Sequence[Run]) -> str:
    """What the names of the members share, without the words for a seed at its end."""
    if len(members) == 1:
        return members[0].name
    columns = zip(*(run.name for run in members), strict=False)
    shared = "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)).rstrip("-_. /=")
    for word in ("seed", "s"):
        shorter = shared.removesuffix(word)
        if shorter != shared and shorter[-1:] in "-_. /":
            shared = shorter.rstrip("-_. /")
    return shared or members[0].name


def _refuse_other_folders(folder: Path) -> None:
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise RunFolderError(f"{folder} {what}, and a run is a folder. Give the folder that training wrote its run to.")
    refuse_other_folders(folder)


def _read_recipe(folder: Path) -> dict[str, object] | None:
    path = folder / CONFIG_FILE
    with explain_os_errors("read", path):
        if not path.exists():
            return None
        text = path.read_text("utf-8", errors="replace")
    return flat(recipe) if (recipe := parsed(text)) else None


def _without_own_folder(value: object, own: str) -> object:
    inside = isinstance(value, str) and own and value.startswith(f"{own}/")
    return OWN_FOLDER + str(value)[len(own) :] if inside else value
