"""Started twice, as ranks 0 and 1, with a folder of models, a file to write and a way to share the work; rank 0 writes down loss,
gradients and metrics of one step.

`data`: each rank takes half of the batch; `sequence`: each reads half of every packed sequence; `fsdp`: as data, under FSDP1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["VERL_PLATFORM"] = "cpu"

import torch
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1
from transformers import AutoModelForCausalLM
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.utils.torch_functional import allgather_dict_into_dict
from verl.workers.engine.fsdp import transformer_impl
from verl_engines import batch, engine, policy_loss

torch.set_num_threads(1)
models, out_path, way, settings = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])


class Fsdp1OnCpu(Fsdp1):
    """FSDP1 sends weights from rank 0 by GPU alone, so that each rank reads them here; all else is what verl asks for."""

    def __init__(self, _module: torch.nn.Module, **options: Any) -> None:
        options |= {"sync_module_states": False, "device_id": torch.device("cpu"), "param_init_fn": None}
        whole = AutoModelForCausalLM.from_pretrained(
            models / "student", attn_implementation="sdpa", dtype=torch.float32
        )
        super().__init__(whole, **options)


if way == "fsdp":
    transformer_impl.FSDP = Fsdp1OnCpu
built = engine(
    models,
    strategy="fsdp" if way == "fsdp" else "fsdp2",
    sequence_parallel=2 if way == "sequence" else 1,
    **settings,
)
if way == "sequence":
    mine = batch(micro_batch_size=2, entropy=True)
else:
    mine = tu.chunk_tensordict(batch(entropy=True), 2)[built.rank]
    tu.assign_non_tensor(mine, micro_batch_size_per_gpu=1)


def gradients() -> dict[str, torch.Tensor]:
    if way != "fsdp":
        return {name: p.grad.full_tensor() for name, p in built.module.named_parameters() if p.grad is not None}
    for parameter in built.module.parameters():  # flat and sharded: gathered as if gradients were weights
        parameter.data.copy_(parameter.grad)
    with Fsdp1.summon_full_params(built.module):
        return {
            name.replace("_fsdp_wrapped_module.", ""): p.detach().clone() for name, p in built.module.named_parameters()
        }


with built.train_mode(zero_grad_on_exit=False):
    built.optimizer_zero_grad()
    out = built.forward_backward_batch(mine, policy_loss(entropy_coeff=0.1), forward_only=False)
    found = gradients()
loss = torch.tensor(sum(out["loss"]))
torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.AVG)
metrics = allgather_dict_into_dict(data=out["metrics"], group=built.get_data_parallel_group())
shared = {name: float(Metric.aggregate_dp(value)) for name, value in metrics.items() if isinstance(value[0], Metric)}
if built.rank == 0:
    torch.save({"loss": loss.item(), "gradients": found, "metrics": shared}, out_path)
torch.distributed.barrier()
