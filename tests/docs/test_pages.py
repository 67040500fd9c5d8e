"""The pages of the documentation: every command in them is run here, or its page says why not; links lead somewhere; the site builds."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from opd.testing import byte_tokenizer, save_model, tiny_causal_lm

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("docs/*.md"),
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "recipes/README.md",
        ROOT / "benchmarks/README.md",
        ROOT / "patches/PATCH_README.md",
        ROOT / "src/opd/integrations/verl/README.md",
    ]
)
GENERATED = {"keys.md"}
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES if page.name not in GENERATED]
COMMAND = re.compile(
    r"^\s*(?:[\w./-]*/)?(?:opd|make|pip|python3?|bash|git|vllm|torchrun)\s+[\w.'-]|^\s*[A-Z_]+=\S+ \S+", re.MULTILINE
)
FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<language>[\w{}-]*)[^\n]*\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"\]\((?!https?:|mailto:)([^()\s]+)\)")
TIMEOUT_S = 300
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@dataclass(frozen=True)
class Fence:
    mark: str
    language: str
    body: str

    @property
    def commands(self) -> bool:
        """A reader would type it."""
        return self.language in ("", "sh", "bash", "shell") and COMMAND.search(self.body) is not None


def fences(page: str) -> list[Fence]:
    return [
        Fence(match["mark"] or "", match["language"], match["body"])
        for match in FENCE.finditer((ROOT / page).read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize("page", NAMES)
def test_every_block_of_commands_is_run_or_says_why_not(page):
    for fence in fences(page):
        if fence.commands:
            assert re.match(r"run\b|not run: \S+ \S+", fence.mark), (
                f"{page}: no <!-- run --> or <!-- not run: reason -->:\n{fence.body}"
            )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with two chat models that share a vocabulary, and prompts with numbers as answers."""
    folder, tokenizer = tmp_path_factory.mktemp("pages"), byte_tokenizer(chat_template=TEMPLATE)
    for name, seed in (("my-student", 1), ("my-teacher", 2)):
        save_model(tiny_causal_lm(tokenizer, seed=seed, initializer_range=0.2), tokenizer, folder / name)
    for name in ("train", "test"):
        rows = [{"prompt": [{"role": "user", "content": f"What is {n} + 1?"}], "answer": str(n + 1)} for n in range(32)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("page", [name for name in NAMES if any(f.mark.startswith("run") for f in fences(name))])
def test_the_commands_of_the_page_work_in_order(page, models):
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
    }
    for fence in fences(page):
        if fence.mark.startswith("file: "):
            (models / fence.mark.removeprefix("file: ")).write_text(fence.body)
        if not fence.mark.startswith("run"):
            continue
        if fence.language == "python":
            (models / "snippet.py").write_text(fence.body)
            fence = Fence("run", "", "python snippet.py")
        allowed = {int(code) for code in fence.mark.removeprefix("run").lstrip(":").split()} or {0, 1}
        for line in commands_of(fence.body):
            codes = allowed if line.split()[:2] in (["opd", "check"], ["opd", "doctor"]) else {0}
            done = subprocess.run(
                shlex.split(line, comments=True),
                cwd=models,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
            )
            assert done.returncode in codes, f"{page}: {line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


def commands_of(body: str) -> list[str]:
    """Lines, of which those that end in a backslash go on."""
    return [
        line for line in body.replace("\\\n", " ").splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]


@pytest.mark.parametrize("page", NAMES)
def test_links_inside_the_repository_lead_somewhere(page):
    folder, text = (ROOT / page).parent, (ROOT / page).read_text(encoding="utf-8")
    missing = []
    for target in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        path, _, anchor = target.partition("#")
        file = (folder / path).resolve() if path else ROOT / page
        if not (file.exists() or file.name in GENERATED) or (
            anchor and file.suffix == ".md" and anchor not in anchors(file)
        ):
            missing.append(target)
    assert missing == []


def anchors(file: Path) -> set[str]:
    """GitHub's names of the headings, also of a file that the page includes."""
    text = file.read_text(encoding="utf-8")
    for included in re.findall(r"^```\{include\} (\S+)$", text, flags=re.MULTILINE):
        text += (file.parent / included).read_text(encoding="utf-8")
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def test_the_site_builds_without_a_warning_and_without_a_network(tmp_path):
    pytest.importorskip("sphinx")
    blocked = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    words = ["-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", str(ROOT / "docs"), str(tmp_path / "site")]
    environment = {**os.environ, **blocked, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    home = (tmp_path / "site" / "index.html").read_text()
    assert "on-policy distillation" in home and (tmp_path / "site" / "searchindex.js").exists()
    for page in ("losses", "recipes", "verl"):
        body = (tmp_path / "site" / f"{page}.html").read_text().partition("<article")[2]
        broken = [
            link
            for link in re.findall(r'href="(?!https?:|#|mailto:)([^"#]+)', body)
            if not (tmp_path / "site" / link).exists()
        ]
        assert broken == []


def test_the_readme_is_short_and_shows_pictures():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120
    assert sum(line.startswith("![") for line in lines) >= 2 and any(line.startswith("![") for line in lines[:25])
