"""The doctor's checks for a command line of verl: `opd verl smoke` begins with them, and `opd doctor verl WORDS` shows them alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from opd.doctor.check import Check, Number, failed, skipped
from opd.errors import OpdError

if TYPE_CHECKING:
    from opd.doctor.quick import Examined
    from opd.integrations.verl.dry_run.recipe import DoctorsRecipe

GIB = 1 << 30
CHEAP_WEIGHTS = 2 * GIB
"""Of all models together: what answers on a CPU in a minute."""
PROMPTS = 8
ANSWER_TOKENS = 128
"""Of an answer that is drawn here; longer ones are cut."""
OF_WEIGHTS = ("alignment", "stop mass", "start", "reward")
OF_BOTH = ("vocabulary", "template")
"""Checks that say more where the weights are here."""
NOT_VERLS = ("recipe", "memory", "reward")
"""Checks of `opd check` about a recipe's own keys, about one machine, and about a reward that verl does not call."""
ADAM_BYTES = 16
"""Per parameter of the student: float32 weights, gradients, and Adam's two moments."""
TEACHER_BYTES = 2
"""Per parameter, in bfloat16."""


def examine_words(words: Sequence[str]) -> list[Check]:
    """The checks of a command line of verl. An error in it is a red check."""
    from opd.integrations.verl.dry_run.compose import compose, read_words
    from opd.integrations.verl.dry_run.recipe import doctors_recipe
    from opd.integrations.verl.plugin.recipe_keys import as_override, in_verl_words

    try:
        config = compose(read_words(words))
        if config.get("opd") is None:
            return [skipped("files", "Without +opd=default this is verl's own training, and nothing is distilled.")]
        with tempfile.TemporaryDirectory(prefix="opd-doctor-") as folder:
            found = list(_checks(doctors_recipe(config, Path(folder))))
    except OpdError as error:
        return [failed("config", error)]
    return [
        replace(one, seen=in_verl_words(one.seen), why=in_verl_words(one.why), mend=as_override(one.mend))
        for one in found
    ]


def check_plugin() -> Check:
    """The check of `opd doctor verl`: whether verl loads the plugin, and has what it relies on."""
    from opd.integrations.verl.contract.doctor import ask

    code, said = ask()
    lines = tuple(line for line in said.splitlines() if line.strip())
    if code == 0:
        return Check(
            name="plugin", verdict="green", seen="verl loads the plugin, and has what it relies on.", details=lines
        )
    wrong = [line for line in lines if line.startswith(("FAIL", "error"))] or ["opd doctor verl ended with an error"]
    return Check(
        name="plugin",
        verdict="red",
        seen=f"{wrong[0].removeprefix('FAIL').strip()}.",
        why="verl hides a plugin that failed to load.",
        mend="opd doctor verl, which says what is wrong",
        details=lines,
    )


def _checks(recipe: DoctorsRecipe) -> Iterator[Check]:
    if recipe.settings is None:
        yield from _nothing_to_compare(recipe)
        return
    from opd.doctor.quick import examine

    quick = examine(recipe.settings)
    size = sum(shape.stored_bytes for shape in quick.shapes.values())
    has_weights = len(quick.shapes) > 0 and all(shape.stored_bytes for shape in quick.shapes.values())
    cheap = has_weights and size <= CHEAP_WEIGHTS
    yield _files(recipe, "weights, config and tokenizer" if cheap else "config and tokenizer alone")
    red = {one.name for one in quick.checks if one.verdict == "red"}
    full = [one for one in _with_weights(recipe) if one.name not in red] if cheap else []
    full = [one for one in full if _base(one) not in OF_BOTH or one.verdict != "skipped"]
    again = {one.name for one in full if _base(one) in OF_BOTH}
    yield from (one for one in quick.checks if one.name not in (*NOT_VERLS, *again))
    yield from _prompt_length(recipe, quick)
    yield from _memory(recipe, quick)
    if cheap:
        yield from full
        return
    reason = (
        f"The models' weights are {size / GIB:.1f} GiB, more than the {CHEAP_WEIGHTS / GIB:.0f} GiB that this looks at; opd doctor RECIPE "
        "looks at any."
        if has_weights
        else "The models' weights are not in a folder of this machine."
    )
    yield from (skipped(name, reason) for name in OF_WEIGHTS)


def _base(check: Check) -> str:
    return check.name.partition("/")[0]


def _nothing_to_compare(recipe: DoctorsRecipe) -> Iterator[Check]:
    reason = (
        f"Not on this machine: {'; '.join(recipe.absent)}."
        if recipe.absent
        else "opd.rl.distill_weight=0 asks no teacher."
    )
    yield from (skipped(name, reason) for name in ("files", *OF_BOTH, *OF_WEIGHTS))


def _files(recipe: DoctorsRecipe, what: str) -> Check:
    assert recipe.settings is not None
    models = ", ".join(f"{role} '{one.model}'" for role, one in recipe.settings.all_models.items() if one.model)
    prompts = (
        "the prompts are made-up sums, because data.train_files are not here"
        if recipe.made_up
        else "the prompts are yours"
    )
    left = f" Not looked at: {'; '.join(recipe.notes)}." if recipe.notes else ""
    return Check(name="files", verdict="green", seen=f"Read from your own files: {what} of {models}; {prompts}.{left}")


def _with_weights(recipe: DoctorsRecipe) -> list[Check]:
    """The checks of `opd doctor` that need the models' weights, with fewer and shorter answers."""
    from opd.config.whole import whole_config
    from opd.trainer.examine import examine

    assert recipe.settings is not None
    longest = recipe.settings.rollout.max_new_tokens
    tokens = min(longest, ANSWER_TOKENS)
    rollout = replace(recipe.settings.rollout, max_new_tokens=tokens)
    found = examine(whole_config(replace(recipe.settings, rollout=rollout)), prompts=PROMPTS)
    wanted = [one for one in found if _base(one) in (*OF_BOTH, *OF_WEIGHTS) or one.verdict == "red"]
    cut = f"Answers are cut at {tokens} of {longest} tokens here, so their lengths say nothing."
    theirs = "verl's reward is a function of its own, which the steps of opd verl smoke call."
    instead = {"start/task": theirs, "reward": theirs, **({"start/lengths": cut} if tokens < longest else {})}
    return [skipped(one.name, instead[one.name]) if one.name in instead else one for one in wanted]


def _prompt_length(recipe: DoctorsRecipe, quick: Examined) -> Iterator[Check]:
    longest, limit = quick.longest_prompt, recipe.max_prompt_tokens
    if longest is None or recipe.made_up:
        return
    numbers: dict[str, Number] = {"longest prompt": longest, "data.max_prompt_length": limit}
    if longest <= limit:
        yield Check(name="prompt length", verdict="green", seen="Every prompt has room.", numbers=numbers)
        return
    yield Check(
        name="prompt length",
        verdict="yellow",
        seen=f"The longest prompt has {longest} tokens, and data.max_prompt_length={limit}.",
        numbers=numbers,
        why="verl leaves such prompts out, cuts them, or ends with an error, as data.filter_overlong_prompts and data.truncation say.",
        mend=f"data.max_prompt_length={longest}",
    )


def _memory(recipe: DoctorsRecipe, quick: Examined) -> Iterator[Check]:
    """Of weights alone: activations and the cache of the rollouts are verl's to divide."""
    if "student" not in quick.shapes:
        return
    own = quick.shapes["student"].parameters
    teachers = sum(shape.parameters for role, shape in quick.shapes.items() if role != "student")
    numbers: dict[str, Number] = {
        "student GiB per GPU": ADAM_BYTES * own / recipe.workers / GIB,
        "teachers GiB per GPU": TEACHER_BYTES * teachers / recipe.workers / GIB,
    }
    seen = (
        f"Over {recipe.workers} GPUs, FSDP's shards of float32 weights, gradients and Adam's moments, and of bfloat16 teachers. Activations "
        "and the rollout engine come on top."
    )
    yield Check(name="memory", verdict="green", seen=seen, numbers=numbers)
