"""Read the disassembly of a kernel: its inner loops, and their instructions by the pipe that runs them."""

from __future__ import annotations

import re
from collections import Counter

PIPES = ("tensor", "fma", "alu", "xu", "shared", "global", "uniform", "control")
_NAMES = {
    "tensor": r"HMMA|HGMMA|IMMA|QGMMA|UTC\w*MMA",
    "fma": r"FFMA2?|FMUL2?|FADD2?|IMAD|HFMA2|HMUL2|HADD2|FFMA32I|FMUL32I|FADD32I",
    "xu": r"MUFU|F2I|I2F|I2FP|F2F|FRND|POPC|FLO",
    "shared": r"LDS|STS|LDSM|STSM|LDTM|STTM|SHFL|LDT|STT|MOVM|REDUX",
    "global": r"LDG|STG|LDGSTS|ATOMG?|REDG?|UTMALDG|UTMASTG|UBLKCP|LDL|STL|CCTL|UTMAPF|LD|ST",
    "control": (
        r"BRA|BAR|SYNCS|WARPSYNC|DEPBAR|NOP|WARPGROUP|BSSY|BSYNC|EXIT|FENCE|MEMBAR|ELECT|NANOSLEEP|LDGDEPBAR|"
        r"YIELD|CALL|RET|LDC|LDCU|S2R|CS2R|UTMACMDFLUSH|UTMACCTL|WARPGROUPDEPBAR|ERRBAR|UTCBAR|BMOV|BREAK|"
        r"ACQBULK|ARRIVES|PLOP3|VOTE|VOTEU|UCGABAR_\w+|R2UR|S2UR|PREEXIT|USETMAXREG|UVIRTCOUNT"
    ),
}
_PIPE_OF = [(pipe, re.compile(rf"(?:{names})")) for pipe, names in _NAMES.items()]
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)([^;]*);", re.M)


def instructions(text: str) -> list[tuple[int, str, str]]:
    """Return (address, name, the rest) of every instruction in the output of cuobjdump or nvdisasm."""
    return [(int(at, 16), name, rest) for at, name, rest in _LINE.findall(text)]


def pipe_of(name: str) -> str:
    """Return the pipe of an instruction by its name without suffixes; what no list names is integer and logic (alu)."""
    for pipe, names in _PIPE_OF:
        if names.fullmatch(name):
            return pipe
    if name.startswith("U"):
        return "uniform"
    return "alu"


def product_loops(text: str) -> list[Counter[str]]:
    """Return the instructions by pipe of one turn of every innermost loop that holds a matrix product, in order.

    A loop is a branch backwards. The shortest win: code that lies apart branches back into the middle of a loop.
    """
    lines = instructions(text)
    tensor = [at for at, name, _ in lines if pipe_of(name) == "tensor"]
    spans = []
    for at, name, rest in lines:
        if name == "BRA":
            target = re.search(r"0x([0-9a-f]+)", rest)
        else:
            target = None
        if target and any(int(target[1], 16) <= t < at for t in tensor):
            spans.append((int(target[1], 16), at))
    inner: list[tuple[int, int]] = []
    for first, last in sorted(spans, key=lambda span: span[1] - span[0]):
        if all(last < a or b < first for a, b in inner):
            inner.append((first, last))
    return [
        Counter(pipe_of(name) for at, name, _ in lines if a <= at <= b) for a, b in sorted(inner)
    ]


def tile_instructions(kernel: str, text: str) -> Counter[str] | None:
    """Return the instructions of one warp for one tile of scores that needs no mask, or None where loops are not found.

    The pattern kernel passes a tile twice: its loops are full, masked, full, masked; statistics are full, masked; the
    column kernel is masked, full. A variant without full loops has half as many.
    """
    loops = product_loops(text)
    if kernel == "pattern":
        if len(loops) in (2, 4):
            return loops[0] + loops[len(loops) // 2]
        return None
    if len(loops) not in (1, 2):
        return None
    return loops[-1 if kernel == "column" else 0]
