"""verl's FSDP engine with a teacher beside the student: the distillation loss is made inside the student's forward pass.

Registered for this machine's device *and* vendor, which verl looks up before the device alone; without `opd:` in its config it is
verl's engine, unchanged.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_device_name
from verl.utils.metric import AggregationType, Metric

from opd.errors import ConfigError, NonFiniteError
from opd.integrations.verl.plugin.alignment import ResponseTokens, advantages_of, response_tokens, with_advantages
from opd.integrations.verl.plugin.canary import check_teacher
from opd.integrations.verl.plugin.checks import end_ids
from opd.integrations.verl.plugin.head import output_layer, run_to_head
from opd.integrations.verl.plugin.hydra_targets import OpdEngineConfig, start_line
from opd.integrations.verl.plugin.metrics import Tally
from opd.integrations.verl.plugin.one_memory import LanguageModelEngine
from opd.integrations.verl.plugin.packed_reading import in_rows, packed, reads_rows
from opd.integrations.verl.plugin.served_logprobs import policy_loss
from opd.integrations.verl.plugin.settings import Settings
from opd.integrations.verl.plugin.shard import Shard, shard_of, whole_group
from opd.integrations.verl.plugin.teacher_backends import Part, Source, make_source
from opd.integrations.verl.plugin.trace import write_trace
from opd.integrations.verl.plugin.v080 import register_engine
from opd.integrations.verl.plugin.weights import Spread, Weights, matched, scheduled
from opd.kernels import linear_log_prob, linear_objective
from opd.kernels.row_spec import select_target
from opd.types import Head, HiddenTarget

PREFIX = "actor/opd/"
TOLD_APART = ("reverse_kl", "forward_kl", "teacher_entropy", "teacher_logp")
"""Metrics that are logged for each teacher too, where each token has one of several."""


@register_engine(model_type="language_model", backend="fsdp")
@register_engine(model_type="language_model", backend="fsdp2")
class OpdEngine(LanguageModelEngine):
    """λ_rl · verl's loss + λ_distill · distillation, one forward pass of each model per micro-batch."""

    settings: Settings | None = None
    """None for the reference policy, and in a run without opd: then nothing here differs from verl."""
    source: Source | None = None
    """Where the teacher's side comes from; None without distillation."""
    updates = 0
    traced = 0
    weights = Weights(0.0, 0.0)
    """Of the update at hand."""
    reads_rows = False
    """Whether each packed sequence is read in a row of its own, because the student would let them see each other."""
    spread: Spread | None = None
    """While both terms are looked at before an update."""

    def initialize(self) -> None:
        """Build the student as verl does, then the teacher."""
        super().initialize()
        config = self.engine_config
        if not isinstance(config, OpdEngineConfig):
            return
        self.settings = config.settings()
        self.reduction = dict(config.opd_reduction)
        if self.rank == 0:
            print(start_line(self.settings), flush=True)
        if not self.settings.distils:
            return
        output_layer(self.module, "student")
        self.reads_rows = reads_rows(self, "student", self.model_config.processor)
        self.source = make_source(self.settings, self)
        if self.is_param_offload_enabled:
            self.source.leave()
        self.eos_ids = end_ids(self.model_config.tokenizer, self.model_config.generation_config)

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        """Move the student as verl does. Where its weights leave the accelerator, so does the teacher."""
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if device == "cpu" and model and self.source is not None and self.is_param_offload_enabled:
            self.source.leave()

    def forward_backward_batch(self, data: Any, loss_function: Callable[..., Any], forward_only: bool = False) -> Any:
        """One mini-batch. Its metrics are joined by every rank at its end, because means of ratios are no ratios of means."""
        settings = self.settings
        if settings is None or forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only)
        self.weights = scheduled(settings, self)
        told = {"lambda_rl": self.weights.rl, "lambda_distill": self.weights.distill}
        if self.source is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        self.canary_due = settings.canary_every > 0 and self.updates % settings.canary_every == 0
        if settings.scale == "match" and self.weights.mixed:
            told["advantage_std"], told["distill_std"] = stds = self._spreads(data, loss_function)
            self.weights = matched(self.weights, stds)
        self.tally = Tally()
        output = super().forward_backward_batch(data, loss_function, forward_only)
        self.updates += 1
        means = self.tally.means(whole_group(self)) | told
        output["metrics"] |= {PREFIX + name: Metric(AggregationType.MEAN, value) for name, value in means.items()}
        return output

    def _spreads(self, data: Any, loss_function: Callable[..., Any]) -> tuple[float, float]:
        """The spread of both terms over the mini-batch, by a pass without gradients."""
        self.tally, self.spread = Tally(), Spread()
        try:
            super().forward_backward_batch(data, loss_function, True)
            return self.spread.of_all(whole_group(self))
        finally:
            self.spread = None

    def forward_step(
        self, micro_batch: Any, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """One micro-batch. Only training steps of an actor that distils differ from verl's."""
        looks = self.spread is not None
        if self.reads_rows:
            micro_batch = in_rows(micro_batch)
        if self.settings is None or loss_function is None or (forward_only and not looks):
            return super().forward_step(micro_batch, loss_function, forward_only)
        rl, distill = self.weights
        if self.source is None:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
            return loss * rl, {**output, "loss": output["loss"] * rl}
        micro_batch = micro_batch.to(get_device_id())
        inputs, output_args = self.prepare_model_inputs(micro_batch=micro_batch)
        tokens = response_tokens(
            micro_batch,
            packed=packed(micro_batch),
            reduction=self.reduction,
            vocabulary=self.source.vocabulary,
            rows=self.source.rows,
        )
        shard = shard_of(self, micro_batch, output_args)
        total, whole, values = self._distil(self.settings, micro_batch, inputs, shard.own(tokens), shard)
        if looks:
            return total, {"model_output": {}, "loss": 0.0, "metrics": {}}
        # Gradients are averaged over all ranks; those of one sequence add up.
        loss, told = total * (distill * shard.ranks), whole * distill
        metrics: dict[str, Any] = {}
        model_output: dict[str, Tensor] = {}
        if rl > 0:
            advantage = values.pop("advantage", None)
            if advantage is not None:
                micro_batch = with_advantages(micro_batch, advantage[tokens.packed_index], tokens, self.weights)
            offsets = micro_batch["input_ids"].offsets()
            model_output = {n: torch.nested.nested_tensor_from_jagged(v, offsets) for n, v in values.items()}
            theirs, metrics = policy_loss(loss_function)(
                model_output=model_output, data=micro_batch, dp_group=self.get_data_parallel_group()
            )
            both = advantage is None
            loss = loss + rl * theirs if both else theirs
            told = told + rl * theirs.detach() if both else theirs.detach()
        plain = {name: value.detach() for name, value in model_output.items()}
        return loss, {"model_output": plain, "loss": told.item(), "metrics": metrics}

    def _distil(
        self, settings: Settings, micro_batch: Any, inputs: dict[str, Any], own: ResponseTokens, shard: Shard
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The distillation loss of this rank's tokens, that of all, and what verl's loss wants of all tokens [tokens].

        That is `log_probs` and `entropy`, and with hybrid=advantages `advantage`, log q − log p, in place of a loss.
        """
        assert self.source is not None
        seen: dict[str, Tensor] = {}
        wants_rl = self.weights.rl > 0
        distils = self.weights.distill > 0
        as_advantage = wants_rl and distils and settings.hybrid == "advantages"
        heard, rows = self._heard(settings, own)
        said = self.source.look(inputs, micro_batch, heard) if distils else nullcontext(())

        def at_head(hidden: Tensor, layer: nn.Linear) -> Tensor:
            hidden = hidden.index_select(0, own.model_index).to(layer.weight.dtype)
            with said as parts, torch.set_grad_enabled(torch.is_grad_enabled() and not as_advantage):
                told = hidden if rows is None else hidden[rows]
                each = [self._divergence(settings, told, layer, part, heard, seen) for part in parts]
                total = sum(each, start=hidden.new_zeros((), dtype=torch.float32))
            if not wants_rl:
                return total.view(1)
            logp, entropy = self._log_probs(hidden, layer, own, micro_batch["temperature"])
            return torch.cat([total.view(1), logp, entropy])

        with torch.autocast(get_device_name(), self._autocast_dtype, enabled=self._autocast_dtype != torch.float32):
            values = run_to_head(self.module, inputs, at_head, "student")
        total, whole = values[0], shard.total(values[0])
        if not whole.isfinite():
            raise NonFiniteError(self._why_not_finite(seen))
        wanted: dict[str, Tensor] = {}
        if wants_rl:
            wanted["log_probs"], entropy = values[1:].tensor_split(2)
            if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
                wanted["entropy"] = entropy
        gap = whole.new_zeros(0)
        if as_advantage:
            gap = seen["teacher_logp"] - seen["student_logp"] if len(heard.ids) else gap
            wanted["advantage"] = gap if rows is None else gap.new_zeros(len(own.ids)).index_copy(0, rows, gap)
        if self.spread is not None:
            term = gap if as_advantage else seen["per_token"]
            self.spread.see(advantages_of(micro_batch, heard), term)
            return total, whole, {}
        if distils:
            self._count(whole, own, heard, seen)
        if distils and settings.trace is not None:
            self.traced += 1
            write_trace(settings.trace, self.rank, self.traced, micro_batch["input_ids"], heard, seen["per_token"])
        length = len(micro_batch["input_ids"].values())
        return total, whole, {name: shard.everywhere(value, own, length) for name, value in wanted.items()}

    def _heard(self, settings: Settings, own: ResponseTokens) -> tuple[ResponseTokens, Tensor | None]:
        """The response tokens that the distillation is about, and which they are; None is all.

        A loss over the vocabulary does not read the response token, so that one which is no token counts like any other; a loss of the
        sampled token leaves it out. What stands after an id that a teacher has no row for, no teacher has read.
        """
        counts = own.followed
        if "sampled" in (settings.objective.support, settings.objective.tail):
            counts = counts & own.known
        if bool(counts.all()):
            return own, None
        rows = counts.nonzero().squeeze(-1)
        return own.at(rows), rows

    def _count(self, whole: Tensor, own: ResponseTokens, heard: ResponseTokens, seen: dict[str, Tensor]) -> None:
        self.tally.add_total("loss", whole)
        self.tally.see({name: value for name, value in seen.items() if name != "per_token"}, heard)
        self.tally.add_count("padding_tokens", ~own.known)
        self.tally.add_count("unread_tokens", ~own.followed)

    def _divergence(
        self,
        settings: Settings,
        hidden: Tensor,
        layer: nn.Linear,
        part: Part,
        tokens: ResponseTokens,
        seen: dict[str, Tensor],
    ) -> Tensor:
        """Σ weight · loss of the part's tokens; what each token came to is put into `seen`."""
        assert self.source is not None

        def own(values: Tensor | None) -> Any:
            return values if values is None or part.rows is None else values[part.rows]

        total, per_token, metrics = linear_objective(
            own(hidden),
            layer.weight,
            part.target,
            own(self.source.vocabulary.with_stand_ins(tokens.ids)),
            settings.objective,
            token_weights=own(tokens.weights),
            bias=layer.bias,
            valid_vocab=self.source.vocabulary.size,
            masked_ids=self.source.vocabulary.invalid_ids,
            sampler_logp=own(tokens.sampler_logp),
            sequence_index=own(tokens.sequence_index),
            eos_ids=self.eos_ids,
        )
        for name, value in {**metrics, "per_token": per_token}.items():
            if part.rows is None:
                seen[name] = value
            else:
                everywhere = seen.setdefault(name, value.new_zeros(len(tokens.ids)))
                seen[name] = everywhere.index_copy(0, part.rows, value)
                if name in TOLD_APART:
                    self.tally.add(f"{part.name}/{name}", value)
        if self.canary_due and "student_logp" in metrics:
            known = own(tokens.known).nonzero().squeeze(-1)
            target = select_target(part.target, known)
            assert target is not None
            check_teacher(
                target,
                own(tokens.ids)[known],
                own(tokens.sequence_index)[known],
                metrics["student_logp"][known],
                vocab=self.source.vocabulary.size,
                name=part.name,
                student=HiddenTarget(
                    hidden=own(hidden).detach()[known],
                    head=Head(weight=layer.weight.detach(), bias=None if layer.bias is None else layer.bias.detach()),
                ),
            )
        return total

    def _log_probs(
        self, hidden: Tensor, layer: nn.Linear, tokens: ResponseTokens, temperature: Any
    ) -> tuple[Tensor, Tensor]:
        """As verl's policy loss wants them: at the rollout temperature, over every row of the output layer."""
        values = torch.as_tensor(temperature, dtype=torch.float32).unique()
        if len(values) != 1:
            raise ConfigError(
                "the samples of one micro-batch were drawn at several temperatures; opd with lambda_rl > 0 takes one. Set one "
                "actor_rollout_ref.rollout.temperature, or opd.lambda_rl=0."
            )
        return linear_log_prob(hidden, layer.weight, tokens.ids, bias=layer.bias, temperature=float(values))

    def _why_not_finite(self, seen: dict[str, Tensor]) -> str:
        assert self.settings is not None
        bad = int((~seen["per_token"].isfinite()).sum())
        instead = (
            "set opd.teacher_logp_floor=-30"
            if self.settings.objective.takes_floor
            else "use opd.divergence=generalized_jsd"
        )
        return (
            f"the distillation loss is not finite, at {bad} of {len(seen['per_token'])} response tokens of this micro-batch; no update "
            "was made. Teacher or student gives NaN, or one model gives probability 0 to a token of the other's: look at the models' "
            f"dtypes, or {instead}."
        )
