"""Tables of the kernel benchmark, and its bars beside the measurements."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import markdown
from benchmarks.kernels.cases import DIVERGENCES, PEER_DIVERGENCES, PEERS, Row, Workload

MAX_ERROR = 1e-4  # of a gradient's largest entry; float32 logits alone make 1e-5 of it
TIME_BARS = {  # of the products' time at the same chunk
    "A": {"reverse_kl": 1.25, "forward_kl": 1.25, "generalized_jsd": 1.5},
    "B": {"reverse_kl": 1.2, "forward_kl": 1.2, "generalized_jsd": 1.35},
    "C": {"forward_kl": 1.15},
}
MEMORY_SLACK = 1.05  # over the weight gradient and the logits of one chunk
MEMORY_BARS_MIB = {"B": 450.0}
MINIMAL_TIME_BAR, MINIMAL_EXTRA_MIB = 2.1, 10.0
SPEED_OVER_GKD = {"reverse_kl": 2.0, "generalized_jsd": 3.5}
MEMORY_OVER_GKD = 5.0
SHORT = {"": "", "reverse_kl": "reverse KL", "forward_kl": "forward KL", "generalized_jsd": "JSD"}


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All processes of one variant, or of the faster of a peer's two chunk sizes."""

    variant: str
    divergence: str
    chunk: int | None
    rows: Sequence[Row]
    others: tuple[int | None, ...] = ()
    """Chunk sizes that were slower."""

    @property
    def cpu_ms(self) -> float:
        return min(row.cpu_ms for row in self.rows)

    @property
    def slowest_ms(self) -> float:
        return max(row.cpu_ms for row in self.rows)

    @property
    def peak_mib(self) -> float:
        return max(row.peak_mib for row in self.rows)

    @property
    def error(self) -> float | None:
        """The worse of the two gradients; None where it was not measured."""
        pairs = [(row.error_hidden, row.error_weight) for row in self.rows]
        known = [value for pair in pairs for value in pair if value is not None]
        return None if not known else max(known)

    @property
    def valid(self) -> bool:
        if self.variant == "products":
            return True
        return self.error is not None and self.error <= MAX_ERROR  # NaN is not

    @property
    def chunk_name(self) -> str:
        if self.variant in ("naive", "TRL GKD", "TRL chunked", "verl top-k", "ours minimal"):
            return ""
        name = "default" if self.chunk is None else str(self.chunk)
        return name + "".join(f" (not {'default' if c is None else c})" for c in self.others)


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One promise; `value` is None when it was not measured, or measured with wrong gradients."""

    workload: str
    claim: str
    value: float | None
    limit: float
    at_most: bool = True
    unit: str = "×"

    @property
    def met(self) -> bool | None:
        if self.value is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    def cells(self) -> list[str]:
        verdict = {True: "met", False: "**missed**", None: "not measured"}[self.met]
        value = "" if self.value is None else f"{_number(self.value)} {self.unit}"
        return [
            self.workload,
            self.claim,
            f"{'≤' if self.at_most else '≥'} {_number(self.limit)} {self.unit}",
            value,
            verdict,
        ]


class Table:
    """The summaries of one workload."""

    def __init__(self, rows: Iterable[Row], load: Workload) -> None:
        self.load = load
        self.groups: dict[tuple[str, str, int | None], list[Row]] = {}
        for row in rows:
            if row.workload == load.name:
                self.groups.setdefault((row.variant, row.divergence, row.chunk), []).append(row)

    def find(
        self, variant: str, divergence: str = "", chunk: int | None = None, *, best: bool = False
    ) -> Summary | None:
        """One variant; with `best`, at whichever of its measured chunk sizes is fastest."""
        found = [
            Summary(variant=v, divergence=d, chunk=c, rows=rows)
            for (v, d, c), rows in self.groups.items()
            if (v, d) == (variant, divergence) and (best or c == chunk)
        ]
        if not found:
            return None
        fastest = min(found, key=lambda s: s.cpu_ms)
        others = tuple(s.chunk for s in found if s is not fastest)
        return Summary(variant=variant, divergence=divergence, chunk=fastest.chunk, rows=fastest.rows, others=others)

    @property
    def floor(self) -> Summary | None:
        """The products at the chunk of ours."""
        return self.find("products", chunk=self.load.chunk)

    def floor_of(self, variant: str) -> Summary | None:
        """The same, except that memory='minimal' cuts the vocabulary instead and takes these tokens all at once."""
        return self.find("products", chunk=self.load.tokens) if variant == "ours minimal" else self.floor

    @property
    def best_floor(self) -> Summary | None:
        return self.find("products", best=True)

    def summaries(self) -> list[Summary]:
        """In the order of the table: products, then by divergence ours, plain and peers."""
        chunks = sorted({c for v, _, c in self.groups if v == "products" and c is not None})
        found = [self.find("products", chunk=c) for c in chunks]
        for divergence in DIVERGENCES:
            found.append(self.find("ours", divergence, best=True))
            found.append(self.find("ours minimal", divergence))
            found.append(self.find("naive", divergence))
            found += [self.find(peer, divergence, best=True) for peer in PEERS]
        return [summary for summary in found if summary is not None]


def report(rows: Sequence[Row], loads: Mapping[str, Workload], command: str, *, toy: bool = False) -> tuple[str, bool]:
    """Markdown, and whether every gradient that was measured is right. Toy shapes are held to no bar."""
    if not rows:
        raise SystemExit("No rows: nothing was measured.")
    tables = [Table(rows, load) for name, load in loads.items() if any(row.workload == name for row in rows)]
    versions = dict(sorted(item.split("=", 1) for row in rows for item in row.versions.split()))
    loads_seen = [row.load for row in rows]
    dates = sorted({row.date for row in rows})
    threads = rows[0].threads
    lines = [
        "# The loss from hidden states, on a CPU",
        "",
        f"`{command}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {threads} thread{'s' if threads > 1 else ''}, "
        f"float32, {rows[0].cpu}, load average {min(loads_seen):.1f} to {max(loads_seen):.1f}, "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "Forward and backward from the hidden states of both models: loss, gradient of the student's hidden states, gradient of its "
        "head. Times are processor time including the kernel's, the minimum over fresh processes and their repetitions; the slowest "
        "process in brackets. Peak is what the first forward and backward adds to the inputs, gradients included.",
        "",
        *([] if toy else _bar_section(tables)),
        *(line for table in tables for line in _section(table)),
        *_comparison(tables),
        *NOTES,
    ]
    wrong = [s for table in tables for s in table.summaries() if not s.valid]
    return "\n".join(lines) + "\n", not wrong


def _bar_section(tables: Sequence[Table]) -> list[str]:
    header = ["workload", "what", "bar", "measured", ""]
    return ["## Bars", "", markdown.table(header, [bar.cells() for bar in bars(tables)], numbers=False), ""]


def bars(tables: Iterable[Table]) -> list[Bar]:
    """Every bar whose workload was run."""
    return [bar for table in tables for bar in (*_own_bars(table), *_minimal_bars(table), *_peer_bars(table))]


def _own_bars(table: Table) -> Iterable[Bar]:
    load = table.load
    for divergence, limit in TIME_BARS[load.name].items():
        ours = table.find("ours", divergence, load.chunk)
        label = f"top-{load.top_k} {SHORT[divergence]}" if load.top_k is not None else SHORT[divergence]
        value = _ratio(ours, table.floor, lambda s: s.cpu_ms)
        yield Bar(workload=load.name, claim=f"{label}: time of {load.products} products", value=value, limit=limit)
        peak = ours.peak_mib if ours is not None and ours.valid else None
        memory = (load.weight_grad_mib + load.chunk_mib(load.chunk)) * MEMORY_SLACK
        claim = f"{label}: peak, {load.weight_grad_mib:.0f} MiB of gradient + {load.chunk_mib(load.chunk):.0f} MiB of logits + 5%"
        if load.name in MEMORY_BARS_MIB:
            memory, claim = MEMORY_BARS_MIB[load.name], f"{label}: peak"
        yield Bar(workload=load.name, claim=claim, value=peak, limit=memory, unit="MiB")


def _minimal_bars(table: Table) -> Iterable[Bar]:
    for divergence in DIVERGENCES if table.load.top_k is None else ():
        ours = table.find("ours minimal", divergence)
        value = _ratio(ours, table.floor_of("ours minimal"), lambda s: s.cpu_ms)
        label = f"{SHORT[divergence]}, memory='minimal'"
        yield Bar(workload=table.load.name, claim=f"{label}: time of 4 products", value=value, limit=MINIMAL_TIME_BAR)
        extra = ours.peak_mib - table.load.weight_grad_mib if ours is not None and ours.valid else None
        claim = f"{label}: peak beyond the head's gradient"
        yield Bar(workload=table.load.name, claim=claim, value=extra, limit=MINIMAL_EXTRA_MIB, unit="MiB")


def _peer_bars(table: Table) -> Iterable[Bar]:
    """Speed over TRL GKD has a bar at A only: at B the products alone leave no room for it."""
    load = table.load
    for divergence in PEER_DIVERGENCES if load.top_k is None else ():
        ours, gkd = table.find("ours", divergence, load.chunk), table.find("TRL GKD", divergence)
        liger = table.find("Liger compiled", divergence, best=True)
        if gkd is None and liger is None:
            continue
        label = SHORT[divergence]
        if load.name == "A":
            value, limit = _ratio(gkd, ours, lambda s: s.cpu_ms), SPEED_OVER_GKD[divergence]
            claim = f"{label}: times faster than TRL GKD"
            yield Bar(workload=load.name, claim=claim, value=value, limit=limit, at_most=False)
        memory = _ratio(gkd, ours, lambda s: s.peak_mib)
        claim = f"{label}: times less memory than TRL GKD"
        yield Bar(workload=load.name, claim=claim, value=memory, limit=MEMORY_OVER_GKD, at_most=False)
        value = _ratio(ours, liger, lambda s: s.cpu_ms)
        yield Bar(workload=load.name, claim=f"{label}: time of Liger compiled", value=value, limit=1.0)


def _ratio(above: Summary | None, below: Summary | None, of: Callable[[Summary], float]) -> float | None:
    if above is None or below is None or not (above.valid and below.valid):
        return None
    return of(above) / of(below)


def _section(table: Table) -> list[str]:
    load, cells = table.load, []
    for summary in table.summaries():
        wrong = summary.error is None or not summary.valid
        error = (
            "" if summary.variant == "products" else "not checked" if summary.error is None else f"{summary.error:.0e}"
        )
        cells.append(
            [
                f"{load.products} products" if summary.variant == "products" else summary.variant,
                SHORT[summary.divergence],
                summary.chunk_name,
                f"{summary.cpu_ms:.0f} [{summary.slowest_ms:.0f}]",
                _times(summary, table.floor_of(summary.variant)),
                _by_round(summary, table.floor_of(summary.variant)),
                _times(summary, table.best_floor),
                f"{summary.peak_mib:.1f}",
                error + (" **wrong**" if wrong and summary.error is not None else ""),
            ]
        )
    losses = {s.divergence: s.rows[0].loss for s in table.summaries() if not s.variant.startswith("verl")}
    said = ", ".join(f"{SHORT[name]} {loss:.3f}" for name, loss in losses.items() if loss is not None)
    header = [
        "variant",
        "loss",
        "chunk",
        "CPU ms",
        "× products",
        "by round",
        "× best products",
        "peak MiB",
        "gradient error",
    ]
    return [
        f"## {load.name}: {load.shape}",
        "",
        f"Chunk of ours {load.chunk}; the head's gradient {load.weight_grad_mib:.1f} MiB, one chunk of logits "
        f"{load.chunk_mib(load.chunk):.1f} MiB. Nats per token: {said}.",
        "",
        markdown.table(header, cells, numbers=False),
        "",
    ]


def _comparison(tables: Iterable[Table]) -> list[str]:
    """Ratios of the other variants' time and memory to ours."""
    cells = []
    for table in tables:
        for other in table.summaries():
            ours = table.find("ours", other.divergence, table.load.chunk)
            if ours is None or other.variant in ("ours", "ours minimal", "products"):
                continue
            ratios = [_ratio(other, ours, lambda s: s.cpu_ms), _ratio(other, ours, lambda s: s.peak_mib)]
            label = f"{other.variant}{f', chunk {other.chunk}' if other.chunk else ''}"
            shown = ["" if ratio is None else f"{ratio:.1f}" for ratio in ratios]
            cells.append([table.load.name, SHORT[other.divergence], label, *shown])
    header = ["workload", "loss", "other", "× time of ours", "× memory of ours"]
    return ["## The others against ours", "", markdown.table(header, cells, numbers=False), ""] if cells else []


def _times(summary: Summary, floor: Summary | None) -> str:
    return "" if floor is None else f"{summary.cpu_ms / floor.cpu_ms:.2f}"


def _by_round(summary: Summary, floor: Summary | None) -> str:
    """Lowest, median and highest ratio to the products of the same round."""
    floors = {} if floor is None else {row.round: row.cpu_ms for row in floor.rows}
    ratios = [row.cpu_ms / floors[row.round] for row in summary.rows if row.round in floors]
    if len(ratios) < 2:
        return ""
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


NOTES = (
    "## How it is measured",
    "",
    "- Variants run in shuffled order, round by round, each in its own process. `× products` divides by the bare products at the chunk "
    "of ours (memory='minimal': all tokens at once), `× best products` by the fastest of all chunks listed; `by round` is the median, lowest and highest ratio within a round.",
    "- The products write student logits, teacher logits, and both gradients from buffers that the chunks share, allocated "
    "once per step, as a loss would. Their logits stand in for the gradient of the logits.",
    "- Peak is VmHWM after the first full step, less VmRSS before it. A step at a toy shape comes first, so that code and lazy imports are "
    "not counted. Liger compiled runs one full step more, uncounted, so that the compiler's memory and time are not.",
    "- Gradient error: largest difference from float64 gradients of the plain loss on the same inputs, over the largest entry. A "
    f"variant above {MAX_ERROR:g} counts for no bar.",
    "- Liger and verl's chunked loss are measured at their own default chunk and at 128; the table has the faster. TRL's tiles are "
    "constants of its module. JSD is the published one, β = ½ and not normalised, as the peers compute it.",
    "- In the peers' favour: TRL GKD gets no labels, whose mask would copy the divergences, and TRL chunked, Liger and verl "
    "get no masked tokens. verl's clamp of log-probabilities at −10 is off: with it the loss is another function. verl's top-k "
    "loss has no tail; its gradients are compared with those of its own definition.",
    "- Inputs: Gaussian hidden states and heads, student logits of standard deviation 4, a teacher that is the student with 10% noise.",
)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
