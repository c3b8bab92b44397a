"""Who may import whom, and what `import headwater` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    "kernels": set(),
    "store": set(),
    "extractor": {"kernels", "store"},
    "analysis": {"kernels", "store", "extractor"},
}
FORBIDDEN = {"store": {"torch", "ray", "triton"}, "kernels": {"ray", "zarr"}}


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_only_what_they_may(folder):
    for path in (ROOT / folder).rglob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[0] == "headwater" and len(parts) > 1 and parts[1] in {*ALLOWED, "cli", "commands", "benchmarks"}:
                assert parts[1] in ALLOWED[folder] | {folder}, f"{path.relative_to(ROOT)} imports {name}"
            assert parts[0] not in FORBIDDEN.get(folder, set()), f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(("package", "home"), [("ray", "extractor/ray_cluster.py"), ("obstore", "store/objects.py"),
                                               ("boto3", None)])
def test_an_optional_package_is_imported_in_one_module(package, home):
    found = {
        str(path.relative_to(ROOT))
        for folder in (*ALLOWED, "headwater")
        for path in (ROOT / folder).glob("*.py")
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert found <= {home}


def test_folders_have_no_init():
    """A top-level package named `kernels` would hide Hugging Face's from transformers."""
    assert not [folder for folder in (*ALLOWED, "benchmarks", "tests") if (ROOT / folder / "__init__.py").exists()]


def test_import_headwater_is_light():
    code = "import headwater, headwater.cli, sys; print(sorted({'torch', 'ray', 'zarr', 'xarray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
