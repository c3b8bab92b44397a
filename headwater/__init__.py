"""Headwater turns what happens inside GPT-2-family models into Zarr data.

`extract` makes a run on disk, `open_run` reads one, `stream` hands its vectors out in shuffled batches, `capture` gives
a dataset in memory, and `analysis` measures runs:

    import headwater

    run = headwater.extract(headwater.RunConfig(model="demo", text=("book.txt",), out="run", preset="patterns"))
    run["pattern"][2, 0, 1]  # layer 2, sequence 0, head 1: [query, key]
    headwater.analysis.sinks(run)  # an xarray dataset

Nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from headwater.store.version import __version__

if TYPE_CHECKING:
    from headwater import analysis
    from headwater.analysis.streams.stream import stream
    from headwater.cli.extract import extract
    from headwater.extractor.edits.grammar import Edit
    from headwater.extractor.in_memory import capture
    from headwater.extractor.request import RunConfig
    from headwater.store.reader import Run, open_run

# Where each name lives. It is imported when it is first used, so that `import headwater` takes no torch and no xarray;
# type checkers and help() see the same names above.
_HOMES = {
    "Edit": "headwater.extractor.edits.grammar",
    "Run": "headwater.store.reader",
    "RunConfig": "headwater.extractor.request",
    "capture": "headwater.extractor.in_memory",
    "extract": "headwater.cli.extract",
    "open_run": "headwater.store.reader",
    "stream": "headwater.analysis.streams.stream",
}
__all__ = [
    "Edit",
    "Run",
    "RunConfig",
    "__version__",
    "analysis",
    "capture",
    "extract",
    "open_run",
    "stream",
]


@cache
def _check_versions() -> None:
    from headwater.store.versions import CORE, check_versions

    check_versions(*CORE)


def __getattr__(name: str) -> Any:
    """Import what is named when it is first used."""
    # Old libraries are named before one of them fails at something that says nothing.
    if name in _HOMES:
        _check_versions()
        return getattr(import_module(_HOMES[name]), name)
    if name == "analysis":
        return import_module("headwater.analysis")
    raise AttributeError(f"module 'headwater' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
