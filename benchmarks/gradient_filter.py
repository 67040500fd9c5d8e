"""What `gradient_filter` saves and what it costs, on logits with the tail of a trained model.

`python -m benchmarks gradient_filter` trains two small language models on text whose tokens follow Zipf's law, then measures
the fused reverse KL and JSD at several thresholds: time, share of columns kept, and error of both gradients against the unfiltered
ones. It writes benchmarks/results/gradient_filter.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from opd.kernels import linear_divergence
from opd.types import Head, HiddenTarget

RESULTS = Path(__file__).parent / "results"
VOCAB, HIDDEN, CONTEXT, SUCCESSORS = 32_000, 256, 3, 64
TOKENS = 512
THRESHOLDS = (None, 0.0, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Each token has a few likely successors, drawn once by Zipf's law; one time in five anything follows, by Zipf's law."""

    successors: Tensor
    weights: Tensor
    unigram: Tensor

    @classmethod
    def make(cls, generator: torch.Generator) -> Source:
        unigram = 1.0 / torch.arange(1, VOCAB + 1, dtype=torch.float64)
        unigram /= unigram.sum()
        drawn = torch.multinomial(unigram, VOCAB * SUCCESSORS, replacement=True, generator=generator)
        weights = 1.0 / torch.arange(1, SUCCESSORS + 1, dtype=torch.float64)
        return cls(successors=drawn.view(VOCAB, SUCCESSORS), weights=weights / weights.sum(), unigram=unigram)

    def text(self, rows: int, length: int, generator: torch.Generator) -> Tensor:
        """Token ids [rows, length]."""
        token = torch.multinomial(self.unigram, rows, replacement=True, generator=generator)
        columns = [token]
        for _ in range(length - 1):
            rank = torch.multinomial(self.weights, rows, replacement=True, generator=generator)
            anything = torch.multinomial(self.unigram, rows, replacement=True, generator=generator)
            free = torch.rand(rows, generator=generator) < 0.2
            token = torch.where(free, anything, self.successors[token, rank])
            columns.append(token)
        return torch.stack(columns, dim=1)


class Model(nn.Module):
    """The last few tokens' embeddings through two layers, and a head."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.mix = nn.Sequential(nn.Linear(CONTEXT * HIDDEN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN))
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    parameter.normal_(std=0.05, generator=generator)

    def hidden(self, windows: Tensor) -> Tensor:
        """[tokens, CONTEXT] ids → [tokens, HIDDEN]."""
        seen = self.embedding(windows)
        return self.norm(seen[:, -1] + self.mix(seen.flatten(1)))


def windows_of(text: Tensor) -> tuple[Tensor, Tensor]:
    """Every CONTEXT tokens, and the token after them."""
    whole = text.unfold(1, CONTEXT + 1, 1).flatten(0, 1)
    return whole[:, :-1], whole[:, -1]


def train(model: Model, source: Source, steps: int, generator: torch.Generator) -> float:
    """Cross-entropy at the end, nats per token."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        windows, following = windows_of(source.text(16, CONTEXT + 32, generator))
        loss = F.cross_entropy(model.head(model.hidden(windows)), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return statistics.mean(losses[-20:])


@dataclass(frozen=True, kw_only=True)
class Run:
    seconds: float
    divergence: float
    hidden_grad: Tensor
    weight_grad: Tensor


def fused(student: Model, teacher: Model, windows: Tensor, divergence: str, threshold: float | None) -> Run:
    """One forward and backward of the fused loss, in processor time."""
    with torch.no_grad():
        hidden, taught = student.hidden(windows), teacher.hidden(windows)
    hidden.requires_grad_()
    weight = student.head.weight.detach().clone().requires_grad_()
    target = HiddenTarget(hidden=taught, head=Head(weight=teacher.head.weight.detach()))
    began = time.process_time()
    out = linear_divergence(
        hidden,
        weight,
        target,
        divergence=divergence,  # pyright: ignore[reportArgumentType]
        token_weights=torch.full((len(windows),), 1 / len(windows)),
        gradient_filter=threshold,
    )
    out.loss.backward()
    seconds = time.process_time() - began
    assert hidden.grad is not None and weight.grad is not None
    return Run(seconds=seconds, divergence=out.loss.item(), hidden_grad=hidden.grad, weight_grad=weight.grad)


def relative(actual: Tensor, exact: Tensor) -> float:
    return float((actual - exact).norm() / exact.norm())


def measure(student: Model, teacher: Model, windows: Tensor, divergence: str, rounds: int) -> list[str]:
    """Table rows, one per threshold, measured in turn."""
    runs: dict[float | None, list[Run]] = {threshold: [] for threshold in THRESHOLDS}
    for _ in range(rounds):
        for threshold, kept in runs.items():
            kept.append(fused(student, teacher, windows, divergence, threshold))
    exact = runs[None][0]
    fastest = min(run.seconds for run in runs[None])
    lines = []
    for threshold, kept in runs.items():
        columns = (kept[0].weight_grad != 0).any(dim=1).float().mean().item()
        lines.append(
            f"| {divergence} | {'off' if threshold is None else f'{threshold:g}'} "
            f"| {min(run.seconds for run in kept) / fastest:.2f} | {columns:.1%} "
            f"| {relative(kept[0].hidden_grad, exact.hidden_grad):.1e} | {relative(kept[0].weight_grad, exact.weight_grad):.1e} |"
        )
    return lines


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gradient_filter", description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="training steps of the teacher; the student gets half")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    source = Source.make(generator)
    teacher, student = Model(generator), Model(generator)
    losses = train(teacher, source, args.steps, generator), train(student, source, args.steps // 2, generator)
    windows, _ = windows_of(source.text(TOKENS // 32, CONTEXT + 32, generator))
    rows = [
        line
        for name in ("reverse_kl", "generalized_jsd")
        for line in measure(student, teacher, windows, name, args.rounds)
    ]
    apart = fused(student, teacher, windows, "reverse_kl", None).divergence
    text = (
        f"""# Dropping columns with small gradients

`python -m benchmarks gradient_filter --steps {args.steps}`: torch {torch.__version__}, 1 thread, float32, {len(windows)} tokens, hidden size {HIDDEN}, vocabulary {VOCAB}.
Two models trained on Zipfian text (cross-entropy {losses[0]:.2f} and {losses[1]:.2f} nats; reverse KL between them {apart:.3f}).
Time is processor time of forward and backward, over that without a filter; errors are relative norms against no filter.

| divergence | threshold | time | columns kept | error of d hidden | error of d weight |
| --- | --- | --- | --- | --- | --- |
"""
        + "\n".join(rows)
        + "\n"
    )
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "gradient_filter.md").write_text(text, encoding="utf-8")
    print(text)
    return 0
