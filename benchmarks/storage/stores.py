"""One array [sequence, position, d_model] in the stores that users know, each as its library writes and reads it."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from headwater.store.layout import ArraySpec
from headwater.store.place import place_of
from headwater.store.reader import Run, RunArray
from headwater.store.writer import BlockWriter

BLOCK = 16


class Store(ABC):
    """A way to keep an array: `write` all of it durably, `open` it, then read sequences or one vector."""

    name: str

    def __init__(self, folder: Path, spec: ArraySpec) -> None:
        self.path = folder / type(self).__name__.lower()
        self.spec = spec

    @abstractmethod
    def write(self, values: np.ndarray) -> None:
        """Store all values, a block of sequences at a time as an extraction would."""

    @abstractmethod
    def open(self) -> Any:
        """Return something that is indexed by [sequence] or [sequence, position]."""

    def read(self, opened: Any, key: Any) -> np.ndarray:
        """Return values as a numpy array."""
        return np.asarray(opened[key])

    def files(self) -> list[Path]:
        """Return the files on disk."""
        if self.path.is_file():
            return [self.path]
        return [path for path in self.path.rglob("*") if path.is_file()]

    def sync(self) -> None:
        """Make the files durable."""
        for path in self.files():
            with path.open("rb") as file:
                os.fsync(file.fileno())


class Headwater(Store):
    """Blocks through the writer of extraction: ring, writer thread, O_DIRECT, checksums, fsync, rename."""

    name = "headwater"

    def __init__(self, folder: Path, spec: ArraySpec) -> None:
        super().__init__(folder, spec)
        self.path.mkdir()
        self.writer = BlockWriter(self.path, [spec], BLOCK)

    def write(self, values: np.ndarray) -> None:
        for first in range(0, len(values), BLOCK):
            last = min(first + BLOCK, len(values))
            self.writer.begin(first, last, str(first))
            for i in range(first, last):
                for part in self.writer.parts(self.spec.name, 0, i, 1):
                    part.view[:] = values[i : i + 1][part.sequences, part.positions]
            self.writer.finish()

    def open(self) -> Any:
        return RunArray(_Files(self.path), self.spec)


class _Files(Run):
    """The files of a run without its manifest and ledger, so that nothing is checked."""

    def __init__(self, path: Path) -> None:
        self.path = place_of(path)
        self.checked = False
        self._lock, self._shards = threading.Lock(), OrderedDict()


class ZarrPython(Store):
    """zarr-python's sharding codec, one write a shard."""

    name = "zarr-python"
    pipeline = "zarr.core.codec_pipeline.BatchedCodecPipeline"

    def write(self, values: np.ndarray) -> None:
        import zarr

        with zarr.config.set({"codec_pipeline.path": self.pipeline}):
            array = zarr.create_array(
                self.path,
                shape=values.shape,
                shards=(BLOCK, *values.shape[1:]),
                chunks=self.spec.chunk,
                overwrite=True,
                dtype=values.dtype,
                compressors=None,
                filters=None,
            )
            for first in range(0, len(values), BLOCK):
                array[first : first + BLOCK] = values[first : first + BLOCK]
        self.sync()

    def open(self) -> Any:
        import zarr

        with zarr.config.set({"codec_pipeline.path": self.pipeline}):
            return zarr.open_array(self.path, mode="r")


class Zarrs(ZarrPython):
    """The same by the Rust pipeline zarrs."""

    name = "zarrs"
    pipeline = "zarrs.ZarrsCodecPipeline"

    def write(self, values: np.ndarray) -> None:
        import zarrs  # noqa: F401

        super().write(values)


class TensorStore(Store):
    """tensorstore's zarr3 driver with Headwater's own metadata: the same shards and checksums."""

    name = "tensorstore"

    def write(self, values: np.ndarray) -> None:
        metadata = self.spec.metadata() | {"shape": list(values.shape)}
        metadata["chunk_grid"]["configuration"]["chunk_shape"] = [BLOCK, *values.shape[1:]]
        array = self._store(metadata=metadata, create=True, delete_existing=True)
        for first in range(0, len(values), BLOCK):
            array[first : first + BLOCK] = values[first : first + BLOCK]
        self.sync()

    def open(self) -> Any:
        return self._store()

    def read(self, opened: Any, key: Any) -> np.ndarray:
        return np.asarray(opened[key].read().result())

    def _store(self, **how: Any) -> Any:
        import tensorstore as ts

        if "metadata" in how:
            metadata = {"metadata": how.pop("metadata")}
        else:
            metadata = {}
        return ts.open(
            {"driver": "zarr3", "kvstore": f"file://{self.path}", **metadata}, **how
        ).result()


class H5py(Store):
    """HDF5 chunks of one sequence with its own checksum, fletcher32."""

    name = "h5py"

    def write(self, values: np.ndarray) -> None:
        import h5py

        with h5py.File(self.path, "w") as file:
            data = file.create_dataset(
                "x", values.shape, values.dtype, chunks=self.spec.chunk, fletcher32=True
            )
            for first in range(0, len(values), BLOCK):
                data[first : first + BLOCK] = values[first : first + BLOCK]
        self.sync()

    def open(self) -> Any:
        import h5py

        return h5py.File(self.path, "r")["x"]


class Safetensors(Store):
    """One file a block, no checksums."""

    name = "safetensors"

    def write(self, values: np.ndarray) -> None:
        from safetensors.numpy import save_file

        self.path.mkdir(exist_ok=True)
        for first in range(0, len(values), BLOCK):
            save_file(
                {"x": values[first : first + BLOCK]}, self.path / f"{first // BLOCK}.safetensors"
            )
        self.sync()

    def open(self) -> Any:
        from safetensors import safe_open

        files: list[Any] = [
            safe_open(self.path / f"{i}.safetensors", "np") for i in range(len(self.files()))
        ]
        return [file.get_slice("x") for file in files]

    def read(self, opened: Any, key: Any) -> np.ndarray:
        first, *rest = key if isinstance(key, tuple) else (key,)
        if isinstance(first, slice):
            parts = [opened[i][:] for i in range(first.start // BLOCK, -(-first.stop // BLOCK))]
            if len(parts) > 1:
                return np.concatenate(parts)
            return np.asarray(parts[0])
        return np.asarray(opened[first // BLOCK][(first % BLOCK, *rest)])


class Memmap(Store):
    """A plain .npy file through numpy's memory map: no chunks, no checksums."""

    name = "np.memmap"

    def write(self, values: np.ndarray) -> None:
        data = np.lib.format.open_memmap(self.path, "w+", values.dtype, values.shape)
        for first in range(0, len(values), BLOCK):
            data[first : first + BLOCK] = values[first : first + BLOCK]
        data.flush()
        self.sync()

    def open(self) -> Any:
        return np.load(self.path, mmap_mode="r")


STORES: tuple[type[Store], ...] = (
    Headwater,
    ZarrPython,
    Zarrs,
    TensorStore,
    H5py,
    Safetensors,
    Memmap,
)
