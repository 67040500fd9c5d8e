"""Prompts and responses as the token ids of one tokenizer, and token ids as text that a person can read."""

from __future__ import annotations

import codecs
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from opd.data.chat import ChatTemplate
from opd.errors import DataError, ModelError
from opd.types import Prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

SENTENCEPIECE_SPACE = "▁"
MAX_RUN = 64  # tokens; a run goes on while each of its tokens ends inside a character
SENTENCEPIECE_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Renderer:
    """Prompts as the token ids of one tokenizer. `name` is the model's in error messages: "student 'Qwen/Qwen3-0.6B'"."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        """`system` precedes the messages of every prompt without a system message."""
        self.tokenizer = tokenizer
        self.name = name
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.system = system
        self.chat = ChatTemplate(tokenizer, name=name, arguments=self.chat_template_kwargs)
        self._rendered: dict[int, tuple[Prompt, array[int]]] = {}

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Text as it is, after BOS if the tokenizer writes one; messages through the chat template, up to the answer.

        Renders a prompt once: it returns every epoch, and for every sample of it.
        """
        kept = self._rendered.get(id(prompt))  # held-out prompts have the same indices
        if kept is not None:
            return tuple(kept[1])
        ids = self._text_ids(prompt) if prompt.messages is None else self.chat.ids(prompt, self.system)
        if not ids:
            raise DataError(f"prompt {prompt.index} has no tokens under the tokenizer of {self.name}; remove the row.")
        self._rendered[id(prompt)] = (prompt, array("i", ids))
        return tuple(ids)

    def response_ids(self, text: str, finished: bool = True) -> tuple[int, ...]:
        """Token ids of a reference response; a finished one ends with the tokenizer's EOS."""
        ids = self._tokenise(text, "a response", special=False)
        if not finished:
            return tuple(ids)
        eos: Any = self.tokenizer.eos_token_id
        if eos is None:
            raise ModelError(
                f"the tokenizer of {self.name} has no EOS token, so a response cannot end; set its eos_token."
            )
        return tuple(ids) if ids and ids[-1] == eos else (*ids, eos)

    def reference_ids(self, prompt: Prompt, eos: Sequence[int]) -> tuple[int, ...]:
        """The prompt's reference response, ended as this prompt's format ends an answer.

        A chat template may end a turn with another stop token than the tokenizer's EOS (Gemma's <end_of_turn>); `eos` are the ids
        that the model stops at.
        """
        assert prompt.response is not None
        if prompt.messages is None or len(eos) < 2:
            return self.response_ids(prompt.response)
        answered = self.chat.ids(prompt, self.system, answer=prompt.response)
        end = next((token for token in reversed(answered) if token in eos), None)
        if end is None:
            return self.response_ids(prompt.response)
        return (*self.response_ids(prompt.response, finished=False), end)

    def check_length(self, prompt: Prompt, ids: Sequence[int], max_new_tokens: int, context: int) -> None:
        """Raise DataError for a prompt that leaves no room in the context (tokens) for a whole response."""
        if len(ids) + max_new_tokens > context:
            raise DataError(
                f"prompt {prompt.index} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is "
                f"{len(ids) + max_new_tokens}, but the context of {self.name} is {context}. "
                "Shorten or remove the prompt, or lower max_new_tokens."
            )

    def decode(self, ids: Sequence[int]) -> str:
        """Text without special tokens."""
        return self._decode(ids, skip_special_tokens=True)

    def decode_all(self, ids: Sequence[int]) -> str:
        """Text with special tokens, for checking a chat template."""
        # tokenizers written in Python add spaces between special tokens
        return self._decode(ids, skip_special_tokens=False, spaces_between_special_tokens=False)

    def _decode(self, ids: Sequence[int], **options: bool) -> str:
        tokenizer: Any = self.tokenizer
        return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False, **options))

    def with_special(self, ids: Sequence[int]) -> tuple[str, tuple[tuple[int, int], ...]]:
        """`decode_all`, and where its special tokens are: index of the first character, and of the one after the last."""
        text, end = self.decode_all(ids), 0
        spans: list[tuple[int, int]] = []
        between: list[int] = []
        for token_id in ids:
            token = self._special_tokens.get(token_id)
            if token is None:
                between.append(token_id)
                continue
            # What stands between may spell a special token itself.
            start = text.find(token, end + (len(self.decode_all(between)) if between else 0))
            if start < 0:  # a decoder that hides its tokens
                break
            end = start + len(token)
            spans.append((start, end))
            between = []
        return text, tuple(spans)

    def joined_tokens(self, ids: Sequence[int]) -> tuple[tuple[int, int, str], ...]:
        """Runs of tokens that make whole characters together and not alone: index of the first, of the one after the last, their text."""
        pieces, start = [self._token_bytes(token_id) for token_id in ids], 0
        runs: list[tuple[int, int, str]] = []
        while start < len(pieces):
            end, text = _whole_characters(pieces, start)
            if end > start + 1:
                runs.append((start, end, text))
            start = end
        return tuple(runs)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Each token by itself, readable: spaces as spaces, special tokens by name, part of a character as \\x bytes."""
        return [self._token_string(token_id) for token_id in ids]

    def _text_ids(self, prompt: Prompt) -> list[int]:
        assert prompt.text is not None, "a prompt has text or messages"
        if self.system is not None:
            raise DataError(
                f"prompt {prompt.index} is plain text, which has no place for the system message of {self.name}; "
                "write the prompt as messages, or leave the system message out."
            )
        for name in prompt.template_arguments:
            self.chat.note_left_out(f"{name} beside a prompt that is plain text", prompt.index)
        plain = self._tokenise(prompt.text, f"prompt {prompt.index}", special=False)
        whole = self._tokenise(prompt.text, f"prompt {prompt.index}", special=True)
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                before = whole[:start]  # what comes after, an EOS, would end the prompt before it is answered
                return plain if plain[:start] == before else before + plain
        raise ModelError(
            f"the tokenizer of {self.name} changes the text of prompt {prompt.index} when it adds special tokens, so "
            "the end of the prompt cannot be told; write the prompt as messages."
        )

    def _tokenise(self, text: str, what: str, *, special: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])  # pyright: ignore[reportArgumentType]
        except Exception as error:  # the Rust tokenizers raise nothing more specific
            raise DataError(f"{what} cannot be tokenised by the tokenizer of {self.name}: {error}.") from error

    def _token_string(self, token_id: int) -> str:
        piece = self._token_bytes(token_id)
        return piece if isinstance(piece, str) else piece.decode("utf-8", errors="backslashreplace")

    def _token_bytes(self, token_id: int) -> bytes | str:
        """The bytes that a token stands for, or the text of one that stands for whole characters."""
        added = self._added_tokens.get(token_id)
        if added is not None:
            return added
        piece = self.tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return f"[{token_id}]"  # a padding row of the embedding
        if self._is_byte_level:
            return bytes(_byte_of()[character] for character in piece)
        byte = SENTENCEPIECE_BYTE.fullmatch(piece)
        return bytes([int(byte[1], 16)]) if byte else piece.replace(SENTENCEPIECE_SPACE, " ")

    @cached_property
    def _added_tokens(self) -> dict[int, str]:
        return {token_id: token.content for token_id, token in self.tokenizer.added_tokens_decoder.items()}

    @cached_property
    def _special_tokens(self) -> dict[int, str]:
        """Added tokens that are marks of a template or of an end, not words."""
        marks = {token_id: token for token_id, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return {token_id: token.content for token_id, token in marks.items()}

    @cached_property
    def _is_byte_level(self) -> bool:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or backend.decoder is None:
            return False
        decoder = json.loads(backend.decoder.__getstate__())
        return any(part["type"] == "ByteLevel" for part in [decoder, *decoder.get("decoders", ())])


def eos_ids(model_generation_config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a response: those of the generation config, then the tokenizer's EOS. Raises ModelError without any."""
    configured = getattr(model_generation_config, "eos_token_id", None)
    ids: list[Any] = [configured] if isinstance(configured, int) else list(configured or ())
    ids.append(tokenizer.eos_token_id)
    found = tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))
    if not found:
        raise ModelError(
            "neither the model's generation config nor its tokenizer names an EOS token, so no response would ever end; "
            "set eos_token_id in generation_config.json."
        )
    return found


def _whole_characters(pieces: Sequence[bytes | str], start: int) -> tuple[int, str]:
    """The end of the shortest run of pieces from `start` that is whole characters, and its text; one piece where no run is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = ""
    for end, piece in enumerate(pieces[start : start + MAX_RUN], start + 1):
        if isinstance(piece, str):
            break
        try:
            text += decoder.decode(piece)
        except UnicodeDecodeError:
            break
        if not decoder.getstate()[0]:
            return end, text
    return start + 1, ""


def byte_alphabet() -> list[str]:
    """The printable stand-in of every byte, in byte order, as byte-level BPE vocabularies write them (GPT-2)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + hidden.index(byte)) for byte in range(256)]


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    return {character: byte for byte, character in enumerate(byte_alphabet())}
