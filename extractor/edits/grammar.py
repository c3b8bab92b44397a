"""Edits: what a user changes in the forward pass, as one line of text each, checked before anything runs."""

from __future__ import annotations

import hashlib
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from headwater.extractor.sites import SITES, SQUARE, VECTOR, RequestError, parse_site

OPS = {
    "scale": "multiply by a number",
    "set": "put a number, or an array, in place of the value",
    "zero": "put 0 in place of the value",
    "add": "add a number, or a direction from an array, times `factor`",
    "mean": "put the mean over a run, RUN, in place of the value",
    "patch": "put the value from elsewhere in its place: a run, or a prompt as ids:1,2,3 or text:…",
    "freeze": "keep the value that it has without the edits, times an optional number",
    "linearise": "replace the activation function (at mlp_post) by its tangent at the value without the edits",
    "noise": "add normal noise of this standard deviation, the same for a `seed` whatever the batch",
    "call": "apply a function, module:name, to the values [n, …]",
}
REFERENCE = ("freeze", "linearise")
SCALES = ("ln1_scale", "ln2_scale", "ln_final_scale")
EDITABLE = (
    tuple(s.name for s in SITES.values() if s.group in (VECTOR, SQUARE) and not s.extra) + SCALES
)
WORDS = {"position": "positions", "token": "tokens", "head": "heads", "dim": "dims", "key": "keys"}
OPTIONS = ("sequence", "source", "seed", "factor")
PART = r"(-?[0-9]{1,9}|(-?[0-9]{1,9})?:(-?[0-9]{1,9})?(:[0-9]{1,9})?)"
INDICES = re.compile(rf"{PART}(,{PART})*")
SPOTS = re.compile(rf"({PART}|first|last)(,({PART}|first|last))*")
EXAMPLE = "resid[4] position=first dim=447 scale=0.5"
_DERIVED = {
    "resid_": "resid",
    "attn_result": "z",
    "attn_": "pattern or attn_scores",
    "ln1_out": "ln1_scale or resid",
    "ln2_out": "ln2_scale or resid_mid",
    "ln_final_out": "ln_final_scale or resid",
}


@dataclass(frozen=True, eq=False)
class Edit:
    """One change of the forward pass: `op` with its `value`, at a site, where the selections say.

    `site` may carry its layers or depths: `resid[4]`, `z[0,3:6]`, or a TransformerLens name. Selections are whole
    numbers, lists of them, or text as everywhere (`0,4:8,-1`); `positions` can also be `first` (each row's first
    visible key) or `last`, `tokens` are ids, `keys` select the keys of `pattern` and `attn_scores`. Without a
    selection, all are meant. `value` is what the op takes (see OPS): a number, a path, ids:…, text:…, or in Python an
    array or a function. Of a source, `sequence` takes one row for all and `source` one position for all. `seed` is the
    noise's, `factor` stretches what `add` adds.

    Raises RequestError, which names the edit, for anything that no model could do.
    """

    site: str
    op: str
    value: Any = None
    at: Any = None
    positions: Any = None
    tokens: Any = None
    heads: Any = None
    dims: Any = None
    keys: Any = None
    sequence: int | None = None
    source: int | None = None
    seed: int = 0
    factor: float = 1.0

    def __post_init__(self) -> None:
        """Take the layers out of the site's name and check what can be checked without a model."""
        try:
            name, at = _split_site(self.site)
        except RequestError as error:
            raise RequestError(f"--edit {self.site!r}: {error}") from None
        if at is not None and self.at is not None:
            raise RequestError(f"--edit {self.site!r} names its layers twice; leave `at` out.")
        object.__setattr__(self, "site", name)
        object.__setattr__(self, "at", self.at if at is None else at)
        for name in ("at", *WORDS.values()):
            object.__setattr__(self, name, _selection(self, name))
        object.__setattr__(self, "value", _value(self.value))
        _check_alone(self)

    def __str__(self) -> str:
        """Return the edit as one line, which `parse_edit` reads as the same edit where `value` is a number or text."""
        place = self.site + ("" if self.at is None else f"[{self.at}]")
        words = [
            f"{word}={shlex.quote(getattr(self, name))}"
            for word, name in WORDS.items()
            if getattr(self, name) is not None
        ]
        value = self.value
        if isinstance(value, np.ndarray):
            value = f"array:{digest(value.tobytes())}"
        elif callable(value):
            value = f"{value.__module__}:{value.__qualname__}"
        op = str(self.op) if value is None else f"{self.op}={shlex.quote(str(value))}"
        plain = {f.name: f.default for f in fields(self)}
        more = [
            f"{name}={getattr(self, name)}"
            for name in OPTIONS
            if getattr(self, name) != plain[name]
        ]
        return " ".join([place, *words, op, *more])

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are not as by default; `read_edits` takes them, and nothing is parsed again."""
        plain = {f.name: f.default for f in fields(self)}
        values = {name: getattr(self, name) for name in plain}
        return {name: value for name, value in values.items() if value is not plain[name]}

    def refuse(self, what: str) -> RequestError:
        """Make the error that names this edit."""
        return RequestError(f"--edit {str(self)!r}: {what}")


def read_target(value: Any) -> Edit:
    """Read what an ablation scales: an edit, whose op may be left out."""
    if isinstance(value, str):
        words = value.split()[1:]
        has_op = any(word.partition("=")[0] in OPS for word in words)
        return parse_edit(value if has_op else f"{value} scale=1")
    return _read(value)


def stored_edits(config: Mapping[str, Any]) -> tuple[Edit, ...]:
    """Return the edits in the configuration of a run's manifest."""
    return read_edits([item["edit"] for item in config.get("edits", ())])


def refuse_calls(edits: Sequence[Edit], origin: str, allowed: Sequence[str] = ()) -> None:
    """Refuse edits out of a file that call a function which was not allowed by name: a file is never code."""
    for edit in edits:
        if edit.op == "call" and edit.value not in allowed:
            raise edit.refuse(
                f"{origin} names a function, and running it is running code from there. If you trust it, allow it "
                f"with --allow-call {edit.value}."
            )


def read_edits(value: Any) -> tuple[Edit, ...]:
    """Read edits from lines of text, mappings (TOML tables) or Edit objects; raise RequestError for a bad one."""
    items = [value] if isinstance(value, str | Edit | Mapping) else value
    if not isinstance(items, Sequence):
        raise RequestError(f"--edit is {value!r}; expected edits such as {EXAMPLE!r}.")
    return tuple(_read(item) for item in items)


def _read(item: Any) -> Edit:
    if isinstance(item, Edit):
        return item
    if isinstance(item, str):
        return parse_edit(item)
    names = [f.name for f in fields(Edit)]
    if not isinstance(item, Mapping) or set(item) - set(names) or not {"site", "op"} <= set(item):
        raise RequestError(
            f"--edit is {item!r}; expected a line such as {EXAMPLE!r}, or a table with site, op and any of "
            f"{', '.join(names[2:])}."
        )
    return Edit(**item)


def parse_edit(text: str) -> Edit:
    """Read one line: the site, then selections, then exactly one op: `resid[4] position=first dim=447 scale=0.5`."""
    try:
        site, *words = shlex.split(text)
    except ValueError as error:
        raise RequestError(
            f"--edit {text!r} cannot be read ({error}); expected a line such as {EXAMPLE!r}."
        ) from None
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name in OPS:
            if "op" in found:
                raise RequestError(
                    f"--edit {text!r} has two ops, {found['op']} and {name}; write two edits."
                )
            found |= {"op": name, "value": _number(value) if equals else None}
        elif equals and name in WORDS and WORDS[name] not in found:
            found[WORDS[name]] = value
        elif equals and name in OPTIONS and name not in found:
            found[name] = _number(value)
        else:
            raise RequestError(
                f"--edit {text!r}: {word!r} is not understood. After the site come {'=…, '.join(WORDS)}=…, each at "
                f"most once, and one of {', '.join(OPS)}; for example {EXAMPLE!r}."
            )
    if "op" not in found:
        raise RequestError(
            f"--edit {text!r} does not say what to do; expected one of {', '.join(OPS)}, as in "
            f"{EXAMPLE!r}."
        )
    return Edit(site, **found)


def identity(edit: Edit, digest_source: Callable[[Edit], str]) -> dict[str, str]:
    """Return what fixes an edit's effect: its line, and a digest of the array, file, run or function behind it."""
    value = edit.value
    if isinstance(value, np.ndarray):
        mark = digest(value.tobytes() + str(value.shape).encode())
    elif callable(value):
        code = getattr(value, "__code__", None)
        mark = digest(
            repr(value).encode() if code is None else code.co_code + repr(code.co_consts).encode()
        )
    elif isinstance(value, str) and edit.op != "call" and not value.startswith(("ids:", "text:")):
        mark = digest_source(edit)
    else:
        mark = ""
    return {"edit": str(edit), "digest": mark}


def _selection(edit: Edit, name: str) -> str | None:
    """Return a selection as text without blanks; refuse what is neither numbers, ranges nor named positions."""
    value = getattr(edit, name)
    if value is None:
        return None
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        text = str(value)
    elif isinstance(value, list | tuple | range):
        text = ",".join(map(str, value))
    else:
        text = value if isinstance(value, str) else ""
    text = re.sub(r"\s*([,:])\s*", r"\1", text.strip())
    if not (SPOTS if name in ("positions", "keys") else INDICES).fullmatch(text):
        named = ", first and last" if name in ("positions", "keys") else ""
        raise RequestError(
            f"--edit at {edit.site}: {name} is {value!r}; expected numbers{named} and ranges, such as 0,4:8."
        )
    return text


def _value(value: Any) -> Any:
    """Return an array as float64, and text that is a number as that number: in a line the two look alike."""
    if isinstance(value, np.ndarray):
        try:
            return np.ascontiguousarray(value, np.float64)
        except (TypeError, ValueError) as error:
            raise RequestError(f"--edit: its array is not of numbers ({error}).") from None
    return _number(value) if isinstance(value, str) else value


def _split_site(text: Any) -> tuple[str, str | None]:
    """Split `resid[2:5]`, `resid[4]` or a TransformerLens name into the site and its layers or depths."""
    if not isinstance(text, str):
        raise RequestError(f"a site is a name, not {text!r}.")
    many = re.fullmatch(r"([^\[\]]+)\[([^\[\]]*[^\[\]0-9][^\[\]]*)\]", text.strip())
    name, index = parse_site(many[1] if many else text)
    return name, many[2] if many else None if index is None else str(index)


def _check_alone(edit: Edit) -> None:
    """Refuse what no model could do: a site that is derived, selections it lacks, an op without its value."""
    site = SITES[edit.site]
    if edit.site not in EDITABLE:
        instead = next(
            (to for start, to in _DERIVED.items() if edit.site.startswith(start)), "resid"
        )
        raise edit.refuse(f"{edit.site} is computed from other values; edit {instead} instead.")
    if not isinstance(edit.op, str) or edit.op not in OPS:
        raise edit.refuse(f"there is no op {edit.op!r}; expected one of {', '.join(OPS)}.")
    missing = {
        "at": site.axis is None,
        "heads": "head" not in site.dims,
        "dims": site.group != VECTOR,
        "keys": site.group != SQUARE,
    }
    for name, lacks in missing.items():
        if lacks and getattr(edit, name) is not None:
            raise edit.refuse(
                f"{edit.site} has no {'layers or depths' if name == 'at' else name} to select."
            )
    for name, kind in (("sequence", int), ("source", int), ("seed", int), ("factor", int | float)):
        value = getattr(edit, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
            raise edit.refuse(f"{name} is {value!r}; expected a number.")
    if edit.seed < 0 or not _is_finite(edit.factor):
        raise edit.refuse("seed must be 0 or more, and factor finite.")
    _check_value(edit)


def _check_value(edit: Edit) -> None:
    value = edit.value
    op = edit.op
    number = isinstance(value, int | float) and not isinstance(value, bool)
    array = isinstance(value, np.ndarray)
    text = isinstance(value, str)
    right = {
        "scale": number,
        "set": number or array or text,
        "zero": value is None,
        "add": number or array or text,
        "mean": text or array,
        "patch": text or array,
        "freeze": value is None or number,
        "linearise": value is None or text or array,
        "noise": number and value >= 0,
        "call": text or callable(value),
    }[op]
    if not right:
        shown = "no value" if value is None else repr(value)
        raise edit.refuse(f"{op} has {shown}; expected: {OPS[op]}.")
    if number and isinstance(value, int) and not _is_finite(value):
        raise edit.refuse(f"{op} has a number that is too large.")
    if number and math.isnan(value):
        raise edit.refuse(f"{op} has NaN; expected a number.")
    if number and math.isinf(value) and (op, edit.site) != ("set", "attn_scores"):
        raise edit.refuse(
            f"{op} has {value}; only `attn_scores … set=-inf`, which hides a key, may be infinite."
        )
    if array and not np.isfinite(value).all():
        raise edit.refuse("its array has values that are NaN or infinite.")
    if op == "linearise" and edit.site != "mlp_post":
        raise edit.refuse("linearise replaces the activation function, so its site is mlp_post.")
    if op == "noise" and SITES[edit.site].group != VECTOR:
        raise edit.refuse("noise is for residual streams, q, k, v, z and neurons.")
    if op == "mean" and SITES[edit.site].group == SQUARE:
        raise edit.refuse("a mean over positions means nothing for a pattern; patch it, or edit z.")
    if op == "patch" and edit.site in SCALES:
        raise edit.refuse("LayerNorm's scales are frozen or set, not patched.")
    if edit.factor != 1 and op != "add":
        raise edit.refuse("factor goes with add alone.")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can hold
        return False


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
