"""The libraries that own the format read every array of a run bit-equal to us, half done as well as done, unwarned."""

from __future__ import annotations

import os
import warnings
from itertools import islice

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import headwater
from headwater.benchmarks.lib.synthetic import make_run
from headwater.extractor.run import extract
from headwater.store.manifest import RunError
from headwater.store.rows import RowReader

CASES = {
    "one tile": {"length": 64, "codec": "none", "dtype": "float16"},
    "ragged tiles": {
        "length": 300,
        "codec": "none,pattern=zstd-1",
        "dtype": "float32,pattern=float16",
    },
    "big tiles": {"length": 512, "codec": "zstd-3,resid=none", "dtype": "float16"},
}
SITES = (
    "resid",
    "z",
    "mlp_post",
    "pattern",
    "attn_scores",
    "attn_entropy",
    "attn_argmax",
    "attn_received",
    "resid_norm",
    "loss",
    "top_tokens",
)


class Stop(Exception):
    """Ends an extraction after its first block."""


def stop_after_one(progress):
    if progress.entry is not None:
        raise Stop


@pytest.fixture(
    scope="module",
    params=[(name, whole) for name in CASES for whole in (True, False)],
    ids=lambda p: f"{p[0]}{'' if p[1] else ', half done'}",
)
def run(request, tmp_path_factory, oracle):
    """A run of six sequences in blocks of two, whole or stopped after the first block, with padding in one row."""
    name, whole = request.param
    case, folder = CASES[name], tmp_path_factory.mktemp("run")
    length = case["length"]
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "n_layer": 2,
        "n_head": 3,
        "n_embd": 24,
        "n_positions": length,
        "vocab_size": 50,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder / "model")
    ids = np.random.default_rng(0).integers(0, 50, (6, length))
    ids[1, length - 7 :] = -1
    np.save(folder / "ids.npy", ids)
    config = headwater.RunConfig(
        model=str(folder / "model"),
        tokens=str(folder / "ids.npy"),
        out=str(folder / "run"),
        sites=SITES,
        block=2,
        codec=case["codec"],
        dtype=case["dtype"],
    )
    if whole:
        extract(config)
    else:
        with pytest.raises(Stop):
            extract(config, stop_after_one)
    return headwater.open_run(folder / "run")


def arrays(run):
    """Every array of the run, read by zarr-python: our reference."""
    group = zarr.open_group(run.path, mode="r", use_consolidated=True)
    return {name: array[...] for name, array in group.arrays()}


def test_a_small_array_says_how_it_is_read(run):
    for name in ("tokens", "complete"):
        with pytest.raises(RunError, match=rf"read whole: run\.plain\('{name}'\)"):
            run[name]


def test_zarr_reads_what_the_run_reads(run):
    done = int(run.complete.sum())
    assert done == (6 if len(list(run.blocks())) == 3 else 2)
    for name, values in arrays(run).items():
        if name in run.sites:
            np.testing.assert_array_equal(run[name][...], values, err_msg=name)


def test_missing_values_are_not_zero(run):
    done = run.complete
    for name, values in arrays(run).items():
        if name not in run.sites or done.all():
            continue
        spec = run.spec(name)
        rest = np.compress(~done, values, axis=0 if spec.axis is None else 1)
        np.testing.assert_array_equal(rest, np.full_like(rest, spec.fill), err_msg=name)
    last = run["resid"][0, 1, -7:]
    assert np.isnan(last).all() and not np.isnan(run["resid"][0, 1, :-7]).any()


def test_xarray_opens_it_without_a_warning(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = xr.open_zarr(run.path, chunks=None)
        loaded = dataset.load()
    for name, values in arrays(run).items():
        np.testing.assert_array_equal(loaded[name].values, values, err_msg=name)
    assert dataset["pattern"].dims == ("layer", "sequence", "head", "query", "key")
    assert dataset["resid"].sel(depth=2).dims == ("sequence", "position", "d_model")
    assert {"depth_fraction", "layer_fraction", "layer", "depth", "head"} <= set(dataset.coords)


def test_tensorstore_reads_the_same(run):
    tensorstore = pytest.importorskip("tensorstore")
    for name, values in arrays(run).items():
        store = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{run.path / name}/"}}
        np.testing.assert_array_equal(
            tensorstore.open(store).result().read().result(), values, err_msg=name
        )


def test_zarrs_reads_the_same(run):
    pytest.importorskip("zarrs")
    values = arrays(run)
    with (
        zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # zarrs warns of data types that it leaves to zarr-python
        for name in run.sites:
            found = zarr.open_array(run.path / name, mode="r")[...]
            np.testing.assert_array_equal(found, values[name], err_msg=name)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_slices_are_numpy_slices(run, data):
    name = data.draw(st.sampled_from(sorted(run.sites)))
    whole = zarr.open_array(run.path / name, mode="r")[...]
    key = tuple(
        data.draw(
            st.one_of(st.integers(-n, n - 1), st.slices(n).filter(lambda s: s.step in (None, 1)))
        )
        for n in islice(whole.shape, data.draw(st.integers(1, whole.ndim)))
    )
    np.testing.assert_array_equal(run[name][key], whole[key])


def test_plain_reads_of_rows_give_what_arrays_give(run):
    """Raw, compressed, all layers in a shard or one, whole or half done: the same rows; fill where there is none."""
    for site in ("resid", "z", "mlp_post"):
        array, reader = run[site], RowReader(run, site)
        step = array.spec.chunk[2]
        for lead in range(array.shape[0]):
            for sequence in range(array.shape[1]):
                for first in range(0, array.shape[2], step):
                    for low, high in (
                        (first, min(first + step, array.shape[2])),
                        (first + 3, first + 8),
                    ):
                        expected = array[lead, sequence, low:high].reshape(high - low, -1)
                        got = np.zeros_like(expected)
                        reader.read(lead, sequence, low, high, got)
                        np.testing.assert_array_equal(got, expected)


def test_a_shard_that_was_cut_short_is_not_read_as_rows(tmp_path):
    run = make_run(tmp_path, 4 * 3 * 256 * 64 * 2, 2, 64, 256)
    reader, out = RowReader(run, "resid"), np.empty((8, 64), np.float16)
    reader.read(1, 0, 0, 8, out)
    for shard in (run.path / "resid/c").rglob("*"):
        if shard.is_file():
            os.truncate(shard, 4096)
    with pytest.raises(RunError, match="the file is damaged"):
        reader.read(2, 3, 128, 136, out)
