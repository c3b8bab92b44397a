"""The command that measures GPT-2's published figures on given weights: reproduce."""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.cli.command import DONE, FAILED, Command, Parser
from headwater.cli.show import print_json

if TYPE_CHECKING:
    from headwater.analysis.studies.reproduce import Row

VARIABLE = "HEADWATER_GPT2"


def add_reproduce(parser: Parser) -> None:
    """Add the arguments of `reproduce`."""
    parser.description = (
        "Extract two small runs with OpenAI's GPT-2 weights and print one table: published figures of massive\n"
        "activations, sinks and weights beside what was measured. They agree within 10 % on other text. Exit code 1 "
        "where one\ndoes not. A model of another size is measured alike, with nothing to compare."
    )
    parser.add_argument(
        "--model",
        metavar="M",
        help=f"directory or hub id of the weights (default: ${VARIABLE}, else gpt2)",
    )
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--text",
        metavar="PATH",
        nargs="+",
        help="text to run over (default: the help topics of Python's pydoc)",
    )
    parser.add_argument(
        "--sequences", type=int, default=8, metavar="N", help="sequences of each run (default: 8)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="directory to keep the two runs in (default: a temporary one)"
    )


def run_reproduce(options: Namespace) -> int:
    """Print the table; fail where a published figure is not met."""
    from headwater.analysis.studies.reproduce import reproduce

    if options.sequences < 1:
        raise ValueError(f"--sequences is {options.sequences}; expected a whole number from 1 on.")
    model = options.model or os.environ.get(VARIABLE) or "gpt2"
    # A text that every machine has: what Python's own help says.
    text = options.text or [str(files("pydoc_data") / "topics.py")]
    # Two runs of GPT-2 take gigabytes: they go unless --out keeps them.
    with tempfile.TemporaryDirectory() as folder:
        rows = reproduce(
            model, tuple(text), Path(options.out or folder), options.sequences, options.revision
        )
    if options.json:
        print_json({"model": model, "text": text, "rows": [vars(row) for row in rows]})
    else:
        _print_rows(rows)
    return FAILED if any(row.agrees is False for row in rows) else DONE


def _print_rows(rows: list[Row]) -> None:
    print(f"{'':70}{'published':>22}{'measured':>22}")
    for row in rows:
        # A place is a layer, or a layer and a head.
        where = ""
        if row.place:
            layer, *heads = row.place
            where = f", layer {layer}" + "".join(f" head {head}" for head in heads)
        verdict = {None: "", True: "  agrees", False: "  DIFFERS"}[row.agrees]
        print(f"{row.title + where:70}{_show(row.published):>22}{_show(row.measured):>22}{verdict}")
    compared = [row for row in rows if row.agrees is not None]
    if compared:
        print(
            f"{sum(bool(row.agrees) for row in compared)} of {len(compared)} published figures agree"
        )
    else:
        print("nothing is published for a model of this size; this is what it measures")


def _show(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


COMMANDS = (
    Command(
        "reproduce",
        "measure GPT-2's published figures on given weights",
        add_reproduce,
        run_reproduce,
    ),
)
