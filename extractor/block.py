"""Compute one block and write its shards: the heart of extraction, on one screen."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack, suppress

import torch

from headwater.extractor.capture import CaptureTap
from headwater.extractor.edits.apply import Editor
from headwater.extractor.maker import maker
from headwater.extractor.model.batch import Batch, make_batch, padded
from headwater.extractor.model.device_tap import DeviceTap
from headwater.extractor.model.forward import Model
from headwater.extractor.model.forward_device import KernelModel
from headwater.extractor.model.transfer import Transfer, ring_capacity
from headwater.extractor.model.walk import Micro, walk
from headwater.extractor.plan import Plan
from headwater.extractor.selection import Selection
from headwater.extractor.sites import SITES
from headwater.store.layout import sequence_bytes, tile_edge
from headwater.store.ledger import Entry
from headwater.store.manifest import Manifest
from headwater.store.place import PlaceLike
from headwater.store.publish import open_writer
from headwater.store.reader import open_run
from headwater.store.writer import file_sums

DEVICE_WRITERS = 4
HEAD_SITES = ("loss", "top_logits", "top_tokens", "logits")
OUTPUT_SITES = ("ln_final_scale", "ln_final_out", *HEAD_SITES)


class Worker:
    """A model and a writer that extract one block after another of one run."""

    def __init__(
        self,
        run: PlaceLike,
        manifest: Manifest,
        plan: Plan,
        model: Model,
        keep_overflow: bool = False,
    ) -> None:
        self.manifest = manifest
        self.plan = plan
        self.model = model
        self.keep_overflow = keep_overflow
        self.editor = Editor(plan.edits, model, manifest.n_positions)
        self._stack = ExitStack()
        n_threads = 1
        if isinstance(model, KernelModel):  # beside a GPU the processor has time
            n_threads = DEVICE_WRITERS
        self.writer = self._stack.enter_context(
            open_writer(run, manifest.arrays, manifest.block, n_threads)
        )
        self._text = open_run(run, manifest=manifest)
        shape = (manifest.block, padded(manifest.n_positions), model.config.d_model)
        self._stream = torch.empty(shape, dtype=model.stream, device=model.device)
        self._n_layers = last_layer(plan.selection, model.config.n_layer)
        self._maker = maker(str(model.device))
        self._transfer: Transfer | None = None
        if isinstance(model, KernelModel):
            self._transfer = Transfer(
                model.device, ring_capacity(sequence_bytes(spec) for spec in manifest.arrays)
            )
            self._stack.callback(self._transfer.close)

    def extract_block(self, block: int, attempt: int) -> Entry:
        """Compute a block, make its shards durable, and return the ledger entry that would commit it."""
        first, last = self.manifest.block_range(block)
        start = time.perf_counter()
        tap = self._tap()
        micros = self._micros(first, last)
        self.writer.begin(first, last, f"{block:08d}.{attempt}")
        if self._transfer is not None:
            self._transfer.begin()
        try:
            with torch.inference_mode():
                walk(self.model, micros, tap, self._n_layers)
                n_tokens = sum(_count_tokens(micro.batch) for micro in micros)
                tap.finish()
            computed = time.perf_counter()
            files = self.writer.finish()
        except BaseException:
            self._stop_transfer()
            self.writer.abandon()
            raise
        seconds = {
            "compute": computed - start,
            "finish": time.perf_counter() - computed,
            **self.writer.seconds,
        }
        if self._transfer is not None:
            seconds = split_seconds(seconds, self._transfer.seconds)
        return Entry(
            block=block,
            attempt=attempt,
            fingerprint=self.manifest.fingerprint,
            first=first,
            last=last,
            n_tokens=n_tokens,
            files=file_sums(files),
            casts=tap.recorder.casts,
            seconds={k: round(v, 6) for k, v in seconds.items()},
            worker=f"{socket.gethostname()}:{os.getpid()}",
            made_by=self._maker,
        )

    def close(self) -> None:
        """End the threads of the transfer and of the writer."""
        self._stack.close()

    def _stop_transfer(self) -> None:
        """Let what is under way end, whatever becomes of it, so that the writer can be told to abandon the block."""
        if self._transfer is not None:
            with suppress(BaseException):
                self._transfer.drain()

    def _tap(self) -> CaptureTap:
        """Return a tap for one block: on a device, one that sends what it takes through the transfer."""
        arrays = self.manifest.arrays
        if self._transfer is None:
            return CaptureTap(self.plan, arrays, self.writer, self.keep_overflow)
        device = self.model.device
        return DeviceTap(self.plan, arrays, self.writer, self._transfer, device, self.keep_overflow)

    def _micros(self, first: int, last: int) -> list[Micro]:
        """Cut a block into micro-batches, each with its part of the block's stream."""
        tokens = self._text.rows("tokens", first, last)
        row_start = self._text.rows("row_start", first, last)
        edge = tile_edge(self.manifest.n_positions)
        micros = []
        for at in range(0, last - first, self.manifest.micro):
            rows = slice(at, at + self.manifest.micro)
            batch = make_batch(tokens[rows], row_start[rows], edge)
            edited = self.editor.hook(batch, first + at).to(self.model.device)
            x_BTD = self._stream[at : at + len(edited.tokens)]
            micros.append(Micro(first + at, edited, x_BTD))
        return micros


def _count_tokens(batch: Batch) -> int:
    """Count the positions that are no padding."""
    t = torch.arange(batch.row_start.shape[1], device=batch.row_start.device)
    return int((batch.row_start <= t).sum())


def split_seconds(seconds: dict[str, float], transfer: dict[str, float]) -> dict[str, float]:
    """Return a block's seconds by phase where a transfer stands between the forward and the writer.

    The writer's waits are its thread's, so they are taken out of `encode`; `wait` is the forward's, out of `compute`.
    """
    encode = max(transfer["encode"] - seconds["wait"], 0.0)
    compute = max(seconds["compute"] - transfer["wait"], 0.0)
    return seconds | transfer | {"compute": compute, "encode": encode}


def last_layer(selection: Selection, n_layer: int) -> int:
    """Return how many layers must be computed for a selection."""
    needed = [0]
    for site in selection.sites:
        axis = SITES[site].axis
        needed.append(
            n_layer if site in OUTPUT_SITES else max(selection.along(axis)) + (axis == "layer")
        )
    return max(needed)
