"""Break Headwater in every way that has a trial, and print what held: kills, faults, power, flips, fuzz, load.

`--scale 1` takes some half an hour on two cores; `--save` writes results and the tables of docs/reliability.md.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headwater.benchmarks import bench_fuzz, bench_serve
from headwater.benchmarks.breaking import faults, flips, fuzz_cases, kill
from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.page import put_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
Row = Row


@dataclass(frozen=True)
class Scale:
    """How much is tried; `share` of the full number, at least one of each."""

    share: float
    seed: int
    jobs: int

    def of(self, full: int) -> int:
        return max(round(full * self.share), 1)

    def stride(self, full: int) -> int:
        return max(round(full / self.share), 1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials that are named, or all; return 1 if anything was silently wrong or a parser failed."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks faults", description=__doc__
    )
    parser.add_argument("--only", nargs="+", choices=TRIALS, default=list(TRIALS))
    parser.add_argument("--scale", type=float, default=1.0, help="a share of every number tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes at once (default 2)")
    parser.add_argument("--save", action="store_true", help="write the results and the page")
    options = parser.parse_args(arguments)
    scale = Scale(options.scale, options.seed, options.jobs)
    failed = False
    for name in options.only:
        start = time.perf_counter()
        # A fork keeps what a trial changes in its process (its process number, its hooks) from the next.
        rows: list[Row] = faults.spread([name], lambda name: TRIALS[name](scale), 1)[0]
        print(
            f"\n{name}, {time.perf_counter() - start:.0f} s\n{bench_fuzz.render(rows)}", flush=True
        )
        failed |= any(row.get(column) for row in rows for column in BAD)
        if options.save:
            print(write_csv(f"faults_{name}", rows))
            write_page(name, rows, PAGE)
    if failed:
        return 1
    return 0


BAD = (
    "silently_wrong",
    "unclear",
    "missed",
    *(kind.replace(" ", "_") for kind in bench_fuzz.FAILURES),
)


def try_kills(scale: Scale) -> list[Row]:
    """Kill extracting processes with signal 9 at random moments and go on."""
    with tempfile.TemporaryDirectory() as folder:
        found, _ = kill.kill_and_resume(Path(folder), scale.of(200), scale.seed, n_lines=96)
    return [
        {
            "trial": "kill -9 of `headwater extract`",
            "tried": found["killed"],
            "ended_in_equal_bytes": f"{found['runs finished']} of {found['runs finished']} runs",
            "silently_wrong": found["wrong"],
        }
    ]


def try_disk(scale: Scale) -> list[Row]:
    """End or fail each disk operation, and lose power."""
    rows = []
    for title, *flags in (
        ("a crash or an error at a disk operation", "--stride", str(scale.stride(5))),
        ("power lost", "--power", "--stride", str(scale.stride(20))),
    ):
        command = [
            sys.executable,
            "-m",
            "headwater.benchmarks.breaking.crash",
            "--jobs",
            str(scale.jobs),
            *flags,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        found: Counter[str] = Counter()
        for part in done.stdout.rpartition(",")[0].split(", "):
            n, _, what = part.partition(" ")
            found[what] += int(n)
        tried = sum(n for what, n in found.items() if what not in ("operations", "events"))
        rows.append(
            {
                "trial": title,
                "tried": tried,
                "ended_in_equal_bytes": sum(
                    n for w, n in found.items() if "resumed" in w or "no harm" in w
                ),
                "silently_wrong": found["wrong"],
            }
        )
    return rows


def try_flips(scale: Scale) -> list[Row]:
    """Damage files of a run; a row a kind of file and damage, with what each reader made of it."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    found = flips.run(scale.of(400), scale.seed)
    for (kind, reader), outcomes in found.items():
        for place in ((kind.partition(":")[0], reader), ("all", reader)):
            counts.setdefault(place, Counter()).update(outcomes)
    readers = list(dict.fromkeys(reader for _, reader in counts))
    rows = []
    for kind in [*sorted({k for k, _ in counts} - {"all"}), "all"]:
        outcomes = sum((counts[kind, reader] for reader in readers), Counter())
        cases = sum(counts[kind, readers[0]].values())
        told = {r: f"{counts[kind, r]['same']} / {counts[kind, r]['refused']}" for r in readers}
        unclear = sum(n for what, n in outcomes.items() if what.startswith("unclear"))
        bad = {"silently_wrong": outcomes["wrong"], "unclear": unclear}
        rows.append({"file": kind, "damaged": cases, **told, **bad})
    return rows


def try_fuzz(scale: Scale) -> list[Row]:
    """Hand spoiled inputs to every parser."""
    names = list(fuzz_cases.PARSERS)
    each = -(-scale.of(5000) // len(names))
    cases = [(name, i) for name in names for i in range(each)]
    with tempfile.TemporaryDirectory(prefix="hw-fuzz-") as folder:
        return bench_fuzz.table(bench_fuzz.fuzz(Path(folder), cases, scale.seed, scale.jobs))


def try_load(scale: Scale) -> list[Row]:
    """Hold connections that send nothing and answers that nobody reads, beside a client that asks."""
    options = argparse.Namespace(idle=scale.of(500), slow=scale.of(60), seed=scale.seed)
    with tempfile.TemporaryDirectory() as folder:
        found = bench_serve.bear_load(Path(folder), options)
    return [{"missed" if name == "wrong" else name: value for name, value in found.items()}]


def write_page(name: str, rows: Sequence[Row], page: Path) -> None:
    """Put a table into its place in the documentation."""
    put_table(page, name, markdown(rows))


def markdown(rows: Sequence[Row]) -> str:
    """Return rows as a table of Markdown."""
    lines = [[str(column).replace("_", " ") for column in rows[0]], ["---"] * len(rows[0])]
    lines += [[str(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TRIALS: dict[str, Callable[[Scale], list[Row]]] = {
    "kills": try_kills,
    "disk": try_disk,
    "flips": try_flips,
    "fuzz": try_fuzz,
    "load": try_load,
}

if __name__ == "__main__":
    sys.exit(main())
