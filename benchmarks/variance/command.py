"""Variance of one rollout's gradient, for each estimator of the same divergence, and for a reward.

`python -m benchmarks gradient_variance` works out mean and variance by enumeration (every response, its probability, its gradient by
`Objective.per_token`) and again by simulation (responses drawn, gradients by the fused `linear_objective` that the trainer calls), in
float64, and writes benchmarks/results/gradient_variance.{csv,md}. Two problems: the single position of 50 tokens of the loss tables, and
whole responses of 3 tokens out of 6, where the prefix is drawn too. The parameters are the student's logits after every prefix state.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import RESULTS, markdown
from benchmarks.losses import command as losses
from opd.kernels import PolicyTerm, linear_objective
from opd.losses import Objective, gather_logp, policy_gradient_loss, to_logp
from opd.types import DenseTarget

DRAWS, CHUNK = 100_000, 10_000
SAMPLED = Objective(support="sampled", estimator="k1", delivery="advantage")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Responses of a fixed length; what comes next depends on the place and on the token before it."""

    name: str
    student: Tensor
    """Logits [states, vocab]: one state for the first place, then `vocab` for each further one."""
    teacher: Tensor
    """Log-probs [states, vocab]."""
    length: int
    top_k: int
    """Of the methods that see the teacher's likeliest tokens."""

    @property
    def vocab(self) -> int:
        return self.student.shape[1]

    def states(self, responses: Tensor) -> Tensor:
        """State at each place [responses, length] of responses of the same shape."""
        later = 1 + torch.arange(self.length - 1) * self.vocab + responses[:, :-1]
        return torch.cat([torch.zeros_like(responses[:, :1]), later], dim=1)

    def logp(self, responses: Tensor) -> Tensor:
        """The student's log-probability [responses] of each."""
        return to_logp(self.student)[self.states(responses), responses].sum(1)

    def every_response(self) -> Tensor:
        return torch.tensor(list(product(range(self.vocab), repeat=self.length)))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Responses [count, length] of the student."""
        p = to_logp(self.student).exp()
        drawn = torch.zeros(count, self.length, dtype=torch.long)
        for place in range(self.length):
            rows = p[self.states(drawn)[:, place]]
            drawn[:, place] = torch.multinomial(rows, 1, generator=generator).squeeze(1)
        return drawn

    def reward(self, responses: Tensor) -> Tensor:
        """1 for the response that the teacher likes best token by token, else 0; minus its expectation."""
        best = torch.zeros(1, self.length, dtype=torch.long)
        for place in range(self.length):
            best[0, place] = self.teacher[self.states(best)[0, place]].argmax()
        return (responses == best).all(1).double() - self.logp(best).exp()


def problems() -> tuple[Problem, Problem]:
    """The position of the loss tables, and short responses of which all can be listed."""
    logits, teacher = losses.problem()
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(2, 13, 6, generator=generator, dtype=torch.float64)
    mixed = to_logp(1.5 * noise[0])
    return (
        Problem(name="one position, 50 tokens", student=logits, teacher=teacher, length=1, top_k=losses.TOP_K),
        Problem(name="3 places, 6 tokens", student=mixed + 0.8 * noise[1], teacher=mixed, length=3, top_k=2),
    )


@dataclass(frozen=True, kw_only=True)
class Method:
    """`objective` None is a reward alone."""

    name: str
    objective: Objective | None

    @property
    def discount(self) -> float:
        return 0.0 if self.objective is None else self.objective.discount


def methods(problem: Problem) -> list[Method]:
    few = Objective(support="teacher_top_k", top_k=problem.top_k)
    baseline = replace(SAMPLED, baseline="value")
    found = [
        Method(name="exact", objective=Objective()),
        Method(name=f"top-{problem.top_k} + bucket", objective=replace(few, tail="bucket")),
        Method(name=f"top-{problem.top_k} + sampled tail", objective=replace(few, tail="sampled")),
        Method(name="sampled", objective=SAMPLED),
        Method(name="sampled + baseline", objective=baseline),
    ]
    if problem.length > 1:
        found += [
            Method(name="sampled, discount 1", objective=replace(SAMPLED, discount=1.0)),
            Method(name="sampled + baseline, discount 1", objective=replace(baseline, discount=1.0)),
        ]
    return [*found, Method(name="reward − its mean", objective=None)]


def rollout_gradients(problem: Problem, method: Method, responses: Tensor, *, fused: bool) -> Tensor:
    """d loss / d logits of every response by itself [responses, states · vocab]: by definition, or by the fused loss."""
    states = problem.states(responses)
    ids = responses.flatten()
    rows = problem.student[states.flatten()].clone().requires_grad_()
    target = DenseTarget(logits=problem.teacher[states.flatten()])
    sequence = torch.arange(len(responses)).repeat_interleave(problem.length)
    advantages = problem.reward(responses).repeat_interleave(problem.length)
    if fused:
        total, _, _ = linear_objective(
            rows,
            torch.eye(problem.vocab, dtype=rows.dtype),
            None if method.objective is None else target,
            ids,
            method.objective or Objective(),
            token_weights=torch.ones(len(ids), dtype=rows.dtype),
            policy=PolicyTerm(advantages=advantages) if method.objective is None else None,
            sequence_index=sequence,
        )
    elif method.objective is None:
        total = policy_gradient_loss(gather_logp(to_logp(rows), ids), advantages).sum()
    else:
        total = method.objective.per_token(rows, target, ids, sequence_index=sequence).loss.sum()
    (slopes,) = torch.autograd.grad(total, rows)
    found = torch.zeros(len(responses), *problem.student.shape, dtype=rows.dtype)
    found[sequence, states.flatten()] = slopes
    return found.flatten(1)


def wanted_gradient(problem: Problem, method: Method) -> Tensor:
    """Gradient that the method's mean should equal: of the reverse KL summed over the places of the student's own prefixes, which are held fixed
    (discount 0), of the reverse KL of whole responses (discount 1), or of minus the expected reward. By autograd of the sum itself."""
    responses = problem.every_response()
    student = problem.student.clone().requires_grad_()
    states = problem.states(responses)
    logp = to_logp(student)
    of_responses = logp[states, responses].sum(1)
    if method.objective is None:
        loss = -(of_responses.exp() * problem.reward(responses)).sum()
    elif method.discount == 1:
        loss = (of_responses.exp() * (of_responses - problem.teacher[states, responses].sum(1))).sum()
    else:
        kl = (logp.exp() * (logp - problem.teacher)).sum(1)
        loss = (of_responses.detach().exp() * kl[states].sum(1)).sum()
    return torch.autograd.grad(loss, student)[0].flatten()


@dataclass(frozen=True, kw_only=True)
class Moments:
    mean: Tensor
    variance: float
    """tr Σ: of all coordinates together."""
    variance_error: float
    """Standard deviation of `variance` over repetitions with this many draws."""


def enumerated(problem: Problem, method: Method, draws: int) -> Moments:
    """Exact moments, and the standard error that a simulation of `draws` rollouts has."""
    responses = problem.every_response()
    p = problem.logp(responses).exp()
    gradients = rollout_gradients(problem, method, responses, fused=False)
    mean = p @ gradients
    squared = (gradients - mean).square().sum(1)
    variance = float(p @ squared)
    return Moments(
        mean=mean, variance=variance, variance_error=math.sqrt(float(p @ (squared - variance).square()) / draws)
    )


def simulated(problem: Problem, method: Method, draws: int, seed: int = 0) -> Moments:
    """The same of drawn rollouts."""
    generator = torch.Generator().manual_seed(seed)
    count, total = 0, torch.zeros(problem.student.numel(), dtype=torch.float64)
    squares = torch.zeros((), dtype=torch.float64)
    fourth = torch.zeros((), dtype=torch.float64)
    origin = wanted_gradient(problem, method)  # near the mean, so that nothing cancels
    while count < draws:
        responses = problem.draw(min(CHUNK, draws - count), generator)
        away = rollout_gradients(problem, method, responses, fused=True) - origin
        size = away.square().sum(1)
        total, squares, fourth = total + away.sum(0), squares + size.sum(), fourth + size.square().sum()
        count += len(responses)
    shift = total / count
    spread = float(fourth / count - (squares / count).square())
    return Moments(
        mean=origin + shift,
        variance=float(squares / count - shift.square().sum()) * count / (count - 1),
        variance_error=math.sqrt(max(0.0, spread) / count),
    )


def measure(problem: Problem, draws: int) -> list[dict[str, object]]:
    """One row per method."""
    rows: list[dict[str, object]] = []
    for method in methods(problem):
        exact, drawn = enumerated(problem, method, draws), simulated(problem, method, draws)
        wanted = wanted_gradient(problem, method)
        rows.append(
            {
                "problem": problem.name,
                "method": method.name,
                "gradient_norm": float(exact.mean.norm()),
                "relative_bias": float((exact.mean - wanted).norm() / wanted.norm()),
                "variance_enumerated": exact.variance,
                "variance_simulated": drawn.variance,
                "standard_error": drawn.variance_error,
                "rollouts_for_snr_1": exact.variance / float(exact.mean.square().sum()),
            }
        )
    return rows


def table(rows: Sequence[dict[str, object]]) -> str:
    """Markdown of one problem's rows."""

    def number(value: object, digits: int = 4) -> str:
        assert isinstance(value, float)
        return "0" if abs(value) < 1e-12 else f"{value:.{digits}f}"

    shown = [
        (
            str(row["method"]),
            number(row["gradient_norm"]),
            number(row["relative_bias"], 2),
            number(row["variance_enumerated"]),
            f"{number(row['variance_simulated'])} ± {number(row['standard_error'])}",
            number(row["rollouts_for_snr_1"], 2),
        )
        for row in rows
    ]
    head = ("method", "\\|E∇\\|", "bias", "tr Σ, enumerated", "tr Σ, simulated", "rollouts for signal = noise")
    return markdown.table(head, shown)


def main(argv: Sequence[str] = ()) -> int:
    """Measure, print and write the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gradient_variance", description=__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS, help="rollouts of each simulation")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    rows = [measure(problem, arguments.draws) for problem in problems()]
    text = [
        "# Variance of one rollout's gradient",
        f"`python -m benchmarks gradient_variance --draws {arguments.draws}`: reverse KL, float64, d / d logits. tr Σ is the variance of all "
        "coordinates together, over rollouts of the student; ± is the simulation's standard error. Bias is the distance of the mean from the "
        "gradient that is wanted, over that one's norm: of the reverse KL (discount 1: of whole responses, prefixes included), or of minus "
        "the expected reward. The last column is tr Σ / |E∇|². The reward is 1 for one response and 0 for all others.",
    ]
    for problem, found in zip(problems(), rows, strict=True):
        text += [f"## {problem.name[0].upper()}{problem.name[1:]}", table(found)]
    written = "\n\n".join(text) + "\n"
    print(written)
    arguments.results.mkdir(parents=True, exist_ok=True)
    (arguments.results / "gradient_variance.md").write_text(written, encoding="utf-8")
    with (arguments.results / "gradient_variance.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0][0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for found in rows for row in found)
    return 0
