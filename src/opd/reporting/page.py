"""Templates of assets/ → one HTML page with its styles and scripts in it, and a policy that allows these alone.

The policy names each inline style and script by its hash, so that nothing which slips into the page as text can run or load anything.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from opd.reporting.files import strict_json
from opd.reporting.tokens import DARK_SCALE, LIGHT_SCALE, scale_css

ASSETS = Path(__file__).parent / "assets"
POLICY = "<policy>"  # where the policy comes to stand; no escaped text holds it
ELSEWHERE = "base-uri 'none'; form-action 'none'"


def render_page(template: str, context: Mapping[str, Any], *, connect: str = "'none'") -> str:
    """A page from a template of assets/.

    In it `style(NAME, …)` and `script(NAME, …)` stand for an element with the content of these files; a file that is not there is left
    out. `| json` is for script elements of data, `| slug` for ids. `connect` is what the page may fetch from: `'none'`, or `'self'`.
    """
    inline = _Inline()
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"json": inline_json, "slug": slug}
    environment.globals |= {"style": inline.style, "script": inline.script, "policy": Markup(POLICY), "dots": Dots}
    page = environment.get_template(template).render(**context)
    return page.replace(POLICY, inline.policy(connect), 1)


class _Inline:
    """Styles and scripts of one page, with their hashes."""

    def __init__(self) -> None:
        self._hashes: dict[str, list[str]] = {"style": [], "script": []}

    def style(self, *names: str) -> Markup:
        scales = f":root{{{scale_css(LIGHT_SCALE)}}}@media screen{{[data-theme=dark]{{{scale_css(DARK_SCALE)}}}}}"
        return self._element("style", [scales, *map(_asset, names)])

    def script(self, *names: str) -> Markup:
        return self._element("script", [_asset(name) for name in names])

    def policy(self, connect: str) -> str:
        allowed = [f"{kind}-src {' '.join(hashes) or repr('none')}" for kind, hashes in self._hashes.items()]
        return "; ".join(["default-src 'none'", *allowed, f"connect-src {connect}", ELSEWHERE])

    def _element(self, kind: str, parts: Sequence[str]) -> Markup:
        text = "\n".join(filter(None, parts))
        if not text:
            return Markup("")
        assert f"</{kind}" not in text.lower(), "would close the element"
        digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
        self._hashes[kind].append(f"'sha256-{digest}'")
        return Markup(f"<{kind}>{text}</{kind}>")


class Dots:
    """Positions, in percent of the width, on an axis from 0 to a round number of percent that holds every value (shares in [0, 1])."""

    def __init__(self, values: Sequence[float]) -> None:
        most = max(values, default=0.0)
        self.end = next((end for end in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if most <= end), 1.0)
        self.ticks = [self.end * part / 4 for part in range(5)] if self.end in (0.02, 0.2, 1.0) else None
        self.ticks = self.ticks or [self.end * part / 5 for part in range(6)]

    def at(self, value: float) -> str:
        return f"{100 * min(max(value / self.end, 0.0), 1.0):.3f}%"

    def between(self, low: float, high: float) -> str:
        return f"{100 * (min(high / self.end, 1.0) - max(low / self.end, 0.0)):.3f}%"


def inline_json(value: Any) -> Markup:
    """JSON for a script element: "<" is escaped, so that no content can close the element."""
    return Markup(json.dumps(strict_json(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def slug(text: str) -> str:
    """Text as an id: "Top-k overlap" → "top-k-overlap"."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-") or "chart"


def _asset(name: str) -> str:
    path = ASSETS / name
    return path.read_text("utf-8") if path.exists() else ""
