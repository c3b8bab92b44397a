"""What a ledger of many entries costs: to open it, and to plan a run of as many blocks, in seconds and memory."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from headwater.benchmarks.lib.measure import peak_bytes, write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.extractor.model.weights import ModelConfig
from headwater.extractor.plan import geometry, make_plan
from headwater.extractor.request import RunConfig
from headwater.store.entry import Entry
from headwater.store.ledger import COMPACT_AT, Ledger
from headwater.store.segments import Segments, table_of

FINGERPRINT = "f" * 64
WORKERS = 64
GPT2 = {
    "model_type": "gpt2",
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_positions": 1024,
    "vocab_size": 50257,
}
SITES = ("attn_entropy", "attn_max", "attn_sink", "attn_received", "resid_norm", "loss")


def fill(run: Path, n: int, per_segment: int = COMPACT_AT) -> None:
    """Write a ledger of `n` entries, as blocks of a statistics run of GPT-2 small have them, in segments.

    Segments differ in the numbers of their blocks alone, to be made quickly.
    """
    segments = Segments(run, FINGERPRINT)
    table = table_of((_entry(block), False) for block in range(per_segment))
    for first in range(0, n, per_segment):
        part = table.slice(0, n - first)
        blocks = np.arange(first, min(first + per_segment, n))
        for name, values in (("block", blocks), ("first", blocks * 16), ("last", blocks * 16 + 16)):
            part = part.set_column(part.schema.get_field_index(name), name, [values])
        segments.add(part)


def _entry(block: int) -> Entry:
    files = {
        f"{site}/c/0/{block}/0/0": [786_432 + block % 7, block * 2654435761 % 2**32]
        for site in SITES
    }
    files[f"complete/c/{block}"] = [20, 0]
    seconds = {"compute": 4.0, "finish": 0.01, "write": 0.2, "sync": 0.1, "wait": 0.0}
    worker = f"node{block % WORKERS // 8}:{1000 + block % WORKERS}"
    return Entry(
        block, 1, FINGERPRINT, block * 16, block * 16 + 16, 16384, files, {}, seconds, worker
    )


def measure(run: Path) -> Row:
    """Open the ledger in this process: count its committed blocks, and what a driver asks before it starts."""
    before = peak_bytes()
    start = time.perf_counter()
    n = len(Ledger(run, FINGERPRINT).committed())
    opened = time.perf_counter() - start
    Ledger(run, FINGERPRINT).trusted()
    checked = time.perf_counter() - start - opened
    return {
        "entries": n,
        "open_seconds": round(opened, 3),
        "checked_seconds": round(checked, 3),
        "memory_bytes": peak_bytes() - before,
    }


def measure_plan(n_blocks: int) -> Row:
    """Plan a run of GPT-2 small with `n_blocks` blocks, and list those that are missing."""
    before = peak_bytes()
    start = time.perf_counter()
    model = ModelConfig.from_hf(GPT2, "config")
    config = RunConfig(out="run", preset="statistics", block=16)
    plan = make_plan(config, model, geometry(config, model), 16 * n_blocks)
    missing = [block for block in plan.blocks if block % 2]
    return {
        "entries": len(plan.blocks),
        "missing": len(missing),
        "plan_bytes": plan.total_bytes,
        "plan_seconds": round(time.perf_counter() - start, 3),
        "memory_bytes": peak_bytes() - before,
    }


def main(arguments: list[str] | None = None) -> int:
    """Print the figures, and write them to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks ledger", description=__doc__
    )
    parser.add_argument("--entries", type=int, default=1_000_000)
    parser.add_argument("--folder", help="where to write the ledger (default: a temporary folder)")
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.part:  # in a process of its own, for its memory
        what, run = options.part
        print(json.dumps(measure(Path(run)) if what == "open" else measure_plan(options.entries)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = Path(folder) / "run"
        start = time.perf_counter()
        fill(run, options.entries)
        filled = time.perf_counter() - start
        n_bytes = sum(path.stat().st_size for path in run.rglob("*.parquet"))
        rows = []
        for part in ("open", "open", "plan"):
            command = [
                sys.executable,
                "-m",
                "headwater.benchmarks",
                "ledger",
                "--part",
                part,
                str(run),
            ]
            command += ["--entries", str(options.entries)]
            said = json.loads(
                subprocess.run(command, capture_output=True, text=True, check=True).stdout
            )
            rows.append({"case": part, **dict.fromkeys(COLUMNS, ""), **said})
    print(f"{options.entries:,} entries written in {filled:.0f} s, {n_bytes:,} bytes")
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items() if value != ""))
    if options.save:
        print(write_csv("ledger", rows))
    return 0


COLUMNS = (
    "entries",
    "open_seconds",
    "checked_seconds",
    "plan_seconds",
    "missing",
    "plan_bytes",
    "memory_bytes",
)


if __name__ == "__main__":
    sys.exit(main())
