"""The kernels on a GPU: checked against float64 first, then timed against what one would use without them.

For GPT-2's shapes: time, bytes, the share of the copy bandwidth measured in the same run, and the ratio to eager
attention, SDPA with a recomputed pattern, SDPA alone, Triton flash attention alone, and compiled eager attention.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from headwater.benchmarks.lib.measure import write_csv
from headwater.benchmarks.lib.rows import Row
from headwater.kernels.attention import attention
from headwater.kernels.gpu.launch import HEAD_SIZES
from headwater.kernels.output import AttentionOutput, ResidualOutput
from headwater.kernels.reference import attention_reference, residual_reference, row_statistics
from headwater.kernels.residual import residual_tap

SHAPES = {
    "small": (12, 64, 768),
    "medium": (16, 64, 1024),
    "large": (20, 64, 1280),
    "xl": (25, 64, 1600),
}
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
TOKENS = 16384
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
QUEUE_CYCLES = 2_000_000
SMALLEST = 1e-3
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 8e-3}
GOALS = {
    "pattern": ("share_of_write_limit ≥ 0.6", "x_eager ≥ 6"),
    "statistics": ("x_flash ≥ 0.71", "x_eager_statistics ≥ 8"),
    "residual": ("share_of_copy ≥ 0.85",),
}
NO_GPU = """No CUDA device here, so nothing can be timed: every figure of the kernels on a GPU is not measured yet.

What can be had without one:
  python -m headwater.benchmarks kernels --static        instructions, registers, bytes counted, a model of time
  python -m headwater.benchmarks.gpu.aot --all               every configuration compiled and held to its budget
  python -m headwater.benchmarks kernels --device cpu    this program on the CPU's path: a test of it, no result
"""


@dataclass(frozen=True)
class Inputs:
    """One shape: views of a fused projection, row starts, and a residual stream with what is added to it."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    start: torch.Tensor
    x: torch.Tensor
    delta: torch.Tensor
    weight: torch.Tensor
    edge: int

    @property
    def scale(self) -> float:
        """The factor on q · k."""
        return float(self.q.shape[-1] ** -0.5)


def make_inputs(
    n: int, n_positions: int, sizes: tuple[int, int, int], dtype: torch.dtype, device: str
) -> Inputs:
    """Draw inputs of a shape on a device."""
    n_head, d_head, d_model = sizes
    make = torch.Generator(device).manual_seed(0)
    fused = torch.randn(n, n_positions, 3, n_head, d_head, generator=make, device=device).to(dtype)
    q, k, v = fused.unbind(2)
    start = torch.zeros(n, n_positions, dtype=torch.int32, device=device)
    x, delta = (
        torch.randn(n, n_positions, d_model, generator=make, device=device).to(t)
        for t in (torch.float32, dtype)
    )
    weight = torch.ones(d_model, device=device)
    return Inputs(q, k, v, start, x, delta, weight, 256 if n_positions % 256 == 0 else n_positions)


def check(inputs: Inputs) -> list[str]:
    """Compare every kernel with float64 on one sequence of two heads of the inputs; return what is wrong."""
    i = inputs
    dtype = inputs.q.dtype
    q, k, v = (x[:1, :, :2] for x in (i.q, i.k, i.v))
    arguments: Row = {
        "scale": i.scale,
        "row_start": i.start[:1],
        "pattern": "tiles",
        "edge": i.edge,
        "statistics": True,
    }
    got = attention(q, k, v, **arguments)
    want = attention_reference(q.double(), k.double(), v.double(), **arguments)
    return [*_compare_attention(got, want, TOLERANCE[dtype]), *_compare_tap(inputs)]


def _compare_attention(
    got: AttentionOutput, want: AttentionOutput, tolerance: float
) -> Iterator[str]:
    assert got.row is not None and want.row is not None
    pairs = {
        "z": (got.z, want.z),
        "lse": (got.lse, want.lse),
        "pattern": (got.pattern, want.pattern),
        "column": (got.column, want.column),
    }
    pairs |= {name: (got.row[name], want.row[name]) for name in want.row if name != "attn_argmax"}
    for name, (a, b) in pairs.items():
        yield from _compare(name, a, b, tolerance)
    largest = got.row["attn_argmax"].long().clamp(min=0)
    if want.pattern is not None and want.pattern.shape[2] == 1:
        yield from _compare(
            "argmax",
            want.pattern[:, :, 0].gather(-1, largest[..., None])[..., 0],
            want.row["attn_max"],
            tolerance,
        )


def _compare_tap(i: Inputs) -> Iterator[str]:
    x = i.x[:1]
    delta = i.delta[:1]
    slot = torch.empty_like(x, dtype=torch.float16)
    got = residual_tap(x, delta, i.weight, i.weight, out=torch.empty_like(x), slot=slot)
    want = residual_reference(
        x.double(), delta.double(), i.weight, i.weight, capture_dtype=torch.float16
    )
    for name in ("x", "normed", "scale", "norm", "cosine", "largest"):
        yield from _compare(f"residual {name}", getattr(got, name), getattr(want, name), 1e-5)
    yield from _compare("residual slot", slot, want.x, 1e-3)


def _compare(name: str, got: Any, want: Any, tolerance: float) -> Iterator[str]:
    least = SMALLEST * want.numel() ** 0.5  # the entropy of a row with one key is 0
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp(min=least))
    if not error <= tolerance:
        yield f"{name}: relative error {error:.1e} to float64, expected at most {tolerance:.0e}"


def eager(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute attention as transformers' eager path does; return z and the pattern."""
    q, k, v = (x.transpose(1, 2) for x in (i.q, i.k, i.v))
    scores = torch.matmul(q, k.transpose(2, 3)) * i.scale
    hidden = torch.full(
        scores.shape[-2:], torch.finfo(scores.dtype).min, dtype=scores.dtype, device=q.device
    ).triu(1)
    p = torch.softmax(scores + hidden, -1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(p, v).transpose(1, 2).contiguous(), p


def eager_statistics(i: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Compute eager attention and the same statistics from its pattern."""
    z, p = eager(i)
    return z, row_statistics(p.float(), i.start), p.sum(-2)


def sdpa(i: Inputs) -> torch.Tensor:
    """Compute torch's fused attention, which gives no pattern."""
    q, k, v = (x.transpose(1, 2) for x in (i.q, i.k, i.v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=i.scale)


def unfused_tap(i: Inputs, slot: torch.Tensor) -> ResidualOutput:
    """Compute the residual tap by torch, an operation a launch."""
    got = residual_reference(i.x, i.delta, i.weight, i.weight, capture_dtype=torch.float16)
    slot.copy_(got.x)
    return got


def make_cases(i: Inputs, compiled: bool) -> dict[str, Callable[[], Any]]:
    """Return everything that is timed for a shape, by name."""
    common: Row = {"scale": i.scale, "row_start": i.start}
    slot = torch.empty_like(i.x, dtype=torch.float16)
    out = torch.empty_like(i.x)
    source = torch.empty(max(i.q.numel() * 8, 1 << 20), dtype=torch.uint8, device=i.q.device)
    target = torch.empty_like(source)
    cases: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "pattern": lambda: attention(i.q, i.k, i.v, **common, pattern="tiles", edge=i.edge),
        "pattern, square": lambda: attention(i.q, i.k, i.v, **common, pattern="square"),
        "statistics": lambda: attention(i.q, i.k, i.v, **common, statistics=True),
        "flash": lambda: attention(i.q, i.k, i.v, **common),
        "residual": lambda: residual_tap(i.x, i.delta, i.weight, i.weight, out=out, slot=slot),
        "eager": lambda: eager(i),
        "eager, statistics": lambda: eager_statistics(i),
        "sdpa + pattern": lambda: (sdpa(i), eager(i)[1]),
        "sdpa": lambda: sdpa(i),
        "residual, unfused": lambda: unfused_tap(i, slot),
    }
    if compiled:
        fast = torch.compile(eager)
        cases["compiled eager"] = lambda: fast(i)
    return cases


def bytes_of(case: str, i: Inputs) -> int:
    """Return the least bytes that a case moves: every input and output once; 0 where that says nothing."""
    n, n_positions, n_head, d_head = i.q.shape
    rows = n * n_positions * n_head
    item = i.q.element_size()
    plain = rows * (4 * d_head * item + 4)
    tiles = -(-n_positions // i.edge)
    kept = 2
    if i.q.dtype == torch.float32:
        kept = 4
    square = {
        "pattern": tiles * (tiles + 1) // 2 * i.edge**2,
        "pattern, square": n_positions**2,
    }.get(case, 0)
    if case == "copy":
        return 2 * max(i.q.numel() * 8, 1 << 20)
    if case == "residual":
        return i.x.numel() * (4 + item + 4 + 4 + 2)
    if case in ("flash", "statistics", "pattern", "pattern, square"):
        return plain + n * n_head * square * kept + (rows * 32 if case == "statistics" else 0)
    return 0


def time_cases(cases: dict[str, Callable[[], Any]], device: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of each case; cases take turns, so that a clock that changes changes all."""
    once = _time_on_cpu
    if device.startswith("cuda"):
        once = _time_on_gpu
    for case in cases.values():
        case()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            seconds[name].append(once(case))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _time_on_gpu(case: Callable[[], Any]) -> float:
    """Return a case's seconds on the GPU alone: its launches are all queued before the first may begin."""
    event: Any = torch.cuda.Event
    begin = event(enable_timing=True)
    end = event(enable_timing=True)
    torch.empty(
        64 << 20, dtype=torch.int32, device="cuda"
    ).zero_()  # the L2 cache forgets the last case
    torch.cuda._sleep(QUEUE_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    case()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _time_on_cpu(case: Callable[[], Any]) -> float:
    start = time.perf_counter()
    case()
    return time.perf_counter() - start


def report(
    model: str, n_positions: int, dtype: str, i: Inputs, seconds: dict[str, float]
) -> list[Row]:
    """Turn seconds into lines: bytes a second against this run's copy, and how many times faster than the others."""
    copy = bytes_of("copy", i) / seconds["copy"]
    lines = []
    for case, value in seconds.items():
        n_bytes = bytes_of(case, i)
        line = {
            "model": model,
            "n_positions": n_positions,
            "dtype": dtype,
            "case": case,
            "us": round(value * 1e6, 2),
            "bytes": n_bytes,
            "share_of_copy": round(n_bytes / value / copy, 3) if n_bytes else "",
        }
        against = {
            "x_eager": "eager",
            "x_eager_statistics": "eager, statistics",
            "x_sdpa_pattern": "sdpa + pattern",
            "x_sdpa": "sdpa",
            "x_flash": "flash",
            "x_compiled_eager": "compiled eager",
            "x_unfused": "residual, unfused",
        }
        ours = case in GOALS or case == "pattern, square"
        lines.append(
            line
            | {
                name: round(seconds[other] / value, 2) if ours and other in seconds else ""
                for name, other in against.items()
            }
        )
    return lines


def run(options: argparse.Namespace) -> list[Row]:
    """Check and time every shape that the options ask for."""
    lines = []
    for model in options.models:
        for n_positions in options.lengths:
            n = max(options.tokens // n_positions, 1)
            inputs = make_inputs(
                n, n_positions, SHAPES[model], DTYPES[options.dtype], options.device
            )
            if wrong := check(inputs):
                raise RuntimeError(
                    f"{model}, T = {n_positions}, {options.dtype} is wrong, so it is not timed: "
                    f"{'; '.join(wrong)}"
                )
            seconds = time_cases(
                make_cases(inputs, options.compiled), options.device, options.rounds
            )
            new = report(model, n_positions, options.dtype, inputs, seconds)
            for line in new:
                print(
                    " ".join(
                        f"{value:>10}" if name != "case" else f"{value:24}"
                        for name, value in line.items()
                    ),
                    flush=True,
                )
            lines += new
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 where a kernel is wrong or there is no GPU."""
    parser = argparse.ArgumentParser(
        prog="python -m headwater.benchmarks kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--static", action="store_true", help="no GPU: compile, count bytes, model the time"
    )
    parser.add_argument(
        "--out", type=Path, help="with --static: every head size and type, into this CSV (slow)"
    )
    parser.add_argument(
        "--retune", action="store_true", help="time the candidates of this GPU, rewrite the table"
    )
    parser.add_argument(
        "--kernels",
        type=lambda text: text.split(","),
        default=["pattern", "statistics", "flash", "column"],
        help="with --retune (default: all)",
    )
    parser.add_argument(
        "--sizes",
        type=lambda text: list(map(int, text.split(","))),
        default=list(HEAD_SIZES),
        help="with --retune: head sizes (default: all)",
    )
    parser.add_argument(
        "--bits",
        type=lambda text: list(map(int, text.split(","))),
        default=[16, 32],
        help="with --retune: widths of the type (default: 16,32)",
    )
    parser.add_argument(
        "--device", default="cuda", help="cuda, or cpu to test this program (default: cuda)"
    )
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(SHAPES))
    parser.add_argument(
        "--lengths", type=lambda text: list(map(int, text.split(","))), default=list(LENGTHS)
    )
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help="tokens a shape (default: 16384)"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--compiled", action="store_true", help="time torch.compile of eager attention, too"
    )
    parser.add_argument("--save", action="store_true", help="write the lines to benchmarks/results")
    options = parser.parse_args(arguments)
    if options.static:
        from headwater.benchmarks.gpu.kernels_static import (
            every_row,
            faults,
            make_table,
            write_page,
        )

        if options.out:
            lines = make_table(options.out, list(every_row()))
        else:
            lines = make_table()
        if not options.out:
            write_page(lines)
        broken = faults(lines)
        print("\n".join(broken), file=sys.stderr)
        return int(bool(broken))
    if options.device != "cpu" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 1
    if options.retune:
        from headwater.benchmarks.gpu.retune import retune

        return retune(options.kernels, options.sizes, options.bits)
    if options.device == "cpu" and options.save:
        parser.error(
            "--save with --device cpu: these times say nothing of a GPU; leave one of the two out"
        )
    if options.device == "cpu":
        print(
            "on the CPU's path, as a test of this program; nothing here says anything of a GPU",
            file=sys.stderr,
        )
    try:
        lines = run(options)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    for case, goals in GOALS.items():
        print(f"goal of {case}: {', '.join(goals)}")
    if options.save:
        print(
            write_csv(
                "kernels", lines, keys=("model", "n_positions", "dtype"), device=options.device
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
