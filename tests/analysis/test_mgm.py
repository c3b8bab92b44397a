"""MGM, a trained GPT-2: its sinks, transition, cosines, CKA and spectra are the ones that are known."""

import numpy as np
import pytest

import headwater
from headwater.analysis.measures.cosine import cosine
from headwater.analysis.measures.sinks import sinks
from headwater.analysis.measures.svd import svd

pytestmark = pytest.mark.network
SHARE = [0.0478, 0.1343, 0.0953, 0.1748, 0.2544, 0.1095, 0.3480, 0.3707]
SECOND_HALF = [0.0354, 0.0608, 0.0570, 0.1039, 0.2036, 0.0502, 0.2782, 0.2893]
CONSECUTIVE = [0.0183, 0.9207, 0.9422, 0.9752, 0.9762, 0.9856, 0.9854, 0.9778]


@pytest.fixture(scope="module")
def run(mgm_model, tmp_path_factory):
    home = tmp_path_factory.mktemp("mgm")
    r = np.random.default_rng(0)
    ids = np.stack([np.r_[2, r.permutation(np.arange(5, 9669))[:255]] for _ in range(8)])
    np.save(home / "ids.npy", ids.astype(np.int32))
    sites = ("resid", "pattern", "attn_entropy", "attn_sink", "attn_distance", "attn_received")
    config = headwater.RunConfig(
        model=str(mgm_model),
        tokens=str(home / "ids.npy"),
        out=str(home / "run"),
        sites=sites,
        dtype="float32",
        block=4,
    )
    return headwater.extract(config)


@pytest.mark.parametrize("source", ["pattern", "statistics"])
def test_sinks(run, source):
    got = sinks(run, source=source)
    np.testing.assert_allclose(got.share_by_layer.sel(query_set="all"), SHARE, atol=6e-5)
    np.testing.assert_allclose(
        got.share_by_layer.sel(query_set="second_half"), SECOND_HALF, atol=6e-5
    )
    heads = got.first_token_share.sel(query_set="second_half").values
    strongest = np.argsort(heads.ravel())[::-1][:3]
    assert [divmod(int(i), 8) for i in strongest] == [(4, 7), (6, 1), (7, 1)]
    np.testing.assert_allclose(heads.ravel()[strongest], [0.959, 0.905, 0.758], atol=6e-4)
    assert got.l_in == 6 and np.isnan(got.l_out)
    assert got.l_in.transition == "steps" and got.l_in.r2_steps > got.l_in.r2_line


def test_cosines_and_cka(run):
    got = cosine(run)
    plain = got.isel(centring=0, positions=0, outliers=0)
    np.testing.assert_allclose(plain.consecutive, CONSECUTIVE, atol=6e-5)
    np.testing.assert_allclose(got.cka.sel(depth=1, other_depth=2), [0.74, 0.95], atol=6e-3)
    assert 165 in got.outlier_dimensions
    large = got.outlier_sequences.sel(outlier=got.outlier_dimensions == 165).squeeze()
    assert large.values.tolist() == [0] + [8] * 8
    contribution = got.anisotropy_contribution.isel(centring=0, outliers=0)
    np.testing.assert_allclose(
        contribution.sum("d_model"), got.anisotropy.isel(centring=0, outliers=0), 1e-12
    )


def test_spectrum(run):
    got = svd(run, at=[6], centrings=["centred"]).squeeze()
    for positions, sigma, ratio in (
        ("all", [4723.65, 1760.36, 1153.89, 1117.85], 2.49),
        ("without_first", [1776.62, 1162.5, 1117.86, 1079.51], 10.92),
    ):
        one = got.sel(positions=positions)
        np.testing.assert_allclose(one.singular_value[:4], sigma, atol=6e-3)
        np.testing.assert_allclose(one.participation_ratio, ratio, atol=6e-3)
    assert np.abs(got.direction.sel(positions="all")[0].values).argmax() == 165
