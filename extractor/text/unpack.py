"""Open files as bytes, unpacked where they are compressed, and watch the streams that can be read only once."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import shutil
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

STDIN = Path("-")
MAGIC = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\xfd7zXZ\x00": ".xz",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\x03\x04": ".zip",
}
PACKINGS = (".gz", ".bz2", ".xz", ".zst", ".zip")
MOST_UNPACKED = 128 << 30
CHUNK = 1 << 20
# What an xz file may ask for; `xz -9` needs 65 MiB.
XZ_MEMORY = 256 << 20
UNPACK_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    lzma.LZMAError,
    zipfile.BadZipFile,
    NotImplementedError,
    pa.ArrowException,
)


class TextError(ValueError):
    """A source of text cannot be found or read as asked; the message says what to do next."""


class Stream:
    """What is known of a stream that is read once: its size and sha256 so far."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.size = 0
        self._digest = hashlib.sha256()

    def add(self, data: bytes) -> None:
        self._digest.update(data)
        self.size += len(data)

    def describe(self) -> dict[str, str | int]:
        """Return path, size in bytes and sha256."""
        return {"path": self.path, "size": self.size, "sha256": self._digest.hexdigest()}


def read_once(path: Path) -> bool:
    """Tell whether a path is standard input, a named pipe, a process substitution or the like."""
    return path == STDIN or not stat.S_ISREG(path.stat().st_mode)


def packing_of(path: Path) -> str:
    """Return the suffix of a compressed file, by its name, or ""."""
    suffix = path.suffix.lower()
    if suffix in PACKINGS:
        return suffix
    return ""


@contextmanager
def open_unpacked(
    path: Path, limit: int = MOST_UNPACKED, stream: Stream | None = None
) -> Iterator[BinaryIO]:
    """Open a file or a stream for reading; what is compressed, by its first bytes or its suffix, comes unpacked.

    Memory is a few buffers. `stream` is told every byte as it is read. Raises TextError once more than `limit` bytes
    were unpacked, and one of UNPACK_ERRORS for what is damaged.
    """
    with ExitStack() as stack:
        if path == STDIN:
            source: Any = sys.stdin.buffer
        else:
            source = stack.enter_context(path.open("rb"))
        raw = io.BufferedReader(_Watched(source, stream=stream), CHUNK)
        if not (packing := _packing(raw.peek(8), path)):
            yield raw
            return
        unpacked = stack.enter_context(_unpack(packing, raw, path))
        yield io.BufferedReader(_Watched(unpacked, path, limit), CHUNK)


@contextmanager
def unpacked_path(path: Path, limit: int = MOST_UNPACKED) -> Iterator[Path]:
    """Give a file under its own path, or its unpacked contents in a temporary file.

    For libraries whose threads read: pyarrow's CSV reader can wait for ever for a thread that reads a Python file.
    """
    with path.open("rb") as file:
        packing = _packing(file.read(8), path)
    if not packing:
        yield path
        return
    with tempfile.NamedTemporaryFile(prefix="hw-csv-") as copy:
        with open_unpacked(path, limit) as source:
            shutil.copyfileobj(source, copy, CHUNK)
        copy.flush()
        yield Path(copy.name)


def _packing(first: bytes, path: Path) -> str:
    """Return how a file is compressed, by its first bytes or else by its suffix."""
    found = (kind for magic, kind in MAGIC.items() if first.startswith(magic))
    return next(found, packing_of(path))


def zip_member(path: Path) -> str:
    """Return the name of the one file in a zip archive; raise TextError where there are several."""
    with zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
    names = [name for name in names if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise TextError(
            f"{path} holds {len(names)} files; of a zip archive with one file that one is read. Unpack it, and "
            "name its directory."
        )
    return names[0]


@contextmanager
def _unpack(packing: str, raw: BinaryIO, path: Path) -> Iterator[Any]:
    if packing == ".gz":
        yield gzip.GzipFile(fileobj=raw)
    elif packing == ".bz2":
        yield bz2.BZ2File(raw)
    elif packing == ".xz":
        yield _Xz(raw)
    elif packing == ".zst":
        yield pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
    else:
        if read_once(path):
            raise TextError(
                f"{path} is a zip archive in a stream. Unpack it with `unzip -p` first."
            )
        try:
            with zipfile.ZipFile(path) as archive, archive.open(zip_member(path)) as file:
                yield file
        except RuntimeError as error:  # how zipfile says that there is a password
            raise TextError(f"{path} cannot be unpacked: {error}. Unpack it first.") from error


class _Watched(io.RawIOBase):
    """Pass the bytes of a file on, count them against a limit and tell a stream about them."""

    def __init__(
        self, inner: Any, path: Path = STDIN, limit: int = 0, stream: Stream | None = None
    ) -> None:
        self._inner = inner
        self._path = path
        self._limit = limit
        self._stream = stream
        self._n = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        if self._stream is not None:
            self._stream.add(data)
        self._n += len(data)
        if self._limit and self._n > self._limit:
            raise TextError(
                f"{self._path} unpacks to more than {self._limit:,} bytes. If that is meant, allow more with "
                "--max-unpacked, or unpack it first."
            )
        buffer[: len(data)] = data
        return len(data)


class _Xz(io.RawIOBase):
    """Read an xz file with a limit on the memory that its header may ask for, which `lzma.open` does not have."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            more = b""
            if self._decoder.eof:  # another stream may follow, after padding with zeros
                more = (self._decoder.unused_data or self._raw.read(CHUNK)).lstrip(b"\0")
                if not more:
                    return 0
                self._decoder = lzma.LZMADecompressor(memlimit=XZ_MEMORY)
            elif self._decoder.needs_input and not (more := self._raw.read(CHUNK)):
                raise EOFError("it ends before its end-of-stream marker")
            data = self._decoder.decompress(more, len(buffer))
        buffer[: len(data)] = data
        return len(data)
