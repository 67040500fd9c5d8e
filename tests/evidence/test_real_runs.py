"""The evidence on a real model: its curves, ratios and tables, and two steps of its runs with a tiny model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import yaml
from benchmarks.real import plan, world
from benchmarks.real.curves import rising, updates_to
from benchmarks.real.report import claim_table, compared, groups
from benchmarks.real.run import perform, recipe
from benchmarks.real.store import RESULTS, SETTING, Row, Store, fill
from benchmarks.real.words import HELD_OUT_SEED, WORDS, Cell, rows

from opd.testing import byte_tokenizer, save_model, tiny_causal_lm

GRPO, OPD = plan.TEACHING, ("reverse_kl", "adamw", plan.FULL)


def finished(kind, seed, rewards, *, lr=1e-5, seconds=100.0, teacher="grpo", base=0.1, best=0.9):
    """A run with these rewards."""
    this = plan.setting(kind, lr, seed)
    values = dict(zip(SETTING, this.key, strict=True)) | dict.fromkeys(RESULTS, "0") | {"teacher": teacher}
    return Row(
        values
        | {
            "base_accuracy": str(base),
            "teacher_accuracy": str(best),
            "final_accuracy": str(rewards[-1]),
            "rewards": " ".join(map(str, rewards)),
            "cpu_seconds": str(seconds * this.steps),
        }
    )


def test_the_rising_curve_is_the_nearest_one_in_squares():
    values = [0.3, 0.1, 0.2, 0.6, 0.5, 0.5, 0.9]
    found = rising(values)
    assert found == pytest.approx([0.2, 0.2, 0.2, 1.6 / 3, 1.6 / 3, 1.6 / 3, 0.9])
    distance = sum((a - b) ** 2 for a, b in zip(found, values, strict=True))
    for levels in itertools.combinations_with_replacement([i / 20 for i in range(21)], 4):
        for cuts in itertools.combinations(range(1, 7), 3):
            other = [levels[sum(place >= cut for cut in cuts)] for place in range(7)]
            assert distance <= sum((a - b) ** 2 for a, b in zip(other, values, strict=True)) + 1e-12


@pytest.mark.parametrize(
    ("rewards", "level", "expected"),
    [
        ([0.0, 0.2, 0.4, 0.6], 0.4, 2.0),
        ([0.0, 0.2, 0.4, 0.6], 0.5, 2.5),
        ([0.0, 0.2, 0.4, 0.6], 0.7, None),
        ([0.5, 0.6], 0.4, 0.0),
        ([0.0, 0.4, 0.2, 0.6], 0.3, 1.5),  # the middle two are one level, whose middle is 1.5
        ([], 0.1, None),
    ],
)
def test_a_level_is_reached_between_the_updates_around_it(rewards, level, expected):
    assert updates_to(rewards, level) == (None if expected is None else pytest.approx(expected))


def test_ratios_are_of_means_over_seeds_against_the_best_arm_that_always_gets_there():
    slow = [finished(GRPO, seed, [0.1, 0.3, 0.5, 0.7, 0.9], seconds=10) for seed in plan.SEEDS]
    lucky = [finished(("grpo", "muon", plan.FULL), seed, [0.1, 0.9 if seed else 0.2]) for seed in plan.SEEDS]
    quick = [finished(OPD, seed, [0.1, 0.5 + 0.1 * seed, 0.9], seconds=20) for seed in plan.SEEDS]
    found = groups([*slow, *lucky, *quick])
    assert [g.kind for g in found] == [GRPO, ("grpo", "muon", plan.FULL), OPD]
    factor = {g.kind: 1.0 for g in found}
    half = compared(found[2], found, 0.5, factor)
    assert half is not None
    # half way is 0.5: update 2 of the slow arm; of the quick one 1, 0.8 and 2/3
    assert half.value == pytest.approx(2 / ((1 + 0.8 + 2 / 3) / 3))
    assert half.low == pytest.approx(2.0) and half.high == pytest.approx(3.0)
    less = compared(found[2], found, 0.5, {g.kind: g.seconds for g in found})
    assert less is not None and less.value == pytest.approx(half.value / 2)
    assert compared(found[0], found, 0.5, factor) is None  # reinforcement learning is what is compared with
    table = claim_table(found)
    assert "| 2 of 3 |" in table and "GRPO, Muon" in table


def test_every_word_is_drawn_and_answers_are_in_the_opposite_order():
    assert len(set(WORDS)) == len(WORDS)
    seen = set()
    for prompt, answer in rows(2000, 3, 5):
        words = prompt.removesuffix(" ->").split()
        assert answer == " " + " ".join(words[::-1]) and len(set(words)) == 3
        seen |= set(words)
    assert seen == set(WORDS)
    assert list(rows(5, 3, 5)) == list(rows(5, 3, 5)) != list(rows(5, 3, 6))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    tokenizer = byte_tokenizer()
    save_model(tiny_causal_lm(tokenizer, architecture="llama", seed=1), tokenizer, tmp_path / "model")
    monkeypatch.setenv("OPD_REAL_MODEL", str(tmp_path / "model"))
    monkeypatch.setenv("OPD_REAL", str(tmp_path / "work"))
    monkeypatch.setattr(plan, "ROLLOUTS", 16)
    monkeypatch.setattr(plan, "GRPO_STEPS", 2)
    monkeypatch.setattr(plan, "TUNING_STEPS", dict.fromkeys(plan.OPD_STEPS, 2))
    monkeypatch.setattr(plan, "OPD_STEPS", dict.fromkeys(plan.OPD_STEPS, 2))
    return tmp_path


def test_the_accuracy_of_a_model_is_the_mean_probability_of_the_answers(tiny, monkeypatch):
    monkeypatch.setattr(world, "HELD_OUT", 80)  # more than one batch
    cell = Cell(name="short", words=1, warm_steps=0)
    tokenizer, model = world.load(tiny / "model")
    total = 0.0
    for prompt, answer in rows(80, cell.words, HELD_OUT_SEED):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        wanted = [*tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        logp = model(input_ids=torch.tensor([ids + wanted])).logits[0].log_softmax(-1)
        total += math.exp(sum(float(logp.detach()[len(ids) - 1 + i, token]) for i, token in enumerate(wanted)))
    assert world.accuracy(tiny / "model", cell) == pytest.approx(total / 80, rel=1e-3)


@pytest.mark.timeout(240)
def test_two_steps_of_reinforcement_make_a_teacher_and_two_of_distillation_learn_from_it(tiny, monkeypatch):
    monkeypatch.setattr(world, "BATCH", 2)
    store = Store(tiny / "runs.csv")
    teaching = plan.setting(GRPO, 1e-5, 0)
    learning = plan.setting(OPD, 1e-5, 0, teacher_lr=1e-5, measured=True)
    adapters = plan.setting(("reverse_kl", "adamw", plan.LORA), 1e-3, 0, teacher_lr=1e-5)
    for this in (teaching, learning, adapters):
        store.add(perform(this))
    again = Store(tiny / "runs.csv")
    assert not again.missing([teaching, learning, adapters])
    first, second, third = again.of([teaching, learning, adapters])
    assert first.setting == teaching and len(first.series("rewards")) == 2 and first["reverse_kl"] == ""
    assert second["teacher_accuracy"] == first["final_accuracy"] and len(second.series("reverse_kl")) == 2
    assert float(second["eval_reverse_kl"]) >= 0 and third["eval_reverse_kl"] == ""
    assert float(second["cpu_seconds"]) > 0 and (tiny / "work" / "hard-0" / teaching.name).is_dir()
    assert list(fill(again, [teaching, learning], perform, 1)) == []  # nothing is run twice


@pytest.mark.parametrize(("name", "kind", "lr"), [("words-grpo", GRPO, 6e-5), ("words", OPD, 2e-4)])
def test_the_recipes_are_what_was_measured(name, kind, lr):
    written = yaml.safe_load((world.ROOT / "recipes" / "smollm2" / f"{name}.yaml").read_text())
    measured = recipe(plan.setting(kind, lr, 0, teacher_lr=None))
    for section in ("rollout", "rl"):
        assert written.get(section) == measured.get(section), section
    for section in ("train", "optimizer"):
        assert {"name": "adamw", **written[section]} == {"name": "adamw", **measured[section]}, section
