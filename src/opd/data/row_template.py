"""A Jinja template that is filled in with the columns of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.data.values import plain
from opd.errors import ConfigError, DataError


class RowTemplate:
    """One template of the recipe. It runs in Jinja's sandbox, and a column that a row lacks is an error."""

    def __init__(self, template: str, *, key: str, example: str) -> None:
        """`key` names the template in messages, `example` is a column of it. Raises ConfigError for a syntax error."""
        from jinja2 import StrictUndefined, TemplateSyntaxError
        from jinja2.sandbox import SandboxedEnvironment

        self.key = key
        environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            self._template = environment.from_string(template)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"{key} is not a Jinja template: {error}. Write fields of the row as {{{{ {example} }}}}."
            ) from error

    def filled(self, fields: Mapping[str, Any], place: str) -> str:
        """The text for one row. Raises DataError, which begins with `place`, for a row that lacks a field of the template."""
        try:
            return self._template.render(plain(dict(fields)))
        except Exception as error:  # somebody else's template: anything that Python can raise
            raise DataError(
                f"{self.key} cannot be filled in for {place}: {error}. The row has {', '.join(sorted(fields))}; add the field to every "
                "row, or guard it with {% if … is defined %}."
            ) from error
