"""One model with its tokenizer, from a folder, the hub or Python; and the sampler made of it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opd.config import ModelConfig, PromptsConfig, RolloutConfig, StudentConfig, TeacherConfig
from opd.data.rendering import Renderer, eos_ids
from opd.doctor.renderers import make_renderer
from opd.errors import OpdError
from opd.models import load_causal_lm, prepare_causal_lm, resolve_device, resolve_dtype, stored_dtype
from opd.quantized import quantization_options
from opd.reporting.loading import Loading
from opd.reporting.model_facts import model_facts
from opd.reporting.progress import quoted
from opd.samplers.base import Sampling
from opd.samplers.hf import HfSampler
from opd.teachers.vocabulary import VocabularyMatch
from opd.tokenizer import load_tokenizer, own_files
from opd.trainer.guardrails import memory_advice
from opd.types import Prompt, RolloutSource


@dataclass(frozen=True, kw_only=True)
class GivenModel:
    """A model and its tokenizer that are in memory already."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model with its tokenizer, and its way of writing prompts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    eos: tuple[int, ...]
    files: Mapping[str, bytes] = field(default_factory=dict)
    """The student's own tokenizer and processor files, which its trained form takes along."""
    stored_dtype: str | None = None
    """Dtype of the student's weights as they came; None where nothing says it."""

    @property
    def pad_id(self) -> int:
        """Any id will do, because padding is masked by position; a tokenizer without one lends its EOS."""
        pad_id = self.tokenizer.pad_token_id
        return pad_id if isinstance(pad_id, int) else self.eos[0]


def load_model(
    config: StudentConfig | TeacherConfig,
    role: str,
    prompts: PromptsConfig,
    *,
    device: str,
    given: GivenModel | None = None,
    loading: Loading | None = None,
    shown: Prompt | None = None,
    home: str | None = None,
) -> LoadedModel:
    """Model, tokenizer and renderer; `given` takes the place of what would be loaded. A teacher's renderer follows
    prompts.teacher_prompt. `loading` is told what is loaded, and shows the prompt `shown` as the model will read it. With `home` the weights
    stay on that device, from where they are taken to `device` in parts."""
    loading = loading or Loading(enabled="off")
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code, "role": role}
    name = f"{role} '{config.model}'"
    if given is None:
        place = resolve_device(device)
        dtype, quantised = resolve_dtype(config.dtype, place), config.load_options
        quantization = quantization_options(
            quantised.quantization, quantised.quantization_config, role, dtype=dtype, device=place
        )
        here = model_facts(config.model, config.revision).here
        loading.begin(f"loading {name} in {str(dtype).removeprefix('torch.')} on {place}", here=here)
        tokenizer = load_tokenizer(config.model, **options)
        _show(shown, config, tokenizer, name, prompts, loading)
        with memory_advice("load"):
            model = load_causal_lm(
                config.model,
                dtype=dtype,
                device=place if home is None else resolve_device(home),
                quantization=quantization,
                attn_implementation=config.attn_implementation,
                **options,
            )
    else:
        model, tokenizer = prepare_causal_lm(given.model, role=role, name=config.model), given.tokenizer
    renderer = make_renderer(config, tokenizer, name, prompts, rewrites=role != "student")
    files: Mapping[str, bytes] = {}
    stored: str | None = None
    if role == "student" and given is None:
        files = own_files(config.model, tokenizer, revision=config.revision, code=config.trust_remote_code)
        stored = stored_dtype(config.model, config.revision)
    elif role == "student":
        files = saved_files(tokenizer)
    eos = eos_ids(model.generation_config, tokenizer)
    return LoadedModel(model=model, tokenizer=tokenizer, renderer=renderer, eos=eos, files=files, stored_dtype=stored)


def _show(
    prompt: Prompt | None,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    prompts: PromptsConfig,
    loading: Loading,
) -> None:
    """Show how a prompt reads once it is rendered. One that cannot be is refused later, where it can be said why."""
    if prompt is None:
        return
    with suppress(OpdError):
        renderer = make_renderer(config, tokenizer, name, prompts, rewrites=False)
        rendered = renderer.decode_all(renderer.prompt_ids(prompt))
        loading.message("\n".join(quoted("prompt", rendered)))


def saved_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    """The files that a tokenizer in memory would be saved as."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def sampling_of(rollout: RolloutConfig) -> Sampling:
    """How training draws responses."""
    return Sampling(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop=rollout.stop,
    )


def make_sampler(
    rollout: RolloutConfig,
    loaded: LoadedModel,
    vocabulary: VocabularyMatch,
    pad_id: int,
    *,
    source: RolloutSource,
    model: PreTrainedModel | None = None,
    **options: Any,
) -> HfSampler:
    """A sampler that draws as the recipe says; `options` are further ones of HfSampler."""
    return HfSampler(
        model or loaded.model,
        loaded.renderer,
        sampling_of(rollout),
        eos_ids=loaded.eos,
        pad_id=pad_id,
        vocabulary=vocabulary,
        batch_size=rollout.batch_size,
        source=source,
        **options,
    )
