"""Read documents one at a time from plain text, JSON lines, Parquet, Arrow and CSV files, and standard input.

Memory holds one document, or one batch of a table's rows. Texts are taken as they are: only a byte order mark at the
start of a plain file is dropped, line ends stay.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

Label = int | float | str | bool | None
Row = tuple[int, str | None, Sequence[Label]]

KINDS = {
    "text": (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".js", ".ts", ".rs",
             ".go", ".java", ".sh"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
    "csv": (".csv", ".tsv"),
}
SUFFIXES = tuple(chain.from_iterable(KINDS.values()))
STDIN = Path("-")
ROWS_PER_BATCH = 64
CSV_BLOCK = 16 << 20


class TextError(ValueError):
    """A source of text cannot be found or read as asked; the message says what to do next."""


@dataclass(frozen=True)
class Document:
    """One text, the file it comes from ("-" for standard input) and its row there, counted from 0.

    A line of a JSON lines file is a row, blank ones included; a plain file is one document in row 0. `labels` holds
    the columns that were asked for, None where a value is missing.
    """

    source: str
    row: int
    text: str
    labels: dict[str, Label]


@dataclass
class Tally:
    """What `iter_documents` has passed so far: documents yielded, rows without text, and what standard input held."""

    documents: int = 0
    skipped: int = 0
    stdin: dict[str, str | int] | None = None


def expand_paths(arguments: Sequence[str]) -> list[Path]:
    """List the files that arguments name: files, directories, globs with `**`, and "-" for standard input.

    Of a directory the files with a known suffix are taken, at every depth, in sorted order; hidden ones are skipped.
    A file that several arguments name is read once. Raises TextError for an argument that names no file.
    """
    return list(dict.fromkeys(chain.from_iterable(_matches(argument) for argument in arguments)))


def describe_sources(paths: Iterable[Path]) -> list[dict[str, str | int]]:
    """Return path, size in bytes and sha256 of each file; standard input is left out (see `Tally.stdin`)."""
    described: list[dict[str, str | int]] = []
    for path in paths:
        if path != STDIN:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                described.append({"path": str(path), "size": file.tell(), "sha256": digest})
    return described


def iter_documents(
    paths: Iterable[Path], column: str | None, labels: Sequence[str], kind: str | None = None,
    tally: Tally | None = None,
) -> Iterator[Document]:
    """Yield the documents of files in order; rows whose text is null or empty are skipped and counted in `tally`.

    `column` holds the text in tables and JSON lines (default "text"); `labels` are columns carried along. `kind`, one
    of KINDS, replaces what the suffix says; unknown suffixes and standard input are plain text. Raises TextError.
    """
    tally = tally or Tally()
    for path in paths:
        chosen = kind or kind_of(path)
        try:
            for row, text, values in _rows(path, chosen, column or "text", labels, tally):
                if text:
                    tally.documents += 1
                    yield Document(str(path), row, text, dict(zip(labels, values, strict=True)))
                else:
                    tally.skipped += 1
        except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            advice = ("It is cut short, damaged, or of another format; check it, or name its format."
                      if "straddl" not in reason else
                      f"A row is longer than {CSV_BLOCK} bytes; write the table as Parquet or JSON lines.")
            raise TextError(f"{path} cannot be read as {chosen}: {reason}. {advice}") from error


def kind_of(path: Path) -> str:
    """Tell the format of a file, one of KINDS, by its suffix."""
    suffix = path.with_suffix("").suffix if path.suffix.lower() == ".gz" else path.suffix
    return next((kind for kind, suffixes in KINDS.items() if suffix.lower() in suffixes), "text")


def _matches(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if argument == "-":
        return [STDIN]
    if argument and path.is_dir():
        if found := list(_walk(path)):
            return found
        raise TextError(f"directory {argument!r} holds no file ending in {', '.join(SUFFIXES)}, plain or .gz. Name the "
                        "files themselves, or a glob.")
    if argument and path.exists():
        return [path]
    if found := [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)]:
        return found
    raise TextError(f"there is no file {argument!r}, and as a glob it matches none; expected a file, a directory, a "
                    "glob, or '-' for standard input. Check the path.")


def _walk(directory: Path) -> Iterator[Path]:
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        elif entry.is_file() and entry.name.lower().removesuffix(".gz").endswith(SUFFIXES):
            yield entry


def _rows(path: Path, kind: str, column: str, labels: Sequence[str], tally: Tally) -> Iterator[Row]:
    if kind == "text":
        return _text_row(path, labels, tally)
    if kind == "jsonl":
        return _json_rows(path, column, labels, tally)
    if kind not in KINDS:
        raise TextError(f"{kind!r} is not a format of text; expected one of {', '.join(KINDS)}.")
    if path == STDIN:
        raise TextError(f"standard input cannot be read as {kind}; expected text or jsonl. Write it to a file first.")
    return _table_rows(path, kind, column, labels)


def _text_row(path: Path, labels: Sequence[str], tally: Tally) -> Iterator[Row]:
    if labels:
        raise TextError(f"{path} is plain text, which has no columns, so label {labels[0]!r} is not there; expected "
                        "JSON lines, Parquet, Arrow or CSV. Convert it, or leave the labels out.")
    with _open(path) as file:
        data = b"".join(_hashed(file, tally)) if path == STDIN else file.read()
    yield 0, _decode(data, path, 0).removeprefix("\ufeff"), ()


def _json_rows(path: Path, column: str, labels: Sequence[str], tally: Tally) -> Iterator[Row]:
    offset, seen = 0, False
    with _open(path) as file:
        for row, line in enumerate(_hashed(file, tally) if path == STDIN else file):
            text = _decode(line, path, offset)
            offset += len(line)
            if text.strip():
                yield row, *_json_row(text, f"{path}:{row + 1}", column, () if seen else labels, labels)
                seen = True


def _json_row(
    line: str, where: str, column: str, required: Sequence[str], labels: Sequence[str]
) -> tuple[str | None, list[Label]]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise TextError(f"{where} is not valid JSON ({error}); expected one object or string a line. Correct the line, "
                        "or read the file as plain text.") from error
    entry = {column: value} if isinstance(value, str) else value
    if not isinstance(entry, dict):
        raise TextError(f"{where} holds a JSON {type(value).__name__}; expected an object with {column!r}, or a "
                        "string. Write one object a line, for example with `jq -c '.[]'`.")
    for name in (column, *required):
        if name not in entry:
            raise TextError(f"{where} has no {name!r}; there are {_list(entry)}. Name another column, or write null "
                            "where a value is missing.")
    text, values = entry[column], [entry.get(name) for name in labels]
    if not isinstance(text, str | None):
        raise TextError(f"{where}: {column!r} holds {type(text).__name__}, expected a string or null. Name the column "
                        "that holds the text.")
    if text and "\\u" in line and any("\ud800" <= character <= "\udfff" for character in text):
        raise TextError(f"{where}: {column!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is no "
                        "character. Correct the line.")
    for name, label in zip(labels, values, strict=True):
        if not isinstance(label, Label):
            raise TextError(f"{where}: label {name!r} holds {type(label).__name__}; expected a number, a string, true, "
                            "false or null. Name another column.")
    return text, values


def _table_rows(path: Path, kind: str, column: str, labels: Sequence[str]) -> Iterator[Row]:
    """Read a table in batches; the row number counts every row of the file."""
    wanted = list(dict.fromkeys((column, *labels)))
    if kind == "parquet":
        with pa.parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow, column, labels)
            yield from _batch_rows(file.iter_batches(ROWS_PER_BATCH, columns=wanted), column, labels)
    elif kind == "arrow":
        with pa.memory_map(str(path)) as mapped:
            try:
                opened = pa.ipc.open_file(mapped)
                batches: Iterable[Any] = (opened.get_batch(i) for i in range(opened.num_record_batches))
            except pa.ArrowInvalid:
                mapped.seek(0)
                batches = opened = pa.ipc.open_stream(mapped)
            _check_columns(path, opened.schema, column, labels)
            yield from _batch_rows(batches, column, labels)
    else:
        with _open(path) as raw, _open_csv(raw, path, column, None) as head:
            _check_columns(path, head.schema, column, labels)
        with _open(path) as raw, _open_csv(raw, path, column, wanted) as batches:
            yield from _batch_rows(batches, column, labels)


def _batch_rows(batches: Iterable[Any], column: str, labels: Sequence[str]) -> Iterator[Row]:
    row = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            part = batch.slice(start, ROWS_PER_BATCH)
            texts = part.column(column).to_pylist()
            values = [part.column(name).to_pylist() for name in labels]
            for text, *found in zip(texts, *values, strict=True):
                yield row, text, found
                row += 1


def _open_csv(raw: BinaryIO, path: Path, column: str, wanted: list[str] | None) -> Any:
    tab = path.name.lower().removesuffix(".gz").endswith(".tsv")
    return pa.csv.open_csv(
        raw,
        read_options=pa.csv.ReadOptions(block_size=CSV_BLOCK),
        parse_options=pa.csv.ParseOptions(delimiter="\t" if tab else ",", newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(column_types={column: pa.string()}, include_columns=wanted),
    )


def _check_columns(path: Path, schema: Any, column: str, labels: Sequence[str]) -> None:
    types = pa.types
    for name in (column, *labels):
        if (count := schema.names.count(name)) != 1:
            there = f"no column {name!r}" if not count else f"{count} columns {name!r}"
            raise TextError(f"{path} has {there}; there are {_list(schema.names)}. Name another column.")
        kind = schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        string = str(kind) in ("string", "large_string", "string_view")
        number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        if not (string or types.is_null(kind) or (number and name != column)):
            expected = "strings" if name == column else "numbers, strings or booleans"
            raise TextError(f"{path}: column {name!r} holds {kind}, expected {expected}. Name another column, or cast "
                            "this one.")


def _open(path: Path) -> BinaryIO:
    if path == STDIN:
        return cast(BinaryIO, sys.stdin.buffer)
    return cast(BinaryIO, gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _hashed(file: BinaryIO, tally: Tally) -> Iterator[bytes]:
    """Yield the lines of standard input and record their size and sha256, since it cannot be read again."""
    digest, size = hashlib.sha256(), 0
    try:
        for line in file:
            digest.update(line)
            size += len(line)
            yield line
    finally:
        tally.stdin = {"path": "-", "size": size, "sha256": digest.hexdigest()}


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset + error.start} "
                        f"({error.reason}). Convert it, for example with `iconv -t UTF-8`.") from error


def _list(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "") or "none"
