"""Checks of what two models read: the tokens they share, the ids that end an answer, and their renderings of a prompt."""

from __future__ import annotations

from collections.abc import Sequence

from opd.data.rendering import Renderer
from opd.doctor.check import Check, Number
from opd.doctor.reading import EXCERPT
from opd.teachers.vocabulary import VocabularyMatch
from opd.types import Prompt

SHOWN_PROMPTS = 2
SHOWN_CHARACTERS = 1200  # of a rendering; the middle of a longer one is left out


def check_vocabulary(
    vocabulary: VocabularyMatch, tokenizer_size: int, rows: int, student_eos: Sequence[int], teacher_eos: Sequence[int]
) -> Check:
    """The common vocabulary and the ids that end an answer; `rows` are those of the student's output layer. `teacher_eos` is empty
    where they are unknown."""
    numbers: dict[str, Number] = {
        "common tokens": vocabulary.size - len(vocabulary.invalid_ids),
        "student's tokens": tokenizer_size,
        "padding rows": max(0, rows - vocabulary.size),
        "ids of one side": len(vocabulary.invalid_ids),
        "student ends at": " ".join(map(str, student_eos)),
        "teacher ends at": " ".join(map(str, teacher_eos)) or "unknown",
    }
    if not vocabulary.warnings:
        return Check(name="vocabulary", verdict="green", seen="Both models read the same token ids.", numbers=numbers)
    return Check(
        name="vocabulary",
        verdict="yellow",
        seen=vocabulary.warnings[0],
        numbers=numbers,
        why="A token that one side lacks is not learnt about, and an end that one side lacks lets answers run on.",
        mend="student.model and teacher.model: a pair of one family, or eos_token_id in the student's generation_config.json",
        details=vocabulary.warnings[1:],
    )


def check_template(
    student: Renderer, teacher: Renderer, prompts: Sequence[Prompt], *, role: str, shown_more: bool
) -> Check:
    """Both renderings of some prompts, shown with special tokens where they differ. `shown_more`: the recipe shows the teacher more."""
    name = "template" if role == "teacher" else f"template/{role}"
    some = prompts[:SHOWN_PROMPTS]
    pairs = [(p, student.prompt_ids(p), teacher.prompt_ids(p)) for p in some]
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    lengths = {
        "prompts": len(some),
        "differing": len(differing),
        "student's tokens": " ".join(str(len(ids)) for _, ids, _ in pairs),
        "teacher's tokens": " ".join(str(len(ids)) for _, _, ids in pairs),
    }
    if not differing:
        return Check(name=name, verdict="green", seen="Both models read the same prompts.", numbers=lengths)
    details = tuple(
        line
        for prompt, mine, theirs in differing
        for line in (
            f"prompt {prompt.index}, student: {_shown(student, mine)!r}",
            f"prompt {prompt.index}, {role}: {_shown(teacher, theirs)!r}",
        )
    )
    why = "A teacher scores an answer to the prompt that it reads, and the student answers the prompt that the student reads."
    lacking = _lacks_bos(student, teacher, differing)
    if lacking is not None:
        side, token = lacking
        return Check(
            name=name,
            verdict="yellow",
            seen=f"The {side} reads prompts without {token!r} at their beginning, and the other model reads them with it.",
            numbers=lengths,
            why=f"{why} Models that were trained with such a token are much worse without it.",
            mend=f"{side}.model: a folder whose tokenizer or chat template writes {token!r} first",
            details=details,
        )
    if shown_more:
        seen = "The renderings differ, as prompts.teacher_prompt says."
        return Check(name=name, verdict="green", seen=seen, numbers=lengths, details=details)
    prompt, mine, theirs = differing[0]
    place = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    parts = [side.decode_all(ids[place:])[:EXCERPT] for side, ids in ((student, mine), (teacher, theirs))]
    return Check(
        name=name,
        verdict="yellow",
        seen=f"The models read prompt {prompt.index} differently from token {place} on: {parts[0]!r} and {parts[1]!r}.",
        numbers=lengths,
        why=why,
        mend=f"{role}.chat_template_kwargs and student.chat_template_kwargs: the same values, unless each format is its model's own",
        details=details,
    )


def _lacks_bos(
    student: Renderer, teacher: Renderer, pairs: Sequence[tuple[Prompt, Sequence[int], Sequence[int]]]
) -> tuple[str, str] | None:
    """The side that reads no BOS where the other does, and that token. Both have to know it."""
    firsts = [mine[0] for _, mine, _ in pairs], [theirs[0] for _, _, theirs in pairs]
    for side, writer, reader, written, read in (
        ("teacher", student, teacher, firsts[0], firsts[1]),
        ("student", teacher, student, firsts[1], firsts[0]),
    ):
        bos, token = writer.tokenizer.bos_token_id, writer.tokenizer.bos_token
        if not isinstance(bos, int) or reader.tokenizer.convert_ids_to_tokens(bos) != token:
            continue
        if all(first == bos for first in written) and bos not in read:
            return side, str(token)
    return None


def _shown(renderer: Renderer, ids: Sequence[int]) -> str:
    text = renderer.decode_all(ids)
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {text[-half:]}"
