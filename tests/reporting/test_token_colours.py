from __future__ import annotations

import itertools

import pytest

from opd.reporting.tokens import (
    DARK_DIFFERENCE,
    DARK_ENTROPY,
    DARK_SCALE,
    DIFFERENCE_EDGES,
    ENTROPY_EDGES,
    KL_EDGES,
    LIGHT_DIFFERENCE,
    LIGHT_ENTROPY,
    LIGHT_SCALE,
    SHARE_EDGES,
    level_labels,
    readable,
    visible,
)

SCALES = [LIGHT_SCALE, DARK_SCALE, LIGHT_ENTROPY, DARK_ENTROPY, LIGHT_DIFFERENCE, DARK_DIFFERENCE]


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, as WCAG 2.2 defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_level_has_a_colour_and_a_label():
    for edges in (KL_EDGES, ENTROPY_EDGES, DIFFERENCE_EDGES, SHARE_EDGES):
        assert list(edges) == sorted(edges)
        assert {len(scale) for scale in SCALES} == {len(level_labels(edges))} == {len(edges) + 1}
    assert level_labels(KL_EDGES)[0] == "< 0.01"
    assert level_labels(KL_EDGES)[-1] == "≥ 3"
    assert level_labels(DIFFERENCE_EDGES)[1] == "−3 – −1"


@pytest.mark.parametrize(("light", "dark"), [(LIGHT_SCALE, DARK_SCALE), (LIGHT_ENTROPY, DARK_ENTROPY)])
def test_a_light_scale_darkens_and_a_dark_scale_brightens_with_the_amount(light, dark):
    light, dark = ([luminance(back) for back, _ in scale] for scale in (light, dark))
    assert all(low > high for low, high in itertools.pairwise(light))
    assert all(low < high for low, high in itertools.pairwise(dark))


@pytest.mark.parametrize(("scale", "sign"), [(LIGHT_DIFFERENCE, -1), (DARK_DIFFERENCE, 1)])
def test_the_scale_with_two_ends_grows_from_its_middle_and_is_orange_and_blue(scale, sign):
    tones = [sign * luminance(back) for back, _ in scale]
    assert tones[0] > tones[1] > tones[2] > tones[3] < tones[4] < tones[5] < tones[6]
    red, blue = ([int(back[i : i + 2], 16) for back, _ in scale] for i in (1, 5))
    assert all(r > b for r, b in zip(red[:3], blue[:3], strict=True))
    assert all(r < b for r, b in zip(red[4:], blue[4:], strict=True))


@pytest.mark.parametrize("scale", SCALES)
def test_text_is_legible_on_every_colour(scale):
    assert min(contrast(back, ink) for back, ink in scale) >= 4.5


@pytest.mark.parametrize("scale", SCALES)
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
        ("👩\u200d👩\u200d👧", "👩\u200d👩\u200d👧"),
        (" 🏳️\u200d🌈!", " 🏳️\u200d🌈!"),
        ("❤️\u200d🔥", "❤️\u200d🔥"),
        ("\U0001f3f4\U000e0067\U000e0062\U000e007f", "\U0001f3f4\U000e0067\U000e0062\U000e007f"),
        ("a\u200db", "a⟨U+200D⟩b"),
        ("👩\u200d", "👩⟨U+200D⟩"),
        ("\u200d👧", "⟨U+200D⟩👧"),
        ("x\U000e0067", "x⟨U+E0067⟩"),
        ("\u0301a", "◌\u0301a"),
        ("e\u0301", "e\u0301"),
        (" \u0301", " ◌\u0301"),
    ],
)
def test_nothing_in_a_token_stays_invisible(token, shown):
    assert visible(token) == shown


def test_a_whole_text_keeps_its_spaces_and_shows_what_would_disorder_it():
    assert readable("a  b\n\tc\u202e\u00a0👩\u200d👧") == "a  b\n\tc⟨U+202E⟩\u00a0👩\u200d👧"
