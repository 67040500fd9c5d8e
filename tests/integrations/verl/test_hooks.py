"""Every release of verl has the hooks that it should have, and one that moves is told by its name."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import RELEASES, NoDownload, table, unpacked

import opd.integrations.verl
from opd.errors import ConfigError
from opd.integrations.verl.contract import doctor
from opd.integrations.verl.contract.source_check import (
    BY_PART,
    HOOKS,
    PARTS,
    ReliedOn,
    VerlSource,
    check_contract,
    expected,
    installed,
    moved,
    version_of,
)

PLUGIN = Path(opd.integrations.verl.__file__).parent

SINCE_0_9 = {
    "verl:": "the plugin loads itself; in 0.8, `+opd=default` still names its classes, and VERL_USE_EXTERNAL_MODULES loads the rest",
    "verl.workers.engine:EngineRegistry.register": "v080 writes into the registry's table",
    "verl.utils.device:get_vendor": "v080 does without vendors",
    "verl.trainer.ppo.v1.trainer_base:PPOTrainer._update_actor": "0.8's trainer is RayPPOTrainer alone",
    **dict.fromkeys(
        [hook.where for hook in BY_PART["guard"]], "0.8's trainer has no registry, and nothing looks at opd.guard there"
    ),
    "verl.plugin.platform:PlatformBase": "a CPU is found by itself in 0.8",
    "verl.plugin.platform:PlatformRegistry.register": "a CPU is found by itself in 0.8",
    "verl.plugin.platform.platform_manager:_detect_platform_name": "a CPU is found by itself in 0.8",
    "verl.workers.config:RolloutConfig": "0.8 has no seed for rollouts",
    "verl.workers.rollout.base:BaseRollout.update_weights": "0.8 knows whole tensors only, which is our default",
}
"""What 0.8 lacks, and how it is lived with."""
SINCE_0_9_1 = {
    "verl.trainer.ppo.padding_utils:construct_minimal_padding_template": "a batch with teachers' scores cannot be filled up in 0.9.0",
}


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("releases")


def source_of(version: str, folder: Path) -> Path:
    if version == version_of(installed()):
        return installed()
    try:
        return unpacked(version, folder)
    except NoDownload as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_has_every_hook_that_it_should_have(version: str, releases: Path):
    folder = source_of(version, releases)
    assert version_of(folder) == version
    assert [str(gone) for gone in moved(folder, expected(version))] == []


@pytest.mark.parametrize(
    ("version", "absent"), [("0.8.0", {*SINCE_0_9, *SINCE_0_9_1}), ("0.9.0", {*SINCE_0_9_1}), ("0.9.1", set())]
)
def test_what_an_older_release_lacks_is_known(version: str, absent: set[str], releases: Path):
    gone = moved(source_of(version, releases))
    assert {hook.where for hook in HOOKS if hook not in expected(version)} == absent
    assert {m.hook.where for m in gone} == absent


def test_the_installed_verl_has_every_hook_of_its_release():
    assert [str(gone) for gone in moved(installed(), expected(version_of(installed())))] == []


def test_every_name_that_the_plugin_imports_from_verl_is_in_the_table():
    """A new import in the plugin asks for a new hook, with its reason. What the patch puts into verl is run in every release."""
    known = {hook.where.split(".")[0] if hook.where.endswith(":") else hook.where for hook in HOOKS}
    names = {where.partition(":")[0] + ":" + where.partition(":")[2].split(".")[0] for where in known}
    modules = {name.partition(":")[0] for name in names}
    unlisted = []
    for path in sorted(path for path in PLUGIN.rglob("*.py") if PLUGIN / "patch" not in path.parents):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "verl":
                for alias in node.names:
                    listed = f"{node.module}:{alias.name}" in names or f"{node.module}.{alias.name}" in modules
                    if not listed:
                        unlisted.append(f"{path.name}: from {node.module} import {alias.name}")
    assert unlisted == []


def test_every_hook_says_why_and_no_two_are_the_same():
    assert all(hook.why for hook in HOOKS)
    assert len({(h.where, h.needs, h.says) for h in HOOKS}) == len(HOOKS)
    assert set(BY_PART) >= {"config", "engine", "teacher", "loss", "serving", "cpu", "pool"}


CHANGES = [
    (
        "workers/utils/padding.py",
        "def no_padding_2_padding(tensor: torch.Tensor,",
        "def no_padding_2_padding(flat: torch.Tensor,",
        "verl.workers.utils.padding:no_padding_2_padding has no tensor",
    ),
    (
        "workers/engine/fsdp/transformer_impl.py",
        "def _build_fsdp_module(",
        "def _shard_module(",
        "verl.workers.engine.fsdp.transformer_impl:FSDPEngine._build_fsdp_module is gone",
    ),
    (
        "workers/engine/fsdp/transformer_impl.py",
        "tu.assign_non_tensor(data, batch_num_tokens=",
        "tu.assign_non_tensor(data, token_count=",
        "verl.workers.engine.fsdp.transformer_impl:FSDPEngine.forward_backward_batch says nothing of batch_num_tokens= any more",
    ),
    (
        "workers/config/engine.py",
        "    offload_policy: bool = False\n    reshard_after_forward: bool = True\n    fsdp_size: int = -1\n    forward_prefetch",
        "    cpu_offload: bool = False\n    reshard_after_forward: bool = True\n    fsdp_size: int = -1\n    forward_prefetch",
        "verl.workers.config:FSDPEngineConfig has no offload_policy",
    ),
    (
        "workers/rollout/base.py",
        '    @abstractmethod\n    async def release(self):\n        """Release weights',
        '    @abstractmethod\n    async def pause(self):\n        ...\n\n    @abstractmethod\n    async def release(self):\n        """Release weights',
        "verl.workers.rollout.base:BaseRollout asks its subclasses for pause",
    ),
    (
        "trainer/config/_generated_ppo_trainer.yaml",
        "loss_agg_mode:",
        "aggregation:",
        "trainer/config/_generated_ppo_trainer.yaml:actor_rollout_ref.actor has no loss_agg_mode",
    ),
]


@pytest.mark.parametrize(
    ("file", "old", "new", "told"), CHANGES, ids=lambda v: v if v.endswith((".py", ".yaml")) else ""
)
def test_a_hook_that_moves_is_told_by_its_name(tmp_path: Path, file: str, old: str, new: str, told: str):
    folder = tmp_path / "verl"
    shutil.copytree(installed(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    hooks = expected(version_of(folder))
    assert any(str(gone).startswith(told) for gone in moved(folder, hooks)), [
        str(gone) for gone in moved(folder, hooks)
    ]


def another(tmp_path: Path, version: str, file: str = "", old: str = "", new: str = "") -> Path:
    """The installed verl under another number, with one change."""
    folder = tmp_path / "verl"
    shutil.copytree(installed(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "version/version").write_text(version + "\n", encoding="utf-8")
    if file:
        text = (folder / file).read_text(encoding="utf-8")
        assert old in text
        (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    return folder


@pytest.mark.parametrize("version", ["0.10.0.dev", "1.0", "nightly", "0.9.7"])
def test_a_verl_of_another_number_is_taken_when_every_hook_is_there_and_that_is_told(tmp_path: Path, version: str):
    said = check_contract(another(tmp_path, version))
    assert said.startswith(
        f"verl {version} is none of the releases that opd was tested with (0.8.0, 0.9.0, 0.9.1), but all "
    )


def test_a_release_that_was_tested_is_taken_without_a_word():
    assert check_contract(installed(), BY_PART) == ""


@pytest.mark.parametrize("version", ["0.10.0", version_of(installed())])
def test_a_verl_that_moved_a_hook_is_refused_by_the_hook_whatever_its_number(tmp_path: Path, version: str):
    file, old, new, told = CHANGES[1]
    folder = another(tmp_path, version, file, old, new)
    with pytest.raises(ConfigError) as caught:
        check_contract(folder)
    assert f"verl {version} differs at 1 of " in str(caught.value) and told in str(caught.value)
    assert "opd.try_verl=true" in str(caught.value)
    said = check_contract(folder, anyway=True)
    assert said.startswith(f"warning: verl {version} differs at 1 of ") and told in said


def test_a_hook_of_a_part_that_the_run_does_not_need_refuses_nothing(tmp_path: Path):
    file = "trainer/ppo/padding_utils.py"
    folder = another(tmp_path, "0.10.0", file, "teacher_ids", "expert_ids")
    assert "all" in check_contract(folder)
    with pytest.raises(
        ConfigError, match="padding_utils:construct_minimal_padding_template says nothing of teacher_ids"
    ):
        check_contract(folder, (*PARTS, "serving", "pool"))


def test_a_verl_before_the_oldest_is_held_to_the_oldest(tmp_path: Path):
    assert expected("0.7.1") == expected("0.8.0") != ()
    folder = another(tmp_path, "0.7.1")
    shutil.rmtree(folder / "workers/engine")
    with pytest.raises(ConfigError, match=r"verl 0\.7\.1 differs at \d\d of .*; and \d+ more"):
        check_contract(folder)


def test_a_module_that_is_gone_takes_its_hooks_along(tmp_path: Path):
    folder = tmp_path / "verl"
    shutil.copytree(installed(), folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "workers/engine/fsdp/transformer_impl.py").unlink()
    gone = {m.hook.where for m in moved(folder)}
    assert {h.where for h in HOOKS if h.where.startswith("verl.workers.engine.fsdp.transformer_impl:")} <= gone


def test_names_are_found_wherever_imports_lead():
    source = VerlSource(installed())
    found = source.find("verl.workers.config", "FSDPActorConfig.validate")  # through `from .actor import *`
    assert found is not None and found[0] == "verl.workers.config.actor"
    inherited = source.find("verl.workers.engine.fsdp.transformer_impl", "FSDPEngineWithLMHead.train_mode")
    assert inherited is not None
    assert source.find("verl.workers.config", "FSDPActorConfig.no_such_method") is None
    assert source.find("verl.workers.config", "NoSuchConfig") is None


def test_the_doctor_names_a_hook_that_moved(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    hook = ReliedOn(where="verl.workers.utils.padding:no_padding_2_padding", needs="tensor data gone", why="a test")
    monkeypatch.setattr(doctor, "HOOKS", (hook,))
    assert doctor.main() == 1
    assert (
        "FAIL  verl has changed under this plugin: verl.workers.utils.padding:no_padding_2_padding has no gone"
        in capsys.readouterr().out
    )


def test_the_doctor_looks_at_the_verl_that_is_imported(tmp_path: Path):
    """Another copy first on PYTHONPATH, beside the metadata of the installed one."""
    folder = another(tmp_path, "0.10.0.dev", "trainer/ppo/padding_utils.py", "teacher_ids", "expert_ids")
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", "from opd.integrations.verl.contract import doctor as d; print(d._version().text, d._hooks().text)"],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert folder.exists() and done.returncode == 0, done.stderr
    assert "note: verl 0.10.0.dev is none of the releases that opd was tested with" in done.stdout
    assert "note: +opd=default needs none of what verl has changed: verl.trainer.ppo.padding_utils" in done.stdout


def test_the_table_counts_what_each_release_has():
    lines = table({version_of(installed()): moved(installed())}).splitlines()
    assert lines[0] == f"| part | hooks | {version_of(installed())} |"
    assert f"| engine | {len(BY_PART['engine'])} | {len(BY_PART['engine'])} |" in lines
    assert lines[-1] == f"{version_of(installed())}: all there"
