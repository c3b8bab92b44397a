"""The commands that make runs, extract and plan; and `headwater.extract`, which shows its progress as they do."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from headwater.cli.command import DONE, Command, Parser, add_options, part_of
from headwater.cli.progress import Reporter
from headwater.cli.show import print_json, print_plan, print_projection, text_lines
from headwater.extractor.units import count, show_bytes

if TYPE_CHECKING:
    from headwater.extractor.limits import Projection
    from headwater.extractor.plan import Plan
    from headwater.extractor.progress import Observer
    from headwater.extractor.request import RunConfig
    from headwater.store.reader import Run

NOWHERE = "headwater-plan"
EXTRACT = """\
Run the model over text and store the chosen sites in a run: a directory of Zarr arrays.

Stop it whenever you like (Ctrl-C, a crash): finished blocks are kept, and the same command goes on
where it stopped. On a finished run it does nothing."""
EXTRACT_EXAMPLES = """examples:
  headwater extract --model demo --text README.md --out run
  headwater extract --model gpt2 --text corpus/ --out run --preset statistics --seq-len 512
  headwater extract --model gpt2 --text pile.jsonl --column text --labels source --mode document --out run
  headwater extract --model gpt2 --tokens ids.npy --sites resid,pattern --layers 0,4:8 --depths 4:9 --out run
  headwater extract --out run                      go on with an unfinished run
"""
STORED = """how values are stored:
  residual streams, q, k, v, z, neurons and patterns as float16 unless --dtype says otherwise, statistics
  as float32, indices as int32. A value too large for float16 stops the run; see --on-overflow.
"""
PLAN = """\
Show what `headwater extract` with the same arguments would write, array by array, and how much disk and memory
it needs. Reads the text to count it, but not the weights. Exit code 2 where it cannot fit."""
PLAN_EXAMPLE = """example:
  headwater plan --model gpt2 --text corpus/ --preset patterns --max-sequences 1000
"""


def extract(config: RunConfig, observe: Observer | None = None, *, progress: bool = True) -> Run:
    """Make a run, or go on with the one at `config.out`; return it for reading.

    Blocks that are committed are not computed again, so a finished run is left as it is. Progress goes to standard
    error: one line that is redrawn on a terminal, a plain line every ten seconds in notebooks and files;
    `progress=False` is silent. `observe`, where given, is called with every `Progress` instead. Raises RequestError or
    RunError for a request that cannot be met, and leaves the run resumable on every other error.
    """
    from headwater.extractor import run as extractor

    if observe is not None or not progress:
        return extractor.extract(config, observe)
    reporter = Reporter(sys.stderr)
    try:
        return extractor.extract(config, reporter)
    finally:
        reporter.close()


def add_extract(parser: Parser) -> None:
    """Add the arguments of `extract`: the fields of RunConfig, which checks the values."""
    parser.description = EXTRACT
    parser.epilog = f"{STORED}\n{EXTRACT_EXAMPLES}"
    parser.usage = "headwater extract --out RUN (--text PATH … | --tokens IDS.npy) [more of the arguments below]"
    _add_config(parser)


def add_plan(parser: Parser) -> None:
    """Add the arguments of `plan`: those of `extract`, and the rates of another machine."""
    parser.description = PLAN
    parser.epilog = PLAN_EXAMPLE
    parser.usage = "headwater plan (--text PATH … | --tokens IDS.npy) [more of the arguments below]"
    _add_config(parser)
    parser.add_argument(
        "--assume",
        metavar="RATES",
        help="rates of the machine that will run it, for the projected speed: compute=300,link=25,disk=2.5 (TFLOP/s, "
        "GB/s, GB/s)",
    )


def _add_config(parser: Parser) -> None:
    # Imported when one of these commands is asked for: numpy comes with the request.
    from headwater.extractor.request import HUB, RunConfig

    add_options(parser, RunConfig)
    part_of(parser, HUB).add_argument(
        "--config",
        metavar="FILE",
        help="TOML file of these arguments (seq_len = 512); what is given here wins over it",
    )


def read_config(options: Namespace, out: str | None = None) -> RunConfig:
    """Return the request of the flags and of the file --config; `out` is where --out is not given."""
    from headwater.extractor.request import make_config

    return make_config(vars(options), options.config, out)


def run_plan(options: Namespace) -> int:
    """Print the plan of an extraction, then refuse it where it cannot fit."""
    from headwater.extractor.budget import check_resources, free_disk
    from headwater.extractor.limits import device_bytes, find_rates, project, read_rates
    from headwater.extractor.machine import available_memory
    from headwater.extractor.run import plan_run
    from headwater.extractor.sites import SITES, SQUARE
    from headwater.store.manifest import check_target
    from headwater.store.place import place_of

    config = read_config(options, out=NOWHERE)
    out = place_of(config.out)
    stated = read_rates(options.assume) if options.assume else {}
    # Without --out a plan stands for a run in a directory here that nobody makes.
    if config.out != NOWHERE:
        check_target(out)
    plan = plan_run(config)
    free = free_disk(out)
    memory = available_memory()
    projection = project(plan, find_rates(config, stated))
    # What a GPU needs is projected from shapes; whether this machine has one does not matter here.
    on_device = None
    if config.device != "cpu":
        on_device = device_bytes(config, plan)
    if options.json:
        print_json(_plan_json(plan, projection, free, memory, on_device))
    else:
        print_plan(plan, free, memory)
        if on_device is not None:
            print(f"device  {show_bytes(on_device)} of memory needed on the GPU, projected")
        squares = [spec.name for spec in plan.arrays if SITES[spec.name].group == SQUARE]
        print_projection(projection, squares)
    # Last, so that who is refused has seen what it would have taken.
    check_resources(plan, out)
    return DONE


def _plan_json(
    plan: Plan, projection: Projection, free: int, memory: int, on_device: int | None
) -> dict[str, object]:
    sizes = plan.array_bytes()
    arrays = {}
    for spec in plan.arrays:
        arrays[spec.name] = {
            "n_bytes": sizes[spec.name],
            "dtype": spec.dtype,
            "codec": spec.codec,
            "sizes": dict(zip(spec.dims, spec.shape, strict=True)),
            "shard": spec.shard,
            "chunk": spec.chunk,
        }
    return {
        "n_sequences": plan.n_sequences,
        "seq_len": plan.geometry.seq_len,
        "block": plan.geometry.block,
        "n_blocks": plan.n_blocks,
        "arrays": arrays,
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


def run_extract(options: Namespace) -> int:
    """Extract, showing progress; print where the run is."""
    config = read_config(options)
    # Who forgot the file would wait for a command that waits for them.
    if "-" in config.text and sys.stdin is not None and sys.stdin.isatty():
        print("headwater: reading text from the terminal; end it with Ctrl-D", file=sys.stderr)
    run = _extract_and_say(config)
    if options.json:
        print_json(_made_json(run))
    else:
        _print_made(run)
    return DONE


def _extract_and_say(config: RunConfig) -> Run:
    """Extract; an error that stops it says what of the run is kept."""
    from headwater.extractor import run as extractor

    # Standard output is for the result, so that it can be piped; progress and errors have the other stream.
    reporter = Reporter(sys.stderr)
    try:
        return extractor.extract(config, reporter)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_kept(config)) from None
    except ValueError as error:
        # A plain ValueError while blocks are computed is no wrong request (exit code 2) but a failure (1). RequestError
        # and RunError, its subclasses, still mean the request.
        if reporter.computing and type(error) is ValueError:
            raise RuntimeError(f"{error}. {_kept(config)}") from error
        raise
    finally:
        reporter.close()


def _made_json(run: Run) -> dict[str, object]:
    manifest = run.manifest
    return {
        "run": str(run.path),
        "fingerprint": manifest.fingerprint,
        "n_sequences": manifest.n_sequences,
        "complete": int(run.complete.sum()),
        "seq_len": manifest.n_positions,
        "n_blocks": manifest.n_blocks,
        "n_bytes": _stored_bytes(run),
        "documents": manifest.text.get("documents"),
        "sites": run.sites,
    }


def _print_made(run: Run) -> None:
    manifest = run.manifest
    # The first line, on special tokens, is for `info`; what was cut off is said at once.
    for line in text_lines(manifest.text)[1:]:
        print(line)
    sequences = count(int(run.complete.sum()), "sequence")
    positions = count(manifest.n_positions, "position")
    arrays = count(len(run.sites), "array")
    size = show_bytes(_stored_bytes(run))
    print(
        f"{run.path}: {sequences} of {positions}, {arrays}, {size}. See `headwater info {run.path}`."
    )
    for note in manifest.model.get("notes", ()):
        print(f"note: {note}")


def _stored_bytes(run: Run) -> int:
    return sum(entry.n_bytes for entry in run.ledger.entries())


def _kept(config: RunConfig) -> str:
    """Say what of a run is kept when it stops now."""
    from headwater.store.reader import open_run

    try:
        run = open_run(config.out)
        n_done = len(run.ledger.committed())
    except (OSError, ValueError):
        return "Nothing was computed yet: run the same command again to start over."
    blocks = count(run.manifest.n_blocks, "block")
    return f"{n_done:,} of {blocks} are kept in {config.out}: run the same command again to go on."


COMMANDS = (
    Command(
        "extract", "run a model over text and store the chosen sites", add_extract, run_extract
    ),
    Command("plan", "show what `extract` would write and need; write nothing", add_plan, run_plan),
)
