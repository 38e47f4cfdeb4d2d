"""The README's code runs, in the order in which it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import workbench as wb
from workbench import zoo

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def apps(monkeypatch):
    """Close the apps that the README opens."""
    opened, begin = [], wb.Workbench.__init__

    def kept(app, *given, **named):
        opened.append(app)
        begin(app, *given, **named)

    monkeypatch.setattr(wb.Workbench, "__init__", kept)
    yield opened
    for app in opened:
        app.close()


def test_readme_runs_as_it_stands(tmp_path, monkeypatch, apps):
    pytest.importorskip("xarray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "settings", lambda _: {"num_inference_steps": 8, "guidance_scale": 3.0})
    text, names = README.read_text(encoding="utf-8"), {}
    found = list(BLOCK.finditer(text))
    assert len(found) >= 10
    for block in found:
        line = text[: block.start()].count("\n") + 2
        # Errors name the README's own lines.
        code = compile("\n" * (line - 1) + block.group(1), str(README), "exec")
        exec(code, names)
    assert len(apps) == 2
    assert (tmp_path / "experiment.py").is_file()
