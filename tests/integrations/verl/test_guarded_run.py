"""Real runs of verl's own main on Ray whose rules of opd.guard end them after a save, and that go on from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from verl_runs import Done, main_ppo, make_folder

from opd.integrations.verl.plugin.step_guard import STATE_FILE
from opd.reporting.guarded import read_onsets

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE = 2
STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("guarded"))


def guarded(folder: Path, *more: str) -> Done:
    """Random models hardly ever end, so that nearly all of their 12 tokens' answers are cut off."""
    return main_ppo(
        folder,
        "+opd=default",
        f"opd.teacher.model={folder}/teacher",
        f"opd.run_dir={folder}/records",
        "opd.guard.truncated.threshold=0.5",
        f"opd.guard.truncated.patience={PATIENCE}",
        "opd.guard.truncated.action=stop",
        f"trainer.total_training_steps={STEPS}",
        "trainer.save_freq=-1",
        *more,
    )


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Done:
    return guarded(folder)


def test_a_rule_that_stops_saves_first_and_says_why(stopped: Done, folder: Path):
    done = stopped
    assert done.code == 1
    assert [step["training/global_step"] for step in done.metrics] == [1, 2]
    share = done.metrics[-1]["actor/opd/truncated"]
    assert share > 0.5
    said = [
        line
        for line in done.log.splitlines()
        if "GuardStop: stopped after step 2 of 4 by opd.guard.truncated: " in line
    ]
    assert said, done.log[-4000:]
    assert (
        f"{share:.0%} of the responses are cut off, and opd.guard.truncated.threshold=0.5 has been passed for 2 steps."
        in said[0]
    )
    assert "data.max_response_length" in said[0] and "rollout.max_new_tokens" not in said[0]
    assert f"The last values of truncated: {done.metrics[0]['actor/opd/truncated']:.3g}, {share:.3g}." in said[0]
    assert "opd: warning: step 2: opd.guard.truncated: " in done.log
    saved = folder / "checkpoints" / "global_step_2"
    assert f"Saved in {saved};" in said[0]
    assert (folder / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
    assert list((saved / "actor").glob("model_world_size_1_rank_0.pt")) and (saved / "data.pt").exists()
    state = json.loads((saved / STATE_FILE).read_text())
    assert [one["step"] for one in state["steps"]] == [0, 1]
    assert [one["metrics"]["reward/mean"] for one in state["steps"]] == pytest.approx(
        [step["critic/score/mean"] for step in done.metrics]
    )
    assert [one["metrics"]["loss"] for one in state["steps"]] == pytest.approx([s["actor/loss"] for s in done.metrics])
    (onset,) = read_onsets(folder / "records")
    assert (onset.step, onset.rule, onset.action) == (1, "truncated", "stop")
    assert all("perf/throughput" in step for step in done.metrics)  # the last step was logged whole


def test_the_same_command_goes_on_with_the_rules_whole_patience(stopped: Done, folder: Path):
    assert stopped.code == 1
    again = guarded(folder, f"trainer.total_training_steps={STEPS + 1}")
    assert again.code == 1
    assert [step["training/global_step"] for step in again.metrics] == [3, 4]
    assert "GuardStop: stopped after step 4 of 5 by opd.guard.truncated: " in again.log
