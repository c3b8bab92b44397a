"""Spectra, directions and projections against numpy's SVD in float64."""

import numpy as np
import pytest

from headwater.analysis.engine.scan import Scan, analyse
from headwater.analysis.measures.project import read_directions
from headwater.analysis.measures.svd import (
    Scatter,
    SvdAnalysis,
    effective_rank,
    participation_ratio,
    spectrum,
    svd,
)
from headwater.store.manifest import RunError

VARIANTS = [(c, p) for c in ("raw", "centred") for p in ("all", "without_first")]


def rows_of(run, site, lead, positions, head=None):
    """Return the rows of one variant, float64 [n, D]."""
    row_start, t = run.plain("row_start"), np.arange(run.manifest.n_positions)
    keep = row_start <= t if positions == "all" else row_start < t
    values = run[site][lead].astype(np.float64)[keep]
    return values if head is None else values[:, head]


@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
def test_the_spectrum_is_that_of_the_stacked_rows(analysis_run, layout):
    run = analysis_run(layout)
    got = svd(run, k=4)
    for centring, positions in VARIANTS:
        for depth in run.leads("resid"):
            rows = rows_of(run, "resid", depth, positions)
            mean = rows.mean(0)
            _, sigma, v = np.linalg.svd(rows - mean * (centring == "centred"), full_matrices=False)
            one = got.sel(centring=centring, positions=positions, depth=depth)
            assert one.n_rows == len(rows)
            np.testing.assert_allclose(one.singular_value, sigma, 1e-9, 1e-7 * sigma[0])
            np.testing.assert_allclose(one["mean"], mean, 1e-10, 1e-12)
            np.testing.assert_allclose(np.abs((one.direction.values * v[:4]).sum(1)), 1, 1e-6)
            power = sigma**2
            np.testing.assert_allclose(
                one.participation_ratio, power.sum() ** 2 / (power**2).sum(), 1e-9
            )
            share = sigma / sigma.sum()
            np.testing.assert_allclose(
                one.effective_rank, np.exp(-(share * np.log(share)).sum()), 1e-7
            )
            largest = np.abs(one.direction.values).argmax(1)
            assert (one.direction.values[range(4), largest] > 0).all()


@pytest.mark.parametrize("site", ["z", "mlp_post", "resid_mid"])
def test_every_vector_site_has_a_spectrum(analysis_run, site):
    run = analysis_run("packed")
    got = svd(run, site, at=[1], k=2)
    assert got.attrs["analysis"] == f"svd_{site}"
    for head in range(2) if site == "z" else [None]:
        rows = rows_of(run, site, 1, "without_first", head)
        sigma = np.linalg.svd(rows - rows.mean(0), compute_uv=False)
        one = got.sel(centring="centred", positions="without_first", layer=1)
        one = one if head is None else one.isel(head=head)
        np.testing.assert_allclose(one.singular_value[: len(sigma)], sigma, 1e-9, 2e-7 * sigma[0])


def test_little_memory_means_more_passes_and_the_same_bits(analysis_run):
    run = analysis_run("plain")
    per = Scatter(run, "resid", [0]).nbytes
    seen = []
    whole = svd(run)
    narrow = svd(run, scan=Scan(memory=80_000_000, observe=lambda p: seen.append(p.passes)))
    assert set(seen) == {1}
    analysis = SvdAnalysis().prepare(run, per)
    assert analysis.passes == 4
    (split,) = analyse(run, [analysis])
    for name, value in whole.items():
        np.testing.assert_array_equal(value, narrow[name])
        np.testing.assert_array_equal(value, split[name])


def test_equal_eigenvalues_count_themselves():
    for r in (1, 3, 8):
        sigma = np.array([2.0] * r + [0.0] * (8 - r))
        assert participation_ratio(sigma) == pytest.approx(r)
        assert effective_rank(sigma) == pytest.approx(r)
    assert np.isnan(participation_ratio(np.zeros(3))) and np.isnan(effective_rank(np.zeros(3)))


def test_small_singular_values_survive_a_wide_spectrum():
    rng = np.random.default_rng(0)
    u, _ = np.linalg.qr(rng.normal(size=(400, 32)))
    v, _ = np.linalg.qr(rng.normal(size=(32, 32)))
    for decades, limit in ((3, 4e-10), (4, 3e-8)):
        sigma = np.logspace(0, -decades, 32)
        rows = u * sigma @ v
        got, _ = spectrum(rows.T @ rows, 1)
        assert np.abs(got / sigma - 1).max() < limit


def test_directions_read_through_the_unembedding(analysis_run, tiny_gpt2):
    from headwater.extractor.model.weights import load_checkpoint

    run = analysis_run("packed")
    directions = svd(run, k=3, centrings=["centred"], positions=["all"])
    got = read_directions(directions, str(tiny_gpt2), n=4, run=run).squeeze()
    w_u = load_checkpoint(str(tiny_gpt2)).tensors["wte.weight"].double().numpy()
    logits = directions.direction.values[0, 0] @ w_u.T
    order = np.argsort(logits, -1)
    np.testing.assert_array_equal(got.token[0], order[..., ::-1][..., :4])
    np.testing.assert_array_equal(got.token[1], order[..., :4])
    np.testing.assert_allclose(got.logit[1], np.sort(logits, -1)[..., :4], 1e-12)
    assert all(isinstance(text, str) for text in got.token_text.values.ravel())
    with pytest.raises(ValueError, match="is not the model of these directions"):
        read_directions(directions.assign_attrs(model_digest="x"), str(tiny_gpt2))


def test_bad_requests_say_what_is_wrong(analysis_run):
    run = analysis_run("plain")
    with pytest.raises(RunError, match=r"svd takes a site of vectors.*resid_norm"):
        svd(run, "resid_norm")
    with pytest.raises(RunError, match="no 'resid_post'"):
        svd(run, "resid_post")
    with pytest.raises(ValueError, match="7 is out of range; there are 4 depths"):
        svd(run, at=[7])
    with pytest.raises(ValueError, match="centrings is"):
        svd(run, centrings=["none"])
