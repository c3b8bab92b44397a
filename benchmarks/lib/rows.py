"""What benchmarks hand to each other: named values, such as a line of a table of results."""

from __future__ import annotations

from typing import Any, TypeAlias

# A figure, a text or a date by its name; what a column holds is known to those who read it.
Row: TypeAlias = dict[str, Any]
