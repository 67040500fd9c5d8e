"""The definition: whole logits, `losses`, autograd. Every other implementation is held to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from opd.kernels.chunk_loop import HeadLogits
from opd.kernels.full_logits import diagnostics_from_logits, loss_from_logits
from opd.kernels.spec import Columns, RowResults, RowSpec
from opd.losses import weighted_sum
from opd.types import DenseTarget, HiddenTarget, TeacherMixture


def run_whole(student: HeadLogits, rows: RowSpec) -> RowResults:
    """Every row's results; the gradients are set in `student`."""
    head = student.head
    operands = (head.hidden, head.needs.hidden), (head.weight, head.needs.weight), (head.bias, head.needs.bias)
    hidden, weight, bias = leaves = [
        None if value is None else value.detach().to(head.dtype).requires_grad_(wanted) for value, wanted in operands
    ]
    assert hidden is not None and weight is not None
    with torch.enable_grad():
        logits = _masked(F.linear(hidden, weight, bias), rows.columns)
        target = _with_logits(rows.target, rows.columns, head.dtype)
        loss, values = loss_from_logits(rows, logits, target)
        total = weighted_sum(loss, head.token_weights)
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        found = list(torch.autograd.grad(total, wanted)) if wanted else []
    gradients = [found.pop(0) if leaf is not None and leaf.requires_grad else None for leaf in leaves]
    student.hidden_grad, student.weight_grad, student.bias_grad = gradients
    values["loss"] = loss.detach()
    if rows.diagnostics is not None:
        seen = _with_logits(rows.diagnostics.target, rows.columns, head.dtype)
        found = diagnostics_from_logits(rows, logits, seen)
        values |= {f"diagnostics/{name}": value for name, value in found.items()}
    values = {name: value.to(head.dtype) for name, value in values.items()}
    return RowResults(values=values, scale=torch.ones_like(values["loss"]))


def _masked(logits: Tensor, columns: Columns) -> Tensor:
    logits = logits[:, : columns.vocab]
    if columns.masked_ids:
        logits = logits.index_fill(-1, torch.tensor(columns.masked_ids, device=logits.device), -torch.inf)
    return logits


def _with_logits(target: Any, columns: Columns, dtype: torch.dtype) -> Any:
    """Logits over the common vocabulary in place of hidden states."""
    if isinstance(target, TeacherMixture):
        return replace(target, targets=tuple(_with_logits(member, columns, dtype) for member in target.targets))
    if isinstance(target, HiddenTarget):
        head, bias = target.head, target.head.bias
        logits = F.linear(target.hidden.to(dtype), head.weight.to(dtype), None if bias is None else bias.to(dtype))
        target = DenseTarget(logits=logits)
    return DenseTarget(logits=_masked(target.logits, columns)) if isinstance(target, DenseTarget) else target
