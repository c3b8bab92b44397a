"""Measure a real server: 200 readers of slices while a job writes, a server killed 20 times, a 100 GB run opened,
and one under the load of clients that neither ask nor read."""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import headwater
from headwater.benchmarks.breaking import faults
from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.lib.serving import Server, ask_and_wait, memory_of
from headwater.service.client import Client
from headwater.store.entry import Entry, encode
from headwater.store.ledger import Ledger
from headwater.store.manifest import Manifest, read_manifest, write_manifest, write_metadata
from headwater.store.shard import crc32c
from headwater.store.writer import INTERNAL

LOAD_SECONDS = 10.0
SITES = ("resid", "pattern", "attn_entropy", "resid_norm")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are asked for; print figures; return 1 if anything was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks serve", description=__doc__
    )
    parser.add_argument(
        "parts", nargs="*", default=list(PARTS), help="readers, kills, large, load (default: all)"
    )
    parser.add_argument(
        "--readers", type=int, default=200, metavar="N", help="readers at once (default 200)"
    )
    parser.add_argument(
        "--reads", type=int, default=25, metavar="N", help="slices of each reader (default 25)"
    )
    parser.add_argument(
        "--kills", type=int, default=20, metavar="N", help="times the server is killed (default 20)"
    )
    parser.add_argument(
        "--gigabytes", type=float, default=100, metavar="GB", help="of the large run (default 100)"
    )
    parser.add_argument(
        "--idle", type=int, default=500, metavar="N", help="idle connections (default 500)"
    )
    parser.add_argument(
        "--slow", type=int, default=60, metavar="N", help="clients that do not read (default 60)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of places and moments (default 0)"
    )
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    wrong = 0
    for part in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            found = PARTS[part](Path(folder), options)
        print(f"{part}: {json.dumps(found)}")
        if options.save:
            print(write_csv(f"serve_{part}", [found]))
        wrong += found["wrong"]
    if wrong:
        return 1
    return 0


def make_root(root: Path, n_sequences: int, n_positions: int = 64, **sizes: int) -> Row:
    """Put a model and ids into a root; return the document of a job over them."""
    faults.make_model(root / "model", n_positions, **sizes)
    ids = np.random.default_rng(0).integers(0, 97, (n_sequences, n_positions)).astype(np.int32)
    np.save(root / "ids.npy", ids)
    return {"model": "model", "tokens": "ids.npy", "preset": "all", "block": 2, "threads": 1}


def read_together(root: Path, options: argparse.Namespace) -> Row:
    """Let readers fetch random slices of a finished run, and of the one that a job writes, while it is written."""
    document = make_root(root, 256)
    whole = headwater.extract(headwater.RunConfig(**_local(root, document, "whole")))
    truth = {site: np.asarray(whole[site][...]) for site in SITES}
    seconds: list[float] = []
    problems: list[str] = []
    refused = [0]
    with Server(root) as server:
        number = server.client.post(
            "/jobs", {"kind": "extract", "document": document | {"out": "growing"}}
        )["id"]
        server.wait_for(number, lambda job: job["progress"].get("done", 0) > 0)
        begun = time.perf_counter()
        threads = [
            threading.Thread(
                target=_read,
                args=(
                    server.url,
                    truth,
                    options.seed + i,
                    options.reads,
                    seconds,
                    problems,
                    refused,
                ),
            )
            for i in range(options.readers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - begun
        state = server.client.get(f"/jobs/{number}")["state"]
        final = server.finish(number)["state"]
    equal = faults.contents(root / "growing") == faults.contents(root / "whole")
    for problem in problems[:10]:
        print(problem, file=sys.stderr)
    times = np.sort(seconds)
    return {
        "readers": options.readers,
        "slices": len(seconds),
        "not yet computed": refused[0],
        "job at their end": state,
        "job": final,
        "p50_s": _at(times, 0.5),
        "p99_s": _at(times, 0.99),
        "slices_per_s": round(len(seconds) / elapsed, 1),
        "bytes_equal": equal,
        "wrong": len(problems) + (not equal),
    }


def _read(
    url: str,
    truth: dict[str, np.ndarray],
    seed: int,
    n: int,
    seconds: list[float],
    problems: list[str],
    refused: list[int],
) -> None:
    """Fetch slices and compare them with the truth, bit by bit."""
    chance = random.Random(seed)
    client = Client(url)
    for _ in range(n):
        site = chance.choice(SITES)
        run = chance.choice(("whole", "growing"))
        values = truth[site]
        lead = chance.randrange(values.shape[0])
        sequence = chance.randrange(values.shape[1])
        axis = "layer"
        if site.startswith("resid"):
            axis = "depth"
        begun = time.perf_counter()
        try:
            with client._open(
                "GET", f"/runs/{run}/arrays/{site}?{axis}={lead}&sequence={sequence}"
            ) as answer:
                found = np.load(io.BytesIO(answer.read()), allow_pickle=False)
        except ValueError as error:
            if run == "growing" and "not computed yet" in str(error):
                refused[0] += 1
            else:
                problems.append(str(error))
            continue
        except Exception as error:
            problems.append(f"{type(error).__name__}: {error}")
            continue
        seconds.append(time.perf_counter() - begun)
        if found.tobytes() != values[lead, sequence].tobytes():
            problems.append(f"{run} {site}[{lead}, {sequence}] differs")


def kill_often(root: Path, options: argparse.Namespace) -> Row:
    """Kill the server at random moments of one job; the run must end with the bytes of an undisturbed one."""
    document = make_root(root, 512)
    headwater.extract(headwater.RunConfig(**_local(root, document, "whole")))
    expected = faults.contents(root / "whole")
    chance = random.Random(options.seed)
    moments = list[int]()
    with Server(root) as server:
        number = server.client.post(
            "/jobs", {"kind": "extract", "document": document | {"out": "killed"}}
        )["id"]
        for _ in range(options.kills):
            if chance.random() < 0.7:
                _wait_for_more(server, number, moments[-1] if moments else 0)
            time.sleep(chance.random() * 0.5)
            server.kill()
            moments.append(_committed(root / "killed"))
            server.start()
        job = server.finish(number)
        jobs = len(server.client.get("/jobs")["jobs"])
    equal = faults.contents(root / "killed") == expected
    good = equal and job["state"] == "done" and jobs == 1
    return {
        "kills": options.kills,
        "blocks at the kills": moments,
        "starts": job["starts"],
        "state": job["state"],
        "jobs": jobs,
        "bytes_equal": equal,
        "wrong": int(not good),
    }


def _wait_for_more(server: Server, number: int, n_done: int) -> None:
    server.wait_for(
        number, lambda job: job["progress"].get("done", 0) > n_done or job["finished"] is not None
    )


def open_large(root: Path, options: argparse.Namespace) -> Row:
    """Ask for what the page asks for, on a run of many gigabytes whose shards are holes but for the first block."""
    document = make_root(root, 16, 512, n_layer=12, n_head=12, n_embd=96) | {
        "block": 16,
        "sites": ["resid", "pattern"],
    }
    del document["preset"]
    small = headwater.extract(headwater.RunConfig(**_local(root, document, "small")))
    per_block = sum(spec.stored_bytes(16) for spec in small.manifest.arrays)
    blocks = int(options.gigabytes * 1e9 / per_block) + 1
    large = stretch(root / "small", root / "large", blocks)
    size = sum(path.stat().st_size for path in large.rglob("*") if path.is_file())
    asked = (
        "runs",
        "runs/large/about",
        "runs/large/figures/tokens?sequence=0",
        "runs/large/thumbnails?sequence=0&layer=0",
        "runs/large/arrays/pattern?layer=0&head=0&sequence=0",
        "runs/large/figures/sinks?sequence=0",
        "runs/large/figures/norm?sequence=0",
    )
    seconds = {}
    with Server(root) as server:
        for path in asked:
            begun = time.perf_counter()
            with server.client._open("GET", f"/{path}") as answer:
                answer.read()
            seconds[path] = round(time.perf_counter() - begun, 3)
    return {
        "gigabytes": round(size / 1e9, 1),
        "blocks": blocks,
        "seconds": seconds,
        "total_s": round(sum(seconds.values()), 3),
        "wrong": 0,
    }


def bear_load(root: Path, options: argparse.Namespace) -> Row:
    """Hold idle connections and large slices that nobody reads; see how soon the server answers, and its memory."""
    rows = 1 << 13
    document = make_root(root, rows) | {"block": rows, "sites": ["resid"], "dtype": "float32"}
    del document["preset"]
    run = headwater.extract(headwater.RunConfig(**_local(root, document, "run")))
    row_bytes = run["resid"][0, 0].nbytes
    n = min((64 << 20) // row_bytes, rows)
    slice_ = (
        f"GET /runs/run/arrays/resid?depth=0&sequence=0:{n} HTTP/1.1\r\nhost: localhost\r\n\r\n"
    )
    seconds = []
    wrong = 0
    with Server(root) as server, ExitStack() as stack:
        before = memory_of(server.pid)
        for i in range(options.idle):
            stack.enter_context(ask_and_wait(server.port, "GET / HTTP/1.1\r\n" if i % 2 else ""))
        for _ in range(options.slow):
            stack.enter_context(ask_and_wait(server.port, slice_))
        end = time.monotonic() + LOAD_SECONDS
        while time.monotonic() < end:
            begun = time.perf_counter()
            wrong += server.fetch("/runs")[0] != 200
            seconds.append(time.perf_counter() - begun)
            time.sleep(0.1)
        most = memory_of(server.pid, "VmHWM")
    return {
        "idle": options.idle,
        "slow": options.slow,
        "slice_bytes": n * row_bytes,
        "p50_s": _at(np.sort(seconds), 0.5),
        "largest_s": round(max(seconds), 4),
        "bytes_before": before,
        "largest_bytes": most,
        "wrong": wrong + (max(seconds) > 1) + (most > 1 << 30),
    }


def stretch(small: Path, large: Path, n_blocks: int) -> Path:
    """Make a run of many blocks from one of a single block: every other shard is a hole of the same length."""
    m = read_manifest(small)
    n = m.block * n_blocks
    arrays = tuple(_longer(spec, n) for spec in m.arrays)
    shutil.copytree(small, large)
    statics = dict(m.statics)
    metadata = {}
    for path in sorted(large.glob("*/zarr.json")):
        raw = json.loads(path.read_bytes())
        if raw["dimension_names"][0] == "sequence":
            raw["shape"][0] = n
        metadata[path.parent.name] = raw
    metadata |= {spec.name: spec.metadata() for spec in arrays}
    write_metadata(
        large, metadata, json.loads((large / "zarr.json").read_bytes())["attributes"], statics
    )
    fields = {name: getattr(m, name) for name in m.__dataclass_fields__}
    write_manifest(
        large, Manifest(**fields | {"n_sequences": n, "arrays": arrays, "statics": statics})
    )
    ledger = Ledger(large, m.fingerprint)
    (entry,) = ledger.entries()
    for block in range(1, n_blocks):
        first = block * m.block
        last = (block + 1) * m.block
        files = {}
        for spec in arrays:
            old = spec.block_shards(0, m.block)
            for path, like in zip(spec.block_shards(first, last), old, strict=True):
                size = (large / like).stat().st_size
                (large / path).parent.mkdir(parents=True, exist_ok=True)
                with (large / path).open("wb") as file:
                    file.truncate(size)
                files[path] = [size, 0]
        written = encode(Entry(block, 1, m.fingerprint, first, last, entry.n_tokens, files))
        (large / INTERNAL / "ledger" / f"{block:08d}.1.json").write_bytes(written)
        mask = np.ones(m.block, bool).tobytes()
        (large / "complete" / "c" / str(block)).write_bytes(mask + crc32c(mask))
    return large


def _longer(spec: Any, n: int) -> Any:
    at = spec.dims.index("sequence")
    return replace(spec, shape=(*spec.shape[:at], n, *spec.shape[at + 1 :]))


def _local(root: Path, document: Row, out: str) -> Row:
    return document | {
        "model": str(root / "model"),
        "tokens": str(root / "ids.npy"),
        "out": str(root / out),
    }


def _committed(run: Path) -> int:
    try:
        return len(headwater.open_run(run).ledger.committed())
    except ValueError:
        return 0


def _at(times: np.ndarray, share: float) -> float:
    if len(times):
        return round(float(np.quantile(times, share)), 4)
    return float("nan")


PARTS = {
    "readers": read_together,
    "kills": kill_often,
    "large": open_large,
    "load": bear_load,
}

if __name__ == "__main__":
    sys.exit(main())
