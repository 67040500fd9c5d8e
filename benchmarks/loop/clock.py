"""Time of each phase of a step, measured alike in both trainers. Standard library only: it runs in either environment."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Case:
    """One workload, as the two workers read it."""

    name: str
    student: str
    teacher: str
    data: str
    """JSONL with `prompt`, a list of messages, and `response`."""
    rollouts_per_step: int
    max_new_tokens: int
    steps: int
    warmup_steps: int
    """The first of `steps`; not timed."""
    lr: float
    threads: int
    seed: int
    bfloat16: bool = False
    """Products in bfloat16 by autocast; weights stay float32."""
    rows_at_once: int | None = None
    """Of TRL: rows of one forward and backward pass; None takes all rollouts of a step."""


def read_case(path: str) -> Case:
    return Case(**json.loads(Path(path).read_text()))


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """One optimizer step. Seconds are of the wall clock and of the processor; `phases` do not overlap."""

    wall: float
    cpu: float
    phases: dict[str, tuple[float, float]]
    rollouts: int
    tokens: int
    """Response tokens sampled and trained on, EOS included."""
    loss: float
    """Mean reverse KL, nats per response token."""
    facts: dict[str, float]


class StepClock:
    """Splits each step into phases; time inside a nested phase counts for the inner one alone."""

    def __init__(self) -> None:
        self.steps: list[StepTimes] = []
        self._open: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Forget what has been timed since the last step."""
        self._began = self._mark = _now()
        self._phases: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))

    def _charge(self) -> None:
        now = _now()
        if self._open:
            wall, cpu = self._phases[self._open[-1]]
            self._phases[self._open[-1]] = (wall + now[0] - self._mark[0], cpu + now[1] - self._mark[1])
        self._mark = now

    @property
    def running(self) -> str:
        """The phase that is timed now."""
        return self._open[-1] if self._open else "update"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, its time charged to the phase `name`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return function(*args, **kwargs)

        return timed

    def step(self, *, rollouts: int, tokens: int, loss: float, **facts: float) -> None:
        """The step has ended; whatever no phase claimed is the update."""
        now = _now()
        wall, cpu = now[0] - self._began[0], now[1] - self._began[1]
        phases = dict(self._phases)
        phases["update"] = (wall - sum(w for w, _ in phases.values()), cpu - sum(c for _, c in phases.values()))
        self.steps.append(
            StepTimes(wall=wall, cpu=cpu, phases=phases, rollouts=rollouts, tokens=tokens, loss=loss, facts=facts)
        )
        self.restart()

    def write(self, path: str, *, prompts: Sequence[Sequence[int]], versions: dict[str, str], **facts: Any) -> None:
        """Writes the JSON for the parent process. `prompts` are all prompt ids, in the order they were used."""
        digest = blake2b(repr([list(p) for p in prompts]).encode(), digest_size=8).hexdigest()
        result = {"steps": [asdict(s) for s in self.steps], "prompts": digest, "versions": versions, **facts}
        Path(path).write_text(json.dumps(result))


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()
