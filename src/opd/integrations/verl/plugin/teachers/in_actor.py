"""Teachers in the actor's workers, which read the very micro-batch that the student is trained on: frozen models, or the student's base."""

# pyright: reportMissingImports=false
from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from verl.utils import tensordict_utils as tu
from verl.utils.fsdp_utils import load_fsdp_model_to_gpu, offload_fsdp_model_to_cpu
from verl.workers.config import FSDPEngineConfig

from opd.errors import ConfigError
from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.integrations.verl.plugin.base_engines import LanguageModelEngine, frozen_engine_config, frozen_model_config
from opd.integrations.verl.plugin.head import head_of, hidden_states, output_layer
from opd.integrations.verl.plugin.model_checks import NO_ADAPTER, common_vocabulary, teacher_attention
from opd.integrations.verl.plugin.packed_reading import autocast, in_rows, packed, readable, reads_rows, takes_bounds
from opd.integrations.verl.plugin.settings import Settings, TeacherSettings
from opd.integrations.verl.plugin.teachers import TargetSlice
from opd.kernels.spec import select_target
from opd.teachers.vocabulary import embedding_rows, joined
from opd.types import HiddenTarget, TeacherMixture

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
"""verl's names."""
DEFAULT_PRECISION = "bf16"  # verl's, where fsdp_config.mixed_precision does not say


class FrozenTeacher(LanguageModelEngine):
    """Every worker holds a shard; a forward pass gathers one layer at a time."""

    is_offloaded = False
    """True while its shards are in host memory, until the next forward pass."""

    def __init__(self, settings: TeacherSettings, student: Any) -> None:
        """`student` is the actor's engine, whose sharding the teacher shares."""
        actor, precision = student.engine_config, precision_of(settings, student.engine_config)
        sequence_parallel = actor.ulysses_sequence_parallel_size
        attention = teacher_attention(
            settings,
            student=student.model_config.override_config.get("attn_implementation"),
            precision=precision,
            sequence_parallel=sequence_parallel,
        )
        config = frozen_engine_config(
            actor,
            precision,
            strategy="fsdp2",
            offload_policy=settings.offload or actor.offload_policy,
            ulysses_sequence_parallel_size=sequence_parallel,
        )
        super().__init__(frozen_model_config(settings, student.model_config, attention), config, None, None)  # pyright: ignore[reportArgumentType]
        module = self._build_module().requires_grad_(False)
        self.rows = embedding_rows(module)
        self.pass_packed_cu_seqlens = takes_bounds(module, student)
        self.module: nn.Module = self._build_fsdp_module(module).eval()
        self.reads_rows = reads_rows(self, "teacher", student.model_config.processor)

    def offload(self) -> None:
        """Move the shards to host memory until the next forward pass."""
        if not self.is_offloaded and not self.engine_config.offload_policy:  # that policy keeps them there anyway
            offload_fsdp_model_to_cpu(self.module)  # pyright: ignore[reportArgumentType]
            self.is_offloaded = True

    @torch.no_grad()
    def hidden(self, inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens) -> Tensor:
        """The states, [tokens, hidden], that predict the response tokens; `inputs` are the student's model inputs."""
        if self.is_offloaded:
            load_fsdp_model_to_gpu(self.module)  # pyright: ignore[reportArgumentType]
            self.is_offloaded = False
        index = tokens.model_index
        if self.reads_rows and packed(micro_batch):
            inputs, _ = self.prepare_model_inputs(micro_batch=in_rows(micro_batch))
            index = tokens.row_index
        with autocast(self):
            return hidden_states(self.module, readable(self, inputs), index, "teacher")

    @contextmanager
    def target(self, hidden: Tensor) -> Iterator[HiddenTarget]:
        """The target of these states, for as long as the teacher's output layer is gathered."""
        layer = output_layer(self.module, "teacher")
        owner = layer if isinstance(layer, FSDPModule) else self.module  # the root, where embeddings are tied
        owner.unshard()  # pyright: ignore[reportCallIssue]
        try:
            yield HiddenTarget(
                hidden=hidden.to(self._autocast_dtype), head=head_of(layer, hidden.device, self._autocast_dtype)
            )
        finally:
            owner.reshard()  # pyright: ignore[reportCallIssue]
            self.module.reshard()  # pyright: ignore[reportCallIssue]  # its own few weights wait for a backward pass


class StudentBase:
    """The student with its LoRA adapter off: a teacher without memory of its own."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self.model_config = engine.model_config
        self.rows = sys.maxsize  # it reads whatever the student wrote
        if not hasattr(engine.module, "disable_adapter"):
            raise ConfigError(NO_ADAPTER)

    def offload(self) -> None:
        """Nothing: verl moves the student."""

    @torch.no_grad()
    def hidden(self, inputs: Mapping[str, Any], _micro_batch: Any, tokens: ResponseTokens) -> Tensor:
        """As `FrozenTeacher.hidden`, by the student's own layers."""
        index, module = tokens.model_index, self.engine.module
        training = module.training
        module.eval()
        try:
            with self.engine.disable_adapter(), autocast(self.engine):
                return hidden_states(module, inputs, index, "student's base")
        finally:
            module.train(training)

    @contextmanager
    def target(self, hidden: Tensor) -> Iterator[HiddenTarget]:
        """Entered at the student's output layer, which is gathered there and has no adapter."""
        head = head_of(output_layer(self.engine.module, "student"))
        yield HiddenTarget(hidden=hidden.to(head.weight.dtype), head=head)


def precision_of(settings: TeacherSettings, actor: FSDPEngineConfig) -> Any:
    """verl's name of the dtype that the teacher computes in."""
    return PRECISIONS.get(settings.dtype, dict(actor.mixed_precision or {}).get("param_dtype", DEFAULT_PRECISION))


class InActorTeachers:
    """The models of `opd.teacher` or `opd.teachers`."""

    def __init__(self, settings: Settings, engine: Any) -> None:
        self.settings = settings
        self.names = tuple(settings.all_teachers)
        self.members = [
            StudentBase(engine) if one.is_student else FrozenTeacher(one, engine)
            for one in settings.all_teachers.values()
        ]
        self.vocabulary = joined([common_vocabulary(engine.model_config, one.model_config) for one in self.members])
        self.rows = min(member.rows for member in self.members)

    def offload(self) -> None:
        """Move every teacher's shards to host memory."""
        for member in self.members:
            member.offload()

    def prepare(
        self, inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens, /
    ) -> AbstractContextManager[Sequence[TargetSlice]]:
        """Run every teacher on the whole micro-batch, in the same order on every worker: gathering weights is a collective."""
        hidden = [member.hidden(inputs, micro_batch, tokens) for member in self.members]
        routes = self._routes(micro_batch, tokens) if self.settings.mixture.kind == "routing" else None
        return self._targets(hidden, routes)

    @contextmanager
    def _targets(
        self, hidden: Sequence[Tensor], routes: Mapping[str, Tensor] | None
    ) -> Iterator[Sequence[TargetSlice]]:
        with ExitStack() as stack:
            targets = [
                stack.enter_context(member.target(own)) for member, own in zip(self.members, hidden, strict=True)
            ]
            if routes is not None:
                yield [
                    TargetSlice(target=select_target(target, routes[name]), rows=routes[name], name=name)  # pyright: ignore[reportArgumentType]
                    for name, target in zip(self.names, targets, strict=True)
                ]
            elif len(targets) == 1:
                yield [TargetSlice(target=targets[0])]
            else:
                weights = torch.tensor(list(self.settings.shares().values()), device=hidden[0].device)
                kind: Any = self.settings.mixture.kind
                yield [TargetSlice(target=TeacherMixture(targets=tuple(targets), weights=weights, mixture=kind))]

    def _routes(self, micro_batch: Any, tokens: ResponseTokens) -> dict[str, Tensor]:
        """Indices of the response tokens of each teacher, by the field of their sample that names it."""
        column = self.settings.prompts.teacher_column
        if column not in micro_batch:
            raise ConfigError(
                f"opd.prompts.teacher_column={column}: the training batch has no such field; it has "
                f"{', '.join(sorted(map(str, micro_batch.keys())))}. Use a column of the data files that holds the teacher's name."
            )
        named = [str(value) for value in tu.get(micro_batch, column)]
        unknown = sorted(set(named) - set(self.names))
        if unknown:
            raise ConfigError(
                f"opd.prompts.teacher_column={column}: a sample says {unknown[0]!r}, and the teachers are {', '.join(self.names)}; name a "
                f"teacher of opd.teachers {unknown[0]!r}, or correct the data."
            )
        number = torch.tensor([self.names.index(value) for value in named], device=tokens.ids.device)
        of_token = number[tokens.sequence_index]
        return {name: (of_token == i).nonzero().squeeze(-1) for i, name in enumerate(self.names)}
