"""A Config made in Python takes what a recipe takes: dicts for sections, and values that become their types or are refused."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import opd
from opd.config import (
    BaseMixtureConfig,
    Config,
    EvalConfig,
    HybridConfig,
    LoraConfig,
    MixtureConfig,
    PromptsConfig,
    RlConfig,
    RolloutConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from opd.config.optimizer import NaturalGradientConfig, OptimizerConfig
from opd.config.recipe import build, to_dict
from opd.config.sections import Section, parse_section, section_of
from opd.errors import ConfigError, ObjectiveError, OpdError
from opd.losses import Objective

STUDENT, TEACHER, PROMPTS = {"model": "s"}, {"model": "t"}, {"path": "p"}


def whole(**more: Any) -> Config:
    return Config(**({"student": STUDENT, "teacher": TEACHER, "prompts": PROMPTS} | more))


def test_every_section_may_be_a_dict_and_is_then_what_a_recipe_makes_of_it():
    sections: dict[str, Any] = {
        "student": {"model": "s", "lora": {"rank": 8}},
        "teachers": {"math": {"model": "t"}, "code": {"model": "c", "device": "cpu"}},
        "mixture": {"kind": "loss", "weights": {"math": 0.5, "code": 0.5}},
        "prompts": {"path": "p"},
        "objective": {"divergence": "forward_kl"},
        "rl": {"weight": 1, "reward": "exact_match"},
        "reward": {"timeout": 3},
        "rollout": {"stop": "END", "max_new_tokens": 5},
        "optimizer": {"name": "natural_gradient", "natural_gradient": {"damping": "1e-3"}},
        "train": {"steps": 5},
        "guard": {"repetition": {"action": "stop"}},
        "eval": {"extra_temperatures": [0, 0.5]},
        "checkpoint": {"every": 2},
        "log": {"samples": 1},
        "save": {"dtype": "float32"},
    }
    assert sections.keys() == {f.name for f in dataclasses.fields(Config)} - {"teacher", "run_dir", "seed"}
    made = Config(**sections)
    assert made == build(sections)
    assert made.student.lora == LoraConfig(rank=8) and made.teachers["code"] == TeacherConfig(model="c", device="cpu")
    assert made.optimizer.natural_gradient == NaturalGradientConfig(damping=1e-3)
    assert whole(teacher=TeacherConfig(model="t"), student=StudentConfig(model="s")) == whole()


def test_every_section_of_a_recipe_is_a_section():
    def sections(one: type) -> set[type]:
        inner = {
            child for hint in vars(__import__("typing"))["get_type_hints"](one).values() if (child := section_of(hint))
        }
        return {one}.union(*(sections(child) for child in inner))

    assert {one for one in sections(Config) if not issubclass(one, Section)} == {Objective}


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: whole(student={}), "'student.model' is not set"),
        (lambda: whole(student="s"), "'student' is a section and cannot be 's'"),
        (lambda: whole(train=TrainConfig), "'train' is a section and cannot be"),
        (lambda: whole(optimizer=TrainConfig()), "'optimizer' is a section and cannot be TrainConfig"),
        (lambda: whole(train={"step": 5}), "Unknown key 'train.step'. Did you mean 'train.steps'?"),
        (lambda: whole(student={"model": "s", "lora": {"rnk": 1}}), "Did you mean 'student.lora.rank'?"),
        (lambda: whole(train={"steps": "five"}), "'train.steps' cannot be 'five'"),
        (lambda: whole(teachers={"math": {"model": 3}}, teacher=None), "'teachers.math.model' cannot be 3"),
        (lambda: whole(studnet={}), "Unknown key 'studnet'. Did you mean 'student'?"),
        (lambda: Config(student=STUDENT, teacher=TEACHER), "'prompts' is not set"),
        (lambda: Config(STUDENT), "Config takes its keys by name"),
        (lambda: whole(train={"steps": 0}), "train.steps must be at least 1"),
        (lambda: TrainConfig(steps="abc"), "'train.steps' cannot be 'abc'"),
        (lambda: TrainConfig(steps=True), "'train.steps' cannot be true: it is a number"),
        (lambda: StudentConfig(model=None), "'student.model' cannot be None"),
        (lambda: NaturalGradientConfig(damping="x"), "'optimizer.natural_gradient.damping' cannot be 'x'"),
        (lambda: MixtureConfig(kind="router"), "'mixture.kind' cannot be 'router'"),
        (lambda: EvalConfig(reward=lambda p, r: 1.0), "'eval.reward' cannot be"),
        (lambda: RlConfig(weight=[1.0]), "'rl.weight' cannot be"),
        (lambda: dataclasses.replace(TrainConfig(), steps="many"), "'train.steps' cannot be 'many'"),
        (lambda: opd.train("recipe.yaml"), "a recipe file is opd.config.recipe.load(PATH)"),
        (lambda: opd.train({"student": STUDENT}), "'prompts' is not set"),
    ],
)
def test_what_cannot_be_a_section_is_refused_with_its_key(make, what):
    with pytest.raises(ConfigError, match=re.escape(what)):
        make()


def test_an_objective_s_own_refusal_is_kept():
    with pytest.raises(ObjectiveError, match=r"objective: beta=0.9 is not read by reverse_kl"):
        whole(objective={"beta": 0.9})
    with pytest.raises(ObjectiveError, match=r"objective: .*ignore"):
        whole(objective={"tail": "ignore", "support": "teacher_top_k"})


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"student_temperature": "1.0"}, "student_temperature='1.0' must be a number"),
        ({"beta": [0.5], "divergence": "generalized_jsd"}, "beta=[0.5] must be a number"),
        ({"discount": True}, "discount=True must be a number"),
        ({"fixed_count": "7", "reduction": "fixed"}, "fixed_count='7' must be a number or None"),
        ({"teacher_logp_floor": [-3]}, "teacher_logp_floor=[-3] must be a number or None"),
        ({"normalize": "no"}, "normalize='no' must be True or False"),
        ({"always_include": 5}, "always_include=5 must be a tuple of token ids"),
        ({"always_include": "5"}, "always_include='5' must be a tuple of token ids"),
    ],
)
def test_an_objective_made_in_python_refuses_wrong_types_by_name(wrong, what):
    with pytest.raises(ObjectiveError, match=re.escape(what)):
        Objective(**wrong)


class Teacher(Section, key="teacher"):
    model: str


class Foreign(Section):
    rl: HybridConfig = dataclasses.field(default_factory=HybridConfig)
    mixture: BaseMixtureConfig = dataclasses.field(default_factory=BaseMixtureConfig)
    objective: Objective = dataclasses.field(default_factory=Objective)
    teachers: dict[str, Teacher] = dataclasses.field(default_factory=dict)


def test_another_program_s_config_holds_the_same_sections():
    made = parse_section(Foreign, {"rl": {"weight": "0.5"}, "teachers": {"a": {"model": "m"}}}, "opd.")
    assert made == Foreign(rl=HybridConfig(weight=0.5), teachers={"a": Teacher(model="m")})
    assert made.rl.weights_at(0, 10) == (0.5, 1.0) and made.mixture.at(0, 10, ("a", "b")) == {"a": 0.5, "b": 0.5}
    assert RlConfig(weight=1.0).rewarded and isinstance(RlConfig(), HybridConfig)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (
            {"rl": {"wieght": 1}},
            "Unknown key 'opd.rl.wieght'. Did you mean 'opd.rl.weight'? Keys of section 'opd.rl': weight,",
        ),
        ({"weight": 1}, "Unknown key 'opd.weight'. Did you mean 'opd.rl.weight'? Keys of section 'opd': rl, mixture,"),
        ({"rl": 3}, "'opd.rl' is a section and cannot be 3; set its keys, e.g. opd.rl.weight=VALUE."),
        (
            {"teachers": {"a": {}}},
            "'opd.teachers.a.model' is not set, and has no default. Add it to the recipe or pass opd.",
        ),
        ({"rl": {"weight": True}}, "'opd.rl.weight' cannot be true: it is a number"),
        ({"rl": {"weight": "x"}}, "'opd.rl.weight' cannot be 'x'"),
        ({"rl": {"weight": -1}}, "opd.rl.weight must be 0 or a positive number, not -1.0"),
        ({"rl": {"distill_weight": 0}}, "opd.rl.weight and opd.rl.distill_weight are both 0"),
        ({"mixture": {"kind": "loss", "weights": {"a": 2}}}, "opd.mixture.weights must be ≥ 0 and sum to 1"),
        ({"mixture": {"weights": {"a": 1}}}, "opd.mixture.weights would change nothing: with opd.mixture.kind=routing"),
        ({"objective": {"beta": 0.5}}, "opd.objective: beta=0.5 is not read by reverse_kl"),
        ({"objective": {"top_k": 64}}, "opd.objective: top_k=64 is read by top-k supports"),
    ],
)
def test_and_its_messages_name_keys_as_they_are_written_there(data, what):
    with pytest.raises(OpdError, match=re.escape(what)):
        parse_section(Foreign, data, "opd.")


def test_values_become_their_types():
    assert StudentConfig(model=Path("a") / "b").model == "a/b"
    assert whole(prompts={"path": Path("p.jsonl")}).prompts == PromptsConfig(path="p.jsonl")
    assert RolloutConfig(stop="END").stop == ("END",)
    assert EvalConfig(extra_temperatures=[0, 0.5]).extra_temperatures == (0.0, 0.5)
    numbers = TrainConfig(steps=np.int64(5), token_fraction=np.float32(0.5))
    assert (numbers.steps, numbers.token_fraction) == (5, 0.5) and type(numbers.steps) is int
    assert OptimizerConfig(lr="1e-3").lr == 1e-3


def test_a_config_survives_a_round_trip_and_a_copy():
    import copy
    import pickle

    made = whole(train={"steps": 7}, student={"model": "s", "lora": {"rank": 2}})
    assert build(to_dict(made)) == made == copy.deepcopy(made) == pickle.loads(pickle.dumps(made))
    assert isinstance(ConfigError("x"), OpdError)
