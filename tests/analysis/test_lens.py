"""The logit lens against the model's own outputs and its definition in float64."""

import numpy as np
import pytest
import torch

import headwater
from headwater.analysis.engine.scan import Scan
from headwater.analysis.measures.lens import QUANTITIES, lens, lens_figures
from headwater.extractor.model.weights import load_checkpoint
from headwater.store.manifest import RunError


@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
def test_every_quantity_is_its_definition(analysis_run, layout):
    run = analysis_run(layout)
    got = lens(run, n_positions=1000, k=3)
    checkpoint = load_checkpoint(run.manifest.model["name"])
    t = {name: tensor.double() for name, tensor in checkpoint.tensors.items()}
    tokens, row_start = run.plain("tokens"), run.plain("row_start")
    at = np.arange(tokens.shape[1] - 1)
    there = (row_start[:, :-1] <= at) & (row_start[:, 1:] <= at)
    target = torch.from_numpy(tokens[:, 1:][there].astype(np.int64))
    first = (row_start[:, :-1] == at)[there]
    x = torch.from_numpy(run["resid"][:][:, :, :-1][:, there]).double()
    d = x.shape[-1]
    normed = torch.nn.functional.layer_norm(x, [d], t["ln_f.weight"], t["ln_f.bias"], 1e-5)
    log_p = (normed @ t["wte.weight"].T).log_softmax(-1)
    for depth, now in enumerate(log_p):
        own = now.gather(1, target[:, None])
        rank = (now > own).sum(1).double()
        tops = (
            [set(row.tolist()) for row in now.topk(3).indices],
            [set(r.tolist()) for r in log_p[-1].topk(3).indices],
        )
        want = {
            "kl": torch.nn.functional.kl_div(now, log_p[-1], log_target=True, reduction="none").sum(
                1
            ),
            "top1_agreement": (now.argmax(1) == log_p[-1].argmax(1)).double(),
            "top_k_agreement": torch.tensor(
                [len(a & b) / 3 for a, b in zip(*tops, strict=True)], dtype=torch.float64
            ),
            "entropy": torch.distributions.Categorical(logits=now).entropy(),
            "loss": -own[:, 0],
            "target_rank": rank,
            "target_reciprocal_rank": 1 / (rank + 1),
        }
        assert tuple(want) == QUANTITIES
        for name, values in want.items():
            for i, keep in enumerate((slice(None), ~first)):
                np.testing.assert_allclose(
                    got[name][i, depth], values[keep].mean(), 1e-4, 1e-6, err_msg=name
                )
    assert got.n_tokens.values.tolist() == [there.sum(), (~first).sum()]
    loss = run["loss"][:]
    np.testing.assert_allclose(got.loss[0, -1], loss[~np.isnan(loss)].mean(), 1e-4)
    assert got.identical(lens(run, n_positions=1000, k=3, scan=Scan(2, "threads")))


def test_a_uniform_depth_has_known_figures():
    uniform = np.full((2, 8), -np.log(8))
    final = np.log(np.full((2, 8), 0.3 / 7))
    final[:, 5] = np.log(0.7)
    got = dict(zip(QUANTITIES, lens_figures(uniform, final, np.array([5, 1]), 1), strict=True))
    entropy = -(0.7 * np.log(0.7) + 0.3 * np.log(0.3 / 7))
    np.testing.assert_allclose(got["kl"], np.log(8) - entropy)
    np.testing.assert_allclose(got["entropy"], np.log(8))
    assert got["target_rank"].tolist() == [0, 0]


def test_bad_requests_say_what_is_wrong(analysis_run):
    run = analysis_run("plain")
    with pytest.raises(ValueError, match="k is 0"):
        lens(run, k=0)
    with pytest.raises(ValueError, match="not those that"):
        lens(run, "demo")
    with pytest.raises(RunError, match="needs every position"):
        lens(analysis_run("0:5"))


@pytest.mark.network
def test_mgm_ends_at_its_loss(mgm_model, tmp_path):
    r = np.random.default_rng(0)
    ids = np.stack([np.r_[2, r.permutation(np.arange(5, 9669))[:255]] for _ in range(8)])
    np.save(tmp_path / "ids.npy", ids.astype(np.int32))
    config = headwater.RunConfig(
        model=str(mgm_model),
        tokens=str(tmp_path / "ids.npy"),
        out=str(tmp_path / "run"),
        sites=("resid",),
        depths="0,8",
        dtype="float32",
        block=8,
    )
    got = lens(headwater.extract(config), n_positions=256)
    np.testing.assert_allclose(got.loss[0, -1], 11.5278, atol=6e-5)
    np.testing.assert_allclose(got.kl[:, -1], 0, atol=1e-12)
    assert got.n_tokens[0] == 8 * 255 and got.kl[0, 0] > 1
