"""verl's losses on the device: the patch's row pass on a recorded micro-batch, and the plugin's engine where verl is installed."""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gpu.sheet import CheckFailed, Sheet
from opd.integrations.verl.plugin.logits import token_losses
from opd.losses import Objective
from opd.types import DenseTarget

RECORDED = Path(__file__).parent / "verl_micro_batch.safetensors"
"""Logits of both models at the response tokens of one micro-batch, and the loss that verl's engine gave for it on a CPU;
written by benchmarks/gpu/record_verl.py."""
TESTS = Path(__file__).parents[2] / "tests" / "integrations" / "verl"
OBJECTIVES = {
    "reverse KL": Objective(),
    "forward KL": Objective(divergence="forward_kl"),
    "JSD, β = 0.3": Objective(divergence="generalized_jsd", beta=0.3),
    "skewed reverse KL, β = 0.4": Objective(divergence="skew_reverse_kl", beta=0.4),
    "teacher's top 16": Objective(support="teacher_top_k", top_k=16),
}
BOUNDS = {torch.float32: 2.0**-18, torch.bfloat16: 1.01 * 2.0**-8}
"""Of the loss and of the largest entry of a gradient: sums in another order, and two roundings of a gradient to bfloat16."""
ENGINE_BOUND = 1e-5


def measure(sheet: Sheet) -> None:
    batch = load_file(RECORDED)
    for name, objective in OBJECTIVES.items():
        for dtype in BOUNDS:
            sheet.case(
                "the patch's row pass on a recorded micro-batch, against float64",
                f"{name}, {str(dtype).removeprefix('torch.')}",
                partial(_row_pass, sheet, batch, objective, dtype),
                judged=True,
            )
    sheet.case("step 1 of verl's engine", "recorded on a CPU", partial(_recorded_loss, sheet, batch), judged=True)
    sheet.case(
        "step 1 of verl's engine",
        "the plugin on this device, against plain transformers",
        partial(_engine, sheet),
        judged=True,
        seconds=40,
        needs=("verl", "ray", "tensordict", "pytest"),
    )


def _row_pass(sheet: Sheet, batch: dict[str, Tensor], objective: Objective, dtype: torch.dtype) -> dict[str, float]:
    """Loss and gradient of the logits in `dtype` against the definition in float64 on the same rounded numbers."""
    student, teacher = (batch[name].to(dtype) for name in ("student_logits", "teacher_logits"))
    if objective.support == "teacher_top_k":
        teacher = _without_ties(teacher, objective.top_k or 1)
    leaf = student.double().requires_grad_()
    exact = objective.per_token(leaf, DenseTarget(logits=teacher.double()), batch["response_ids"]).loss
    exact.mean().backward()
    on_device = student.clone().to(sheet.device).requires_grad_()
    got = token_losses(
        on_device, [teacher.to(sheet.device)], objective, response_ids=batch["response_ids"].to(sheet.device)
    ).loss
    got.mean().backward()
    assert leaf.grad is not None and on_device.grad is not None
    return {
        "error of the losses": _apart(got, exact, BOUNDS[torch.float32]),
        "error of the gradient": _apart(on_device.grad, leaf.grad, BOUNDS[dtype]),
    }


def _without_ties(logits: Tensor, k: int) -> Tensor:
    """Rows in which any top-k names the same tokens: of equal logits, devices name different ones."""
    best = logits.double().topk(k, dim=-1)
    return logits.scatter(-1, best.indices, (best.values + 1.0).to(logits.dtype))


def _apart(got: Tensor, exact: Tensor, bound: float) -> float:
    error = float((got.detach().double().cpu() - exact.detach()).abs().max() / exact.detach().abs().max())
    if not error <= bound:
        raise CheckFailed(f"off by {error:.1e} of the largest entry, more than {bound:.1e}", {"error": error})
    return error


def _recorded_loss(sheet: Sheet, batch: dict[str, Tensor]) -> dict[str, float]:
    """The row pass gives the number that verl's engine gave, with the plugin, on a CPU."""
    logits = [batch[name].to(sheet.device) for name in ("student_logits", "teacher_logits")]
    got = float(token_losses(logits[0], logits[1:], Objective()).loss.detach().mean())
    wanted = float(batch["engine_loss"])
    cells = {"here": got, "verl's engine": wanted}
    if abs(got - wanted) > ENGINE_BOUND * abs(wanted):
        raise CheckFailed("the row pass gives another loss than verl's engine did", cells)
    return cells


def _engine(sheet: Sheet) -> dict[str, float]:
    """One optimizer step's loss and gradients by verl's own engine with the plugin, in float32."""
    if sheet.device.type == "cpu":
        os.environ["VERL_PLATFORM"] = "cpu"  # before the first import of verl
    sys.path.insert(0, str(TESTS))
    from test_engine import plainly  # pyright: ignore[reportMissingImports]
    from verl_engines import batch, engine, step  # pyright: ignore[reportMissingImports]
    from verl_world import make_models  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        loss, gradients, _ = step(engine(models), batch())
        expected, wanted = plainly(models, batch(), Objective())
    cells = {"loss": loss, "plain transformers": expected}
    if abs(loss - expected) > ENGINE_BOUND * abs(expected):
        raise CheckFailed("the engine's loss is not that of plain transformers", cells)
    worst = max(_apart(gradients[name], gradient.double(), 1.0) for name, gradient in wanted.items())
    cells["largest error of a gradient"] = worst
    if worst > 10 * ENGINE_BOUND:
        raise CheckFailed("a gradient is not that of plain transformers", cells)
    return cells
