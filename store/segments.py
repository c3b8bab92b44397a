"""Segments of the ledger: immutable Parquet files that each hold thousands of entries."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import google_crc32c
import numpy as np

from headwater.store.entry import ADVICE, Entry, LedgerError
from headwater.store.place import Place, names_in, read_all, write_whole
from headwater.store.writer import INTERNAL

FOLDER = f"{INTERNAL}/segments"


@dataclass(frozen=True)
class Columns:
    """What a segment says of blocks: number, attempt, and whether that attempt took the block out of the run."""

    name: str
    block: np.ndarray
    attempt: np.ndarray
    gone: np.ndarray


class Segments:
    """The segments of one run; what was read of one is kept, since it cannot change."""

    def __init__(self, run: Place, fingerprint: str) -> None:
        self._run, self._fingerprint = run, fingerprint
        self._known: dict[str, Columns] = {}

    def names(self) -> list[str]:
        """List the segments, the oldest first."""
        return sorted(name for name in names_in(self._run / FOLDER) if _parse(name) is not None)

    def columns(self) -> tuple[list[Columns], list[LedgerError]]:
        """Return what the segments say of blocks, and the errors of those that cannot be trusted."""
        found, errors = self.names(), list[LedgerError]()
        new = [name for name in found if name not in self._known]
        for name, data in zip(new, read_all(self._run / FOLDER / name for name in new), strict=True):
            try:
                table = self._table(name, data, ["block", "attempt", "gone"])
            except LedgerError as error:
                errors.append(error)
            else:
                self._known[name] = Columns(name, *(table.column(i).to_numpy() for i in range(3)))
        return [self._known[name] for name in found if name in self._known], errors

    def entries(self, name: str) -> Iterator[Entry]:
        """Yield the entries of a segment; blocks taken out have no files."""
        (data,) = read_all([self._run / FOLDER / name])
        for row in self._table(name, data).to_pylist():
            files = {item["path"]: [item["bytes"], item["sum"]] for item in row["files"]}
            yield Entry(
                row["block"], row["attempt"], row["fingerprint"], row["first"], row["last"], row["n_tokens"], files,
                json.loads(row["casts"]), dict(row["seconds"]), row["worker"],
            )  # fmt: skip

    def write(self, rows: Iterable[tuple[Entry, bool]]) -> str:
        """Write entries, each with whether it takes its block out, as a new segment; return its name."""
        return self.add(table_of(rows))

    def add(self, table: Any) -> str:
        """Write a table of entries as a new segment; return its name."""
        import pyarrow.parquet

        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink, compression="zstd")
        data = sink.getvalue()
        number = max((_parse(name) or 0 for name in self.names()), default=0) + 1
        name = f"{number:08d}.{int(google_crc32c.value(data)):08x}.parquet"
        write_whole(self._run, f"{FOLDER}/{name}", data)
        return name

    def _table(self, name: str, data: bytes | OSError, columns: list[str] | None = None) -> Any:
        import pyarrow.parquet

        try:
            if isinstance(data, OSError):
                raise data
            if f"{int(google_crc32c.value(data)):08x}" != name.split(".")[1]:
                raise ValueError("it does not match its checksum")
            table = pyarrow.parquet.read_table(io.BytesIO(data), columns=columns)
            marks = (pyarrow.parquet.read_schema(io.BytesIO(data)).metadata or {}).get(b"fingerprint", b"").decode()
            if marks not in ("", self._fingerprint):
                raise ValueError(f"it belongs to another run (fingerprint {marks[:12]})")
            return table
        except (OSError, ValueError, KeyError) as error:
            raise LedgerError(f"ledger segment {name} cannot be read ({error}). {ADVICE}") from error


def table_of(rows: Iterable[tuple[Entry, bool]]) -> Any:
    """Return entries, each with whether it takes its block out, as a table in the order of blocks."""
    import pyarrow

    schema = _schema()
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    fingerprints = set()
    for entry, gone in sorted(rows, key=lambda row: (row[0].block, row[0].attempt)):
        fingerprints.add(entry.fingerprint)
        for name in ("block", "attempt", "fingerprint", "first", "last", "n_tokens", "n_bytes", "worker"):
            columns[name].append(getattr(entry, name))
        columns["gone"].append(gone)
        columns["casts"].append(json.dumps(entry.casts, sort_keys=True))
        columns["seconds"].append(list(entry.seconds.items()))
        columns["files"].append([{"path": p, "bytes": size, "sum": crc} for p, (size, crc) in entry.files.items()])
    (fingerprint,) = fingerprints
    return pyarrow.table(columns, schema.with_metadata({"fingerprint": fingerprint}))


@cache
def _schema() -> Any:
    import pyarrow as pa

    files = pa.list_(pa.struct({"path": pa.string(), "bytes": pa.int64(), "sum": pa.int64()}))
    return pa.schema({
        "block": pa.int64(), "attempt": pa.int64(), "gone": pa.bool_(), "fingerprint": pa.string(),
        "first": pa.int64(), "last": pa.int64(), "n_tokens": pa.int64(), "n_bytes": pa.int64(), "worker": pa.string(),
        "casts": pa.string(), "seconds": pa.map_(pa.string(), pa.float64()), "files": files,
    })  # fmt: skip


def _parse(name: str) -> int | None:
    """Return the number in a segment's name, None for another file."""
    number, _, rest = name.partition(".")
    sum_, _, kind = rest.partition(".")
    return int(number) if number.isdecimal() and len(sum_) == 8 and kind == "parquet" else None
