"""What the settings of analyses can be: the kinds of their values, and how a field says which it is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import MISSING, field
from typing import Any, TypeVar

from headwater.extractor.settings import (
    INDICES,
    Kind,
    count_from,
    option,
    refuse,
)
from headwater.extractor.sites import SITES, SQUARE, VECTOR

PART = "what analyses take"
MOST = 10**6

T = TypeVar("T")


def setting(
    default: T, kind: Kind, help: str, metavar: str = "", flag: str | None = None, leads: str = ""
) -> T:
    """Declare a setting of an analysis: a dataclass field that is a flag, a key of jobs and a parameter in Python.

    `help` is without the default and the name of the analysis, which are added. `leads` is MODEL for a model's name.
    """
    metadata = option(kind, PART, help, metavar, flag=flag, leads=leads or None)
    made: T = field(default=default, metadata=metadata)
    return made


def required(kind: Kind, help: str, metavar: str = "") -> Any:
    """Declare a setting that has no default."""
    return field(default=MISSING, metadata=option(kind, PART, help, metavar))


def numbers_from(least: int) -> Kind:
    """Whole numbers from `least` on, such as 16,64,256 or a list of them."""
    one = count_from(least, MOST)

    def read(flag: str, value: object) -> list[int]:
        if isinstance(value, str):
            value = [int(part) if part.strip().isdigit() else part for part in value.split(",")]
        if not isinstance(value, Sequence) or not value:
            raise refuse(flag, value, "whole numbers such as 16,64,256")
        return [one.read(flag, item) for item in value]

    items = {"type": "integer", "minimum": least, "maximum": MOST}
    return Kind(read, {"type": "array", "items": items, "minItems": 1, "maxItems": 10_000})


def some_of(*choices: str) -> Kind:
    """Some of a few words, such as raw,centred or a list of them."""

    def read(flag: str, value: object) -> tuple[str, ...]:
        words = value.split(",") if isinstance(value, str) else value
        if not isinstance(words, list | tuple) or not words or set(words) - set(choices):
            raise refuse(flag, value, f"some of {', '.join(choices)}")
        return tuple(words)

    items = {"type": "string", "enum": list(choices)}
    return Kind(read, {"type": "array", "items": items, "minItems": 1}, choices=choices)


def _read_number(flag: str, value: object) -> float:
    try:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError
        number = float(value)
    except ValueError:
        raise refuse(flag, value, "a number such as 0.3") from None
    if not abs(number) < float("inf"):
        raise refuse(flag, value, "a number such as 0.3")
    return number


def _read_positive(flag: str, value: object) -> float:
    number = _read_number(flag, value)
    if number <= 0:
        raise refuse(flag, value, "a number above 0, such as 100")
    return number


def _read_fraction(flag: str, value: object) -> float:
    number = _read_number(flag, value)
    if not 0 < number < 1:
        raise refuse(flag, value, "a number between 0 and 1, such as 0.3")
    return number


def _read_sign(flag: str, value: object) -> int:
    sign = {"1": 1, "-1": -1, "-": -1}.get(str(value))
    if sign is None:
        raise refuse(flag, value, "1 or -1")
    return sign


def _read_site(flag: str, value: object) -> str:
    """Take any site of vectors or patterns; one that Headwater does not know may be that of a derived run."""
    takes = [site.name for site in SITES.values() if site.group in (VECTOR, SQUARE)]
    if not isinstance(value, str) or not re.fullmatch(r"\w{1,64}", value):
        raise refuse(flag, value, f"a site such as {', '.join(takes)}")
    if value in SITES and value not in takes:
        raise refuse(flag, value, f"one of {', '.join(takes)}")
    return value


def _read_outliers(flag: str, value: object) -> object:
    if value == "large":
        return value
    if value == "none":
        return []
    return INDICES.read(flag, value)


COUNT = count_from(1, MOST)
SOME = count_from(1, 10_000)
SEED = count_from(0, 2**31 - 1)
NUMBER = Kind(_read_number, {"type": "number"})
POSITIVE = Kind(_read_positive, {"type": "number", "exclusiveMinimum": 0})
FRACTION = Kind(_read_fraction, {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1})
SIGN = Kind(_read_sign, {"type": "integer", "enum": [1, -1]})
SITE = Kind(_read_site, {"type": "string"})
OUTLIERS = Kind(_read_outliers, INDICES.schema)
