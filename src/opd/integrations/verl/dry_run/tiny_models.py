"""Tiny random models, prompts and a reward that replace the user's for a dry run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.integrations.verl.plugin.model_checks import INITIALIZER_RANGE, NOT_BUILT, in_short, small_model
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model, tiny_causal_lm


@dataclass(frozen=True, kw_only=True)
class RequestedModel:
    """A model of the user's config."""

    role: str
    key: str
    """Of the override that names it."""
    path: str
    config_path: str | None = None
    tokenizer_path: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class StandIn:
    """A small model in a folder of its own, with a tokenizer."""

    requested: RequestedModel
    folder: str
    description: str
    readable: bool
    """Config and tokenizer are those of the model that was asked for."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    config: Any
    tokenizer: Any
    ends: Any


def make_models(requested: Sequence[RequestedModel], folder: Path) -> list[StandIn]:
    """Models with random weights. One that is not on this machine becomes a copy of one that is, or a Llama that reads bytes."""
    known = [_read(one) for one in requested]
    first = next((i for i, one in enumerate(known) if isinstance(one, _Known)), None)
    made = []
    for seed, (one, own) in enumerate(zip(requested, known, strict=True)):
        place = folder / f"model{seed}"
        if isinstance(own, _Known):
            description = _write(own, place, seed)
        elif first is not None:
            description = f"not readable here ({own}): like the {requested[first].role}, vocabularies not compared"
            _write(known[first], place, seed)  # pyright: ignore[reportArgumentType]
        else:
            description = f"not readable here ({own}): a Llama that reads bytes, vocabularies not compared"
            tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE)
            save_model(_llama(tokenizer, None, tie=False, seed=seed), tokenizer, place)
        made.append(
            StandIn(requested=one, folder=str(place), description=description, readable=isinstance(own, _Known))
        )
    return made


def why_unreadable(model: RequestedModel) -> str:
    """The reason why its config and tokenizer are not read from this machine's disk; empty where they are."""
    found = _read(model)
    return found if isinstance(found, str) else ""


def _read(model: RequestedModel) -> _Known | str:
    """Config and tokenizer, or why not. Only this machine's disk is looked at."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(model.config_path or model.path, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(
            model.tokenizer_path or model.path, local_files_only=True, trust_remote_code=model.trust_remote_code
        )
    except NOT_BUILT as error:
        return in_short(error)
    try:
        ends = GenerationConfig.from_pretrained(model.path, local_files_only=True).eos_token_id
    except NOT_BUILT:
        ends = None
    return _Known(config=config.get_text_config(), tokenizer=tokenizer, ends=ends)


def _write(known: _Known, folder: Path, seed: int) -> str:
    # Rows beyond the tokenizer's last id are padding that a trained model never samples; one with random weights would.
    rows = min(known.config.vocab_size, max(known.tokenizer.get_vocab().values()) + 1)
    built = small_model(known.config, rows, seed)
    kind = f"{known.config.model_type}, 2 layers of 64"
    if isinstance(built, str):
        kind = f"a Llama in place of {known.config.model_type}, which cannot be made small ({built})"
        built = _llama(known.tokenizer, rows, tie=bool(known.config.tie_word_embeddings), seed=seed)
    if known.ends is not None:
        built.generation_config.eos_token_id = known.ends
    save_model(built, known.tokenizer, folder)
    return f"{kind}, its own tokenizer, {rows} tokens"


def _llama(tokenizer: Any, rows: int | None, *, tie: bool, seed: int) -> Any:
    rows = None if rows is None else max(rows, len(tokenizer))
    return tiny_causal_lm(
        tokenizer,
        architecture="llama",
        seed=seed,
        initializer_range=INITIALIZER_RANGE,
        tie=tie,
        vocab_size=rows,
        max_positions=4096,
    )


DATA_SOURCE = "opd_smoke"
REWARD = '''"""A reward that stands in for one that is not on this machine: the share of digits."""


def compute_score(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return sum(character.isdigit() for character in solution_str) / max(1, len(solution_str))
'''


def make_prompts(
    path: Path, *, prompt_key: str, source_key: str, sources: Sequence[str] = (DATA_SOURCE,), rows: int = 64
) -> Path:
    """Sums, as a parquet file in verl's form; `sources` take turns in the column that routes samples to teachers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [
        {
            "data_source": DATA_SOURCE,
            prompt_key: [{"role": "user", "content": f"{i} + {i + 1} ="}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * i + 1)},
            "extra_info": {"index": i},
            source_key: sources[i % len(sources)],
        }
        for i in range(rows)
    ]
    pq.write_table(pa.Table.from_pylist(table), path)
    return path
