"""Bytes counted under the interpreter, and faults put into the kernels on purpose: the interpreted tests must see them.

Not collected by itself: test_kernels_interpreter.py runs it with TRITON_INTERPRET=1.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from headwater.benchmarks.gpu import count_bytes, naive_kernels
from headwater.kernels.gpu import blocks, column_mass
from headwater.kernels.gpu import pattern as attention_pattern
from headwater.kernels.gpu.launch import Config
from headwater.kernels.gpu.pattern import plan_pattern
from headwater.kernels.gpu.residual import plan_residual
from headwater.kernels.gpu.row_statistics import plan_statistics
from headwater.kernels.reference import attention_reference

sys.path.insert(0, str(Path(__file__).parent))
import kernels_interpreted as cases
from kernels_interpreted import FULL, inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Counter:
    """Count the bytes that loads read and stores write, masked elements left out."""

    def __init__(self, monkeypatch):
        self.loaded = self.stored = 0
        builder = type(interpreter.interpreter_builder)
        load, store = builder.create_masked_load, builder.create_masked_store

        def size(ptrs, mask):
            return int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8

        def create_masked_load(builder, ptrs, mask, *rest, **named):
            self.loaded += size(ptrs, mask)
            return load(builder, ptrs, mask, *rest, **named)

        def create_masked_store(builder, ptrs, value, mask, *rest):
            self.stored += size(ptrs, mask)
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(builder, "create_masked_load", create_masked_load)
        monkeypatch.setattr(builder, "create_masked_store", create_masked_store)


def nbytes(*tensors):
    return sum(x.numel() * x.element_size() for x in tensors)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("edge", [-1, 64])
def test_pattern_is_stored_exactly_once(monkeypatch, tma, edge):
    q, k, v, start = inputs(120, (2, 2), 32, FULL, "packed", 5)
    counter = Counter(monkeypatch)
    launch = plan_pattern(
        q,
        k,
        v,
        scale=0.4,
        row_start=start,
        edge=edge,
        pattern_dtype=torch.float16,
        config=Config(32, 16, 4, 2, tma=tma),
    )
    outputs = launch.run()
    assert counter.stored == nbytes(*outputs)


def test_statistics_are_stored_exactly_once(monkeypatch):
    q, k, v, start = inputs(120, (2, 2), 32, FULL, "packed", 5)
    counter = Counter(monkeypatch)
    launch = plan_statistics(
        q,
        k,
        v,
        scale=0.4,
        row_start=start,
        statistics=True,
        features=None,
        config=Config(32, 32, 4, 2),
    )
    outputs = launch.run()
    assert counter.stored == nbytes(*outputs)


def test_residual_tap_moves_no_byte_twice(monkeypatch):
    x, delta = (torch.randn(64, 200).half() for _ in range(2))
    w = torch.randn(200).half()
    out = torch.empty_like(x)
    counter = Counter(monkeypatch)
    launch = plan_residual(
        x, delta, w, w, epsilon=1e-5, previous=None, out=out, slot=None, config=Config(16, 0, 4, 1)
    )
    normed, floats, ints = launch.run()
    assert counter.stored == nbytes(out, normed, floats, ints)
    assert counter.loaded == nbytes(x, delta) + 64 // 16 * nbytes(w, w)


@pytest.mark.parametrize(
    ("kernel", "most"),
    [("pattern", 1.05), ("statistics", 1.1), ("flash", 1.1), ("column", 1.1), ("residual", 1.02)],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_a_launch_moves_little_more_than_its_inputs_and_outputs(kernel, most, arch):
    launch = count_bytes.make_launch(
        kernel, arch, 768 if kernel == "residual" else 64, torch.float16, n_positions=256
    )
    moved = count_bytes.count(launch)
    assert moved["minimum"] * 0.999 <= moved["moved"] <= most * moved["minimum"]
    assert moved["l2_read"] >= moved["read"] and moved["written"] >= nbytes(*launch.outputs)


@pytest.mark.parametrize(
    ("kernel", "variant"),
    [(k, name) for k, names in naive_kernels.VARIANTS.items() for name in names],
)
def test_naive_variants_give_the_same_attention(kernel, variant):
    """A comparison with something that computes less would say nothing."""
    launch = count_bytes.make_launch(kernel, "sm_80", 32, FULL, n_positions=64)
    other = naive_kernels.vary(
        count_bytes.make_launch(kernel, "sm_80", 32, FULL, n_positions=64), kernel, variant
    )
    for out in other.outputs:
        out.zero_()  # z first, P afterwards leaves the rest of the pattern unwritten
    for got, want in list(zip(other.run(), launch.run(), strict=True))[
        : 3 if kernel == "pattern" else 2
    ]:
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_packed_documents_skip_the_keys_of_others():
    """Four documents read a quarter of what one reads, up to blocks that straddle."""
    read = []
    for length in (128, 32):
        q, k, v, _ = inputs(128, (1, 1), 32, FULL, "causal", 5, n=1)
        start = (torch.arange(128) // length * length).int()[None]
        with pytest.MonkeyPatch.context() as patch:
            counter = Counter(patch)
            plan_statistics(
                q,
                k,
                v,
                scale=0.4,
                row_start=start,
                statistics=False,
                features=None,
                config=Config(32, 32, 4, 2),
            ).run()
        read.append(counter.loaded - nbytes(q, start))
    assert read[1] * 10 == read[0] * 4


def test_a_pattern_of_more_than_2_to_the_31_elements(monkeypatch):
    """Only the last program is run, in virtual memory: its offsets need 64 bits."""
    n_positions = 64
    n = 2**31 // n_positions**2 + 3
    q, k, v, _ = inputs(n_positions, (1, 1), 16, torch.float16, "causal", 0, n=1)
    launch = plan_pattern(
        *(x.expand(n, -1, -1, -1) for x in (q, k, v)),
        scale=0.4,
        row_start=None,
        edge=-1,
        pattern_dtype=torch.float16,
        config=Config(64, 64, 4, 2),
    )
    builder = type(interpreter.interpreter_builder)
    last = interpreter.TensorHandle(np.array([n - 1], np.int32), tl.int32)
    monkeypatch.setattr(builder, "create_get_program_id", lambda builder, axis: last)
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *arguments: None)
    _, lse, pattern = replace(launch, grid=1).run()
    want = attention_reference(q.double(), k.double(), v.double(), scale=0.4, pattern="square")
    assert pattern.numel() > 2**31
    torch.testing.assert_close(pattern[-1].double(), want.pattern[0], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(lse[-1].double(), want.lse[0], atol=1e-5, rtol=1e-5)


@triton.jit
def _peeks(scores, n0, t, start, BLOCK_N: tl.constexpr):
    key = n0 + tl.arange(0, BLOCK_N)
    seen = (key[None, :] >= start[:, None]) & (key[None, :] <= t[:, None] + 1)
    return tl.where(seen, scores, blocks.HIDDEN)


@triton.jit
def _forgets_start(scores, n0, t, start, BLOCK_N: tl.constexpr):
    key = n0 + tl.arange(0, BLOCK_N)
    return tl.where(key[None, :] <= t[:, None], scores, blocks.HIDDEN)


def test_what_is_broken_below_is_whole():
    cases.test_pattern.hypothesis.inner_test(100, (2, 2), 16, FULL, "packed", False, 0, -1, FULL)
    cases.test_pattern.hypothesis.inner_test(8, (3, 3), 16, FULL, "packed", False, 0, -1, FULL)
    cases.test_column_mass.hypothesis.inner_test(70, (2, 2), 16, FULL, "causal", False, 0)


@pytest.mark.parametrize("wrong", [_peeks, _forgets_start])
def test_a_wrong_mask_is_caught(monkeypatch, wrong):
    monkeypatch.setattr(attention_pattern, "hide", wrong)
    with pytest.raises(AssertionError):
        cases.test_pattern.hypothesis.inner_test(
            100, (2, 2), 16, FULL, "packed", False, 0, -1, FULL
        )


@pytest.mark.parametrize("pair", [("sqt", "sqn"), ("skt", "skn"), ("svt", "svn"), ("sqb", "sqt")])
def test_swapped_strides_are_caught(monkeypatch, pair):
    plan = attention_pattern.plan_pattern

    def swapped(*arguments, **options):
        launch = plan(*arguments, **options)
        a, b = pair
        changed = {**launch.arguments, a: launch.arguments[b], b: launch.arguments[a]}
        if "b" in a[-1]:
            changed = {**launch.arguments, a: launch.arguments[b]}
        return replace(launch, arguments=changed)

    monkeypatch.setattr(cases, "plan_pattern", swapped)
    with pytest.raises(AssertionError):
        cases.test_pattern.hypothesis.inner_test(8, (3, 3), 16, FULL, "packed", False, 0, -1, FULL)


def test_a_column_sum_without_the_diagonal_mask_is_caught(monkeypatch):
    monkeypatch.setattr(column_mass, "_add", _unmasked(column_mass._add))
    with pytest.raises(AssertionError):
        cases.test_column_mass.hypothesis.inner_test(70, (2, 2), 16, FULL, "causal", False, 0)


def _unmasked(add):
    def call(*arguments, **options):
        changed = list(arguments)
        changed[-4] = False
        return add(*changed, **options)

    return call
