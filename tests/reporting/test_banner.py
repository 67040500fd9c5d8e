"""The banner, and the facts of a model that are known before it is loaded."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path

import pytest

from opd.config.recipe import build, check, load, merge, to_dict, words_of
from opd.reporting.banner import banner, objective_words, show
from opd.reporting.model_facts import count, model_facts
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from worlds import settings

QWEN_0_5B = {  # its published config.json; the model has 494,032,768 parameters
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


def test_parameters_are_counted_from_the_header_of_the_weights(tmp_path: Path):
    model = tiny_causal_lm(digit_tokenizer(), hidden=32, layers=2, seed=0)
    save_model(model, digit_tokenizer(), tmp_path)
    facts = model_facts(str(tmp_path))
    assert facts.here and facts.parameters == sum(p.numel() for p in model.parameters())
    assert (facts.dtype, facts.vocabulary) == ("float32", model.config.vocab_size)


def test_parameters_of_shards_are_added_up(tmp_path: Path):
    for name, shape in (("a.safetensors", [3, 5]), ("b.safetensors", [7])):
        header = json.dumps(
            {"__metadata__": {}, f"w of {name}": {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]}}
        )
        (tmp_path / name).write_bytes(struct.pack("<Q", len(header)) + header.encode())
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert model_facts(str(tmp_path)).parameters == 22


def test_without_weights_parameters_are_estimated_within_a_thousandth(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_0_5B))
    facts = model_facts(str(tmp_path))
    assert facts.parameters == pytest.approx(494_032_768, rel=1e-3)
    assert str(facts) == "494M parameters, bfloat16, vocabulary 151,936"


@pytest.mark.parametrize("broken", ["", "[]", "{", '{"vocab_size": "many", "hidden_size": null}'])
def test_a_broken_folder_has_no_facts_and_no_exception(tmp_path: Path, broken: str):
    (tmp_path / "config.json").write_text(broken)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    assert model_facts(str(tmp_path)).parameters == 0


def test_a_name_that_is_not_on_this_disk_is_not_looked_for_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    for name in ("nobody/such-a-model-there-is-not", "./nothere", "/nothere", "a/b/c", "", "spaces in it"):
        assert not model_facts(name).here


@pytest.mark.parametrize(
    ("number", "shown"),
    [(494_032_768, "494M"), (7_615_616_512, "7.6B"), (9_700, "9.7k"), (999_960_000, "1.0B"), (12, "12")],
)
def test_numbers_of_parameters_read_as_people_say_them(number: int, shown: str):
    assert count(number) == shown


def test_the_banner_says_what_is_trained_on_what(world: Path, tmp_path: Path):
    values = settings(world, tmp_path / "run", prompts__limit=30)
    lines = dict(banner(to_dict(build(merge({}, values))), "1.2.3"))
    assert lines["opd"] == f"1.2.3 · {tmp_path}/run"
    assert lines["student"].startswith(f"{world}/student · 9.7k parameters, float32, vocabulary 13")
    assert lines["teacher"].startswith(f"{world}/teacher · 9.7k parameters")
    assert lines["loss"] == "reverse KL, whole vocabulary"
    prompts = world / "prompts.jsonl"
    assert lines["prompts"] == f"{prompts} (30 of 40 rows) · held out: {prompts} (8 of 40 rows), every 3 steps"
    assert lines["step"] == "6 prompts × 2 samples × at most 6 tokens = up to 72 tokens; 8 steps"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"objective": {"divergence": "generalized_jsd", "beta": 0.1}}, "generalised JSD (β = 0.1), whole vocabulary"),
        ({"objective": {"support": "teacher_top_k", "top_k": 20}}, "reverse KL, the teacher's top 20"),
        ({"objective": {"support": "sampled", "estimator": "k1"}}, "reverse KL, sampled token (k1)"),
        ({"rl": {"weight": 0.5}}, "reverse KL, whole vocabulary, and reward (weight 0.5)"),
        ({"rl": {"weight": 1, "distill_weight": 0}}, "reward (weight 1)"),
    ],
)
def test_the_objective_is_said_in_words(more: dict[str, object], words: str):
    assert objective_words(more) == words


def test_the_words_of_a_recipe_and_its_config_make_the_same_banner(world: Path, tmp_path: Path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"student: {{model: {world}/student}}\nteachers:\n  a: {{model: {world}/teacher}}\n  b: {{url: http://127.0.0.1:9}}\n"
        f"prompts: {{path: {world}/prompts.jsonl}}\nobjective: {{support: teacher_top_k, top_k: 8}}\n"
    )
    overrides = ["--train.steps=7", "--rollout.max-new-tokens", "33", "--prompts.eval_path", f"{world}/prompts.jsonl"]
    early = banner(to_dict(check(words_of(str(recipe), overrides))), "1")
    assert early == banner(to_dict(load(recipe, overrides)), "1")
    assert ("teacher", "b: http://127.0.0.1:9") in early


def test_a_pipe_gets_one_line_each_and_no_control_character():
    out = io.StringIO()
    show([("opd", "1 · run"), ("prompts", "a\x1b[2Jb" + " word" * 60)], out)
    lines = out.getvalue().splitlines()
    assert lines[0] == "opd       1 · run" and len(lines) == 2 and "\x1b" not in lines[1] and "\\x1b[2J" in lines[1]


def test_a_narrow_terminal_gets_lines_that_fit(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "44")
    out = Terminal()
    show([("prompts", "/a/long/path/to/a/file.jsonl (7,473 rows) · held out: /another/path.jsonl (256 rows)")], out)
    lines = out.getvalue().splitlines()
    assert len(lines) > 1 and all(len(line) < 44 for line in lines)
    assert all(line.startswith(" " * 10) for line in lines[1:])
