"""What a command of the command line is, and how a request's fields become its flags."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:  # numpy comes with it
    from headwater.extractor.settings import Option, Request

DONE = 0
FAILED = 1


class UsageError(ValueError):
    """The command line cannot be read."""


class Parser(ArgumentParser):
    """A parser that raises its errors."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and which help to read."""
        raise UsageError(f"{message.removeprefix('argument ')}. See `{self.prog} --help`.")


@dataclass(frozen=True)
class Command:
    """A command: its line in `headwater --help`, what adds its arguments, and what runs it and returns an exit code.

    `add` is called only for the command that is asked for, so that it may import what the help of others need not.
    """

    name: str
    summary: str
    add: Callable[[Parser], None]
    run: Callable[[Namespace], int]


def add_options(parser: Parser, request: type[Request], only: Collection[str] = ()) -> None:
    """Add the fields of a request as flags, each under the title of its part; `only` some of them where it is given.

    What is not given stays None, so that the request's own defaults hold.
    """
    from headwater.extractor.settings import options_of

    for option in options_of(request):
        if not only or option.name in only:
            _add(parser, option)


def part_of(parser: Parser, title: str) -> _ArgumentGroup:
    """Return the part of a help text with this title; a new one where there is none yet."""
    # argparse has no public way to ask for its groups.
    for group in parser._action_groups:
        if group.title == title:
            return group
    return parser.add_argument_group(title)


def number(text: str) -> int | str:
    """Read a whole number; leave anything else to the request, which refuses it in its own words."""
    try:
        return int(text)
    except ValueError:
        return text


def _add(parser: Parser, option: Option) -> None:
    # Nothing is checked here, and no default is set: the request does both, alike for Python, TOML and jobs.
    part = part_of(parser, option.part)
    kind = option.kind
    if kind.schema.get("type") == "boolean":
        part.add_argument(
            option.flag, dest=option.name, action="store_true", default=None, help=option.help
        )
        return
    more: dict[str, Any] = {}
    # What several values are given by: `--text a b` or `--edit x --edit y`.
    if kind.many == "words":
        more = {"nargs": "+", "action": "extend"}
    elif kind.many == "again":
        more = {"action": "append"}
    elif kind.schema.get("type") == "integer":
        more = {"type": number}
    part.add_argument(
        option.flag, dest=option.name, metavar=option.metavar, help=option.help, **more
    )
