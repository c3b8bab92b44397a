"""Massive activations: found by their definition, and split into exact sums."""

from itertools import pairwise

import numpy as np
import pytest
import xarray

import headwater
from headwater.analysis.engine import results
from headwater.analysis.engine.scan import Scan
from headwater.analysis.measures.massive import Massive, massive, massive_dimensions
from headwater.analysis.measures.origin import Event, massive_events, massive_origin
from headwater.analysis.suite.registry import summarise


class Memory:
    """A chunk out of memory: resid [L, S, P, D]; the first row begins at position 2."""

    def __init__(self, resid, first=0):
        self.resid, self.lead, self.first = resid, 0, first
        at = np.arange(resid.shape[2])
        start = np.where(np.arange(resid.shape[1]) + first == 0, 2, 0)[:, None]
        self.masks = type("Text", (), {"real": at >= start, "first": at == start})

    def text(self, site):
        return self.masks

    def __getitem__(self, site):
        return self.resid[self.lead]


def fake_run(shape):
    spec = type("Array", (), {"shape": shape})
    manifest = type("Manifest", (), {"n_positions": shape[2]})
    return type("Run", (), {"__getitem__": lambda self, name: spec, "manifest": manifest})()


def reduce(resid, cuts):
    reducer = Massive(fake_run(resid.shape), "resid", range(len(resid)))
    whole = reducer.zero()
    for low, high in pairwise(cuts):
        state, chunk = reducer.zero(), Memory(resid[:, low:high], low)
        for chunk.lead in range(len(resid)):
            reducer.update(state, chunk)
        whole = reducer.merge(whole, state)
    return whole


def test_planted_activations_are_found_at_their_level():
    rng = np.random.default_rng(0)
    resid = rng.normal(size=(2, 4, 10, 6)).astype(np.float32)
    resid[:, 0, :2] = np.nan
    typical = np.median(np.abs(resid[1, 2]))
    resid[1, 2, 0, 5] = -1100 * typical
    resid[1, 3, 7, 4] = 150.0
    resid[0, 1, 0, 3] = 80.0 * np.median(np.abs(resid[0, 1]))
    resid[0, 0, 2, 1] = 120.0
    got = reduce(resid, [0, 4])
    assert np.argwhere(got["sequences"]).tolist() == [[0, 0, 1], [0, 1, 4], [0, 1, 5], [1, 1, 5]]
    assert np.argwhere(got["n_by_position"]).tolist() == [
        [0, 0, 2],
        [0, 1, 0],
        [0, 1, 7],
        [1, 1, 0],
    ]
    assert got["n_massive"].tolist() == [[[1, 1], [0, 1]], [[0, 1], [0, 0]]]
    real = np.where(np.isnan(resid), 0, resid)
    for lead in (0, 1):
        for s in range(4):
            rows = resid[lead, s][2:] if s == 0 else resid[lead, s]
            assert got["median"][lead] > 0 and np.median(np.abs(rows)) > 0
        first = np.stack([real[lead, s, 2 if s == 0 else 0] for s in range(4)])
        place = np.abs(first).argmax(0)
        np.testing.assert_array_equal(got["sequence"][0, lead], place)
        np.testing.assert_array_equal(got["peak"][0, lead], first[place, np.arange(6)])
        np.testing.assert_array_equal(got["position"][0, lead], np.where(place == 0, 2, 0))
    np.testing.assert_allclose(got["peak_ratio"][0, 1, 5], 1100, 2e-2)
    for cuts in ([0, 1, 2, 4], [0, 3, 4]):
        other = reduce(resid, cuts)
        for name, value in got.items():
            np.testing.assert_allclose(other[name], value, 1e-15, err_msg=name)


def test_a_silent_sequence_has_none():
    got = reduce(np.zeros((1, 2, 3, 4), np.float32), [0, 2])
    assert not got["sequences"].any() and got["sequence"].tolist() == [[[0] * 4], [[1] * 4]]


@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
def test_peaks_are_those_of_the_residual(analysis_run, layout, tmp_path):
    run = analysis_run(layout)
    got = massive(run)
    x, row_start, t = (
        run["resid"][:].astype(np.float64),
        run.plain("row_start"),
        np.arange(run.manifest.n_positions),
    )
    for part, keep in enumerate((row_start == t, row_start < t)):
        kept = x[:, keep]
        np.testing.assert_allclose(np.abs(got.peak[part]), np.abs(kept).max(1))
        np.testing.assert_allclose(got.max_size[part], np.abs(kept).max((1, 2)))
        s, p = got.peak_sequence[part].values, got.peak_position[part].values
        depth, d = np.indices(s.shape)
        assert keep[s, p].all() and (x[depth, s, p, d] == got.peak[part].values).all()
        middle = np.array(
            [
                [np.median(np.abs(one[b][row_start[b] <= t])) for b in range(len(row_start))]
                for one in x
            ]
        )
        np.testing.assert_allclose(
            got.peak_ratio[part], np.abs(got.peak[part]) / middle[depth, s], 1e-6
        )
    assert np.isnan(got.born).all() and not massive_dimensions(got)
    assert got.attrs["fingerprint"] == run.manifest.fingerprint
    threads = massive(run, scan=Scan(workers=2, pool="threads"))
    assert got.identical(threads)


@pytest.mark.parametrize("layout", ["plain", "packed", "padded"])
def test_contributions_add_up_to_the_residual(analysis_run, layout):
    run = analysis_run(layout)
    row_start = run.plain("row_start")
    real = np.argwhere(row_start <= np.arange(row_start.shape[1]))
    events = [
        Event(d, int(s), int(p))
        for d, (s, p) in zip((3, 0, 15), real[[0, len(real) // 2, -1]], strict=True)
    ]
    got = massive_origin(run, events=events, n_neurons=4)
    assert (got.stored_error < 1e-4).all() and (got.closure < 1e-10).all()
    total = got.token_embedding + got.position_embedding + (got.attn_out + got.mlp_out).sum("layer")
    np.testing.assert_allclose(total, got.resid.isel(depth=-1), 1e-10)
    np.testing.assert_allclose(got.head_out.sum("head") + got.attn_bias, got.attn_out, 1e-9, 1e-12)
    neurons = got.neuron_contribution.sum("rank") + got.neuron_rest + got.mlp_bias
    np.testing.assert_allclose(neurons, got.mlp_out, 1e-9, 1e-12)
    np.testing.assert_allclose(
        got.neuron_activation * got.neuron_weight, got.neuron_contribution, 1e-12
    )
    assert (np.diff(np.abs(got.neuron_contribution)) <= 0).all()
    inside = [e.position - row_start[e.sequence, e.position] for e in events]
    assert got.text_position.values.tolist() == inside
    e = events[1]
    for i in range(got.sizes["layer"]):
        stored = run["mlp_out"][i, e.sequence, e.position][e.dimension]
        np.testing.assert_allclose(got.mlp_out[1, i], stored, 1e-3, 1e-5)


def test_the_largest_neuron_is_that_of_all_layers():
    """It need not lie in the layer of the largest MLP, whose neurons may cancel or be many."""
    layers = np.array([[[9.0, 1.0], [2.0, 2.0]]])
    data = {
        "mlp_out": (("event", "layer"), np.array([[1.0, -5.0]])),
        "neuron": (("event", "layer", "rank"), np.array([[[7, 3], [4, 5]]])),
        "neuron_contribution": (("event", "layer", "rank"), layers),
    }
    places = {name: ("event", [0]) for name in ("dimension", "position", "text_position")}
    found = summarise("massive_origin", xarray.Dataset(data, places))
    assert found["largest_mlp"] == "layer 1: -5.0" and found["largest_neuron"] == "L0N7: 9.0"


def test_bad_requests_say_what_is_wrong(analysis_run):
    run = analysis_run("plain")
    with pytest.raises(ValueError, match=r"no activation of .* is massive"):
        massive_origin(run, massive(run), level="large")
    with pytest.raises(ValueError, match="level is 'huge'"):
        massive_origin(run, massive(run), level="huge")
    result = massive(run)
    (event,) = massive_events(run, result, "largest")
    assert massive_origin(run, result).dimension == event.dimension
    largest = np.abs(run["resid"][:, event.sequence, event.position]).max()
    assert largest == result.max_size.max() and not massive_dimensions(result)
    for event, message in (
        (Event(0, 99, 0), "outside the run"),
        (Event(99, 0, 0), "dimensions 0 to 23"),
    ):
        with pytest.raises(ValueError, match=message):
            massive_origin(run, events=[event])
    with pytest.raises(ValueError, match="not those that"):
        massive_origin(run, model="demo", events=[Event(0, 0, 0)])
    with pytest.raises(ValueError, match="takes a site of vectors"):
        massive(run, "pattern")


@pytest.mark.network
def test_mgm_makes_its_massive_dimension_in_known_mlps(mgm_model, tmp_path):
    r = np.random.default_rng(0)
    ids = np.stack([np.r_[2, r.permutation(np.arange(5, 9669))[:255]] for _ in range(8)])
    np.save(tmp_path / "ids.npy", ids.astype(np.int32))
    config = headwater.RunConfig(
        model=str(mgm_model),
        tokens=str(tmp_path / "ids.npy"),
        out=str(tmp_path / "run"),
        sites=("resid",),
        dtype="float32",
        block=4,
    )
    run = headwater.extract(config)
    got = massive(run)
    size = [6.1, 240.0, 996.2, 1429.3, 1448.8, 1539.8, 1545.2, 1544.5, 1543.1]
    np.testing.assert_allclose(got.max_size.max("positions"), size, atol=0.06)
    assert (got.max_dimension.sel(positions="first")[1:] == 165).all()
    rest = got.max_size.sel(positions="rest")
    np.testing.assert_allclose([rest.min(), rest.max()], [1.9, 225.5], atol=0.06)
    median = [0.122, 1.752, 2.096, 2.875, 3.590, 4.358, 5.075, 5.776, 6.068]
    np.testing.assert_allclose(got["median"], median, atol=6e-3)
    assert not got.sequences.sel(level="strict").any() and massive_dimensions(got)[0] == 165
    assert got.sequences.sel(level="large")[:, 165].values.tolist() == [0] + [8] * 8
    assert (got.born.sel(level="large")[165], got.died.sel(level="large")[165]) == (1, 8)
    np.testing.assert_allclose((got.max_size.max("positions") / got["median"]).max(), 497, atol=1)
    results.save(run, got)
    event = massive_events(run, got)[0]
    assert (event.dimension, event.position) == (165, 0)
    origin = massive_origin(run, results.load(run, "massive")).isel(event=0)
    np.testing.assert_allclose(
        origin.mlp_out[[0, 1, 2, 4]], [-232.8, -752.2, -428.3, -81.4], atol=0.06
    )
    assert ((origin.attn_out > -11.5) & (origin.attn_out < -1.5)).all()
    for layer, neurons, parts in (
        (1, [253, 803, 267], [-293.9, -201.0, -137.9]),
        (2, [306, 726, 299], [-152.6, -145.9, -124.3]),
    ):
        assert origin.neuron[layer, :3].values.tolist() == neurons
        np.testing.assert_allclose(origin.neuron_contribution[layer, :3], parts, atol=0.06)
    results.save(run, origin)
