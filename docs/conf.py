"""Sphinx's settings of the documentation. `make docs` builds it; nothing is read from the network."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from tools import keys_page  # noqa: E402

import opd  # noqa: E402

project, author, copyright = "opd", "the authors of opd", "the authors of opd, Apache-2.0"
release = version = opd.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["images"]
html_theme, html_title = "furo", f"opd {release}"
html_static_path: list[str] = []
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
html_show_sourcelink = False
pygments_style, pygments_dark_style = "friendly", "github-dark"
myst_enable_extensions = ["deflist", "dollarmath", "colon_fence"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
python_maximum_signature_line_length = 90
nitpicky = False
suppress_warnings = [
    "misc.highlighting_failure"
]  # shell lines with placeholders and JSON with an ellipsis are no program

PAGES = {
    "README.md": "index",
    "recipes/README.md": "recipes",
    "src/opd/losses/README.md": "losses",
    "src/opd/kernels/README.md": "kernels",
    "src/opd/integrations/verl/README.md": "verl",
    "patches/PATCH_README.md": "patch",
    "benchmarks/README.md": "evidence",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
}
"""Files of the repository that are pages of the site, by their path."""
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^()\s]+)\)")


def linked(text: str, folder: Path) -> str:
    """The text of a file in `folder` with links that work in the site: pages and pictures; of other files the words alone stay."""

    def target(match: re.Match[str]) -> str:
        picture, words, path = match.groups()
        name, hash_, anchor = path.partition("#")
        file = (folder / name).resolve()
        relative = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else name
        if picture:
            return f"![{words}](/../{relative})"
        if relative in PAGES:
            return f"[{words}](/{PAGES[relative]}.md{hash_}{anchor})"
        if relative.startswith("docs/") and relative.endswith(".md"):
            return f"[{words}](/{relative.removeprefix('docs/')}{hash_}{anchor})"
        return words if words.startswith("`") else f"{words} (`{relative}`)"

    return LINK.sub(target, text)


def include_read(_app: Any, path: Path, _parent: str, content: list[str]) -> None:
    """Sphinx's event for a file that a page includes."""
    content[0] = linked(content[0], (HERE / path).resolve().parent if not path.is_absolute() else path.resolve().parent)


def source_read(_app: Any, _page: str, content: list[str]) -> None:
    """Sphinx's event for a page of this folder."""
    content[0] = linked(content[0], HERE)


def setup(app: Any) -> None:
    """Write the generated page, and follow includes."""
    (HERE / "keys.md").write_text(keys_page.page(), encoding="utf-8")
    app.connect("include-read", include_read)
    app.connect("source-read", source_read)
