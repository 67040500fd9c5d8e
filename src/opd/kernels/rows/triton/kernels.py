"""Triton row kernels: one program per row, whatever the vocabulary; float32 inside, float64 for float64 rows.

Of a row of student logits z and teacher logits t, with u = z − max z, v = t − max t, S = Σ e^u and Q = Σ e^v:

    statistics   max z, S, Σ e^u u,  max t, Q, Σ e^v v,  Σ e^u (u − v), Σ e^v (v − u)     one read of z and t
    moments      the divergence and Σ p f, for divergences whose f = ∂D/∂p needs S and Q   one read
    gradient     w p (f − Σ p f) + p (c log p − e), over z, elsewhere, or added to it      one read, one write

BLOCK lanes walk over a row, and each has sums of its own: nothing is exchanged before the row's end, so that loads never wait. A lane's
sums run online: relative to its largest logit so far, and rescaled whenever a larger one comes. A logit of MASKED or −inf has
probability exactly 0. Where a divergence is truly infinite, what is returned is infinite or NaN.
"""

from __future__ import annotations

import os

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from opd.kernels import spec
from opd.losses import divergences

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# Numbers that the kernels read.
MASKED = tl.constexpr(spec.MASKED)
DEAD = tl.constexpr(spec.MASKED / 2)  # below this nothing is a logit
EXP_RANGE = tl.constexpr(divergences.EXP_RANGE)
SERIES = tl.constexpr(0.5)  # |x| up to which eight terms of e^x − 1 err by less than one rounding of float32

# Rows of the statistics tensor.
TOP_Z = tl.constexpr(0)
S = tl.constexpr(1)
ZP = tl.constexpr(2)
TOP_T = tl.constexpr(3)
Q = tl.constexpr(4)
TQ = tl.constexpr(5)
REVERSE = tl.constexpr(6)  # Σ e^u (u − v)
FORWARD = tl.constexpr(7)  # Σ e^v (v − u)
STATISTICS = 8

# Numbers of the divergence, in the dtype of the rows: scalar arguments of a kernel would be rounded to float32.
ALPHA = tl.constexpr(0)
BETA = tl.constexpr(1)
REST = tl.constexpr(2)  # 1 − β
STUDENT_SHARE = tl.constexpr(3)  # of KL(S‖M) in the JSD
TEACHER_SHARE = tl.constexpr(4)  # of KL(T‖M)
SIGN = tl.constexpr(5)  # 1, or −1 where β > ½
SMALL = tl.constexpr(6)  # the smaller one of β and 1 − β
LARGE = tl.constexpr(7)
EDGE = tl.constexpr(8)  # log-ratio at which the model of the smaller weight is the larger part of M, but at least 1


@triton.jit
def _sum(x):
    # tl.sum, of which the interpreter knows nothing when Triton was imported before TRITON_INTERPRET was set
    return tl.reduce(x, 0, tl.standard._sum_combine)


@triton.jit
def _max(x):
    return tl.reduce(x, 0, tl.standard._elementwise_max)


@triton.jit
def _logits(row, column, columns):
    x = tl.load(row + column, mask=column < columns, other=-float("inf"))
    return tl.where(x < DEAD, -float("inf"), x)


@triton.jit
def _less_one(u, x):
    """e^x − 1 to a rounding or two, also near 0, from u = e^x."""
    if x.dtype == tl.float64:
        inner = tl.where(u == 1.0, x, (u - 1.0) * x / tl.log(u))  # the error of u cancels (Kahan)
    else:
        inner = 1.0 + x * (1 / 8)
        inner = 1.0 + x * (1 / 7) * inner
        inner = 1.0 + x * (1 / 6) * inner
        inner = 1.0 + x * (1 / 5) * inner
        inner = 1.0 + x * (1 / 4) * inner
        inner = 1.0 + x * (1 / 3) * inner
        inner = x + x * (0.5 * x * inner)
    return tl.where(tl.abs(x) < SERIES, inner, u - 1.0)


@triton.jit
def _expm1(x):
    return _less_one(tl.exp(x), x)


@triton.jit
def _mixture(d, shape):
    """log M/p, log M/q and (q − p)/M for M = βq + (1−β)p and d = log q − log p; never overflows, and near d = 0 nothing cancels.

    With w the smaller weight, a the model of the larger and x the other's log-ratio to it: log M/a = log1p(w (e^x − 1)), of a
    number ≥ −½, up to some x ≥ 1; from there on the other logarithm, log(w + (1−w) e^−x). The two are x apart.
    """
    sign, small, large = tl.load(shape + SIGN), tl.load(shape + SMALL), tl.load(shape + LARGE)
    x = sign * d
    near = x <= tl.load(shape + EDGE)
    x = tl.where(near, x, -x)
    u = tl.exp(x)
    e = _less_one(u, x)
    y = small * e
    ratio = tl.where(near, 1.0 + y, small + large * u)
    log = tl.log(ratio)
    log += tl.where(near, (y - (ratio - 1.0)) / ratio, 0.0)  # what the sum lost
    over_a = tl.where(near, log, log - x)
    over_b = tl.where(near, log - x, log)
    gap = sign * tl.where(near, e, -e) / ratio
    return tl.where(sign > 0.0, over_a, over_b), tl.where(sign > 0.0, over_b, over_a), gap


@triton.jit
def _alpha_beta_slope(logp, logq, d, alpha, beta, ORDER: tl.constexpr, ZERO: tl.constexpr):
    """p ∂D/∂p = −(1/α) (q^α p^β − p^(α+β)), and −p^β d at α = 0."""
    if ZERO and not ORDER:
        return -tl.exp(beta * logp) * d
    above = tl.exp(alpha * logq + beta * logp) * _expm1(-alpha * d)
    return tl.where(d > 0.0, above, -tl.exp((alpha + beta) * logp) * _expm1(alpha * d)) / alpha


@triton.jit
def _alpha_beta_value(logp, logq, d, alpha, beta, NO_BETA: tl.constexpr):
    """−1/(αβ) (q^α p^β − α/(α+β) q^(α+β) − β/(α+β) p^(α+β)) for α ≥ β, as `losses.divergences` has it."""
    total = alpha + beta
    p_power, q_power = tl.exp(total * logp), tl.exp(total * logq)
    near = tl.abs(d) * tl.maximum(total, 1.0) <= EXP_RANGE
    x = tl.where(near, d, 0.0)
    if NO_BETA:
        small = -x
        weighted = tl.where(logq == -float("inf"), 0.0, tl.exp(alpha * logq) * alpha * d)
        far = (weighted - q_power + p_power) / (alpha * alpha)
    else:
        small = _expm1(-beta * x) / beta
        cross = tl.exp(alpha * logq + beta * logp)
        far = (alpha / total * q_power + beta / total * p_power - cross) / (alpha * beta)
    return tl.where(near, q_power * (_expm1(-total * x) / total - small) / alpha, far)


@triton.jit
def _slope(u, v, p, q, s, q_sum, shape, KIND: tl.constexpr, ORDER: tl.constexpr, ZERO: tl.constexpr):
    """p f of every entry, and the entry's part of the divergence, for what `moments` is needed.

    ORDER says that α ≥ β, and ZERO that the smaller of the two is 0.
    """
    d = (v - u) - tl.log(q_sum / s)
    student, teacher = u > -float("inf"), v > -float("inf")
    beta, rest = tl.load(shape + BETA), tl.load(shape + REST)
    if KIND == "total_variation":
        apart = -_expm1(-tl.abs(d))  # |p − q| / max(p, q)
        value = 0.5 * tl.maximum(p, q) * apart
        slope = tl.where(d > 0.0, -0.5, tl.where(d < 0.0, 0.5, 0.0)) * p
    elif KIND == "alpha_beta_divergence":
        alpha, logp, logq = tl.load(shape + ALPHA), u - tl.log(s), v - tl.log(q_sum)
        slope = _alpha_beta_slope(logp, logq, d, alpha, beta, ORDER, ZERO)
        if ORDER:
            value = _alpha_beta_value(logp, logq, d, alpha, beta, ZERO)
        else:
            value = _alpha_beta_value(logq, logp, -d, beta, alpha, ZERO)
    else:
        over_p, over_q, gap = _mixture(d, shape)
        moved = gap * (beta * q + rest * p)  # q − p: of sum 0, but with it a skewed KL's entry is least at p = q
        if KIND == "generalized_jsd":
            slope = -tl.load(shape + STUDENT_SHARE) * p * over_p
            value = tl.where(student, slope, 0.0)
            value -= tl.where(teacher, tl.load(shape + TEACHER_SHARE) * q * over_q, 0.0)
        elif KIND == "skew_reverse_kl":
            slope = p * (beta * rest * gap - over_p)
            value = tl.where(student, -p * over_p, 0.0) + beta * moved
        else:
            slope = -rest * rest * p * gap
            value = tl.where(teacher, -q * over_q, 0.0) - rest * moved
    return tl.where(student, slope, 0.0), tl.where(student | teacher, value, 0.0)


@triton.jit(do_not_specialize=["rows"])
def statistics(
    z,
    t,
    scales,
    out,
    tops,
    rows,
    columns,
    z_stride,
    t_stride,
    TEACHER: tl.constexpr,
    HAS_REVERSE: tl.constexpr,
    HAS_FORWARD: tl.constexpr,
    SCALED: tl.constexpr,
    TOPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Normalisers, entropies and the sums that the two KLs are made of; `out` is [STATISTICS, rows].

    SCALED multiplies student's and teacher's logits with the two numbers of `scales`. TOPS leaves the largest logit of every lane,
    columns ≡ lane (mod BLOCK), in `tops`, [2, rows, BLOCK]: the likeliest tokens are in the lanes whose largest are largest.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    t += row * t_stride
    dtype = z.dtype.element_ty
    lanes = tl.arange(0, BLOCK)
    top_z, top_t = tl.full((BLOCK,), MASKED, dtype), tl.full((BLOCK,), MASKED, dtype)
    s, zp = tl.full((BLOCK,), 0.0, dtype), tl.full((BLOCK,), 0.0, dtype)
    q, tq = tl.full((BLOCK,), 0.0, dtype), tl.full((BLOCK,), 0.0, dtype)
    reverse, forward = tl.full((BLOCK,), 0.0, dtype), tl.full((BLOCK,), 0.0, dtype)
    for first in range(0, columns, BLOCK):
        column = first + lanes
        u = _logits(z, column, columns)
        if TEACHER:
            v = _logits(t, column, columns)
        if SCALED:
            u *= tl.load(scales)
        larger = tl.maximum(top_z, u)
        z_move = top_z - larger
        top_z = larger
        u -= larger
        p = tl.exp(u)
        fade = tl.exp(z_move)
        if TEACHER:
            if SCALED:
                v *= tl.load(scales + 1)
            larger = tl.maximum(top_t, v)
            t_move = top_t - larger
            top_t = larger
            v -= larger
            weight = tl.exp(v)
            t_fade = tl.exp(t_move)
            if HAS_REVERSE:
                terms = tl.where(u > -float("inf"), p * (u - v), 0.0)
                reverse = fade * (reverse + s * (z_move - t_move)) + terms
            if HAS_FORWARD:
                terms = tl.where(v > -float("inf"), weight * (v - u), 0.0)
                forward = t_fade * (forward + q * (t_move - z_move)) + terms
            tq = t_fade * (tq + t_move * q) + tl.where(v > -float("inf"), weight * v, 0.0)
            q = t_fade * q + weight
        zp = fade * (zp + z_move * s) + tl.where(u > -float("inf"), p * u, 0.0)
        s = fade * s + p
    if TOPS:
        tl.store(tops + row * BLOCK + lanes, top_z)
        tl.store(tops + (rows + row) * BLOCK + lanes, top_t)
    # The lanes' sums, each relative to its own largest logits, as sums relative to the row's.
    row_z, row_t = _max(top_z), _max(top_t)
    z_move, t_move = top_z - row_z, top_t - row_t
    fade, t_fade = tl.exp(z_move), tl.exp(t_move)
    out += row
    tl.store(out + TOP_Z * rows, row_z)
    tl.store(out + S * rows, _sum(fade * s))
    tl.store(out + ZP * rows, _sum(fade * (zp + z_move * s)))
    tl.store(out + TOP_T * rows, row_t)
    tl.store(out + Q * rows, _sum(t_fade * q))
    tl.store(out + TQ * rows, _sum(t_fade * (tq + t_move * q)))
    tl.store(out + REVERSE * rows, _sum(fade * (reverse + s * (z_move - t_move))))
    tl.store(out + FORWARD * rows, _sum(t_fade * (forward + q * (t_move - z_move))))


@triton.jit(do_not_specialize=["rows"])
def moments(
    z,
    t,
    known,
    shape,
    out,
    rows,
    columns,
    z_stride,
    t_stride,
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The divergence and Σ p f from the statistics `known`; `out` is [2, rows]."""
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    t += row * t_stride
    known += row
    top_z, s = tl.load(known + TOP_Z * rows), tl.load(known + S * rows)
    top_t, q_sum = tl.load(known + TOP_T * rows), tl.load(known + Q * rows)
    dtype = z.dtype.element_ty
    total, center = tl.full((BLOCK,), 0.0, dtype), tl.full((BLOCK,), 0.0, dtype)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        u, v = _logits(z, column, columns) - top_z, _logits(t, column, columns) - top_t
        p, q = tl.exp(u) / s, tl.exp(v) / q_sum
        slope, value = _slope(u, v, p, q, s, q_sum, shape, KIND, ORDER, ZERO)
        total += value
        center += slope
    tl.store(out + row, _sum(total))
    tl.store(out + rows + row, _sum(center))


@triton.jit(do_not_specialize=["rows"])
def gradient(
    z,
    t,
    out,
    known,
    per_row,
    shape,
    rows,
    columns,
    z_stride,
    t_stride,
    out_stride,
    KIND: tl.constexpr,
    ORDER: tl.constexpr,
    ZERO: tl.constexpr,
    TEACHER: tl.constexpr,
    EXTRAS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """w p (f − Σ p f) + p (c log p − e) into `out`, which may be z and may be of 16 bits, or added to it.

    `per_row` is [4, rows]: w, Σ p f, c and e. A weight of 0 makes 0 of anything.
    """
    row = tl.program_id(0).to(tl.int64)
    z += row * z_stride
    t += row * t_stride
    out += row * out_stride
    known += row
    per_row += row
    top_z, s = tl.load(known + TOP_Z * rows), tl.load(known + S * rows)
    weight, center = tl.load(per_row), tl.load(per_row + rows)
    share, extra = tl.load(per_row + 2 * rows), tl.load(per_row + 3 * rows)
    top_t, q_sum = tl.load(known + TOP_T * rows), tl.load(known + Q * rows)
    for first in range(0, columns, BLOCK):
        column = first + tl.arange(0, BLOCK)
        u = _logits(z, column, columns) - top_z
        p = tl.exp(u) / s
        slope = tl.full((BLOCK,), 0.0, u.dtype)
        if TEACHER:
            v = _logits(t, column, columns) - top_t
            if KIND == "reverse_kl":
                slope = tl.where(u > -float("inf"), p * ((u - v) - center), 0.0)
            elif KIND == "forward_kl":
                slope = p - tl.exp(v) / q_sum
            elif KIND == "forward_reverse_kl":
                alpha = tl.load(shape + ALPHA)
                slope = tl.where(u > -float("inf"), (1.0 - alpha) * p * ((u - v) - center), 0.0)
                slope += alpha * (p - tl.exp(v) / q_sum)
            else:
                q = tl.exp(v) / q_sum
                slope, _ = _slope(u, v, p, q, s, q_sum, shape, KIND, ORDER, ZERO)
                slope -= p * center
            slope = tl.where(weight == 0.0, 0.0, weight * slope)
        if EXTRAS:
            slope += tl.where(u > -float("inf"), p * (share * (u - tl.log(s)) - extra), 0.0)
        if ADD:
            slope += tl.load(out + column, mask=column < columns, other=0.0)
        tl.store(out + column, slope.to(out.dtype.element_ty), mask=column < columns)


@triton.jit
def times(value, factor, entries, BLOCK: tl.constexpr):
    """value · factor in place, `factor` one number in memory; nothing is read or written where it is 1."""
    by = tl.load(factor)
    if by != 1.0:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(value + at, mask=at < entries, other=0.0)
        wide = x if x.dtype == tl.float64 else x.to(tl.float32)
        tl.store(value + at, (wide * by.to(wide.dtype)).to(x.dtype), mask=at < entries)
