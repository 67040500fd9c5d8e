"""The demo's teacher, base student and prompts, made once and kept in its run folder."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from opd.data.rendering import Renderer
from opd.demo.fit import fit
from opd.demo.task import DIGITS, spoil, write_prompts
from opd.reporting.files import explain_os_errors
from opd.seeding import derive_seed, seeded
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm

TRAIN_PROMPTS = 16384
EVAL_PROMPTS = 512
MAX_POSITIONS = 2 * DIGITS + 4


def prepare(folder: Path, *, seed: int, say: Callable[[str], None]) -> None:
    """Write `train.jsonl` and `eval.jsonl`, and make `teacher/` and `base/` unless they are there."""
    disable_progress_bar()
    with explain_os_errors("write the demo to", folder):
        write_prompts(folder / "train.jsonl", TRAIN_PROMPTS, seed=derive_seed(seed, 0, "demo train"))
        write_prompts(folder / "eval.jsonl", EVAL_PROMPTS, seed=derive_seed(seed, 0, "demo eval"))
    tokenizer = digit_tokenizer()
    _model(folder / "teacher", tokenizer, "the teacher, on sorted digits", lambda gold, _: gold, seed=seed, say=say)
    _model(folder / "base", tokenizer, "the student, on badly sorted digits", spoil, seed=seed, say=say)


def _model(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    what: str,
    answer: Callable[[str, random.Random], str],
    *,
    seed: int,
    say: Callable[[str], None],
) -> None:
    if (folder / "config.json").exists():
        say(f"{what}: kept from an earlier run ({folder})")
        return
    own_seed = derive_seed(seed, 0, folder.name) % 2**32
    model = tiny_causal_lm(tokenizer, max_positions=MAX_POSITIONS, seed=own_seed)
    with seeded(own_seed):
        loss = fit(model, Renderer(tokenizer, name=folder.name), answer, seed=own_seed)
    say(f"{what}: fitted, {loss:.3f} nats per token")
    temporary = folder.with_name(f".writing-{folder.name}")
    with explain_os_errors("save the demo's models to", folder):
        shutil.rmtree(temporary, ignore_errors=True)
        save_model(model, tokenizer, temporary)
        temporary.rename(folder)
