"""verl's own `forward_kl_topk`, run by verl's own functions: what it computes, to rounding, and what a bucket for the tail changes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[3]))  # benchmarks/ stands beside tests/

from benchmarks.verl_native.command import (
    PROMPT,
    VOCAB,
    Data,
    bucket,
    cosine,
    exact,
    gradient,
    logits_of,
    native,
    noisy,
    sampled,
    tail_ignored,
    teacher_model,
)

from opd.losses import to_logp

SAME = {"rtol": 1e-6, "atol": 1e-6}
STUDENTS = ("far", "near", "same")


@pytest.fixture(scope="module")
def worlds() -> dict[str, tuple[Tensor, Data]]:
    """Logits of students that are far from the teacher, near it, and the teacher itself; each on its own samples."""
    teacher = teacher_model()
    made = {}
    for name, student in (("far", noisy(teacher, 0.2)), ("near", noisy(teacher, 0.02)), ("same", teacher)):
        data = sampled(student, teacher, seed=0)
        with torch.no_grad():
            made[name] = (logits_of(student, data.ids), data)
    return made


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("k", [1, 4, 16, 64, 512])
@pytest.mark.parametrize(
    "clamps",
    [
        {},
        {"loss_max_clamp": 10.0, "log_prob_min_clamp": -10.0},  # the defaults of verl's dataclass
        {"loss_max_clamp": 0.5, "log_prob_min_clamp": -4.0},
    ],
    ids=["yaml", "dataclass", "tight"],
)
def test_verls_own_loss_is_the_tail_ignored_and_three_clamps(worlds, student: str, k: int, clamps: dict[str, float]):
    """In value, token by token and in all, and in gradient."""
    logits, data = worlds[student]
    verls = native(logits, data, k, **clamps)
    before_the_last = {name: value for name, value in clamps.items() if name != "loss_max_clamp"}
    torch.testing.assert_close(verls.per_token, tail_ignored(logits, data, k, **before_the_last), **SAME)
    torch.testing.assert_close(verls.total, tail_ignored(logits, data, k, **clamps).mean(), **SAME)
    slope = gradient(logits, lambda x: native(x, data, k, **clamps).total)
    ours = gradient(logits, lambda x: tail_ignored(x, data, k, **clamps).mean())
    assert slope.abs().max() > 0 or ours.abs().max() == 0
    scale = float(ours.abs().max()) or 1.0
    torch.testing.assert_close(slope / scale, ours / scale, **SAME)


@pytest.mark.parametrize("student", STUDENTS)
def test_verls_chunked_log_probs_are_the_same_loss(worlds, student: str):
    logits, data = worlds[student]
    verls = native(logits, data, 16, use_chunked_topk=True, chunked_topk_chunk_size=7)
    torch.testing.assert_close(verls.per_token, tail_ignored(logits, data, 16), **SAME)


def test_the_clamps_are_seen_at_work(worlds):
    """Otherwise the agreement above would say nothing of them."""
    logits, data = worlds["far"]
    assert (native(logits, data, 4).per_token > 0.5).any()
    floored = native(logits, data, 4, log_prob_min_clamp=-4.0).per_token
    assert (floored - native(logits, data, 4).per_token).abs().max() > 0.1
    logits, data = worlds["near"]
    assert (native(logits, data, 1).per_token == 0).any()


def world_of(student: list[float], teacher: list[float]) -> tuple[Tensor, Data]:
    """Every row the same; sequences as short as can be."""
    rows = PROMPT + 1
    data = Data(ids=torch.zeros(1, rows, dtype=torch.int64), teacher_logp=torch.tensor(teacher).log().expand(rows, -1))
    return torch.tensor(student).log().repeat(rows, 1), data


def test_a_student_too_sure_of_the_teachers_favourite_learns_nothing_from_verl_and_something_from_a_bucket():
    """p = (.6, .2, .2), q = (.5, .3, .2), k = 1: .5 ln(.5/.6) < 0 is clamped; the bucket adds .5 ln(.5/.4)."""
    logits, data = world_of([0.6, 0.2, 0.2], [0.5, 0.3, 0.2])
    assert native(logits, data, 1).total.item() == 0
    assert gradient(logits, lambda x: native(x, data, 1).total).abs().max() == 0
    assert bucket(logits, data, 1).item() == pytest.approx(0.020411, abs=1e-6)
    slope = gradient(logits, lambda x: bucket(x, data, 1).mean()).view(PROMPT + 1, 3)[PROMPT - 1]
    torch.testing.assert_close(
        slope, torch.tensor([0.1, -0.05, -0.05]), **SAME
    )  # p − q, the rest shared in proportion to p


def test_a_student_equal_to_the_teacher_is_pulled_away_by_verl_and_left_alone_by_a_bucket(worlds):
    """Where rounding leaves verl's sum above 0, its gradient is (Σ_K q) p − q on K: not 0, though nothing is left to learn."""
    logits, data = world_of([0.5, 0.3, 0.2], [0.5, 0.3, 0.2])
    nudged = logits.clone()
    nudged[:, 0] -= 1e-3
    true = gradient(nudged, lambda x: exact(x, data).mean())
    assert gradient(nudged, lambda x: native(x, data, 1).total).norm() > 100 * true.norm()
    assert gradient(nudged, lambda x: bucket(x, data, 1).mean()).norm() < 1.1 * true.norm()
    logits, data = worlds["same"]
    assert bucket(logits, data, 16).abs().max() < 1e-5
    assert gradient(logits, lambda x: bucket(x, data, 16).mean()).abs().max() < 1e-6


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize("k", [1, 4, 16, 64])
def test_a_bucket_is_never_negative_and_never_above_the_exact_value(worlds, student: str, k: int):
    logits, data = worlds[student]
    bucketed = bucket(logits, data, k)
    assert bucketed.min() >= -1e-6
    assert (bucketed <= exact(logits, data) + 1e-5).all()


@pytest.mark.parametrize("k", [1, 4, 16, 64])
def test_near_the_teacher_a_bucket_points_more_the_exact_way_than_verl(worlds, k: int):
    """Far from it the two are alike: the student has little mass on K, and the tail says little."""
    logits, data = worlds["near"]
    true = gradient(logits, lambda x: exact(x, data).mean())
    of_native = gradient(logits, lambda x: native(x, data, k).total)
    of_bucket = gradient(logits, lambda x: bucket(x, data, k).mean())
    assert cosine(of_bucket, true) > cosine(of_native, true)


def test_on_the_whole_vocabulary_all_three_are_one(worlds):
    logits, data = worlds["near"]
    whole = exact(logits, data)
    torch.testing.assert_close(bucket(logits, data, VOCAB), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(native(logits, data, VOCAB).per_token, whole, rtol=1e-5, atol=1e-5)


def test_the_teacher_is_read_one_row_before_its_token(worlds):
    """What a pencil would check first: verl's loss of a response token is that of the row before it."""
    logits, data = worlds["far"]
    row = PROMPT - 1
    said, logp = data.teacher_logp[row].topk(4), to_logp(logits[row])
    by_hand = sum(float(q.exp() * (q - logp[i])) for q, i in zip(said.values, said.indices, strict=True))
    assert native(logits, data, 4).per_token[0].item() == pytest.approx(max(0.0, by_hand), abs=1e-6)
