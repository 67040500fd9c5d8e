"""`opd COMMAND …`: parses the command, imports only its module, and prints a user error as one line."""

from __future__ import annotations

import importlib
import os
import select
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from opd import __version__
from opd.errors import OpdError

GROUPS = {
    "before a run": {
        "demo": "run the whole method on this machine in minutes: opd demo [--overwrite] [--section.key value …]",
        "check": "all that can be said of a recipe before a model is loaded: opd check RECIPE.yaml [--section.key value …]",
        "doctor": "can this recipe work on this machine? opd doctor [RECIPE.yaml] [--json]; the verl plugin: opd doctor verl",
    },
    "train": {
        "train": "distil a student: opd train RECIPE.yaml [--resume | --overwrite] [--devices N] [--section.key value …]",
        "rollouts": "draw and score the student's rollouts once, to train on them: opd rollouts RECIPE.yaml --out DIR",
        "serve-teacher": "a frozen model for students on other machines: opd serve-teacher MODEL [--host HOST --port PORT …]",
        "verl": "try a verl config on this machine's CPU: opd verl smoke [--steps N] [--timeout S] <verl overrides>",
    },
    "look at runs": {
        "runs": "a table of the runs in a folder and below: opd runs [DIR] [--json]",
        "watch": "the report in the browser while the run goes on: opd watch RUN_DIR [--port PORT] [--open]",
        "report": "write report.html of a run folder again, also during the run: opd report RUN_DIR",
        "compare": "two runs or more, or seeds of one recipe, side by side: opd compare RUN RUN … [--out FILE] [--open]",
    },
    "use a model": {
        "eval": "reward, KL to a teacher and length, with intervals: opd eval MODEL|RUN --prompts FILE [--teacher MODEL|URL]",
        "sample": "answers of a model: opd sample MODEL|RUN (--prompt TEXT | --prompts FILE) [-n N] [--temperature X]",
        "score": "any text, token by token, as two models see it: opd score FILE --student MODEL --teacher MODEL|URL",
        "export": "a checkpoint as a Hugging Face folder: opd export RUN/checkpoints/step-N [--out DIR] [--merge]",
    },
    "this shell": {
        "completion": "a script that completes commands, options and keys of recipes: opd completion bash|zsh|fish",
    },
}
"""Commands by what a person wants, each with a line of help."""
COMMANDS = {name: text for group in GROUPS.values() for name, text in group.items()}
RUN_FLAGS = ("--resume", "--overwrite")
SIGNALLED = 128  # plus the signal's number: the shell's code for a process that a signal ended


def help_text() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(
        "\n".join([f"{title}:", *(f"  {name:<{width}}  {text}" for name, text in group.items()), ""])
        for title, group in GROUPS.items()
    )
    return (
        f"opd {__version__}: on-policy distillation of language models\n\nusage: opd COMMAND …\n\n{lines}\n"
        "opd COMMAND --help   all options of a command\n"
        "opd --version        the version\n"
        "--debug              with any command: show the traceback of an error\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0 is success, 1 an explained error, 2 a wrong command line, 3 a run that a rule of the section guard
    ended, and 128 + n an end by signal n. A pipe whose reader has
    gone (`opd train --help | head`) ends the command without a word, as SIGPIPE does.
    """
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _silence_unread_output():
            raise
        return SIGNALLED + signal.SIGPIPE
    return code


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        print(__version__)
        return 0
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        return _wrong_command(command)
    debug = "--debug" in rest
    rest = [a for a in rest if a != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its fork warning would break the progress display
    try:
        with _handling_signals():
            return importlib.import_module(f"opd.cli.{command.replace('-', '_')}").run(rest)
    except OpdError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        facts = getattr(stopped, "facts", None)
        if facts is None:  # outside a run there is nothing to resume
            print("interrupted", file=sys.stderr)
            return SIGNALLED + getattr(stopped, "signal_number", signal.SIGINT)
        print(f"{facts} {_next_command(command, rest, stopped)}", file=sys.stderr)
        return SIGNALLED + stopped.signal_number  # pyright: ignore[reportAttributeAccessIssue]  # a RunStopped


def _silence_unread_output() -> bool:
    """Send output that nobody reads any more to the null device; False when both streams still have a reader."""
    poll = select.poll()
    for descriptor in (1, 2):
        poll.register(descriptor, 0)
    unread = [descriptor for descriptor, event in poll.poll(0) if event & select.POLLERR]
    for descriptor in unread:  # or Python would fail once more as it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return bool(unread)


class _Ended(KeyboardInterrupt):
    """SIGTERM or SIGHUP outside a run, such as while models load."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal_number = number


def _end(number: int, _frame: FrameType | None) -> None:
    raise _Ended(number)


_end.gives_way = True  # to the handlers of a run


@contextmanager
def _handling_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP without another handler end a command as Ctrl-C does, with a message and their exit code."""
    mine = threading.current_thread() is threading.main_thread()
    taken = [n for n in (signal.SIGTERM, signal.SIGHUP) if mine and signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _next_command(command: str, words: Sequence[str], stopped: Any) -> str:
    """The command line that continues a stopped run."""
    flag = {"resume": ["--resume"], "overwrite": ["--overwrite"], "again": [w for w in words if w in RUN_FLAGS]}[
        stopped.next
    ]
    line = shlex.join(["opd", command, *(word for word in words if word not in RUN_FLAGS), *flag])
    return f"{'Continue with' if stopped.next == 'resume' else 'Start again with'}: {line}"


def _wrong_command(command: str) -> int:
    import difflib

    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    print(f"error: opd has no command '{command}'.{hint} Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
