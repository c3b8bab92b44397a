"""`headwater analyze` and `weights`: what they do, keep, use again, skip and refuse."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import xarray

from headwater.analysis.engine.analysis import ModelAnalysis
from headwater.analysis.engine.results import analysis_path, load
from headwater.analysis.measures.norms import Norms
from headwater.analysis.measures.sinks import sinks
from headwater.analysis.suite.analyze import analyze
from headwater.analysis.suite.registry import analyses, settings_of
from headwater.service.jobs.tasks import plan_analyze
from headwater.store.reader import open_run

MODEL_FREE = {"false_sinks", "attribution"}


@pytest.fixture(scope="module")
def run(analysis_run, tmp_path_factory):
    """A copy of the run of packed documents with every site, to keep results beside it."""
    path = tmp_path_factory.mktemp("analyze") / "run"
    shutil.copytree(analysis_run("packed").path, path)
    return path


def test_everything_is_done_kept_and_used_again(cli, run):
    first = json.loads(cli("analyze", run, "--json").out)[0]
    assert list(first["results"]) == list(analyses()) and first["skipped"] == {}
    for name, result in first["results"].items():
        assert result["figures"], name
        kept = xarray.open_zarr(result["path"], chunks=None)
        assert kept.attrs["fingerprint"] == open_run(run).manifest.fingerprint
        assert {"arguments", "conventions", "text", "versions"} <= set(kept.attrs), name
    before = {name: load(run, load_name(first, name)).attrs["request"] for name in first["results"]}
    again = cli("analyze", run)
    assert again.out.count("(kept from before)") == len(analyses()) and again.err == ""
    assert "(kept from before)" not in cli("analyze", run, "cka", "--again").out
    other = cli("analyze", run, "sinks", "--epsilon", "0.2").out
    assert other.count("(in place of a result of other settings") == 2
    changed = json.loads(cli("analyze", run, "sinks", "--epsilon", "0.1", "--json").out)[0]
    assert set(changed["results"]) == {"sinks", "false_sinks"}
    assert load(run, "sinks").attrs["request"] != before["sinks"]
    np.testing.assert_array_equal(load(run, "sinks").sink_rate, sinks(run, epsilon=0.1).sink_rate)


def load_name(outcome, name):
    return outcome["results"][name]["path"].rpartition("/")[2]


@pytest.mark.parametrize("flags", [["--workers", "2"], ["--memory", "110MB"]])
def test_workers_and_memory_change_no_bit(run, cli, flags):
    names = ("cosine", "svd", "massive")
    assert cli("analyze", run, *names).code == 0
    whole = {name: load(run, name).load() for name in names}
    assert cli("analyze", run, *names, "--again", *flags).code == 0
    for name in names:
        for variable, value in load(run, name).items():
            np.testing.assert_array_equal(value, whole[name][variable], f"{name}.{variable}")


def test_little_memory_reads_the_run_more_often(run, monkeypatch):
    from headwater.analysis.engine.scan import Scan

    whole = {
        name: result.load()
        for name, result in analyze(run, ["cosine", "massive"], again=True).results.items()
    }
    monkeypatch.setattr(
        "headwater.analysis.engine.scan.projected_bytes",
        lambda run, reducers, workers: len(reducers),
    )
    reads = {}
    for memory in (1, 2, 3):
        seen = []
        scan = Scan(memory=memory, observe=lambda p, seen=seen: seen.append(p.done))
        split = analyze(run, ["cosine", "massive"], scan=scan, again=True).results
        reads[memory] = seen.count(1)
        for name, result in whole.items():
            assert result.drop_attrs().identical(split[name].load().drop_attrs())
    assert reads[1] > reads[2] > reads[3]


def test_what_a_run_lacks_is_skipped_or_named(cli, analysis_run, tiny_gpt2, tiny_text, tmp_path):
    run = tmp_path / "statistics"
    flags = (
        "--model",
        tiny_gpt2,
        "--text",
        tiny_text,
        "--preset",
        "statistics",
        "--block",
        8,
        "--out",
        run,
    )
    assert cli("extract", *flags).code == 0
    done = json.loads(cli("analyze", run, "--json").out)[0]
    assert set(done["results"]) == {"sinks", "false_sinks", "attribution"}
    assert "Extract a run with --sites resid" in done["skipped"]["cosine"]
    cli("analyze", run, "sinks", "--source", "pattern").error(
        2, "sinks needs pattern", "--sites pattern"
    )
    refused = cli("analyze", run, "svd")
    refused.error(2, "svd needs resid or", "--sites resid")
    assert refused.err.count("resid or") == 1
    cli("analyze", run, "svd", "--site", "mlp_out").error(2, "svd needs mlp_out", "--sites mlp_out")
    half = tmp_path / "half"
    shutil.copytree(run, half)
    open_run(half).ledger.remove(0)
    cli("analyze", half, "sinks").error(2, "is not complete", "--partial")
    partial = json.loads(cli("analyze", half, "sinks", "--partial", "--json").out)[0]
    kept = xarray.open_zarr(partial["results"]["sinks"]["path"], chunks=None)
    assert (
        kept.attrs["partial"] == 1
        and kept.attrs["n_sequences"] < open_run(run).manifest.n_sequences
    )


def test_what_cannot_be_done_leaves_the_rest(cli, tiny_text, tmp_path):
    flags = ("--model", "demo", "--text", tiny_text, "--seq-len", 16, "--max-sequences", 4)
    what = ("--sites", "resid,pattern", "--depths", 3, "--layers", 2)
    assert cli("extract", *flags, *what, "--out", tmp_path / "run").code == 0
    answer = cli("analyze", tmp_path / "run", "--json")
    (done,) = json.loads(answer.out)
    assert answer.code == 0 and {"massive", "svd", "sinks", "top"} <= set(done["results"])
    for name in ("cosine", "norms", "cka"):
        assert "holds one depth of resid" in done["skipped"][name]
    assert len(done["results"]) + len(done["skipped"]) == len(analyses())
    cli("analyze", tmp_path / "run", "sinks", "cka").error(2, "holds one depth of resid; cka")
    assert cli("report", tmp_path / "run").code == 0
    price = plan_analyze({"run": tmp_path / "run", "analyses": [], "options": {}}, print)
    assert price["passes"] == 1


def test_an_analysis_that_fails_leaves_the_others(cli, analysis_run, tmp_path, monkeypatch):
    path = tmp_path / "run"
    shutil.copytree(analysis_run("packed").path, path)

    def fail(self, state, chunk):
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(Norms, "update", fail)
    answer = cli("analyze", path, "--json")
    (done,) = json.loads(answer.out)
    assert answer.code == 1 and set(done["results"]) == set(analyses()) - {"norms"}
    assert done["skipped"]["norms"].startswith("unexpected ZeroDivisionError: by zero. This is a")
    cli("analyze", path, "norms", "cosine", "--again").error(1, "unexpected ZeroDivisionError")
    monkeypatch.undo()
    assert cli("analyze", path, "norms").code == 0


@pytest.mark.parametrize(
    ("asked", "layers"), [("-1", [1]), (":1", [0]), ("0,1:", [0, 1]), ("1,0", [0, 1])]
)
def test_lists_of_indices_are_written_alike_everywhere(cli, run, asked, layers):
    done = cli("analyze", run, "sinks", "svd", "top", "--layers", asked, "--at", asked)
    assert done.code == 0, done.err
    assert load(run, "sinks").layer.values.tolist() == layers
    depths = {"-1": [2], "0,1:": [0, 1, 2]}.get(asked, layers)
    assert load(run, "svd").depth.values.tolist() == depths
    got = sinks(run, layers=asked)
    assert got.layer.values.tolist() == sinks(run, layers=layers).layer.values.tolist() == layers


def test_wrong_requests_are_refused_before_anything_is_read(cli, run, tmp_path):
    cli("analyze", run, "cosines").error(2, "'cosines' is neither a run nor an analysis", "cosine")
    cli("analyze", "sinks").error(2, "no run is named")
    cli("analyze", tmp_path / "nothing").error(2, "there is no run at")
    cli("analyze", run, "sinks", "--epsilon", "x").error(2, "--epsilon is 'x'", "such as 0.3")
    cli("analyze", run, "sinks", "--memory", "big").error(2, "--memory is 'big'", "such as 2GB")
    cli("analyze", run, "sinks", "--workers", "0").error(2, "--workers is '0'")
    cli("analyze", run, "sinks", "--units", "3").error(2, "sinks takes no --units; it is for top.")
    cli("analyze", run, "cosine", "--at", "1").error(2, "cosine takes no --at; it is for svd, top.")
    cli("analyze", run, "cosine", "--site", "resid").error(2, "takes no --site; it is for")
    cli("analyze", run, "svd", "--at", "7").error(
        2, "--at '7': 7 is out of range; there are 3 depths"
    )
    cli("analyze", run, "svd", "--at", "2:1").error(2, "'2:1' selects nothing")
    cli("analyze", run, "heads", "--memory", "1MB", "--again").error(
        2, "needs", "the limit is 1 MB"
    )
    cli("analyze", run, "lens", "--model", "demo").error(
        2, "the weights of demo are not those that"
    )


def test_every_entry_describes_itself():
    known = analyses()
    for name, kind in known.items():
        assert kind.title and kind.section and kind.__doc__, name
        assert set(kind.brings) <= set(known), name
        assert all(option.help for option in settings_of(kind)), name
        if issubclass(kind, ModelAnalysis):
            assert kind.after in ("", *known), name


def test_weights_are_kept_where_one_asks(cli, tiny_gpt2, tmp_path):
    done = json.loads(
        cli("weights", "--model", tiny_gpt2, "--directions", 2, "--out", tmp_path, "--json").out
    )
    kept = xarray.open_zarr(done[0]["path"], chunks=None)
    text = tmp_path / "fox.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 30)
    flags = ("--model", tiny_gpt2, "--directions", 2, "--corpus", text, "--out", tmp_path, "--json")
    scored = json.loads(cli("weights", *flags).out)
    assert scored[1]["path"].endswith(".coherence") and "w_out_coherent" in scored[1]["figures"]
    assert kept.ov_write.shape == (2, 2, 2, 16) and done[0]["figures"]["w_out_sigma_1"]
    cli("weights", "--model", tmp_path / "none").error(2, "none")


def test_an_interrupted_analysis_says_how_to_go_on(cli, run, monkeypatch):
    def stop(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr("headwater.analysis.suite.analyze.analyse", stop)
    answer = cli("analyze", run, "massive", "--again")
    assert answer.code == 130 and "run the same command again to go on" in answer.err


def test_top_and_svd_of_a_site_lie_beside_those_of_others(cli, run):
    assert (
        cli("analyze", run, "svd", "top", "--site", "mlp_out", "--k", "3", "--directions").code == 2
    )
    assert cli("analyze", run, "svd", "--site", "mlp_out", "--k", "3").code == 0
    done = cli("analyze", run, "top", "--site", "mlp_out", "--directions", "--k", "2")
    assert done.code == 0 and analysis_path(run, "top_mlp_out_directions").is_dir()
    assert load(run, "top_mlp_out_directions").sizes["unit"] == 3
