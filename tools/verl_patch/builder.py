"""`patches/`, generated and packed: one patch for every supported release, the same bytes on every machine, with or without git.

A patch of new files and insertions fits several releases when each hunk shows only the lines around it that all of them have.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path

from opd import __version__
from opd.errors import ConfigError
from tools.verl_patch.hooks import INSERTIONS, Insertion
from tools.verl_patch.sources import LICENSE, copied_files, rewritten

HERE = Path(__file__).parent
PATCHES = HERE.parents[1] / "patches"
PATCH, FILES, SUMMARY = "0001-on-policy-distillation.patch", "FILES.txt", "PATCH_SUMMARY.txt"
WRITTEN_BY_HAND = ("apply_patch.sh", "PATCH_README.md")
AUTHOR = "opd <opd@example.invalid>"
DATE = "Sun, 22 Nov 2026 00:00:00 +0000"
SUBJECT = "Add on-policy distillation as a policy loss"
BODY = """\
actor_rollout_ref.actor.policy_loss.loss_mode=on_policy_distillation trains
the student on its own samples to follow a frozen teacher, which runs beside
the student in the FSDP workers and reads the same micro-batches. Reverse KL,
forward KL, the skewed and the generalized Jensen-Shannon divergence over the
whole vocabulary; several teachers; a policy loss beside it.

The losses in verl/trainer/ppo/opd_core are copied from the package opd. No
dependency is added. Nothing changes for other loss modes.
"""
CONTEXT = 3
PLAIN, RUNNABLE = "100644", "100755"
NO_BLOB = "0" * 40
ADDED = {
    "ON_POLICY_DISTILLATION.md": "ON_POLICY_DISTILLATION.md",
    "examples/on_policy_distillation/README.md": "example_readme.md",
    "examples/on_policy_distillation/benchmark.py": "benchmark.py.txt",
    "examples/on_policy_distillation/run_distillation.sh": "run_distillation.sh",
    "examples/on_policy_distillation/run_hybrid.sh": "run_hybrid.sh",
    "examples/on_policy_distillation/run_two_teachers.sh": "run_two_teachers.sh",
    "tests/test_on_policy_distillation.py": "test_on_policy_distillation.py.txt",
}
"""Path in verl's tree → template."""
Release = Mapping[str, bytes]
"""A release of verl: path in the tree → content."""


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """A file that verl lacks."""

    path: str
    text: str

    @property
    def added(self) -> int:
        return self.text.count("\n")

    @property
    def mode(self) -> str:
        return RUNNABLE if self.path.endswith(".sh") else PLAIN

    def diff(self) -> str:
        """The file's part of the patch, as git writes it."""
        assert self.text.endswith("\n"), f"{self.path} does not end with a newline"
        lines = "".join(f"+{line}" for line in self.text.splitlines(keepends=True))
        return (
            f"diff --git a/{self.path} b/{self.path}\nnew file mode {self.mode}\nindex {NO_BLOB}..{blob_name(self.text)}\n"
            f"--- /dev/null\n+++ b/{self.path}\n@@ -0,0 +1,{self.added} @@\n{lines}"
        )


@dataclass(frozen=True, kw_only=True)
class Hunk:
    """An insertion with the lines around it that every release has."""

    line: int
    """Number of the first line of `above` in the last release, from 1."""
    above: tuple[str, ...]
    lines: tuple[str, ...]
    below: tuple[str, ...]

    def diff(self, grown: int) -> str:
        """The hunk, after `grown` lines that hunks before it add to the file."""
        before = len(self.above) + len(self.below)
        head = f"@@ -{self.line},{before} +{self.line + grown},{before + len(self.lines)} @@\n"
        kept, added = "".join(f" {line}" for line in self.above), "".join(f"+{line}" for line in self.lines)
        return head + kept + added + "".join(f" {line}" for line in self.below)


@dataclass(frozen=True, kw_only=True)
class ChangedFile:
    """One of verl's own files, in every release, and what it gains."""

    path: str
    texts: tuple[str, ...]
    insertions: tuple[Insertion, ...]

    @property
    def added(self) -> int:
        return sum(insertion.lines.count("\n") for insertion in self.insertions)

    @cached_property
    def blobs(self) -> tuple[str, ...]:
        """git's name of the file in each release, by which `git apply --3way` finds what a fork began from."""
        return tuple(map(blob_name, self.texts))

    def after(self, number: int) -> str:
        """The file with the insertions, in one of the releases."""
        text = self.texts[number]
        for insertion in self.insertions:
            parts = (insertion.lines, insertion.anchor) if insertion.before else (insertion.anchor, insertion.lines)
            text = text.replace(insertion.anchor, "".join(parts))
        return text

    def hunks(self) -> list[Hunk]:
        """The insertions in the order of the file."""
        hunks = sorted((self._hunk(insertion) for insertion in self.insertions), key=lambda hunk: hunk.line)
        for one, other in pairwise(hunks):
            assert one.line + len(one.above) + len(one.below) <= other.line, f"{self.path}: hunks overlap"
        return hunks

    def _hunk(self, insertion: Insertion) -> Hunk:
        around = [self._around(text, insertion) for text in self.texts]
        above = _common([lines[::-1] for lines, _ in around])[::-1]
        below = _common([lines for _, lines in around])
        size = min(len(above), len(below))  # GNU patch takes a hunk with less on one side for the file's first or last
        if size == 0:
            raise ConfigError(
                f"{self.path}: the releases have no line in common on one side of {insertion.anchor.strip()!r}; move the insertion in "
                "tools/verl_patch/hooks.py."
            )
        above, below = above[-size:], below[:size]
        assert insertion.anchor in "".join(above) + "".join(below), f"{self.path}: the hunk does not show its anchor"
        first = len(around[-1][0]) - len(above) + 1
        return Hunk(line=first, above=above, lines=tuple(insertion.lines.splitlines(keepends=True)), below=below)

    def _around(self, text: str, insertion: Insertion) -> tuple[list[str], list[str]]:
        """The file's lines before and after the place."""
        count = text.count(insertion.anchor)
        if count != 1:
            raise ConfigError(
                f"{self.path}: the place for a hook ({insertion.why}) was found {count} times, not once: {insertion.anchor.strip()!r}. "
                "This release of verl needs a new anchor in tools/verl_patch/hooks.py."
            )
        above, below = text.split(insertion.anchor)
        if insertion.before:
            below = insertion.anchor + below
        else:
            above += insertion.anchor
        return above.splitlines(keepends=True), below.splitlines(keepends=True)

    def diff(self) -> str:
        """The file's part of the patch, as git writes it; blob names are those of the last release."""
        text = (
            f"diff --git a/{self.path} b/{self.path}\nindex {self.blobs[-1]}..{blob_name(self.after(-1))} {PLAIN}\n"
            f"--- a/{self.path}\n+++ b/{self.path}\n"
        )
        grown = 0
        for hunk in self.hunks():
            text += hunk.diff(grown)
            grown += len(hunk.lines)
        return text


def _common(runs: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """The first lines, at most CONTEXT, that all of these begin with."""
    columns = zip(*runs, strict=False)
    return tuple(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))[:CONTEXT]


def blob_name(text: str) -> str:
    """git's name of a file with this content."""
    content = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def changes(releases: Sequence[Release]) -> list[NewFile | ChangedFile]:
    """Every file that the patch touches, in the order of their paths. Raises ConfigError where an insertion finds no place."""
    made: list[NewFile | ChangedFile] = []
    for path in dict.fromkeys(insertion.file for insertion in INSERTIONS):
        texts = tuple(release.get(path, b"").decode() for release in releases)
        made.append(
            ChangedFile(path=path, texts=texts, insertions=tuple(one for one in INSERTIONS if one.file == path))
        )
        made[-1].diff()
    added = {path: template(name) for path, name in ADDED.items()}
    python = {path: LICENSE + rewritten(text) for path, text in added.items() if path.endswith(".py")}
    copied = copied_files(__version__, [added[path] for path in python])
    for path, text in {**copied, **added, **python}.items():
        if any(path in release for release in releases):
            raise ConfigError(f"{path}: this release of verl has such a file already; the patch would overwrite it.")
        made.append(NewFile(path=path, text=text))
    return sorted(made, key=lambda change: change.path)


def template(name: str) -> str:
    """The text of a template."""
    return (HERE / "templates" / name).read_text(encoding="utf-8")


def patch_text(made: Sequence[NewFile | ChangedFile]) -> str:
    """The whole patch, as `git format-patch` lays it out."""
    new = [f" create mode {change.mode} {change.path}" for change in made if isinstance(change, NewFile)]
    totals = f" {len(made)} files changed, {sum(change.added for change in made)} insertions(+)"
    stat = "\n".join([*(f" {change.path} | {change.added} +" for change in made), totals, *new])
    head = (
        f"From {NO_BLOB} Mon Sep 17 00:00:00 2001\nFrom: {AUTHOR}\nDate: {DATE}\nSubject: [PATCH] {SUBJECT}\n"
        f"MIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n\n{BODY}---\n{stat}\n\n"
    )
    return head + "".join(change.diff() for change in made) + f"-- \nopd {__version__}\n\n"


def files_text(versions: Sequence[str], made: Sequence[NewFile | ChangedFile]) -> str:
    """One line per file: new or changed, lines added, path, and of a changed file its blob in each of `versions`."""
    head = f"# verl {' '.join(versions)}\n"
    return head + "".join(
        f"new {change.added} {change.path}\n"
        if isinstance(change, NewFile)
        else f"changed {change.added} {change.path} {' '.join(change.blobs)}\n"
        for change in made
    )


def summary_text(versions: Sequence[str], made: Sequence[NewFile | ChangedFile]) -> str:
    """PATCH_SUMMARY.txt."""
    new = sum(isinstance(change, NewFile) for change in made)
    title = (
        f"verl {', '.join(versions)}: {len(made)} files, {new} of them new, {sum(change.added for change in made)} lines added, none "
        "taken away"
    )
    rows = [f"  {c.added:5d}  {'new' if isinstance(c, NewFile) else 'changed':7}  {c.path}" for c in made]
    return "\n".join([template(SUMMARY), title, *rows, ""])


def build(releases: Mapping[str, Release], out: Path) -> list[Path]:
    """Write into `out` the patch for these releases, oldest first, and all that goes with it. Returns what was written.

    Raises ConfigError where an insertion finds no place, or the releases have no line in common there.
    """
    made = changes(tuple(releases.values()))
    written = {
        PATCH: patch_text(made),
        FILES: files_text(tuple(releases), made),
        SUMMARY: summary_text(tuple(releases), made),
        **{name: (PATCHES / name).read_text(encoding="utf-8") for name in WRITTEN_BY_HAND},
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, text in written.items():
        path = out / name
        path.write_text(text, encoding="utf-8", newline="\n")
        path.chmod(0o755 if name.endswith(".sh") else 0o644)
    return [out / name for name in written]


NAME = f"opd-verl-patch-{__version__}"


def pack(out: Path, folder: Path = PATCHES) -> list[Path]:
    """Write `out`/NAME.tar.gz with SHA256SUMS inside, and its own SHA-256 beside it. Raises ConfigError where `folder` has no patch."""
    inside = sorted(p for p in folder.rglob("*") if p.is_file())
    if not any(path.name == PATCH for path in inside):
        raise ConfigError(f"{folder} holds no patch; build it: python -m tools.verl_patch build")
    contents = [(path.relative_to(folder).as_posix(), path.read_bytes()) for path in inside]
    sums = "".join(f"{_sha256(content)}  {name}\n" for name, content in contents)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, content in [*contents, ("SHA256SUMS", sums.encode())]:
            member = tarfile.TarInfo(f"{NAME}/{name}")
            member.size, member.mode = len(content), 0o755 if name.endswith(".sh") else 0o644
            archive.addfile(member, io.BytesIO(content))
    out.mkdir(parents=True, exist_ok=True)
    packed = out / f"{NAME}.tar.gz"
    packed.write_bytes(gzip.compress(plain.getvalue(), mtime=0))
    checksum = out / f"{packed.name}.sha256"
    checksum.write_text(f"{_sha256(packed.read_bytes())}  {packed.name}\n", encoding="utf-8")
    return [packed, checksum]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
