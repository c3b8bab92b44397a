"""Read documents one at a time from plain text, JSON lines, Parquet, Arrow and CSV files, and from streams.

Memory holds one line or 4 MB of a plain text, or one batch of a table's rows. Texts are taken as they are: only a byte
order mark at the start of a file is dropped, line ends stay.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from headwater.extractor.text.columns import (
    MASK,
    SURROGATE,
    check_label,
    check_text,
    is_ids,
    is_temporal,
    text_or_ids,
    values_of,
)
from headwater.extractor.text.paths import (
    KINDS,
    first_bytes,
    how_to_convert,
    kind_of,
    name_all,
    unpacked_name,
)
from headwater.extractor.text.unpack import (
    MOST_UNPACKED,
    STDIN,
    UNPACK_ERRORS,
    Stream,
    TextError,
    open_unpacked,
    packing_of,
    read_once,
    unpacked_path,
    zip_member,
)

__all__ = [
    "STDIN",
    "Document",
    "Label",
    "Tally",
    "TextError",
    "describe_sources",
    "iter_documents",
]

Label = int | float | str | bool | None

ROWS_PER_BATCH = 64
CSV_BLOCK = 16 << 20
TEXT_CHUNK = 4 << 20
# A line is held three times while it is decoded and parsed.
LONGEST_LINE = 128 << 20


@dataclass(frozen=True)
class Document:
    """One text, the file it comes from ("-" for standard input) and its row there, counted from 0.

    A line of a JSON lines file is a row, blank ones included; a plain file is one document in row 0. `labels` holds
    the columns that were asked for, None where a value is missing. `more` is what follows `text` in a long file; it
    can be read once, before the next document is asked for. `ids` are token ids, int64 [n], in the place of a text.
    """

    source: str
    row: int
    text: str
    labels: dict[str, Label]
    more: Iterable[str] = field(default=(), compare=False, repr=False)
    ids: np.ndarray | None = field(default=None, compare=False, repr=False)


class Row(NamedTuple):
    """A row of a file: its text, or the list of token ids in its place, and its labels."""

    number: int
    text: str | np.ndarray | None
    labels: Sequence[Label]
    more: Iterable[str] = ()


@dataclass
class Tally:
    """What `iter_documents` has passed so far: documents yielded, rows without text, and streams read once."""

    documents: int = 0
    skipped: int = 0
    streams: list[Stream] = field(default_factory=list)


def describe_sources(paths: Iterable[Path]) -> list[dict[str, str | int]]:
    """Return path, size in bytes and sha256 of each file; what is read once is left out (see `Tally.streams`)."""
    described: list[dict[str, str | int]] = []
    for path in paths:
        # A stream cannot be read twice; its digest is made while it is read.
        if not read_once(path):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                described.append({"path": str(path), "size": file.tell(), "sha256": digest})
    return described


def iter_documents(
    paths: Iterable[Path],
    column: str | None,
    labels: Sequence[str],
    kind: str | None = None,
    tally: Tally | None = None,
    max_unpacked: int | None = None,
) -> Iterator[Document]:
    """Yield the documents of files in order; rows whose text is null or empty are skipped and counted in `tally`.

    `column` holds the text in tables and JSON lines (default "text"), or token ids, or the turns of a conversation,
    which are joined as lines "role: content"; `labels` are columns carried along. `kind`, one of KINDS, replaces what
    the suffix says; unknown suffixes and streams are plain text. A compressed file may unpack to `max_unpacked` bytes.
    Raises TextError.
    """
    tally = tally or Tally()
    reader = _Reader(column or "text", tuple(labels), tally, max_unpacked or MOST_UNPACKED)
    for path in paths:
        chosen = kind or "text"
        try:
            chosen = kind or kind_of(path)
            for row in reader.rows(path, chosen):
                if row.text is None or not len(row.text):
                    tally.skipped += 1
                    continue
                tally.documents += 1
                # The labels of one row, in the order in which they were asked for.
                named = dict(zip(labels, row.labels, strict=True))
                if isinstance(row.text, str):
                    yield Document(str(path), row.number, row.text, named, row.more)
                else:
                    yield Document(str(path), row.number, "", named, (), row.text)
        except (*UNPACK_ERRORS, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            advice = "It is cut short, damaged, or of another format; check it, or name its format."
            if "straddl" in reason:
                advice = f"A row is longer than {CSV_BLOCK} bytes; write the table as Parquet or JSON lines."
            elif chosen == "csv" and ("UTF8" in reason or "utf-8" in reason):
                advice = f"It is not UTF-8. {how_to_convert(first_bytes(path))}"
            raise TextError(f"{path} cannot be read as {chosen}: {reason}. {advice}") from error


class _Reader:
    """Read the rows of files, each by its format."""

    def __init__(self, column: str, labels: tuple[str, ...], tally: Tally, limit: int) -> None:
        self._column = column
        self._labels = labels
        self._tally = tally
        self._limit = limit

    def rows(self, path: Path, kind: str) -> Iterator[Row]:
        if kind not in KINDS:
            raise TextError(
                f"{kind!r} is not a format of text; expected one of {', '.join(KINDS)}."
            )
        once = read_once(path)
        if once and kind not in ("text", "jsonl"):
            if path == STDIN:
                what = "standard input"
            else:
                what = f"the stream {path}"
            raise TextError(
                f"{what} cannot be read as {kind}; expected text or jsonl. Write it to a file first."
            )
        if kind in ("parquet", "arrow"):
            yield from self._table(path, kind)
            return
        if kind == "csv":
            yield from self._csv(path)
            return
        if once:
            stream = Stream(path)
        else:
            stream = None
        if stream is not None:
            self._tally.streams.append(stream)
        with open_unpacked(path, self._limit, stream) as file:
            yield from self._text(file, path) if kind == "text" else self._json(file, path)

    def _text(self, file: BinaryIO, path: Path) -> Iterator[Row]:
        if self._labels:
            raise TextError(
                f"{path} is plain text, which has no columns, so label {self._labels[0]!r} is not there; expected "
                "JSON lines, Parquet, Arrow or CSV. Convert it, or leave the labels out."
            )
        parts = _decoded(file, path)
        # The first part comes with the row, the rest as it is asked for: memory holds 4 MB of a text of any length.
        text = next(parts, "").removeprefix("\ufeff")
        second = next(parts, None)
        more: Iterable[str] = ()
        if second is not None:
            more = chain([second], parts)
        yield Row(0, text, (), more)
        for _ in more:  # what was not asked for is read all the same: it may not be UTF-8
            pass

    def _json(self, file: BinaryIO, path: Path) -> Iterator[Row]:
        offset = 0
        row = 0
        seen = False
        while line := file.readline(LONGEST_LINE + 1):
            where = f"{path}:{row + 1}"
            if len(line) > LONGEST_LINE:
                raise TextError(
                    f"{where} is longer than {LONGEST_LINE >> 20} MiB; expected one document a line. Divide it, or "
                    "read the file as plain text."
                )
            text = _decode(line, path, offset)
            if row == 0:
                text = text.removeprefix("\ufeff")
            offset += len(line)
            if text.strip():
                required = self._labels
                if seen:
                    required = ()
                found, labels = _json_row(text, where, self._column, required, self._labels)
                yield Row(row, found, labels)
                seen = True
            row += 1

    def _table(self, path: Path, kind: str) -> Iterator[Row]:
        """Read a table in batches; the row number counts every row of the file."""
        if kind == "parquet":
            with pa.parquet.ParquetFile(path) as file:
                wanted = self._check(path, file.schema_arrow)
                # Only the columns that were asked for are read; 64 rows at a time, since a row may be a whole book.
                batches = file.iter_batches(ROWS_PER_BATCH, columns=wanted)
                yield from self._batches(path, batches, file.schema_arrow)
            return
        # Not a memory map: a damaged file could then name memory that is not the file's.
        with pa.OSFile(str(path)) as file:
            try:
                opened = pa.ipc.open_file(file)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            except pa.ArrowInvalid:
                file.seek(0)
                batches = opened = pa.ipc.open_stream(file)
            self._check(path, opened.schema)
            yield from self._batches(path, batches, opened.schema)

    def _csv(self, path: Path) -> Iterator[Row]:
        tab = _is_tab_separated(path)
        with unpacked_path(path, self._limit) as whole:
            # Twice: for the names and guessed types first, then with text and dates as strings, as they stand there.
            with _open_csv(whole, tab, {}, None) as head:
                schema = head.schema
            wanted = self._check(path, schema, has_types=False)
            kept = [name for name in wanted if name == self._column or is_temporal(schema, name)]
            types = dict.fromkeys(
                kept, pa.string()
            )  # a CSV has no dates, only what looks like them
            with _open_csv(whole, tab, types, wanted) as batches:
                yield from self._batches(path, batches, batches.schema)

    def _batches(self, path: Path, batches: Iterable[Any], schema: Any) -> Iterator[Row]:
        names = [self._column, *self._labels]
        if is_ids(schema, self._column) and MASK in schema.names:
            mask = MASK
        else:
            mask = None
        row = 0
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                part = batch.slice(start, ROWS_PER_BATCH)
                columns = [values_of(part.column(name)) for name in names]
                if mask:
                    masks = values_of(part.column(mask))
                else:
                    masks = [None] * part.num_rows
                for text, kept, *labels in zip(columns[0], masks, *columns[1:], strict=True):
                    yield Row(row, text_or_ids(text, kept, f"{path}, row {row}"), labels)
                    row += 1

    def _check(self, path: Path, schema: Any, has_types: bool = True) -> list[str]:
        """Refuse columns that are not there or cannot be used; return those to read."""
        for name in (self._column, *self._labels):
            if (count := schema.names.count(name)) != 1:
                if not count:
                    there = f"no column {name!r}"
                else:
                    there = f"{count} columns {name!r}"
                raise TextError(
                    f"{path} has {there}; there are {name_all(schema.names)}. Name another column."
                )
        if has_types:
            check_text(path, schema, self._column)
        for name in self._labels:
            check_label(path, schema, name)
        wanted = [self._column, *self._labels]
        if is_ids(schema, self._column) and schema.names.count(MASK) == 1:
            wanted.append(MASK)
        return list(dict.fromkeys(wanted))


def _json_row(
    line: str, where: str, column: str, required: Sequence[str], labels: Sequence[str]
) -> tuple[str | np.ndarray | None, list[Label]]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TextError(
            f"{where} is not valid JSON ({error}); expected one object or string a line. Correct the line, "
            "read the file as plain text, or write a JSON array as lines with `jq -c '.[]'`."
        ) from error
    # A line that is a string alone is a document without labels.
    entry = value
    if isinstance(value, str):
        entry = {column: value}
    if not isinstance(entry, dict):
        raise TextError(
            f"{where} holds a JSON {type(value).__name__}; expected an object with {column!r}, or a "
            "string. Write one object a line, for example with `jq -c '.[]'`."
        )
    # A label that the first line lacks is a slip of the pen; in later ones it is a missing value.
    for name in (column, *required):
        if name not in entry:
            raise TextError(
                f"{where} has no {name!r}; there are {name_all(entry)}. Name another column, or write null "
                "where a value is missing."
            )
    text = text_or_ids(entry[column], entry.get(MASK), f"{where}: {column!r}")
    values = [entry.get(name) for name in labels]
    for name, label in [(column, text), *zip(labels, values, strict=True)]:
        if isinstance(label, str) and "\\u" in line and SURROGATE.search(label):
            raise TextError(
                f"{where}: {name!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
                "character. Correct the line."
            )
    for name, label in zip(labels, values, strict=True):
        if not isinstance(label, Label):
            raise TextError(
                f"{where}: label {name!r} holds {type(label).__name__}; expected a number, a string, true, "
                "false or null. Name another column."
            )
    return text, values


def _is_tab_separated(path: Path) -> bool:
    zipped = packing_of(path) == ".zip"
    return (zip_member(path).lower() if zipped else unpacked_name(path)).endswith(".tsv")


def _open_csv(path: Path, tab: bool, types: dict[str, Any], wanted: list[str] | None) -> Any:
    return pa.csv.open_csv(
        path,
        read_options=pa.csv.ReadOptions(block_size=CSV_BLOCK),
        parse_options=pa.csv.ParseOptions(delimiter="\t" if tab else ",", newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types=types, include_columns=wanted),
    )


def _decoded(file: BinaryIO, path: Path) -> Iterator[str]:
    """Yield the text of a file in parts of TEXT_CHUNK bytes, the last one shorter."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_read = 0
    while True:
        data = file.read(TEXT_CHUNK)
        # The decoder may hold the first bytes of a character that the last part cut: the offset is theirs.
        offset = n_read - len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, path, offset) from error
        n_read += len(data)
        if text:
            yield text
        if not data:
            return


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(error, path, offset) from error


def _not_utf8(error: UnicodeDecodeError, path: Path, offset: int) -> TextError:
    return TextError(
        f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start} "
        f"({error.reason}). {how_to_convert(error.object[:2])}"
    )
