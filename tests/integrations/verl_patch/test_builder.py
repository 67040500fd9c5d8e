"""The patch in the repository is what the builder makes, and carries nothing but verl and PyTorch."""

from __future__ import annotations

import ast
import difflib
import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from patch_trees import NEWEST, PATCHES, VERSIONS, git, make_tree, release, script, small_files, touched
from tools.verl_patch import builder
from tools.verl_patch.__main__ import main
from tools.verl_patch.builder import pack
from tools.verl_patch.release import SUPPORTED, cache_folder, read_release

from opd.errors import ConfigError


def all_changes() -> list[builder.NewFile | builder.ChangedFile]:
    return builder.changes([release(version) for version in VERSIONS])


def added_modules() -> dict[str, str]:
    return {c.path: c.text for c in all_changes() if isinstance(c, builder.NewFile) and c.path.endswith(".py")}


def test_every_supported_version_has_a_patch():
    assert tuple(VERSIONS) == SUPPORTED


def test_the_committed_patches_are_rebuilt_byte_for_byte(tmp_path: Path):
    builder.build({version: release(version) for version in VERSIONS}, tmp_path)
    committed, rebuilt = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (PATCHES, tmp_path)
    )
    assert rebuilt.keys() == committed.keys()
    stale = [str(name) for name in rebuilt if rebuilt[name] != committed[name]]
    assert not stale, f"losses, row passes or templates changed; run `make patches` and commit: {stale}"


def test_the_summary_says_what_git_counts(tmp_path: Path):
    patch = PATCHES / builder.PATCH
    done = subprocess.run(
        ["git", "apply", "--numstat", patch], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    counted = sorted(tuple(line.split("\t")) for line in done.stdout.splitlines())
    lines = (PATCHES / builder.FILES).read_text(encoding="utf-8").splitlines()[1:]
    assert counted == sorted((n, "0", path) for _, n, path, *_ in (line.split() for line in lines))
    summary = (PATCHES / builder.SUMMARY).read_text(encoding="utf-8")
    total = sum(int(n) for n, _, _ in counted)
    assert f"verl {', '.join(VERSIONS)}: {len(counted)} files" in summary and f"{total} lines added" in summary


@pytest.mark.parametrize("number", range(len(VERSIONS)))
def test_git_reads_the_blob_names_that_the_builder_wrote(number: int, tmp_path: Path):
    """`--3way` looks for the file that was changed by them."""
    git(tmp_path, "init", "--quiet")
    for change in all_changes():
        new = isinstance(change, builder.NewFile)
        for text in (change.text,) if new else (change.texts[number], change.after(number)):
            (tmp_path / "x").write_text(text, encoding="utf-8", newline="\n")
            assert git(tmp_path, "hash-object", "--no-filters", "x").strip() == builder.blob_name(text)


@pytest.mark.parametrize("number", range(len(VERSIONS)))
def test_the_one_patch_puts_every_line_where_it_belongs_in_every_release(number: int, tmp_path: Path):
    tree = make_tree(tmp_path / "verl", small_files(VERSIONS[number]))
    subprocess.run(["git", "apply", PATCHES / builder.PATCH], cwd=tree, check=True)
    for change in all_changes():
        wanted = change.text if isinstance(change, builder.NewFile) else change.after(number)
        assert (tree / change.path).read_text(encoding="utf-8") == wanted, change.path


def test_the_added_modules_need_verl_and_torch_alone():
    allowed = {"torch", "verl", "__future__", *sys.stdlib_module_names}
    guarded = {"jaxtyping", "transformers"}  # for annotations: under TYPE_CHECKING, or where installed
    for path, text in added_modules().items():
        if path.startswith("tests/"):
            allowed |= {"yaml", "omegaconf"}  # verl's own
        tree = ast.parse(text)
        for node in tree.body:
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {n.split(".")[0] for n in names} <= allowed, f"{path}:{node.lineno}"
        everywhere = {n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module}
        assert everywhere <= allowed | guarded, path
        assert "opd" not in everywhere


def test_every_import_between_the_added_modules_is_there():
    modules = added_modules()
    for path, text in modules.items():
        for name in re.findall(r"^\s*from (verl\.trainer\.ppo\.(?:opd_core|on_policy_distillation)[\w.]*)", text, re.M):
            file = name.replace(".", "/")
            assert {f"{file}.py", f"{file}/__init__.py"} & modules.keys(), f"{path} imports {name}"


def test_nothing_is_taken_away_from_verl():
    for change in all_changes():
        for number, text in enumerate(change.texts if isinstance(change, builder.ChangedFile) else ()):
            after = change.after(number).splitlines()
            assert not any(line.startswith("- ") for line in difflib.ndiff(text.splitlines(), after)), change.path


def test_a_release_that_moved_a_hook_is_named(tmp_path: Path):
    moved = {**release(NEWEST)}
    path = "verl/workers/engine_workers.py"
    moved[path] = moved[path].replace(b"self.actor.reset()", b"self.actor.restart()")
    with pytest.raises(ConfigError, match=r"engine_workers\.py: the place for a hook .* was found 0 times"):
        builder.changes([moved])


def test_what_cannot_be_built_is_refused(tmp_path: Path, capsys):
    assert main(["build", "--verl", "0.7.1", "--out", str(tmp_path)]) == 1
    assert "verl 0.7.1 is not supported; supported are 0.8.0, 0.9.0, 0.9.1" in capsys.readouterr().err
    assert main(["build", "--verl", "0.10.0", "--out", str(tmp_path)]) == 1
    assert "--try builds it" in capsys.readouterr().err
    assert main(["build", "--try"]) == 1
    assert "about one release" in capsys.readouterr().err
    release(NEWEST)  # so that it is in the cache
    archive = next(iter(sorted((cache_folder() / NEWEST).glob("verl-*"))))
    with pytest.raises(ConfigError, match=rf"holds verl {re.escape(NEWEST)}, not 0\.9\.7"):
        read_release("0.9.7", archive)
    with pytest.raises(ConfigError, match="is not a file"):
        read_release(NEWEST, tmp_path / "none.whl")


def archive_of(version: str, path: Path, **changed: bytes) -> Path:
    """The newest release under another number, as a source archive."""
    files = {**release(NEWEST), "verl/version/version": f"{version}\n".encode(), **changed}
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"verl-{version}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_a_patch_for_a_release_of_another_number_is_built_when_it_is_asked_for(tmp_path: Path, capsys):
    archive, out = archive_of("0.10.0.dev", tmp_path / "verl.tar.gz"), tmp_path / "out"
    words = ["build", "--verl", "0.10.0.dev", "--archive", str(archive), "--out", str(out)]
    assert main(words) == 1
    assert "verl 0.10.0.dev is not supported" in capsys.readouterr().err
    assert main([*words, "--try"]) == 0
    tree = make_tree(tmp_path / "verl", {**small_files(NEWEST), "verl/version/version": b"0.10.0.dev\n"})
    done = subprocess.run(["bash", out / "apply_patch.sh", "--no-verify", tree], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    changed = {c.path: c.after(-1) for c in all_changes() if isinstance(c, builder.ChangedFile)}
    assert changed == {path: (tree / path).read_text(encoding="utf-8") for path in changed}


def test_a_release_that_moved_a_hook_is_not_built_even_when_it_is_asked_for(tmp_path: Path, capsys):
    path = "verl/workers/engine_workers.py"
    moved = release(NEWEST)[path].replace(b"self.actor.reset()", b"self.actor.restart()")
    archive = archive_of("0.10.0", tmp_path / "verl.tar.gz", **{path: moved})
    out = tmp_path / "out"
    assert main(["build", "--verl", "0.10.0", "--archive", str(archive), "--out", str(out), "--try"]) == 1
    assert re.search(r"engine_workers\.py: the place for a hook .* was found 0 times", capsys.readouterr().err)
    assert not out.exists()


def test_the_archive_holds_everything_and_its_checksums_are_right(tmp_path: Path):
    packed, checksum = pack(tmp_path)
    again, _ = pack(tmp_path / "again")
    assert packed.read_bytes() == again.read_bytes()
    subprocess.run(["sha256sum", "--check", checksum.name], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["tar", "xzf", packed.name], cwd=tmp_path, check=True)
    folder = tmp_path / packed.name.removesuffix(".tar.gz")
    subprocess.run(["sha256sum", "--check", "SHA256SUMS"], cwd=folder, check=True, capture_output=True)
    tree = make_tree(tmp_path / "verl tree", release(NEWEST))
    done = subprocess.run(
        ["bash", folder / "apply_patch.sh", "--check", tree], capture_output=True, text=True, check=True
    )
    assert f"the patch applies ({len(touched())} files)" in done.stdout
    assert "Already" not in script("--check", tree).stdout
