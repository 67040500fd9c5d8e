"""The `opd:` section of a verl config, without verl: what it comes to, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

import opd.integrations.verl.plugin.conf
from opd.config import HybridConfig
from opd.config.guard import GuardConfig
from opd.errors import ConfigError, ObjectiveError
from opd.integrations.verl.plugin.concept_names import CONCEPT_NAMES
from opd.integrations.verl.plugin.settings import (
    OBJECTIVE_KEYS,
    LogSettings,
    MixtureSettings,
    PromptsSettings,
    Settings,
    TeacherSettings,
    parse,
    settings_of,
)
from opd.losses import Objective

GROUP = Path(opd.integrations.verl.plugin.conf.__file__).parent / "opd" / "default.yaml"
TEACHER = {"teacher": {"model": "teacher"}}
BOTH = {"teachers": {"a": {"model": "one"}, "b": {"model": "two"}}}
CONCEPT = [one.name for one in CONCEPT_NAMES]


def weighted(a: float, b: float, kind: str = "probability") -> dict:
    return {**BOTH, "mixture": {"kind": kind, "weights": {"a": a, "b": b}}}


def group() -> dict:
    return yaml.safe_load(GROUP.read_text(encoding="utf-8"))["opd"]


def defaults(section: type) -> dict:
    return {f.name: f.default for f in dataclasses.fields(section) if f.default is not dataclasses.MISSING}


def test_the_config_group_holds_every_key_and_its_default():
    section = group()
    assert {k: section.pop(k) for k in CONCEPT} == dict.fromkeys(CONCEPT)
    objective = section.pop("objective")
    lists = {key: tuple(objective[key]) for key in ("always_include", "eos_groups")}
    assert {**objective, **lists} == {k: getattr(Objective(), k) for k in OBJECTIVE_KEYS}
    assert section.pop("teacher") == defaults(TeacherSettings) | {"model": None}
    assert section.pop("teachers") == {}
    assert section.pop("mixture") == defaults(MixtureSettings) | {"weights": {}}
    assert section.pop("prompts") == defaults(PromptsSettings)
    assert section.pop("rl") == defaults(HybridConfig)
    assert section.pop("log") == defaults(LogSettings)
    guard = section.pop("guard")
    assert guard.pop("first_steps") == GuardConfig().first_steps
    assert guard.pop("canary") == {**vars(GuardConfig().canary), "action": "off"}
    assert guard.pop("start_kl") == vars(GuardConfig().start_kl)
    assert guard == {
        name: vars(rule) for name, rule in GuardConfig().rules.items() if name not in ("canary", "start_kl")
    }
    assert section == {k: v for k, v in defaults(Settings).items() if k != "teacher"}


def test_the_group_as_it_stands_is_exact_reverse_kl():
    settings, notes = parse({**group(), **TEACHER})
    assert settings.objective == Objective()
    assert (settings.rl.weight, settings.rl.distill_weight, notes) == (0.0, 1.0, ())


@pytest.mark.parametrize(
    ("older", "divergence"), [("reverse_kl", "reverse_kl"), ("forward_kl", "forward_kl"), ("gkd", "skew_reverse_kl")]
)
def test_types_of_the_concept_are_mapped_and_told(older: str, divergence: str):
    settings, notes = parse({**group(), **TEACHER, "distillation_type": older})
    assert settings.objective.divergence == divergence
    assert notes[0].startswith(f"distillation_type={older} was read as objective.divergence={divergence}")
    assert ("generalized_jsd" in notes[0]) == (older == "gkd")


def test_all_names_of_the_concept_together():
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
    assert (settings.rl.weight, settings.rl.distill_weight) == (0.3, 0.6)
    assert len(notes) == 5


def test_the_line_in_the_log_names_what_is_not_default():
    objective = {"divergence": "generalized_jsd", "beta": 0.25}
    settings, _ = parse({**TEACHER, "objective": objective, "rl": {"weight": 0.1}})
    said = "generalized_jsd beta=0.25 rl.distill_weight=1 rl.weight=0.1, teacher 'teacher' in the actor"
    assert settings.describe() == said


def test_several_teachers_are_told_with_their_shares():
    settings, _ = parse({**group(), **weighted(0.25, 0.75, "logit")})
    assert settings.shares() == {"a": 0.25, "b": 0.75}
    assert settings.describe().endswith("mixture.kind=logit, a 'one' × 0.25, b 'two' × 0.75 in the actor")
    routed, _ = parse({**BOTH, "mixture": {"kind": "routing"}, "prompts": {"teacher_column": "domain"}})
    assert routed.describe().endswith("mixture.kind=routing by domain, a 'one', b 'two' in the actor")
    assert list(parse(BOTH)[0].shares().values()) == [0.5, 0.5]


def test_the_students_base_is_a_teacher():
    settings, _ = parse({"teacher": {"source": "adapter_off"}})
    assert settings.describe().endswith("teacher the student's base in the actor")


@pytest.mark.parametrize(
    ("section", "error", "said"),
    [
        ({"teacher": {"model": None}}, ConfigError, "opd.teacher.model is not set"),
        ({"teacher": "path"}, ConfigError, "'opd.teacher' is a section"),
        ({"teachers": "path"}, ConfigError, "opd.teachers is a section"),
        ({"teachers": {"a": "path"}}, ConfigError, "'opd.teachers.a' is a section"),
        ({"teachers": {"a": {"model": ""}}}, ConfigError, "opd.teachers.a needs a model, or source=adapter_off"),
        ({"teacher": {"model": "t", "source": "adapter_off"}}, ConfigError, "and not both"),
        ({**TEACHER, **BOTH}, ConfigError, "opd.teacher and opd.teachers are both set"),
        ({**TEACHER, "mixture": {"kind": "logit"}}, ConfigError, "nothing to mix"),
        ({"teachers": {"a": {"model": "one"}}, "mixture": {"kind": "routing"}}, ConfigError, "nothing to mix"),
        (
            {**BOTH, "mixture": {"weights": {"a": 1.0}}},
            ConfigError,
            "opd.mixture.weights names a, and the teachers are a, b; give every teacher one",
        ),
        (weighted(0.5, 0.6), ConfigError, "opd.mixture.weights must be ≥ 0 and sum to 1"),
        (weighted(1.5, -0.5), ConfigError, "≥ 0"),
        (weighted(0.5, 0.5, "routing"), ConfigError, "opd.mixture.weights would change nothing"),
        (
            {**TEACHER, "rl": {"combine": "advantages", "weight": 1.0}},
            ConfigError,
            "opd.rl.combine=advantages adds log q − log p",
        ),
        ({**TEACHER, "sanity_check_every": -1}, ConfigError, "opd.sanity_check_every=-1"),
        ({**TEACHER, "rl": {"distill_weight": 0.0}}, ConfigError, "opd.rl.weight and opd.rl.distill_weight are both 0"),
        ({**TEACHER, "rl": {"weight": -1.0}}, ConfigError, "opd.rl.weight must be 0 or a positive number"),
        ({**TEACHER, "rl": {"weight": float("nan")}}, ConfigError, "opd.rl.weight must be 0 or a positive number"),
        ({**TEACHER, "rl": {"weight": True}}, ConfigError, "it is a number"),
        ({**TEACHER, "divergense": "reverse_kl"}, ConfigError, "Did you mean 'opd.objective.divergence'"),
        ({**TEACHER, "divergence": "reverse_kl"}, ConfigError, "Did you mean 'opd.objective.divergence'"),
        (
            {**TEACHER, "temperature": 2.0},
            ConfigError,
            "Did you mean 'opd.objective.student_temperature' or 'opd.objective.teacher_temperature'",
        ),
        ({**TEACHER, "offload": True}, ConfigError, "Did you mean 'opd.teacher.offload'"),
        ({"teacher": {"model_path": "t"}}, ConfigError, "Did you mean 'opd.teacher.model'"),
        ({"teachers": {"a": {"model_path": "t"}}}, ConfigError, "Did you mean 'opd.teachers.a.model'"),
        ({"teacher": {"model": "t", "dtyp": 1}}, ConfigError, "Did you mean 'opd.teacher.dtype'"),
        ({**TEACHER, "placement": "cloud"}, ConfigError, "'opd.placement' cannot be 'cloud'"),
        ({**TEACHER, "objective": {"divergence": "kl"}}, ConfigError, "opd.objective.divergence' cannot be 'kl'"),
        ({**TEACHER, "objective": {"beta": 0.3}}, ObjectiveError, "beta=0.3 is not read by reverse_kl"),
        ({**TEACHER, "objective": {"tail": "ignore", "support": "union"}}, ObjectiveError, "use tail='bucket'"),
        ({**TEACHER, "objective": {"top_k": 8}}, ObjectiveError, "top_k=8 is read by top-k supports"),
        (
            {**TEACHER, "objective": {"reduction": "fixed"}},
            ConfigError,
            "set actor_rollout_ref.actor.loss_agg_mode",
        ),
        ({**TEACHER, "distillation_type": "jsd"}, ConfigError, "not one of reverse_kl, forward_kl, gkd"),
        (
            {**TEACHER, "distillation_type": "gkd", "objective": {"divergence": "forward_kl"}},
            ConfigError,
            "means opd.objective.divergence=skew_reverse_kl, but opd.objective.divergence=forward_kl is set too",
        ),
        (
            {**TEACHER, "distillation_temperature": 2.0, "objective": {"student_temperature": 3.0}},
            ConfigError,
            "is set too",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(section: dict, error: type[Exception], said: str):
    with pytest.raises(error, match=r"opd\b") as caught:
        parse(section)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"objective": {"beta": 0.5}}, "beta=0.5 is not read by reverse_kl"),
        ({"objective": {"divergence": "forward_kl", "beta": 0.3}}, "beta=0.3 is not read by forward_kl"),
        ({"objective": {"normalize": True}}, "normalize=True is read by generalized_jsd only"),
        ({"distillation_beta": 0.5}, "beta=0.5 is not read by reverse_kl"),
    ],
    ids=str,
)
def test_a_setting_that_its_divergence_does_not_read_is_refused_in_both_sections(section: dict, said: str):
    """Also at the value that it has where it is read: None alone is unset."""
    beside = {key: value for key, value in section.items() if key in CONCEPT}
    opd_section = {key: value for key, value in section.items() if key not in CONCEPT}
    for read in (
        lambda: parse({**group(), **TEACHER, **section}),
        lambda: settings_of({"opd": {**TEACHER, **opd_section}, **beside}),
    ):
        with pytest.raises((ConfigError, ObjectiveError)) as caught:
            read()
        assert said in str(caught.value)


def test_both_sections_have_the_same_defaults_where_a_divergence_reads_a_setting():
    for objective in ({"divergence": "generalized_jsd"}, {"divergence": "skew_reverse_kl", "beta": 0.3}):
        mine = settings_of({"opd": {**TEACHER, "objective": objective}}).objective.loss()
        assert mine == parse({**TEACHER, "objective": objective})[0].objective
