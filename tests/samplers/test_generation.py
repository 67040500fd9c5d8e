"""Rows that have ended leave the batch, and equal prompts are read once; what is drawn is the same as without."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.mixing_models import APART, MIXING, tiny
from transformers import PreTrainedModel

from opd.data.rendering import Renderer
from opd.samplers import generation
from opd.samplers.base import Sampling, draw
from opd.samplers.hf import HfSampler
from opd.samplers.key_values import GROUPED, selectable_cache
from opd.teachers.vocabulary import VocabularyMatch
from opd.testing import digit_tokenizer
from opd.types import Prompt, Rollout

EOS, PAD = 12, 11
PROMPTS = [Prompt(index=i, text=t) for i, t in enumerate(("12>", "3>", "456789>", "12>", "89>", "0>"))]

SAMPLINGS = ({}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9}, {"stop": ("7", "42")}, {"temperature": 0.0})


def sampler_of(model: PreTrainedModel, *, entropy: bool = False, **sampling: Any) -> HfSampler:
    settings: dict[str, Any] = {"max_new_tokens": 16} | sampling
    return HfSampler(
        model,
        Renderer(digit_tokenizer(), name="student"),
        Sampling(**settings),
        eos_ids=(EOS,),
        pad_id=PAD,
        vocabulary=VocabularyMatch(size=13),
        record_entropy=entropy,
    )


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows leave as soon as one has ended, whatever that costs in a tiny model."""
    monkeypatch.setattr(generation, "CALL_COST", 0)
    monkeypatch.setattr(generation, "LEAVING_SHARE", {"cpu": 1 / 100})


def plainly(sample: Callable[[], list[Rollout]]) -> list[Rollout]:
    """The same with one call of `generate`, to whose cache nobody has access."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "selectable_cache", lambda *_: None)
        return sample()


def shapes_seen(model: PreTrainedModel, sample: Callable[[], object]) -> list[tuple[int, ...]]:
    """[rows, tokens] of every call of the model."""
    seen: list[tuple[int, ...]] = []

    def look(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(tuple(kwargs["input_ids"].shape))

    hook = model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        sample()
    finally:
        hook.remove()
    return seen


def same(some: list[Rollout], others: list[Rollout]) -> None:
    assert [r.response_ids for r in some] == [r.response_ids for r in others]
    assert [(r.finished, r.text, r.prompt_ids) for r in some] == [(r.finished, r.text, r.prompt_ids) for r in others]
    for one, other in zip(some, others, strict=True):
        for name in ("sampler_logp", "sampler_entropy"):
            values = [getattr(r, name) for r in (one, other)]
            assert (values[0] is None) == (values[1] is None)
            torch.testing.assert_close(*(torch.tensor(v or ()) for v in values), atol=1e-5, rtol=0)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", [*APART, *MIXING])
def test_every_kind_of_model_draws_the_same_with_and_without(kind: str):
    """Gemma's window of 4 tokens, gpt2's absolute positions, and layers that carry a state, of which no row can be taken out."""
    model = tiny(kind, 13, initializer_range=0.3)
    for sampling in SAMPLINGS if kind in APART else SAMPLINGS[:1]:  # two of the others are slow
        sampler = sampler_of(model, entropy=True, **sampling)
        same(draw(sampler, PROMPTS[1:], 2, seed=1), plainly(lambda s=sampler: draw(s, PROMPTS[1:], 2, seed=1)))


def test_rows_can_be_taken_out_of_keys_and_values_alone():
    assert all(selectable_cache(tiny(kind, 13), 9) is not None for kind in APART)
    assert not any(selectable_cache(tiny(kind, 13), 9) for kind in MIXING)


@pytest.mark.usefixtures("eager")
def test_a_row_that_has_ended_passes_the_model_no_more():
    model = tiny("llama", 13, initializer_range=0.3)
    rollouts: list[Rollout] = []
    seen = shapes_seen(model, lambda: rollouts.extend(sampler_of(model).sample(PROMPTS, seed=1)))
    lengths = [len(r.response_ids) for r in rollouts]
    assert len(set(lengths)) > 2, "rows must end at several lengths for this test to say anything"
    assert seen[0] == (5, 7), "six prompts, two of which are equal"
    decoded = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert seen[1:] == [(rows, 1) for rows in decoded]


@pytest.mark.usefixtures("eager")
def test_samples_of_a_prompt_share_its_reading_and_are_apart():
    model = tiny("llama", 13, initializer_range=0.3)
    rollouts: list[Rollout] = []
    seen = shapes_seen(model, lambda: rollouts.extend(draw(sampler_of(model), PROMPTS[:2], 8, seed=1)))
    assert seen[0] == (2, 3) and seen[1][1] == 1
    assert len({r.response_ids for r in rollouts[:8]}) > 4


def test_sampling_attends_in_groups_and_training_as_before():
    model = tiny("llama", 13, initializer_range=0.3)
    seen: set[str] = set()
    model.register_forward_pre_hook(lambda *_: seen.add(model.config._attn_implementation))  # pyright: ignore[reportArgumentType]
    sampler_of(model).sample(PROMPTS, seed=1)
    assert seen == {GROUPED} and model.config._attn_implementation == "sdpa"


def test_rows_stay_where_leaving_costs_more_than_it_saves(monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama", 13, initializer_range=0.3)
    sampler = sampler_of(model)
    assert {rows for rows, _ in shapes_seen(model, lambda: sampler.sample(PROMPTS, seed=1))[1:]} == {6}
    monkeypatch.setattr(generation, "CALL_COST", 0)
    monkeypatch.setattr(generation, "LEAVING_SHARE", {"cpu": 1 / 2})
    steps = shapes_seen(model, lambda: sampler.sample(PROMPTS, seed=1))[1:]
    assert steps[0][0] == 6 and 0 < min(rows for rows, _ in steps) <= 3
    before = [rows for rows, _ in steps]
    assert all(after <= rows / 2 for rows, after in pairwise(before) if after != rows)


@pytest.mark.usefixtures("eager")
def test_whoever_watches_sees_every_row_to_the_end():
    model = tiny("llama", 13, initializer_range=0.3)
    sampler, shown = sampler_of(model), []
    sampler.watch = lambda responses: shown.append([list(r) for r in responses])
    rollouts = sampler.sample(PROMPTS, seed=1)
    assert [len(responses) for responses in shown] == [len(PROMPTS)] * max(len(r.response_ids) for r in rollouts)
    order = sorted(range(len(PROMPTS)), key=lambda i: len(rollouts[i].prompt_ids))
    assert [shown[-1][place][: len(rollouts[i].response_ids)] for place, i in enumerate(order)] == [
        list(rollouts[i].response_ids) for i in order
    ]
