"""What each command does: a thin layer over functions that Python can call too."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from headwater.cli.show import (
    array_line,
    print_bottleneck,
    print_json,
    print_plan,
    print_projection,
    text_lines,
)
from headwater.extractor.units import count, show_bytes

if TYPE_CHECKING:
    from headwater.extractor.request import RunConfig
    from headwater.store.reader import Run

DONE = 0
FAILED = 1
NOWHERE = "headwater-plan"
SHOWN_WORKERS = 8
SHOWN_RANGES = 8


def run_plan(options: Any) -> int:
    """Print the plan of an extraction, then refuse it where it cannot fit."""
    from headwater.extractor.budget import check_resources, free_disk
    from headwater.extractor.limits import device_bytes, find_rates, project, read_rates
    from headwater.extractor.machine import available_memory
    from headwater.extractor.run import plan_run
    from headwater.extractor.sites import SITES, SQUARE
    from headwater.store.manifest import check_target
    from headwater.store.place import place_of

    config = _config(options, out=NOWHERE)
    out = place_of(config.out)
    stated = read_rates(options.assume) if options.assume else {}
    if config.out != NOWHERE:
        check_target(out)
    plan = plan_run(config)
    free = free_disk(out)
    memory = available_memory()
    projection = project(plan, find_rates(config, stated))
    on_device = device_bytes(config, plan) if config.device != "cpu" else None
    if options.json:
        sizes = plan.array_bytes()
        print_json(
            {
                "n_sequences": plan.n_sequences,
                "seq_len": plan.geometry.seq_len,
                "block": plan.geometry.block,
                "n_blocks": plan.n_blocks,
                "arrays": {
                    s.name: {
                        "n_bytes": sizes[s.name],
                        "dtype": s.dtype,
                        "codec": s.codec,
                        "sizes": dict(zip(s.dims, s.shape, strict=True)),
                        "shard": s.shard,
                        "chunk": s.chunk,
                    }
                    for s in plan.arrays
                },
                "text": plan.text,
                "text_bytes": plan.text_bytes,
                "total_bytes": plan.total_bytes,
                "free_disk_bytes": free,
                "host_bytes": plan.host_bytes,
                "available_memory_bytes": memory,
                "notes": plan.notes,
                "device_bytes": on_device,
                "projection": {
                    "bound": projection.bound,
                    "tokens_per_second": projection.tokens_per_second,
                    "tokens_per_second_with_statistics": projection.statistics,
                    "rates": {name: vars(rate) for name, rate in projection.rates.items()},
                },
            }
        )
    else:
        print_plan(plan, free, memory)
        if on_device is not None:
            print(f"device  {show_bytes(on_device)} of memory needed on the GPU, projected")
        print_projection(projection, [s.name for s in plan.arrays if SITES[s.name].group == SQUARE])
    check_resources(plan, out)
    return DONE


def run_extract(options: Any) -> int:
    """Extract, showing progress; print where the run is."""
    from headwater.cli.progress import Reporter
    from headwater.extractor.run import extract

    config = _config(options)
    if "-" in config.text and sys.stdin is not None and sys.stdin.isatty():
        print("headwater: reading text from the terminal; end it with Ctrl-D", file=sys.stderr)
    reporter = Reporter(sys.stderr)
    try:
        run = extract(config, reporter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(config)) from None
    except ValueError as error:
        if reporter.computing and type(error) is ValueError:
            raise RuntimeError(f"{error}. {_kept(config)}") from error
        raise
    finally:
        reporter.close()
    m = run.manifest
    n = int(run.complete.sum())
    n_bytes = sum(size for entry in run.ledger.entries() for size, _ in entry.files.values())
    if options.json:
        print_json(
            {
                "run": str(run.path),
                "fingerprint": m.fingerprint,
                "n_sequences": m.n_sequences,
                "complete": n,
                "seq_len": m.n_positions,
                "n_blocks": m.n_blocks,
                "n_bytes": n_bytes,
                "documents": m.text.get("documents"),
                "sites": run.sites,
            }
        )
    else:
        for line in text_lines(m.text)[1:]:
            print(line)
        print(
            f"{run.path}: {count(n, 'sequence')} of {count(m.n_positions, 'position')}, "
            f"{count(len(run.sites), 'array')}, {show_bytes(n_bytes)}. See `headwater info {run.path}`."
        )
        for note in m.model.get("notes", ()):
            print(f"note: {note}")
    return DONE


def _kept(config: RunConfig) -> str:
    """Say what of a run is kept when it stops now."""
    from headwater.store.reader import open_run

    try:
        run = open_run(config.out)
        n_done = len(run.ledger.committed())
    except (OSError, ValueError):
        return "Nothing was computed yet: run the same command again to start over."
    return (
        f"{n_done:,} of {count(run.manifest.n_blocks, 'block')} are kept in {config.out}: run the same command again "
        "to go on."
    )


def run_status(options: Any) -> int:
    """Print how much of a run is done, and where its time went."""
    from headwater.extractor.cluster.members import by_worker, straggler
    from headwater.extractor.limits import bottleneck
    from headwater.store.ledger import Damage
    from headwater.store.reader import open_run

    run = open_run(options.run)
    examined = list(run.ledger.examine())
    entries = [found for found in examined if not isinstance(found, Damage)]
    damaged = [found for found in examined if isinstance(found, Damage)]
    casts: dict[str, dict[str, int]] = {}
    seconds: dict[str, float] = {}
    for entry in entries:
        for name, counts in entry.casts.items():
            casts[name] = {kind: casts.get(name, {}).get(kind, 0) + n for kind, n in counts.items()}
        for phase, value in entry.seconds.items():
            seconds[phase] = seconds.get(phase, 0) + value
    n_blocks = run.manifest.n_blocks
    n_tokens = sum(e.n_tokens for e in entries)
    n_bytes = sum(size for e in entries for size, _ in e.files.values())
    if options.json:
        print_json(
            {
                "run": options.run,
                "done": len(entries) == n_blocks,
                "n_blocks": n_blocks,
                "committed": len(entries),
                "n_sequences": run.manifest.n_sequences,
                "complete": sum(e.last - e.first for e in entries),
                "n_tokens": n_tokens,
                "n_bytes": n_bytes,
                "seconds": {k: round(v, 3) for k, v in seconds.items()},
                "bottleneck": bottleneck(seconds)[0] if entries else None,
                "casts": casts,
                "workers": by_worker(entries),
                "retried": sum(e.attempt > 1 for e in entries),
                "straggler": straggler(entries),
                "damaged": [found.path for found in damaged],
            }
        )
        return FAILED if damaged else DONE
    state = (
        "done"
        if len(entries) == n_blocks
        else f"go on with `headwater extract --out {options.run}`"
    )
    print(
        f"{len(entries):,} of {count(n_blocks, 'block')}, {n_tokens:,} tokens, {show_bytes(n_bytes)}: {state}"
    )
    if entries:
        print("seconds  " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
        print_bottleneck(seconds)
    _print_workers(by_worker(entries))
    if retried := sum(e.attempt > 1 for e in entries):
        print(f"retried  {count(retried, 'block')} committed by a later attempt")
    if slow := straggler(entries):
        took = f"{slow['seconds']} s, {slow['times']} times the median"
        print(f"slowest  block {slow['block']} on {slow['worker']}: {took}")
    for name, counts in casts.items():
        print(
            f"kept in {name}: {counts['overflow']:,} overflowed and {counts['nonfinite']:,} non-finite values"
        )
    for found in damaged:
        print(f"damaged  {found.path}: {found.error}")
    return FAILED if damaged else DONE


def _print_workers(workers: dict[str, dict[str, Any]]) -> None:
    """Print the slowest of several workers, which hold the others up."""
    slowest = sorted(workers.items(), key=lambda item: item[1]["tokens_per_second"])
    for name, w in slowest[:SHOWN_WORKERS] if len(workers) > 1 else []:
        print(
            f"worker   {name}: {count(w['blocks'], 'block')}, {w['tokens']:,} tokens in {w['seconds']:.1f} s "
            f"({w['tokens_per_second']:,.0f} a second), most of it {w['slowest']}"
        )
    if len(workers) > SHOWN_WORKERS:
        print(f"         and {len(workers) - SHOWN_WORKERS:,} faster ones")


def run_info(options: Any) -> int:
    """Describe a run and say how to open it."""
    from headwater.store.reader import open_run

    run = open_run(options.run)
    m = run.manifest
    n = int(run.complete.sum())
    if options.json:
        print_json(
            {name: value for name, value in m.to_json().items() if name != "statics"}
            | {"complete": n, "mixed": _mixed(run)}
        )
        return DONE
    c = m.model["config"]
    source = m.text["sources"]
    print(f"run      {run.path}, fingerprint {m.fingerprint[:16]}")
    print(
        f"model    {m.model['name']}: {count(c['n_layer'], 'layer')}, {count(c['n_head'], 'head')}, "
        f"d_model {c['d_model']:,}, vocabulary {c['d_vocab']:,}; computed in {m.config['compute']}"
    )
    for note in m.model.get("notes", ()):
        print(f"         {note}")
    print(
        f"text     {count(m.n_sequences, 'sequence')} of {count(m.n_positions, 'position')} from "
        f"{source[0]['path'] if len(source) == 1 else count(len(source), 'file')}; {n:,} computed"
    )
    for line in text_lines(m.text):
        print(f"         {line}")
    made = m.made_by
    products = (
        "" if made.get("products", "torch") == "torch" else f", products by {made['products']}"
    )
    print(
        f"made by  headwater {made['headwater']}, torch {made['torch']}, {made['processor']}{products}"
    )
    _print_mixed(run)
    for spec in m.arrays:
        print(array_line(spec, spec.stored_bytes(m.n_sequences)))
    if run.path.local is None:
        print(
            f"open it  import headwater\n         run = headwater.open_run({str(run.path)!r}).to_xarray()"
        )
    else:
        print(
            f"open it  import xarray\n         run = xarray.open_zarr({str(run.path)!r}, chunks=None)"
        )
    print(f"         run[{m.arrays[0].name!r}]")
    return DONE


def _mixed(run: Run) -> list[dict[str, Any]]:
    """List in what makers differ from the run's own, each with its blocks."""
    mixed = run.ledger.mixed(run.manifest.made_by)
    return [{"made_by": dict(other), "blocks": blocks} for other, blocks in mixed.items()]


def _print_mixed(run: Run) -> None:
    """Name the blocks that something else made than what the run names: their last bits may differ."""
    for other, blocks in run.ledger.mixed(run.manifest.made_by).items():
        what = ", ".join(f"{name} {value}" for name, value in other)
        print(f"mixed    {_ranges(blocks)} made with {what}: last bits may differ")


def _ranges(blocks: list[int]) -> str:
    """Write block numbers as ranges: blocks 0 to 3, 7."""
    starts = [b for b, before in zip(blocks, [None, *blocks], strict=False) if before != b - 1]
    ends = [b for b, after in zip(blocks, [*blocks[1:], None], strict=True) if after != b + 1]
    ranges = [f"{a} to {b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)]
    more = f" and {len(ranges) - SHOWN_RANGES:,} more ranges" if len(ranges) > SHOWN_RANGES else ""
    return f"block{'s' if len(blocks) > 1 else ''} {', '.join(ranges[:SHOWN_RANGES])}{more}"


def run_verify(options: Any) -> int:
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
    fixed: list[int] = []
    if options.repair and report.problems:
        with hold(run.path):
            fixed = repair(run, report)
    bad = [p for p in report.problems if not (options.repair and p.repairable)]
    if options.json:
        print_json(
            {
                "run": options.run,
                "n_blocks": report.n_blocks,
                "committed": report.n_committed,
                "n_files": report.n_files,
                "n_bytes": report.n_bytes,
                "quick": options.quick,
                "uncommitted": fixed,
                "mixed": _mixed(run),
                "problems": [vars(p) for p in report.problems],
                "notes": report.notes,
            }
        )
        return FAILED if bad else DONE
    for problem in report.problems:
        print(
            f"{problem.path}: {problem.what}"
            + ("" if problem.block is None else f" (block {problem.block})")
        )
    print(
        f"{count(report.n_files, 'file')}, {show_bytes(report.n_bytes)}, {report.n_committed:,} of "
        f"{count(report.n_blocks, 'block')}: {count(len(report.problems), 'problem')}"
        f"{' (lengths and indexes only)' if options.quick else ''}"
    )
    _print_mixed(run)
    for note in report.notes:
        print(note)
    if fixed:
        print(
            f"took {count(len(fixed), 'block')} out; `headwater extract --out {options.run}` computes them again"
        )
    if any(not p.repairable for p in bad):
        print(
            "files that are written once cannot be repaired: restore them from a copy, or extract the run anew"
        )
    elif bad:
        print(
            f"`headwater verify --repair {options.run}` takes the damaged blocks out, to be computed again"
        )
    return FAILED if bad else DONE


def run_sites(options: Any) -> int:
    """List the sites, with their sizes for a model where one is named."""
    from headwater.extractor.sites import PRESETS, SITES

    sizes: dict[str, int] = {}
    if options.model:
        from headwater.extractor.model.weights import read_config

        c = read_config(options.model)
        sizes = {
            "layer": c.n_layer,
            "depth": c.n_layer + 1,
            "head": c.n_head,
            "d_model": c.d_model,
            "d_head": c.d_head,
            "d_mlp": c.d_mlp,
            "d_vocab": c.d_vocab,
        }
    if options.json:
        print_json(
            {
                s.name: {
                    "dims": s.dims,
                    "title": s.title,
                    "transformer_lens": s.alias,
                    "sizes": {d: sizes[d] for d in s.dims if d in sizes},
                }
                for s in SITES.values()
            }
        )
        return DONE
    for site in SITES.values():
        dims = ", ".join(f"{d} {sizes[d]}" if d in sizes else d for d in site.dims)
        print(
            f"{site.name:15} {site.title}\n{'':15} ({dims})"
            + (f"  {site.alias.format('L')}" if site.alias else "")
        )
    print("\npresets")
    for name, members in PRESETS.items():
        others = [site for site in SITES if site not in members]
        listed = f"every site but {', '.join(others)}" if name == "all" else ", ".join(members)
        print(f"  {name:11} {listed}")
    return DONE


def _config(options: Any, out: str | None = None) -> RunConfig:
    from headwater.extractor.request import make_config

    return make_config(vars(options), options.config, out)
