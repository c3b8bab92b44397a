"""A plateau sweep against plain forward passes over as many positions.

The sweep moves the last position of many prompt pairs, at many depths, in many steps; each step recomputes one position
from its depth on, and its logits. Beside it run plain forward passes (Model, nothing captured but the logits that the
sweep needs too) in two ways of counting the same number of positions: `same layers`, as many passes of a position
through a layer, and as many logits, as the sweep has; `same positions`, every recomputed position through all layers.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import numpy as np
import torch

from headwater.analysis.interventions.plateau import Sweep
from headwater.analysis.interventions.plateau_paths import make_path
from headwater.analysis.interventions.prompts import Pair
from headwater.analysis.interventions.replay import Replay
from headwater.benchmarks.bench_extract import SIZES
from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.extractor.model.batch import make_batch
from headwater.extractor.model.forward import Model
from headwater.extractor.model.tap import NoTap
from headwater.extractor.model.walk import Micro, walk_layers
from headwater.extractor.model.weights import Checkpoint, ModelConfig

COLUMNS = (
    "size",
    "pairs",
    "depths",
    "steps",
    "prompt",
    "sweep_seconds",
    "same_layers_seconds",
    "same_positions_seconds",
    "x_same_layers",
    "x_same_positions",
)
LOGIT_ROWS = 512


def random_checkpoint(size: str) -> Checkpoint:
    """Make a GPT-2 of a size with random weights."""
    n_layer, n_head, d_model, d_vocab = SIZES[size]
    config = ModelConfig.from_hf(
        {
            "model_type": "gpt2",
            "n_layer": n_layer,
            "n_head": n_head,
            "n_embd": d_model,
            "vocab_size": d_vocab,
        },
        size,
    )
    make = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=make) / 8 for name, shape in config.shapes().items()
    }
    return Checkpoint(size, config, tensors, "", None)


class Plain:
    """Plain forward passes of a model over rows as long as the prompts, in batches of about 2,000 positions."""

    def __init__(self, model: Model, replay: Replay, length: int) -> None:
        self.model = model
        self.replay = replay
        ids = np.random.default_rng(1).integers(
            0, model.config.d_vocab, (max(2048 // length, 1), length)
        )
        self.batch = make_batch(ids.astype(np.int32), np.zeros(ids.shape, np.int32))
        self.x = model.embed(self.batch).clone()

    def layers(self, n_positions: int) -> float:
        """Take so many positions through one layer, any; return the seconds."""
        layer = 0
        left = n_positions
        x = self.x.clone()
        start = time.perf_counter()
        with torch.inference_mode():
            while left > 0:
                at = layer % self.model.config.n_layer
                walk_layers(self.model, [Micro(0, self.batch, x)], NoTap(), at, at + 1)
                layer = layer + 1
                left = left - x.shape[0] * x.shape[1]
        return (time.perf_counter() - start) * n_positions / (n_positions - left)

    def logits(self, n_positions: int) -> float:
        """Compute the log-probabilities of so many positions; return the seconds."""
        rows = self.x.reshape(-1, self.x.shape[-1])[:LOGIT_ROWS]
        start = time.perf_counter()
        done = 0
        with torch.inference_mode():
            while done < n_positions:
                torch.log_softmax(self.replay.logits(rows), -1)
                done += len(rows)
        return (time.perf_counter() - start) * n_positions / done


def sweep(replay: Replay, pairs: list[Pair], depths: list[int], n_steps: int) -> float:
    """Run the sweep as `plateau` does, prompts included; return the seconds."""
    start = time.perf_counter()
    ready = Sweep(replay, pairs, n_steps)
    alpha = torch.from_numpy(ready.alpha).to(replay.dtype)
    for depth in depths:
        a, b = ready.ends(depth)
        for part in ready.parts():
            ready.outputs(depth, part, make_path(a[part], b[part], alpha, "linear"))
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and write it to benchmarks/results with --save."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks plateau", description=__doc__
    )
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--depths", type=int, default=12, help="the first so many")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--save", action="store_true", help="write the figures to benchmarks/results"
    )
    options = parser.parse_args(arguments)
    load_before = os.getloadavg()[0]
    checkpoint = random_checkpoint(options.size)
    replay = Replay(checkpoint)
    model = Model(checkpoint)
    ids = (
        np.random.default_rng(0)
        .integers(0, checkpoint.config.d_vocab, (2, options.pairs, options.prompt))
        .tolist()
    )
    pairs = [Pair(a, b, "", {}) for a, b in zip(*ids, strict=True)]
    n_layer = checkpoint.config.n_layer
    depths = list(range(options.depths))
    n_rows = options.pairs * options.steps * len(depths)
    n_layers = options.pairs * options.steps * sum(n_layer - depth for depth in depths)
    plain = Plain(model, replay, options.prompt)
    sweep(replay, pairs[:2], depths[:1], options.steps), plain.layers(1), plain.logits(1)
    rows: list[Row] = []
    for _ in range(options.rounds):
        seconds = sweep(replay, pairs, depths, options.steps)
        layers = plain.layers(n_layers)
        logits = plain.logits(n_rows)
        same = layers + logits
        whole = layers * n_rows * n_layer / n_layers + logits
        rows.append(
            {
                "size": options.size,
                "pairs": options.pairs,
                "depths": len(depths),
                "steps": options.steps,
                "prompt": options.prompt,
                "sweep_seconds": round(seconds, 2),
                "same_layers_seconds": round(same, 2),
                "same_positions_seconds": round(whole, 2),
                "x_same_layers": round(seconds / same, 3),
                "x_same_positions": round(seconds / whole, 3),
            }
        )
    print("".join(f"{name:>24}" for name in COLUMNS))
    for row in rows:
        print("".join(f"{row[name]:>24}" for name in COLUMNS))
    print(
        f"{os.cpu_count()} cores; load before the start {load_before:.1f}; x: the sweep over plain passes"
    )
    if options.save:
        print(write_csv("plateau", [{"load_before": round(load_before, 2)} | row for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
