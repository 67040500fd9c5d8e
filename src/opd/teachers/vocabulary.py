"""Do student and teacher read the same token ids? Asked once, before any model runs.

A teacher scores the student's ids as they are, so id i has to be the same token on both sides. The sizes of the two
embeddings may differ: released models pad them (151 936 rows and 152 064 rows over the same 151 665 tokens).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd.errors import VocabularyError

if TYPE_CHECKING:
    from jaxtyping import Bool, Int
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

MAX_SHOWN = 5
"""Tokens spelt out in one message."""
RESERVED = re.compile(r"reserved|unused|place.?holder", re.IGNORECASE)
"""Names of added tokens that a release leaves free for a later one."""
COPY_TOKENIZER = (
    "Give the student the teacher's tokenizer: copy tokenizer.json and tokenizer_config.json of the teacher into a copy of the student's "
    'folder, with the teacher\'s "eos_token_id" in its generation_config.json.'
)


@dataclass(frozen=True, kw_only=True)
class VocabularyMatch:
    """The token ids that mean the same thing to student and teacher."""

    size: int
    """Ids at or beyond this are padding, or unknown to the student; their logits are −inf on both sides."""
    invalid_ids: tuple[int, ...] = ()
    """Ids below `size` that are not a token of both; their logits are −inf on both sides too."""
    warnings: tuple[str, ...] = ()

    def owns(self, ids: Int[Tensor, " tokens"]) -> Bool[Tensor, " tokens"]:
        """Mask of the ids that are a token of both. An inference engine may sample others: rows of padding have a probability too."""
        import torch  # not needed to compare vocabularies, which opd check does without it

        inside = ids < self.size
        if self.invalid_ids:
            inside &= ~torch.isin(ids, torch.tensor(self.invalid_ids, device=ids.device, dtype=ids.dtype))
        return inside

    def with_stand_ins(self, ids: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
        """The ids, and a token of both in place of each that is none: for a loss that asks for ids and does not read these."""
        import torch

        invalid = set(self.invalid_ids)
        stand_in = next(i for i in range(self.size) if i not in invalid)
        return torch.where(self.owns(ids), ids, stand_in)


def embedding_rows(model: Any) -> int:
    """Number of token ids that a model can read."""
    return model.get_input_embeddings().weight.shape[0]


def joined(matches: Sequence[VocabularyMatch]) -> VocabularyMatch:
    """The token ids that are in all of them."""
    size = min(match.size for match in matches)
    invalid = sorted({i for match in matches for i in match.invalid_ids if i < size})
    return VocabularyMatch(size=size, invalid_ids=tuple(invalid))


def check_vocabularies(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    student_rows: int,
    teacher_rows: int,
    *,
    student_name: str,
    teacher_name: str,
    student_eos: Collection[int] = (),
    teacher_eos: Collection[int] = (),
) -> VocabularyMatch:
    """The common vocabulary, or a VocabularyError that shows where the two part.

    Rows are those of each model's output layer. Token strings are compared id by id, added tokens included. A token that
    only the student has is refused, because the teacher cannot score it; a token that only the teacher has is masked
    and named in a warning. So is a special or reserved token that the two spell differently, as between releases of
    Llama 3, as long as both models keep an end; an ordinary one is refused. EOS ids are those that each model's generation
    config stops at; without them, the ends of the two are not compared.
    """
    student_label, teacher_label = f"student {student_name!r}", f"teacher {teacher_name!r}"
    warnings: list[str] = []
    student = _tokens_with_a_row(student_tokenizer, student_rows, student_label, warnings)
    teacher = _tokens_with_a_row(teacher_tokenizer, teacher_rows, teacher_label, warnings)
    if student != teacher:
        renamed = _renamed_tokens(student, teacher, student_tokenizer, teacher_tokenizer)
        added = student_tokenizer.added_tokens_decoder.keys() & teacher_tokenizer.added_tokens_decoder.keys()
        _refuse_differing_strings(student, teacher, student_label, teacher_label, renamed, added)
        if renamed:
            ends = (student_eos or _own_end(student_tokenizer), teacher_eos or _own_end(teacher_tokenizer))
            warnings.append(_mask_renamed(student, teacher, student_label, teacher_label, renamed, ends))
            student, teacher = ({i: t for i, t in side.items() if i not in renamed} for side in (student, teacher))
            student_eos, teacher_eos = set(student_eos) - renamed, set(teacher_eos) - renamed
        _refuse_student_only_tokens(student, teacher, student_label, teacher_label)
        rowless = (
            student_tokenizer.added_tokens_decoder.keys() - renamed
        )  # named in a warning already, where they have no row
        extra = sorted(teacher.keys() - student.keys() - rowless)
        if extra:
            warnings.append(
                f"{teacher_label} has {_count(extra)} that {student_label} lacks: {_shown(extra, teacher)}. "
                "They are masked on both sides, so nothing is learnt about them."
            )
    warnings.extend(_compare_ends(student, teacher, student_label, teacher_label, student_eos, teacher_eos))
    size = max(student) + 1
    invalid = () if size == len(student) else tuple(token_id for token_id in range(size) if token_id not in student)
    return VocabularyMatch(size=size, invalid_ids=invalid, warnings=tuple(warnings))


def _tokens_with_a_row(
    tokenizer: PreTrainedTokenizerBase, rows: int, label: str, warnings: list[str]
) -> dict[int, str]:
    """Token string of every id that the model can produce."""
    tokens = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    if not tokens:
        raise VocabularyError(f"the tokenizer of {label} has no tokens; it was probably saved incompletely.")
    rowless = sorted(token_id for token_id in tokens if token_id >= rows) if max(tokens) >= rows else []
    if not rowless:
        return tokens
    needed = {getattr(tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")}
    if not set(rowless) <= tokenizer.added_tokens_decoder.keys() - needed:
        raise VocabularyError(
            f"{label} has {rows} vocabulary rows, but its tokenizer has {_count(rowless)} beyond them: "
            f"{_shown(rowless, tokens)}. The tokenizer belongs to another model, or tokens were added without "
            f"resizing; use the model's own tokenizer, or model.resize_token_embeddings({max(tokens) + 1})."
        )
    warnings.append(
        f"{label} has {rows} vocabulary rows, and no row for {_count(rowless)} added to its tokenizer: "
        f"{_shown(rowless, tokens)}. The model cannot read a prompt that contains one."
    )
    return {token_id: token for token_id, token in tokens.items() if token_id < rows}


def _renamed_tokens(
    student: Mapping[int, str],
    teacher: Mapping[int, str],
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> set[int]:
    """Ids that the two spell differently and that are special or reserved to both, such as <|eot_id|>: text is never made of them."""
    unspoken = _unspoken(student_tokenizer) & _unspoken(teacher_tokenizer)
    return {i for i in unspoken & student.keys() & teacher.keys() if student[i] != teacher[i]}


def _own_end(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    end = tokenizer.eos_token_id
    return (end,) if isinstance(end, int) else ()


def _unspoken(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the added tokens that are special or reserved."""
    added = tokenizer.added_tokens_decoder
    return {i for i, token in added.items() if token.special or RESERVED.search(token.content)}


def _refuse_differing_strings(
    student: Mapping[int, str],
    teacher: Mapping[int, str],
    student_label: str,
    teacher_label: str,
    renamed: Collection[int],
    added: Collection[int],
) -> None:
    """`added` are the ids of tokens that both tokenizers add to those of text."""
    shared = student.keys() & teacher.keys()
    differing = sorted(i for i in shared if student[i] != teacher[i] and i not in renamed)
    if not differing:
        return
    if set(differing) <= set(added):
        everywhere = sorted({*differing, *renamed})
        raise VocabularyError(
            f"{student_label} and {teacher_label} share every token of text and spell {_count(everywhere, 'added token')} differently. "
            f"Text can hold those that are not special to both: {_both_names(differing, student, teacher)}. {COPY_TOKENIZER}"
        )
    raise VocabularyError(
        f"{student_label} and {teacher_label} do not read the same token ids: {len(differing)} of {len(shared)} "
        f"shared ids differ. The first: {_both_names(differing, student, teacher)}. The teacher would score other tokens than the "
        "student sampled; use a student and a teacher of one model family, with one tokenizer."
    )


def _mask_renamed(
    student: Mapping[int, str],
    teacher: Mapping[int, str],
    student_label: str,
    teacher_label: str,
    renamed: Collection[int],
    ends: tuple[Collection[int], Collection[int]],
) -> str:
    """The warning that these added tokens are masked. Raises VocabularyError where a model would be left without an end."""
    where = (
        f"{student_label} and {teacher_label} share every token of text and spell {_count(renamed, 'added token')} differently: "
        f"{_both_names(sorted(renamed), student, teacher)}."
    )
    for label, own in zip((student_label, teacher_label), ends, strict=True):
        if own and not set(own) - set(renamed):
            raise VocabularyError(
                f"{where} All ends of {label} are among them, so no answer could end. {COPY_TOKENIZER}"
            )
    return f"{where} These ids are masked on both sides, so no answer holds them and nothing is learnt about them."


def _both_names(ids: Sequence[int], student: Mapping[int, str], teacher: Mapping[int, str]) -> str:
    return "; ".join(
        f"{token_id} is {student[token_id]!r} to the student and {teacher[token_id]!r} to the teacher"
        for token_id in ids[:MAX_SHOWN]
    ) + ("; …" if len(ids) > MAX_SHOWN else "")


def _refuse_student_only_tokens(
    student: Mapping[int, str], teacher: Mapping[int, str], student_label: str, teacher_label: str
) -> None:
    unknown = sorted(student.keys() - teacher.keys())
    if unknown:
        raise VocabularyError(
            f"{student_label} has {_count(unknown)} that {teacher_label} lacks: {_shown(unknown, student)}. "
            "The teacher cannot score a response that contains one; take them out of the student's tokenizer (padding "
            "can reuse the EOS token), or use a teacher that was trained with them."
        )


def _compare_ends(
    student: Mapping[int, str],
    teacher: Mapping[int, str],
    student_label: str,
    teacher_label: str,
    student_eos: Collection[int],
    teacher_eos: Collection[int],
) -> list[str]:
    student_ends, teacher_ends = sorted(set(student_eos)), sorted(set(teacher_eos))
    if not student_ends or not teacher_ends or student_ends == teacher_ends:
        return []
    where = (
        f"{student_label} stops at {_shown(student_ends, student)}, {teacher_label} at {_shown(teacher_ends, teacher)}."
    )
    if not set(teacher_ends) & student.keys():
        raise VocabularyError(
            f"{where} None of the teacher's stop tokens is in the student's vocabulary, so the teacher cannot say when "
            "to stop; use a student whose tokenizer has them."
        )
    if not set(teacher_ends) - set(student_ends):
        return [f"{where} The teacher may never end a response at a token that only the student stops at."]
    return [
        f"{where} A student that learns to end as the teacher does would run on to the length limit; write "
        f'"eos_token_id": {sorted({*student_ends, *teacher_ends} & student.keys())} in the student\'s generation_config.json.'
    ]


def _count(ids: Collection[int], noun: str = "token") -> str:
    return f"1 {noun}" if len(ids) == 1 else f"{len(ids)} {noun}s"


def _shown(ids: Iterable[int], tokens: Mapping[int, str]) -> str:
    ids = list(ids)
    shown = ", ".join(f"{token_id} {tokens.get(token_id, '(no token)')!r}" for token_id in ids[:MAX_SHOWN])
    return shown + (", …" if len(ids) > MAX_SHOWN else "")
