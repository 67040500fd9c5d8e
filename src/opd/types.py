"""The nouns of the data flow: Prompt → Rollout → Target → Batch → LossOutput → Record.

Tensors are flat over *response tokens*: `tokens` below is the number of response tokens of one rollout (in a `Target`)
or of a whole micro-batch (in a `Batch`), in the order of the rollouts. Row t of a target is what the teacher says about
response token t given the prompt and the response tokens before t: the shift by one has already happened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor

TargetKind = Literal["sampled", "top_k", "dense", "hidden"]
RolloutSource = Literal["student", "teacher", "dataset"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the prompt set. Exactly one of `text` and `messages` is set."""

    index: int
    """Row number in the data set; identifies the prompt in every report."""
    text: str | None = None
    messages: tuple[Mapping[str, Any], ...] | None = None
    template_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the row hands to a chat template besides the messages: tools, documents, and other arguments by name."""
    answer: str | None = None
    response: str | None = None
    """A reference response, for off-policy distillation."""
    teacher: str | None = None
    """Name of the teacher this prompt is routed to."""
    metadata: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One response, as token ids of the student's tokenizer."""

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    """The student's rendering of the prompt."""
    response_ids: tuple[int, ...]
    """Response tokens; a finished response ends with its EOS (or stop) token, a truncated one does not."""
    sampler_logp: tuple[float, ...] | None
    """Log-probability (nats) of each response token under the distribution it was drawn from (after temperature, top-p, top-k); None for data-set responses."""
    sampler_entropy: tuple[float, ...] | None = None
    """Entropy (nats) of the distribution that each response token was drawn from; None where nobody asked for it."""
    finished: bool
    """True when the response ended by itself (EOS or stop string) rather than at the length limit."""
    policy_version: int
    """Number of optimizer steps the sampling student had taken."""
    source: RolloutSource = "student"
    text: str = ""
    """The response, decoded without special tokens."""
    id: int = -1
    """Place among the rollouts drawn together, from 0. `samplers.base.draw` sets it, and samplers leave it alone."""
    group: int = -1
    """Place of its prompt among those drawn together: samples of one prompt share it. Set with `id`."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """A teacher's output layer, by reference: `logits = hidden @ weight.T + bias`."""

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    valid_vocab: int | None = None
    """Rows at or beyond this index are padding; their logits are −inf."""


@dataclass(frozen=True, kw_only=True)
class SampledTarget:
    """Teacher log-probability (nats) of each sampled token."""

    kind: ClassVar[TargetKind] = "sampled"
    teacher_logp: Float[Tensor, " tokens"]

    def __len__(self) -> int:
        return self.teacher_logp.shape[0]


@dataclass(frozen=True, kw_only=True)
class TopKTarget:
    """Teacher log-probabilities (nats, normalised over the whole vocabulary) of its k likeliest tokens, most likely first."""

    kind: ClassVar[TargetKind] = "top_k"
    ids: Int[Tensor, "tokens k"]
    teacher_logp: Float[Tensor, "tokens k"]
    sampled_logp: Float[Tensor, " tokens"] | None = None
    """Teacher log-probability of the sampled token, which tail='sampled' and include_sampled need."""

    def __len__(self) -> int:
        return self.ids.shape[0]


@dataclass(frozen=True, kw_only=True)
class DenseTarget:
    """Teacher logits over the whole vocabulary; padding rows are −inf."""

    kind: ClassVar[TargetKind] = "dense"
    logits: Float[Tensor, "tokens vocab"]

    def __len__(self) -> int:
        return self.logits.shape[0]


@dataclass(frozen=True, kw_only=True)
class HiddenTarget:
    """Teacher last hidden states and its head, so that teacher logits exist only for the micro-batch being trained on."""

    kind: ClassVar[TargetKind] = "hidden"
    hidden: Float[Tensor, "tokens hidden"]
    head: Head

    def __len__(self) -> int:
        return self.hidden.shape[0]


@dataclass(frozen=True, kw_only=True)
class TeacherMixture:
    """Several teachers of one student: their distributions are mixed (probability, logit), or their losses added (loss)."""

    kind: ClassVar[str] = "mixture"
    targets: tuple[HiddenTarget | DenseTarget, ...]
    weights: Float[Tensor, "tokens teachers"] | Float[Tensor, " teachers"]
    """≥ 0 and 1 in sum, for all tokens or for each."""
    mixture: Literal["probability", "logit", "loss"] = "probability"

    def __len__(self) -> int:
        return len(self.targets[0])


Target = SampledTarget | TopKTarget | DenseTarget | HiddenTarget
AnyTarget = Target | TeacherMixture


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts and responses laid out for a model's forward pass."""

    input_ids: Int[Tensor, "rows length"]
    attention_mask: Int[Tensor, "rows length"] | None
    """None when the rows are packed: then `position_ids` restart at 0 for every sequence."""
    position_ids: Int[Tensor, "rows length"]
    predict_index: Int[Tensor, " tokens"]
    """Flat index (row · length + column) of the position whose output predicts each response token."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch: its sequences, and everything that is flat over response tokens."""

    sequences: Sequences
    response_ids: Int[Tensor, " tokens"]
    sequence_index: Int[Tensor, " tokens"]
    """Place in this micro-batch of the rollout that each response token belongs to."""
    rollouts: tuple[Rollout, ...]
    target: AnyTarget | None
    token_weights: Float[Tensor, " tokens"]
    """mask × 1/global count (× importance weight): the loss is Σ token_weights · per-token loss."""
    sampler_logp: Float[Tensor, " tokens"] | None = None
    advantages: Float[Tensor, " tokens"] | None = None
    """Advantage of each response token, without gradient; None where no reward is asked."""
    kept: Bool[Tensor, " response_tokens"] | None = None
    """Mask of the rollouts' response tokens that `tokens` are; None keeps all."""


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """One model's say at response tokens, at temperature 1 over the common vocabulary; None where the target cannot tell."""

    logp: Float[Tensor, " tokens"] | None = None
    """Log-probability (nats) of the response token."""
    entropy: Float[Tensor, " tokens"] | None = None
    """In nats."""
    top_ids: Int[Tensor, "tokens k"] | None = None
    """The likeliest tokens, most likely first."""
    top_probabilities: Float[Tensor, "tokens k"] | None = None


@dataclass(frozen=True, kw_only=True)
class TokenViews:
    """Both models' say at some response tokens of one rollout."""

    positions: Int[Tensor, " tokens"]
    """Places of these tokens in the response, from 0: a run may leave tokens out."""
    student: ModelView
    teacher: ModelView


@dataclass(frozen=True, kw_only=True)
class LossOutput:
    """Result of one optimizer step: the scalar loss (nats per token under token_mean) and its metrics."""

    loss: float
    metrics: Mapping[str, float]
    per_token: Sequence[tuple[Rollout, Float[Tensor, " response"]]] = ()
    """Each rollout with the reverse KL (nats) at its response tokens, for the report; empty where the target could not tell."""
    views: Mapping[int, TokenViews] = field(default_factory=dict[int, "TokenViews"])
    """By `Rollout.id`, what both models said before the update, for the rollouts that were asked for."""


Reward = Callable[..., float]
"""Called as reward(prompt, response), and with finished=… where it has a parameter of that name: False for a response cut off at the
length limit."""
