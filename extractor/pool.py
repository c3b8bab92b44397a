"""Where the blocks of a run are computed: in this process, or on Ray actors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from headwater.extractor.block import Worker
from headwater.extractor.model.forward_device import load_model
from headwater.extractor.model.weights import Checkpoint
from headwater.extractor.plan import Plan
from headwater.extractor.progress import Notify
from headwater.store.ledger import Entry, Ledger
from headwater.store.manifest import Manifest
from headwater.store.place import Place


class Pool(Protocol):
    """What computes and commits blocks."""

    def run(self, blocks: Sequence[int]) -> Iterator[Entry]:
        """Yield the entry of each block as it is committed, in any order."""


def open_pool(
    run: Place, manifest: Manifest, plan: Plan, checkpoint: Checkpoint, notify: Notify
) -> AbstractContextManager[Pool]:
    """Open the pool that a request asks for; `notify` is told now and then what workers do."""
    if plan.request.workers == 0 and plan.request.ray is None:
        return _in_process(run, manifest, plan, checkpoint)
    from headwater.extractor.cluster.pool import RayPool

    return RayPool(plan.request, run, manifest, checkpoint, notify)


@contextmanager
def _in_process(
    run: Place, manifest: Manifest, plan: Plan, checkpoint: Checkpoint
) -> Iterator[Pool]:
    request = plan.request
    model = load_model(checkpoint, request.compute, request.device)
    worker = Worker(run, manifest, plan, model, request.on_overflow == "keep")
    try:
        yield InProcess(worker, Ledger(run, manifest.fingerprint))
    finally:
        worker.close()


class InProcess:
    """Compute blocks one after another in this process."""

    def __init__(self, worker: Worker, ledger: Ledger) -> None:
        self._worker = worker
        self._ledger = ledger

    def run(self, blocks: Sequence[int]) -> Iterator[Entry]:
        """Yield the entry of each block once it is committed."""
        tried = self._ledger.tried()
        for block in blocks:
            entry = self._worker.extract_block(block, tried.get(block, 0) + 1)
            self._ledger.commit(entry)
            yield entry
