"""Memory: what analyses take at their peak is within what the engine projects, and near it."""

import tracemalloc

import numpy as np
import pytest

import headwater
from headwater.analysis.engine.scan import Scan, reduce_run
from headwater.analysis.engine.work import projected_bytes
from headwater.analysis.measures.cka import CrossScatter
from headwater.analysis.measures.cosine_passes import Centres, Pairs
from headwater.analysis.measures.favourites import Favourites
from headwater.analysis.measures.heads import Heads
from headwater.analysis.measures.lens import Lens
from headwater.analysis.measures.massive import Massive
from headwater.analysis.measures.norms import Norms
from headwater.analysis.measures.origin import load_run_model
from headwater.analysis.measures.sink_rows import Sinks
from headwater.analysis.measures.svd import Scatter
from headwater.analysis.measures.top import Top
from headwater.analysis.measures.top_units import Units

D_VOCAB = 8000


@pytest.fixture(scope="module")
def run(tmp_path_factory, oracle):
    """8 sequences of 512 positions, width 96, so that values outweigh the interpreter."""
    home = tmp_path_factory.mktemp("memory")
    oracle.gpt2(
        n_layer=3, n_head=4, n_embd=96, n_positions=512, vocab_size=D_VOCAB
    ).save_pretrained(home / "model")
    np.save(home / "ids.npy", np.random.default_rng(0).integers(0, 31, (8, 512)).astype(np.int32))
    sites = ("resid", "pattern", "attn_entropy", "attn_sink", "attn_distance", "attn_received")
    config = headwater.RunConfig(
        model=str(home / "model"),
        tokens=str(home / "ids.npy"),
        out=str(home / "run"),
        sites=sites,
        block=2,
    )
    return headwater.extract(config)


MAKE = {
    "centres": lambda run: Centres(run, range(4), True),
    "pairs": lambda run: Pairs(range(4), np.zeros((2, 4, 96)), np.array([3])),
    "cka": lambda run: CrossScatter(run, "resid", [(i, i) for i in range(4)] + [(0, 1)]),
    "svd": lambda run: Scatter(run, "resid", range(4)),
    "patterns": lambda run: Sinks(run, "pattern", 0.3, 64, range(3), None),
    "statistics": lambda run: Sinks(run, "statistics", 0.3, 64, range(3), None),
    "norms": lambda run: Norms(range(4), 96),
    "massive": lambda run: Massive(run, "resid", range(4)),
    "heads": lambda run: Heads(run, [1], 4, 16, 128),
    "favourites": lambda run: Favourites(run, [0, 2], 8, np.arange(8, 512, 8), np.arange(31)),
    "lens": lambda run: Lens(run, load_run_model(run, None), 64, 10),
    "top": lambda run: Top(
        run, "resid", range(4), Units(run, "resid", np.arange(96), None, None), 10, 1
    ),
    "top patterns": lambda run: Top(
        run, "pattern", range(3), Units(run, "pattern", np.arange(4), None, None), 10, 1
    ),
}


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("what", MAKE)
def test_the_peak_is_within_the_projection(run, what, workers, monkeypatch):
    monkeypatch.setattr("headwater.analysis.engine.work.BASE_BYTES", 1 << 20)
    reducer = MAKE[what](run)
    assert reducer.nbytes == sum(value.nbytes for value in reducer.zero().values())
    reduce_run(run, [reducer], Scan(workers=workers))
    projected = projected_bytes(run, [reducer], workers)
    tracemalloc.start()
    try:
        reduce_run(run, [reducer], Scan(workers=workers, memory=projected))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= projected
    if workers == 1:  # how far two overlap is chance
        assert projected <= 12 * peak + (8 << 20)
