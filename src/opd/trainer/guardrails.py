"""Guards that stop a run before it harms the weights: losses and gradients that are not finite, and memory that ran out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from opd.data.pack import one_rollout
from opd.errors import UNDRAWABLE, NonFiniteError, OutOfMemoryError, UndrawableError
from opd.losses import Objective
from opd.types import Batch, Rollout

TORCH_ERRORS = (torch.OutOfMemoryError, MemoryError, RuntimeError, UndrawableError)
OUT_OF_MEMORY_ADVICE = {
    "rollout": "rollout.batch_size or rollout.max_new_tokens, and go on with --resume",
    "teacher": "teacher.tokens_per_batch, and go on with --resume",
    "update": "train.tokens_per_microbatch (gradients accumulate, so the result is the same) or set student.gradient_checkpointing=true "
    "(with natural_gradient: optimizer.natural_gradient.keep_graphs=false), and go on with --resume; or begin a new run with "
    "student.lora.rank=32 (with natural_gradient: fewer optimizer.natural_gradient.parameters)",
    "load": "the models' size: teacher.dtype=bfloat16 or another teacher.device, which --resume may do, or a new run of smaller models",
    "eval": "rollout.batch_size, teacher.tokens_per_batch or rollout.max_new_tokens, and go on with --resume",
}


def check_loss(per_token: torch.Tensor, batch: Batch, objective: Objective) -> None:
    """Raises NonFiniteError naming the first response token whose loss is NaN or infinite."""
    bad = (~per_token.detach().isfinite()) & (batch.token_weights != 0)
    if not bad.any():
        return
    index = int(bad.nonzero()[0])
    sequence = int(batch.sequence_index[index])
    position = index - int((batch.sequence_index < sequence).sum())
    value = float(per_token.detach()[index])
    if value == float("inf"):
        bound = "set objective.teacher_logp_floor=-30 to bound it (metric: clamped_tokens) and go on with --resume"
        floor = bound if objective.takes_floor else ""
        other = "" if objective.support == "sampled" else "begin a new run with objective.divergence=generalized_jsd"
        advice = ", or ".join(part for part in (floor, other) if part) or "look at the models' dtypes"
        cause = (
            f"{objective.divergence} is infinite in truth where one model gives zero probability to what the other can emit. "
            f"{advice[0].upper()}{advice[1:]}."
        )
    else:
        cause = "Look for NaN in the student's or the teacher's weights, or lower optimizer.lr and resume from the last checkpoint."
    raise NonFiniteError(
        f"The loss is {value} at response token {position} of {_describe(batch.rollouts[sequence])}. "
        f"The weights were not changed. {cause}"
    )


def bad_gradient(batches: Sequence[Batch], is_finite: Callable[[Batch], bool]) -> str | None:
    """The gradient is known to be bad: the first sample, in words, whose own gradient is; None where that of every one is finite."""
    for batch in batches:
        for index, rollout in enumerate(batch.rollouts):
            if not is_finite(one_rollout(batch, index)):
                return _describe(rollout)
    return None


def gradient_error(sample: str | None) -> NonFiniteError:
    """The error for a gradient that is not finite, by what `bad_gradient` found."""
    if sample is not None:
        return NonFiniteError(
            f"The loss is finite but its gradient is not, first in {sample}. The weights were not changed. "
            "Lower optimizer.lr or use train.autocast=none, and resume from the last checkpoint; or drop the sample and begin a "
            "new run."
        )
    return NonFiniteError(
        "The gradient of the batch is not finite though that of every sample is: the sum overflowed. The weights were not "
        "changed. Use float32 weights (student.dtype=float32) or smaller steps."
    )


def _describe(rollout: Rollout) -> str:
    text = rollout.text if len(rollout.text) <= 80 else rollout.text[:77] + "…"
    return f"the {rollout.source} sample for prompt {rollout.prompt.index} ({text!r})"


@contextmanager
def memory_advice(phase: str) -> Iterator[None]:
    """An out-of-memory error becomes one that says what to lower; sampling from NaN becomes a NonFiniteError."""
    try:
        yield
    except TORCH_ERRORS as error:
        explain(error, phase)
        raise


def explain(error: BaseException, phase: str) -> None:
    """Raise what says how to go on, where `error` is one of exhausted memory, or of probabilities that are NaN."""
    if isinstance(error, UndrawableError) or "probability tensor contains" in str(error):  # torch.multinomial's words
        raise NonFiniteError(UNDRAWABLE.format(where=f" during {phase}")) from error
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        raise OutOfMemoryError(
            f"Out of memory during {phase}. Lower {OUT_OF_MEMORY_ADVICE[phase]}. ({(str(error) or 'no details').splitlines()[0][:160]})"
        ) from error
