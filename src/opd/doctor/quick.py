"""The checks of `opd check`: all that can be said of a recipe without loading a weight. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.config.model import ModelConfig
from opd.config.run import RunSettings, teacher_key
from opd.data.chat import left_out_notices
from opd.data.rendering import Renderer
from opd.doctor.check import Check, Verdict, worst
from opd.doctor.checks import check_rows, notices, served_notes
from opd.doctor.device_memory import device_memory
from opd.doctor.memory_checks import memory_checks
from opd.doctor.model_shape import ModelShape, is_quick, model_shape
from opd.doctor.paths import check_paths
from opd.doctor.read_prompts import ReadPrompts, read_prompts
from opd.doctor.reading import check_reading, check_text
from opd.doctor.renderers import make_renderer
from opd.doctor.without_torch import transformers_without_torch
from opd.errors import OpdError
from opd.reporting.model_facts import adapter_base, adapter_parameters, count
from opd.rewards import load_reward
from opd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_PROMPTS = 2
MEASURED_PROMPTS = 512  # of the longest texts: what does not fit is among them, and a large file stays quick
PIECES = re.compile(r"<[^<>\s]+>|\s+|\w+|[^\w\s]")  # most special tokens stay whole
MARKS = ("⟦", "⟧")
GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One prompt as one model reads it, with special tokens; stretches that the other model does not read are in MARKS."""

    prompt: int
    role: str
    text: str


@dataclass(kw_only=True)
class Examined:
    """All checks, in order, and the prompts shown."""

    checks: list[Check] = field(default_factory=list[Check])
    rendered: list[Rendered] = field(default_factory=list[Rendered])
    shapes: dict[str, ModelShape] = field(default_factory=dict[str, ModelShape])
    """By section: student, teacher or teachers.NAME."""
    read: ReadPrompts | None = None
    """None where they could not be read."""
    longest_prompt: int | None = None
    """In the student's tokens; None where it could not be rendered."""

    @property
    def verdict(self) -> Verdict:
        """The worst of all."""
        return worst(self.checks)

    def say(self, check: str, text: str, warnings: Iterable[str] = ()) -> None:
        """A green finding, and a yellow one for each warning."""
        self.checks.append(Check(name=check, verdict="green", seen=text))
        self.checks += [Check(name=check, verdict="yellow", seen=warning) for warning in warnings]

    def attempt(self, check: str, step: Callable[[], None]) -> bool:
        """Run one check; its OpdError is a red finding, and False."""
        try:
            step()
        except OpdError as error:
            if all(one.seen != str(error) for one in self.checks):  # two checks may meet the same fault
                self.checks.append(Check(name=check, verdict="red", seen=str(error)))
            return False
        return True


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """A model's tokenizer and its way of writing prompts."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    renderer: Renderer
    eos: tuple[int, ...]


def examine(settings: RunSettings, *, gpus: Sequence[int] | None = None, ranks: int = 1) -> Examined:
    """Every check of a recipe whose keys and values are right. A check that needs what another one refused is left out. `gpus` are
    bytes of GPUs that a run would have in place of those that are here; `ranks` says how many processes it has."""
    seen = Examined()
    seen.say("recipe", "keys and values are right", notices(settings))
    seen.checks += [Check(name="recipe", verdict="green", seen=f"note: {note}") for note in served_notes(settings)]
    if not seen.attempt("files", lambda: check_paths(settings)):
        return seen
    fine = seen.attempt("prompts", lambda: _prompts(settings, seen))
    prompts = [*seen.read.training, *seen.read.held_out] if fine and seen.read is not None else []
    models = settings.all_models
    quick = all(is_quick(one.model, one.revision) for one in models.values() if one.model)
    with transformers_without_torch() if quick else nullcontext():
        readers: dict[str, _Reader] = {}
        for role, section in models.items():
            seen.attempt("tokenizer", lambda r=role, s=section: readers.update({r: _reader(settings, r, s)}))
        for role, section in models.items():
            if section.model:
                seen.attempt("size", lambda r=role, s=section: _size(seen, r, s))
        if len(readers) == len(models):
            _compare(settings, seen, readers, prompts)
    seen.attempt("reward", lambda: _rewards(settings, seen))
    if "student" in seen.shapes and seen.longest_prompt is not None:
        limits = device_memory(gpus)
        seen.checks += memory_checks(settings, seen.shapes, seen.longest_prompt, limits, ranks=ranks)
    return seen


def _rewards(settings: RunSettings, seen: Examined) -> None:
    """The rewards can be had; the module of a user's own is imported."""
    names = [settings.eval.reward] if settings.eval.every > 0 else []
    if settings.judges_rollouts:
        names.append(settings.rl.reward or settings.eval.reward)
    for name in dict.fromkeys(names):
        load_reward(name)
        seen.say("reward", name)


def _prompts(settings: RunSettings, seen: Examined) -> None:
    read = seen.read = read_prompts(settings)
    check_rows(settings, read.training, read.held_out)
    seen.say("prompts", f"{len(read.training):,} to train on, {len(read.held_out):,} held out", read.said)
    seen.checks += [Check(name="prompts", verdict="green", seen=f"note: {note}") for note in read.noted]


def _reader(settings: RunSettings, role: str, section: ModelConfig) -> _Reader:
    from opd.tokenizer import load_tokenizer

    own = section if section.model else replace(settings.student, chat_template_kwargs=section.chat_template_kwargs)
    tokenizer = load_tokenizer(
        own.model,
        revision=own.revision,
        trust_remote_code=own.trust_remote_code,
        role=role if section.model else "student",
    )
    name = f"{role} '{own.model}'"
    renderer = make_renderer(own, tokenizer, name, settings.prompts, rewrites=role != "student")
    return _Reader(name=own.model, tokenizer=tokenizer, renderer=renderer, eos=_ends(own, tokenizer))


def _ends(section: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    from transformers import GenerationConfig

    from opd.data.rendering import eos_ids

    try:
        base = adapter_base(section.model)  # an adapter ends as its base does
        generation = GenerationConfig.from_pretrained(
            base or section.model, revision=(not base and section.revision) or "main"
        )
    except OSError:  # a model need not have one
        generation = None
    return eos_ids(generation, tokenizer)


def _size(seen: Examined, role: str, section: ModelConfig) -> None:
    shape = seen.shapes[role] = model_shape(
        section.model, role, revision=section.revision, trust_remote_code=section.trust_remote_code
    )
    base, adapter = adapter_base(section.model), ""
    if base is not None:
        own = adapter_parameters(Path(section.model))
        adapter = f"an adapter{f' of {count(own)} parameters' if own else ''} on '{base}', which has "
    stored = f", {shape.stored_bytes / GIB:.2f} GiB in its files" if shape.stored_bytes else ""
    seen.say(
        "size",
        f"{role}: {adapter}{count(shape.parameters)} parameters{stored}; {shape.layers} layers of {shape.hidden}, "
        f"{shape.heads} heads, {shape.kv_heads} of keys and values, vocabulary {shape.vocabulary:,}",
    )


def _compare(settings: RunSettings, seen: Examined, readers: Mapping[str, _Reader], prompts: Sequence[Prompt]) -> None:
    """What needs the tokenizers of all models."""
    from opd.teachers.vocabulary import check_vocabularies

    student, teachers = readers["student"], {role: one for role, one in readers.items() if role != "student"}

    def vocabulary(role: str, teacher: _Reader) -> None:
        match = check_vocabularies(
            student.tokenizer,
            teacher.tokenizer,
            _rows(seen, "student", student),
            _rows(seen, role, teacher),
            student_name=student.name,
            teacher_name=teacher.name,
            student_eos=student.eos,
            teacher_eos=teacher.eos,
        )
        seen.say("vocabulary", f"student and {role} share {match.size:,} token ids", match.warnings)

    for role, teacher in teachers.items():
        seen.attempt("vocabulary", lambda r=role, t=teacher: vocabulary(r, t))
    if not prompts:
        return
    seen.attempt("length", lambda: _lengths(settings, seen, readers, prompts))
    seen.attempt("template", lambda: _templates(settings, seen, readers, prompts))


def _rows(seen: Examined, role: str, reader: _Reader) -> int:
    """Rows of the output layer; those of the tokenizer where the model's are not known."""
    shape = seen.shapes.get(role)
    return shape.vocabulary if shape is not None else len(reader.tokenizer)


def _lengths(settings: RunSettings, seen: Examined, readers: Mapping[str, _Reader], prompts: Sequence[Prompt]) -> None:
    """Every prompt of the longest has room for a whole response in every model's context."""
    some = sorted(prompts, key=_characters, reverse=True)[:MEASURED_PROMPTS]
    longest: dict[str, int] = {}
    for role, reader in readers.items():
        limit = seen.shapes[role].positions if role in seen.shapes else None
        for prompt in some:
            ids = reader.renderer.prompt_ids(prompt)
            longest[role] = max(longest.get(role, 0), len(ids))
            if limit is not None:
                reader.renderer.check_length(prompt, ids, settings.rollout.max_new_tokens, limit)
    seen.longest_prompt = longest["student"]
    room = ", ".join(
        f"{role} {longest[role]} + {settings.rollout.max_new_tokens} of "
        f"{seen.shapes[role].positions if role in seen.shapes else 'an unknown number of'} tokens"
        for role in readers
    )
    looked = "" if len(some) == len(prompts) else f" (of the {len(some)} longest texts)"
    seen.say("length", f"the longest prompt and response{looked}: {room}")


def _characters(prompt: Prompt) -> int:
    return len(prompt.text) if prompt.text is not None else len(str(prompt.messages))


def _templates(
    settings: RunSettings, seen: Examined, readers: Mapping[str, _Reader], prompts: Sequence[Prompt]
) -> None:
    student, teachers = readers["student"], {n: readers[teacher_key(n)] for n in settings.all_teachers}
    said = check_text(student.renderer, "student", prompts)
    said += check_reading(settings, prompts, student, teachers)
    said += left_out_notices(one.renderer.chat for one in readers.values())
    seen.rendered = [one for prompt in prompts[:SHOWN_PROMPTS] for one in rendered(prompt, readers)]
    alike = not teachers or all(MARKS[0] not in one.text for one in seen.rendered)
    seen.say("template", "all models read the same text" if alike else "the models read different texts, below", said)


def rendered(prompt: Prompt, readers: Mapping[str, Any]) -> list[Rendered]:
    """The prompt as each model reads it; where a teacher reads another text than the student, both are shown with their own stretches
    marked. Raises DataError."""
    texts = {role: one.renderer.decode_all(one.renderer.prompt_ids(prompt)) for role, one in readers.items()}
    student = texts["student"]
    others = [text for text in texts.values() if text != student]
    shown = [Rendered(prompt=prompt.index, role="student", text=_marked(student, others[0]) if others else student)]
    for role, text in texts.items():
        if role != "student" and text != student:
            shown.append(Rendered(prompt=prompt.index, role=role, text=_marked(text, student)))
    return shown


def _marked(text: str, other: str) -> str:
    """The text, with what the other one lacks in MARKS; where only the other has something, empty MARKS stand in its place."""
    mine, theirs = PIECES.findall(text), PIECES.findall(other)
    parts = []
    for kind, start, end, _, _ in SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
        piece = "".join(mine[start:end])
        parts.append(piece if kind == "equal" else f"{MARKS[0]}{piece}{MARKS[1]}")
    return "".join(parts)
