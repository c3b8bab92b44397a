"""The command line: its arguments, its commands, and what they print."""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command, as `headwater` does; return its exit code."""
    from headwater.cli.entry import main as run

    return run(arguments)
