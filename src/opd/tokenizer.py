"""A model's tokenizer as its own files describe it, and those files, which a trained student takes along unchanged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import snapshot_download
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd.adapter import base_of
from opd.errors import ModelError
from opd.models import UNREADABLE, check_folder, load_failure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")
OWN_FILES = (
    *TOKENIZER_FILES,
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "*processor*.json",
    "*feature_extractor*.json",
)
"""Beside weights and config: what AutoTokenizer and AutoProcessor read, and servers such as vLLM with them."""
CODE_FILES = "*.py"
PIPELINE = ("model", "normalizer", "pre_tokenizer", "decoder")
"""The parts of a tokenizer.json that decide which ids a text gets and which text ids give."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, role: str = "model"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from the same folder or hub name; where it has a tokenizer.json, exactly that one. Raises ModelError.

    transformers builds some tokenizer classes anew from the vocabulary alone (a byte-level tokenizer.json under LlamaTokenizerFast
    loses every space that way), while a model was trained with what its tokenizer.json says.
    """
    base = base_of(name)
    if base is not None and not any(True for pattern in TOKENIZER_FILES for _ in Path(name).glob(pattern)):
        name, revision = base, None  # peft saves none beside an adapter that keeps its base's
    check_folder(role, name, TOKENIZER_FILES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        file = _folder(name, revision, ("tokenizer.json",)) / "tokenizer.json"
        if _is_remade(tokenizer) and file.is_file():
            filed = Tokenizer.from_file(str(file))
            if _pipeline(filed) != _pipeline(tokenizer.backend_tokenizer):
                return _as_filed(name, revision, tokenizer, filed)
        return tokenizer
    except UNREADABLE as error:
        raise ModelError(load_failure(role, "tokenizer", name, error)) from error


def own_files(name: str, tokenizer: PreTrainedTokenizerBase, *, revision: str | None, code: bool) -> dict[str, bytes]:
    """Contents of the model's tokenizer, chat template and processor files by their path in its folder; with `code`, of its Python files
    too. They are read at once, so that a folder that goes away during the run costs nothing. Raises ModelError."""
    named = tuple(tokenizer.vocab_files_names.values())
    patterns = (*OWN_FILES, *named, *((CODE_FILES,) if code else ()))
    try:
        folder = _folder(name, revision, patterns)
        files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(files)}
    except OSError as error:
        raise ModelError(load_failure("student", "tokenizer", name, error)) from error


def write_own_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Put them into a student's folder, over what is there."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def _folder(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The local folder, or the hub's files of these patterns in the local cache."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def _is_remade(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether transformers may have built it from something else than its tokenizer.json. A class that comes with the model is the
    author's own word on it."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind is not PreTrainedTokenizerFast
        and kind.__module__.startswith("transformers.")
    )


def _pipeline(tokenizer: Tokenizer) -> list[object]:
    parts = json.loads(tokenizer.to_str())
    return [parts[name] for name in PIPELINE]


def _as_filed(
    name: str, revision: str | None, remade: PreTrainedTokenizerBase, filed: Tokenizer
) -> PreTrainedTokenizerBase:
    """The tokenizer.json as it is. Special tokens that only the class knows are kept where the file has them."""
    special = {key: getattr(remade, key) for key in SPECIAL_TOKENS}
    known = {key: token for key, token in special.items() if token is not None and filed.token_to_id(token) is not None}
    return PreTrainedTokenizerFast.from_pretrained(name, revision=revision, **known)  # pyright: ignore[reportArgumentType]
