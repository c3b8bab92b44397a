"""Every Triton kernel under the interpreter against float64 where keys or values are NaN or infinite, or scores huge.

Not collected by itself: test_interpreter.py runs it with TRITON_INTERPRET=1.
"""

import sys
from pathlib import Path

import pytest
import torch

from headwater.kernels.attention import attention
from headwater.kernels.gpu.column_mass import plan_column_mass
from headwater.kernels.gpu.launch import Config
from headwater.kernels.gpu.pattern import plan_pattern
from headwater.kernels.gpu.row_statistics import plan_statistics
from headwater.kernels.output import FLOAT_ROWS
from headwater.kernels.reference import attention_reference

sys.path.insert(0, str(Path(__file__).parent))
from kernels_interpreted import HALF, inputs
from test_not_finite import SPOILT, assert_alike, spoil

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
N_POSITIONS = 45
SCALE = 0.4


CONFIG = Config(32, 16, 4, 2)
MASKS = ("causal", "packed", "left")


@pytest.mark.parametrize(("kind", "mask"), list(zip(SPOILT, MASKS * 2, strict=True)))
def test_rows_that_see_a_bad_key_say_so_and_no_other(kind, mask):
    q, k, v, start = inputs(N_POSITIONS, (2, 1), 16, HALF, mask, 3)
    q, k = spoil(kind, q, k)
    options = {"scale": SCALE, "row_start": start}
    doubles = [x.double() for x in (q, k, v)]
    want = attention_reference(*doubles, **options, pattern="square", statistics=True)
    options["config"] = CONFIG

    z, lse, pattern = plan_pattern(q, k, v, **options, edge=-1, pattern_dtype=torch.float32).run()
    assert_alike(z, want.z, 2e-3)
    assert_alike(lse, want.lse, 1e-4)
    assert_alike(pattern, want.pattern, 2e-3)

    statistics = plan_statistics(q, k, v, **options, statistics=True, features=None)
    z, lse, row, argmax, _ = statistics.run()
    assert_alike(z, want.z, 2e-3)
    assert_alike(lse, want.lse, 1e-4)
    for name, value in zip(FLOAT_ROWS, row, strict=True):
        assert_alike(value, want.row[name], 5e-2 if name == "attn_distance" else 2e-3)
    assert torch.equal(argmax < 0, want.row["attn_argmax"] < 0)

    (column,) = plan_column_mass(q, k, lse, **options).run()
    assert_alike(column, want.column, 5e-3)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_a_row_that_sees_no_key_is_empty_and_not_broken(impl):
    q, k, v, start = inputs(20, (2, 1), 16, HALF, "empty", 1)
    k = torch.full_like(k, torch.nan)
    v = torch.full_like(v, torch.nan)
    out = attention(
        q, k, v, scale=SCALE, row_start=start, pattern="square", statistics=True, impl=impl
    )
    assert not out.z.any() and not out.pattern.any() and not out.column.any()
    assert out.lse.isneginf().all() and (out.row["attn_argmax"] == -1).all()
    assert not any(out.row[name].any() for name in FLOAT_ROWS)


def test_scores_of_ten_million():
    """Differences of whole numbers at 2^23 and beyond: exact in float32, so that the results must be right, too."""
    n_positions, d_head = 40, 16
    generator = torch.Generator().manual_seed(0)
    q = torch.zeros(1, n_positions, 1, d_head)
    k = torch.zeros(1, n_positions, 1, d_head)
    q[..., 0] = 1
    k[0, :, 0, 0] = 10_000_000 + torch.randint(0, 9, (n_positions,), generator=generator)
    v = torch.randn(1, n_positions, 1, d_head, generator=generator)
    options = {"scale": 1.0, "row_start": None}
    doubles = [x.double() for x in (q, k, v)]
    want = attention_reference(*doubles, **options, pattern="square", statistics=True)
    statistics = plan_statistics(q, k, v, **options, statistics=True, features=None, config=CONFIG)
    z, lse, row, argmax, _ = statistics.run()
    assert_alike(lse, want.lse, 1e-6)
    # log2(e) in float32 is wrong by 6e-8: at 1e7 that moves no difference of scores by more than its own rounding.
    assert_alike(z, want.z, 1e-3)
    for name, value in zip(FLOAT_ROWS, row, strict=True):
        assert_alike(value, want.row[name], 1e-3)
    assert torch.equal(argmax, want.row["attn_argmax"])
    _, _, pattern = plan_pattern(
        q, k, v, **options, edge=-1, pattern_dtype=torch.float32, config=CONFIG
    ).run()
    assert_alike(pattern, want.pattern, 1e-3)
