"""`patches/`, generated: the same input gives the same bytes, on every machine, with or without git."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path

from opd import __version__
from opd.errors import ConfigError
from opd.integrations.verl.patch.hooks import HOOKS
from opd.integrations.verl.patch.release import SUPPORTED, read_release
from opd.integrations.verl.patch.sources import LICENSE, copied_files, rewritten

PATCH = "0001-on-policy-distillation.patch"
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
"""Path in verl's tree → our template."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One file of the tree before and after."""

    path: str
    before: str | None
    """None: the file is new."""
    after: str

    @property
    def mode(self) -> str:
        return RUNNABLE if self.path.endswith(".sh") else PLAIN

    @property
    def counts(self) -> tuple[int, int]:
        """Lines added and taken away."""
        lines = [line for line in self.hunks() if not line.startswith(("---", "+++"))]
        return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)

    def hunks(self) -> list[str]:
        """Unified diff without its two head lines."""
        before = [] if self.before is None else self.before.splitlines(keepends=True)
        for text in (self.before, self.after):
            assert text is None or text.endswith("\n"), f"{self.path} does not end with a newline"
        return list(difflib.unified_diff(before, self.after.splitlines(keepends=True), n=CONTEXT))[2:]

    def diff(self) -> str:
        """As git writes it, with whole blob names so that --3way finds the file that was changed."""
        old = NO_BLOB if self.before is None else blob_name(self.before)
        head = [f"diff --git a/{self.path} b/{self.path}\n"]
        if self.before is None:
            head += [f"new file mode {self.mode}\n", f"index {old}..{blob_name(self.after)}\n", "--- /dev/null\n"]
        else:
            head += [f"index {old}..{blob_name(self.after)} {PLAIN}\n", f"--- a/{self.path}\n"]
        return "".join([*head, f"+++ b/{self.path}\n", *self.hunks()])


def blob_name(text: str) -> str:
    """git's name of a file with this content."""
    content = text.encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def changes(tree: Mapping[str, bytes]) -> list[Change]:
    """Every file that the patch touches, in the order of their paths. Raises ConfigError where a hook finds no place."""
    edited: dict[str, str] = {}
    for hook in HOOKS:
        text = edited.get(hook.file) or tree.get(hook.file, b"").decode()
        count = text.count(hook.anchor)
        if count != 1:
            raise ConfigError(
                f"{hook.file}: the place for a hook ({hook.why}) was found {count} times, not once: {hook.anchor.strip()!r}. This release of "
                "verl needs a new anchor in opd/integrations/verl/patch/hooks.py."
            )
        with_lines = hook.lines + hook.anchor if hook.before else hook.anchor + hook.lines
        edited[hook.file] = text.replace(hook.anchor, with_lines)
    made = [Change(path=path, before=tree[path].decode(), after=after) for path, after in edited.items()]
    for path, text in {**copied_files(__version__), **_added()}.items():
        if path in tree:
            raise ConfigError(f"{path}: this release of verl has such a file already; the patch would overwrite it.")
        made.append(Change(path=path, before=None, after=text))
    return sorted(made, key=lambda change: change.path)


def template(name: str) -> str:
    """The text of one of our templates."""
    return (resources("opd.integrations.verl.patch") / "templates" / name).read_text(encoding="utf-8")


def _added() -> dict[str, str]:
    texts = {path: template(name) for path, name in ADDED.items()}
    return {p: LICENSE + rewritten(text) if p.endswith(".py") else text for p, text in texts.items()}


def patch_text(made: list[Change]) -> str:
    """The whole file, as `git format-patch` lays it out."""
    new = [f" create mode {change.mode} {change.path}" for change in made if change.before is None]
    added, removed = (sum(change.counts[i] for change in made) for i in (0, 1))
    totals = f" {len(made)} files changed, {added} insertions(+)" + (f", {removed} deletions(-)" if removed else "")
    stat = "\n".join([*(_stat_line(change) for change in made), totals, *new])
    head = (
        f"From {NO_BLOB} Mon Sep 17 00:00:00 2001\nFrom: {AUTHOR}\nDate: {DATE}\nSubject: [PATCH] {SUBJECT}\n"
        f"MIME-Version: 1.0\nContent-Type: text/plain; charset=UTF-8\nContent-Transfer-Encoding: 8bit\n\n{BODY}---\n{stat}\n\n"
    )
    return head + "".join(change.diff() for change in made) + f"-- \nopd {__version__}\n\n"


def _stat_line(change: Change) -> str:
    added, removed = change.counts
    return f" {change.path} | {added + removed} {'+' * bool(added)}{'-' * bool(removed)}"


def build(version: str, out: Path, archive: Path | None = None, *, untested: bool = False) -> list[Path]:
    """Write `out`/<version>/PATCH, and the files that all versions share. Returns what was written.

    Raises ConfigError for a version that was not tested, unless `untested`, and where a hook finds no place.
    """
    if version not in SUPPORTED and not untested:
        raise ConfigError(
            f"verl {version} is not supported; supported are {', '.join(SUPPORTED)}. --try builds it where every hook has its place."
        )
    made = changes(read_release(version, archive))
    written = {
        f"{version}/{PATCH}": patch_text(made),
        f"{version}/FILES.txt": files_text(version, made),
        "apply_patch.sh": template("apply_patch.sh"),
        "PATCH_README.md": template("PATCH_README.md"),
    }
    for name, text in written.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
        path.chmod(0o755 if name.endswith(".sh") else 0o644)
    summary = out / "PATCH_SUMMARY.txt"
    summary.write_text(summary_text(out), encoding="utf-8", newline="\n")
    return [*(out / name for name in written), summary]


def files_text(version: str, made: list[Change]) -> str:
    """One line per file: changed or new, lines added, path."""
    lines = [f"{'new' if c.before is None else 'changed'} {c.counts[0]} {c.path}" for c in made]
    return f"# verl {version}\n" + "\n".join(lines) + "\n"


def summary_text(out: Path) -> str:
    """PATCH_SUMMARY.txt: from the FILES.txt of every version that was built."""
    parts = [template("PATCH_SUMMARY.txt").rstrip("\n")]
    for listing in sorted(out.glob("*/FILES.txt")):
        rows = [line.split(" ", 2) for line in listing.read_text(encoding="utf-8").splitlines()[1:]]
        total = sum(int(count) for _, count, _ in rows)
        new = sum(kind == "new" for kind, _, _ in rows)
        title = (
            f"verl {listing.parent.name}: {len(rows)} files, {new} of them new, {total} lines added, none taken away"
        )
        parts.append("\n".join([title, *(f"  {int(n):5d}  {kind:7}  {path}" for kind, n, path in rows)]))
    return "\n\n".join(parts) + "\n"
