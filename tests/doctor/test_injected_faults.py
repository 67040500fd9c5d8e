"""The faults that a run can have, what sees each before a step and what sees it later, and the tests that show it."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from doctor.pairs import TOKENIZER, answering, bigram_lm, by_name, config_of, write_pair
from opd.config import GuardConfig
from opd.trainer.examine import examine, examine_parts
from opd.trainer.from_config import RunComponents
from remote.scripted import serving
from teachers.model_server import ModelServer

ROOT = Path(__file__).parents[2]
DOCTOR, ALIGNMENT, HERE = (f"doctor/test_{name}.py" for name in ("examine", "alignment", "injected_faults"))
GUARD, CANARY = "trainer/test_guard.py", "trainer/test_canary.py"
Test = tuple[str, str]
"""A file below tests/, and the name of its test without `test_`."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault of a run."""

    what: str
    before: str = ""
    """What sees it before a step; empty where it arises later."""
    before_test: Test | None = None
    later: str = ""
    """What sees it before an update with it, or while the run goes on; empty where it cannot arise later."""
    later_test: Test | None = None


FAULTS = (
    Fault(
        what="the teacher's template lacks BOS",
        before="doctor: template",
        before_test=(DOCTOR, "a_beginning_that_one_side_lacks_is_shown_with_both_renderings"),
    ),
    Fault(
        what="the teacher is served with another tokenizer of equal size",
        before="doctor: vocabulary",
        before_test=(HERE, "a_server_with_another_tokenizer_of_equal_size_is_red"),
        later="guard.canary",
        later_test=(CANARY, "an_inference_server_that_wakes_up_as_another_ends_the_run_before_an_update"),
    ),
    Fault(
        what="scores are shifted by one",
        before="doctor: alignment",
        before_test=(ALIGNMENT, "scores_that_are_shifted_by_one_are_red"),
        later="guard.canary",
        later_test=(CANARY, "a_local_teacher_that_changes_ends_the_run_before_an_update"),
    ),
    Fault(
        what="scores are uniform",
        before="doctor: alignment",
        before_test=(DOCTOR, "uniform_scores_are_red"),
        later="guard.canary",
        later_test=(CANARY, "a_teacher_without_weights_ends_the_run_before_the_first_update"),
    ),
    Fault(
        what="NaN in one layer",
        before="doctor: recipe",
        before_test=(DOCTOR, "nan_in_one_layer_is_red_and_names_the_weight"),
        later="guard.canary",
        later_test=(CANARY, "weights_become_nan_and_the_run_says_whose"),
    ),
    Fault(
        what="weights are lost after a wake-up",
        later="guard.canary",
        later_test=(CANARY, "a_server_that_falls_asleep_in_a_step_is_seen_before_its_update"),
    ),
    Fault(
        what="ends are declared alike and used differently",
        before="doctor: stop mass",
        before_test=(DOCTOR, "ends_declared_alike_and_used_differently_are_red"),
        later="guard.eos_prob",
        later_test=(GUARD, "a_rule_is_broken_at_its_threshold_and_acts_when_its_patience_is_over"),
    ),
    Fault(
        what="a base student never ends, with a teacher that does",
        before="doctor: start/lengths",
        before_test=(DOCTOR, "a_student_that_never_ends_is_told_from_answers_that_are_too_long"),
        later="guard.truncated",
        later_test=(GUARD, "responses_that_are_all_cut_off_end_a_run_that_says_how_to_go_on"),
    ),
    Fault(
        what="the teacher is weaker than its student",
        before="doctor: start/task",
        before_test=(DOCTOR, "a_teacher_that_is_worse_than_its_student_is_red"),
        later="guard.reward",
        later_test=(GUARD, "a_reward_that_falls_while_the_kl_falls_is_said_and_every_other_way_is_not"),
    ),
    Fault(
        what="a scoring server processes log-probs with a temperature",
        before="doctor: recipe",
        before_test=(HERE, "a_scoring_server_that_processes_log_probs_is_yellow_and_scores_rightly_all_the_same"),
    ),
    Fault(
        what="a sampling server gives raw log-probs at another temperature than 1",
        before="the run's check of its engine, before step 0",
        before_test=("samplers/test_vllm_sampler.py", "raw_log_probs_are_told_from_the_sampler_s_own"),
        later="guard.sampler_gap",
        later_test=(GUARD, "a_rule_is_broken_at_its_threshold_and_acts_when_its_patience_is_over"),
    ),
    Fault(
        what="all answers are cut off",
        before="doctor: start/lengths",
        before_test=(DOCTOR, "a_student_that_never_ends_is_told_from_answers_that_are_too_long"),
        later="guard.truncated",
        later_test=(GUARD, "responses_that_are_all_cut_off_end_a_run_that_says_how_to_go_on"),
    ),
    Fault(
        what="the reward is constant",
        before="doctor: reward",
        before_test=(DOCTOR, "a_constant_reward_is_yellow_and_red_where_it_is_learnt_from"),
        later="a warning of the step",
        later_test=("trainer/test_reinforcement.py", "equal_rewards_in_every_group_are_said_and_change_no_weight"),
    ),
    Fault(
        what="the run will not fit in memory",
        before="doctor: memory",
        before_test=(HERE, "a_run_that_will_not_fit_is_red_before_a_step"),
    ),
    Fault(
        what="the student starts to repeat at step 30",
        later="guard.repetition",
        later_test=(GUARD, "a_student_that_starts_to_repeat_at_step_thirty_is_said_within_the_patience_and_not_before"),
    ),
)

HEAD = """# Faults, and what sees them

Each fault is put into a run of tiny real models by a test. `before` is what sees it before the first step, `later` the
rule that sees it where it can arise while a run goes on.

| fault | before | later | tests |
|---|---|---|---|
"""


def written() -> str:
    """The page of docs/faults.md."""
    rows = []
    for fault in FAULTS:
        tests = dict.fromkeys(test for test in (fault.before_test, fault.later_test) if test is not None)
        links = "<br>".join(f"[{name.replace('_', ' ')}](../tests/{file})" for file, name in tests)
        rows.append(f"| {fault.what} | {fault.before or '–'} | {fault.later or '–'} | {links} |\n")
    return HEAD + "".join(rows)


def test_the_page_of_the_faults_is_this_table():
    assert (ROOT / "docs" / "faults.md").read_text() == written(), (
        "write it anew: python -m doctor.test_injected_faults"
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_every_fault_is_seen_by_something_that_exists_and_a_test_shows_it(fault: Fault):
    assert fault.before or fault.later
    for seen, test in ((fault.before, fault.before_test), (fault.later, fault.later_test)):
        assert bool(seen) == (test is not None)
        if test is None:
            continue
        file, name = test
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert f"test_{name}" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test
        if seen.startswith("guard."):
            assert seen.removeprefix("guard.") in GuardConfig().rules


TOP_K: dict[str, Any] = {"teacher__model": "", "objective__support": "teacher_top_k", "objective__top_k": 4}


def served(folder: Path, url: str, **more: Any) -> dict[str, Any]:
    values = write_pair(folder, answering(0.4), answering(), **TOP_K | more)
    return by_name(examine(config_of(values | {"teacher.url": [url]})))


def test_a_server_with_another_tokenizer_of_equal_size_is_red(tmp_path: Path):
    class Other:
        def decode(self, ids: list[int]) -> str:
            return str(TOKENIZER.decode([(i + 1) % len(TOKENIZER) for i in ids]))

    with serving(ModelServer(bigram_lm(answering()), Other())) as (server,):  # pyright: ignore[reportArgumentType]
        found = served(tmp_path, server.url)
    assert (
        found["vocabulary"].verdict == "red"
        and "reads other tokens than the student writes" in found["vocabulary"].seen
    )


@pytest.mark.parametrize(("api", "verdict"), [("vllm", "green"), ("sglang", "yellow")])
def test_a_scoring_server_that_processes_log_probs_is_yellow_and_scores_rightly_all_the_same(
    tmp_path: Path, api: str, verdict: str
):
    """It is told by the same request at two temperatures; opd asks at temperature 1, where both are the model's own."""
    with serving(ModelServer(bigram_lm(answering()), TOKENIZER)) as (server,):
        found = served(tmp_path, server.url, teacher__api=api)
    said = [found["recipe"].seen, *found["recipe"].details]
    assert any("changes its log-probs with the temperature" in line for line in said) == (verdict == "yellow"), said
    assert found["alignment"].verdict == "green"


def test_a_run_that_will_not_fit_is_red_before_a_step(tmp_path: Path):
    parts = RunComponents(config_of(write_pair(tmp_path, answering(0.4), answering())))
    fits, not_at_all = (by_name(examine_parts(parts, 4, {"cpu": limit})) for limit in (1 << 36, 1 << 16))
    assert fits["memory"].verdict == "green" and not_at_all["memory"].verdict == "red"


if __name__ == "__main__":
    (ROOT / "docs" / "faults.md").write_text(written())
