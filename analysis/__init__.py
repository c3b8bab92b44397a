"""Measures of runs, of weights and of what interventions change, by their names.

`headwater.analysis.sinks(run)` returns an xarray dataset, as every measure does; `headwater.analysis.analyze(run)` runs
all that a run's sites allow. Nothing is imported before it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

_HOMES = {
    "ablate": "interventions.ablation",
    "analyze": "suite.analyze",
    "attribution": "measures.attribution",
    "coherence": "weights.coherence",
    "compare": "suite.compare",
    "cosine": "measures.cosine",
    "draw": "plots.catalogue",
    "dynamics": "studies.dynamics",
    "false_sinks": "measures.false_sinks",
    "favourites": "measures.favourites",
    "heads": "measures.heads",
    "lens": "measures.lens",
    "massive": "measures.massive",
    "massive_origin": "measures.origin",
    "norms": "measures.norms",
    "patch": "interventions.patching",
    "plateau": "interventions.plateau",
    "project": "measures.project",
    "report": "plots.report",
    "reproduce": "studies.reproduce",
    "sinks": "measures.sinks",
    "stream": "streams.stream",
    "svd": "measures.svd",
    "top": "measures.top",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Callable[..., Any]:
    """Import a function when it is first named."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headwater.analysis' has no attribute {name!r}")
    function: Callable[..., Any] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return function


def __dir__() -> list[str]:
    return __all__
