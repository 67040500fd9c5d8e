"""Run as a program: three steps of every case in as many ranks as it is told, and what rank 0 has seen of them in a file for each.

usage: rank_cases.py SCHOOL RESULTS 1 2 4
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from opd.config.recipe import build, merge
from opd.joining import session
from opd.ranks import STARTED_BY, Ranks
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer.from_config import Given, RunComponents
from opd.trainer.loop import take_step
from worlds import make_world, settings

torch.set_num_threads(1)
STEPS = 3
MOST_S = 300
NAMES = ("even", "odd")
RL = {"rl__weight": 1.0, "rl__reward": "worlds:first_digit", "train__samples_per_prompt": 4}
K1 = {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"}
TRAINED = {"full": {}, "adapters": {"student__lora__rank": 4}}
LAYOUTS = {"padded": {}, "packed": {"train__layout": "packed", "rollout__batch_size": 5}}
LEARNT: dict[str, dict[str, object]] = {
    "reverse KL": {},
    "top-k": {"objective__support": "teacher_top_k", "objective__top_k": 4, "teacher__supply": "top_k"},
    "hybrid": {**RL, "rl__scale": "match"},
    "two teachers": {"teachers": True, "mixture__balance_tokens": True, "mixture__weights": {"even": 0.3, "odd": 0.7}},
}
MUON = "muon"
NATURAL = "natural gradient"
MORE: dict[str, dict[str, object]] = {
    "a mixture": {"teachers": True, "mixture__kind": "probability"},
    "whole logits": {"teacher__supply": "dense"},
    "advantages with a reference": {**RL, **K1, "rl__combine": "advantages", "rl__reference_kl": 0.1},
    "the mean of sequences": {"objective__reduction": "sequence_mean", "train__drop": ["truncated"]},
    "tokens of high entropy": {"train__token_fraction": 0.3, "rollout__top_p": 0.9},
    MUON: {"optimizer__name": "muon"},
    NATURAL: {
        "optimizer__name": "natural_gradient",
        "optimizer__lr": 0.5,
        "optimizer__natural_gradient__iterations": 4,
        "optimizer__natural_gradient__probes": 2,
        "train__token_fraction": 0.6,
    },
    "the teacher's samples": {
        "rollout__lmbda": 0.5,
        "rollout__off_policy": "teacher",
        "rollout__temperature": 0.7,
        "rollout__cross_entropy": 0.3,
    },
    "an average of the student": {
        "teacher__model": "",
        "teacher__source": "ema",
        "objective__teacher_temperature": 0.7,
        "optimizer__max_grad_norm": 0.01,
    },
}
CASES: dict[str, dict[str, object]] = {
    f"{trained}, {layout}, {learnt}": {**TRAINED[trained], **LAYOUTS[layout], **LEARNT[learnt]}
    for trained, layout, learnt in itertools.product(TRAINED, LAYOUTS, LEARNT)
} | MORE


def make_school(folder: Path) -> Path:
    """A student, a teacher, and two more teachers, of whom every prompt names one."""
    make_world(folder)
    tokenizer = digit_tokenizer()
    for name, hidden, seed in (("even", 32, 5), ("odd", 48, 6)):
        model = tiny_causal_lm(tokenizer, hidden=hidden, layers=1, max_positions=64, seed=seed, initializer_range=0.4)
        save_model(model, tokenizer, folder / name)
    rows = [{"prompt": f"{i * 7919 % 10 ** (1 + i % 4)}>", "answer": str(i), "who": NAMES[i % 2]} for i in range(40)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder: Path, case: dict[str, object]) -> Any:
    more = {
        "train__steps": STEPS,
        "optimizer__max_grad_norm": 0.0,
        "optimizer__warmup_steps": 0,
        "eval__prompts": 6,
        "prompts__shuffle": False,
    } | case
    several = more.pop("teachers", False)
    values = settings(folder, folder / "run", **more)
    if several:
        del values["teacher.model"]
        values |= {"prompts.teacher_column": "who"}
        values |= {f"teachers.{name}.model": str(folder / name) for name in NAMES}
    return build(merge({}, values))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of it, also where every rank has a part; they have to ask together."""
    divided: Any = tensor
    return divided.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor.clone()


def taken(folder: Path, case: dict[str, object], ranks: Ranks, *, evaluates: bool = True) -> dict[str, Any]:
    """Rollouts, metrics and gradients of the steps, the weights after them, and an evaluation. Of divided gradients those of the first
    step, since making them whole takes time."""
    parts = RunComponents(recipe(folder, case), Given(ranks=ranks))
    student, steps = parts.student, []
    named = {name: p for name, p in student.model.named_parameters() if p.requires_grad}
    gradients: list[dict[str, torch.Tensor]] = []
    step_of = student._step

    def watched(batches: Any, temperature: float) -> dict[str, float]:
        wanted = named if parts.divisions is None or not gradients else {}
        gradients.append({name: whole(p.grad) for name, p in wanted.items() if p.grad is not None})
        return step_of(batches, temperature)

    student._step = watched  # pyright: ignore[reportAttributeAccessIssue]  # looks, and goes on
    parts.draws.load(student)
    for step in range(STEPS):
        done = take_step(parts, step)
        parts.draws.load(student)
        steps.append(
            {
                "rollouts": [(r.id, r.group, r.prompt.index, r.response_ids, r.text) for r in done.rollouts],
                "logp": [r.sampler_logp for r in done.rollouts],
                "metrics": {name: value for name, value in done.metrics.items() if not name.startswith("time/")},
                "views": sorted(done.out.views),
                "per_token": {rollout.id: kl.tolist() for rollout, kl in done.out.per_token},
            }
        )
    measured = {}
    if evaluates:
        evaluation = parts.evaluate("student", extra=False)
        measured = {name: value for name, value in evaluation.metrics.items() if not name.startswith("time/")}
    if parts.divisions is not None:
        parts.divisions.close()
    weights = {name: whole(p.detach()) for name, p in named.items()}
    return {"steps": steps, "gradients": gradients, "weights": weights, "evaluation": measured}


def nothing_more(_folder: Path, _ranks: Ranks) -> dict[str, Any]:
    return {}


def as_rank(
    folder: Path,
    out: Path,
    cases: Mapping[str, dict[str, object]],
    take: Callable[[Path, dict[str, object], Ranks], dict[str, Any]] = taken,
    also: Callable[[Path, Ranks], dict[str, Any]] = nothing_more,
) -> None:
    """Take all cases as one rank of a session, and write what rank 0 has seen."""
    with session() as ranks:
        found = {name: take(folder, case, ranks) for name, case in cases.items()}
        everywhere = ranks.gather([one["weights"] for one in found.values()])
        apart = [
            name
            for theirs in everywhere
            for name, own, other in zip(found, everywhere[0], theirs, strict=True)
            if any(not torch.equal(own[key], other[key]) for key in own)
        ]
        seen = {"cases": found, "apart": apart, **also(folder, ranks)}
        if ranks.first:
            torch.save(seen, out)


def start(world: int, out: Path, work: Callable[[Path], None], *, words: bool = False) -> list[int]:
    """Ranks as forks of this process, in which everything is imported already; their process ids. What rank N prints goes to
    OUT.N.txt with `words`."""
    Path(f"{out}.store").unlink(missing_ok=True)
    children = []
    for rank in range(world):
        child = os.fork()
        if child:
            children.append(child)
            continue
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in own.items()}, **{STARTED_BY: f"{out}.store"})
        code = 1
        try:
            if words:
                file = os.open(f"{out}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(file, 1)
                os.dup2(file, 2)
            work(out)
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return children


def exit_codes(children: Sequence[int], seconds: float) -> list[int]:
    """Of all ranks, once they have ended; those that have not in this time are killed."""
    until, codes = time.monotonic() + seconds, dict[int, int]()
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                codes |= {child: os.waitstatus_to_exitcode(status)} if ended else {}
        if time.monotonic() > until:
            for child in {*children} - codes.keys():
                os.kill(child, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[child] for child in children]


def in_forks(world: int, out: Path, work: Callable[[Path], None]) -> bool:
    """True where all ranks ended well."""
    return exit_codes(start(world, out, work), MOST_S) == [0] * world


if __name__ == "__main__":
    school, results = Path(sys.argv[1]), Path(sys.argv[2])
    sys.exit(
        not all(
            in_forks(int(world), results / f"{world}.pt", partial(as_rank, school, cases=CASES))
            for world in sys.argv[3:]
        )
    )
