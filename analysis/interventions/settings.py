"""The settings of an intervention: what each is called, says and accepts, in Python, in flags and in a job's JSON."""

from __future__ import annotations

import math
import re
from dataclasses import field
from typing import SupportsFloat, TypeVar

from headwater.extractor.edits.grammar import INDICES as GRAMMAR
from headwater.extractor.edits.grammar import Edit, read_target
from headwater.extractor.settings import EDITS, FILE, Kind, option
from headwater.extractor.sites import RequestError

MOST = 10**6

T = TypeVar("T")


def setting(
    default: T,
    kind: Kind,
    part: str,
    help: str,
    *,
    metavar: str = "",
    flag: str | None = None,
    leads: str | None = None,
) -> T:
    """Declare a setting: a field of a request, from which its flag, its help and its JSON schema are made.

    The help says the default besides, where that is a value and not put in words already.
    """
    said = f"{help}{_default(default)}"
    made: T = field(
        default=default, metadata=option(kind, part, said, metavar, flag=flag, leads=leads)
    )
    return made


def _default(value: object) -> str:
    if isinstance(value, list | tuple):
        value = ",".join(map(str, value))
    if value is None or value is False or value == "":
        return ""
    return f" (default: {value})"


def _read_text(flag: str, value: object) -> str:
    """Read text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{flag} is {value!r}; expected text.")
    return value


def word(*choices: str) -> Kind:
    """Text that is one of a few words, which is for the measure itself to check."""
    return Kind(_read_text, {"type": "string", "enum": list(choices)}, choices=choices)


def whole(least: int) -> Kind:
    """Whole numbers from `least` on."""

    def read(flag: str, value: object) -> int:
        number = least - 1
        if isinstance(value, int) and not isinstance(value, bool):
            number = value
        elif isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value.strip()):
            number = int(value)
        if not least <= number <= MOST:
            raise RequestError(
                f"{flag} has {value!r}; expected whole numbers from {least} on (to {MOST:,})."
            )
        return number

    return Kind(read, {"type": "integer", "minimum": least, "maximum": MOST})


def _read_real(flag: str, value: object) -> float:
    """Read a finite number."""
    number = math.nan
    if isinstance(value, str | SupportsFloat) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
    if not math.isfinite(number):
        raise RequestError(f"{flag} is {value!r}; expected numbers such as 0,0.5,1.")
    return number


def list_of(kind: Kind) -> Kind:
    """Lists, which may be text with commas, whose items are of a kind."""

    def read_list(flag: str, value: object) -> tuple[object, ...]:
        items = _items(value.split(",") if isinstance(value, str) else value)
        if not items:
            raise RequestError(f"{flag} is {value!r}; expected at least one.")
        stripped = [item.strip() if isinstance(item, str) else item for item in items]
        return tuple(kind.read(flag, item) for item in stripped)

    listed = {"type": "array", "items": dict(kind.schema), "minItems": 1}
    return Kind(read_list, {"anyOf": [{"type": "string"}, listed]})


def _read_indices(flag: str, value: object) -> str:
    """Read a selection of indices, whose bounds only the model knows; return it as text without blanks."""
    chosen = "".join(",".join(map(str, _items(value))).split())
    if not GRAMMAR.fullmatch(chosen):
        raise RequestError(f"{flag} is {value!r}; expected numbers and ranges, such as 0,4:8.")
    return chosen


def _read_paths(flag: str, value: object) -> tuple[str, ...]:
    """Read one path or several."""
    return tuple(_read_text(flag, item) for item in _items(value))


def _read_clusters(flag: str, value: object) -> tuple[str, ...]:
    """Read token ids: with commas between rows, and plus signs within the cluster that one row draws from."""
    items = _items(value)
    for item in items:
        if isinstance(item, bool) or not re.fullmatch(r"[0-9]{1,9}([+,][0-9]{1,9})*", str(item)):
            raise RequestError(
                f"{flag} has {item!r}; expected token ids such as 262,13 or 464+383."
            )
    return tuple(map(str, items))


def _read_compute(flag: str, value: object) -> str:
    """Read the precision of the model's arithmetic."""
    if value not in ("fp32", "fp64"):
        raise RequestError(f"{flag} is {value!r}; expected fp32 or fp64.")
    return str(value)


def _read_target(flag: str, value: object) -> Edit:
    """Read a place without an operation."""
    return read_target(value)


def _items(value: object) -> list[object]:
    """Return the items of a list, or one value as a list of one."""
    if isinstance(value, list | tuple):
        return list(value)
    return [value]


_STRINGS = {"type": "array", "items": {"type": "string"}}
_TEXT = {"type": "string"}

TEXT = Kind(_read_text, _TEXT)
REAL = Kind(_read_real, {"type": "number"})
INDICES = Kind(
    _read_indices,
    {"anyOf": [_TEXT, {"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]},
)
PATHS = Kind(_read_paths, {"anyOf": [_TEXT, _STRINGS]}, many="words", leads=FILE)
CLUSTERS = Kind(_read_clusters, {"anyOf": [_TEXT, _STRINGS]}, many="again")
PRECISION = Kind(_read_compute, {"type": "string", "enum": ["fp32", "fp64"]})
TARGET = Kind(_read_target, {"anyOf": [_TEXT, {"type": "object"}]}, leads=EDITS)
