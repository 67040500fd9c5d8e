"""A folder as a user has it: a student, a teacher, prompts and a recipe; all real, all tiny."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from opd_user import Desk, User

from opd.config.recipe import load
from opd.testing import digit_tokenizer, save_model, tiny_causal_lm
from opd.trainer.run import train

RECIPE = """\
student:
  model: {folder}/student
  device: cpu
teacher:
  model: {folder}/teacher
prompts:
  path: {folder}/prompts.jsonl
rollout:
  max_new_tokens: 4
train:
  steps: 2
  prompts_per_step: 3
  samples_per_prompt: 1
eval:
  every: 0
checkpoint:
  every: 1
log:
  progress: plain
"""


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """No test changes anything in it."""
    folder = tmp_path_factory.mktemp("desk")
    tokenizer = digit_tokenizer()
    for seed, name in enumerate(("student", "teacher")):
        model = tiny_causal_lm(tokenizer, layers=1, hidden=16, heads=2, kv_heads=1, max_positions=64, seed=seed)
        save_model(model, tokenizer, folder / name)
    rows = [{"prompt": f"{i}{9 - i}>", "answer": f"{i}{9 - i}"} for i in range(6)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=folder))
    train(load(folder / "recipe.yaml", ["--run_dir", str(folder / "finished")]))
    return Desk(folder)


@pytest.fixture
def user(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> User:
    """Somebody at the command line, in an empty folder of their own: a relative path that slips through ends there."""
    monkeypatch.chdir(tmp_path)
    return User(desk, tmp_path, capsys)
