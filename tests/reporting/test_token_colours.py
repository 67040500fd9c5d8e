from __future__ import annotations

import itertools
import math

import pytest
from report_inputs import a_sample

from opd.reporting.tokens import (
    DARK_SCALE,
    KL_EDGES,
    LIGHT_SCALE,
    coloured_tokens,
    kl_level,
    level_labels,
    pair_samples,
    visible,
)


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2.2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_level_never_falls_as_kl_rises():
    kls = [-1.0, 0.0, *(10 ** (i / 20) for i in range(-80, 60)), math.inf]
    levels = [kl_level(kl) for kl in kls]
    known = [level for level in levels if level is not None]
    assert levels == sorted(known)
    assert set(levels) == set(range(len(LIGHT_SCALE)))


def test_an_edge_belongs_to_the_level_above_it():
    assert [kl_level(edge) for edge in KL_EDGES] == [1, 2, 3, 4, 5, 6]
    assert [kl_level(math.nextafter(edge, 0)) for edge in KL_EDGES] == [0, 1, 2, 3, 4, 5]


def test_every_level_has_a_colour_and_a_label():
    assert len(LIGHT_SCALE) == len(DARK_SCALE) == len(level_labels()) == len(KL_EDGES) + 1
    assert level_labels()[0] == "< 0.01"
    assert level_labels()[-1] == "≥ 3"


def test_the_light_scale_darkens_and_the_dark_scale_brightens_with_kl():
    light = [luminance(back) for back, _ in LIGHT_SCALE]
    dark = [luminance(back) for back, _ in DARK_SCALE]
    assert all(low > high for low, high in itertools.pairwise(light))
    assert all(low < high for low, high in itertools.pairwise(dark))


@pytest.mark.parametrize("scale", [LIGHT_SCALE, DARK_SCALE])
def test_text_is_legible_on_every_colour(scale):
    assert min(contrast(back, ink) for back, ink in scale) >= 4.5


@pytest.mark.parametrize("scale", [LIGHT_SCALE, DARK_SCALE])
def test_neighbouring_colours_can_be_told_apart_by_lightness_alone(scale):
    assert min(contrast(a[0], b[0]) for a, b in itertools.pairwise(scale)) >= 1.08


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        ("the", "the"),
        (" the", " the"),
        (" ", "·"),
        ("  the", "··the"),
        ("the ", "the·"),
        ("\n", "↵\n"),
        ("\t", "→\t"),
        ("", "∅"),
        ("\x00", "⟨U+0000⟩"),
        ("\u202eabc", "⟨U+202E⟩abc"),
        ("\u200b", "⟨U+200B⟩"),
        ("\r\n", "⟨U+000D⟩↵\n"),
        ("é语🙂", "é语🙂"),
    ],
)
def test_nothing_in_a_token_stays_invisible(token, shown):
    assert visible(token) == shown


def test_hover_shows_the_token_and_its_kl():
    token = coloured_tokens(a_sample(tokens=("\n",), reverse_kl=(0.123456,)))[0]
    assert token.hover == "“↵”  0.123 nats"
    assert token.level == 3


def test_tokens_without_kl_have_no_colour():
    unscored = coloured_tokens(a_sample(reverse_kl=None))
    unknown = coloured_tokens(a_sample(tokens=("a",), reverse_kl=(math.nan,)))
    assert [token.level for token in (*unscored, *unknown)] == [None, None, None]
    assert "no KL recorded" in unknown[0].hover


def test_a_pair_is_the_first_and_the_last_answer_to_one_prompt():
    samples = [a_sample(step, prompt) for step in (0, 2, 4) for prompt in ("a", "b")]
    pairs = pair_samples(samples)
    assert [(p.late.prompt, p.early.step if p.early else None, p.late.step) for p in pairs] == [
        ("a", 0, 4),
        ("b", 0, 4),
    ]


def test_evaluation_prompts_come_before_training_prompts():
    samples = [a_sample(0, "t", phase="train"), a_sample(3, "t", phase="train"), a_sample(0, "e"), a_sample(3, "e")]
    assert [pair.late.prompt for pair in pair_samples(samples)] == ["e", "t"]


def test_without_a_repeated_prompt_the_first_step_stands_beside_the_last():
    samples = [a_sample(step, f"prompt {step}", phase="train") for step in range(5)]
    (pair,) = pair_samples(samples)
    assert pair.early is not None
    assert (pair.early.step, pair.late.step) == (0, 4)


def test_the_teacher_is_shown_beside_the_student_and_never_as_the_student():
    samples = [
        a_sample(0),
        a_sample(0, who="teacher", source="teacher", response="by the teacher"),
        a_sample(9, phase="eval"),
        a_sample(10, source="dataset"),
    ]
    (pair,) = pair_samples(samples)
    assert pair.teacher is not None
    assert pair.teacher.response == "by the teacher"
    assert (pair.early.step if pair.early else None, pair.late.step) == (0, 9)


def test_one_step_of_samples_is_shown_alone():
    (pair,) = pair_samples([a_sample(3)])
    assert pair.early is None
    assert pair.late.step == 3


def test_answers_to_one_row_are_a_pair_whatever_each_model_reads():
    samples = [
        a_sample(0, "<s>q", prompt_index=4),
        a_sample(0, "<|user|>q", prompt_index=4, who="teacher", source="teacher", response="by the teacher"),
        a_sample(0, "<s>q", prompt_index=5),
        a_sample(9, "<s>q", prompt_index=4),
    ]
    first, second = pair_samples(samples)
    assert first.teacher is not None and first.teacher.response == "by the teacher"
    assert (first.early.step if first.early else None, first.late.step) == (0, 9)
    assert (second.early, second.teacher, second.late.prompt_index) == (None, None, 5)
