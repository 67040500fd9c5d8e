"""The `opd:` section of a verl config, without verl: what it comes to, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

import opd.integrations.verl.plugin.conf
from opd.errors import ConfigError, ObjectiveError
from opd.integrations.verl.plugin.settings import OBJECTIVE_KEYS, OLDER_NAMES, Settings, TeacherSettings, parse
from opd.losses import Objective

GROUP = Path(opd.integrations.verl.plugin.conf.__file__).parent / "opd" / "default.yaml"
TEACHER = {"teacher": {"model_path": "teacher"}}
BOTH = {"a": {"model_path": "one"}, "b": {"model_path": "two"}}


def weighted(a: float | None, b: float | None) -> dict:
    return {"a": {**BOTH["a"], "weight": a}, "b": {**BOTH["b"], "weight": b}}


def group() -> dict:
    return yaml.safe_load(GROUP.read_text(encoding="utf-8"))["opd"]


def test_the_config_group_holds_every_key_and_its_default():
    section = group()
    teacher = section.pop("teacher")
    assert section.pop("teachers") == {}
    assert {k: section.pop(k) for k in OLDER_NAMES} == dict.fromkeys(OLDER_NAMES)
    expected = {k: getattr(Objective(), k) for k in OBJECTIVE_KEYS} | {
        f.name: f.default for f in dataclasses.fields(Settings) if f.name not in ("teachers", "objective")
    }
    assert {**section, "always_include": tuple(section["always_include"])} == expected
    assert teacher == {f.name: f.default for f in dataclasses.fields(TeacherSettings)} | {"model_path": None}


def test_the_group_as_it_stands_is_exact_reverse_kl():
    settings, notes = parse({**group(), **TEACHER})
    assert settings.objective == Objective()
    assert (settings.lambda_rl, settings.lambda_distill, notes) == (0.0, 1.0, ())


@pytest.mark.parametrize(
    ("older", "divergence"), [("reverse_kl", "reverse_kl"), ("forward_kl", "forward_kl"), ("gkd", "skew_reverse_kl")]
)
def test_older_types_are_mapped_and_told(older: str, divergence: str):
    settings, notes = parse({**group(), **TEACHER, "distillation_type": older})
    assert settings.objective.divergence == divergence
    assert notes[0].startswith(f"distillation_type={older} was read as divergence={divergence}")
    assert ("generalized_jsd" in notes[0]) == (older == "gkd")


def test_all_older_names_together():
    settings, notes = parse(
        {
            **group(),
            **TEACHER,
            "distillation_type": "gkd",
            "distillation_temperature": 2.0,
            "distillation_beta": 0.7,
            "hybrid_lambda_rl": 0.3,
            "hybrid_lambda_distill": 0.6,
        }
    )
    wanted = Objective(divergence="skew_reverse_kl", beta=0.7, student_temperature=2.0, teacher_temperature=2.0)
    assert settings.objective == wanted
    assert (settings.lambda_rl, settings.lambda_distill) == (0.3, 0.6)
    assert len(notes) == 5


def test_the_line_in_the_log_names_what_is_not_default():
    settings, _ = parse({**TEACHER, "divergence": "generalized_jsd", "beta": 0.25, "lambda_rl": 0.1})
    said = "generalized_jsd beta=0.25 lambda_distill=1 lambda_rl=0.1, teacher 'teacher' in the actor"
    assert settings.describe() == said


def test_several_teachers_are_told_with_their_shares():
    settings, _ = parse({**group(), "teachers": weighted(0.25, 0.75), "mixture": "logit"})
    assert [settings.share(name) for name in settings.teachers] == [0.25, 0.75]
    assert settings.describe().endswith("mixture=logit, a 'one' × 0.25, b 'two' × 0.75 in the actor")
    routed, _ = parse({"teachers": BOTH, "mixture": "routing", "teacher_key": "domain"})
    assert routed.describe().endswith("mixture=routing by domain, a 'one', b 'two' in the actor")
    assert [parse({"teachers": BOTH})[0].share(name) for name in BOTH] == [0.5, 0.5]


def test_the_students_base_is_a_teacher():
    settings, _ = parse({"teacher": {"adapter_off": True}})
    assert settings.describe().endswith("teacher the student's base in the actor")


@pytest.mark.parametrize(
    ("section", "error", "said"),
    [
        ({"teacher": {"model_path": None}}, ConfigError, "opd.teacher.model_path is not set"),
        ({"teacher": "path"}, ConfigError, "opd.teacher is a section"),
        ({"teachers": "path"}, ConfigError, "opd.teachers is a section"),
        ({"teachers": {"a": "path"}}, ConfigError, "opd.teachers.a is a section"),
        (
            {"teachers": {"a": {"model_path": ""}}},
            ConfigError,
            "opd.teachers.a needs a model_path, or adapter_off=true",
        ),
        ({"teacher": {"model_path": "t", "adapter_off": True}}, ConfigError, "and not both"),
        ({**TEACHER, "teachers": BOTH}, ConfigError, "opd.teacher and opd.teachers are both set"),
        ({**TEACHER, "mixture": "logit"}, ConfigError, "nothing to mix"),
        ({"teachers": {"a": BOTH["a"]}, "mixture": "routing"}, ConfigError, "nothing to mix"),
        ({"teachers": weighted(0.5, None)}, ConfigError, "are a 0.5, b None; give every teacher one"),
        ({"teachers": weighted(0.5, 0.6)}, ConfigError, "with a sum of 1"),
        ({"teachers": weighted(1.5, -0.5)}, ConfigError, "≥ 0"),
        ({"teachers": weighted(0.5, 0.5), "mixture": "routing"}, ConfigError, "drop the weights"),
        (
            {**TEACHER, "hybrid": "advantages", "lambda_rl": 1.0},
            ConfigError,
            "opd.hybrid=advantages adds log q − log p",
        ),
        ({**TEACHER, "canary_every": -1}, ConfigError, "opd.canary_every=-1"),
        ({**TEACHER, "lambda_distill": 0.0}, ConfigError, "both 0"),
        ({**TEACHER, "lambda_rl": -1.0}, ConfigError, "≥ 0"),
        ({**TEACHER, "lambda_rl": float("nan")}, ConfigError, "finite"),
        ({**TEACHER, "lambda_rl": True}, ConfigError, "it is a number"),
        ({**TEACHER, "divergense": "reverse_kl"}, ConfigError, "Did you mean 'opd.divergence'"),
        (
            {**TEACHER, "temperature": 2.0},
            ConfigError,
            "Did you mean 'opd.student_temperature' or 'opd.teacher_temperature'",
        ),
        ({**TEACHER, "offload": True}, ConfigError, "Did you mean 'opd.teacher.offload'"),
        ({"teachers": {"a": {"path": "t"}}}, ConfigError, "Did you mean 'opd.teachers.a.model_path'"),
        ({"teacher": {"model_path": "t", "dtyp": 1}}, ConfigError, "Did you mean 'opd.teacher.dtype'"),
        ({**TEACHER, "placement": "cloud"}, ConfigError, "opd.placement cannot be 'cloud'"),
        ({**TEACHER, "divergence": "kl"}, ConfigError, "opd.divergence cannot be 'kl'"),
        ({**TEACHER, "beta": 0.3}, ObjectiveError, "beta=0.3 is not read by reverse_kl"),
        ({**TEACHER, "tail": "ignore", "support": "union"}, ObjectiveError, "use tail=bucket"),
        ({**TEACHER, "top_k": 8}, ObjectiveError, "top_k=8 is read by top-k supports"),
        ({**TEACHER, "distillation_type": "jsd"}, ConfigError, "not one of reverse_kl, forward_kl, gkd"),
        (
            {**TEACHER, "distillation_type": "gkd", "divergence": "forward_kl"},
            ConfigError,
            "means opd.divergence=skew_reverse_kl, but opd.divergence=forward_kl is set too",
        ),
        ({**TEACHER, "distillation_temperature": 2.0, "student_temperature": 3.0}, ConfigError, "is set too"),
    ],
)
def test_what_cannot_work_is_refused_by_name(section: dict, error: type[Exception], said: str):
    with pytest.raises(error, match=r"opd\b") as caught:
        parse(section)
    assert said in str(caught.value)
