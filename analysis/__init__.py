"""Measures of runs, of weights and of what interventions change, by their names.

`headwater.analysis.sinks(run)` returns an xarray dataset, as every measure does; `headwater.analysis.analyze(run)` runs
all that a run's sites allow. Nothing is imported before it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

# What is no analysis of a run, or lies in a module of another name.
_HOMES = {
    "ablate": "interventions.ablation",
    "analyze": "suite.analyze",
    "coherence": "weights.coherence",
    "compare": "suite.compare",
    "draw": "plots.catalogue",
    "dynamics": "studies.dynamics",
    "massive_origin": "measures.origin",
    "patch": "interventions.patching",
    "plateau": "interventions.plateau",
    "project": "measures.project",
    "register": "suite.registry",
    "report": "plots.report",
    "reproduce": "studies.reproduce",
    "stream": "streams.stream",
    "svd_tokens": "measures.project",
}


def __getattr__(name: str) -> Any:
    """Import a function when it is first named: those of this package first, then the analyses of others."""
    if name == "__all__":
        return __dir__()
    if not name.startswith("_"):
        home = _HOMES.get(name)
        if home is None and find_spec(f"{__name__}.measures.{name}"):
            home = f"measures.{name}"
        if home is not None:
            function = getattr(import_module(f"{__name__}.{home}"), name, None)
            if function is not None:
                return function
        elif find_spec(f"{__name__}.{name}") is None:
            return _function_of(name)
    raise AttributeError(f"module 'headwater.analysis' has no attribute {name!r}")


def __dir__() -> list[str]:
    from headwater.analysis.suite.registry import analyses

    return sorted({*_HOMES, *analyses()})


def _function_of(name: str) -> Callable[..., Any]:
    """Make the function of an analysis that another package offers."""
    from headwater.analysis.engine.analysis import as_function
    from headwater.analysis.suite.registry import analyses

    kind = analyses().get(name)
    if kind is None:
        raise AttributeError(f"module 'headwater.analysis' has no attribute {name!r}")
    return as_function(kind)
