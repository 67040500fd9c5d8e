"""The fused loss's way on a GPU, taken here at a small size: what its products, its row kernels and PyTorch's operators read and write.

Kernels are counted by what they are given, and products only in number; of PyTorch's operators, what they are handed is what they read
and write.
Kernels run in Triton's interpreter. Sizes are chosen such that every part that grows with the vocabulary can be told from the rest.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opd.kernels import chunk_loop, linear_divergence, linear_objective
from opd.kernels.rows.triton import kernels, rows
from opd.losses import Objective
from opd.types import AnyTarget, Head, HiddenTarget, TopKTarget

VIEWS = {
    "view", "expand", "unsqueeze", "squeeze", "slice", "select", "split", "detach", "t", "transpose", "permute", "alias",
    "as_strided", "unbind", "_reshape_alias", "unflatten", "_unsafe_view", "empty", "empty_like", "new_empty", "split_with_sizes",
}  # fmt: skip
PICK, PLACE = (
    {"gather", "index", "index_select"},
    {"scatter_", "scatter_add_", "index_put_", "index_fill_", "index_copy_"},
)
WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero"}
HIDDEN = 16
TOKENS, CHUNK = (16, 32), 8
VOCABULARIES = (2560, 4608)  # both more than one block of every kernel
TOP_K = 64


@dataclass
class Counted:
    """Of one call, forward and backward."""

    products: int = 0
    kernel_bytes: int = 0
    kernels: int = 0
    operator_bytes: int = 0
    operators: int = 0
    waits: int = 0
    """Times that the host waits for the device."""


class Counter(TorchDispatchMode):
    """Counts PyTorch's operators, but for views and while it is `silent`."""

    def __init__(self) -> None:
        super().__init__()
        self.counted = Counted()
        self.silent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split("::")[1].split(".")[0]
        if not self.silent:
            self.counted.waits += name in WAITS
            if name not in VIEWS:
                self.counted.operators += 1
                self.counted.operator_bytes += _moved(name, args, kwargs, out)
        return out

    @contextlib.contextmanager
    def apart(self) -> Iterator[Counted]:
        """Inside, operators are not counted: they stand for a product or a kernel."""
        self.silent += 1
        try:
            yield self.counted
        finally:
            self.silent -= 1


def _moved(name: str, args: Any, kwargs: Any, out: Any) -> int:
    """Bytes that an operator reads and writes: all that it is given, but of picking and placing, what is picked or placed."""
    if name in PICK:
        return _bytes(args[1:], kwargs) + 2 * _bytes(out)
    if name in PLACE:
        return 2 * _bytes(args[1:], kwargs)
    return _bytes(args, kwargs, out)


def _bytes(*values: Any) -> int:
    tensors = {id(one): one for one in tree_leaves(values) if isinstance(one, Tensor)}
    sizes = (min(one.numel(), one.untyped_storage().nbytes() // one.element_size()) for one in tensors.values())
    return sum(size * one.element_size() for size, one in zip(sizes, tensors.values(), strict=True))


@contextlib.contextmanager
def as_on_a_gpu(counter: Counter) -> Iterator[None]:
    """Stored gradients, and products that take and give what those of a GPU do, counted by themselves."""
    layer, plain = chunk_loop.OutputLayer, {}

    def product(name: str) -> Any:
        def run(self: Any, gradient: Tensor, *args: Any, **options: Any) -> Any:
            with counter.apart() as counted:  # this machine's products take one type, and write float32
                wide = gradient if name == "logits" else gradient.float()
                if name == "weight_grad":
                    sums = args[1].float()
                    out = plain[name](self, wide, args[0], sums, **options)
                    args[1].copy_(sums)
                else:
                    out = plain[name](self, wide, *args, **options)
            counted.products += 1
            return out

        return run

    def launch(kernel: Any, z: Tensor, *arguments: Any, **constants: Any) -> None:
        with counter.apart() as counted:
            rows_launch(kernel, z, *arguments, **constants)
        counted.kernels += 1
        counted.kernel_bytes += kernel_bytes(kernel, z, arguments, constants)

    rows_launch = rows._launch
    with contextlib.ExitStack() as stack:
        for name in ("logits", "hidden_grad", "weight_grad"):
            plain[name] = getattr(layer, name)
            stack.enter_context(mock.patch.object(layer, name, product(name)))
        stack.enter_context(mock.patch.object(layer, "gradient_dtype", return_value=torch.bfloat16))
        stack.enter_context(mock.patch.object(rows, "_launch", launch))
        stack.enter_context(mock.patch.object(chunk_loop, "stored_tokens", lambda head: head.tokens))
        yield


def kernel_bytes(kernel: Any, z: Tensor, arguments: Any, constants: Any) -> int:
    """What the kernel reads and writes of whole rows."""
    entries = z.numel()
    moved = 4 * entries * (2 if constants.get("TEACHER", True) else 1)
    if kernel is kernels.gradient:
        out = arguments[1]
        moved += entries * out.element_size() * (2 if constants["ADD"] else 1)
    if constants.get("TOPS"):
        moved += 2 * len(z) * constants["BLOCK"] * 4
    return moved


def losses() -> dict[str, tuple[Objective, str, bool]]:
    """By name: the objective, the target, and whether the trainer's metrics are asked for."""
    few = Objective(support="teacher_top_k", top_k=TOP_K)
    return {
        "reverse KL": (Objective(), "hidden", False),
        "reverse KL with the trainer's metrics": (Objective(), "hidden", True),
        "JSD": (Objective(divergence="generalized_jsd", beta=0.5), "hidden", False),
        f"top-{TOP_K}, bucket": (few, "top_k", False),
        f"top-{TOP_K}, sampled tail": (Objective(support="teacher_top_k", top_k=TOP_K, tail="sampled"), "top_k", False),
    }


def counted(objective: Objective, kind: str, diagnostics: bool, vocabulary: int, tokens: int) -> Counted:
    """One call at a small size, with weights of 16 bits."""
    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=source).to(torch.bfloat16)

    order = torch.stack([torch.randperm(vocabulary, generator=source) for _ in range(tokens)])
    ids = order[:, TOP_K].contiguous()  # outside of the top-k, as where the tail matters
    hidden, weight = draw(tokens, HIDDEN).requires_grad_(), draw(vocabulary, HIDDEN).requires_grad_()
    target: AnyTarget = HiddenTarget(hidden=draw(tokens, HIDDEN), head=Head(weight=draw(vocabulary, HIDDEN)))
    if kind == "top_k":
        logp = draw(tokens, TOP_K).float().log_softmax(-1) - 0.1
        target = TopKTarget(
            ids=order[:, :TOP_K].contiguous(), teacher_logp=logp, sampled_logp=torch.full((tokens,), -6.0)
        )
    shared: dict[str, Any] = {
        "token_weights": torch.full((tokens,), 1 / tokens),
        "chunk_tokens": CHUNK,
        "impl": "triton",
    }
    counter = Counter()
    with counter, as_on_a_gpu(counter):
        if diagnostics:
            loss, _, _ = linear_objective(hidden, weight, target, ids, objective, eos_ids=(1,), **shared)
        else:
            form = {"divergence": objective.divergence, "beta": objective.beta, "tail": objective.tail}
            loss = linear_divergence(hidden, weight, target, response_ids=ids, **form, **shared).loss
        loss.backward()
    return counter.counted


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """A call at a real size, from calls at small ones."""

    flop: float
    kernel_gb: float
    operator_gb: float
    kernels: int
    operators: int
    waits: int


def scaled(
    objective: Objective, kind: str, diagnostics: bool, *, tokens: int, hidden: int, vocabulary: int, chunk: int
) -> Scaled:
    """Launches grow with the chunks, and bytes with tokens × vocabulary, with the weight's entries, and with the tokens."""
    seen = {(n, v): counted(objective, kind, diagnostics, v, n) for n in TOKENS for v in VOCABULARIES}
    (few, many), (narrow, wide) = TOKENS, VOCABULARIES

    def launches(name: str) -> int:
        """The same for each chunk, beside what a call has once."""
        less, more = (getattr(seen[n, narrow], name) for n in TOKENS)
        if [getattr(seen[n, wide], name) for n in TOKENS] != [less, more]:
            raise SystemExit(f"{name} are not the same for both vocabularies: {seen}")
        return round(more + (more - less) * CHUNK / (many - few) * (math.ceil(tokens / chunk) - many / CHUNK))

    def gigabytes(name: str) -> float:
        """Of entries of the logits, of entries of the weight, and of the rest, which is of the tokens."""
        per_column = {
            n: (getattr(seen[n, wide], name) - getattr(seen[n, narrow], name)) / (wide - narrow) for n in TOKENS
        }
        entry = (per_column[many] - per_column[few]) / (many - few)
        of_weight = (per_column[few] - entry * few) / HIDDEN
        rest = (getattr(seen[many, narrow], name) - per_column[many] * narrow) / many
        return (entry * tokens * vocabulary + of_weight * vocabulary * hidden + rest * tokens) / 1e9

    products = (
        4 if kind == "hidden" else 3
    )  # logits of one model or both, and the gradients of hidden states and weight
    return Scaled(
        flop=2 * products * tokens * hidden * vocabulary,
        kernel_gb=gigabytes("kernel_bytes"),
        operator_gb=gigabytes("operator_bytes"),
        kernels=launches("kernels"),
        operators=launches("operators"),
        waits=launches("waits"),
    )


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    found = {name: asdict(scaled(*loss, **asked)) for name, loss in losses().items()}
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
