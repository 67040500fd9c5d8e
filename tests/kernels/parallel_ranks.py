"""One rank of test_parallel.py: every case on its rows of the vocabulary, the results in a file.

Called as `python parallel_ranks.py RANK RANKS INIT_FILE OUTPUT`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from kernel_cases import CLOSED, DIVERGENCES, ENDS, GRADIENTS, OUTPUTS, TAILS, Settings, World, named

from opd.errors import OpdError
from opd.kernels import TeacherMixture, linear_divergence, linear_log_prob
from opd.types import DenseTarget, HiddenTarget

TOKENS, HIDDEN, VOCAB = 13, 6, 37
SPLITS: dict[str, list[int]] = {
    "2 even": [19, 18],
    "2 uneven": [31, 6],
    "2 empty": [37, 0],
    "4 even": [10, 9, 9, 9],
    "4 uneven": [1, 17, 3, 16],
    "4 empty": [0, 20, 0, 17],
}
EXTRAS: Settings = {"policy": True, "entropy_bonus": 0.1, "distill_weight": 0.4}


def cases() -> dict[str, tuple[str, Settings]]:
    """Kind of target and settings under each name; the keys `world` and `never` change the world itself."""
    found: dict[str, tuple[str, Settings]] = {}
    for divergence in DIVERGENCES + ENDS:
        found[f"hidden {named(divergence)}"] = ("hidden", {**divergence, "chunk_tokens": 5})
        found[f"dense {named(divergence)} with extras"] = (
            "dense",
            {**divergence, **EXTRAS, "student_temperature": 1.3},
        )
    for divergence in CLOSED:
        found[f"without response {named(divergence)}"] = ("hidden", {**divergence, "response_ids": None})
    for tail in TAILS:
        for name in ("reverse_kl", "generalized_jsd"):
            found[f"top_k {tail} {name}"] = ("top_k", {"tail": tail, "divergence": name, **EXTRAS, "chunk_tokens": 5})
    found["top_k alone"] = ("top_k", {"response_ids": None})
    found["sampled"] = ("sampled", {"policy": True})
    found["none"] = ("none", {"policy": True, "entropy_bonus": 0.2, "chunk_tokens": 4})
    for kind in ("probability", "logit", "loss"):
        for name in ("reverse_kl", "skew_forward_kl", "total_variation"):
            found[f"{kind} {name}"] = (kind, {"divergence": name, "chunk_tokens": 5, "teacher_temperature": 1.4})
    for valid in (33, 5):
        found[f"valid_vocab {valid}"] = (
            "hidden",
            {"valid_vocab": valid, "policy": True, "divergence": "generalized_jsd"},
        )
        found[f"head of {valid}"] = ("head", {"valid": valid, "entropy_bonus": 0.1})
    for name in ("reverse_kl", "skew_forward_kl", "skew_reverse_kl"):
        found[f"student rules out two, {name}"] = ("hidden", {"never": "student", "divergence": name, "policy": True})
        found[f"teacher rules out two, {name}"] = ("never", {"divergence": name})
    found["student rules out two, top_k"] = ("top_k", {"never": "student", "entropy_bonus": 0.1})
    for offset in (60.0, -150.0):
        for kind in ("hidden", "top_k", "probability"):
            settings = {"world": {"offset": offset}, **EXTRAS, "chunk_tokens": 5, "dtype": torch.float32}
            found[f"offset {offset} {kind}"] = (kind, settings)
    found["uncounted"] = ("hidden", {"weights": torch.arange(TOKENS) % 3 * 0.5})
    found["nothing counted"] = ("hidden", {"weights": torch.zeros(TOKENS)})
    found["no tokens"] = ("hidden", {"world": {"tokens": 0}})
    found["frozen weight"] = ("hidden", {"grads": "hb"})
    found["frozen hidden"] = ("hidden", {"grads": "wb"})
    found["no gradients"] = ("hidden", {"grads": ""})
    return found


def make(settings: Settings) -> tuple[World, Settings]:
    """The world of a case, and what is left for the call."""
    settings = dict(settings)
    world = World(**({"tokens": TOKENS, "hidden": HIDDEN, "vocab": VOCAB} | settings.pop("world", {})))
    if settings.pop("never", None) == "student":
        world.parts["bias"][[2, 30]] = -torch.inf
    world.parts["response_ids"] = torch.where(world.response_ids % 28 == 2, 3, world.response_ids)
    if "valid_vocab" in settings or "valid" in settings:
        world.parts["response_ids"] = world.response_ids % 5
    world.parts["old"] = world.student_logp() + world.advantages / 4
    return world, settings


def call(world: World, kind: str, settings: Settings, rows: slice, **more: Any) -> dict[str, torch.Tensor]:
    """A loss on these rows of the vocabulary: its numbers and gradients."""
    settings = dict(settings)
    dtype, grads = settings.pop("dtype", torch.float64), settings.pop("grads", "hwb")
    valid = settings.pop("valid", None)
    leaves = [
        part.to(dtype).clone().requires_grad_(letter in grads)
        for part, letter in ((world.hidden_states, "h"), (world.weight[rows], "w"), (world.bias[rows], "b"))
    ]
    if settings.get("policy") is True:
        settings["policy"] = world.policy(dtype)
    weights = settings.pop("weights", world.token_weights).to(dtype)
    settings = {"response_ids": world.response_ids, "token_weights": weights} | settings
    if kind == "never":
        logits = world.teacher_logits().to(dtype)
        logits[:, [2, 30]] = -torch.inf
        target: Any = DenseTarget(logits=logits)
    else:
        target = world.target("hidden" if kind == "head" else kind, dtype)
    if valid is not None:
        target = replace(target, head=replace(target.head, valid_vocab=valid))
    out = linear_divergence(leaves[0], leaves[1], cut(target, rows), bias=leaves[2], **settings, **more)  # pyright: ignore[reportArgumentType]
    if out.loss.requires_grad:
        out.loss.backward()
    found = {"loss": out.loss, **{name: getattr(out, name) for name in OUTPUTS}}
    found |= {name: leaf.grad for name, leaf in zip(GRADIENTS, leaves, strict=True)}
    return {name: value.detach() for name, value in found.items() if value is not None}


def cut(target: Any, rows: slice) -> Any:
    """These rows of the teacher's vocabulary."""
    if isinstance(target, TeacherMixture):
        return replace(target, targets=tuple(cut(member, rows) for member in target.targets))
    if isinstance(target, HiddenTarget):
        head = target.head
        bias = None if head.bias is None else head.bias[rows]
        return replace(target, head=replace(head, weight=head.weight[rows], bias=bias))
    return DenseTarget(logits=target.logits[:, rows]) if isinstance(target, DenseTarget) else target


def log_prob(world: World, rows: slice, **more: Any) -> dict[str, torch.Tensor]:
    leaves = [p.clone().requires_grad_() for p in (world.hidden_states, world.weight[rows], world.bias[rows])]
    logp, entropy = linear_log_prob(leaves[0], leaves[1], world.response_ids, bias=leaves[2], chunk_tokens=5, **more)
    (logp.square() + 0.3 * entropy.exp()).sum().backward()
    grads = {name: leaf.grad for name, leaf in zip(GRADIENTS, leaves, strict=True)}
    return {"logp": logp.detach(), "entropy": entropy.detach(), **grads}


@contextmanager
def counted(into: Counter[str]) -> Iterator[None]:
    """Counts collectives by name."""
    plain = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", "all_gather_object")}

    def counting(name: str):
        def one(*args: Any, **kwargs: Any) -> Any:
            into[name] += 1
            return plain[name](*args, **kwargs)

        return one

    for name in plain:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, function in plain.items():
            setattr(dist, name, function)


def refusals(rank: int, sizes: list[int], rows: slice) -> dict[str, str]:
    world, _ = make({})
    wrong = slice(rows.start, rows.stop - 1)
    found = {}
    for name, target, settings in (
        ("reference", world.target("hidden"), {"impl": "reference"}),
        ("minimal", world.target("hidden"), {"memory": "minimal"}),
        ("teacher split otherwise", cut(world.target("hidden"), wrong), None),
        ("logits split otherwise", cut(world.target("dense"), wrong), None),
    ):
        given = cut(target, rows) if settings is not None else target
        try:
            linear_divergence(
                world.hidden_states, world.weight[rows], given, group=dist.group.WORLD, **(settings or {})
            )
            found[name] = ""
        except OpdError as error:
            found[name] = str(error)
    return found


def with_dtensor(rank: int) -> dict[str, Any]:
    """Each rank has tokens of its own; the weight and the bias are sharded parameters."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    world = World(TOKENS, HIDDEN, VOCAB)
    own = slice(0, 5) if rank == 0 else slice(5, TOKENS)
    hidden = world.hidden_states[own].clone().requires_grad_()
    weight = torch.nn.Parameter(distribute_tensor(world.weight, mesh, [Shard(0)]))
    bias = torch.nn.Parameter(distribute_tensor(world.bias, mesh, [Shard(0)]))
    target = DenseTarget(logits=world.target("dense").logits[own])
    with CommDebugMode() as seen:
        out = linear_divergence(
            hidden, weight, target, bias=bias, token_weights=world.token_weights[own], chunk_tokens=2
        )
    forward = {str(k): v for k, v in seen.get_comm_counts().items()}
    with CommDebugMode() as seen:
        out.loss.backward()
    backward = {str(k): v for k, v in seen.get_comm_counts().items()}
    assert weight.grad is not None and bias.grad is not None and hidden.grad is not None
    return {
        "forward": forward,
        "backward": backward,
        "placements": str(weight.grad.placements),
        "loss": out.loss.detach(),
        "d_hidden": hidden.grad,
        "d_weight": weight.grad.full_tensor(),
        "d_bias": bias.grad.full_tensor(),
    }


def main(rank: int, ranks: int, init_file: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=ranks)
    results: dict[str, Any] = {}
    for split, sizes in SPLITS.items():
        if len(sizes) != ranks:
            continue
        rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        for name, (kind, settings) in cases().items():
            world, left = make(settings)
            seen: Counter[str] = Counter()
            with counted(seen):
                found = call(world, kind, left, rows, group=dist.group.WORLD)
            results[f"{split}: {name}"] = found, dict(seen)
        results[f"{split}: log_prob"] = log_prob(make({})[0], rows, group=dist.group.WORLD), {}
        if "even" in split and "un" not in split:
            results[f"{split}: refusals"] = refusals(rank, sizes, rows)
    if ranks == 2:
        results["dtensor"] = with_dtensor(rank)
    torch.save(results, output)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
