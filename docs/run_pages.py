"""Run the code of documentation pages, and compare what it prints with what the page says. Run it from the root.

    python docs/run_pages.py [--write] PAGE.md …

The blocks of a page run in order, in one folder that holds the repository's LICENSE as a text to read: ```python blocks
share their names, ```sh blocks are commands. A ```text block behind one is its standard output; --write puts the real
one there. A block behind `<!-- not run -->` is left out. Numbers may differ by a few percent, for processors differ.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from headwater.cli.entry import main as command

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(
    r"(?P<skip><!-- not run[^>]*-->\n+)?```(?P<language>python|sh)\n(?P<code>.*?)```\n"
    r"(?:\n*```text\n(?P<output>.*?)```\n)?",
    re.DOTALL,
)
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")
RELATIVE, ABSOLUTE = 0.05, 0.02


@dataclass(frozen=True)
class Block:
    """A piece of code of a page; `output` is None where the page shows none, `span` where that stands."""

    language: str
    code: str
    output: str | None
    span: tuple[int, int]


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page that run."""
    found = [match for match in BLOCK.finditer(page) if not match["skip"]]
    return [Block(m["language"], m["code"], m["output"], m.span("output")) for m in found]


def same(said: str, printed: str) -> bool:
    """Say whether two outputs are alike but for small differences of their numbers and spaces."""
    if NUMBER.sub("#", said).split() != NUMBER.sub("#", printed).split():
        return False
    pairs = zip(NUMBER.findall(said), NUMBER.findall(printed), strict=True)
    for one, other in pairs:
        a, b = float(one.replace(",", "")), float(other.replace(",", ""))
        if abs(a - b) > ABSOLUTE + RELATIVE * abs(a):
            return False
    return True


def run_shell(code: str) -> str:
    """Run commands; those of headwater alone in this process, which spares the start of Python."""
    printed = ""
    for line in code.replace("\\\n", " ").strip().splitlines():
        if line.startswith("headwater ") and not re.search(r"[|<>;&$*]", line):
            shown = io.StringIO()
            with contextlib.redirect_stdout(shown):
                status = command(shlex.split(line, comments=True)[1:])
            printed += shown.getvalue()
            if status:
                raise RuntimeError(f"{line} ended with {status}")
            continue
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "PATH": path}
        )
        printed += done.stdout
        if done.returncode:
            raise RuntimeError(f"{line} ended with {done.returncode}: {done.stderr}")
    return printed


def run_python(code: str, names: dict[str, object]) -> str:
    """Run Python with the page's names."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code, "<page>", "exec"), names)
    return shown.getvalue()


def run_block(block: Block, names: dict[str, object]) -> str:
    """Run one block; return what it printed."""
    if block.language == "sh":
        return run_shell(block.code)
    return run_python(block.code, names)


@contextlib.contextmanager
def folder_with_text() -> Iterator[Path]:
    """Make a folder with LICENSE, the text that pages read, and work there."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(ROOT / "LICENSE", folder)
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def run_page(page: str) -> list[tuple[Block, str]]:
    """Run a page's blocks in a new folder; return each with what it printed."""
    names: dict[str, object] = {}
    printed = []
    with folder_with_text() as folder:
        for block in blocks(page):
            output = run_block(block, names)
            output = "\n".join(line.rstrip() for line in output.splitlines())
            output = output.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", "")
            printed.append((block, output.strip("\n") + "\n"))
    return printed


def differences(page: str) -> list[str]:
    """Run a page; return what it says wrongly."""
    return [
        f"{block.code}\nThe page says:\n{block.output}\nIt printed:\n{output}"
        for block, output in run_page(page)
        if block.output is not None and not same(block.output, output)
    ]


def rewritten(page: str) -> str:
    """Run a page; return it with what its code printed."""
    for block, output in reversed(run_page(page)):
        if block.output is not None:
            page = page[: block.span[0]] + output + page[block.span[1] :]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the real outputs into the pages")
    parser.add_argument("pages", nargs="+", type=Path, metavar="PAGE.md")
    options = parser.parse_args()
    for path in options.pages:
        page = path.read_text("utf-8")
        if options.write:
            path.write_text(rewritten(page), "utf-8")
            continue
        for difference in differences(page):
            print(f"{path}: {difference}")


if __name__ == "__main__":
    main()
