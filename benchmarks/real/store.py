"""Settings and results of runs as lines of a CSV: what is there is not run again."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol, TypeVar


class Keyed(Protocol):
    """A setting: what it says, as the cells of a CSV."""

    @property
    def key(self) -> tuple[str, ...]: ...


Wanted = TypeVar("Wanted", bound=Keyed)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One call of `opd train`, fully said."""

    cell: str
    arm: str
    """A name of plan.ARMS."""
    optimizer: str
    weights: str
    """full, or loraN with the rank N."""
    lr: float
    """Of natural_gradient the trust region in nats per token."""
    seed: int
    steps: int
    teacher: str = ""
    """The name of the run of this cell and seed whose student teaches; none for reinforcement learning."""

    @property
    def key(self) -> tuple[str, ...]:
        return tuple(str(value) for value in asdict(self).values())

    @property
    def name(self) -> str:
        """Of its folder."""
        return "-".join(part for part in self.key[:-1])


SETTING = tuple(f.name for f in fields(Setting))
RESULTS = (
    "base_accuracy", "teacher_accuracy", "final_accuracy", "rewards", "reverse_kl", "forward_kl", "entropy", "length", "tokens",
    "cpu_seconds", "rollout_seconds", "teacher_seconds", "update_seconds", "peak_gib",
)  # fmt: skip
COLUMNS = (*SETTING, *RESULTS)


@dataclass(frozen=True)
class Row:
    """A finished run, as the CSV has it."""

    values: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.values[name]

    @property
    def setting(self) -> Setting:
        v = self.values
        return Setting(
            cell=v["cell"], arm=v["arm"], optimizer=v["optimizer"], weights=v["weights"], lr=float(v["lr"]), seed=int(v["seed"]),
            steps=int(v["steps"]), teacher=v["teacher"],
        )  # fmt: skip

    def number(self, name: str) -> float:
        return float(self.values[name])

    def series(self, name: str) -> list[float]:
        """One number per update, that of the weights before it."""
        return [float(value) for value in self.values[name].split()]


class Store:
    """The lines of one CSV, whose first columns are `setting`."""

    def __init__(self, path: Path, setting: Sequence[str] = SETTING, results: Sequence[str] = RESULTS) -> None:
        self.path = path
        self.setting = tuple(setting)
        self.columns = (*setting, *results)
        self.rows: dict[tuple[str, ...], Row] = {}
        if path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                for row in map(Row, csv.DictReader(file)):
                    self.rows[self._key(row)] = row

    def _key(self, row: Row) -> tuple[str, ...]:
        return tuple(row[name] for name in self.setting)

    def add(self, row: Row) -> None:
        self.rows[self._key(row)] = row
        new = not self.path.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row.values)

    def of(self, settings: Iterable[Keyed]) -> list[Row]:
        return [self.rows[s.key] for s in settings if s.key in self.rows]

    def missing(self, settings: Iterable[Wanted]) -> list[Wanted]:
        return [s for s in dict.fromkeys(settings) if s.key not in self.rows]


def fill(store: Store, settings: Sequence[Wanted], perform: Callable[[Wanted], Row], workers: int) -> Iterator[Row]:
    """Do what is missing, `workers` runs at a time; each row is written as soon as it is there."""
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(perform, setting) for setting in store.missing(settings)]):
            row = future.result()
            store.add(row)
            yield row
