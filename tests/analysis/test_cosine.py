"""Cosines, block influence, norms, anisotropy and CKA against their definitions in float64."""

import numpy as np
import pytest

from headwater.analysis.engine.moments import add_rows, merge_mean, merge_scatter, with_room
from headwater.analysis.engine.scan import Scan, analyse
from headwater.analysis.measures.cka import CkaAnalysis, CrossScatter
from headwater.analysis.measures.cosine import cosine
from headwater.analysis.measures.cosine_passes import Centres, Pairs, large_dimensions, median
from headwater.store.manifest import RunError

LAYOUTS = ("plain", "packed", "padded")


def tokens_of(run):
    """Return the residual stream at real positions, float64 [depth, n, D], and which of them are first."""
    row_start, t = run.plain("row_start"), np.arange(run.manifest.n_positions)
    real = row_start <= t
    return run["resid"][:].astype(np.float64)[:, real], (row_start == t)[real]


def direct(x, first, centred, without_first, outliers):
    """Compute a variant by its definition: mean cosines [L, L], unit vectors [L, n, D]."""
    x = x[:, ~first] if without_first else x
    x = x - x.mean(1, keepdims=True) if centred else x.copy()
    x[..., outliers] = 0
    u = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return np.einsum("ind,jnd->ij", u, u, optimize=True) / x.shape[1], u


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_variant_is_its_definition(analysis_run, layout):
    run = analysis_run(layout)
    x, first = tokens_of(run)
    got = cosine(run, outliers=[3, 5], cka=None)
    assert got.outlier_dimensions.values.tolist() == [3, 5]
    for c, p, o in np.ndindex(2, 2, 2):
        mean, u = direct(x, first, c, p, [3, 5] if o else [])
        n = u.shape[1]
        at = {"centring": c, "positions": p, "outliers": o}
        np.testing.assert_allclose(got.cosine.isel(at), mean, 1e-10, 1e-12)
        np.testing.assert_allclose(got.consecutive.isel(at), np.diagonal(mean, 1), 1e-10, 1e-12)
        np.testing.assert_allclose(
            got.block_influence.isel(at), 1 - np.diagonal(mean, 1), 1e-10, 1e-12
        )
        assert (got.n_tokens.isel(at) == n).all()
        pairs = u @ u.transpose(0, 2, 1)
        anisotropy = (pairs.sum((1, 2)) - n) / (n * (n - 1))
        np.testing.assert_allclose(got.anisotropy.isel(at), anisotropy, 1e-9, 1e-12)
        parts = (u.sum(1) ** 2 - (u**2).sum(1)) / (n * (n - 1))
        np.testing.assert_allclose(got.anisotropy_contribution.isel(at), parts, 1e-9, 1e-12)
    np.testing.assert_allclose(
        got.anisotropy_contribution.sum("d_model"), got.anisotropy, 1e-9, 1e-12
    )
    for p, chosen in enumerate((x, x[:, ~first])):
        norm = np.linalg.norm(chosen, axis=-1)
        np.testing.assert_allclose(got.norm[p], norm.mean(1), 1e-12)
        np.testing.assert_allclose(got.norm_rms[p], np.sqrt((norm**2).mean(1)), 1e-12)
        np.testing.assert_allclose(
            got.norm_growth[p], np.exp(np.log(norm[1:] / norm[:-1]).mean(1)), 1e-12
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("state_bytes", [1 << 20, 40_000])
def test_cka_is_its_definition_in_any_number_of_passes(analysis_run, layout, state_bytes):
    run = analysis_run(layout)
    x, first = tokens_of(run)
    analysis = CkaAnalysis("all").prepare(run, state_bytes)
    assert analysis.passes == 1 or state_bytes == 40_000
    (got,) = analyse(run, [analysis])
    for p, chosen in enumerate((x, x[:, ~first])):
        y = chosen - chosen.mean(1, keepdims=True)
        cross = np.array([[np.linalg.norm(a.T @ b) ** 2 for b in y] for a in y])
        own = np.sqrt(np.diagonal(cross))
        np.testing.assert_allclose(got.cka[p], cross / np.outer(own, own), 1e-9)


def test_selected_positions_are_the_same_tokens(analysis_run):
    padded = analysis_run("padded")
    row_start, t = padded.plain("row_start"), np.arange(padded.manifest.n_positions)
    last = np.where(row_start <= t, t, -1).max(1)
    for layout, keep in (("0:5", (row_start <= t) & (t < 5)), ("last", t == last[:, None])):
        x, first = padded["resid"][:].astype(np.float64)[:, keep], (row_start == t)[keep]
        assert layout == "last" or first.any()
        got = cosine(analysis_run(layout), outliers=[], cka=None)
        for p in (0, 1):
            mean, u = direct(x, first, 0, p, [])
            np.testing.assert_allclose(got.cosine[0, p, 0], mean, 1e-5)
            assert (got.n_tokens[0, p, 0] == u.shape[1]).all()


def test_cka_takes_the_pairs_it_is_asked_for(analysis_run):
    run = analysis_run("plain")
    every = cosine(run, cka="all").cka.values
    some = cosine(run, cka=[(0, 3)]).cka.values
    assert np.isnan(some).sum() == 2 * (16 - 4)
    np.testing.assert_allclose(some[:, 0, 3], every[:, 0, 3], 1e-12)
    consecutive = cosine(run).cka.values
    assert (np.isnan(consecutive) == (np.abs(np.subtract.outer(range(4), range(4))) > 1)).all()
    with pytest.raises(RunError, match="depth 9 was asked for"):
        cosine(run, cka=[(0, 9)])
    with pytest.raises(ValueError, match="cka is 'some'"):
        cosine(run, cka="some")


class Memory:
    """A chunk out of memory: resid [L, S, P, D], every row beginning at position 0."""

    def __init__(self, resid):
        self.resid, self.lead = resid, 0
        real = np.ones(resid.shape[1:3], bool)
        self.masks = type(
            "Text", (), {"real": real, "first": real & (np.arange(resid.shape[2]) == 0)}
        )

    def text(self, site):
        return self.masks

    def __getitem__(self, site):
        return self.resid[self.lead]

    def rows(self, site, lead, keep):
        return self.resid[lead][keep]


def fake_run(shape):
    spec = type("Array", (), {"shape": shape, "dims": ("depth", "sequence", "position", "d_model")})
    manifest = type("Manifest", (), {"n_positions": shape[2]})
    return type("Run", (), {"__getitem__": lambda self, name: spec, "manifest": manifest})()


def test_a_rotation_and_a_scale_leave_cka_at_one():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 20, 8)) * rng.uniform(0.1, 9, 8)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    resid = np.stack([x, 3 * x @ rotation + 5])
    reducer = CrossScatter(fake_run(resid.shape), "resid", [(0, 0), (0, 1), (1, 1)])
    state = reducer.zero()
    reducer.update(state, Memory(resid))
    norms = reducer.finalise(state)
    np.testing.assert_allclose(norms[0, 1] ** 2 / norms[0, 0] / norms[1, 1], 1, 1e-12)


def test_dimensions_that_are_large_are_found_by_sequence_and_depth():
    rng = np.random.default_rng(1)
    resid = rng.normal(size=(2, 4, 10, 6)).astype(np.float32)
    resid[1, 2, 0, 5] = 101 * np.median(np.abs(np.delete(resid[1, 2].ravel(), 5)))
    resid[0, 1, 3, 2] = 90 * np.median(np.abs(resid[0, 1]))
    reducer = Centres(fake_run(resid.shape), [0, 1], True)
    state = reducer.zero()
    for lead in (0, 1):
        chunk = Memory(resid)
        chunk.lead = lead
        reducer.update(state, chunk)
    assert np.argwhere(state["large"]).tolist() == [[1, 5]]
    assert large_dimensions(np.zeros((3, 2))) == []


def test_large_is_against_the_median_of_all_values():
    rng = np.random.default_rng(4)
    for n in (1, 2, 5, 6):
        for scale in (1, 3, 30, 300):
            size = np.abs(rng.normal(size=(n, 3)) * [1, 1, scale]).round(1)
            assert median(size) == np.median(size)
            want = np.flatnonzero((size.max(0) >= 10 * np.median(size)) & (np.median(size) > 0))
            assert np.median(size) == 0 or sorted(large_dimensions(size, 10)) == want.tolist()


def test_equal_vectors_have_cosine_one_and_no_centred_cosine():
    resid = np.full((3, 2, 7, 4), 2.5)
    centre = np.full((2, 3, 4), 2.5)
    reducer = Pairs(range(3), centre, np.array([1]))
    state = reducer.zero()
    reducer.update(state, Memory(resid))
    np.testing.assert_allclose(state["cosine"][0] / state["n_pair"][0], 1, 1e-14)
    assert not state["n_pair"][1].any() and not state["cosine"][1].any()


def test_merged_moments_are_those_of_all_rows_whatever_the_offset():
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(300, 5)) + 1e6
    n, mean, scatter = np.zeros(()), np.zeros(5), np.zeros((5, 5))
    add_rows(n, mean, scatter, with_room(rows[:7]))
    n_b, mean_b, scatter_b = np.zeros(()), np.zeros(5), np.zeros((5, 5))
    for at in range(7, 300, 50):
        add_rows(n_b, mean_b, scatter_b, with_room(rows[at : at + 50]))
    step = mean_b - mean
    merge_scatter(scatter, scatter_b, float(n), float(n_b), step, step)
    merge_mean(n, mean, n_b, mean_b)
    centred = rows - rows.mean(0)
    assert n == 300
    np.testing.assert_allclose(mean, rows.mean(0), 1e-15)
    np.testing.assert_allclose(scatter, centred.T @ centred, 1e-8, 1e-8)


def test_bad_requests_say_what_is_wrong(analysis_run):
    with pytest.raises(ValueError, match="--outliers 'big'"):
        cosine(analysis_run("plain"), outliers="big")
    with pytest.raises(ValueError, match="0 to 23"):
        cosine(analysis_run("plain"), outliers=[24])
    with pytest.raises(ValueError, match="memory"):
        cosine(analysis_run("plain"), scan=Scan(memory=1000))
