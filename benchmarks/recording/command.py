"""CPU seconds of a step that records samples, token by token, against the same step without, in turn.

`python -m benchmarks recording` trains two copies of a student on the same rollouts, one of which records `log.samples` samples at
every step, and writes benchmarks/results/recording.md. By default a run records at every tenth step: the cost is a tenth of that.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from benchmarks import RESULTS, markdown
from opd.config import LogConfig
from opd.config.recipe import build, merge, read_recipe
from opd.demo.prepare import MAX_POSITIONS
from opd.demo.recipe import recipe_path
from opd.demo.task import write_prompts
from opd.reporting.record import RunRecorder
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer.from_config import RunComponents
from opd.trainer.loop import take_step
from opd.trainer.records import record_samples

WARM_UP = 2  # steps: the first compile and allocate
VOCABULARY = 32_000


@dataclass(frozen=True, kw_only=True)
class World:
    """Models and prompts on disk, and the recipe of a run with them."""

    what: str
    recipe: dict[str, Any]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks recording", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of a step of the large vocabulary")
    parser.add_argument("--tokens", type=int, default=64, help="length limit of its responses")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", choices=["demo", "words"], help="one of the two models")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    disable_progress_bar()
    rows = []
    for make in (_demo, _words):
        if args.only in (None, make.__name__.removeprefix("_")):
            with tempfile.TemporaryDirectory() as folder:
                rows.append(_measured(make, args, Path(folder)))
    page = _page(args, rows)
    if args.only is None:
        (args.results / "recording.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def _demo(folder: Path, args: argparse.Namespace) -> World:
    """The demo's models, unfitted, and its recipe."""
    write_prompts(folder / "prompts.jsonl", 2048, seed=1)
    _save(folder, digit_tokenizer(), max_positions=MAX_POSITIONS)
    return World(what="the demo's: 13 tokens, 2 layers of 64", recipe=read_recipe(recipe_path()))


def _words(folder: Path, args: argparse.Namespace) -> World:
    """A vocabulary of the size that small released models have."""
    words = {f"w{number}": number for number in range(VOCABULARY - 2)} | {
        "<pad>": VOCABULARY - 2,
        "<eos>": VOCABULARY - 1,
    }
    backend = Tokenizer(models.WordLevel(words))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    rows = (f'{{"prompt": "w{n} w{7919 * n % 31_000} w{n + 1}", "answer": "w1"}}\n' for n in range(2000))
    (folder / "prompts.jsonl").write_text("".join(rows))
    shape = {"hidden": args.hidden, "heads": args.hidden // 64, "layers": args.layers, "max_positions": 128}
    _save(folder, tokenizer, architecture="llama", **shape)
    recipe = {
        "rollout": {"max_new_tokens": args.tokens},
        "train": {"prompts_per_step": args.rollouts, "samples_per_prompt": 1},
        "optimizer": {"lr": 1e-5},
    }
    what = f"{VOCABULARY // 1000} 000 tokens, {args.layers} layers of {args.hidden}"
    return World(what=what, recipe=recipe)


def _save(folder: Path, tokenizer: PreTrainedTokenizerBase, **shape: Any) -> None:
    for name, seed in (("student", 1), ("teacher", 2)):
        save_model(tiny_causal_lm(tokenizer, seed=seed, **shape), tokenizer, folder / name)


class Run:
    """A student that trains step by step, and writes the samples of every step."""

    def __init__(self, world: World, folder: Path, *, samples: int, steps: int) -> None:
        own = {
            "student.model": str(folder / "student"),
            "teacher.model": str(folder / "teacher"),
            "prompts.path": str(folder / "prompts.jsonl"),
            "train.steps": steps,
            "eval.every": 0,
            "optimizer.warmup_steps": 0,
            "log.samples_every": 1,
            "log.samples": samples,
            "log.progress": "off",
            "run_dir": str(folder / f"run-{samples}"),
        }
        self.parts = RunComponents(build(merge(world.recipe, own)))
        self.recorder = RunRecorder(folder / f"run-{samples}", resume_step=None)
        self.parts.draws.load(self.parts.student)

    def step(self) -> tuple[float, dict[str, float]]:
        """CPU seconds of a step as the trainer takes it, and its metrics."""
        parts, number = self.parts, self.parts.student.version
        began = time.process_time()
        done = take_step(parts, number)
        self.recorder.step(number, done.metrics)
        record_samples(
            self.recorder, number, done.rollouts, done.out, done.scored.rewards, parts.renderer, parts.config.log, parts.teacher
        )  # fmt: skip
        parts.draws.load(parts.student)
        return time.process_time() - began, done.metrics


def _measured(make: Callable[[Path, argparse.Namespace], World], args: argparse.Namespace, folder: Path) -> list[str]:
    world, default = make(folder, args), LogConfig()
    counts = (0, default.samples)
    runs = {samples: Run(world, folder, samples=samples, steps=WARM_UP + args.steps) for samples in counts}
    seconds: dict[int, list[float]] = {samples: [] for samples in runs}
    for turn in range(WARM_UP + args.steps):
        seen = {}
        for samples in counts if turn % 2 else reversed(counts):
            took, metrics = runs[samples].step()
            seen[samples] = {name: value for name, value in metrics.items() if not name.startswith("time/")}
            if turn >= WARM_UP:
                seconds[samples].append(took)
        if seen[0] != seen[default.samples]:
            raise AssertionError("recording changes a metric: the two steps are not the same")
    for run in runs.values():
        run.recorder.close()
    plain, recorded = (seconds[samples] for samples in counts)
    share = statistics.median(b / a - 1 for a, b in zip(plain, recorded, strict=True))
    lines = (folder / f"run-{default.samples}" / "samples.jsonl").read_bytes().splitlines()
    return [
        world.what,
        f"{seen[0]['tokens']:.0f}",
        f"{1000 * statistics.median(plain):.0f} ms",
        f"{1000 * statistics.median(b - a for a, b in zip(plain, recorded, strict=True)):.1f} ms",
        f"{100 * share:.1f} %",
        f"{100 * share / default.samples_every:.2f} %",
        f"{statistics.mean(map(len, lines)) / 1000:.1f} kB",
    ]


def _page(args: argparse.Namespace, rows: Sequence[Sequence[str]]) -> str:
    default = LogConfig()
    head = ["model", "response tokens of a step", "step", "recording", "share of a recorded step", "share of a run", "a sample on disk"]  # fmt: skip
    return "\n".join(
        [
            "# What recording samples costs",
            "",
            f"`python -m benchmarks recording --steps {args.steps} --rollouts {args.rollouts} --tokens {args.tokens} --hidden {args.hidden} "
            f"--layers {args.layers}` on {platform.machine()}, one thread; CPU time, medians of {args.steps} pairs of steps on the same "
            f"rollouts, taken in turn. A recorded step keeps {default.samples} samples with what both models said at each token; a run "
            f"records every {default.samples_every}th step.",
            "",
            markdown.table(head, rows),
            "",
        ]
    )
