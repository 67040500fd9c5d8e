"""verl's FSDP engine with a teacher beside the student: the distillation loss is made inside the student's forward pass.

It is registered for this machine's device *and* vendor, which verl looks up before the device alone. Without `opd:` in its config it
is verl's engine, unchanged.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id
from verl.utils.metric import AggregationType, Metric

from opd.errors import NonFiniteError
from opd.integrations.verl.plugin.alignment import (
    ResponseTokens,
    SequenceSlice,
    padded,
    response_tokens,
    rollout_temperature,
    sequence_slice,
    whole_group,
    with_advantages,
)
from opd.integrations.verl.plugin.base_engines import LanguageModelEngine, register_engine
from opd.integrations.verl.plugin.head import head_of, output_layer, run_to_head
from opd.integrations.verl.plugin.hydra_targets import OpdEngineConfig, start_line
from opd.integrations.verl.plugin.metrics import MetricSums, Spread, Weights, matched, scheduled, write_trace
from opd.integrations.verl.plugin.model_checks import end_ids
from opd.integrations.verl.plugin.packed_reading import autocast, in_rows, packed, reads_rows
from opd.integrations.verl.plugin.run_records import RunWriter
from opd.integrations.verl.plugin.sanity_check import check_teacher
from opd.integrations.verl.plugin.settings import Settings
from opd.integrations.verl.plugin.teachers import TargetSlice, TeacherBackend
from opd.integrations.verl.plugin.teachers.in_actor import InActorTeachers
from opd.integrations.verl.plugin.teachers.served import ServedHiddenStates, ServedLogProbs, policy_loss
from opd.kernels import linear_log_prob, linear_objective
from opd.kernels.spec import select_target
from opd.losses import Objective
from opd.types import HiddenTarget

BACKENDS: dict[str, Callable[[Settings, Any], TeacherBackend]] = {
    "actor": InActorTeachers,
    "pool": ServedLogProbs,
    "hidden": ServedHiddenStates,
}
"""The teacher backend of each `opd.placement`; `actor` loads weights, and `hidden` an output layer."""
Numbers = dict[str, Tensor]
"""Of each token, by name."""
PREFIX = "actor/opd/"
PER_TEACHER = ("reverse_kl", "forward_kl", "teacher_entropy", "teacher_logp")
"""Metrics that are logged for each teacher too, where each token has one of several."""


@register_engine(model_type="language_model", backend="fsdp")
@register_engine(model_type="language_model", backend="fsdp2")
class OpdEngine(LanguageModelEngine):
    """λ_rl · verl's loss + λ_distill · distillation, one forward pass of each model per micro-batch."""

    settings: Settings | None = None
    """None for the reference policy, and in a run without opd: then nothing here differs from verl."""
    teachers: TeacherBackend | None = None
    """None without distillation."""
    updates = 0
    traced = 0
    last_step = -1
    """verl's step of the last update, from 0."""
    compares_sampler = False
    """In the first update of a step, where samples were drawn from the student's distribution as it is."""
    weights = Weights(0.0, 0.0)
    """Of the update at hand."""
    reads_rows = False
    """True where each packed sequence is read in a row of its own, because the student would let them see each other."""
    records: RunWriter | None = None
    """On rank 0, where opd.run_dir is set."""
    spread: Spread | None = None
    """During the pass that measures the standard deviations of both terms before an update."""

    def initialize(self) -> None:
        """Build the student as verl does, then the teachers."""
        super().initialize()
        config = self.engine_config
        if not isinstance(config, OpdEngineConfig):
            return
        self.settings = config.settings()
        self.reduction, self.sampling = dict(config.opd_reduction), dict(config.opd_sampling)
        if self.rank == 0:
            print(start_line(self.settings), flush=True)
        if not self.settings.rl.distilled:
            return
        output_layer(self.module, "student")
        self.reads_rows = reads_rows(self, "student", self.model_config.processor)
        self.teachers = BACKENDS[self.settings.placement](self.settings, self)
        if self.is_param_offload_enabled:
            self.teachers.offload()
        tokenizer = self.model_config.tokenizer
        self.eos_ids = end_ids(tokenizer, self.model_config.generation_config)
        if self.rank == 0 and self.settings.run_dir is not None:
            self.records = RunWriter(self.settings, tokenizer, self.eos_ids)

    def to(self, device: str, model: bool = True, optimizer: bool = True, grad: bool = True) -> None:
        """Move the student as verl does. Where its weights leave the accelerator, so do the teachers'."""
        super().to(device=device, model=model, optimizer=optimizer, grad=grad)
        if device == "cpu" and model and self.teachers is not None and self.is_param_offload_enabled:
            self.teachers.offload()

    def forward_backward_batch(self, data: Any, loss_function: Callable[..., Any], forward_only: bool = False) -> Any:
        """One mini-batch. Every rank joins its metrics at the end, because a mean of ratios is no ratio of means."""
        settings = self.settings
        if settings is None or forward_only:
            return super().forward_backward_batch(data, loss_function, forward_only)
        self.weights = scheduled(settings, self)
        metrics = {"lambda_rl": self.weights.rl, "lambda_distill": self.weights.distill}
        if self.teachers is None:
            return super().forward_backward_batch(data, loss_function, forward_only)
        self.checks_teacher = settings.sanity_check_every > 0 and self.updates % settings.sanity_check_every == 0
        if settings.rl.scale == "match" and self.weights.mixed:
            metrics["advantage_std"], metrics["distill_std"] = stds = self._measure_stds(data, loss_function)
            self.weights = matched(self.weights, stds)
        self.sums = MetricSums()
        first, self.last_step = self.lr_scheduler.last_epoch != self.last_step, self.lr_scheduler.last_epoch
        plain = self.sampling.get("top_p", 1.0) == 1 and self.sampling.get("top_k", -1) <= 0
        self.compares_sampler = first and plain and "rollout_log_probs" in data
        if self.records is not None:
            self.records.begin(self.lr_scheduler.last_epoch)  # verl's count of the trainer's steps
        output = super().forward_backward_batch(data, loss_function, forward_only)
        self.updates += 1
        metrics = self.sums.means(whole_group(self)) | metrics
        if self.records is not None:
            self.records.end(metrics)
        output["metrics"] |= {PREFIX + name: Metric(AggregationType.MEAN, value) for name, value in metrics.items()}
        return output

    def _measure_stds(self, data: Any, loss_function: Callable[..., Any]) -> tuple[float, float]:
        """The standard deviations of both terms over the mini-batch, by a pass without gradients."""
        self.sums, self.spread = MetricSums(), Spread()
        try:
            super().forward_backward_batch(data, loss_function, True)
            return self.spread.stds(whole_group(self))
        finally:
            self.spread = None

    def forward_step(
        self, micro_batch: Any, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> tuple[Tensor, dict[str, Any]]:
        """One micro-batch. Only training steps of an actor that distils differ from verl's."""
        measures = self.spread is not None
        if self.reads_rows:
            micro_batch = in_rows(micro_batch)
        if self.settings is None or loss_function is None or (forward_only and not measures):
            return super().forward_step(micro_batch, loss_function, forward_only)
        rl, distill = self.weights
        if self.teachers is None:
            loss, output = super().forward_step(micro_batch, loss_function, forward_only)
            return loss * rl, {**output, "loss": output["loss"] * rl}
        micro_batch = micro_batch.to(get_device_id())
        inputs, output_args = self.prepare_model_inputs(micro_batch=micro_batch)
        tokens = response_tokens(
            micro_batch,
            packed=packed(micro_batch),
            reduction=self.reduction,
            vocabulary=self.teachers.vocabulary,
            rows=self.teachers.rows,
        )
        piece = sequence_slice(self, micro_batch, output_args)
        if not measures:
            self.sums.add_responses(micro_batch, tokens, self.eos_ids, self.sampling.get("response_length"))
        total, whole, values = self._distil(self.settings, micro_batch, inputs, piece.own(tokens), piece)
        if measures:
            return total, {"model_output": {}, "loss": 0.0, "metrics": {}}
        # Gradients are averaged over all ranks; those of one sequence add up.
        loss, logged = total * (distill * piece.ranks), whole * distill
        metrics: dict[str, Any] = {}
        model_output: dict[str, Tensor] = {}
        if rl > 0:
            advantage = values.pop("advantage", None)
            if advantage is not None:
                at_tokens = advantage[tokens.packed_index]
                micro_batch = with_advantages(micro_batch, at_tokens, tokens, rl_weight=rl, distill_weight=distill)
            offsets = micro_batch["input_ids"].offsets()
            model_output = {n: torch.nested.nested_tensor_from_jagged(v, offsets) for n, v in values.items()}
            theirs, metrics = policy_loss(loss_function)(
                model_output=model_output, data=micro_batch, dp_group=self.get_data_parallel_group()
            )
            both = advantage is None
            loss = loss + rl * theirs if both else theirs
            logged = logged + rl * theirs.detach() if both else theirs.detach()
        plain = {name: value.detach() for name, value in model_output.items()}
        return loss, {"model_output": plain, "loss": logged.item(), "metrics": metrics}

    def _distil(
        self, settings: Settings, micro_batch: Any, inputs: dict[str, Any], own: ResponseTokens, piece: SequenceSlice
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The distillation loss of this rank's tokens, that of all ranks', and the inputs of verl's loss for all tokens, [tokens] each.

        These are `log_probs` and `entropy`, and with rl.combine=advantages `advantage`, log q − log p, in place of a loss.
        """
        assert self.teachers is not None
        diagnostics: Numbers = {}
        wants_rl, distils = self.weights.rl > 0, self.weights.distill > 0
        as_advantage = wants_rl and distils and settings.rl.combine == "advantages"
        taught, rows = _taught(settings, own)
        records = None if self.spread is not None else self.records
        if records is not None:
            records.choose(micro_batch, own)
        prepared = self.teachers.prepare(inputs, micro_batch, taught) if distils else nullcontext(())

        def at_head(hidden: Tensor, layer: nn.Linear) -> Tensor:
            hidden = hidden.index_select(0, own.model_index).to(layer.weight.dtype)
            with prepared as slices, torch.set_grad_enabled(torch.is_grad_enabled() and not as_advantage):
                at_taught = hidden if rows is None else hidden[rows]
                each = [
                    self._divergence(settings.objective, at_taught, layer, one, taught, diagnostics) for one in slices
                ]
                total = sum(each, start=hidden.new_zeros((), dtype=torch.float32))
            if not wants_rl:
                return total.view(1)
            temperature = rollout_temperature(micro_batch, "opd with opd.rl.weight > 0", ", or opd.rl.weight=0")
            # For verl's policy loss: at the rollout temperature, over every row of the output layer.
            logp, entropy = linear_log_prob(hidden, layer.weight, own.ids, bias=layer.bias, temperature=temperature)
            return torch.cat([total.view(1), logp, entropy])

        with autocast(self):
            values = run_to_head(self.module, inputs, at_head, "student")
        total, whole = values[0], piece.total(values[0])
        if not whole.isfinite():
            raise NonFiniteError(_not_finite(settings, diagnostics["per_token"]))
        for_rl: dict[str, Tensor] = {}
        if wants_rl:
            for_rl["log_probs"], entropy = values[1:].tensor_split(2)
            if tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False):
                for_rl["entropy"] = entropy
        gap = whole.new_zeros(0)
        if as_advantage:
            gap = diagnostics["teacher_logp"] - diagnostics["student_logp"] if len(taught.ids) else gap
            for_rl["advantage"] = gap if rows is None else gap.new_zeros(len(own.ids)).index_copy(0, rows, gap)
        if self.spread is not None:
            advantages = padded(micro_batch, "advantages")[taught.sequence_index, taught.position]
            self.spread.add_terms(advantages, gap if as_advantage else diagnostics["per_token"])
            return total, whole, {}
        if distils:
            self._record(settings.trace, micro_batch, whole, own, taught, diagnostics)
            if records is not None:
                records.write(micro_batch["input_ids"], own, taught, diagnostics.get("reverse_kl"))
        length = len(micro_batch["input_ids"].values())
        return total, whole, {name: piece.everywhere(value, own, length) for name, value in for_rl.items()}

    def _record(
        self, trace: str | None, data: Any, whole: Tensor, own: ResponseTokens, taught: ResponseTokens, found: Numbers
    ) -> None:
        """Add the micro-batch to the metrics, and to the trace."""
        self.sums.add_total("loss", whole)
        self.sums.add_diagnostics({name: v for name, v in found.items() if name != "per_token"}, taught)
        self.sums.add_count("padding_tokens", ~own.known)
        self.sums.add_count("unread_tokens", ~own.followed)
        if (
            self.compares_sampler
            and "student_logp" in found
            and bool((torch.as_tensor(data["temperature"]) == 1).all())
        ):
            assert taught.sampler_logp is not None
            gap = (found["student_logp"] - taught.sampler_logp).abs()
            self.sums.add("sampler_student_gap", gap[taught.known])
        if trace is not None:
            self.traced += 1
            write_trace(trace, self.rank, self.traced, data["input_ids"], taught, found["per_token"])

    def _divergence(
        self,
        objective: Objective,
        hidden: Tensor,
        layer: nn.Linear,
        part: TargetSlice,
        tokens: ResponseTokens,
        found: Numbers,
    ) -> Tensor:
        """Σ weight · loss of the slice's tokens. The numbers of each token are put into `found`."""
        assert self.teachers is not None
        vocabulary = self.teachers.vocabulary

        def own(values: Tensor | None) -> Any:
            return values if values is None or part.rows is None else values[part.rows]

        total, per_token, metrics = linear_objective(
            own(hidden),
            layer.weight,
            part.target,
            own(vocabulary.with_stand_ins(tokens.ids)),
            objective,
            token_weights=own(tokens.weights),
            bias=layer.bias,
            valid_vocab=vocabulary.size,
            masked_ids=vocabulary.invalid_ids,
            sampler_logp=own(tokens.sampler_logp),
            sequence_index=own(tokens.sequence_index),
            eos_ids=self.eos_ids,
        )
        if self.records is not None and self.spread is None:
            slice_tokens = tokens if part.rows is None else tokens.at(part.rows)
            self.records.look(own(hidden), layer, part, slice_tokens, vocabulary)
        for name, value in {**metrics, "per_token": per_token}.items():
            if part.rows is None:
                found[name] = value
                continue
            everywhere = found.setdefault(name, value.new_zeros(len(tokens.ids)))
            found[name] = everywhere.index_copy(0, part.rows, value)
            if name in PER_TEACHER:
                self.sums.add(f"{part.name}/{name}", value)
        if self.checks_teacher and "student_logp" in metrics:
            known = own(tokens.known).nonzero().squeeze(-1)
            target = select_target(part.target, known)
            assert target is not None
            check_teacher(
                target,
                own(tokens.ids)[known],
                own(tokens.sequence_index)[known],
                metrics["student_logp"][known],
                vocab=vocabulary.size,
                name=part.name,
                student=HiddenTarget(hidden=own(hidden).detach()[known], head=head_of(layer)),
            )
        return total


def _taught(settings: Settings, own: ResponseTokens) -> tuple[ResponseTokens, Tensor | None]:
    """The response tokens that have a distillation loss, and their indices; None is all.

    A loss over the vocabulary does not read the response token, so that one which is no token counts like any other; a loss that
    reads it leaves it out. No teacher has read the tokens that follow an id it has no embedding for.
    """
    counts = own.followed
    if settings.objective.reads_response_token:
        counts = counts & own.known
    if bool(counts.all()):
        return own, None
    rows = counts.nonzero().squeeze(-1)
    return own.at(rows), rows


def _not_finite(settings: Settings, per_token: Tensor) -> str:
    floor, other = "set opd.objective.teacher_logp_floor=-30", "use opd.objective.divergence=generalized_jsd"
    return (
        f"the distillation loss is not finite, at {int((~per_token.isfinite()).sum())} of {len(per_token)} response tokens of this "
        "micro-batch; no update was made. Teacher or student gives NaN, or one model gives probability 0 to a token of the other's: look "
        f"at the models' dtypes, or {floor if settings.objective.takes_floor else other}."
    )
