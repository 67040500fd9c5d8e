"""verl's own main with a teacher in its servers: what it trained on, computed again with plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from verl_runs import Done, main_ppo, make_folder

from opd.losses import Objective
from opd.types import DenseTarget, Target, TopKTarget

STEPS = 2
TOKENS = 258  # of the byte tokenizer; the models have no other rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("verl"))


def served_run(folder: Path, trace: Path, *more: str) -> Done:
    return main_ppo(
        folder,
        *more,
        f"opd.teacher.model={folder}/teacher",
        f"opd.trace={trace}",
        f"trainer.total_training_steps={STEPS}",
    )


def again(folder: Path, trace: dict[str, torch.Tensor], objective: Objective) -> torch.Tensor:
    """The loss of every traced token, sequence by sequence, from the student as it was saved and the teacher's whole logits."""
    models = [
        AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager", dtype=torch.float32).eval()
        for name in ("student", "teacher")
    ]
    losses = []
    for start, end in trace["offsets"].unfold(0, 2, 1).tolist():
        ids = trace["input_ids"][start:end].unsqueeze(0)
        at = trace["predict_index"]
        at = at[(at >= start) & (at < end)] - start
        with torch.no_grad():
            student_logits, teacher_logits = (model(input_ids=ids).logits[0, at, :TOKENS] for model in models)
            target: Target = DenseTarget(logits=teacher_logits)
            if objective.support == "teacher_top_k":
                top = teacher_logits.log_softmax(-1).topk(objective.top_k, dim=-1)
                target = TopKTarget(ids=top.indices, teacher_logp=top.values)
            losses.append(objective.per_token_loss(student_logits, target, ids[0, at + 1])[0])
    return torch.cat(losses)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("overrides", "objective"),
    [
        (["+opd=pool", "opd.objective.top_k=64"], Objective(support="teacher_top_k", top_k=64)),
        (
            [
                "+opd=pool",
                "opd.objective.divergence=forward_kl",
                "opd.objective.top_k=16",
                "opd.rl.weight=0.5",
                "opd.rl.distill_weight=2.0",
            ],
            Objective(divergence="forward_kl", support="teacher_top_k", top_k=16),
        ),
        (["+opd=hidden"], Objective()),
    ],
    ids=["pool-reverse_kl-64", "pool-hybrid-forward_kl-16", "hidden-reverse_kl"],
)
def test_the_first_steps_loss_is_that_of_plain_transformers(
    folder: Path, tmp_path: Path, overrides: list[str], objective: Objective
):
    done = served_run(folder, tmp_path / "trace", *overrides)
    assert done.code == 0, done.log[-4000:]
    assert len(done.metrics) == STEPS
    trace = load_file(tmp_path / "trace" / "rank0_000001.safetensors")
    expected = again(folder, trace, objective)
    assert len(expected) == len(trace["predict_index"]) > 0
    assert torch.allclose(trace["loss"], expected, rtol=1e-5, atol=1e-5)
    total = float((trace["weights"] * expected).sum())
    assert done.metrics[0]["actor/opd/loss"] == pytest.approx(total, rel=1e-5)
    assert not any(name.startswith(("distillation/", "actor/distillation/")) for name in done.metrics[0])


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("opd.objective.support=full", "use support=teacher_top_k with tail=bucket"),
        ("+distillation.teacher_models.teacher_model.inference.engine_kwargs.vllm.max_logprobs=20", "max_logprobs=64"),
    ],
)
def test_a_pool_that_cannot_feed_the_loss_is_refused_before_ray_starts(folder: Path, override: str, said: str):
    done = main_ppo(
        folder,
        "+opd=pool",
        f"opd.teacher.model={folder}/teacher",
        "distillation.teacher_models.teacher_model.inference.name=vllm",
        override,
    )
    assert done.code == 1
    assert said in done.log
    assert "ray init kwargs" not in done.log
