"""`opd completion`: a script that lets a shell complete commands, options and the keys of recipes."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib import import_module

from opd.cli.options import Command, Option, read
from opd.errors import ConfigError, did_you_mean

SHELLS = ("bash", "zsh", "fish")
COMMAND = Command(
    usage="opd completion bash|zsh|fish",
    about="""Prints a script that completes commands, options, and keys of recipes. For this shell and those to come:

bash   echo 'source <(opd completion bash)' >> ~/.bashrc
zsh    echo 'source <(opd completion zsh)' >> ~/.zshrc        (after compinit)
fish   opd completion fish > ~/.config/fish/completions/opd.fish""",
)
WITHOUT_TABLE: Mapping[str, tuple[str, ...]] = {
    "train": ("--resume", "--overwrite", "--devices"),
    "demo": ("--resume", "--overwrite"),
    "rollouts": ("--out", "--overwrite"),
    "check": ("--gpu-memory",),
    "doctor": ("--json", "--prompts"),
    "compare": ("--out", "--open"),
    "watch": ("--port", "--open"),
    "report": (),
    "verl": ("--steps", "--timeout", "--try", "--no-doctor", "--json"),
}
"""Options of the commands that read their words by themselves, beside keys of a recipe."""
TAKE_KEYS = ("train", "demo", "rollouts", "check", "doctor")
ALL = ("--help", "--debug")


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print(COMMAND.help)
        return 0
    given = read(COMMAND, args)
    shell = given.words[0] if len(given.words) == 1 else ""
    if shell not in SHELLS:
        hint = did_you_mean(shell, SHELLS) if shell else ""
        raise ConfigError(f"Give one shell, {', '.join(SHELLS)}.{hint} Usage: {COMMAND.usage}")
    print({"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](), end="")
    return 0


def options_of(command: str) -> list[Option]:
    """The options of a command, the keys of a recipe left out."""
    if command == "serve-teacher":
        from opd.config.sections import all_keys
        from opd.config.serving import ServeConfig

        names = [f"--{key.replace('_', '-')}" for key in all_keys(ServeConfig) if key != "model"]
        return [Option(name=name, help="") for name in names]
    if command in WITHOUT_TABLE:
        return [Option(name=name, help="") for name in WITHOUT_TABLE[command]]
    return list(_table(command).options)


def takes_keys(command: str) -> bool:
    """`--section.key value` goes to a recipe."""
    if command in WITHOUT_TABLE or command == "serve-teacher":
        return command in TAKE_KEYS
    return _table(command).takes_recipe_keys


def _table(command: str) -> Command:
    return import_module(f"opd.cli.{command}").COMMAND


def _commands() -> dict[str, str]:
    from opd.cli.main import COMMANDS

    return {name: text.partition(": opd ")[0] for name, text in COMMANDS.items()}


def _keys() -> list[str]:
    from opd.config.recipe import whole_keys

    return [f"--{key}" for key in whole_keys() if ".NAME." not in key]


def _names(command: str) -> list[str]:
    own = [name for option in options_of(command) for name in (option.name, option.short) if name]
    return [*own, *ALL]


def _bash() -> str:
    cases = "\n".join(
        f'        {name}) names="{" ".join(_names(name))}{" $keys" if takes_keys(name) else ""}" ;;'
        for name in _commands()
    )
    return f"""_opd() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" names=""
    local keys="{" ".join(_keys())}"
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{" ".join(_commands())} --help --version" -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}}" in
{cases}
    esac
    if [ "${{COMP_WORDS[1]}}" = completion ]; then
        names="$names {" ".join(SHELLS)}"
    elif [[ "$word" != -* ]]; then
        return  # files, by the shell itself
    fi
    COMPREPLY=($(compgen -W "$names" -- "$word"))
}}
complete -o default -F _opd opd
"""


def _zsh() -> str:
    described = " ".join(shlex.quote(f"{name}:{text.replace(':', ',')}") for name, text in _commands().items())
    cases = "\n".join(
        f"        {name}) names=({' '.join(_names(name))}{' $keys' if takes_keys(name) else ''}) ;;"
        for name in _commands()
    )
    return f"""#compdef opd
_opd() {{
    local -a commands keys names
    commands=({described})
    keys=({" ".join(_keys())})
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    case $words[2] in
{cases}
    esac
    if [[ $words[2] == completion ]]; then
        compadd -- {" ".join(SHELLS)}
    elif [[ $PREFIX == -* ]]; then
        compadd -a names
    else
        _files
    fi
}}
if [[ $funcstack[1] == _opd ]]; then _opd "$@"; else compdef _opd opd; fi
"""


def _fish() -> str:
    lines = [
        f"complete -c opd -n __fish_use_subcommand -f -a {name} -d {_fish_text(text)}"
        for name, text in _commands().items()
    ]
    for name in _commands():
        seen = f"complete -c opd -n '__fish_seen_subcommand_from {name}'"
        for option in options_of(name):
            value = "" if option.kind == "flag" or name in WITHOUT_TABLE else " -r"
            short = f" -s {option.short.strip('-')}" if option.short else ""
            about = f" -d {_fish_text(option.help)}" if option.help else ""
            lines.append(f"{seen} -l {option.name.removeprefix('--')}{short}{value}{about}")
    taking = " ".join(name for name in _commands() if takes_keys(name))
    lines += [f"complete -c opd -n '__fish_seen_subcommand_from {taking}' -l {key[2:]} -r" for key in _keys()]
    lines.append(f"complete -c opd -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'")
    return "\n".join(lines) + "\n"


def _fish_text(text: str) -> str:
    """A text in single quotes, in which fish reads backslashes before quotes and backslashes alone."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
