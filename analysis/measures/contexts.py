"""Show the contexts of a `top` result: as rows of a table, and as HTML with the tokens in place."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

N_UNITS = 12
N_CONTEXTS = 5


def context_rows(
    dataset: Any, n_units: int = N_UNITS, n_contexts: int = N_CONTEXTS
) -> list[dict[str, Any]]:
    """List the contexts of the units that stand out most among those of their layer or depth.

    Each row has the layer or depth, unit, rank, value, sequence, position, the tokens before, at and after, and the key
    for a head's pattern. Tokens are strings where the run has a tokenizer, ids elsewhere.
    """
    value = dataset["value"].values
    axis = str(dataset["value"].dims[0])
    numbers = dataset[dataset["value"].dims[0]].values
    peak = np.where(np.isfinite(value[..., 0]), np.abs(value[..., 0]), 0)
    middle = np.median(peak, axis=1, keepdims=True)
    order = np.argsort(-(peak / np.where(middle > 0, middle, 1)), axis=None, kind="stable")[
        :n_units
    ]
    named = "context_text" in dataset
    tokens = (dataset["context_text"] if named else dataset["context"]).values
    at = int(np.flatnonzero(dataset.offset.values == 0)[0])
    rows = []
    for lead, unit in zip(*np.unravel_index(order, peak.shape), strict=True):
        for rank in range(min(n_contexts, value.shape[2])):
            if dataset.sequence.values[lead, unit, rank] < 0:
                continue
            words = [
                str(w) if named else (f"{w} " if w >= 0 else "") for w in tokens[lead, unit, rank]
            ]
            row = {
                axis: int(numbers[lead]),
                "unit": int(dataset.unit.values[unit]),
                "rank": rank,
                "value": float(value[lead, unit, rank]),
                "sequence": int(dataset.sequence.values[lead, unit, rank]),
                "position": int(dataset.position.values[lead, unit, rank]),
                "before": "".join(words[:at]),
                "token": words[at],
                "after": "".join(words[at + 1 :]),
            }
            if "key" in dataset:
                shown = dataset["key_text"] if "key_text" in dataset else dataset["key_token"]
                row |= {
                    "key": int(dataset.key.values[lead, unit, rank]),
                    "key_token": str(shown.values[lead, unit, rank]),
                }
            rows.append(row)
    return rows


def contexts_html(dataset: Any, n_units: int = N_UNITS, n_contexts: int = N_CONTEXTS) -> str:
    """Return an HTML table of `context_rows`: one line a context, the unit's token marked, spaces and breaks shown."""
    rows = context_rows(dataset, n_units, n_contexts)
    axis = str(dataset["value"].dims[0])
    key = "key" in dataset
    head = "".join(
        f"<th>{name}</th>"
        for name in (axis, "unit", "value", "place", *(["to key"] if key else []), "context")
    )
    body = []
    last = None
    for row in rows:
        new = (row[axis], row["unit"]) != last
        last = row[axis], row["unit"]
        cells = [
            f"{row[axis]}" if new else "",
            f"{row['unit']}" if new else "",
            f"{row['value']:.3g}",
            f"{row['sequence']}:{row['position']}",
        ]
        cells += [f"{row['key']} {_visible(row['key_token'])}"] if key else []
        text = f"{_visible(row['before'])}<mark>{_visible(row['token'])}</mark>{_visible(row['after'])}"
        line = "".join(f"<td>{cell}</td>" for cell in cells)
        body.append(f"<tr{' class=new' if new else ''}>{line}<td class=text>{text}</td></tr>")
    return f"<table class=contexts><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _visible(text: str) -> str:
    """Escape a text for HTML; line breaks and tabs are shown as signs."""
    return escape(text).replace("\n", "<i>⏎</i>").replace("\t", "<i>⇥</i>")
