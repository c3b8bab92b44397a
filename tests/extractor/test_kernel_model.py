"""The forward on the kernels, and the way from a device to the store: the code of every device, on CPU tensors."""

import numpy as np
import pytest
import torch

import headwater
from headwater.benchmarks.breaking.faults import contents
from headwater.extractor import pool as run_module
from headwater.extractor.capture import OverflowFound
from headwater.extractor.in_memory import run_in_memory
from headwater.extractor.model import transfer as transfer_module
from headwater.extractor.model.forward_device import KernelModel
from headwater.extractor.plan import Geometry, make_plan
from headwater.extractor.request import RunConfig
from headwater.extractor.sites import SITES
from headwater.store.shard import ShardWriter
from headwater.store.verify import verify


def captured(oracle, model, tokens, row_start, compute="fp32", **request):
    """Capture with a KernelModel; return the arrays."""
    loaded = KernelModel(oracle.checkpoint(model), compute)
    config = RunConfig(
        out=".", top_k=oracle.top_k, **{"sites": tuple(SITES), "dtype": "float32"} | request
    )
    plan = make_plan(
        config, loaded.config, Geometry(tokens.shape[1], len(tokens), len(tokens)), len(tokens)
    )
    return run_in_memory(loaded, plan, tokens, row_start).arrays


@pytest.mark.parametrize("layout", ["unpadded", "left", "right", "documents"])
@pytest.mark.parametrize("length", [1, 23, 64, 300])
def test_every_site_agrees_with_float64(oracle, layout, length):
    model = oracle.gpt2(n_layer=2, n_head=3, n_embd=24, n_positions=max(length, 8))
    tokens, row_start = oracle.rows(2, length, layout)
    oracle.assert_sites(
        captured(oracle, model, tokens, row_start), oracle.reference(model, tokens, row_start)
    )


@pytest.mark.parametrize(
    "request_",
    [
        {"heads": "1"},
        {"positions": "last"},
        {"positions": "0,5"},
        {"layers": "1"},
        {"depths": "1:"},
    ],
)
def test_selections_are_those_of_the_plain_forward(oracle, request_):
    model = oracle.gpt2(n_layer=2, n_head=3, n_embd=24)
    tokens, row_start = oracle.rows(3, 33, "right")
    got = captured(oracle, model, tokens, row_start, **request_)
    _, want = oracle.capture(model, tokens, row_start, **request_)
    for name, value in got.items():
        assert value.shape == want[name].shape and value.dtype == want[name].dtype
        if not np.issubdtype(value.dtype, np.integer):
            np.testing.assert_allclose(value, want[name], 1e-3, 1e-4, err_msg=name)


@pytest.mark.parametrize("compute", ["bf16", "fp16", "fp64"])
def test_compute_types(oracle, compute):
    model = oracle.gpt2(n_layer=1)
    tokens, row_start = oracle.rows(2, 20, "documents")
    got = captured(oracle, model, tokens, row_start, compute)
    want = oracle.reference(model, tokens, row_start)
    tolerance = 1e-4 if compute == "fp64" else 0.06
    for name in ("resid", "pattern", "attn_entropy", "attn_received", "loss", "z"):
        np.testing.assert_allclose(got[name], want[name], tolerance, tolerance, err_msg=name)


@pytest.fixture
def on_kernels(monkeypatch):
    """Let extraction take the model and the pipeline of a device, on CPU tensors; `ring` limits the ring's bytes."""

    def choose(ring=None):
        monkeypatch.setattr(
            run_module,
            "load_model",
            lambda checkpoint, compute, device: KernelModel(checkpoint, compute),
        )
        if ring is not None:
            monkeypatch.setattr(transfer_module, "RING_BYTES", ring)

    return choose


def request_of(tiny_gpt2, tmp_path, name, **changes):
    np.save(
        tmp_path / "ids.npy", np.random.default_rng(5).integers(0, 200, (12, 32)).astype(np.int32)
    )
    return RunConfig(
        **{
            "out": str(tmp_path / name),
            "model": str(tiny_gpt2),
            "tokens": str(tmp_path / "ids.npy"),
            "preset": "all",
            "block": 8,
            "dtype": "float32",
        }
        | changes
    )


@pytest.mark.parametrize("ring", [None, 4096])
@pytest.mark.parametrize("codec", ["none", "zstd-1"])
def test_a_run_through_the_ring_is_the_run_without_it(tiny_gpt2, tmp_path, on_kernels, ring, codec):
    plain = headwater.extract(request_of(tiny_gpt2, tmp_path, "plain", codec=codec))
    on_kernels(ring)
    piped = headwater.extract(request_of(tiny_gpt2, tmp_path, "piped", codec=codec))
    assert piped.complete.all() and not verify(piped).problems
    for name in plain.sites:
        got, want = piped[name][:], plain[name][:]
        if not np.issubdtype(got.dtype, np.integer):
            np.testing.assert_allclose(got, want, 1e-3, 1e-4, err_msg=name)
    for entry in piped.ledger.entries():
        assert {
            "compute",
            "copy",
            "encode",
            "write",
            "sync",
            "wait",
            "finish",
        } <= entry.seconds.keys()
        assert all(value >= 0 for value in entry.seconds.values())
    again = headwater.extract(request_of(tiny_gpt2, tmp_path, "again", codec=codec))
    assert contents(again.path) == contents(piped.path)


def test_overflow_on_the_device_is_counted_and_stops_the_run(
    tiny_gpt2, tmp_path, on_kernels, oracle
):
    model = oracle.gpt2()
    with torch.no_grad():
        model.transformer.wpe.weight[3, 5] = 1e6
    model.save_pretrained(tmp_path / "wide")
    np.save(tmp_path / "few.npy", np.zeros((2, 8), np.int32))
    request = {
        "model": str(tmp_path / "wide"),
        "tokens": str(tmp_path / "few.npy"),
        "preset": "residual",
        "dtype": "float16",
        "block": 2,
    }
    plain = headwater.extract(
        request_of(tiny_gpt2, tmp_path, "kept", on_overflow="keep", **request)
    )
    on_kernels()
    piped = headwater.extract(
        request_of(tiny_gpt2, tmp_path, "piped", on_overflow="keep", **request)
    )
    casts = [[entry.casts for entry in run.ledger.entries()] for run in (plain, piped)]
    assert casts[0] == casts[1] and casts[0][0]["resid"]["overflow"] == 6
    with pytest.raises(OverflowFound, match="too large for float16"):
        headwater.extract(request_of(tiny_gpt2, tmp_path, "refused", **request))
    rest = headwater.extract(
        request_of(tiny_gpt2, tmp_path, "wide-run", **request | {"dtype": "float32"})
    )
    assert rest.complete.all()


def test_a_failed_block_leaves_the_pipeline_usable(tiny_gpt2, tmp_path, on_kernels, monkeypatch):
    """The writer fails once, in the middle of a block; the same worker then computes the block again."""
    on_kernels(4096)
    config = request_of(tiny_gpt2, tmp_path, "run")
    before = run_module.Worker.extract_block

    def twice(worker, block, attempt):
        put, calls = ShardWriter.put_pages, iter(range(100))

        def fail(self, *arguments):
            if next(calls) == 3:
                raise OSError(5, "broken on purpose")
            return put(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(ShardWriter, "put_pages", fail)
            with pytest.raises(OSError, match="on purpose"):
                before(worker, block, attempt)
        return before(worker, block, attempt + 1)

    monkeypatch.setattr(run_module.Worker, "extract_block", twice)
    made = headwater.extract(config)
    assert made.complete.all() and not verify(made).problems
