"""`python -m verl.trainer.main_ppo` in a patched release, without the plugin: what was trained is recomputed with plain transformers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed, so it cannot be run", allow_module_level=True)

sys.path.append(str(Path(__file__).parents[1] / "verl"))

from patch_trees import VERSIONS, make_tree, release, script
from transformers import AutoModelForCausalLM
from verl_runs import Done, main_ppo, make_folder

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SOURCE = Path(__file__).parents[3] / "src"
"""For the platform and the rollout on a CPU, which are no part of the patch."""
HARNESS = (Path(__file__).parents[1] / "verl", Path(__file__).parent)
LOSS = "actor_rollout_ref.actor.policy_loss"
STEPS = 3
INSTALLED = importlib.metadata.version("verl")
RUNNABLE = [version for version in VERSIONS if version.split(".")[:2] == INSTALLED.split(".")[:2]]
"""The releases whose dependencies this environment has."""
OLD = INSTALLED.startswith("0.8.")  # it has no platforms, and pools of devices that are named after the device
MODULES = (
    "verl080_cpu,verl080_rollout,opd.integrations.verl.dry_run.register"
    if OLD
    else "opd.integrations.verl.dry_run.platform"
)
OF_THE_RELEASE = (
    ["+ray_kwargs.ray_init.resources={cpu:8}", "actor_rollout_ref.rollout.calculate_log_probs=True"] if OLD else []
)
Loss = Callable[..., Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    version = getattr(request, "param", RUNNABLE[-1])
    made = make_tree(tmp_path_factory.mktemp("patched") / "verl tree", release(version))
    assert script(made).returncode == 0
    return made


def trained(tree: Path, folder: Path, trace: Path, *more: str, steps: int = 1) -> Done:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tree), str(SOURCE), *map(str, HARNESS)]))
        patch.setenv("VERL_USE_EXTERNAL_PLUGINS", "none")
        patch.setenv("VERL_USE_EXTERNAL_MODULES", MODULES)
        done = main_ppo(
            folder,
            f"{LOSS}.loss_mode=on_policy_distillation",
            f"{LOSS}.opd.trace={trace}",
            f"trainer.total_training_steps={steps}",
            *OF_THE_RELEASE,
            *more,
        )
    assert done.code == 0, done.log[-4000:]
    assert len(done.metrics) == steps
    assert "on-policy distillation: DistillationSettings(" in done.log
    assert "opd 0." not in done.log and not any(name.startswith("actor/opd/") for name in done.metrics[0])  # no plugin
    return done


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum(-1)


def recomputed(
    folder: Path, trace: Path, loss: Loss, *teachers: str, parts: Sequence[str] = ("rank0_000001",)
) -> tuple[Tensor, Tensor]:
    """The loss of each response token of these micro-batches, from whole logits in float64; and what the run said it was."""
    student, *experts = (
        AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="eager", dtype=torch.float64)
        for name in ("student", *teachers)
    )
    ours, said = [], []
    for part in parts:
        data = torch.load(trace / f"{part}.pt")
        losses = []
        with torch.no_grad():
            for start, end in pairwise(data["offsets"].tolist()):
                ids = data["input_ids"][start:end].unsqueeze(0)
                rows = [model(input_ids=ids).logits[0, :, :258].log_softmax(-1) for model in (student, *experts)]
                losses.append(loss(*rows))
        ours.append(torch.cat(losses)[data["predict_index"]])
        said.append(data["loss"].double())
    return torch.cat(ours), torch.cat(said)


@pytest.mark.parametrize("tree", RUNNABLE, indirect=True)
def test_main_ppo_trains_and_its_first_loss_is_that_of_plain_transformers(tree: Path, folder: Path):
    trace = folder / ("trace-" + (tree / "verl/version/version").read_text().strip())
    done = trained(tree, folder, trace, f"{LOSS}.opd.teacher.model={folder}/teacher", steps=STEPS)
    per_token, said = recomputed(folder, trace, kl, "teacher")
    torch.testing.assert_close(said, per_token, atol=1e-5, rtol=0)
    mean = float(per_token.mean())
    assert mean > 0.1
    first = done.metrics[0]
    assert first["actor/loss"] == pytest.approx(mean, abs=1e-5)
    assert first["actor/distillation/reverse_kl"] == pytest.approx(mean, abs=1e-5)
    losses = [step["actor/distillation/loss"] for step in done.metrics]
    assert losses[-1] < losses[0]
    drift = [step["training/rollout_probs_diff_max"] for step in done.metrics]
    assert max(drift) < (0.05 if OLD else 1e-5), drift  # 0.8 sends the rollout its weights in bfloat16


def test_two_ranks_padded_micro_batches_two_teachers_and_a_policy_loss(tree: Path, folder: Path):
    """FSDP2 over gloo with token counts that differ; rollouts at another temperature than the loss; teachers of other widths; GRPO beside it."""
    trace = folder / "hybrid"
    done = trained(
        tree,
        folder,
        trace,
        f"+{LOSS}.opd.teachers.one.model={folder}/teacher",
        f"+{LOSS}.opd.teachers.other.model={folder}/wide",
        f"{LOSS}.opd.mixture.weights={{one:0.25,other:0.75}}",
        f"{LOSS}.distillation_type=generalized_jsd",
        f"{LOSS}.distillation_beta=0.3",
        f"{LOSS}.distillation_temperature=2.0",
        f"{LOSS}.hybrid_lambda_rl=0.5",
        f"{LOSS}.hybrid_lambda_distill=2.0",
        "actor_rollout_ref.rollout.temperature=0.7",
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
        "actor_rollout_ref.model.use_remove_padding=false",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=2",
        "trainer.n_gpus_per_node=2",
    )

    def jsd(student: Tensor, one: Tensor, other: Tensor) -> Tensor:
        p, q1, q2 = ((x / 2.0).log_softmax(-1) for x in (student, one, other))
        q = (0.25 * q1.exp() + 0.75 * q2.exp()).log()
        m = (0.3 * q.exp() + 0.7 * p.exp()).log()
        return kl(q, m) / 0.7 + kl(p, m) / 0.3

    parts = [f"rank{rank}_00000{number}" for rank in (0, 1) for number in (1, 2)]
    per_token, said = recomputed(folder, trace, jsd, "teacher", "wide", parts=parts)
    torch.testing.assert_close(said, per_token, atol=1e-5, rtol=0)
    first = done.metrics[0]
    assert first["actor/distillation/loss"] == pytest.approx(float(per_token.mean()), abs=1e-5)
    expected = 2.0 * float(per_token.mean()) + 0.5 * first["actor/pg_loss"]
    assert first["actor/loss"] == pytest.approx(expected, abs=1e-5)
