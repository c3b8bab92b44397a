"""Compile one launch of a kernel without a GPU, and read its code object: registers, spills, stores."""
# mypy: ignore-errors

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from headwater.kernels.gpu.program import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32"}


@dataclass(frozen=True)
class Compiled:
    """What one compiled kernel uses; `stores` maps the width of a global store in bits to how many there are."""

    seconds: float
    registers: int
    spills: int
    stack: int
    shared: int
    matrix: int
    stores: dict[int, int]
    tma_stores: int
    instructions: int
    text: str


def signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list]]:
    """Return types, constants and divisibility of a launch's arguments as the just-in-time compiler would see them."""
    types = {}
    constants = {}
    hints = {}
    for i, param in enumerate(launch.kernel.params):
        value = launch.arguments[param.name]
        if param.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            types[param.name], constants[param.name] = "constexpr", value
        elif isinstance(value, TensorDescriptor):
            block = ",".join(map(str, value.block_shape))
            types[param.name] = f"tensordesc<{NAMES[value.base.dtype]}[{block}]>"
        elif isinstance(value, torch.Tensor):
            types[param.name] = f"*{NAMES[value.dtype]}"
            hints[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[param.name] = "fp32"
        else:
            types[param.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    return types, constants, hints


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """Compile a launch for `arch` and disassemble it."""
    types, constants, hints = signature(launch)
    begin = time.perf_counter()
    made = triton.compile(
        ASTSource(launch.kernel, types, constants, hints),
        target=TARGETS[arch],
        options=launch.options,
    )
    seconds = time.perf_counter() - begin
    if arch.startswith("sm"):
        return _read_cuda(made, seconds)
    return _read_amd(made, seconds)


@cache
def _cuobjdump() -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")


def _read_cuda(made: Any, seconds: float) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "-res-usage", "-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
    stores: dict[int, int] = {}
    for line in re.findall(r"\bSTG(\.[\w.]+)", text):
        width = next(
            (int(w) for w in re.findall(r"\.(\d+)(?=\.|$)", line) if int(w) in (64, 128, 256)), 32
        )
        width = {"U8": 8, "U16": 16}.get(next(iter(re.findall(r"U8|U16", line)), ""), width)
        stores[width] = stores.get(width, 0) + 1
    return Compiled(
        seconds=seconds,
        registers=usage["REG"],
        spills=len(re.findall(r"\b(?:LDL|STL)\b", text)),
        stack=usage["STACK"],
        shared=made.metadata.shared,
        matrix=len(re.findall(r"\b(?:HGMMA|HMMA|UTCHMMA|UTCQMMA|UTC\w*MMA)\b", text)),
        stores=stores,
        tma_stores=len(re.findall(r"\bUTMASTG\b", text)),
        instructions=len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s", text, re.M)),
        text=text,
    )


def _read_amd(made: Any, seconds: float) -> Compiled:
    text = made.asm["amdgcn"]
    found = {
        key: int(value)
        for key, value in re.findall(
            r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size"
            r"|sgpr_spill_count):\s*(\d+)",
            text,
        )
    }
    stores: dict[int, int] = {}
    widths = {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32, "short": 16, "byte": 8}
    for kind in re.findall(r"\b(?:global|buffer)_store_(\w+?)(?:_d16_hi)?\b", text):
        stores[widths.get(kind, 0)] = stores.get(widths.get(kind, 0), 0) + 1
    return Compiled(
        seconds=seconds,
        registers=found["vgpr_count"],
        spills=found["vgpr_spill_count"],
        stack=found["private_segment_fixed_size"],
        shared=made.metadata.shared,
        matrix=len(re.findall(r"\bv_mfma_", text)),
        stores=stores,
        tma_stores=0,
        instructions=len(re.findall(r"^\t[a-z]\w+", text, re.M)),
        text=text,
    )
