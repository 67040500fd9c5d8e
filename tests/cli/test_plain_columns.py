"""Rows whose columns hold no messages go through every command that uses a model, by prompts.user_message or as tasks."""

import json
from pathlib import Path

import pytest
import yaml

from opd.cli.main import main
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model, tiny_causal_lm

TEMPLATE = "{{ question }} Now."
SHORT = ["--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chat models, questions, and `run`, a finished run of a recipe with a template."""
    folder, tokenizer = tmp_path_factory.mktemp("desk"), byte_tokenizer(chat_template=CHAT_TEMPLATE)
    for name, seed in (("student", 3), ("teacher", 4)):
        save_model(
            tiny_causal_lm(tokenizer, seed=seed, hidden=32, layers=1, initializer_range=0.4), tokenizer, folder / name
        )
    rows = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(folder / "rows.jsonl")
    recipe = {
        "student": {"model": str(folder / "student")},
        "teacher": {"model": str(folder / "teacher")},
        "prompts": {"path": path, "eval_path": path, "user_message": TEMPLATE},
        "rollout": {"max_new_tokens": 4},
        "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 1},
        "eval": {"every": 1, "prompts": 4, "reward": "numeric_answer"},
        "log": {"progress": "off"},
        "run_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["train", str(folder / "recipe.yaml")]) == 0
    return folder


def test_a_model_is_evaluated_with_a_template_that_is_given(desk: Path, capsys: pytest.CaptureFixture[str]):
    words = ["eval", str(desk / "student"), "--prompts", str(desk / "rows.jsonl"), "--prompts.user_message", TEMPLATE]
    assert main([*words, *SHORT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompts_used"] == 8 and found["reward"] == "exact_match", "the first row's answer was seen"


def test_answers_of_a_run_are_scored_though_its_template_is_for_other_rows(
    desk: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["sample", str(desk / "run"), "--prompts", str(desk / "rows.jsonl"), "--json", "--seed", "2"]) == 0
    lines = capsys.readouterr().out
    sampled = [json.loads(line) for line in lines.splitlines()]
    assert sampled[1]["prompt"] == [{"role": "user", "content": "What is 1 + 1? Now."}]
    (desk / "sampled.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in sampled if one["response"]))
    words = ["--student", str(desk / "run"), "--out", str(desk / "score.html")]
    assert main(["score", str(desk / "sampled.jsonl"), *words]) == 0
    shown = [json.loads(line) for line in (desk / "score.jsonl").read_text().splitlines()]
    assert "What is 1 + 1? Now." in shown[1]["prompt"]


def test_rows_with_the_runs_own_columns_go_through_its_template(desk: Path):
    rows = [{"question": "What is 7 + 1?", "response": "8"}]
    (desk / "answered.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert (
        main(["score", str(desk / "answered.jsonl"), "--student", str(desk / "run"), "--out", str(desk / "page.html")])
        == 0
    )
    (line,) = (desk / "page.jsonl").read_text().splitlines()
    assert "What is 7 + 1? Now." in json.loads(line)["prompt"]


def test_tasks_are_made_as_the_command_line_says(desk: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("reasoning_gym")
    words = [
        "sample",
        str(desk / "student"),
        "--prompts",
        "reasoning_gym:leg_counting",
        "--limit",
        "1",
        "--json",
        *SHORT,
    ]
    asked = []
    for seed in ("0", "7"):
        assert main([*words, "--prompts.reasoning_gym.seed", seed]) == 0
        asked.append(json.loads(capsys.readouterr().out)["prompt"])
    assert asked[0] != asked[1]
