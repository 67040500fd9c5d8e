"""Messages rendered by a chat template, in the form that this template reads, and a record of whatever it leaves out.

Templates disagree about content (null, text or parts), about arguments of calls (objects or text), and about tools (wrapped or
bare). The canonical form is rendered first. If the template fails on it, or shows less than the row holds, the other forms are
tried. The form that shows most is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

from opd.data.messages import TOOL_ARGUMENTS, Message, canonical
from opd.data.reasoning_gym import COLUMN
from opd.data.repairs import NONE, REPAIRS, Chat, Leaf, Repair, contains, leaves_of, misread_structures, put, repaired
from opd.errors import ConfigError, DataError
from opd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESERVED = ("add_generation_prompt", "continue_final_message", "return_dict", "return_tensors", "tokenize")
"""Arguments of apply_chat_template that opd sets itself."""
PROBE = "opdprobe"
"""A word that no row holds: a text that can grow by it unnoticed is not shown."""
CODE = re.compile(r"\{[%#].*?[%#]\}|\{\{.*?\}\}", re.DOTALL)
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")


@dataclass
class LeftOut:
    """Something that rows hold and that the template does not show."""

    rows: int = 0
    first: int = 0
    """Index of the first such prompt."""


@dataclass
class _Rendering:
    text: str = ""
    error: Exception | None = None
    faults: Counter[str] = field(default_factory=Counter[str])
    """Number of places that the rendering shows wrongly, by kind."""

    @property
    def rank(self) -> tuple[bool, int]:
        return self.error is not None, self.faults.total()


class ChatTemplate:
    """One tokenizer's chat template. `name` is the model's in error messages."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str, arguments: Mapping[str, Any]) -> None:
        """`arguments` go to the template with every prompt; a row's own come before them.

        Raises ConfigError for an argument that the template does not read.
        """
        self.tokenizer: Any = tokenizer
        self.name = name
        self.arguments = dict(arguments)
        self.left_out: dict[str, LeftOut] = {}
        """Keyed by a description; under NONE, nulls that are written out."""
        self._repairs: dict[frozenset[str], tuple[tuple[Repair, ...], frozenset[str]]] = {}
        """The repairs that helped against these faults, and the faults that remained."""
        self._shown_kinds: set[tuple[Any, ...]] = set()
        self._check_choice()
        for key in self.arguments:
            self._check(key)

    def ids(self, prompt: Prompt, system: str | None, answer: str | None = None) -> list[int]:
        """Token ids of the prompt up to the answer, or with `answer` as the assistant's.

        Raises DataError for every failure of the template or of the tokenizer.
        """
        if not self._templates and "chat_template" not in self.arguments:
            as_text = (
                "set prompts.reasoning_gym.chat=false" if COLUMN in prompt.metadata else "write the prompts as text"
            )
            raise DataError(
                f"prompt {prompt.index} is a list of messages, but the tokenizer of {self.name} has no chat template, as is usual for a base "
                f"model; {as_text}, or put the chat template of an instruction-tuned model of its family into its folder, as "
                "chat_template.jinja."
            )
        messages = [canonical(message) for message in prompt.messages or ()]
        if system is not None and messages[0].get("role") != "system":
            messages.insert(0, {"role": "system", "content": system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        own = {key: value for key, value in prompt.template_arguments.items() if key not in RESERVED}
        chat = (messages, {**self.arguments, **own})
        self._check_named(prompt, chat[1])
        leaves, generate = list(leaves_of(chat)), answer is None
        repairs, rendering = self._best(chat, leaves, generate)
        if rendering.error is not None:
            raise self._refusal(prompt, messages, rendering.error) from rendering.error
        if generate:
            self._note(prompt, chat, leaves, repairs, rendering)
        try:
            encoded = self._apply(repaired(chat, repairs), generate, tokenize=True, return_dict=True)
        except Exception as error:  # the Rust tokenizers raise nothing more specific
            raise DataError(
                f"prompt {prompt.index} cannot be tokenised by the tokenizer of {self.name}: {error}."
            ) from error
        return list(encoded["input_ids"])

    def note_left_out(self, what: str, row: int) -> None:
        """Count something that a row holds and no rendering does."""
        self.left_out.setdefault(what, LeftOut(first=row)).rows += 1

    # The choice of a form

    def _best(self, chat: Chat, leaves: Sequence[Leaf], generate: bool) -> tuple[tuple[Repair, ...], _Rendering]:
        """The form with the fewest faults, of those the one nearest to the row."""
        first = self._judged(chat, leaves, generate)
        best: tuple[tuple[Repair, ...], _Rendering] = ((), first)
        if not any(first.rank):
            return best
        kind = frozenset([*first.faults, type(first.error).__name__])
        if kind in self._repairs:
            known, left = self._repairs[kind]
            again = self._judged(repaired(chat, known), leaves, generate) if known else first
            if again.error is None and again.faults.keys() <= left:
                return known, again
        helpful = [repair for repair in REPAIRS if repair(chat) != chat]
        for count in range(1, len(helpful) + 1):
            for repairs in combinations(helpful, count):
                tried = self._judged(repaired(chat, repairs), leaves, generate)
                if tried.rank < best[1].rank:
                    best = (repairs, tried)
            if not any(best[1].rank):
                break
        self._repairs[kind] = best[0], frozenset(best[1].faults)
        return best

    def _judged(self, chat: Chat, leaves: Sequence[Leaf], generate: bool) -> _Rendering:
        try:
            text = str(self._apply(chat, generate, tokenize=False))
        except Exception as error:  # somebody else's template: anything that Python can raise
            return _Rendering(error=error)
        faults = Counter(leaf.label for leaf in leaves if not contains(text, leaf.text))
        faults[NONE] = max(0, text.count(NONE) - sum(leaf.text.count(NONE) for leaf in leaves))
        faults["structure"] = sum(written in text for written in misread_structures(chat[0]))
        return _Rendering(text=text, faults=+faults)

    def _apply(self, chat: Chat, generate: bool, **options: Any) -> Any:
        messages, arguments = chat
        templates = self._templates
        if isinstance(templates, dict) and len(templates) == 1:
            arguments = {"chat_template": next(iter(templates)), **arguments}
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=generate, **options, **arguments)

    # Texts that are left out

    def _note(
        self, prompt: Prompt, chat: Chat, leaves: Sequence[Leaf], repairs: tuple[Repair, ...], rendering: _Rendering
    ) -> None:
        labels = {
            leaf.label
            for leaf in leaves
            if self._is_doubtful(leaf, chat, rendering.text) and not self._reads(leaf, chat, repairs, rendering.text)
        }
        for key in prompt.template_arguments:
            if key in RESERVED or (key not in (*TOOL_ARGUMENTS, "chat_template") and not self._names(key)):
                labels.add(f"chat_template_kwargs.{key}")
        if rendering.faults[NONE] and not self._spells_none:
            labels.add(NONE)
        for label in labels:
            self.note_left_out(label, prompt.index)

    def _is_doubtful(self, leaf: Leaf, chat: Chat, text: str) -> bool:
        """True for a text that has to be probed: it is absent, or is the first of its kind and could be there by chance."""
        if not contains(text, leaf.text):
            return True
        kind: tuple[Any, ...] = (leaf.label, leaf.path[-1])
        if leaf.path[0] == 0:  # whether a message is shown can depend on its place
            place: int = leaf.path[1]
            before = chat[0][place - 1].get("role") if place else None
            kind += (before, "tool_calls" in chat[0][place])
        if kind in self._shown_kinds:
            return False
        self._shown_kinds.add(kind)
        return True

    def _reads(self, leaf: Leaf, chat: Chat, repairs: tuple[Repair, ...], text: str) -> bool:
        """True when the rendering depends on both ends of this text."""
        for probed in (leaf.text + PROBE, PROBE + leaf.text):
            changed = deepcopy(chat)
            put(changed, leaf.path, probed)
            try:
                again = self._apply(repaired(changed, repairs), True, tokenize=False)
            except Exception:  # the template looks at the text, whatever it thinks of the probe
                continue
            if again == text:
                return False
        return True

    @cached_property
    def _spells_none(self) -> bool:
        """True when the template itself holds the word None, which then tells nothing about a row."""
        code = [piece for source in self._sources() for piece in CODE.findall(source)]
        own = [CODE.sub("", source) for source in self._sources()] + [q for c in code for q in QUOTED.findall(c)]
        return any(NONE in text for text in own)

    # Arguments, and the choice of a template

    @property
    def _templates(self) -> str | dict[str, str] | None:
        """One template, or several by name."""
        return self.tokenizer.chat_template

    def _sources(self) -> list[str]:
        template, chosen = self._templates, self.arguments.get("chat_template")
        if isinstance(chosen, str):
            return [template[chosen] if isinstance(template, dict) and chosen in template else chosen]
        return list(template.values()) if isinstance(template, dict) else [template] if template else []

    def _names(self, key: str) -> bool:
        return any(re.search(rf"\b{re.escape(key)}\b", source) for source in self._sources())

    def _check(self, key: str) -> None:
        if key in RESERVED:
            raise ConfigError(f"chat_template_kwargs cannot set {key!r}, which opd sets itself; leave it out.")
        if key != "chat_template" and not self._names(key):
            raise ConfigError(
                f"the chat template of {self.name} does not read {key!r}, so it would change nothing; "
                "check the spelling, or leave it out of chat_template_kwargs."
            )

    def _check_choice(self) -> None:
        """Refuse a `chat_template` that neither names one of several templates nor is one."""
        chosen = self.arguments.get("chat_template")
        if "chat_template" not in self.arguments or (isinstance(chosen, str) and ("{{" in chosen or "{%" in chosen)):
            return
        templates = self._templates
        names = sorted(templates) if isinstance(templates, dict) else []
        if chosen not in names:
            raise ConfigError(
                f"chat_template_kwargs.chat_template={chosen!r} names no chat template of {self.name}; "
                f"{'it has ' + ', '.join(names) if names else 'it has one without a name'}. Name one, write one out, or leave it out."
            )

    def _check_named(self, prompt: Prompt, arguments: Mapping[str, Any]) -> None:
        """Refuse several templates of which none is called default and none is chosen."""
        templates = self._templates
        if not isinstance(templates, dict) or len(templates) == 1 or "default" in templates:
            return
        if "chat_template" in arguments or ("tools" in arguments and "tool_use" in templates):
            return
        section = self.name.partition(" ")[0]
        raise DataError(
            f"prompt {prompt.index} is a list of messages, and the tokenizer of {self.name} has several chat templates, none of them "
            f"called default: {', '.join(sorted(templates))}. Choose one with "
            f"--{section}.chat_template_kwargs '{{chat_template: {sorted(templates)[0]}}}'."
        )

    def _refusal(self, prompt: Prompt, messages: Sequence[Message], error: Exception) -> DataError:
        from jinja2 import TemplateError

        reason = " ".join(str(error).split())
        if not isinstance(error, TemplateError):
            reason = f"{type(error).__name__}: {reason}"
        return DataError(
            f"the chat template of {self.name} refuses prompt {prompt.index}: {reason}. "
            f"Its roles are {', '.join(str(message.get('role')) for message in messages)}. Change the row, or use another template."
        )


def left_out_notices(templates: Iterable[ChatTemplate]) -> list[str]:
    """Sentences about texts that rows hold and renderings do not; models with the same losses share a sentence."""
    templates_of: dict[str, list[ChatTemplate]] = {}
    for template in templates:
        for what in template.left_out:
            templates_of.setdefault(what, []).append(template)
    notices: list[str] = []
    by_names: dict[str, list[str]] = {}
    for what, found in templates_of.items():
        kept, names = found[0].left_out[what], " and ".join(template.name for template in found)
        rows = f"{'1 row' if kept.rows == 1 else f'{kept.rows} rows'}, the first is prompt {kept.first}"
        if what == NONE:
            notices.append(
                f"the chat template of {names} writes None for a value that is null ({rows}); fill it in, or remove the row."
            )
        else:
            by_names.setdefault(names, []).append(f"{what} ({rows})")
    return notices + [
        f"rows hold what prompts of {names} do not show, whole or in part: {'; '.join(whats)}. Write it where the chat template "
        "shows it, such as a message of the user, or leave it out of the rows."
        for names, whats in by_names.items()
    ]
