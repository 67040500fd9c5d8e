"""A teacher in verl's own servers: what they say comes with the micro-batch, and opd's losses are computed from it.

verl asks its vLLM or SGLang servers for `prompt_logprobs` while rollouts still run. Row t of `teacher_ids` and
`teacher_logprobs` is about the token after t, at temperature 1: its top_k likeliest tokens, or with support=sampled that
very token. The last row of a sequence is a dummy, and no response token reads it. The servers of `hidden_server` send hidden
states in the place of log-probs, [tokens, hidden]: then the teacher's output layer alone is in the actor's workers, and every
divergence is exact.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.hub import cached_file
from verl.trainer.distillation.losses import DistillationLossSettings, distillation_ppo_loss
from verl.utils.device import get_device_id
from verl.utils.fs import copy_to_local
from verl.workers.config import DistillationLossConfig, DistillationTeacherModelConfig
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry
from verl.workers.utils.losses import ppo_loss

from opd.errors import ConfigError, ModelError, NonFiniteError
from opd.integrations.verl.plugin.alignment import ResponseTokens
from opd.integrations.verl.plugin.head import output_layer
from opd.integrations.verl.plugin.model_checks import common_vocabulary, read_model
from opd.integrations.verl.plugin.settings import Settings, TeacherSettings, parse
from opd.integrations.verl.plugin.teachers import TargetSlice
from opd.losses._shapes import Float, Int
from opd.losses.partial import support_of
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import Head, HiddenTarget, SampledTarget, TopKTarget

FIELDS = ("teacher_ids", "teacher_logprobs")
"""verl's names in a micro-batch: jagged over sequences, [tokens, k] without padding."""
MASS_ROUNDING = 1e-2
"""By how much probabilities of bf16 servers may add up to more than 1."""


class ServedLogProbs:
    """Reads the scores that came with the micro-batch: no forward pass, no memory."""

    def __init__(self, settings: Settings, engine: Any) -> None:
        (self.teacher,) = settings.all_teachers.values()
        self.objective = settings.objective
        self.vocabulary = vocabulary_of(self.teacher, engine)
        config = AutoConfig.from_pretrained(
            copy_to_local(self.teacher.model), trust_remote_code=self.teacher.trust_remote_code
        )
        self.rows = config.get_text_config().vocab_size

    def prepare(
        self, _inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens
    ) -> AbstractContextManager[Sequence[TargetSlice]]:
        """The target of the response tokens. Raises an OpdError for scores that no teacher gives."""
        name, sampled = self.teacher.model, self.objective.support == "sampled"
        ids, teacher_logp = sent(micro_batch, tokens)
        asked = 1 if sampled else self.objective.top_k
        if ids.shape[-1] != asked:
            raise ModelError(
                f"teacher '{name}' sent {ids.shape[-1]} log-probs per token, and opd asked for {asked}; start with +opd=pool, which sets "
                "what verl's servers are asked for."
            )
        teacher_logp = teacher_logp.float()
        refuse_nonsense(ids, teacher_logp, name)
        if not sampled:
            return nullcontext([TargetSlice(target=in_vocabulary(ids, teacher_logp, self.vocabulary))])
        refuse_other_tokens(ids, tokens, name)
        return nullcontext([TargetSlice(target=SampledTarget(teacher_logp=teacher_logp[:, 0]))])

    def offload(self) -> None:
        """Nothing: the teacher is in the server."""


def vocabulary_of(teacher: TeacherSettings, engine: Any) -> VocabularyMatch:
    """The token ids that verl's student and a teacher in a server have in common, from the teacher's config and tokenizer."""
    model = read_model(copy_to_local(teacher.model), teacher.trust_remote_code, "opd.teacher.model")
    return common_vocabulary(engine.model_config, replace(model, path=teacher.model))


def sent(micro_batch: Any, tokens: ResponseTokens) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
    """Token ids and scores of the response tokens, as a server sent them."""
    missing = [name for name in FIELDS if name not in micro_batch]
    if missing:
        raise ConfigError(
            f"the micro-batch has no {' and no '.join(missing)}: verl asked no teacher server. Start with +opd=pool, which sets "
            "distillation.enabled=true."
        )
    ids, scores = (micro_batch[name].values().index_select(0, tokens.packed_index) for name in FIELDS)
    return ids.long(), scores


def refuse_other_tokens(ids: Int[Tensor, "tokens 1"], tokens: ResponseTokens, name: str) -> None:
    """Raise where the server's own word for what it scored is not what was sampled."""
    wrong = ids[:, 0] != tokens.ids
    if bool(wrong.any()):
        raise ModelError(
            f"teacher '{name}' scored other tokens than were sampled, at {int(wrong.sum())} of {len(ids)} response tokens: its server "
            "shifts or changes what it is sent. No update was made."
        )


def in_vocabulary(
    ids: Int[Tensor, "tokens k"], teacher_logp: Float[Tensor, "tokens k"], vocabulary: VocabularyMatch
) -> TopKTarget:
    """The target on tokens that the student has. What the teacher gave to others is shared out, as where their logits are −inf."""
    unknown = ids >= vocabulary.size
    if vocabulary.invalid_ids:
        unknown |= torch.isin(ids, torch.tensor(vocabulary.invalid_ids, device=ids.device))
    lost = torch.where(unknown, teacher_logp.exp(), 0.0).sum(-1, keepdim=True)
    if bool(unknown.all(-1).any()):
        raise ModelError(
            "all tokens that the teacher finds likely at some position are unknown to the student; raise opd.objective.top_k, or use a teacher of "
            "the student's vocabulary."
        )
    rest = torch.log1p(-lost.clamp_max(1 - torch.finfo(lost.dtype).eps))
    kept = torch.where(unknown, -torch.inf, teacher_logp - rest)
    likeliest_first = kept.sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(-1, likeliest_first.indices)
    # A repeated token counts once, where it stands first: so the places of unknown tokens are filled and say nothing.
    return TopKTarget(
        ids=torch.where(likeliest_first.values == -torch.inf, ids[:, :1], ids), teacher_logp=likeliest_first.values
    )


def refuse_nonsense(ids: Int[Tensor, "tokens k"], teacher_logp: Float[Tensor, "tokens k"], name: str) -> None:
    """Raise for NaN and for probabilities above 1, in every micro-batch; `sanity_check` looks at the rest."""
    if not ids.numel():
        return
    bad = (teacher_logp.isnan() | (teacher_logp == torch.inf)).any(-1)
    if bool(bad.any()):
        raise NonFiniteError(
            f"teacher '{name}' sent NaN or infinite log-probs at {int(bad.sum())} of {len(bad)} response tokens; no update was made. "
            "Look at its server's dtype (distillation.teacher_models.teacher_model.inference.dtype)."
        )
    mass = support_of(ids).mask(teacher_logp).exp().sum(-1)
    if float(mass.max()) > 1 + MASS_ROUNDING:
        raise ModelError(
            f"teacher '{name}' sent probabilities that add up to {float(mass.max()):.3g} at one position; no update was made. Its server "
            "must send log-probs over the whole vocabulary at temperature 1 (vLLM: logprobs_mode=raw_logprobs)."
        )


def policy_loss(loss_function: Callable[..., Any]) -> Callable[..., Any]:
    """verl's loss without its distillation, which it binds in whenever its teacher servers run."""
    if isinstance(loss_function, partial) and loss_function.func is distillation_ppo_loss:
        return partial(ppo_loss, config=loss_function.keywords["config"])
    return loss_function


WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"


class ServedHiddenStates:
    """Holds the teacher's output layer: one matrix, whole on every worker."""

    def __init__(self, settings: Settings, engine: Any) -> None:
        (self.teacher,) = settings.all_teachers.values()
        self.vocabulary = vocabulary_of(self.teacher, engine)
        self.head = load_head(copy_to_local(self.teacher.model), trust_remote_code=self.teacher.trust_remote_code)
        self.rows = self.head.weight.shape[0]

    def prepare(
        self, _inputs: Mapping[str, Any], micro_batch: Any, tokens: ResponseTokens
    ) -> AbstractContextManager[Sequence[TargetSlice]]:
        """The target of the response tokens. Raises an OpdError for states that no teacher gives."""
        name = self.teacher.model
        ids, states = sent(micro_batch, tokens)
        refuse_other_tokens(ids, tokens, name)
        width = self.head.weight.shape[1]
        if states.shape[-1] != width:
            raise ModelError(
                f"teacher '{name}' sent {states.shape[-1]} numbers per token, and its output layer takes {width}; let "
                "distillation.teacher_models.teacher_model.inference.name be what +opd=hidden sets."
            )
        bad = ~states.isfinite().all(-1)
        if bool(bad.any()):
            raise NonFiniteError(
                f"teacher '{name}' sent NaN or infinite hidden states at {int(bad.sum())} of {len(bad)} response tokens; no update was "
                "made. Look at distillation.teacher_models.teacher_model.inference.dtype."
            )
        device, bias = get_device_id(), self.head.bias
        bias = None if bias is None else bias.to(device, torch.float32)
        head = Head(weight=self.head.weight.to(device, states.dtype), bias=bias)
        if not self.teacher.offload:
            self.head = head
        return nullcontext([TargetSlice(target=HiddenTarget(hidden=states, head=head))])

    def offload(self) -> None:
        """Move the output layer to host memory; the next `prepare` copies it back."""
        bias = None if self.head.bias is None else self.head.bias.cpu()
        self.head = Head(weight=self.head.weight.cpu(), bias=bias)


def load_head(folder: str, *, trust_remote_code: bool = False) -> Head:
    """The output layer of a model whose other weights are not read. Raises ModelError where it cannot be found."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layer = output_layer(model, "teacher")

    def read(held: Tensor) -> Tensor:
        # Tied embeddings stand in the state dict under several names.
        everything = model.named_parameters(remove_duplicate=False)
        return _read(folder, [name for name, parameter in everything if parameter is held])

    return Head(weight=read(layer.weight), bias=None if layer.bias is None else read(layer.bias))


def _read(folder: str, names: Sequence[str]) -> Tensor:
    index = cached_file(folder, INDEX, _raise_exceptions_for_missing_entries=False)
    files: Mapping[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"] if index else {}
    for name in names:
        file = cached_file(folder, files.get(name, WEIGHTS), _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        with safe_open(file, framework="pt") as weights:
            if name in weights.keys():  # noqa: SIM118  # no mapping
                return weights.get_tensor(name)
    raise ModelError(
        f"The output layer of teacher '{folder}' was not found: its safetensors hold no {' or '.join(names)}. Save it with transformers' "
        "save_pretrained, or use +opd=default, where the whole teacher is loaded."
    )


LIMITED = ("vllm", "sglang")
"""Servers of which verl knows how many log-probs they give."""


@dataclass
class ServedLossConfig(DistillationLossConfig):
    """verl's loss settings, of which only what its servers are asked for matters: that is what opd's objective reads."""

    opd: Any = None
    """The `opd:` section as written."""

    _mutable_fields = DistillationLossConfig._mutable_fields | {
        "loss_settings",
        "topk",
        "use_task_rewards",
        "use_policy_gradient",
    }

    def __post_init__(self) -> None:
        settings = parse(self.opd or {})[0]
        one = settings.placement == "hidden" or settings.objective.support == "sampled"
        self.topk = None if one else settings.objective.top_k
        self.loss_settings = DistillationLossSettings(names=["opd"], use_topk=not one, use_estimator=one)
        # verl leaves log-probs out for a loss that is distillation alone; its own policy loss reads them.
        self.use_task_rewards, self.use_policy_gradient = True, False


@dataclass
class ServedTeacherConfig(DistillationTeacherModelConfig):
    """verl's settings of a teacher; the transformers server of `+opd_device=cpu` is taken too."""

    def _validate_topk_logprobs(self, use_topk: bool, topk: int | None) -> None:
        if self.inference.name in LIMITED:
            super()._validate_topk_logprobs(use_topk, topk)


def _hidden() -> type[RolloutReplica]:
    from opd.integrations.verl.plugin.teachers.hidden_server import HiddenStateReplica

    return HiddenStateReplica


RolloutReplicaRegistry.register("opd_hidden", _hidden)
