"""Compute one block and write its shards: the heart of extraction, on one screen."""

from __future__ import annotations

import os
import socket
import time
from contextlib import ExitStack, suppress
from functools import partial

import torch

from headwater.extractor.capture import CaptureTap
from headwater.extractor.edits.apply import Editor
from headwater.extractor.maker import maker
from headwater.extractor.model.batch import Batch, make_batch, padded
from headwater.extractor.model.device_tap import DeviceTap
from headwater.extractor.model.forward import Model
from headwater.extractor.model.forward_device import KernelModel
from headwater.extractor.model.transfer import Transfer, ring_capacity
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
        n_threads = (
            DEVICE_WRITERS if isinstance(model, KernelModel) else 1
        )  # beside a GPU the processor has time
        self.writer = self._stack.enter_context(
            open_writer(run, manifest.arrays, manifest.block, n_threads)
        )
        self._text = open_run(run, manifest=manifest)
        shape = (manifest.block, padded(manifest.n_positions), model.config.d_model)
        self._stream = torch.empty(shape, dtype=model.stream, device=model.device)
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
        specs = {spec.name: spec for spec in self.manifest.arrays}
        host = CaptureTap(
            self.plan.selection,
            specs,
            self.writer,
            self.plan.top_k,
            self.keep_overflow,
        )
        tap = host if self._transfer is None else DeviceTap(host, self._transfer, self.model.device)
        self.writer.begin(first, last, f"{block:08d}.{attempt}")
        try:
            with torch.inference_mode():
                n_tokens = self._walk(first, last, tap)
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
            casts=host.casts,
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

    def _walk(self, first: int, last: int, tap: CaptureTap | DeviceTap) -> int:
        """Take every micro-batch through a layer before any goes on to the next; return the number of tokens."""
        micros = self._batches(first, last)
        if self._transfer is not None:
            self._transfer.begin()

        def place(at: int, batch: Batch) -> torch.Tensor:
            tap.place(
                first + at, batch.row_start, self.manifest.n_positions, self.model.config.n_head
            )
            return self._stream[at : at + batch.tokens.shape[0]]

        for at, batch in micros:
            x = self.model.embed(batch, place(at, batch))
            tap.take_depth(0, x, None)
        self._close(tap, "depth", 0)
        for layer in range(last_layer(self.plan.selection, self.model.config.n_layer)):
            for at, batch in micros:
                x = place(at, batch)
                before = x.clone() if tap.wants_previous else None
                told = self.model.layer(layer, x, batch, tap, before)
                tap.take_depth(layer + 1, x, before, told)
            self._close(tap, "layer", layer)
            self._close(tap, "depth", layer + 1)
        for at, batch in micros:
            self.model.finish(place(at, batch), batch, tap)
        t = torch.arange(padded(self.manifest.n_positions), device=self.model.device)
        return sum(int((batch.row_start <= t).sum()) for _, batch in micros)

    def _batches(self, first: int, last: int) -> list[tuple[int, Batch]]:
        tokens = self._text.rows("tokens", first, last)
        row_start = self._text.rows("row_start", first, last)
        edge = tile_edge(self.manifest.n_positions)
        micro = self.manifest.micro
        micros = [
            (
                at,
                self.editor.hook(
                    make_batch(tokens[at : at + micro], row_start[at : at + micro], edge),
                    first + at,
                ),
            )
            for at in range(0, last - first, micro)
        ]
        return [(at, batch.to(self.model.device)) for at, batch in micros]

    def _close(self, tap: CaptureTap | DeviceTap, axis: str, index: int) -> None:
        chosen = self.plan.selection.along(axis)
        if index in chosen:
            tap.then(partial(self.writer.close_layer, axis, chosen.index(index)))


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
