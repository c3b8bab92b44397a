"""Scripts that let a shell complete commands and flags: bash, zsh and fish, with nothing but what the parsers hold."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

from headwater.cli.command import Command, Parser

SHELLS = ("bash", "zsh", "fish")
# The flags depend on the command alone; whatever is no flag may be a file.
BASH = """\
_headwater() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" flags=""
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{commands}" -- "$word"))
    return
  fi
  case "${{COMP_WORDS[1]}}" in
{cases}
  esac
  if [[ "$word" == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$word"))
  else
    COMPREPLY=($(compgen -f -- "$word"))
  fi
}}
complete -o filenames -F _headwater headwater
"""
# zsh reads completions of bash.
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def print_completion(shell: str, parsers: Mapping[Command, Parser]) -> None:
    """Print the script for a shell, which `source` or its folder of completions takes."""
    if shell == "fish":
        print("\n".join(_fish(parsers)))
        return
    cases = "\n".join(_cases(parsers))
    commands = " ".join(command.name for command in parsers)
    if shell == "zsh":
        print(ZSH, end="")
    print(BASH.format(commands=commands, cases=cases), end="")


def _cases(parsers: Mapping[Command, Parser]) -> Iterator[str]:
    for command, parser in parsers.items():
        flags = " ".join(flag for flag, _ in _flags(parser))
        yield f'    {command.name}) flags="{flags}" ;;'


def _fish(parsers: Mapping[Command, Parser]) -> Iterator[str]:
    for command, parser in parsers.items():
        yield f"complete -c headwater -n __fish_use_subcommand -a {command.name} -d {_quoted(command.summary)}"
        for flag, help in _flags(parser):
            where = _quoted(f"__fish_seen_subcommand_from {command.name}")
            yield f"complete -c headwater -n {where} -l {flag[2:]} -d {_quoted(help)}"


def _flags(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yield the long flags of a command with their help."""
    # The parser is the one place that knows the flags: those of requests come from fields, others from their module.
    for action in parser._actions:
        for flag in action.option_strings:
            if flag.startswith("--"):
                yield flag, action.help or ""


def _quoted(text: str) -> str:
    """Return a text as fish reads it, in single quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
