"""The kinds of settings that a request has, and the one place where their values are checked."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Mapping
from typing import Any

from headwater.extractor.edits.grammar import read_edits
from headwater.extractor.sites import PRESETS, SITES, RequestError, split_names
from headwater.store.layout import CODECS
from headwater.store.place import plain_place

CHOICES = {
    "preset": tuple(PRESETS),
    "mode": ("pack", "document"),
    "special_tokens": ("ids", "text"),
    "compute": ("fp32", "bf16", "fp16"),
    "on_overflow": ("fail", "keep"),
}
PER_SITE = {"dtype": ("float16", "float32"), "codec": tuple(CODECS)}
COUNTS = (
    "seq_len",
    "stride",
    "max_sequences",
    "max_tokens",
    "max_unpacked",
    "block",
    "top_k",
    "threads",
    "workers",
)
SWITCHES = ("within_documents", "bos", "jsonl", "other_processor")
LISTS = ("text", "sites", "labels", "allow_call")
SELECTIONS = ("layers", "depths", "heads", "positions")
TEXT_ONLY = (
    "mode",
    "within_documents",
    "bos",
    "special_tokens",
    "tokenizer",
    "column",
    "labels",
    "jsonl",
    "max_tokens",
    "max_unpacked",
)
MOST_THREADS = 4096


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def read_setting(name: str, value: Any, optional: bool) -> Any:
    """Return a setting's value in its own type, whether a flag, TOML or Python gave it.

    None stays None where the setting is `optional`. Raises RequestError for a value that the setting cannot have.
    """
    if value is None and optional:
        return None
    if name in COUNTS:
        return _count(name, value)
    if name in SWITCHES:
        return value if isinstance(value, bool) else _refuse(name, value, "true or false")
    if name == "edits":
        return read_edits(value)
    if name in LISTS:
        return _names(name, value)
    if name in SELECTIONS:
        value = _indices(value)
    elif name in PER_SITE and isinstance(value, Mapping):
        value = ",".join(str(v) if k == "default" else f"{k}={v}" for k, v in value.items())
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if name in ("out", "tokens") and isinstance(value, str):
        value = os.path.expanduser(value)
    if name == "out" and isinstance(value, str):
        value = plain_place(value)
    if not isinstance(value, str):
        _refuse(name, value, "a string")
    if name in CHOICES and value not in CHOICES[name]:
        _refuse(name, value, f"one of {', '.join(CHOICES[name])}")
    if name == "device" and not re.fullmatch(r"cpu|cuda(:\d+)?", value):
        _refuse(name, value, "cpu, cuda, or one of several GPUs such as cuda:1")
    if not value.strip():
        _refuse(name, value, "something that is not empty")
    if name in PER_SITE:
        read_per_site(value, name)
    return value


def read_per_site(text: str, name: str) -> tuple[str | None, dict[str, str]]:
    """Read "default,site=value,…" of `dtype` or `codec`; return the default (or None) and the exceptions."""
    default = None
    named = {}
    for part in split_names(text):
        site, equals, value = part.rpartition("=")
        if value == "bfloat16":
            raise RequestError(
                f"{flag_of(name)} {part!r}: zarr-python has no bfloat16, so runs do not store it. Use float16 or "
                "float32 (bf16 can be the --compute)."
            )
        if value not in PER_SITE[name]:
            raise RequestError(
                f"{flag_of(name)} has {value!r}; expected one of {', '.join(PER_SITE[name])}."
            )
        if equals and site not in SITES:
            raise RequestError(
                f"{flag_of(name)} {part!r}: there is no site {site!r}; see `headwater sites`."
            )
        if equals and name == "dtype" and SITES[site].integer:
            raise RequestError(
                f"{flag_of(name)} {part!r}: {site} holds whole numbers, always int32. Leave it out."
            )
        if (equals and site in named) or (not equals and default is not None):
            raise RequestError(
                f"{flag_of(name)} {text!r} names {site or 'the default'} twice; expected it once."
            )
        if equals:
            named[site] = value
        else:
            default = value
    return default, named


def _count(name: str, value: Any) -> int:
    least = 0 if name == "workers" else 1
    number = _whole(value)
    if number is None or number < least:
        return int(_refuse(name, value, f"a whole number from {least} on"))
    if name == "block" and number & (number - 1):
        near = 1 << number.bit_length() - 1
        _refuse(
            name, value, f"a power of two, so that shards divide it; {near} and {2 * near} are near"
        )
    if name in ("threads", "workers") and number > MOST_THREADS:
        _refuse(name, value, f"at most {MOST_THREADS}")
    return number


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike):
        value = (value,) if name == "text" else split_names(str(value)) or ("",)
    if not isinstance(value, list | tuple) or not all(
        isinstance(v, str | os.PathLike) for v in value
    ):
        _refuse(name, value, "a list of names")
    names = tuple(os.fspath(v) for v in value)
    return (
        names if all(v.strip() for v in names) else _refuse(name, names, "names that are not empty")
    )


def _indices(value: Any) -> Any:
    """Write a whole number, a range or a list of numbers, as TOML and Python can give them, as the flag would."""
    if isinstance(value, str) or value is None:
        return value
    single = _whole(value)
    listed = [single] if single is not None else [_whole(v) for v in _items(value)]
    return ",".join(map(str, listed)) if listed and None not in listed else value


def _items(value: Any) -> list[Any]:
    """Return the items of a list, a range or an array of one dimension; None for anything else, which is no number."""
    if isinstance(value, list | tuple | range) or getattr(value, "ndim", None) == 1:
        return list(value)
    return [None]


def _whole(value: Any) -> int | None:
    """Return a whole number of any integer type, numpy's included; None for anything else, true and false too."""
    try:
        return None if isinstance(value, bool) or _is_bool(value) else operator.index(value)
    except TypeError:
        return None


def _is_bool(value: Any) -> bool:
    return str(getattr(value, "dtype", "")) in ("bool", "torch.bool")


def _refuse(name: str, value: Any, expected: str) -> Any:
    raise RequestError(f"{flag_of(name)} is {value!r}; expected {expected}.")
