"""Tokens drawn by inverting the cumulative distribution, with uniform numbers that belong to one rollout each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import LogitsProcessor

from opd.errors import UNDRAWABLE, UndrawableError
from opd.seeding import derive_seed

BLOCK = 256  # tokens whose probabilities are summed before the sums are accumulated


def uniform_numbers(seed: int, rollouts: Sequence[int], count: int) -> torch.Tensor:
    """[rollouts, count] float64 numbers in [0, 1). Those of a rollout depend on the seed and its index alone, and the first of them
    do not depend on `count`."""
    source = torch.Generator()
    rows = [
        torch.rand(count, dtype=torch.float64, generator=source.manual_seed(derive_seed(seed, i, "draw")))
        for i in rollouts
    ]
    return torch.stack(rows)


def inverse_cdf(probabilities: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """[rows] tokens: in every row the first one whose cumulative share of the row's sum exceeds its uniform number.

    `probabilities` are [rows, vocabulary], not negative, and need not sum to 1. `uniforms` are [rows], float64, in [0, 1). Cumulative
    sums are float64, so that every float32 probability above 1e-15 keeps its width; a token of probability 0 is never drawn. They run
    over blocks first and then inside one block, which spares a float64 pass over the vocabulary. The float32 sum of a block weighs
    its tokens right to 1e-6.
    """
    size = probabilities.shape[-1]
    if size <= 2 * BLOCK:
        return _chosen(probabilities.double(), uniforms[:, None])[0]
    whole = size // BLOCK * BLOCK
    blocks = [probabilities[:, :whole].unflatten(-1, (-1, BLOCK)).sum(-1)]
    if whole < size:
        blocks.append(probabilities[:, whole:].sum(-1, keepdim=True))
    block, inside = _chosen(torch.cat(blocks, -1).double(), uniforms[:, None])
    columns = block[:, None] * BLOCK + torch.arange(BLOCK, device=block.device)
    masses = probabilities.gather(-1, columns.clamp(max=size - 1)).double()
    token, _ = _chosen(masses.masked_fill_(columns >= size, 0), inside[:, None])
    return block * BLOCK + token


def _chosen(masses: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows] indices of the masses at which the uniform numbers fall, and where inside them they fall, from 0 to 1.

    `masses` are [rows, n], `uniforms` [rows, 1]. Where rounding takes a number beyond every mass, it falls into the last that is not 0.
    """
    upper = masses.cumsum(-1)
    target = uniforms * upper[:, -1:]
    positive = masses > 0
    beyond = (upper > target) & positive
    last = masses.shape[-1] - 1 - positive.flip(-1).byte().argmax(-1, keepdim=True)
    index = torch.where(beyond.any(-1, keepdim=True), beyond.byte().argmax(-1, keepdim=True), last)
    mass = masses.gather(-1, index)
    within = (target - (upper.gather(-1, index) - mass)) / mass
    return index[:, 0], within[:, 0].clamp(0, 1)


class Draw(LogitsProcessor):
    """Draws one token per row from the scores that it is given, which makes it the last processor. `generate` takes the largest score,
    so all the others become −inf. Tokens, log-probs and entropies of every step are kept, without a [steps, rows, vocabulary] stack."""

    def __init__(self, uniforms: torch.Tensor | None, *, entropy: bool = False) -> None:
        """`uniforms` are [rows, steps]; None takes the likeliest token."""
        self.uniforms = uniforms
        self.entropy = entropy
        self.tokens: list[torch.Tensor] = []
        self.logp: list[torch.Tensor] = []
        self.entropies: list[torch.Tensor] = []
        self.answer: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.float()
        normaliser = scores.logsumexp(-1, keepdim=True)
        probabilities = (scores - normaliser).exp_()
        if self.uniforms is None:
            tokens = scores.argmax(-1)
        else:
            tokens = inverse_cdf(probabilities, self.uniforms[:, len(self.tokens)])
        self.tokens.append(tokens)
        self.logp.append((scores.gather(-1, tokens[:, None]) - normaliser)[:, 0])
        if self.entropy:
            self.entropies.append(torch.special.entr(probabilities).sum(-1))
        return self._only(tokens, scores)

    def columns(self) -> tuple[list[list[int]], list[list[float]], list[list[float]]]:
        """Tokens, their log-probs and the entropies in nats, each [rows][steps]; no entropies where they are not asked for. Raises
        UndrawableError where a distribution was not one."""
        logp = torch.stack(self.logp, 1)
        if not bool(logp.isfinite().all()):
            raise UndrawableError(UNDRAWABLE.format(where=""))
        entropies = torch.stack(self.entropies, 1).tolist() if self.entropy else [[] for _ in logp]
        return torch.stack(self.tokens, 1).tolist(), logp.tolist(), entropies

    def _only(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores whose largest is the token's. One tensor serves every step: filling it each time would cost as much as drawing."""
        if self.answer is None:
            self.answer = torch.full_like(scores, -torch.inf)
        else:
            self.answer.scatter_(-1, self.tokens[-2][:, None], -torch.inf)
        return self.answer.scatter_(-1, tokens[:, None], 0.0)
