"""What train.parallel=auto chooses, and the memory of one of several ranks."""

from __future__ import annotations

from typing import Any

import pytest

from opd.config.recipe import check
from opd.config.run import RunSettings
from opd.config.words import merge
from opd.doctor.memory import Memory, estimate, gathered_bytes, step_sizes
from opd.doctor.memory_checks import memory_checks
from opd.doctor.model_shape import ModelShape
from opd.doctor.parallel import choose_parallel, estimates

MATRICES = {"q_proj": (4, 4), "up_proj": (6, 4), "down_proj": (4, 6)}  # 64 entries
SHAPE = ModelShape(
    weights={
        "model.embed_tokens.weight": (16, 4),
        "lm_head.weight": (16, 4),
        **{f"model.layers.{i}.{name}.weight": shape for i in range(8) for name, shape in MATRICES.items()},
    },
    layers=8,
    hidden=4,
    heads=1,
    kv_heads=1,
    head_dim=4,
    intermediate=6,
    vocabulary=16,
)
PARAMETERS = 2 * 16 * 4 + 8 * 64
SHAPES = {"student": SHAPE, "teacher": SHAPE}


def settings(**more: object) -> RunSettings:
    base: dict[str, Any] = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher"},
        "prompts": {"path": "prompts.jsonl"},
        "rollout": {"max_new_tokens": 5},
        "train": {"prompts_per_step": 6, "samples_per_prompt": 2, "tokens_per_microbatch": 14},
    }
    return check(merge(base, {key.replace("__", "."): value for key, value in more.items()}))


def of_a_rank(ranks: int, *, divided: bool, **more: object) -> Memory:
    return estimate(settings(**more), SHAPES, 3, gpus=ranks, ranks=ranks, divided=divided)["cuda:0"]


def test_ranks_share_the_rollouts_of_a_step():
    assert [step_sizes(settings(), 3, ranks).rollouts for ranks in (1, 2, 4, 5)] == [12, 6, 3, 3]
    alone, one_of_4 = of_a_rank(1, divided=False), of_a_rank(4, divided=False)
    assert one_of_4.always == alone.always
    assert one_of_4.phases["update"]["targets"] * 4 == alone.phases["update"]["targets"]


def test_divided_weights_moments_and_teacher_are_a_rank_s_part_and_what_is_gathered_is_beside_them():
    whole, part = of_a_rank(4, divided=False), of_a_rank(4, divided=True)
    assert whole.always == {"student": 4 * PARAMETERS, "optimizer": 8 * PARAMETERS, "teacher": 2 * PARAMETERS}
    assert part.always == {name: size // 4 for name, size in whole.always.items()}
    gathered = 16 * 4 + 2 * 64  # the output layer and two layers
    assert gathered_bytes(SHAPE, 2) == 2 * gathered
    assert part.phases["rollout"]["gathered weights"] == 4 * gathered  # the student's are float32
    assert part.phases["update"]["gathered weights"] == (4 + 2) * gathered  # the teacher's are bfloat16
    assert whole.phases["update"].keys() < part.phases["update"].keys()


def test_adapters_have_no_whole_gradient_of_the_output_layer():
    full, lora = (of_a_rank(4, divided=True, **more) for more in ({}, {"student__lora__rank": 1}))
    assert full.phases["update"]["gradients"] > 4 * (16 * 4 + 2 * 64)
    assert lora.phases["update"]["gradients"] < 4 * (16 * 4 + 2 * 64)


def choice(limit: float, ranks: int = 4, **more: object) -> Any:
    limits = {"cpu": 1 << 40, **{f"cuda:{i}": int(limit) for i in range(ranks)}}
    return choose_parallel(settings(**more), SHAPES, 3, limits, ranks)


def test_auto_is_ddp_where_whole_models_fit_and_fsdp2_elsewhere_and_says_why():
    whole, part = estimates(settings(), SHAPES, 3, 4, gpus=4)
    assert part < whole
    fits, does_not = choice(whole), choice(whole - 1)
    assert fits.parallel == "ddp" and fits.why.startswith(
        "train.parallel=auto is ddp: of 0.00 GiB a rank's GPU needs about"
    )
    assert does_not.parallel == "fsdp2" and "with ddp and" in does_not.why


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"student__device": "cpu"}, "train.parallel=auto is ddp on a CPU"),
        ({"optimizer__name": "muon"}, "optimizer.name=muon orthogonalises whole matrices"),
    ],
)
def test_auto_stays_ddp_where_weights_cannot_be_divided(more, said):
    found = choice(1, **more)
    assert found.parallel == "ddp" and said in found.why


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_what_a_recipe_says_is_taken(parallel):
    assert choice(1, train__parallel=parallel).parallel == parallel


def test_a_machine_with_several_gpus_has_a_line_about_both_ways():
    (own, line) = memory_checks(settings(), SHAPES, 3, {"cuda:0": 1 << 30, "cuda:1": 1 << 30})
    assert own.seen.startswith("cuda:0 needs about")
    assert line.seen.startswith("--devices 2: train.parallel=auto is ddp: of 1.00 GiB")
    (_, line) = memory_checks(settings(train__parallel="fsdp2"), SHAPES, 3, {"cuda:0": 1 << 30, "cuda:1": 1 << 30})
    assert line.seen.startswith("--devices 2, train.parallel=fsdp2: of 1.00 GiB")
    assert len(memory_checks(settings(), SHAPES, 3, {"cuda:0": 1 << 30})) == 1
    assert len(memory_checks(settings(rollout__engine="vllm"), SHAPES, 3, {"cuda:0": 1 << 30, "cuda:1": 1 << 30})) == 1


def test_a_run_of_several_ranks_is_checked_for_one_of_them():
    whole, part = estimates(settings(), SHAPES, 3, 4, gpus=4)
    limits = {f"cuda:{i}": (whole + part) // 2 for i in range(4)}
    (divided,) = memory_checks(settings(), SHAPES, 3, limits, ranks=4)
    (not_divided,) = memory_checks(settings(train__parallel="ddp"), SHAPES, 3, limits, ranks=4)
    assert divided.seen.startswith("cuda:0 needs about") and not_divided.verdict in ("yellow", "red")
    (cpu,) = memory_checks(settings(student__device="cpu"), SHAPES, 3, {"cpu": 1 << 40}, ranks=4)
    assert "of 256.00 GiB" in cpu.seen
