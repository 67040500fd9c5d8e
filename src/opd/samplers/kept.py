"""Rollouts of the student as it was before training, in a file that a person can read; and the sampler that hands them out."""

from __future__ import annotations

import hashlib
import json
import os
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from opd.errors import CacheError
from opd.samplers.base import SampledStudent
from opd.types import Prompt, Rollout

FORMAT = 1
LINES = "rollouts.jsonl"
MANIFEST = "rollouts.json"
TARGETS = "targets"
"""Subfolder of the teacher's scores, where teacher.cache names no other."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The contents of rollouts.json: what the rollouts were drawn from, and how they stand."""

    drawn_from: Mapping[str, Any]
    """Prompts, student and settings of sampling, by name: those of a run that takes the rollouts have to be the same."""
    scored_by: Mapping[str, str]
    """Fingerprints of the teachers behind `overlap` and `reverse_kl`."""
    seed: int
    prompts: int
    samples_per_prompt: int
    prompts_at_once: int
    digest: str | None = None
    """Of the whole rollouts.jsonl; None until all are drawn."""
    summary: Mapping[str, float] = field(default_factory=dict[str, float])
    """Means over the rollouts."""
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None where there is none. Raises CacheError for one that cannot be read."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("format") != FORMAT:
                raise CacheError(
                    f"'{path}' has format {content.get('format')}, and this version of opd reads {FORMAT}. {_again(folder)}"
                )
            return cls(**content)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            if isinstance(error, CacheError):
                raise
            raise CacheError(f"'{path}' cannot be read: {error}. {_again(folder)}") from error

    def text(self) -> str:
        """As the file holds it."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=1) + "\n"


def line_of(rollout: Rollout, sample: int, prompt_text: str, measured: Mapping[str, Any]) -> bytes:
    """A rollout as its line in the file: text for people, ids for training, and what was measured of it."""
    record = {
        "prompt_index": rollout.prompt.index,
        "sample": sample,
        "prompt": prompt_text,
        "answer": rollout.prompt.answer,
        "response": rollout.text,
        "finished": rollout.finished,
        "policy_version": rollout.policy_version,
        **measured,
        "prompt_ids": rollout.prompt_ids,
        "response_ids": rollout.response_ids,
        "sampler_logp": rollout.sampler_logp,
    }
    # A lone surrogate has no UTF-8 form; backslashreplace writes \udXXX, which is its JSON escape.
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class KeptRollouts:
    """A sampler that hands out what was drawn before training, whatever the student has become."""

    def __init__(
        self, folder: str | Path, prompts: Sequence[Prompt], drawn_from: Mapping[str, Any], samples_per_prompt: int
    ) -> None:
        """Raises CacheError for rollouts that are missing, damaged, or of something else than `drawn_from`."""
        self.folder = Path(folder)
        manifest = Manifest.read(self.folder)
        if manifest is None:
            raise CacheError(
                f"'{self.folder}' holds no rollouts, which rollout.source=cached trains on. {_first(self.folder)}"
            )
        check_same(self.folder, manifest, drawn_from)
        if manifest.digest is None:
            raise CacheError(
                f"Not all rollouts of '{self.folder}' are drawn: opd rollouts was stopped. Run it again, and it goes on where it stopped."
            )
        self.per_prompt = manifest.samples_per_prompt
        if samples_per_prompt > self.per_prompt:
            raise CacheError(
                f"train.samples_per_prompt={samples_per_prompt}, and '{self.folder}' holds {self.per_prompt} rollouts of every prompt. Lower it, "
                f"or draw more. {_again(self.folder)}"
            )
        self.digest = manifest.digest
        self._starts = self._read_starts(manifest, len(prompts))

    def _read_starts(self, manifest: Manifest, prompts: int) -> array[int]:
        """Where every line starts. Raises CacheError for a file that is not what was written."""
        path, digest, starts, position = self.folder / LINES, hashlib.sha256(), array("q"), 0
        try:
            with open(path, "rb") as file:
                for line in file:
                    starts.append(position)
                    digest.update(line)
                    position += len(line)
        except OSError as error:
            raise CacheError(f"'{path}' cannot be read: {error.strerror or error}. {_again(self.folder)}") from error
        if digest.hexdigest() != manifest.digest or len(starts) != prompts * self.per_prompt:
            raise CacheError(
                f"'{path}' is not what opd rollouts wrote: it was edited or cut short. {_again(self.folder)}"
            )
        return starts

    def load(self, student: SampledStudent) -> None:
        """Nothing to do: the rollouts are those of the first weights."""

    def limit(self, max_new_tokens: int) -> None:
        """Nothing to do: they were drawn with the recipe's own limit."""

    def sample(self, prompts: Sequence[Prompt], *, seed: int) -> list[Rollout]:
        """One kept rollout per prompt, in order, and another one for each sample of a prompt. Where more are kept than a step takes,
        the seed says which."""
        first, seen = random.Random(seed).randrange(self.per_prompt), Counter[int]()
        found = []
        with open(self.folder / LINES, "rb") as file:
            for prompt in prompts:
                sample = (first + seen[prompt.index]) % self.per_prompt
                seen[prompt.index] += 1
                found.append(self._rollout(file, prompt, sample))
        return found

    def _rollout(self, file: BinaryIO, prompt: Prompt, sample: int) -> Rollout:
        file.seek(self._starts[prompt.index * self.per_prompt + sample])
        record = json.loads(file.readline())
        if (record["prompt_index"], record["sample"]) != (prompt.index, sample):
            raise CacheError(f"'{self.folder / LINES}' changed while it was read. {_again(self.folder)}")
        logp = record["sampler_logp"]
        return Rollout(
            prompt=prompt,
            prompt_ids=tuple(record["prompt_ids"]),
            response_ids=tuple(record["response_ids"]),
            sampler_logp=None if logp is None else tuple(logp),
            finished=record["finished"],
            policy_version=record["policy_version"],
            text=record["response"],
        )


def check_same(folder: Path, manifest: Manifest, drawn_from: Mapping[str, Any]) -> None:
    """Raise CacheError where the rollouts were drawn from something else, with the names of what differs."""
    now = json.loads(json.dumps(dict(drawn_from)))
    kept = manifest.drawn_from
    names = [name for name in sorted({*now, *kept}) if kept.get(name) != now.get(name)]
    if not names:
        return
    shown = ", ".join(_difference(name, kept.get(name), now.get(name)) for name in names)
    raise CacheError(
        f"The rollouts in '{folder}' are not those of this recipe: {shown} differ. Use the recipe that they were drawn with, or another "
        f"folder. {_again(folder)}"
    )


def _difference(name: str, kept: Any, now: Any) -> str:
    return f"{name} ({kept!r} there, {now!r} here)" if "." in name else f"the {name}"


def whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of the file that end; the last one of a process that was killed may not."""
    with open(path, "rb") as file:
        yield from (line for line in file if line.endswith(b"\n"))


def keep_lines(path: Path, count: int) -> None:
    """Cut the file behind its first `count` lines."""
    if path.exists():
        os.truncate(path, sum(len(line) for line in islice(whole_lines(path), count)))


def _first(folder: Path) -> str:
    return f"Draw them first: opd rollouts RECIPE.yaml --out {folder}"


def _again(folder: Path) -> str:
    return f"To draw them anew: opd rollouts RECIPE.yaml --out {folder} --overwrite"
