"""Kill real `headwater extract` processes at random moments; every run must stay right and end with the same bytes.

`python -m headwater.benchmarks.breaking.kill --n 100` starts, kills (signal 9) and resumes until 100 are dead.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from headwater.benchmarks.breaking import faults
from headwater.store.ledger import Ledger
from headwater.store.manifest import manifest_path, read_manifest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
LIMIT = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill and resume; print a summary; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks.breaking.kill", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--n", type=int, default=100, metavar="N", help="processes to kill (default 100)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    parser.add_argument(
        "--lines", type=int, default=96, help="texts of 64 tokens to extract (default 96)"
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="where to work (default: the temporary directory)"
    )
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        found, moments = kill_and_resume(Path(folder), options.n, options.seed, options.lines)
    print(", ".join(f"{n} {what}" for what, n in found.items()))
    print(
        "committed blocks at the kills: "
        + ", ".join(f"{n} × {blocks}" for blocks, n in sorted(moments.items()))
    )
    print(f"{time.perf_counter() - start:.0f} s")
    if found["wrong"] == 0:
        return 0
    return 1


def kill_and_resume(
    home: Path, n: int, seed: int, n_lines: int
) -> tuple[Counter[str], Counter[int]]:
    """Kill `n` processes; return the outcomes, and how often how many blocks were committed at a kill."""
    chance = random.Random(seed)
    model = faults.make_model(home / "model")
    text = home / "text.txt"
    text.write_text("\n".join("".join(chance.choices("abcdefgh ", k=63)) for _ in range(n_lines)))
    reference = home / "reference"
    run = home / "run"
    first = start_extract(model, text, reference)
    wait_for(reference, first)
    begun = time.perf_counter()
    assert first.wait(LIMIT) == 0
    working = time.perf_counter() - begun
    expected = faults.contents(reference)
    found = Counter({"killed": 0, "in the text stage": 0, "runs finished": 0, "wrong": 0})
    moments = Counter[int]()
    while found["killed"] < n:
        process = start_extract(model, text, run)
        wait_for(run, process)
        time.sleep(chance.choice((0.05, 0.2, 1.0)) * chance.random() * working)
        process.kill()
        killed = process.wait() < 0
        problem = check(run, reference, expected)
        if problem:
            print(f"kill {found['killed']}: {problem}", file=sys.stderr)
        found["wrong"] += problem is not None
        if killed:
            found["killed"] += 1
            found["in the text stage"] += not manifest_path(run).exists()
            moments[n_committed(run)] += 1
        if not killed or found["killed"] == n:
            found["wrong"] += finish(model, text, run, expected)
            found["runs finished"] += 1
            shutil.rmtree(run)
    return found, moments


def start_extract(model: Path, text: Path, run: Path) -> subprocess.Popen[bytes]:
    """Start a process of the command line."""
    command = [
        sys.executable,
        "-m",
        "headwater",
        "extract",
        "--model",
        str(model),
        "--text",
        str(text),
    ]
    command += ["--out", str(run), "--preset", "all", "--block", "8", "--threads", "1"]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def wait_for(run: Path, process: subprocess.Popen[bytes]) -> None:
    """Wait until the process holds the run, or has ended."""
    end = time.monotonic() + LIMIT
    while process.poll() is None and time.monotonic() < end:
        try:
            if json.loads((run / "headwater" / "lock").read_bytes())["pid"] == process.pid:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.002)


def check(run: Path, reference: Path, expected: dict[str, bytes]) -> str | None:
    """Return what is wrong with what a kill left, or None."""
    try:
        faults.check_survivors(run, expected)
        faults.check_with_zarr(run, reference)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def finish(model: Path, text: Path, run: Path, expected: dict[str, bytes]) -> bool:
    """Let a run end undisturbed; return whether that went wrong or its bytes differ."""
    if start_extract(model, text, run).wait(LIMIT):
        return True
    return faults.contents(run) != expected


def n_committed(run: Path) -> int:
    """Count the committed blocks."""
    if manifest_path(run).exists():
        return len(Ledger(run, read_manifest(run).fingerprint).committed())
    return 0


if __name__ == "__main__":
    sys.exit(main())
