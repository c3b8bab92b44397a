"""What a worker process of a pool does: hold a model and a writer, compute blocks, commit them."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict
from typing import Any

from headwater.extractor.config import RunConfig
from headwater.extractor.node_weights import load
from headwater.store.ledger import Ledger
from headwater.store.manifest import read_manifest
from headwater.store.place import place_of
from headwater.store.writer import INTERNAL


class BlockActor:
    """One process with a model and a writer; Ray makes it an actor.

    `nonce` is a file that the driver made in the run, to show that both see the same. `shared` says whether the driver
    is on this machine.
    """

    def __init__(self, run: str, config: dict[str, Any], digest: str, nonce: str, threads: int, shared: bool) -> None:
        import torch

        from headwater.extractor.kernel_model import load_model
        from headwater.extractor.run import plan_of
        from headwater.extractor.worker import Worker

        path = place_of(run)
        if not (path / INTERNAL / "tmp" / nonce).exists():
            raise RuntimeError(
                f"node {socket.gethostname()} does not see the run at {run}. Put --out on storage that "
                "every node reaches under this name, such as a shared file system or s3://."
            )
        torch.set_num_threads(threads)
        settings = RunConfig(**config)
        manifest = read_manifest(path)
        checkpoint = load(path, digest, shared)
        plan = plan_of(settings, checkpoint, manifest)
        self.ledger = Ledger(path, manifest.fingerprint)
        device = "cpu" if settings.device == "cpu" else "cuda"  # Ray shows an actor only its own GPU
        model = load_model(checkpoint, settings.compute, device)
        self.worker = Worker(path, manifest, plan, model, settings.on_overflow == "keep")

    def ready(self) -> str:
        """Say where this worker is, once it has loaded its model."""
        return f"{socket.gethostname()}:{os.getpid()}"

    def close(self) -> None:
        """Delete temporary files."""
        self.worker.close()

    def work(self, block: int, attempt: int) -> dict[str, Any]:
        """Compute and commit one block; return its ledger entry."""
        entry = self.worker.extract_block(block, attempt)
        self.ledger.commit(entry)
        return asdict(entry)
