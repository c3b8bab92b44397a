"""Headwater and its peers on the same work: same model, ids and stored dtype, checked against float64 before timing.

Every peer is a process in its own environment. A timed step takes token ids to files on disk, fsync included, and each
step stands between two steps of transformers' plain SDPA forward, which captures nothing: `x_plain` is the median over
rounds of the mean of those two over the step. Loading models is not timed. `--prepare` makes environments, models and
references, so that a later call only measures.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from headwater.benchmarks.bench_extract import SIZES
from headwater.benchmarks.lib.limits import limits
from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.benchmarks.peers.environments import (
    HEADWATER,
    PEERS,
    PLAIN,
    Peer,
    PeerMissing,
    cache_folder,
    python_of,
    version_of,
)
from headwater.benchmarks.peers.peer_inputs import WORKLOADS, Inputs, Workload, prepare
from headwater.benchmarks.peers.peer_process import PeerProcess

READS = 48


class Case:
    """One peer at one workload: its process, its seconds, what it left on disk."""

    def __init__(
        self, process: PeerProcess, work: Workload, inputs: Inputs, out: Path, batch: int
    ) -> None:
        self.process = process
        self.work = work
        self.inputs = inputs
        self.out = out
        self.batch = batch
        self.paced = process.peer is HEADWATER
        self.seconds: list[float] = []
        self.unsynced: list[float] = []
        self.ratios: list[float] = []
        self.place = ""
        self.row: Row = {}

    def begin(self, function: str, warm: bool = True) -> float:
        """Tell the process what to capture and let it capture once, uncounted; return the seconds."""
        tokens, batch = (
            (self.inputs.repeated, self.work.n) if self.paced else (self.inputs.ids, self.batch)
        )
        self.row |= self.process.ask(
            "begin", workload=function, tokens=str(tokens), out=str(self.out), batch=batch
        )
        if warm:
            return self.step(timed=False)
        return 0.0

    def step(self, timed: bool = True) -> float:
        """Capture every sequence once; return the seconds."""
        for folder in [] if self.paced or not self.out.exists() else self.out.iterdir():
            shutil.rmtree(folder)
        before = disk_bytes(self.out)
        answer = self.process.ask("step")
        self.place = answer["out"]
        self.row["MB_on_disk"] = round((disk_bytes(self.out) - before) / 1e6, 1)
        if timed:
            self.seconds.append(answer["seconds"])
            self.unsynced.append(answer["seconds"] - answer["sync"])
        return float(answer["seconds"])

    def check(self, limit: int) -> None:
        """Read values back and compare them with float64; raise PeerMissing where one is wrong."""
        places = self.inputs.truth.places(self.work.sites, limit)
        values, seconds = self.process.read(self.place, places, self.batch)
        for place, value in zip(places, values, strict=True):
            assert value is not None
            if problem := self.inputs.truth.problem(place, value):
                raise PeerMissing(f"its values are wrong: {problem}")
        self.row |= {"values_checked": sum(v.size for v in values if v is not None)}
        self.row |= {"read_ms": round(1e3 * statistics.median(seconds), 3)}

    def finish(self) -> Row:
        """Return the row of this case."""
        seconds = statistics.median(self.seconds)
        ratio = statistics.median(self.ratios)
        return {
            **self.row,
            "case": self.process.peer.name,
            "rounds": len(self.seconds),
            "batch": self.work.n if self.paced else self.batch,
            "tokens_per_second": round(self.work.n * self.work.seq_len / seconds, 1),
            "x_plain": round(ratio, 3),
            "spread": spread(self.ratios),
            "x_plain_without_fsync": round(ratio * seconds / statistics.median(self.unsynced), 3),
            "peak_MB": self.process.ask("peak")["bytes"] >> 20,
        }


def disk_bytes(folder: Path) -> int:
    """Return what the files of a folder occupy on disk."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())


def start_all(
    peers: Sequence[Peer],
    model: Path,
    functions: Sequence[str],
    cache: Path,
    folder: Path,
    keep: bool,
    stack: ExitStack,
) -> tuple[list[PeerProcess], dict[str, str]]:
    """Start a process for every peer and load the model in all of them; return them, and why others are missing."""
    processes = []
    missing = dict[str, str]()
    for peer in peers:
        try:
            process = PeerProcess(
                peer, python_of(peer, cache, install=False), folder / f"{peer.driver}.log", keep
            )
        except PeerMissing as error:
            missing[peer.name] = str(error)
            continue
        stack.callback(process.close)
        process.tell("load", model=str(model), workloads=functions)
        processes.append(process)
    ready = []
    for process in processes:
        try:
            process.workloads = process.hear()["workloads"]
            ready.append(process)
        except PeerMissing as error:
            missing[process.peer.name] = str(error)
    return ready, missing


def measure_workload(
    name: str,
    processes: Sequence[PeerProcess],
    inputs: Inputs,
    work: Workload,
    rounds: tuple[int, int],
    folder: Path,
) -> list[Row]:
    """Warm up, check and time every process at one workload; return the rows.

    The first process is the plain forward. `rounds` are those of Headwater and those of its peers; a slow peer's only
    pass is not preceded by a warm one, and is checked after it.
    """
    cases: list[Case] = []
    rows: list[Row] = []
    for process in processes[1:]:
        if work.function not in process.workloads:
            rows.append({"case": process.peer.name, "problem": "it does not capture this"})
            continue
        case = Case(process, work, inputs, folder / f"{name}-{process.peer.name}", work.batch)
        try:
            case.begin(work.function, warm=not process.peer.slow)
            if not process.peer.slow:
                case.check(READS)
            cases.append(case)
        except PeerMissing as error:
            rows.append({"case": process.peer.name, "problem": str(error)})
    plain = Case(processes[0], work, inputs, folder / "plain", work.batch)
    plain.batch = best_batch(plain)
    for i in range(max(rounds)):
        before = plain.step()
        for case in list(cases):
            if i >= (rounds[0] if case.paced else 1 if case.process.peer.slow else rounds[1]):
                continue
            try:
                seconds = case.step()
                if case.process.peer.slow:
                    case.check(READS)
            except PeerMissing as error:
                rows.append({"case": case.process.peer.name, "problem": str(error)})
                cases.remove(case)
                continue
            after = plain.step()
            case.ratios.append((before + after) / 2 / seconds)
            before = after
    for case in cases:
        shutil.rmtree(case.out, ignore_errors=True)
    plain.ratios = [statistics.median(plain.seconds) / seconds for seconds in plain.seconds]
    return [case.finish() for case in (plain, *cases)] + rows


def best_batch(plain: Case) -> int:
    """Return the batch at which the plain forward is faster: the measure of all ratios is at its best."""
    seconds = {}
    usual = plain.batch
    for batch in (usual, 1, usual):  # the first pass only warms up
        plain.batch = batch
        seconds[batch] = plain.begin("plain")
    if seconds[1] < seconds[usual]:
        plain.batch = 1
        plain.begin("plain", warm=False)
    return plain.batch


def spread(values: Sequence[float]) -> float:
    """Return (largest − smallest) / median."""
    return round((max(values) - min(values)) / statistics.median(values), 3)


def iter_tables(
    workloads: dict[str, Workload],
    size: str,
    rounds: tuple[int, int],
    cache: Path,
    folder: Path,
    peers: Sequence[Peer] = PEERS,
    keep: bool = False,
) -> Iterator[tuple[str, list[Row]]]:
    """Measure one workload after another, then the machine; yield ("peers", rows) for each, then ("limits", rows)."""
    inputs = {name: prepare(work, size, rounds[0] + 2, cache) for name, work in workloads.items()}
    functions = sorted({"plain", *(work.function for work in workloads.values())})
    memory = "default"
    if keep:
        memory = "kept"
    with ExitStack() as stack:
        model = next(iter(inputs.values())).model
        processes, missing = start_all(
            (PLAIN, *peers), model, functions, cache, folder, keep, stack
        )
        versions = {p.peer.name: version_of(p.peer, python_of(p.peer, cache)) for p in processes}
        storage = {peer.name: peer.storage for peer in (PLAIN, *peers)}
        for name, work in workloads.items():
            rows = measure_workload(name, processes, inputs[name], work, rounds, folder)
            rows += [{"case": peer, "problem": reason} for peer, reason in missing.items()]
            common = {
                "workload": name,
                "memory": memory,
                "model": size,
                "seq_len": work.seq_len,
                "sequences": work.n,
                "load": round(os.getloadavg()[0], 1),
            }
            yield (
                "peers",
                [
                    common
                    | {"version": versions.get(row["case"], ""), "storage": storage[row["case"]]}
                    | dict.fromkeys(COLUMNS, "")
                    | row
                    for row in rows
                ],
            )
    yield (
        "limits",
        [{"workload": "+".join(workloads), "memory": memory, **limit} for limit in limits(folder)],
    )


COLUMNS = (
    "case",
    "rounds",
    "tokens_per_second",
    "x_plain",
    "spread",
    "x_plain_without_fsync",
    "batch",
    "peak_MB",
    "MB_on_disk",
    "read_ms",
    "lines",
    "values_checked",
    "problem",
)


def show(rows: list[Row]) -> None:
    """Print rows as a table."""
    for row in rows:
        if row["case"] == "plain":
            print(
                f"\n{row['workload']}: T = {row['seq_len']}, {row['sequences']} sequences, memory {row['memory']}"
            )
            heads = ("tokens/s", "× plain", "no fsync", "peak MB", "MB", "read ms", "lines")
            print("{:16}{:>10}{:>9}{:>10}{:>9}{:>9}{:>9}{:>7}".format("", *heads))
        if row["problem"]:
            print(f"{row['case']:16}{row['problem']}")
            continue
        print(
            f"{row['case']:16}{row['tokens_per_second']:>10}{row['x_plain']:>9}{row['x_plain_without_fsync']:>10}"
            f"{row['peak_MB']:>9}{row['MB_on_disk']:>9}{row['read_ms']:>9}{row['lines']:>7}"
        )


def show_limits(rows: list[Row]) -> None:
    """Print what the machine can do."""
    print()
    for row in rows:
        print(f"{row['limit']:28}{row['rate']:>10} {row['unit']}")


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, and write them to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks peers", description=__doc__
    )
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=list(WORKLOADS))
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--sequences",
        type=int,
        help="of 1024 tokens, or as many tokens in shorter ones (default 4)",
    )
    parser.add_argument(
        "--peer-rounds", type=int, help="fewer rounds for the peers (default: as many)"
    )
    parser.add_argument(
        "--peers", nargs="+", choices=[p.name for p in PEERS], default=[p.name for p in PEERS]
    )
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="let every process keep the memory it frees (MALLOC_)",
    )
    parser.add_argument(
        "--prepare", action="store_true", help="only make environments, models and references"
    )
    parser.add_argument(
        "--cache",
        help="where environments and models are kept (default ~/.cache/headwater-benchmarks)",
    )
    parser.add_argument(
        "--folder", help="where to write what is captured (default: a temporary folder)"
    )
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    cache = cache_folder(options.cache)
    rounds = options.rounds, min(options.peer_rounds or options.rounds, options.rounds)
    chosen = [peer for peer in PEERS if peer.name in options.peers]
    workloads = {name: WORKLOADS[name] for name in options.workload}
    if options.sequences is not None:
        workloads = {
            n: replace(w, n=options.sequences * 1024 // w.seq_len) for n, w in workloads.items()
        }
    for peer in chosen:
        try:
            python_of(peer, cache)
        except PeerMissing as error:
            print(f"{peer.name}: {error}", file=sys.stderr)
    if options.prepare:
        for work in workloads.values():
            prepare(work, options.size, options.rounds + 2, cache)
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        tables = iter_tables(
            workloads, options.size, rounds, cache, Path(folder), chosen, options.keep_memory
        )
        for table, rows in tables:
            show(rows) if table == "peers" else show_limits(rows)
            if options.save:
                print(write_csv(table, rows, keys=("workload", "memory")), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
