"""Every benchmark runs, small, and prints what it promises; memory stays within the plan's projection."""

from __future__ import annotations

import csv
import importlib.util

import numpy as np
import pytest

from headwater.benchmarks import __main__ as benchmarks
from headwater.benchmarks import bench_analysis, bench_extract, bench_start
from headwater.benchmarks.lib import measure
from headwater.benchmarks.registry import BENCHMARKS, load
from headwater.benchmarks.storage import bench_shard


def test_every_benchmark_explains_itself(capsys):
    assert benchmarks.main([]) == 0
    listed = capsys.readouterr().out
    for name in BENCHMARKS:
        assert name in listed
        with pytest.raises(SystemExit) as stop:
            load(name)(["--help"])
        assert stop.value.code == 0
        assert ("--save" in capsys.readouterr().out) == (name not in ("versions", "truth"))
    assert benchmarks.main(["no-such-benchmark"]) == 2


def test_extract_prints_ratios_and_memory_stays_within_projection(tmp_path):
    rows = {row["case"]: row for row in bench_extract.run("tiny", 128, 4, 1, tmp_path)}
    assert rows.keys() == {*bench_extract.FORWARDS, *bench_extract.VARIANTS}
    assert rows["loss"]["against"] == "transformers, head"
    for name, row in rows.items():
        assert row["x_transformers"] > 0 and row["x_plain"] > 0 and 0 < row["of_gemm_rate"] < 2
        if name in bench_extract.VARIANTS:
            assert 0 < row["peak_MB"] <= row["projected_MB"]


def test_start_measures_whole_processes(tmp_path, monkeypatch):
    real = bench_start.commands
    monkeypatch.setattr(
        bench_start, "commands", lambda at: {k: real(at)[k] for k in ("python", "headwater --help")}
    )
    rows = {row["case"]: row for row in bench_start.run(1, tmp_path)}
    assert 0 < rows["python"]["seconds"] <= rows["headwater --help"]["seconds"]
    assert rows["headwater --help"]["goal"] == 0.25
    assert bench_start.GOALS.keys() <= real(tmp_path).keys()


def test_analysis_measures_memory_speed_and_error(tmp_path):
    """In this process, so that the suite does not start ten; ratios are those of a tiny run and say nothing."""
    from headwater.benchmarks.lib.synthetic import make_run

    run = make_run(tmp_path, 12 * 8 * 64 * 32 * 2, 7, 32, 64)
    sigma, consecutive = bench_analysis.exact_sigma(run), bench_analysis.exact_consecutive(run)
    rows = run["resid"][4].reshape(-1, 32).astype(np.float64)
    np.testing.assert_allclose(sigma, np.linalg.svd(rows - rows.mean(0), compute_uv=False), 1e-9)
    for name, case in bench_analysis.CASES.items():
        module = next(
            (m for word, m in (("dask", "dask"), ("scikit", "sklearn")) if name.startswith(word)),
            "numpy",
        )
        if importlib.util.find_spec(module) is None:
            continue
        figures = case(run, 1, 256 << 20)
        assert bench_analysis.raw_of(name) in bench_analysis.CASES
        if "sigma" in figures:
            n, error = (
                (len(sigma), 1e-6) if module == "numpy" else (2, 1e-3)
            )  # the others' are approximate
            np.testing.assert_allclose(figures["sigma"][:n], sigma[:n], error)
        if "consecutive" in figures:
            np.testing.assert_allclose(figures["consecutive"], consecutive, 0, 1e-5)
    rows = bench_analysis.run(run.path, 1, 256 << 20, ["raw read", "norms"])
    assert [row["case"] for row in rows] == ["raw read", "norms"]
    assert rows[0]["of_raw_read"] == 1 and rows[0]["error"] == "" and float(rows[1]["error"]) < 1e-5
    assert 0 <= rows[1]["peak_MB"] + rows[1]["mapped_MB"] <= 256


def test_shard_compares_five_ways(tmp_path):
    rows = bench_shard.run(4, 1, tmp_path)
    assert len(rows) == 5 and all(row["MB_per_second"] > 0 for row in rows)


def test_results_carry_date_and_machine(tmp_path):
    path = measure.write_csv("x", [{"case": "a", "ratio": 1.5}], tmp_path)
    (row,) = csv.DictReader(path.open())
    assert row["ratio"] == "1.5" and row["processor"] and row["date"] in path.name
