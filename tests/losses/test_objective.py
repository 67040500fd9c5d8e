import math

import pytest
import torch
from loss_oracles import (
    FULL_NAMES,
    PARTIAL_NAMES,
    expected,
    gradient,
    random_logits,
    relative_error,
    sampled_gradients,
    tail_problem,
    total_variance,
)

from opd.errors import ObjectiveError
from opd.losses import (
    Objective,
    dense_from_hidden,
    discounted_return,
    entropy,
    forward_kl,
    full_divergence,
    gather_logp,
    generalized_jsd,
    partial_divergence,
    reverse_kl,
    to_logp,
    top_k_support,
)
from opd.types import DenseTarget, Head, HiddenTarget, SampledTarget, TopKTarget

TOKENS, V = 6, 40
STUDENT, TEACHER_LOGITS = random_logits(TOKENS, V, seed=51), random_logits(TOKENS, V, seed=52)
TEACHER = to_logp(TEACHER_LOGITS)
DENSE = DenseTarget(logits=TEACHER_LOGITS)
IDS = torch.tensor([3, 0, 39, 7, 7, 20])
SEQUENCES = torch.tensor([0, 0, 0, 1, 2, 2])


def top_k_target(k, sampled=True):
    best = TEACHER.topk(k, dim=-1)
    return TopKTarget(
        ids=best.indices, teacher_logp=best.values, sampled_logp=gather_logp(TEACHER, IDS) if sampled else None
    )


def sampled_target():
    return SampledTarget(teacher_logp=gather_logp(TEACHER, IDS))


def policy(**changes):
    return Objective(support="sampled", estimator="k1", delivery="advantage", **changes)


def same(actual, wanted):
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-13)


# --- the loss it computes ---------------------------------------------------------------------------------------------


def test_the_default_is_exact_reverse_kl_over_the_whole_vocabulary():
    assert torch.equal(Objective().per_token(STUDENT, DENSE, IDS).loss, reverse_kl(to_logp(STUDENT), TEACHER))


@pytest.mark.parametrize("name", FULL_NAMES)
def test_full_support_computes_the_divergence_it_names(name):
    shape = {
        "generalized_jsd": {"beta": 0.3},
        "alpha_beta_divergence": {"alpha": 0.3, "beta": 0.9},
        "forward_reverse_kl": {"alpha": 0.3},
    }.get(name, {})
    loss = Objective(divergence=name, **shape).per_token(STUDENT, DENSE, IDS).loss
    assert torch.equal(loss, full_divergence(name, to_logp(STUDENT), TEACHER, **shape))


def test_published_jsd_is_passed_on():
    loss = Objective(divergence="generalized_jsd", beta=0.3, normalize=False).per_token(STUDENT, DENSE, IDS).loss
    assert torch.equal(loss, generalized_jsd(to_logp(STUDENT), TEACHER, 0.3, normalize=False))
    partial = Objective(divergence="generalized_jsd", beta=0.3, normalize=False, support="union", top_k=40)
    same(partial.per_token(STUDENT, DENSE, IDS).loss, loss)


@pytest.mark.parametrize("name", PARTIAL_NAMES)
@pytest.mark.parametrize("tail", ["bucket", "generalized", "renormalize"])
def test_partial_supports_are_chosen_by_whom_they_name(name, tail):
    student = to_logp(STUDENT)
    for support, chooser in (("teacher_top_k", TEACHER), ("student_top_k", student)):
        chosen = top_k_support(chooser, 5, (1, 2))
        wanted = partial_divergence(name, chosen.gather(student), chosen.gather(TEACHER), tail=tail)
        objective = Objective(divergence=name, support=support, top_k=5, tail=tail, always_include=(1, 2))
        same(objective.per_token(STUDENT, DENSE, IDS).loss, wanted)


def test_union_sees_what_either_side_thinks_likely():
    student, teacher = torch.tensor([[5.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 5.0, 0.0, 0.0]])
    objective = Objective(support="union", top_k=1)
    loss = objective.per_token(student, DenseTarget(logits=teacher), torch.tensor([0])).loss
    wanted = reverse_kl(
        to_logp(student), to_logp(teacher)
    )  # the other two entries are alike, so the bucket loses nothing
    torch.testing.assert_close(loss, wanted)


@pytest.mark.parametrize("tail", ["bucket", "generalized", "renormalize", "sampled"])
def test_a_teacher_that_shows_its_top_k_gives_the_same_loss_as_its_logits(tail):
    objective = Objective(support="teacher_top_k", top_k=5, tail=tail)
    wanted = objective.per_token(STUDENT, DENSE, IDS).loss
    for shown in (5, 9):  # more than asked for is cut
        same(objective.per_token(STUDENT, top_k_target(shown), IDS).loss, wanted)


def test_hidden_states_give_the_same_loss_as_the_logits_they_stand_for():
    hidden, weight, bias = random_logits(TOKENS, 8, seed=53), random_logits(V, 8, seed=54), random_logits(V, seed=55)
    target = HiddenTarget(hidden=hidden, head=Head(weight=weight, bias=bias))
    wanted = Objective().per_token(STUDENT, DenseTarget(logits=hidden @ weight.T + bias), IDS).loss
    same(Objective().per_token(STUDENT, target, IDS).loss, wanted)


def test_padding_rows_of_a_head_cannot_be_emitted_and_low_precision_is_widened():
    head = Head(weight=random_logits(10, 4, seed=1, dtype=torch.bfloat16), valid_vocab=7)
    hidden = random_logits(3, 4, seed=2, dtype=torch.bfloat16)
    logits = dense_from_hidden(HiddenTarget(hidden=hidden, head=head)).logits
    assert logits.dtype == torch.float32
    assert (logits[:, 7:] == -math.inf).all()
    torch.testing.assert_close(logits[:, :7], hidden.float() @ head.weight[:7].float().T, rtol=1e-6, atol=1e-6)


def test_each_side_has_its_own_temperature():
    loss = Objective(student_temperature=2.0, teacher_temperature=0.5).per_token(STUDENT, DENSE, IDS).loss
    same(loss, reverse_kl(to_logp(STUDENT, 2.0), to_logp(TEACHER_LOGITS, 0.5)))


def test_t2_multiplies_by_the_square_of_the_temperature_only_when_asked():
    plain = Objective(student_temperature=3.0, teacher_temperature=3.0).per_token(STUDENT, DENSE, IDS).loss
    scaled = Objective(student_temperature=3.0, teacher_temperature=3.0, scale_by_t2=True)
    same(scaled.per_token(STUDENT, DENSE, IDS).loss, 9 * plain)


def test_the_sampled_tail_divides_by_the_sampler_when_it_is_given():
    objective = Objective(support="teacher_top_k", top_k=4, tail="sampled")
    own = objective.per_token(STUDENT, DENSE, IDS).loss
    student_logp = gather_logp(to_logp(STUDENT), IDS)
    same(objective.per_token(STUDENT, DENSE, IDS, sampler_logp=student_logp).loss, own)
    head = Objective(support="teacher_top_k", top_k=4, tail="generalized").per_token(STUDENT, DENSE, IDS).loss
    doubled = objective.per_token(STUDENT, DENSE, IDS, sampler_logp=student_logp + math.log(2)).loss
    same(doubled - head, (own - head) / 2)
    assert (own - head).abs().max() > 0.1


# --- sampled tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [sampled_target(), top_k_target(3), DENSE])
def test_sampled_losses_need_only_the_sampled_token_from_any_target(target):
    delta = gather_logp(to_logp(STUDENT), IDS) - gather_logp(TEACHER, IDS)
    k2_loss = Objective(support="sampled", estimator="k2").per_token(STUDENT, target, IDS).loss
    k3_loss = Objective(support="sampled", estimator="k3", divergence="forward_kl").per_token(STUDENT, target, IDS).loss
    same(k2_loss, delta**2 / 2)
    same(k3_loss, (-delta).exp() - 1 + delta)
    same(policy().per_token(STUDENT, target, IDS).loss, delta)


LOGITS_1, TEACHER_1 = tail_problem()


def objective_gradients(objective, teacher=TEACHER_1):
    """Every token of one position drawn once, through `per_token`."""

    def loss(logp, drawn):
        rows = logp.shape[0]
        return objective.per_token(logp, DenseTarget(logits=teacher.expand(rows, -1)), drawn).loss

    return sampled_gradients(loss, LOGITS_1[0])


@pytest.mark.parametrize(
    ("objective", "exact"),
    [
        (policy(), reverse_kl),
        (policy(baseline="value"), reverse_kl),
        (Objective(support="sampled", estimator="k2"), reverse_kl),
        (Objective(support="sampled", estimator="k3", divergence="forward_kl"), forward_kl),
        (Objective(support="teacher_top_k", top_k=8, tail="sampled"), reverse_kl),
        (Objective(support="union", top_k=3, tail="sampled", divergence="forward_kl"), forward_kl),
        (Objective(support="student_top_k", top_k=3, tail="sampled", divergence="generalized_jsd"), generalized_jsd),
    ],
)
def test_every_sampled_objective_has_the_expected_gradient_of_what_it_names(objective, exact):
    wanted = gradient(lambda s: exact(to_logp(s), TEACHER_1), LOGITS_1)[0]
    assert relative_error(expected(*objective_gradients(objective)), wanted) < 1e-12


def test_the_value_baseline_lowers_the_variance():
    assert total_variance(*objective_gradients(policy(baseline="value"))) < total_variance(
        *objective_gradients(policy())
    )


def test_the_value_baseline_is_subtracted_after_the_return():
    delta = gather_logp(to_logp(STUDENT), IDS) - gather_logp(TEACHER, IDS)
    returns = discounted_return(-delta, SEQUENCES, 0.5)
    loss = policy(baseline="value", discount=0.5).per_token(STUDENT, DENSE, IDS, sequence_index=SEQUENCES).loss
    same(loss, -(returns + reverse_kl(to_logp(STUDENT), TEACHER)))


def test_the_value_baseline_is_coarse_when_only_the_top_k_is_known():
    delta = gather_logp(to_logp(STUDENT), IDS) - gather_logp(TEACHER, IDS)
    support = top_k_support(TEACHER, 5)
    coarse = partial_divergence("reverse_kl", support.gather(to_logp(STUDENT)), support.gather(TEACHER))
    same(policy(baseline="value").per_token(STUDENT, top_k_target(5), IDS).loss, delta - coarse)


def test_the_policy_gradient_uses_and_clips_the_ratio_to_the_sampler():
    student_logp = gather_logp(to_logp(STUDENT), IDS)
    plain = policy().per_token(STUDENT, DENSE, IDS).loss
    sampler = student_logp - math.log(1.5)
    same(policy().per_token(STUDENT, DENSE, IDS, sampler_logp=sampler).loss, 1.5 * plain)
    clipped = policy(clip_range=0.2).per_token(STUDENT, DENSE, IDS, sampler_logp=sampler).loss
    same(clipped, torch.where(plain < 0, 1.2 * plain, 1.5 * plain))


# --- the teacher's floor ----------------------------------------------------------------------------------------------

FLOOR_STUDENT = torch.tensor([[0.5, 0.25, 0.25, 0.0]]).double().log()
FLOOR_TEACHER = torch.tensor([[0.75, 0.25, 0.0, 0.0]]).double().log()


def test_without_a_floor_an_impossible_token_is_infinitely_bad_and_said_so():
    out = Objective().per_token(FLOOR_STUDENT, DenseTarget(logits=FLOOR_TEACHER), torch.tensor([0]))
    assert out.loss.item() == math.inf
    assert out.metrics["reverse_kl"].item() == math.inf
    assert out.metrics["clamped"].item() == 0


def test_the_floor_bounds_the_loss_and_reports_the_probability_it_touched():
    out = Objective(teacher_logp_floor=-10.0).per_token(
        FLOOR_STUDENT, DenseTarget(logits=FLOOR_TEACHER), torch.tensor([0])
    )
    assert out.loss.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.25 * (math.log(0.25) + 10))
    assert out.metrics["clamped"].item() == pytest.approx(0.25)


def test_the_floor_does_not_raise_padding():
    objective = Objective(support="student_top_k", top_k=4, tail="generalized", teacher_logp_floor=-10.0)
    out = objective.per_token(FLOOR_STUDENT, DenseTarget(logits=FLOOR_TEACHER), torch.tensor([0]))
    raised = 0.25 * (math.log(0.25) + 10) - 0.25 + math.exp(-10)
    assert out.loss.item() == pytest.approx(0.5 * math.log(0.5 / 0.75) + 0.75 - 0.5 + raised)


@pytest.mark.parametrize(
    "settings",
    [
        {"divergence": "forward_kl"},
        {"divergence": "generalized_jsd"},
        {"divergence": "generalized_jsd", "beta": 0.0},
        {"divergence": "skew_reverse_kl"},
        {"divergence": "skew_forward_kl"},
        {"divergence": "total_variation"},
        {"divergence": "alpha_beta_divergence"},
        {"divergence": "alpha_beta_divergence", "alpha": 0.0, "beta": 1.0},
        {"divergence": "forward_reverse_kl"},
        {"divergence": "forward_kl", "support": "teacher_top_k"},
    ],
)
def test_a_floor_is_refused_where_the_loss_sums_over_the_teacher(settings):
    """151 936 tokens raised to −10 are 7 times the teacher's own probability: forward KL to itself would be 105 nats."""
    with pytest.raises(ObjectiveError, match=r"the student would learn the floor; drop.*use divergence='reverse_kl'"):
        Objective(**settings, teacher_logp_floor=-10.0)
    assert not Objective(**settings).takes_floor
    Objective(teacher_logp_floor=-10.0)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"divergence": "generalized_jsd", "beta": 1.0},
        {"divergence": "skew_reverse_kl", "beta": 1.0},
        {"divergence": "forward_reverse_kl", "alpha": 0.0},
    ],
)
def test_under_a_floor_a_large_vocabulary_keeps_the_gradient_of_reverse_kl(settings):
    generator = torch.Generator().manual_seed(0)
    logits = 2.2 * torch.randn(2, 40_000, generator=generator)
    logits[:, :40] += torch.linspace(24.0, 6.0, 40)
    moved = logits + 0.3 * torch.randn(2, 40_000, generator=generator)
    found = []
    for floor in (None, -20.0, -10.0):
        z = moved.clone().requires_grad_()
        objective = Objective(**settings, teacher_logp_floor=floor)
        loss = objective.per_token_loss(z, DenseTarget(logits=logits), torch.zeros(2, dtype=torch.long))[0].sum()
        found.append(torch.autograd.grad(loss, z)[0])
    for slope in found[1:]:
        assert (slope - found[0]).norm() < 0.01 * found[0].norm()


def test_the_floor_leaves_the_mass_outside_a_top_k_as_it_is():
    """A bucket of what raised tokens leave would be the floor's, not the teacher's: here it would be less than nothing."""
    p, q = torch.tensor([0.4, 0.3, 0.2, 0.1]).double(), torch.tensor([0.9, 0.06, 1e-4, 0.0399]).double()
    out = Objective(support="student_top_k", top_k=3, teacher_logp_floor=-2.0).per_token(
        p.log()[None], DenseTarget(logits=q.log()[None]), torch.tensor([0])
    )
    floor = math.exp(-2.0)
    terms = [(0.4, 0.9), (0.3, floor), (0.2, floor), (0.1, 1 - 0.9 - 0.06 - 1e-4)]
    assert out.loss.item() == pytest.approx(sum(a * math.log(a / b) for a, b in terms))
    value = policy(baseline="value", teacher_logp_floor=-2.0).per_token(
        p.log()[None],
        TopKTarget(ids=torch.tensor([[0, 1, 2]]), teacher_logp=q[:3].log()[None], sampled_logp=q[:1].log()),
        torch.tensor([0]),
    )
    assert value.loss.item() == pytest.approx(math.log(0.4 / 0.9) - out.loss.item())


def test_the_floor_bounds_k3_and_leaves_its_gradient_alone():
    ids = torch.tensor([2, 1])
    slopes = []
    for floor in (None, -10.0):
        z = FLOOR_STUDENT.expand(2, -1).clone().requires_grad_()
        objective = Objective(support="sampled", estimator="k3", divergence="forward_kl", teacher_logp_floor=floor)
        target = SampledTarget(teacher_logp=torch.tensor([-math.inf, -3.0]).double())
        out = objective.per_token(z, target, ids)
        slopes.append(torch.autograd.grad(out.loss[1], z, retain_graph=True)[0])
    assert out.loss[0].item() == pytest.approx(-1 + math.log(0.25) + 10)
    assert out.metrics["clamped"].tolist() == [1.0, 0.0]
    assert torch.equal(*slopes)
    assert torch.autograd.grad(out.loss[0], z)[0].isfinite().all()


def test_the_floor_acts_on_sampled_tokens_and_counts_them():
    target = SampledTarget(teacher_logp=torch.tensor([-math.inf, -3.0]).double())
    out = policy(teacher_logp_floor=-10.0).per_token(FLOOR_STUDENT.expand(2, -1), target, torch.tensor([2, 1]))
    assert out.loss.tolist() == pytest.approx([math.log(0.25) + 10, math.log(0.25) + 3])
    assert out.metrics["clamped"].tolist() == [1.0, 0.0]


def test_the_floor_acts_inside_a_top_k_and_on_the_sampled_tail():
    target = DenseTarget(logits=FLOOR_TEACHER)
    head = Objective(support="student_top_k", top_k=3, tail="generalized", teacher_logp_floor=-10.0)
    out = head.per_token(FLOOR_STUDENT, target, torch.tensor([0]))
    assert out.metrics["clamped"].item() == pytest.approx(0.25)
    assert out.loss.isfinite().all()
    tail = Objective(support="teacher_top_k", top_k=2, tail="sampled", teacher_logp_floor=-10.0)
    out = tail.per_token(FLOOR_STUDENT, target, torch.tensor([2]))
    assert out.metrics["clamped"].item() == 1.0
    outside = (0.25 * (math.log(0.25) + 10) - 0.25 + math.exp(-10)) / 0.25
    inside = 0.5 * math.log(0.5 / 0.75) - 0.75 + 1
    assert out.loss.item() == pytest.approx(outside + inside)


def test_the_floor_acts_on_the_baseline():
    objective = policy(baseline="value", teacher_logp_floor=-10.0)
    out = objective.per_token(FLOOR_STUDENT, DenseTarget(logits=FLOOR_TEACHER), torch.tensor([0]))
    kl = 0.5 * math.log(0.5 / 0.75) + 0.25 * (math.log(0.25) + 10)
    assert out.loss.item() == pytest.approx(math.log(0.5 / 0.75) - kl)


# --- diagnostics ------------------------------------------------------------------------------------------------------


def test_logits_allow_every_diagnostic():
    metrics = (
        Objective(support="teacher_top_k", top_k=4).per_token(STUDENT.clone().requires_grad_(), DENSE, IDS).metrics
    )
    student = to_logp(STUDENT)
    same(metrics["reverse_kl"], reverse_kl(student, TEACHER))
    same(metrics["forward_kl"], forward_kl(student, TEACHER))
    same(metrics["student_entropy"], entropy(student))
    same(metrics["teacher_entropy"], entropy(TEACHER))
    same(metrics["student_logp"], gather_logp(student, IDS))
    same(metrics["teacher_logp"], gather_logp(TEACHER, IDS))
    mine, theirs = student.topk(4).indices.tolist(), TEACHER.topk(4).indices.tolist()
    assert metrics["overlap"].tolist() == [len(set(a) & set(b)) / 4 for a, b in zip(mine, theirs, strict=True)]
    assert not any(value.requires_grad for value in metrics.values())
    assert all(value.shape == (TOKENS,) for value in metrics.values())


@pytest.mark.parametrize(("vocab", "k"), [(200, 16), (20, 5), (3, 1)])
def test_overlap_looks_at_no_more_than_16_tokens_nor_a_quarter_of_the_vocabulary(vocab, k):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, vocab, generator=generator) for _ in range(2))
    metrics = (
        Objective(support="union", top_k=64)
        .per_token(student, DenseTarget(logits=teacher), IDS.clamp(max=vocab - 1))
        .metrics
    )
    mine, theirs = student.topk(k).indices.tolist(), teacher.topk(k).indices.tolist()
    wanted = [len(set(a) & set(b)) / k for a, b in zip(mine, theirs, strict=True)]
    assert metrics["overlap"].tolist() == pytest.approx(wanted)


def test_a_top_k_allows_the_coarse_kls_and_the_overlap():
    metrics = (
        Objective(support="teacher_top_k", top_k=5, tail="generalized").per_token(STUDENT, top_k_target(5), IDS).metrics
    )
    support = top_k_support(TEACHER, 5)
    on_k = support.gather(to_logp(STUDENT)), support.gather(TEACHER)
    same(metrics["reverse_kl"], partial_divergence("reverse_kl", *on_k))
    same(metrics["forward_kl"], partial_divergence("forward_kl", *on_k))
    mine, theirs = to_logp(STUDENT).topk(5).indices.tolist(), support.ids.tolist()
    wanted = [len(set(a) & set(b)) / 5 for a, b in zip(mine, theirs, strict=True)]
    assert metrics["overlap"].tolist() == pytest.approx(wanted)
    same(metrics["support_mass"], on_k[0].exp().sum(-1))
    same(metrics["teacher_support_mass"], on_k[1].exp().sum(-1))
    assert "teacher_entropy" not in metrics


def test_a_sampled_token_allows_its_two_log_probs():
    metrics = policy().per_token(STUDENT, sampled_target(), IDS).metrics
    assert set(metrics) == {"student_entropy", "student_logp", "teacher_logp", "clamped"}
    same(metrics["teacher_logp"], gather_logp(TEACHER, IDS))


def test_diagnostics_are_at_temperature_1_whatever_the_loss():
    metrics = Objective(student_temperature=3.0, teacher_temperature=0.5).per_token(STUDENT, DENSE, IDS).metrics
    same(metrics["reverse_kl"], reverse_kl(to_logp(STUDENT), TEACHER))


ALL_OBJECTIVES = [
    *[Objective(divergence=name) for name in FULL_NAMES],
    *[
        Objective(divergence=name, support=support, tail=tail, top_k=3)
        for name in PARTIAL_NAMES
        for support in ("teacher_top_k", "student_top_k", "union")
        for tail in ("bucket", "generalized", "renormalize", "sampled")
    ],
    Objective(support="sampled", estimator="k2"),
    Objective(support="sampled", estimator="k3", divergence="forward_kl"),
    policy(),
    policy(baseline="value"),
    policy(discount=1.0),
]


@pytest.mark.parametrize("objective", ALL_OBJECTIVES, ids=str)
def test_teacher_equal_to_student_costs_exactly_nothing(objective):
    out = objective.per_token(STUDENT.float(), DenseTarget(logits=STUDENT.float()), IDS, sequence_index=SEQUENCES)
    assert (out.loss == 0).all()
    assert (out.metrics["reverse_kl"] == 0).all()
    assert (out.metrics["overlap"] == 1).all()


@pytest.mark.parametrize("objective", ALL_OBJECTIVES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype_trains_with_finite_gradients_and_no_tokens_is_no_loss(objective, dtype):
    leaf = STUDENT.to(dtype).requires_grad_()
    out = objective.per_token(leaf, DenseTarget(logits=TEACHER_LOGITS.to(dtype)), IDS, sequence_index=SEQUENCES)
    slope = torch.autograd.grad(out.loss.sum(), leaf)[0]
    assert out.loss.dtype == torch.float32
    assert slope.dtype == dtype
    assert slope.isfinite().all()
    assert slope.norm() > 0
    nothing = objective.per_token(
        leaf[:0], DenseTarget(logits=TEACHER_LOGITS[:0]), IDS[:0], sequence_index=SEQUENCES[:0]
    )
    assert nothing.loss.tolist() == []


def test_a_bare_tensor_is_no_target():
    with pytest.raises(ObjectiveError, match=r"the target is a Tensor; wrap what the teacher says"):
        Objective().per_token(STUDENT, STUDENT, IDS)  # pyright: ignore[reportArgumentType]
