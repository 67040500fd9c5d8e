"""`opd eval`: the numbers of a run come out as the run wrote them, and those of any model by the same code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from desks import check_refusal, make_desk
from opd.cli.main import main
from opd.reporting import read_metrics, read_samples

WRONG = {
    "no such folder": (
        ["./stduent", "--prompts", "prompts.jsonl"],
        "There is no folder './stduent'. Did you mean 'student'?",
    ),
    "no prompts": (["student"], "Give prompts for 'student', e.g. --prompts test.jsonl."),
    "no such prompts": (
        ["student", "--prompts", "prompt.jsonl"],
        "prompt.jsonl does not exist; did you mean prompts.jsonl?",
    ),
    "no such teacher": (["run", "--teacher", "./taecher"], "There is no folder './taecher'."),
    "no such reward": (["run", "--reward", "exact"], "Did you mean 'exact_match'?"),
    "no such option": (["run", "--sample", "3"], "There is no option --sample here. Did you mean --samples?"),
    "no such key": (["run", "--eval.sample", "3"], "Unknown key 'eval.sample'."),
    "a wrong number": (["run", "--samples", "0"], "--samples takes a whole number from 1 up, not '0'."),
    "no value": (["run", "--prompts", "--json"], "--prompts needs a value: --prompts FILE."),
    "two models": (["run", "student"], "Give one model to evaluate, not 2"),
    "a taken folder": (
        ["run", "--out", "student"],
        "'student' is there already; give --out a folder that is new or empty.",
    ),
    "all checkpoints": (
        ["run/checkpoints"],
        "holds 2 checkpoints; name one of them, the newest is run/checkpoints/step-00000004.",
    ),
    "a run that has not begun": (["begun"], "The run 'begun' has no student/ and no checkpoint yet."),
    "a checkpoint without its run": (["alone/step-00000001"], "holds weights alone, and there is no config.yaml in"),
    "a folder without a model": (["empty"], "'empty' holds none of config.json, adapter_config.json and config.yaml."),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_desk(tmp_path_factory.mktemp("desk"))
    (folder / "empty").mkdir()
    (folder / "begun").mkdir()
    (folder / "begun" / "config.yaml").write_bytes((folder / "run" / "config.yaml").read_bytes())
    (folder / "alone" / "step-00000001").mkdir(parents=True)
    for name in ("weights.safetensors", "state.json"):
        (folder / "alone" / "step-00000001" / name).write_bytes(b"{}")
    return folder


def evaluated(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    """The JSON document of `opd eval WORDS`."""
    capsys.readouterr()
    assert main(["eval", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def recorded(run: Path, step: int, who: str = "student") -> tuple[dict[str, float], dict[str, list[float]]]:
    """Metrics without times, and intervals, as the run wrote them."""
    record = next(r for r in read_metrics(run) if (r.kind, r.step, r.who) == ("eval", step, who))
    metrics = {name: value for name, value in record.metrics.items() if not name.startswith("time/")}
    return metrics, {name: list(interval) for name, interval in record.intervals.items()}


@pytest.mark.parametrize(
    ("model", "run", "step"),
    [
        ("run", "run", 4),
        ("run/checkpoints/step-00000002", "run", 2),
        ("run/checkpoints/step-00000004", "run", 4),
        ("recipe.yaml", "run", 0),
        ("lora/checkpoints/step-00000002", "lora", 2),
    ],
)
def test_the_numbers_are_those_of_the_runs_own_evaluation(
    desk: Path, capsys: pytest.CaptureFixture[str], model: str, run: str, step: int
):
    metrics, intervals = recorded(desk / run, step)
    found = evaluated(capsys, desk / model)["result"]
    assert {name: found["metrics"][name] for name in metrics} == metrics
    assert {name: found["intervals"][name] for name in intervals} == intervals
    assert {"accuracy", "reverse_kl", "forward_kl", "response_length", "truncated"} <= metrics.keys()
    assert {"accuracy", "reverse_kl", "forward_kl"} <= intervals.keys()


def test_what_was_trained_is_not_what_it_began_with(desk: Path):
    """The cases above would pass with weights that never move."""
    for run in ("run", "lora"):
        assert len({recorded(desk / run, step)[0]["reverse_kl"] for step in (0, 2, 4)}) == 3


def test_the_student_of_a_lora_run_is_its_merged_model(desk: Path, capsys: pytest.CaptureFixture[str]):
    """Merging rounds in another order, so that the numbers are equal to some digits alone."""
    metrics, _ = recorded(desk / "lora", 4)
    assert evaluated(capsys, desk / "lora")["result"]["metrics"]["reverse_kl"] == pytest.approx(
        metrics["reverse_kl"], rel=1e-4
    )


def test_an_adapter_folder_is_a_model(desk: Path, capsys: pytest.CaptureFixture[str]):
    """An adapter has the numbers of the checkpoint whose weights it is."""
    words = ("--prompts", desk / "prompts.jsonl", "--limit", 8, "--teacher", desk / "teacher", "--max-new-tokens", 6)
    alone = evaluated(
        capsys, desk / "lora" / "adapter", *words, "--reward", "regex:^[0-4]", "--eval.extra_temperatures", "0.0"
    )
    metrics, _ = recorded(desk / "lora", 4)
    assert alone["result"]["metrics"] == pytest.approx(metrics, rel=1e-4)


def test_a_model_without_a_run_is_measured_as_the_recipe_measures_it(desk: Path, capsys: pytest.CaptureFixture[str]):
    metrics, intervals = recorded(desk / "run", 0)
    words = ("--prompts", desk / "prompts.jsonl", "--limit", 8, "--teacher", desk / "teacher", "--max-new-tokens", 6)
    found = evaluated(
        capsys,
        desk / "student",
        *words,
        "--reward",
        "regex:^[0-4]",
        "--teacher-too",
        "--train.tokens_per_microbatch",
        60,
    )
    del metrics["accuracy_greedy"], intervals["accuracy_greedy"]
    assert (found["result"]["metrics"], found["result"]["intervals"]) == (metrics, intervals)
    teacher, _ = recorded(desk / "run", 0, "teacher")
    del teacher["accuracy_greedy"]
    assert found["teacher_result"]["metrics"] == teacher


def test_options_change_what_is_measured(desk: Path, capsys: pytest.CaptureFixture[str]):
    run = desk / "run"
    usual = evaluated(capsys, run)
    assert (usual["prompts_used"], usual["samples_per_prompt"], usual["seed"]) == (8, 1, 0)
    assert evaluated(capsys, run)["result"] == usual["result"]
    for words in (("--seed", 1), ("--samples", 3), ("--max-new-tokens", 3), ("--temperature", 0), ("--limit", 5)):
        assert evaluated(capsys, run, *words)["result"]["metrics"] != usual["result"]["metrics"], words
    assert evaluated(capsys, run, "--prompts", desk / "prompts.jsonl")["prompts_used"] == 40
    itself = evaluated(capsys, run, "--teacher", run / "student")["result"]["metrics"]
    assert (itself["reverse_kl"], itself["forward_kl"]) == pytest.approx((0, 0), abs=1e-6)


def test_without_answers_or_a_teacher_what_cannot_be_measured_is_left_out(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "1>"}\n{"prompt": "2>"}\n')
    words = ("--prompts", tmp_path / "bare.jsonl", "--max-new-tokens", 6)
    found = evaluated(capsys, desk / "student", *words)
    assert set(found["result"]["metrics"]) == {"response_length", "truncated"}
    assert (found["reward"], found["teacher"]) == (None, None)
    assert any("have no reference answer" in note for note in found["notes"])


def test_the_folder_that_is_written_is_read_by_other_commands(
    desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "found"
    document = evaluated(capsys, desk / "run", "--out", out, "--teacher-too")
    assert json.loads((out / "eval.json").read_text()) == document
    metrics, _ = recorded(out, 0)
    assert metrics == document["result"]["metrics"]
    samples = read_samples(out)
    assert len(samples) == 8 and {sample.who for sample in samples} == {"student", "teacher"}
    assert samples[0].details is not None and samples[0].details.teacher_top is not None
    page = (out / "report.html").read_text()
    assert "No training step is recorded" not in page
    assert main(["compare", str(out), str(desk / "run"), "--out", str(tmp_path / "compare.html")]) == 0


def test_a_self_teacher_is_that_of_a_checkpoint(desk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from opd.config.recipe import build, merge
    from opd.trainer.run import train
    from worlds import settings

    more = {"train__steps": 4, "eval__every": 2, "checkpoint__every": 2, "optimizer__lr": 0.03}
    values = settings(desk, tmp_path / "own", **more)
    del values["teacher.model"]
    values |= {"teacher.source": "ema", "prompts.teacher_prompt": "{{ answer }}>{{ prompt }}"}
    train(build(merge({}, values)))
    metrics, _ = recorded(tmp_path / "own", 4)
    found = evaluated(capsys, tmp_path / "own" / "checkpoints" / "step-00000004")["result"]["metrics"]
    assert found["reverse_kl"] == metrics["reverse_kl"] > 0
    assert main(["eval", str(tmp_path / "own")]) == 1
    assert "Give a checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_word_is_refused_before_torch_is_imported(desk: Path, case: str):
    words, said = WRONG[case]
    check_refusal(desk, ["eval", *words], said)
