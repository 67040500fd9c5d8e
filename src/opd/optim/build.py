"""AdamW and Muon, both from torch.optim; natural-gradient steps; and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from opd.config import OptimizerConfig
from opd.config.optimizer import NaturalGradientConfig
from opd.errors import ConfigError
from opd.optim.natural_gradient import natural_gradient_step
from opd.ranks import ALONE, Ranks
from opd.seeding import derive_seed
from opd.types import Batch

MUON_ADAMW_RATIO = 6.0  # Muon's lr over AdamW's when only one is given; see OptimizerConfig.adamw_lr


def build_optimizer(model: PreTrainedModel, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """Optimizers over the trainable parameters; every group carries its `peak_lr`. Matrices decay, vectors do not.

    Muon (torch.optim.Muon) takes the hidden matrices; embeddings, head and vectors stay with AdamW, as its authors advise
    (https://kellerjordan.github.io/posts/muon/).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if config.name == "adamw":
        return [_adamw([p for _, p in named], config, config.peak_lr)]
    if config.name == "natural_gradient":
        return [NaturalGradient(_chosen(named, config.natural_gradient.parameters), config)]
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
        [{"params": hidden, "peak_lr": config.peak_lr}],
        lr=config.peak_lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        adjust_lr_fn="original",
    )
    return [muon, *([_adamw(rest, config, config.adamw_lr or config.peak_lr / MUON_ADAMW_RATIO)] if rest else [])]


def _adamw(parameters: list[nn.Parameter], config: OptimizerConfig, lr: float) -> torch.optim.AdamW:
    return torch.optim.AdamW(_groups(parameters, config, lr), lr=lr, betas=config.betas, fused=True)


def _groups(parameters: list[nn.Parameter], config: OptimizerConfig, lr: float) -> list[dict]:
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay, "peak_lr": lr},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "peak_lr": lr},
    ]
    return [g for g in groups if g["params"]]


class NaturalGradient(torch.optim.Optimizer):
    """Natural-gradient steps, without momentum or any other state: the next step is a function of weights and rollouts alone."""

    def __init__(self, parameters: list[nn.Parameter], config: OptimizerConfig) -> None:
        super().__init__(_groups(parameters, config, config.peak_lr), {"lr": config.peak_lr})
        self.solver: NaturalGradientConfig = config.natural_gradient

    def step_on(
        self, batches: Sequence[Batch], logits: Callable[[Batch], torch.Tensor], ranks: Ranks = ALONE
    ) -> dict[str, float]:
        """One step down the accumulated `.grad`, on the Fisher matrix of these micro-batches and of the other ranks'; its metrics. Raises
        NonFiniteError, and then the weights are as before."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        found = natural_gradient_step(
            parameters,
            [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters],
            batches,
            logits,
            [batch.token_weights for batch in batches],
            damping=self.solver.damping,
            trust_region=self.solver.trust_region,
            iterations=self.solver.iterations,
            probes=self.solver.probes,
            draws=probe_draws,
            keep_graphs=self.solver.keep_graphs,
            ranks=ranks,
        )
        rate = self.param_groups[0]["lr"]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 - rate * group["weight_decay"])
        found.apply(parameters, rate)
        return {
            "natural/predicted_kl": found.predicted_kl * rate**2,
            "natural/scale": found.scale,
            "natural/residual": found.residual,
            "natural/iterations": float(found.iterations),
        }


def probe_draws(batch: Batch, count: int) -> torch.Tensor:
    """Uniform numbers [count, tokens] of a micro-batch's tokens, a function of each rollout alone, whatever it shares a micro-batch or a
    process with."""
    parts = []
    for rollout in batch.rollouts:
        seed = derive_seed(
            rollout.id, len(rollout.prompt_ids), f"probes of {rollout.prompt_ids} {rollout.response_ids}"
        )
        source = torch.Generator().manual_seed(seed)
        parts.append(torch.rand((count, len(rollout.response_ids)), generator=source, dtype=torch.float64))
    uniform = torch.cat(parts, dim=1)
    return uniform if batch.kept is None else uniform[:, batch.kept.cpu()]


def _chosen(named: list[tuple[str, nn.Parameter]], pattern: str | None) -> list[nn.Parameter]:
    """The parameters that natural_gradient trains; the others are frozen. Raises ConfigError for a pattern that fits none."""
    chosen = {name for name, _ in named if pattern is None or re.search(pattern, name)}
    if not chosen:
        raise ConfigError(
            f"optimizer.natural_gradient.parameters='{pattern}' fits none of the student's {len(named)} trainable parameters. Their names "
            f"are like {', '.join(name for name, _ in named[:: max(1, len(named) // 3)])}."
        )
    coarse = [name for name, p in named if name in chosen and p.dtype not in (torch.float32, torch.float64)]
    if coarse:
        raise ConfigError(
            f"optimizer.name=natural_gradient needs float32 weights, and '{coarse[0]}' is coarser. Use student.dtype=float32."
        )
    for name, parameter in named:
        parameter.requires_grad_(name in chosen)
    return [p for name, p in named if name in chosen]


def _embedding_parameters(model: PreTrainedModel) -> set[int]:
    modules = [m for m in model.modules() if isinstance(m, nn.Embedding)] + [model.get_output_embeddings()]
    return {id(p) for module in modules if module is not None for p in module.parameters()}


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Share of the peak learning rate for update `step` (from 0): linear warm-up, then the schedule. A pure function of the step."""
    warmup = config.warmup_within(total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    decay = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * decay
