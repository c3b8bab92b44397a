"""Saved results of analyses as JSON: what their attributes say, and the arrays that are small enough to show."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from headwater.analysis.engine.results import load
from headwater.service.data.figures import nest, plain
from headwater.service.places import NotHereError
from headwater.store.reader import Run

SHOWN_VALUES = 65536
PROVENANCE = ("arguments", "text", "versions")


def read_result(run: Run, names: list[str], name: str) -> dict[str, Any]:
    """Return a result's attributes and its variables; values only where there are at most SHOWN_VALUES of them."""
    if name not in names:
        raise NotHereError(f"this run has no result {name!r}; it has {', '.join(names) or 'none'}.")
    dataset = load(run, name)
    attributes = {
        k: json.loads(v) if k in PROVENANCE else _value(v) for k, v in dataset.attrs.items()
    }
    if isinstance(attributes.get("text"), dict):
        attributes["text"].pop("sources", None)
    return {
        "name": name,
        "attributes": attributes,
        "sizes": {str(k): int(v) for k, v in dataset.sizes.items()},
        "variables": {
            str(k): {
                "dims": list(map(str, v.dims)),
                "dtype": str(v.dtype),
                "values": _values(v) if v.size <= SHOWN_VALUES else None,
            }
            for k, v in dataset.variables.items()
        },
    }


def _values(variable: Any) -> Any:
    values = np.asarray(variable.values)
    if values.dtype.kind in "OUST":
        return nest([str(value) for value in values.reshape(-1)], values.shape)
    return plain(values)


def _value(value: Any) -> Any:
    return value if isinstance(value, str) else plain(np.asarray(value))
