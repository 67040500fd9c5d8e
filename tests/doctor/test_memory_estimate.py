"""The memory estimate: sums that a pencil can check, the kernels' own numbers, and the largest micro-batch that fits."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opd.config.model import LoadOptionsConfig
from opd.config.recipe import check
from opd.config.run import RunSettings
from opd.config.words import merge
from opd.doctor import memory
from opd.doctor.check import Check
from opd.doctor.device_memory import device_memory
from opd.doctor.memory import Memory, StepSizes
from opd.doctor.memory_checks import memory_checks
from opd.doctor.model_shape import ModelShape, shape_of
from opd.kernels import spec
from opd.testing import tiny_causal_lm

LAYER = {"q_proj": (8, 4), "k_proj": (4, 4), "v_proj": (4, 4), "o_proj": (4, 8), "up_proj": (6, 4), "down_proj": (4, 6)}
WEIGHTS = {
    "model.embed_tokens.weight": (10, 4),
    "lm_head.weight": (10, 4),
    "model.norm.weight": (4,),
    **{f"model.layers.0.{name}.weight": shape for name, shape in LAYER.items()},
}
MATRICES = 32 + 16 + 16 + 32 + 24 + 24
PARAMETERS = MATRICES + 40 + 40 + 4
SHAPE = ModelShape(
    weights=WEIGHTS, layers=1, hidden=4, heads=2, kv_heads=1, head_dim=4, intermediate=6, vocabulary=10, gated=True
)


def settings(**more: object) -> RunSettings:
    """4 rollouts of 3 + 5 tokens, 7 of which a model reads."""
    base: dict[str, Any] = {
        "student": {"model": "student"},
        "teacher": {"model": "teacher", "tokens_per_batch": 14},
        "prompts": {"path": "prompts.jsonl"},
        "rollout": {"max_new_tokens": 5},
        "train": {"prompts_per_step": 2, "samples_per_prompt": 2, "tokens_per_microbatch": 14},
    }
    return check(merge(base, {key.replace("__", "."): value for key, value in more.items()}))


def estimated(gpus: int = 0, **more: object) -> dict[str, Memory]:
    return memory.estimate(settings(**more), {"student": SHAPE, "teacher": SHAPE}, 3, gpus=gpus)


def test_parameters_and_matrices_are_counted():
    assert SHAPE.parameters == PARAMETERS
    assert sum(a * b for a, b in SHAPE.hidden_matrices.values()) == MATRICES


def test_weights_are_counted_in_their_dtype_and_quantised_ones_without_embeddings():
    assert memory.weight_bytes(SHAPE, 2) == 2 * PARAMETERS
    assert memory.weight_bytes(SHAPE, 2, LoadOptionsConfig(quantization="bitsandbytes-8bit")) == MATRICES + 2 * 84
    assert memory.weight_bytes(SHAPE, 2, LoadOptionsConfig(quantization="bitsandbytes-4bit")) == 81 + 2 * 84


def test_an_adapter_has_two_factors_beside_every_hidden_matrix():
    assert memory.lora_parameters(SHAPE, 3) == 3 * (12 + 8 + 8 + 12 + 10 + 10)


@pytest.mark.parametrize(
    ("name", "per_matrix_entry", "per_other_entry"), [("adamw", 2, 2), ("muon", 1, 2), ("natural_gradient", 0, 0)]
)
def test_optimizers_keep_their_moments(name: str, per_matrix_entry: int, per_other_entry: int):
    state = memory.optimizer_bytes(SHAPE, name, PARAMETERS, 4, lora=False)
    assert state == 4 * (per_matrix_entry * MATRICES + per_other_entry * (PARAMETERS - MATRICES))


def test_a_layer_keeps_what_its_backward_pass_reads():
    """Two norms of 4 × (4 + 4 + 4) bytes, five rows of 8 entries, four of 6."""
    assert memory.layer_bytes(SHAPE, 4, 4) == 2 * 4 * 12 + 5 * 8 * 4 + 4 * 6 * 4
    # In bfloat16 the norm still keeps its input in float32.
    assert memory.layer_bytes(SHAPE, 2, 2) == 2 * 4 * 8 + 5 * 8 * 2 + 4 * 6 * 2
    # Queries of 8 and keys of 4, before and after their norm.
    assert memory.layer_bytes(replace(SHAPE, normed_heads=True), 4, 4) - memory.layer_bytes(SHAPE, 4, 4) == 12 * 8


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all():
    deep = replace(SHAPE, layers=10)
    layer = memory.layer_bytes(SHAPE, 4, 4)
    assert memory.activation_bytes(deep, 7, 4, 4, checkpointing=False) == 7 * (10 * layer + 4 * 12)
    assert memory.activation_bytes(deep, 7, 4, 4, checkpointing=True) == 7 * (10 * 4 * 4 + layer)


def test_the_cache_holds_keys_and_values_of_every_layer():
    deep = replace(SHAPE, layers=3)
    assert memory.cache_bytes(deep, rows=2, tokens=5, size=2) == (3 + 1) * 2 * 4 * 2 * 5 * 2


@pytest.mark.parametrize("vocabulary", [10, 1000, 32_000, 151_936, 262_144])
@pytest.mark.parametrize("gpu", [False, True])
def test_the_chunk_is_the_one_that_the_kernels_take(vocabulary: int, gpu: bool):
    hidden: Any = SimpleNamespace(dtype=torch.float32, is_cuda=gpu)
    assert memory.loss_chunk(vocabulary, gpu=gpu, minimal=False) == spec.default_chunk(hidden, vocabulary, "fast")
    assert memory.loss_chunk(vocabulary, gpu=gpu, minimal=True) == spec.default_chunk(hidden, vocabulary, "minimal")


def test_the_kernels_constants_are_the_same():
    names = ("CPU_CHUNK_BYTES", "CPU_CHUNK_ROWS", "CPU_CACHED_BYTES", "GPU_CHUNK_BYTES", "GPU_STORE_BYTES")
    for name in (*names, "MAX_CHUNK", "MINIMAL_CHUNK"):
        assert getattr(memory, name) == getattr(spec, name), name


@pytest.mark.parametrize("tokens", [100, 3000, 8192, 20_000])
def test_a_gpu_keeps_the_gradients_of_logits_in_16_bits(tokens: int):
    """What the loss needs with bfloat16 products beyond what it needs without is the kernels' store."""
    wide = replace(SHAPE, vocabulary=151_936)
    options = {"gpu": True, "minimal": False, "trains_head": False}
    extra = memory.loss_bytes(wide, tokens, 2, **options) - memory.loss_bytes(wide, tokens, 4, **options)
    weight = SimpleNamespace(dtype=torch.bfloat16)
    chunk = memory.loss_chunk(151_936, gpu=True, minimal=False)
    head: Any = SimpleNamespace(
        may_store=True,
        hidden=SimpleNamespace(is_cuda=True),
        weight=weight,
        columns=SimpleNamespace(here=151_936),
        chunk_tokens=chunk,
        tokens=tokens,
    )
    assert extra == 2 * 151_936 * min(tokens, spec.stored_tokens(head))


def test_the_loss_holds_the_logits_of_a_chunk_of_both_models():
    assert memory.loss_bytes(SHAPE, 6, 4, gpu=False, minimal=False, trains_head=False) == 2 * 6 * 10 * 4 + 2 * 6 * 4 * 4
    with_head = memory.loss_bytes(SHAPE, 6, 4, gpu=False, minimal=False, trains_head=True)
    assert with_head - 2 * 6 * 10 * 4 - 2 * 6 * 4 * 4 == 10 * 4 * 4
    assert memory.loss_bytes(SHAPE, 6, 4, gpu=False, minimal=True, trains_head=False) == 2 * 6 * 4 * 4


def test_sequences_that_fit_a_batch_are_counted_whole():
    sizes = StepSizes(prompt=3, response=5, rollouts=4)
    assert sizes.length == 7
    assert [sizes.rows_in(tokens) for tokens in (1, 7, 13, 14, 27, 28, 1000)] == [1, 1, 1, 2, 3, 4, 4]


def test_a_run_on_one_device_by_hand():
    here = estimated()
    assert set(here) == {"cpu"}
    found = here["cpu"]
    assert found.always == {"student": 4 * PARAMETERS, "optimizer": 8 * PARAMETERS, "teacher": 4 * PARAMETERS}
    assert set(found.phases) == {"rollout", "teacher", "update"}
    targets = 4 * 5 * 4 * 4  # hidden states of every response token of the step
    assert found.phases["update"] == {
        "gradients": 4 * PARAMETERS,
        "activations": 14 * (memory.layer_bytes(SHAPE, 4, 4) + 4 * 12),
        "loss": memory.loss_bytes(SHAPE, 10, 4, gpu=False, minimal=False, trains_head=True),
        "targets": targets,
    }
    assert found.phases["teacher"] == {"forward pass": memory.forward_bytes(SHAPE, 14, 4), "targets": targets}
    assert found.phase == "update"
    assert found.peak == sum(found.always.values()) + sum(found.phases["update"].values())


def test_the_gradients_of_one_micro_batch_come_as_its_activations_go():
    alone = estimated(train__tokens_per_microbatch=28)["cpu"].phases["update"]
    assert alone["gradients"] == max(0, 4 * PARAMETERS - alone["activations"]) == 0
    large = replace(SHAPE, weights={**WEIGHTS, "model.embed_tokens.weight": (10_000, 4)})
    run = settings(train__tokens_per_microbatch=28)
    found = memory.estimate(run, {"student": large, "teacher": SHAPE}, 3)["cpu"].phases["update"]
    assert found["gradients"] + found["activations"] == 4 * large.parameters


def test_a_teacher_on_its_own_gpu_leaves_the_students():
    alone, apart = estimated(gpus=2), estimated(gpus=2, student__device="cuda:0", teacher__device="cuda:1")
    assert set(alone) == {"cuda:0"} and set(apart) == {"cuda:0", "cuda:1"}
    assert apart["cuda:1"].always == {"teacher": 2 * PARAMETERS}  # auto is bfloat16 on a GPU
    assert "teacher" not in apart["cuda:0"].always
    assert "targets" in apart["cuda:0"].phases["update"]


def test_an_offloaded_teacher_is_on_the_device_while_it_is_asked():
    found = estimated(gpus=1, teacher__offload=True)
    assert found["cpu"].always == {"teacher": 2 * PARAMETERS}
    assert "teacher" not in found["cuda:0"].always
    assert found["cuda:0"].phases["teacher"]["weights that are moved in"] == 2 * PARAMETERS


def test_a_teacher_behind_a_server_takes_nothing_here():
    served = settings(
        teacher={"url": "http://127.0.0.1:8000"}, objective={"support": "teacher_top_k", "tail": "sampled"}
    )
    found = memory.estimate(served, {"student": SHAPE}, 3)["cpu"]
    assert "teacher" not in found.always and "teacher" not in found.phases


def test_adapters_train_in_float32_beside_a_frozen_student():
    found = estimated(student__lora={"rank": 3}, student__dtype="bfloat16")["cpu"]
    entries = memory.lora_parameters(SHAPE, 3)
    assert found.always["student"] == 2 * PARAMETERS
    assert (found.always["adapters"], found.always["optimizer"]) == (4 * entries, 8 * entries)
    assert found.phases["update"]["gradients"] == 4 * entries


def test_autocast_halves_products_and_keeps_copies_of_the_matrices():
    plain, cast = estimated()["cpu"].phases["update"], estimated(train__autocast="bfloat16")["cpu"].phases["update"]
    assert cast["weights in bfloat16"] == 2 * MATRICES
    assert cast["activations"] < plain["activations"] and cast["gradients"] == plain["gradients"]


def test_a_reward_alone_needs_no_teacher_and_a_moving_average_needs_a_copy():
    rewarded = {"rl": {"weight": 1.0, "distill_weight": 0.0}, "rl__reference_kl": 0.1}
    found = memory.estimate(settings(**rewarded), {"student": SHAPE, "teacher": SHAPE}, 3)["cpu"]
    assert "teacher" not in found.always and found.always["reference"] == 4 * PARAMETERS
    own = settings(teacher={"source": "ema"}, prompts__teacher_prompt="{{ prompt }}!")
    assert memory.estimate(own, {"student": SHAPE}, 3)["cpu"].always["moving average"] == 4 * PARAMETERS


def test_the_largest_micro_batch_fits_and_one_more_sequence_does_not():
    shapes, run = {"student": SHAPE, "teacher": SHAPE}, settings()
    for rows in (1, 2, 3, 4):
        exact = replace(run, train=replace(run.train, tokens_per_microbatch=7 * rows))
        peak = memory.estimate(exact, shapes, 3)["cpu"].peak
        assert memory.largest_microbatch(run, shapes, 3, {"cpu": peak}) == 7 * rows
        below = memory.largest_microbatch(run, shapes, 3, {"cpu": peak - 1})
        assert below == (7 * (rows - 1) if rows > 1 else None)
    assert memory.largest_microbatch(run, shapes, 3, {}) == 28  # nothing limits it


def test_a_micro_batch_that_is_left_open_has_1_gib_of_activations_on_a_cpu():
    open_run = settings(train__tokens_per_microbatch=None)
    smol = ModelShape(
        weights={},
        layers=30,
        hidden=576,
        heads=9,
        kv_heads=3,
        head_dim=64,
        intermediate=1536,
        vocabulary=49152,
        gated=True,
    )
    tokens = memory.microbatch_tokens(open_run, smol, gpu=False)
    assert 512 < tokens < 1024 and tokens % 64 == 0
    needed = memory.activation_bytes(smol, tokens, 4, 4, checkpointing=False)
    assert (1 << 30) * 0.9 < needed <= 1 << 30 < memory.activation_bytes(smol, tokens + 64, 4, 4, checkpointing=False)
    wide = replace(smol, hidden=4096, intermediate=16384)
    assert memory.microbatch_tokens(open_run, wide, gpu=False) == 512
    assert (
        memory.microbatch_tokens(open_run, SHAPE, gpu=False)
        == memory.microbatch_tokens(open_run, smol, gpu=True)
        == 8192
    )
    chosen = settings(train__tokens_per_microbatch=21)
    assert memory.microbatch_tokens(chosen, wide, gpu=False) == memory.microbatch_tokens(chosen, wide, gpu=True) == 21


def test_the_estimate_is_of_the_micro_batch_that_is_taken():
    """400 rollouts of a wide model are several micro-batches on a CPU, and a larger one that would just fit is no advice."""
    wide = replace(SHAPE, layers=40, intermediate=8000)
    run = settings(train__tokens_per_microbatch=None, train__samples_per_prompt=200)
    shapes = {"student": wide, "teacher": SHAPE}
    tokens = memory.microbatch_tokens(run, wide, gpu=False)
    found = memory.estimate(run, shapes, 3)["cpu"].phases["update"]["activations"]
    assert found == memory.activation_bytes(wide, tokens // 7 * 7, 4, 4, checkpointing=False)
    (check,) = memory_checks(run, shapes, 3, {"cpu": int(1.1 * memory.estimate(run, shapes, 3)["cpu"].peak)})
    assert "It is close; a smaller train.tokens_per_microbatch" in check.seen


def test_the_shape_of_a_config_is_that_of_the_model():
    model = tiny_causal_lm(13, architecture="gpt2", hidden=16, layers=2, heads=4)
    weights = {name: tuple(p.shape) for name, p in model.named_parameters()}
    shape = shape_of(model.config, weights)
    assert (shape.layers, shape.hidden, shape.kv_heads, shape.head_dim, shape.intermediate) == (2, 16, 4, 4, 64)
    assert not shape.gated and not shape.normed_heads
    assert all("wte" not in name and "wpe" not in name for name in shape.hidden_matrices)


def findings(limit: float, **more: object) -> Check:
    peak = estimated(**more)["cpu"].peak
    (found,) = memory_checks(settings(**more), {"student": SHAPE, "teacher": SHAPE}, 3, {"cpu": int(limit * peak)})
    return found


@pytest.mark.parametrize(("limit", "level"), [(1.2, "green"), (1.1, "yellow"), (0.9, "yellow"), (0.8, "red")])
def test_what_is_near_the_limit_is_yellow_and_what_is_far_above_it_red(limit: float, level: str):
    found = findings(limit, train__tokens_per_microbatch=28)
    assert found.verdict == level
    assert found.seen.startswith("cpu needs about") and "in the update (" in found.seen


def test_the_advised_micro_batch_fits():
    run = {"train__tokens_per_microbatch": 28}
    one_less = estimated(train__tokens_per_microbatch=21)["cpu"].peak
    (found,) = memory_checks(settings(**run), {"student": SHAPE, "teacher": SHAPE}, 3, {"cpu": one_less})
    assert "The largest train.tokens_per_microbatch that fits is 21" in found.seen
    assert "No train.tokens_per_microbatch is small enough" in findings(0.1, **run).seen


def test_where_sampling_needs_most_the_advice_is_about_sampling():
    wide = replace(SHAPE, vocabulary=100_000)
    sampling = {"train__samples_per_prompt": 100, "train__tokens_per_microbatch": 7}
    (found,) = memory_checks(settings(**sampling), {"student": wide, "teacher": wide}, 3, {"cpu": 1})
    assert "Lower rollout.batch_size=256" in found.seen


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_offloaded_moments_are_in_main_memory_and_on_the_device_beside_gradients_alone(name):
    run = {"optimizer__name": name, "train__tokens_per_microbatch": 7}
    kept, moved = (estimated(gpus=1, **run, optimizer__offload=away) for away in (False, True))
    bytes_of = kept["cuda:0"].always["optimizer"]
    assert "optimizer" not in moved["cuda:0"].always and moved["cpu"].always == {"optimizer": bytes_of}
    assert moved["cuda:0"].phases[memory.STEP] == {"gradients": 4 * PARAMETERS, "optimizer": bytes_of}
    assert moved["cuda:0"].phases["update"] == kept["cuda:0"].phases["update"]
    cast = estimated(gpus=1, **run, optimizer__offload=True, train__autocast="bfloat16")["cuda:0"].phases
    assert "weights in bfloat16" in cast["update"] and cast[memory.STEP] == moved["cuda:0"].phases[memory.STEP]
    shapes = {"student": SHAPE, "teacher": SHAPE}
    half = memory.estimate(settings(**run, optimizer__offload=True), shapes, 3, gpus=1, ranks=2, divided=True)["cuda:0"]
    assert half.phases[memory.STEP] == {"gradients": 2 * PARAMETERS, "optimizer": bytes_of // 2}


@pytest.mark.parametrize(
    ("more", "advised", "idle"),
    [
        ({}, ["optimizer.offload=true", "teacher.offload=true"], []),
        ({"optimizer__offload": True}, ["teacher.offload=true"], ["optimizer.offload"]),
        ({"teacher__offload": True, "train__parallel": "ddp"}, ["optimizer.offload=true"], ["teacher.offload"]),
        ({"student__gradient_checkpointing": True}, ["student.lora.rank=32"], ["gradient_checkpointing"]),
    ],
)
def test_keys_that_are_advised_are_not_set_already(more, advised, idle):
    (found, *_) = memory_checks(settings(**more), {"student": SHAPE, "teacher": SHAPE}, 3, {"cuda:0": 1})
    assert all(key in found.seen for key in advised) and not any(key in found.seen for key in idle)


def test_nothing_is_offloaded_from_a_cpu():
    (found,) = memory_checks(settings(), {"student": SHAPE, "teacher": SHAPE}, 3, {"cpu": 1})
    assert "student.lora.rank=32" in found.seen and "offload" not in found.seen


def test_the_memory_of_this_machine_is_found():
    import psutil

    here = device_memory()["cpu"]
    assert 0 < here <= psutil.virtual_memory().total
