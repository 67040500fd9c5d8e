"""Tasks of reasoning-gym as prompts, with their verifiers as the reward."""

from importlib.util import find_spec
from pathlib import Path

import pytest

from opd.config.recipe import check
from opd.data.prompts import load_prompts
from opd.data.rendering import Renderer
from opd.doctor.quick import examine
from opd.errors import ConfigError, DataError, MissingDependencyError
from opd.rewards import load_reward, score_reward
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm
from opd.trainer.run import train

needs_it = pytest.mark.skipif(find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed")
PATH = "reasoning_gym:chain_sum"


@needs_it
def test_rows_are_the_packages_own_and_the_same_every_time():
    import reasoning_gym

    task = {"size": 10, "seed": 3, "config": {"min_terms": 2, "max_terms": 2}}
    prompts = load_prompts(PATH, task=task)
    entries = list(reasoning_gym.create_dataset("chain_sum", size=10, seed=3, min_terms=2, max_terms=2))
    assert [prompt.messages for prompt in prompts] == [({"role": "user", "content": e["question"]},) for e in entries]
    assert [prompt.answer for prompt in prompts] == [entry["answer"] for entry in entries]
    assert load_prompts(PATH, task=task) == prompts
    assert [prompt.text for prompt in load_prompts(PATH, task={**task, "chat": False})] == [
        e["question"] for e in entries
    ]


@needs_it
@pytest.mark.parametrize("name", ["chain_sum", "countdown", "spell_backward", "knights_knaves", "basic_arithmetic"])
def test_the_reward_is_the_verifiers_and_reads_tags_boxes_and_bare_answers(name):
    import reasoning_gym

    settings = {"size": 3, "seed": 1}
    verifier = reasoning_gym.create_dataset(name, **settings)
    reward = load_reward("reasoning_gym")
    for n, prompt in enumerate(load_prompts(f"reasoning_gym:{name}", task=settings)):
        entry = verifier[n]
        for answer in (entry["answer"], "certainly wrong"):
            score = verifier.score_answer(answer, entry)
            assert score_reward(reward, prompt, f"Hm 9. <answer> {answer} </answer>") == score
            assert score_reward(reward, prompt, f" {answer}\n") == score
            assert score_reward(reward, prompt, f"Hm 9. \\boxed{{{answer}}}") == score
        assert score_reward(reward, prompt, entry["answer"]) > score_reward(reward, prompt, "certainly wrong")
        assert score_reward(reward, prompt, entry["answer"], finished=False) == 0.0
        assert score_reward(reward, prompt, f"<answer>{entry['answer']}</answer> or", finished=False) == 1.0


@needs_it
def test_a_task_with_many_right_answers_has_none_to_compare_with_and_is_judged_all_the_same():
    (prompt,) = load_prompts("reasoning_gym:propositional_logic", task={"size": 1, "seed": 1})
    example = prompt.metadata["reasoning_gym"]["entry"]["metadata"]["example_answer"]
    assert prompt.answer is None
    assert score_reward(load_reward("reasoning_gym"), prompt, f"<answer>{example}</answer>") == 1.0


@needs_it
def test_a_misspelt_task_and_a_wrong_setting_are_refused():
    with pytest.raises(DataError, match=r"no task 'chian_sum'\. Did you mean reasoning_gym:chain_sum\?"):
        load_prompts("reasoning_gym:chian_sum")
    with pytest.raises(DataError, match=r"'chain_sum' has no setting 'terms'; it has .*max_terms, min_digits"):
        load_prompts(PATH, task={"config": {"terms": 2}})
    with pytest.raises(DataError, match=r"'chain_sum' refuses its settings.*correct prompts.reasoning_gym.config"):
        load_prompts(PATH, task={"config": {"min_terms": 5, "max_terms": 2}})


@needs_it
def test_a_tokenizer_without_a_chat_template_gets_the_key_that_makes_text():
    renderer = Renderer(byte_tokenizer(), name="student 'm'")
    with pytest.raises(DataError, match=r"no chat template.*set prompts.reasoning_gym.chat=false, or put"):
        renderer.prompt_ids(load_prompts(PATH)[0])
    assert renderer.prompt_ids(load_prompts(PATH, task={"chat": False})[0])


def test_a_missing_package_is_told_by_name_before_a_row_is_read(monkeypatch):
    monkeypatch.setattr("opd.data.reasoning_gym.find_spec", lambda name: None)
    with pytest.raises(
        MissingDependencyError, match=r"reasoning-gym, which is not installed; pip install 'opd\[reasoning-gym\]'"
    ):
        load_prompts(PATH)


# Recipes


def words(**prompts):
    prompts = {"path": PATH, "eval_path": PATH, **prompts}
    return {
        "student": {"model": "m"},
        "teacher": {"model": "t"},
        "prompts": prompts,
        "eval": {"prompts": 20, "reward": "reasoning_gym"},
    }


def test_held_out_rows_that_are_trained_on_are_refused():
    task = {"size": 100, "seed": 1000}
    assert check(words(reasoning_gym={**task})).prompts.reasoning_gym.eval_seed == 1_000_000_000
    for seed in (981, 1000, 1001, 1099):
        with pytest.raises(
            ConfigError,
            match=rf"eval_seed={seed} makes held-out rows that are trained on.*Set eval_seed to 1100 or more",
        ):
            check(words(reasoning_gym={**task, "eval_seed": seed}))
    for seed in (980, 1100):
        check(words(reasoning_gym={**task, "eval_seed": seed}))


@needs_it
def test_rows_of_seeds_that_are_close_are_the_same_which_is_why():
    first, second = ([p.messages for p in load_prompts(PATH, task={"size": 5, "seed": seed})] for seed in (0, 1))
    assert first[1:] == second[:-1]


def test_settings_of_a_task_without_one_and_settings_in_the_wrong_place_are_refused():
    with pytest.raises(ConfigError, match=r"prompts.path=p.jsonl is none; set prompts.path=reasoning_gym:NAME"):
        check(words(path="p.jsonl", eval_path="e.jsonl", reasoning_gym={"size": 5}))
    with pytest.raises(ConfigError, match=r"config has seed; set prompts.reasoning_gym.seed in its place"):
        check(words(reasoning_gym={"config": {"seed": 5}}))


@needs_it
def test_a_recipe_of_tasks_is_checked_and_trained(tmp_path: Path):
    tokenizer = byte_tokenizer()
    for name, seed in (("m", 1), ("t", 2)):
        model = tiny_causal_lm(tokenizer, seed=seed)
        save_model(model, tokenizer, tmp_path / name)
    recipe = words(reasoning_gym={"size": 8, "chat": False, "config": {"max_terms": 2}})
    recipe |= {
        "student": {"model": str(tmp_path / "m")},
        "teacher": {"model": str(tmp_path / "t")},
        "rollout": {"max_new_tokens": 4},
        "train": {"steps": 1, "prompts_per_step": 2, "samples_per_prompt": 2},
        "eval": {"prompts": 4, "reward": "reasoning_gym"},
        "log": {"progress": "off"},
        "run_dir": str(tmp_path / "run"),
    }
    seen = examine(check(recipe))
    assert seen.verdict != "red"
    assert any(one.name == "prompts" and one.seen.startswith("8 to train on, 4 held out") for one in seen.checks)
    assert any((one.name, one.seen) == ("reward", "reasoning_gym") for one in seen.checks)
    summary = train(recipe)
    assert summary is not None and 0 <= summary["student_after"]["accuracy"] <= 1
    recipe["prompts"] = {"path": str(tmp_path / "p.jsonl")}
    (tmp_path / "p.jsonl").write_text('{"prompt": "hi"}\n')
    recipe["prompts"]["eval_path"] = recipe["prompts"]["path"]
    assert any(
        "is no task of reasoning-gym" in one.seen for one in examine(check(recipe)).checks if one.verdict == "red"
    )
