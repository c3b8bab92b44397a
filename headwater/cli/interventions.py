"""The commands that intervene: plateau, patch, ablate."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.command import DONE, Command, Parser, add_options, part_of
from headwater.cli.show import print_json

if TYPE_CHECKING:
    from headwater.analysis.interventions.requests import Intervention
    from headwater.store.place import Place


PLATEAU = """\
Move the residual stream at one depth and position from prompt A's state to prompt B's, in A's context, and see how flat
the output is: curves and widths at every later depth and at the logits, for many pairs and depths at once.

PAIRS.jsonl has one pair a line, text or lists of token ids: {"a": "The house is", "b": "The river was"}"""
PLATEAU_EXAMPLES = """examples:
  headwater plateau --model gpt2 --a "The house is" --b "The river was" --depths 0,2,6
  headwater plateau --model gpt2 --pairs pairs.jsonl --parts --heads          what makes the plateaus, layer by layer
  headwater plateau --model gpt2 --pairs pairs.jsonl --run run --paths linear,random,covariance
"""
PATCH = """\
Put clean values into a corrupt run, one site, layer and position (and head) at a time, and see how much of the logit
difference between the right and the wrong answer comes back.

PAIRS.jsonl has lines of equally long prompts: {"clean": "…", "corrupt": "…", "answer": " Paris", "wrong": " Rome"}"""
PATCH_EXAMPLES = """examples:
  headwater patch --model gpt2 --pairs capitals.jsonl
  headwater patch --model gpt2 --pairs capitals.jsonl --sites z --by-head --layers 6:12
"""
ABLATE = """\
Scale what is at a place over a grid and see what depends on it: loss, mass on the first key by layer and head, norms
and cosines of the residual stream, and the derivatives of loss and first-token shares by the scale at 1."""
ABLATE_EXAMPLES = """examples:
  headwater ablate --run run --target 'resid[3] position=first dim=447'
  headwater ablate --run run --target 'resid[3:] position=first dim=447' --hold --scales 0,0.5,1,1.5,2
  headwater ablate --model gpt2 --text book.txt --seq-len 256 --target 'z[5]' --sweep head --scales 0
  headwater ablate --run run --effects                       what the loss needs, head by head: directly and in total
  headwater ablate --model gpt2 --repeated 262,13 --repeated 464+383+632 --lengths 16,64,256
"""


def add_plateau(parser: Parser) -> None:
    """Add the arguments of `plateau`."""
    parser.description = PLATEAU
    parser.epilog = PLATEAU_EXAMPLES
    parser.usage = (
        "headwater plateau (--pairs PAIRS.jsonl | --a TEXT --b TEXT) [more of the arguments below]"
    )
    _add_settings(parser, "plateau")


def add_patch(parser: Parser) -> None:
    """Add the arguments of `patch`."""
    parser.description = PATCH
    parser.epilog = PATCH_EXAMPLES
    parser.usage = "headwater patch --pairs PAIRS.jsonl [more of the arguments below]"
    _add_settings(parser, "patch")


def add_ablate(parser: Parser) -> None:
    """Add the arguments of `ablate`."""
    parser.description = ABLATE
    parser.epilog = ABLATE_EXAMPLES
    parser.usage = "headwater ablate (--run RUN | --tokens IDS.npy | --text PATH …) --target PLACE [more below]"
    _add_settings(parser, "ablate")


def _add_settings(parser: Parser, kind: str) -> None:
    """Add the settings of the request, and what becomes of its results."""
    from headwater.analysis.interventions.requests import MODEL_PART, REQUESTS

    add_options(parser, REQUESTS[kind])
    part = part_of(parser, MODEL_PART)
    part.add_argument(
        "--out",
        metavar="NAME",
        help="keep the results in NAME.analysis (default: beside --run, else here)",
    )
    part.add_argument("--plot", metavar="DIR", help="draw the results as .png files in DIR")


def run_intervention(options: Namespace) -> int:
    """Make the request of the flags that were given; keep and print what it finds."""
    from headwater.analysis.interventions.requests import REQUESTS, make_request

    kind = options.command.name
    # Only what was given, so that the request's own defaults hold.
    given: dict[str, object] = {}
    for item in fields(REQUESTS[kind]):
        value = getattr(options, item.name)
        if value is not None:
            given[item.name] = value
    request = make_request(kind, given)
    found, _ = request.results()
    return _report(options, request, found)


def _report(options: Namespace, request: Intervention, found: Sequence[Any]) -> int:
    """Keep results, draw them where asked, and print their figures."""
    from headwater.analysis.interventions.figures import headline
    from headwater.store.place import place_of

    # Beside the run that was named, else under the command's name in the directory one is in.
    home = place_of(options.out or getattr(options, "run", None) or options.command.name)
    # Results of other settings are moved aside, never overwritten: they may have taken hours.
    paths, aside = request.keep(home, found)
    figures: list[Path] = []
    if options.plot:
        figures = _draw(options, found, home)
    lines = [headline(dataset) for dataset in found]
    if options.json:
        print_json(
            [
                {"analysis": d.attrs["analysis"], "path": str(path), "figures": figure}
                for d, path, figure in zip(found, paths, lines, strict=True)
            ]
        )
        return DONE
    for dataset, path, figure in zip(found, paths, lines, strict=True):
        print(f"{dataset.attrs['analysis']}")
        for label, value in figure.items():
            print(f"  {label:34} {_shown(value)}")
        print(f"  kept in {path}")
    for file in figures:
        print(f"drew {file}")
    for other in aside:
        print(f"earlier results of other settings are kept in {other}")
    return DONE


def _draw(options: Namespace, found: Sequence[Any], home: Place) -> list[Path]:
    from headwater.analysis.engine.results import RunResults
    from headwater.analysis.plots.catalogue import draw, save_figures

    results = RunResults(home.name, {dataset.attrs["analysis"]: dataset for dataset in found}, home)
    return save_figures(draw([results]), Path(options.plot))


def _shown(value: object) -> str:
    """Write a figure, or several: four digits, and a dash where there is none."""
    if isinstance(value, str):
        return value
    values = value if isinstance(value, list) else [value]
    return " ".join(map(_digits, values))


def _digits(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


COMMANDS = (
    Command(
        "plateau",
        "move a state from one prompt's to another's, and see plateaus",
        add_plateau,
        run_intervention,
    ),
    Command(
        "patch",
        "patch clean activations into a corrupt prompt, place by place",
        add_patch,
        run_intervention,
    ),
    Command(
        "ablate",
        "scale what is at a place, and see loss, sinks and gradients",
        add_ablate,
        run_intervention,
    ),
)
