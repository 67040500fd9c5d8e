"""Checks of what each model really reads: prompts that a tokenizer does not give back, template arguments that no template sees, and prompts
that student and teacher end differently. Imports no torch."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from opd.config.run import RunSettings, teacher_key
from opd.data.privileged import PrivilegedRenderer
from opd.data.rendering import Renderer
from opd.doctor.prompt_starts import check_starts
from opd.errors import ModelError
from opd.types import Prompt

LOOKED_AT = 256  # prompts, evenly spaced: what is wrong with a tokenizer or a template shows in every one of them
MAX_LOST = 0.05  # of the characters. Spaces alone are a sixth of English; a rare character that a vocabulary lacks stays far below
EXCERPT = 60
MODES = ("enable_thinking", "thinking", "reasoning_effort")
"""Arguments of well-known templates that decide whether and how much a model thinks."""
ANSWER = "The answer is 42."  # in a conversation that is only rendered


class ReadingModel(Protocol):
    """A model's way of writing prompts; one in this process has the `model` too."""

    @property
    def renderer(self) -> Renderer: ...


def check_reading(
    config: RunSettings,
    prompts: Sequence[Prompt],
    student: ReadingModel,
    teachers: Mapping[str, ReadingModel],
) -> list[str]:
    """Warnings about how the prompts reach the models, other than check_text's about the student. Raises ModelError where a teacher's
    tokenizer loses the prompts."""
    some = evenly_spaced(prompts)
    found = []
    for name, side in teachers.items():
        if config.all_teachers[name].source == "model":
            found += check_text(side.renderer, teacher_key(name), prompts)
    found += _untemplated(config, prompts, student.renderer, {teacher_key(n): s.renderer for n, s in teachers.items()})
    readers = {"student": student.renderer, **{teacher_key(name): side.renderer for name, side in teachers.items()}}
    found += check_starts(some, readers, system=config.prompts.system)
    for name, side in teachers.items():
        found += _different_modes(student.renderer, side.renderer, teacher_key(name), some)
    return found


def evenly_spaced(prompts: Sequence[Prompt]) -> Sequence[Prompt]:
    """LOOKED_AT of the prompts, or all of fewer."""
    return prompts[:: max(1, len(prompts) // LOOKED_AT)][:LOOKED_AT]


# --- text in, text out ------------------------------------------------------------------------------------------------


def check_text(renderer: Renderer, role: str, prompts: Sequence[Prompt]) -> list[str]:
    """Does decode(encode(text)) give the text back? Unicode normalisation and a leading space are a tokenizer's own business. Returns
    warnings; raises ModelError where more is lost than a rare character."""
    changed, lost, characters = [], 0, 0
    some = evenly_spaced(prompts)
    for prompt in some:
        for text in _texts(_as_read(renderer, prompt)):
            try:
                ids = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
            except Exception:  # the Rust tokenizers raise nothing more specific
                renderer.prompt_ids(prompt)  # says it of the row
                continue
            back = renderer.decode_all(ids)  # pyright: ignore[reportArgumentType]
            characters += len(text)
            if _normal(back) != _normal(text):
                changed.append((prompt.index, text, back))
                lost += (Counter(text.casefold()) - Counter(back.casefold())).total()
    if not changed:
        return []
    index, text, back = changed[0]
    start = _first_difference(text, back)
    shown = f"prompt {index}: {_cut(text, start)!r} comes back as {_cut(back, start)!r}"
    if lost > MAX_LOST * characters:
        raise ModelError(
            f"The tokenizer of {renderer.name} loses {lost / characters:.0%} of the prompts' characters ({shown}), so the model would "
            f"read something else than what is asked. Give {role}.model a folder with the tokenizer.json that the model was trained "
            "with, or use prompts that its vocabulary can spell."
        )
    return [
        f"the tokenizer of {renderer.name} does not give {len(changed)} of the texts back as they were, in {len(some)} prompts looked "
        f"at; {shown}. The model reads what came back."
    ]


def _as_read(renderer: Renderer, prompt: Prompt) -> Prompt:
    return renderer.rewritten(prompt) if isinstance(renderer, PrivilegedRenderer) else prompt


def _texts(prompt: Prompt) -> list[str]:
    if prompt.messages is None:
        return [prompt.text or ""]
    return [text for message in prompt.messages for text in _parts(message.get("content"))]


def _parts(content: object) -> list[str]:
    """A message's texts: its content, or those of the content's parts."""
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFKC", text).removeprefix(" ")


def _first_difference(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _cut(text: str, middle: int) -> str:
    start, end = max(0, middle - EXCERPT // 2), middle + EXCERPT // 2
    return ("…" if start else "") + text[start:end] + ("…" if end < len(text) else "")


# --- templates --------------------------------------------------------------------------------------------------------


def _untemplated(
    config: RunSettings, prompts: Sequence[Prompt], student: Renderer, teachers: Mapping[str, Renderer]
) -> list[str]:
    """Plain text goes to a model as it is: what a template would have done with it is not done."""
    plain = sum(prompt.messages is None for prompt in prompts)
    if not plain:
        return []
    given = {"student": config.student.chat_template_kwargs}
    given |= {teacher_key(name): section.chat_template_kwargs for name, section in config.all_teachers.items()}
    found = [
        f"{role}.chat_template_kwargs ({', '.join(arguments)}) changes nothing for {_share(plain, prompts)}, which are plain text and "
        'pass through no chat template. Write them as messages, "prompt": [{"role": "user", "content": "…"}], or leave the arguments out.'
        for role, arguments in given.items()
        if arguments
    ]
    templates = [renderer.name for renderer in (student, *teachers.values()) if renderer.tokenizer.chat_template]
    if not found and templates:
        found.append(
            f"{_share(plain, prompts)} are plain text, which passes through no chat template, and {templates[0]} has one. That is right "
            'for a base model; an instruction-tuned one expects messages: "prompt": [{"role": "user", "content": "…"}].'
        )
    return found


def _share(part: int, prompts: Sequence[Prompt]) -> str:
    return f"all {part} prompts" if part == len(prompts) else f"{part} of {len(prompts)} prompts"


def _different_modes(student: Renderer, teacher: Renderer, role: str, prompts: Sequence[Prompt]) -> list[str]:
    """What a template writes between the head of the assistant's turn and the answer decides what a model goes on with, such as a
    thought or an answer; an argument may say the same at the start. The same arguments on both sides, with whatever values, say that
    the difference is meant; another format of the turns is every model's own."""
    mine, theirs = student.chat_template_kwargs, teacher.chat_template_kwargs
    if mine and mine.keys() == theirs.keys():
        return []
    single = list(_one_sided(student, teacher, role))
    for prompt in prompts:
        ends = _end(student, prompt), _end(teacher, prompt)
        if ends[0] is None or ends[1] is None or ends[0].opening == ends[1].opening:
            continue
        advice = single[0].advice if single else _mode_advice(student, teacher, role, prompt)
        return [
            f"student and {role} read prompts that end differently: the student's with {ends[0].text!r}, the teacher's with "
            f"{ends[1].text!r} (prompt {prompt.index}). The teacher then scores answers that it was asked for in another way, such as with "
            f"its thoughts first. {advice}"
        ]
    for one in single:
        for prompt in prompts:
            given, left_out = one.effect(prompt)
            if given != left_out:
                return [
                    f"{one.where}.chat_template_kwargs.{one.name} is set on this side alone, which then reads {given!r} where the other side's "
                    f"prompts keep to {left_out!r} (prompt {prompt.index}). {one.advice}"
                ]
    return []


def _mode_advice(student: Renderer, teacher: Renderer, role: str, prompt: Prompt) -> str:
    """The way to the same ending where no argument of one side alone is the reason."""
    sides = {"student": student, role: teacher}
    sources = {where: str(one.tokenizer.chat_template) for where, one in sides.items()}
    for name in MODES:
        reads = [where for where, source in sources.items() if re.search(rf"\b{name}\b", source)]
        if len(reads) == len(sides):
            return f"Set chat_template_kwargs.{name} for both."
        for where in reads:
            (other,) = (one for key, one in sides.items() if key != where)
            if (change := _matching(sides[where], name, other, prompt)) is not None:
                return change.format(key=f"{where}.chat_template_kwargs.{name}")
    return (
        "No argument of the templates decides it. Where it is not meant, put the teacher's template into the student's folder, as "
        "chat_template.jinja, if the student knows its special tokens."
    )


def _matching(giver: Renderer, name: str, other: Renderer, prompt: Prompt) -> str | None:
    """What to do with an argument that one side alone reads, so that its prompt ends as the other side's does; None where no value of
    it does that."""
    wanted, kept = _end(other, prompt), {k: v for k, v in giver.chat_template_kwargs.items() if k != name}
    changes = {"Drop {key}.": kept} if name in giver.chat_template_kwargs else {}
    changes |= {f"Set {{key}}={json.dumps(value)}.": {**kept, name: value} for value in (True, False)}
    for words, arguments in changes.items():
        ended = _end(_bare(giver, arguments), _as_read(giver, prompt))
        if wanted is not None and ended is not None and ended.opening == wanted.opening:
            return words
    return None


@dataclass(frozen=True, kw_only=True)
class _End:
    """A rendered prompt from the end of the last message on."""

    text: str
    opening: str
    """The part that stands before the answer and not before an answer given earlier in a conversation."""


def _end(renderer: Renderer, prompt: Prompt) -> _End | None:
    """None for text, and where a template rewrites the last message or takes no further turns."""
    if prompt.messages is None:
        return None
    read = _as_read(renderer, prompt)
    content = next(reversed(_texts(read)), "").strip()
    longer = [*(read.messages or ()), {"role": "assistant", "content": ANSWER}, {"role": "user", "content": ANSWER}]
    bare = _bare(renderer, renderer.chat_template_kwargs)
    whole = renderer.decode_all(renderer.prompt_ids(prompt))
    try:
        answered = bare.decode_all(bare.prompt_ids(replace(read, messages=tuple(longer))))
    except Exception:  # somebody else's template, on a conversation that nobody gave
        return None
    before = answered[: answered.find(ANSWER)]
    if not content or content not in whole or content not in before:
        return None
    text, head = (part[part.rfind(content) + len(content) :] for part in (whole, before))
    return _End(text=text, opening=text.removeprefix(head.rstrip()).strip())


def _bare(renderer: Renderer, arguments: Mapping[str, Any]) -> Renderer:
    """The same tokenizer and system message with other arguments, for prompts as they are."""
    return Renderer(renderer.tokenizer, name=renderer.name, chat_template_kwargs=arguments, system=renderer.system)


@dataclass(frozen=True, kw_only=True)
class _OneSided:
    """A template argument that one side has, and that the other side's template would read too."""

    name: str
    where: str
    giver: Renderer
    advice: str

    def effect(self, prompt: Prompt) -> tuple[str, str]:
        """The rendered prompt around the first difference that the argument makes, with it and without it; the same text twice where it
        makes none."""
        if prompt.messages is None:
            return "", ""
        bare = _bare(self.giver, {k: v for k, v in self.giver.chat_template_kwargs.items() if k != self.name})
        try:
            left_out = bare.decode_all(bare.prompt_ids(_as_read(self.giver, prompt)))
        except Exception:  # somebody else's template, without an argument that it may need
            return "", ""
        given = self.giver.decode_all(self.giver.prompt_ids(prompt))
        at = _first_difference(given, left_out)
        return _cut(given, at), _cut(left_out, at)


def _one_sided(student: Renderer, teacher: Renderer, role: str) -> Iterator[_OneSided]:
    for where, giver, other, taker in (("student", student, role, teacher), (role, teacher, "student", student)):
        for name, value in giver.chat_template_kwargs.items():
            if name not in taker.chat_template_kwargs and re.search(rf"\b{name}\b", str(taker.tokenizer.chat_template)):
                advice = (
                    f"Set {other}.chat_template_kwargs.{name}={json.dumps(value)} too; set on both sides, to whatever values, it counts as "
                    "meant."
                )
                yield _OneSided(name=name, where=where, giver=giver, advice=advice)
