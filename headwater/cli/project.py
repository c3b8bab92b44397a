"""The command that makes a run of projections: project."""

from __future__ import annotations

import sys
from argparse import Namespace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from headwater.cli.analysis_arguments import add_scan, read_scan
from headwater.cli.command import DONE, Command, Parser
from headwater.cli.show import array_line, print_json

ABOUT = """\
Write the projections of a run onto its first k principal directions as a run of its own, with the same text: stream,
verify, info and xarray take it like any other. Stop it whenever you like, the same command goes on where it was. The
directions are those of `headwater analyze RUN svd`, and are computed where they are not kept yet."""
EXAMPLES = """examples:
  headwater project run --out run-64 --k 64
  headwater project run --out run-z --site z --at 3:6 --k 8 --centring raw
  headwater project other --directions run --out other-in-the-same-axes
"""


def add_project(parser: Parser) -> None:
    """Add the arguments of `project`."""
    parser.description = ABOUT
    parser.epilog = EXAMPLES
    parser.add_argument("run", metavar="RUN", help="directory of a run")
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="where the projections go: a new directory"
    )
    parser.add_argument("--site", metavar="S", default="resid", help="vector site (default: resid)")
    parser.add_argument("--k", metavar="N", type=int, default=32, help="directions (default: 32)")
    parser.add_argument(
        "--at",
        metavar="LIST",
        help="layers or depths, such as 0,4:8 or -1 (default: all that are stored)",
    )
    parser.add_argument(
        "--centring", default="centred", choices=("centred", "raw"), help="default: centred"
    )
    parser.add_argument(
        "--positions",
        default="without_first",
        choices=("without_first", "all"),
        help="rows that the directions are computed from (default: without_first)",
    )
    parser.add_argument(
        "--directions", metavar="RUN", help="take the directions of another run of the same model"
    )
    add_scan(parser)


def run_project(options: Namespace) -> int:
    """Compute the directions where they are not kept, then the projections; print what was made."""
    from headwater.analysis.engine.pools import open_pool
    from headwater.analysis.measures.project import project
    from headwater.analysis.measures.svd import SvdAnalysis
    from headwater.analysis.suite.analyze import analyze
    from headwater.cli.progress import ScanReporter
    from headwater.store.reader import open_run

    # Directions of another run of the same model make two runs comparable: the same axes for both.
    run = open_run(options.run)
    home = open_run(options.directions or options.run)
    # Only what differs from svd's own defaults, so that a kept result is used again.
    wanted: dict[str, Any] = {"site": options.site}
    # The usual result holds fewer directions too, so it is computed anew only for more than it has.
    if options.k > SvdAnalysis().k:
        wanted["k"] = options.k
    if options.at is not None:
        wanted["at"] = options.at
    reporter = ScanReporter(sys.stderr, str(home.path))
    try:
        with ExitStack() as stack:
            if options.ray is not None:
                options.pool = stack.enter_context(
                    open_pool(read_scan(options).workers, options.ray)
                )
            directions = analyze(home, ["svd"], wanted, read_scan(options, reporter)).results["svd"]
    finally:
        reporter.close()
    reporter = ScanReporter(sys.stderr, options.out)
    try:
        made = project(
            run,
            directions,
            Path(options.out),
            options.k,
            options.centring,
            options.positions,
            options.partial,
            reporter,
        )
    finally:
        reporter.close()
    (spec,) = made.manifest.arrays
    if options.json:
        print_json(
            {
                "run": options.out,
                "array": spec.name,
                "dims": list(spec.dims),
                "shape": list(spec.shape),
            }
        )
    else:
        print(f"{options.out}\n{array_line(spec, spec.stored_bytes(made.manifest.n_sequences))}")
    return DONE


COMMANDS = (
    Command(
        "project",
        "write projections onto principal directions as a run",
        add_project,
        run_project,
    ),
)
