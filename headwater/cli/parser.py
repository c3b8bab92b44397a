"""Read the command line: find the command, and its options with the arguments that its module adds."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from types import ModuleType

import headwater
from headwater.cli import (
    analyses,
    dynamics,
    extract,
    interventions,
    project,
    reproduce,
    runs,
    service,
    sites,
    studies,
)
from headwater.cli.command import Command, Parser, UsageError
from headwater.cli.completion import SHELLS, print_completion

# Each area has COMMANDS; the help lists them in this order.
AREAS: tuple[ModuleType, ...] = (
    extract,
    runs,
    sites,
    analyses,
    project,
    interventions,
    dynamics,
    studies,
    reproduce,
    service,
)
COMMANDS: dict[str, Command] = {one.name: one for area in AREAS for one in area.COMMANDS}
START = """start here:
  headwater extract --model demo --text README.md --out run --preset all
  headwater info run

`headwater COMMAND --help` explains a command. Results go to standard output, progress and errors to standard error.
Exit codes: 0 done; 1 failed while it ran, what was finished is kept; 2 wrong request, nothing was touched; 130 stopped.
"""


def read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command and its options; raise UsageError, or SystemExit after printing a help text."""
    names = ", ".join(COMMANDS)
    if not arguments:
        raise UsageError(f"a command is missing; expected one of {names}. See `headwater --help`.")
    first, *rest = arguments
    if first in COMMANDS:
        return _read_options(COMMANDS[first], rest)
    if first.startswith("-"):
        make_parser().parse_known_args(arguments)
        raise UsageError(f"{first!r} stands where a command is expected. See `headwater --help`.")
    raise UsageError(
        f"there is no command {first!r}{_near(first, COMMANDS)} Expected one of {names}. See `headwater --help`."
    )


def make_parser() -> Parser:
    """Build the parser that prints what commands there are, and the version."""
    parser = Parser(
        prog="headwater",
        usage="headwater COMMAND [arguments]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a GPT-2-family model over text and store what happens inside it as Zarr arrays.",
        epilog=START,
    )
    parser.add_argument("--version", action="version", version=f"headwater {headwater.__version__}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print the script that completes commands and flags in a shell",
    )
    group = parser.add_subparsers(title="commands", metavar="COMMAND", prog="headwater")
    group.required = False
    # Names and summaries alone. The arguments of every command would import numpy, and take a third of a second.
    for command in COMMANDS.values():
        group.add_parser(command.name, help=command.summary)
    return parser


class PrintCompletion(argparse.Action):
    """Print a completion script and end, as --help does."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        parsers = {command: make_command_parser(command) for command in COMMANDS.values()}
        print_completion(str(values), parsers)
        parser.exit()


def make_command_parser(command: Command) -> Parser:
    """Build the parser of one command."""
    parser = Parser(
        prog=f"headwater {command.name}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}.",
        # An abbreviation would change its meaning when a flag is added.
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(command=command)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    command.add(parser)
    return parser


def _read_options(command: Command, arguments: Sequence[str]) -> argparse.Namespace:
    parser = make_command_parser(command)
    options, unknown = parser.parse_known_args(_attach(arguments))
    if not unknown:
        return options
    # parse_known_args lets us name the nearest flag; argparse itself would only repeat the wrong one.
    flags = re.findall(r"--[a-z-]+", parser.format_usage() + parser.format_help())
    hint = ""
    if not unknown[0].startswith("-"):
        hint = " Lists are written with commas, such as --sites resid,pattern."
    raise UsageError(
        f"{unknown[0]!r} is not an argument of `{parser.prog}`{_near(unknown[0], flags)}{hint} See "
        f"`{parser.prog} --help`."
    )


def _near(word: str, words: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.partition("=")[0], list(words), 1)
    if not near:
        return "."
    return f"; did you mean {near[0]}?"


def _attach(arguments: Sequence[str]) -> list[str]:
    """Join a value such as `-2:` or `-1,0` to the flag before it, since argparse would take it for a flag."""
    joined: list[str] = []
    for argument in arguments:
        after_flag = bool(joined) and re.fullmatch(r"--[a-z-]+", joined[-1]) is not None
        if after_flag and re.fullmatch(r"-\d[\d:,-]*", argument):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined
