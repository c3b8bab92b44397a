"""Attention over keys and values that are not finite: what a row sees goes through to it, and nothing else does."""

import sys
from pathlib import Path

import pytest
import torch

from headwater.kernels.cpu.attention import attention_cpu
from headwater.kernels.cpu.rows import STATISTICS, attend
from headwater.kernels.cpu.workspace import Workspace
from headwater.kernels.mask import split_rows, visible
from headwater.kernels.reference import attention_reference

sys.path.insert(0, str(Path(__file__).parent))
from test_cpu import MASKS, make_qkv, make_row_start

SPOILT = ("nan", "inf", "minus inf", "all minus inf", "nan and inf", "first")


def spoil(kind, q, k):
    """Return q and k with keys that make scores of a kind: NaN, +inf, −inf of some keys, −inf of all, or of key 0."""
    q = q.clone()
    k = k.clone()
    if kind == "nan":
        k[0, 20, 0, 3] = torch.nan
    elif kind == "inf":
        q[..., 2] = q[..., 2].abs() + 1
        k[:, 33, 0, 2] = torch.inf
    elif kind == "minus inf":
        q[..., 2] = q[..., 2].abs() + 1
        k[:, 20, 0, 2] = -torch.inf
    elif kind == "all minus inf":
        q[..., 2] = q[..., 2].abs() + 1
        k[1, :, :, 2] = -torch.inf
    elif kind == "nan and inf":
        k[0, 17:40:11] = torch.nan
        k[1, 5, 0, 1] = torch.inf
        k[1, 40:, 0, 1] = -torch.inf
    else:
        k[:, 0] = torch.nan
    return q, k


def assert_alike(got, want, tolerance):
    """Compare with NaN and the infinities in the same places, and by absolute or relative error elsewhere."""
    torch.testing.assert_close(
        got.double(), want.double(), atol=tolerance, rtol=tolerance, equal_nan=True
    )


def by_definition(q, k, v, start, scale):
    """Compute a row at a time from the keys that it sees, so that nothing hidden can get into it."""
    n, n_positions, n_head, _ = q.shape
    p = torch.zeros(n, n_head, n_positions, n_positions, dtype=torch.float64)
    z = torch.zeros(v.shape, dtype=torch.float64)
    for b in range(n):
        for t in range(n_positions):
            keys = slice(int(start[b, t]), t + 1)
            if keys.start > t:
                continue
            scores = scale * torch.einsum("nh,knh->nk", q[b, t].double(), k[b, keys].double())
            row = torch.softmax(scores, -1)
            p[b, :, t, keys] = row
            z[b, t] = torch.einsum("nk,knh->nh", row, v[b, keys].double())
    return p, z


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", SPOILT)
def test_the_reference_hides_by_position(kind, mask):
    q, k, v = make_qkv(2, 50, 2, 8, 0)
    q, k = spoil(kind, q, k)
    start = make_row_start(mask, 2, 50, 3)
    want, z = by_definition(q, k, v, start, 0.4)
    doubles = [x.double() for x in (q, k, v)]
    got = attention_reference(
        *doubles, scale=0.4, row_start=start, pattern="square", statistics=True
    )
    assert_alike(got.pattern, want, 1e-12)
    assert_alike(got.z, z, 1e-12)
    broken = want.isnan().any(-1)
    assert torch.equal(got.lse.isnan(), broken)
    empty = (start > torch.arange(50))[:, None].expand_as(broken)
    assert torch.equal(got.lse.isneginf(), empty)
    for name, value in got.row.items():
        if name == "attn_argmax":
            assert torch.equal(value < 0, broken | empty)
        else:
            assert torch.equal(value.isnan(), broken), name


@pytest.mark.parametrize("n_rows", [16, 128])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", SPOILT)
def test_row_blocks_agree_with_the_definition(kind, mask, n_rows):
    n_positions = 75
    q, k, v = make_qkv(2, n_positions, 2, 16, 0)
    q, k = spoil(kind, q, k)
    start = make_row_start(mask, 2, n_positions, 3)
    shape = (2, 2, n_positions)
    got = {name: torch.empty(shape) for name in STATISTICS}
    got["attn_argmax"] = torch.empty(shape, dtype=torch.int32)
    z = torch.empty(v.shape)
    pattern = torch.zeros(*shape, n_positions)

    def on_pattern(b, block, value):
        pattern[b, :, block.first : block.last, block.key : block.last] = value

    attend(
        q,
        k,
        v,
        z,
        scale=0.4,
        blocks=[split_rows(row, n_rows) for row in start],
        row_start_BT=start,
        workspace=Workspace(),
        statistics=got,
        on_pattern=on_pattern,
    )
    doubles = [x.double() for x in (q, k, v)]
    want = attention_reference(
        *doubles, scale=0.4, row_start=start, pattern="square", statistics=True
    )
    assert_alike(pattern, want.pattern, 1e-4)
    assert_alike(z, want.z, 1e-4)
    assert_alike(got.pop("attn_received"), want.column, 1e-4)
    argmax = got.pop("attn_argmax")
    assert torch.equal(argmax < 0, want.row["attn_argmax"] < 0)
    for name, value in got.items():
        assert_alike(value, want.row[name], 1e-3)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", SPOILT)
def test_the_operator_agrees_with_the_definition(kind, mask, statistics):
    q, k, v = make_qkv(2, 75, 2, 16, 0)
    q, k = spoil(kind, q, k)
    start = make_row_start(mask, 2, 75, 3)
    table = torch.randint(0, 3, (75, 5)).float()
    options = {"scale": 0.4, "row_start": start, "statistics": statistics, "features": table}
    got = attention_cpu(q, k, v, **options, edge=-1, pattern_dtype=torch.float32)
    doubles = [x.double() for x in (q, k, v)]
    want = attention_reference(*doubles, **options, pattern="square")
    for name in ("z", "lse", "pattern", "features"):
        assert_alike(getattr(got, name), getattr(want, name), 1e-3)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_reaches_the_rows_that_see_it(mask, bad):
    q, k, v = make_qkv(1, 75, 2, 16, 0)
    v = v.clone()
    v[0, 30, 0, 5] = bad
    start = make_row_start(mask, 1, 75, 3)
    z = attention_cpu(
        q,
        k,
        v,
        scale=0.4,
        row_start=start,
        edge=0,
        statistics=False,
        features=None,
        pattern_dtype=torch.float32,
    ).z
    want = attention_reference(*(x.double() for x in (q, k, v)), scale=0.4, row_start=start)
    sees = visible(start)[0, :, 30]
    broken = ~z.isfinite()
    assert torch.equal(broken[0, :, 0, 5], sees)
    assert int(broken.sum()) == int(sees.sum())
    assert torch.equal(~want.z.isfinite(), broken)
    good = ~broken
    torch.testing.assert_close(z[good].double(), want.z[good], atol=1e-5, rtol=1e-4)
