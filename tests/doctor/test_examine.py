"""`opd doctor RECIPE` on real tiny models: what it says of a healthy pair, and of pairs with one thing wrong."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from doctor.pairs import (
    EOS,
    SECOND_END,
    SIZE,
    TOKENIZER,
    answering,
    bigram_lm,
    by_name,
    config_of,
    verdicts,
    write_pair,
)
from opd.cli.main import main
from opd.config.recipe import merge
from opd.doctor.check import Check
from opd.testing import digit_tokenizer, save_model
from opd.trainer.examine import examine
from opd.types import Prompt


def look(folder: Path, student: Any, teacher: Any, **more: Any) -> dict[str, Check]:
    return by_name(examine(config_of(write_pair(folder, student, teacher, **more))))


def reds(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.verdict == "red"]


def test_a_healthy_pair_has_no_red_and_the_numbers_of_its_tables(tmp_path: Path):
    found = look(tmp_path, answering(0.4), answering(0.95))
    assert not reds(found)
    assert found["start/task"].verdict == found["alignment"].verdict == found["stop mass"].verdict == "green"
    numbers = found["stop mass"].numbers
    end = 0.98 + 0.02 / SIZE
    assert numbers[f"'<eos>' ({EOS})"] == f"student {end:.3g}, teacher {end:.3g}"
    assert found["alignment"].numbers["teacher's log-prob"] == pytest.approx(
        (torch.tensor(0.98 * 0.95 + 0.02 / SIZE).log() + torch.tensor(end).log()).item() / 2, abs=1e-3
    )
    mean, low, high = found["start/distance"].numbers["reverse KL"]
    assert 0 < low < mean < high
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_is_worse_than_its_student_is_red(tmp_path: Path):
    found = look(tmp_path, answering(0.95), answering(0.1))
    assert found["start/task"].verdict == "red" and "worse at this task" in found["start/task"].seen


def test_a_teacher_that_is_as_good_as_its_student_is_yellow(tmp_path: Path):
    found = look(tmp_path, answering(0.6), answering(0.6))
    assert found["start/task"].verdict == "yellow"


def test_uniform_scores_are_red(tmp_path: Path):
    teacher = bigram_lm(answering())
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
    found = look(tmp_path, answering(0.4), teacher)
    assert found["alignment"].verdict == "red" and "uniform" in found["alignment"].seen


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_one_layer_is_red_and_names_the_side(tmp_path: Path, side: str):
    models = {"student": bigram_lm(answering(0.4)), "teacher": bigram_lm(answering())}
    with torch.no_grad():
        models[side].model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    found = look(tmp_path, models["student"], models["teacher"])
    assert found["alignment"].verdict == "red"
    assert f"The {side}'s scores are NaN" in found["alignment"].seen


def test_ends_declared_alike_and_used_differently_are_red(tmp_path: Path):
    student, teacher = (bigram_lm(answering(0.5, ends={end: 0.9, EOS: 0.1} if end != EOS else {EOS: 1.0})) for end in (SECOND_END, EOS))
    for model in (student, teacher):
        model.generation_config.eos_token_id = [EOS, SECOND_END]
    found = look(tmp_path, student, teacher)
    assert found["vocabulary"].verdict == "green"
    assert found["stop mass"].verdict == "red" and "declare the same ids" in found["stop mass"].seen


def test_a_student_that_never_ends_is_told_from_answers_that_are_too_long(tmp_path: Path):
    endless = answering(0.5, ends={EOS: 0.0}, spread=0.001)
    alone = look(tmp_path / "student", endless, answering(0.95))
    assert alone["start/lengths"].verdict == "red" and "The student never ends" in alone["start/lengths"].seen
    assert alone["stop mass"].verdict == "yellow"
    both = look(tmp_path / "both", answering(0.5), answering(0.95), rollout__max_new_tokens=1)
    assert both["start/lengths"].verdict == "red" and "cut off at rollout.max_new_tokens=1" in both["start/lengths"].seen
    assert both["stop mass"].verdict == "yellow"


def test_models_with_other_likeliest_tokens_should_warm_up_first(tmp_path: Path):
    found = look(tmp_path, answering(0.4), answering(0.95))
    assert "rollout.lmbda" not in found["start/distance"].mend or found["start/distance"].verdict == "yellow"


def constant(prompt: Prompt, response: str) -> float:
    return 0.5


def broken(prompt: Prompt, response: str) -> float:
    raise KeyError(response)


def test_a_constant_reward_is_yellow_and_red_where_it_is_learnt_from(tmp_path: Path):
    own = f"{__name__}:constant"
    assert look(tmp_path / "a", answering(0.4), answering(), eval__reward=own)["reward"].verdict == "yellow"
    learnt = look(tmp_path / "b", answering(0.4), answering(), eval__reward=own, rl__weight=1.0)["reward"]
    assert learnt.verdict == "red" and learnt.numbers["groups without signal"] == "3 of 3"


def test_a_reward_that_raises_is_red_with_its_message(tmp_path: Path):
    found = look(tmp_path, answering(0.4), answering(), eval__reward=f"{__name__}:broken")
    assert found["reward"].verdict == "red" and "KeyError" in found["reward"].seen


def test_another_tokenizer_is_red_and_what_needs_the_models_is_skipped(tmp_path: Path):
    values = write_pair(tmp_path, answering(0.4), answering())
    save_model(bigram_lm(answering()), digit_tokenizer(extra="jihgfedcba"), tmp_path / "teacher")
    found = verdicts(examine(config_of(values)))
    assert found["vocabulary"] == "red"
    assert found["alignment"] == found["start"] == found["reward"] == "skipped"
    assert found["machine"] == "green"


def test_a_beginning_that_one_side_lacks_is_shown_with_both_renderings(tmp_path: Path):
    values = write_pair(tmp_path, answering(0.4), answering())
    tokenizer = digit_tokenizer(extra="abcdefghij", bos=True)
    for name, kept in (("student", tokenizer), ("teacher", digit_tokenizer(extra="abcdefghij", bos=True))):
        if name == "teacher":
            kept.backend_tokenizer.post_processor = None
        model = bigram_lm(answering())
        model.resize_token_embeddings(SIZE + 1, mean_resizing=False)
        save_model(model, kept, tmp_path / name)
    found = by_name(examine(config_of(values)))
    check = found["template"]
    assert check.verdict == "yellow" and "The teacher reads prompts without '<bos>'" in check.seen
    assert any("'<bos>" in line and "student" in line for line in check.details)
