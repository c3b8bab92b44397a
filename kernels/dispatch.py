"""Register the operators `headwater::attention` and `headwater::residual_tap` with torch, and send them to a backend.

Operators return plain tensors; what was not asked for is an empty tensor. CUDA (and HIP) tensors go to Triton, which is
imported only then; CPU tensors to the row blocks; float64, and devices that Triton cannot serve, to the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch

from headwater.kernels.cpu.attention import attention_cpu
from headwater.kernels.gpu.launch import MAX_HEAD, TRITON_TYPES, Config, choose
from headwater.kernels.output import FLOAT_ROWS, AttentionOutput, ResidualOutput, n_causal_tiles
from headwater.kernels.reference import attention_reference, exact_type, residual_reference

Packed = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]
PackedTap = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
ATTENTION = (
    "headwater::attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? row_start, Tensor? features, int edge, "
    "bool statistics, ScalarType pattern_dtype) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
RESIDUAL = (
    "headwater::residual_tap(Tensor x, Tensor? delta, Tensor? weight, Tensor? bias, float epsilon, Tensor? previous, "
    "Tensor(a!) out, Tensor(b!)? slot) -> (Tensor, Tensor, Tensor)"
)


def has_triton() -> bool:
    """Say whether Triton is installed."""
    return find_spec("triton") is not None


def attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    row_start: torch.Tensor | None,
    features: torch.Tensor | None,
    edge: int,
    statistics: bool,
    pattern_dtype: torch.dtype,
) -> Packed:
    """Launch the kernels that give what was asked for; a pattern together with statistics takes a launch each."""
    from headwater.kernels.gpu.column_mass import plan_column_mass
    from headwater.kernels.gpu.pattern import plan_pattern
    from headwater.kernels.gpu.row_statistics import plan_statistics

    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    wanted = statistics or features is not None
    pattern, column, row, sums = (q.new_empty(0) for _ in range(4))
    argmax = q.new_empty(0, dtype=torch.int32)

    kernel_of_rows = "flash"
    if wanted:
        kernel_of_rows = "statistics"

    def config(kernel: str) -> Config:
        return choose(kernel, q.device, q.shape[-1], q.dtype)

    if wanted or edge == 0:
        z, lse, row, argmax, sums = plan_statistics(
            q,
            k,
            v,
            scale=scale,
            row_start=row_start,
            statistics=statistics,
            features=features,
            config=config(kernel_of_rows),
        ).run()
        if not statistics:
            row = q.new_empty(0)
            argmax = q.new_empty(0, dtype=torch.int32)
        if features is None:
            sums = q.new_empty(0)
    if edge:
        z, lse, pattern = plan_pattern(
            q,
            k,
            v,
            scale=scale,
            row_start=row_start,
            edge=edge,
            pattern_dtype=pattern_dtype,
            config=config("pattern"),
        ).run()
    if statistics:
        (column,) = plan_column_mass(
            q, k, lse, scale=scale, row_start=row_start, config=config("column")
        ).run()
    return z, lse, pattern, row, argmax, column, sums


def pack(out: AttentionOutput, like: torch.Tensor) -> Packed:
    """Turn the output of a torch backend into the operator's tensors."""
    row = None
    argmax = like.new_empty(0, dtype=torch.int32)
    if out.row:
        row = torch.stack([out.row[name] for name in FLOAT_ROWS])
        argmax = out.row["attn_argmax"].contiguous()
    tensors = (out.z, out.lse, out.pattern, row, argmax, out.column, out.features)
    z, lse, kept, rows, place, column, features = (
        like.new_empty(0) if x is None else x.contiguous() for x in tensors
    )
    return z, lse, kept, rows, place, column, features


def unpack(packed: Packed, edge: int, statistics: bool, features: bool) -> AttentionOutput:
    """Turn the operator's tensors into a named output."""
    z, lse, pattern, row, argmax, column, sums = packed
    out = AttentionOutput(z, lse)
    if edge:
        out = out._replace(pattern=pattern)
    if statistics:
        names = {**dict(zip(FLOAT_ROWS, row, strict=True)), "attn_argmax": argmax}
        out = out._replace(row=names, column=column)
    if features:
        out = out._replace(features=sums)
    return out


def attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    row_start: torch.Tensor | None,
    features: torch.Tensor | None,
    edge: int,
    statistics: bool,
    pattern_dtype: torch.dtype,
) -> Packed:
    """Compute by the reference."""
    pattern = ("square" if edge < 0 else "tiles") if edge else None
    out = attention_reference(
        q,
        k,
        v,
        scale=scale,
        row_start=row_start,
        pattern=pattern,
        edge=edge,
        statistics=statistics,
        features=features,
        pattern_dtype=pattern_dtype,
    )
    return pack(out, q)


def attention_on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    row_start: torch.Tensor | None,
    features: torch.Tensor | None,
    edge: int,
    statistics: bool,
    pattern_dtype: torch.dtype,
) -> Packed:
    """Compute by row blocks; float64 by the reference, for the row blocks are float32."""
    if q.dtype == torch.float64:
        return attention_torch(q, k, v, scale, row_start, features, edge, statistics, pattern_dtype)
    out = attention_cpu(
        q,
        k,
        v,
        scale=scale,
        row_start=row_start,
        edge=edge,
        statistics=statistics,
        features=features,
        pattern_dtype=pattern_dtype,
    )
    return pack(out, q)


def _serves(x: torch.Tensor) -> bool:
    """Say whether the Triton kernels take a tensor's type and device: sm_80 or later, or AMD."""
    recent = torch.version.hip is not None or torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.dtype in TRITON_TYPES and has_triton() and recent


def _attention_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    row_start: torch.Tensor | None,
    features: torch.Tensor | None,
    edge: int,
    statistics: bool,
    pattern_dtype: torch.dtype,
) -> Packed:
    attend = attention_torch
    if q.shape[-1] <= MAX_HEAD and _serves(q):
        attend = attention_triton
    return attend(q, k, v, scale, row_start, features, edge, statistics, pattern_dtype)


def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    row_start: torch.Tensor | None,
    features: torch.Tensor | None,
    edge: int,
    statistics: bool,
    pattern_dtype: torch.dtype,
) -> Packed:
    n, n_positions, n_head, _ = q.shape
    exact = exact_type(q.dtype)
    plane = (n, n_head, n_positions)
    # An operator returns tensors only: what was not asked for is an empty one, as in `pack`.
    pattern, row, column, sums = (q.new_empty(0) for _ in range(4))
    argmax = q.new_empty(0, dtype=torch.int32)
    if edge > 0:
        tiles = (n, n_head, n_causal_tiles(n_positions, edge), edge, edge)
        pattern = q.new_empty(tiles, dtype=pattern_dtype)
    elif edge:
        pattern = q.new_empty((*plane, n_positions), dtype=pattern_dtype)
    if statistics:
        row = q.new_empty((len(FLOAT_ROWS), *plane), dtype=exact)
        argmax = q.new_empty(plane, dtype=torch.int32)
        column = q.new_empty(plane, dtype=exact)
    if features is not None:
        sums = q.new_empty((*plane, features.shape[-1]), dtype=exact)
    z = q.new_empty(q.shape, dtype=v.dtype)
    lse = q.new_empty(plane, dtype=exact)
    return z, lse, pattern, row, argmax, column, sums


def residual_torch(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    previous: torch.Tensor | None,
    out: torch.Tensor,
    slot: torch.Tensor | None,
) -> PackedTap:
    """Compute the residual tap by the reference; write `out` and `slot` last, for they may be the inputs."""
    capture_dtype = None
    if slot is not None:
        capture_dtype = slot.dtype
    got = residual_reference(
        x,
        delta,
        weight,
        bias,
        epsilon=epsilon,
        previous=previous,
        capture_dtype=capture_dtype,
    )
    if slot is not None:
        # The slot takes the exact sum, not the one that the stream's type has rounded.
        total = x.to(exact_type(x.dtype))
        if delta is not None:
            total = total + delta.to(total.dtype)
        slot.copy_(total)
    out.copy_(got.x)
    floats = torch.stack([got.scale, got.norm, got.cosine, got.largest])
    ints = torch.stack([got.dimension, got.overflow, got.nonfinite])
    normed = x.new_empty(0)
    if got.normed is not None:
        normed = got.normed.contiguous()
    return normed, floats, ints


def _residual_cuda(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    previous: torch.Tensor | None,
    out: torch.Tensor,
    slot: torch.Tensor | None,
) -> PackedTap:
    if not _serves(x):
        return residual_torch(x, delta, weight, bias, epsilon, previous, out, slot)
    return residual_triton(x, delta, weight, bias, epsilon, previous, out, slot)


def residual_triton(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    previous: torch.Tensor | None,
    out: torch.Tensor,
    slot: torch.Tensor | None,
) -> PackedTap:
    """Launch the residual kernel."""
    from headwater.kernels.gpu.residual import plan_residual

    config = choose("residual", x.device, x.shape[-1], x.dtype)
    launch = plan_residual(
        x,
        delta,
        weight,
        bias,
        epsilon=epsilon,
        previous=previous,
        out=out,
        slot=slot,
        config=config,
    )
    normed, floats, ints = launch.run()
    return normed, floats, ints


def _residual_fake(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    epsilon: float,
    previous: torch.Tensor | None,
    out: torch.Tensor,
    slot: torch.Tensor | None,
) -> PackedTap:
    n = x.shape[0]
    if weight is None:
        normed = x.new_empty(0)
    else:
        normed = x.new_empty(x.shape)
    return (
        normed,
        x.new_empty((4, n), dtype=exact_type(x.dtype)),
        x.new_empty((3, n), dtype=torch.int32),
    )


def name_residual(x: torch.Tensor, packed: PackedTap, lead: torch.Size) -> ResidualOutput:
    """Turn the operator's tensors, rows of [R], into a named output of leading shape `lead`."""
    normed, floats, ints = packed
    shaped = None
    if normed.numel():
        shaped = normed.view(x.shape)
    scale, norm, cosine, largest = floats.view(4, *lead)
    dimension, overflow, nonfinite = ints.view(3, *lead)
    return ResidualOutput(
        x,
        shaped,
        scale,
        norm,
        cosine,
        largest,
        dimension,
        overflow,
        nonfinite,
    )


def _register(schema: str, fake: Callable[..., object], **backends: Callable[..., object]) -> None:
    name = schema.split("(")[0]
    torch.library.define(name, schema[len(name) :], tags=(torch.Tag.pt2_compliant_tag,))
    for device, function in backends.items():
        torch.library.impl(name, device)(function)
    torch.library.register_fake(name)(fake)


_register(
    ATTENTION, _attention_fake, cpu=attention_on_cpu, cuda=_attention_cuda, mps=attention_torch
)
_register(RESIDUAL, _residual_fake, cpu=residual_torch, cuda=_residual_cuda, mps=residual_torch)
