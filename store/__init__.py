"""The store: where every value of a run lies, how it is committed, and how it is read. FORMAT.md is the specification.

    from headwater.store import open_run

    run = open_run("run")
    run["resid"][4, 0]  # depth 4, sequence 0: numpy [position, d_model]

Nothing is imported before it is named; torch and Ray never are.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwater.store.layout import ArraySpec
    from headwater.store.ledger import Entry, Ledger, LedgerError
    from headwater.store.lock import LockedError
    from headwater.store.manifest import Manifest, RunDamaged, RunError, read_manifest
    from headwater.store.place import Place, place_of
    from headwater.store.reader import Run, open_run

_HOMES = {
    "ArraySpec": "layout",
    "Entry": "ledger",
    "Ledger": "ledger",
    "LedgerError": "ledger",
    "LockedError": "lock",
    "Manifest": "manifest",
    "Place": "place",
    "Run": "reader",
    "RunDamaged": "manifest",
    "RunError": "manifest",
    "open_run": "reader",
    "place_of": "place",
    "read_manifest": "manifest",
}
__all__ = [
    "ArraySpec",
    "Entry",
    "Ledger",
    "LedgerError",
    "LockedError",
    "Manifest",
    "Place",
    "Run",
    "RunDamaged",
    "RunError",
    "open_run",
    "place_of",
    "read_manifest",
]


def __getattr__(name: str) -> object:
    """Import what is named when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headwater.store' has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
