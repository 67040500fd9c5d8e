"""Runs that are compared: groups of seeds, paired differences, and what must not be compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from opd.errors import ConfigError, RunFolderError
from opd.reporting import RunRecorder, write_summary
from opd.reporting.compare import compare
from opd.reporting.compare_words import explained, plain_text, terminal
from opd.reporting.differences import Difference, difference
from opd.reporting.runs import Group, grouped, read_runs
from reporting.compare_inputs import a_recipe, write_compared
from reporting.report_inputs import a_sample

T_3 = 3.182446305284263  # two-sided 95 % of Student's t, three degrees of freedom; T_2 two, T_1 one
T_2 = 4.302652729911275
T_1 = 12.706204736432095


def groups_of(*runs: Path) -> list[Group]:
    return grouped(read_runs(runs))


def between(one: Path, two: Path, metric: str) -> Difference:
    base, other = groups_of(one, two)
    found = difference(base, other, metric)
    assert found is not None
    return found


# Pairs


def test_reverse_kl_of_two_runs_is_paired_prompt_by_prompt(tmp_path: Path):
    """Differences −0.05, −0.05, −0.15, −0.15: mean −0.1, s = √(4 · 0.05² / 3), half width t₃ s / 2 = t₃ · 0.05 / √3."""
    one = write_compared(tmp_path / "one", kl=(0.1, 0.2, 0.3, 0.4))
    two = write_compared(tmp_path / "two", kl=(0.05, 0.15, 0.15, 0.25), optimizer__lr=1e-4)
    found = between(one, two, "reverse_kl")
    half = T_3 * 0.05 / math.sqrt(3)
    assert found.value == pytest.approx(-0.1)
    assert found.interval == pytest.approx((-0.1 - half, -0.1 + half), rel=1e-6)
    assert found.pairs == "4 prompts"


def test_the_difference_is_the_later_run_minus_the_first(tmp_path: Path):
    one = write_compared(tmp_path / "one", right=(0, 0, 0, 1))
    two = write_compared(tmp_path / "two", right=(0, 1, 1, 1), optimizer__lr=1e-4)
    found = between(one, two, "accuracy")
    assert found.value == pytest.approx(0.5)
    # b = 2.5, c = 0.5, N = 6: 1/3 ± z √(3 − 4/6) / 6
    half = 1.959963984540054 * math.sqrt(3 - 4 / 6) / 6
    assert found.interval == pytest.approx((1 / 3 - half, 1 / 3 + half))


def test_pairs_follow_the_prompt_and_not_the_order_of_the_records(tmp_path: Path):
    """Of recorded answers: B asked prompts 3, 2, 1, 0. By prompt every difference is +0.1; by order they would be 0.4 … −0.2."""
    folders = []
    for name, order, more in (("one", (0, 1, 2, 3), 0.0), ("two", (3, 2, 1, 0), 0.1)):
        run = tmp_path / name
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump(a_recipe(run, objective__beta=more)))
        with RunRecorder(run, resume_step=None) as recorder:
            recorder.evaluation(4, "student", {"reverse_kl": 0.25 + more}, measure="m1")
            for index in order:
                value = 0.1 * (index + 1) + more
                recorder.sample(a_sample(4, prompt=str(index), prompt_index=index, reverse_kl=(value, value)))
        write_summary(run / "summary.json", {})
        folders.append(run)
    found = between(*folders, "reverse_kl")
    assert found.pairs == "4 prompts"
    assert found.interval == pytest.approx((0.1, 0.1))


def test_seeds_are_paired_with_the_same_seed(tmp_path: Path):
    """Seeds 1, 2, 3 have 0.25, 0.5, 0.75 and then 0.5, 0.75, 0.75: differences 0.25, 0.25, 0; mean 1/6, s = √(1/48)."""
    rights = {1: (1, 0, 0, 0), 2: (1, 1, 0, 0), 3: (1, 1, 1, 0)}
    better = {3: (1, 1, 1, 0), 1: (1, 1, 0, 0), 2: (1, 1, 1, 0)}  # another order on the command line
    runs = [write_compared(tmp_path / f"a-s{seed}", right=right, seed=seed) for seed, right in rights.items()]
    runs += [write_compared(tmp_path / f"b-s{s}", right=r, seed=s, optimizer__lr=1e-4) for s, r in better.items()]
    base, other = groups_of(*runs)
    assert (base.title, other.title) == ("a (3 seeds)", "b (3 seeds)")
    assert list(other.seeds) == [1, 2, 3]
    found = difference(base, other, "accuracy")
    assert found is not None and found.pairs == "3 seeds"
    half = T_2 * math.sqrt(1 / 48) / math.sqrt(3)
    assert found.value == pytest.approx(1 / 6)
    assert found.interval == pytest.approx((1 / 6 - half, 1 / 6 + half), rel=1e-6)


def test_seeds_that_the_other_side_lacks_are_named_and_left_out(tmp_path: Path):
    runs = [write_compared(tmp_path / f"a{s}", seed=s) for s in (1, 2, 3)]
    runs += [write_compared(tmp_path / f"b{s}", seed=s, right=(1, 1, 1, 0), optimizer__lr=1e-4) for s in (2, 3, 4)]
    found = difference(*groups_of(*runs), "accuracy")
    assert found is not None and found.pairs == "2 seeds" and found.value == pytest.approx(0.25)
    assert "left out: 1, 4" in found.note


def test_groups_without_shared_seeds_get_an_unpaired_interval_over_seeds(tmp_path: Path):
    """Welch by hand: both sides s² = 1/32 over 2, so 2 degrees of freedom and half width t₂ · √(1/32)."""
    rights = ((1, 0, 0, 0), (1, 1, 0, 0))
    runs = [write_compared(tmp_path / f"a{s}", seed=s, right=r) for s, r in zip((1, 2), rights, strict=True)]
    runs += [
        write_compared(tmp_path / f"b{s}", seed=s, right=r, optimizer__lr=1e-4)
        for s, r in zip((3, 4), ((1, 1, 0, 0), (1, 1, 1, 0)), strict=True)
    ]
    found = difference(*groups_of(*runs), "accuracy")
    assert found is not None and found.pairs == "" and "do not share" in found.note
    half = T_2 * math.sqrt(1 / 32)
    assert found.interval == pytest.approx((0.25 - half, 0.25 + half), rel=1e-6)


def test_without_records_prompt_by_prompt_the_interval_is_unpaired_and_says_so(tmp_path: Path):
    """Newcombe by hand, of Wilson's intervals of 1/4 and 3/4."""
    one = write_compared(tmp_path / "one", right=(1, 0, 0, 0), per_prompt=False)
    two = write_compared(tmp_path / "two", right=(1, 1, 1, 0), per_prompt=False, optimizer__lr=1e-4)
    found = between(one, two, "accuracy")
    l1, u1, l2, u2 = 0.045587, 0.699358, 0.300642, 0.954413
    low, high = 0.5 - math.hypot(0.75 - l2, u1 - 0.25), 0.5 + math.hypot(u2 - 0.75, 0.25 - l1)
    assert found.interval == pytest.approx((low, high), abs=1e-4)
    assert found.pairs == "" and "no answers were recorded prompt by prompt" in found.note


def test_a_few_recorded_answers_of_many_are_not_paired(tmp_path: Path):
    """Four answers of an evaluation of 100 prompts would be another difference than the one of the table."""
    settings = {"per_prompt": False, "samples": True, "eval__prompts": 100}
    one = write_compared(tmp_path / "one", **settings)
    two = write_compared(tmp_path / "two", optimizer__lr=1e-4, **settings)
    assert between(one, two, "accuracy").pairs == ""


def test_no_interval_is_made_up(tmp_path: Path):
    folders = []
    for name in ("one", "two"):
        with RunRecorder(tmp_path / name, resume_step=None) as recorder:
            recorder.evaluation(4, "student", {"accuracy": 0.5}, measure="m1")
        write_summary(tmp_path / name / "summary.json", {})
        folders.append(tmp_path / name)
    found = between(*folders, "accuracy")
    assert found.value == 0 and found.interval is None and found.note.startswith("No interval")


def test_seeds_that_agree_exactly_claim_no_certainty(tmp_path: Path):
    runs = [write_compared(tmp_path / f"a{s}", seed=s, right=(1, 0, 0, 0)) for s in (1, 2)]
    runs += [write_compared(tmp_path / f"b{s}", seed=s, right=(1, 1, 0, 0), optimizer__lr=1e-4) for s in (1, 2)]
    groups = groups_of(*runs)
    found = difference(*groups, "accuracy")
    assert found is not None and found.value == 0.25 and found.interval is None and "No interval" in found.note
    assert "accuracy" not in compare(groups).results[0].interval


# What must not be compared


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"measure": "m2"}, "different held-out prompts"),
        ({"measure": "m2", "eval__temperature": 0.0}, "eval.temperature is 1.0 in one and 0.0 in two"),
        ({"measure": None}, "An older version of opd recorded two"),
    ],
)
def test_another_measure_is_refused_with_its_reason(tmp_path: Path, changes: dict, why: str):
    one = write_compared(tmp_path / "one")
    two = write_compared(tmp_path / "two", optimizer__lr=1e-4, **changes)
    for metric in ("accuracy", "reverse_kl"):
        found = between(one, two, metric)
        assert found.value is None and found.interval is None and why in found.note


def test_old_runs_are_compared_where_recorded_prompts_show_that_they_were_asked_the_same(tmp_path: Path):
    one = write_compared(tmp_path / "one", measure=None, samples=True, per_prompt=False)
    two = write_compared(tmp_path / "two", measure=None, samples=True, per_prompt=False, optimizer__lr=1e-4)
    assert between(one, two, "accuracy").pairs == "4 prompts"


def test_reverse_kl_to_another_teacher_is_refused_and_accuracy_is_not(tmp_path: Path):
    one = write_compared(tmp_path / "one")
    two = write_compared(tmp_path / "two", teacher__model="larger")
    assert "teacher.model is large in one and larger in two" in between(one, two, "reverse_kl").note
    assert between(one, two, "accuracy").value == 0


def test_a_teacher_in_the_run_folder_is_the_same_only_if_it_answers_alike(tmp_path: Path):
    for name, accuracy in (("one", 0.9), ("two", 0.9), ("three", 0.8)):
        run = write_compared(tmp_path / name, teacher__model=str(tmp_path / name / "teacher"), optimizer__lr=len(name))
        with RunRecorder(run, resume_step=4) as recorder:
            recorder.evaluation(4, "teacher", {"accuracy": accuracy}, measure="m1")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert between(one, two, "reverse_kl").value == 0
    assert "no evaluation shows that the two answer alike" in between(one, three, "reverse_kl").note


def test_an_unfinished_run_is_compared_at_the_last_evaluation_that_both_have(tmp_path: Path):
    one = write_compared(tmp_path / "one", right=(1, 1, 1, 1))
    two = write_compared(tmp_path / "two", right=(1, 1, 1, 1), steps=3, finished=False, optimizer__lr=1e-4)
    found = between(one, two, "accuracy")
    assert found.value == 0 and found.note.startswith("Before the first step")
    assert "Not finished: two" in " ".join(compare(groups_of(one, two)).notes)


def test_a_measurement_that_only_finished_runs_have_is_not_compared_with_an_older_one(tmp_path: Path):
    """Accuracy at other temperatures is measured at the ends alone: A's last is no match for B's first."""
    one, two = write_compared(tmp_path / "one"), write_compared(tmp_path / "two", finished=False, optimizer__lr=1e-4)
    with RunRecorder(one, resume_step=4) as recorder:
        recorder.evaluation(4, "student", {"accuracy": 0.5, "accuracy_greedy": 1.0}, measure="m1")
    with RunRecorder(two, resume_step=0) as recorder:
        recorder.evaluation(0, "student", {"accuracy": 0.0, "accuracy_greedy": 0.5}, measure="m1")
        recorder.evaluation(4, "student", {"accuracy": 0.5}, measure="m1")
    assert difference(*groups_of(one, two), "accuracy_greedy") is None
    assert between(one, two, "accuracy").note.startswith("At step 4")


# Groups


def test_runs_that_differ_in_seed_folder_and_logging_are_one_group(tmp_path: Path):
    one = write_compared(tmp_path / "x-seed1", seed=1)
    two = write_compared(tmp_path / "x-seed2", seed=2, log__samples=2, checkpoint__every=5)
    other = write_compared(tmp_path / "y", seed=2, optimizer__lr=2e-3)
    assert [(g.mark, g.name, len(g.runs)) for g in groups_of(one, two, other)] == [("A", "x", 2), ("B", "y", 1)]


def test_a_path_in_the_run_folder_does_not_make_another_recipe(tmp_path: Path):
    runs = [write_compared(tmp_path / f"s{s}", seed=s, student__model=str(tmp_path / f"s{s}" / "base")) for s in (1, 2)]
    assert len(groups_of(*runs)) == 1


def test_a_run_that_names_files_of_another_runs_folder_has_the_same_recipe(tmp_path: Path):
    """As after `opd demo`, whose models lie in its folder: --seed 1 in another folder, with the models of the first."""
    base = str(tmp_path / "demo" / "base")
    runs = [write_compared(tmp_path / name, seed=s, student__model=base) for s, name in enumerate(("demo", "again"))]
    other = write_compared(tmp_path / "other", student__model=base, optimizer__lr=1e-4)
    groups = groups_of(*runs, other)
    assert [len(group.runs) for group in groups] == [2, 1]
    assert [row.key for row in compare(groups).recipe] == ["optimizer.lr", "seed"]


def test_two_runs_of_one_seed_and_runs_without_a_recipe_stay_apart(tmp_path: Path):
    same = [write_compared(tmp_path / name, seed=1) for name in ("one", "two")]
    bare = [write_compared(tmp_path / name, recipe=False) for name in ("three", "four")]
    groups = groups_of(*same, *bare)
    assert [g.name for g in groups] == ["one", "two", "three", "four"]
    notes = " ".join(compare(groups).notes)
    assert "one and two have one recipe and one seed" in notes
    assert "Without a readable config.yaml: three, four" in notes


def test_a_group_has_the_mean_over_its_seeds_and_their_t_interval(tmp_path: Path):
    sides = ((1, (1, 0, 0, 0), (0.1, 0.2, 0.3, 0.4)), (2, (1, 1, 0, 0), (0.2, 0.3, 0.4, 0.5)))
    runs = [write_compared(tmp_path / f"a{seed}", seed=seed, right=right, kl=kl) for seed, right, kl in sides]
    other = write_compared(tmp_path / "b", right=(1, 1, 1, 0), optimizer__lr=2e-3)
    row = compare(groups_of(*runs, other)).results[0]
    assert row.metric["accuracy"] == pytest.approx(0.375)
    assert row.interval["accuracy"] == (0, 1)  # 0.375 ± t₁ · 0.125, within what a share can be
    assert row.metric["reverse_kl"] == pytest.approx(0.3)  # of 0.25 and 0.35
    assert row.interval["reverse_kl"] == pytest.approx((0.3 - T_1 * 0.05, 0.3 + T_1 * 0.05), rel=1e-6)
    assert (row.tokens, row.seconds) == (400.0, 10.0)


def test_names_are_the_shortest_that_tell_runs_apart(tmp_path: Path):
    runs = [write_compared(tmp_path / a / b, optimizer__lr=i) for i, (a, b) in enumerate([("p", "run"), ("q", "run")])]
    assert [run.name for run in read_runs(runs)] == ["p/run", "q/run"]


# Recipes


def test_the_recipe_table_has_the_keys_that_differ_and_marks_defaults(tmp_path: Path):
    one = write_compared(tmp_path / "one", seed=1)
    two = write_compared(tmp_path / "two", seed=2, optimizer__lr=2e-3, objective__top_k=8, log__samples=2)
    rows = {row.key: row for row in compare(groups_of(one, two), {"optimizer.lr": 0.002, "objective.top_k": 64}).recipe}
    assert rows.keys() == {"optimizer.lr", "objective.top_k", "log.samples", "seed"}
    assert (rows["optimizer.lr"].values, rows["optimizer.lr"].are_default) == (("0.001", "0.002"), (False, True))
    assert (rows["objective.top_k"].values, rows["objective.top_k"].are_default) == (("64", "8"), (True, False))
    assert [row.matters for row in (rows["log.samples"], rows["optimizer.lr"])] == [False, True]


def test_a_section_that_one_run_lacks_shows_no_defaults_for_it(tmp_path: Path):
    one = write_compared(tmp_path / "one", student__lora=None)
    two = write_compared(tmp_path / "two", student__lora={"rank": 8})
    (row,) = compare(groups_of(one, two), {"student.lora.rank": 32, "student.lora": None}).recipe
    assert (row.key, row.values) == ("student.lora.rank", ("not set", "8"))


# Words


def test_the_text_says_results_differences_and_what_they_stand_on(tmp_path: Path):
    one = write_compared(tmp_path / "one", right=(0, 0, 0, 1))
    two = write_compared(tmp_path / "[red]two", right=(0, 1, 1, 1), optimizer__lr=1e-4)
    comparison = compare(groups_of(one, two))
    text = plain_text(comparison)
    assert "[red]two" in text and "B − A" in text
    assert "+50.0 [−16.6, +83.2] points" in text and "paired, 4 prompts" in text
    assert explained(comparison) == [
        "B − A: The interval is over the prompts; what another seed would change is not in it."
    ]


@pytest.mark.parametrize("width", [50, 80, 200])
def test_no_number_of_the_result_is_cut_in_a_narrow_terminal(tmp_path: Path, width: int):
    one = write_compared(tmp_path / "a-rather-long-name-of-a-run", right=(0, 0, 0, 1))
    two = write_compared(tmp_path / "another-name-of-a-run", right=(0, 1, 1, 1), optimizer__lr=1e-4)
    console = Console(width=width, force_terminal=False, color_system=None)
    with console.capture() as capture:
        console.print(terminal(compare(groups_of(one, two)), width))
    text = capture.get()
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    if width >= 80:
        assert "25.0% [4.6, 69.9]" in text and "75.0% [30.1, 95.4]" in text


@pytest.mark.parametrize("given", ["none", "file", "other", "twice"])
def test_folders_that_cannot_be_compared_are_refused(tmp_path: Path, given: str):
    run = write_compared(tmp_path / "run")
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    second = {
        "none": tmp_path / "none",
        "file": tmp_path / "file",
        "other": tmp_path / "other",
        "twice": tmp_path / "." / "run",
    }
    said = {"none": "does not exist", "file": "is a file", "other": "is not a run folder", "twice": "the same folder"}
    with pytest.raises((ConfigError, RunFolderError), match=said[given]):
        read_runs([run, second[given]])


def test_runs_without_a_shared_metric_have_nothing_in_common(tmp_path: Path):
    for name in ("one", "two"):
        with RunRecorder(tmp_path / name, resume_step=None) as recorder:
            recorder.step(0, {name: 1.0})
    with pytest.raises(RunFolderError, match="nothing in common"):
        compare(groups_of(tmp_path / "one", tmp_path / "two"))
