"""Read ready token ids: NumPy's arrays, torch's tensors, and the flat files of nanoGPT, llm.c and Megatron."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from headwater.extractor.sites import RequestError
from headwater.extractor.text.paths import kind_of, refuse_url

NPY = b"\x93NUMPY"
ZIP = b"PK\x03\x04"
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
LLM_C = 20240520
LLM_C_HEADER = 1024
# A .npz is unpacked in memory; a .npy of any size is mapped.
LARGEST_NPZ = 4 << 30
EXPECTED = (
    "Expected whole numbers [sequence, position], or one long row, as numpy.save writes them (.npy), or a .npz, .pt "
    "or .bin with one such array."
)


def load_ids(path: str) -> np.ndarray:
    """Return the ids in a file as they are, memory-mapped where the format allows it: [n, T], or [T] for a flat file.

    A .bin is uint16, as nanoGPT and llm.c write it, or what the .idx of Megatron beside it says; the borders of its
    documents are not read. Nothing is unpickled but by torch's loader for tensors only. Raises RequestError.
    """
    refuse_url("--tokens", path)
    file = Path(path)
    try:
        ids = _load(file)
    except RequestError:
        raise
    except Exception as error:  # numpy's and zipfile's parsers raise what they meet
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        if "allow_pickle" in reason or "Python objects" in reason:
            reason = "it holds Python objects, which Headwater does not load"
        raise RequestError(f"--tokens {path} cannot be read ({reason}). {EXPECTED}") from error
    if not isinstance(ids, np.ndarray) or ids.ndim not in (1, 2) or 0 in ids.shape:
        shape = list(getattr(ids, "shape", []))
        raise RequestError(f"--tokens {path} has shape {shape}. {EXPECTED}")
    return ids


def _load(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise ValueError("it is empty")
    if head.startswith(NPY):
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if head.startswith(ZIP) and not _is_torch(path):
        return _one_of_npz(path)
    if head.startswith(ZIP) or path.suffix in (".pt", ".pth"):
        from headwater.extractor.model import weight_files

        return _one_tensor(weight_files.unpickle(path), path)
    if path.suffix == ".bin":
        return _flat(path, head)
    if kind_of(path) != "text":
        raise RequestError(
            f"--tokens {path} is a table. Name it with --text, and its column of ids with --column input_ids."
        )
    raise ValueError("it has no header of a format that is known")


def _is_torch(path: Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())


def _one_of_npz(path: Path) -> np.ndarray:
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    if len(infos) != 1 or infos[0].file_size > LARGEST_NPZ:
        raise ValueError(
            f"it holds {len(infos)} arrays of {sum(info.file_size for info in infos):,} bytes; of a .npz one array of "
            f"at most {LARGEST_NPZ:,} is read"
        )
    with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays[arrays.files[0]])


def _one_tensor(raw: Any, path: Path) -> np.ndarray:
    import torch

    found = [raw] if isinstance(raw, torch.Tensor) else []
    if isinstance(raw, dict):
        found = [value for value in raw.values() if isinstance(value, torch.Tensor)]
    if len(found) != 1:
        raise RequestError(
            f"--tokens {path} holds {len(found)} tensors, expected one. Save the tensor of ids alone with torch.save."
        )
    return np.asarray(found[0].numpy())


def _flat(path: Path, head: bytes) -> np.ndarray:
    """Map a flat file of ids; of Megatron's, the type is in the index beside it."""
    index = path.with_suffix(".idx")
    dtype = "<u2"
    offset = LLM_C_HEADER if int.from_bytes(head[:4], "little") == LLM_C else 0
    if index.is_file():
        with index.open("rb") as file:
            raw = file.read(len(MEGATRON) + 9)
        if not raw.startswith(MEGATRON) or raw[-1] not in MEGATRON_DTYPES:
            raise ValueError(f"{index.name} beside it is not Megatron's index of whole numbers")
        dtype = MEGATRON_DTYPES[raw[-1]]
    return np.memmap(path, dtype, "r", offset)
