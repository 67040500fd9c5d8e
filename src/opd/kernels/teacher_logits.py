"""Teacher logits of a chunk of tokens, of one teacher or of several that are mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.kernels.output_layer import OutputLayer, mask_columns
from opd.kernels.row_spec import RowSpec
from opd.types import DenseTarget, HiddenTarget, TeacherMixture

Teachers = Sequence[tuple[Tensor | None, Tensor]]
"""(weight per token, logits [rows, columns]) of each distribution that the student is compared with; one alone has weight None."""


class TeacherLogits:
    """Logits divided by the teacher's temperature, in buffers that are made once."""

    def __init__(self, rows: RowSpec, new_buffer: Callable[[], Tensor]) -> None:
        target = rows.target
        self.shards, self.columns = rows.columns.shards, rows.columns.here
        self.temperature = rows.objective.teacher_temperature
        self.mixture = target if isinstance(target, TeacherMixture) else None
        self.members: list[HiddenTarget | DenseTarget] = []
        if isinstance(target, (HiddenTarget, DenseTarget)):
            self.members = [target]
        elif self.mixture is not None:
            self.members = list(self.mixture.targets)
        if not self.members:
            return
        apart = self.mixture is None or self.mixture.mixture == "loss"
        self.buffers = [new_buffer() for _ in (self.members if apart else self.members[:2])]
        self.dtype = self.buffers[0].dtype
        self.masked = rows.columns.masked(self.buffers[0].device)
        self.layers = [self._layer(member) for member in self.members]

    def _layer(self, member: HiddenTarget | DenseTarget) -> OutputLayer | None:
        if isinstance(member, DenseTarget):
            return None
        head = member.head
        return OutputLayer(
            head.weight[: self.columns],
            None if head.bias is None else head.bias[: self.columns],
            dtype=self.dtype,
            temperature=self.temperature,
            masked=self.masked,
        )

    def logits(self, index: slice | Tensor, rows: int, fill: float) -> Teachers:
        """Of the tokens `index`, `rows` in number; masked columns are `fill`. Empty without a teacher that has logits."""
        if not self.members:
            return []
        buffers = [buffer[:rows] if rows <= len(buffer) else buffer.new_empty(rows, self.columns) for buffer in self.buffers]  # fmt: skip
        if self.mixture is None:
            return [(None, self.member(0, index, buffers[0], fill))]
        weights = self.mixture.weights.to(self.dtype)
        per_token = (weights.expand(rows, -1) if weights.dim() == 1 else weights[index]).unbind(-1)
        if self.mixture.mixture == "loss":
            return [(w, self.member(i, index, buffers[i], fill)) for i, w in enumerate(per_token)]
        return [(None, self._mixed(per_token, index, buffers, fill))]

    def member(self, number: int, index: slice | Tensor, out: Tensor, fill: float, first: int = 0) -> Tensor:
        """One teacher's logits of the columns [first, first + out's width) into `out`."""
        member, layer = self.members[number], self.layers[number]
        if layer is not None:
            assert isinstance(member, HiddenTarget)
            return layer.logits(member.hidden[index], out, fill, first)
        assert isinstance(member, DenseTarget)
        out.copy_(member.logits[index, first : first + out.shape[1]])
        if self.temperature != 1.0:
            out.div_(self.temperature)
        return mask_columns(out, self.masked, fill, first, self.columns)

    def _mixed(
        self, weights: Sequence[Tensor], index: slice | Tensor, buffers: Sequence[Tensor], fill: float
    ) -> Tensor:
        """log Σ w_i q_i, or Σ w_i log q_i up to a constant per row, which the row pass takes out."""
        assert self.mixture is not None
        by_probability = self.mixture.mixture == "probability"
        total, other = buffers[0], buffers[-1]
        for number, weight in enumerate(weights):
            member = self.member(number, index, total if number == 0 else other, fill)
            member.sub_(self._log_normalizer(member))
            if by_probability:
                member.add_(weight.log().unsqueeze(-1))
            else:
                member.mul_(weight.unsqueeze(-1))
                if fill == -math.inf:
                    member.nan_to_num_(nan=0.0, neginf=fill)  # 0 · −inf: a teacher of weight 0 says nothing
            if number and by_probability:
                torch.logaddexp(total, member, out=total)
            elif number:
                total.add_(member)
        mask_columns(total, self.masked, fill, 0, self.columns)
        if fill == -math.inf and not by_probability and bool((self.shards.top(total, fill) == fill).any()):
            raise ObjectiveError(
                "mixture='logit' has no tokens left at some position: every token is impossible for one of the teachers; "
                "use mixture='probability'."
            )
        return total

    def _log_normalizer(self, logits: Tensor) -> Tensor:
        if self.shards.alone:
            return logits.logsumexp(-1, keepdim=True)
        top = self.shards.top(logits, -math.inf)
        (mass,) = self.shards.sum((logits - top).exp().sum(-1, keepdim=True))
        return top + mass.log()
