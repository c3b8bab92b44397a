"""Analyses on every pool: in this process, threads, processes, a Ray of our own, a cluster; always the same bits."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from headwater.analysis.engine.pools import open_pool
from headwater.analysis.engine.scan import Scan
from headwater.analysis.measures.cosine import cosine
from headwater.analysis.measures.sinks import sinks
from headwater.store.manifest import RunError

pytest.importorskip("ray")


def make_faulty(marker):
    """Make a function that fails in a way of its own, or dies once with its process."""

    def faulty(item):
        if item == 3:
            raise RunError("block 3 is not to be read. Take another.")
        if item == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return item * item

    return faulty


def test_the_same_bits_on_every_pool(analysis_run, tmp_path):
    run = analysis_run("plain")
    expected = [analysis(run) for analysis in (cosine, sinks)]

    def check(scan, what):
        for analysis, there in zip((cosine, sinks), expected, strict=True):
            here = analysis(run, scan=scan)
            for name in there.data_vars:
                np.testing.assert_array_equal(
                    here[name].values, there[name].values, err_msg=f"{what}: {name}"
                )

    check(Scan(workers=2, pool="threads"), "threads")
    check(Scan(workers=2, pool="processes"), "processes")
    with open_pool(2) as pool:
        assert list(pool.map(abs, [-1])) == [(-1, 1)]
    with open_pool(2, "local") as pool:
        check(Scan(pool=pool), "Ray")
        with pytest.raises(RunError, match="block 3 is not to be read"):
            list(pool.map(make_faulty(tmp_path / "died"), range(5)))
        assert dict(pool.map(make_faulty(tmp_path / "died"), [4, 5, 6])) == {4: 16, 5: 25, 6: 36}
        assert (tmp_path / "died").exists()
