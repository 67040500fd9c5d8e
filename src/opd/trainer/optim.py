"""AdamW or Muon, both from torch.optim, and the learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from opd.config import OptimizerConfig
from opd.errors import ConfigError

MUON_ADAMW_RATIO = 6.0  # Muon's lr over AdamW's when only one is given; see OptimizerConfig.adamw_lr


def build_optimizer(model: PreTrainedModel, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Optimizers over the trainable parameters; every group carries its `peak_lr`. Matrices decay, vectors do not.

    Muon (torch.optim.Muon) takes the hidden matrices; embeddings, head and vectors stay with AdamW, as its authors advise
    (https://kellerjordan.github.io/posts/muon/).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.name == "adamw":
        return [_adamw([p for _, p in named], config, config.lr)]
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f"optimizer.name=muon needs torch.optim.Muon (PyTorch ≥ 2.9); this is {torch.__version__}. Use adamw."
        )
    outer = _embedding_parameters(model)
    hidden = [p for _, p in named if p.dim() == 2 and id(p) not in outer]
    rest = [p for _, p in named if p.dim() != 2 or id(p) in outer]
    if not hidden:
        raise ConfigError("optimizer.name=muon found no hidden matrix to train; use adamw.")
    muon = torch.optim.Muon(
        [{"params": hidden, "peak_lr": config.lr}],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="original",
    )
    return [muon, *([_adamw(rest, config, config.adamw_lr or config.lr / MUON_ADAMW_RATIO)] if rest else [])]


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig, lr: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay, "peak_lr": lr},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "peak_lr": lr},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=config.betas, fused=True)


def _embedding_parameters(model: PreTrainedModel) -> set[int]:
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)] + [model.get_output_embeddings()]
    return {id(p) for module in modules if module is not None for p in module.parameters()}


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate for update `step` (from 0): linear warm-up, then the schedule. A pure function of the step."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    decay = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay
