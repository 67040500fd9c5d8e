"""The row pass of the Triton implementation: kernels over whole rows, and between them torch on one number per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.few_tokens import add_few_tokens, token_slopes
from opd.kernels.rows.triton import kernels
from opd.kernels.rows.triton.kernels import INTERPRETED
from opd.kernels.spec import MASKED, RowResults, RowSpec, Teachers, bounded, kind_of, restore_neg_inf
from opd.losses import Objective, overlap, overlap_size
from opd.types import DenseTarget, HiddenTarget, TopKTarget

LANES = 1024  # of the statistics and moments: 4 entries a thread, whose sums stay in its registers (ptxas: 5 blocks fit an SM)
MAX_BLOCK = 2048  # entries of a row that the gradient works on together
LANES_WARPS = BLOCK_WARPS = 8  # fastest of five settings each on an H200 (benchmarks/LOG.md)
TIMES_BLOCK = 8192
KLS = ("reverse_kl", "forward_kl")
TWO_READS = (*KLS, "forward_reverse_kl")  # their Σ p f needs no normaliser


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Per row, relative to the largest logits: what the kernel `statistics` leaves, over all shards."""

    known: Tensor
    """[STATISTICS, rows] for the kernels that follow."""
    tops: Tensor | None = None
    """[2, rows, lanes]: largest logits of both models' lanes, where they were asked for."""

    @property
    def log_s(self) -> Tensor:
        return self.known[1].log()

    @property
    def student_entropy(self) -> Tensor:
        return self.log_s - self.known[2] / self.known[1]

    @property
    def log_q(self) -> Tensor:
        return self.known[4].log()

    @property
    def teacher_entropy(self) -> Tensor:
        return self.log_q - self.known[5] / self.known[4]

    def student_logp(self, logits: Tensor) -> Tensor:
        """Of tokens with these logits, [rows, k]; −inf where they are masked."""
        logp = logits - self.known[0].unsqueeze(-1) - self.log_s.unsqueeze(-1)
        return restore_neg_inf(logp)

    def teacher_logp(self, logits: Tensor) -> Tensor:
        """As `student_logp`, of the teacher."""
        return restore_neg_inf(logits - self.known[3].unsqueeze(-1) - self.log_q.unsqueeze(-1))

    def two_read(self, kind: str, alpha: float = 0.0) -> tuple[Tensor, Tensor]:
        """A KL, or both weighed by α, and its Σ p f, as the gradient kernel understands f."""
        s, q, reverse, forward = (self.known[row] for row in (1, 4, 6, 7))
        log_ratio = (q / s).log()
        if kind == "forward_kl":
            return forward / q - log_ratio, torch.zeros_like(s)
        value = reverse / s + log_ratio
        if kind == "forward_reverse_kl":
            value = alpha * (forward / q - log_ratio) + (1.0 - alpha) * value
        return value, reverse / s


class TritonRows:
    """Every divergence over the vocabulary, top-k and sampled targets, the policy term and the entropy bonus."""

    fill = MASKED

    def __init__(self, rows: RowSpec, logits: Tensor) -> None:
        if not (logits.is_cuda or INTERPRETED):
            raise ObjectiveError(
                "TRITON_INTERPRET=1 came too late: the kernels have been compiled for CUDA in this process; set it before the first "
                "import of opd.kernels.rows.triton."
            )
        objective, self.shards = rows.objective, rows.columns.shards
        self.kind = kind_of(objective)
        alpha, beta, _ = objective.shape
        self.alpha = alpha
        order, zero = alpha >= beta, min(alpha, beta) == 0.0
        self.constants = {"KIND": self.kind, "ORDER": order, "ZERO": zero}
        self.shape = torch.tensor(_shape(objective), dtype=logits.dtype, device=logits.device)
        temperatures = objective.student_temperature, objective.teacher_temperature
        self.scales = (
            None if temperatures == (1.0, 1.0) else torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)
        )
        whole = isinstance(rows.target, (HiddenTarget, DenseTarget))
        self.makes_diagnostics = rows.diagnostics is not None and whole and self.shards.alone
        eos = rows.diagnostics.eos_ids if rows.diagnostics is not None else ()
        self.eos = torch.tensor(eos, device=logits.device, dtype=torch.long)  # once: it waits for the device

    def __call__(
        self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool, room: Tensor | None = None
    ) -> RowResults:
        if teachers and teachers[0][0] is not None:
            return self._sum_of_losses(rows, z, teachers, gradient)
        return self._rows(rows, z, teachers[0][1] if teachers else None, out=z if gradient else None, room=room)

    def _sum_of_losses(self, rows: RowSpec, z: Tensor, teachers: Teachers, gradient: bool) -> RowResults:
        """Σ w_i D(S, T_i) + what does not depend on a teacher, which goes with the first."""
        total = torch.zeros_like(z) if gradient else None
        plain = replace(rows, policy=None, entropy_bonus=0.0)
        values: dict[str, Tensor] = {}
        for number, (weight, t) in enumerate(teachers):
            one = self._rows(plain if number else rows, z, t, out=total, weight=weight).values
            if number == 0:
                values = {name: value for name, value in one.items() if name != "teacher_entropy"}
            else:
                values |= {name: values[name] + one[name] for name in ("divergence", "loss")}
        if total is not None:
            z.copy_(total)
        return RowResults(values=values, scale=torch.ones_like(values["loss"]))

    def _rows(
        self,
        rows: RowSpec,
        z: Tensor,
        t: Tensor | None,
        *,
        out: Tensor | None,
        weight: Tensor | None = None,
        room: Tensor | None = None,
    ) -> RowResults:
        """Loss of rows against one teacher's logits `t` or a target without logits; `out` or `room` gets the gradient.

        A `weight` per row multiplies the divergence, and the gradient is added to `out`; without one it replaces it.
        """
        shards, target = self.shards, rows.target
        y_logits = None if rows.response_ids is None else shards.pick(z, rows.response_ids.unsqueeze(-1))
        k_logits = shards.pick(z, target.ids) if isinstance(target, TopKTarget) else None
        found = self._statistics(z, t, diagnostics=self.makes_diagnostics and self.scales is None)
        values = {"student_entropy": found.student_entropy}
        if y_logits is not None:
            values["student_logp"] = found.student_logp(y_logits).squeeze(-1)
        values["loss"], center = torch.zeros_like(found.log_s), torch.zeros_like(found.log_s)
        factor = weight
        if t is not None:
            values["teacher_entropy"] = found.teacher_entropy
            divergence, center = (
                found.two_read(self.kind, self.alpha) if self.kind in TWO_READS else self._moments(z, t, found)
            )
            values["divergence"] = divergence if weight is None else torch.where(weight > 0, weight * divergence, 0.0)
            if rows.objective.token_clip is not None:
                factor = bounded(rows, values, torch.ones_like(center))
            values["loss"] = rows.distill_weight * values["divergence"]
            if self.makes_diagnostics:
                values |= self._diagnostics(rows, z, t, found)
        slopes = add_few_tokens(rows, values, None if k_logits is None else found.student_logp(k_logits))
        result = RowResults(values=values, scale=torch.ones_like(values["loss"]))
        if out is None:
            return result
        adds = token_slopes(rows, slopes)
        per_row = _per_row(rows, found, center, factor, adds)
        if room is not None and (not adds or (t is None and shards.alone)):
            out = result.gradient = room
        self._gradient(z, t, found, per_row, out, extras=rows.has_extras, add=weight is not None)
        if result.gradient is None:
            for ids, slope in adds:
                shards.add_at(out, ids, slope)
        elif adds:
            put(out, few_slopes(adds, z, found, per_row))
        return result

    def _diagnostics(self, rows: RowSpec, z: Tensor, t: Tensor, found: Statistics) -> dict[str, Tensor]:
        """The metrics at temperature 1: of the same sums where that is the loss's, else of one more read."""
        assert rows.diagnostics is not None and rows.response_ids is not None
        if self.scales is not None:
            found = self._statistics(z, t, diagnostics=True, scales=self.scales)
        ids, (student, teacher) = rows.response_ids.unsqueeze(-1), (1.0, 1.0) if self.scales is None else self.scales
        reverse, forward = found.two_read("reverse_kl")[0], found.two_read("forward_kl")[0]
        eos_logp = found.student_logp(z[:, self.eos] * student)
        seen = {
            "reverse_kl": torch.where(
                reverse.isnan(), torch.inf, reverse
            ),  # a lane's infinity, times a weight that has become 0
            "forward_kl": torch.where(forward.isnan(), torch.inf, forward),
            "student_entropy": found.student_entropy,
            "teacher_entropy": found.teacher_entropy,
            "student_logp": found.student_logp(z.gather(-1, ids) * student).squeeze(-1),
            "teacher_logp": found.teacher_logp(t.gather(-1, ids) * teacher).squeeze(-1),
            "overlap": _overlap(z, t, found, rows.objective.top_k),
            "eos_prob": eos_logp.exp().sum(-1),
        }
        return {f"diagnostics/{name}": value for name, value in seen.items()}

    # ---- launches --------------------------------------------------------------------------------------------------

    def _statistics(
        self, z: Tensor, t: Tensor | None, *, diagnostics: bool = False, scales: Tensor | None = None
    ) -> Statistics:
        """`diagnostics` takes both KLs' sums and the lanes' largest logits; `scales` multiply both models' logits."""
        kinds = KLS if diagnostics or self.kind == "forward_reverse_kl" else (self.kind,)
        out, tops = _statistics(z, t, kinds, tops=diagnostics, scales=scales)
        return Statistics(known=out if self.shards.alone else self._over_shards(out), tops=tops)

    def _over_shards(self, out: Tensor) -> Tensor:
        """The statistics of the whole vocabulary: two messages per chunk, of the maxima and of the sums."""
        top_z, s, zp, top_t, q, tq, reverse, forward = out
        whole_z, whole_t = self.shards.max(top_z, top_t)
        z_move, t_move = top_z - whole_z, top_t - whole_t
        z_fade, t_fade = z_move.exp(), t_move.exp()
        crosses: list[Tensor] = []
        if self.kind in ("reverse_kl", "forward_reverse_kl"):
            crosses.append(z_fade * (reverse + s * (z_move - t_move)))
        if self.kind in ("forward_kl", "forward_reverse_kl"):
            crosses.append(t_fade * (forward + q * (t_move - z_move)))
        zp, tq = z_fade * (zp + z_move * s), t_fade * (tq + t_move * q)
        s, zp, q, tq, *crosses = self.shards.sum(z_fade * s, zp, t_fade * q, tq, *crosses)
        reverse, forward = (crosses * 2)[:2] if crosses else (torch.zeros_like(s),) * 2
        return torch.stack([whole_z, s, zp, whole_t, q, tq, reverse, forward])

    def _moments(self, z: Tensor, t: Tensor, found: Statistics) -> tuple[Tensor, Tensor]:
        rows, columns = z.shape
        out = torch.empty(2, rows, dtype=z.dtype, device=z.device)
        strides = (z.stride(0), t.stride(0))
        constants = {**self.constants, "BLOCK": block_of(columns, LANES)}
        _launch(kernels.moments, z, t, found.known, self.shape, out, rows, columns, *strides, **constants)
        (out,) = self.shards.sum(out)
        return out[0], out[1]

    def _gradient(
        self, z: Tensor, t: Tensor | None, found: Statistics, per_row: Tensor, out: Tensor, *, extras: bool, add: bool
    ) -> None:
        rows, columns = z.shape
        other = z if t is None else t
        constants = {
            **self.constants,
            "TEACHER": t is not None,
            "EXTRAS": extras or t is None,
            "ADD": add,
            "BLOCK": block_of(columns, MAX_BLOCK),
        }
        strides = (z.stride(0), other.stride(0), out.stride(0))
        _launch(kernels.gradient, z, other, out, found.known, per_row, self.shape, rows, columns, *strides, **constants)


def _statistics(
    z: Tensor, t: Tensor | None, kinds: Sequence[str] = (), *, tops: bool = False, scales: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """[STATISTICS, rows], with the sums of the KLs among `kinds`; and the lanes' largest logits, where `tops` asks for them."""
    rows, columns = z.shape
    block, other = block_of(columns, LANES), z if t is None else t
    out = torch.empty(kernels.STATISTICS, rows, dtype=z.dtype, device=z.device)
    largest = torch.empty(2, rows, block, dtype=z.dtype, device=z.device) if tops else None
    constants = {
        "TEACHER": t is not None,
        "HAS_REVERSE": t is not None and "reverse_kl" in kinds,
        "HAS_FORWARD": t is not None and "forward_kl" in kinds,
        "SCALED": scales is not None,
        "TOPS": tops,
        "BLOCK": block,
    }
    given = (out if scales is None else scales, out, out if largest is None else largest)
    _launch(kernels.statistics, z, other, *given, rows, columns, z.stride(0), other.stride(0), **constants)
    return out, largest


def log_prob_of_rows(z: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log Σ e^z, the log-prob of each row's token and the entropy, [rows] each."""
    found = Statistics(known=_statistics(z, None)[0])
    logp = found.student_logp(z.gather(-1, ids.unsqueeze(-1))).squeeze(-1)
    return found.known[0] + found.log_s, logp, found.student_entropy


def log_prob_gradient(
    z: Tensor, out: Tensor, ids: Tensor, d_logp: Tensor, d_entropy: Tensor, log_z: Tensor, entropy: Tensor
) -> None:
    """d_logp (1[v = y] − p) − d_entropy p (log p + H) of each row into `out`, which may be z."""
    known, per_row = z.new_zeros(kernels.STATISTICS, len(z)), z.new_zeros(4, len(z))
    known[0], known[1] = log_z, 1.0
    per_row[2], per_row[3] = -d_entropy, d_logp + d_entropy * entropy
    few = few_slopes([(ids.unsqueeze(-1), d_logp.unsqueeze(-1))], z, Statistics(known=known), per_row)
    constants = {"KIND": "none", "ORDER": True, "ZERO": False, "TEACHER": False, "EXTRAS": True, "ADD": False}
    strides = (z.stride(0), z.stride(0), out.stride(0))
    block = block_of(z.shape[1], MAX_BLOCK)
    _launch(kernels.gradient, z, z, out, known, per_row, per_row, *z.shape, *strides, **constants, BLOCK=block)
    put(out, few)


def put(out: Tensor, few: tuple[Tensor, Tensor]) -> None:
    """out[row, ids[row]] = values, rounded to its dtype."""
    out.scatter_(-1, few[0], few[1].to(out.dtype))


def _per_row(
    rows: RowSpec, found: Statistics, center: Tensor, weight: Tensor | None, adds: Sequence[tuple[Tensor, Tensor]]
) -> Tensor:
    """[4, rows]: w, Σ p f, and c and e of p (c log p − e), which holds −p Σ_k F'_k and the entropy bonus."""
    out = torch.zeros(4, *center.shape, dtype=center.dtype, device=center.device)
    out[0] = rows.distill_weight if weight is None else rows.distill_weight * weight
    out[1] = center
    out[2] = rows.entropy_bonus
    out[3] = -rows.entropy_bonus * found.student_entropy
    for _, slope in adds:
        out[3] += slope.sum(-1)
    return out


def few_slopes(
    adds: Sequence[tuple[Tensor, Tensor]], z: Tensor, found: Statistics, per_row: Tensor
) -> tuple[Tensor, Tensor]:
    """The ids of `adds`, and p (c log p − e) + Σ F'_k there in bulk: so it is rounded once, not before and after the sum."""
    ids = torch.cat([ids for ids, _ in adds], dim=-1)
    slopes = torch.cat([slope for _, slope in adds], dim=-1)
    logp = found.student_logp(z.gather(-1, ids))
    share, extra = per_row[2].unsqueeze(-1), per_row[3].unsqueeze(-1)
    plain = torch.where(logp.isfinite(), logp.exp() * (share * logp - extra), 0.0)
    same = ids.unsqueeze(-1) == ids.unsqueeze(-2)  # a token may stand in two lists: every place of it gets all
    return ids, plain + torch.where(same, slopes.unsqueeze(-2), 0.0).sum(-1)


def _overlap(z: Tensor, t: Tensor, found: Statistics, top_k: int | None) -> Tensor:
    """The share of the likeliest tokens that both models agree on, as `losses.top_overlap` defines it, from the lanes' largest."""
    assert found.tops is not None
    k = overlap_size(z.shape[1], top_k)
    return overlap(_likeliest(z, found.tops[0], k), _likeliest(t, found.tops[1], k))


def _likeliest(logits: Tensor, tops: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits of each row, [rows, k]."""
    columns, lanes = logits.shape[1], tops.shape[1]
    best = tops.topk(k, dim=-1, sorted=False).indices
    steps = torch.arange(0, columns, lanes, device=logits.device)
    ids = (best.unsqueeze(-1) + steps).flatten(1)
    values = logits.gather(-1, ids.clamp(max=columns - 1)).masked_fill_(ids >= columns, -torch.inf)
    return ids.gather(-1, values.topk(k, dim=-1, sorted=False).indices)


def multiply(value: Tensor, factor: Tensor) -> None:
    """value · factor in place; costs nothing where the factor, one number on the device, is 1."""
    entries, kernel = value.numel(), cast(Any, kernels.times)
    with torch.cuda.device_of(value):
        kernel[(math.ceil(entries / TIMES_BLOCK),)](value, factor, entries, BLOCK=TIMES_BLOCK, num_warps=BLOCK_WARPS)


def _shape(objective: Objective) -> tuple[float, ...]:
    """α, β and what follows from them, in the order of `kernels.ALPHA` to `kernels.EDGE`."""
    alpha, beta, normalize = objective.shape
    rest = 1.0 - beta
    inside = 0.0 < beta < 1.0
    shares = (1.0 / beta, 1.0 / rest) if normalize and inside else (rest, beta)
    small, large = min(beta, rest), max(beta, rest)
    edge = max(1.0, math.log(large / small)) if inside else 1.0
    return (alpha, beta, rest, *shares, 1.0 if beta <= 0.5 else -1.0, small, large, edge)


def _launch(kernel: Any, z: Tensor, *arguments: Any, **constants: Any) -> None:
    """One program per row of z, on its device."""
    with torch.cuda.device_of(z):
        warps = BLOCK_WARPS if kernel is kernels.gradient else LANES_WARPS
        kernel[(z.shape[0],)](z, *arguments, num_warps=warps, **constants)


def block_of(columns: int, most: int) -> int:
    """The power of two that covers a row, but no more than `most`."""
    return min(most, 1 << max(0, columns - 1).bit_length())
