"""Weights reach a node once: a file in the run, copied to the node under its digest, mapped by every worker there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch

from headwater.extractor.weights import Checkpoint, CheckpointError, ModelConfig


@contextmanager
def published(run: Path, checkpoint: Checkpoint) -> Iterator[None]:
    """Keep the weights in the run's temporary folder for a while; the file is gone afterwards, whatever happens."""
    path = _source(run, checkpoint.digest)
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        metadata = {"config": json.dumps(asdict(checkpoint.config)), "name": checkpoint.name}
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        safetensors.torch.save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
        yield
    finally:
        temporary.unlink(missing_ok=True)
        path.unlink(missing_ok=True)


def load(run: Path, digest: str, shared: bool) -> Checkpoint:
    """Map the published weights: the run's own file where the driver is on this machine, else a copy on this node.

    The tensors share one memory map among all workers of the node. Raises CheckpointError where the run has no weights.
    """
    source = _source(run, digest)
    if shared:
        return _mapped(source, digest)
    folder = cache_folder()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _mapped(_local_copy(source, folder / f"{digest}.safetensors"), digest)


def cache_folder() -> Path:
    """Return this node's folder for weights, which is ours alone; it holds one model, that of the newest run."""
    folder = Path(tempfile.gettempdir()) / f"headwater-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CheckpointError(f"{folder} belongs to somebody else; remove it, or set TMPDIR to another directory.")
    return folder


def _local_copy(source: Path, local: Path) -> Path:
    """Copy a file of weights whole or not at all, unless it is there, in place of those of other models."""
    if not local.exists() and source.exists():
        for old in local.parent.glob("*.safetensors*"):
            old.unlink()  # workers that have mapped it keep their map
        temporary = local.with_suffix(".safetensors.part")
        with open(source, "rb") as read, open(temporary, "wb") as write:
            shutil.copyfileobj(read, write, 1 << 24)
            write.flush()
            os.fsync(write.fileno())
        os.replace(temporary, local)
    return local


def _mapped(path: Path, digest: str) -> Checkpoint:
    """Map a file of weights, which stays mapped when it is deleted."""
    if not path.exists():
        raise CheckpointError(f"{path} is missing; start the extraction again, it puts the weights there.")
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return Checkpoint(metadata["name"], ModelConfig(**json.loads(metadata["config"])), tensors, digest, None)


def _source(run: Path, digest: str) -> Path:
    return run / "headwater" / "tmp" / f"weights-{digest[:16]}.safetensors"
