"""The arguments of the commands that analyse, and what they mean."""

from __future__ import annotations

import os
import re
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from headwater.cli.command import Parser, number

if TYPE_CHECKING:
    from headwater.analysis.engine.analysis import Analysis
    from headwater.analysis.engine.scan import Scan, ScanProgress
    from headwater.extractor.settings import Option

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
ANALYZE = """\
Analyse runs and keep the results beside them, in RUN.analysis, one Zarr group for each analysis (xarray.open_zarr opens
them). Without names, everything that the run's sites allow is done, and what is left out is named with its reason. A
result that is there already is used again. All analyses of a run share its reads; stop it whenever you like, the same
command goes on where it was."""
EXAMPLES = """examples:
  headwater analyze run
  headwater analyze small medium large sinks --epsilon 0.2
  headwater analyze run svd top --site mlp_out --memory 2GB --workers 4
"""


def add_analyze(parser: Parser) -> None:
    """Add the arguments of `analyze`."""
    from headwater.analysis.suite.registry import analyses

    listed = "\n".join(f"  {name:15} {kind.title}" for name, kind in analyses().items())
    parser.description = f"{ANALYZE}\n\nanalyses:\n{listed}"
    parser.epilog = EXAMPLES
    parser.usage = "headwater analyze RUN … [ANALYSIS …] [more of the arguments below]"
    parser.add_argument(
        "names",
        metavar="RUN|ANALYSIS",
        nargs="+",
        help="directories of runs, then names of analyses",
    )
    parser.add_argument(
        "--again", action="store_true", help="compute results anew that are there already"
    )
    add_scan(parser)
    add_options(parser)


def add_scan(parser: Parser) -> None:
    """Add how runs are read."""
    part = parser.add_argument_group("how the run is read")
    part.add_argument(
        "--memory", metavar="BYTES", help="most memory to use, such as 2GB; less means more reads"
    )
    part.add_argument(
        "--workers",
        metavar="N",
        default="1",
        help="blocks computed at once (default: 1); same results",
    )
    part.add_argument("--processes", action="store_true", help="workers are processes, not threads")
    part.add_argument(
        "--ray", metavar="ADDRESS", help="workers are on a Ray cluster: auto, its address, or local"
    )
    part.add_argument(
        "--partial", action="store_true", help="analyse the finished blocks of an unfinished run"
    )


def add_options(parser: Parser) -> None:
    """Add what analyses can be told; every flag goes to those of the chosen analyses that take it."""
    from headwater.analysis.suite.registry import all_options

    part = parser.add_argument_group("what analyses take")
    for name, takers in all_options().items():
        option = takers[0][1]
        if option.kind.schema.get("type") != "boolean":
            part.add_argument(
                option.flag, dest=name, metavar=option.metavar or "VALUE", help=help_of(takers)
            )
        elif option.default is None:
            part.add_argument(
                option.flag, dest=name, action=BooleanOptionalAction, help=help_of(takers)
            )
        else:
            part.add_argument(
                option.flag, dest=name, action="store_true", default=None, help=help_of(takers)
            )


def help_of(takers: Sequence[tuple[type[Analysis], Option]]) -> str:
    """Return the help of a setting: what each analysis says of it, those that say the same together."""
    said: dict[str, dict[str, str]] = {}
    for kind, option in takers:
        said.setdefault(option.help, {})[kind.name] = _default(option.default)
    return "; ".join(f"{text} ({_takers(defaults)})" for text, defaults in said.items())


def _takers(defaults: Mapping[str, str]) -> str:
    """Name the analyses that take a setting, with their defaults."""
    distinct = set(defaults.values())
    if distinct == {""}:
        return ", ".join(defaults)
    if len(distinct) == 1:
        return f"{', '.join(defaults)}; default: {distinct.pop()}"
    return ", ".join(f"{name}: {default}" for name, default in defaults.items())


def _default(value: object) -> str:
    """Write a default as the flag would have it; "" for one that the help text tells of."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if value is None or isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def add_weights(parser: Parser) -> None:
    """Add the arguments of `weights`."""
    parser.description = (
        "Decompose the weights of models: singular values and directions of every OV and QK circuit, W_in and W_out, "
        "with\nthe tokens that they read and write. Keeps MODEL.weights, a Zarr group, or RUN.analysis/weights where "
        "--corpus\nis a run of that model: then `headwater report RUN` shows it."
    )
    parser.add_argument(
        "--model", metavar="M", nargs="+", required=True, help="directories, hub ids, or demo"
    )
    parser.add_argument(
        "--directions",
        metavar="N",
        type=_count,
        default=30,
        help="directions of each (default: 30)",
    )
    parser.add_argument(
        "--tokens", metavar="N", type=_count, default=20, help="tokens of each sign (default: 20)"
    )
    parser.add_argument(
        "--corpus",
        metavar="RUN|TEXT",
        help="score the directions on a run's tokens or a text: how "
        "many are coherent, by layer, beside the sinks that are kept with that run",
    )
    parser.add_argument(
        "--out", metavar="DIR", help="where to keep the results (default: see above)"
    )


def add_plot(parser: Parser) -> None:
    """Add the arguments of `plot`."""
    parser.description = (
        "Draw the results that are kept beside runs. Several runs share one axis, depth / n_layer, where that makes "
        "sense."
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="*", help="directories of runs that were analysed"
    )
    parser.add_argument(
        "--list", action="store_true", help="list the figures there are, and draw none"
    )
    parser.add_argument(
        "--figures",
        metavar="A,B",
        help="figures by name, see --list (default: all that the results allow)",
    )
    parser.add_argument(
        "--format", metavar="F", default="png", help="png, svg or pdf (default: png)"
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="where to write them (default: RUN.analysis/plots, of several runs plots-with-…); figures of the same "
        "names there are replaced, also those of other runs",
    )


def add_report(parser: Parser) -> None:
    """Add the arguments of `report`."""
    parser.description = (
        "Analyse runs as `headwater analyze RUN` does, and write one HTML page with the figures, the headline numbers, "
        "the\ndefinitions and where it all comes from. The page asks for nothing from outside."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="directories of runs")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="page to write (default: RUN.analysis/report.html, report-with-… of several)",
    )
    parser.add_argument(
        "--again", action="store_true", help="compute results anew that are there already"
    )
    add_scan(parser)
    add_options(parser)


def add_compare(parser: Parser) -> None:
    """Add the arguments of `compare`."""
    parser.description = (
        "Print the headline figures of runs that were analysed, side by side: sizes of a model, or checkpoints of one "
        "training in the order of their steps."
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="directories of runs that were analysed"
    )
    parser.add_argument(
        "--steps",
        metavar="A,B",
        help="training steps (default: of names such as step-1000 or ckpt-1000)",
    )


def split_names(words: list[str]) -> tuple[list[str], list[str]]:
    """Tell runs from analyses; raise ValueError where there is no run or a word is neither."""
    from headwater.analysis.suite.registry import analyses

    known = analyses()
    runs = [word for word in words if word not in known]
    names = [word for word in words if word in known]
    for word in runs:
        if not os.path.isdir(word) and not re.search(r"[/.\\]", word) and runs.index(word) > 0:
            raise ValueError(
                f"{word!r} is neither a run nor an analysis; analyses are {', '.join(known)}. Name runs first."
            )
    if not runs:
        raise ValueError(f"no run is named; expected `headwater analyze RUN … {' '.join(names)}`.")
    return runs, names


def read_scan(options: Namespace, observe: Callable[[ScanProgress], None] | None = None) -> Scan:
    """Return how to read runs; raise ValueError for values that make no sense."""
    from headwater.analysis.engine.scan import Scan
    from headwater.analysis.suite.analyze import KEEP_SECONDS

    workers = _whole("--workers", options.workers, 1)
    memory = None if options.memory is None else read_bytes(options.memory)
    pool = getattr(options, "pool", None) or ("processes" if options.processes else None)
    return Scan(workers, pool, memory, options.partial, KEEP_SECONDS, observe)


def read_options(options: Namespace, names: Sequence[str] = ()) -> dict[str, object]:
    """Return the options of analyses that were given, in the types of the first of the named ones that takes them."""
    from headwater.analysis.suite.registry import all_options

    found: dict[str, object] = {}
    for name, takers in all_options().items():
        value = getattr(options, name)
        if value is None:
            continue
        mine = [option for kind, option in takers if kind.name in names]
        option = (mine or [option for _, option in takers])[0]
        found[name] = option.kind.read(option.flag, _typed(option, value))
    return found


def _typed(option: Option, value: object) -> object:
    """Return a whole number where one is wanted and written; anything else as it is, for the option to read."""
    if option.kind.schema.get("type") == "integer" and isinstance(value, str):
        return number(value)
    return value


def read_bytes(text: str) -> int:
    """Read a number of bytes such as 2GB, 512M or 1e9."""
    match = re.fullmatch(r"\s*([\d.]+(?:e\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    try:
        n = int(float(match[1]) * UNITS[match[2]]) if match else 0
    except ValueError:
        n = 0
    if n <= 0:
        raise ValueError(f"--memory is {text!r}; expected a number of bytes such as 2GB or 512MB.")
    return n


def _whole(flag: str, text: str, least: int = 1) -> int:
    try:
        n = int(text)
    except ValueError:
        n = least - 1
    if n < least:
        raise ValueError(f"{flag} is {text!r}; expected a whole number from {least} on.")
    return n


def read_numbers(flag: str, text: str) -> list[int]:
    """Read whole numbers such as 16,64,256."""
    return [_whole(flag, part, 0) for part in text.split(",")]


def _count(text: str) -> int | str:
    return int(text) if text.isdigit() else text
