"""Two real tokenizers, built on the spot: one token per character, and one token per byte."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from opd.data.rendering import byte_alphabet

DIGITS = "0123456789"
PAD, EOS, BOS = "<pad>", "<eos>", "<bos>"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A chat template for any tokenizer that can spell it."""


def digit_tokenizer(
    *, separator: str = ">", extra: str = "", bos: bool = False, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token per character. Digit d has id d; then the separator, the extra characters, <pad>, <eos>, and <bos> if asked for."""
    characters = DIGITS + separator + extra
    if len(set(characters)) != len(characters):
        raise ValueError(f"every character has to occur once, got {characters!r}")
    vocab = {character: index for index, character in enumerate(characters)}
    specials = [PAD, EOS, *([BOS] if bos else [])]
    vocab |= {token: len(vocab) + offset for offset, token in enumerate(specials)}
    backend = Tokenizer(models.WordLevel(vocab))  # pyright: ignore[reportCallIssue]  # no unknown token: a stray character is an error
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return _wrap(backend, specials, chat_template=chat_template)


def byte_tokenizer(
    *, chat_template: str | None = None, bos: bool = False, extra_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte. Byte b has id b; <pad> is 256, <eos> 257, then <bos> if asked for, then the extra tokens."""
    vocab = {character: byte for byte, character in enumerate(byte_alphabet())}
    specials = [PAD, EOS, *([BOS] if bos else []), *extra_tokens]
    vocab |= {token: len(vocab) + offset for offset, token in enumerate(specials)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend, specials, chat_template=chat_template)


def _wrap(backend: Tokenizer, specials: list[str], *, chat_template: str | None) -> PreTrainedTokenizerFast:
    bos = BOS if BOS in specials else None
    backend.add_special_tokens(specials)
    if bos is not None:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    named = {"pad_token": PAD, "eos_token": EOS} | ({"bos_token": bos} if bos else {})
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)
    tokenizer.chat_template = chat_template
    return tokenizer
