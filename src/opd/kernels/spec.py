"""What a fused loss is asked for: its matrices (`HeadSpec`), what is computed from a row of logits (`RowSpec`), and over which columns."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from opd.errors import ObjectiveError
from opd.losses import Objective
from opd.losses._shapes import Bool, Float
from opd.losses.groups import first_of
from opd.types import AnyTarget, DenseTarget, HiddenTarget, TeacherMixture

Memory = Literal["fast", "minimal"]

CPU_CHUNK_BYTES = 75 << 20  # of one logits buffer: 128 rows of 152k columns; with fewer the products lose speed
CPU_CHUNK_ROWS = 256  # more gain nothing on a CPU (benchmarks/LOG.md), unless rows are so short that calls cost more:
CPU_CACHED_BYTES = 4 << 20
GPU_CHUNK_BYTES = 640 << 20  # 1024 rows of 152k columns: fewer rows re-read dW too often, more cost memory
GPU_STORE_BYTES = 2375 << 20  # 8192 rows of 152k columns in 16 bits
MAX_CHUNK = 8192
MINIMAL_CHUNK = 1024
SAFE_SUM = (1e-10, 1e20)  # far from both ends of float32, so that products of two sums still fit
CPU_PIECE = 1 << 16  # entries of float32: four buffers of 256 KiB stay in a core's second-level cache
GPU_PIECE = 1 << 24  # 64 MiB; autograd keeps about thirty copies of a piece
MASKED = -1e30  # a logit whose probability is 0, and which, unlike −inf, may be subtracted from itself
Teachers = Sequence[tuple[Tensor | None, Tensor]]
"""(weight per token, logits [rows, columns]) of each distribution that the student is compared with; one alone has weight None."""


class Shards:
    """Columns [offset, offset + size) of the vocabulary are on this rank; without a group, all of them, and nothing is sent."""

    def __init__(self, size: int, group: Any = None) -> None:
        self.group = group
        self.size = size
        self.sizes = [size]
        self.offset = 0
        if group is not None:
            everyone: list[int] = [0] * dist.get_world_size(group)
            dist.all_gather_object(everyone, size, group=group)
            self.sizes = everyone
            self.offset = sum(everyone[: dist.get_rank(group)])

    @property
    def alone(self) -> bool:
        return self.group is None

    @property
    def vocab(self) -> int:
        """Columns of all shards."""
        return sum(self.sizes)

    def sum(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Each tensor added over the ranks, in one message."""
        return self._reduce(parts, dist.ReduceOp.SUM)

    def max(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """The maximum of each tensor over the ranks, in one message."""
        return self._reduce(parts, dist.ReduceOp.MAX)

    def top(self, logits: Tensor, nothing: float) -> Tensor:
        """Each row's maximum over all ranks, [rows, 1]; a rank without columns contributes `nothing`."""
        here = logits.amax(-1, keepdim=True) if logits.shape[1] else logits.new_full((len(logits), 1), nothing)
        return self.max(here)[0]

    def _reduce(self, parts: tuple[Tensor, ...], operation: Any) -> tuple[Tensor, ...]:
        if self.group is None:
            return parts
        message = torch.stack([part.contiguous() for part in parts])
        dist.all_reduce(message, op=operation, group=self.group)
        return message.unbind(0)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Column numbers on this rank (0 where the id lives elsewhere), and whether the id lives here."""
        if self.group is None:
            return ids, torch.ones_like(ids, dtype=torch.bool)
        moved = ids - self.offset
        here = (moved >= 0) & (moved < self.size)
        return torch.where(here, moved, 0), here

    def pick(self, logits: Tensor, ids: Tensor) -> Tensor:
        """logits[row, ids[row]] wherever the columns are; ids are [rows, k]."""
        if self.group is None:
            return logits.gather(-1, ids)
        column, here = self.local(ids)
        own = torch.where(here, logits.gather(-1, column), 0.0) if self.size else logits.new_zeros(ids.shape)
        return self.sum(own)[0]

    def add_at(self, logits: Tensor, ids: Tensor, values: Tensor) -> None:
        """logits[row, ids[row]] += values, in place, on the rank that has the column."""
        if not logits.shape[-1]:
            return
        column, here = self.local(ids)
        logits.scatter_add_(-1, column, values if self.alone else torch.where(here, values, 0.0))

    def gather_columns(self, logits: Tensor) -> Tensor:
        """The whole rows [rows, vocab] on every rank."""
        if self.group is None:
            return logits
        widest = max(self.sizes)
        padded = logits.new_zeros(logits.shape[0], widest)
        padded[:, : self.size] = logits
        everyone = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(everyone, padded, group=self.group)
        return torch.cat([part[:, :size] for part, size in zip(everyone, self.sizes, strict=True)], dim=-1)

    def own_columns(self, rows: Tensor) -> Tensor:
        """This rank's part of whole rows."""
        return rows[:, self.offset : self.offset + self.size]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The vocabulary entries that a row of logits has."""

    vocab: int
    """Entries that exist on both sides, of all shards together; those beyond are padding."""
    masked_ids: tuple[int, ...] = ()
    """Entries below `vocab` that no token owns."""
    shards: Shards

    @classmethod
    def whole(cls, vocab: int, masked_ids: tuple[int, ...] = ()) -> Columns:
        """All of them on one rank."""
        return cls(vocab=vocab, masked_ids=masked_ids, shards=Shards(vocab))

    @property
    def here(self) -> int:
        """Columns of the logits on this rank: all of a shard, or those below `vocab`."""
        return self.vocab if self.shards.alone else self.shards.size

    def masked(self, device: torch.device) -> Tensor:
        """This rank's column numbers that must have probability 0, of both models: masked ids and padding."""
        column, mine = self.shards.local(torch.tensor(self.masked_ids, dtype=torch.long, device=device))
        first = min(self.here, max(0, self.vocab - self.shards.offset))
        return torch.cat([column[mine & (column < first)], torch.arange(first, self.here, device=device)])


@dataclass(frozen=True, kw_only=True)
class GradsNeeded:
    """The gradients that are wanted; a product that feeds none of them is not run."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False

    @property
    def any(self) -> bool:
        return self.hidden or self.weight or self.bias


@dataclass(frozen=True, kw_only=True)
class HeadSpec:
    """logits = (hidden @ weight.T + bias) / temperature over `columns`, and the gradient of Σ token_weights · loss."""

    hidden: Float[Tensor, "tokens hidden"]
    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None
    columns: Columns
    token_weights: Float[Tensor, " tokens"]
    temperature: float = 1.0
    needs: GradsNeeded = GradsNeeded()
    chunk_tokens: int
    may_store: bool = False
    """True if d(logits) of many tokens may be kept for the gradient products; else they are multiplied chunk by chunk."""
    weight_grad_dtype: torch.dtype | None = None
    """In which the weight's gradient is handed out, where that is known."""

    @property
    def dtype(self) -> torch.dtype:
        """Of logits, divergences and accumulated gradients."""
        return torch.float64 if self.hidden.dtype == torch.float64 else torch.float32

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    def at(self, index: Tensor) -> HeadSpec:
        """The specification at some of its tokens."""
        return replace(self, hidden=self.hidden[index], token_weights=self.token_weights[index])


@dataclass(frozen=True, kw_only=True)
class PolicyTerm:
    """Reinforcement learning on the same rows: weight · importance · clipped surrogate, arXiv 1707.06347.

    −min(r A, clip(r, 1−low, 1+high) A) with r = p(y) / old(y), y the response token and p the student at its loss temperature. With
    `likelihood` it is −A log p(y): cross-entropy with y, whose gradient is that of the surrogate at r = 1.
    """

    advantages: Float[Tensor, " tokens"]
    """A, without gradient. With `likelihood`, each token's weight; a token of weight 0 has a loss of 0 whatever its probability."""
    old_log_prob: Float[Tensor, " tokens"] | None = None
    """log old(y) in nats; None means the student itself, r = 1."""
    clip_range: float | tuple[float, float] | None = None
    """ε, or (low, high); None does not clip."""
    importance_weights: Float[Tensor, " tokens"] | None = None
    """Factor per token, for example a truncated trainer / rollout probability ratio; without gradient."""
    weight: float = 1.0
    """λ_rl, or that of the cross-entropy."""
    likelihood: bool = False
    """Cross-entropy with the response token in the place of the surrogate; then there is no old log-prob and nothing is clipped."""

    def at(self, index: Any) -> PolicyTerm:
        """The term at some tokens."""
        return replace(self, **tensors_at(self, index))


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """The metrics that a trainer wants beside the loss, at temperature 1."""

    target: AnyTarget | None
    """With all its top-k, where the loss reads the first few; None: the student's own numbers alone."""
    eos_ids: tuple[int, ...] = ()
    """Ids below the common vocabulary's size, whose probability is summed up."""


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """loss = distill_weight · D(S, T) + policy − entropy_bonus · H(S), for each token; all tensors are detached and checked."""

    columns: Columns
    objective: Objective
    target: AnyTarget | None
    """None: no distillation, the policy term and the entropy bonus alone."""
    response_ids: Tensor | None = None
    sampler_logp: Tensor | None = None
    sequence_index: Tensor | None = None
    """Read by a discount, which only whole logits can have."""
    policy: PolicyTerm | None = None
    entropy_bonus: float = 0.0
    distill_weight: float = 1.0
    diagnostics: Diagnostics | None = None

    def with_first_ids(self) -> RowSpec:
        """Response and EOS ids in which the first of each of `eos_groups` stands for all of it."""
        groups, seen = self.objective.eos_groups, self.diagnostics
        ids = None if self.response_ids is None else first_of(self.response_ids, groups)
        if seen is not None:
            seen = replace(seen, eos_ids=tuple(dict.fromkeys(first_of(torch.tensor(seen.eos_ids), groups).tolist())))
        return replace(self, response_ids=ids, diagnostics=seen)

    @property
    def has_extras(self) -> bool:
        """True if there is a policy term or an entropy bonus."""
        return self.policy is not None or self.entropy_bonus != 0.0

    def fits(self, divergences: Collection[str]) -> bool:
        """True if row passes that are made for these divergences, and for terms of a few tokens, have the loss."""
        objective = self.objective
        if self.target is None:
            return True
        if not target_has_logits(self.target):
            return objective.baseline == "none"
        bounded = objective.token_clip is not None
        if bounded and (self.has_extras or isinstance(self.target, TeacherMixture)):
            return False  # a row's one gradient has parts that are bounded apart from each other
        return (
            objective.support == "full" and objective.teacher_logp_floor is None and objective.divergence in divergences
        )

    def at(self, index: Any, *, whole_targets: bool = True) -> RowSpec:
        """The specification at some tokens. Row passes get a target's logits as an argument: without `whole_targets` it is left out."""
        seen = self.diagnostics
        if seen is not None:
            seen = replace(seen, target=_target_at(seen.target, index, whole_targets))
        return replace(
            self,
            target=_target_at(self.target, index, whole_targets),
            policy=None if self.policy is None else self.policy.at(index),
            diagnostics=seen,
            **tensors_at(self, index),
        )


@dataclass(kw_only=True)
class RowResults:
    """Per-token results of a chunk. The chunk's logits have become d(loss)/d(logits) / `scale`, row by row."""

    values: dict[str, Tensor]
    scale: Tensor
    """[rows]; folded into the hidden rows, which are much shorter than the vocabulary."""
    gradient: Tensor | None = None
    """Set where the gradient is not in the place of the logits but here, in the room that was offered."""
    state: dict[str, Tensor] = field(default_factory=dict)
    """Sums of rows from which their gradient can be made again; NaN in rows that were recomputed by autograd."""

    @classmethod
    def join(cls, parts: Sequence[RowResults], like: Tensor) -> RowResults:
        """One after the other; `like` gives dtype and device when there are none."""
        if not parts:
            return cls(values={}, scale=like.new_zeros(0))
        return cls(
            values={name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values},
            scale=torch.cat([part.scale for part in parts]),
            state={name: torch.cat([part.state[name] for part in parts]) for name in parts[0].state},
        )

    def nonfinite(self) -> Tensor:
        """True where the loss or an entropy is not finite: where something has probability 0, and −inf met 0."""
        seen = [self.values[name] for name in ("loss", "student_entropy", "teacher_entropy") if name in self.values]
        return ~torch.stack(seen).sum(0).isfinite()

    def nonfinite_rows(self) -> Tensor:
        """Their positions."""
        return self.nonfinite().nonzero().squeeze(-1)

    def replace(self, where: Tensor, other: RowResults) -> None:
        """Put the rows of `other` at the positions `where`."""
        for name, value in other.values.items():
            if name in self.values:
                self.values[name][where] = value.to(self.values[name].dtype)
        self.scale[where] = other.scale
        for value in self.state.values():
            value[where] = torch.nan


def bounded(rows: RowSpec, values: dict[str, Tensor], factor: Tensor) -> Tensor:
    """The gradient's factor of each row, 0 where `token_clip` bounds the row's divergence; `values` gets both. Infinite ones are left to
    the chunk loop, because 0 times their gradient would be NaN."""
    clip, divergence = rows.objective.token_clip, values["divergence"]
    if clip is None:
        return factor
    above = (divergence > clip) & divergence.isfinite()
    values["divergence"], values["clamped"] = torch.where(above, clip, divergence), above.to(divergence.dtype)
    return torch.where(above, 0.0, factor)


class RowPass(Protocol):
    """d(loss)/d(logits) from logits, in place, for the rows of a chunk."""

    fill: float
    """The value of masked logits: −inf where the pass minds them, MASKED where they just drop out."""
    makes_diagnostics: bool
    """True if the pass makes the diagnostics itself."""

    def __call__(
        self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool, room: Tensor | None = None
    ) -> RowResults:
        """A pass that can write the gradient elsewhere, rounded once, writes it into `room`, and says so in its results."""
        ...


def at(value: Tensor | None, index: Any) -> Tensor | None:
    """value[index], where there is a value."""
    return None if value is None else value[index]


def restore_neg_inf(logp: Tensor) -> Tensor:
    """Log-probs in which masked tokens have −inf again instead of MASKED."""
    return torch.where(logp < MASKED / 2, -torch.inf, logp)


def tensors_at(value: Any, index: Any) -> dict[str, Tensor]:
    """The tensors of a dataclass, each of which has a row per token, at some tokens."""
    tensors = {part.name: getattr(value, part.name) for part in fields(value)}
    return {name: tensor[index] for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def select_target(target: AnyTarget | None, index: Any) -> AnyTarget | None:
    """The target at some tokens; `index` is an index tensor or a slice."""
    if target is None:
        return None
    if not isinstance(target, TeacherMixture):
        return replace(target, **tensors_at(target, index))
    members: Any = tuple(select_target(member, index) for member in target.targets)
    weights = target.weights if target.weights.dim() == 1 else target.weights[index]
    return replace(target, targets=members, weights=weights)


def _target_at(target: AnyTarget | None, index: Any, whole_targets: bool) -> AnyTarget | None:
    return select_target(target, index) if whole_targets or not target_has_logits(target) else None


def target_has_logits(target: AnyTarget | None) -> bool:
    """True if the teacher's side is a whole row of logits."""
    return isinstance(target, (HiddenTarget, DenseTarget, TeacherMixture))


def head_spec(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: AnyTarget | None = None,
    *,
    token_weights: Tensor | None = None,
    valid_vocab: int | None = None,
    masked_ids: tuple[int, ...] = (),
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    memory: Memory = "fast",
    group: Any = None,
) -> HeadSpec:
    """Detached, over the columns that the student and `target` share. Raises ObjectiveError where there are none."""
    shards, on = Shards(weight.shape[0], group), torch.is_grad_enabled()
    if token_weights is None:
        token_weights = torch.ones(hidden.shape[:1], device=hidden.device)
    head = HeadSpec(
        hidden=hidden.detach(),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        columns=Columns(vocab=common_vocabulary(shards, target, valid_vocab), masked_ids=masked_ids, shards=shards),
        token_weights=token_weights.detach().to(torch.promote_types(hidden.dtype, torch.float32)),
        temperature=temperature,
        needs=GradsNeeded(
            hidden=on and hidden.requires_grad,
            weight=on and weight.requires_grad,
            bias=on and bias is not None and bias.requires_grad,
        ),
        chunk_tokens=chunk_tokens if chunk_tokens is not None else default_chunk(hidden, shards.size, memory),
        may_store=chunk_tokens is None and memory == "fast",
        weight_grad_dtype=weight.dtype,
    )
    check_chunk(head.chunk_tokens)
    return head


def under_autocast(head: HeadSpec) -> HeadSpec:
    """Inside `torch.autocast`, float32 hidden states and weight rounded to its dtype, as a linear layer's are."""
    device = head.hidden.device.type
    if head.hidden.dtype != torch.float32 or not torch.is_autocast_enabled(device):
        return head
    operands = torch.get_autocast_dtype(device)
    return replace(head, hidden=head.hidden.to(operands), weight=head.weight.to(operands))


def stored_tokens(head: HeadSpec) -> int:
    """Tokens whose d(logits) are kept until they are multiplied, as the device's budget allows; 0 multiplies chunk by chunk."""
    if not (head.may_store and head.hidden.is_cuda and head.weight.dtype in (torch.bfloat16, torch.float16)):
        return 0
    most = max(head.chunk_tokens, GPU_STORE_BYTES // (2 * max(1, head.columns.here)) // 64 * 64)
    return most if head.tokens <= most else max(head.chunk_tokens, most // 2)  # beside sums in float32


def common_vocabulary(shards: Shards, target: AnyTarget | None, valid_vocab: int | None) -> int:
    """Columns that exist on both sides, over all shards. Raises ObjectiveError when shards do not line up."""
    rows = shards.vocab
    if valid_vocab is not None and not 0 < valid_vocab <= rows:
        raise ObjectiveError(
            f"valid_vocab={valid_vocab}, but the student's weight has {rows} rows; it counts the rows that are tokens."
        )
    sizes = [rows if valid_vocab is None else valid_vocab]
    members = target.targets if isinstance(target, TeacherMixture) else (target,)
    for member in members:
        if isinstance(member, HiddenTarget):
            own, valid = member.head.weight.shape[0], member.head.valid_vocab
        elif isinstance(member, DenseTarget):
            own, valid = member.logits.shape[1], None
        else:
            continue
        if not shards.alone and own != shards.size:
            raise ObjectiveError(
                f"this rank has {shards.size} rows of the student's vocabulary and {own} of a teacher's: split both at the same rows "
                "(pad the smaller, and say so with valid_vocab)."
            )
        sizes.append(own if shards.alone else rows)
        if valid is not None:
            sizes.append(valid)
    if min(sizes) < 1:
        raise ObjectiveError(
            f"student and teacher have {sizes} vocabulary entries: nothing is common to both; look at valid_vocab and at the heads."
        )
    return min(sizes)


def default_chunk(hidden: Tensor, columns: int, memory: Memory) -> int:
    """Tokens per chunk: as many as fit the device's budget, and on a CPU no more than pay."""
    if memory == "minimal":
        return MINIMAL_CHUNK
    row = max(1, columns) * (8 if hidden.dtype == torch.float64 else 4)
    if hidden.is_cuda:
        return max(64, min(MAX_CHUNK, GPU_CHUNK_BYTES // row // 64 * 64))
    useful = max(CPU_CHUNK_ROWS, CPU_CACHED_BYTES // row)
    return max(16, min(MAX_CHUNK, useful, CPU_CHUNK_BYTES // row // 16 * 16))


def check_chunk(chunk_tokens: int) -> None:
    """Raise ObjectiveError for a chunk that is no number of tokens."""
    if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ObjectiveError(
            f"chunk_tokens={chunk_tokens} must be a whole number ≥ 1; leave it out for a good default."
        )


def unshard(weight: Tensor) -> Tensor:
    """A DTensor's whole value. Ranks work on tokens of their own, so its gradient is the sum over them."""
    if not hasattr(weight, "full_tensor"):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    return weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)


def kind_of(objective: Objective) -> str:
    """The divergence whose form applies: the ends of the α and β dials are KLs, and a mixture of one model could underflow."""
    name, (alpha, beta, _) = objective.divergence, objective.shape
    ends = {
        ("generalized_jsd", 0.0): "forward_kl",
        ("generalized_jsd", 1.0): "reverse_kl",
        ("skew_reverse_kl", 1.0): "reverse_kl",
        ("skew_forward_kl", 0.0): "forward_kl",
        ("forward_reverse_kl", 0.0): "reverse_kl",
        ("forward_reverse_kl", 1.0): "forward_kl",
    }
    return ends.get((name, float(alpha if name == "forward_reverse_kl" else beta)), name)


def pieces(z: Tensor) -> list[slice]:
    """The rows, some at a time."""
    rows = max(1, (GPU_PIECE if z.is_cuda else CPU_PIECE) // max(1, z.shape[1]))
    return [slice(first, min(first + rows, z.shape[0])) for first in range(0, z.shape[0], rows)]


def out_of_range(sums: Float[Tensor, "rows k"]) -> Bool[Tensor, " rows"]:
    """True where one of a row's sums has left the range; NaN counts as outside."""
    low, high = SAFE_SUM
    return ~((sums > low) & (sums < high)).all(-1)


def log_probs(z: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    """log softmax(z) by the sums of the fused row pass, so that the same logits give the same bits; by `log_softmax` where they are out
    of range."""
    sums = torch.cat([z.new_empty(0, 1), *(z[piece].exp().sum(-1, keepdim=True) for piece in pieces(z))])
    logp = z - sums.log()
    outside = out_of_range(sums)
    if bool(outside.any()):
        logp[outside] = torch.log_softmax(z[outside], dim=-1)
    return logp
