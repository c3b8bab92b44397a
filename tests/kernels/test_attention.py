"""The public kernel functions: one result on every backend, refusals that name the value, operators that compile."""

import subprocess
import sys

import pytest
import torch

from headwater.kernels.attention import attention
from headwater.kernels.gpu.launch import ARCHES, HEAD_SIZES, lookup, parse
from headwater.kernels.output import tiles_to_square
from headwater.kernels.reference import residual_reference
from headwater.kernels.residual import residual_tap

ATTENTION = torch.ops.headwater.attention.default
RESIDUAL = torch.ops.headwater.residual_tap.default


def make_inputs(n=2, n_positions=40, n_head=4, n_key=2, d_head=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(n, n_positions, n_head, d_head, generator=generator).to(dtype)
    k, v = (
        torch.randn(n, n_positions, n_key, d_head, generator=generator).to(dtype) for _ in range(2)
    )
    start = (torch.arange(n_positions) // 13 * 13).int().expand(n, n_positions).contiguous()
    return q, k, v, start


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("pattern", [None, "square", "tiles"])
def test_every_backend_on_the_cpu_gives_the_same(dtype, pattern):
    q, k, v, start = make_inputs(dtype=dtype)
    features = torch.eye(40)[:, :3]
    arguments = {
        "scale": 0.4,
        "row_start": start,
        "pattern": pattern,
        "edge": 16,
        "statistics": True,
        "features": features,
    }
    outs = [attention(q, k, v, **arguments, impl=impl) for impl in ("auto", "cpu", "reference")]
    for got in outs[:2]:
        for name, want in outs[2]._asdict().items():
            value = getattr(got, name)
            if name == "row":
                assert value.keys() == want.keys()
                for key in want:
                    torch.testing.assert_close(
                        value[key].double(), want[key].double(), atol=1e-4, rtol=1e-3
                    )
            elif want is None:
                assert value is None
            else:
                assert value.shape == want.shape and value.dtype == want.dtype
                torch.testing.assert_close(
                    value.double(),
                    want.double(),
                    atol=1e-2 if dtype.itemsize == 2 else 1e-5,
                    rtol=1e-2 if dtype.itemsize == 2 else 1e-4,
                )
    if pattern == "tiles":
        square = attention(q, k, v, **{**arguments, "pattern": "square"}).pattern
        torch.testing.assert_close(tiles_to_square(outs[0].pattern, 40), square)
    if pattern is not None:
        kept = {torch.float32: torch.float32, torch.float64: torch.float64}.get(
            dtype, torch.float16
        )
        assert outs[0].pattern.dtype == kept


def test_row_start_of_one_sequence_serves_all():
    q, k, v, start = make_inputs()
    assert torch.equal(
        attention(q, k, v, scale=1.0, row_start=start[0]).z,
        attention(q, k, v, scale=1.0, row_start=start).z,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 0.0}, "scale is 0.0"),
        ({"scale": float("nan")}, "scale is nan"),
        ({"pattern": "half"}, "pattern is 'half'"),
        ({"pattern": "tiles", "edge": 20}, "edge is 20"),
        ({"impl": "fast"}, "impl is 'fast'"),
        ({"impl": "triton"}, 'impl="triton"'),
        ({"row_start": torch.zeros(40, dtype=torch.int64)}, "row_start is torch.int64"),
        ({"row_start": torch.zeros(41, dtype=torch.int32)}, r"row_start is torch.int32 \[41\]"),
        ({"features": torch.zeros(40, 13)}, r"features is \[40, 13\]"),
        ({"features": torch.zeros(3, 2)}, r"features is \[3, 2\]"),
        ({"pattern_dtype": torch.int32}, "pattern_dtype is torch.int32"),
        ({"k": torch.zeros(2, 40, 3, 24), "v": torch.zeros(2, 40, 3, 24)}, "4 query heads over 3"),
        ({"v": torch.zeros(2, 40, 1, 24)}, r"expected \[B, T, N, H\]"),
        ({"q": torch.zeros(2, 40, 4, 24).half()}, "one and the same floating type"),
        ({"q": torch.zeros(2, 40, 4, 24, requires_grad=True)}, "forward only"),
        (
            {
                "q": torch.zeros(2, 0, 4, 24),
                "k": torch.zeros(2, 0, 2, 24),
                "v": torch.zeros(2, 0, 2, 24),
            },
            "0 positions",
        ),
    ],
)
def test_wrong_requests_are_refused_by_name(change, message):
    q, k, v, _ = make_inputs()
    arguments = {"q": q, "k": k, "v": v, "scale": 1.0, **change}
    with pytest.raises(ValueError, match=message):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.mark.parametrize("edge", [0, -1, 16])
@pytest.mark.parametrize("statistics", [False, True])
def test_attention_operator_is_well_formed(edge, statistics):
    q, k, v, start = make_inputs(n_positions=21)
    table = torch.ones(1, 21, 2) if statistics else None
    torch.library.opcheck(
        ATTENTION,
        (q, k, v, 0.5, start if statistics else None, table, edge, statistics, torch.float16),
    )


@pytest.mark.parametrize("full", [False, True])
def test_residual_operator_is_well_formed(full):
    x, delta, previous, out = (torch.randn(5, 12) for _ in range(4))
    w, b = torch.randn(12), torch.randn(12)
    slot = torch.empty(5, 12, dtype=torch.float16)
    torch.library.opcheck(
        RESIDUAL,
        (x, delta, w, b, 1e-5, previous, out, slot)
        if full
        else (x, None, None, None, 1e-5, None, out, None),
    )


def test_kernels_compile_without_a_graph_break():
    q, k, v, start = make_inputs()
    x, delta, w = torch.randn(2, 40, 96), torch.randn(2, 40, 96), torch.randn(96)

    def forward(q, k, v, start, x, delta, w):
        a = attention(
            q * 1.5, k, v, scale=0.5, row_start=start, pattern="tiles", edge=16, statistics=True
        )
        tap = residual_tap(x, a.z.flatten(2) + delta, w, w)
        return (
            a.pattern.sum(-1) * 2,
            a.row["attn_entropy"] + 1,
            a.column,
            tap.normed,
            tap.norm,
            tap.dimension,
        )

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        compiled(q, k, v, start, x, delta, w), forward(q, k, v, start, x, delta, w), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_residual_tap_writes_in_place_and_into_the_slot():
    x, delta, w, b = torch.randn(3, 7, 32), torch.randn(3, 7, 32), torch.randn(32), torch.randn(32)
    previous = torch.randn(3, 7, 32)
    x[0, 0, 3], x[1, 1, 5], x[2, 2, 6], delta[0, 1, 4] = 70000.0, torch.inf, torch.nan, -90000.0
    want = residual_reference(
        x.double(), delta.double(), w, b, previous=previous, capture_dtype=torch.float16
    )
    before = x.clone()
    store = torch.full((3, 2, 7, 32), torch.nan, dtype=torch.float16)
    got = residual_tap(x, delta, w, b, previous=previous, out=x, slot=store.view(-1, 7, 32)[:3])
    torch.testing.assert_close(got.x, before + delta, equal_nan=True)
    assert got.x.data_ptr() == x.data_ptr()
    torch.testing.assert_close(store.view(-1, 7, 32)[:3], (before + delta).half(), equal_nan=True)
    assert store.view(-1, 7, 32)[3:].isnan().all()
    assert got.overflow.sum() == 2 and got.overflow[0, :2].tolist() == [1, 1]
    assert got.nonfinite.sum() == 2 and got.nonfinite[1, 1] == 1 and got.nonfinite[2, 2] == 1
    good = want.nonfinite == 0
    for name in ("scale", "norm", "cosine", "largest"):
        torch.testing.assert_close(
            getattr(got, name)[good].double(), getattr(want, name)[good], rtol=1e-4, atol=1e-5
        )
    assert torch.equal(got.dimension[good], want.dimension[good])
    with pytest.raises(ValueError, match="delta is"):
        residual_tap(x, delta[:2])
    with pytest.raises(ValueError, match="take `slot`"):
        residual_tap(x, delta, out=torch.empty_like(x, dtype=torch.float16))


def test_residual_layernorm_and_cosine_agree_with_torch():
    x, delta, w, b = torch.randn(6, 48), torch.randn(6, 48), torch.randn(48), torch.randn(48)
    got = residual_tap(x, delta, w, b)
    torch.testing.assert_close(got.normed, torch.nn.functional.layer_norm(x + delta, [48], w, b))
    torch.testing.assert_close(got.cosine, torch.cosine_similarity(x, x + delta, dim=-1))
    assert residual_tap(torch.zeros(2, 8)).cosine.tolist() == [0, 0]


def test_importing_the_kernels_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\nfrom headwater.kernels.attention import attention\nimport headwater.kernels.residual\n"
        "x = torch.ones(1, 3, 1, 4)\nprint(attention(x, x, x, scale=1.0, statistics=True).z.sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "12.0", done.stderr


def test_the_launch_table_is_complete():
    for arch in ARCHES:
        for kernel in ("pattern", "statistics", "flash", "column"):
            for bits in (16, 32):
                for size in HEAD_SIZES:
                    config = lookup(kernel, arch, size, bits)
                    assert not config.tma or arch in ("sm_90", "sm_100")
                    assert config.block_m >= 16 and config.block_n >= 16
    with pytest.raises(ValueError, match="no row of the launch table"):
        parse("64x64")
