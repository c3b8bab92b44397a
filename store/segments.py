"""Segments of the ledger: immutable Parquet files that each hold thousands of entries."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import google_crc32c
import numpy as np

from headwater.store.entry import ADVICE, Entry, LedgerError, mark_of
from headwater.store.place import PlaceLike, place_of
from headwater.store.writer import INTERNAL

FOLDER = f"{INTERNAL}/segments"
KEPT_TABLES = 4


@dataclass(frozen=True)
class Columns:
    """What a segment says of blocks: number, attempt, and whether that attempt took the block out of the run."""

    name: str
    block: np.ndarray
    attempt: np.ndarray
    gone: np.ndarray


class Segments:
    """The segments of one run; what was read of one is kept, since it cannot change."""

    def __init__(self, run: PlaceLike, fingerprint: str) -> None:
        self._run = place_of(run)
        self._fingerprint = fingerprint
        self._known: dict[str, Columns] = {}
        self._kept = lru_cache(KEPT_TABLES)(self._whole)

    def names(self) -> list[str]:
        """List the segments, the oldest first."""
        return sorted(
            name for name in (self._run / FOLDER).file_names() if _parse(name) is not None
        )

    def columns(self) -> tuple[list[Columns], list[LedgerError]]:
        """Return what the segments say of blocks, and the errors of those that cannot be trusted."""
        found = self.names()
        errors = list[LedgerError]()
        new = [name for name in found if name not in self._known]
        for name, data in zip(new, (self._run / FOLDER).read_all(new), strict=True):
            try:
                table = self._table(name, data, ["block", "attempt", "gone"])
            except LedgerError as error:
                errors.append(error)
            else:
                self._known[name] = Columns(name, *(table.column(i).to_numpy() for i in range(3)))
        return [self._known[name] for name in found if name in self._known], errors

    def entries(self, name: str) -> Iterator[Entry]:
        """Yield the entries of a segment; blocks taken out have no files."""
        yield from map(_entry_of, self._whole(name).to_pylist())

    def entry(self, name: str, block: int, attempt: int) -> Entry:
        """Return one entry of a segment, whose table is kept for the next."""
        table = self._kept(name)
        columns = self._known[name]
        (at,) = np.flatnonzero((columns.block == block) & (columns.attempt == attempt))
        return _entry_of(table.slice(int(at), 1).to_pylist()[0])

    def marks(self, name: str) -> Iterator[tuple[int, int, str]]:
        """Yield block, attempt and mark of the entries of a segment."""
        table = self._kept(name)
        # The column is a list of structs: read as flat columns and offsets, instead of a dictionary a file.
        lists = table.column("files").combine_chunks()
        parts = (lists.values.field(part) for part in ("path", "bytes", "sum"))
        files = list(zip(*(part.to_pylist() for part in parts), strict=True))
        ends = lists.offsets.to_numpy()
        for i, (block, attempt) in enumerate(
            zip(*(table.column(part).to_pylist() for part in ("block", "attempt")), strict=True)
        ):
            yield block, attempt, mark_of(attempt, files[ends[i] : ends[i + 1]])

    def _whole(self, name: str) -> Any:
        (data,) = (self._run / FOLDER).read_all([name])
        return self._table(name, data)

    def makers(self, name: str) -> Iterator[tuple[int, int, dict[str, str]]]:
        """Yield block, attempt and what made it of a segment's entries, without reading anything else of them."""
        (data,) = (self._run / FOLDER).read_all([name])
        table = self._table(name, data, ["block", "attempt"], "made_by")
        if "made_by" not in table.column_names:  # older segments do not say
            return
        made: dict[str, dict[str, str]] = {}
        for block, attempt, text in zip(*(column.to_pylist() for column in table), strict=True):
            yield block, attempt, made.setdefault(text, json.loads(text))

    def write(self, rows: Iterable[tuple[Entry, bool]]) -> str:
        """Write entries, each with whether it takes its block out, as a new segment; return its name."""
        return self.add(table_of(rows))

    def add(self, table: Any) -> str:
        """Write a table of entries as a new segment; return its name."""
        import pyarrow.parquet

        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        # The name holds the checksum of the file, so that a damaged or cut segment is never believed.
        data = sink.getvalue()
        # Numbers only grow; the holder of the run's lock alone writes segments, so no two take one number.
        number = max((_parse(name) or 0 for name in self.names()), default=0) + 1
        name = f"{number:08d}.{int(google_crc32c.value(data)):08x}.parquet"
        self._run.write_whole(f"{FOLDER}/{name}", data)
        return name

    def _table(
        self,
        name: str,
        data: bytes | OSError,
        columns: list[str] | None = None,
        optional: str | None = None,
    ) -> Any:
        """Read a segment, or some columns of it, and the `optional` one where it is there."""
        import pyarrow.parquet

        try:
            if isinstance(data, OSError):
                raise data
            if f"{int(google_crc32c.value(data)):08x}" != name.split(".")[1]:
                raise ValueError("it does not match its checksum")
            schema = pyarrow.parquet.read_schema(io.BytesIO(data))
            if columns is not None and optional is not None and optional in schema.names:
                columns = [*columns, optional]
            table = pyarrow.parquet.read_table(io.BytesIO(data), columns=columns)
            marks = (schema.metadata or {}).get(b"fingerprint", b"").decode()
            if marks not in ("", self._fingerprint):
                raise ValueError(f"it belongs to another run (fingerprint {marks[:12]})")
            return table
        except (OSError, ValueError, KeyError) as error:
            raise LedgerError(
                f"ledger segment {name} cannot be read ({error}). {ADVICE}"
            ) from error


def _entry_of(row: dict[str, Any]) -> Entry:
    return Entry(
        block=row["block"],
        attempt=row["attempt"],
        fingerprint=row["fingerprint"],
        first=row["first"],
        last=row["last"],
        n_tokens=row["n_tokens"],
        files={item["path"]: [item["bytes"], item["sum"]] for item in row["files"]},
        casts=json.loads(row["casts"]),
        seconds=dict(row["seconds"]),
        worker=row["worker"],
        made_by=json.loads(row.get("made_by") or "{}"),
        source=row.get("source") or "",
    )


def table_of(rows: Iterable[tuple[Entry, bool]]) -> Any:
    """Return entries, each with whether it takes its block out, as a table in the order of blocks."""
    import pyarrow

    schema = _schema()
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    fingerprints = set()
    for entry, gone in sorted(rows, key=lambda row: (row[0].block, row[0].attempt)):
        fingerprints.add(entry.fingerprint)
        for name in (
            "block",
            "attempt",
            "fingerprint",
            "first",
            "last",
            "n_tokens",
            "n_bytes",
            "worker",
            "source",
        ):
            columns[name].append(getattr(entry, name))
        columns["gone"].append(gone)
        columns["casts"].append(json.dumps(entry.casts, sort_keys=True))
        columns["made_by"].append(json.dumps(entry.made_by, sort_keys=True))
        columns["seconds"].append(list(entry.seconds.items()))
        columns["files"].append(
            [{"path": p, "bytes": size, "sum": crc} for p, (size, crc) in entry.files.items()]
        )
    (fingerprint,) = fingerprints
    return pyarrow.table(columns, schema.with_metadata({"fingerprint": fingerprint}))


@cache
def _schema() -> Any:
    import pyarrow as pa

    files = pa.list_(pa.struct({"path": pa.string(), "bytes": pa.int64(), "sum": pa.int64()}))
    return pa.schema(
        {
            "block": pa.int64(),
            "attempt": pa.int64(),
            "gone": pa.bool_(),
            "fingerprint": pa.string(),
            "first": pa.int64(),
            "last": pa.int64(),
            "n_tokens": pa.int64(),
            "n_bytes": pa.int64(),
            "worker": pa.string(),
            "casts": pa.string(),
            "made_by": pa.string(),
            "seconds": pa.map_(pa.string(), pa.float64()),
            "source": pa.string(),
            "files": files,
        }
    )


def _parse(name: str) -> int | None:
    """Return the number in a segment's name, None for another file."""
    number, _, rest = name.partition(".")
    sum_, _, kind = rest.partition(".")
    if number.isdecimal() and len(sum_) == 8 and kind == "parquet":
        return int(number)
    return None
