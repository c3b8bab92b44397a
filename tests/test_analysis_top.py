"""Maximum-activating contexts against a sort of everything in memory."""

import numpy as np
import pytest

from headwater.analysis.engine import Scan
from headwater.analysis.top import top
from headwater.store.manifest import RunError


@pytest.mark.parametrize("layout, sign", [("plain", -1), ("packed", -1), ("padded", 1)])
def test_the_largest_values_and_their_contexts(analysis_run, layout, sign):
    run = analysis_run(layout)
    got = top(run, "mlp_post", [0, 5, 7], at=[1], k=6, sign=sign, reach=2)
    x, tokens, row_start = run["mlp_post"][1].astype(np.float64), run.tokens, run.plain("row_start")
    real = row_start <= np.arange(tokens.shape[1])
    for i, unit in enumerate((0, 5, 7)):
        places = sorted(np.argwhere(real).tolist(), key=lambda sp: (-sign * x[sp[0], sp[1], unit], *sp))[:6]
        for rank, (s, p) in enumerate(places):
            one = got.isel(unit=i, rank=rank, layer=0)
            assert (one.sequence, one.position, one.value) == (s, p, x[s, p, unit])
            assert one.token == tokens[s, p] == one.context.sel(offset=0)
            for offset in (-2, -1, 1, 2):
                q = p + offset
                same = 0 <= q < tokens.shape[1] and real[s, q] and row_start[s, q] == row_start[s, p]
                assert one.context.sel(offset=offset) == (tokens[s, q] if same else -1)
    assert ("context_text" in got) == (layout != "plain")
    if layout == "padded":
        assert got.identical(top(run, "mlp_post", [0, 5, 7], at=[1], k=6, reach=2, scan=Scan(2, "threads")))


def test_selected_positions_give_the_row_s_positions(analysis_run):
    last, padded = top(analysis_run("last"), "resid", [3], k=100, reach=0), analysis_run("padded")
    row_start = padded.plain("row_start")
    t = np.arange(row_start.shape[1])
    want = np.where(row_start <= t, t, 0).max(1)
    there = last.sequence[0, 0].values >= 0
    assert there.sum() == len(want) and (last.value[0, 0].values[~there] == -np.inf).all()
    np.testing.assert_array_equal(last.position[0, 0][there], want[last.sequence[0, 0][there]])
    found = padded["resid"][0][last.sequence[0, 0].values[there], last.position[0, 0].values[there], 3]
    np.testing.assert_allclose(last.value[0, 0][there], found, 1e-5)


def test_bad_requests_say_what_is_wrong(analysis_run):
    run = analysis_run("plain")
    for arguments, message in (({"units": [96]}, "0 to 95"), ({"k": 0}, "k, sign, reach"), ({"sign": 2}, "one of 1")):
        with pytest.raises(ValueError, match=message):
            top(run, "mlp_post", **arguments)
    with pytest.raises(RunError, match="site of vectors"):
        top(run, "pattern")
    with pytest.raises(RunError, match="was asked for"):
        top(run, "mlp_post", at=[9])
