"""Cases of the kernel benchmark: shapes, variants, and one CSV row per process. Imports nothing heavy."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

MIB = 1 << 20
FLOAT_BYTES = 4
FLOOR_CHUNKS = (64, 128, 256, 512)
"""Token chunks at which the bare products are timed, next to the chunk that ours uses and to all tokens at once."""
DIVERGENCES = ("reverse_kl", "forward_kl", "generalized_jsd")
PEER_DIVERGENCES = ("reverse_kl", "generalized_jsd")
SMALL_CHUNK = 128
"""Chunk of the peers that have a chunk option, measured besides their default."""
PEERS = ("TRL GKD", "TRL chunked", "Liger eager", "Liger compiled", "verl top-k", "verl top-k chunked")


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One shape, and how often it is measured."""

    name: str
    tokens: int
    hidden: int
    teacher_hidden: int
    vocab: int
    top_k: int | None = None
    """The teacher supplies this many log-probabilities per token; None: its hidden states and head."""
    chunk: int = 0
    """Token chunk of ours. 0: what it takes when it is not told, filled in before anything is measured."""
    reps: int
    rounds: int

    @property
    def products(self) -> int:
        """Matrix products that cannot be avoided: student logits, teacher logits, and two gradients."""
        return 4 if self.top_k is None else 3

    @property
    def weight_grad_mib(self) -> float:
        return self.vocab * self.hidden * FLOAT_BYTES / MIB

    def chunk_mib(self, chunk: int) -> float:
        """The logits of one chunk of tokens, of every model whose logits are computed."""
        return (self.products - 2) * chunk * self.vocab * FLOAT_BYTES / MIB

    def with_chunk(self, chunk: int) -> Workload:
        """In chunks of at most so many tokens, and, like ours, even ones, in multiples of 8."""
        even = math.ceil(self.tokens / math.ceil(self.tokens / chunk))
        return replace(self, chunk=min(chunk, math.ceil(even / 8) * 8))

    @property
    def shape(self) -> str:
        if self.top_k is not None:
            return f"N={self.tokens}, H={self.hidden}, V={self.vocab}, top {self.top_k}"
        return f"N={self.tokens}, H={self.hidden}, Hₜ={self.teacher_hidden}, V={self.vocab}"


WORKLOADS = {
    w.name: w
    for w in (
        Workload(name="A", tokens=512, hidden=256, teacher_hidden=256, vocab=32_000, reps=5, rounds=5),
        Workload(name="B", tokens=512, hidden=512, teacher_hidden=1024, vocab=151_936, reps=2, rounds=3),
        Workload(name="C", tokens=512, hidden=256, teacher_hidden=256, vocab=32_000, top_k=64, reps=8, rounds=5),
    )
}
QUICK = {
    w.name: w
    for w in (
        replace(load, chunk=16, reps=2, rounds=1)
        for load in (
            replace(WORKLOADS["A"], tokens=64, hidden=32, teacher_hidden=32, vocab=2000),
            replace(WORKLOADS["B"], tokens=48, hidden=16, teacher_hidden=32, vocab=3001),
            replace(WORKLOADS["C"], tokens=64, hidden=32, teacher_hidden=32, vocab=2000, top_k=8),
        )
    )
}


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to compute a loss with its gradients, or the products alone."""

    name: str
    divergence: str = ""
    chunk: int | None = None
    """None: the implementation's own default, or no chunks at all."""

    @property
    def compiles(self) -> bool:
        """torch.compile runs in its first call."""
        return self.name == "Liger compiled"

    @property
    def reference(self) -> str:
        """The divergence whose float64 gradients it must match; the bare products have none."""
        return "forward_kl_on_k" if self.name in ("verl top-k", "verl top-k chunked") else self.divergence


def variants(load: Workload, *, peers: bool) -> list[Variant]:
    """Everything that is measured at this workload."""
    floor_chunks = sorted({c for c in FLOOR_CHUNKS if c < load.tokens} | {load.chunk, load.tokens})
    found = [Variant(name="products", chunk=chunk) for chunk in floor_chunks]
    if load.top_k is not None:
        found += [
            Variant(name="ours", divergence="forward_kl", chunk=load.chunk),
            Variant(name="naive", divergence="forward_kl"),
        ]
        if peers:
            found += [Variant(name="verl top-k", divergence="forward_kl")]
            found += [Variant(name="verl top-k chunked", divergence="forward_kl", chunk=c) for c in (None, SMALL_CHUNK)]
        return found
    for divergence in DIVERGENCES:
        found.append(Variant(name="ours", divergence=divergence, chunk=load.chunk))
        found.append(Variant(name="ours minimal", divergence=divergence))
        found.append(Variant(name="naive", divergence=divergence))
    for divergence in PEER_DIVERGENCES if peers else ():
        found += [Variant(name=name, divergence=divergence) for name in ("TRL GKD", "TRL chunked")]
        found += [
            Variant(name=name, divergence=divergence, chunk=chunk)
            for name in ("Liger eager", "Liger compiled")
            for chunk in (None, SMALL_CHUNK)
        ]
    return found


@dataclass(frozen=True, kw_only=True)
class Task:
    """Work of one process: write the references of a workload, or measure one variant."""

    workload: Workload
    references: str
    """Folder of the float64 gradients, one file per divergence."""
    variant: Variant | None = None
    """None: compute the references."""
    needed: tuple[str, ...] = ()
    """References to compute."""
    check: bool = False
    """Compare the gradients of the last repetition with the reference."""
    threads: int = 1

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def read_task(path: Path) -> Task:
    raw = json.loads(path.read_text())
    raw["workload"] = Workload(**raw["workload"])
    raw["variant"] = raw["variant"] and Variant(**raw["variant"])
    return Task(**raw)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One process. Milliseconds are minima over its repetitions."""

    workload: str
    variant: str
    divergence: str
    chunk: int | None
    round: int
    cpu_ms: float
    wall_ms: float
    peak_mib: float
    loss: float | None
    error_hidden: float | None
    error_weight: float | None
    """Largest difference from the float64 gradient, over that gradient's largest entry; measured in the first round."""
    cpu_ms_all: str
    load: float
    """Load average over the minute before the process began."""
    date: str
    threads: int
    cpu: str
    versions: str

    @property
    def key(self) -> tuple[str, str, str, int | None]:
        return self.workload, self.variant, self.divergence, self.chunk


COLUMNS = tuple(f.name for f in fields(Row))


def row_from_csv(cells: dict[str, str]) -> Row:
    """The inverse of writing `asdict(row)` to a CSV file."""
    parsed: dict[str, Any] = {}
    for column in fields(Row):
        text, kind = cells[column.name], str(column.type)
        if text == "" and "None" in kind:
            parsed[column.name] = None
        else:
            parsed[column.name] = int(text) if "int" in kind else float(text) if "float" in kind else text
    return Row(**parsed)
