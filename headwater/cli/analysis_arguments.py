"""The arguments of the commands that analyse, and what they mean."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from headwater.analysis.suite.registry import ENTRIES

if TYPE_CHECKING:
    from headwater.analysis.engine.scan import Scan

ANALYSES = {entry.name: entry.title for entry in ENTRIES}
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


def add_analyze(parser: Any) -> None:
    """Add the arguments of `analyze`."""
    listed = "\n".join(f"  {name:15} {text}" for name, text in ANALYSES.items())
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


def add_scan(parser: Any) -> None:
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


def add_options(parser: Any) -> None:
    """Add what analyses can be told; every flag goes to those of the chosen analyses that take it."""
    part = parser.add_argument_group("what analyses take")
    for flag, (name, kind, text) in OPTIONS.items():
        if kind is None:
            part.add_argument(flag, dest=name, action="store_true", default=None, help=text)
        else:
            part.add_argument(flag, dest=name, metavar=flag.rpartition("-")[2].upper(), help=text)


def add_weights(parser: Any) -> None:
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


def add_plot(parser: Any) -> None:
    """Add the arguments of `plot`."""
    parser.description = (
        "Draw the results that are kept beside runs. Several runs share one axis, depth / n_layer, where that makes "
        "sense."
    )
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="directories of runs that were analysed"
    )
    parser.add_argument(
        "--figures", metavar="A,B", help="figures by name (default: all that the results allow)"
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


def add_report(parser: Any) -> None:
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


def add_compare(parser: Any) -> None:
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
    runs = [word for word in words if word not in ANALYSES]
    names = [word for word in words if word in ANALYSES]
    for word in runs:
        if not os.path.isdir(word) and not re.search(r"[/.\\]", word) and runs.index(word) > 0:
            raise ValueError(
                f"{word!r} is neither a run nor an analysis; analyses are {', '.join(ANALYSES)}. Name runs first."
            )
    if not runs:
        raise ValueError(f"no run is named; expected `headwater analyze RUN … {' '.join(names)}`.")
    return runs, names


def read_scan(options: Any, observe: Callable[[Any], None] | None = None) -> Scan:
    """Return how to read runs; raise ValueError for values that make no sense."""
    from headwater.analysis.engine.scan import Scan
    from headwater.analysis.suite.analyze import KEEP_SECONDS

    workers = _whole("--workers", options.workers, 1)
    memory = None if options.memory is None else read_bytes(options.memory)
    pool = getattr(options, "pool", None) or ("processes" if options.processes else None)
    return Scan(workers, pool, memory, options.partial, KEEP_SECONDS, observe)


def read_options(options: Any) -> dict[str, Any]:
    """Return the options of analyses that were given, in their own types."""
    found = {}
    for flag, (name, kind, _) in OPTIONS.items():
        value = getattr(options, name)
        if value is not None:
            found[name] = True if kind is None else kind(flag, value)
    return found


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


def _whole(flag: str, text: Any, least: int = 1) -> int:
    try:
        n = int(text)
    except ValueError:
        n = least - 1
    if n < least:
        raise ValueError(f"{flag} is {text!r}; expected a whole number from {least} on.")
    return n


def _fraction(flag: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{flag} is {text!r}; expected a number such as 0.3.") from None


def _word(flag: str, text: str) -> str:
    return text


def read_numbers(flag: str, text: str) -> list[int]:
    """Read whole numbers such as 16,64,256."""
    return [_whole(flag, part, 0) for part in text.split(",")]


def _outliers(flag: str, text: str) -> str | list[int]:
    return [] if text == "none" else text


def _pairs(flag: str, text: str) -> str:
    if text not in ("consecutive", "all"):
        raise ValueError(f"{flag} is {text!r}; expected consecutive or all.")
    return text


def _sign(flag: str, text: str) -> int:
    return -1 if text in ("-", "-1") else _whole(flag, text)


def _count(text: str) -> Any:
    return int(text) if text.isdigit() else text


OPTIONS: dict[str, tuple[str, Callable[[str, str], Any] | None, str]] = {
    "--model": (
        "model",
        _word,
        "the run's model, where it has moved (massive_origin, svd_tokens, lens, attribution, "
        "false_sinks)",
    ),
    "--layers": (
        "layers",
        _word,
        "layers: 0,4:8, -1 (sinks, heads, favourites; default: all stored)",
    ),
    "--epsilon": ("epsilon", _fraction, "ε of Sink_k^ε (sinks, false_sinks; default: 0.3)"),
    "--window": ("window", _whole, "T of Sink_k^ε (sinks; default: 64)"),
    "--source": ("source", _word, "pattern, statistics or auto (sinks; default: auto)"),
    "--outliers": (
        "outliers",
        _outliers,
        "dimensions that the variant without outliers leaves out: large (those with "
        "massive activations), none, or a list (cosine; default: large)",
    ),
    "--cka": ("pairs", _pairs, "consecutive or all depths (cka; default: consecutive)"),
    "--site": ("site", _word, "site (svd, massive, top; default: resid, for top mlp_post)"),
    "--at": ("at", _word, "layers or depths: 0,4:8, -1 (svd, top; default: all stored)"),
    "--k": ("k", _whole, "directions of svd (32), tokens of lens (10), contexts of top (10)"),
    "--units": (
        "units",
        _word,
        "neurons, dimensions, heads or directions (top; default: those that stand out)",
    ),
    "--sign": ("sign", _sign, "1 for the largest values, -1 for the smallest (top; default: 1)"),
    "--reach": ("reach", _whole, "tokens shown on either side (top; default: 8)"),
    "--directions": (
        "directions",
        None,
        "units are the directions of the kept svd of the site (top)",
    ),
    "--level": (
        "level",
        _word,
        "large, strict, largest (massive_origin; default: large, or largest where none is)",
    ),
    "--sequences": ("n_sequences", _whole, "sampled rows (heads: 128, attribution: 16)"),
    "--positions": (
        "n_positions",
        _whole,
        "sampled positions of a row (lens: 64, attribution: 32)",
    ),
    "--queries": ("n_queries", _whole, "sampled queries of a row (heads; default: 32)"),
    "--lengths": (
        "lengths",
        read_numbers,
        "lengths of repeated tokens (false_sinks; default: 16,64,256)",
    ),
}
