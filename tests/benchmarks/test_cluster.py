"""The simulated cluster: it scales until something shared is busy all the time, and begins from measured costs."""

from __future__ import annotations

import dataclasses

import pytest

from headwater.benchmarks import simulate_cluster
from headwater.benchmarks.registry import RESULTS
from headwater.benchmarks.simulate_cluster import Costs, limits, measured, simulate

COSTS = Costs(
    block_seconds=1.0,
    block_bytes=1e6,
    spread=0.0,
    driver_seconds=1e-4,
    entry_seconds=0.0,
    entries_per_second=1e4,
    node_bandwidth=1e9,
    store_bandwidth=1e10,
    gpus_per_node=8,
    mtbf_hours=0,
)


def test_workers_share_the_work_evenly():
    for n in (1, 4, 16):
        assert simulate(COSTS, n, 160)["seconds"] == pytest.approx(160 / n, rel=0.01)


@pytest.mark.parametrize(
    ("change", "part", "rate"),
    [
        ({"driver_seconds": 0.5}, "driver", 2),
        ({"entries_per_second": 2.0}, "ledger", 2),
        ({"store_bandwidth": 2e6}, "store", 2),
        ({"node_bandwidth": 2e6, "gpus_per_node": 64}, "network", 2),
    ],
)
def test_what_is_shared_limits_the_rate(change, part, rate):
    costs = dataclasses.replace(COSTS, **change)
    found = simulate(costs, 32, 200)
    assert found["seconds"] == pytest.approx(200 / rate, rel=0.05) and found[part] > 0.95
    assert min(limits(costs).values()) == pytest.approx(rate)


def test_a_worker_that_dies_loses_its_block_only():
    found = simulate(dataclasses.replace(COSTS, mtbf_hours=0.01), 8, 400, seed=1)
    assert found["lost"] > 3 and found["seconds"] >= (400 + found["lost"]) / 8


def test_costs_are_measured_ones_by_default(capsys):
    name, tokens_per_second, driver_seconds = measured(RESULTS)
    assert tokens_per_second > 0 and 0 < driver_seconds < 0.02
    assert simulate_cluster.main(["--workers", "2", "--blocks", "50"]) == 0
    assert "speed-up" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        simulate_cluster.main(["--help"])
    assert name in capsys.readouterr().out
