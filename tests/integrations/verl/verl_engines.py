"""An engine in this very process, on one rank, and batches made by hand: everything of verl but Ray."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from verl.utils import tensordict_utils as tu
from verl.utils.distributed import initialize_global_process_group_ray
from verl.workers.config import FSDPActorConfig, FSDPOptimizerConfig, HFModelConfig
from verl.workers.engine import EngineRegistry
from verl.workers.utils.losses import ppo_loss
from verl_world import section

from opd.integrations.verl.dry_run import attention
from opd.integrations.verl.plugin.hydra_targets import engine_config

attention.register()
PROMPT_LENGTHS = (5, 9, 1, 7)
RESPONSE_LENGTHS = (6, 1, 8, 4)
ROUNDING = 1e-5
"""Of a gradient's largest entry."""
TERM = 2.0**-23
"""One rounding of a term of a nat: the terms of an advantage cancel in their mean."""
FP32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def join() -> None:
    """The process group that the environment describes, made as verl's workers make it; of one where it says nothing."""
    if torch.distributed.is_initialized():
        return
    if "RANK" not in os.environ:
        store = Path(tempfile.mkdtemp()) / "store"
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "DIST_INIT_METHOD": f"file://{store}"}
    initialize_global_process_group_ray()


def engine(
    models: Path,
    *,
    student: str = "student",
    remove_padding: bool = True,
    reduction: str = "token-mean",
    lora_rank: int = 0,
    mixed_precision: dict[str, str] | None = FP32,
    strategy: str = "fsdp2",
    sequence_parallel: int = 1,
    param_offload: bool = False,
    offload_policy: bool = False,
    reshard_after_forward: bool = True,
    **opd: Any,
):
    """What a worker would build from `+opd=default` and these overrides."""
    join()
    config = engine_config(
        strategy=strategy,
        mixed_precision=mixed_precision,
        use_torch_compile=False,
        ulysses_sequence_parallel_size=sequence_parallel,
        param_offload=param_offload,
        offload_policy=offload_policy,
        reshard_after_forward=reshard_after_forward,
        opd=section(**{"teacher": {"model": str(models / "teacher")}, **opd}),
        opd_reduction={"loss_agg_mode": reduction, "loss_scale_factor": None},
    )
    built = EngineRegistry.new(
        model_type="language_model",
        backend=strategy,
        model_config=HFModelConfig(
            path=str(models / student),
            override_config={"attn_implementation": "sdpa" if sequence_parallel == 1 else attention.NAME},
            use_remove_padding=remove_padding,
            lora_rank=lora_rank,
        ),
        engine_config=config,
        optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=10),
        checkpoint_config=None,
    )
    built.initialize()
    return built


def jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def batch(
    *,
    micro_batch_size: int = 4,
    remove_padding: bool = True,
    temperature: float = 1.0,
    hide: tuple[tuple[int, int], ...] = (),
    entropy: bool = False,
):
    """Four ragged sequences; `hide` masks response tokens, each given as (sequence, token)."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(97, 122, (n,), generator=generator) for n in PROMPT_LENGTHS]
    responses = [torch.randint(97, 122, (n,), generator=generator) for n in RESPONSE_LENGTHS]
    masks = [torch.ones(n, dtype=torch.int64) for n in RESPONSE_LENGTHS]
    for sequence, token in hide:
        masks[sequence][token] = 0
    sequences = [torch.cat(pair) for pair in zip(prompts, responses, strict=True)]
    numbers = [torch.randn(n, generator=generator) for n in RESPONSE_LENGTHS]
    return tu.get_tensordict(
        {
            "input_ids": jagged(sequences),
            "position_ids": jagged([torch.arange(len(s)) for s in sequences]),
            "prompts": jagged(prompts),
            "responses": jagged(responses),
            "response_mask": jagged(masks),
            "loss_mask": jagged(masks),
            "advantages": jagged(numbers),
            "old_log_probs": jagged([-3.0 + 0.1 * n for n in numbers]),
        },
        {
            "temperature": temperature,
            "global_batch_size": len(sequences),
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": micro_batch_size,
            "use_remove_padding": remove_padding,
            "use_fused_kernels": False,
            "calculate_entropy": entropy,
            "pad_token_id": 256,
        },
    )


def policy_loss(reduction: str = "token-mean", entropy_coeff: float = 0.0, scale_factor: int | None = None):
    """verl's, as its worker binds it."""
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=4,
        loss_agg_mode=reduction,
        loss_scale_factor=scale_factor,
        entropy_coeff=entropy_coeff,
    )
    return functools.partial(ppo_loss, config=config)


def step(built: Any, data: Any, loss: Any = None) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients by name, and metrics as verl adds them up, of one optimizer step that is not taken."""
    with built.train_mode(zero_grad_on_exit=False):
        built.optimizer_zero_grad()
        out = built.forward_backward_batch(data, loss or policy_loss(), forward_only=False)
        gradients = {
            name: parameter.grad.full_tensor().clone()
            for name, parameter in built.module.named_parameters()
            if parameter.grad is not None
        }
    return (
        sum(out["loss"]),
        gradients,
        {k: v.aggregate() if hasattr(v, "aggregate") else v for k, v in out["metrics"].items()},
    )


def same(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Equal but for the rounding of float32 sums in another order."""
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        bound = ROUNDING * float(expected[name].abs().max())
        assert float((gradient - expected[name]).abs().max()) <= bound, name
