"""Ahead-of-time compilation of a covering set of kernels: registers, spills, matrix instructions and store widths."""

import csv
import os
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter doesn't compile", allow_module_level=True)

from headwater.benchmarks.gpu import aot_cases  # noqa: E402
from headwater.benchmarks.gpu.aot import row  # noqa: E402
from headwater.benchmarks.gpu.compiled import _cuobjdump  # noqa: E402
from headwater.benchmarks.registry import RESULTS  # noqa: E402

pytestmark = pytest.mark.skipif(
    not Path(_cuobjdump()).exists(), reason="this Triton carries no cuobjdump"
)
COVER = list(aot_cases.cover_cases())


@pytest.mark.parametrize("case", COVER, ids=lambda case: case.name.replace(" ", "-"))
def test_compiled_kernel_keeps_its_budget(case):
    made = aot_cases.compile_case(case)
    assert aot_cases.faults(case, made) == []
    if (
        case.arch == "sm_90"
        and case.kernel != "residual"
        and case.config.block_m >= 64
        and case.dtype.itemsize == 2
    ):
        assert "HGMMA" in made.text


def test_the_covering_set_covers():
    assert {case.kernel for case in COVER} == {*aot_cases.KERNELS, "residual"}
    assert {case.arch for case in COVER} == set(aot_cases.ARCHES)
    assert {case.dtype.itemsize for case in COVER} == {2, 4}
    assert {
        case.config.tma for case in COVER if case.arch == "sm_90" and case.kernel == "pattern"
    } == {True, False}


def test_a_budget_that_is_broken_is_said():
    case = COVER[0]
    made = aot_cases.compile_case(case)
    spilling = type(made)(
        **{
            **made.__dict__,
            "spills": 3,
            "matrix": 0,
            "stores": {32: 4},
            "registers": 255,
            "shared": 10**6,
        }
    )
    assert len(aot_cases.faults(case, spilling)) == 5


def test_committed_results_are_of_this_table():
    results = RESULTS / "kernels_aot.csv"
    with results.open() as file:
        lines = list(csv.DictReader(file))
    made = aot_cases.compile_case(COVER[0])
    assert list(row(COVER[0], made)) == list(lines[0])
    names = {
        (
            x["kernel"],
            x["arch"],
            x["d_head"],
            x["dtype"],
            x["path"],
            x["block"],
            x["warps"],
            x["stages"],
        )
        for x in lines
    }
    for case in aot_cases.table_cases():
        c = case.config
        assert (
            case.kernel,
            case.arch,
            str(case.d_head),
            str(case.dtype).removeprefix("torch."),
            "descriptors" if c.tma else "pointers",
            f"{c.block_m}x{c.block_n}" if c.block_n else str(c.block_m),
            str(c.warps),
            str(c.stages),
        ) in names, f"run python -m headwater.benchmarks.gpu.aot --all: {case.name}"
    assert not [x for x in lines if x["faults"]]
