"""Divergences between the student's p and the teacher's q over one vocabulary, one number per token.

Every function takes log-probabilities, student first, and computes in float32 (float64 when given it). An entry of −inf
contributes exactly 0, forward and backward. Where the true value is +inf the result is +inf; the infinite entry then has
no gradient, so that masking the token removes it cleanly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opd.errors import ObjectiveError
from opd.losses._shapes import Float
from opd.losses.choices import Divergence, check_shape_parameters, warn_if_faded

EXP_RANGE = 60.0  # e^60 ≈ 1e26 and its inverse are normal float32 numbers
FEW_ENTRIES = 1 << 18  # of a tensor that is mended entry by entry sooner than a device says whether it is finite


def to_logp(logits: Float[Tensor, "*tokens vocab"], temperature: float = 1.0) -> Float[Tensor, "*tokens vocab"]:
    """log softmax(logits / temperature), in float32 (float64 stays float64). Logits of −inf are tokens that cannot occur."""
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ObjectiveError(
            f"temperature must be a finite number > 0, not {temperature}; use 1.0 to leave logits as they are."
        )
    logits = _widen(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def forward_kl(
    student_logp: Float[Tensor, "*tokens vocab"], teacher_logp: Float[Tensor, "*tokens vocab"]
) -> Float[Tensor, "*tokens"]:
    """KL(T‖S) = Σ q (log q − log p), in nats. Covers every mode of the teacher."""
    return full_divergence("forward_kl", student_logp, teacher_logp)


def reverse_kl(
    student_logp: Float[Tensor, "*tokens vocab"], teacher_logp: Float[Tensor, "*tokens vocab"]
) -> Float[Tensor, "*tokens"]:
    """KL(S‖T) = Σ p (log p − log q), in nats. Settles on modes of the teacher; +inf where p > 0 = q."""
    return full_divergence("reverse_kl", student_logp, teacher_logp)


def generalized_jsd(
    student_logp: Float[Tensor, "*tokens vocab"],
    teacher_logp: Float[Tensor, "*tokens vocab"],
    beta: float = 0.5,
    normalize: bool = True,
) -> Float[Tensor, "*tokens"]:
    """β KL(T‖M) + (1−β) KL(S‖M) with M = βT + (1−β)S, divided by β(1−β) when `normalize`. arXiv 2306.13649.

    Normalised, β is a direction: β → 0 is forward KL, β → 1 is reverse KL, and both ends are reached. The published form
    (`normalize=False`) fades to nothing at both ends, yet is defined as the KLs at β = 0 and β = 1.
    """
    if not normalize:
        warn_if_faded(beta)
    return full_divergence("generalized_jsd", student_logp, teacher_logp, beta=beta, normalize=normalize)


def skew_reverse_kl(
    student_logp: Float[Tensor, "*tokens vocab"], teacher_logp: Float[Tensor, "*tokens vocab"], beta: float = 0.5
) -> Float[Tensor, "*tokens"]:
    """KL(S‖M) with M = βT + (1−β)S: reverse KL at β = 1, identically 0 at β = 0. arXiv 2402.03898, whose α is 1 − β."""
    return full_divergence("skew_reverse_kl", student_logp, teacher_logp, beta=beta)


def skew_forward_kl(
    student_logp: Float[Tensor, "*tokens vocab"], teacher_logp: Float[Tensor, "*tokens vocab"], beta: float = 0.5
) -> Float[Tensor, "*tokens"]:
    """KL(T‖M) with M = βT + (1−β)S: forward KL at β = 0, identically 0 at β = 1. arXiv 2402.03898, whose α is β."""
    return full_divergence("skew_forward_kl", student_logp, teacher_logp, beta=beta)


def alpha_beta_divergence(
    student_logp: Float[Tensor, "*tokens vocab"],
    teacher_logp: Float[Tensor, "*tokens vocab"],
    alpha: float = 0.5,
    beta: float = 0.5,
) -> Float[Tensor, "*tokens"]:
    """−1/(αβ) Σ [q^α p^β − α/(α+β) q^(α+β) − β/(α+β) p^(α+β)], arXiv 2505.04560.

    (1, 0) is forward KL, (0, 1) reverse KL, (½, ½) is 4 (1 − Σ √(pq)), (1, 1) half the squared distance. α and β must be
    ≥ 0 and not both 0.
    """
    return full_divergence("alpha_beta_divergence", student_logp, teacher_logp, alpha=alpha, beta=beta)


def forward_reverse_kl(
    student_logp: Float[Tensor, "*tokens vocab"], teacher_logp: Float[Tensor, "*tokens vocab"], alpha: float = 0.5
) -> Float[Tensor, "*tokens"]:
    """α KL(T‖S) + (1−α) KL(S‖T), in nats: forward KL at α = 1, reverse KL at α = 0; +inf where either is."""
    return full_divergence("forward_reverse_kl", student_logp, teacher_logp, alpha=alpha)


def total_variation(
    student_logp: Float[Tensor, "*tokens vocab"], teacher_logp: Float[Tensor, "*tokens vocab"]
) -> Float[Tensor, "*tokens"]:
    """½ Σ |p − q|: the probability mass that would have to move; between 0 and 1."""
    return full_divergence("total_variation", student_logp, teacher_logp)


def entropy(logp: Float[Tensor, "*tokens vocab"]) -> Float[Tensor, "*tokens"]:
    """−Σ p log p, in nats."""
    logp = _widen(logp)
    return -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(dim=-1)  # clamped, so that 0 · −inf is 0


def full_divergence(
    name: Divergence,
    student_logp: Float[Tensor, "*tokens vocab"],
    teacher_logp: Float[Tensor, "*tokens vocab"],
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    normalize: bool = True,
) -> Float[Tensor, "*tokens"]:
    """The divergence called `name`, over the whole vocabulary."""
    return entry_terms(name, student_logp, teacher_logp, alpha=alpha, beta=beta, normalize=normalize).sum(dim=-1)


def entry_terms(
    name: Divergence,
    student_logp: Float[Tensor, "*entries"],
    teacher_logp: Float[Tensor, "*entries"],
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    normalize: bool = True,
) -> Float[Tensor, "*entries"]:
    """The term of each vocabulary entry in the divergence called `name`; full and partial forms are sums of these."""
    check_shape_parameters(name, alpha=alpha, beta=beta)
    logp, logq = _widen_both(student_logp, teacher_logp)
    if name == "total_variation":
        return 0.5 * (logp.exp() - logq.exp()).abs()
    if name == "reverse_kl":
        return _weigh(logp, logp - logq)
    log_ratio = logq - logp  # NaN where neither can occur, and such entries weigh nothing
    if name == "forward_kl":
        return _weigh(logq, log_ratio)
    if name == "skew_reverse_kl":
        return _weigh(logp, -log_mixture_ratio(log_ratio, beta))
    if name == "skew_forward_kl":
        return _weigh(logq, -log_mixture_ratio(-log_ratio, 1.0 - beta))
    if name == "alpha_beta_divergence":
        return _alpha_beta_terms(logp, logq, log_ratio, alpha, beta)
    if name == "forward_reverse_kl":
        return _forward_reverse_terms(logp, logq, log_ratio, alpha)
    return _jsd_terms(logp, logq, log_ratio, beta, normalize)


def mass_coefficient(name: Divergence, beta: float = 0.5, alpha: float = 0.5) -> float:
    """c such that entry term + c (q − p) is ≥ 0, with its minimum 0 at p = q, for every single entry.

    Over a whole vocabulary Σ (q − p) = 0 and c does not matter; over a part of it, c is what keeps mass from leaking out.
    """
    if name == "alpha_beta_divergence":
        raise ObjectiveError(
            "alpha_beta_divergence is not defined on part of a vocabulary; use support='full' or a KL."
        )
    if name == "generalized_jsd":
        return {0.0: -1.0, 1.0: 1.0}.get(float(beta), 0.0)
    if name == "forward_reverse_kl":
        return 1.0 - 2.0 * alpha
    constants = {"forward_kl": -1.0, "reverse_kl": 1.0, "skew_forward_kl": beta - 1.0, "skew_reverse_kl": beta}
    return constants.get(name, 0.0)


def log_mixture_ratio(log_ratio: Float[Tensor, "*entries"], beta: float) -> Float[Tensor, "*entries"]:
    """log(1 − β + β e^d): log(M/p) for M = βq + (1−β)p and d = log q − log p. Its slope at d = 0 is exactly β."""
    if beta == 1.0:
        return log_ratio
    near = log_ratio.abs() <= EXP_RANGE
    # Each branch sees only arguments it can take, because the gradient of a branch that is not chosen is 0 · (its slope).
    middle = torch.where(near, log_ratio, 0.0)
    if beta == 0.0:
        return 0.0 * middle
    if beta <= 0.5:
        body = torch.log1p(beta * torch.expm1(middle))
    else:  # the same number, written so that nothing cancels
        body = middle + torch.log1p((1.0 - beta) * torch.expm1(-middle))
    above, below = log_ratio > EXP_RANGE, log_ratio < -EXP_RANGE
    high = torch.where(above, log_ratio, EXP_RANGE)
    low = torch.where(below, log_ratio, -EXP_RANGE)
    # The larger weight's logarithm is nearly 0: as the logarithm of a float32 sum it would keep no digit.
    upper = high + (math.log(beta) + torch.log1p((1.0 - beta) / beta * torch.exp(-high)))
    lower = math.log(1.0 - beta) + torch.log1p(beta / (1.0 - beta) * torch.exp(low))
    return torch.where(near, body, torch.where(above, upper, torch.where(below, lower, log_ratio)))


def _widen(logp: Tensor) -> Tensor:
    return logp if logp.dtype == torch.float64 else logp.float()


def _widen_both(student_logp: Tensor, teacher_logp: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(torch.promote_types(student_logp.dtype, teacher_logp.dtype), torch.float32)
    return student_logp.to(dtype), teacher_logp.to(dtype)


def _weigh(log_weight: Tensor, value: Tensor) -> Tensor:
    """e^log_weight · value; 0 where the weight is 0 whatever the value; an infinite value passes as a constant."""
    if value.numel() > FEW_ENTRIES and _is_finite(value):
        return log_weight.exp() * value
    occurs = log_weight > -torch.inf
    usable = value.isfinite()
    term = log_weight.exp() * torch.where(occurs & usable, value, 0.0)
    return torch.where(occurs & ~usable, value.detach(), term)


def _is_finite(value: Tensor) -> bool:
    """True if every entry is finite. A sum is one cheap pass over memory; element-wise tests and masks are several dear ones."""
    return bool(value.detach().sum().isfinite())


def _forward_reverse_terms(logp: Tensor, logq: Tensor, log_ratio: Tensor, alpha: float) -> Tensor:
    if alpha == 1.0:
        return _weigh(logq, log_ratio)
    reverse = _weigh(logp, -log_ratio)
    return reverse if alpha == 0.0 else alpha * _weigh(logq, log_ratio) + (1.0 - alpha) * reverse


def _jsd_terms(logp: Tensor, logq: Tensor, log_ratio: Tensor, beta: float, normalize: bool) -> Tensor:
    if beta == 0.0:
        return _weigh(logq, log_ratio)
    if beta == 1.0:
        return _weigh(logp, -log_ratio)
    teacher_to_mixture = _weigh(logq, -log_mixture_ratio(-log_ratio, 1.0 - beta))
    student_to_mixture = _weigh(logp, -log_mixture_ratio(log_ratio, beta))
    if normalize:
        return teacher_to_mixture / (1.0 - beta) + student_to_mixture / beta
    return beta * teacher_to_mixture + (1.0 - beta) * student_to_mixture


def _alpha_beta_terms(logp: Tensor, logq: Tensor, log_ratio: Tensor, alpha: float, beta: float) -> Tensor:
    if beta > alpha:  # the two are symmetric; the smaller exponent is the one that can be 0
        return _alpha_beta_terms(logq, logp, -log_ratio, beta, alpha)
    total = alpha + beta
    p_power, q_power = (total * logp).exp(), (total * logq).exp()
    # The definition subtracts nearly equal powers and divides by αβ; in terms of d nothing cancels, but e^d may overflow.
    near = log_ratio.abs() * max(total, 1.0) <= EXP_RANGE
    d = torch.where(near, log_ratio, 0.0)
    if beta == 0.0:
        small_power = -d
        far = (_weigh(alpha * logq, alpha * log_ratio) - q_power + p_power) / alpha**2
    else:
        small_power = torch.expm1(-beta * d) / beta
        cross = (alpha * logq + beta * logp).exp()
        far = -(cross - alpha / total * q_power - beta / total * p_power) / (alpha * beta)
    close = q_power * (torch.expm1(-total * d) / total - small_power) / alpha
    return torch.where(near, close, far)
