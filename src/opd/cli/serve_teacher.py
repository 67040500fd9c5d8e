"""`opd serve-teacher`: puts a frozen model behind HTTP."""

from __future__ import annotations

from collections.abc import Sequence

from opd.config.recipe import merge, parse_overrides
from opd.config.sections import parse_section
from opd.config.serving import ServeConfig
from opd.errors import ConfigError, MissingDependencyError

USAGE = "opd serve-teacher MODEL [--host HOST] [--port PORT] [--dtype DTYPE] [--device DEVICE] [--token-env NAME] [--max-tokens N] …"


def run(args: Sequence[str]) -> int:
    if "-h" in args or "--help" in args:
        print_help()
        return 0
    if not args or args[0].startswith("--"):
        raise ConfigError(f"Name the model to serve: {USAGE}")
    config = parse_section(ServeConfig, merge({"model": args[0]}, parse_overrides(args[1:])))
    try:
        from opd.serving.run import serve
    except ImportError as error:
        if error.name not in ("fastapi", "uvicorn", "prometheus_client", "starlette"):
            raise
        raise MissingDependencyError(f"opd serve-teacher needs {error.name}: pip install 'opd[serve]'.") from None
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return serve(config, lambda line: print(line, flush=True))


def print_help() -> None:
    """Print every option with its default, as tyro renders the dataclass."""
    import tyro

    shown = ServeConfig(model="-")
    object.__setattr__(shown, "model", tyro.MISSING)
    try:
        tyro.cli(ServeConfig, prog="opd serve-teacher MODEL", default=shown, args=["--help"])
    except SystemExit as ended:
        if ended.code:  # the reader of a pipe has gone
            raise
