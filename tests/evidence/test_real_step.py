"""The benchmark of a training step: its page is a function of its CSV, and its limits count what PyTorch counts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.real.step.command import COLUMNS, kept, summary
from benchmarks.real.step.report import OPD, PHASES, TRL, page
from benchmarks.real.step.roofline import Shape, limits, work
from benchmarks.rows import read, write
from torch.utils.flop_counter import FlopCounterMode

from opd.testing import tiny_causal_lm

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "real"
SIZES = {"threads": 1, "steps": 2, "prompts": 2, "max_new_tokens": 6}
LENGTHS = [[(5, 3), (7, 6)]] * 3


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama whose query heads share keys and values. PyTorch does not count scaled_dot_product_attention on a CPU."""
    made = tiny_causal_lm(97, architecture="llama", hidden=64, heads=4, kv_heads=2, layers=3)
    made.set_attn_implementation("eager")
    return made


@pytest.fixture
def shape(model: Any) -> Shape:
    return Shape.of_config(model.config.to_dict())


def counted(model: Any, rows: int, tokens: int, backward: bool = False) -> float:
    """Floating-point operations of PyTorch's own counter."""
    counter = FlopCounterMode(display=False)
    with counter:
        loss = model(input_ids=torch.ones(rows, tokens, dtype=torch.long)).logits.sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def test_a_forward_pass_is_counted_as_pytorch_counts_it(model: Any, shape: Shape):
    rows, tokens = 2, 48
    ours = rows * (shape.body(tokens, tokens) + shape.head(tokens))
    assert ours == pytest.approx(counted(model, rows, tokens), rel=0.02)


def test_an_update_is_three_forward_passes_and_the_teachers_head(model: Any, shape: Shape):
    tokens = 48
    step = work(shape, [(1, tokens)])  # every token that is fed predicts one of the response
    assert step.update - shape.head(tokens) == pytest.approx(counted(model, 1, tokens, backward=True), rel=0.02)
    assert step.teacher == shape.body(tokens, tokens)


def test_decoding_reads_the_weights_for_every_token_but_the_first(model: Any, shape: Shape):
    step = work(shape, [(5, 3), (7, 6)])
    assert shape.weights == sum(p.numel() for p in model.parameters() if p.ndim == 2)
    assert step.decode_bytes == 5 * shape.weights * 4
    first = sum(shape.body(n, n) + shape.head(1) for n in (5, 7))
    assert step.prefill == first
    seen = (6, 7, 8, 9, 10, 11, 12)  # keys of the two and five tokens that are fed one by one
    assert step.decode == sum(shape.body(1, keys) + shape.head(1) for keys in seen)


def test_the_limit_of_decoding_is_the_slower_of_products_and_reading():
    task = {"prefill": 10.0, "decode": 20.0, "decode_bytes": 3.0, "teacher": 30.0, "update": 40.0, "update_bytes": 1.0}
    rates = {"rollout": 10.0, "teacher": 5.0, "update": 20.0}
    assert limits(task, rates, 1.0) == {"rollout": 1 + 3.0, "teacher": 6.0, "update": 2.0 + 1.0}
    assert limits(task, rates, 3.0)["rollout"] == 1 + 2.0


def result(seconds: float) -> dict[str, Any]:
    """As a worker writes it; the first step is to be left out."""
    phases = {"rollout": (seconds / 2, 0.3), "teacher": (seconds / 8, 0.1), "update": (seconds * 3 / 8, 0.2)}
    step = {"wall": seconds, "cpu": 0.6, "phases": phases, "tokens": 9, "loss": 0.5}
    return {
        "steps": [{**step, "wall": 1000.0}, step, step],
        "lengths": LENGTHS,
        "peak_bytes": 2 << 30,
        "float32_rate": 1e11,
        "bfloat16_rate": 3e11,
        "read_rate": 1e10,
        "products": "rollout=float32 teacher=float32 update=bfloat16",
        "prompts": "abc",
        "versions": {"torch": "2"},
    }


def row(trainer: str, number: int, seconds: float, shape: Shape) -> dict[str, str]:
    own = {"trainer": trainer, "dtype": "float32", "round": number, **SIZES, **summary(result(seconds), shape)}
    assert own.keys() == set(COLUMNS)
    return {name: str(own[name]) for name in COLUMNS}


def test_the_page_is_a_function_of_the_csv(tmp_path: Path, shape: Shape):
    rows = [row(OPD, 0, 2.0, shape), row(TRL, 0, 6.0, shape), row(OPD, 1, 1.0, shape), row(TRL, 1, 3.0, shape)]
    write(tmp_path / "step.csv", COLUMNS, rows)
    text = page(read(tmp_path / "step.csv"))
    assert text == page(rows)
    assert "| float32 | opd | 2 | 1.5 [1, 2] | 0.75 | 0.19 | 0.56 |" in text
    assert "opd trains on 3.00 times the response tokens per second of 'TRL', at 1.00 of its peak memory" in text
    least = limits(asdict(work(shape, LENGTHS[0])), dict.fromkeys(PHASES, 3e11), 1e10)["update"]
    line = next(line for line in text.splitlines() if "| opd | update | bfloat16 |" in line)
    assert line.endswith(f"| {least:.2f} | 0.56 | {least / 0.5625:.0%} |")


def test_runs_of_other_sizes_are_refused(tmp_path: Path, shape: Shape):
    write(tmp_path / "step.csv", COLUMNS, [row(OPD, 0, 2.0, shape)])
    assert len(kept(tmp_path / "step.csv", SIZES)) == 1
    with pytest.raises(SystemExit, match=r"threads=1, and 2 is asked for.*--results"):
        kept(tmp_path / "step.csv", {**SIZES, "threads": 2})


@pytest.mark.skipif(not (RESULTS / "step.csv").exists(), reason="no runs are kept")
def test_the_kept_page_is_written_again_from_its_csv():
    assert page(read(RESULTS / "step.csv")) == (RESULTS / "step.md").read_text("utf-8")
