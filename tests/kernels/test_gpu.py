"""The kernels, the forward on them and the pipeline on a GPU; skipped where there is none."""

import numpy as np
import pytest
import torch

from headwater.benchmarks.gpu import bench_kernels
from headwater.extractor.in_memory import run_in_memory
from headwater.extractor.model.forward_device import KernelModel
from headwater.extractor.plan import Geometry, make_plan
from headwater.extractor.request import RunConfig
from headwater.kernels.attention import attention
from headwater.kernels.reference import attention_reference
from headwater.kernels.residual import residual_tap

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_inputs(n_positions=200, d_head=64, dtype=torch.float16, n=2, n_head=4, n_key=2):
    make = torch.Generator("cuda").manual_seed(0)
    fused = torch.randn(
        n, n_positions, n_head + 2 * n_key, d_head, generator=make, device="cuda"
    ).to(dtype)
    q, k, v = fused.split([n_head, n_key, n_key], 2)
    start = (torch.arange(n_positions, device="cuda") // 60 * 60).int().expand(n, -1).contiguous()
    return q, k, v, start


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("n_positions", [1, 77, 256, 1000, 2048])
@pytest.mark.parametrize("d_head", [16, 64, 80, 128, 256])
def test_every_kernel_agrees_with_float64(dtype, n_positions, d_head):
    inputs = bench_kernels.make_inputs(
        1, n_positions, (4, d_head, 4 * d_head), bench_kernels.DTYPES[dtype], "cuda"
    )
    assert bench_kernels.check(inputs) == []


@pytest.mark.parametrize("pattern", ["square", "tiles"])
def test_packed_documents_and_shared_key_heads(pattern):
    q, k, v, start = make_inputs()
    arguments = {
        "scale": 0.125,
        "row_start": start,
        "pattern": pattern,
        "edge": 64,
        "statistics": True,
    }
    got = attention(q, k, v, **arguments)
    want = attention_reference(q.double(), k.double(), v.double(), **arguments)
    for name in ("z", "pattern", "column"):
        torch.testing.assert_close(
            getattr(got, name).double(), getattr(want, name).double(), atol=3e-3, rtol=3e-3
        )


def test_a_compiled_function_has_no_graph_break():
    q, k, v, start = make_inputs()
    x, weight = torch.randn(2, 200, 256, device="cuda"), torch.ones(256, device="cuda")

    def forward(q, k, v, start, x, weight):
        out = attention(q, k, v, scale=0.1, row_start=start, statistics=True)
        tap = residual_tap(x, out.z.flatten(2), weight, weight)
        return out.row["attn_entropy"] * 2, out.column, tap.normed + 1, tap.norm

    compiled = torch.compile(forward, fullgraph=True)
    for got, want in zip(
        compiled(q, k, v, start, x, weight), forward(q, k, v, start, x, weight), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_a_cuda_graph_replays_what_the_kernels_do():
    q, k, v, start = make_inputs()
    x, delta, weight = (
        torch.randn(400, 256, device="cuda"),
        torch.randn(400, 256, device="cuda"),
        torch.ones(256, device="cuda"),
    )
    out, slot = torch.empty_like(x), torch.empty_like(x, dtype=torch.float16)

    def forward():
        a = attention(
            q, k, v, scale=0.1, row_start=start, pattern="tiles", edge=64, statistics=True
        )
        return (
            a.z,
            a.pattern,
            a.column,
            residual_tap(x, delta, weight, weight, out=out, slot=slot).normed,
        )

    forward()  # compiles, and fills the table of positions
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = forward()
    q.copy_(torch.randn_like(q))
    x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(kept, forward(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_pattern_of_more_than_2_to_the_31_elements():
    n = 2**31 // (1024 * 1024 * 8) + 1
    q, k, v = torch.randn(n, 1024, 24, 16, device="cuda", dtype=torch.float16).split([8, 8, 8], 2)
    got = attention(q, k, v, scale=0.25, pattern="square").pattern
    assert got.numel() > 2**31
    want = attention_reference(
        q[-1:].double(), k[-1:].double(), v[-1:].double(), scale=0.25, pattern="square"
    ).pattern
    torch.testing.assert_close(got[-1:].double(), want, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("layout", ["documents", "left"])
def test_a_forward_on_the_gpu_agrees_with_float64(oracle, layout):
    model = oracle.gpt2(n_layer=2, n_head=3, n_embd=48, n_positions=300)
    tokens, row_start = oracle.rows(3, 300, layout)
    loaded = KernelModel(oracle.checkpoint(model), device="cuda")
    config = RunConfig(out=".", top_k=oracle.top_k, preset="all", dtype="float32", device="cuda")
    plan = make_plan(config, loaded.config, Geometry(300, 3, 3), 3)
    oracle.assert_sites(
        run_in_memory(loaded, plan, tokens, row_start).arrays,
        oracle.reference(model, tokens, row_start),
    )


def test_extraction_on_the_gpu_is_that_of_the_cpu(cli, tiny_gpt2, tmp_path):
    import headwater

    np.save(
        tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 200, (9, 32)).astype(np.int32)
    )
    runs = []
    for device in ("cpu", "cuda"):
        out = tmp_path / device
        request = (
            "--model",
            tiny_gpt2,
            "--tokens",
            tmp_path / "ids.npy",
            "--preset",
            "all",
            "--dtype",
            "float32",
        )
        assert cli("extract", *request, "--out", out, "--device", device, "--block", "4").code == 0
        runs.append(headwater.open_run(out))
    for name in runs[0].sites:
        a, b = (run[name][:] for run in runs)
        if a.dtype.kind == "f":
            np.testing.assert_allclose(b, a, 1e-3, 1e-4, err_msg=name)
