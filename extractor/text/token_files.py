"""What `capture` takes as text: strings, token ids of every usual kind, and what a Hugging Face tokenizer returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from headwater.extractor.sites import RequestError
from headwater.extractor.text.rows import PADDING

EXPECTED = (
    "expected a text, several texts, token ids [sequence, position] (an array, a tensor or lists), or "
    "what a Hugging Face tokenizer returns"
)
CHANGING = ("token_type_ids", "position_ids", "inputs_embeds", "past_key_values")


def read_input(given: Any) -> list[str] | np.ndarray:
    """Return texts, or token ids int64 [sequence, position] with −1 for padding at the right of shorter rows.

    Of a mapping, `input_ids` counts, and `attention_mask` says what is padding. Raises RequestError for what is
    neither text nor ids.
    """
    if isinstance(given, str):
        return _texts([given])
    if isinstance(given, Mapping):
        return _tokenizer_output(given)
    if isinstance(given, bytes | PurePath) or hasattr(given, "columns"):
        raise _refusal(given)
    if isinstance(given, torch.Tensor | np.ndarray) or hasattr(given, "__array__"):
        values = _array(given)
        return _texts(values.tolist()) if values.dtype.kind in "OUST" else _rows(values)
    if not isinstance(given, Iterable):
        raise _refusal(given)
    items = list(given)
    if not items:
        raise RequestError(
            f"the text is an empty {type(given).__name__}, so it holds no tokens; {EXPECTED}."
        )
    if isinstance(items[0], str):
        return _texts(items)
    if all(_is_id(item) for item in items):
        return _rows(_array(items))
    return _padded([_row(item) for item in items])


def _texts(items: list[Any]) -> list[str]:
    """Return a flat list of texts that UTF-8 can hold."""
    for number, item in enumerate(items):
        if not isinstance(item, str):
            raise _refusal(item, f"item {number} of the texts")
        try:
            item.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text {number} holds a lone surrogate, {item[error.start]!r}, at character "
                f"{error.start}, which stands for no character. Replace it, as with "
                "text.encode('utf-8', 'replace').decode()."
            ) from None
    return items


def _tokenizer_output(given: Mapping[Any, Any]) -> np.ndarray:
    """Return the ids of a tokenizer's output, −1 where its attention_mask is 0."""
    if "input_ids" not in given:
        raise RequestError(
            f"the text is a {type(given).__name__} with {', '.join(map(str, list(given)[:4])) or 'nothing'}; "
            f"{EXPECTED}, which has input_ids."
        )
    if changing := [name for name in CHANGING if given.get(name) is not None]:
        raise RequestError(
            f"{changing[0]} would change what the model computes, which Headwater does not follow. Give "
            "input_ids and attention_mask alone."
        )
    ids = read_input(given["input_ids"])
    if not isinstance(ids, np.ndarray):
        raise RequestError(f"input_ids are texts; {EXPECTED}.")
    if given.get("attention_mask") is None:
        return ids
    mask = read_input(given["attention_mask"])
    if not isinstance(mask, np.ndarray) or mask.shape != ids.shape:
        raise RequestError(
            f"attention_mask has shape {list(np.shape(mask))}, but input_ids {list(ids.shape)}; expected "
            "the same."
        )
    return np.where(mask > 0, ids, PADDING)


def _array(given: Any) -> np.ndarray:
    tensor = given.detach().cpu() if isinstance(given, torch.Tensor) else given
    try:
        return np.asarray(tensor)
    except (TypeError, ValueError, OverflowError) as error:
        raise _refusal(given, reason=str(error)) from error


def _rows(values: np.ndarray) -> np.ndarray:
    """Return whole numbers as [sequence, position]; one dimension is one sequence."""
    if values.dtype.kind not in "iu" or values.ndim not in (1, 2):
        raise RequestError(
            f"token ids have dtype {values.dtype} and shape {list(values.shape)}; expected whole numbers "
            "[sequence, position], or [position] for one sequence."
        )
    rows = values[None] if values.ndim == 1 else values
    return rows.astype(np.int64)


def _is_id(item: Any) -> bool:
    return isinstance(item, int | np.integer) and not isinstance(item, bool)


def _row(item: Any) -> np.ndarray:
    """Return one sequence of ids among several."""
    if isinstance(item, str | bytes) or not (
        hasattr(item, "__array__") or isinstance(item, Iterable)
    ):
        raise _refusal(item, "an item among lists of token ids")
    values = _array(item if hasattr(item, "__array__") else list(item))
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise RequestError(
            f"an item among lists of token ids has dtype {values.dtype} and shape {list(values.shape)}; "
            "expected whole numbers [position], at least one."
        )
    return values


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    ids = np.full((len(rows), max(map(len, rows))), PADDING, np.int64)
    for row, values in zip(ids, rows, strict=True):
        row[: len(values)] = values
    return ids


def _refusal(item: Any, what: str = "the text", reason: str = "") -> RequestError:
    return RequestError(
        f"{what} is a {type(item).__name__}{f' ({reason})' if reason else ''}; {EXPECTED}. Of a file, give "
        "its text; of a table, one column as a list."
    )
