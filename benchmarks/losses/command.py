"""The tables of src/opd/losses/README.md, by exact enumeration over one distribution of 50 tokens in float64.

`python -m benchmarks losses` measures and writes them; `--check` measures and fails if the README says something else.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks import ROOT, markdown
from opd.losses import (
    Support,
    Tail,
    distillation_advantage,
    entry_terms,
    forward_kl,
    gather_logp,
    generalized_jsd,
    k1,
    k2,
    k3,
    partial_divergence,
    policy_gradient_loss,
    reverse_kl,
    to_logp,
    top_k_support,
    union_support,
    value_baseline,
)
from opd.losses.partial import SampledToken

README = ROOT / "src/opd/losses/README.md"
VOCAB, TOP_K = 50, 8
STEPS, LEARNING_RATE, DRAWS = 1200, 0.03, 64

Loss = Callable[[Tensor, Tensor], Tensor]


def main(argv: Sequence[str] = ()) -> int:
    """Write the measured tables into the README, or check them."""
    parser = argparse.ArgumentParser(prog="benchmarks losses", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the README is out of date")
    arguments = parser.parse_args(list(argv))
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="generalized_jsd")
    text = README.read_text(encoding="utf-8")
    measured = text
    for name, measure in (("jsd", jsd_table), ("estimators", estimator_table), ("tails", tail_table), ("k", k_table)):
        rows = measure()
        print(f"{name}\n{rows}\n", flush=True)
        block = f"<!-- measured: {name} -->\n{rows}\n<!-- end -->"
        measured, found = re.subn(
            rf"<!-- measured: {name} -->\n.*?<!-- end -->", lambda _, b=block: b, measured, flags=re.S
        )
        assert found == 1, f"the README has no place for table {name!r}"
    if arguments.check:
        print("README is up to date" if measured == text else "README is out of date; run without --check")
        return int(measured != text)
    README.write_text(measured, encoding="utf-8")
    return 0


def problem() -> tuple[Tensor, Tensor]:
    """Student logits and teacher log-probs [1, vocab]: reverse KL 0.435, 0.88 of the teacher in its top 8."""

    def noise(seed: int, scale: float) -> Tensor:
        return scale * torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    teacher = to_logp(noise(0, 2.0))
    return teacher + noise(104, 1.2), teacher


def jsd_table() -> str:
    """Gradient norms of the generalized JSD over β."""
    rows = []
    for beta in (0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0):
        normalised, published = (
            exact_gradient(lambda s, t, b=beta, n=n: generalized_jsd(s, t, b, normalize=n)).norm()
            for n in (True, False)
        )
        same = {0.0: " = forward KL", 1.0: " = reverse KL"}.get(beta, "")
        rows.append((f"{beta:g}{same}", f"{normalised:.4f}", f"{published:.4f}"))
    return markdown.table(("β", "\\|∇\\| normalised", "\\|∇\\| published"), rows)


def estimator_table() -> str:
    """Expected gradients and their variances of what can be made from one sampled token."""
    logits, teacher = problem()
    kl = reverse_kl(to_logp(logits), teacher)
    reverse, forward = exact_gradient(reverse_kl), exact_gradient(forward_kl)

    def rewarded(advantage: Loss) -> Loss:
        return lambda s, t: policy_gradient_loss(s, advantage(s, t).detach())

    rows = []
    for name, loss in (
        ("k1 as a loss", k1),
        ("k2 as a loss", k2),
        ("k3 as a loss", k3),
        ("−k1 as an advantage", rewarded(distillation_advantage)),
        (
            "−k1 as an advantage, value baseline",
            rewarded(lambda s, t: distillation_advantage(s, t) - value_baseline(kl)),
        ),
        ("−k3 as an advantage", rewarded(lambda s, t: -k3(s, t))),
        ("−KL(S‖T) of the position as an advantage", rewarded(lambda s, t: -kl.expand_as(s))),
    ):
        mean, variance = moments(lambda logp, drawn, f=loss: f(gather_logp(logp, drawn), teacher[0, drawn]))
        cosine = torch.nn.functional.cosine_similarity(mean, reverse, dim=0) if mean.norm() > 1e-12 else None
        rows.append(
            (
                name,
                f"{mean.norm():.4f}" if cosine is not None else "0",
                "–" if cosine is None else f"{cosine:.3f}",
                error(mean, reverse),
                error(mean, forward),
                f"{variance:.3f}",
            )
        )
    head = ("used as", "\\|E∇\\|", "cos to ∇ reverse KL", "error to ∇ reverse KL", "error to ∇ forward KL", "variance")
    return markdown.table(head, rows)


def tail_table() -> str:
    """Final divergence after training free logits, for each tail and each support."""
    logits, teacher = problem()
    start = reverse_kl(to_logp(logits), teacher).item()
    rows = [("(start)", *[f"{start:.3f}"] * 3)]
    for tail in ("ignore", "renormalize", "generalized", "bucket", "sampled"):
        ends = [trained(tail, support) for support in ("teacher_top_k", "student_top_k", "union")]
        rows.append((f"`{tail}`", *[f"{end:.3f}" for end in ends]))
    return markdown.table(("tail", "teacher_top_k", "student_top_k", "union"), rows)


def k_table() -> str:
    """Gradient variance of the sampled tail by k, beside the estimators that see the sampled token only."""
    _, teacher = problem()
    rows = []
    for k in (1, 2, 4, 8, 16, 32, 49):
        support = top_k_support(teacher, k)
        mean, variance = moments(
            lambda logp, drawn, s=support: with_sampled_tail(s, logp, teacher.expand_as(logp), drawn),
        )
        rows.append((str(k), error(mean, exact_gradient(reverse_kl)), f"{variance:.4f}"))
    return markdown.table(("k", "error to ∇ reverse KL", "variance"), rows)


def exact_gradient(divergence: Loss) -> Tensor:
    """d divergence / d student logits."""
    logits, teacher = problem()
    logits.requires_grad_()
    return torch.autograd.grad(divergence(to_logp(logits), teacher).sum(), logits)[0][0]


def moments(loss: Loss) -> tuple[Tensor, Tensor]:
    """Mean and total variance of the gradient of `loss(logp, drawn)` when the token is drawn from the student."""
    logits = problem()[0]
    rows = logits.expand(VOCAB, -1).clone().requires_grad_()
    slopes = torch.autograd.grad(loss(to_logp(rows), torch.arange(VOCAB)).sum(), rows)[0]
    probability = to_logp(logits)[0].exp().unsqueeze(-1)
    mean = (probability * slopes).sum(dim=0)
    return mean, (probability * (slopes - mean).square()).sum()


def with_sampled_tail(support: Support, student_logp: Tensor, teacher_logp: Tensor, drawn: Tensor) -> Tensor:
    """Reverse KL with tail='sampled', one row per drawn token, the same support for all."""
    rows = Support(
        ids=support.ids.expand(len(drawn), -1).contiguous(), counted=support.counted.expand(len(drawn), -1).contiguous()
    )
    token = SampledToken(
        student_logp=gather_logp(student_logp, drawn),
        teacher_logp=gather_logp(teacher_logp, drawn),
        in_support=rows.contains(drawn),
    )
    on_k = rows.gather(student_logp), rows.gather(teacher_logp)
    return partial_divergence("reverse_kl", *on_k, tail="sampled", sampled=token)


def trained(tail: Tail | str, support_name: str) -> float:
    """Reverse KL after Adam on free logits, with the support chosen anew at every step."""
    logits, teacher = problem()
    logits.requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        student = to_logp(logits)
        if support_name == "union":
            support = union_support(student, teacher, TOP_K)
        else:
            support = top_k_support(teacher if support_name == "teacher_top_k" else student, TOP_K)
        if tail == "sampled":
            drawn = torch.multinomial(student.detach().exp()[0], DRAWS, replacement=True, generator=generator)
            loss = with_sampled_tail(support, student.expand(DRAWS, -1), teacher.expand(DRAWS, -1), drawn).mean()
        elif tail == "ignore":  # the mistake: what is outside the support is left out
            loss = entry_terms("reverse_kl", support.gather(student), support.gather(teacher)).sum()
        else:
            on_k = support.gather(student), support.gather(teacher)
            loss = partial_divergence("reverse_kl", *on_k, tail=tail).sum()  # pyright: ignore[reportArgumentType]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return reverse_kl(to_logp(logits), teacher).item()


def error(actual: Tensor, wanted: Tensor) -> str:
    """Relative error, with rounding called by its name."""
    relative = float((actual - wanted).norm() / wanted.norm())
    return "0 (rounding)" if relative < 1e-12 else f"{relative:.2f}"
