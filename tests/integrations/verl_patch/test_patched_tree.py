"""Inside a patched release: the added tests pass, the examples compose, verl's own configs are as they were."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from patch_trees import NEWEST, VERSIONS, make_tree, release, script, state

from opd.integrations.verl.dry_run.launch import NOT_INHERITED

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is not installed, so a tree of it cannot be imported", allow_module_level=True)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
INSTALLED = importlib.metadata.version("verl")
RUNNABLE = [version for version in VERSIONS if version.split(".")[:2] == INSTALLED.split(".")[:2]]
"""The releases whose dependencies this environment has."""

HERE = Path(__file__).parent
HARNESS = (HERE.parents[2] / "src", HERE.parents[1], HERE.parent / "verl", HERE)
"""For a platform on a CPU and tiny models, which are no part of the patch."""
MODULES = "verl080_cpu" if INSTALLED.startswith("0.8.") else "opd.integrations.verl.dry_run.platform"

COMPOSE = """
import sys
from hydra import compose, initialize_config_module
with initialize_config_module("verl.trainer.config", version_base=None):
    config = compose("ppo_trainer", overrides=sys.argv[1:])
from verl.utils.config import omega_conf_to_dataclass
actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
from verl.trainer.ppo.on_policy_distillation import settings_of
print(settings_of(actor.policy_loss))
"""


def python(tree: Path, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    """This environment's Python with the tree's verl, and without the plugin."""
    left_out = ("PYTHONPATH", "VERL_PLATFORM", "VERL_USE_EXTERNAL_MODULES", *NOT_INHERITED)
    clean = {k: v for k, v in os.environ.items() if k not in left_out}
    env = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "VERL_USE_EXTERNAL_PLUGINS": "none", **env}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=tree, env={**clean, **env}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module", params=RUNNABLE)
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Patched by the installer, which ran the added tests."""
    folder = make_tree(tmp_path_factory.mktemp("patched") / "verl", release(request.param))
    done = script("--python", sys.executable, folder, VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "added tests pass" in done.stdout
    return folder


@pytest.fixture(scope="module")
def newest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What does not differ from release to release is tried in one."""
    folder = make_tree(tmp_path_factory.mktemp("newest") / "verl", release(RUNNABLE[-1]))
    assert script(folder).returncode == 0
    return folder


def test_the_added_tests_pass_with_pytest_too(tree: Path):
    """The installer ran them with Python."""
    tests = "tests/test_on_policy_distillation.py"
    done = python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests)
    assert done.returncode == 0, done.stdout
    count = (tree / tests).read_text(encoding="utf-8").count("\ndef test_")
    assert f"{count} passed" in done.stdout and count > 20


def test_it_is_the_trees_own_verl_and_no_part_of_opd(tree: Path):
    code = "import sys, verl.trainer.ppo.on_policy_distillation as m; print(m.__file__, 'opd' in sys.modules, 'ray' in sys.modules)"
    done = python(tree, "-c", code)
    path, has_opd, _ = done.stdout.split()[-3:]
    assert Path(path).is_relative_to(tree) and has_opd == "False"


def test_a_step_of_the_trees_own_engine_equals_plain_transformers(tree: Path, tmp_path: Path):
    """Loss and every gradient: packed and padded, micro-batches, masks, temperatures, PPO beside it, two teachers, models with a state, padding rows."""
    sys.path.append(str(HERE.parent / "verl"))
    from verl_world import make_models

    path = os.pathsep.join(map(str, (tree, *HARNESS)))
    env = {"PYTHONPATH": path, "VERL_PLATFORM": "cpu", "VERL_USE_EXTERNAL_MODULES": MODULES, "OMP_NUM_THREADS": "1"}
    done = python(tree, HERE / "engine_in_tree.py", make_models(tmp_path), **env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\nok ") + done.stdout.startswith("ok ") == 8, done.stdout


IMPORTED = """
import runpy, sys
tests = runpy.run_path(sys.argv[1], run_name="tests")
import verl
print(verl.__file__, sum(name.startswith("test_") or name == "peak" for name in tests))
"""


@pytest.mark.parametrize(
    "name", ["tests/test_on_policy_distillation.py", "examples/on_policy_distillation/benchmark.py"]
)
def test_the_trees_own_verl_is_taken_where_another_is_installed(newest: Path, name: str, tmp_path: Path):
    """Started from another folder, without PYTHONPATH: this environment has a verl in its site-packages."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VERL_PLATFORM", *NOT_INHERITED)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(newest / name)], cwd=tmp_path, capture_output=True, text=True, timeout=120,
        env={**env, "PYTHONDONTWRITEBYTECODE": "1", "VERL_USE_EXTERNAL_PLUGINS": "none"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    file, count = done.stdout.split()[-2:]
    assert Path(file).is_relative_to(newest) and int(count) > 0


@pytest.mark.parametrize("name", ["run_distillation.sh", "run_hybrid.sh", "run_two_teachers.sh"])
def test_the_example_scripts_start_the_trees_own_verl(newest: Path, name: str, tmp_path: Path):
    fake = tmp_path / "python3"
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$PYTHONPATH"\n', encoding="utf-8")
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": "/mine"}
    command = ["bash", newest / "examples/on_policy_distillation" / name]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.stdout.split() == [f"{newest}:/mine"]


@pytest.mark.parametrize("name", ["run_distillation.sh", "run_hybrid.sh", "run_two_teachers.sh"])
def test_the_example_scripts_are_command_lines_that_verl_takes(newest: Path, name: str, tmp_path: Path):
    """`python3` is replaced by one that composes the same overrides and makes verl's config classes."""
    composer = tmp_path / "compose.py"
    composer.write_text(COMPOSE, encoding="utf-8")
    fake = tmp_path / "python3"
    fake.write_text(f'#!/usr/bin/env bash\nshift 2\nexec "{sys.executable}" "{composer}" "$@"\n', encoding="utf-8")
    fake.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(newest),
        "VERL_USE_EXTERNAL_PLUGINS": "none",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(tmp_path),
    }
    script_path = newest / "examples/on_policy_distillation" / name
    done = subprocess.run(["bash", script_path], env=env, capture_output=True, text=True, check=False, cwd=newest)
    assert done.returncode == 0, done.stderr
    assert "TeacherModel(model='Qwen/Qwen2.5-7B-Instruct'" in done.stdout
    assert ("rl_weight=1.0" in done.stdout) == (name == "run_hybrid.sh")
    assert ("mixture_weights={'one': 0.7, 'other': 0.3}" in done.stdout) == (name == "run_two_teachers.sh")


@pytest.mark.parametrize("who", ["ours", "definition"])
def test_the_benchmark_of_the_readme_measures(newest: Path, who: str):
    words = ("examples/on_policy_distillation/benchmark.py", "--one", who, "generalized_jsd", "128", "8000", "float32")
    done = python(newest, *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    seconds, mib = done.stdout.split()[-2:]
    assert float(seconds) > 0 and int(mib) >= 0


def test_the_patched_tree_is_restored_after_use(tree: Path, tmp_path: Path):
    fresh = make_tree(tmp_path / "fresh", release((tree / "verl/version/version").read_text().strip()))
    done = script("--reverse", tree)
    assert done.returncode == 0, done.stderr
    assert state(tree) == state(fresh)
    assert NEWEST in VERSIONS
