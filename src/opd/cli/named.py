"""The model that a command line names: a folder, a hub name, a run, one of its checkpoints, or a recipe. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from opd.errors import ConfigError, ModelError, RunFolderError
from opd.folders import MODEL_FILES, is_path
from opd.reporting.files import CONFIG_FILE, METRICS_FILE, STATE_FILE

RECIPES = (".yaml", ".yml")
WEIGHTS, PARTS = "weights.safetensors", "parts"  # of a checkpoint, whole or divided
CHECKPOINTS = "checkpoints"
KINDS = "a model's folder or hub name, a run folder, a checkpoint in RUN/checkpoints, or a recipe"


@dataclass(frozen=True, kw_only=True)
class Named:
    """A model, and the recipe that comes with it."""

    name: str
    """As it was given."""
    model: str
    """Folder or hub name to load: of a checkpoint, the student that the run began with."""
    recipe: Mapping[str, Any] | None = None
    """Of a run or a recipe: its sections, which nothing has checked yet."""
    checkpoint: Path | None = None
    """Trained weights to put into `model`."""
    run: Path | None = None
    trained: bool = False
    """`model` is the finished student of `run`."""


def named(name: str) -> Named:
    """Find out what `name` is. Raises ModelError for a name that is nothing, RunFolderError for a run that has no weights yet."""
    place = Path(name)
    if name.endswith(RECIPES):
        return _recipe(name)
    if place.is_file():
        raise ModelError(f"'{name}' is a file. Give {KINDS}.")
    if not place.is_dir():
        if is_path(name):
            raise ModelError(f"There is no folder '{name}'.{_near(place)} Give {KINDS}.")
        return Named(name=name, model=name)
    if any((place / name).exists() for name in (WEIGHTS, PARTS)) and (place / STATE_FILE).is_file():
        return _checkpoint(name, place)
    if any((place / file).is_file() for file in MODEL_FILES):
        return Named(name=name, model=name)
    if (place / CONFIG_FILE).is_file():
        return _run(name, place)
    if place.name == CHECKPOINTS and (found := checkpoints_in(place)):
        raise ModelError(f"'{name}' holds {len(found)} checkpoints; name one of them, the newest is {found[-1]}.")
    if (place / METRICS_FILE).is_file():
        raise RunFolderError(
            f"The run '{name}' has no {CONFIG_FILE}, so what it trained cannot be told. Restore that file, or give {place / 'student'}."
        )
    raise ModelError(f"'{name}' holds none of {', '.join(MODEL_FILES)} and {CONFIG_FILE}. Give {KINDS}.")


def checkpoints_in(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(place for place in folder.glob("step-*") if (place / STATE_FILE).is_file())


def recipe_of(run: Path) -> dict[str, Any]:
    """The recipe that a run was started with. Raises ConfigError where it cannot be read."""
    from opd.config.recipe import without_idle_defaults
    from opd.config.words import read_recipe

    return dict(without_idle_defaults(read_recipe(run / CONFIG_FILE)))


def student_of(recipe: Mapping[str, Any], where: str) -> str:
    """The student that a recipe starts from. Raises ConfigError for a recipe without one."""
    section = recipe.get("student")
    model = section.get("model") if isinstance(section, Mapping) else None
    if not isinstance(model, str) or not model:
        raise ConfigError(f"'{where}' names no student; set student.model in it.")
    return model


def _recipe(name: str) -> Named:
    from opd.config.words import read_recipe

    recipe = read_recipe(name)
    return Named(name=name, model=student_of(recipe, name), recipe=recipe)


def _checkpoint(name: str, place: Path) -> Named:
    run = place.resolve().parents[1]
    if not (run / CONFIG_FILE).is_file():
        raise RunFolderError(
            f"The checkpoint '{name}' holds weights alone, and there is no {CONFIG_FILE} in '{run}' that says of what. Keep it in "
            "RUN/checkpoints, beside the RUN/config.yaml that training wrote."
        )
    run = place.parent.parent if place.parent.name == CHECKPOINTS else run
    recipe = recipe_of(run)
    return Named(name=name, model=student_of(recipe, str(run / CONFIG_FILE)), recipe=recipe, checkpoint=place, run=run)


def _run(name: str, place: Path) -> Named:
    recipe = recipe_of(place)
    first = student_of(recipe, str(place / CONFIG_FILE))
    student = place / "student"
    if (student / "config.json").is_file():
        return Named(name=name, model=str(student), recipe=recipe, run=place, trained=True)
    found = checkpoints_in(place / CHECKPOINTS)
    if not found:
        raise RunFolderError(
            f"The run '{name}' has no student/ and no checkpoint yet. Wait for its first checkpoint, or give the student that it began "
            f"with: {first}."
        )
    return Named(name=name, model=first, recipe=recipe, checkpoint=found[-1], run=place)


def _near(place: Path) -> str:
    neighbours = [entry.name for entry in place.parent.iterdir()] if place.parent.is_dir() else []
    near = get_close_matches(place.name, neighbours, n=1)
    return f" Did you mean '{place.parent / near[0]}'?" if near else ""
