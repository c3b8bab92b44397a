"""Products with weights on a CPU: right by both libraries, and the same bits however the work is cut."""

import numpy as np
import pytest
import torch

from headwater.extractor.in_memory import run_in_memory
from headwater.extractor.model.forward import Model
from headwater.extractor.plan import Geometry, make_plan
from headwater.extractor.request import RunConfig
from headwater.kernels.cpu import products
from headwater.kernels.cpu.products import GROUP, cut_rows, multiply, multiply_heads

openblas = pytest.mark.skipif(
    products.library() == "torch", reason="torch multiplies on this processor"
)


@pytest.fixture(params=[1, 2, 3, 5, 16])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [16, 48, 64, 112, 256, 1024])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("n_parts", [1, 2, 7, 64])
def test_sequences_are_cut_at_groups_and_never_near_the_end(n, length, n_parts):
    parts = cut_rows(n, length, n_parts)
    assert [
        row for b, first, last in parts for row in range(b * length + first, b * length + last)
    ] == list(range(n * length))
    assert all(
        first % GROUP == 0 and last - first >= min(GROUP, length) for _, first, last in parts
    )


@pytest.mark.parametrize("shape", [(2, 64, 48, 144), (3, 112, 768, 100), (1, 16, 20, 31)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_agree_with_float64(shape, transposed, with_bias, n_threads):
    n, length, width, wide = shape
    x, weight = (
        torch.randn(n, length, width),
        torch.randn(wide, width).T if transposed else torch.randn(width, wide),
    )
    bias = torch.randn(wide) if with_bias else None
    out = torch.full((n, length, wide), torch.nan)
    multiply(x, weight, bias, out)
    want = x.double() @ weight.double() + (0 if bias is None else bias.double())
    torch.testing.assert_close(out.double(), want, atol=1e-4, rtol=1e-3)


@openblas
@pytest.mark.parametrize(
    "width, wide", [(16, 64), (768, 2304), (3072, 768), (100, 300), (64, 5003), (20, 17_000)]
)
def test_no_bit_depends_on_threads_or_on_other_sequences(width, wide, n_threads):
    make = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=make) for shape in ((5, 208, width), (width, wide), (wide,))
    )
    one = torch.empty(1, 208, wide)
    together = torch.empty(5, 208, wide)
    multiply(x, weight, bias, together)
    torch.set_num_threads(1)
    for b in range(5):
        multiply(x[b : b + 1], weight, bias, one)
        assert torch.equal(one[0], together[b])
    with products.one_thread():
        alone = torch.from_numpy(x[0].numpy() @ weight.numpy()) + bias
    assert torch.equal(alone, together[0])


def test_the_processor_chooses_the_library(monkeypatch):
    def choose(vendor="AuthenticAMD", mkl=True, blas="scipy-openblas", equal=True):
        products.library.cache_clear()
        monkeypatch.setattr(products, "_of_processor", {"vendor_id": vendor}.get)
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
        monkeypatch.setattr(
            np,
            "show_config",
            lambda mode: {"Build Dependencies": {"blas": {"name": blas, "version": "0.3.99"}}},
        )
        monkeypatch.setattr(products, "whole_groups_are_equal", lambda: equal)
        return products.library()

    real = products._openblas().info()
    try:
        assert choose() == (f"OpenBLAS 0.3.99 {real[0]['architecture']}" if real else "torch")
        assert (
            choose("GenuineIntel")
            == choose(mkl=False)
            == choose(blas="mkl")
            == choose(equal=False)
            == "torch"
        )
        assert choose(vendor="") == "torch"
    finally:
        monkeypatch.undo()
        products.library.cache_clear()


@pytest.mark.parametrize("library", ["torch", "OpenBLAS 0"])
def test_the_forward_agrees_with_float64_by_either_library(oracle, monkeypatch, library):
    """Both run on every machine, whichever it would choose."""
    if not products._openblas().info():
        pytest.skip("numpy has no OpenBLAS here")
    monkeypatch.setattr(products, "library", lambda: library)
    model = oracle.gpt2(n_layer=2, n_head=3, n_embd=48, n_positions=100)
    tokens, row_start = oracle.rows(3, 100, "documents")
    loaded = Model(oracle.checkpoint(model))
    assert loaded._openblas == (library != "torch")
    plan = make_plan(
        RunConfig(out=".", top_k=oracle.top_k, preset="all", dtype="float32"),
        loaded.config,
        Geometry(100, 3, 3),
        3,
    )
    oracle.assert_sites(
        run_in_memory(loaded, plan, tokens, row_start).arrays,
        oracle.reference(model, tokens, row_start),
    )


@pytest.mark.parametrize(
    "library, family, faster",
    [
        ("OpenBLAS 0.3.99 SkylakeX", "26", True),
        ("OpenBLAS 0.3.99 SkylakeX", "25", False),
        ("OpenBLAS 0.3.99 Haswell", "26", False),
        ("torch", "26", False),
        ("OpenBLAS 0.3.99 SkylakeX", "", False),
    ],
)
def test_heads_go_to_openblas_where_it_is_faster(monkeypatch, library, family, faster):
    monkeypatch.setattr(products, "library", lambda: library)
    monkeypatch.setattr(products, "_of_processor", {"cpu family": family}.get)
    assert products.heads_are_faster.__wrapped__() == faster


@pytest.mark.parametrize("faster", [False, True])
@pytest.mark.parametrize("length", [700, 1024])
def test_large_products_of_heads_are_right_on_any_number_of_threads(
    monkeypatch, faster, length, n_threads
):
    """Both ways on every machine; q, k and v are strided views of one projection, as in the forward."""
    monkeypatch.setattr(products, "heads_are_faster", lambda: faster)
    fused = torch.randn(length, 3 * 12 * 64, generator=torch.Generator().manual_seed(0))
    q, k, v = (part.unflatten(-1, (12, 64)).transpose(0, 1) for part in fused.chunk(3, -1))
    scores, values = torch.full((12, 128, length), torch.nan), torch.full((12, 128, 64), torch.nan)
    multiply_heads(q[:, -128:], k.transpose(1, 2), scores, 0.3)
    multiply_heads(scores, v, values)
    want = 0.3 * q[:, -128:].double() @ k.transpose(1, 2).double()
    torch.testing.assert_close(scores.double(), want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(values.double(), scores.double() @ v.double(), atol=1e-2, rtol=1e-4)
    torch.set_num_threads(1)
    one = torch.empty_like(scores)
    multiply_heads(q[:, -128:], k.transpose(1, 2), one, 0.3)
    assert torch.equal(one, scores)


def test_openblas_is_held_to_one_thread_until_the_last_user_is_done():
    found = products._openblas().lib_controllers
    before = [library.get_num_threads() for library in found]
    with products.one_thread():
        with products.one_thread():
            assert all(library.get_num_threads() == 1 for library in found)
        assert all(library.get_num_threads() == 1 for library in found)
    assert [library.get_num_threads() for library in found] == before
