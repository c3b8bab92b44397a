"""Weights decomposed: the thin SVD is the SVD, planted directions are found, tokens are the largest products."""

import numpy as np
import pytest
import torch

from headwater.analysis.weights.circuits import head_weights, thin_svd
from headwater.analysis.weights.directions import read_tokens, weights, weights_of


@pytest.fixture(scope="module")
def checkpoint(oracle):
    return oracle.checkpoint(oracle.gpt2(n_layer=3, n_head=3, n_embd=24))


def test_a_thin_svd_is_the_svd(checkpoint):
    got = weights_of(checkpoint, 8, 5)
    for layer in range(3):
        w_q, w_k, w_v, w_o = (w.numpy() for w in head_weights(checkpoint, layer))
        for head in range(3):
            for name, whole, left, right in (
                ("ov", w_v[head] @ w_o[head], "ov_read", "ov_write"),
                ("qk", w_q[head] @ w_k[head].T, "qk_query", "qk_key"),
            ):
                sigma = got[f"{name}_sigma"][layer, head].values
                np.testing.assert_allclose(sigma, np.linalg.svd(whole)[1][:8], 1e-10)
                u, v = got[left][layer, head].values, got[right][layer, head].values
                np.testing.assert_allclose(u.T * sigma @ v, whole, atol=1e-10)
                for side in (u, v):
                    np.testing.assert_allclose(side @ side.T, np.eye(8), atol=1e-10)
                assert (np.take_along_axis(v, np.abs(v).argmax(1)[:, None], 1) > 0).all()


def test_mlp_directions_are_those_of_the_matrices(checkpoint):
    got = weights_of(checkpoint, 24, 5)
    w_in = checkpoint.tensors["h.1.mlp.c_fc.weight"].double().numpy()
    gamma = checkpoint.tensors["h.1.ln_2.weight"].double().numpy()[:, None]
    w_out = checkpoint.tensors["h.1.mlp.c_proj.weight"].double().numpy()
    for fold, matrix in (("raw", w_in), ("folded", gamma * w_in)):
        v, sigma = (
            got.w_in.sel(fold=fold, layer=1).values,
            got.w_in_sigma.sel(fold=fold, layer=1).values,
        )
        np.testing.assert_allclose(v.T * sigma**2 @ v, matrix @ matrix.T, atol=1e-9)
    v, sigma = got.w_out[1].values, got.w_out_sigma[1].values
    np.testing.assert_allclose(v.T * sigma**2 @ v, w_out.T @ w_out, atol=1e-9)


def test_a_planted_direction_reads_as_its_tokens():
    rng = torch.Generator().manual_seed(0)
    embedding = torch.randn(50, 16, generator=rng, dtype=torch.float64)
    written, read = embedding[7] / embedding[7].norm(), embedding[3] / embedding[3].norm()
    left, right = (torch.randn(16, 4, generator=rng, dtype=torch.float64) / 99 for _ in (0, 1))
    left[:, 0], right[:, 0] = 5 * read, written
    u, sigma, v = thin_svd(left, right.T)
    assert sigma[0] > 10 * sigma[1]
    for direction, token in ((u[0], 3), (v[0], 7)):
        ids, values = read_tokens(direction, embedding, 3)
        assert token in (ids[0, 0], ids[1, 0])
        product = (embedding @ direction).numpy()
        np.testing.assert_allclose(
            values, [np.sort(product)[::-1][:3], np.sort(-product)[::-1][:3]], 1e-5
        )


def test_qk_correlation_is_over_all_pairs_of_tokens(checkpoint):
    got = weights_of(checkpoint, 2, 2).qk_correlation
    embedding = checkpoint.tensors["wte.weight"].double().numpy()
    w_q, w_k, *_ = (w.numpy() for w in head_weights(checkpoint, 2))
    scores = [(embedding @ q @ k.T @ embedding.T).ravel() for q, k in zip(w_q, w_k, strict=True)]
    np.testing.assert_allclose(got[2], np.corrcoef(scores), atol=1e-10)


def test_a_model_by_name_with_token_strings(tiny_gpt2):
    got = weights(str(tiny_gpt2), 3, 4)
    assert got.sizes["d_vocab"] == len(got.token_text) and " fo" in got.token_text.values
    assert got.ov_write_token.dims == ("sign", "layer", "head", "rank", "top")
    assert got.attrs["analysis"] == "weights" and got.attrs["model_digest"]
    with pytest.raises(ValueError, match="expected at least 1 each"):
        weights(str(tiny_gpt2), 0)


@pytest.mark.network
def test_mgm_has_its_massive_dimension_in_w_out(mgm_model):
    got = weights(str(mgm_model), 2, 3)
    assert got.sizes["layer"] == 8 and (np.diff(got.w_out_sigma) <= 1e-12).all()
    assert np.abs(got.w_out[1, 0].values).argmax() == 165
