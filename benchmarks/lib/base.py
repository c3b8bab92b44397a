"""`--base REF`: time another commit with the benchmarks of this one, side by side, once the tests of both have passed.

The other commit is checked out in a worktree beside this one. Its tests run with its own code; then it gets this
checkout's benchmarks, so that both are measured the same way, in turn.
"""

from __future__ import annotations

import csv
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 3


class BaseError(RuntimeError):
    """The other commit cannot be compared with; the message says why."""


def compare(
    name: str,
    arguments: Sequence[str],
    ref: str,
    tests: Sequence[str],
    root: Path = ROOT,
    pairs: int = PAIRS,
) -> str:
    """Return a table of how much faster this checkout is than `ref` in a benchmark; raise BaseError."""
    with worktree(root, ref) as (base, commit):
        for tree in (base, root):
            run_tests(tree, tests, "this checkout" if tree == root else commit)
        shutil.rmtree(base / "benchmarks")
        left_out = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(root / "benchmarks", base / "benchmarks", ignore=left_out)
        found: dict[str, list[dict[str, float]]] = {"base": [], "here": []}
        for i in range(pairs):
            for side, tree in (("base", base), ("here", root)):
                found[side].append(measure(tree, name, arguments, base / f"results-{side}-{i}"))
    return table(found["base"], found["here"], commit)


@contextmanager
def worktree(root: Path, ref: str) -> Iterator[tuple[Path, str]]:
    """Check a commit out beside `root`; give its folder and its name; remove it afterwards."""
    done = _git(root, "rev-parse", "--verify", "--short=10", f"{ref}^{{commit}}")
    if done.returncode:
        raise BaseError(f"--base {ref} is not a commit of this repository; `git log` lists them.")
    commit = done.stdout.strip()
    folder = root.parent / f"{root.name}-base-{commit}-{os.getpid()}"
    made = _git(root, "worktree", "add", "--detach", str(folder), commit)
    if made.returncode:
        raise BaseError(
            f"--base {ref}: git cannot make a worktree in {folder}: {made.stderr.strip()}"
        )
    try:
        yield folder, commit
    finally:
        _git(root, "worktree", "remove", "--force", str(folder))


def run_tests(tree: Path, tests: Sequence[str], what: str) -> None:
    """Run the tests of a tree that guard a benchmark; raise BaseError where there are none or one fails."""
    present = [test for test in tests if (tree / test).exists()]
    if not present:
        raise BaseError(
            f"{what} has none of the tests {', '.join(tests)}; figures without them are not reported."
        )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *present]
    done = subprocess.run(command, cwd=tree, env=_environment(tree), capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        why = "; ".join(lines[:3]) or (done.stdout + done.stderr).strip()[-300:]
        raise BaseError(f"the tests of {what} fail, so nothing is reported: {why}")


def measure(tree: Path, name: str, arguments: Sequence[str], into: Path) -> dict[str, float]:
    """Run a benchmark in a tree; return its rates by row and column."""
    environment = _environment(tree) | {"HEADWATER_RESULTS": str(into)}
    command = [sys.executable, "-m", "headwater.benchmarks", name, *arguments, "--save"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise BaseError(
            f"{name} does not run in {tree}: {(done.stderr or done.stdout).strip()[-300:]}"
        )
    rates: dict[str, float] = {}
    for path in sorted(into.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                label = " ".join(row[c] for c in ("workload", "case", "workers") if row.get(c))
                rates |= {
                    f"{label}: {column}": float(value)
                    for column, value in row.items()
                    if column.endswith("_per_second") and value
                }
    if not rates:
        raise BaseError(
            f"{name} {' '.join(arguments)} gave no column that ends in _per_second to compare."
        )
    return rates


def table(base: Sequence[dict[str, float]], here: Sequence[dict[str, float]], commit: str) -> str:
    """Return medians and the median ratio of pairs, a line for each rate that both have."""
    ratios = defaultdict(list)
    for before, after in zip(base, here, strict=True):
        for key in before.keys() & after.keys():
            ratios[key].append(after[key] / before[key])
    lines = [f"{'':48}{commit:>14}{'here':>12}{'here / base':>13}"]
    for key in (key for key in here[0] if key in ratios):
        old, new = (
            statistics.median(side[key] for side in runs if key in side) for runs in (base, here)
        )
        lines.append(f"{key:48}{old:>14.1f}{new:>12.1f}{statistics.median(ratios[key]):>13.3f}")
    return "\n".join(lines)


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(tree)}
