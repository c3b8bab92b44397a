"""JSON as it comes and goes: the documents of jobs, their prices and progress, and what clients are answered."""

from __future__ import annotations

import json
from typing import Any, TypeAlias

# What json.loads gives. Its parts are checked where they are read, as every document from outside must be.
Json: TypeAlias = Any
JsonObject: TypeAlias = dict[str, Any]


def read_json(text: str) -> Json:
    """Read JSON; NaN and infinities, which Python writes and no browser reads, become null."""
    return json.loads(text, parse_constant=lambda _: None)
