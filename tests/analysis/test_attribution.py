"""Direct logit attribution: the parts add up to the logit that the model gives, and are what they are said to be."""

import numpy as np
import pytest
import torch

from headwater.analysis.measures.attribution import attribution
from headwater.extractor.model.weights import load_checkpoint


@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
def test_the_parts_are_those_of_the_stored_stream(analysis_run, layout):
    run = analysis_run(layout)
    got = attribution(run, n_sequences=1000, n_positions=1000)
    t = {
        name: tensor.double().numpy()
        for name, tensor in load_checkpoint(run.manifest.model["name"]).tensors.items()
    }
    tokens, row_start = run.plain("tokens"), run.plain("row_start")
    at = np.arange(tokens.shape[1] - 1)
    there = (row_start[:, :-1] <= at) & (row_start[:, 1:] <= at)
    first = (row_start[:, :-1] == at)[there]
    assert got.n_tokens.values.tolist() == [there.sum(), (~first).sum()]
    x = run["resid"][:].astype(np.float64)[:, :, :-1][:, there]
    last = x[-1] - x[-1].mean(1, keepdims=True)
    scale = np.sqrt((last**2).mean(1, keepdims=True) + 1e-5)
    toward = t["wte.weight"][tokens[:, 1:][there]] - t["wte.weight"].mean(0)
    direction = toward * t["ln_f.weight"]
    direction = (direction - direction.mean(1, keepdims=True)) / scale

    def mean(values):
        part = (values * direction).sum(-1)
        return np.stack([part.mean(-1), part[..., ~first].mean(-1)])

    mlp = run["mlp_out"][:].astype(np.float64)[:, :, :-1][:, there]
    np.testing.assert_allclose(got.mlp, mean(mlp), 1e-4, 1e-5)
    z = run["z"][:].astype(np.float64)[:, :, :-1][:, there]
    n_layer, _, n_head, d_head = z.shape
    for layer in range(n_layer):
        w_o = t[f"h.{layer}.attn.c_proj.weight"].reshape(n_head, d_head, -1)
        head = np.einsum("nhd,hdm->hnm", z[layer], w_o)
        np.testing.assert_allclose(got.head_contribution[:, layer], mean(head), 1e-4, 1e-5)
    np.testing.assert_allclose(got.token_embedding + got.position_embedding, mean(x[0]), 1e-4, 1e-5)
    parts = got.head_contribution.sum(("layer", "head")) + (got.mlp + got.attn_bias).sum("layer")
    parts = parts + got.token_embedding + got.position_embedding + got.constant
    np.testing.assert_allclose(parts, got.logit, 1e-9)
    logits = (
        torch.from_numpy(last / scale * t["ln_f.weight"] + t["ln_f.bias"])
        @ torch.from_numpy(t["wte.weight"]).T
    )
    want = logits.gather(1, torch.from_numpy(tokens[:, 1:][there].astype(np.int64))[:, None])[
        :, 0
    ] - logits.mean(1)
    np.testing.assert_allclose(got.logit[0], want.mean(), 1e-4)
    np.testing.assert_allclose(got.logit_std[0], want.std(correction=0), 1e-4)
    assert got.closure < 1e-9


def test_bad_requests_say_what_is_wrong(analysis_run):
    with pytest.raises(ValueError, match="n_sequences, n_positions are 0"):
        attribution(analysis_run("plain"), n_sequences=0)
    with pytest.raises(ValueError, match="not those that"):
        attribution(analysis_run("plain"), "demo")
