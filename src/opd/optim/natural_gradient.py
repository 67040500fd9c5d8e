"""The natural-gradient step: (F + damping·I) x = −g by conjugate gradients, cut back to a trust region in KL.

F = Σ_t w_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t is the Fisher matrix of the next-token distributions p_t = softmax(z_t) at the response
tokens of a whole step, J_t the Jacobian of the logits z_t by the trained parameters, w_t the loss's own token weights. It never exists
as a matrix: a product F v is J v, a row operation, and Jᵀ of that (Martens, arXiv 1412.1193; the trust region as in arXiv 1502.05477).

J v is found by differentiating Jᵀu, which is linear in u, by u. The graphs of z and of Jᵀu stay in memory, so that a product costs no
forward pass; forward-mode differentiation would repeat it for every product, and took longer (benchmarks/LOG.md). Where only the last
layers are trained, the graphs hold those alone.

Cost of a step: one forward and one backward pass for the graphs, then per iteration one pass back through Jᵀu and one through z, about
a forward and a backward pass again: with 10 iterations, 9 to 14 AdamW updates on the CPU. A probe for the preconditioner
(optim/preconditioner.py) is one pass back through z. Memory: 3 to 3.5 times that of a backward pass over all
micro-batches at once, whole [tokens, vocabulary] logits among it; without `keep_graphs` 3 to 4 times that of one micro-batch, at 1.4 to
1.6 times the time. Beside it six vectors of the size of the trained parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from opd.errors import ModelError, NonFiniteError
from opd.optim.preconditioner import Kronecker
from opd.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

B = TypeVar("B")

DAMPING = 0.01
TRUST_REGION = 0.1  # nats per token
ITERATIONS = 10
RESIDUAL_TOLERANCE = 1e-10  # of |g|; float32 never gets there, so that only `iterations` ends it
CURVATURE_TOLERANCE = 0.05  # a lost path changes vᵀFv by its order; bfloat16 activations stay under 1%
ROUNDING = 1e-5  # float32, in sums that cancel
_NOT_TWICE = (
    "A natural-gradient step differentiates the student twice, and some of its operations cannot be: {} Use "
    "student.attn_implementation=sdpa or eager and no custom kernels, or another optimizer."
)
_NOT_FINITE = (
    "The natural-gradient step is not finite though the gradient is. The weights were not changed. Raise "
    "optimizer.natural_gradient.damping, and look for infinite logits in the student."
)


@dataclass(frozen=True, kw_only=True)
class NaturalStep:
    """The step of every parameter, and diagnostics of the solver."""

    step: tuple[Tensor, ...]
    predicted_kl: float
    """½ xᵀFx of this step, in nats per token: how far the distributions will move, to second order."""
    scale: float
    """Factor that brought the solution into the trust region; 1 where it lay inside."""
    residual: float
    """|(F + damping) x + g| / |g|: 0 is a solved system."""
    iterations: int

    @torch.no_grad()
    def apply(self, parameters: Sequence[Tensor], factor: float = 1.0) -> None:
        """parameters += factor · step, in place."""
        for parameter, move in zip(parameters, self.step, strict=True):
            parameter.add_(move.to(parameter.dtype), alpha=factor)


def natural_gradient_step(
    parameters: Sequence[Tensor],
    gradient: Sequence[Tensor],
    micro_batches: Sequence[B],
    logits: Callable[[B], Float[Tensor, "tokens vocab"]],
    token_weights: Sequence[Float[Tensor, " tokens"]],
    *,
    damping: float = DAMPING,
    trust_region: float = TRUST_REGION,
    iterations: int = ITERATIONS,
    probes: int = 0,
    draws: Callable[[B, int], Float[Tensor, "probes tokens"]] | None = None,
    keep_graphs: bool = True,
    ranks: Ranks = ALONE,
) -> NaturalStep:
    """The step down `gradient`, that of the whole batch. Changes neither parameters nor their `.grad`. Several `ranks` have micro-batches
    of their own, and all get the same step.

    `logits` runs the model on one micro-batch, at the temperature of the loss, and is differentiated twice; `token_weights` has one
    tensor for each micro-batch; `probes` random gradients make a preconditioner, the same ones for the same weights and rollouts, with
    `draws` as the uniform numbers in [0, 1) that they come from, which several ranks need. Raises NonFiniteError, and ModelError for a
    model without second derivatives.
    """
    fisher = Fisher(parameters, micro_batches, logits, token_weights, keep_graphs=keep_graphs, ranks=ranks)
    solved = conjugate_gradient(
        fisher,
        -flatten(gradient),
        damping=damping,
        iterations=iterations,
        precondition=Kronecker(fisher.samples(probes, draws), damping) if probes else None,
    )
    kl = max(0.0, 0.5 * float(solved.x @ solved.product)) / fisher.total_weight
    scale = 1.0 if kl <= trust_region else (trust_region / kl) ** 0.5
    step = solved.x * scale
    if not step.isfinite().all():
        raise NonFiniteError(_NOT_FINITE)
    return NaturalStep(
        step=unflatten(step, parameters),
        predicted_kl=kl * scale**2,
        scale=scale,
        residual=solved.residual,
        iterations=solved.iterations,
    )


class Fisher:
    """v ↦ F v, on vectors [parameters] in the order of `parameters`. Use it before the weights change: it may hold their graphs. F is the
    sum over the micro-batches of all `ranks`, which all have to ask for the same."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        micro_batches: Sequence[B],
        logits: Callable[[B], Tensor],
        token_weights: Sequence[Tensor],
        *,
        keep_graphs: bool = True,
        ranks: Ranks = ALONE,
    ) -> None:
        self.parameters = list(parameters)
        self.ranks = ranks
        self.total_weight = sum(ranks.gather(sum(float(weights.double().sum()) for weights in token_weights)))
        """1 under token_mean; ½ vᵀFv over this is in nats per token."""
        pairs = list(zip(micro_batches, token_weights, strict=True))
        self._batches = list(micro_batches)
        self._pieces = [partial(Linearized, self.parameters, partial(logits, batch), w) for batch, w in pairs]
        self._kept = [piece() for piece in self._pieces] if keep_graphs else None
        self._checked = False

    def __call__(self, vector: Float[Tensor, " parameters"]) -> Float[Tensor, " parameters"]:
        direction = unflatten(vector, self.parameters)
        total, curvature = torch.zeros_like(vector), 0.0
        for index in range(len(self._pieces)):
            product, along = self._piece(index).fisher_product(
                direction
            )  # unkept, it is gone before the next one is made
            total += flatten(product)
            curvature += along
        if not self._checked:
            self._check(float(vector @ total), curvature, slack=float(vector.norm() * total.norm()))
        return self.ranks.sum_vector(total)

    def samples(self, count: int, draws: Callable[[Any, int], Tensor] | None = None) -> list[tuple[Tensor, ...]]:
        """Random gradients with mean 0 and covariance F: of log-probs of tokens drawn from p_t, each times √w_t. `draws` has the uniform
        numbers [count, tokens] of a micro-batch; without it they always come from the same seed. A step stays a function of weights and
        rollouts either way."""
        source = torch.Generator().manual_seed(0)
        totals = [torch.zeros_like(flatten(self.parameters)) for _ in range(count)]
        for index, batch in enumerate(self._batches):
            piece = self._piece(index)
            shape = (count, piece.tokens)
            uniform = torch.rand(shape, generator=source, dtype=torch.float64) if draws is None else draws(batch, count)
            for total, numbers in zip(totals, uniform, strict=True):
                total += flatten(piece.sample(numbers))
        return [unflatten(self.ranks.sum_vector(total), self.parameters) for total in totals]

    def _piece(self, index: int) -> Linearized:
        return self._pieces[index]() if self._kept is None else self._kept[index]

    def _check(self, by_transpose: float, by_jvp: float, *, slack: float) -> None:
        """vᵀFv once from the gradient's own graph and once from its derivative, which a custom kernel can cut off in silence."""
        self._checked = True
        if abs(by_transpose - by_jvp) > CURVATURE_TOLERANCE * abs(by_jvp) + ROUNDING * slack:
            raise ModelError(_NOT_TWICE.format("their first and second derivatives contradict each other."))


class Linearized:
    """The logits of one micro-batch as a linear function of the parameters: J and Jᵀ are passes through graphs that stay."""

    def __init__(
        self, parameters: list[Tensor], logits: Callable[[], Tensor], weights: Float[Tensor, " tokens"]
    ) -> None:
        self._parameters = parameters
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fast attention kernels have one derivative only
            self._logits = logits()
            self._u = torch.zeros_like(self._logits, requires_grad=True)
            pulled = _derivative([self._logits], parameters, [self._u], create_graph=True)
        self._pulled = [(index, g) for index, g in enumerate(pulled) if g is not None]
        self._weights = weights.to(self._logits.dtype).unsqueeze(-1)
        self._p = self._logits.detach().softmax(-1)

    def fisher_product(self, direction: Sequence[Tensor]) -> tuple[list[Tensor], float]:
        """F v = Σ_t w_t J_tᵀ (diag p_t − p_t p_tᵀ) J_t v, one tensor for every parameter; and vᵀFv from J v alone."""
        moved = self.jvp(direction)
        pushed = self._weights * self._p * (moved - (self._p * moved).sum(-1, keepdim=True))
        return self.vjp(pushed), float((pushed * moved).sum())

    @property
    def tokens(self) -> int:
        """Rows of the logits."""
        return len(self._p)

    def sample(self, uniform: Float[Tensor, " tokens"]) -> list[Tensor]:
        """Jᵀu with u_t = √w_t (e_y − p_t), where y ~ p_t is the first token at which the distribution function passes `uniform`."""
        reached = self._p.cumsum(-1, dtype=torch.float64)
        wanted = uniform.to(reached).unsqueeze(-1) * reached[:, -1:]
        drawn = torch.searchsorted(reached, wanted, right=True).clamp_max(reached.shape[-1] - 1)
        return self.vjp(self._weights.sqrt() * (torch.zeros_like(self._p).scatter_(-1, drawn, 1.0) - self._p))

    def jvp(self, direction: Sequence[Tensor]) -> Float[Tensor, "tokens vocab"]:
        """J v: how the logits move when the parameters move in this direction."""
        if not self._pulled:  # no parameter has a say in this micro-batch
            return torch.zeros_like(self._p)
        directions = [direction[index].to(g.dtype) for index, g in self._pulled]
        moved = _derivative([g for _, g in self._pulled], [self._u], directions)[0]
        if moved is None:
            raise ModelError(_NOT_TWICE.format("their gradient has no derivative."))
        return moved

    def vjp(self, u: Float[Tensor, "tokens vocab"]) -> list[Tensor]:
        """Jᵀu, one tensor for every parameter."""
        found = _derivative([self._logits], self._parameters, [u])
        return [torch.zeros_like(p) if g is None else g for g, p in zip(found, self._parameters, strict=True)]


def _derivative(
    outputs: list[Tensor], inputs: list[Tensor], directions: list[Tensor], *, create_graph: bool = False
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` on graphs that stay; None for an input that the outputs do not depend on."""
    options = {"retain_graph": True, "create_graph": create_graph, "allow_unused": True}
    try:
        return torch.autograd.grad(outputs, inputs, directions, **options)
    except RuntimeError as error:  # PyTorch's, for an operation that can be differentiated once only
        if "derivative" not in str(error) and "differentiat" not in str(error):
            raise
        raise ModelError(_NOT_TWICE.format(error)) from error


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Of (A + damping·I) x = b."""

    x: Tensor
    product: Tensor
    """A x, which comes for nothing and has no damping in it."""
    residual: float
    """|b − (A + damping·I) x| / |b|."""
    iterations: int


def conjugate_gradient(
    product: Callable[[Tensor], Tensor],
    b: Float[Tensor, " parameters"],
    *,
    damping: float,
    iterations: int,
    tolerance: float = RESIDUAL_TOLERANCE,
    precondition: Callable[[Tensor], Tensor] | None = None,
) -> Solution:
    """Conjugate gradients from x = 0 for a positive semidefinite A given by `product`; `precondition` is r ↦ P⁻¹ r for a positive
    definite P near A + damping·I. Ends early when the residual is under `tolerance`, or a direction has no curvature left. Every iterate
    descends: xᵀb > 0. Raises NonFiniteError."""
    x, ax = torch.zeros_like(b), torch.zeros_like(b)
    residual = b.clone()
    near = residual if precondition is None else precondition(residual)
    direction = near.clone()
    start = square = float(b @ b)
    along, done = float(residual @ near), 0
    while done < iterations and square > tolerance**2 * start:
        a_direction = product(direction)
        curvature = float(direction @ a_direction) + damping * float(direction @ direction)
        if not math.isfinite(curvature):
            raise NonFiniteError(_NOT_FINITE)
        if curvature <= 0:
            break
        length = along / curvature
        x.add_(direction, alpha=length)
        ax.add_(a_direction, alpha=length)
        residual.sub_(a_direction.add_(direction, alpha=damping), alpha=length)
        square = float(residual @ residual)
        near = residual if precondition is None else precondition(residual)
        previous, along = along, float(residual @ near)
        direction.mul_(along / previous).add_(near)
        done += 1
    return Solution(x=x, product=ax, residual=(square / start) ** 0.5 if start else 0.0, iterations=done)


def flatten(tensors: Sequence[Tensor]) -> Float[Tensor, " parameters"]:
    """One vector of all entries."""
    return torch.cat([t.detach().flatten() for t in tensors])


def unflatten(vector: Float[Tensor, " parameters"], like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The vector in pieces with the shapes of `like`."""
    return tuple(part.view_as(t) for part, t in zip(vector.split([t.numel() for t in like]), like, strict=True))
