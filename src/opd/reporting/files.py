"""Files of a run folder: their names, and writing them. A failure is a `RunFolderError` with its reason and advice."""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opd.durable import replacing
from opd.errors import RunFolderError

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"
HISTORY_FILE = "history.jsonl"
ABOUT_FILE = "about.json"
STATE_FILE = "state.json"
SUMMARY_FILE = "summary.json"
GUARD_FILE = "guard.json"
EVAL_FILE = "eval.json"
REPORT_FILE = "report.html"
CONFIG_FILE = "config.yaml"

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@contextmanager
def explain_os_errors(action: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` while doing `action` to `path` into a `RunFolderError`."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"Cannot {action} {path}: {error.strerror or error}. {_advice(error.errno, path)}"
        ) from error


def refuse_other_folders(folder: Path, *, begun: bool = True) -> None:
    """Raise RunFolderError for an existing folder that training did not write to; one whose run has not `begun` holds its state alone."""
    names = (METRICS_FILE, SAMPLES_FILE, SUMMARY_FILE)
    if not any((folder / name).exists() for name in (*names, *(() if begun else (STATE_FILE,)))):
        raise RunFolderError(
            f"{folder} is not a run folder: it has none of {METRICS_FILE}, {SAMPLES_FILE} and {SUMMARY_FILE}. "
            "Give the folder that training wrote its run to."
        )


def dangling_link(path: Path) -> Path | None:
    """The first of `path` and the folders above it that is a link to nothing."""
    return next((place for place in (path, *path.parents) if place.is_symlink() and not place.exists()), None)


def explain_link(link: Path) -> str:
    """A sentence with advice about a link to nothing."""
    return (
        f"'{link}' is a link to '{os.readlink(link)}', which is not there: moved, or on a disk that is not mounted? Bring it back, or "
        "remove the link."
    )


def remove(path: Path) -> None:
    """Delete a file, or a folder with what is in it; of a link, the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _advice(code: int | None, path: Path) -> str:
    if (link := dangling_link(path)) is not None:
        return explain_link(link)
    if code == errno.EBUSY:
        return "A disk is mounted there, or another process holds it. Empty it by hand, or choose another folder."
    if code in DISK_FULL:
        return "Free some space on that disk, or choose a run folder on another one; then resume the run."
    if code in NOT_ALLOWED:
        return "Choose a run folder that you may write to, or change its permissions."
    if code in (errno.ENOENT, errno.ENOTDIR):
        return "Check the spelling of the path, and that the folder was not moved or deleted."
    return "Check that the folder still exists and that its disk is healthy."


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`: a reader sees the old file or the new one, never a part of it."""
    with explain_os_errors("write", path), replacing(path) as stream:
        stream.write(content)


def strict_json(value: Any) -> Any:
    """`value` with every non-finite float replaced by None: JSON has no NaN or infinity."""
    if isinstance(value, Mapping):
        return {str(key): strict_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict_json(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
