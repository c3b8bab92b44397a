"""Headwater turns what happens inside GPT-2-family models into Zarr data.

`extract` makes a run on disk, `open_run` reads one, `stream` hands its vectors out in shuffled batches, `capture` gives
a dataset in memory. Nothing heavy is imported until one of them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from headwater.analysis.stream import stream
    from headwater.extractor.config import RunConfig
    from headwater.extractor.memory import capture
    from headwater.extractor.run import extract
    from headwater.store.reader import Run, open_run

_HOMES = {
    "RunConfig": "headwater.extractor.config",
    "capture": "headwater.extractor.memory",
    "extract": "headwater.extractor.run",
    "Run": "headwater.store.reader",
    "open_run": "headwater.store.reader",
    "stream": "headwater.analysis.stream",
}
__all__ = ["Run", "RunConfig", "__version__", "capture", "extract", "open_run", "stream"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'headwater' has no attribute {name!r}")
