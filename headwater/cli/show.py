"""Print plans, arrays and JSON on standard output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headwater.extractor.units import count, show_bytes

if TYPE_CHECKING:
    from headwater.extractor.limits import Projection
    from headwater.extractor.plan import Plan
    from headwater.store.layout import ArraySpec

BOUNDS = {"compute": "compute", "link": "the link from the GPU", "disk": "the disk"}


def text_lines(text: Mapping[str, Any]) -> list[str]:
    """Say what a reader should know of how a text became sequences; `text` is what the manifest keeps of it."""
    lines: list[str] = []
    packing = text.get("packing")
    documents = text.get("documents")
    if packing is not None:
        # Runs that were made before there was --special-tokens spelled them out.
        became = "are spelled out as text"
        if text["request"].get("special_tokens") == "ids":
            became = "are ids"
        lines.append(f"special tokens that stand in the text {became} (--special-tokens)")
    if packing is not None and documents and packing["mode"] == "document" and documents["cut"]:
        lines.append(
            f"{documents['cut']:,} of {count(documents['n'], 'document')} cut: the rest of each is in no sequence "
            "(--stride makes several sequences of one)"
        )
    return lines


def print_plan(plan: Plan, free: int, memory: int) -> None:
    """Print each array with its bytes, what the run needs and what there is, and what a reader should know."""
    from headwater.extractor.budget import ENDLESS

    shape = plan.geometry
    sizes = plan.array_bytes()
    n_tokens = plan.n_sequences * shape.seq_len
    print(
        f"{count(plan.n_sequences, 'sequence')} of {count(shape.seq_len, 'position')}, "
        f"{count(plan.n_blocks, 'block')} of {count(shape.block, 'sequence')}"
    )
    for spec in plan.arrays:
        print(
            array_line(
                spec, sizes[spec.name], f"{show_bytes(sizes[spec.name] / n_tokens):>9}/token"
            )
        )
    for name, size in (("the rest", plan.text_bytes), ("total", plan.total_bytes)):
        print(f"  {name:15}{show_bytes(size):>9}{show_bytes(size / n_tokens):>9}/token")
    room = f"{show_bytes(free)} free"
    if free >= ENDLESS:
        room = "in an object store"
    print(f"disk    {show_bytes(plan.total_bytes)} needed, {room}")
    print(f"memory  {show_bytes(plan.host_bytes)} needed, {show_bytes(memory)} available")
    for note in plan.notes:
        print(f"note: {note}")
    names, share = plan.heaviest()
    if len(plan.arrays) > 1:
        verb = "takes" if len(names) == 1 else "take"
        print(f"note: {', '.join(names)} {verb} {share:.0%} of the bytes")
    for line in text_lines(plan.text):
        print(f"note: {line}")
    if plan.certain_bytes < plan.total_bytes:
        # How far a codec shrinks values is known only once they are there: the plan counts them raw, and is refused
        # only where even what cannot shrink does not fit.
        shrinking = show_bytes(plan.total_bytes - plan.certain_bytes)
        must = ""
        if plan.total_bytes > free >= plan.certain_bytes:
            must = ", and must, to fit on the disk"
        print(f"note: bytes are counted before --codec; {shrinking} will shrink{must}")
    if any(spec.dtype == "float16" and spec.name in ("resid", "resid_mid") for spec in plan.arrays):
        print(
            "note: float16 has steps of 2 between 2048 and 4096, where massive activations lie; --dtype resid=float32 "
            "keeps them exact"
        )


def print_projection(projection: Projection, names: list[str]) -> None:
    """Print which limit a run will meet, what that rests on, and what would stream where squares cannot.

    `names` are the square sites of the run.
    """
    p = projection
    units = {"compute": ("TFLOP/s", 1e12), "link": ("GB/s", 1e9), "disk": ("GB/s", 1e9)}
    speeds = ", ".join(f"{name} {value:,.0f}" for name, value in p.tokens_per_second.items())
    print(f"speed   tokens a second, projected, not measured: {speeds}; bound by {BOUNDS[p.bound]}")
    rests = ", ".join(
        f"{name} {rate.value / units[name][1]:.3g} {units[name][0]} {rate.how}"
        for name, rate in p.rates.items()
    )
    print(f"        from {rests}; --assume states others")
    # A square site writes a row of keys for every query, so it often waits for the link or the disk.
    slowest = p.tokens_per_second[p.bound]
    compute = p.tokens_per_second["compute"]
    if p.statistics is not None and p.bound != "compute" and slowest < compute / 2:
        print(
            f"note: {' and '.join(names)} cannot stream: {BOUNDS[p.bound]} allows {slowest / compute:.0%} of the speed "
            f"of compute. Row statistics instead (--preset statistics) allow {min(p.statistics / compute, 1):.0%}; "
            "keep patterns for samples, with --max-sequences or --layers"
        )


def print_bottleneck(seconds: dict[str, float]) -> None:
    """Print which part of a run was busiest, and how busy the others were beside it."""
    from headwater.extractor.limits import bottleneck

    # Computing and writing overlap: a run takes about as long as the busier of them, not their sum.
    name, busy = bottleneck(seconds)
    others = ", ".join(
        f"{other} {value / max(busy[name], 1e-9):.0%}"
        for other, value in busy.items()
        if other != name
    )
    print(
        f"limit    {name}, busy {busy[name]:.1f} s; beside it {others} of that; waits {seconds.get('wait', 0):.1f} s"
    )


def array_line(spec: ArraySpec, size: int, more: str = "") -> str:
    """Describe an array in one line: name, bytes, `more`, stored type and codec, dimensions."""
    sizes = [f"{dim} {n}" for dim, n in zip(spec.dims, spec.shape, strict=True)]
    stored = spec.dtype
    if spec.codec != "none":
        stored += f" {spec.codec}"
    name_and_bytes = f"  {spec.name:15}{show_bytes(size):>9}"
    return f"{name_and_bytes}{more}  {stored:8}  ({', '.join(sizes)})"


def print_json(value: object) -> None:
    """Print a value as JSON."""
    print(json.dumps(value, indent=2, allow_nan=False))
