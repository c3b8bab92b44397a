"""Write docs/reference from the code: commands, sites, and the names of the Python interface. Run it from the root.

    python docs/make_reference.py

A test compares the pages with what this would write.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from pathlib import Path

import headwater
import headwater.analysis
from headwater.cli.entry import main as command
from headwater.extractor.sites import PRESETS, SITES

REFERENCE = Path(__file__).parent / "reference"
LINKED = ("extractor", "store", "analysis", "benchmarks")
MADE = "<!-- made by docs/make_reference.py; do not edit -->\n"


def help_of(*arguments: str) -> str:
    """Return what a command prints for --help, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        command([*arguments, "--help"])
    return shown.getvalue().rstrip()


def command_names() -> list[str]:
    """Return the commands in the order of `headwater --help`."""
    listed = help_of().partition("COMMAND\n")[2].partition("\n\n")[0]
    return re.findall(r"^ {4}(\S+)", listed, re.MULTILINE)


def commands_page() -> str:
    parts = [MADE, "# Commands\n", f"```text\n{help_of()}\n```\n"]
    for name in command_names():
        parts += [f"## {name}\n", f"```text\n{help_of(name)}\n```\n"]
    return "\n".join(parts)


def sites_page() -> str:
    rows = [
        f"| `{site.name}` | {site.title} | {', '.join(site.dims)} | {site.dtype} | "
        f"{', '.join(name for name, sites in PRESETS.items() if site.name in sites) or '–'} |"
        for site in SITES.values()
    ]
    aliases = [f"| `{site.alias}` | `{site.name}` |" for site in SITES.values() if site.alias]
    return "\n".join(
        [
            MADE,
            "# Sites",
            "",
            "What can be captured, as `--sites` and `sites=` take it. The dtype is the stored one "
            "unless `--dtype` says otherwise.",
            "",
            "| site | what it is | dimensions | dtype | presets |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "## TransformerLens names",
            "",
            "These names are taken as well; `{}` stands for the layer.",
            "",
            "| TransformerLens | Headwater |",
            "|---|---|",
            *aliases,
            "",
        ]
    )


def directive(value: object) -> str:
    """Return the mkdocstrings line of a function or class where it is defined; what it says of itself otherwise."""
    if inspect.isclass(value) or inspect.isfunction(value):
        # mkdocstrings does not follow links, and headwater.store is one to the folder at the top.
        home = value.__module__
        if home.split(".")[1] in LINKED:
            home = home.removeprefix("headwater.")
        return f"::: {home}.{value.__qualname__}"
    return inspect.getdoc(value) or ""


def python_page() -> str:
    parts = [MADE, "# Python", "", "## headwater", ""]
    for name in headwater.__all__:
        value = getattr(headwater, name)
        if not name.startswith("__") and not inspect.ismodule(value):
            parts += [f"### headwater.{name}", "", directive(value), ""]
    parts += ["## headwater.analysis", ""]
    for name in headwater.analysis.__all__:
        value = getattr(headwater.analysis, name)
        if not inspect.ismodule(value):
            parts += [f"### headwater.analysis.{name}", "", directive(value), ""]
    return "\n".join(parts)


PAGES = {"commands.md": commands_page, "sites.md": sites_page, "python.md": python_page}


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (REFERENCE / name).write_text(make(), "utf-8")


if __name__ == "__main__":
    main()
