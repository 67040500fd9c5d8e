"""The patch's own objective is `opd.losses.Objective` over the whole vocabulary: the same numbers, to the bit, and the same refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tools.verl_patch.tree import full_vocabulary as own
from torch import Tensor

from opd import losses
from opd.errors import ObjectiveError
from opd.integrations.verl.plugin.logits import token_losses
from opd.types import DenseTarget

SHAPES: list[dict[str, Any]] = [
    {"divergence": "reverse_kl"},
    {"divergence": "forward_kl"},
    *({"divergence": "skew_reverse_kl", "beta": beta} for beta in (0.3, 1.0)),
    *(
        {"divergence": "generalized_jsd", "beta": beta, "normalize": normalize}
        for beta in (0.0, 0.3, 0.7, 1.0)
        for normalize in (True, False)
    ),
]
TEMPERATURES = ({}, {"student_temperature": 2.0, "teacher_temperature": 2.0}, {"student_temperature": 0.7})
WRONG: list[dict[str, Any]] = [
    {"divergence": "kl"},
    {"divergence": "skew_reverse_kl", "beta": 0.0},
    {"divergence": "generalized_jsd", "beta": 1.5},
    {"student_temperature": 0.0},
    {"teacher_temperature": float("inf")},
    {"divergence": "reverse_kl", "beta": 0.5},
    {"divergence": "forward_kl", "beta": 0.3},
    {"divergence": "skew_reverse_kl", "normalize": True},
]


def pair(dtype: torch.dtype = torch.float32, vocab: int = 37) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3.0 * torch.randn(11, vocab, generator=generator) for _ in range(2))
    teacher[3, :5], student[4, 7] = -torch.inf, -torch.inf
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False")
@pytest.mark.parametrize("temperatures", TEMPERATURES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients_are_those_of_the_package(shape: dict[str, Any], temperatures: dict[str, float]):
    student, teacher = pair()
    ids = torch.arange(len(student))
    found = []
    for objective in (own.Objective(**shape, **temperatures), losses.Objective(**shape, **temperatures)):
        logits = student.clone().requires_grad_(True)
        loss, _ = objective.per_token_loss(logits, DenseTarget(logits=teacher), ids)
        found.append((loss, *torch.autograd.grad(loss[loss.isfinite()].sum(), logits)))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:generalized_jsd with normalize=False")
@pytest.mark.parametrize("temperatures", TEMPERATURES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mixture", [None, "probability", "logit", "loss"])
def test_the_row_passes_read_nothing_else(shape: dict[str, Any], temperatures: dict[str, float], mixture: str | None):
    """Losses, gradients and diagnostics from whole logits, rows with a probability of 0 included."""
    student, teacher = pair()
    teachers = [teacher] if mixture is None else [teacher, pair(vocab=37)[0].roll(1, 0).nan_to_num(neginf=0.0)]
    weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    found = []
    for objective in (own.Objective(**shape, **temperatures), losses.Objective(**shape, **temperatures)):
        logits = student.clone().requires_grad_(True)
        told = token_losses(
            logits, teachers, objective, teacher_weights=weights, mixture=mixture or "probability", masked_ids=(2,)
        )  # pyright: ignore[reportArgumentType]
        (slope,) = torch.autograd.grad(told.loss[told.loss.isfinite()].sum(), logits)
        found.append((told.loss, slope, *told.metrics.values()))
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)


def test_diagnostics_are_those_of_the_package():
    student, teacher = pair()
    logp, ids = losses.to_logp(student), torch.arange(len(student))
    mine, theirs = (
        diagnose(logp, DenseTarget(logits=teacher), ids, 64)
        for diagnose in (own.token_diagnostics, losses.token_diagnostics)
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_what_the_package_refuses_is_refused(wrong: dict[str, Any]):
    for kind in (own.Objective, losses.Objective):
        with pytest.raises(ObjectiveError):
            kind(**wrong)
