"""`opd verl smoke`, run as a user runs it; and that nothing of it stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from test_smoke_config import ACTOR, CLUSTER
from verl_world import REWARD, make_near_pair, make_prompts

from opd.errors import OpdError
from opd.integrations.verl.dry_run.launch import MARK, cpu_environment, first_error, launch
from opd.integrations.verl.dry_run.smoke import smoke, step_lines
from opd.testing import CHAT_TEMPLATE, digit_tokenizer, save_model, tiny_causal_lm

LOG = """\
loading
ValueError: this is only printed
(TaskRunnerV1 pid=12) Traceback (most recent call last):
(TaskRunnerV1 pid=12)   File "/x/verl/a.py", line 3, in run
(TaskRunnerV1 pid=12)     go()
(TaskRunnerV1 pid=12) opd.errors.ConfigError: first thing wrong
(TaskRunnerV1 pid=12) with a second line
(TaskRunnerV1 pid=12)
Traceback (most recent call last):
  File "/x/main.py", line 9, in <module>
    ray.get(x)
ray.exceptions.RayTaskError(ConfigError): ray::TaskRunnerV1.run()
"""


def test_the_first_error_of_a_log_is_found():
    assert first_error(LOG) == (
        "opd.errors.ConfigError: first thing wrong\nwith a second line\nraised in /x/verl/a.py, line 3"
    )
    assert first_error("all is well\nValueError: only printed\n") is None


def test_a_step_shows_its_losses_first():
    said = step_lines(3, {"actor/opd/entropy": 1.0, "actor/opd/loss": 0.123456, "actor/lr": 1.0, "actor/loss": None})
    assert said == "step 3: actor/opd/loss 0.12346  actor/loss nan\n  entropy 1"


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RANK", "WORLD_SIZE", "MASTER_PORT", "DIST_INIT_METHOD"])
def test_a_run_joins_no_cluster_or_process_group_of_its_parent(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    with cpu_environment(tmp_path / "metrics.jsonl") as env:
        assert name not in env
        assert env["KEPT"] == "1"


ORPHAN = """
import subprocess, sys, time
child = [sys.executable, "-c", "import time; time.sleep(600)"]
print(subprocess.Popen(child, start_new_session=True).pid, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("lives", [0.0, 600.0], ids=["orphaned", "at the limit"])
def test_nothing_that_a_process_started_outlives_it(tmp_path: Path, lives: float):
    log = tmp_path / "log.txt"
    ended = launch([sys.executable, "-c", ORPHAN, str(lives)], log=log, env=dict(os.environ), limit=3.0)
    assert ended.code == (0 if lives == 0 else None)
    assert not psutil.pid_exists(int(log.read_text()))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers and configs as a user has them, data, and a reward."""
    folder = tmp_path_factory.mktemp("user")
    make_near_pair(folder)
    other = digit_tokenizer(extra="\n", chat_template=CHAT_TEMPLATE)
    save_model(tiny_causal_lm(other, architecture="llama"), other, folder / "other")
    make_prompts(folder / "train.parquet", rows=2048)
    (folder / "reward.py").write_text(REWARD)
    (folder / "broken.py").write_text("def compute_score(**kwargs):\n    raise KeyError('no ground truth here')\n")
    return folder


def own_words(world: Path, *more: str) -> list[str]:
    """The cluster's command line with files that are here."""
    return [
        *CLUSTER,
        f"opd.teacher.model={world}/teacher",
        f"actor_rollout_ref.model.path={world}/student",
        f"data.train_files={world}/train.parquet",
        f"reward.custom_reward_function.path={world}/reward.py",
        *more,
    ]


def command(words: list[str], *options: str) -> list[str]:
    return [sys.executable, "-m", "opd.cli.main", "verl", "smoke", *options, *words]


def mine(process: psutil.Process, word: str) -> bool:
    try:
        return word in " ".join(process.cmdline()) or word in str(process.environ().get(MARK, ""))
    except psutil.Error:
        return False


@pytest.mark.slow
@pytest.mark.serial  # beside another run of Ray the KL at the end was once 4e-6; alone it never was
@pytest.mark.timeout(600)
def test_a_cluster_config_runs_its_steps(world: Path, tmp_path: Path):
    """GRPO beside distillation, with KL to a reference policy, whose engine verl would keep in pinned memory."""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    hybrid = [
        "opd.rl.weight=1",
        f"{ACTOR}.use_kl_loss=true",
        "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=16",
    ]
    words = own_words(world, "opd.objective.divergence=forward_kl", *hybrid)
    done = subprocess.run(command(words), capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.glob("opd-smoke-*")
    lines = done.stdout.splitlines()
    assert any(
        line.startswith("student") and "llama, 2 layers of 64, its own tokenizer, 258 tokens" in line for line in lines
    )
    assert any(line.split()[:2] == ["alignment", "green"] for line in lines)  # the doctor, on the user's own weights
    assert any(line.startswith("opd 0.1.0 (verl 0.9.") and "forward_kl" in line for line in lines)
    assert [line.split(":")[0] for line in lines if line.startswith("step ")] == ["step 1", "step 2"]
    assert lines[-1].startswith("ok: 2 steps in ")
    metrics = [json.loads(line)["data"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(step["actor/opd/forward_kl"] > 0 for step in metrics)
    assert abs(metrics[0]["actor/kl_loss"]) < 1e-6  # the student starts as its reference, in one precision
    assert not list(folder.glob("model*"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("more", "who", "said"),
    [
        (["data.train_batch_size=128"], "verl", "train_batch_size (128) must be >= actor.ppo_mini_batch_size (256)"),
        ([f"{ACTOR}.calculate_sum_pi_squared=true"], "opd", "needs the whole logits, which opd does not make"),
        (["opd.teacher.model={world}/other"], "opd", "teacher '{world}/other' do not read the same token ids"),
    ],
    ids=["batch", "logits", "vocabulary"],
)
def test_a_mistake_is_told_before_the_run(
    world: Path, more: list[str], who: str, said: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(OpdError) as caught:
        smoke(own_words(world, *(word.format(world=world) for word in more)))
    assert said.format(world=world) in str(caught.value)
    assert f"{who} refuses this config" in str(caught.value)
    assert "full log: " in str(caught.value)
    assert "step 1" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_error_in_the_users_reward_is_shown(world: Path):
    words = own_words(world, f"reward.custom_reward_function.path={world}/broken.py")
    done = subprocess.run(command(words), capture_output=True, text=True, timeout=500)
    assert done.returncode == 2
    assert "KeyError: 'no ground truth here'" in done.stderr
    assert f"raised in {world}/broken.py, line 2" in done.stderr
    assert "full log: " in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_limit_ends_everything(world: Path, tmp_path: Path):
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run(
        command(own_words(world), "--timeout", "45", "--no-doctor"),
        capture_output=True,
        text=True,
        timeout=200,
        env=env,
    )
    assert done.returncode == 2
    assert time.monotonic() - began < 90
    assert "the limit of 45 s was over" in done.stderr
    (folder,) = tmp_path.glob("opd-smoke-*")
    assert not [process for process in psutil.process_iter() if mine(process, str(folder))]
