"""The code of the pages runs and prints what they say; the reference is what the code says; the site builds."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
RUN = (
    "tutorial.md",
    "howto/statistics.md",
    "howto/sae.md",
    "howto/massive.md",
    "howto/patch.md",
    "skills/headwater/SKILL.md",
)


def load_script(name):
    """Import a script of the documentation, which is in no package."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


run_pages = load_script("run_pages")


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_code_runs_and_prints_what_the_page_says(name):
    assert run_pages.differences((DOCS / name).read_text("utf-8")) == []


def test_outputs_that_differ_are_told_apart():
    assert run_pages.same("loss 4.42 of 14\n", "loss  4.43 of 14\n")
    assert not run_pages.same("loss 4.42 of 14\n", "loss 5.42 of 14\n")
    assert not run_pages.same("loss 4.42\n", "size 4.42\n")
    page = "```python\nprint(1 + 1)\n```\n\n```text\n7\n```\n"
    assert len(run_pages.differences(page)) == 1
    assert run_pages.differences(run_pages.rewritten(page)) == []


def test_what_is_not_run_says_so():
    page = "<!-- not run: needs a bucket -->\n```sh\nexit 1\n```\n"
    assert run_pages.blocks(page) == []


def test_the_reference_is_what_the_code_says():
    make_reference = load_script("make_reference")
    for name, make in make_reference.PAGES.items():
        page = (DOCS / "reference" / name).read_text("utf-8")
        assert page == make(), f"{name} is old: run python docs/make_reference.py"


def test_every_analysis_has_a_page_with_its_parts():
    from headwater.cli.entry import main

    pages = {path.stem for path in (DOCS / "analyses").glob("*.md")} - {"index"}
    listed = (DOCS / "reference/commands.md").read_text("utf-8")
    names = re.findall(r"^  ([a-z_]+) {2,}", listed.partition("analyses:\n")[2], re.MULTILINE)
    assert callable(main) and {"cosine", "sinks", "massive"} <= set(names)
    for name in names[: names.index("top") + 1]:
        assert name in pages, f"docs/analyses/{name}.md is missing"
    for name in pages:
        text = (DOCS / "analyses" / f"{name}.md").read_text("utf-8")
        for part in ("**Run it:**", "**Source:**", "## Definition", "## How to read it"):
            assert part in text, f"{name} lacks {part}"
        assert f"({name}.md)" in (DOCS / "analyses/index.md").read_text("utf-8")


def test_links_and_pictures_are_there():
    # In a build of the site mkdocs looks at them too; this needs nothing but the files.
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        DOCS / "llms.txt",
        *DOCS.rglob("*.md"),
    ):
        prose = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s#]+)[^)]*\)", prose):
            outside = target in ("index.md", "reference/format.md") and page.name == "llms.txt"
            if ":" not in target and not outside:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_skill_has_a_name_and_a_description():
    text = (DOCS / "skills/headwater/SKILL.md").read_text("utf-8")
    assert re.match(r"---\nname: headwater\ndescription: .{40,1024}\n---\n", text)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    index = json.loads((tmp_path / "search/search_index.json").read_text("utf-8"))
    titles = {entry["title"] for entry in index["docs"]}
    assert {"Headwater", "Commands", "Sites", "headwater.RunConfig"} <= titles
    assert (tmp_path / "llms.txt").is_file()
