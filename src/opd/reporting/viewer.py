"""Samples as the token viewer of the report reads them: one JSON object, in which every text stands once.

Log-probs and entropies are stored in thousandths of a nat, probabilities in ten-thousandths, reverse KL in nats to four digits.
A page that would grow too large shows fewer samples, and says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from opd.reporting.files import SAMPLES_FILE
from opd.reporting.page import ASSETS
from opd.reporting.record import PER_TOKEN, TOPS, SampleRecord, TopTokens
from opd.reporting.tokens import (
    DARK_DIFFERENCE,
    DARK_ENTROPY,
    DIFFERENCE_EDGES,
    ENTROPY_EDGES,
    KL_EDGES,
    LIGHT_DIFFERENCE,
    LIGHT_ENTROPY,
    SHARE_EDGES,
    level_labels,
    readable,
    scale_css,
    visible,
)

MAX_BYTES = 800_000
"""Of the samples of one page, as JSON."""
LIKELIEST_KEPT = 1500
"""Tokens of one response that keep the likeliest tokens of both models: those of the highest reverse KL."""
MAX_PLAIN = 60_000
"""Characters of the list for readers without JavaScript."""
BRIEF = 160
"""Characters of a prompt in the list of samples."""

SCRIPTS = ("viewer_model.js", "viewer_text.js", "viewer_panel.js", "viewer_tables.js", "viewer_list.js", "viewer.js")

SCALES = (
    {
        "key": "kl",
        "css": "kl",
        "name": "Reverse KL, nats",
        "about": "How far the student is from the teacher at each token",
        "edges": KL_EDGES,
        "labels": level_labels(KL_EDGES),
    },
    {
        "key": "difference",
        "css": "difference",
        "name": "Teacher − student log-prob, nats",
        "about": "Orange: the teacher likes the sampled token less than the student does; blue: more",
        "edges": DIFFERENCE_EDGES,
        "labels": level_labels(DIFFERENCE_EDGES),
    },
    {
        "key": "entropy",
        "css": "entropy",
        "name": "Entropy of the student, nats",
        "about": "How undecided the student was at each token",
        "edges": ENTROPY_EDGES,
        "labels": level_labels(ENTROPY_EDGES),
    },
    {
        "key": "relative",
        "css": "kl",
        "name": "Rank of its KL in this response",
        "about": "The share of the tokens of this response with a lower reverse KL",
        "edges": SHARE_EDGES,
        "labels": ["< 50%", "50 – 70", "70 – 80", "80 – 90", "90 – 95", "95 – 99", "≥ 99%"],
    },
)


def viewer_data(samples: Sequence[SampleRecord], max_bytes: int = MAX_BYTES) -> dict[str, Any] | None:
    """The values of `viewer.html.jinja`: `data` for the script, `plain` for readers without one; None without samples."""
    if not samples:
        return None
    book = _Book()
    kept: dict[int, dict[str, Any]] = {}
    room = max_bytes
    for number in _by_importance(samples):
        sample = samples[number]
        if kept and room < 7 * len(sample.tokens):  # a token takes at least that; do not pack what cannot fit
            continue
        before = book.size
        packed = _packed_sample(sample, number, book)
        size = len(json.dumps(packed)) + book.size - before
        if size <= room or not kept:
            kept[number] = packed
            room -= size
    shown = [samples[number] for number in sorted(kept)]
    plain = _plain(shown)
    return {
        "data": {
            "texts": book.texts,
            "prompts": book.prompts(),
            "scales": SCALES,
            "samples": [kept[number] for number in sorted(kept)],
        },
        "plain": plain,
        "plain_left_out": len(shown) - len(plain),
        "left_out": _left_out(len(shown), len(samples)),
    }


def viewer_script() -> str:
    """The script of the viewer, in a block of its own, so that its names meet no other script's."""
    parts = [(ASSETS / name).read_text("utf-8") for name in SCRIPTS]
    return '"use strict";\n{\n' + "\n".join(parts) + "}\n"


def viewer_css() -> str:
    """The style of the viewer, with the colours of both themes."""
    light = scale_css(LIGHT_ENTROPY, "entropy") + scale_css(LIGHT_DIFFERENCE, "difference")
    dark = scale_css(DARK_ENTROPY, "entropy") + scale_css(DARK_DIFFERENCE, "difference")
    themes = f":root{{{light}}}@media screen{{[data-theme=dark]{{{dark}}}}}"
    levels = "\n".join(
        f".{name}-{i}{{background:var(--{name}-{i});color:var(--{name}-{i}-ink)}}"
        for name in ("kl", "entropy", "difference")
        for i in range(len(KL_EDGES) + 1)
    )
    return "\n".join((themes, levels, (ASSETS / "viewer.css").read_text("utf-8")))


class _Book:
    """Every text and prompt of the page, once, with its number."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.size = 0
        """Characters of JSON, about."""
        self._numbers: dict[str, int] = {}
        self._prompts: dict[tuple[str, Any, str], int] = {}

    def text(self, token: str) -> int:
        if token not in self._numbers:
            self._numbers[token] = len(self.texts)
            self.texts.append(visible(token))
            self.size += len(json.dumps(self.texts[-1])) + 1
        return self._numbers[token]

    def prompt(self, sample: SampleRecord) -> int:
        key = (sample.prompt, tuple(sample.special), author(sample))
        if key not in self._prompts:
            self._prompts[key] = len(self._prompts)
            self.size += len(json.dumps(sample.prompt)) + 2 * BRIEF
        return self._prompts[key]

    def prompts(self) -> list[dict[str, Any]]:
        """`pieces`: [text, 1 where it is a special token]; `brief`: what tells the prompt from the others of its author."""
        by_author: dict[str, list[str]] = {}
        for text, special, who in self._prompts:
            by_author.setdefault(who, []).append(_without(text, special))
        shared = {who: _shared_ends(texts) for who, texts in by_author.items()}
        found = []
        for text, special, who in self._prompts:
            head, tail = shared[who]
            whole = _without(text, special)
            words = " ".join((whole[head:][: -tail or None].strip() or whole).split())
            brief = words if len(words) <= BRIEF else "…" + words[-BRIEF:]
            found.append({"pieces": _pieces(text, special), "brief": readable(brief)})
        return found


def author(sample: SampleRecord) -> str:
    """Who wrote the response: student, teacher or dataset."""
    return sample.who if sample.source == "student" or sample.who == "teacher" else sample.source


def _prompt_key(sample: SampleRecord) -> tuple[str, int | str]:
    """Equal in samples that answer one prompt; student and teacher may read other words for one row."""
    return sample.phase, sample.prompt if sample.prompt_index is None else sample.prompt_index


def _packed_sample(sample: SampleRecord, number: int, book: _Book) -> dict[str, Any]:
    row = _prompt_key(sample)[1]
    packed: dict[str, Any] = {
        "n": number + 1,
        "step": sample.step,
        "phase": sample.phase,
        "by": author(sample),
        "prompt": book.prompt(sample),
        "row": f"{sample.phase} {row}" if isinstance(row, int) else f"{sample.phase} {book.text(row)} text",
        "answer": None if sample.answer is None else readable(sample.answer),
        "reward": sample.reward,
        "finished": sample.finished,
        "teacher": None if sample.teacher is None else readable(sample.teacher),
        "tokens": [book.text(token) for token in sample.tokens],
    }
    if not sample.tokens:
        packed["response"] = readable(sample.response)
    if sample.reverse_kl is not None:
        packed["reverse_kl"] = [_number(value) for value in sample.reverse_kl]
    if sample.joined:
        packed["joined"] = [[first, end, book.text(text)] for first, end, text in sample.joined]
    if sample.details is not None:
        for name in PER_TOKEN:
            values: Sequence[float] | None = getattr(sample.details, name)
            if values is not None:
                packed[name] = [_scaled(value, 1000) for value in values]
        kept = _costliest(sample)
        for name in TOPS:
            top: TopTokens | None = getattr(sample.details, name)
            if top is not None:
                packed[name] = [_likeliest(top, i, book) if i in kept else 0 for i in range(len(sample.tokens))]
    return packed


def _costliest(sample: SampleRecord) -> set[int]:
    """Positions that keep the likeliest tokens of both models."""
    if len(sample.tokens) <= LIKELIEST_KEPT or sample.reverse_kl is None:
        return set(range(min(len(sample.tokens), LIKELIEST_KEPT)))
    kl = [value if math.isfinite(value) else -math.inf for value in sample.reverse_kl]
    return set(sorted(range(len(kl)), key=lambda i: -kl[i])[:LIKELIEST_KEPT])


def _likeliest(top: TopTokens, position: int, book: _Book) -> list[int | None]:
    """[text, probability, text, …], most likely first."""
    pairs = zip(top.tokens[position], top.probabilities[position], strict=True)
    return [part for token, p in pairs for part in (book.text(token), _scaled(p, 10_000))]


def _number(value: float) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = round(float(f"{value:.4g}"), 5)
    return int(short) if short == int(short) else short


def _scaled(value: float, factor: int) -> int | None:
    return round(value * factor) if math.isfinite(value) else None


def _by_importance(samples: Sequence[SampleRecord]) -> Iterator[int]:
    """Every sample: of each prompt the last answer, the first, one half-way, … ; evaluations before training.

    Training prompts that were asked once count as one prompt, so that they, too, are spread evenly over the run.
    """
    by_prompt: dict[tuple[Any, ...], list[int]] = {}
    for number, sample in enumerate(samples):
        by_prompt.setdefault((*_prompt_key(sample), author(sample)), []).append(number)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for (phase, row, who), numbers in by_prompt.items():
        is_single = phase == "train" and len(numbers) == 1
        groups.setdefault((phase, who) if is_single else (phase, row, who), []).extend(numbers)
    ordered = []
    for key, numbers in groups.items():
        numbers.sort(key=lambda number: (samples[number].step, number))
        ordered += [(rank, key[0] != "eval", numbers[at]) for rank, at in enumerate(_spread(len(numbers)))]
    return (number for _, _, number in sorted(ordered))


def _spread(count: int) -> list[int]:
    """0 … count−1: the last, the first, the middle, the quarters, and so on."""
    order, seen, parts = [], set(), 1
    while len(order) < count:
        for i in range(parts, -1, -1):
            at = round(i * (count - 1) / parts)
            if at not in seen:
                seen.add(at)
                order.append(at)
        parts *= 2
    return order


def _pieces(prompt: str, special: Sequence[tuple[int, int]]) -> list[list[Any]]:
    pieces, at = [], 0
    for first, end in special:
        pieces += [[prompt[at:first], 0], [prompt[first:end], 1]]
        at = end
    pieces.append([prompt[at:], 0])
    return [[readable(text), kind] for text, kind in pieces if text]


def _without(prompt: str, special: Sequence[tuple[int, int]]) -> str:
    """The prompt without its special tokens."""
    ends = [0, *(at for span in special for at in span), len(prompt)]
    return " ".join(prompt[ends[i] : ends[i + 1]] for i in range(0, len(ends), 2))


def _shared_ends(texts: Sequence[str]) -> tuple[int, int]:
    """Length of the whole words that all texts begin with, and that all end with."""
    if len(set(texts)) < 2:
        return 0, 0
    head = _common_start(texts)
    head = head[: 1 + max(head.rfind(" "), head.rfind("\n"))]
    tail = _common_start([text[len(head) :][::-1] for text in texts])
    return len(head), 1 + max(tail.rfind(" "), tail.rfind("\n"))


def _common_start(texts: Sequence[str]) -> str:
    low, high = min(texts), max(texts)
    same = next(
        (i for i, pair in enumerate(zip(low, high, strict=False)) if pair[0] != pair[1]), min(len(low), len(high))
    )
    return low[:same]


def _plain(samples: Sequence[SampleRecord]) -> list[Mapping[str, Any]]:
    found, room = [], MAX_PLAIN
    for sample in samples:
        room -= len(sample.prompt) + len(sample.response)
        if room < 0:
            break
        reward = "" if sample.reward is None else f", reward {sample.reward:g}"
        words = {"student": "Student", "teacher": "Teacher", "dataset": "Data set"}[author(sample)]
        found.append(
            {
                "title": f"{words}, step {sample.step}{reward}",
                "prompt": readable(sample.prompt),
                "response": readable(sample.response),
            }
        )
    return found


def _left_out(shown: int, recorded: int) -> str | None:
    if shown == recorded:
        return None
    return (
        f"This page holds {shown:,} of {recorded:,} recorded responses, to stay small: of each prompt the first answer, the last, "
        f"and answers evenly spaced between them. {SAMPLES_FILE} holds all."
    )
