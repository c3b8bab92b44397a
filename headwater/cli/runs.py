"""The commands that look at runs: status, verify, info."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from headwater.cli.command import DONE, FAILED, Command, Parser, number
from headwater.cli.show import array_line, print_bottleneck, print_json, text_lines
from headwater.extractor.units import count, show_bytes

if TYPE_CHECKING:
    from headwater.store.entry import Entry
    from headwater.store.ledger import Damage
    from headwater.store.manifest import Manifest
    from headwater.store.reader import Run
    from headwater.store.verify import Report

SHOWN_WORKERS = 8
SHOWN_RANGES = 8
VERIFY = """\
Read every file of a run and compare it with the length and checksum that were recorded when it was
written. Problems are printed one a line, by path. Exit code 1 where any is left. Blocks that are not computed
yet are no problem."""


def add_run(parser: Parser) -> None:
    """Add the run that a command is about."""
    parser.add_argument("run", metavar="RUN", help="directory of a run, finished or not")


def add_verify(parser: Parser) -> None:
    """Add the arguments of `verify`."""
    parser.description = VERIFY
    add_run(parser)
    parser.add_argument(
        "--quick", action="store_true", help="compare only lengths and shard indexes"
    )
    parser.add_argument(
        "--repair",
        action="store_true",
        help="take damaged blocks out of the run; `headwater extract --out RUN` then computes them again",
    )
    parser.add_argument(
        "--workers", type=number, default=2, metavar="N", help="files read at once (default: 2)"
    )


def run_status(options: Namespace) -> int:
    """Print how much of a run is done, and where its time went."""
    from headwater.store.ledger import Damage
    from headwater.store.reader import open_run

    run = open_run(options.run)
    entries: list[Entry] = []
    damaged: list[Damage] = []
    # A run with damage is still described: what can be read of it is what one wants to know then.
    for found in run.ledger.examine():
        if isinstance(found, Damage):
            damaged.append(found)
        else:
            entries.append(found)
    if options.json:
        print_json(_status_json(options.run, run, entries, damaged))
    else:
        _print_status(options.run, run, entries, damaged)
    return FAILED if damaged else DONE


def _status_json(
    name: str, run: Run, entries: Sequence[Entry], damaged: Sequence[Damage]
) -> dict[str, object]:
    from headwater.extractor.cluster.members import by_worker, straggler
    from headwater.extractor.limits import bottleneck

    seconds = _seconds(entries)
    return {
        "run": name,
        "done": len(entries) == run.manifest.n_blocks,
        "n_blocks": run.manifest.n_blocks,
        "committed": len(entries),
        "n_sequences": run.manifest.n_sequences,
        "complete": sum(entry.last - entry.first for entry in entries),
        "n_tokens": sum(entry.n_tokens for entry in entries),
        "n_bytes": sum(entry.n_bytes for entry in entries),
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "bottleneck": bottleneck(seconds)[0] if entries else None,
        "casts": _casts(entries),
        "workers": by_worker(entries),
        "retried": sum(entry.attempt > 1 for entry in entries),
        "straggler": straggler(entries),
        "damaged": [found.path for found in damaged],
    }


def _print_status(name: str, run: Run, entries: Sequence[Entry], damaged: Sequence[Damage]) -> None:
    from headwater.extractor.cluster.members import straggler

    # Bytes and tokens are of what was committed; what is half written does not count.
    n_blocks = run.manifest.n_blocks
    state = f"go on with `headwater extract --out {name}`"
    if len(entries) == n_blocks:
        state = "done"
    n_tokens = sum(entry.n_tokens for entry in entries)
    size = show_bytes(sum(entry.n_bytes for entry in entries))
    print(f"{len(entries):,} of {count(n_blocks, 'block')}, {n_tokens:,} tokens, {size}: {state}")
    if entries:
        seconds = _seconds(entries)
        phases = ", ".join(f"{phase} {value:.1f}" for phase, value in seconds.items())
        print(f"seconds  {phases}")
        print_bottleneck(seconds)
    _print_workers(entries)
    # An attempt after the first means that a worker was lost, or a block was repaired.
    if retried := sum(entry.attempt > 1 for entry in entries):
        print(f"retried  {count(retried, 'block')} committed by a later attempt")
    if slow := straggler(entries):
        took = f"{slow['seconds']} s, {slow['times']} times the median"
        print(f"slowest  block {slow['block']} on {slow['worker']}: {took}")
    for site, counts in _casts(entries).items():
        overflowed = f"{counts['overflow']:,} overflowed"
        print(f"kept in {site}: {overflowed} and {counts['nonfinite']:,} non-finite values")
    for found in damaged:
        print(f"damaged  {found.path}: {found.error}")


def _seconds(entries: Sequence[Entry]) -> dict[str, float]:
    """Add up the seconds of each phase over blocks."""
    total: dict[str, float] = {}
    for entry in entries:
        for phase, value in entry.seconds.items():
            total[phase] = total.get(phase, 0) + value
    return total


def _casts(entries: Sequence[Entry]) -> dict[str, dict[str, int]]:
    """Add up, by site, the values that their stored type could not hold."""
    total: dict[str, dict[str, int]] = {}
    for entry in entries:
        for site, counts in entry.casts.items():
            of_site = total.setdefault(site, {})
            for kind, n in counts.items():
                of_site[kind] = of_site.get(kind, 0) + n
    return total


def _print_workers(entries: Sequence[Entry]) -> None:
    """Print the slowest of several workers, which hold the others up."""
    from headwater.extractor.cluster.members import by_worker

    workers = by_worker(entries)
    if len(workers) < 2:
        return
    # The run ends when its slowest worker does, so those are shown.
    slowest = sorted(workers.items(), key=lambda item: item[1]["tokens_per_second"])
    for name, worker in slowest[:SHOWN_WORKERS]:
        blocks = count(int(worker["blocks"]), "block")
        took = f"{worker['tokens']:,} tokens in {worker['seconds']:.1f} s"
        rate = f"{worker['tokens_per_second']:,.0f} a second"
        print(f"worker   {name}: {blocks}, {took} ({rate}), most of it {worker['slowest']}")
    if len(workers) > SHOWN_WORKERS:
        print(f"         and {len(workers) - SHOWN_WORKERS:,} faster ones")


def run_info(options: Namespace) -> int:
    """Describe a run and say how to open it."""
    from headwater.store.reader import open_run

    run = open_run(options.run)
    manifest = run.manifest
    if options.json:
        # "statics" lists the files that are written once with their checksums: for verify, not for readers.
        found = manifest.to_json()
        del found["statics"]
        print_json(found | {"complete": int(run.complete.sum()), "mixed": _mixed(run)})
        return DONE
    print(f"run      {run.path}, fingerprint {manifest.fingerprint[:16]}")
    _print_origin(manifest, int(run.complete.sum()))
    _print_mixed(run)
    for spec in manifest.arrays:
        print(array_line(spec, spec.stored_bytes(manifest.n_sequences)))
    # xarray opens a directory itself; a store needs our reader and its credentials.
    if run.path.local is None:
        print("open it  import headwater")
        print(f"         run = headwater.open_run({str(run.path)!r}).to_xarray()")
    else:
        print("open it  import xarray")
        print(f"         run = xarray.open_zarr({str(run.path)!r}, chunks=None)")
    print(f"         run[{manifest.arrays[0].name!r}]")
    return DONE


def _print_origin(manifest: Manifest, n_complete: int) -> None:
    """Print what a run was made of, and what made it."""
    config = manifest.model["config"]
    shape = f"{count(config['n_layer'], 'layer')}, {count(config['n_head'], 'head')}"
    sizes = f"d_model {config['d_model']:,}, vocabulary {config['d_vocab']:,}"
    compute = manifest.config["compute"]
    print(f"model    {manifest.model['name']}: {shape}, {sizes}; computed in {compute}")
    for note in manifest.model.get("notes", ()):
        print(f"         {note}")
    sources = manifest.text["sources"]
    origin = count(len(sources), "file")
    if len(sources) == 1:
        origin = sources[0]["path"]
    rows = f"{count(manifest.n_sequences, 'sequence')} of {count(manifest.n_positions, 'position')}"
    print(f"text     {rows} from {origin}; {n_complete:,} computed")
    for line in text_lines(manifest.text):
        print(f"         {line}")
    made = manifest.made_by
    # Which library multiplied decides the last bits, so it is part of what made a run.
    products = ""
    if made.get("products", "torch") != "torch":
        products = f", products by {made['products']}"
    versions = f"headwater {made['headwater']}, torch {made['torch']}"
    print(f"made by  {versions}, {made['processor']}{products}")


def _mixed(run: Run) -> list[dict[str, object]]:
    """List in what makers differ from the run's own, each with its blocks."""
    mixed = run.ledger.mixed(run.manifest.made_by)
    return [{"made_by": dict(other), "blocks": blocks} for other, blocks in mixed.items()]


def _print_mixed(run: Run) -> None:
    """Name the blocks that something else made than what the run names: their last bits may differ."""
    # Two kinds of processor add up in other orders, and float addition is not associative.
    for other, blocks in run.ledger.mixed(run.manifest.made_by).items():
        what = ", ".join(f"{name} {value}" for name, value in other)
        print(f"mixed    {name_blocks(blocks)} made with {what}: last bits may differ")


def name_blocks(blocks: Sequence[int]) -> str:
    """Write increasing block numbers as ranges: blocks 0 to 3, 7."""
    ranges: list[list[int]] = []
    for block in blocks:
        if ranges and ranges[-1][-1] == block - 1:
            ranges[-1].append(block)
        else:
            ranges.append([block])
    named = []
    for numbers in ranges[:SHOWN_RANGES]:
        first = numbers[0]
        last = numbers[-1]
        if first == last:
            named.append(f"{first}")
        else:
            named.append(f"{first} to {last}")
    noun = "block" if len(blocks) == 1 else "blocks"
    more = ""
    if len(ranges) > SHOWN_RANGES:
        more = f" and {len(ranges) - SHOWN_RANGES:,} more ranges"
    return f"{noun} {', '.join(named)}{more}"


def run_verify(options: Namespace) -> int:
    """Check a run; print each problem with its path in the run."""
    from headwater.cli.progress import ByteReporter
    from headwater.store.lock import hold
    from headwater.store.reader import open_run
    from headwater.store.verify import repair, verify

    if not isinstance(options.workers, int) or options.workers < 1:
        raise ValueError(f"--workers is {options.workers!r}; expected a whole number from 1 on.")
    run = open_run(options.run)
    reporter = ByteReporter(sys.stderr, "checked")
    try:
        report = verify(run, options.quick, options.workers, reporter)
    finally:
        reporter.close()
    # Blocks that are taken out are computed again by `extract`; files that are written once have no second source.
    fixed: list[int] = []
    if options.repair and report.problems:
        # Nobody may commit blocks while others are taken out.
        with hold(run.path):
            fixed = repair(run, report)
    if options.json:
        print_json(_report_json(options, run, report, fixed))
    else:
        _print_report(options, run, report, fixed)
    bad = [problem for problem in report.problems if not (options.repair and problem.repairable)]
    return FAILED if bad else DONE


def _report_json(
    options: Namespace, run: Run, report: Report, fixed: list[int]
) -> dict[str, object]:
    return {
        "run": options.run,
        "n_blocks": report.n_blocks,
        "committed": report.n_committed,
        "n_files": report.n_files,
        "n_bytes": report.n_bytes,
        "quick": options.quick,
        "uncommitted": fixed,
        "mixed": _mixed(run),
        "problems": [vars(problem) for problem in report.problems],
        "notes": report.notes,
    }


def _print_report(options: Namespace, run: Run, report: Report, fixed: list[int]) -> None:
    for problem in report.problems:
        block = ""
        if problem.block is not None:
            block = f" (block {problem.block})"
        print(f"{problem.path}: {problem.what}{block}")
    read = f"{count(report.n_files, 'file')}, {show_bytes(report.n_bytes)}"
    blocks = f"{report.n_committed:,} of {count(report.n_blocks, 'block')}"
    depth = " (lengths and indexes only)" if options.quick else ""
    print(f"{read}, {blocks}: {count(len(report.problems), 'problem')}{depth}")
    _print_mixed(run)
    for note in report.notes:
        print(note)
    again = f"`headwater extract --out {options.run}` computes them again"
    if fixed:
        print(f"took {count(len(fixed), 'block')} out; {again}")
    if not all(problem.repairable for problem in report.problems):
        print(
            "files that are written once cannot be repaired: restore them from a copy, or extract the run anew"
        )
    elif report.problems and not options.repair:
        command = f"`headwater verify --repair {options.run}`"
        print(f"{command} takes the damaged blocks out, to be computed again")


COMMANDS = (
    Command(
        "status", "show how much of a run is done, and where its time went", add_run, run_status
    ),
    Command("verify", "read a run again and compare it with its checksums", add_verify, run_verify),
    Command("info", "describe a run: model, text, arrays, and how to open it", add_run, run_info),
)
