"""Training dynamics: figures over checkpoints agree with the analyses of their runs and with planted values."""

import json

import numpy as np
import pytest
import xarray

import headwater
from headwater.analysis.measures.sinks import sinks
from headwater.analysis.measures.svd import svd
from headwater.analysis.studies.dynamics import SITES, dynamics, name_steps
from headwater.cli.entry import main

STEPS = (0, 20, 100)


@pytest.fixture(scope="module")
def training(tmp_path_factory, oracle):
    """Checkpoints of a pretended training: an activation of dimension 5 at position 0 grows."""
    import torch

    home = tmp_path_factory.mktemp("training")
    for step in STEPS:
        model = oracle.gpt2(n_head=2, n_embd=16, n_positions=32)
        with torch.no_grad():
            model.transformer.wpe.weight[0, 5] = -10.0 * step
        model.save_pretrained(home / f"step-{step}")
    np.save(home / "ids.npy", np.random.default_rng(0).integers(0, 31, (3, 32)).astype(np.int32))
    return home


def test_figures_are_those_of_every_checkpoints_run(training, tmp_path):
    models = {step: str(training / f"step-{step}") for step in STEPS}
    got = dynamics(models, tmp_path, tokens=str(training / "ids.npy"))
    assert got.step.values.tolist() == list(STEPS) and got.model.values.tolist() == list(
        models.values()
    )
    for step in STEPS:
        run, one = headwater.open_run(tmp_path / f"step-{step}"), got.sel(step=step)
        assert set(run.sites) == set(SITES)
        resid = np.stack([run["resid"][depth] for depth in range(3)])
        np.testing.assert_allclose(np.abs(one.largest), np.abs(resid).max((1, 2, 3)), 1e-6)
        np.testing.assert_allclose(one.largest_rest, np.abs(resid[:, :, 1:]).max((1, 2, 3)), 1e-6)
        for depth in range(3):
            place = (
                depth,
                one.largest_sequence[depth],
                one.largest_position[depth],
                one.largest_dimension[depth],
            )
            assert resid[tuple(int(i) for i in place)] == one.largest[depth]
        xarray.testing.assert_equal(
            one.first_token_share.drop_vars(["step", "model"]), sinks(run).first_token_share
        )
        np.testing.assert_array_equal(one.participation_ratio, svd(run).participation_ratio)
        np.testing.assert_allclose(one.loss, np.nanmean(run["loss"][...]), 1e-6)
    last = got.sel(step=100, depth=0)
    assert last.largest_dimension == 5 and last.largest_position == 0 and last.largest < -990
    assert last.largest_ratio > 100 and got.largest_ratio.sel(step=0, depth=0) < 20


def test_kept_runs_are_not_computed_again(training, tmp_path):
    for _ in range(2):
        dynamics({0: str(training / "step-0")}, tmp_path, tokens=str(training / "ids.npy"))
    assert len(list((tmp_path / "step-0/headwater/ledger").iterdir())) == 1


def test_command_prints_and_keeps_the_figures(training, tmp_path, capsys):
    names = [str(training / f"step-{step}") for step in reversed(STEPS)]
    out = tmp_path / "dynamics.zarr"
    request = ["dynamics", *names, "--tokens", str(training / "ids.npy")]
    assert main([*request, "--json", "--out", str(out)]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["step"] for row in rows] == list(STEPS)
    kept = xarray.open_zarr(out, chunks=None)
    assert rows[2]["largest"] == float(kept.largest.sel(step=100)[rows[2]["depth"]])
    assert main([*request, "--out", str(out)]) == 2 and "exists already" in capsys.readouterr().err
    assert main(request) == 0
    assert len(capsys.readouterr().out.splitlines()) == 5


def test_steps_come_from_names():
    assert name_steps(["run2/step-200", "5=a", "ckpt_1000.pt"]) == {
        5: "a",
        200: "run2/step-200",
        1000: "ckpt_1000.pt",
    }
    for names, what in (
        (["final"], "does not say which step"),
        (["a-1", "b-1"], "both step 1"),
        ([], "no checkpoint"),
    ):
        with pytest.raises(ValueError, match=what):
            name_steps(names)


def test_other_models_are_refused(training, tmp_path, oracle):
    oracle.gpt2(n_head=4, n_embd=16, n_positions=32).save_pretrained(tmp_path / "other-7")
    with pytest.raises(ValueError, match="step 7 has other model sizes"):
        dynamics(
            {0: str(training / "step-0"), 7: str(tmp_path / "other-7")},
            tokens=str(training / "ids.npy"),
        )
