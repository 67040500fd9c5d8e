"""Started twice, as ranks 0 and 1: each takes half of the batch; rank 0 writes down loss, gradients and metrics."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["VERL_PLATFORM"] = "cpu"

import torch
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.utils.torch_functional import allgather_dict_into_dict
from verl_engines import batch, engine, policy_loss

torch.set_num_threads(1)
built = engine(Path(sys.argv[1]), lambda_rl=0.5)
half = tu.chunk_tensordict(batch(), 2)[built.rank]
tu.assign_non_tensor(half, micro_batch_size_per_gpu=1)
with built.train_mode(zero_grad_on_exit=False):
    built.optimizer_zero_grad()
    out = built.forward_backward_batch(half, policy_loss(), forward_only=False)
    gradients = {name: p.grad.full_tensor() for name, p in built.module.named_parameters() if p.grad is not None}
loss = torch.tensor(sum(out["loss"]))
torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.AVG)
metrics = allgather_dict_into_dict(data=out["metrics"], group=built.get_data_parallel_group())
shared = {name: float(Metric.aggregate_dp(value)) for name, value in metrics.items() if isinstance(value[0], Metric)}
if built.rank == 0:
    torch.save({"loss": loss.item(), "gradients": gradients, "metrics": shared}, sys.argv[2])
torch.distributed.barrier()
