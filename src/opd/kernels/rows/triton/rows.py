"""The row pass of the Triton implementation: kernels over whole rows, and between them torch on one number per row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.few_tokens import add_few_tokens, token_slopes
from opd.kernels.rows.triton import kernels
from opd.kernels.rows.triton.kernels import INTERPRETED
from opd.kernels.spec import MASKED, RowResults, RowSpec, Teachers, kind_of, restore_neg_inf
from opd.losses import Objective
from opd.types import TopKTarget

MAX_BLOCK = 16384  # entries of a row worked on together; with more, registers spill (Fast-LLM #547, speculators #1111)
BUSY_BLOCK = 8192  # the same where an entry costs logarithms (ptxas for sm_90: few spills or none from 8 warps on)
TWO_READS = ("reverse_kl", "forward_kl")  # their Σ p f needs no normaliser


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Per row, relative to the largest logits: what the kernel `statistics` leaves, over all shards."""

    known: Tensor
    """[7, rows] for the kernels that follow."""

    @property
    def log_s(self) -> Tensor:
        return self.known[1].log()

    @property
    def student_entropy(self) -> Tensor:
        return self.log_s - self.known[2] / self.known[1]

    @property
    def teacher_entropy(self) -> Tensor:
        return self.known[4].log() - self.known[5] / self.known[4]

    def student_logp(self, logits: Tensor) -> Tensor:
        """Of tokens with these logits, [rows, k]; −inf where they are masked."""
        logp = logits - self.known[0].unsqueeze(-1) - self.log_s.unsqueeze(-1)
        return restore_neg_inf(logp)

    def two_read(self, kind: str) -> tuple[Tensor, Tensor]:
        """A KL and its Σ p f, as the gradient kernel understands f."""
        s, q, cross = self.known[1], self.known[4], self.known[6]
        log_ratio = (q / s).log()
        if kind == "reverse_kl":
            return cross / s + log_ratio, cross / s
        return cross / q - log_ratio, torch.zeros_like(s)


class TritonRows:
    """Every divergence over the vocabulary, top-k and sampled targets, the policy term and the entropy bonus."""

    fill = MASKED
    makes_diagnostics = False

    def __init__(self, rows: RowSpec, logits: Tensor) -> None:
        if not (logits.is_cuda or INTERPRETED):
            raise ObjectiveError(
                "TRITON_INTERPRET=1 came too late: the kernels have been compiled for CUDA in this process; set it before the first "
                "import of opd.kernels.rows.triton."
            )
        objective, self.shards = rows.objective, rows.columns.shards
        self.kind = kind_of(objective)
        alpha, beta, _ = objective.shape
        order, zero = alpha >= beta, min(alpha, beta) == 0.0
        self.constants = {"KIND": self.kind, "ORDER": order, "ZERO": zero}
        self.shape = torch.tensor(_shape(objective), dtype=logits.dtype, device=logits.device)

    def __call__(self, rows: RowSpec, z: Tensor, teachers: Teachers, *, gradient: bool) -> RowResults:
        if teachers and teachers[0][0] is not None:
            return self._sum_of_losses(rows, z, teachers, gradient)
        return self._rows(rows, z, teachers[0][1] if teachers else None, out=z if gradient else None)

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
        self, rows: RowSpec, z: Tensor, t: Tensor | None, *, out: Tensor | None, weight: Tensor | None = None
    ) -> RowResults:
        """Loss of rows against one teacher's logits `t` or a target without logits; `out` gets the gradient.

        A `weight` per row multiplies the divergence, and the gradient is added to `out`; without one it replaces it.
        """
        shards, target = self.shards, rows.target
        y_logits = None if rows.response_ids is None else shards.pick(z, rows.response_ids.unsqueeze(-1))
        k_logits = shards.pick(z, target.ids) if isinstance(target, TopKTarget) else None
        found = self._statistics(z, t)
        values = {"student_entropy": found.student_entropy}
        if y_logits is not None:
            values["student_logp"] = found.student_logp(y_logits).squeeze(-1)
        values["loss"], center = torch.zeros_like(found.log_s), torch.zeros_like(found.log_s)
        if t is not None:
            values["teacher_entropy"] = found.teacher_entropy
            divergence, center = found.two_read(self.kind) if self.kind in TWO_READS else self._moments(z, t, found)
            values["divergence"] = divergence if weight is None else torch.where(weight > 0, weight * divergence, 0.0)
            values["loss"] = rows.distill_weight * values["divergence"]
        slopes = add_few_tokens(rows, values, None if k_logits is None else found.student_logp(k_logits))
        if out is not None:
            adds = token_slopes(rows, slopes)
            per_row = _per_row(rows, found, center, weight, adds)
            self._gradient(z, t, found, per_row, out, extras=rows.has_extras, add=weight is not None)
            for ids, slope in adds:
                shards.add_at(out, ids, slope)
        return RowResults(values=values, scale=torch.ones_like(values["loss"]))

    # ---- launches --------------------------------------------------------------------------------------------------

    def _statistics(self, z: Tensor, t: Tensor | None) -> Statistics:
        rows, columns = z.shape
        out, other = torch.empty(7, rows, dtype=z.dtype, device=z.device), z if t is None else t
        kind = self.kind if t is not None and self.kind in TWO_READS else "none"
        constants = {"KIND": kind, "TEACHER": t is not None, "BLOCK": block_of(columns, MAX_BLOCK)}
        _launch(kernels.statistics, z, other, out, rows, columns, z.stride(0), other.stride(0), **constants)
        return Statistics(known=out if self.shards.alone else self._over_shards(out))

    def _over_shards(self, out: Tensor) -> Tensor:
        """The statistics of the whole vocabulary: two messages per chunk, of the maxima and of the sums."""
        top_z, s, zp, top_t, q, tq, cross = out
        whole_z, whole_t = self.shards.max(top_z, top_t)
        z_move, t_move = top_z - whole_z, top_t - whole_t
        z_fade, t_fade = z_move.exp(), t_move.exp()
        if self.kind == "forward_kl":
            cross = t_fade * (cross + q * (t_move - z_move))
        else:
            cross = z_fade * (cross + s * (z_move - t_move))
        zp, tq = z_fade * (zp + z_move * s), t_fade * (tq + t_move * q)
        s, zp, q, tq, cross = self.shards.sum(z_fade * s, zp, t_fade * q, tq, cross)
        return torch.stack([whole_z, s, zp, whole_t, q, tq, cross])

    def _moments(self, z: Tensor, t: Tensor, found: Statistics) -> tuple[Tensor, Tensor]:
        rows, columns = z.shape
        out = torch.empty(2, rows, dtype=z.dtype, device=z.device)
        strides = (z.stride(0), t.stride(0))
        constants = {**self.constants, "BLOCK": block_of(columns, BUSY_BLOCK)}
        _launch(kernels.moments, z, t, found.known, self.shape, out, rows, columns, *strides, **constants)
        (out,) = self.shards.sum(out)
        return out[0], out[1]

    def _gradient(
        self, z: Tensor, t: Tensor | None, found: Statistics, per_row: Tensor, out: Tensor, *, extras: bool, add: bool
    ) -> None:
        rows, columns = z.shape
        other = z if t is None else t
        busy = t is not None and self.kind not in TWO_READS
        constants = {
            **self.constants,
            "TEACHER": t is not None,
            "EXTRAS": extras or t is None,
            "ADD": add,
            "BLOCK": block_of(columns, BUSY_BLOCK if busy else MAX_BLOCK),
        }
        if not kernels.INTERPRETED:
            # Tuning runs a kernel many times, which this one, in place, does not survive: it takes what suits the one before it.
            before: Any = kernels.moments if busy else kernels.statistics
            constants["num_warps"] = before.best_config.num_warps
        strides = (z.stride(0), other.stride(0), out.stride(0))
        _launch(kernels.gradient, z, other, out, found.known, per_row, self.shape, rows, columns, *strides, **constants)


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
        kernel[(z.shape[0],)](z, *arguments, **constants)


def block_of(columns: int, most: int) -> int:
    """The power of two that covers a row, but no more than `most`."""
    return min(most, 1 << max(0, columns - 1).bit_length())
