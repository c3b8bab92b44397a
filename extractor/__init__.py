"""The extractor: from a request to a run, or to a dataset in memory.

    from headwater.extractor import RunConfig, extract

    extract(RunConfig(model="demo", text=("book.txt",), out="run", preset="patterns"))

A request (`RunConfig`) and the model's configuration make a plan; its blocks go through the model one by one, and their
values into the store. Nothing is imported before it is named.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headwater.extractor.edits.grammar import Edit
    from headwater.extractor.model.weights import Checkpoint, ModelConfig, load_checkpoint
    from headwater.extractor.plan import Geometry, Plan, make_plan
    from headwater.extractor.request import RunConfig
    from headwater.extractor.run import extract, plan_run
    from headwater.extractor.sites import SITES

_HOMES = {
    "SITES": "sites",
    "Checkpoint": "model.weights",
    "Edit": "edits.grammar",
    "Geometry": "plan",
    "ModelConfig": "model.weights",
    "Plan": "plan",
    "RunConfig": "request",
    "extract": "run",
    "load_checkpoint": "model.weights",
    "make_plan": "plan",
    "plan_run": "run",
}
__all__ = [
    "SITES",
    "Checkpoint",
    "Edit",
    "Geometry",
    "ModelConfig",
    "Plan",
    "RunConfig",
    "extract",
    "load_checkpoint",
    "make_plan",
    "plan_run",
]


def __getattr__(name: str) -> object:
    """Import what is named when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headwater.extractor' has no attribute {name!r}")
    found: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return __all__
