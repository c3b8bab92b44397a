"""What peers capture, and from what: workloads, a random model, random ids and their reference in float64."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from headwater.benchmarks.bench_extract import SIZES, make_model
from headwater.benchmarks.peers.truth import STATISTICS, Truth


@dataclass(frozen=True)
class Workload:
    """What is captured: the function of the drivers, the sites to check, positions and sequences."""

    function: str
    sites: tuple[str, ...]
    seq_len: int
    n: int

    @property
    def batch(self) -> int:
        """Sequences that peers take at once."""
        return max(2048 // self.seq_len, 1)


WORKLOADS = {
    "residual": Workload("residual", ("resid",), 1024, 4),
    "patterns": Workload("patterns", ("resid", "pattern"), 1024, 4),
    "short": Workload("residual", ("resid",), 128, 32),
    "statistics": Workload("only_statistics", STATISTICS, 1024, 4),
}


@dataclass(frozen=True)
class Inputs:
    """Files that every process reads: the model, the ids once and repeated, and the reference."""

    model: Path
    ids: Path
    repeated: Path
    truth: Truth


def prepare(work: Workload, size: str, steps: int, cache: Path) -> Inputs:
    """Make a random model, random ids and their float64 reference, or find them in the cache."""
    model = prepare_model(size, cache)
    name = f"{size}-{work.seq_len}-{work.n}"
    ids = cache / f"ids-{name}.npy"
    repeated = cache / f"ids-{name}-{steps}.npy"
    rows = np.random.default_rng(0).integers(
        0, SIZES[size][-1], (work.n, work.seq_len), dtype=np.int32
    )
    np.save(ids, rows)
    np.save(repeated, np.tile(rows, (steps, 1)))
    return Inputs(model, ids, repeated, Truth.of(model, ids, cache / f"truth-{name}.npz"))


def prepare_model(size: str, cache: Path) -> Path:
    """Make a random model with a tokenizer, or find it in the cache."""
    model = cache / f"model-{size}"
    if not (model / "tokenizer_config.json").exists():
        make_model(model, size, 1024)
        add_tokenizer(model)
    return model


def add_tokenizer(model: Path) -> None:
    """Give a model a byte-level tokenizer: some peers load none without one, and none is used."""
    from tokenizers import ByteLevelBPETokenizer

    coder = ByteLevelBPETokenizer()
    coder.train_from_iterator(["ids are given"], 257, 2, False, ["<|endoftext|>"])
    coder.save(str(model / "tokenizer.json"))
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (model / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named})
    )
