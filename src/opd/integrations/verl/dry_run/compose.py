"""verl's config as its main composes it from the words of a command line, and overrides that come after the user's own; without importing verl.

`python -m … WORDS` imports it, for what verl's main checks on the driver before Ray starts.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from opd.errors import ConfigError, MissingDependencyError
from opd.integrations.verl.plugin.settings import may_be_added, suggestion

DEFAULT_NAME = "ppo_trainer"
FLAGS = {
    "--config-name": "name",
    "-cn": "name",
    "--config-path": "path",
    "-cp": "path",
    "--config-dir": "dir",
    "-cd": "dir",
}
"""Hydra's own options that say which config it is."""


@dataclass(frozen=True, kw_only=True)
class Words:
    """A command line of verl's main, taken apart."""

    overrides: tuple[str, ...]
    name: str = DEFAULT_NAME
    path: str | None = None
    dir: str | None = None

    def flags(self) -> list[str]:
        """Hydra's options again."""
        given = {"--config-name": self.name, "--config-path": self.path, "--config-dir": self.dir}
        return [f"{flag}={value}" for flag, value in given.items() if value is not None]


def read_words(words: Sequence[str]) -> Words:
    """Raises ConfigError for a word that is neither an override nor an option about the config."""
    chosen: dict[str, str] = {}
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag in FLAGS:
            value = value if equals else next(rest, "")
            if not value:
                raise ConfigError(f"{flag} is without a value; write {flag}=VALUE.")
            chosen[FLAGS[flag]] = value
        elif word.startswith("-"):
            raise ConfigError(
                f"'{flag}' is no option here; options are {', '.join(FLAGS)}, and overrides are written key=value."
            )
        elif not equals and not word.startswith("~"):
            raise ConfigError(
                f"'{word}' is not an override; verl's are written key=value, as in data.train_batch_size=256."
            )
        else:
            overrides.append(word)
    return Words(overrides=tuple(overrides), **chosen)


def verl_folder() -> Path:
    """The package that `python -m verl` would run: a checkout in this folder comes before the installed one."""
    found = PathFinder.find_spec("verl", [os.getcwd(), *sys.path])
    if found is None or found.origin is None:
        raise MissingDependencyError("verl is not installed in this environment; pip install 'opd[verl]'.")
    return Path(found.origin).parent


def compose(words: Words, more: Sequence[str] = ()) -> DictConfig:
    """The config; ConfigError with the gist of Hydra's message when it cannot be made."""
    verls = verl_folder() / "trainer"
    places = [verls / (words.path or "config")]  # Hydra reads a relative one from the folder of the main
    if words.dir is not None:
        own = Path(words.dir).resolve()
        places.insert(0 if (own / f"{words.name}.yaml").exists() else 1, own)
    missing = next((place for place in places if not place.is_dir()), None)
    if missing is not None:
        raise ConfigError(f"{missing} is no folder; give --config-path and --config-dir absolute paths.")
    extra = [f"hydra.searchpath=[{','.join(f'file://{place}' for place in places[1:])}]"]
    try:
        with initialize_config_dir(str(places[0]), version_base=None):
            config = hydra_compose(words.name, [*words.overrides, *extra, *more])
        for _ in leaves(config):
            """Every interpolation is looked up."""
    except HydraException as error:
        raise ConfigError(_gist(error, words)) from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"verl's config: {_first_line(error)}.") from error
    return config


def leaves(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value; lists are values, and a key that must be given but is not is None."""
    for key in config:
        name = f"{prefix}{key}"
        if OmegaConf.is_missing(config, key):
            yield name, None
            continue
        value = config[key]
        if isinstance(value, DictConfig) and len(value):
            yield from leaves(value, f"{name}.")
        else:
            yield name, OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def literal(value: Any) -> str:
    """A value as Hydra's grammar for overrides wants it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(literal, value))}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{literal(item)}" for key, item in value.items()) + "}"
    return "'" + str(value).replace("'", "\\'") + "'"


def _gist(error: HydraException, words: Words) -> str:
    said = _first_line(error)
    key = said.partition("Could not override '")[2].partition("'")[0]
    if not key:
        near = str(error).partition("Available options in ")[2].partition("\nConfig search path")[0].split()
        return f"verl's config: {said}." + (f" There is {', '.join(near[1:])}." if near else "")
    if key.startswith("opd.") and not any(word.lstrip("+").startswith("opd=") for word in words.overrides):
        return f"verl's config has no key '{key}', because the section opd is not there; add +opd=default."
    add = f"verl's config has no key '{key}'; write +{key}=… if it is to be added."
    if may_be_added(key):
        return add
    if key.startswith("opd."):
        near = suggestion(key)
        hint = f"did you mean {near}?" if near else "opd/integrations/verl/README.md has a table of its keys."
        return f"verl's config has no key '{key}'; {hint}"
    with initialize_config_dir(str(verl_folder() / "trainer" / "config"), version_base=None):
        known = [name for name, _ in leaves(hydra_compose(DEFAULT_NAME, ["+opd=default"]))]
    if key in known:
        return f"verl's config has no key '{key}' with this model_engine; it is there with FSDP (model_engine=dp)."
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    return f"verl's config has no key '{key}'; did you mean '{near[0]}'?" if near else add


def _first_line(error: Exception) -> str:
    return next(line for line in str(error).splitlines() if line.strip()).strip().rstrip(".")


ACTOR, ROLLOUT, REF, MODEL = (f"actor_rollout_ref.{name}" for name in ("actor", "rollout", "ref", "model"))


@dataclass
class ConfigOverrides:
    """Changes to a user's config."""

    config: DictConfig
    values: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    """(setting, in the user's config, here)."""

    def has(self, key: str) -> bool:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(self.config, parent) if parent else self.config
        return isinstance(node, DictConfig) and name in node

    def get(self, key: str) -> Any:
        """The user's value; None for a key that is not there."""
        return OmegaConf.select(self.config, key, throw_on_missing=False)

    def set(self, key: str, value: Any) -> None:
        self.values[key] = value

    def row(self, setting: str, own: Any, here: Any) -> None:
        self.rows.append((setting, str(own), str(here)))

    def overrides(self) -> list[str]:
        """In Hydra's form, without those that the user's config has anyway."""
        found = []
        for key, value in self.values.items():
            parent, _, name = key.rpartition(".")
            node, own = OmegaConf.select(self.config, parent), self.get(key)
            open_ = not self.has(key) or OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name)
            if open_ or own != value or type(own) is not type(value):
                found.append(f"++{key}={literal(value)}")
        return found


def has_critic(config: DictConfig) -> bool:
    enabled = config.critic.enable
    return bool(enabled) if enabled is not None else config.algorithm.adv_estimator == "gae"


def main(words: Sequence[str]) -> None:
    """verl's checks of the sizes that the user wrote. Raises what verl raises, or returns."""
    config = compose(read_words(words))
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    validate_config(config, need_reference_policy(config), need_critic(config))


if __name__ == "__main__":
    main(sys.argv[1:])
