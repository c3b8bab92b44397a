"""Attention on the CPU against its definition in float64: every shape, mask and statistic."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headwater.kernels.cpu.attention import attention_cpu
from headwater.kernels.cpu.rows import STATISTICS, attend
from headwater.kernels.cpu.workspace import Workspace
from headwater.kernels.mask import split_rows, visible
from headwater.kernels.output import n_causal_tiles, square_to_tiles, tiles_to_square
from headwater.kernels.reference import attention_reference, row_statistics

MASKS = ("causal", "packed", "left", "right", "window", "random", "empty")


def make_row_start(kind: str, n: int, n_positions: int, seed: int) -> torch.Tensor:
    """Return row starts of one kind, a different one in each sequence: int32 [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.arange(n_positions)
    rows = []
    for _ in range(n):
        cut = int(torch.randint(0, n_positions + 1, (), generator=generator))
        if kind == "causal":
            start = torch.zeros(n_positions)
        elif kind == "packed":
            new = torch.rand(n_positions, generator=generator) < 0.05
            start = torch.where(new, t, 0).cummax(0).values
        elif kind == "left":
            start = torch.where(t < cut, t + 1, cut)
        elif kind == "right":
            start = torch.where(t < cut, 0, t + 1)
        elif kind == "window":
            start = (t - cut).clamp(min=0)
        elif kind == "random":
            start = (torch.rand(n_positions, generator=generator) * (t + 2)).long()
        else:
            start = t + 1
        rows.append(start.int())
    return torch.stack(rows)


def make_qkv(n: int, n_positions: int, n_head: int, d_head: int, seed: int) -> list[torch.Tensor]:
    """Return q, k, v as strided views of one fused projection: float32 [B, T, N, H]."""
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(n, n_positions, 3 * n_head * d_head, generator=generator)
    return [part.unflatten(-1, (n_head, d_head)) for part in fused.chunk(3, -1)]


@settings(max_examples=40, deadline=None)
@given(
    n_positions=st.integers(1, 300),
    n_head=st.integers(1, 3),
    d_head=st.sampled_from([1, 7, 16, 33, 64, 80]),
    kind=st.sampled_from(MASKS),
    n_rows=st.sampled_from([16, 64, 100, 128]),
    seed=st.integers(0, 99),
)
def test_attend_agrees_with_the_definition(n_positions, n_head, d_head, kind, n_rows, seed):
    q, k, v = make_qkv(2, n_positions, n_head, d_head, seed)
    start = make_row_start(kind, 2, n_positions, seed)
    z = torch.full((2, n_positions, n_head, d_head), torch.nan)
    got = {name: torch.full((2, n_head, n_positions), torch.nan) for name in STATISTICS}
    got["attn_argmax"] = torch.full((2, n_head, n_positions), -99, dtype=torch.int32)
    pattern = torch.zeros(2, n_head, n_positions, n_positions)

    def on_pattern(b, block, value):
        pattern[b, :, block.first : block.last, block.key : block.last] = value

    attend(
        q,
        k,
        v,
        z,
        scale=0.7,
        blocks=[split_rows(row, n_rows) for row in start],
        row_start_BT=start,
        workspace=Workspace(),
        statistics=got,
        on_pattern=on_pattern,
    )
    want = attention_reference(
        q.double(),
        k.double(),
        v.double(),
        scale=0.7,
        row_start=start,
        pattern="square",
        statistics=True,
    )
    torch.testing.assert_close(z.double(), want.z, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(pattern.double(), want.pattern, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.pop("attn_received").double(), want.column, atol=2e-5, rtol=1e-5)
    assert_rows_agree(got, want, atol=1e-4)


def assert_rows_agree(got, want, atol, ties=1e-5):
    """Compare row statistics; an argmax may name another key only where that one is as large."""
    assert got.keys() == want.row.keys()
    for name, value in want.row.items():
        if name != "attn_argmax":
            torch.testing.assert_close(
                got[name].double(), value, atol=atol, rtol=1e-4, msg=lambda m, n=name: f"{n} {m}"
            )
    place = got["attn_argmax"].long()
    assert ((place < 0) == (want.row["attn_argmax"] < 0)).all()
    if want.pattern is not None:
        picked = want.pattern.gather(-1, place.clamp(min=0)[..., None])[..., 0]
        torch.testing.assert_close(picked, want.row["attn_max"], atol=ties, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(
    n_positions=st.integers(1, 200),
    group=st.sampled_from([1, 2, 3]),
    kind=st.sampled_from(MASKS),
    pattern=st.sampled_from(["square", "tiles"]),
    edge=st.sampled_from([16, 64, 96, 256]),
    seed=st.integers(0, 99),
)
def test_fused_path_agrees_with_the_definition(n_positions, group, kind, pattern, edge, seed):
    q, k, v = make_qkv(2, n_positions, 2 * group, 24, seed)
    k, v = k[:, :, ::group], v[:, :, ::group]
    start = make_row_start(kind, 2, n_positions, seed)
    table = torch.randint(0, 3, (n_positions, 5)).float()
    got = attention_cpu(
        q,
        k,
        v,
        scale=0.3,
        row_start=start,
        edge=edge if pattern == "tiles" else -1,
        statistics=True,
        features=table,
        pattern_dtype=torch.float32,
    )
    want = attention_reference(
        q.double(),
        k.double(),
        v.double(),
        scale=0.3,
        row_start=start,
        pattern=pattern,
        edge=edge,
        statistics=True,
        features=table,
    )
    for name in ("z", "lse", "pattern", "column", "features"):
        value = getattr(want, name)
        assert getattr(got, name).shape == value.shape
        torch.testing.assert_close(getattr(got, name).double(), value, atol=3e-5, rtol=1e-4)
    square = want._replace(
        pattern=tiles_to_square(want.pattern, n_positions) if pattern == "tiles" else want.pattern
    )
    assert_rows_agree(got.row, square, atol=1e-4)


def test_entropy_is_exact_where_attention_is_uniform_and_where_it_is_one_hot():
    n = 64
    k = torch.eye(n)[None, :, None]
    uniform = attention_reference(
        torch.zeros_like(k).double(), k.double(), k.double(), scale=1.0, statistics=True
    )
    t = torch.arange(n, dtype=torch.float64)
    torch.testing.assert_close(uniform.row["attn_entropy"][0, 0], (t + 1).log())
    torch.testing.assert_close(uniform.row["attn_distance"][0, 0], t / 2)
    harmonic = torch.cat([torch.zeros(1), (1 / (t + 1)).cumsum(0)])
    torch.testing.assert_close(uniform.column[0, 0], harmonic[-1] - harmonic[:-1])
    sharp = attention_reference(
        k.double() * 900, k.double(), k.double(), scale=1.0, statistics=True
    )
    torch.testing.assert_close(sharp.row["attn_self"][0, 0], torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(
        sharp.row["attn_entropy"][0, 0], torch.zeros(n, dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("edge", [1, 3, 16, 64])
@pytest.mark.parametrize("n_positions", [1, 15, 16, 17, 50])
def test_tiles_are_the_lower_triangle(n_positions, edge):
    square = torch.randn(2, n_positions, n_positions).tril()
    tiles = square_to_tiles(square, edge)
    assert tiles.shape == (2, n_causal_tiles(n_positions, edge), edge, edge)
    assert torch.equal(tiles_to_square(tiles, n_positions), square)


@settings(max_examples=30, deadline=None)
@given(
    n_positions=st.integers(1, 300),
    kind=st.sampled_from(MASKS),
    n_rows=st.integers(1, 140),
    seed=st.integers(0, 99),
)
def test_row_blocks_cover_every_visible_key(n_positions, kind, n_rows, seed):
    start = make_row_start(kind, 1, n_positions, seed)[0]
    seen = visible(start)
    covered = torch.zeros_like(seen)
    for block in split_rows(start, n_rows):
        hidden = (
            torch.zeros(block.last - block.first, block.last - block.key)
            if block.hidden is None
            else block.hidden
        )
        covered[block.first : block.last, block.key : block.last] = hidden == 0
        if block.hidden is None:
            covered[block.first : block.last] &= (
                torch.ones(block.last - block.first, n_positions).tril(block.first).bool()
            )
        if block.empty is not None:
            covered[block.first + block.empty] = False
    assert torch.equal(covered, seen)


def test_statistics_of_the_hand_made_pattern():
    pattern = torch.tensor(
        [[1.0, 0, 0], [0.25, 0.75, 0], [0.5, 0.125, 0.375]], dtype=torch.float64
    )[None, None]
    row = row_statistics(pattern, torch.zeros(1, 3, dtype=torch.int32))
    expected = {
        "attn_max": [1, 0.75, 0.5],
        "attn_argmax": [0, 1, 0],
        "attn_sink": [1, 0.25, 0.5],
        "attn_distance": [0, 0.25, 1.125],
        "attn_self": [1, 0.75, 0.375],
        "attn_prev": [0, 0.25, 0.125],
    }
    for name, values in expected.items():
        assert row[name][0, 0].tolist() == values
