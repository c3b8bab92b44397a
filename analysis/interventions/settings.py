"""The settings of an intervention: what each is called, says and accepts, in Python, in flags and in a job's JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import Field, field
from typing import SupportsFloat, TypeVar

from headwater.extractor.edits.grammar import INDICES, Edit, read_edits, read_target
from headwater.extractor.sites import RequestError

# What a setting names, for those who check where it lies: a file to read, a model, a run, edits.
FILE = "file"
MODEL = "model"
RUN = "run"
EDITS = "edits"

# How a flag takes several values: after one flag, or by being given again.
MANY = "many"
AGAIN = "again"

MOST = 10**6

T = TypeVar("T")

# Reads the value of a flag, which comes as text, as JSON or as Python has it; raises RequestError for a wrong one.
Reader = Callable[[str, object], object]


def setting(
    default: T,
    read: Reader,
    part: str,
    help: str,
    *,
    metavar: str | None = None,
    flag: str | None = None,
    choices: tuple[str, ...] | None = None,
    names: str = "",
    several: str = "",
) -> T:
    """Declare a setting: a field of a request, from which its flag, its help and its JSON schema are made.

    `part` is the heading that it stands under in the help, and `help_of` adds the default. A setting without a
    `metavar` is a switch. `flag` is given where it is not the field's own name. `names` says what the value names
    (FILE, MODEL, RUN or EDITS), and `several` how a flag takes more than one (MANY or AGAIN).
    """
    metadata = {
        "read": read,
        "part": part,
        "help": help,
        "metavar": metavar,
        "flag": flag,
        "choices": choices,
        "names": names,
        "several": several,
    }
    made: T = field(default=default, metadata=metadata)
    return made


def help_of(item: Field[object]) -> str:
    """Return the help of a setting with its default, where that is a value and not put in words already."""
    said: str = item.metadata["help"]
    default = item.default
    if isinstance(default, list | tuple):
        default = ",".join(map(str, default))
    if default is None or default is False or default == "":
        return said
    return f"{said} (default: {default})"


def as_text(flag: str, value: object) -> str:
    """Read text that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise RequestError(f"{flag} is {value!r}; expected text.")
    return value


def as_switch(flag: str, value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise RequestError(f"{flag} is {value!r}; expected true or false.")
    return value


def as_whole(least: int) -> Callable[[str, object], int]:
    """Return a reader of whole numbers from `least` on."""

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

    return read


def as_real(flag: str, value: object) -> float:
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


def as_list_of(read: Reader) -> Callable[[str, object], tuple[object, ...]]:
    """Return a reader of lists, which may be text with commas, that reads item by item."""

    def read_list(flag: str, value: object) -> tuple[object, ...]:
        items = _items(value.split(",") if isinstance(value, str) else value)
        if not items:
            raise RequestError(f"{flag} is {value!r}; expected at least one.")
        stripped = [item.strip() if isinstance(item, str) else item for item in items]
        return tuple(read(flag, item) for item in stripped)

    return read_list


def as_indices(flag: str, value: object) -> str:
    """Read a selection of indices, whose bounds only the model knows; return it as text without blanks."""
    chosen = "".join(",".join(map(str, _items(value))).split())
    if not INDICES.fullmatch(chosen):
        raise RequestError(f"{flag} is {value!r}; expected numbers and ranges, such as 0,4:8.")
    return chosen


def as_paths(flag: str, value: object) -> tuple[str, ...]:
    """Read one path or several."""
    return tuple(as_text(flag, item) for item in _items(value))


def as_clusters(flag: str, value: object) -> tuple[str, ...]:
    """Read token ids: with commas between rows, and plus signs within the cluster that one row draws from."""
    items = _items(value)
    for item in items:
        if isinstance(item, bool) or not re.fullmatch(r"[0-9]{1,9}([+,][0-9]{1,9})*", str(item)):
            raise RequestError(
                f"{flag} has {item!r}; expected token ids such as 262,13 or 464+383."
            )
    return tuple(map(str, items))


def as_compute(flag: str, value: object) -> str:
    """Read the precision of the model's arithmetic."""
    if value not in ("fp32", "fp64"):
        raise RequestError(f"{flag} is {value!r}; expected fp32 or fp64.")
    return str(value)


def as_edits(flag: str, value: object) -> tuple[Edit, ...]:
    """Read edits of the forward pass."""
    return read_edits(value)


def as_target(flag: str, value: object) -> Edit:
    """Read a place without an operation."""
    return read_target(value)


def _items(value: object) -> list[object]:
    """Return the items of a list, or one value as a list of one."""
    if isinstance(value, list | tuple):
        return list(value)
    return [value]
