"""`opd export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from opd.cli.named import CHECKPOINTS, Named, checkpoints_in, named
from opd.cli.options import Command, Option, read_one
from opd.cli.places import new_folder
from opd.errors import ConfigError, ModelError

DTYPES = ("auto", "float32", "bfloat16", "float16")
COMMAND = Command(
    usage="opd export RUN/checkpoints/step-N [--out DIR] [--merge] [--dtype DTYPE]",
    about="""Writes the student of a checkpoint as a Hugging Face folder: weights, config, tokenizer, generation config, chat template. Of a run
folder the newest checkpoint is taken. The run may still go on; it needs no GPU.""",
    options=(
        Option(name="--out", kind="path", value="DIR", help="a folder that is new or empty (RUN/exported/step-N)"),
        Option(name="--merge", kind="flag", help="of a LoRA run, the merged model in DIR as well as DIR/adapter"),
        Option(
            name="--dtype", value="DTYPE", help=f"{', '.join(DTYPES)}; auto is that of the model the run began with"
        ),
    ),
)


def run(args: Sequence[str]) -> int:
    given = read_one(COMMAND, args, "checkpoint")
    if given is None:
        return 0
    dtype = given.get("dtype", "auto")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype takes {', '.join(DTYPES)}, not '{dtype}'.")
    subject = _newest(named(given.words[0]))
    assert subject.checkpoint is not None and subject.run is not None and subject.recipe is not None
    out = new_folder(given.get("out") or str(subject.run / "exported" / subject.checkpoint.name))
    from opd.config.recipe import check
    from opd.folders import MODEL_FILES, check_folder

    settings = check(subject.recipe)
    check_folder("student", settings.student.model, MODEL_FILES)
    if given.get("merge") and settings.student.lora is None:
        raise ConfigError("--merge is about adapters, and this run trained all weights; drop it.")
    from transformers.utils.logging import disable_progress_bar

    from opd.reporting.loading import Loading
    from opd.trainer.export import export_student

    disable_progress_bar()
    merge = bool(given.get("merge"))
    with Loading(stream=sys.stderr) as loading:
        written = export_student(settings, subject.checkpoint, out, merge=merge, dtype=dtype, loading=loading)
    for place in written:
        print(place)
    print(f"try it: {shlex.join(['opd', 'sample', str(written[0]), '--prompt', '…'])}", file=sys.stderr)
    return 0


def _newest(subject: Named) -> Named:
    """The checkpoint, or of a run the newest one. Raises ModelError for anything else."""
    if subject.checkpoint is not None:
        return subject
    if subject.run is None:
        raise ModelError(
            f"'{subject.name}' is no checkpoint of a run: it can be loaded as it is. Give RUN/checkpoints/step-N."
        )
    found = checkpoints_in(Path(subject.run) / CHECKPOINTS)
    if not found:
        raise ModelError(
            f"The run '{subject.name}' has no checkpoint. Its trained student is a Hugging Face folder already: {subject.model}"
        )
    return replace(subject, checkpoint=found[-1])
