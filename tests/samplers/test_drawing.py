"""Tokens are drawn with exactly the probability that they have, at every size and at both ends of the uniform numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from opd.samplers.drawing import BLOCK, Draw, inverse_cdf, uniform_numbers

SIZES = (1, 2, 13, 2 * BLOCK, 2 * BLOCK + 1, 3 * BLOCK, 5 * BLOCK + 7)
LARGEST = 1 - 2**-53


def distribution(size: int, seed: int = 0, spread: float = 4.0) -> torch.Tensor:
    """Float32 probabilities over several orders of magnitude, a third of them 0."""
    source = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(size, generator=source)
    logits[torch.rand(size, generator=source) < 1 / 3] = -torch.inf
    logits[size // 2] = 1.0
    return logits.softmax(-1)


def drawn(probabilities: torch.Tensor, uniforms: list[float] | torch.Tensor) -> list[int]:
    numbers = torch.as_tensor(uniforms, dtype=torch.float64)
    return inverse_cdf(probabilities.expand(len(numbers), -1), numbers).tolist()


@pytest.mark.parametrize("size", SIZES)
def test_every_token_that_has_probability_is_drawn_in_the_middle_of_its_interval(size: int):
    """The intervals are added up with fractions, and no number that falls into one gives another token."""
    probabilities = distribution(size)
    shares = [Fraction(p) for p in probabilities.tolist()]
    total, before, middles, owners = sum(shares), Fraction(0), [], []
    for token, share in enumerate(shares):
        if float(share / total) > 1e-7:  # the float32 sum of a block is right to about this much
            middles.append(float((before + share / 2) / total))
            owners.append(token)
        before += share
    assert drawn(probabilities, middles) == owners


@pytest.mark.parametrize("size", SIZES)
def test_the_smallest_and_the_largest_number_draw_the_first_and_the_last_token_with_probability(size: int):
    probabilities = distribution(size, seed=1)
    positive = probabilities.nonzero()[:, 0].tolist()
    assert drawn(probabilities, [0.0, LARGEST]) == [positive[0], positive[-1]]


def test_a_number_on_a_boundary_belongs_to_the_token_behind_it():
    quarters = torch.tensor([0.25, 0.0, 0.25, 0.5])
    assert drawn(quarters, [0.0, 0.25 - 1e-12, 0.25, 0.5 - 1e-12, 0.5, LARGEST]) == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("token", [0, 1, 255, 256, 511, 512, 700])
def test_a_distribution_on_one_token_has_one_outcome(token: int):
    alone = torch.zeros(701)
    alone[token] = 1.0
    assert drawn(alone, [0.0, 1e-300, 0.5, LARGEST]) == [token] * 4


def test_a_rare_token_between_likely_ones_keeps_its_width():
    """In a float32 cumulative sum these tokens would have none: 1 + 1e-9 is 1."""
    probabilities = torch.zeros(150_000)
    probabilities[0] = 1.0
    rare = torch.tensor([1, 300, 77_777, 149_999])
    probabilities[rare] = 1e-9
    total = 1 + 4e-9
    middles = [(1 + (i + 0.5) * 1e-9) / total for i in range(4)]
    assert drawn(probabilities, middles) == rare.tolist()
    inside = torch.zeros(150_000)  # all in one block
    inside[3] = 1.0
    inside[4:8] = 1e-9
    assert drawn(inside, middles) == [4, 5, 6, 7]


def test_tokens_of_probability_0_are_never_drawn_from_150_thousand():
    """Numbers on the boundaries of blocks too, where rounding decides."""
    probabilities = distribution(150_001, seed=2)
    bounds = (probabilities.double().cumsum(-1) / probabilities.double().sum())[BLOCK - 1 :: BLOCK]
    for numbers in (bounds.clamp(max=LARGEST), torch.rand(500, dtype=torch.float64, generator=torch.manual_seed(3))):
        tokens = torch.tensor(drawn(probabilities, numbers))
        assert tokens.min() >= 0 and tokens.max() < 150_001 and (probabilities[tokens] > 0).all()


@pytest.mark.parametrize("size", [13, 700, 150_000])
def test_frequencies_pass_a_chi_square_test(size: int):
    """Tokens are counted in 13 classes, so that every class is met often; the bound is that of one false alarm in 10 000."""
    probabilities, rounds, rows = distribution(size, seed=4, spread=1.5), 20, 2000 if size < 1000 else 100
    classes = torch.arange(size) * 13 // size
    expected = torch.zeros(13, dtype=torch.float64).index_add_(0, classes, probabilities.double()) * rounds * rows
    source, seen = torch.Generator().manual_seed(5), torch.zeros(13, dtype=torch.float64)
    for _ in range(rounds):
        numbers = torch.rand(rows, dtype=torch.float64, generator=source)
        seen += torch.bincount(classes[torch.tensor(drawn(probabilities, numbers))], minlength=13)
    met = expected > 0
    assert seen[~met].sum() == 0
    statistic = float(((seen - expected)[met] ** 2 / expected[met]).sum())
    freedom = int(met.sum()) - 1
    bound = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3  # Wilson and Hilferty
    assert statistic < bound


def test_the_sum_of_a_row_does_not_matter_and_rows_are_apart():
    one, other = distribution(700, seed=6), distribution(700, seed=7)
    numbers = torch.tensor([0.3, 0.3, 0.9], dtype=torch.float64)
    tokens = inverse_cdf(torch.stack([one, other, one * 0.25]), numbers).tolist()
    assert tokens == [*drawn(one, [0.3]), *drawn(other, [0.3]), *drawn(one, [0.9])]


def test_the_numbers_of_a_rollout_are_its_own():
    """Neither the rollouts beside it nor the length limit change them."""
    all_of_them = uniform_numbers(3, range(5), 40)
    assert torch.equal(uniform_numbers(3, [4, 2], 17), all_of_them[[4, 2], :17])
    assert len(set(all_of_them.flatten().tolist())) == 200
    assert not torch.equal(uniform_numbers(4, range(5), 40), all_of_them)
    assert all_of_them.dtype == torch.float64 and all_of_them.min() >= 0 and all_of_them.max() < 1


def test_the_processor_draws_step_by_step_and_leaves_one_score():
    scores = torch.randn(2, 600, generator=torch.manual_seed(0))
    numbers = torch.tensor([[0.1, 0.6], [0.7, 0.2]], dtype=torch.float64)
    draw = Draw(numbers, entropy=True)
    for step in range(2):
        forced = draw(torch.zeros(2, 1, dtype=torch.long), scores + step)
        expected = inverse_cdf(scores.softmax(-1), numbers[:, step])
        assert forced.argmax(-1).tolist() == expected.tolist() and int(forced.isfinite().sum()) == 2
    tokens, logp, entropies = draw.columns()
    assert tokens == [
        [*pair] for pair in zip(*(inverse_cdf(scores.softmax(-1), numbers[:, t]).tolist() for t in (0, 1)), strict=True)
    ]
    plain = scores.log_softmax(-1)
    torch.testing.assert_close(torch.tensor(logp), plain.gather(-1, torch.tensor(tokens)), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.tensor(entropies)[:, 0], -(plain.exp() * plain).sum(-1))
