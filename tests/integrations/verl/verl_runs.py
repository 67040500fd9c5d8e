"""`python -m verl.trainer.main_ppo` as a user starts it, on a CPU, under a time limit, with nothing left running."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
from verl_world import REWARD, make_models, make_prompts, read_metrics

LIMIT_SECONDS = 420.0  # a run of 3 steps takes about 60 on two idle cores
POLL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished run."""

    code: int
    log: str
    metrics: list[dict[str, float]]
    """verl's file logger, one per step."""


def overrides(folder: Path) -> list[str]:
    """GRPO on the tiny world: 4 prompts, 2 samples each, 12 tokens at the most."""
    actor, rollout = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
    return [
        "+opd_device=cpu",
        "algorithm.adv_estimator=grpo",
        f"data.train_files={folder}/train.parquet",
        f"data.val_files={folder}/train.parquet",
        "data.train_batch_size=4",
        "data.max_prompt_length=64",
        "data.max_response_length=12",
        "data.shuffle=False",
        f"actor_rollout_ref.model.path={folder}/student",
        f"{rollout}.n=2",
        f"{rollout}.log_prob_micro_batch_size_per_gpu=8",
        f"{actor}.ppo_mini_batch_size=4",
        f"{actor}.ppo_micro_batch_size_per_gpu=8",
        f"{actor}.optim.lr=1e-3",
        f"reward.custom_reward_function.path={folder}/reward.py",
        "trainer.total_epochs=1",
        "trainer.logger=[console,file]",
        "trainer.val_before_train=False",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        f"trainer.default_local_dir={folder}/checkpoints",
    ]


def make_folder(folder: Path) -> Path:
    """Everything that `overrides` names."""
    make_models(folder)
    make_prompts(folder / "train.parquet")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    return folder


def main_ppo(folder: Path, *more: str, limit: float = LIMIT_SECONDS) -> Done:
    """Run it; later overrides win. Ray's sockets want a short path, and everything of the run lives in folders of its own."""
    ray_folder = Path(tempfile.mkdtemp(prefix="vr", dir="/tmp"))
    metrics_path = Path(tempfile.mkdtemp(dir=folder)) / "metrics.jsonl"
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *overrides(folder), *more]
    command += [f"+ray_kwargs.ray_init._temp_dir={ray_folder}"]
    env = {
        **os.environ,
        "HOME": str(ray_folder),
        "VERL_PLATFORM": "cpu",
        "VERL_FILE_LOGGER_PATH": str(metrics_path),
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "HYDRA_FULL_ERROR": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log_path = metrics_path.with_name("log.txt")
    try:
        with log_path.open("wb") as log:
            code = _watch(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT), limit)
    finally:
        shutil.rmtree(ray_folder, ignore_errors=True)
    metrics = read_metrics(metrics_path) if metrics_path.exists() else []
    return Done(code=code, log=log_path.read_text(encoding="utf-8", errors="replace"), metrics=metrics)


def _watch(process: subprocess.Popen[bytes], limit: float) -> int:
    """The exit code; -1 after the limit. Whatever the run had started is gone afterwards."""
    family: set[psutil.Process] = set()
    root, end = psutil.Process(process.pid), time.monotonic() + limit
    try:
        while process.poll() is None and time.monotonic() < end:
            family |= _children(root)
            time.sleep(POLL_SECONDS)
        return process.returncode if process.poll() is not None else -1
    finally:
        family |= _children(root)
        for member in [*family, root]:
            if member.is_running():  # and is the very process that was seen, not a later one of its number
                _kill(member)
        process.wait()


def _children(root: psutil.Process) -> set[psutil.Process]:
    try:
        return set(root.children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
