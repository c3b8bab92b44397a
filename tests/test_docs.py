"""The scripts and snippets of the documentation run, on a run of the packaged model."""

from __future__ import annotations

import importlib.util
import json
import operator
import re
import subprocess
import sys
from pathlib import Path

import pytest

import headwater
from headwater.cli.entry import main

ROOT = Path(__file__).parents[1]


def load_script(name: str):
    """Import a script of the documentation, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


run_pages = load_script("run_pages")


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("demo") / "run"
    flags = [
        "--config",
        str(ROOT / "docs/demo.toml"),
        "--text",
        str(Path(json.__path__[0]) / "decoder.py"),
    ]
    assert (
        main(["extract", *flags, "--seq-len", "64", "--max-sequences", "6", "--out", str(run)]) == 0
    )
    return run


@pytest.mark.parametrize("script", ["read_xarray.py", "read_zarr.py", "read_tokens.py"])
def test_scripts_read_a_run_without_headwater(demo_run, script):
    code = (ROOT / "docs" / script).read_text("utf-8")
    assert "headwater" not in "".join(line for line in code.splitlines() if "import" in line)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "docs" / script), str(demo_run)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    assert len(done.stdout.splitlines()) >= 6 and "nan" not in done.stdout


def test_info_prints_a_snippet_that_works(demo_run, capsys):
    assert main(["info", str(demo_run)]) == 0
    printed = capsys.readouterr().out
    snippet = printed[printed.index("import xarray") :]
    lines = [line.strip() for line in snippet.splitlines()]
    names: dict = {}
    exec("\n".join([*lines[:-1], f"last = {lines[-1]}"]), names)
    assert names["last"].dims[0] == "depth"


def test_every_line_of_the_readme_runs_and_prints_what_it_says():
    page = (ROOT / "README.md").read_text("utf-8")
    assert len(page.split()) <= 600
    assert {block.language for block in run_pages.blocks(page)} == {"python", "sh"}
    assert run_pages.differences(page) == []


def test_every_line_of_python_about_interventions_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/interventions.md").read_text("utf-8")
    names: dict = {}
    for snippet in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(snippet, names)
    assert "direction" in names


def test_every_name_of_headwater_in_the_documents_is_there():
    texts = [
        path.read_text("utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    ]
    inline = {name for text in texts for name in re.findall(r"`headwater\.([a-z_.A-Z]+)\(", text)}
    assert inline >= {"stream", "capture"}
    for name in inline:
        assert callable(operator.attrgetter(name)(headwater)), name


def test_demo_toml_and_makefile_agree():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert "docs/demo.toml" in makefile and "docs/read_xarray.py" in makefile
    readme = (ROOT / "README.md").read_text("utf-8")
    assert re.search(r"make demo\n\. \.venv/bin/activate\nmake test", readme)
