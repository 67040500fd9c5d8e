"""NaN and infinity: the run stops before the weights change, and names the first bad sample."""

from __future__ import annotations

import copy
import math
import shutil
from typing import Any

import pytest
import torch
from opd_user import User
from safetensors.torch import load_file, save_file

from opd.config import OptimizerConfig
from opd.data.pack import pack
from opd.errors import NonFiniteError
from opd.losses import Objective
from opd.teachers.local import LocalTeacher
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import digit_tokenizer, random_logits, random_rollout, tiny_causal_lm
from opd.trainer.student import Student
from opd.types import Batch, DenseTarget, HiddenTarget

VOCAB = 13
RESPONSE = 3


@pytest.fixture
def student() -> Student:
    """After one update, so that the optimizer has a state to spoil."""
    model = tiny_causal_lm(digit_tokenizer(), layers=1, hidden=16, heads=2, kv_heads=1, initializer_range=0.3)

    def no_hidden_target(_: HiddenTarget) -> torch.Tensor:
        raise AssertionError

    student = Student(
        model,
        OptimizerConfig(lr=1e-2, warmup_steps=0),
        vocabulary=VocabularyMatch(size=VOCAB),
        eos_ids=(VOCAB - 1,),
        teacher_logits=no_hidden_target,
        total_steps=10,
    )
    before = state_of(student)
    student.update(batches(), Objective())
    assert not same(before, state_of(student))
    return student


def batches(spoil: dict[tuple[int, int, int], float] | None = None, *, tokens_per_microbatch: int = 12) -> list[Batch]:
    """Four samples in two micro-batches. `spoil` puts a value at (sample, response token, vocabulary entry) of the teacher's logits."""
    rollouts = [random_rollout(4, RESPONSE, VOCAB - 3, seed=i, index=i) for i in range(4)]
    targets = [random_logits(RESPONSE, VOCAB, seed=100 + i) for i in range(4)]
    for (sample, token, entry), value in (spoil or {}).items():
        targets[sample][token, entry] = value
    return pack(
        rollouts,
        [DenseTarget(logits=logits) for logits in targets],
        layout="right_padded",
        tokens_per_microbatch=tokens_per_microbatch,
        pad_id=VOCAB - 2,
    )


def state_of(student: Student) -> dict[str, Any]:
    return copy.deepcopy(
        {
            "weights": dict(student.model.state_dict()),
            "optimizers": [optimizer.state_dict() for optimizer in student.optimizers],
            "version": student.version,
        }
    )


def same(a: Any, b: Any) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_refused_without_a_trace(student: Student, bad: list[Batch], objective: Objective, *fragments: str) -> None:
    before = state_of(student)
    with pytest.raises(NonFiniteError) as refusal:
        student.update(bad, objective)
    missing = [f for f in (*fragments, "The weights were not changed") if f not in str(refusal.value)]
    assert not missing, f"{missing} not in: {refusal.value}"
    assert same(before, state_of(student))


def test_a_nan_loss_names_sample_and_token_and_changes_nothing(student: Student):
    bad = batches({(2, 1, 5): math.nan})
    assert_refused_without_a_trace(
        student, bad, Objective(), "The loss is nan at response token 1", "prompt 2", "lower optimizer.lr", "resume"
    )


@pytest.mark.parametrize("tokens_per_microbatch", [6, 12, 100])
def test_the_first_of_several_bad_tokens_is_named(student: Student, tokens_per_microbatch: int):
    bad = batches(
        {(1, 1, 0): math.nan, (1, 2, 0): math.nan, (3, 0, 0): math.nan}, tokens_per_microbatch=tokens_per_microbatch
    )
    assert_refused_without_a_trace(student, bad, Objective(), "response token 1", "prompt 1")


def test_an_infinite_loss_advises_a_floor_and_the_floor_helps(student: Student):
    bad = batches({(1, 0, 4): -math.inf})
    assert_refused_without_a_trace(
        student,
        bad,
        Objective(),
        "The loss is inf at response token 0",
        "prompt 1",
        "zero probability to what the other can emit",
        "objective.teacher_logp_floor=-30",
        "generalized_jsd",
    )
    assert math.isfinite(student.update(bad, Objective(teacher_logp_floor=-30)).loss)
    assert math.isfinite(student.update(bad, Objective(divergence="generalized_jsd")).loss)


def test_an_infinite_loss_that_no_floor_bounds_does_not_advise_one():
    from opd.trainer.guardrails import check_loss

    batch = batches()[0]
    losses = torch.full(batch.token_weights.shape, math.inf)
    with pytest.raises(NonFiniteError) as refusal:
        check_loss(losses, batch, Objective(divergence="forward_kl"))
    assert "floor" not in str(refusal.value)
    assert "Begin a new run with objective.divergence=generalized_jsd." in str(refusal.value)


@pytest.mark.parametrize("tokens_per_microbatch", [6, 12, 100])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_names_its_sample(student: Student, tokens_per_microbatch: int, value: float):
    good = batches(tokens_per_microbatch=tokens_per_microbatch)
    bad = 2
    marker = next(rollout.prompt_ids for batch in good for rollout in batch.rollouts if rollout.prompt.index == bad)

    def spoil_its_gradient(_module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        is_bad = (args[0][:, : len(marker)] == torch.tensor(marker)).all(-1)
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.masked_fill(is_bad[:, None, None], value))

    handle = student.model.get_input_embeddings().register_forward_hook(spoil_its_gradient)
    try:
        assert_refused_without_a_trace(
            student, good, Objective(), "its gradient is not", f"prompt {bad}", "Lower optimizer.lr", "drop the sample"
        )
    finally:
        handle.remove()
    assert math.isfinite(student.update(good, Objective()).loss)


def test_a_sum_of_finite_gradients_that_overflows_is_told_apart(student: Student):
    good = batches(tokens_per_microbatch=100)
    embedding = student.model.get_input_embeddings()

    def overflow_together(_module: torch.nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        if output.requires_grad and args[0].shape[0] > 1:
            output.register_hook(lambda gradient: gradient.fill_(math.inf))

    handle = embedding.register_forward_hook(overflow_together)
    try:
        assert_refused_without_a_trace(student, good, Objective(), "that of every sample is", "student.dtype=float32")
    finally:
        handle.remove()


def _overflowing(user: User, name: str, scale: float = 3e38) -> str:
    """A model whose weights are finite and whose logits are not."""
    tokenizer = digit_tokenizer()
    model = tiny_causal_lm(
        tokenizer, layers=1, hidden=16, heads=2, kv_heads=1, max_positions=64, tie=False, initializer_range=0.5
    )
    with torch.no_grad():
        model.lm_head.weight.copy_(scale * model.lm_head.weight.sign())
    return user.saves(name, model, tokenizer)


def test_a_teacher_that_overflows_stops_the_run_before_the_weights_change(user: User):
    teacher = user.copies(user.desk.teacher, "teacher")
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 3e38)
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    canary = user.train(teacher__model=teacher)
    canary.refuses("the teacher", "log-probs that are NaN or infinite", "The weights were not changed", "opd doctor")
    assert not any(name.startswith(("checkpoints", "student")) for name in user.files())
    outcome = user.train("--overwrite", "--guard.canary.action=off", teacher__model=teacher)
    outcome.refuses("The loss is", "at response token", "sample for prompt", "The weights were not changed", "NaN")
    assert not any(name.startswith(("checkpoints", "student")) for name in user.files())


def test_a_loss_that_turns_bad_in_mid_run_leaves_the_last_checkpoint_to_resume_from(user: User, monkeypatch):
    user.train().succeeds()
    finished = user.files()["student/model.safetensors"]
    last = user.run_dir / "checkpoints" / "step-00000002"
    shutil.rmtree(last)
    before = user.files()
    hidden = LocalTeacher._hidden
    with monkeypatch.context() as patch:
        patch.setattr(LocalTeacher, "_hidden", lambda *args: hidden(*args) * torch.nan)
        user.train("--resume").refuses("log-probs that are NaN or infinite", "The weights were not changed")
        off = user.train("--resume", "--guard.canary.action=off")
        off.refuses("The loss is nan", "sample for prompt", "The weights were not changed")
    kept = ("checkpoints", "student")
    assert {n: c for n, c in user.files().items() if n.startswith(kept)} == {
        n: c for n, c in before.items() if n.startswith(kept)
    }
    user.train("--resume").succeeds()
    assert user.files()["student/model.safetensors"] == finished


def test_a_student_that_overflows_cannot_be_sampled_and_says_so(user: User):
    outcome = user.train(student__model=_overflowing(user, "overflowing"))
    outcome.refuses("probabilities are NaN or infinite during rollout", "nothing can be sampled", "Lower optimizer.lr")
    assert not (user.run_dir / "student").exists()
    assert not (user.run_dir / "checkpoints").exists()
