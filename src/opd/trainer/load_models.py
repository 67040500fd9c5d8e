"""One model with its tokenizer, and the sampler made of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config import Config, ModelConfig, StudentConfig, TeacherConfig
from opd.data.privileged import PrivilegedRenderer
from opd.data.rendering import Renderer, eos_ids
from opd.models import load_causal_lm, resolve_device, resolve_dtype
from opd.samplers.base import Sampling
from opd.samplers.hf import HfSampler
from opd.teachers.vocabulary import VocabularyMatch
from opd.tokenizer import load_tokenizer, own_files
from opd.trainer.guardrails import memory_advice
from opd.types import RolloutSource


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """What is loaded from one folder, or from the hub."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    eos: tuple[int, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The student's own tokenizer and processor files, which its trained form takes along."""


def load_side(
    config: StudentConfig | TeacherConfig, role: str, device_name: str, system: str | None, template: str | None = None
) -> LoadedModel:
    """Model, tokenizer and renderer; with `template`, of prompts that it rewrites."""
    device = resolve_device(device_name)
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code, "role": role}
    tokenizer = load_tokenizer(config.model, **options)
    with memory_advice("load"):
        model = load_causal_lm(
            config.model,
            dtype=resolve_dtype(config.dtype, device),
            device=device,
            attn_implementation=config.attn_implementation,
            **options,
        )
    renderer = make_renderer(config, tokenizer, f"{role} '{config.model}'", system, template)
    files = {}
    if role == "student":
        files = own_files(config.model, tokenizer, revision=config.revision, code=config.trust_remote_code)
    eos = eos_ids(model.generation_config, tokenizer)
    return LoadedModel(model=model, tokenizer=tokenizer, renderer=renderer, eos=eos, files=files)


def make_renderer(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, name: str, system: str | None, template: str | None
) -> Renderer:
    """This model's way of writing prompts."""
    options: dict[str, Any] = {
        "name": name,
        "chat_template_kwargs": config.chat_template_kwargs,
        "system": system,
    }
    return Renderer(tokenizer, **options) if template is None else PrivilegedRenderer(tokenizer, template, **options)


def pad_id_of(side: LoadedModel) -> int:
    """Any id will do, because padding is masked by position; a tokenizer without one lends its EOS."""
    pad_id = side.tokenizer.pad_token_id
    return pad_id if isinstance(pad_id, int) else side.eos[0]


def make_sampler(
    config: Config,
    side: LoadedModel,
    vocabulary: VocabularyMatch,
    pad_id: int,
    *,
    source: RolloutSource,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> HfSampler:
    """Draws as the recipe says; `options` are further ones of HfSampler."""
    rollout = config.rollout
    sampling = Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
    )
    return HfSampler(
        model or side.model,
        side.renderer,
        sampling,
        eos_ids=side.eos,
        pad_id=pad_id,
        vocabulary=vocabulary,
        batch_size=rollout.batch_size,
        source=source,
        **options,
    )
