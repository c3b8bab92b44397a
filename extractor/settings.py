"""What the fields of a request say of themselves: flag, help, kind of value; and the one place that checks values."""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, ClassVar, Protocol

from headwater.extractor.edits.grammar import read_edits
from headwater.extractor.sites import PRESETS, SITES, RequestError, split_names
from headwater.store.layout import CODECS
from headwater.store.place import plain_place

PER_SITE = {"dtype": ("float16", "float32"), "codec": tuple(CODECS)}
MOST_THREADS = 4096

# What the value of a setting leads to. Who runs requests of others must check where it lies: a path to read, one to
# write, a model, a run, or edits, which may name files and functions. PLAIN values lead nowhere.
PLAIN = "plain"
FILE = "file"
PLACE = "place"
MODEL = "model"
RUN = "run"
EDITS = "edits"


class Request(Protocol):
    """A dataclass whose fields are options."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


@dataclass(frozen=True)
class Kind:
    """What values a setting can have.

    `read` takes the flag, for its errors, and a value from Python, a flag, TOML or JSON; it returns the value in its
    own type or raises RequestError. `schema` says the same as JSON schema. A flag of a kind with `many` takes several
    words ("words") or is repeated ("again"). `leads` is what such values name, or None where the field must say it.
    """

    read: Callable[[str, Any], Any]
    schema: Mapping[str, object]
    many: str = ""
    leads: str | None = PLAIN
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """A field of a request, as the command line, jobs and documents see it."""

    name: str
    flag: str
    metavar: str
    help: str
    part: str
    kind: Kind
    leads: str | None
    refused: str
    required: bool
    default: object

    def schema(self) -> dict[str, object]:
        """Return the JSON schema of the field's value."""
        found = {**self.kind.schema, "description": self.help}
        if not self.required and isinstance(self.default, bool | int | float | str):
            found["default"] = self.default
        return found


def option(
    kind: Kind,
    part: str,
    help: str,
    metavar: str = "",
    *,
    flag: str | None = None,
    leads: str | None = None,
    refused: str = "",
    **more: object,
) -> dict[str, object]:
    """Return the metadata that makes a dataclass field an option: `part` is the title under which the help lists it.

    `leads` is what its values name where the kind alone does not say; `refused` tells a server's clients why they may
    not set it. Whatever is in `more` is for the request's own class.
    """
    return {
        "kind": kind,
        "part": part,
        "help": help,
        "metavar": metavar,
        "flag": flag,
        "leads": leads or kind.leads,
        "refused": refused,
        **more,
    }


def options_of(request: type[Request]) -> list[Option]:
    """Return the options of a request, in the order of its fields; a field without metadata is for Python alone."""
    found = []
    for item in fields(request):
        meta = item.metadata
        if not meta:
            continue
        one = Option(
            name=item.name,
            flag=meta["flag"] or flag_of(item.name),
            metavar=meta["metavar"],
            help=meta["help"],
            part=meta["part"],
            kind=meta["kind"],
            leads=meta["leads"],
            refused=meta["refused"],
            required=item.default is MISSING,
            default=item.default,
        )
        found.append(one)
    return found


def read_fields(request: Request) -> None:
    """Bring every value of a new request to its own type; None stays where it is the default."""
    for item in fields(type(request)):
        value = getattr(request, item.name)
        if value is None and item.default is None:
            continue
        flag = item.metadata["flag"] or flag_of(item.name)
        try:
            value = item.metadata["kind"].read(flag, value)
        except RequestError as error:
            error.flag = error.flag or item.name
            raise
        object.__setattr__(request, item.name, value)


def request_schema(request: type[Request]) -> dict[str, object]:
    """Return the JSON schema of a request as a job's document: what jobs may not set is left out."""
    offered = [one for one in options_of(request) if not one.refused and one.leads is not None]
    return {
        "type": "object",
        "description": (request.__doc__ or "").partition("\n")[0],
        "properties": {one.name: one.schema() for one in offered},
        "required": [one.name for one in offered if one.required],
        "additionalProperties": False,
    }


def flag_of(name: str) -> str:
    """Return the flag of a setting."""
    return f"--{name.replace('_', '-')}"


def refuse(flag: str, value: object, expected: str) -> RequestError:
    """Return the error for a value that a setting cannot have."""
    return RequestError(f"{flag} is {value!r}; expected {expected}.")


def count_from(least: int, most: int | None = None) -> Kind:
    """Whole numbers from `least` on, to `most` where there is an end."""

    def read(flag: str, value: object) -> int:
        number = _whole(value)
        if number is None or number < least:
            raise refuse(flag, value, f"a whole number from {least} on")
        if most is not None and number > most:
            raise refuse(flag, value, f"at most {most}")
        return number

    limits = {"minimum": least} if most is None else {"minimum": least, "maximum": most}
    return Kind(read, {"type": "integer", **limits})


def one_of(*choices: str) -> Kind:
    """One of a few words."""

    def read(flag: str, value: object) -> str:
        text = _read_text(flag, value)
        if text not in choices:
            raise refuse(flag, value, f"one of {', '.join(choices)}")
        return text

    return Kind(read, {"type": "string", "enum": list(choices)}, choices=choices)


def per_site(name: str) -> Kind:
    """A default and exceptions by site, such as "float16,resid=float32" or a table of them."""

    def read(flag: str, value: object) -> str:
        if isinstance(value, Mapping):
            value = ",".join(_entry(site, chosen) for site, chosen in value.items())
        text = _read_text(flag, value)
        read_per_site(text, name)
        return text

    one = {"type": "string", "enum": list(PER_SITE[name])}
    schema = {"anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": one}]}
    return Kind(read, schema, choices=PER_SITE[name])


def read_per_site(text: str, name: str) -> tuple[str | None, dict[str, str]]:
    """Read "default,site=value,…" of `dtype` or `codec`; return the default (or None) and the exceptions."""
    default = None
    named: dict[str, str] = {}
    flag = flag_of(name)
    for part in split_names(text):
        site, equals, value = part.rpartition("=")
        if value == "bfloat16":
            raise RequestError(
                f"{flag} {part!r}: zarr-python has no bfloat16, so runs do not store it. Use float16 or float32 (bf16 "
                "can be the --compute)."
            )
        if value not in PER_SITE[name]:
            raise RequestError(
                f"{flag} has {value!r}; expected one of {', '.join(PER_SITE[name])}."
            )
        if equals and site not in SITES:
            raise RequestError(
                f"{flag} {part!r}: there is no site {site!r}; see `headwater sites`."
            )
        if equals and name == "dtype" and SITES[site].integer:
            raise RequestError(
                f"{flag} {part!r}: {site} holds whole numbers, always int32. Leave it out."
            )
        if (equals and site in named) or (not equals and default is not None):
            raise RequestError(
                f"{flag} {text!r} names {site or 'the default'} twice; expected it once."
            )
        if equals:
            named[site] = value
        else:
            default = value
    return default, named


def _entry(site: object, value: object) -> str:
    if site == "default":
        return str(value)
    return f"{site}={value}"


def _read_switch(flag: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise refuse(flag, value, "true or false")
    return value


def _read_text(flag: str, value: object) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise refuse(flag, value, "a string")
    if not value.strip():
        raise refuse(flag, value, "something that is not empty")
    return value


def _read_path(flag: str, value: object) -> str:
    return os.path.expanduser(_read_text(flag, value))


def _read_place(flag: str, value: object) -> str:
    return plain_place(_read_path(flag, value))


def _read_device(flag: str, value: object) -> str:
    text = _read_text(flag, value)
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise refuse(flag, value, "cpu, cuda, or one of several GPUs such as cuda:1")
    return text


def _read_block(flag: str, value: object) -> int:
    number: int = COUNT.read(flag, value)
    # A shard holds 2^k sequences, and a block must fill whole shards or be filled by them.
    if number & (number - 1):
        near = 1 << number.bit_length() - 1
        expected = f"a power of two, so that shards divide it; {near} and {2 * near} are near"
        raise refuse(flag, value, expected)
    return number


def _read_names(flag: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike):
        value = split_names(str(value)) or ("",)
    return _listed(flag, value)


def _read_paths(flag: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str | os.PathLike):  # a path may hold a comma
        value = (value,)
    return _listed(flag, value)


def _listed(flag: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise refuse(flag, value, "a list of names")
    if not all(isinstance(item, str | os.PathLike) for item in value):
        raise refuse(flag, value, "a list of names")
    names = tuple(os.fspath(item) for item in value)
    if not all(name.strip() for name in names):
        raise refuse(flag, names, "names that are not empty")
    return names


def _read_indices(flag: str, value: object) -> str:
    """Write a whole number, a range or a list of numbers, as TOML and Python can give them, as the flag would."""
    if isinstance(value, str | os.PathLike):
        return _read_text(flag, value)
    single = _whole(value)
    if single is not None:
        return str(single)
    listed = [_whole(item) for item in _items(value)]
    if not listed or None in listed:
        return _read_text(flag, value)
    return ",".join(map(str, listed))


def _items(value: Any) -> Sequence[object]:
    """Return the items of a list, a range or an array of one dimension; nothing of anything else."""
    if isinstance(value, list | tuple | range) or getattr(value, "ndim", None) == 1:
        return list(value)
    return ()


def _whole(value: Any) -> int | None:
    """Return a whole number of any integer type, numpy's included; None for anything else, true and false too."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool"):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def _read_edits(flag: str, value: object) -> object:
    return read_edits(value)


_NAMES = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
_NUMBERS = [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]
_LINES = [{"type": "string"}, {"type": "object"}]

COUNT = count_from(1)
THREADS = count_from(1, MOST_THREADS)
WORKERS = count_from(0, MOST_THREADS)
BLOCK = Kind(_read_block, {"type": "integer", "minimum": 1})
SWITCH = Kind(_read_switch, {"type": "boolean"})
PRESET = one_of(*PRESETS)
DEVICE = Kind(_read_device, {"type": "string", "pattern": "^(cpu|cuda(:[0-9]+)?)$"})
NAMES = Kind(_read_names, _NAMES)
INDICES = Kind(_read_indices, {"anyOf": [{"type": "string"}, *_NUMBERS]})
EDIT_LINES = Kind(
    _read_edits,
    {"anyOf": [*_LINES, {"type": "array", "items": {"anyOf": _LINES}}]},
    many="again",
    leads=EDITS,
)

# Free text could name anything, so a field of these kinds says what it leads to; jobs are refused one that does not.
TEXT = Kind(_read_text, {"type": "string"}, leads=None)
PATH = Kind(_read_path, {"type": "string"}, leads=FILE)
PATHS = Kind(_read_paths, _NAMES, many="words", leads=FILE)
OUT = Kind(_read_place, {"type": "string"}, leads=PLACE)
CALLS = Kind(_read_names, _NAMES, many="again", leads=None)
