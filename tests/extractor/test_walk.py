"""There is one walk through a model's layers, and one kind of tap."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("extractor", "analysis", "benchmarks")


def calls(name):
    """Return the files that call a method of this name of something that is called model."""
    found = []
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    owner = ast.unparse(node.func.value)
                    if node.func.attr == name and owner.split(".")[-1] in ("model", "self"):
                        found.append(str(path.relative_to(ROOT)))
    return found


def test_one_loop_goes_over_the_layers():
    assert calls("layer") == ["extractor/model/walk.py"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_tap_is_of_any_type(folder):
    for path in (ROOT / folder).rglob("*.py"):
        text = path.read_text("utf-8")
        assert "tap: Any" not in text and "getattr(tap" not in text, path
