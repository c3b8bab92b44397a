"""The command line: every command is a thin layer over a function that Python can call too."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

import headwater

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0 done, 1 failed while running, 2 wrong request, 130 interrupted."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    parser = make_parser()
    options = parser.parse_args(arguments)
    if not hasattr(options, "command"):
        parser.print_help()
        return REFUSED
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return int(options.command(options))
    except KeyboardInterrupt:
        where = (
            f" Run the same command again to go on; {options.out} keeps every finished block."
            if "out" in options
            else ""
        )
        return _say(f"interrupted.{where}", INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except ValueError as error:
        return _say(f"error: {error}", REFUSED)
    except (OSError, RuntimeError, MemoryError) as error:
        return _say(f"error: {_reason(error, options)}", FAILED)


def make_parser() -> argparse.ArgumentParser:
    """Build the parser with the help of every command."""
    parser = argparse.ArgumentParser(
        prog="headwater",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Run a GPT-2-family model over text and store what happens inside it as Zarr arrays.",
        epilog="Start here:\n  headwater extract --model demo --text README.md --out run --preset all\n"
        "  headwater info run",
    )
    parser.add_argument("--version", action="version", version=f"headwater {headwater.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    plan = _command(commands, "plan", run_plan, "show what an extraction would write and need, and write nothing")
    _extraction(plan, out_required=False)
    extract = _command(commands, "extract", run_extract, "run the model over text and store the chosen sites")
    _extraction(extract, out_required=True)
    status = _command(commands, "status", run_status, "show how much of a run is done")
    status.add_argument("run", metavar="RUN")
    info = _command(commands, "info", run_info, "describe a run: model, text, arrays, and how to open it")
    info.add_argument("run", metavar="RUN")
    verify = _command(commands, "verify", run_verify, "check every byte of a run against its ledger")
    verify.add_argument("run", metavar="RUN")
    verify.add_argument("--quick", action="store_true", help="check only file lengths and shard indexes")
    verify.add_argument(
        "--repair",
        action="store_true",
        help="uncommit damaged blocks; `headwater extract --out RUN` then computes them again",
    )
    verify.add_argument("--workers", type=int, default=2, metavar="N", help="files read at once (default 2)")
    sites = _command(commands, "sites", run_sites, "list what can be captured")
    sites.add_argument("--model", metavar="M", help="show shapes for this model")
    return parser


def _command(commands: Any, name: str, function: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(command=function)
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    return parser


def _extraction(parser: argparse.ArgumentParser, out_required: bool) -> None:
    """Add the flags of `extract`; their names are the fields of RunConfig."""
    what = parser.add_argument_group("model and text")
    what.add_argument(
        "--model",
        metavar="M",
        help="a Hugging Face directory, a nanoGPT ckpt.pt, a hub id such as gpt2, or demo (default)",
    )
    what.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    what.add_argument(
        "--text",
        nargs="+",
        metavar="PATH",
        help="files (txt, jsonl, csv, parquet, arrow), directories, globs, or - for standard input",
    )
    what.add_argument(
        "--tokens", metavar="IDS.npy", help="ready token ids [sequence, position] instead of text; -1 pads"
    )
    what.add_argument(
        "--tokenizer", metavar="T", help="tokenizer.json, its directory, or a hub id (default: the model's)"
    )
    what.add_argument("--column", metavar="NAME", help="column that holds the text (default: text)")
    what.add_argument("--labels", type=_names, metavar="A,B", help="columns to keep as labels of each sequence")
    what.add_argument("--jsonl", action="store_true", default=None, help="standard input is JSON lines")
    rows = parser.add_argument_group("rows")
    rows.add_argument("--seq-len", type=int, metavar="N", help="positions a row (default: the model's n_ctx)")
    rows.add_argument(
        "--mode", metavar="MODE", help="pack: join documents and cut full rows (default); document: one a row"
    )
    rows.add_argument(
        "--within-documents",
        action="store_true",
        default=None,
        help="pack: keep attention and positions within each document",
    )
    rows.add_argument("--bos", action="store_true", default=None, help="put the beginning-of-text token first")
    rows.add_argument("--max-sequences", type=int, metavar="N", help="stop after N rows")
    rows.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens")
    sites = parser.add_argument_group("what to capture")
    sites.add_argument("--preset", metavar="P", help="residual (default), patterns, statistics or all")
    sites.add_argument(
        "--sites", type=_names, metavar="A,B", help="sites by name instead of a preset: see `headwater sites`"
    )
    sites.add_argument("--layers", metavar="L", help="layers, such as 0,4:8 (default: all)")
    sites.add_argument("--depths", metavar="D", help="depths of the residual stream, 0 to n_layer (default: all)")
    sites.add_argument("--heads", metavar="H", help="heads (default: all)")
    sites.add_argument(
        "--positions", metavar="P", help="positions of vector sites: last, or such as 0:16 (default: all)"
    )
    sites.add_argument("--top-k", type=int, metavar="K", help="how many of the largest logits (default 10)")
    store = parser.add_argument_group("how to compute and store")
    store.add_argument("--compute", metavar="C", help="fp32 (default), bf16 or fp16 matrix products")
    store.add_argument(
        "--dtype", metavar="D", help="float16 (default) or float32, with exceptions: float16,resid=float32"
    )
    store.add_argument(
        "--codec", metavar="C", help="none (default), zstd-1 or zstd-3, with exceptions: none,pattern=zstd-1"
    )
    store.add_argument(
        "--on-overflow", metavar="O", help="fail (default) or keep values that the stored dtype cannot hold"
    )
    store.add_argument("--block", type=int, metavar="B", help="sequences committed together, a power of two")
    store.add_argument("--threads", type=int, metavar="N", help="processor threads (default: all cores)")
    store.add_argument(
        "--other-processor",
        action="store_true",
        default=None,
        help="resume on another kind of processor or torch; last bits may differ",
    )
    store.add_argument("--config", metavar="FILE", help="TOML file of these settings; flags win")
    store.add_argument(
        "--out", required=out_required, metavar="RUN", help="directory of the run; an unfinished one is resumed"
    )


def run_plan(options: Any) -> int:
    """Print the plan of an extraction."""
    from headwater.extractor.plan import available_memory, check_resources, free_disk, show_bytes
    from headwater.extractor.run import plan_run

    config = _config(options, out=options.out or ".")
    plan = plan_run(config)
    n_tokens = plan.n_sequences * plan.geometry.seq_len
    if options.json:
        _print_json(
            {
                "n_sequences": plan.n_sequences,
                "seq_len": plan.geometry.seq_len,
                "block": plan.geometry.block,
                "n_blocks": plan.n_blocks,
                "arrays": plan.array_bytes(),
                "total_bytes": plan.total_bytes,
                "host_bytes": plan.host_bytes,
                "free_disk_bytes": free_disk(_path(config.out)),
                "available_memory_bytes": available_memory(),
            }
        )
    else:
        print(
            f"{plan.n_sequences} sequences of {plan.geometry.seq_len} positions, {plan.n_blocks} blocks of "
            f"{plan.geometry.block}"
        )
        for spec in plan.arrays:
            size = plan.array_bytes()[spec.name]
            dims = ", ".join(f"{d} {n}" for d, n in zip(spec.dims, spec.shape, strict=True))
            print(
                f"  {spec.name:15}{show_bytes(size):>9}  {show_bytes(size / n_tokens):>8} a token  {spec.dtype}"
                f"{'' if spec.codec == 'none' else ', ' + spec.codec}  ({dims})"
            )
        print(
            f"  {'total':15}{show_bytes(plan.total_bytes):>9}  {show_bytes(plan.total_bytes / n_tokens):>8} a token"
            f"{'  before zstd' if any(s.codec != 'none' for s in plan.arrays) else ''}"
        )
        print(
            f"free disk {show_bytes(free_disk(_path(config.out)))}; memory needed {show_bytes(plan.host_bytes)}, "
            f"available {show_bytes(available_memory())}"
        )
        if any(s.dtype == "float16" and s.name.startswith("resid") for s in plan.arrays):
            print(
                "note: float16 has steps of 2 between 2048 and 4096, where massive activations lie; "
                "--dtype resid=float32 keeps them exact"
            )
    check_resources(plan, _path(config.out))
    return DONE


def run_extract(options: Any) -> int:
    """Extract, showing progress; print where the run is."""
    from headwater.extractor.run import extract
    from headwater.progress import Reporter

    reporter = Reporter(sys.stderr)
    run = extract(_config(options), reporter)
    reporter.close()
    m, n = run.manifest, int(run.complete.sum())
    if options.json:
        _print_json(
            {
                "run": str(run.path),
                "n_sequences": m.n_sequences,
                "complete": n,
                "fingerprint": m.fingerprint,
                "n_bytes": _run_bytes(run),
                "blocks": m.n_blocks,
            }
        )
    else:
        print(f"{run.path}: {n} of {m.n_sequences} sequences of {m.n_positions} positions, {', '.join(run.sites)}")
    return DONE


def run_status(options: Any) -> int:
    """Print how much of a run is done, and where its time went."""
    from headwater.extractor.plan import show_bytes
    from headwater.store.reader import open_run

    run = open_run(options.run)
    entries = list(run.ledger.entries())
    seconds: dict[str, float] = {}
    for entry in entries:
        for phase, value in entry.seconds.items():
            seconds[phase] = seconds.get(phase, 0) + value
    report: dict[str, Any] = {
        "blocks": run.manifest.n_blocks,
        "committed": len(entries),
        "n_tokens": sum(e.n_tokens for e in entries),
        "n_bytes": sum(size for e in entries for size, _ in e.files.values()),
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
        "casts": {name: count for e in entries for name, count in e.casts.items()},
    }
    if options.json:
        _print_json(report)
        return DONE
    state = (
        "done"
        if report["committed"] == report["blocks"]
        else "resume with `headwater extract --out " + options.run + "`"
    )
    print(
        f"{report['committed']} of {report['blocks']} blocks, {report['n_tokens']} tokens, "
        f"{show_bytes(report['n_bytes'])}: {state}"
    )
    if entries:
        print("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
    for name, count in report["casts"].items():
        print(f"kept in {name}: {count['overflow']} overflowed and {count['nonfinite']} non-finite values (one block)")
    return DONE


def run_info(options: Any) -> int:
    """Describe a run and say how to open it."""
    from headwater.extractor.plan import show_bytes
    from headwater.store.reader import open_run

    run = open_run(options.run)
    m = run.manifest
    if options.json:
        raw = m.to_json()
        del raw["statics"]
        _print_json(raw)
        return DONE
    c = m.model["config"]
    print(f"{run.path}  fingerprint {m.fingerprint[:16]}")
    print(
        f"model    {m.model['name']}: {c['n_layer']} layers, {c['n_head']} heads, d_model {c['d_model']}, "
        f"vocabulary {c['d_vocab']}; computed in {m.config['compute']}"
    )
    print(
        f"text     {m.n_sequences} sequences of {m.n_positions} positions from "
        f"{len(m.text['sources'])} files; {int(run.complete.sum())} complete"
    )
    print(f"made by  headwater {m.made_by['headwater']}, torch {m.made_by['torch']}, {m.made_by['processor']}")
    for spec in m.arrays:
        dims = ", ".join(f"{d} {n}" for d, n in zip(spec.dims, spec.shape, strict=True))
        print(f"  {spec.name:15}{show_bytes(spec.stored_bytes(m.n_sequences)):>9}  {spec.dtype:8} ({dims})")
    print(f"""open it  import xarray as xr
         run = xr.open_zarr({str(run.path)!r}, chunks=None)
         run[{m.arrays[0].name!r}]""")
    return DONE


def run_verify(options: Any) -> int:
    """Check a run; print each problem with its path in the run."""
    from headwater.extractor.plan import show_bytes
    from headwater.store.lock import hold
    from headwater.store.reader import open_run
    from headwater.store.verify import repair, verify

    run = open_run(options.run)
    if options.workers < 1:
        raise ValueError(f"--workers is {options.workers}; expected a whole number from 1 on.")
    report = verify(run, options.quick, options.workers)
    fixed: list[int] = []
    if options.repair and report.problems:
        with hold(run.path):
            fixed = repair(run, report)
    if options.json:
        _print_json(
            {
                "blocks": report.n_blocks,
                "committed": report.n_committed,
                "files": report.n_files,
                "n_bytes": report.n_bytes,
                "uncommitted": fixed,
                "problems": [vars(p) for p in report.problems],
            }
        )
    else:
        for problem in report.problems:
            print(f"{problem.path}: {problem.what}" + ("" if problem.block is None else f" (block {problem.block})"))
        print(
            f"{report.n_files} files, {show_bytes(report.n_bytes)}, {report.n_committed} of {report.n_blocks} blocks: "
            f"{len(report.problems) or 'no'} problem{'' if len(report.problems) == 1 else 's'}"
            f"{' (lengths and indexes only)' if options.quick else ''}"
        )
        if fixed:
            print(f"uncommitted {len(fixed)} blocks; `headwater extract --out {options.run}` computes them again")
        elif any(p.block is None for p in report.problems):
            print("files that are written once cannot be repaired: restore them from a copy, or extract the run anew")
        elif report.problems:
            print(f"`headwater verify --repair {options.run}` uncommits the damaged blocks")
    bad = [p for p in report.problems if p.block not in fixed]
    return FAILED if bad else DONE


def run_sites(options: Any) -> int:
    """List the sites, with their shapes for a model where one is named."""
    from headwater.extractor.sites import PRESETS, SITES

    sizes: dict[str, Any] = {}
    if options.model:
        from headwater.extractor.weights import read_config

        c = read_config(options.model)
        sizes = {
            "layer": c.n_layer,
            "depth": c.n_layer + 1,
            "head": c.n_head,
            "d_model": c.d_model,
            "d_head": c.d_head,
            "d_mlp": c.d_mlp,
        }
    if options.json:
        _print_json(
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
        print(f"{site.name:15} {site.title}\n{'':15} ({dims})" + (f"  {site.alias.format('L')}" if site.alias else ""))
    print("\npresets")
    for name, members in PRESETS.items():
        print(f"  {name:11} {', '.join(members) if len(members) < len(SITES) else 'every site'}")
    return DONE


def _config(options: Any, **more: Any) -> Any:
    from headwater.extractor.config import make_config

    flags = {k: v for k, v in vars(options).items() if k not in ("command", "json", "config")}
    return make_config(flags | more, options.config)


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _path(text: str) -> Any:
    from pathlib import Path

    return Path(text)


def _run_bytes(run: Any) -> int:
    return sum(size for entry in run.ledger.entries() for size, _ in entry.files.values())


def _reason(error: BaseException, options: Any) -> str:
    import errno

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return (
            f"the disk is full ({error}). Every finished block is kept: free some space, then run the same command "
            "again to go on."
        )
    return str(error) or type(error).__name__


def _say(text: str, code: int) -> int:
    print(f"headwater: {text}", file=sys.stderr)
    return code


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    sys.exit(main())
