"""Run as a program: three steps of every case with weights that are divided over as many ranks as it is told; one rank has them whole.

usage: fsdp2_cases.py SCHOOL RESULTS 1 2 4
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rank_cases import CASES, MORE, as_rank, in_forks, make_school, recipe, taken

from opd.config import LoraConfig
from opd.ranks import Ranks
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer.from_config import Given, RunComponents
from opd.trainer.loop import take_step
from opd.trainer.lora import add_lora

torch.set_num_threads(1)
FEWER = "fewer rollouts than ranks"
LEFT_OUT = {"muon", "natural gradient", "the mean of sequences", "tokens of high entropy"}
QUICK: dict[str, object] = {"guard__canary__action": "off"}
FORMS: dict[str, dict[str, object]] = {
    "weights gathered layer by layer for every token": {"by_layer": True},
    "gradient checkpointing": {"student__gradient_checkpointing": True, "optimizer__max_grad_norm": 0.01},
    "an output layer of its own": {"student__model": "untied", "teacher__model": "untied teacher"},
    FEWER: {"train__prompts_per_step": 3, "train__samples_per_prompt": 1},
}
ALL: dict[str, dict[str, object]] = {
    name: {**case, "train__parallel": "fsdp2", **({} if name in FORMS | MORE else QUICK)}
    for name, case in (CASES | FORMS).items()
    if name not in LEFT_OUT
}
PRODUCT = {name: case for name, case in ALL.items() if name not in FORMS and name not in MORE}
"""Full weights and adapters × layouts × losses, for every number of ranks, and not evaluated; most of the others are for two."""
FOUR = {**PRODUCT, FEWER: ALL[FEWER]}
HALF = ("full, packed", "adapters, padded")
TWO = {name: case for name, case in ALL.items() if not name.startswith(HALF)}
MEASURED = {"train__parallel": "fsdp2", "train__tokens_per_microbatch": 14}


def make_divided_school(folder: Path) -> Path:
    """The school of rank_cases with students of two layers, and a pair whose output layers are not their embeddings."""
    make_school(folder)
    tokenizer = digit_tokenizer()
    for name, seed, tie in (("student", 1, True), ("untied", 3, False), ("untied teacher", 4, False)):
        options: Any = {"hidden": 32, "layers": 2, "max_positions": 64, "initializer_range": 0.4, "tie": tie}
        save_model(tiny_causal_lm(tokenizer, seed=seed, **options), tokenizer, folder / name)
    return folder


def cases_of(world: int) -> dict[str, dict[str, object]]:
    """Ranks on two cores take their time: four have no other forms, and two half of the product."""
    return {1: ALL, 2: TWO, 4: FOUR}[world]


def import_all() -> None:
    """What every rank would import for itself."""
    import opd.trainer.division  # noqa: F401

    add_lora(tiny_causal_lm(4, hidden=8, layers=1), LoraConfig(rank=1), seed=0)


def in_folder(case: Mapping[str, object], folder: Path) -> dict[str, object]:
    """The case with its models by their paths."""
    models = {key: str(folder / str(value)) for key, value in case.items() if key.endswith("__model") and value}
    return {**case, **models}


def divided(folder: Path, case: dict[str, object], ranks: Ranks) -> dict[str, Any]:
    """What `taken` sees; no room for whole weights while rollouts are drawn is what one case is about."""
    from opd.trainer import division

    room, case, evaluates = division.ROOM, in_folder(case, folder), case not in PRODUCT.values()
    division.ROOM = 0.0 if case.pop("by_layer", False) else room
    try:
        return taken(folder, case, ranks, evaluates=evaluates)
    finally:
        division.ROOM = room


def measure(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Bytes that every rank has in a step, and how often its update gathers the output layer."""
    parts = RunComponents(recipe(folder, MEASURED), Given(ranks=ranks))
    student, seen = parts.student, dict[str, Any]()
    if student.division is None:
        return {}
    gathers = counted_gathers(student.division.model)
    update, step_of = student.update, student._step

    def watched_update(batches: Any, *args: Any) -> Any:
        seen["micro-batches"], before = len(batches), gathers[0]
        out = update(batches, *args)
        seen["gathers"] = gathers[0] - before
        return out

    def watched_step(*args: Any) -> Any:
        trained = student.parameters()
        seen["weights"] = size_of(trained)
        seen["gradients"] = size_of([p.grad for p in trained])
        return step_of(*args)

    student.update = watched_update  # pyright: ignore[reportAttributeAccessIssue]  # looks, and goes on
    student._step = watched_step  # pyright: ignore[reportAttributeAccessIssue]
    parts.draws.load(student)
    take_step(parts, 0)
    moments = [
        value for state in student.optimizers[0].state.values() for name, value in state.items() if name != "step"
    ]
    seen["moments"] = size_of(moments)
    teacher = parts.teachers.loaded["teacher"].model
    assert parts.divisions is not None
    parts.divisions.close()
    seen["teacher"] = size_of(list(teacher.parameters()))
    seen["teacher's whole"] = sum(p.numel() * p.element_size() for p in teacher.parameters())
    seen["whole"] = sum(p.numel() * p.element_size() for p in student.parameters())
    return {"bytes": ranks.gather(seen)}


def size_of(tensors: Any) -> int:
    """Bytes of the memory that holds this rank's parts; several may be in one piece."""
    pieces = [t.to_local().untyped_storage() for t in tensors]
    return sum({piece.data_ptr(): piece.nbytes() for piece in pieces if piece.nbytes()}.values())


def counted_gathers(model: Any) -> list[int]:
    """A list whose number is how often the model's own group, output layer and all, has been gathered."""
    from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

    count = [0]

    class Counted(DefaultAllGather):
        def __call__(self, *args: Any, **options: Any) -> Any:
            count[0] += 1
            return super().__call__(*args, **options)

    model.set_custom_all_gather(Counted())
    return count


if __name__ == "__main__":
    school, results = Path(sys.argv[1]), Path(sys.argv[2])
    import_all()
    work = {world: partial(as_rank, school, cases=cases_of(world), take=divided, also=measure) for world in (1, 2, 4)}
    sys.exit(not all(in_forks(int(world), results / f"{world}.pt", work[int(world)]) for world in sys.argv[3:]))
