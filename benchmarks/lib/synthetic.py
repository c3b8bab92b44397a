"""Runs of any size without a model: residual streams with the spectrum, growth and massive activations of GPT-2's.

Depth d adds to depth d − 1, with a power-law spectrum and a mean; from depth 3 on the first position of a sequence has
activations near 3000 in two dimensions.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from headwater.extractor.model.weights import Checkpoint, ModelConfig
from headwater.extractor.plan import make_plan
from headwater.extractor.request import RunConfig
from headwater.extractor.text.commit import commit_text
from headwater.extractor.text.source import Source
from headwater.store.ledger import Entry, Ledger
from headwater.store.place import place_of
from headwater.store.reader import Run, open_run
from headwater.store.writer import BlockWriter, file_sums

POOL_ROWS = 1 << 14
MASSIVE = ((447, 3000.0), (138, 800.0))
D_VOCAB = 512


class Residuals:
    """Residual streams of sequences, depth by depth."""

    def __init__(self, n_positions: int, d_model: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        rotation = np.linalg.qr(rng.standard_normal((d_model, d_model)))[0].astype(np.float32)
        spectrum = (np.arange(1, d_model + 1) ** -0.6).astype(np.float32)
        spectrum *= np.sqrt(d_model / (spectrum**2).sum())
        rows = max(POOL_ROWS, 2 * n_positions)
        self.pool = (rng.standard_normal((rows, d_model), np.float32) * spectrum) @ rotation
        self.mean = rotation[0] * np.float32(np.sqrt(d_model))
        self.n_positions = n_positions
        self.rng = rng

    def start(self, n: int) -> np.ndarray:
        """Return the embeddings of n sequences: float32 [n, position, d_model]."""
        x = np.empty((n, self.n_positions, self.pool.shape[1]), np.float32)
        for row in x:
            row[:] = self._draw()
        return x

    def go_on(self, x: np.ndarray, depth: int) -> None:
        """Add what the layer before `depth` writes, in place."""
        size = np.float32(0.4 + 0.08 * depth)
        for row in x:
            row += self._draw() * size
            row += self.mean * (size * np.float32(0.5))
            if depth == 3:
                for dimension, value in MASSIVE:
                    row[0, dimension % row.shape[1]] += value

    def _draw(self) -> np.ndarray:
        at = int(self.rng.integers(0, len(self.pool) - self.n_positions + 1))
        return self.pool[at : at + self.n_positions]


def make_run(
    folder: Path,
    n_bytes: int,
    n_layer: int = 12,
    d_model: int = 768,
    n_positions: int = 1024,
    dtype: str = "float16",
) -> Run:
    """Write a run of `resid` of about `n_bytes` in the folder `run`, and return it."""
    n = max(n_bytes // ((n_layer + 1) * d_model * n_positions * np.dtype(dtype).itemsize), 1)
    raw = {
        "model_type": "gpt2",
        "n_layer": n_layer,
        "n_head": 4,
        "n_embd": d_model,
        "n_positions": n_positions,
        "vocab_size": D_VOCAB,
    }
    checkpoint = Checkpoint("synthetic", ModelConfig.from_hf(raw, "synthetic"), {}, "0" * 64, None)
    folder.mkdir(parents=True, exist_ok=True)
    np.save(
        folder / "ids.npy",
        np.random.default_rng(1).integers(0, D_VOCAB, (n, n_positions), dtype=np.int32),
    )
    block = 1 << max(int(math.log2(16384 / n_positions)), 0)
    path = folder / "run"
    config = RunConfig(
        out=str(path),
        model="synthetic",
        tokens=str(folder / "ids.npy"),
        sites=("resid",),
        dtype=dtype,
        block=block,
    )
    path.mkdir()
    text = Source(config, checkpoint.config, None)
    plan = make_plan(config, checkpoint.config, text.geometry)
    manifest = commit_text(place_of(path), text, plan, checkpoint)
    writer = BlockWriter(path, manifest.arrays, manifest.block)
    ledger = Ledger(path, manifest.fingerprint)
    source = Residuals(n_positions, d_model)
    for at in range(manifest.n_blocks):
        first, last = manifest.block_range(at)
        writer.begin(first, last, f"{at:08d}.1")
        x = source.start(last - first)
        for depth in range(n_layer + 1):
            if depth:
                source.go_on(x, depth)
            for part in writer.parts("resid", depth, first, last - first):
                part.view[...] = x[part.sequences, part.positions]
            writer.close_layer("depth", depth)
        files = file_sums(writer.finish())
        n_tokens = (last - first) * n_positions
        ledger.commit(
            Entry(at, 1, manifest.fingerprint, first, last, n_tokens, files, {}, {}, "synthetic")
        )
    writer.close()
    return open_run(path)
