"""The GPT-2 forward pass on the kernels: attention with what it gives back, and residual taps, a launch each.

It runs on any device; on the CPU the same operators are computed by torch. Attention takes q, k and v in the compute
type, where the forward of `headwater.extractor.model.forward` widens them to float32.
"""

from __future__ import annotations

from typing import Any

import torch

from headwater.extractor.model.batch import NO_HOOK, Batch
from headwater.extractor.model.device_tap import cut_tiles
from headwater.extractor.model.forward import Model
from headwater.extractor.model.tap import Tap
from headwater.extractor.model.weights import Checkpoint
from headwater.extractor.sites import RequestError
from headwater.kernels.attention import attention
from headwater.kernels.cpu.rows import STATISTICS
from headwater.kernels.mask import visible
from headwater.kernels.output import AttentionOutput, ResidualOutput
from headwater.kernels.residual import residual_tap


class KernelModel(Model):
    """A GPT-2 whose attention and residual additions are launches of the kernels; `impl` is that of the kernels."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        compute: str = "fp32",
        device: torch.device | str = "cpu",
        impl: Any = "auto",
    ) -> None:
        super().__init__(checkpoint, compute, device)
        self.impl = impl

    def layer(
        self,
        layer: int,
        x_BTD: torch.Tensor,
        batch: Batch,
        tap: Tap,
        previous: torch.Tensor | None = None,
    ) -> ResidualOutput:
        """Advance the residual stream through one block, in place; return what the last addition told of the sum.

        `tap` is a DeviceTap, or a NoTap; the sum's copy in the stored type goes to its slot.
        """
        if batch.hook is not NO_HOOK:
            raise RequestError(
                "edits change the forward of the CPU only; take a Model instead of a KernelModel."
            )
        b = f"h.{layer}."
        w = self._weights
        normed = self._norm(b + "ln_1", x_BTD, batch, tap, "ln1", layer)
        z = self._attention(layer, normed, batch, tap)
        delta = self._part(b + "attn.c_proj", z, tap, "attn_out", layer)
        epsilon = self.config.layer_norm_epsilon
        mid = residual_tap(
            x_BTD,
            delta,
            w[b + "ln_2.weight"],
            w[b + "ln_2.bias"],
            epsilon=epsilon,
            out=x_BTD,
            impl=self.impl,
        )
        assert mid.normed is not None
        for site, value in (
            ("resid_mid", mid.x),
            ("ln2_scale", mid.scale),
            ("ln2_out", mid.normed),
        ):
            if tap.wants(site, layer):
                tap.take(site, layer, value)
        delta = self._part(
            b + "mlp.c_proj",
            self._neurons(layer, mid.normed.to(self.compute), batch, tap),
            tap,
            "mlp_out",
            layer,
        )
        return residual_tap(
            x_BTD,
            delta,
            epsilon=epsilon,
            out=x_BTD,
            previous=previous,
            slot=tap.slot(layer + 1, x_BTD),
            impl=self.impl,
        )

    def _part(self, name: str, x: torch.Tensor, tap: Tap, site: str, layer: int) -> torch.Tensor:
        out = self._linear(name, x, "out")
        if tap.wants(site, layer):
            tap.take(site, layer, out)
        return out

    def _attention(self, layer: int, normed: torch.Tensor, batch: Batch, tap: Tap) -> torch.Tensor:
        c, (n, length) = self.config, batch.tokens.shape
        qkv = self._linear(f"h.{layer}.attn.c_attn", normed, "qkv")
        q, k, v = (part.view(n, length, c.n_head, c.d_head) for part in qkv.chunk(3, -1))
        for site, value in (("q", q), ("k", k), ("v", v)):
            if tap.wants(site, layer):
                tap.take(site, layer, value)
        request = self._request(layer, batch, tap)
        out = attention(
            q, k, v, scale=self.scale(layer), row_start=batch.row_start, impl=self.impl, **request
        )
        self._give(layer, out, batch, tap)
        if tap.wants("attn_scores", layer):
            self._give_scores(layer, q, k, batch, tap)
        if tap.wants("z", layer):
            tap.take("z", layer, out.z)
        self._tap_results(layer, out.z, tap)
        return out.z.view(n, length, c.d_model)

    def _request(self, layer: int, batch: Batch, tap: Tap) -> dict[str, Any]:
        """Return what attention is asked for; tiles only where they are those of the store, else the square."""
        request: dict[str, Any] = {"statistics": any(tap.wants(site, layer) for site in STATISTICS)}
        if tap.wants("pattern", layer):
            edge, dtype = tap.tile("pattern")
            tiled = edge % 16 == 0 and edge < batch.tokens.shape[1]
            request |= {
                "pattern": "tiles" if tiled else "square",
                "edge": edge,
                "pattern_dtype": dtype,
            }
        return request

    def _give(self, layer: int, out: AttentionOutput, batch: Batch, tap: Tap) -> None:
        if out.pattern is not None:
            edge, _ = tap.tile("pattern")
            square = out.pattern.ndim == 4
            tap.take_tiles(
                "pattern", layer, out.pattern[:, :, None, :edge, :edge] if square else out.pattern
            )
        rows = dict(out.row or {})
        if out.column is not None:
            rows["attn_received"] = out.column
        for site in STATISTICS:
            if tap.wants(site, layer):
                tap.take(site, layer, rows[site])

    def _give_scores(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, batch: Batch, tap: Tap
    ) -> None:
        """Give the scores, NaN at hidden keys, one sequence after another."""
        edge, dtype = tap.tile("attn_scores")
        exact = self.stream
        tiles = []
        overflow = []
        for b, start in enumerate(batch.row_start):
            scores = self.scale(layer) * torch.einsum(
                "qnh,knh->nqk", q[b].to(exact), k[b].to(exact)
            )
            stored = scores.to(dtype)
            seen = visible(start)
            overflow.append((stored.isinf() & scores.isfinite() & seen).sum())
            stored.masked_fill_(~seen, torch.nan)
            tiles.append(cut_tiles(stored[None, :, :, :], edge, torch.nan))
        tap.take_tiles("attn_scores", layer, torch.cat(tiles), torch.stack(overflow))


def load_model(checkpoint: Checkpoint, compute: str = "fp32", device: str = "cpu") -> Model:
    """Make the model that a device runs best: row blocks on the CPU, the kernels elsewhere.

    Raises RequestError for a device that torch does not find here.
    """
    check_device(device)
    return (
        Model(checkpoint, compute) if device == "cpu" else KernelModel(checkpoint, compute, device)
    )


def check_device(device: str) -> None:
    """Raise RequestError unless torch can use a device."""
    n = torch.cuda.device_count()
    index = int(device.partition(":")[2] or 0)
    if device != "cpu" and index >= n:
        found = "no GPU here" if n == 0 else f"{n} here, cuda:0 to cuda:{n - 1}"
        raise RequestError(
            f"--device is {device!r}, but torch {torch.__version__} finds {found}. Use --device cpu, or "
            "install a torch that is built for your GPU."
        )
