"""Memory that runs out, in each phase: the error says what to lower. The allocations are real, and really refused."""

from __future__ import annotations

import pytest
import torch
from opd_user import User
from transformers import PreTrainedModel

import opd.trainer.load_models
from opd.errors import OpdError, OutOfMemoryError
from opd.models import load_causal_lm
from opd.trainer.guardrails import OUT_OF_MEMORY_ADVICE, memory_advice

TOO_MUCH = 2**58  # bytes


def ask_for_too_much(*_: object) -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def _greedy_student(phase: str, model: PreTrainedModel, role: str) -> None:
    """The model of that role runs out of memory in that phase."""
    embedding = model.get_input_embeddings()

    def hook(_module: torch.nn.Module, args: tuple[torch.Tensor], _output: torch.Tensor) -> None:
        if args[0].shape[-1] <= 2:
            return  # the probe of the output layer
        training = torch.is_grad_enabled()
        if role == ("teacher" if phase == "teacher" else "student") and training == (phase == "update"):
            ask_for_too_much()

    embedding.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("phase", "advice"),
    [
        ("rollout", ("rollout.batch_size", "rollout.max_new_tokens")),
        ("teacher", ("teacher.tokens_per_batch",)),
        ("update", ("train.tokens_per_microbatch", "gradient_checkpointing", "student.lora.rank")),
        ("eval", ("rollout.batch_size", "teacher.tokens_per_batch")),
        ("load", ("teacher.dtype=bfloat16", "smaller models")),
    ],
)
def test_running_out_of_memory_says_in_which_phase_and_what_to_lower(
    user: User, monkeypatch: pytest.MonkeyPatch, phase: str, advice: tuple[str, ...]
):
    def load(*args, role: str, **options):
        if phase == "load":
            ask_for_too_much()
        model = load_causal_lm(*args, role=role, **options)
        _greedy_student(phase, model, role)
        return model

    monkeypatch.setattr(opd.trainer.load_models, "load_causal_lm", load)
    evaluation = ("--eval.every", "1", "--prompts.eval_path", user.desk.prompts) if phase == "eval" else ()
    outcome = user.train(*evaluation)
    outcome.refuses(f"Out of memory during {phase}", "Lower", *advice, "allocate memory")
    assert not (user.run_dir / "student").exists()


@pytest.mark.parametrize("phase", sorted(OUT_OF_MEMORY_ADVICE))
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), MemoryError()]
)
def test_every_kind_of_out_of_memory_is_explained(phase: str, error: Exception):
    with pytest.raises(OutOfMemoryError, match=f"during {phase}. Lower "), memory_advice(phase):
        raise error


def test_another_error_is_not_taken_for_memory():
    with pytest.raises(RuntimeError, match="shape mismatch") as caught, memory_advice("update"):
        raise RuntimeError("shape mismatch")
    assert not isinstance(caught.value, OpdError)
