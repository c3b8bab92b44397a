"""Read documents one at a time from plain text, JSON lines, Parquet, Arrow and CSV files, and from streams.

Memory holds one line or 4 MB of a plain text, or one batch of a table's rows. Texts are taken as they are: only a byte
order mark at the start of a file is dropped, line ends stay.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv
import pyarrow.parquet

from headwater.extractor.text.unpack import (
    MOST_UNPACKED,
    PACKINGS,
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
    "expand_paths",
    "iter_documents",
    "kind_of",
]

Label = int | float | str | bool | None

KINDS = {
    "text": (
        ".txt",
        ".text",
        ".md",
        ".markdown",
        ".rst",
        ".tex",
        ".py",
        ".c",
        ".h",
        ".cpp",
        ".js",
        ".ts",
        ".rs",
        ".go",
        ".java",
        ".sh",
    ),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
    "csv": (".csv", ".tsv"),
}
SUFFIXES = tuple(chain.from_iterable(KINDS.values()))
ROWS_PER_BATCH = 64
CSV_BLOCK = 16 << 20
TEXT_CHUNK = 4 << 20
# A line is held three times while it is decoded and parsed.
LONGEST_LINE = 128 << 20
# What a dataset's folder holds beside its tables.
CARDS = re.compile(r"(readme|licen[cs]e|citation|changelog)(\.(md|markdown|txt|text|rst))?", re.I)
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CARD_START = b"---\n"  # the YAML with which the card of a dataset begins
URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.I)
FETCH = {
    "s3": "Copy it here first, for example with `aws s3 cp`",
    "gs": "Copy it here first, for example with `gsutil cp`",
    "hf": "Fetch it first, for example with `hf download --repo-type dataset`",
    "file": "Write the path alone",
}
# Pairs of keys that a turn of a conversation has: who speaks, and what is said.
TURNS = (("role", "content"), ("from", "value"))


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


def expand_paths(arguments: Sequence[str]) -> list[Path]:
    """List the files that arguments name: files, directories, globs with `**`, and "-" for standard input.

    Of a directory the files with a known suffix are taken, at every depth, in sorted order; hidden ones are skipped,
    and where there are tables or JSON lines, so are README, LICENSE and the metadata of the `datasets` library. Of a
    folder that `datasets` saved to disk, the files that its state.json lists are taken. A file that several arguments
    name is read once. Raises TextError for an argument that names no file.
    """
    return list(dict.fromkeys(chain.from_iterable(_matches(argument) for argument in arguments)))


def describe_sources(paths: Iterable[Path]) -> list[dict[str, str | int]]:
    """Return path, size in bytes and sha256 of each file; what is read once is left out (see `Tally.streams`)."""
    described: list[dict[str, str | int]] = []
    for path in paths:
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
                advice = f"It is not UTF-8. {_convert(_first_bytes(path))}"
            raise TextError(f"{path} cannot be read as {chosen}: {reason}. {advice}") from error


def kind_of(path: Path) -> str:
    """Tell the format of a file, one of KINDS, by its suffix; of a zip archive also by that of its one file."""
    packing = packing_of(path)
    name = path.name.lower().removesuffix(packing)
    if packing == ".zip" and not name.endswith(SUFFIXES) and path.is_file():
        name = zip_member(path).lower()
    suffix = Path(name).suffix
    return next((kind for kind, suffixes in KINDS.items() if suffix in suffixes), "text")


def _matches(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if argument == "-":
        return [STDIN]
    refuse_url("--text", argument)
    if argument and path.is_dir():
        if found := _documents_of(path):
            return found
        raise TextError(
            f"directory {argument!r} holds no file ending in {', '.join(SUFFIXES)}, plain or compressed "
            f"({' '.join(PACKINGS)}). Name the files themselves, or a glob."
        )
    if argument and path.exists():
        return [path]
    if found := [
        Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)
    ]:
        return found
    raise TextError(
        f"there is no file {argument!r}, and as a glob it matches none; expected a file, a directory, a "
        "glob, or '-' for standard input. Check the path."
    )


def refuse_url(flag: str, argument: str) -> None:
    """Raise TextError for an address, and say how to fetch what it names."""
    if (url := URL.match(argument)) and not Path(argument).exists():
        advice = FETCH.get(url[1].lower(), "Fetch it first, for example with `curl -LO`")
        if flag == "--text" and url[1] != "file":
            pipe = ", or pipe it into `--text -`"
        else:
            pipe = ""
        raise TextError(
            f"{flag} {argument!r} is an address, and Headwater reads text and ids from this machine only, so that "
            f"it can compare them when a run goes on. {advice}{pipe}."
        )


def _documents_of(directory: Path) -> list[Path]:
    """List a directory's files without what only describes its tables."""
    found = list(_walk(directory))
    described = [path for path in found if _describes(path)]
    others = set(found) - set(described)
    if any(kind_of_name(path.name) != "text" for path in others):
        return [path for path in found if path in others]
    return found


def _describes(path: Path) -> bool:
    """Tell whether a file is a card, metadata, or the script of a dataset, which stands beside a card."""
    if path.suffix == ".py" and (card := path.with_name("README.md")).is_file():
        with card.open("rb") as file:
            return file.read(len(CARD_START)) == CARD_START
    return bool(CARDS.fullmatch(path.name)) or path.name.lower() in METADATA


def kind_of_name(name: str) -> str:
    """Tell the format by a name alone."""
    return kind_of(Path("/nowhere") / name)


def _walk(directory: Path) -> Iterator[Path]:
    if listed := _saved_to_disk(directory):
        yield from listed
        return
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        elif entry.is_file() and _unpacked_name(entry).endswith(SUFFIXES):
            yield entry


def _unpacked_name(path: Path) -> str:
    return path.name.lower().removesuffix(packing_of(path))


def _saved_to_disk(directory: Path) -> list[Path]:
    """List the files of a folder that `datasets.Dataset.save_to_disk` wrote, in their order; none of another."""
    try:
        state = json.loads((directory / "state.json").read_bytes())
        names = [item["filename"] for item in state["_data_files"]]
        if state.get("_indices_files") or not all(Path(name).name == name for name in names):
            return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    found = [directory / name for name in names]
    if all(path.is_file() for path in found):
        return found
    return []


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
            with _open_csv(whole, tab, {}, None) as head:
                schema = head.schema
            wanted = self._check(path, schema, has_types=False)
            kept = [name for name in wanted if name == self._column or _is_temporal(schema, name)]
            types = dict.fromkeys(
                kept, pa.string()
            )  # a CSV has no dates, only what looks like them
            with _open_csv(whole, tab, types, wanted) as batches:
                yield from self._batches(path, batches, batches.schema)

    def _batches(self, path: Path, batches: Iterable[Any], schema: Any) -> Iterator[Row]:
        names = [self._column, *self._labels]
        if _is_ids(schema, self._column) and MASK in schema.names:
            mask = MASK
        else:
            mask = None
        row = 0
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS_PER_BATCH):
                part = batch.slice(start, ROWS_PER_BATCH)
                columns = [_values(part.column(name)) for name in names]
                if mask:
                    masks = _values(part.column(mask))
                else:
                    masks = [None] * part.num_rows
                for text, kept, *labels in zip(columns[0], masks, *columns[1:], strict=True):
                    yield Row(row, _text_or_ids(text, kept, f"{path}, row {row}"), labels)
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
                    f"{path} has {there}; there are {_list(schema.names)}. Name another column."
                )
        if has_types:
            _check_text(path, schema, self._column)
        for name in self._labels:
            _check_label(path, schema, name)
        wanted = [self._column, *self._labels]
        if _is_ids(schema, self._column) and schema.names.count(MASK) == 1:
            wanted.append(MASK)
        return list(dict.fromkeys(wanted))


MASK = "attention_mask"


def _plain_type(schema: Any, name: str) -> Any:
    kind = schema.field(name).type
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return kind


def _is_string(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _is_temporal(schema: Any, name: str) -> bool:
    return bool(pa.types.is_temporal(_plain_type(schema, name)))


def _is_list(kind: Any) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_ids(schema: Any, name: str) -> bool:
    kind = schema.field(name).type
    return _is_list(kind) and bool(pa.types.is_integer(kind.value_type))


def _check_text(path: Path, schema: Any, name: str) -> None:
    kind = _plain_type(schema, name)
    turns = _is_list(kind) and pa.types.is_struct(kind.value_type)
    if not (_is_string(kind) or pa.types.is_null(kind) or _is_ids(schema, name) or turns):
        raise TextError(
            f"{path}: column {name!r} holds {kind}, expected strings, lists of token ids, or lists of turns with "
            "role and content. Name another column, or cast this one."
        )


def _check_label(path: Path, schema: Any, name: str) -> None:
    types = pa.types
    kind = _plain_type(schema, name)
    number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
    if not (_is_string(kind) or types.is_null(kind) or number or types.is_temporal(kind)):
        raise TextError(
            f"{path}: column {name!r} holds {kind}, expected numbers, strings, dates or booleans. Name another "
            "column, or cast this one."
        )


def _values(column: Any) -> list[Any]:
    """Return the values of a column, dates and times as text, after a check that its buffers hold what they say."""
    column.validate(full=True)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_temporal(column.type):
        column = pa.compute.cast(column, pa.string())
    return list(column.to_pylist())


def _text_or_ids(value: Any, mask: Any, where: str) -> str | np.ndarray | None:
    """Return a text, the ids of a list without what its mask leaves out, or the turns of a conversation as a text."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise TextError(
            f"{where} holds {type(value).__name__}, expected a string or null, a list of token ids, or a list of "
            "turns with role and content. Name the column that holds the text."
        )
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
    entry = value
    if isinstance(value, str):
        entry = {column: value}
    if not isinstance(entry, dict):
        raise TextError(
            f"{where} holds a JSON {type(value).__name__}; expected an object with {column!r}, or a "
            "string. Write one object a line, for example with `jq -c '.[]'`."
        )
    for name in (column, *required):
        if name not in entry:
            raise TextError(
                f"{where} has no {name!r}; there are {_list(entry)}. Name another column, or write null "
                "where a value is missing."
            )
    text = _text_or_ids(entry[column], entry.get(MASK), f"{where}: {column!r}")
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


SURROGATE = re.compile("[\ud800-\udfff]")


def _is_tab_separated(path: Path) -> bool:
    zipped = packing_of(path) == ".zip"
    return (zip_member(path).lower() if zipped else _unpacked_name(path)).endswith(".tsv")


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
        f"({error.reason}). {_convert(error.object[:2])}"
    )


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def _convert(start: bytes) -> str:
    """Say how to make UTF-8 of a file that begins with these bytes."""
    marked = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "WINDOWS-1252"
    if marked:
        encoding = "UTF-16"
    sure = "Convert"
    if marked:
        sure = "It is UTF-16: convert"
    return f"{sure} it, for example with `iconv -f {encoding} -t UTF-8`."


def _list(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return (
        ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
        or "none"
    )
