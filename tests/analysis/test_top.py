"""Maximum-activating contexts against a sort of everything in memory."""

import numpy as np
import pytest

from headwater.analysis.engine.scan import Scan
from headwater.analysis.measures.svd import svd
from headwater.analysis.measures.top import top
from headwater.store.manifest import RunError


@pytest.mark.parametrize("layout, sign", [("plain", -1), ("packed", -1), ("padded", 1)])
def test_the_largest_values_and_their_contexts(analysis_run, layout, sign):
    run = analysis_run(layout)
    got = top(run, "mlp_post", [0, 5, 7], at=[1], k=6, sign=sign, reach=2)
    x, tokens, row_start = run["mlp_post"][1].astype(np.float64), run.tokens, run.plain("row_start")
    real = row_start <= np.arange(tokens.shape[1])
    for i, unit in enumerate((0, 5, 7)):
        places = sorted(
            np.argwhere(real).tolist(), key=lambda sp: (-sign * x[sp[0], sp[1], unit], *sp)
        )[:6]
        for rank, (s, p) in enumerate(places):
            one = got.isel(unit=i, rank=rank, layer=0)
            assert (one.sequence, one.position, one.value) == (s, p, x[s, p, unit])
            assert one.token == tokens[s, p] == one.context.sel(offset=0)
            for offset in (-2, -1, 1, 2):
                q = p + offset
                same = (
                    0 <= q < tokens.shape[1] and real[s, q] and row_start[s, q] == row_start[s, p]
                )
                assert one.context.sel(offset=offset) == (tokens[s, q] if same else -1)
    assert ("context_text" in got) == (layout != "plain")
    if layout == "padded":
        assert got.identical(
            top(run, "mlp_post", [0, 5, 7], at=[1], k=6, reach=2, scan=Scan(2, "threads"))
        )


def test_selected_positions_give_the_row_s_positions(analysis_run):
    last, padded = top(analysis_run("last"), "resid", [3], k=100, reach=0), analysis_run("padded")
    row_start = padded.plain("row_start")
    t = np.arange(row_start.shape[1])
    want = np.where(row_start <= t, t, 0).max(1)
    there = last.sequence[0, 0].values >= 0
    assert there.sum() == len(want) and (last.value[0, 0].values[~there] == -np.inf).all()
    np.testing.assert_array_equal(last.position[0, 0][there], want[last.sequence[0, 0][there]])
    found = padded["resid"][0][
        last.sequence[0, 0].values[there], last.position[0, 0].values[there], 3
    ]
    np.testing.assert_allclose(last.value[0, 0][there], found, 1e-5)


def test_bad_requests_say_what_is_wrong(analysis_run):
    run = analysis_run("plain")
    for arguments, message in (
        ({"units": [96]}, "0 to 95"),
        ({"k": 0}, "k, sign, reach"),
        ({"sign": 2}, "one of 1"),
    ):
        with pytest.raises(ValueError, match=message):
            top(run, "mlp_post", **arguments)
    with pytest.raises(RunError, match="site of vectors"):
        top(run, "resid_norm")
    with pytest.raises(ValueError, match="9 is out of range"):
        top(run, "mlp_post", at=[9])


@pytest.mark.parametrize("site", ["z", "pattern"])
def test_heads_are_ranked_by_norm_or_by_their_largest_other_weight(analysis_run, site):
    run = analysis_run("packed")
    got = top(run, site, [1], at=[0], k=7, reach=0).isel(layer=0, unit=0)
    row_start, t = run.plain("row_start"), np.arange(run.manifest.n_positions)
    real = row_start <= t
    if site == "z":
        value = np.linalg.norm(run["z"][0][:, :, 1].astype(np.float64), axis=-1)
    else:
        kept = (t > row_start[..., None]) & (t < t[:, None])
        weights = np.where(kept, run["pattern"][0][:, 1], 0)
        value = weights.max(-1)
    places = sorted(np.argwhere(real).tolist(), key=lambda sp: (-value[tuple(sp)], *sp))[:7]
    assert np.stack([got.sequence, got.position], 1).tolist() == places
    np.testing.assert_allclose(got["value"], [value[tuple(sp)] for sp in places], 1e-6)
    if site == "pattern":
        assert got.key.values.tolist() == [int(weights[tuple(sp)].argmax()) for sp in places]
        assert (got.key_token == run.tokens[got.sequence, got.key]).all() and all(
            map(str, got.key_text.values)
        )


def test_directions_are_ranked_by_projection(analysis_run):
    run = analysis_run("padded")
    directions = svd(run, "mlp_out", k=3)
    got = top(run, "mlp_out", [2], at=[1], k=4, directions=directions, reach=0)
    one = directions.sel(centring="centred", positions="without_first", layer=1)
    value = (run["mlp_out"][1].astype(np.float64) - one["mean"].values) @ one.direction.values[2]
    value[run.plain("row_start") > np.arange(run.manifest.n_positions)] = -np.inf
    np.testing.assert_allclose(got["value"][0, 0], np.sort(value.ravel())[::-1][:4], 1e-9)
    with pytest.raises(ValueError, match="expected an svd of resid"):
        top(run, "resid", directions=directions)


def test_the_units_that_stand_out_are_kept(analysis_run):
    run = analysis_run("plain")
    every, kept = top(run, "mlp_post", k=2, reach=0), top(run, "mlp_post", k=2, reach=0, keep=5)
    peak = every["value"][..., 0].values
    order = np.argsort(-(peak / np.median(np.abs(peak), 1, keepdims=True)).max(0))[:5]
    assert kept.unit.values.tolist() == sorted(order.tolist())
    np.testing.assert_array_equal(kept["value"], every["value"].sel(unit=kept.unit))
