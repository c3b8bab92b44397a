"""Hand every parser of foreign files spoiled inputs: an error in words, no code run, and bounded time and memory.

Each case is a command of the real command line in a process of its own, with a limit on its seconds and its memory.
`refused` is an exit code of 2, or 1 with a reason; a traceback, `fault in Headwater`, a signal, a limit that was met
and a file of which code ran are failures. A case is repeated by `--only PARSER --first N --n 1`.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from headwater.benchmarks.breaking import faults, fuzz_cases
from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.lib.serving import memory_of
from headwater.cli import entry as cli

SECONDS = 30  # of a processor
PATIENCE = 300  # seconds of the clock: others may use the machine, too
MEMORY = 2 << 30
FAILURES = ("traceback", "fault", "signal", "over time", "over memory", "code run")
OUTCOMES = ("read", "refused", *FAILURES)


@dataclass(frozen=True)
class Outcome:
    """What a case ended in: one of OUTCOMES, seconds, bytes above those of the parent, what it said."""

    kind: str
    seconds: float
    memory: int
    said: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a row a parser; return 1 if a case failed."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks fuzz", description=__doc__
    )
    parser.add_argument("--n", type=int, default=500, help="cases over all parsers (default 500)")
    parser.add_argument("--first", type=int, default=0, help="the first case's number (default 0)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all cases (default 0)")
    parser.add_argument("--only", choices=sorted(fuzz_cases.PARSERS), help="one parser")
    parser.add_argument("--jobs", type=int, default=2, help="cases at once (default 2)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results")
    options = parser.parse_args(arguments)
    if options.only:
        names = [options.only]
    else:
        names = list(fuzz_cases.PARSERS)
    each = -(-options.n // len(names))
    cases = [(name, options.first + i) for name in names for i in range(each)]
    with tempfile.TemporaryDirectory(prefix="hw-fuzz-") as folder:
        found = fuzz(Path(folder), cases, options.seed, options.jobs)
    rows = table(found)
    print(render(rows))
    if options.save:
        print(write_csv("fuzz", rows))
    if any(outcome.kind in FAILURES for _, _, outcome in found):
        return 1
    return 0


def fuzz(
    home: Path, cases: Sequence[tuple[str, int]], seed: int, jobs: int
) -> list[tuple[str, int, Outcome]]:
    """Run cases (parser, number), `jobs` at once; say each failure on standard error as it is met."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "HEADWATER_DEBUG": "1"}
    material = fuzz_cases.make_material(home / "material")

    def work(case: tuple[str, int]) -> tuple[str, int, Outcome]:
        name, number = case
        outcome = run_case(material, home, name, number, seed)
        if outcome.kind in FAILURES:
            print(f"{name} {number}: {outcome.kind}: {outcome.said[-1500:]}", file=sys.stderr)
        return name, number, outcome

    return faults.spread(list(cases), work, jobs)


def run_case(material: Path, home: Path, name: str, number: int, seed: int) -> Outcome:
    """Make one case in a folder of its own, run its command in a fork, and judge how it ended."""
    folder = home / f"{name}-{number}"
    shutil.copytree(material, folder, symlinks=True)
    try:
        command = fuzz_cases.PARSERS[name](folder, Random(f"{seed}/{name}/{number}"))
        return _judge(folder, command)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _judge(folder: Path, command: Callable[[], int] | list[str]) -> Outcome:
    said = folder / "said"
    before = memory_of(os.getpid())
    start = time.perf_counter()
    if not (child := os.fork()):
        _run_child(command, folder, said)
    _, status, used = os.wait4(child, 0)
    seconds = time.perf_counter() - start
    memory = used.ru_maxrss * 1024 - before
    if said.exists():
        text = said.read_text("utf-8", "replace")
    else:
        text = ""
    code = os.waitstatus_to_exitcode(status)
    return Outcome(_kind(code, text, memory, folder), seconds, max(memory, 0), text)


def _kind(code: int, text: str, memory: int, folder: Path) -> str:
    if (folder / fuzz_cases.MARK).exists():
        return "code run"
    if code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        return "over time"
    if memory > MEMORY or "the memory was not enough" in text:
        return "over memory"
    if code < 0:
        return "signal"
    if "fault in Headwater" in text:
        return "fault"
    if "panicked at" in text or code not in (0, 1, 2):
        return "traceback"
    if code:
        return "refused"
    return "read"


def _run_child(command: Callable[[], int] | list[str], folder: Path, said: Path) -> None:
    """Run a command with its limits and its output in a file, and end the process with its exit code."""
    try:
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        stream = os.fdopen(output, "w", encoding="utf-8", errors="backslashreplace")
        sys.stdout = sys.stderr = stream
        os.chdir(folder)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        # Processor time tells a loop from a busy machine; the alarm is for one that waits.
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        signal.alarm(PATIENCE)
        limit = memory_of(os.getpid(), "VmData") + MEMORY
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        if callable(command):
            code = command()
        else:
            code = cli.main(command)
    except SystemExit as stop:
        if isinstance(stop.code, int):
            code = stop.code
        else:
            code = 2
    except ValueError as error:
        print(error, file=sys.stderr)
        code = 2
    except Exception as error:
        print(cli.explain(error), file=sys.stderr)
        code = 1
    except BaseException as error:
        print(f"fault in Headwater: {type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def table(found: Sequence[tuple[str, int, Outcome]]) -> list[dict[str, object]]:
    """Return a row a parser and one for all: cases by outcome, the slowest and the largest."""
    rows = []
    for name in [*dict.fromkeys(name for name, _, _ in found), "all"]:
        outcomes = [o for parser, _, o in found if name in (parser, "all")]
        counts = Counter(o.kind for o in outcomes)
        rows.append(
            {
                "parser": name,
                "cases": len(outcomes),
                **{kind.replace(" ", "_"): counts[kind] for kind in OUTCOMES},
                "slowest_s": round(max(o.seconds for o in outcomes), 1),
                "largest_MB": max(o.memory for o in outcomes) >> 20,
            }
        )
    return rows


def render(rows: Sequence[dict[str, object]]) -> str:
    """Lay rows out in columns."""
    columns = list(rows[0])
    cells = [[str(c).replace("_", " ") for c in columns]]
    cells += [[str(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


if __name__ == "__main__":
    sys.exit(main())
