"""What a reduction does to losses that look at the sampled token, by enumeration of every response of a tabular student."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses import Objective, Reduction, token_weights
from opd.types import DenseTarget, SampledTarget

VOCAB, LONGEST, END = 4, 4, 0
SAMPLED = {
    "k1": {"support": "sampled", "estimator": "k1", "delivery": "advantage"},
    "k1 with a baseline": {"support": "sampled", "estimator": "k1", "delivery": "advantage", "baseline": "value"},
    "k2": {"support": "sampled", "estimator": "k2"},
    "tail=sampled": {"support": "teacher_top_k", "top_k": 1, "tail": "sampled"},
    "tail=sampled of a union": {"support": "union", "top_k": 1, "tail": "sampled"},
}


class Tabular:
    """A student with logits of its own at every prefix, its teacher, and all of its responses with their probabilities."""

    def __init__(self) -> None:
        self.responses: list[tuple[int, ...]] = []
        self._grow(())
        prefixes = sorted({r[:i] for r in self.responses for i in range(len(r))})
        at = {prefix: i for i, prefix in enumerate(prefixes)}
        generator = torch.Generator().manual_seed(1)
        self.logits = torch.randn(len(prefixes), VOCAB, generator=generator, dtype=torch.float64)
        self.teacher = 1.5 * torch.randn(len(prefixes), VOCAB, generator=generator, dtype=torch.float64)
        self.rows = [torch.tensor([at[r[:i]] for i in range(len(r))]) for r in self.responses]
        self.ids = [torch.tensor(r) for r in self.responses]
        logp = self.logits.log_softmax(-1)
        drawn = [logp[rows].gather(-1, ids[:, None]).sum() for rows, ids in zip(self.rows, self.ids, strict=True)]
        self.probability = torch.stack(drawn).exp()
        self.lengths = torch.tensor([len(r) for r in self.responses])

    def _grow(self, prefix: tuple[int, ...]) -> None:
        if prefix and (prefix[-1] == END or len(prefix) == LONGEST):
            self.responses.append(prefix)
            return
        for token in range(VOCAB):
            self._grow((*prefix, token))

    def gradients(self, objective: Objective) -> Tensor:
        """Of the unweighted sum of each response, [responses, prefixes, vocab]."""
        found = []
        for rows, ids in zip(self.rows, self.ids, strict=True):
            logits = self.logits.clone().requires_grad_()
            target = DenseTarget(logits=self.teacher[rows])
            out = objective.per_token(logits[rows], target, ids, sequence_index=torch.zeros_like(ids))
            found.append(torch.autograd.grad(out.loss.sum(), logits)[0])
        return torch.stack(found)

    def expected(self, objective: Objective, reduction: Reduction, batch: int) -> Tensor:
        """E of the gradient of a batch's loss, up to a factor of the batch size: the weights are those of `token_weights`."""
        one = torch.zeros(1, dtype=torch.long)
        weights = torch.zeros(len(self.responses), dtype=torch.float64)
        for number, length in enumerate(self.lengths):
            for others, chance in enumerate(self._lengths_of(batch - 1)):
                count = {"token_mean": int(length) + others, "sequence_mean": batch, "fixed": batch}[reduction]
                if chance > 0:
                    settings = {"reduction": reduction, "global_count": count, "dtype": torch.float64}
                    weights[number] += chance * token_weights(one, length.view(1), **settings)[0]
        return (batch * weights * self.probability)[:, None, None].mul(self.gradients(objective)).sum(0)

    def _lengths_of(self, responses: int) -> Tensor:
        """How likely so many responses have 0, 1, … tokens in sum."""
        single = torch.zeros(LONGEST + 1, dtype=torch.float64).index_add(0, self.lengths, self.probability)
        total = torch.ones(1, dtype=torch.float64)
        for _ in range(responses):
            total = torch.nn.functional.conv1d(total[None, None], single.flip(0)[None, None], padding=LONGEST)[0, 0]
        return total


WORLD = Tabular()


def bias(settings: dict, reduction: Reduction, batch: int) -> float:
    """Of the expected gradient, against the exact divergence's under the same reduction, relative to it."""
    wanted = WORLD.expected(Objective(), reduction, batch)
    return float((WORLD.expected(Objective(**settings), reduction, batch) - wanted).norm() / wanted.norm())


def test_every_response_is_there_once():
    assert len(set(WORLD.responses)) == len(WORLD.responses) == 1 + 3 + 9 + 27 * VOCAB
    torch.testing.assert_close(WORLD.probability.sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("name", SAMPLED)
def test_fixed_leaves_every_sampled_loss_its_exact_gradient(name):
    assert bias(SAMPLED[name], "fixed", 4) < 1e-13


@pytest.mark.parametrize("name", SAMPLED)
def test_a_mean_over_tokens_is_off_by_one_over_the_batch(name):
    one, four, sixteen = (bias(SAMPLED[name], "token_mean", batch) for batch in (1, 4, 16))
    assert one > 0.4
    assert 0.05 < four < 0.15
    assert sixteen == pytest.approx(four / 4, rel=0.25)


@pytest.mark.parametrize("name", SAMPLED)
def test_a_mean_over_sequences_is_off_at_every_size_and_refused_with_what_is_not(name):
    assert bias(SAMPLED[name], "sequence_mean", 1) == pytest.approx(bias(SAMPLED[name], "sequence_mean", 16), rel=1e-9)
    assert bias(SAMPLED[name], "sequence_mean", 16) > 0.4
    with pytest.raises(
        ObjectiveError, match=r"reduction='sequence_mean' with .*sampled.*use reduction='fixed' with fixed_count"
    ):
        Objective(**SAMPLED[name], reduction="sequence_mean")
    assert Objective(**SAMPLED[name], reduction="fixed", fixed_count=1000).reduction == "fixed"


def test_k3_has_the_gradient_of_forward_kl_under_fixed_alone():
    k3 = {"support": "sampled", "estimator": "k3", "divergence": "forward_kl"}
    wanted = {r: WORLD.expected(Objective(divergence="forward_kl"), r, 4) for r in ("fixed", "token_mean", "sequence_mean")}  # fmt: skip
    found = {r: WORLD.expected(Objective(**k3), r, 4) for r in wanted}
    errors = {r: float((found[r] - wanted[r]).norm() / wanted[r].norm()) for r in wanted}
    assert errors["fixed"] < 1e-13
    assert 0.02 < errors["token_mean"] < 0.2
    assert errors["sequence_mean"] > 0.2
    with pytest.raises(ObjectiveError, match="sequence_mean"):
        Objective(**k3, reduction="sequence_mean")


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_losses_that_do_not_look_at_the_sampled_token_take_every_reduction(reduction):
    for settings in ({}, {"support": "teacher_top_k", "top_k": 2}, {"divergence": "generalized_jsd"}):
        assert Objective(**settings, reduction=reduction).reduction == reduction


def test_a_sampled_target_is_reduced_as_its_logits_are():
    """What a server sends, the log-prob of the sampled token alone, has the same expectation."""
    objective = Objective(**SAMPLED["k2"])
    logq = WORLD.teacher.log_softmax(-1)
    for rows, ids, wanted in zip(WORLD.rows[:5], WORLD.ids[:5], WORLD.gradients(objective)[:5], strict=True):
        logits = WORLD.logits.clone().requires_grad_()
        target = SampledTarget(teacher_logp=logq[rows].gather(-1, ids[:, None]).squeeze(-1))
        loss = objective.per_token(logits[rows], target, ids).loss.sum()
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted)
