"""What the kernel tests are made of: one student and its teachers in any dtype, every kind of target, and a count of the products."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opd.kernels import PolicyTerm, TeacherMixture, linear_divergence
from opd.testing import assert_close_to_reference
from opd.types import DenseTarget, Head, HiddenTarget, SampledTarget, TopKTarget

Settings = dict[str, Any]

DIVERGENCES: tuple[Settings, ...] = (
    {"divergence": "reverse_kl"},
    {"divergence": "forward_kl"},
    {"divergence": "generalized_jsd", "beta": 0.3},
    {"divergence": "generalized_jsd", "beta": 0.7, "normalize": False},
    {"divergence": "skew_reverse_kl", "beta": 0.3},
    {"divergence": "skew_forward_kl", "beta": 0.6},
    {"divergence": "alpha_beta_divergence", "alpha": 0.4, "beta": 0.7},
    {"divergence": "forward_reverse_kl", "alpha": 0.3},
    {"divergence": "total_variation"},
)
ENDS: tuple[Settings, ...] = (
    {"divergence": "generalized_jsd", "beta": 0.0},
    {"divergence": "generalized_jsd", "beta": 1.0},
    {"divergence": "skew_reverse_kl", "beta": 1.0},
    {"divergence": "skew_forward_kl", "beta": 0.0},
    {"divergence": "forward_reverse_kl", "alpha": 0.0},
    {"divergence": "forward_reverse_kl", "alpha": 1.0},
)
NEAR_ENDS: tuple[Settings, ...] = tuple(
    {"divergence": name, "beta": beta}
    for name in ("generalized_jsd", "skew_reverse_kl", "skew_forward_kl")
    for small in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
    for beta in (small, 1.0 - small)
)
PARTIAL = tuple(d for d in DIVERGENCES if d["divergence"] != "alpha_beta_divergence")
CLOSED = tuple(d for d in PARTIAL if d["divergence"] != "total_variation")
TAILS = ("bucket", "generalized", "renormalize", "sampled")
SAMPLED: tuple[Settings, ...] = (
    {"divergence": "reverse_kl", "estimator": "k1"},
    {"divergence": "reverse_kl", "estimator": "k2"},
    {"divergence": "forward_kl", "estimator": "k3"},
)
WHOLE = ("hidden", "dense", "probability", "logit", "loss")
WAYS: dict[str, Settings] = {
    "reference": {"impl": "reference"},
    "chunked": {"impl": "chunked"},
    "minimal": {"memory": "minimal"},
}
GRADIENTS = ("d_hidden", "d_weight", "d_bias")
OUTPUTS = (
    "per_token",
    "student_entropy",
    "teacher_entropy",
    "student_logp",
    "policy_loss",
    "clipped",
)


def named(settings: Any) -> str:
    """A word for the id of a test."""
    return "-".join(str(v) for v in settings.values()) or "alone" if isinstance(settings, dict) else str(settings)


@dataclass
class World:
    """A student and two teachers. Values are representable in `dtype` and held in float64, so that every precision sees the same."""

    tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype = torch.float64
    seed: int = 0
    closeness: float | None = None
    """None: unrelated models. Else the teacher is the student, its hidden states moved by this much."""
    offset: float = 0.0
    """Added to the student's logits; and to the teacher's, unless `teacher_offset` says otherwise."""
    teacher_offset: float | None = None
    scale: float = 2.0
    """Standard deviation of the logits."""
    top_k: int = 4
    device: str = "cpu"
    """Where the tensors are; they are drawn on the CPU, so that every device sees the same."""
    parts: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return self.rounded(scale * torch.randn(*shape, generator=generator, dtype=torch.float64))

        n, h, v, width = self.tokens, self.hidden, self.vocab, self.scale / self.hidden**0.5
        self.parts["hidden"], self.parts["weight"] = draw(n, h), draw(v, h, scale=width)
        self.parts["bias"] = self.rounded(draw(v) + self.offset)
        moved = self.offset if self.teacher_offset is None else self.teacher_offset
        if self.closeness is None:
            wide = h + 3
            self.parts["teacher_hidden"] = draw(n, wide)
            self.parts["teacher_weight"] = draw(v, wide, scale=self.scale / wide**0.5)
            self.parts["teacher_bias"] = self.rounded(draw(v) + moved)
        else:
            self.parts["teacher_hidden"] = self.rounded(self.parts["hidden"] + self.closeness * draw(n, h))
            self.parts["teacher_weight"] = self.parts["weight"]
            self.parts["teacher_bias"] = self.rounded(self.parts["bias"] - self.offset + moved)
        self.parts["other_hidden"] = draw(n, h)
        self.parts["other_weight"] = draw(v, h, scale=width)
        self.parts["response_ids"] = torch.randint(v, (n,), generator=generator)
        self.parts["token_weights"] = torch.rand(n, generator=generator, dtype=torch.float64).float().double() + 0.1
        share = torch.randint(1, 64, (n,), generator=generator) / 64.0  # sums to 1 exactly, in every dtype
        self.parts["mixture"] = torch.stack([share, 1.0 - share], -1).double()
        self.parts["advantages"] = torch.randn(n, generator=generator, dtype=torch.float64).float().double()
        self.parts["old"] = self.student_logp() + 0.4 * torch.randn(n, generator=generator, dtype=torch.float64)
        self.parts["importance"] = torch.rand(n, generator=generator, dtype=torch.float64).float().double() + 0.5
        self.parts = {name: part.to(self.device) for name, part in self.parts.items()}

    def rounded(self, value: Tensor) -> Tensor:
        return value.to(self.dtype).double()

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["parts"][name]
        except KeyError:
            raise AttributeError(name) from None

    def logits(self) -> Tensor:
        return self.hidden_states @ self.weight.T + self.bias

    @property
    def hidden_states(self) -> Tensor:
        return self.parts["hidden"]

    def teacher_logits(self) -> Tensor:
        return self.teacher_hidden @ self.teacher_weight.T + self.teacher_bias

    def student_logp(self) -> Tensor:
        return self.logits().log_softmax(-1).gather(-1, self.response_ids[:, None]).squeeze(-1)

    def policy(self, dtype: torch.dtype = torch.float64, **changes: Any) -> PolicyTerm:
        wide = torch.promote_types(dtype, torch.float32)
        settings: Settings = {
            "advantages": self.advantages.to(wide),
            "old_log_prob": self.old.float().to(wide),
            "clip_range": (0.2, 0.3),
            "importance_weights": self.importance.to(wide),
            "weight": 0.7,
        }
        return PolicyTerm(**(settings | changes))

    def target(self, kind: str, dtype: torch.dtype = torch.float64) -> Any:
        """A target of the given kind: hidden, dense, top_k, sampled, none, or a mixture by its name."""
        wide = torch.promote_types(dtype, torch.float32)
        if kind == "none":
            return None
        if kind == "hidden":
            head = Head(weight=self.teacher_weight.to(dtype), bias=self.teacher_bias.to(dtype))
            return HiddenTarget(hidden=self.teacher_hidden.to(dtype), head=head)
        if kind == "dense":
            return DenseTarget(logits=self.rounded(self.teacher_logits()).to(dtype))
        logp = self.teacher_logits().log_softmax(-1)
        drawn = logp.gather(-1, self.response_ids[:, None]).squeeze(-1).float().to(wide)
        if kind == "sampled":
            return SampledTarget(teacher_logp=drawn)
        if kind == "top_k":
            best = logp.topk(min(self.top_k, self.vocab), dim=-1)
            return TopKTarget(ids=best.indices, teacher_logp=best.values.float().to(wide), sampled_logp=drawn)
        other = HiddenTarget(hidden=self.other_hidden.to(dtype), head=Head(weight=self.other_weight.to(dtype)))
        return TeacherMixture(
            targets=(self.target("hidden", dtype), other),
            weights=self.mixture.to(wide),
            mixture=kind,  # pyright: ignore[reportArgumentType]
        )


def run(
    world: World,
    kind: str | Callable[[torch.dtype], Any],
    impl: str,
    dtype: torch.dtype = torch.float64,
    *,
    grads: str = "hwb",
    scale: float = 1.0,
    bias: bool = True,
    **settings: Any,
) -> dict[str, Tensor]:
    """Everything a call gives: loss, per-token outputs, and the gradients of scale · loss. `impl` may be "minimal" too."""
    if impl == "minimal":
        impl, settings = "auto", {"memory": "minimal"} | settings
    hidden, weight, b = (
        part.to(dtype).clone().requires_grad_(letter in grads)
        for part, letter in ((world.hidden_states, "h"), (world.weight, "w"), (world.bias, "b"))
    )
    wide = torch.promote_types(dtype, torch.float32)
    settings = {"token_weights": world.token_weights.to(wide), "response_ids": world.response_ids} | settings
    if settings.get("policy") is True:
        settings["policy"] = world.policy(dtype)
    target = world.target(kind, dtype) if isinstance(kind, str) else kind(dtype)
    out = linear_divergence(hidden, weight, target, bias=b if bias else None, impl=impl, **settings)  # pyright: ignore[reportArgumentType]
    if out.loss.requires_grad:
        (scale * out.loss).backward()
    found = {"loss": out.loss, **{name: getattr(out, name) for name in OUTPUTS}}
    found |= {"d_hidden": hidden.grad, "d_weight": weight.grad, "d_bias": b.grad}
    return {name: value.detach() for name, value in found.items() if value is not None}


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Equal to `tolerance` of the largest entry (of 1, where all are smaller), name by name."""
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        size = max([1.0, *value[value.isfinite()].abs().tolist()]) if value.numel() else 1.0
        torch.testing.assert_close(
            got[name].double(), value.double(), rtol=0, atol=tolerance * size, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_as_accurate(
    world: World,
    kind: str | Callable[[torch.dtype], Any],
    dtype: torch.dtype,
    impl: str = "chunked",
    *,
    sum_depth: float = 0.0,
    **settings: Any,
) -> None:
    """Every number of `impl` errs at most twice as much as the plain version in this dtype, and one rounding of each logit.

    The plain version subtracts each row's normaliser first and rounds numbers of the size of a log-prob; a fast pass works on
    logits as they come. A log-ratio of two logits is off by one rounding of each, δ = 2 · 2⁻²³ max|z|. A log-ratio off by δ moves
    a gradient by at most w p δ times what d(logits) is multiplied with; a value such as an entropy is the difference of two
    numbers of that size, so 2δ. An importance ratio or k3 is the exponential of such a number, and errs relative to itself.
    Gradients in 16 bits are rounded once more: by half an ulp of themselves.

    `sum_depth` is for rows of 10⁵ columns: the values sum over a row, and a pairwise sum of V numbers is off by log₂ V roundings
    of the sum of their sizes (Higham, Accuracy and Stability of Numerical Algorithms, 2002, §4.2). Gradients get nothing from it.
    """
    chunk = {"chunk_tokens": max(1, world.tokens // 2)} if impl != "reference" else {}
    exact = run(world, kind, "reference", torch.float64, **settings)
    plain = run(world, kind, "reference", dtype, **settings)
    fast = run(world, kind, impl, dtype, **chunk, **settings)
    largest = max(
        float(world.logits().abs().max()) / settings.get("student_temperature", 1.0),
        float(world.teacher_logits().abs().max()) / settings.get("teacher_temperature", 1.0),
        1.0,
    )
    delta = 2.0**-22 * largest
    if settings.get("tail") == "sampled" or "estimator" in settings:
        delta *= max(1.0, float(exact["per_token"].abs().max()))
    weights = world.token_weights
    summed = sum_depth * 2.0**-24 * largest
    allowed = {
        "loss": (2 * delta + summed) * float(weights.sum()),
        "d_hidden": delta * float(weights.max() * world.weight.abs().max()),
        "d_weight": delta * float(weights.sum() * world.hidden_states.abs().max()),
        "d_bias": delta * float(weights.sum()),
    }
    assert fast.keys() == exact.keys()
    for name, value in exact.items():
        finite = value[value.isfinite()]
        size = float(finite.abs().max()) if finite.numel() else 1.0
        floor = allowed.get(name, 2 * delta + summed)
        if name in GRADIENTS and dtype in (torch.bfloat16, torch.float16):
            floor += torch.finfo(dtype).eps / 2 * size
        unit = max(size, floor)  # assert_close_to_reference takes its floor relative to 1 or more
        try:
            assert_close_to_reference(fast[name] / unit, plain[name] / unit, value / unit, floor=floor / unit)
        except AssertionError as error:
            shape = (world.tokens, world.hidden, world.vocab)
            raise AssertionError(f"{name} at tokens, hidden, vocab = {shape}, {dtype}, {settings}: {error}") from None


def assert_digits_survive(world: World, dtype: torch.dtype, impl: str, floor: float, **settings: Any) -> None:
    """Relative to themselves, divergences and gradients of `impl` err at most twice as much as the plain version's, or `floor`."""
    exact = run(world, "hidden", "reference", torch.float64, **settings)
    plain = run(world, "hidden", "reference", dtype, **settings)
    fast = run(world, "hidden", impl, dtype, **settings)

    def errors(found: dict[str, Tensor]) -> dict[str, float]:
        value = ((found["per_token"] - exact["per_token"]).abs() / exact["per_token"].abs()).max()
        slopes = {n: (found[n] - exact[n]).norm() / exact[n].norm() for n in GRADIENTS}
        return {name: float(error) for name, error in {"per_token": value, **slopes}.items()}

    told, own = errors(plain), errors(fast)
    for name, error in own.items():
        assert error <= max(2 * told[name], floor), (
            f"{name} errs {error:.1e}, the plain one {told[name]:.1e}: {settings}"
        )


class Products(TorchDispatchMode):
    """Counts matrix products. Those of a few rows with each other, which stand for dot products, are not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[tuple[int, ...], tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.name().split("::")[1].split(".")[0]
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "matmul", "linear"):
            left, right = [a for a in args if isinstance(a, Tensor)][-2:]
            if left.shape[0] != right.shape[1] or left.shape[0] > 4 or left.data_ptr() == 0:
                self.shapes.append((tuple(left.shape), tuple(right.shape)))
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        return len(self.shapes)

    @property
    def multiplications(self) -> int:
        return sum(math.prod(left) * right[1] for left, right in self.shapes)
