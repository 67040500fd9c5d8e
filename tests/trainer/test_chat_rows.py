"""Rows of chats through a whole run: what models read, what is recorded of it, and what is said about the rest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from opd.config.recipe import build, merge
from opd.data.privileged import PrivilegedRenderer
from opd.teachers.ensemble import Ensemble
from opd.testing import CHAT_TEMPLATE, byte_tokenizer, save_model, tiny_causal_lm
from opd.trainer.fingerprints import prompts_fingerprint
from opd.trainer.from_config import RunComponents
from opd.trainer.run import train
from opd.types import Prompt

SPECIAL = "{{ bos_token }}{% for m in messages %}<turn>{{ m.role }} {{ m.content }}{% endfor %}<turn>assistant "
USER = {"role": "user", "content": "2+2?"}
TOOL = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def folder(tmp_path):
    for name, template in (("student", SPECIAL), ("teacher", CHAT_TEMPLATE)):
        tokenizer = byte_tokenizer(chat_template=template, bos=True, extra_tokens=["<turn>"])
        model = tiny_causal_lm(tokenizer, layers=1, hidden=16, heads=2, kv_heads=1, max_positions=128)
        save_model(model, tokenizer, tmp_path / name)
    return tmp_path


def recipe(folder, *rows, **more):
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "student.model": str(folder / "student"), "student.device": "cpu", "teacher.model": str(folder / "teacher"),
        "prompts.path": str(folder / "p.jsonl"), "prompts.eval_path": str(folder / "p.jsonl"), "rollout.max_new_tokens": 4,
        "train.steps": 1, "train.prompts_per_step": 1, "train.samples_per_prompt": 1, "eval.every": 1, "checkpoint.every": 0,
        "run_dir": str(folder / "run"), "log.progress": "plain",
    }  # fmt: skip
    return build(merge({}, values | {name.replace("__", "."): value for name, value in more.items()}))


def test_recorded_prompts_are_what_each_model_reads_special_tokens_included(folder):
    train(recipe(folder, {"prompt": [USER], "answer": "4"}))
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    read = {(sample["who"], sample["prompt"], sample["prompt_index"]) for sample in samples}
    assert read == {
        ("student", "<bos><turn>user 2+2?<turn>assistant ", 0),
        ("teacher", "<|user|>2+2?\n<|assistant|>", 0),
    }


def test_what_rows_hold_and_prompts_do_not_is_said_before_the_run(folder):
    rows = [
        {"prompt": [USER, {"role": "assistant", "content": "4"}]},
        {"prompt": [USER], "tools": [TOOL], "chat_template_kwargs": {"think": True}, "context": "Rome."},
    ]
    parts = RunComponents(recipe(folder, *rows, eval__every=0))
    warnings = "\n".join(parts.warnings)
    assert "1 of 2 rows" in parts.notes[0] and "end with the assistant's answer" in parts.notes[0]
    assert "has context, which no prompt holds" in warnings
    names = f"student '{folder / 'student'}' and teacher '{folder / 'teacher'}'"
    assert f"rows hold what prompts of {names} do not show" in warnings
    assert "tools (1 row, the first is prompt 1)" in warnings and "chat_template_kwargs.think (1 row" in warnings


def test_a_step_of_more_prompts_than_there_are_is_said(folder):
    warnings = "\n".join(
        RunComponents(recipe(folder, {"prompt": [USER]}, train__prompts_per_step=2, eval__every=0)).warnings
    )
    assert "train.prompts_per_step=2 is more than" in warnings and "has rows (1)" in warnings


def test_nothing_is_said_about_rows_that_are_shown(folder):
    config = recipe(folder, {"prompt": [USER], "answer": "4", "level": 3})
    assert RunComponents(config).warnings == ()


def test_the_teachers_own_prompt_keeps_the_text_of_parts_and_writes_no_none():
    renderer = PrivilegedRenderer(
        byte_tokenizer(chat_template=CHAT_TEMPLATE), "{{ prompt }} {{ extra.hint }}{{ extra.more }}", name="teacher"
    )
    parts = {"role": "user", "content": [{"type": "text", "text": "2+2?"}]}
    prompt = Prompt(index=0, messages=(parts,), metadata={"extra": {"hint": "even", "more": "!"}})
    assert renderer.decode(renderer.prompt_ids(prompt)) == "<|user|>2+2? even!\n<|assistant|>"
    nothing = replace(prompt, metadata={"extra": {"hint": "even", "more": None}})
    with pytest.raises(ValueError, match=r"cannot be filled in for prompt 0: .*has no attribute 'more'"):
        renderer.prompt_ids(nothing)


def test_weights_of_teachers_can_lie_inside_a_column():
    members: Any = dict.fromkeys(("a", "b"))
    ensemble = Ensemble(members=members, mixture="loss", weights={}, weights_column="extra.mix")
    prompt = Prompt(index=0, text="q", metadata={"extra": {"mix": {"a": 0.25, "b": 0.75}}})
    assert ensemble.weights_of(prompt) == (0.25, 0.75)


def test_a_change_of_a_rows_tools_is_a_change_of_the_prompts():
    plain = Prompt(index=0, messages=(USER,))
    with_tools = replace(plain, template_arguments={"tools": [TOOL]})
    assert prompts_fingerprint([plain]) != prompts_fingerprint([with_tools])


def test_rewards_are_told_in_training_and_evaluation_what_was_cut(folder, monkeypatch):
    (folder / "own_reward.py").write_text("def ended(prompt, response, finished=True): return float(finished)")
    monkeypatch.syspath_prepend(folder)
    train(
        recipe(folder, {"prompt": [USER]}, eval__reward="own_reward:ended", rl__weight=1.0, train__samples_per_prompt=4)
    )
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert {sample["phase"] for sample in samples} == {"train", "eval"} and not all(s["finished"] for s in samples)
    assert all(sample["reward"] == sample["finished"] for sample in samples)
