"""`opd doctor RECIPE` on real tiny models: what it says of a healthy pair, and of pairs with one thing wrong."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

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
from opd.doctor.check import Check
from opd.testing import digit_tokenizer, save_model
from opd.trainer.examine import examine, examine_parts, in_process
from opd.trainer.from_config import RunComponents
from opd.types import Prompt


def look(folder: Path, student: Any, teacher: Any, **more: Any) -> dict[str, Check]:
    return by_name(examine(config_of(write_pair(folder, student, teacher, **more))))


def reds(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.verdict == "red"]


def test_a_healthy_pair_has_no_red_and_the_numbers_of_its_tables(tmp_path: Path):
    found = look(tmp_path, answering(0.2), answering(0.95))
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


def test_what_a_step_will_take_grows_with_its_responses(tmp_path: Path):
    keys = (("start/lengths", "rollouts of a step, about (s)"), ("start/distance", "scores of a step, about (s)"))
    parts = RunComponents(config_of(write_pair(tmp_path, answering(0.2), answering(0.95))))
    few, many = (by_name(examine_parts(replaced, 4)) for replaced in (parts, times_100(parts)))
    for name, key in keys:
        seconds = [found[name].numbers[key] for found in (few, many)]
        assert 0 < seconds[0] < 60 and seconds[1] > 5 * seconds[0], seconds  # pyright: ignore[reportOperatorIssue, reportOptionalOperand]


def times_100(parts: RunComponents) -> RunComponents:
    more = copy.copy(parts)
    more.config = replace(parts.config, train=replace(parts.config.train, prompts_per_step=800))
    return more


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
def test_nan_in_one_layer_is_red_and_names_the_weight(tmp_path: Path, side: str):
    models = {"student": bigram_lm(answering(0.4)), "teacher": bigram_lm(answering())}
    with torch.no_grad():
        models[side].model.layers[0].mlp.up_proj.weight[3, 3] = torch.nan
    found = look(tmp_path, models["student"], models["teacher"])
    assert reds(found) == ["recipe"]
    assert f"The {side} '" in found["recipe"].seen and "layers.0.mlp.up_proj.weight" in found["recipe"].seen
    assert found["alignment"].verdict == "skipped"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_layer_that_overflows_is_red_and_names_the_side(tmp_path: Path, side: str):
    models = {"student": bigram_lm(answering(0.4)), "teacher": bigram_lm(answering())}
    with torch.no_grad():
        models[side].model.layers[0].mlp.up_proj.weight.fill_(3e38)
    found = look(tmp_path, models["student"], models["teacher"])
    assert found["alignment"].verdict == "red"
    assert f"The {side}'s scores are NaN" in found["alignment"].seen


def test_ends_declared_alike_and_used_differently_are_red(tmp_path: Path):
    student, teacher = (
        bigram_lm(answering(0.5, ends={end: 0.9, EOS: 0.1} if end != EOS else {EOS: 1.0})) for end in (SECOND_END, EOS)
    )
    for model in (student, teacher):
        model.generation_config.eos_token_id = [EOS, SECOND_END]
    found = look(tmp_path, student, teacher)
    assert found["vocabulary"].verdict == "green"
    assert found["stop mass"].verdict == "red" and "declare the same ids" in found["stop mass"].seen
    assert f"objective.eos_groups: [[{EOS}, {SECOND_END}]]" in found["stop mass"].mend
    mended = look(tmp_path, student, teacher, objective__eos_groups=[[EOS, SECOND_END]])
    assert mended["stop mass"].verdict == "green"


def test_a_student_that_never_ends_is_told_from_answers_that_are_too_long(tmp_path: Path):
    endless = answering(0.5, ends={EOS: 0.0}, spread=0.001)
    alone = look(tmp_path / "student", endless, answering(0.95))
    assert alone["start/lengths"].verdict == "red" and "The student never ends" in alone["start/lengths"].seen
    assert alone["stop mass"].verdict == "yellow"
    both = look(tmp_path / "both", answering(0.5), answering(0.95), rollout__max_new_tokens=1)
    assert (
        both["start/lengths"].verdict == "red" and "cut off at rollout.max_new_tokens=1" in both["start/lengths"].seen
    )
    assert both["stop mass"].verdict == "yellow"


def test_models_with_other_likeliest_tokens_should_warm_up_first(tmp_path: Path):
    """Half of the tokens are likelier than the other half, and the halves are the other way round for the student."""

    def halves(first: float) -> torch.Tensor:
        table = torch.cat([torch.full((SIZE, 12), first), torch.full((SIZE, SIZE - 12), 1 - first)], dim=1)
        table[:, EOS] = 3.0  # both end
        return table / table.sum(-1, keepdim=True)

    apart = look(tmp_path / "apart", halves(0.9), halves(0.1))["start/distance"]
    assert apart.verdict == "yellow" and "rollout.lmbda" in apart.mend
    assert apart.numbers["overlap"][0] < 0.4  # pyright: ignore[reportOptionalSubscript]
    near = look(tmp_path / "near", halves(0.1), halves(0.1))["start/distance"]
    assert near.verdict == "green" and near.numbers["overlap"][0] == pytest.approx(1.0)  # pyright: ignore[reportOptionalSubscript]


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


def test_two_models_with_templates_of_their_own_are_shown_side_by_side(tmp_path: Path):
    values = write_pair(tmp_path, answering(0.4), answering())
    rows = [{"prompt": [{"role": "user", "content": letter}], "answer": "0"} for letter in "abcd"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, template in (("student", "{{ messages[0].content }}>"), ("teacher", "{{ messages[0].content }}")):
        tokenizer = digit_tokenizer(extra="abcdefghij", chat_template=template)
        tokenizer.save_pretrained(tmp_path / name)
    check = by_name(examine(config_of(values)))["template"]
    assert check.verdict == "yellow" and "from token 1 on: '>' and ''" in check.seen
    assert check.numbers["differing"] == 2 and len(check.details) == 4


def test_each_of_several_teachers_is_looked_at_on_its_own_prompts(tmp_path: Path):
    values = write_pair(tmp_path, answering(0.4), answering())
    bad = bigram_lm(answering())
    with torch.no_grad():
        bad.lm_head.weight.zero_()
    save_model(bad, TOKENIZER, tmp_path / "bad")
    rows = [{"prompt": "abcd"[i % 4], "answer": "0", "teacher": ("good", "bad")[i % 2]} for i in range(16)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    del values["teacher.model"]
    values |= {"teachers.good.model": str(tmp_path / "teacher"), "teachers.bad.model": str(tmp_path / "bad")}
    found = by_name(examine(config_of(values)))
    assert found["alignment/good"].verdict == "green" and found["alignment/bad"].verdict == "red"
    assert found["stop mass/good"].numbers["ends"] == 8 and "stop mass/bad" in found
    assert found["start/distance"].verdict != "red"


def test_a_reward_without_a_teacher_is_looked_at_alone(tmp_path: Path):
    values = write_pair(tmp_path, answering(0.4), answering())
    del values["teacher.model"]
    found = verdicts(examine(config_of(values | {"rl.weight": 1.0, "rl.distill_weight": 0.0})))
    assert found["alignment"] == found["stop mass"] == found["start/distance"] == found["start/task"] == "skipped"
    assert found["reward"] == "green"


def test_the_task_is_judged_on_held_out_prompts_where_the_others_have_no_answers(tmp_path: Path):
    values = write_pair(tmp_path, answering(0.4), answering())
    (tmp_path / "prompts.jsonl").rename(tmp_path / "held_out.jsonl")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": "abcd"[i % 4]}) + "\n" for i in range(16)))
    found = by_name(examine(config_of(values)))
    assert found["start/task"].verdict == "skipped" and "have none" in found["start/task"].seen
    values |= {"prompts.eval_path": str(tmp_path / "held_out.jsonl"), "eval.every": 5}
    found = by_name(examine(config_of(values)))
    assert found["start/task"].verdict in ("green", "yellow") and found["start/task"].numbers["prompts"] == 16


def test_answers_of_a_recipe_with_an_engine_are_drawn_in_this_process(tmp_path: Path):
    config = config_of(write_pair(tmp_path, answering(0.4), answering(), rollout__engine="vllm"))
    assert in_process(config).rollout.engine == "hf"
    assert in_process(config).rollout.max_new_tokens == config.rollout.max_new_tokens


def test_scores_of_no_teacher_are_kept(tmp_path: Path):
    values = write_pair(tmp_path, answering(0.4), answering())
    model = values.pop("teacher.model")
    for name in ("one", "two"):
        values |= {f"teachers.{name}.model": model, f"teachers.{name}.cache": str(tmp_path / "cache")}
    config = config_of(values)
    assert {section.cache for section in config.all_teachers.values()} == {str(tmp_path / "cache")}
    assert {section.cache for section in in_process(config).all_teachers.values()} == {None}


def test_a_student_that_a_lower_temperature_makes_as_good_is_yellow(tmp_path: Path):
    """At half the temperature 0.6 of the probability, beside 0.4 spread over nine, becomes 0.95."""
    check = look(tmp_path, answering(0.6, spread=0.001), answering(0.99, spread=0.001))["start/task"]
    assert check.verdict == "yellow" and "A lower temperature does as much" in check.seen


@pytest.mark.parametrize(
    ("right", "more"),
    [
        ((0.1, 0.95), {}),
        ((0.3, 0.99), {"rollout__temperature": 0.8}),
        ((0.4, 0.9), {"train__layout": "packed"}),
        ((0.2, 0.9), {"train__layout": "left_padded"}),
        ((0.2, 0.9), {"rl__weight": 1.0}),
        ((0.2, 0.9), {"objective__support": "teacher_top_k", "objective__top_k": 4}),
        (
            (0.2, 0.9),
            {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"},
        ),
        ((0.2, 0.9), {"train__autocast": "bfloat16"}),
        ((0.2, 0.9), {"teacher__dtype": "bfloat16"}),
        ((0.2, 0.9), {"student__lora__rank": 4}),
    ],
    ids=str,
)
def test_ten_healthy_recipes_have_no_red(tmp_path: Path, right: tuple[float, float], more: dict[str, Any]):
    found = look(tmp_path, answering(right[0]), answering(right[1]), **more)
    assert not reds(found)
    assert len(found) == 14 and "skipped" not in {check.verdict for check in found.values()}
