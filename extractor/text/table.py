"""The table of documents beside a run: where each came from, how much of it is in rows, and its labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from headwater.extractor.text.documents import Document

DOCUMENTS_PER_GROUP = 1 << 16
COLUMNS = (
    ("document", pa.int64()),
    ("source", pa.string()),
    ("row", pa.int64()),
    ("n_tokens", pa.int64()),
    ("complete", pa.bool_()),
)
INT64_MAX = 2**63 - 1
# No label can have this value; it stands for a missing one where −1 is a real one.
LOWEST = -(2**63)
MISSING = {
    pa.int64(): ("int64", LOWEST),
    pa.float64(): ("float64", np.nan),
    pa.string(): ("int32", -1),
}


class LabelColumn(NamedTuple):
    """A label of each row: int64, float64 (NaN missing), or int32 codes into categories (-1 missing).

    Of whole numbers `missing` is -1, or LOWEST where -1 is a label.
    """

    values: np.ndarray
    categories: dict[str, int] | None
    missing: float


class DocumentCount:
    """Count the documents that reach the rows, and those that are not whole there."""

    def __init__(self) -> None:
        self.n_documents = 0
        self.n_cut = 0

    def add(self, document: Document, n_tokens: int, complete: bool) -> None:
        """Count a document: how many of its own tokens are in rows, and whether that is all of them."""
        self.n_documents += 1
        self.n_cut += not complete


class DocumentWriter(DocumentCount):
    """Stream the table of documents into a Parquet file: COLUMNS, and a column "label_…" for each label.

    A label becomes int64 (booleans 0 and 1), float64 or string, whichever holds all its values. That is known at the
    end only, so values wait as text in a file beside `path` until `close`. Leaving `with` by an error writes nothing.
    """

    def __init__(self, path: Path, labels: Sequence[str] = ()) -> None:
        super().__init__()
        self.path = path
        self._types: dict[str, Any] = dict.fromkeys(labels)
        self._schema = pa.schema([*COLUMNS, *((f"label_{name}", pa.string()) for name in labels)])
        self._loose = path.with_name(path.name + ".loose")
        self._writer = pa.parquet.ParquetWriter(self._loose, self._schema)
        self._rows: list[tuple[Any, ...]] = []

    def add(self, document: Document, n_tokens: int, complete: bool) -> None:
        """Append a document: how many of its own tokens are in rows, and whether that is all of them."""
        labels = (self._label(document, name) for name in self._types)
        self._rows.append(
            (self.n_documents, document.source, document.row, n_tokens, complete, *labels)
        )
        super().add(document, n_tokens, complete)
        if len(self._rows) == DOCUMENTS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Give every label its type and move the table to `path`."""
        self._flush()
        self._writer.close()
        types = [kind for _, kind in COLUMNS] + [
            kind or pa.float64() for kind in self._types.values()
        ]
        schema = pa.schema(zip(self._schema.names, types, strict=True))
        with (
            pa.parquet.ParquetFile(self._loose) as loose,
            pa.parquet.ParquetWriter(self.path, schema) as writer,
        ):
            for group in range(loose.num_row_groups):
                writer.write_table(loose.read_row_group(group).cast(schema))
        self._loose.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._writer.close()
            self._loose.unlink(missing_ok=True)

    def _flush(self) -> None:
        # Rows are held until there are enough for a row group, and turned into columns then.
        columns: list[tuple[Any, ...]] = [()] * len(self._schema)
        if self._rows:
            columns = list(zip(*self._rows, strict=True))
        self._writer.write_table(
            pa.table(list(map(pa.array, columns, self._schema.types)), self._schema)
        )
        self._rows = []

    def _label(self, document: Document, name: str) -> str | None:
        value = document.labels[name]
        known = self._types[name]
        if value is None:
            return None
        if isinstance(value, bool):
            value = int(value)
        kind = (
            pa.string()
            if isinstance(value, str)
            else pa.float64()
            if isinstance(value, float)
            else pa.int64()
        )
        if known not in (None, kind) and pa.string() in (known, kind):
            raise ValueError(
                f"{document.source}, row {document.row}: label {name!r} is {value!r}, a {kind}, where "
                f"earlier documents have a {known}; expected only numbers or only strings. Convert it."
            )
        if isinstance(value, int) and not -INT64_MAX <= value <= INT64_MAX:
            raise ValueError(
                f"{document.source}, row {document.row}: label {name!r} is {value}, beyond 64 bits; "
                "expected a smaller number or a string. Convert it."
            )
        self._types[name] = pa.float64() if known == pa.float64() and kind != known else kind
        if isinstance(value, str):
            return value
        return repr(value)


def sequence_labels(path: Path, document: np.ndarray) -> dict[str, LabelColumn]:
    """Return the labels of each row's first document, from a `DocumentWriter`'s file.

    `document` is the rows' non-decreasing int64 [n]. Memory: the result, 8 bytes a row and label at most.
    """
    found: dict[str, LabelColumn] = {}
    base = 0
    with pa.parquet.ParquetFile(path) as file:
        for field in file.schema_arrow:
            if field.name.startswith("label_"):
                kind, missing = MISSING[field.type]
                values = np.full(len(document), missing, kind)
                found[field.name.removeprefix("label_")] = LabelColumn(
                    values, {} if kind == "int32" else None, missing
                )
        for batch in file.iter_batches(DOCUMENTS_PER_GROUP):
            low, high = np.searchsorted(document, [base, base + batch.num_rows])
            wanted = batch.take(pa.array(document[low:high] - base))
            for name, (values, categories, missing) in found.items():
                column = wanted.column(f"label_{name}")
                if categories is None:
                    column = column.fill_null(missing)
                    values[low:high] = column.to_numpy(zero_copy_only=False)
                else:
                    values[low:high] = [
                        -1 if text is None else categories.setdefault(text, len(categories))
                        for text in column.to_pylist()
                    ]
            base += batch.num_rows
    return {name: _settled(label) for name, label in found.items()}


def _settled(label: LabelColumn) -> LabelColumn:
    """Write a missing whole number as -1 where no label is."""
    if label.missing != LOWEST or (label.values == -1).any():
        return label
    label.values[label.values == LOWEST] = -1
    return label._replace(missing=-1)
