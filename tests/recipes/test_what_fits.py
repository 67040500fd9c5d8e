"""docs/what-fits.md is what the memory estimate says, and its models have the sizes that their names say."""

import pytest
from tools.what_fits import MODELS, PAGE, page, row, shape

PUBLISHED = {
    "Qwen2.5-0.5B": 0.49,
    "Qwen2.5-1.5B": 1.54,
    "Qwen2.5-3B": 3.09,
    "Qwen2.5-7B": 7.61,
    "Qwen3-0.6B": 0.6,
    "Qwen3-1.7B": 1.7,
    "Qwen3-4B": 4.0,
    "Qwen3-8B": 8.2,
    "Qwen3-32B": 32.8,
}
"""Billions of parameters, from the cards of the models."""


def test_the_page_is_current():
    assert PAGE.read_text() == page()


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_parameters_that_its_card_names(name):
    assert shape(name).parameters / 1e9 == pytest.approx(PUBLISHED[name], rel=0.015)


def test_a_larger_card_never_fits_less():
    rows = [row("Qwen3-4B", "Qwen3-8B", way) for way in ("LoRA 32", "LoRA 32, teacher behind a URL")]
    for one in rows:
        fits = [tokens or 0 for tokens in one.largest]
        assert fits == sorted(fits)
    assert rows[0].least > rows[1].least
