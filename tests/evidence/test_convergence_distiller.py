"""The convergence benchmark's row from `opd.Distiller`: the product's own trainer does what the benchmark's loop does."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.convergence import distiller, outside
from benchmarks.convergence.distiller import (
    DISTILLER,
    DRAWS,
    LOOP,
    REPLAY,
    distil,
    distiller_of,
    table,
    tokenizer_of_the_task,
)
from benchmarks.convergence.gpt2 import CHARACTERS, decoder_of, texts
from benchmarks.convergence.methods import METHODS
from benchmarks.convergence.model import Shape, TinyDecoder
from benchmarks.convergence.outside import COLUMNS, OutsideRun
from benchmarks.convergence.store import Row, Setting, Store
from benchmarks.convergence.task import VOCAB, accuracy, draw_prompts, generator
from benchmarks.convergence.train import Job, collect, loss_of, step_prompts, train
from benchmarks.convergence.world import Cell, World

DIGITS, STEPS = 3, 5
"""More updates than the warm-up has."""
CELL = Cell(name="tiny", digits=DIGITS, rollouts=32, hidden=16, teacher_hidden=16)
SETTING = Setting(cell=CELL, method="reverse_kl", optimizer="adamw", lr=2e-3, seed=0, max_steps=STEPS)


def sharp_decoder(seed: int) -> TinyDecoder:
    """A decoder with opinions, and no weight that is 0 or 1."""
    decoder = TinyDecoder(Shape(VOCAB, 2 * DIGITS + 1, hidden=16), seed)
    with torch.no_grad():
        decoder.tokens.weight.mul_(20)
        for parameter in decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(seed, 0, "x")))
    return decoder


@pytest.fixture
def there() -> World:
    base, teacher = sharp_decoder(1), sharp_decoder(2)
    held = draw_prompts(32, DIGITS, (0,), generator(0, 0, "held out"))
    accuracies = [accuracy(model, held)[0] for model in (base, teacher)]
    return World(base, (teacher,), held, (held,), accuracies[0], accuracies[1], 0.0)


@pytest.fixture
def job() -> Job:
    return SETTING.job()


def test_every_character_of_the_task_is_one_token_with_its_own_id():
    tokenizer = tokenizer_of_the_task()
    assert tokenizer(CHARACTERS)["input_ids"] == list(range(VOCAB))
    assert tokenizer.decode(list(range(VOCAB - 1))) == CHARACTERS[:-1]


def test_on_the_benchmarks_samples_the_distiller_makes_the_loops_updates(there: World, job: Job, tmp_path: Path):
    loop = train(job, copy.deepcopy(there.base), there.teachers, there.held).model
    product = distiller_of(job, there, str(tmp_path), own_draws=False)
    for _ in range(STEPS):
        product.step()
    ours, base = loop.state_dict(), there.base.state_dict()
    theirs = decoder_of(product.components.student.model, there.base.shape).state_dict()
    moved = max(float((ours[name] - base[name]).abs().max()) for name in ours)
    apart = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
    assert moved > SETTING.lr
    assert apart < 1e-3 * moved


def test_the_first_step_has_the_loops_loss_and_the_trainers_defaults_clip_alike(there: World, job: Job, tmp_path: Path):
    product = distiller_of(job, there, str(tmp_path), own_draws=False)
    batch, logits = collect(job, there.base, there.teachers, 1)
    loss = loss_of(batch, logits(), METHODS["reverse_kl"].hybrid)[0]
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in there.base.parameters() if p.grad is not None])
    found = product.step()
    assert found["reverse_kl"] == pytest.approx(loss.item(), rel=1e-4)
    assert found["grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert product.config.optimizer.max_grad_norm == 1.0 and product.config.optimizer.weight_decay == 0.0


def test_sampling_for_itself_the_distiller_has_the_loops_prompts_and_start(there: World, job: Job, tmp_path: Path):
    product = distiller_of(job, there, str(tmp_path))
    parts = product.components
    assert accuracy(decoder_of(parts.student.model, there.base.shape), there.held) == accuracy(there.base, there.held)
    for step in range(2):
        taken = [p.text for p in parts.schedule.take(step, job.rollouts)]
        assert taken == texts(step_prompts(job, step + 1)[0].ids)


def test_the_biases_that_the_decoder_lacks_stay_zero(there: World, job: Job, tmp_path: Path):
    product = distiller_of(job, there, str(tmp_path))
    for _ in range(STEPS):
        product.step()
    frozen = {n: p for n, p in product.components.student.model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 2 * there.base.shape.layers
    assert all("attn" in n and n.endswith(".bias") and not p.any() for n, p in frozen.items())


@pytest.mark.parametrize(("own_draws", "name"), [(True, DISTILLER), (False, REPLAY)])
def test_a_run_is_a_line_with_every_evaluation(there: World, monkeypatch, own_draws: bool, name: str):
    for module in (distiller, outside):
        monkeypatch.setattr(module, "world", lambda _cell, _seed: there)
    run = distil(SETTING, own_draws=own_draws)
    assert run.key == (name, "tiny", "reverse_kl", "adamw", "0.002", "32", "0", str(STEPS))
    assert run.curve.steps == list(range(STEPS + 1)) or run.curve.values[-1] >= there.level(0.9)
    assert run["curve"].startswith(f"0:{there.base_accuracy:.4f} ")


def test_a_kept_run_of_another_teacher_is_run_again(there: World, monkeypatch, tmp_path: Path):
    monkeypatch.setattr(outside, "world", lambda _cell, _seed: there)
    made = {"base_accuracy": f"{there.base_accuracy:.5f}", "teacher_accuracy": f"{there.teacher_accuracy:.5f}"}
    kept = made | {"curve": "0:0.1 1:0.2", "seconds_per_step": "0.5"}
    again = kept | {"curve": "0:0.1 1:0.9"}
    monkeypatch.setattr(outside, "perform", lambda _setting: Row(again))
    runs = Store(tmp_path / "runs.csv")
    for teacher, curve in ((made["teacher_accuracy"], [0.1, 0.2]), ("0.99999", [0.1, 0.9])):
        runs.rows[SETTING.key] = Row(kept | {"teacher_accuracy": teacher})
        assert outside.own_run(runs, SETTING, name=LOOP).curve.values == curve


def line_of(trainer: str, seed: int, steps: tuple[int, int, int]) -> OutsideRun:
    known = {"trainer": trainer, "seed": str(seed), "lr": "0.1", "rollouts": "256", "seconds_per_step": "0.5"}
    known |= {"base_accuracy": "0.01", "teacher_accuracy": "0.8", "curve": "0:0.0 1:0.1"}
    reached = {f"steps_{level}": str(s) for level, s in zip((50, 80, 90), steps, strict=True)}
    return OutsideRun(dict.fromkeys(COLUMNS, "") | known | reached)


def test_the_table_has_means_ranges_and_the_ratio_to_the_loop_over_pairs_of_seeds():
    runs = [line_of(LOOP, 0, (10, 20, 40)), line_of(LOOP, 1, (30, 40, 80))]
    runs += [line_of(DISTILLER, 0, (20, 40, 40)), line_of(DISTILLER, 1, (60, 80, 80))]
    assert table(runs) == ""  # until every trainer has run
    runs += [line_of(REPLAY, seed, steps) for seed, steps in enumerate([(10, 20, 40), (30, 40, 80)])]
    for number, name in enumerate(DRAWS, start=1):
        runs += [line_of(name, 0, (10 * number, 20, 40)), line_of(name, 1, (30 * number, 40, 80))]
    lines = table(runs).splitlines()
    assert f"| {LOOP} | 2 | 20 (10–30) | 30 (20–40) | 60 (40–80) | 0.500 |" in lines
    twice, same = "[2.00, 2.00 to 2.00]", "[1.00, 1.00 to 1.00]"
    assert f"| {DISTILLER} | 2 | 40 (20–60) {twice} | 60 (40–80) {twice} | 60 (40–80) {same} | 0.500 |" in lines
    assert "holds 1 only at 90 %." in table(runs)
    assert "by 1.00 to 4.00 at 50 %, 1.00 to 1.00 at 80 %" in table(runs)


def test_another_draw_has_the_same_prompts_and_other_samples(there: World, job: Job):
    kept, again, other = (collect(replace(job, draw=n), there.base, there.teachers, 1)[0] for n in (0, 0, 1))
    assert torch.equal(kept.response_ids, again.response_ids)
    first = [b.sequences.input_ids[:, : DIGITS + 1] for b in (kept, other)]
    assert torch.equal(*first) and not torch.equal(kept.response_ids, other.response_ids)
