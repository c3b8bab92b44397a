"""Weights reach a node once: a file in the run, copied to the node under its digest, mapped by every worker there."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path

import safetensors
import safetensors.torch

from headwater.extractor.weights import Checkpoint, CheckpointError, ModelConfig


def publish(run: Path, checkpoint: Checkpoint) -> Path:
    """Write the weights into the run's temporary folder, unless they are there; return the file."""
    path = _published(run, checkpoint.digest)
    if not path.exists():
        metadata = {"config": json.dumps(asdict(checkpoint.config)), "name": checkpoint.name}
        temporary = path.with_suffix(f".{os.getpid()}")
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.tensors.items()}
        safetensors.torch.save_file(tensors, temporary, metadata)
        os.replace(temporary, path)
    return path


def load_local(run: Path, digest: str) -> Checkpoint:
    """Map this node's copy of the published weights, making it first where there is none.

    The tensors share one memory map among all workers of the node. Raises CheckpointError where the run has no weights.
    """
    source = _published(run, digest)
    local = Path(tempfile.gettempdir()) / f"headwater-{os.getuid()}" / f"{digest}.safetensors"
    local.parent.mkdir(mode=0o700, exist_ok=True)
    with open(local.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not local.exists():
            if not source.exists():
                raise CheckpointError(f"{source} is missing; start the extraction again, it puts the weights there.")
            temporary = local.with_suffix(".copy")
            shutil.copyfile(source, temporary)
            os.replace(temporary, local)
    with safetensors.safe_open(local, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return Checkpoint(metadata["name"], ModelConfig(**json.loads(metadata["config"])), tensors, digest, None)


def _published(run: Path, digest: str) -> Path:
    return run / "headwater" / "tmp" / f"weights-{digest[:16]}.safetensors"
