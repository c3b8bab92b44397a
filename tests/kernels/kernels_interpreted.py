"""Every Triton kernel under the interpreter against float64: odd shapes, all options, both paths, poisoned outputs.

Not collected by itself: test_kernels_interpreter.py runs it with TRITON_INTERPRET=1.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwater.extractor.in_memory import run_in_memory
from headwater.extractor.model.forward_device import KernelModel
from headwater.extractor.plan import Geometry, make_plan
from headwater.extractor.request import RunConfig
from headwater.kernels.attention import attention
from headwater.kernels.dispatch import attention_triton
from headwater.kernels.gpu.column_mass import plan_column_mass
from headwater.kernels.gpu.launch import Config
from headwater.kernels.gpu.pattern import plan_pattern
from headwater.kernels.gpu.residual import plan_residual, unpack
from headwater.kernels.gpu.row_statistics import plan_statistics
from headwater.kernels.output import FLOAT_ROWS, n_causal_tiles, tiles_to_square
from headwater.kernels.reference import attention_reference, residual_reference
from headwater.kernels.residual import residual_tap

sys.path.insert(0, str(Path(__file__).parent))
from test_cpu import MASKS, make_row_start

assert os.environ.get("TRITON_INTERPRET") == "1"
torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HALF, BFLOAT, FULL = torch.float16, torch.bfloat16, torch.float32
# The interpreter truncates where a device rounds to bfloat16, so that errors are twice those of a device there.
TOLERANCE = {FULL: 1e-5, HALF: 7e-4, BFLOAT: 9e-3}
MANY = settings(
    max_examples=int(os.environ.get("HEADWATER_EXAMPLES", "14")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
SHAPES = {
    "n_positions": st.integers(1, 130),
    "heads": st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    "d_head": st.sampled_from([16, 20, 24, 40, 64, 80]),
    "dtype": st.sampled_from([FULL, HALF, BFLOAT]),
    "mask": st.sampled_from(MASKS),
    "tma": st.booleans(),
    "seed": st.integers(0, 1000),
}


def inputs(n_positions, heads, d_head, dtype, mask, seed, n=2):
    """Return q, k, v as views of one fused projection, and row starts (None for the plain causal mask)."""
    n_head, n_key = heads
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(n, n_positions, n_head + 2 * n_key, d_head, generator=generator).to(dtype)
    q, k, v = fused.split([n_head, n_key, n_key], 2)
    return q, k, v, None if mask == "causal" else make_row_start(mask, n, n_positions, seed)


def run(launch):
    """Poison every output, launch, and see that nothing of the poison is left."""
    for out in launch.outputs:
        out.fill_(float("nan") if out.is_floating_point() else -12345)
    outputs = launch.run()
    for out in outputs:
        assert not out.isnan().any() if out.is_floating_point() else (out != -12345).all(), (
            "an element was not written"
        )
    return outputs


def close(got, want, tolerance):
    """Compare by the relative Frobenius error over the finite entries; the infinite ones must be the same."""
    finite = want.isfinite()
    assert torch.equal(got[~finite].double(), want[~finite].double())
    error = (got[finite].double() - want[finite].double()).norm()
    assert error <= tolerance * want[finite].norm() + 1e-6, (
        f"relative error {error / want[finite].norm():.1e}"
    )


def config_for(seed, tma):
    return Config(*[(64, 32), (32, 64), (32, 16), (16, 16)][seed % 4], 4, 2, tma=tma)


@MANY
@given(
    **SHAPES,
    edge=st.sampled_from([-1, 16, 32, 48, 64, 256, "T"]),
    kept=st.sampled_from([FULL, HALF, BFLOAT]),
)
def test_pattern(n_positions, heads, d_head, dtype, mask, tma, seed, edge, kept):
    q, k, v, start = inputs(n_positions, heads, d_head, dtype, mask, seed)
    edge = n_positions if edge == "T" else edge
    launch = plan_pattern(
        q,
        k,
        v,
        scale=0.4,
        row_start=start,
        edge=edge,
        pattern_dtype=kept,
        config=config_for(seed, tma),
    )
    z, lse, pattern = run(launch)
    want = attention_reference(
        q.double(),
        k.double(),
        v.double(),
        scale=0.4,
        row_start=start,
        edge=edge,
        pattern="square" if edge < 0 else "tiles",
    )
    close(z, want.z, TOLERANCE[dtype])
    close(lse, want.lse, 3e-6)
    assert pattern.shape == want.pattern.shape
    close(pattern, want.pattern, {FULL: 5e-6, HALF: 4e-4, BFLOAT: 9e-3}[kept])
    assert (pattern[want.pattern == 0] == 0).all(), (
        "a hidden key or the padding of a tile is not zero"
    )


@MANY
@given(**SHAPES, n_features=st.sampled_from([None, 1, 12]))
def test_statistics(n_positions, heads, d_head, dtype, mask, tma, seed, n_features):
    q, k, v, start = inputs(n_positions, heads, d_head, dtype, mask, seed)
    table = (
        None if n_features is None else torch.randint(0, 9, (2, n_positions, n_features)).float()
    )
    launch = plan_statistics(
        q,
        k,
        v,
        scale=0.4,
        row_start=start,
        statistics=True,
        features=table,
        config=config_for(seed, tma),
    )
    z, lse, row, argmax, features = run(launch)
    want = attention_reference(
        q.double(),
        k.double(),
        v.double(),
        scale=0.4,
        row_start=start,
        pattern="square",
        statistics=True,
        features=table,
    )
    close(z, want.z, TOLERANCE[dtype])
    close(lse, want.lse, 3e-6)
    for name, value in zip(FLOAT_ROWS, row, strict=True):
        close(value, want.row[name], 5e-6 if name != "attn_distance" else 1e-5 + TOLERANCE[dtype])
    assert torch.equal(argmax < 0, want.row["attn_argmax"] < 0)
    picked = want.pattern.gather(-1, argmax.long().clamp(min=0)[..., None])[..., 0]
    close(picked, want.row["attn_max"], 1e-6)
    if table is not None:
        close(features, want.features, TOLERANCE[dtype])


@MANY
@given(**SHAPES)
def test_column_mass(n_positions, heads, d_head, dtype, mask, tma, seed):
    q, k, v, start = inputs(n_positions, heads, d_head, dtype, mask, seed)
    want = attention_reference(
        q.double(), k.double(), v.double(), scale=0.4, row_start=start, statistics=True
    )
    launch = plan_column_mass(
        q, k, want.lse.float(), scale=0.4, row_start=start, config=config_for(seed, tma)
    )
    (column,) = run(launch)
    close(column, want.column, 5e-6)
    (again,) = run(launch)
    assert torch.equal(column, again)


@pytest.mark.parametrize("d_head", [136, 256])
def test_wide_heads(d_head):
    test_pattern.hypothesis.inner_test(40, (2, 1), d_head, HALF, "packed", False, 2, 16, HALF)
    test_statistics.hypothesis.inner_test(40, (2, 1), d_head, HALF, "packed", False, 2, 1)
    test_column_mass.hypothesis.inner_test(40, (2, 1), d_head, HALF, "packed", False, 2)


@MANY
@given(
    n_positions=st.integers(1, 130),
    tma=st.booleans(),
    seed=st.integers(0, 1000),
    dtype=st.sampled_from([FULL, HALF]),
)
def test_plain_flash_attention(n_positions, tma, seed, dtype):
    q, k, v, start = inputs(n_positions, (2, 1), 24, dtype, "packed", seed)
    launch = plan_statistics(
        q,
        k,
        v,
        scale=0.4,
        row_start=start,
        statistics=False,
        features=None,
        config=config_for(seed, tma),
    )
    z, lse, *none = run(launch)
    want = attention_reference(q.double(), k.double(), v.double(), scale=0.4, row_start=start)
    close(z, want.z, TOLERANCE[dtype])
    close(lse, want.lse, 3e-6)
    assert all(x.numel() == 0 for x in none)


@settings(MANY, max_examples=30)
@given(
    n_rows=st.integers(1, 40),
    d_model=st.integers(1, 150),
    types=st.sampled_from([(FULL, None), (FULL, HALF), (HALF, None), (HALF, FULL), (FULL, FULL)]),
    added=st.sampled_from([None, HALF, BFLOAT]),
    present=st.integers(0, 15),
    seed=st.integers(0, 1000),
)
def test_residual_tap(n_rows, d_model, types, added, present, seed):
    dtype, kept = types
    generator = torch.Generator().manual_seed(seed)
    wide = (torch.randn(4, n_rows, d_model + 3, generator=generator) * 4).to(dtype)
    x, delta, previous = (part[:, 1 : d_model + 1] for part in wide[:3])
    w, b = (torch.randn(d_model, generator=generator).to(dtype) for _ in range(2))
    if seed % 3 == 0:
        x[0, 0], x[-1, -1], delta[n_rows // 2, d_model // 2] = 65000, torch.inf, torch.nan
        delta[0, 0] = 65000
    delta = delta.to(added or dtype)
    delta, w, b, previous = (
        value if present >> i & 1 else None for i, value in enumerate((delta, w, b, previous))
    )
    b = None if w is None else b
    want = residual_reference(
        x.double(),
        None if delta is None else delta.double(),
        w,
        b,
        previous=previous,
        capture_dtype=kept or dtype,
    )
    out = torch.full_like(x, torch.nan)
    slot = None if kept is None else torch.full((n_rows, d_model), torch.nan, dtype=kept)
    launch = plan_residual(
        x,
        delta,
        w,
        b,
        epsilon=1e-5,
        previous=previous,
        out=out,
        slot=slot,
        config=Config(16, 0, 4, 1),
    )
    for poisoned in launch.outputs:
        poisoned.fill_(float("nan") if poisoned.is_floating_point() else -12345)
    normed, floats, ints = launch.run()
    assert torch.equal(out, want.x.to(dtype)) or torch.allclose(
        out, want.x.to(dtype), rtol=1e-3, equal_nan=True
    )
    if slot is not None:
        torch.testing.assert_close(slot, want.x.to(kept), equal_nan=True, rtol=1e-3, atol=1e-5)
    got = unpack(out, normed, floats, ints)
    assert torch.equal(got.nonfinite, want.nonfinite)
    good = out.isfinite().all(-1) & want.x.isfinite().all(-1)
    assert torch.equal(got.overflow[good], want.overflow[good])
    again = residual_reference(
        out.double(), None, w, b, previous=x.double() if previous is None else previous
    )
    for name in ("scale", "norm", "cosine", "largest"):
        torch.testing.assert_close(
            getattr(got, name)[good].double(), getattr(again, name)[good], rtol=2e-4, atol=2e-5
        )
    assert torch.equal(got.dimension[good], again.dimension[good])
    if w is not None:
        torch.testing.assert_close(
            normed[good].double(),
            again.normed[good],
            rtol=2e-3,
            atol=5e-2 if dtype == HALF else 2e-4,
        )


def test_residual_counts_overflow_of_the_slot_and_works_in_place():
    x, delta = torch.full((3, 20), 60000.0), torch.zeros(3, 20)
    delta[1, 3], delta[2, 4] = 10000.0, torch.inf
    slot = torch.empty(3, 20, dtype=HALF)
    got = residual_tap(x, delta, out=x, slot=slot, impl="triton")
    assert got.overflow.tolist() == [0, 1, 0] and got.nonfinite.tolist() == [0, 0, 1]
    assert x[1, 3] == 70000 and slot[1, 3].isinf() and got.normed is None


@pytest.mark.parametrize("dtype", [FULL, HALF])
@pytest.mark.parametrize("layout", ["fused", "transposed"])
def test_public_function_with_the_pinned_table(dtype, layout):
    q, k, v, start = inputs(70, (4, 2), 20, dtype, "packed", 3)
    if layout == "transposed":
        q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
        assert q.stride(-1) != 1
    table = torch.eye(70)[:, :5]
    arguments = {
        "scale": 0.3,
        "row_start": start,
        "pattern": "tiles",
        "edge": 32,
        "statistics": True,
        "features": table,
    }
    got, want = (attention(q, k, v, **arguments, impl=impl) for impl in ("triton", "reference"))
    close(got.z, want.z, TOLERANCE[dtype])
    close(got.pattern, want.pattern, 1e-3)
    close(got.column, want.column, 1e-5)
    close(got.features, want.features, TOLERANCE[dtype])
    assert (
        got.pattern.shape[2] == n_causal_tiles(70, 32)
        and tiles_to_square(got.pattern, 70).shape[-1] == 70
    )
    for name in FLOAT_ROWS:
        close(got.row[name], want.row[name], 1e-3 if name == "attn_distance" else 1e-5)


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"statistics": True},
        {"features": True},
        {"pattern": "square"},
        {"pattern": "tiles", "edge": 16, "statistics": True, "features": True},
    ],
)
def test_triton_allocates_what_the_fake_says(wanted):
    q, k, v, start = inputs(20, (2, 1), 16, HALF, "packed", 1, n=1)
    table = torch.ones(1, 20, 3) if wanted.get("features") else None
    edge = {None: 0, "square": -1, "tiles": 16}[wanted.get("pattern")]
    arguments = (q, k, v, 0.5, start, table, edge, wanted.get("statistics", False), HALF)
    real = attention_triton(*arguments)
    fake = torch.ops.headwater.attention(
        *(x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments)
    )
    for got, want in zip(real, fake, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()


def test_distance_stays_exact_far_from_the_start():
    """Local heads at late positions: Σ p · position in 16 bits would be wrong by more than the distance itself."""
    n_positions = 700
    k = torch.nn.functional.one_hot(torch.arange(n_positions) % 32, 32).to(BFLOAT)[None, :, None]
    q = (k.roll(1, 1) * 12).contiguous()
    start = make_row_start("window", 1, n_positions, 0).fill_(0)
    start[0] = (torch.arange(n_positions) - 20).clamp(min=0).int()
    launch = plan_statistics(
        q,
        k,
        k,
        scale=1.0,
        row_start=start,
        statistics=True,
        features=None,
        config=Config(128, 64, 4, 2),
    )
    distance = run(launch)[2][FLOAT_ROWS.index("attn_distance")]
    want = attention_reference(
        q.double(), k.double(), k.double(), scale=1.0, row_start=start, statistics=True
    )
    assert (distance - want.row["attn_distance"]).abs().max() < 2e-2


@pytest.mark.parametrize("layout", ["documents", "left"])
def test_a_whole_forward_on_the_kernels_agrees_with_float64(oracle, layout):
    """The model, the tap and the ring of a device, every attention and residual launch interpreted."""
    model = oracle.gpt2(n_layer=2, n_head=2, n_embd=32, n_positions=40)
    tokens, row_start = oracle.rows(2, 37, layout)
    loaded = KernelModel(oracle.checkpoint(model), impl="triton")
    config = RunConfig(out=".", top_k=oracle.top_k, preset="all", dtype="float32")
    plan = make_plan(config, loaded.config, Geometry(37, 2, 2), 2)
    got = run_in_memory(loaded, plan, tokens, row_start).arrays
    oracle.assert_sites(got, oracle.reference(model, tokens, row_start))
