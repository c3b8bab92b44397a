"""What a worker process of a pool does: hold a model and a writer, compute blocks, commit them."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict
from typing import Any

from headwater.extractor.cluster.weights import load
from headwater.extractor.machine import available_memory
from headwater.extractor.request import RunConfig
from headwater.extractor.units import show_bytes
from headwater.store.ledger import Ledger
from headwater.store.manifest import read_manifest
from headwater.store.place import place_of
from headwater.store.writer import INTERNAL


class BlockActor:
    """One process with a model and a writer; Ray makes it an actor.

    `nonce` is a file that the driver made in the run, to show that both see the same; `weights` the one that holds the
    model of this `digest`. `shared` says whether the driver is on this machine. Raises RunError where this process
    would give other last bits than what made the run, unless the request accepts that.
    """

    def __init__(
        self,
        run: str,
        config: dict[str, Any],
        digest: str,
        weights: str,
        nonce: str,
        threads: int,
        shared: bool,
    ) -> None:
        import torch

        from headwater.extractor.block import Worker
        from headwater.extractor.model.forward_device import load_model
        from headwater.extractor.plan import plan_of
        from headwater.extractor.resume import check_maker

        path = place_of(run)
        node = socket.gethostname()
        if not (path / INTERNAL / "tmp" / nonce).exists():
            raise RuntimeError(
                f"node {node} does not see the run at {run}. Put --out on storage that "
                "every node reaches under this name, such as a shared file system or s3://."
            )
        torch.set_num_threads(threads)
        settings = RunConfig(**config)
        manifest = read_manifest(path)
        # Ray shows an actor only its own GPU.
        device = "cpu" if settings.device == "cpu" else "cuda"
        check_maker(settings, manifest, path, device, f"node {node}")
        checkpoint = load(path, weights, digest, shared)
        plan = plan_of(settings, checkpoint.config, manifest)
        memory = available_memory()
        if plan.elsewhere and plan.host_bytes > memory:
            raise RuntimeError(
                f"node {node} has {show_bytes(memory)} of memory available, and a worker needs "
                f"{show_bytes(plan.host_bytes)}. Use a smaller --block, or nodes with more memory."
            )
        self.ledger = Ledger(path, manifest.fingerprint)
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
