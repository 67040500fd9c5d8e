import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_oracles import FULL_NAMES, brute_force, gradient, random_logits

from opd.errors import ObjectiveError
from opd.losses import (
    alpha_beta_divergence,
    entropy,
    forward_kl,
    forward_reverse_kl,
    full_divergence,
    generalized_jsd,
    log_mixture_ratio,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    to_logp,
    total_variation,
)

P, Q = [0.5, 0.5], [0.25, 0.75]  # student, teacher
LN = math.log


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


# --- numbers a pencil can check ---------------------------------------------------------------------------------------


def test_forward_kl_of_a_fair_coin_from_a_quarter_coin():
    assert forward_kl(logs(P), logs(Q)).item() == pytest.approx(0.25 * LN(1 / 2) + 0.75 * LN(3 / 2), abs=1e-15)


def test_reverse_kl_of_a_fair_coin_from_a_quarter_coin():
    assert reverse_kl(logs(P), logs(Q)).item() == pytest.approx(0.5 * LN(4 / 3), abs=1e-15)


def test_total_variation_is_the_mass_that_has_to_move():
    assert total_variation(logs(P), logs(Q)).item() == pytest.approx(0.25, abs=1e-15)


def test_half_half_alpha_beta_is_four_times_the_missing_bhattacharyya_overlap():
    overlap = math.sqrt(0.5 * 0.25) + math.sqrt(0.5 * 0.75)
    assert alpha_beta_divergence(logs(P), logs(Q)).item() == pytest.approx(4 * (1 - overlap), abs=1e-14)


def test_one_one_alpha_beta_is_half_the_squared_distance():
    assert alpha_beta_divergence(logs(P), logs(Q), 1.0, 1.0).item() == pytest.approx(1 / 16, abs=1e-15)


def test_skewed_kls_against_the_mixture_by_hand():
    # beta = 1/4: M = (7/16, 9/16)
    student_to_m = 0.5 * LN(8 / 7) + 0.5 * LN(8 / 9)
    teacher_to_m = 0.25 * LN(4 / 7) + 0.75 * LN(4 / 3)
    assert skew_reverse_kl(logs(P), logs(Q), 0.25).item() == pytest.approx(student_to_m, abs=1e-15)
    assert skew_forward_kl(logs(P), logs(Q), 0.25).item() == pytest.approx(teacher_to_m, abs=1e-15)
    published = generalized_jsd(logs(P), logs(Q), 0.25, normalize=False).item()
    assert published == pytest.approx(0.25 * teacher_to_m + 0.75 * student_to_m, abs=1e-15)
    normalised = generalized_jsd(logs(P), logs(Q), 0.25).item()
    assert normalised == pytest.approx(teacher_to_m / 0.75 + student_to_m / 0.25, abs=1e-14)


def test_a_quarter_of_forward_and_the_rest_of_reverse_kl_by_hand():
    forward, reverse = 0.25 * LN(1 / 2) + 0.75 * LN(3 / 2), 0.5 * LN(4 / 3)
    wanted = 0.25 * forward + 0.75 * reverse
    assert forward_reverse_kl(logs(P), logs(Q), 0.25).item() == pytest.approx(wanted, abs=1e-15)


def test_forward_and_reverse_kl_are_the_ends_of_their_sum_and_its_middle_is_symmetric():
    s, t = to_logp(random_logits(4, 20, seed=15)), to_logp(random_logits(4, 20, seed=16))
    assert torch.equal(forward_reverse_kl(s, t, 1.0), forward_kl(s, t))
    assert torch.equal(forward_reverse_kl(s, t, 0.0), reverse_kl(s, t))
    torch.testing.assert_close(forward_reverse_kl(s, t), forward_reverse_kl(t, s), rtol=1e-13, atol=0)
    apart = logs([0.5, 0.5]), logs([1.0, 0.0])
    for one, other in (apart, apart[::-1]):
        assert forward_reverse_kl(one, other).item() == math.inf


def test_skewed_kls_reach_the_plain_ones_at_their_ends():
    assert skew_reverse_kl(logs(P), logs(Q), 1.0).item() == reverse_kl(logs(P), logs(Q)).item()
    assert skew_reverse_kl(logs(P), logs(Q), 0.0).item() == 0
    assert skew_forward_kl(logs(P), logs(Q), 0.0).item() == forward_kl(logs(P), logs(Q)).item()
    assert skew_forward_kl(logs(P), logs(Q), 1.0).item() == 0


def test_entropy_of_a_fair_coin_is_ln_2_and_of_a_certain_token_is_0():
    assert entropy(logs([0.5, 0.5], [1.0, 0.0])).tolist() == [pytest.approx(LN(2)), 0.0]


def test_temperature_divides_the_logits():
    assert to_logp(torch.tensor([0.0, 2 * LN(3)]), 2.0).exp().tolist() == pytest.approx([0.25, 0.75])


# --- zeros ------------------------------------------------------------------------------------------------------------


def test_a_certain_student_under_a_fair_teacher():
    certain, fair = logs([1.0, 0.0]), logs([0.5, 0.5])
    assert reverse_kl(certain, fair).item() == pytest.approx(LN(2))
    assert forward_kl(certain, fair).item() == math.inf
    assert total_variation(certain, fair).item() == 0.5
    wanted = 2 * (0.5 * LN(2 / 3) + 0.5 * LN(2)) + 2 * LN(4 / 3)
    assert generalized_jsd(certain, fair).item() == pytest.approx(wanted, abs=1e-14)
    assert skew_forward_kl(certain, fair, 0.5).item() == pytest.approx(0.5 * LN(2 / 3) + 0.5 * LN(2), abs=1e-14)
    assert alpha_beta_divergence(certain, fair).item() == pytest.approx(4 * (1 - math.sqrt(0.5)), abs=1e-14)


def test_a_fair_student_under_a_certain_teacher():
    fair, certain = logs([0.5, 0.5]), logs([1.0, 0.0])
    assert reverse_kl(fair, certain).item() == math.inf
    assert forward_kl(fair, certain).item() == pytest.approx(LN(2))
    assert alpha_beta_divergence(fair, certain, 0.0, 1.0).item() == math.inf
    wanted = 0.5 * LN(2 / 3) + 0.5 * LN(2)  # M = (3/4, 1/4)
    assert skew_reverse_kl(fair, certain, 0.5).item() == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("name", FULL_NAMES)
@pytest.mark.parametrize("beta", [0.3, 0.7])
def test_tokens_that_neither_can_emit_change_nothing(name, beta):
    student, teacher = random_logits(3, 7, seed=1), random_logits(3, 7, seed=2)
    padding = torch.full((3, 4), -torch.inf, dtype=torch.float64)

    def loss(s, t):
        return full_divergence(name, to_logp(s), to_logp(t), beta=beta, alpha=0.4)

    wide_s, wide_t = torch.cat([student, padding], -1), torch.cat([teacher, padding], -1)
    torch.testing.assert_close(loss(wide_s, wide_t), loss(student, teacher), rtol=0, atol=1e-15)
    narrow = gradient(lambda s: loss(s, teacher), student)
    wide = gradient(lambda s: loss(s, wide_t), wide_s)
    torch.testing.assert_close(wide[:, :7], narrow, rtol=0, atol=1e-15)
    assert (wide[:, 7:] == 0).all()


@pytest.mark.parametrize("name", FULL_NAMES)
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_never_nan_however_far_apart_the_two_are(name, beta, dtype):
    far = torch.tensor([[0.0, -200.0, -torch.inf, 1.0, -60.5], [0.0, 0.0, -torch.inf, -3e4, 80.0]], dtype=dtype)
    other = torch.tensor([[-300.0, 0.0, 1.0, -torch.inf, 3.0], [-torch.inf, 0.0, -torch.inf, 3e4, 2.0]], dtype=dtype)
    for student, teacher in ((far, other), (other, far)):
        value = full_divergence(name, to_logp(student), to_logp(teacher), beta=beta, alpha=0.6)
        assert not value.isnan().any()
        slope = gradient(
            lambda s, t=teacher: full_divergence(name, to_logp(s), to_logp(t), beta=beta, alpha=0.6), student
        )
        assert slope.isfinite().all()


def test_an_infinite_entry_has_no_gradient_and_leaves_that_of_the_others_alone():
    leaf = logs(P).requires_grad_()
    loss = reverse_kl(leaf, logs([1.0, 0.0]))
    assert loss.item() == math.inf
    assert torch.autograd.grad(loss.sum(), leaf)[0].tolist() == [[pytest.approx(0.5 * (LN(0.5) + 1)), 0.0]]


def test_a_nan_logit_is_not_hidden():
    broken = torch.tensor([[0.0, math.nan, 1.0]])
    for name in FULL_NAMES:
        assert full_divergence(name, to_logp(broken), to_logp(torch.zeros(1, 3))).isnan().all()
        assert full_divergence(name, to_logp(torch.zeros(1, 3)), to_logp(broken)).isnan().all()


# --- every divergence -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL_NAMES)
@pytest.mark.parametrize("beta", [0.05, 0.5, 0.8])
@pytest.mark.parametrize("normalize", [True, False])
def test_equals_the_definition_summed_by_hand(name, beta, normalize):
    student, teacher = random_logits(6, 17, seed=3, scale=3.0), random_logits(6, 17, seed=4, scale=3.0)
    teacher[:, 0] = (
        -torch.inf if name in ("forward_kl", "skew_forward_kl", "skew_reverse_kl", "generalized_jsd") else 0.0
    )
    student[:, 1] = -torch.inf if name not in ("forward_kl", "forward_reverse_kl") else 0.0
    actual = full_divergence(name, to_logp(student), to_logp(teacher), alpha=0.3, beta=beta, normalize=normalize)
    p, q = student.softmax(-1).tolist(), teacher.softmax(-1).tolist()
    wanted = [brute_force(name, a, b, alpha=0.3, beta=beta, normalize=normalize) for a, b in zip(p, q, strict=True)]
    assert actual.tolist() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("name", FULL_NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_is_zero_when_student_equals_teacher(name, dtype, beta):
    logp = to_logp(random_logits(4, 33, seed=5, dtype=dtype, scale=4.0))
    assert (full_divergence(name, logp, logp, alpha=0.5, beta=beta) == 0).all()


@pytest.mark.parametrize("name", FULL_NAMES)
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_gradient_equals_finite_differences(name, beta):
    student = random_logits(2, 6, seed=6).requires_grad_()
    teacher = to_logp(random_logits(2, 6, seed=7))
    assert torch.autograd.gradcheck(
        lambda s: full_divergence(name, to_logp(s, 1.3), teacher, alpha=0.4, beta=beta, normalize=False), (student,)
    )


@pytest.mark.parametrize("name", [n for n in FULL_NAMES if n != "total_variation"])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gradient_vanishes_when_student_equals_teacher(name, beta):
    logits = random_logits(3, 40, seed=8)
    slope = gradient(lambda s: full_divergence(name, to_logp(s), to_logp(logits), beta=beta, alpha=0.3), logits)
    assert slope.abs().max() < 1e-14


@settings(max_examples=60, deadline=None)
@given(
    seeds=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)),
    scale=st.floats(0.01, 20),
    beta=st.floats(0.001, 0.999),
    alpha=st.floats(0.05, 2),
    vocab=st.integers(1, 30),
)
def test_is_never_negative(seeds, scale, beta, alpha, vocab):
    student, teacher = (to_logp(random_logits(3, vocab, seed=seed, scale=scale)) for seed in seeds)
    for name in FULL_NAMES:
        share = alpha / 2 if name == "forward_reverse_kl" else alpha
        assert full_divergence(name, student, teacher, alpha=share, beta=beta).min() >= -1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("vocab", [1, 2, 17, 1000])
@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_any_dtype_and_shape_is_computed_in_at_least_float32(dtype, vocab, tokens):
    student, teacher = (
        random_logits(tokens, vocab, seed=9, dtype=dtype),
        random_logits(tokens, vocab, seed=10, dtype=dtype),
    )
    for name in FULL_NAMES:
        value = full_divergence(name, to_logp(student), to_logp(teacher))
        exact = full_divergence(name, to_logp(student.double()), to_logp(teacher.double()))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(value.double(), exact, rtol=2e-6, atol=2e-6)


def test_leading_axes_are_kept():
    student, teacher = to_logp(random_logits(2, 3, 5, seed=1)), to_logp(random_logits(2, 3, 5, seed=2))
    stacked = reverse_kl(student, teacher)
    assert stacked[1, 2].item() == pytest.approx(reverse_kl(student[1, 2], teacher[1, 2]).item(), abs=1e-15)


def test_a_float64_teacher_is_not_rounded_to_the_students_float32():
    student, teacher = random_logits(3, 9, seed=1, dtype=torch.float32), random_logits(3, 9, seed=2)
    assert reverse_kl(to_logp(student), to_logp(teacher)).dtype == torch.float64


def test_half_precision_log_probs_are_widened():
    half = torch.tensor([[0.5, 0.5]]).log().bfloat16()
    assert reverse_kl(half, half).dtype == torch.float32


# --- generalized Jensen-Shannon ---------------------------------------------------------------------------------------


def slope_norm(loss):
    student, teacher = random_logits(1, 50, seed=31, scale=1.0), to_logp(random_logits(1, 50, seed=32, scale=1.0))
    return float(gradient(lambda s: loss(to_logp(s), teacher), student).norm())


def test_normalised_jsd_tends_to_forward_kl_at_0_and_reverse_kl_at_1():
    assert slope_norm(lambda s, t: generalized_jsd(s, t, 0.001)) == pytest.approx(slope_norm(forward_kl), rel=0.01)
    assert slope_norm(lambda s, t: generalized_jsd(s, t, 0.999)) == pytest.approx(slope_norm(reverse_kl), rel=0.01)
    s, t = to_logp(random_logits(1, 50, seed=11)), to_logp(random_logits(1, 50, seed=12))
    torch.testing.assert_close(generalized_jsd(s, t, 1e-9), forward_kl(s, t), rtol=1e-6, atol=0)
    torch.testing.assert_close(generalized_jsd(s, t, 1 - 1e-9), reverse_kl(s, t), rtol=1e-6, atol=0)
    assert torch.equal(generalized_jsd(s, t, 0.0), forward_kl(s, t))
    assert torch.equal(generalized_jsd(s, t, 1.0), reverse_kl(s, t))


@pytest.mark.filterwarnings("ignore:generalized_jsd")
def test_published_jsd_fades_at_both_ends_where_the_normalised_one_does_not():
    for beta in (0.001, 0.999):
        published = slope_norm(lambda s, t, b=beta: generalized_jsd(s, t, b, normalize=False))
        assert published < 0.002 * slope_norm(lambda s, t, b=beta: generalized_jsd(s, t, b))


@pytest.mark.filterwarnings("ignore:generalized_jsd")
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_published_jsd_equals_the_gkd_definition(beta):
    student, teacher = random_logits(8, 50, seed=13), random_logits(8, 50, seed=14)
    s, t = F.log_softmax(student, -1), F.log_softmax(teacher, -1)

    def divergence_from(target, approximation):  # KL(target ‖ approximation)
        return F.kl_div(approximation, target, reduction="none", log_target=True).sum(-1)

    if beta == 0:
        wanted = divergence_from(t, s)
    elif beta == 1:
        wanted = divergence_from(s, t)
    else:
        m = torch.log(beta * t.exp() + (1 - beta) * s.exp())
        wanted = beta * divergence_from(t, m) + (1 - beta) * divergence_from(s, m)
    torch.testing.assert_close(generalized_jsd(s, t, beta, normalize=False), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(generalized_jsd(s, t, beta, normalize=False), wanted, rtol=1e-11, atol=0)


def test_only_the_published_form_warns_and_only_near_the_ends(recwarn):
    s, t = to_logp(random_logits(1, 5, seed=1)), to_logp(random_logits(1, 5, seed=2))
    for beta in (0.0, 0.01, 0.99, 1.0):
        generalized_jsd(s, t, beta)
    for beta in (0.1, 0.5, 0.9):
        generalized_jsd(s, t, beta, normalize=False)
    assert not recwarn.list
    for beta in (0.09, 0.91):
        with pytest.warns(UserWarning, match="normalize=True"):
            generalized_jsd(s, t, beta, normalize=False)


# --- the mixture's logarithm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1e-6, 0.001, 0.5, 0.999, 1 - 1e-6])
def test_log_mixture_ratio_has_slope_beta_at_equality(beta):
    d = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    value = log_mixture_ratio(d, beta)
    slope = torch.autograd.grad(value.sum(), d)[0]
    assert (value == 0).all()
    assert slope.tolist() == pytest.approx([beta] * 3, rel=1e-9)


@pytest.mark.parametrize("beta", [0.0, 0.001, 0.3, 0.5, 0.7, 0.999, 1.0])
def test_log_mixture_ratio_at_the_edges_of_its_branches(beta):
    ratios = [-math.inf, -1e4, -60.5, -60.0, -59.5, -1.0, 0.0, 1.0, 59.5, 60.0, 60.5, 300.0, 1e4, math.inf]
    actual = log_mixture_ratio(torch.tensor(ratios, dtype=torch.float64), beta)
    assert actual[:1].tolist() == [LN(1 - beta) if beta < 1 else -math.inf]
    assert actual[-1].item() == (math.inf if beta > 0 else 0)
    for d, value in zip(ratios[2:-2], actual[2:-2].tolist(), strict=True):
        assert value == pytest.approx(LN((1 - beta) + beta * math.exp(d)), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("beta", [1e-6, 0.001, 0.3, 0.7, 0.999, 1 - 1e-6])
def test_log_mixture_ratio_keeps_its_digits_in_float32(beta):
    d = torch.linspace(-80, 80, 3001)
    exact = log_mixture_ratio(d.double(), beta)
    error = (log_mixture_ratio(d, beta).double() - exact).abs()
    assert (error <= 4 * torch.finfo(torch.float32).eps * torch.maximum(exact.abs(), beta * d.double().abs())).all()


@pytest.mark.parametrize("beta", [1e-6, 1e-3, 1 - 1e-3, 1 - 1e-6])
@pytest.mark.parametrize("never", [-math.inf, -70.0, -200.0])
def test_a_token_that_one_model_all_but_excludes_keeps_the_digits_of_a_mixture_near_the_ends(beta, never):
    base = torch.tensor([[0.3, 1.0, -0.4, 0.0]], dtype=torch.float64)
    moved = torch.tensor([[0.5, 0.7, -0.1, never]], dtype=torch.float64)
    for student, teacher in ((base, moved), (moved, base)):
        found = []
        for dtype in (torch.float64, torch.float32):
            z = student.to(dtype).requires_grad_()
            loss = generalized_jsd(to_logp(z), to_logp(teacher.to(dtype)), beta)
            found.append((loss.double(), torch.autograd.grad(loss.sum(), z)[0].double()))
        (exact, slope), (value, got) = found
        torch.testing.assert_close(value, exact, rtol=3e-6, atol=0)
        assert (got - slope).norm() <= 3e-6 * slope.norm()


# --- alpha-beta -------------------------------------------------------------------------------------------------------


def test_alpha_beta_of_far_apart_models_is_finite_where_its_powers_add_up_to_more_than_1():
    """e^((α+β) d) leaves float32 where e^d does not: (2, 1) at d = 40."""
    for alpha, beta in ((2.0, 1.0), (1.0, 2.0), (1.5, 1.5)):
        found = []
        for dtype in (torch.float64, torch.float32):
            z = torch.tensor([[0.0, -45.0, -1.0]], dtype=dtype, requires_grad=True)
            teacher = to_logp(torch.tensor([[-45.0, 0.0, -0.5]], dtype=dtype))
            loss = alpha_beta_divergence(to_logp(z), teacher, alpha, beta)
            found.append((loss.double(), torch.autograd.grad(loss.sum(), z)[0].double()))
        (exact, slope), (value, got) = found
        assert value.isfinite().all() and got.isfinite().all()
        torch.testing.assert_close(value, exact, rtol=1e-5, atol=0)
        torch.testing.assert_close(got, slope, rtol=1e-5, atol=1e-7)


def test_alpha_beta_has_the_kls_as_corners_and_as_limits():
    s, t = to_logp(random_logits(4, 20, seed=15)), to_logp(random_logits(4, 20, seed=16))
    torch.testing.assert_close(alpha_beta_divergence(s, t, 1.0, 0.0), forward_kl(s, t), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(alpha_beta_divergence(s, t, 0.0, 1.0), reverse_kl(s, t), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(alpha_beta_divergence(s, t, 1.0, 1e-6), forward_kl(s, t), rtol=1e-5, atol=0)
    torch.testing.assert_close(alpha_beta_divergence(s, t, 1e-6, 1.0), reverse_kl(s, t), rtol=1e-5, atol=0)
    for fixed in (0.4, 1.7):
        for at_zero, near in (((fixed, 0.0), (fixed, 1e-6)), ((0.0, fixed), (1e-6, fixed))):
            limit, close = alpha_beta_divergence(s, t, *at_zero), alpha_beta_divergence(s, t, *near)
            torch.testing.assert_close(close, limit, rtol=1e-4, atol=0)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(-0.1, 1.0), (1.0, -0.1), (0.0, 0.0), (math.nan, 1.0), (1.0, math.inf)])
def test_alpha_beta_refuses_where_it_is_not_a_divergence(alpha, beta):
    with pytest.raises(ObjectiveError, match="alpha ≥ 0"):
        alpha_beta_divergence(logs(P), logs(Q), alpha, beta)


@pytest.mark.parametrize("alpha", [-0.01, 1.01, math.nan])
def test_a_weight_of_forward_kl_outside_0_to_1_is_refused(alpha):
    with pytest.raises(ObjectiveError, match="0 ≤ alpha ≤ 1"):
        forward_reverse_kl(logs(P), logs(Q), alpha)


@pytest.mark.parametrize("loss", [generalized_jsd, skew_reverse_kl, skew_forward_kl])
@pytest.mark.parametrize("beta", [-0.01, 1.01, math.nan])
def test_a_mixture_weight_outside_0_to_1_is_refused(loss, beta):
    with pytest.raises(ObjectiveError, match="0 ≤ beta ≤ 1"):
        loss(logs(P), logs(Q), beta)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(ObjectiveError, match="temperature"):
        to_logp(torch.zeros(1, 2), temperature)
