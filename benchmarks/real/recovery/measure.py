"""What is measured of a model, by `opd eval`: distances from the original on held-out chat prompts, constraints, and the skill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

from benchmarks.real import chat, world
from benchmarks.real.recovery import instructions
from benchmarks.real.recovery.instructions import INSTRUCTIONS
from benchmarks.real.recovery.plan import DAMAGE, TOKENS
from opd.cli.main import main as opd
from opd.types import Prompt

EVAL_SEED = 7


def satisfied(prompt: Prompt, response: str, finished: bool = True) -> float:
    """The reward of an instruction, which the row's answer names by its number: 1 where the response meets the constraint."""
    return float(INSTRUCTIONS[int(prompt.answer or "")].satisfied(response, finished=finished))


def measure(model: Path, folder: Path, *, everything: bool, prompts: int = chat.HELD_OUT) -> dict[str, str]:
    """The columns of recovery.csv that are about a model. `folder` is scratch; without `everything` the two dearest are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    general, original = folder / "held_out.jsonl", str(world.original())
    chat.write(general, chat.held_out()[:prompts])
    own = evaluate(model, general, folder / "own", "--teacher", original, "--max-new-tokens", str(TOKENS))
    found = {
        "skill": f"{world.accuracy(model, DAMAGE):.5f}",
        "reverse_kl": _cells(own["reverse_kl"]),
        "forward_kl": _cells(own["forward_kl"]),
        "forward_kl_on_original": "",
        "satisfied": "",
    }
    if everything:
        # Of the original's own answers, with the model in the place of a teacher: its reverse KL is the model's forward KL.
        swapped = evaluate(
            Path(original), general, folder / "swapped", "--teacher", str(model), "--max-new-tokens", str(TOKENS)
        )
        found["forward_kl_on_original"] = _cells(swapped["reverse_kl"])
        found["satisfied"] = _cells(_satisfied(model, folder))
    shutil.rmtree(folder)
    return found


def _satisfied(model: Path, folder: Path) -> Sequence[float]:
    """1 or 0 of every instruction, for the model's greedy answer."""
    file = folder / "instructions.jsonl"
    lines = [
        json.dumps({"prompt": chat.messages(one.prompt), "answer": str(number)})
        for number, one in enumerate(INSTRUCTIONS)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    reward = f"{__name__}:{satisfied.__name__}"
    limit = str(instructions.MAX_NEW_TOKENS)
    found = evaluate(
        model, file, folder / "instructions", "--reward", reward, "--temperature", "0", "--max-new-tokens", limit
    )
    return found["accuracy"]


def evaluate(model: Path, prompts: Path, out: Path, *words: str) -> dict[str, list[float]]:
    """`opd eval` of the model: a number for every prompt, by metric."""
    shutil.rmtree(out, ignore_errors=True)
    command = ["eval", str(model), "--prompts", str(prompts), "--seed", str(EVAL_SEED), "--out", str(out), *words]
    said = StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        code = opd(command)
    if code:
        raise RuntimeError(f"opd {' '.join(command)} ended with {code}:\n{said.getvalue()}")
    lines = map(json.loads, (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    (found,) = [line["per_prompt"] for line in lines if "per_prompt" in line]
    return found


def _cells(values: Sequence[float]) -> str:
    return " ".join(f"{value:.4g}" for value in values)
