"""How long Headwater takes to start: whole processes, from their start to their exit, in turn; medians.

`torch` and `python` say how much of it is torch's import and the interpreter's own.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from headwater.benchmarks.lib.measure import interleave, write_csv
from headwater.benchmarks.lib.rows import Row

GOALS = {"headwater --help": 0.25, "import headwater": 0.1, "extract": 3.0}
TEXT = "Water runs downhill, and the headwater is where it starts. " * 20


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the processes by name."""
    (folder / "text.txt").write_text(TEXT)
    headwater = [sys.executable, "-m", "headwater"]
    text = ["--model", "demo", "--text", str(folder / "text.txt")]
    return {
        "python": [sys.executable, "-c", ""],
        "torch": [sys.executable, "-c", "import torch"],
        "import headwater": [sys.executable, "-c", "import headwater"],
        "headwater --help": [*headwater, "--help"],
        "plan": [*headwater, "plan", *text],
        "extract": [*headwater, "extract", *text],
    }


def run(rounds: int, folder: Path) -> list[Row]:
    """Start every process once a round and return the rows of the results."""
    outs = iter(range(sys.maxsize))

    def start(name: str, command: Sequence[str]) -> None:
        if name == "extract":
            out = ["--out", str(folder / f"run-{next(outs)}")]
        else:
            out = []
        subprocess.run([*command, *out], check=True, capture_output=True)

    cases: dict[str, Callable[[], None]] = {
        name: partial(start, name, command) for name, command in commands(folder).items()
    }
    seconds = interleave(cases, rounds)
    return [
        {
            "case": name,
            "rounds": rounds,
            "seconds": round(statistics.median(of), 3),
            "goal": GOALS.get(name, ""),
        }
        for name, of in seconds.items()
    ]


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks start", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where to write the runs (default: a temporary folder)")
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = run(options.rounds, Path(folder))
    print(f"{'case':18}{'seconds':>9}{'goal':>7}")
    for row in rows:
        print(f"{row['case']:18}{row['seconds']:>9.3f}{row['goal']:>7}")
    if options.save:
        print(write_csv("start", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
