"""One training step inside verl's FSDP engine: frozen teachers read the micro-batch, the engine hands over the student's logits."""

# pyright: reportMissingImports=false
from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss
from verl.utils import tensordict_utils as tu
from verl.utils.metric import AggregationType, Metric
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import no_padding_2_padding

from opd.errors import NonFiniteError
from opd.integrations.verl.plugin.alignment import padded, response_positions, rollout_temperature
from opd.integrations.verl.plugin.logits import WATCHED, token_losses
from opd.integrations.verl.plugin.packed_reading import followed, refuse_mixing
from opd.integrations.verl.plugin.settings import settings_of
from opd.teachers.vocabulary import joined
from tools.verl_patch.tree.teacher import Teacher

PREFIX = "actor/distillation/"
"""Prefix of the metrics."""
LOSSES = "distillation_losses"
"""In the engine's model output: the divergence at each token of the micro-batch, 0 where no response token follows."""


class OnPolicyDistillation:
    """The actor's loss function. verl's engine calls `look`, then this with the student's logits, then this with its output."""

    def __init__(self, config: Any, engine: Any) -> None:
        """`config` is verl's ActorConfig and `engine` the student's, initialized; loads the teachers."""
        self.config, self.settings = config, settings_of(config.policy_loss)
        self.objective = self.settings.objective.loss()
        self.policy_config = copy.copy(config)
        rl = copy.copy(config.policy_loss)
        object.__setattr__(rl, "loss_mode", self.settings.hybrid_loss_mode)
        object.__setattr__(self.policy_config, "policy_loss", rl)
        refuse_mixing(engine)
        self.teachers = [Teacher(told, engine) for told in self.settings.all_teachers.values()]
        self.vocabulary = joined([teacher.vocabulary for teacher in self.teachers])
        self.rows = min(teacher.rows for teacher in self.teachers)
        self.rank, self.traced = engine.rank, 0
        self.counts: dict[str, int] = {}
        self.teacher_logits: list[Tensor] = []
        if self.rank == 0:
            print(f"on-policy distillation: {self.settings}, {self.vocabulary.size} tokens in common", flush=True)

    def look(self, micro_batch: Any, model_inputs: Mapping[str, Any]) -> None:
        """Let every teacher read what the student is about to read, and ask the engine for the student's logits."""
        tu.assign_non_tensor(micro_batch, distillation_use_topk=True, distillation_only=not self.settings.trains_rl)
        self.teacher_logits = [teacher.logits(micro_batch, model_inputs) for teacher in self.teachers]

    def __call__(
        self,
        model_output: dict[str, Tensor] | None = None,
        data: Any = None,
        dp_group: Any = None,
        student_logits: Tensor | None = None,
        data_format: str = "thd",
    ) -> Any:
        """With `student_logits` [1, tokens, vocab], divided by the rollout temperature: dict of [1, tokens]. Else (loss, metrics)."""
        if student_logits is not None:
            return self._per_token(student_logits.squeeze(0), data)
        assert model_output is not None
        return self._total(model_output, data, dp_group)

    def _per_token(self, logits: Tensor, data: Any) -> dict[str, Tensor]:
        teachers, self.teacher_logits = self.teacher_logits, []
        values = data["input_ids"].values()
        positions = response_positions(data)
        # A divergence does not read the token that followed, so that padding of the output layer counts like any other; what stands
        # after an id that a teacher has no row for, no teacher has read.
        heard = followed(values, data["input_ids"].offsets(), positions, self.rows)
        self.counts = {
            "padding_tokens": int((~self.vocabulary.owns(values[positions + 1])).sum()),
            "unread_tokens": int((~heard).sum()),
        }
        positions = positions[heard]
        found = token_losses(
            logits,
            teachers,
            self.objective,
            positions=positions,
            teacher_weights=torch.tensor(self.settings.shares(len(teachers)), dtype=torch.float64),
            mixture=self.settings.mixture.kind,
            student_scale=rollout_temperature(data),
            vocab=self.vocabulary.size,
            masked_ids=self.vocabulary.invalid_ids,
        )
        bad = int((~found.loss.detach().isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"the distillation loss is not finite at {bad} of {len(positions)} response tokens of this micro-batch; no update was made. "
                "Student or teacher gives NaN, or the teacher rules out a token that the student gives some probability."
            )
        if self.settings.trace:
            self._trace(self.settings.trace, data, positions, found.loss)
        every = {LOSSES: found.loss, **{name: found.metrics[name] for name in WATCHED if name in found.metrics}}
        return {name: _spread(value, positions, len(values)).unsqueeze(0) for name, value in every.items()}

    def _total(self, model_output: dict[str, Tensor], data: Any, dp_group: Any) -> tuple[Tensor, dict[str, Any]]:
        info = {name: data[name] for name in ("dp_size", "batch_num_tokens", "global_batch_size")}
        info["loss_scale_factor"] = self.config.loss_scale_factor
        mask = padded(data, "response_mask").float()

        def mean(name: str) -> Tensor:
            at_responses = no_padding_2_padding(model_output[name], data).float()
            return agg_loss(loss_mat=at_responses, loss_mask=mask, loss_agg_mode=self.config.loss_agg_mode, **info)

        distilled = mean(LOSSES)
        metrics: dict[str, Any] = {PREFIX + "loss": Metric(AggregationType.SUM, distilled.detach())}
        for name in WATCHED:
            if name in model_output:
                metrics[PREFIX + name] = Metric(AggregationType.SUM, mean(name).detach())
        for name, count in self.counts.items():
            metrics[PREFIX + name] = Metric(AggregationType.SUM, torch.tensor(float(count)))
        loss = self.settings.rl.distill_weight * distilled
        if self.settings.trains_rl:
            theirs, more = ppo_loss(self.policy_config, model_output, data, dp_group)
            loss = loss + self.settings.rl.weight * theirs
            metrics = {**more, **metrics}
        return loss, metrics

    def _trace(self, folder: str, data: Any, positions: Tensor, losses: Tensor) -> None:
        self.traced += 1
        Path(folder).mkdir(parents=True, exist_ok=True)
        ids = data["input_ids"]
        torch.save(
            {
                "input_ids": ids.values().cpu(),
                "offsets": ids.offsets().cpu(),
                "predict_index": positions.cpu(),
                "loss": losses.detach().cpu(),
            },
            Path(folder) / f"rank{self.rank}_{self.traced:06d}.pt",
        )


def _spread(values: Tensor, positions: Tensor, tokens: int) -> Tensor:
    return values.new_zeros(tokens).index_put((positions,), values)
