"""Every recipe of recipes/ passes `opd check` and trains two steps, with tiny models and a few rows in place of the published ones."""

import json
from pathlib import Path

import pytest
import yaml

from opd.cli.main import main
from opd.testing import byte_tokenizer, save_model, tiny_causal_lm

RECIPES = Path(__file__).parents[2] / "recipes"
PUBLIC = sorted(
    str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.glob("*/*.yaml") if path.parent.name != "demo"
)

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %}(no thoughts){% endif %}{% endif %}"
)
CHAT = [{"role": "user", "content": "Make 24 of 3 and 8."}, {"role": "assistant", "content": "3 · 8"}]
# One row with the columns that each data set publishes; paths that a user fills in have those that the recipe names.
ROWS = {
    "openai/gsm8k": {"question": "What is 2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    "agentica-org/DeepScaleR-Preview-Dataset": {"problem": "What is $2+3$?", "answer": "5", "solution": "It is 5."},
    "HuggingFaceH4/aime_2024": {
        "id": 60,
        "problem": "What is 2 + 3?",
        "solution": "5",
        "answer": "5",
        "url": "",
        "year": "2024",
    },
    "zwhe99/DeepMath-103K": {"question": "What is 2 + 3?", "final_answer": "5", "difficulty": 3.0, "topic": "Algebra"},
    "runs/real/hard-0/train.jsonl": {"prompt": "apple bell card ->", "answer": "card bell apple"},
    "runs/real/hard-0/eval.jsonl": {"prompt": "apple bell card ->", "answer": "card bell apple"},
    "path/to/aime_2024.jsonl": {"question": "What is 2 + 3?", "final_answer": "5"},
    "open-r1/OpenThoughts-114k-math": {
        "source": "olympiads",
        "problem": "What is 2 + 3?",
        "solution": "It is 5.",
        "correct": True,
    },
    "path/to/aime_2025.jsonl": {"problem": "What is 2 + 3?", "answer": "5"},
    "two_teachers/train.jsonl": {"prompt": CHAT[:1], "answer": "24", "teacher": "math"},
    "two_teachers/eval.jsonl": {"prompt": CHAT[:1], "answer": "24", "teacher": "math"},
    "path/to/train_3domain.jsonl": {"prompt": CHAT[:1], "answer": "24", "teacher": "instructions"},
    "path/to/held_out.jsonl": {"prompt": CHAT[:1], "answer": "24", "teacher": "math"},
    "HuggingFaceTB/Countdown-Task-GOLD": {"messages": CHAT},
    "runs/real/recovery-0/both.jsonl": {"prompt": CHAT[:1], "teacher": "chat"},
    "allenai/tulu-3-sft-mixture": {"id": "x", "messages": CHAT, "source": "y"},
}
SMALL = {
    "rollout": {"max_new_tokens": 6},
    "train": {"steps": 2, "prompts_per_step": 2, "samples_per_prompt": 2},
    "eval": {"prompts": 2, "samples_per_prompt": 1},
    "checkpoint": {"every": 0},
    "log": {"progress": "off"},
}


def text_of(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text()


NEEDS_MATH_VERIFY = {name for name in PUBLIC if "math_verify" in text_of(name)}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    """Folders of a student and of a teacher that share a vocabulary and a chat template."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), byte_tokenizer(chat_template=TEMPLATE)
    student, teacher = (tiny_causal_lm(tokenizer, seed=seed, initializer_range=0.2) for seed in (1, 2))
    return save_model(student, tokenizer, folder / "student"), save_model(teacher, tokenizer, folder / "teacher")


def stand_in(name: str, models: tuple[str, str], folder: Path) -> str:
    """The recipe with tiny models, local rows and small sizes; whatever else it says stays."""
    recipe = yaml.safe_load(text_of(name))
    recipe["student"]["model"] = models[0]
    for teacher in recipe.get("teachers", {"": recipe.get("teacher", {})}).values():
        teacher.pop("url", None)  # a server of the stand-in would be the same model in this process
        teacher.pop("offload", None)  # a CPU has no other place
        if "model" in teacher:
            teacher["model"] = models[1]
    for key in ("path", "eval_path"):
        if key in recipe["prompts"]:
            recipe["prompts"][key] = rows_of(recipe["prompts"][key], folder)
    if recipe["rollout"].get("engine") == "vllm":
        del recipe["rollout"]["engine"]
    for section, values in SMALL.items():
        recipe[section] = {**recipe.get(section, {}), **values}
    recipe["run_dir"] = str(folder / "run")
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return str(file)


def rows_of(path: str, folder: Path) -> str:
    """Four rows in place of a data set."""
    public = path.removeprefix("hub:").split("/")
    row = ROWS["/".join(public[:2]) if path.startswith("hub:") else path]
    file = folder / f"{len(list(folder.iterdir()))}.jsonl"
    file.write_text((json.dumps(row) + "\n") * 4)
    return str(file)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_recipe_passes_opd_check_and_trains_two_steps(name, models, tmp_path, capsys):
    if name in NEEDS_MATH_VERIFY:
        pytest.importorskip("math_verify")
    recipe = stand_in(name, models, tmp_path)
    assert main(["check", recipe]) in (0, 1), capsys.readouterr().out
    assert main(["train", recipe]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["metrics"]["loss"] for line in lines if line["kind"] == "step"]
    assert len(losses) == 2
    assert all(abs(loss) < 100 for loss in losses)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_recipe_says_where_its_values_are_from_what_was_published_and_whether_it_was_measured(name):
    comment = [line for line in text_of(name).splitlines() if line.startswith("#")]
    said = " ".join(comment)
    assert "Values: " in said and "Published: " in said and "Measured here: " in said
