"""Run tests/kernels_interpreted.py in its own process: the interpreter is chosen before Triton is imported."""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def _reason_to_skip():
    try:
        triton, numpy = (
            tuple(map(int, version(name).split("+")[0].split(".")[:2]))
            for name in ("triton", "numpy")
        )
    except PackageNotFoundError:
        return "Triton is not installed"
    return (
        "the interpreter of Triton < 3.7 needs numpy < 2.4"
        if triton < (3, 7) and numpy >= (2, 4)
        else None
    )


@pytest.mark.skipif(_reason_to_skip() is not None, reason=str(_reason_to_skip()))
@pytest.mark.parametrize("name", ["kernels_interpreted", "kernels_mutated", "kernels_not_finite"])
def test_kernels_under_the_interpreter(name):
    cases = Path(__file__).with_name(f"{name}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=cases.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
