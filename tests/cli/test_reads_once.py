"""`opd train` shows the checks of `opd check` first, and the prompts that these have read are those that it trains on."""

from pathlib import Path

import pytest
import yaml

from opd.cli.main import main
from opd.config.recipe import merge
from opd.data import prompts as module
from worlds import make_world, settings


def test_each_file_of_prompts_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    make_world(tmp_path)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text((tmp_path / "prompts.jsonl").read_text())
    more = {"train__steps": 1, "eval__every": 1, "log__progress": "plain", "prompts__eval_path": str(held_out)}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(merge({}, settings(tmp_path, tmp_path / "run", **more))))
    read, original = [], module.read_rows

    def counting(path, *rest):
        read.append(Path(path).name)
        return original(path, *rest)

    monkeypatch.setattr(module, "read_rows", counting)
    assert main(["train", str(tmp_path / "recipe.yaml")]) == 0
    assert sorted(read) == ["held_out.jsonl", "prompts.jsonl"]
    assert "check     " in capsys.readouterr().out
