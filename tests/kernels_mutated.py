"""Bytes counted under the interpreter, and faults put into the kernels on purpose: the interpreted tests must see them.

Not collected by itself: test_kernels_interpreter.py runs it with TRITON_INTERPRET=1.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from headwater.kernels import attention_pattern, blocks, column_mass
from headwater.kernels.attention_pattern import plan_pattern
from headwater.kernels.launch import Config

sys.path.insert(0, str(Path(__file__).parent))
import kernels_interpreted as cases
from kernels_interpreted import FULL, inputs

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Counter:
    """Count the elements that stores write, by the size of an element."""

    def __init__(self, monkeypatch):
        self.stored = {}
        builder = interpreter.interpreter_builder
        store, masked = type(builder).create_store, type(builder).create_masked_store

        def count(ptrs, n):
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            self.stored[size] = self.stored.get(size, 0) + int(n)

        def create_store(builder, ptr, val, *rest):
            return store(builder, ptr, val, *rest)

        def create_masked_store(builder, ptrs, value, mask, *rest):
            count(ptrs, mask.data.sum())
            return masked(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(type(builder), "create_store", create_store)
        monkeypatch.setattr(type(builder), "create_masked_store", create_masked_store)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("edge", [-1, 64])
def test_pattern_is_stored_exactly_once(monkeypatch, tma, edge):
    q, k, v, start = inputs(120, (2, 2), 32, FULL, "packed", 5)
    counter = Counter(monkeypatch)
    launch = plan_pattern(q, k, v, scale=0.4, row_start=start, edge=edge, pattern_dtype=torch.float16,
                          config=Config(32, 16, 4, 2, tma=tma))
    z, lse, pattern = launch.run()
    assert counter.stored == {2: pattern.numel(), 4: z.numel() + lse.numel()}


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
    cases.test_pattern.hypothesis.inner_test(100, (2, 2), 16, FULL, "packed", False, 0, -1, True)
    cases.test_pattern.hypothesis.inner_test(8, (3, 3), 16, FULL, "packed", False, 0, -1, True)
    cases.test_column_mass.hypothesis.inner_test(70, (2, 2), 16, FULL, "causal", False, 0)


@pytest.mark.parametrize("wrong", [_peeks, _forgets_start])
def test_a_wrong_mask_is_caught(monkeypatch, wrong):
    monkeypatch.setattr(attention_pattern, "hide", wrong)
    with pytest.raises(AssertionError):
        cases.test_pattern.hypothesis.inner_test(100, (2, 2), 16, FULL, "packed", False, 0, -1, True)


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
        cases.test_pattern.hypothesis.inner_test(8, (3, 3), 16, FULL, "packed", False, 0, -1, True)


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
