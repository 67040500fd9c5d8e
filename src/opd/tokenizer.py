"""A model's tokenizer as its own files define it, and those files, which a trained student keeps unchanged."""

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
from opd.folders import check_folder
from opd.load_errors import UNREADABLE, load_failure

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
"""Files beside weights and config that AutoTokenizer, AutoProcessor and servers such as vLLM read."""
LOADING_TRACES = ("is_local", "local_files_only")
CODE_FILES = "*.py"
SMALL_PARTS = ("normalizer", "pre_tokenizer", "decoder")
"""The parts of a tokenizer.json that determine encoding and decoding, besides its model."""
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, role: str = "model"
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, from the same folder or hub name; a tokenizer.json is used exactly as it is. Raises ModelError.

    transformers rebuilds some tokenizer classes from the vocabulary alone, which can differ from the tokenizer.json that the
    model was trained with: a byte-level one under LlamaTokenizerFast loses every space.
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
            if not _same_pipeline(filed, tokenizer.backend_tokenizer):
                return _as_filed(name, revision, tokenizer, filed)
        return tokenizer
    except UNREADABLE as error:
        raise ModelError(load_failure(role, "tokenizer", name, error)) from error


def own_files(name: str, tokenizer: PreTrainedTokenizerBase, *, revision: str | None, code: bool) -> dict[str, bytes]:
    """Contents of the model's tokenizer, chat template and processor files by path; with `code`, of its Python files too.

    Read before training, so that a folder deleted during the run does no harm. Raises ModelError.
    """
    named = tuple(tokenizer.vocab_files_names.values())
    patterns = (*OWN_FILES, *named, *((CODE_FILES,) if code else ()))
    try:
        folder = _folder(name, revision, patterns)
        files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
        return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(files)}
    except OSError as error:
        raise ModelError(load_failure("student", "tokenizer", name, error)) from error


def write_own_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files into a student's folder; existing ones are replaced."""
    for name, content in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(_without_traces(content) if name == "tokenizer_config.json" else content)


def _without_traces(content: bytes) -> bytes:
    """A tokenizer_config.json without the keys that transformers writes down of how it was loaded; as it is where there are none."""
    try:
        config = json.loads(content)
    except ValueError:
        return content
    if not isinstance(config, dict) or not any(key in config for key in LOADING_TRACES):
        return content
    kept = {key: value for key, value in config.items() if key not in LOADING_TRACES}
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _folder(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    """The local folder, or the hub's files of these patterns in the local cache."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def _is_remade(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True when transformers may have ignored the tokenizer.json. A class that comes with the model is trusted."""
    kind = type(tokenizer)
    return (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind is not PreTrainedTokenizerFast
        and kind.__module__.startswith("transformers.")
    )


def _same_pipeline(one: Tokenizer, other: Tokenizer) -> bool:
    """Do they encode and decode alike? The model, whose merges take long to compare, comes last."""
    if any(_part(one, name) != _part(other, name) for name in SMALL_PARTS):
        return False
    return one.model.__getstate__() == other.model.__getstate__()


def _part(tokenizer: Tokenizer, name: str) -> object:
    part = getattr(tokenizer, name)
    read = None if part is None else json.loads(part.__getstate__())
    if name == "decoder" and read == {**(read or {}), "type": "ByteLevel"}:
        return "ByteLevel"  # its options are read by pre-tokenizers alone
    for piece in [read, *((read or {}).get("pretokenizers") or ())]:
        if piece:
            piece.pop("trim_offsets", None)  # decides which characters a token is said to stand for, not which token
    return read


def _as_filed(
    name: str, revision: str | None, remade: PreTrainedTokenizerBase, filed: Tokenizer
) -> PreTrainedTokenizerBase:
    """The tokenizer.json as it is, with the class's special tokens where the file has them."""
    special = {key: getattr(remade, key) for key in SPECIAL_TOKENS}
    known = {key: token for key, token in special.items() if token is not None and filed.token_to_id(token) is not None}
    return PreTrainedTokenizerFast.from_pretrained(name, revision=revision, **known)  # pyright: ignore[reportArgumentType]
