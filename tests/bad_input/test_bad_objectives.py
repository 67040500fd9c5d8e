"""Losses that are wrong, and losses that this teacher cannot feed."""

from __future__ import annotations

import pytest
import torch
from opd_user import User
from transformers import Gemma2Config, Gemma2ForCausalLM

from opd.testing import digit_tokenizer


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        ("--objective.divergence generalized_jsd --objective.beta 2", ("0 ≤ beta ≤ 1", "beta=2.0")),
        ("--objective.divergence generalized_jsd --objective.beta -0.1", ("0 ≤ beta ≤ 1", "beta=-0.1")),
        ("--objective.divergence skew_reverse_kl --objective.beta 0", ("beta=0", "identically 0", "use beta=1")),
        ("--objective.beta 0.9", ("beta=0.9 is not read by reverse_kl", "drop it")),
        ("--objective.student_temperature 0", ("student_temperature=0.0", "divided by it")),
        ("--objective.teacher_temperature -1", ("teacher_temperature=-1.0", "divided by it")),
        ("--objective.student_temperature .nan", ("student_temperature=nan", "finite")),
        ("--objective.teacher_logp_floor 3", ("teacher_logp_floor=3.0", "must be negative")),
        ("--objective.support sampled", ("estimator='exact'", "use estimator='k1'")),
        ("--objective.support sampled --objective.estimator k1", ("expected gradient is 0", "delivery='advantage'")),
        ("--objective.top_k 0", ("top_k=0", "≥ 1")),
        ("--objective.tail ignore", ("tail='ignore'", "'bucket'")),
    ],
)
def test_an_objective_that_cannot_work_is_refused_before_anything_is_loaded(
    user: User, words: str, fragments: tuple[str, ...]
):
    user.train(*words.split()).refuses("objective", *fragments)
    assert not user.run_dir.exists()


@pytest.mark.parametrize(
    ("supply", "advice"),
    [("top_k", "use support=teacher_top_k with tail=bucket"), ("sampled", "use support=sampled with estimator=k1")],
)
def test_an_objective_the_teacher_cannot_feed_is_refused_with_what_would_do(user: User, supply: str, advice: str):
    before = user.has_finished_run()
    outcome = user.train("--overwrite", teacher__supply=supply)
    outcome.refuses(
        "reverse_kl needs every vocabulary entry",
        f"teacher '{user.desk.teacher}' supplies",
        advice,
        "teacher.supply=auto",
    )
    assert user.files() == before


def test_hidden_states_do_not_tell_the_logits_of_a_teacher_with_a_softcap(user: User):
    tokenizer = digit_tokenizer()
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, final_logit_softcapping=0.5,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    softcapped = user.saves("softcapped", Gemma2ForCausalLM(config), tokenizer)
    outcome = user.train(teacher__model=softcapped, teacher__supply="hidden")
    outcome.refuses("teacher.supply is 'hidden'", "soft-cap", "Use supply=auto or dense")


def test_a_token_outside_the_vocabulary_is_refused_before_the_run(user: User):
    before = user.has_finished_run()
    outcome = user.train("--overwrite", objective__support="teacher_top_k", objective__always_include=500)
    outcome.refuses("objective.always_include holds 500", "the vocabulary ends at 12", "student's tokenizer")
    outcome = user.train("--overwrite", objective__eos_groups=[[1, 2], [3, 500]])
    outcome.refuses("objective.eos_groups holds 500", "the vocabulary ends at 12", "student's tokenizer")
    assert user.files() == before


@pytest.mark.parametrize(
    ("rollout", "why"),
    [
        ("--rollout.lmbda 0.5", "only for tokens that the student sampled"),
        ("--rollout.top_p 0.9", "top_p=0.9"),
        ("--rollout.top_k 5", "top_k=5"),
    ],
)
def test_a_loss_on_sampled_tokens_refuses_samples_it_is_not_right_for(user: User, rollout: str, why: str):
    words = "--objective.support sampled --objective.estimator k1 --objective.delivery advantage"
    outcome = user.train(*words.split(), *rollout.split())
    outcome.refuses("objective estimator=k1", why, "Set ", "objective.support=full")
