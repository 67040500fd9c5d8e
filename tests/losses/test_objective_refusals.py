import dataclasses
import math

import pytest
import torch
from loss_oracles import random_logits

from opd.errors import ObjectiveError
from opd.losses import Objective, gather_logp, to_logp
from opd.types import DenseTarget, SampledTarget, TopKTarget

STUDENT, TEACHER = random_logits(6, 40, seed=51), to_logp(random_logits(6, 40, seed=52))
IDS = torch.tensor([3, 0, 39, 7, 7, 20])
DENSE, SAMPLED = DenseTarget(logits=TEACHER), SampledTarget(teacher_logp=gather_logp(TEACHER, IDS))
BEST = TEACHER.topk(5, dim=-1)
TOP_5 = TopKTarget(ids=BEST.indices, teacher_logp=BEST.values)


def policy(**changes):
    return Objective(support="sampled", estimator="k1", delivery="advantage", **changes)


# --- what it needs of a teacher ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "needs"),
    [
        (Objective(), ("hidden", "dense")),
        (Objective(support="teacher_top_k"), ("hidden", "dense", "top_k")),
        (Objective(support="teacher_top_k", always_include=(1,)), ("hidden", "dense")),
        (Objective(support="teacher_top_k", teacher_temperature=2.0), ("hidden", "dense")),
        (Objective(support="student_top_k"), ("hidden", "dense")),
        (Objective(support="union"), ("hidden", "dense")),
        (policy(), ("hidden", "dense", "sampled", "top_k")),
        (policy(baseline="value"), ("hidden", "dense", "top_k")),
        (policy(teacher_temperature=2.0), ("hidden", "dense")),
    ],
)
def test_each_objective_names_the_targets_that_can_feed_it(objective, needs):
    assert objective.needs == needs


def test_the_best_target_that_the_teacher_has_is_taken():
    assert Objective().check_supplies(["sampled", "top_k", "dense"], "local") == "dense"
    assert Objective(support="teacher_top_k", top_k=8).check_supplies({"top_k"}, "server", 8) == "top_k"
    assert policy().check_supplies({"sampled", "top_k"}, "server", 20) == "sampled"


@pytest.mark.parametrize(
    ("objective", "supplies", "k", "message"),
    [
        (
            Objective(),
            {"top_k"},
            20,
            "reverse_kl needs every vocabulary entry, but teacher 'server' supplies top-20; use support=teacher_top_k with "
            "tail=bucket, or use a local teacher.",
        ),
        (Objective(), {"sampled"}, None, "use support=sampled with estimator=k1, delivery=advantage"),
        (Objective(support="union"), {"top_k"}, 20, "tokens that the student chooses"),
        (Objective(support="teacher_top_k", always_include=(7,)), {"top_k"}, 99, r"tokens \(7,\).*drop always_include"),
        (policy(baseline="value"), {"sampled"}, None, "baseline=value.*baseline=none"),
        (Objective(teacher_temperature=2.0), {"top_k"}, 20, "set teacher_temperature=1"),
        (Objective(support="teacher_top_k", top_k=64), {"top_k"}, 20, "supplies top-20; set top_k=20"),
        (Objective(), set(), None, "supplies nothing; use a local teacher"),
    ],
)
def test_a_teacher_that_cannot_feed_it_is_refused_with_a_way_out(objective, supplies, k, message):
    with pytest.raises(ObjectiveError, match=message):
        objective.check_supplies(supplies, "server", k)


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"support": "sampled", "estimator": "k1"}, "expected gradient is 0"),
    ({"support": "sampled", "estimator": "k3"}, "gradient of forward KL"),
    ({"support": "sampled", "estimator": "k2", "divergence": "forward_kl"}, "gradient of reverse KL"),
    (
        {"support": "sampled", "estimator": "k1", "delivery": "advantage", "divergence": "forward_kl"},
        "estimates reverse KL",
    ),
    ({"support": "sampled", "estimator": "k3", "delivery": "advantage"}, "wrong direction"),
    (
        {"support": "sampled", "estimator": "k3", "delivery": "advantage", "divergence": "forward_kl"},
        "wrong direction",
    ),
    ({"support": "sampled", "estimator": "k2", "delivery": "advantage"}, "wrong direction"),
    ({"delivery": "advantage"}, "same number for every token"),
    ({"support": "teacher_top_k", "delivery": "advantage"}, "same number for every token"),
    ({"support": "sampled"}, "one token's log-prob"),
    ({"estimator": "k2"}, "support='sampled'"),
    ({"support": "union", "estimator": "k1", "delivery": "advantage"}, "support='sampled'"),
    ({"support": "teacher_top_k", "tail": "ignore"}, "push probability out"),
    ({"support": "teacher_top_k", "tail": "renormalize", "top_k": 1}, "identically 0"),
    ({"support": "union", "divergence": "alpha_beta_divergence"}, "support='full'"),
    ({"tail": "generalized"}, "has none"),
    ({"support": "sampled", "estimator": "k2", "tail": "sampled"}, "has none"),
    ({"always_include": (2,)}, "has none"),
    ({"divergence": "skew_reverse_kl", "beta": 0.0}, "identically 0"),
    ({"divergence": "skew_forward_kl", "beta": 1.0}, "identically 0"),
    ({"divergence": "generalized_jsd", "beta": 1.1}, "0 ≤ beta ≤ 1"),
    ({"divergence": "alpha_beta_divergence", "alpha": -1.0}, "alpha ≥ 0"),
    ({"divergence": "forward_reverse_kl", "alpha": 1.1}, "0 ≤ alpha ≤ 1"),
    ({"divergence": "forward_reverse_kl", "beta": 0.5}, "not read by forward_reverse_kl"),
    ({"divergence": "kl"}, "reverse_kl"),
    ({"beta": 0.9}, "not read by reverse_kl"),
    ({"beta": 0.5}, "beta=0.5 is not read by reverse_kl; drop it"),
    ({"beta": 0.5, "divergence": "total_variation"}, "not read by total_variation"),
    ({"alpha": 0.5}, "alpha=0.5 is not read by reverse_kl; drop it"),
    ({"normalize": True}, "normalize=True is read by generalized_jsd only"),
    ({"top_k": 64}, "top_k=64 is read by top-k supports, and support='full'"),
    ({"top_k": 32}, "top_k=32 is read by top-k supports, and support='full'"),
    ({"support": "sampled", "estimator": "k2", "top_k": 64}, "support='sampled' looks at something else"),
    ({"tail": "bucket"}, "has none"),
    ({"alpha": 0.9, "divergence": "generalized_jsd"}, "not read by generalized_jsd"),
    ({"normalize": False}, "generalized_jsd only"),
    ({"beta": math.nan, "divergence": "generalized_jsd"}, "finite"),
    ({"teacher_logp_floor": math.nan}, "finite"),
    ({"teacher_logp_floor": 0.0}, "negative"),
    ({"student_temperature": 0.0}, "> 0"),
    ({"teacher_temperature": -1.0}, "> 0"),
    ({"student_temperature": math.inf}, "finite"),
    ({"scale_by_t2": True}, "multiplies by 1"),
    ({"scale_by_t2": True, "student_temperature": 2.0}, "set both alike"),
    (
        {
            "scale_by_t2": True,
            "student_temperature": 2.0,
            "teacher_temperature": 2.0,
            "support": "sampled",
            "estimator": "k1",
            "delivery": "advantage",
        },
        "an advantage has no gradient",
    ),
    ({"baseline": "value"}, "delivery='loss' has none"),
    ({"discount": 0.5}, "delivery='loss' has none"),
    ({"clip_range": 0.2}, "delivery='loss' has none"),
    ({"discount": -0.5}, "between 0"),
    ({"discount": 1.5}, "between 0"),
    ({"clip_range": 0.0}, "> 0"),
    ({"top_k": 0, "support": "union"}, "whole number"),
    ({"top_k": 2.5, "support": "union"}, "whole number"),
    ({"always_include": (-1,), "support": "union"}, "token ids"),
    ({"reduction": "mean"}, "token_mean"),
]


@pytest.mark.parametrize(("settings", "why"), REFUSED, ids=lambda value: str(value))
def test_what_cannot_work_is_refused_with_the_reason(settings, why):
    with pytest.raises(ObjectiveError, match=why):
        Objective(**settings)


@pytest.mark.parametrize(
    ("choice", "read"),
    [
        ({"divergence": "generalized_jsd"}, {"beta": 0.5, "normalize": True}),
        ({"divergence": "skew_reverse_kl"}, {"beta": 0.5}),
        ({"divergence": "alpha_beta_divergence"}, {"alpha": 0.5, "beta": 0.5}),
        ({"divergence": "forward_reverse_kl"}, {"alpha": 0.5}),
        ({"support": "union"}, {"top_k": 64, "tail": "bucket"}),
    ],
)
def test_a_setting_has_its_default_where_it_is_read_and_none_elsewhere(choice, read):
    unset = dict.fromkeys(("beta", "alpha", "normalize", "top_k", "tail"))
    made = Objective(**choice)
    assert {name: getattr(made, name) for name in unset} == {**unset, **read}
    assert made == Objective(**choice, **read) == dataclasses.replace(made, student_temperature=1.0)
    assert made.changed() == choice


def test_the_published_jsd_warns_near_its_ends_when_the_objective_is_made():
    with pytest.warns(UserWarning, match="normalize=True"):
        Objective(divergence="generalized_jsd", beta=0.95, normalize=False)


def test_an_objective_cannot_be_changed_only_replaced():
    objective = Objective()
    with pytest.raises(dataclasses.FrozenInstanceError):
        objective.beta = 0.3
    with pytest.raises(ObjectiveError):
        dataclasses.replace(objective, delivery="advantage")


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda: Objective().per_token(STUDENT, SAMPLED, IDS), "kind hidden or dense"),
        (lambda: Objective().per_token(STUDENT, TOP_5, IDS), "kind hidden or dense"),
        (lambda: Objective().per_token(STUDENT[:, :-1], DENSE, IDS), "39 vocabulary entries, teacher logits 40"),
        (lambda: Objective().per_token(STUDENT, DENSE, IDS[:-1]), "6 rows of student logits, 6 of the target and 5"),
        (lambda: Objective().per_token(STUDENT[:-1], DENSE, IDS[:-1]), "same order"),
        (lambda: policy(discount=0.5).per_token(STUDENT, DENSE, IDS), "sequence_index"),
        (lambda: policy(clip_range=0.2).per_token(STUDENT, DENSE, IDS), "sampler_logp"),
        (lambda: policy().per_token(STUDENT, TOP_5, IDS), "sampled_logp"),
        (
            lambda: Objective(support="teacher_top_k", tail="sampled").per_token(STUDENT, TOP_5, IDS),
            "sampled_logp",
        ),
        (
            lambda: Objective(support="teacher_top_k").per_token(STUDENT[:, :3], TOP_5, IDS.clamp(max=2)),
            "same tokenizer",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_they_are_computed_with(call, why):
    with pytest.raises(ObjectiveError, match=why):
        call()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("kl", "'reverse_kl' or 'forward_kl'"),
        ("jsd", "'generalized_jsd'"),
        ("js", "'generalized_jsd'"),
        ("rkl", "'reverse_kl'"),
        ("Total Variation", "'total_variation'"),
        ("forward-kl", "'forward_kl'"),
        ("revers_kl", "'reverse_kl'"),
    ],
)
def test_a_divergence_by_another_name_is_answered_with_the_one_that_is_meant(name: str, meant: str):
    with pytest.raises(ObjectiveError, match=rf"is not known.*Did you mean {meant}\?$"):
        Objective(divergence=name)  # pyright: ignore[reportArgumentType]


def test_a_name_like_no_other_is_answered_without_a_guess():
    with pytest.raises(ObjectiveError, match=r"total_variation\.$"):
        Objective(divergence="cosine")  # pyright: ignore[reportArgumentType]
