"""MGM, a real trained GPT-2, through a run on disk: every figure that transformers gave for it in float64."""

import numpy as np
import pytest

import headwater

pytestmark = pytest.mark.network
N, T, N_LAYER, N_HEAD = 8, 256, 8, 8
LARGEST = [6.1, 240.0, 996.2, 1429.3, 1448.8, 1539.8, 1545.2, 1544.5, 1543.1]
MEDIAN = [0.122, 1.752, 2.096, 2.875, 3.590, 4.358, 5.075, 5.776, 6.068]
SHARE = [0.0478, 0.1343, 0.0953, 0.1748, 0.2544, 0.1095, 0.3480, 0.3707]
SECOND_HALF = [0.0354, 0.0608, 0.0570, 0.1039, 0.2036, 0.0502, 0.2782, 0.2893]
COSINE = [0.0183, 0.9207, 0.9422, 0.9752, 0.9762, 0.9856, 0.9854, 0.9778]
WRITTEN = {0: -232.8, 1: -752.2, 2: -428.3, 4: -81.4}
NEURONS = {1: {253: -293.9, 803: -201.0, 267: -137.9}, 2: {306: -152.6, 726: -145.9, 299: -124.3}}
DIMENSION = 165


@pytest.fixture(scope="module")
def run(mgm_model, tmp_path_factory):
    home = tmp_path_factory.mktemp("mgm")
    r = np.random.default_rng(0)
    np.save(
        home / "ids.npy",
        np.stack([np.r_[2, r.permutation(np.arange(5, 9669))[:255]] for _ in range(N)]),
    )
    sites = (
        "resid,attn_out,mlp_out,mlp_post,pattern,attn_sink,attn_received,attn_entropy,attn_max,attn_argmax,"
        "resid_norm,resid_cosine,resid_max,resid_argmax,loss"
    )
    return headwater.extract(
        headwater.RunConfig(
            model=str(mgm_model),
            tokens=str(home / "ids.npy"),
            out=str(home / "run"),
            sites=sites,
            dtype="float32",
            block=4,
        )
    )


def rounded(value, expected):
    """Check figures that are given with as many decimals as their text shows."""
    for got, want in zip(
        np.atleast_1d(value).tolist(), np.atleast_1d(expected).tolist(), strict=True
    ):
        decimals = len(str(want).partition(".")[2])
        assert abs(got - want) <= 0.5 * 10**-decimals + 2e-6 * abs(want), (value, expected)


def test_massive_activation(run):
    resid = np.abs(run["resid"][...])
    rounded(resid.max((1, 2, 3)), LARGEST)
    assert (run["resid_argmax"][1:, :, 0] == DIMENSION).all()
    assert (resid[1:, :, 0, DIMENSION] == run["resid_max"][1:].max(2)).all()
    order = np.argsort(resid[6:, :, 0].max(1), -1)[:, ::-1]
    assert (order[:, :3] == [DIMENSION, 214, 66]).all()
    largest = resid[1:, :, 0, DIMENSION]
    np.testing.assert_allclose(largest, largest[:, :1].repeat(N, 1), 1e-5)
    rounded(np.median(resid, (1, 2, 3)), MEDIAN)
    np.testing.assert_array_equal(resid.max(-1), run["resid_max"][...])


def test_largest_elsewhere(run):
    elsewhere = run["resid_max"][:, :, 1:].max((1, 2))
    rounded(elsewhere[[0, -1]], [1.9, 225.5])


def test_the_mlp_makes_it(run):
    mlp_out, attn_out = (run[name][:, :, 0, DIMENSION] for name in ("mlp_out", "attn_out"))
    for layer, value in WRITTEN.items():
        rounded(mlp_out[layer].mean(), value)
    assert (attn_out > -11.5).all() and (attn_out < 0).all()
    sums = run["resid"][1:, :, 0, DIMENSION] - run["resid"][:-1, :, 0, DIMENSION]
    np.testing.assert_allclose(attn_out + mlp_out, sums, atol=1e-3)


def test_the_neurons_that_write_it(run, mgm_model):
    from headwater.extractor.model.weights import load_checkpoint

    weights = load_checkpoint(str(mgm_model)).tensors
    for layer, neurons in NEURONS.items():
        column = weights[f"h.{layer}.mlp.c_proj.weight"][:, DIMENSION].double().numpy()
        written = (run["mlp_post"][layer, :, 0] * column).mean(0)
        assert np.argsort(written)[:3].tolist() == list(neurons)
        rounded(written[list(neurons)], list(neurons.values()))


def test_first_token_share(run):
    sink = run["attn_sink"][...]
    np.testing.assert_allclose(sink, run["pattern"][..., 0], atol=1e-6)
    rounded(sink.mean((1, 2, 3)), SHARE)
    rounded(sink[..., T // 2 :].mean((1, 2, 3)), SECOND_HALF)
    heads = sink[..., T // 2 :].mean((1, 3))
    strongest = np.argsort(heads.ravel())[::-1][:3]
    assert [divmod(int(i), N_HEAD) for i in strongest] == [(4, 7), (6, 1), (7, 1)]
    rounded(heads.ravel()[strongest], [0.959, 0.905, 0.758])


def test_statistics_are_those_of_the_pattern(run):
    for layer in range(N_LAYER):
        pattern = run["pattern"][layer].astype(np.float64)
        np.testing.assert_allclose(pattern.sum(-1), 1, atol=1e-5)
        np.testing.assert_allclose(run["attn_received"][layer], pattern.sum(-2), atol=1e-4)
        np.testing.assert_allclose(run["attn_max"][layer], pattern.max(-1), atol=1e-6)
        logs = np.log(pattern, where=pattern > 0, out=np.zeros_like(pattern))
        np.testing.assert_allclose(run["attn_entropy"][layer], -(pattern * logs).sum(-1), atol=1e-4)
        picked = np.take_along_axis(pattern, run["attn_argmax"][layer][..., None], -1)[..., 0]
        np.testing.assert_array_equal(picked, pattern.max(-1))


def test_cosine_of_consecutive_depths(run):
    cosine = run["resid_cosine"][...]
    assert np.isnan(cosine[0]).all()
    rounded(cosine[1:].mean((1, 2)), COSINE)


def test_loss(run):
    loss = run["loss"][...]
    assert np.isnan(loss[:, -1]).all() and np.isfinite(loss[:, :-1]).all()
    rounded(loss[:, :-1].mean(), 11.5278)


def test_every_site_agrees_with_transformers(run, mgm_model, oracle):
    from transformers import GPT2LMHeadModel

    model = GPT2LMHeadModel.from_pretrained(mgm_model).eval()
    tokens, row_start = run.tokens[:1], np.zeros((1, T), np.int32)
    _, got = oracle.capture(model, tokens, row_start)
    oracle.assert_sites(got, oracle.reference(model, tokens, row_start))
    np.testing.assert_array_equal(got["pattern"], run["pattern"][:, :1])
