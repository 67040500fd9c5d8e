"""A recipe is YAML plus overrides; the default is what the documents say; nothing unknown gets in."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from opd.config import Config, MixtureConfig, RlConfig, RolloutConfig
from opd.config.recipe import build, load, merge, parse_overrides, read_recipe, to_dict, to_yaml, without_idle_defaults
from opd.errors import ConfigError, ObjectiveError, OpdError
from opd.losses import Objective

ROOT = Path(__file__).parents[2]
NEEDED = {"student.model": "s", "teacher.model": "t", "prompts.path": "p"}


def config(**overrides: object) -> Config:
    return build(merge({}, NEEDED | {key.replace("__", "."): value for key, value in overrides.items()}))


def test_what_a_step_takes_from_the_sections_by_hand():
    """Moves take the whole run (its last step is at the end), or half of it for the horizon, unless a number of steps is given."""
    rl = RlConfig(
        weight=0.0, weight_end=1.0, distill_weight=3.0, distill_weight_end=1.0, clip_range=0.2, clip_high=0.28
    )
    seen = [rl.hybrid(Objective(), 5).at(step) for step in range(6)]
    assert [one.rl_weight for one in seen] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [one.distill_weight for one in seen] == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]
    assert seen[0].clip_range == (0.2, 0.28)
    assert RlConfig(weight=1.0, clip_range=0.1).hybrid(Objective(), 5).at(0).clip_range == 0.1
    assert RlConfig(weight=1.0, clip_range=None).hybrid(Objective(), 5).at(0).clip_range is None
    mixture = MixtureConfig(kind="loss", weights={"a": 1.0, "b": 0.0}, weights_end={"b": 1.0, "a": 0.0})
    assert [mixture.at(step, 3, ("a", "b")) for step in range(3)] == [{"a": 1 - s / 2, "b": s / 2} for s in range(3)]
    assert MixtureConfig().at(0, 3, ("a", "b")) == {"a": 0.5, "b": 0.5}
    rollout = RolloutConfig(horizon_start=2, max_new_tokens=10)
    assert [rollout.horizon(step, 8) for step in range(8)] == [2, 4, 6, 8, 10, 10, 10, 10]


def test_a_mean_over_tokens_of_a_loss_of_the_sampled_token_is_said_with_its_size():
    from opd.doctor.checks import notices

    tail = {"objective__support": "union", "objective__tail": "sampled"}
    k2 = {"objective__support": "sampled", "objective__estimator": "k2"}
    off = {"eval__every": 0, "train__prompts_per_step": 8, "train__samples_per_prompt": 2}
    for said, settings in (("support=sampled", k2), ("tail=sampled", tail)):
        (notice,) = notices(config(**settings, **off))
        assert f"objective.{said} with objective.reduction=token_mean" in notice and "1/16 of its size" in notice
        assert not notices(config(**settings, **off, objective__reduction="fixed", objective__fixed_count=4000))
        with pytest.raises(OpdError, match="use reduction='fixed' with fixed_count"):
            config(**settings, objective__reduction="sequence_mean")
    assert not notices(config(**off))


def test_every_recipe_in_the_repository_is_valid():
    recipes = sorted((ROOT / "recipes").glob("*/*.yaml"))
    assert recipes
    listed = (ROOT / "recipes" / "README.md").read_text()
    for recipe in recipes:
        load(recipe)
        name = f"{recipe.parent.name}/{recipe.name}"
        assert f"({name})" in listed, f"recipes/README.md does not list {name}"


def test_the_recipe_in_the_readme_is_valid():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    made = build(yaml.safe_load(block))
    assert made.train.autocast == "bfloat16" and made.objective == Objective()


def test_every_way_to_learn_in_the_recipes_readme_is_valid_and_differs_from_the_recipe():
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    ways = (ROOT / "recipes" / "README.md").read_text()
    (section,) = re.findall(r"## A reward, several teachers, or none\n(.*?)\n## ", ways, re.S)
    rows = re.findall(r"^\| [^|]+ \| (`.*`) \|$", section, re.M)
    assert len(rows) == 17
    plain = build(yaml.safe_load(block))
    seen = set()
    for row in rows:
        recipe = yaml.safe_load(block)
        for line in re.findall(r"`([^`]+)`", row):
            for key, value in yaml.safe_load(line).items():
                recipe[key] = value if key.startswith("teacher") else {**recipe.get(key, {}), **value}
        if "teachers" in recipe or recipe.get("rl", {}).get("distill_weight") == 0:
            del recipe["teacher"]
        made = build(recipe)
        assert made != plain
        seen.add(to_yaml(made))
    assert len(seen) == len(rows)


def test_the_snippet_of_the_losses_alone_runs():
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/losses-alone.md").read_text(), re.S)
    names: dict[str, object] = {}
    exec(compile(block, "losses-alone.md", "exec"), names)
    assert names["student_logits"].grad.abs().sum() > 0


def test_a_setting_that_would_do_nothing_is_refused():
    for key, value in (("top_k", 16), ("top_k", 64), ("beta", 0.4), ("beta", 0.5), ("tail", "bucket")):
        why = {"top_k": f"top_k={value} is read by top-k supports", "tail": "support='full' has none"}
        with pytest.raises(ObjectiveError, match=why.get(key, f"objective: beta={value} is not read by reverse_kl")):
            config(**{f"objective__{key}": value})
        with pytest.raises(ObjectiveError, match=why.get(key, f"objective: beta={value} is not read by reverse_kl")):
            build(merge({}, NEEDED | parse_overrides([f"--objective.{key}", str(value)])))
    with pytest.raises(ConfigError, match=r"off_policy=teacher is read where rollout.lmbda < 1"):
        config(rollout__off_policy="teacher")


def test_the_numbers_of_the_loop_benchmark_in_the_docs_are_those_of_its_results():
    rows = [
        line
        for line in (ROOT / "benchmarks/results/loop.md").read_text().splitlines()
        if re.match(r"\| (small|wide)", line)
    ]
    page = (ROOT / "docs/speed.md").read_text()
    for row in rows[:4]:
        cells = [re.sub(r" \[.*?\]", "", cell).strip() for cell in row.strip("|").split("|")][2:]
        assert " | ".join(cells) in page, f"docs/speed.md lacks {cells}"


def test_an_override_wins_over_the_recipe_and_leaves_the_rest_alone(tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(merge({}, NEEDED | {"train.steps": 7, "train.prompts_per_step": 3})))
    loaded = load(recipe, ["--train.steps", "9", "--objective.divergence=forward_kl"])
    assert (loaded.train.steps, loaded.train.prompts_per_step, loaded.objective.divergence) == (9, 3, "forward_kl")


def test_scientific_notation_is_a_number_in_yaml_and_on_the_command_line():
    """PyYAML reads 1e-3 as a string; a learning rate must not be one."""
    assert config(optimizer__lr="1e-3").optimizer.lr == 1e-3
    assert build(merge({}, NEEDED | parse_overrides(["--optimizer.lr", "1e-3"]))).optimizer.lr == 1e-3


def test_off_and_none_are_words_and_null_is_none(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "log: {progress: off}\ntrain: {autocast: none}\nprompts: {limit: null, shuffle: false}"
    )
    made = build(merge(read_recipe(tmp_path / "r.yaml"), NEEDED))
    assert (made.log.progress, made.train.autocast, made.prompts.limit, made.prompts.shuffle) == (
        "off",
        "none",
        None,
        False,
    )
    assert parse_overrides(["--log.progress", "off"]) == {"log.progress": "off"}


@pytest.mark.parametrize("key", ["prompts.user_message", "prompts.teacher_prompt", "prompts.system"])
def test_a_template_on_the_command_line_is_text_though_its_braces_are_mappings_to_yaml(key):
    for text in ("{{ question }}", "{{ question }} Put it in \\boxed{}.", "{% if a %}{{ a }}{% endif %}"):
        assert parse_overrides([f"--{key}", text]) == {key: text}


def test_a_template_without_quotes_in_a_recipe_is_refused_with_its_place(tmp_path):
    (tmp_path / "r.yaml").write_text("prompts:\n  user_message: {{ question }}\n")
    with pytest.raises(ConfigError, match=r"(?s)is not valid YAML.*unhashable.*line 2"):
        load(tmp_path / "r.yaml")


def test_one_value_or_several_make_a_tuple():
    assert config(rollout__stop="END").rollout.stop == ("END",)
    assert build(merge({}, NEEDED | parse_overrides(["--rollout.stop", "A", "B"]))).rollout.stop == ("A", "B")


@pytest.mark.parametrize(
    "text", ["runs/a #1", "[exp]", "{x}", "2026-11-27", "C: x", "*", "&a", "a\nb", "'", "off", " a", "!x"]
)
def test_a_path_on_the_command_line_is_taken_word_for_word(text):
    assert parse_overrides([f"--run_dir={text}", "--teachers.math.model", text]) == {
        "run_dir": text,
        "teachers.math.model": text,
    }


def test_a_stop_string_that_is_yaml_is_taken_word_for_word():
    assert parse_overrides(["--rollout.stop", "###", "A: b"]) == {"rollout.stop": ["###", "A: b"]}


def test_null_quotes_and_lists_are_yaml_s_in_texts_too():
    words = [
        "--prompts.eval_path",
        "null",
        "--run_dir",
        "'null'",
        "--rollout.stop",
        '["A\\n", B]',
        "--prompts.system",
        '"a\\tb"',
    ]
    assert parse_overrides(words) == {
        "prompts.eval_path": None,
        "run_dir": "null",
        "rollout.stop": ["A\n", "B"],
        "prompts.system": "a\tb",
    }


def test_negative_numbers_and_dashes_in_names_are_read():
    parsed = parse_overrides(["--objective.teacher-logp-floor", "-20", "--objective.scale_by_t2", "false"])
    assert parsed == {"objective.teacher_logp_floor": -20, "objective.scale_by_t2": False}


def test_the_resolved_config_builds_the_same_config_again():
    made = config(
        rollout__stop=["A"], student__lora__rank=4, objective__divergence="generalized_jsd", objective__beta=0.3
    )
    assert build(yaml.safe_load(to_yaml(made))) == made


def test_the_recipe_of_an_older_run_is_read_without_the_defaults_that_nothing_read():
    """Versions that wrote 0.5 and 64 for "not set" left them in config.yaml."""
    older = {"beta": 0.5, "alpha": 0.5, "normalize": True, "top_k": 64, "tail": "bucket"}
    for choice in (
        {"divergence": "reverse_kl", "support": "full"},
        {"divergence": "skew_reverse_kl", "support": "union"},
    ):
        saved = merge({}, NEEDED | {"objective": choice | older})
        assert build(without_idle_defaults(saved)).objective == Objective(**choice)
        with pytest.raises(ObjectiveError, match="drop it"):
            build(saved)
    changed = merge({}, NEEDED | {"objective": {"divergence": "reverse_kl", "support": "full", "beta": 0.4}})
    assert without_idle_defaults(changed) == changed


def test_the_default_objective_is_exact_reverse_kl_averaged_over_tokens():
    objective = config().objective
    assert (objective.divergence, objective.support, objective.reduction) == ("reverse_kl", "full", "token_mean")
    assert objective.student_temperature == objective.teacher_temperature == config().rollout.temperature == 1.0


def test_every_field_of_every_section_has_a_help_text():
    """tyro and readers of the source both live from the string under each field."""
    files = [*(ROOT / "src/opd/config").glob("*.py"), ROOT / "src/opd/losses/settings.py"]
    source = "".join(path.read_text() for path in files)
    lines = [line.strip() for line in source.splitlines()]
    for name in to_dict(config(student__lora__rank=1)):
        section = getattr(config(student__lora__rank=1), name)
        for field in dataclasses.fields(section) if dataclasses.is_dataclass(section) else ():
            at = [i for i, line in enumerate(lines) if line.startswith(f"{field.name}: ")]
            assert any(lines[i + 1].startswith('"""') for i in at), f"{name}.{field.name} has no help text"


def test_a_recipe_is_not_changed_by_merging():
    recipe = {"train": {"steps": 1}}
    merge(recipe, {"train.steps": 2, "rollout.top_p": 0.5})
    assert recipe == {"train": {"steps": 1}}


ON_POLICY_ONLY = {
    "k2 on data-set responses": {"objective__support": "sampled", "objective__estimator": "k2", "rollout__lmbda": 0.5},
    "k2 at another sampling temperature": {
        "objective__support": "sampled",
        "objective__estimator": "k2",
        "rollout__temperature": 0.6,
    },
    "k1 on a nucleus": {
        "objective__support": "sampled",
        "objective__estimator": "k1",
        "objective__delivery": "advantage",
        "rollout__top_p": 0.9,
    },
    "a sampled tail on data-set responses": {
        "objective__support": "teacher_top_k",
        "objective__tail": "sampled",
        "rollout__lmbda": 0.5,
    },
}


@pytest.mark.parametrize("name", ON_POLICY_ONLY)
def test_losses_of_the_sampled_token_refuse_samples_they_are_wrong_for(name):
    with pytest.raises(ConfigError, match=r"Set rollout\.|Set top_p=1"):
        config(**ON_POLICY_ONLY[name])


def test_the_same_losses_are_accepted_where_they_are_right():
    k1 = {"objective__support": "sampled", "objective__estimator": "k1", "objective__delivery": "advantage"}
    config(**k1, rollout__temperature=0.8)  # reweighted by the sampler's log-probs
    config(**k1, rollout__lmbda=0.5, rollout__off_policy="teacher")
    config(
        objective__support="sampled",
        objective__estimator="k2",
        rollout__temperature=0.6,
        objective__student_temperature=0.6,
    )
    config(rollout__lmbda=0.5, rollout__top_p=0.9)  # the full vocabulary does not care which token was drawn


def test_a_key_given_twice_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("train:\n  steps: 5\n  steps: 500\n")
    with pytest.raises(ConfigError, match=r"(?s)'steps' is there twice.*line 3"):
        read_recipe(tmp_path / "r.yaml")


def test_the_objective_itself_explains_a_tail_that_it_refuses():
    with pytest.raises(OpdError, match=r"objective: tail='ignore' is wrong.*use tail='bucket'"):
        config(objective__support="teacher_top_k", objective__tail="ignore")


@pytest.mark.parametrize("arguments", [["train.steps", "3"], ["--"], ["--train.steps"]])
def test_an_override_that_cannot_be_read_says_how_they_look(arguments):
    with pytest.raises(ConfigError, match=r"--section\.key|needs a value"):
        parse_overrides(arguments)


def test_a_recipe_that_is_missing_is_an_opd_error():
    with pytest.raises(OpdError, match=r"No recipe at"):
        read_recipe("nowhere.yaml")


def test_several_teachers_and_their_weights_can_be_given_on_the_command_line():
    words = "--teachers.math.model m --teachers.code.model c --mixture.kind loss --mixture.weights.math 0.7 --mixture.weights.code 0.3"
    made = build(merge({}, {"student.model": "s", "prompts.path": "p"} | parse_overrides(words.split())))
    assert {name: teacher.model for name, teacher in made.all_teachers.items()} == {"math": "m", "code": "c"}
    assert made.mixture.weights == {"math": 0.7, "code": 0.3}
    assert build(yaml.safe_load(to_yaml(made))) == made


def test_the_scale_of_an_adapter_stays_what_it_is_when_its_rank_changes():
    def alpha(**lora: object) -> int | None:
        made = config(**{f"student__lora__{key}": value for key, value in lora.items()}).student.lora
        assert made is not None
        return made.alpha

    assert (alpha(rank=32), alpha(rank=64), alpha(rank=1), alpha(target_modules="q_proj")) == (64, 128, 2, 64)
    assert (alpha(rank=64, alpha=16), alpha(rank=8, alpha=None)) == (16, 16)
    saved = yaml.safe_load(to_yaml(config(student__lora__rank=8)))
    assert saved["student"]["lora"]["alpha"] == 16
    assert build(saved) == config(student__lora__rank=8)
    with pytest.raises(ConfigError, match=r"student\.lora\.alpha must be positive, not 0"):
        alpha(rank=8, alpha=0)
