"""A scan that is interrupted goes on where it was, with the same bits."""

import numpy as np
import pytest

from headwater.analysis.engine.checkpoint import Checkpoint
from headwater.analysis.engine.results import analysis_path
from headwater.analysis.engine.scan import Scan
from headwater.analysis.measures.cosine import cosine
from headwater.store.place import place_of


class Stop(Exception):
    """Stands for a kill."""


def stop_after(n, seen):
    def observe(progress):
        seen.append((progress.at, progress.done))
        if len(seen) == n:
            raise Stop

    return observe


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("n", [1, 3, 5, 6, 9, 10])
def test_an_interrupted_scan_goes_on_with_the_same_bits(analysis_run, n, workers):
    run = analysis_run("plain")
    whole = cosine(run, cka="all")
    first, second = [], []
    with pytest.raises(Stop):
        cosine(run, cka="all", scan=Scan(workers, keep_seconds=0, observe=stop_after(n, first)))
    folder = analysis_path(run, ".unfinished")
    assert any(folder.iterdir())
    again = cosine(
        run, cka="all", scan=Scan(workers, keep_seconds=0, observe=stop_after(99, second))
    )
    assert len(first) == n and len(second) == 10 - n
    assert not folder.exists()
    for name, value in whole.items():
        np.testing.assert_array_equal(again[name], value)


def test_another_request_starts_anew(analysis_run):
    run = analysis_run("packed")
    seen = []
    with pytest.raises(Stop):
        cosine(run, cka=None, scan=Scan(keep_seconds=0, observe=stop_after(2, seen)))
    cosine(run, outliers=[1], cka=None, scan=Scan(keep_seconds=0, observe=stop_after(99, seen)))
    assert seen.count((1, 1)) == 2
    cosine(run, cka=None, scan=Scan(keep_seconds=0))


def test_kept_nodes_come_back_and_a_torn_file_is_no_file(tmp_path):
    kept = Checkpoint(place_of(tmp_path), ["x"], 0)
    nodes = {
        (0, 3): None,
        (1, 0): [{"a": np.arange(3.0), "b": np.eye(2)}, {}],
        (0, 2): [{"a": np.ones(()) * 2}],
    }
    kept.save(1, nodes)
    back = kept.load(1)
    assert back.keys() == nodes.keys() and back[0, 3] is None and back[1, 0][1] == {}
    np.testing.assert_array_equal(back[1, 0][0]["b"], np.eye(2))
    assert back[0, 2][0]["a"].shape == ()
    assert kept.load(2) == {}
    path = next(kept.folder.iterdir())
    path.write_bytes(path.read_bytes()[:-40])
    assert kept.load(1) == {}
    slow = Checkpoint(place_of(tmp_path), ["y"], 100)
    slow.save(1, nodes)
    assert not slow.folder.exists()
    slow.save(1, nodes, now=True)
    assert slow.load(1)
