"""Compression on real weights: its plan, its arithmetic, and the page that its CSV makes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from benchmarks.real.compression import plan, report
from benchmarks.real.compression.plan import FULL, INT4, SEEDS, Setting
from benchmarks.real.store import Row, Store

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "real"


def row(setting: Setting, kl: tuple[float, ...], nats: float = 2.0) -> Row:
    series = " ".join(str(value) for value in kl)
    results = dict.fromkeys(plan.RESULTS, "1") | dict.fromkeys(plan.PER_PROMPT, series)
    results |= {"prose_nats": str(nats), "teacher_text_nats": str(nats)}
    return Row(dict(zip(plan.SETTING, setting.key, strict=True)) | results)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "compression.csv", plan.SETTING, plan.RESULTS)


def fill_in(store: Store, arm: str, best: float, tuned: dict[float, float], kl: tuple[float, ...], nats: float) -> None:
    for lr, value in tuned.items():
        store.add(row(plan.setting(INT4, arm, lr, plan.TUNING_SEED), (value, value)))
    for seed in SEEDS:
        apart = 0.0 if arm == "off_policy" else 0.01 * (seed - 1)  # seeds differ, and their mean is `kl`
        store.add(row(plan.setting(INT4, arm, best, seed), tuple(round(value + apart, 2) for value in kl), nats))


def test_a_grid_grows_until_its_best_rate_has_worse_ones_on_both_sides(store: Store):
    tuned = {3e-5: 0.9, 1e-4: 0.8, 3e-4: 0.7, 9e-4: 0.75}
    for lr, value in list(tuned.items())[:3]:
        store.add(row(plan.setting(INT4, "opd", lr, plan.TUNING_SEED), (value,)))
    assert plan.rates(store, INT4, "opd") == list(tuned)
    assert plan.best_rate(store, INT4, "opd") is None and plan.final(store, INT4, "opd") == []
    store.add(row(plan.setting(INT4, "opd", 9e-4, plan.TUNING_SEED), (0.75,)))
    assert plan.best_rate(store, INT4, "opd") == 3e-4
    assert [s.seed for s in plan.final(store, INT4, "opd")] == list(SEEDS)


def test_a_grid_grows_downwards_too_and_ends_at_its_largest_size(store: Store):
    for lr in (3e-5, 1e-4, 3e-4, 1e-5, 3e-6):
        store.add(row(plan.setting(INT4, "opd", lr, plan.TUNING_SEED), (lr,)))
    assert plan.rates(store, INT4, "opd") == [3e-6, 1e-5, 3e-5, 1e-4, 3e-4]
    assert plan.best_rate(store, INT4, "opd") == 3e-6


def test_the_tuning_seed_is_measured_on_other_prompts_than_the_others():
    assert plan.setting(INT4, "opd", 1e-4, plan.TUNING_SEED).part == "tuning"
    assert plan.setting(INT4, "opd", 1e-4, 0).part == plan.untrained(FULL).part == "held_out"


def test_the_share_that_is_recovered_is_measured_from_the_full_precision_model():
    full, before, after = (row(plan.untrained(FULL), kl, nats) for kl, nats in [((0.0, 0.0), 2.0), ((1.0, 3.0), 4.0), ((0.5, 0.5), 2.5)])  # fmt: skip
    assert report.share([after], before, full, "reverse_kl") == pytest.approx(0.75)
    assert report.share([after], before, full, "prose_nats") == pytest.approx(0.75)


def test_the_page_says_which_arm_is_closer_by_differences_paired_by_prompt(store: Store):
    store.add(row(plan.untrained(FULL), (0.0, 0.0, 0.0)))
    store.add(row(plan.untrained(INT4), (1.0, 2.0, 3.0), 3.0))
    tuned = {3e-5: 0.9, 1e-4: 0.7, 3e-4: 0.8}
    fill_in(store, "opd", 1e-4, tuned, (0.41, 1.4, 2.4), 2.5)
    fill_in(store, "off_policy", 1e-4, tuned, (0.5, 1.5, 2.5), 2.25)
    page = report.page(store)
    assert "OPD less off-policy KD: -0.097 [-0.111, -0.082] nats per token. OPD is closer." in page
    assert "OPD less off-policy KD, by seed: +0.250, +0.250, +0.250" in page
    assert f"| {math.exp(3):.2f} |" in page
    assert "gone are 30% of the reverse KL, 30% of the forward KL, 50% of the loss on prose" in page


@pytest.mark.parametrize(("low", "high", "said"), [(-2, -1, "OPD is"), (1, 2, "Off-policy"), (-1, 1, "does not tell")])
def test_a_difference_whose_interval_holds_zero_decides_nothing(low: float, high: float, said: str):
    assert said in report.verdict(low, high)


def test_the_page_is_written_again_from_the_runs():
    path = RESULTS / "compression.csv"
    if not path.exists():
        pytest.skip("there are no runs yet")
    store = Store(path, plan.SETTING, plan.RESULTS)
    assert report.page(store) == (RESULTS / "compression.md").read_text(encoding="utf-8")
