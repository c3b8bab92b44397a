"""What a value of a table or of a line of JSON says: text, token ids, a conversation, a label."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from headwater.extractor.text.unpack import (
    TextError,
)

# Pairs of keys that a turn of a conversation has: who speaks, and what is said.
TURNS = (("role", "content"), ("from", "value"))
MASK = "attention_mask"


def _plain_type(schema: Any, name: str) -> Any:
    kind = schema.field(name).type
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return kind


def _is_string(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def is_temporal(schema: Any, name: str) -> bool:
    return bool(pa.types.is_temporal(_plain_type(schema, name)))


def _is_list(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def is_ids(schema: Any, name: str) -> bool:
    kind = schema.field(name).type
    return _is_list(kind) and bool(pa.types.is_integer(kind.value_type))


def check_text(path: Path, schema: Any, name: str) -> None:
    kind = _plain_type(schema, name)
    turns = _is_list(kind) and pa.types.is_struct(kind.value_type)
    if not (_is_string(kind) or pa.types.is_null(kind) or is_ids(schema, name) or turns):
        raise TextError(
            f"{path}: column {name!r} holds {kind}, expected strings, lists of token ids, or lists of turns with "
            "role and content. Name another column, or cast this one."
        )


def check_label(path: Path, schema: Any, name: str) -> None:
    types = pa.types
    kind = _plain_type(schema, name)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    if not (_is_string(kind) or types.is_null(kind) or number or types.is_temporal(kind)):
        raise TextError(
            f"{path}: column {name!r} holds {kind}, expected numbers, strings, dates or booleans. Name another "
            "column, or cast this one."
        )


def values_of(column: Any) -> list[Any]:
    """Return the values of a column, dates and times as text, after a check that its buffers hold what they say."""
    # Offsets of a damaged file may point anywhere: Arrow reads by them without looking.
    column.validate(full=True)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_temporal(column.type):
        column = pa.compute.cast(column, pa.string())
    return list(column.to_pylist())


def text_or_ids(value: Any, mask: Any, where: str) -> str | np.ndarray | None:
    """Return a text, the ids of a list without what its mask leaves out, or the turns of a conversation as a text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise TextError(
            f"{where} holds {type(value).__name__}, expected a string or null, a list of token ids, or a list of "
            "turns with role and content. Name the column that holds the text."
        )
    # `type`, not isinstance: True is no id.
    if all(type(item) is int for item in value):
        try:
            ids = np.array(value, np.int64)
            if mask is None:
                kept = np.ones(len(ids), bool)
            else:
                kept = np.array(mask, np.int64) != 0
        except (OverflowError, ValueError, TypeError) as error:
            raise TextError(f"{where} holds ids that cannot be read ({error}).") from error
        if kept.shape != ids.shape:
            raise TextError(
                f"{where} holds {len(ids)} ids, but its {MASK} has {kept.size} values; expected as many. Correct "
                "the row, or leave the mask out."
            )
        chosen: np.ndarray = ids[kept]
        return chosen
    return "\n".join(_turn(item, where) for item in value)


def _turn(item: Any, where: str) -> str:
    """Write one turn of a conversation as "role: content"; no template of a tokenizer is run, since it is code."""
    for role, content in TURNS:
        if isinstance(item, Mapping) and isinstance(item.get(content), str | list):
            said = item[content]
            if isinstance(said, list):
                parts = [part.get("text") for part in said if isinstance(part, Mapping)]
                said = "".join(part for part in parts if isinstance(part, str))
            who = item.get(role)
            if isinstance(who, str) and who:
                return f"{who}: {said}"
            return str(said)
    raise TextError(
        f"{where} holds a list with {json.dumps(item, default=str)[:60]}; expected token ids, or turns with role and "
        "content. Name another column, or write the text into one."
    )


SURROGATE = re.compile("[\ud800-\udfff]")
