"""Weights reach a node once: a file in the run, copied to the node under its digest, mapped by every worker there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch

from headwater.extractor.model.weights import Checkpoint, CheckpointError, ModelConfig
from headwater.store.objects import ObjectPath
from headwater.store.place import Place
from headwater.store.writer import INTERNAL


@contextmanager
def published(run: Place, checkpoint: Checkpoint, shared: bool) -> Iterator[str]:
    """Keep the weights in the run's temporary folder for a while, and yield the file's name; it is gone afterwards.

    The name is this driver's own: one that lost the run to another takes nothing away from that one's workers. For a
    run in an object store the weights go to this node's folder, and into the store unless all workers are here,
    `shared`.
    """
    name = f"weights-{checkpoint.digest[:16]}-{uuid.uuid4().hex}.safetensors"
    target = run / INTERNAL / "tmp" / name
    if target.remote is not None:
        with _published_object(target.remote, checkpoint, shared):
            yield name
    elif target.local is not None:
        with _published_file(target.local, checkpoint):
            yield name


@contextmanager
def _published_file(target: Path, checkpoint: Checkpoint) -> Iterator[None]:
    temporary = target.with_suffix(".part")
    try:
        _save(checkpoint, temporary)
        os.replace(temporary, target)
        yield
    finally:
        temporary.unlink(missing_ok=True)
        target.unlink(missing_ok=True)


@contextmanager
def _published_object(target: ObjectPath, checkpoint: Checkpoint, shared: bool) -> Iterator[None]:
    with _locked_folder() as folder:
        local = folder / f"{checkpoint.digest}.safetensors"
        if not local.exists():
            _clear(folder)
            _save(checkpoint, local.with_suffix(".part"))
            os.replace(local.with_suffix(".part"), local)
        if not shared:
            target.put_file(local)
    try:
        yield
    finally:
        if not shared:
            target.unlink()


def _save(checkpoint: Checkpoint, path: Path) -> None:
    metadata = {"config": json.dumps(asdict(checkpoint.config)), "name": checkpoint.name}
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata)


def load(run: Place, name: str, digest: str, shared: bool) -> Checkpoint:
    """Map the published weights: the run's own file where the driver is on this machine, else a copy on this node.

    `name` is what `published` yielded. The tensors share one memory map among all workers of the node. Raises
    CheckpointError where the run has no weights.
    """
    source = run / INTERNAL / "tmp" / name
    if shared and source.local is not None:
        return _mapped(source.local, digest)
    with _locked_folder() as folder:
        return _mapped(_local_copy(source, folder / f"{digest}.safetensors"), digest)


@contextmanager
def _locked_folder() -> Iterator[Path]:
    """Hold this node's folder for weights, so that one process at a time fetches them."""
    folder = cache_folder()
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


def cache_folder() -> Path:
    """Return this node's folder for weights, which is ours alone; it holds one model, that of the newest run."""
    folder = Path(tempfile.gettempdir()) / f"headwater-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CheckpointError(
            f"{folder} belongs to somebody else; remove it, or set TMPDIR to another directory."
        )
    return folder


def _local_copy(source: Place, local: Path) -> Path:
    """Copy a file of weights whole or not at all, unless it is there, in place of those of other models."""
    if not local.exists() and source.exists():
        _clear(local.parent)
        temporary = local.with_suffix(".safetensors.part")
        with source.open("rb") as read, open(temporary, "wb") as write:
            shutil.copyfileobj(read, write, 1 << 24)
            write.flush()
            os.fsync(write.fileno())
        os.replace(temporary, local)
    return local


def _clear(folder: Path) -> None:
    for old in folder.glob("*.safetensors*"):
        old.unlink()  # workers that have mapped it keep their map


def _mapped(path: Path, digest: str) -> Checkpoint:
    """Map a file of weights, which stays mapped when it is deleted."""
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing; start the extraction again, it puts the weights there."
        )
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return Checkpoint(
        metadata["name"], ModelConfig(**json.loads(metadata["config"])), tensors, digest, None
    )
