import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracles import (
    PARTIAL_NAMES,
    brute_force,
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
    SampledToken,
    full_divergence,
    gather_logp,
    likeliest,
    mass_coefficient,
    partial_divergence,
    support_of,
    tail_logp,
    to_logp,
    top_k_support,
    union_support,
)

V = 50
LN = math.log
TAILS = ("bucket", "generalized", "renormalize")


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


# --- numbers a pencil can check: p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), K = the first two -------------------------

P_ON_K, Q_ON_K = logs([0.5, 0.25]), logs([0.25, 0.25])


def test_bucket_adds_the_two_tails_as_one_entry():
    assert partial_divergence("reverse_kl", P_ON_K, Q_ON_K).item() == pytest.approx(0.5 * LN(2) + 0.25 * LN(1 / 2))
    assert partial_divergence("forward_kl", P_ON_K, Q_ON_K).item() == pytest.approx(0.25 * LN(1 / 2) + 0.5 * LN(2))
    assert partial_divergence("total_variation", P_ON_K, Q_ON_K).item() == pytest.approx(0.25)


def test_generalized_adds_the_difference_of_mass():
    reverse = partial_divergence("reverse_kl", P_ON_K, Q_ON_K, tail="generalized").item()
    assert reverse == pytest.approx(0.5 * LN(2) - 0.75 + 0.5)
    forward = partial_divergence("forward_kl", P_ON_K, Q_ON_K, tail="generalized").item()
    assert forward == pytest.approx(0.25 * LN(1 / 2) + 0.75 - 0.5)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("tail", TAILS)
def test_both_kls_in_one_are_their_weighted_sum_with_every_tail(tail, alpha):
    both = partial_divergence("forward_reverse_kl", P_ON_K, Q_ON_K, tail=tail, alpha=alpha).item()
    forward, reverse = (
        partial_divergence(name, P_ON_K, Q_ON_K, tail=tail).item() for name in ("forward_kl", "reverse_kl")
    )
    assert both == pytest.approx(alpha * forward + (1 - alpha) * reverse, abs=1e-12)


def test_renormalize_compares_the_conditional_distributions():
    # (2/3, 1/3) against (1/2, 1/2)
    value = partial_divergence("reverse_kl", P_ON_K, Q_ON_K, tail="renormalize").item()
    assert value == pytest.approx(2 / 3 * LN(4 / 3) + 1 / 3 * LN(2 / 3))


def test_sampled_adds_the_drawn_entry_over_its_probability_only_outside_the_support():
    outside = SampledToken(student_logp=logs(0.25), teacher_logp=logs(0.5), in_support=torch.tensor([False]))
    value = partial_divergence("reverse_kl", P_ON_K, Q_ON_K, tail="sampled", sampled=outside).item()
    head = 0.5 * LN(2) - 0.75 + 0.5
    assert value == pytest.approx(head + (0.25 * LN(1 / 2) - 0.25 + 0.5) / 0.25)
    inside = SampledToken(student_logp=logs(0.25), teacher_logp=logs(0.25), in_support=torch.tensor([True]))
    assert partial_divergence("reverse_kl", P_ON_K, Q_ON_K, tail="sampled", sampled=inside).item() == pytest.approx(
        head
    )


def test_sampled_divides_by_the_probability_under_which_the_token_was_drawn():
    drawn_elsewhere = SampledToken(
        student_logp=logs(0.25), teacher_logp=logs(0.5), in_support=torch.tensor([False]), sampler_logp=logs(0.125)
    )
    value = partial_divergence("reverse_kl", P_ON_K, Q_ON_K, tail="sampled", sampled=drawn_elsewhere).item()
    assert value == pytest.approx(0.5 * LN(2) - 0.25 + 8 * (0.25 * LN(1 / 2) + 0.25))


# --- the support ------------------------------------------------------------------------------------------------------


def test_top_k_takes_the_likeliest_and_adds_the_demanded_without_counting_twice():
    support = top_k_support(logs([0.1, 0.4, 0.3, 0.2]), 2, always_include=(2, 0, 0))
    counted = sorted(support.ids[support.counted].tolist())
    assert counted == [0, 1, 2]
    assert support.gather(logs([0.1, 0.4, 0.3, 0.2])).exp().sum().item() == pytest.approx(0.8)


def test_union_counts_a_shared_token_once():
    student, teacher = logs([0.6, 0.3, 0.1, 0.0]), logs([0.1, 0.6, 0.3, 0.0])
    support = union_support(student, teacher, 2, always_include=(1,))
    assert sorted(support.ids[support.counted].tolist()) == [0, 1, 2]
    assert support.gather(student).exp().sum().item() == pytest.approx(1.0)


def test_union_adds_the_demanded_where_neither_model_would():
    student, teacher = logs([0.6, 0.3, 0.1, 0.0]), logs([0.5, 0.4, 0.0, 0.1])
    support = union_support(student, teacher, 2, always_include=(3, 2))
    assert sorted(support.ids[support.counted].tolist()) == [0, 1, 2, 3]
    assert sorted(union_support(student, teacher, 1, always_include=(2,)).ids.unique().tolist()) == [0, 2]


@pytest.mark.parametrize(("vocab", "k"), [(131, 1), (257, 2), (50_257, 16), (151_937, 16)])
def test_the_likeliest_are_found_in_the_last_columns_of_a_vocabulary_too(vocab, k):
    """50 257 is 17 more than a multiple of 32, and the last of them ends a text."""
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(3, vocab, generator=generator)
    logp[0, -k:] += 100.0
    logp[1, vocab - 1] += 100.0
    values, ids = likeliest(logp, k)
    assert sorted(ids[0].tolist()) == list(range(vocab - k, vocab))
    assert ids[1, 0] == vocab - 1
    plain = logp.topk(k, dim=-1)
    assert torch.equal(values, plain.values) and torch.equal(ids, plain.indices)


def test_repeated_ids_change_no_loss():
    student, teacher = to_logp(random_logits(3, 9, seed=1)), to_logp(random_logits(3, 9, seed=2))
    once = support_of(torch.tensor([[0, 1, 2], [3, 4, 5], [8, 7, 6]]))
    twice = support_of(torch.tensor([[0, 1, 0, 2, 2], [4, 3, 5, 3, 5], [6, 6, 7, 8, 8]]))
    for name in PARTIAL_NAMES:
        for tail in TAILS:
            a = partial_divergence(name, once.gather(student), once.gather(teacher), tail=tail)
            b = partial_divergence(name, twice.gather(student), twice.gather(teacher), tail=tail)
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_contains_says_whether_the_response_token_is_in_the_support():
    support = support_of(torch.tensor([[3, 1, 3], [0, 2, 5]]))
    assert support.contains(torch.tensor([3, 1])).tolist() == [True, False]


def test_k_beyond_the_vocabulary_is_the_vocabulary():
    assert sorted(top_k_support(logs([0.2, 0.8]), 64).ids[0].tolist()) == [0, 1]


def test_gather_reads_one_or_k_tokens_per_position():
    table = torch.arange(6.0).reshape(2, 3)
    assert gather_logp(table, torch.tensor([2, 0])).tolist() == [2.0, 3.0]
    assert gather_logp(table, torch.tensor([[2, 1], [0, 0]])).tolist() == [[2.0, 1.0], [3.0, 3.0]]


def test_the_choice_of_support_has_no_gradient():
    logits = random_logits(2, 9, seed=3).requires_grad_()
    assert not top_k_support(to_logp(logits), 3).ids.requires_grad


# --- bucket -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTIAL_NAMES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_bucket_is_a_lower_bound_that_grows_with_k_to_the_exact_value(name, beta, normalize):
    student, teacher = to_logp(random_logits(5, V, seed=21)), to_logp(random_logits(5, V, seed=22))
    exact = full_divergence(name, student, teacher, beta=beta, normalize=normalize)
    previous = torch.zeros(5, dtype=torch.float64)
    for k in range(1, V + 1):
        support = top_k_support(teacher, k)
        on_k = support.gather(student), support.gather(teacher)
        value = partial_divergence(name, *on_k, beta=beta, normalize=normalize)
        assert (value >= previous - 1e-12).all()
        assert (value <= exact + 1e-12).all()
        previous = value
    torch.testing.assert_close(previous, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PARTIAL_NAMES)
@pytest.mark.parametrize("beta", [0.2, 0.8])
def test_bucket_equals_the_definition_on_the_coarsened_distributions(name, beta):
    student, teacher = to_logp(random_logits(1, V, seed=23)), to_logp(random_logits(1, V, seed=24))
    support = top_k_support(student, 5)
    p, q = support.gather(student).exp()[0].tolist(), support.gather(teacher).exp()[0].tolist()
    wanted = brute_force(name, [*p, 1 - sum(p)], [*q, 1 - sum(q)], beta=beta)
    value = partial_divergence(name, support.gather(student), support.gather(teacher), beta=beta).item()
    assert value == pytest.approx(wanted, rel=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tail_that_rounds_to_nothing_is_finite_and_the_same_for_both(dtype):
    eps = torch.finfo(dtype).eps
    whole = torch.tensor([[1.0, 0.0], [1.0 + eps, 0.0], [1.0 - eps / 2, 0.0]], dtype=dtype).log()
    assert tail_logp(whole).tolist() == pytest.approx([LN(eps)] * 3, rel=1e-6)
    leaky = torch.tensor([[0.75, 0.0]], dtype=dtype).log()
    value = partial_divergence("reverse_kl", leaky, whole[:1])
    assert value.item() == pytest.approx(0.75 * LN(0.75) + 0.25 * (LN(0.25) - LN(eps)), rel=1e-5)


def test_the_floor_of_the_tail_leaves_finite_gradients():
    leaf = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(tail_logp(leaf).sum(), leaf)[0]
    assert (slope == 0).all()


# --- all tails --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTIAL_NAMES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_is_zero_with_zero_gradient_when_student_equals_teacher(name, tail, beta):
    logits = random_logits(4, V, seed=25)
    support = top_k_support(to_logp(logits), 6)

    def loss(student_logits):
        student = to_logp(student_logits)
        return partial_divergence(name, support.gather(student), support.gather(to_logp(logits)), tail=tail, beta=beta)

    assert (loss(logits) == 0).all()
    assert gradient(loss, logits).abs().max() < 1e-14


@settings(max_examples=50, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    scale=st.floats(0.01, 15),
    beta=st.floats(0.001, 0.999),
    k=st.integers(2, 20),
)
def test_no_tail_form_is_ever_negative(seeds, scale, beta, k):
    student, teacher = (to_logp(random_logits(3, 20, seed=seed, scale=scale)) for seed in seeds)
    support = top_k_support(teacher, k)
    for name in PARTIAL_NAMES:
        for tail in TAILS:
            value = partial_divergence(name, support.gather(student), support.gather(teacher), tail=tail, beta=beta)
            assert value.min() >= -1e-11


@settings(max_examples=80, deadline=None)
@given(logp=st.floats(-30, 0), logq=st.floats(-30, 0), beta=st.sampled_from([0.0, 1.0]) | st.floats(1e-6, 1 - 1e-6))
def test_every_generalized_entry_is_non_negative_by_itself(logp, logq, beta):
    p, q = (torch.tensor([[value]], dtype=torch.float64) for value in (logp, logq))
    for name in PARTIAL_NAMES:
        for normalize in (True, False):
            value = partial_divergence(name, p, q, tail="generalized", beta=beta, normalize=normalize)
            assert value.item() >= -1e-13


@pytest.mark.parametrize("name", PARTIAL_NAMES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("beta", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("normalize", [True, False])
def test_every_form_is_exact_on_the_whole_vocabulary(name, tail, beta, normalize):
    student, teacher = to_logp(random_logits(3, 12, seed=27)), to_logp(random_logits(3, 12, seed=28))
    exact = full_divergence(name, student, teacher, beta=beta, normalize=normalize)
    value = partial_divergence(name, student, teacher, tail=tail, beta=beta, normalize=normalize)
    torch.testing.assert_close(value, exact, rtol=0, atol=1e-13)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", PARTIAL_NAMES)
def test_partial_gradient_equals_finite_differences(tail, name):
    student, teacher = random_logits(2, 8, seed=29).requires_grad_(), to_logp(random_logits(2, 8, seed=30))
    support = top_k_support(teacher, 3, always_include=(0, 5))
    assert torch.autograd.gradcheck(
        lambda s: partial_divergence(name, support.gather(to_logp(s)), support.gather(teacher), tail=tail, beta=0.3),
        (student,),
    )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("vocab", [2, 17, 1000])
def test_partial_forms_take_any_dtype_and_shape(tail, dtype, tokens, vocab):
    student, teacher = (
        random_logits(tokens, vocab, seed=1, dtype=dtype),
        random_logits(tokens, vocab, seed=2, dtype=dtype),
    )
    for name in PARTIAL_NAMES:
        values = []
        for s, t in ((to_logp(student), to_logp(teacher)), (to_logp(student.double()), to_logp(teacher.double()))):
            support = top_k_support(t, 7)
            values.append(partial_divergence(name, support.gather(s), support.gather(t), tail=tail).double())
        torch.testing.assert_close(values[0], values[1], rtol=3e-6, atol=3e-6)


def test_entries_that_cannot_occur_on_either_side_leave_gradients_finite():
    student = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    teacher = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]], dtype=torch.float64)
    support = support_of(torch.tensor([[1, 2, 3, 3]]))
    for name in PARTIAL_NAMES:
        for tail in TAILS:

            def loss(s, name=name, tail=tail):
                return partial_divergence(name, support.gather(to_logp(s)), support.gather(to_logp(teacher)), tail=tail)

            assert not loss(student).isnan().any()
            assert gradient(loss, student).isfinite().all()


def test_a_student_with_no_mass_on_the_support_is_not_nan():
    nowhere, somewhere = torch.full((1, 2), -torch.inf), torch.tensor([[0.5, 0.25]]).log()
    assert partial_divergence("forward_kl", nowhere, somewhere, tail="renormalize").item() == math.inf
    assert partial_divergence("reverse_kl", nowhere, somewhere, tail="renormalize").item() == 0
    for name in PARTIAL_NAMES:
        slope = gradient(lambda p, n=name: partial_divergence(n, p, somewhere, tail="renormalize"), nowhere)
        assert slope.isfinite().all()


# --- the sampled tail -------------------------------------------------------------------------------------------------


def sampled_tail_loss(name, teacher, support, beta=0.3, normalize=True, sampler=None):
    def loss(logp, drawn):
        rows = logp.shape[0]
        ids = support.ids.expand(rows, -1)
        here = support_of(ids)
        token = SampledToken(
            student_logp=gather_logp(logp, drawn),
            teacher_logp=teacher[0, drawn],
            in_support=here.contains(drawn),
            sampler_logp=None if sampler is None else sampler[0, drawn],
        )
        return partial_divergence(
            name,
            here.gather(logp),
            here.gather(teacher.expand(rows, -1)),
            tail="sampled",
            beta=beta,
            normalize=normalize,
            sampled=token,
        )

    return loss


@pytest.mark.parametrize("name", PARTIAL_NAMES)
@pytest.mark.parametrize("k", [1, 8, 49])
@pytest.mark.parametrize(("beta", "normalize"), [(0.0, True), (0.3, True), (0.3, False), (1.0, True)])
def test_sampled_tail_is_unbiased_in_value_and_gradient(name, k, beta, normalize):
    logits, teacher = random_logits(1, V, seed=31), to_logp(random_logits(1, V, seed=32))
    loss = sampled_tail_loss(name, teacher, top_k_support(teacher, k), beta, normalize)
    per_draw, probability = sampled_gradients(loss, logits[0])
    values = loss(to_logp(logits).expand(V, V), torch.arange(V))
    exact = full_divergence(name, to_logp(logits), teacher, beta=beta, normalize=normalize)
    assert (probability * values).sum().item() == pytest.approx(exact.item(), rel=1e-12, abs=1e-14)
    exact_slope = gradient(lambda s: full_divergence(name, to_logp(s), teacher, beta=beta, normalize=normalize), logits)
    if exact_slope.norm() > 0:
        assert relative_error(expected(per_draw, probability), exact_slope[0]) < 1e-12


def test_sampled_tail_is_unbiased_for_tokens_drawn_from_an_older_student():
    logits, teacher = random_logits(1, V, seed=31), to_logp(random_logits(1, V, seed=32))
    sampler = to_logp(random_logits(1, V, seed=33))
    loss = sampled_tail_loss("reverse_kl", teacher, top_k_support(teacher, 8), sampler=sampler)
    per_draw, _ = sampled_gradients(loss, logits[0])
    exact_slope = gradient(lambda s: full_divergence("reverse_kl", to_logp(s), teacher), logits)[0]
    assert relative_error(expected(per_draw, sampler[0].exp()), exact_slope) < 1e-12


def test_sampled_tail_has_less_variance_the_more_it_knows_and_none_at_equality():
    logits, teacher = tail_problem()
    variances = [
        total_variance(
            *sampled_gradients(sampled_tail_loss("reverse_kl", teacher, top_k_support(teacher, k)), logits[0])
        )
        for k in (1, 8, 24, 49)
    ]
    assert variances[0] > 2 * variances[1] > 4 * variances[2] > 8 * variances[3]
    same = to_logp(logits)
    loss = sampled_tail_loss("reverse_kl", same, top_k_support(same, 4))
    assert total_variance(*sampled_gradients(loss, logits[0])) < 1e-28


def test_a_very_unlikely_sampled_token_does_not_overflow():
    on_k = torch.tensor([[1.0]]).log()
    token = SampledToken(
        student_logp=torch.tensor([-150.0]), teacher_logp=torch.tensor([-151.0]), in_support=torch.tensor([False])
    )
    value = partial_divergence("reverse_kl", on_k, on_k, tail="sampled", sampled=token)
    assert value.item() == pytest.approx(1 - 1 + math.exp(-1), rel=1e-5)


def test_a_sampled_token_that_the_student_cannot_emit_is_not_nan():
    on_k = torch.tensor([[0.5]]).log()
    token = SampledToken(
        student_logp=torch.tensor([-math.inf]),
        teacher_logp=torch.tensor([0.25]).log(),
        in_support=torch.tensor([False]),
    )
    value = partial_divergence("reverse_kl", on_k, on_k, tail="sampled", sampled=token)
    assert value.item() == pytest.approx(0.25)  # 0 log 0 − 0 + q


# --- training with each form ------------------------------------------------------------------------------------------


def reverse_kl_at_the_end(loss, steps=1200, draws=0):
    """Reverse KL to the teacher before and after minimising `loss` over free logits."""
    logits, teacher = tail_problem()
    logits.requires_grad_()
    start = full_divergence("reverse_kl", to_logp(logits), teacher).item()
    support = top_k_support(teacher, 8)
    optimizer = torch.optim.Adam([logits], lr=0.03)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        student = to_logp(logits)
        optimizer.zero_grad()
        if draws:
            drawn = torch.multinomial(student.detach().exp()[0], draws, replacement=True, generator=generator)
            value = loss(student.expand(draws, -1), drawn).mean()
        else:
            value = loss(support.gather(student), support.gather(teacher)).sum()
        value.backward()
        optimizer.step()
        rate.step()
    return start, full_divergence("reverse_kl", to_logp(logits), teacher).item()


@pytest.mark.parametrize("tail", ["bucket", "generalized"])
def test_training_on_a_top_8_converges_to_the_teacher(tail):
    start, end = reverse_kl_at_the_end(lambda s, t: partial_divergence("reverse_kl", s, t, tail=tail))
    assert start == pytest.approx(0.45, abs=0.05)
    assert end < 0.05


def test_training_with_a_sampled_tail_converges_to_the_teacher():
    _, teacher = tail_problem()
    loss = sampled_tail_loss("reverse_kl", teacher, top_k_support(teacher, 8))
    start, end = reverse_kl_at_the_end(loss, draws=64)
    assert start == pytest.approx(0.45, abs=0.05)
    assert end < 0.05


def test_training_while_ignoring_the_tail_ends_worse_than_it_started():
    start, end = reverse_kl_at_the_end(lambda s, t: (s.exp() * (s - t)).sum(-1))
    assert end > start


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_renormalising_a_single_entry_is_refused():
    with pytest.raises(ObjectiveError, match="identically 0"):
        partial_divergence("reverse_kl", P_ON_K[:, :1], Q_ON_K[:, :1], tail="renormalize")


def test_a_sampled_tail_without_the_sampled_token_is_refused():
    with pytest.raises(ObjectiveError, match="pass `sampled`"):
        partial_divergence("reverse_kl", P_ON_K, Q_ON_K, tail="sampled")


def test_alpha_beta_on_a_partial_support_is_refused():
    with pytest.raises(ObjectiveError, match="part of a vocabulary"):
        partial_divergence("alpha_beta_divergence", P_ON_K, Q_ON_K)
    with pytest.raises(ObjectiveError, match="part of a vocabulary"):
        mass_coefficient("alpha_beta_divergence")


def test_an_unknown_tail_is_refused():
    with pytest.raises(ObjectiveError, match="bucket, generalized"):
        partial_divergence("reverse_kl", P_ON_K, Q_ON_K, tail="ignore")


@pytest.mark.parametrize(("k", "always"), [(0, ()), (-1, ()), (2, (3,)), (2, (-1,))])
def test_an_impossible_support_is_refused(k, always):
    with pytest.raises(ObjectiveError, match=r"top_k|always_include"):
        top_k_support(logs([0.5, 0.25, 0.25]), k, always)
