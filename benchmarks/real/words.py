"""The task: write words in the opposite order. `apple bell card ->` wants ` card bell apple` and the end of the answer.

Every word is one token of the model with the space before it, so an answer of three words has four tokens. A prompt is never seen twice.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_WORDS = """
apple arm baby bag ball bank bed bell bird boat book box boy bread bridge bus cake camp car card cat chair city clock cloud coat coin
cook corn cow cup dance day desk dog door dream dress drum duck dust ear egg eye face farm field fire fish flag floor flower food foot
fork fruit game garden gate girl glass gold grass hair hall hand hat heart hill home horse house ice island jar key king kite knee lake
lamp land leaf leg letter light lion lip lock map market meat milk mirror money moon mountain mouse mouth music nail neck nest night
nose nut ocean oil orange page paper park pen phone pig pin plant plate pond queen rain ring river road rock roof room rope rose salt
sand school sea seat seed ship shirt shoe shop silver sister sky snow soap sock son song soup spoon star stone store storm street sugar
summer sun table tail tea tent tiger tree train truck wall watch water wave wheel wind window wing winter wolf wood world yard
"""
WORDS = tuple(_WORDS.split())
TRAINING, HELD_OUT = 16384, 512
HELD_OUT_SEED = 1_000_003
"""The same held-out prompts for every seed, so that seeds differ in training alone."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One difficulty."""

    name: str
    words: int
    warm_steps: int
    """Supervised steps of 24 rows that teach the form of an answer; the model after them is the base."""
    warm_rate: float = 5e-5
    """AdamW's learning rate in these steps."""


CELLS = {
    cell.name: cell for cell in (Cell(name="hard", words=3, warm_steps=20), Cell(name="easy", words=2, warm_steps=20))
}


def rows(count: int, words: int, seed: int) -> Iterator[tuple[str, str]]:
    """Prompts and answers."""
    source = random.Random(seed)
    for _ in range(count):
        drawn = source.sample(WORDS, words)
        yield f"{' '.join(drawn)} ->", " " + " ".join(reversed(drawn))


def write_prompts(path: Path, count: int, words: int, seed: int) -> None:
    """JSONL that `opd train` reads; exact_match strips the answer."""
    lines = [json.dumps({"prompt": prompt, "answer": answer.strip()}) for prompt, answer in rows(count, words, seed)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
