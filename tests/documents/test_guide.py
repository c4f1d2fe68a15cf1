"""Every code block of the guide runs, in order, on a real model."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guide"
# What a page must have printed for its code to have done its work.
PRINTED = {
    "measured": "calibrated: 16 samples",
    "measuring": "1 results of 2 packages",
    "running": "dB",
}


@pytest.mark.parametrize("page", sorted(GUIDE.glob("*.md")), ids=lambda page: page.stem)
def test_the_code_of_a_page_runs(page, crepe_tiny, tmp_path, monkeypatch, capsys):
    shutil.copytree(crepe_tiny, tmp_path / "model.mlpackage")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, names)
    assert PRINTED.get(page.stem, "verified") in capsys.readouterr().out
