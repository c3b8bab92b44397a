"""Make objects of JSON that others wrote: every member of its type, unknown ones left out, no path outside the run."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

PART = re.compile(r"[\w.+=-]+")
T = TypeVar("T")


def from_raw(kind: type[T], raw: Mapping[str, Any]) -> T:
    """Make a dataclass of JSON members; those that this version does not know are left out.

    Raises ValueError for a member that is missing or of another type.
    """
    hints = typing.get_type_hints(kind)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        if field.name in raw:
            _check(raw[field.name], hints[field.name], field.name)
            values[field.name] = raw[field.name]
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"it has no member {field.name!r}")
    return kind(**values)


def check_paths(paths: Iterable[str]) -> None:
    """Raise ValueError for a path that is not a plain one inside a run."""
    for path in paths:
        parts = path.split("/")
        if not all(PART.fullmatch(part) and part.strip(".") for part in parts):
            raise ValueError(f"it names {path!r}, which is no path inside a run")


def check_files(files: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError for a table of files that is not path inside a run → [bytes, CRC32C]."""
    check_paths(files)
    for path, pair in files.items():
        if len(pair) != 2 or pair[0] < 0 or not 0 <= pair[1] < 1 << 32:
            raise ValueError(f"it gives {path!r} the size and sum {pair}, which no file has")


def _check(value: Any, hint: Any, name: str) -> None:
    """Raise ValueError where a JSON value has another type than a field; tuples are lists in JSON."""
    if not _fits(value, hint):
        raise ValueError(f"its member {name!r} is {str(value)[:60]}; expected {hint}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    # JSON has no integers of its own, and True is an int in Python: it is none here.
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, one) for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, inner[1]) for v in value.values())
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(_fits(v, inner[0]) for v in value)
    return isinstance(value, hint)
