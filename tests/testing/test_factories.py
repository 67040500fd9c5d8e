import pytest
import torch

from opd.testing import (
    assert_close_to_reference,
    random_logits,
    random_rollout,
    random_target,
    target_from_logits,
)


def test_random_logits_repeat_with_the_seed_and_mask_the_padding():
    assert torch.equal(random_logits(3, 8, seed=1), random_logits(3, 8, seed=1))
    assert not torch.equal(random_logits(3, 8, seed=1), random_logits(3, 8, seed=2))
    masked = random_logits(3, 8, valid_vocab=6)
    assert masked[:, 6:].eq(-torch.inf).all() and masked[:, :6].isfinite().all()


def test_targets_of_one_teacher_agree_with_each_other():
    logits, ids = random_logits(5, 8, dtype=torch.float64), torch.tensor([0, 7, 3, 3, 1])
    sampled, best, dense = (target_from_logits(kind, logits, ids, top_k=8) for kind in ("sampled", "top_k", "dense"))
    teacher_logp = dense.logits.log_softmax(-1)
    assert torch.equal(sampled.teacher_logp, teacher_logp[torch.arange(5), ids])
    assert torch.equal(best.sampled_logp, sampled.teacher_logp)
    assert torch.equal(best.teacher_logp, teacher_logp.gather(-1, best.ids))
    assert (best.teacher_logp.diff(dim=-1) <= 0).all()
    assert torch.allclose(best.teacher_logp.exp().sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["sampled", "top_k", "dense", "hidden"])
def test_random_target_has_its_kind_and_one_row_per_token(kind):
    target = random_target(kind, 5, 16, valid_vocab=12)
    assert target.kind == kind
    assert len(target) == 5


def test_sampled_log_probs_of_a_random_target_avoid_the_padding():
    assert random_target("sampled", 200, 16, valid_vocab=4).teacher_logp.isfinite().all()


def test_hidden_target_cannot_come_from_logits():
    with pytest.raises(ValueError, match="hidden"):
        target_from_logits("hidden", random_logits(2, 4), torch.zeros(2, dtype=torch.long))


def test_random_rollout_has_a_log_prob_for_every_response_token():
    rollout = random_rollout(3, 5, 16, seed=1, index=4)
    assert (len(rollout.prompt_ids), len(rollout.response_ids), len(rollout.sampler_logp)) == (3, 5, 5)
    assert rollout.prompt.index == 4
    assert all(0 <= token < 16 for token in rollout.prompt_ids + rollout.response_ids)
    assert all(-3 <= logp <= 0 for logp in rollout.sampler_logp)


def test_an_error_within_the_plain_version_s_own_passes():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert_close_to_reference(exact + 1.9e-3, exact + 1e-3, exact)


def test_an_error_beyond_the_plain_version_s_own_fails_and_says_where():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    wrong = exact + torch.tensor([0.0, 2.5e-3], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"error 2.500e-03 exceeds .* got 2.0025, exact 2"):
        assert_close_to_reference(wrong, exact + 1e-3, exact)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0])
def test_nan_and_misplaced_infinities_fail(bad):
    exact = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close_to_reference(torch.tensor([1.0, bad]), exact.float(), exact)
    assert_close_to_reference(exact.float(), exact.float(), exact)


def test_a_finite_reference_met_by_infinity_fails():
    exact = torch.tensor([1.0], dtype=torch.float64)
    with pytest.raises(AssertionError):
        assert_close_to_reference(torch.tensor([torch.inf]), exact.float(), exact)
