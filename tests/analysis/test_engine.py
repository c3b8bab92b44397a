"""The engine: fixed merges, the same bits in every pool and order, only what is complete, bounded memory."""

import tracemalloc
from functools import partial

import numpy as np
import pytest
import torch
import xarray

from headwater.analysis.engine.pools import make_pool
from headwater.analysis.engine.reducer import Reducer
from headwater.analysis.engine.results import analysis_path, load, save
from headwater.analysis.engine.scan import Prepared, Scan, Tree, analyse, reduce_run
from headwater.analysis.engine.work import projected_bytes
from headwater.analysis.measures.cosine import cosine
from headwater.analysis.measures.svd import Scatter, svd
from headwater.store.manifest import RunError
from headwater.store.reader import open_run


class Norms(Reducer):
    """Sum of squares of every depth, the way an outsider would write one."""

    name, sites = "norms", ("resid",)

    def zero(self):
        return {"sum": np.zeros(4)}

    def update(self, state, chunk):
        state["sum"][chunk.lead] += (chunk["resid"].astype(np.float64) ** 2).sum()

    def finalise(self, state):
        return state["sum"]


class Shuffled:
    """A pool that hands results over in another order."""

    n_workers = 2

    def __init__(self, seed):
        self.seed = seed

    def map(self, function, items):
        items = list(items)
        np.random.default_rng(self.seed).shuffle(items)
        yield from ((item, function(item)) for item in items)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13])
def test_the_tree_is_the_same_in_any_order(n):
    def total(order, missing=()):
        tree = Tree(n, lambda a, b: [{"x": f"({a[0]['x']}{b[0]['x']})"}])
        for i in order:
            tree.put(int(i), None if i in missing else [{"x": str(i % 10)}])
        return tree.root and tree.root[0]["x"]

    expected = total(range(n))
    assert expected == {1: "0", 2: "(01)", 3: "((01)2)"}.get(n, expected)
    for seed in range(5):
        assert total(np.random.default_rng(seed).permutation(n)) == expected
    assert total(range(n)[::-1], range(n)) is None
    if n > 2:
        assert total(range(n)[::-1], {1}) == total(range(n), {1})


def every_analysis(run):
    """Describe every analysis that scans a run of all sites."""
    from headwater.analysis.engine.analysis import ModelAnalysis
    from headwater.analysis.measures.favourites import FavouritesAnalysis
    from headwater.analysis.suite.registry import analyses, make_analysis

    options = {
        "sinks": {"window": 8},
        "svd": {"k": 3},
        "top": {"site": "mlp_post", "k": 2},
        "heads": {"n_queries": 6},
    }
    wanted = [
        make_analysis(run, kind, options.get(kind.name, {})).prepare(run)
        for kind in analyses().values()
        if not issubclass(kind, ModelAnalysis)
    ]
    return [*wanted, FavouritesAnalysis(n_queries=6, min_rows=1).prepare(run)]


def everything(run, scan):
    """Run all analyses in one go and return all their values."""
    results = analyse(run, every_analysis(run), scan)
    return {f"{d.attrs['analysis']}.{name}": v.values for d in results for name, v in d.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["plain", "packed"])
def test_results_have_the_same_bits_in_every_pool_and_order(analysis_run, layout):
    run = analysis_run(layout)
    expected = everything(run, Scan())
    scans = [Scan(workers=3), *(Scan(pool=Shuffled(seed)) for seed in range(2))]
    for scan in scans + [Scan(2, "processes")] * (layout == "plain"):
        for name, value in everything(run, scan).items():
            np.testing.assert_array_equal(value, expected[name], f"{name} {scan}", strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_workers_share_torchs_threads_out(kind):
    """Two workers with all threads each fight for the cores: a scan by processes took ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(10)
    try:
        count = partial(
            eval, "__import__('torch').get_num_threads()"
        )  # what travels must be known to other processes
        assert [n for _, n in make_pool(kind, 2).map(count, [{}])] == [5]
        assert torch.get_num_threads() == 10
    finally:
        torch.set_num_threads(before)


def test_the_pools_are_tried_on_every_reducer(analysis_run, monkeypatch):
    import pkgutil
    from importlib import import_module

    import headwater.analysis
    from headwater.analysis.engine import scan as engine

    for module in pkgutil.walk_packages(headwater.analysis.__path__, "headwater.analysis."):
        import_module(module.name)
    seen = set()
    real = engine.reduce_run

    def note(run, reducers, *rest):
        seen.update(type(reducer) for reducer in reducers)
        return real(run, reducers, *rest)

    monkeypatch.setattr(engine, "reduce_run", note)
    everything(analysis_run("plain"), Scan())
    ours = {
        kind
        for kind in Reducer.__subclasses__()
        if kind.__module__.startswith("headwater.analysis.")
    }
    assert ours <= seen, ours - seen


def test_sharing_a_read_changes_no_bit(analysis_run):
    run = analysis_run("plain")
    shared = everything(run, Scan())
    for name, value in svd(run, k=3).items():
        np.testing.assert_array_equal(value.values, shared[f"svd.{name}"])
    for name, value in cosine(run, cka=None).items():
        np.testing.assert_array_equal(value.values, shared[f"cosine.{name}"])


def test_a_reducer_from_outside_sees_every_value_once(analysis_run):
    run = analysis_run("plain")
    seen = []
    (got,) = reduce_run(run, [Norms()], Scan(observe=lambda p: seen.append((p.done, p.n_blocks))))
    np.testing.assert_allclose(got, (run["resid"][:].astype(np.float64) ** 2).sum((1, 2, 3)), 1e-14)
    assert seen == [(i, 5) for i in range(1, 6)]


def test_an_incomplete_run_is_refused_or_read_as_far_as_it_goes(analysis_run, tmp_path):
    import shutil

    shutil.copytree(analysis_run("plain").path, tmp_path / "half")
    run = open_run(tmp_path / "half")
    for block in (1, 4):
        run.ledger.remove(block)
    with pytest.raises(RunError, match=r"3 of 5 blocks.*headwater extract.*--partial"):
        reduce_run(run, [Norms()])
    (got,) = reduce_run(run, [Norms()], Scan(partial=True))
    kept = run["resid"][:].astype(np.float64)[:, [0, 1, 4, 5, 6, 7]]
    np.testing.assert_allclose(got, (kept**2).sum((1, 2, 3)), 1e-14)
    for block in (0, 2, 3):
        run.ledger.remove(block)
    with pytest.raises(RunError, match="no finished block"):
        reduce_run(run, [Norms()], Scan(partial=True))


def test_bad_requests_say_what_to_do(analysis_run, tmp_path):
    run = analysis_run("plain")
    reducer = Norms()
    reducer.sites = ("resid", "nothing")
    with pytest.raises(RunError, match=r"no 'nothing'.*Extract a run with --sites resid,nothing"):
        reduce_run(run, [reducer])
    with pytest.raises(ValueError, match=r"needs .* MB of memory, but the limit is 1 MB"):
        reduce_run(run, [Norms()], Scan(memory=10**6))
    with pytest.raises(ValueError, match="there is no pool 'cloud'"):
        make_pool("cloud")
    with pytest.raises(ValueError, match="workers is 0"):
        make_pool(None, 0)


def test_nan_in_the_data_is_an_error_that_names_the_sequences(analysis_run, monkeypatch):
    run = open_run(analysis_run("plain").path)
    held = type(run["resid"]).__getitem__

    def broken(array, key):
        values = held(array, key)
        return np.full_like(values, np.nan) if key[-1] == slice(4, 6) else values

    monkeypatch.setattr(type(run["resid"]), "__getitem__", broken)
    with pytest.raises(ValueError, match=r"resid of .* sequences 4 to 5"):
        reduce_run(run, [Norms()])


def test_a_wrong_number_of_passes_is_caught(analysis_run):
    def steps():
        yield [Norms()]
        yield [Norms()]
        return None

    with pytest.raises(AssertionError, match="two declares 1 passes"):
        analyse(analysis_run("plain"), [Prepared("two", 1, steps, {})])


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_stays_within_the_projection(analysis_run, workers, monkeypatch):
    monkeypatch.setattr("headwater.analysis.engine.work.BASE_BYTES", 1 << 20)
    run = analysis_run("plain")
    reducers = [Scatter(run, "mlp_post", range(3)), Scatter(run, "resid", range(4))]
    assert all(r.nbytes == sum(v.nbytes for v in r.zero().values()) for r in reducers)
    projected = projected_bytes(run, reducers, workers)
    reduce_run(run, reducers, Scan(workers=workers))
    tracemalloc.start()
    try:
        reduce_run(run, reducers, Scan(workers=workers, memory=projected))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= projected
    with pytest.raises(ValueError, match="memory"):
        reduce_run(run, reducers, Scan(workers=workers, memory=projected - 1))


def test_a_result_is_kept_beside_the_run_with_its_provenance(analysis_run, recwarn):
    run = analysis_run("plain")
    result = svd(run, k=2, at=[1, 3])
    path = save(run, result)
    assert path == analysis_path(run, "svd") == run.path.parent / "plain.analysis" / "svd"
    save(run, result)
    assert [p.name for p in path.parent.iterdir()] == ["svd"]
    xarray.testing.assert_identical(load(run, "svd").load(), result)
    assert {"fingerprint", "arguments", "versions", "text", "conventions", "passes"} <= set(
        result.attrs
    )
    assert result.attrs["fingerprint"] == run.manifest.fingerprint
    assert not [str(w.message) for w in recwarn]
    with pytest.raises(FileNotFoundError, match=r"headwater analyze .* cosine"):
        load(run, "cosine")
