"""The patches in the repository are what the builder makes, and carry nothing but verl and PyTorch."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from patch_trees import NEWEST, PATCHES, VERSIONS, git, make_tree, release, script, touched

from opd.cli.main import main
from opd.errors import ConfigError
from opd.integrations.verl.patch import builder
from opd.integrations.verl.patch.installer import pack
from opd.integrations.verl.patch.release import SUPPORTED, cache_folder, read_release


def added_modules(version: str) -> dict[str, str]:
    made = builder.changes(release(version))
    return {change.path: change.after for change in made if change.before is None and change.path.endswith(".py")}


def test_every_supported_version_has_a_patch():
    assert tuple(VERSIONS) == SUPPORTED


def test_the_committed_patches_are_rebuilt_byte_for_byte(tmp_path: Path):
    for version in VERSIONS:
        builder.build(version, tmp_path)
    committed, rebuilt = (
        {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        for folder in (PATCHES, tmp_path)
    )
    assert rebuilt.keys() == committed.keys()
    stale = [str(name) for name in rebuilt if rebuilt[name] != committed[name]]
    assert not stale, f"losses, row passes or templates changed; run `make patches` and commit: {stale}"


@pytest.mark.parametrize("version", VERSIONS)
def test_the_summary_says_what_git_counts(version: str, tmp_path: Path):
    patch = PATCHES / version / builder.PATCH
    done = subprocess.run(
        ["git", "apply", "--numstat", patch], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    counted = sorted(tuple(line.split("\t")) for line in done.stdout.splitlines())
    lines = (PATCHES / version / "FILES.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert counted == sorted((n, "0", path) for _, n, path in (line.split(" ", 2) for line in lines))
    summary = (PATCHES / "PATCH_SUMMARY.txt").read_text(encoding="utf-8")
    total = sum(int(n) for n, _, _ in counted)
    assert f"verl {version}: {len(counted)} files" in summary and f"{total} lines added" in summary


@pytest.mark.parametrize("version", VERSIONS)
def test_git_reads_the_blob_names_that_the_builder_wrote(version: str, tmp_path: Path):
    """`--3way` looks for the file that was changed by them."""
    git(tmp_path, "init", "--quiet")
    for change in builder.changes(release(version)):
        (tmp_path / "x").write_text(change.after, encoding="utf-8", newline="\n")
        assert git(tmp_path, "hash-object", "--no-filters", "x").strip() == builder.blob_name(change.after)


def test_the_added_modules_need_verl_and_torch_alone():
    allowed = {"torch", "verl", "__future__", *sys.stdlib_module_names}
    guarded = {"jaxtyping", "transformers"}  # for annotations: under TYPE_CHECKING, or where installed
    for path, text in added_modules(NEWEST).items():
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
    modules = added_modules(NEWEST)
    for path, text in modules.items():
        for name in re.findall(r"^\s*from (verl\.trainer\.ppo\.(?:opd_core|on_policy_distillation)[\w.]*)", text, re.M):
            file = name.replace(".", "/")
            assert {f"{file}.py", f"{file}/__init__.py"} & modules.keys(), f"{path} imports {name}"


def test_nothing_is_taken_away_from_verl():
    for change in builder.changes(release(NEWEST)):
        assert change.counts[1] == 0, change.path


def test_a_release_that_moved_a_hook_is_named(tmp_path: Path):
    moved = {**release(NEWEST)}
    path = "verl/workers/engine_workers.py"
    moved[path] = moved[path].replace(b"self.actor.reset()", b"self.actor.restart()")
    with pytest.raises(ConfigError, match=r"engine_workers\.py: the place for a hook .* was found 0 times"):
        builder.changes(moved)


def test_what_cannot_be_built_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"verl 0\.7\.1 is not supported; supported are 0\.8\.0, 0\.9\.0, 0\.9\.1"):
        builder.build("0.7.1", tmp_path)
    with pytest.raises(ConfigError, match=r"--try builds it"):
        builder.build("0.10.0", tmp_path)
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
    archive = archive_of("0.10.0.dev", tmp_path / "verl.tar.gz")
    words = [
        "verl",
        "patch",
        "build",
        "--verl",
        "0.10.0.dev",
        "--archive",
        str(archive),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(words) == 1
    assert "verl 0.10.0.dev is not supported" in capsys.readouterr().err
    assert main([*words, "--try"]) == 0
    made, known = (
        (folder / builder.PATCH).read_text(encoding="utf-8")
        for folder in (tmp_path / "out/0.10.0.dev", PATCHES / NEWEST)
    )
    assert hunks(made) == hunks(known)


def hunks(text: str) -> dict[str, str]:
    """Of the files of verl that are changed; the added ones follow this checkout."""
    parts = text.split("diff --git a/")[1:]
    return {part.split()[0]: part for part in parts if "new file mode" not in part}


def test_a_release_that_moved_a_hook_is_not_built_even_when_it_is_asked_for(tmp_path: Path):
    path = "verl/workers/engine_workers.py"
    moved = release(NEWEST)[path].replace(b"self.actor.reset()", b"self.actor.restart()")
    archive = archive_of("0.10.0", tmp_path / "verl.tar.gz", **{path: moved})
    with pytest.raises(ConfigError, match=r"engine_workers\.py: the place for a hook .* was found 0 times"):
        builder.build("0.10.0", tmp_path / "out", archive, untested=True)
    assert not (tmp_path / "out").exists()


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
    assert f"the patch applies ({len(touched(NEWEST))} files)" in done.stdout
    assert "Already" not in script("--check", tree).stdout
