"""The command that follows a training over its checkpoints: dynamics."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from headwater.cli.command import DONE, Command, Parser, add_options
from headwater.cli.show import print_json

TEXT = ("text", "tokens", "seq_len", "bos", "max_sequences", "tokenizer")
ABOUT = """\
Run the checkpoints of one training over the same text, and follow the largest activation, the attention on the first
token, the spectrum of the residual stream and the loss from one to the next. With --out the figures of every layer,
depth and head are kept as one Zarr group with the dimension step (xarray.open_zarr opens it)."""
EXAMPLES = """examples:
  headwater dynamics out/step-* --text book.txt --bos --max-sequences 32 --out dynamics.zarr
  headwater dynamics 0=random-init 5000=ckpt.pt --tokens ids.npy
"""


def add_dynamics(parser: Parser) -> None:
    """Add the arguments of `dynamics`."""
    from headwater.extractor.request import RunConfig

    parser.description = ABOUT
    parser.epilog = EXAMPLES
    parser.usage = "headwater dynamics CHECKPOINT … (--text PATH … | --tokens IDS.npy) [more of the arguments below]"
    parser.add_argument(
        "checkpoints",
        metavar="CHECKPOINT",
        nargs="+",
        help="models as `extract` takes them, with their step in the name (step-200) or as STEP=MODEL",
    )
    add_options(parser, RunConfig, TEXT)
    parser.add_argument(
        "--runs", metavar="DIR", help="keep the run of each checkpoint in DIR, and go on from there"
    )
    parser.add_argument(
        "--out", metavar="ZARR", help="Zarr group for the figures; it must not exist yet"
    )


def run_dynamics(options: Namespace) -> int:
    """Measure the checkpoints and print a line for each."""
    from headwater.analysis.engine.results import save_at
    from headwater.analysis.studies.dynamics import dynamics, name_steps

    # Refused before the checkpoints are run, which takes long.
    if options.out is not None and Path(options.out).exists():
        raise ValueError(f"--out {options.out} exists already. Name another place, or remove it.")
    # What is not given is left to the defaults of RunConfig, which every checkpoint's run is made with.
    settings = {name: value for name in TEXT if (value := getattr(options, name)) is not None}
    found = dynamics(name_steps(options.checkpoints), options.runs, **settings)
    if options.out is not None:
        save_at(Path(options.out), found)
    rows = [_row(found.isel(step=i)) for i in range(found.sizes["step"])]
    if options.json:
        print_json(rows)
        return DONE
    print(f"{'step':>8} {'loss':>7} {'share':>6} {'head':>6} {'largest':>9} {'× median':>9}  where")
    for row in rows:
        where = f"depth {row['depth']}, position {row['position']}, dimension {row['dimension']}"
        print(
            f"{row['step']:8d} {row['loss']:7.3f} {row['share']:6.3f} {row['share_of_strongest_head']:6.3f} "
            f"{row['largest']:9.1f} {row['ratio']:9.1f}  {where}"
        )
    print(
        "share: attention on the first token, queries of the second half, mean of all heads; head: strongest head"
    )
    return DONE


def _row(one: Any) -> dict[str, Any]:
    """Return the headline figures of one step."""
    # Queries of the second half alone: the first ones see few keys, so their share of the first is large in any model.
    share = one.first_token_share.sel(query_set="second_half")
    at = one.isel(depth=int(abs(one.largest).argmax("depth")))
    return {
        "step": int(one.step),
        "model": str(one.model.values),
        "loss": float(one.loss),
        "share": float(share.mean()),
        "share_of_strongest_head": float(share.max()),
        "largest": float(at.largest),
        "ratio": float(at.largest_ratio),
        "depth": int(at.depth),
        "position": int(at.largest_position),
        "dimension": int(at.largest_dimension),
    }


COMMANDS = (
    Command(
        "dynamics",
        "follow sinks and massive activations over checkpoints",
        add_dynamics,
        run_dynamics,
    ),
)
