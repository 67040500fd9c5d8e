"""`opd sample`: prints answers of a model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opd.cli.measured import MODEL_OPTIONS, sections
from opd.cli.named import KINDS, Named, named
from opd.cli.options import Command, Given, Option, read_one
from opd.errors import ConfigError, printable

if TYPE_CHECKING:
    from opd.config.run import RunSettings
    from opd.samplers.base import Sampling
    from opd.trainer.ask import Asked
    from opd.types import Prompt, Rollout

COMMAND = Command(
    usage="opd sample MODEL (--prompt TEXT | --prompts FILE) [-n N] [--temperature X] [--max-new-tokens N] [--json]",
    about=f"""Prints answers of a model, drawn as a run draws its rollouts. MODEL is {KINDS}.
A prompt is a message of the user where the model has a chat template. In a terminal a single answer appears as it is drawn. A run and a
recipe bring their system message, stop strings and length.""",
    options=(
        Option(name="--prompt", value="TEXT", help="one prompt; - reads it from standard input"),
        Option(name="--prompts", kind="path", value="FILE", help="many, in any format that a run reads"),
        Option(name="--limit", kind="count", help="use the first N prompts alone"),
        Option(name="--samples", short="-n", kind="count", help="answers to each prompt (1)"),
        Option(name="--temperature", kind="number", help="0 is greedy (1)"),
        Option(name="--top-p", kind="number", help="draw from the likeliest tokens that have this share (1)"),
        Option(name="--top-k", kind="count", lowest=0, help="draw from the K likeliest tokens; 0 is all (0)"),
        Option(name="--max-new-tokens", kind="count", help="tokens after which an answer is cut off (256)"),
        Option(name="--seed", kind="count", lowest=0, help="(0)"),
        Option(name="--system", value="TEXT", help="a system message"),
        Option(name="--plain", kind="flag", help="give --prompt to the model as it is, without a chat template"),
        Option(
            name="--show-prompt", kind="flag", help="print the prompt as the model reads it, special tokens included"
        ),
        *MODEL_OPTIONS[1:],
        Option(name="--json", kind="flag", help="print one JSON object a line, which opd score reads"),
    ),
    takes_recipe_keys=True,
)


def run(args: Sequence[str]) -> int:
    given = read_one(COMMAND, args, "model")
    if given is None:
        return 0
    if given.get("plain") and (given.get("system") is not None or given.get("prompts") is not None):
        raise ConfigError("--plain is about --prompt, and leaves no place for --system; drop one of them.")
    if (given.get("prompt") is None) == (given.get("prompts") is None):
        raise ConfigError(f"Give either --prompt TEXT or --prompts FILE: {COMMAND.usage}")
    subject = named(given.words[0])
    settings = settings_of(subject, given)
    sampling = sampling_of(settings, given)
    text = sys.stdin.read() if given.get("prompt") == "-" else given.get("prompt")
    if text is not None and not text.strip():
        raise ConfigError("The prompt on standard input is empty; write some text there.")
    prompts = _rows(settings, given) if text is None else None
    from transformers.utils.logging import disable_progress_bar

    from opd.reporting.loading import Loading
    from opd.trainer.ask import Asked

    disable_progress_bar()
    with Loading(stream=sys.stderr) as loading:
        asked = Asked(settings, subject.checkpoint, sampling, loading)
    if prompts is None:
        assert text is not None
        prompts = [_prompt(text, chat=asked.chats and not given.get("plain"))]
    _print(asked, prompts, given, settings.seed)
    return 0


def settings_of(subject: Named, given: Given) -> RunSettings:
    """The recipe that the model is loaded by. Raises OpdError before torch is imported."""
    from opd.config.recipe import check, merge
    from opd.folders import MODEL_FILES, check_folder

    words = sections(subject, given)
    path = given.get("prompts", "--prompt")
    overrides: dict[str, Any] = {"prompts.path": path, "prompts.eval_path": None, "eval.every": 0}
    if given.get("plain"):  # plain text has no place for a system message
        overrides["prompts.system"] = None
    elif given.get("system") is not None:
        overrides["prompts.system"] = given.get("system")
    settings = check(merge(words, overrides))
    check_folder("student", settings.student.model, MODEL_FILES)
    return settings


def sampling_of(settings: RunSettings, given: Given) -> Sampling:
    """How answers are drawn."""
    from opd.samplers.base import Sampling

    top_p = given.get("top_p", 1.0)
    if not 0 < top_p <= 1:
        raise ConfigError(f"--top-p takes a number above 0, up to 1, not '{top_p:g}'.")
    rollout = settings.rollout
    return Sampling(
        max_new_tokens=given.get("max_new_tokens", rollout.max_new_tokens),
        temperature=given.get("temperature", 1.0),
        top_p=top_p,
        top_k=given.get("top_k", 0),
        stop=rollout.stop,
    )


def _rows(settings: RunSettings, given: Given) -> list[Prompt]:
    from opd.data.prompts import load_prompts

    section = settings.prompts
    return load_prompts(section.path, **{**section.training(), "limit": given.get("limit")})


def _prompt(text: str, *, chat: bool) -> Prompt:
    from opd.types import Prompt

    return Prompt(index=0, messages=({"role": "user", "content": text},)) if chat else Prompt(index=0, text=text)


def _print(asked: Asked, prompts: Sequence[Prompt], given: Given, seed: int) -> None:
    """Draw and print. A single answer comes alone on standard output; several have a line about each before them."""
    count, as_json = given.get("samples", 1), bool(given.get("json"))
    alone = len(prompts) == count == 1 and not as_json
    if given.get("show_prompt") and alone:
        print(printable(asked.renderer.decode_all(asked.renderer.prompt_ids(prompts[0]))), file=sys.stderr)
    streams = alone and sys.stdout.isatty()
    rollouts = asked.answer(prompts, count, seed=seed, tell=_show if streams else None)
    for number, rollout in enumerate(rollouts):
        if as_json:
            print(json.dumps(row_of(asked, rollout), ensure_ascii=False))
        elif alone:
            print("" if streams else printable(rollout.text))
            print(_facts(rollout), file=sys.stderr)
        else:
            _print_one(asked, rollout, number % count, count, shows_prompt=bool(given.get("show_prompt")))


def _print_one(asked: Asked, rollout: Rollout, number: int, count: int, *, shows_prompt: bool) -> None:
    from opd.reporting.progress import quoted

    if number == 0:
        prompt = rollout.prompt
        text = prompt.text if prompt.text is not None else str(prompt.messages[-1]["content"])  # pyright: ignore[reportOptionalSubscript]
        shown = asked.renderer.decode_all(rollout.prompt_ids) if shows_prompt else text
        print(f"prompt {prompt.index}")
        print("\n".join(map(printable, quoted("", shown))))
    of = f" {number + 1} of {count}" if count > 1 else ""
    print(f"answer{of}: {_facts(rollout)}\n{printable(rollout.text)}\n")


def row_of(asked: Asked, rollout: Rollout) -> dict[str, Any]:
    """One answer as a row of prompt and response, with what is known of it."""
    prompt = rollout.prompt
    logp = rollout.sampler_logp
    return {
        "prompt": prompt.text if prompt.messages is None else [dict(message) for message in prompt.messages],
        "response": rollout.text,
        **({} if prompt.answer is None else {"answer": prompt.answer}),
        "index": prompt.index,
        "tokens": len(rollout.response_ids),
        "finished": rollout.finished,
        "mean_logp": None if not logp else sum(logp) / len(logp),
    }


def _facts(rollout: Rollout) -> str:
    tokens = len(rollout.response_ids)
    return f"{tokens:,} token{'s' if tokens != 1 else ''}{'' if rollout.finished else ', cut off'}"


def _show(piece: str) -> None:
    print(printable(piece), end="", flush=True)
