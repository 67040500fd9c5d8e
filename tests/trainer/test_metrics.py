"""Numbers about whole responses, and means of what a loss returns, by pencil."""

from __future__ import annotations

import pytest
import torch

from opd.data.pack import pack
from opd.losses import TokenLoss
from opd.trainer.metrics import TokenMetrics, repetition
from opd.types import Prompt, Rollout


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ((1, 2, 3, 4, 5, 6), 0.0),  # three 4-grams, all different
        ((1, 1, 1, 1, 1, 1), 2 / 3),  # three, one of a kind
        ((1, 2, 3, 1, 2, 3, 1), 1 / 4),  # 1231 2312 3123 1231
        ((1, 2, 3), 0.0),  # too short to repeat anything
    ],
)
def test_repetition_is_the_share_of_4_grams_seen_before(ids, expected):
    assert repetition(ids) == pytest.approx(expected)


def test_every_metric_that_a_loss_returns_is_averaged_over_the_tokens_that_have_it():
    """Nobody has to know its name; of `clamped`, the sum is taken."""
    responses = [(5, 6, 7), (8,)]
    rollouts = [
        Rollout(
            prompt=Prompt(index=i, text="?"),
            prompt_ids=(1, 2),
            response_ids=ids,
            sampler_logp=None,
            finished=True,
            policy_version=0,
        )
        for i, ids in enumerate(responses)
    ]
    metrics = TokenMetrics()
    for batch in pack(rollouts, None, layout="right_padded", tokens_per_microbatch=4, pad_id=0):
        own = {"surprise": batch.response_ids.double()}
        own |= {"short_only": torch.tensor([9.0])} if len(batch.response_ids) == 1 else {}
        clamped = torch.full(batch.response_ids.shape, 0.5)
        loss = torch.zeros(batch.response_ids.shape)
        metrics.add(batch, TokenLoss(loss=loss, metrics={**own, "clamped": clamped}))
    found = metrics.summary()
    assert found["surprise"] == 6.5 and found["short_only"] == 9.0
    assert found["clamped_tokens"] == 2.0 and "clamped" not in found
    assert [values.tolist() for _, values in metrics.per_rollout("short_only")] == [[], [9.0]]
