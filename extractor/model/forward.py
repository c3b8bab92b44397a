"""The GPT-2 forward pass with taps, one layer at a time.

Shapes: B sequences, T positions (padded to a multiple of 16), N heads, H d_head, D d_model, M d_mlp, V d_vocab,
Q query, K key. The residual stream, LayerNorm, scores and softmax are float32 at every `compute`; matrix products with
weights run in `compute`. Weights are used raw: nothing is folded or centred.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator

import torch

from headwater.extractor.model.activations import ACTIVATIONS, activate, round_up
from headwater.extractor.model.batch import LOGIT_ROWS, Batch, logit_rows
from headwater.extractor.model.tap import Tap
from headwater.extractor.model.walk import Micro, walk
from headwater.extractor.model.weights import Checkpoint
from headwater.kernels.cpu import products
from headwater.kernels.cpu.rows import STATISTICS, attend
from headwater.kernels.cpu.workspace import Workspace
from headwater.kernels.mask import RowBlock
from headwater.kernels.output import ResidualOutput

# Read by MKL at its first product: the bits of a float32 product then depend on neither threads nor the other rows.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

COMPUTE = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
LOSS_VALUES = 1 << 20
OUTPUTS = ("loss", "top_logits", "top_tokens", "logits")
SLICE = 384


class Model:
    """A GPT-2 ready to run: weights in the compute type, and scratch memory that is allocated once."""

    def __init__(
        self, checkpoint: Checkpoint, compute: str = "fp32", device: torch.device | str = "cpu"
    ) -> None:
        self.config = checkpoint.config
        self.device = torch.device(device)
        self.compute = COMPUTE[compute]
        self.stream = torch.float64 if compute == "fp64" else torch.float32
        self.workspace = Workspace(self.device)
        exact = self.compute == torch.float32 and self.device.type == "cpu"
        self._openblas = exact and products.library() != "torch"
        self._activation = ACTIVATIONS[self.config.activation]
        self._weights = {
            name: tensor.to(
                self.device,
                self.compute if tensor.ndim == 2 and name.startswith("h.") else self.stream,
            )
            for name, tensor in checkpoint.tensors.items()
        }
        self._biases = {
            name: value.to(self.compute)
            for name, value in self._weights.items()
            if name.endswith(".bias")
        }
        head = self._weights["wte.weight" if self.config.tied else "lm_head.weight"]
        self._head = head.to(self.compute)

    def scale(self, layer: int) -> float:
        """Return the factor on q·k at a layer, by the configuration's two switches."""
        scale = 1 / math.sqrt(self.config.d_head) if self.config.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.config.scale_attn_by_inverse_layer_idx else scale

    def embed(self, batch: Batch, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return the residual stream at depth 0: float32 [B, T, D], written to `out` where one is given."""
        shape = (*batch.tokens.shape, self.config.d_model)
        x = torch.empty(shape, dtype=self.stream, device=self.device) if out is None else out
        torch.index_select(
            self._weights["wte.weight"], 0, batch.tokens.view(-1), out=x.view(-1, x.shape[-1])
        )
        x.add_(self._weights["wpe.weight"][batch.positions])
        return _changed(x, "resid", 0, batch)

    @torch.inference_mode()
    def run(self, batch: Batch, tap: Tap) -> torch.Tensor:
        """Run a whole batch, every depth, layer and output tapped; return the residual stream after the last layer."""
        shape = (*batch.tokens.shape, self.config.d_model)
        x = torch.empty(shape, dtype=self.stream, device=self.device)
        walk(self, [Micro(0, batch, x)], tap, self.config.n_layer)
        return x

    def layer(
        self,
        layer: int,
        x_BTD: torch.Tensor,
        batch: Batch,
        tap: Tap,
        previous: torch.Tensor | None = None,
    ) -> ResidualOutput | None:
        """Advance the residual stream through one block, in place.

        A model on kernels returns what the last of them told of the new stream, its cosine with `previous` included.
        """
        b = f"h.{layer}."
        batch.hook.prepare(self, layer, batch, tap)
        normed = self._norm(b + "ln_1", x_BTD, batch, tap, "ln1", layer)
        z = self._attention(layer, normed, batch, tap)
        self._add(x_BTD, z, b + "attn.c_proj", batch, tap, "attn_out", layer)
        _changed(x_BTD, "resid_mid", layer, batch)
        if tap.wants("resid_mid", layer):
            tap.take("resid_mid", layer, x_BTD)
        normed = self._norm(b + "ln_2", x_BTD, batch, tap, "ln2", layer)
        self._add(
            x_BTD,
            self._neurons(layer, normed, batch, tap),
            b + "mlp.c_proj",
            batch,
            tap,
            "mlp_out",
            layer,
        )
        _changed(x_BTD, "resid", layer + 1, batch)
        return None

    def finish(self, x_BTD: torch.Tensor, batch: Batch, tap: Tap) -> None:
        """Give the final LayerNorm's scale, the loss and the largest logits, as far as they are wanted."""
        top = tap.top_k
        outputs = [site for site in OUTPUTS if tap.wants(site, 0)]
        if not outputs and not any(
            tap.wants(site, 0) for site in ("ln_final_scale", "ln_final_out")
        ):
            return
        batch.hook.prepare(self, self.config.n_layer, batch, tap)
        normed = self._norm("ln_f", x_BTD, batch, tap, "ln_final", 0)
        if not outputs:
            return
        n, length = batch.tokens.shape
        loss = torch.full((n, length), math.nan, dtype=self.stream, device=self.device)
        logits_k = torch.empty(n, length, top, dtype=self.stream, device=self.device)
        tokens_k = torch.empty(n, length, top, dtype=torch.int32, device=self.device)
        whole = None
        if "logits" in outputs:
            shape = (n, length, self.config.d_vocab)
            whole = self.workspace.get("all_logits", shape, self.stream)
        for i in range(n):
            for part in self._logit_parts(length):
                exact = self._logits(normed[i : i + 1, part])
                if whole is not None:
                    whole[i, part] = exact
                if "top_logits" in outputs or "top_tokens" in outputs:
                    logits_k[i, part], tokens_k[i, part] = exact.topk(top)
                if "loss" in outputs:
                    loss[i, part] = _next_token_loss(exact, batch.targets[i, part])
        values = {"loss": loss, "top_logits": logits_k, "top_tokens": tokens_k, "logits": whole}
        for site, value in values.items():
            if site in outputs and value is not None:
                tap.take(site, 0, value)

    def _logit_parts(self, length: int) -> Iterator[slice]:
        """Cut a sequence into parts whose logits are held at once, on a CPU at whole groups of rows."""
        itemsizes = {self.compute: self.compute.itemsize, self.stream: self.stream.itemsize}
        most = logit_rows(self.config.d_vocab, sum(itemsizes.values()))
        step = max(most // products.GROUP - 1, 1) * products.GROUP
        for start in range(0, length, LOGIT_ROWS):
            n = min(LOGIT_ROWS, length - start)
            for first, last in products.cut_evenly(n, n if n <= most else step, products.GROUP):
                yield slice(start + first, start + last)

    def _logits(self, normed_1TD: torch.Tensor) -> torch.Tensor:
        """Return the logits [T, V] of some rows of one sequence, in scratch memory and the stream's type."""
        shape = (normed_1TD.shape[1], self.config.d_vocab)
        logits = self.workspace.get("logits", shape, self.compute)
        self._multiply(normed_1TD, self._head.T, None, logits[None])
        if self.compute == self.stream:
            return logits
        return self.workspace.get("exact_logits", shape, self.stream).copy_(logits)

    def _norm(
        self, name: str, x: torch.Tensor, batch: Batch, tap: Tap, site: str, layer: int
    ) -> torch.Tensor:
        """Return a LayerNorm's output in `compute`; its sites are `site`_scale and `site`_out."""
        scale_site = f"{site}_scale"
        weight = self._weights[f"{name}.weight"]
        bias = self._weights[f"{name}.bias"]
        normed, mean, inverse = torch.native_layer_norm(
            x, [x.shape[-1]], weight, bias, self.config.layer_norm_epsilon
        )
        if batch.hook.changes(scale_site, layer):
            scale = inverse.reciprocal()
            new = _changed(scale[..., 0].clone(), scale_site, layer, batch)[..., None]
            other = (new != scale)[..., 0]
            normed[other] = (x[other] - mean[other]) / new[other] * weight + bias
            inverse = torch.where(new == scale, inverse, new.reciprocal())
        if tap.wants(scale_site, layer):
            tap.take(scale_site, layer, inverse[..., 0].reciprocal())
        if tap.wants(f"{site}_out", layer):
            tap.take(f"{site}_out", layer, normed)
        return normed.to(self.compute)

    def _linear(self, name: str, x: torch.Tensor, buffer: str) -> torch.Tensor:
        """Return x W + b in `compute`, in scratch memory with room up to `round_up` of its elements."""
        weight = self._weights[f"{name}.weight"]
        shape = (*x.shape[:-1], weight.shape[1])
        out = self.workspace.get(buffer, (round_up(math.prod(shape)),), self.compute)[
            : math.prod(shape)
        ].view(shape)
        self._multiply(x, weight, self._biases[f"{name}.bias"], out)
        return out

    def _multiply(
        self,
        x_BTK: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        out_BTM: torch.Tensor,
    ) -> None:
        if self._openblas:
            products.multiply(x_BTK, weight, bias, out_BTM)
        else:
            _multiply(
                x_BTK.reshape(-1, x_BTK.shape[-1]), weight, bias, out_BTM.view(-1, weight.shape[1])
            )

    def _add(
        self,
        x: torch.Tensor,
        part: torch.Tensor,
        name: str,
        batch: Batch,
        tap: Tap,
        site: str,
        layer: int,
    ) -> None:
        """Add `part` W + b to the residual stream; as a product in place unless the sum itself is wanted.

        Where a hook changes the sum, the rows that it leaves alone get the bits that they would have without it.
        """
        weight = self._weights[f"{name}.weight"]
        bias = self._weights[f"{name}.bias"]
        if self.compute == self.stream and not self._openblas and not tap.wants(site, layer):
            before = x.clone() if batch.hook.changes(site, layer) else None
            x.view(-1, x.shape[-1]).addmm_(part.view(-1, part.shape[-1]), weight)
            x.add_(bias)
            if before is not None:
                out = self._linear(name, part, "out")
                new = _changed(out.clone(), site, layer, batch)
                other = (out != new).any(-1)
                x[other] = before[other] + new[other]
            return
        out = _changed(self._linear(name, part, "out"), site, layer, batch)
        if tap.wants(site, layer):
            tap.take(site, layer, out)
        x.add_(out)

    def _attention(self, layer: int, normed: torch.Tensor, batch: Batch, tap: Tap) -> torch.Tensor:
        c, (n, length) = self.config, batch.tokens.shape
        qkv = self._linear(f"h.{layer}.attn.c_attn", normed, "qkv")
        if self.compute != self.stream:
            qkv = self.workspace.get("qkv_exact", tuple(qkv.shape), self.stream).copy_(qkv)
        q, k, v = (part.view(n, length, c.n_head, c.d_head) for part in qkv.chunk(3, -1))
        for site, value in (("q", q), ("k", k), ("v", v)):
            _changed(value, site, layer, batch)
            if tap.wants(site, layer):
                tap.take(site, layer, value)
        z = self.workspace.get("z", (n, length, c.n_head, c.d_head), self.stream)
        wanted = [site for site in STATISTICS if tap.wants(site, layer)]
        statistics = {site: self._statistic(site, n, length) for site in wanted}

        def rows(site: str) -> Callable[[int, RowBlock, torch.Tensor], None] | None:
            if not tap.wants(site, layer):
                return None
            return lambda b, block, value: tap.take_rows(site, layer, b, block, value)

        def edit(site: str) -> Callable[[int, RowBlock, torch.Tensor], bool] | None:
            if not batch.hook.changes(site, layer):
                return None
            return lambda b, block, value: batch.hook.apply_rows(site, layer, b, block, value)

        attend(
            q,
            k,
            v,
            z,
            scale=self.scale(layer),
            blocks=batch.blocks,
            row_start_BT=batch.row_start,
            workspace=self.workspace,
            statistics=statistics,
            on_scores=rows("attn_scores"),
            on_pattern=rows("pattern"),
            edit_scores=edit("attn_scores"),
            edit_pattern=edit("pattern"),
        )
        _changed(z, "z", layer, batch)
        for site in wanted:
            tap.take(site, layer, statistics[site])
        if tap.wants("z", layer):
            tap.take("z", layer, z)
        self._tap_results(layer, z, tap)
        return z.view(n, length, c.d_model).to(self.compute)

    def _tap_results(self, layer: int, z_BTNH: torch.Tensor, tap: Tap) -> None:
        """Give what each head adds to the residual stream, [B, T, N, D]: its z times its rows of W_O."""
        if not tap.wants("attn_result", layer):
            return
        c, (n, length) = self.config, z_BTNH.shape[:2]
        shape = (c.n_head, n, length, c.d_model)
        result_NBTD = self.workspace.get("attn_result", shape, self.compute)
        weight = self._weights[f"h.{layer}.attn.c_proj.weight"]
        for head in range(c.n_head):
            rows = weight[head * c.d_head : (head + 1) * c.d_head]
            z_BTH = z_BTNH[:, :, head].to(self.compute).contiguous()
            self._multiply(z_BTH, rows, None, result_NBTD[head])
        tap.take("attn_result", layer, result_NBTD.permute(1, 2, 0, 3))

    def _statistic(self, site: str, n: int, length: int) -> torch.Tensor:
        dtype = torch.int32 if site == "attn_argmax" else self.stream
        return self.workspace.get(site, (n, self.config.n_head, length), dtype)

    def _neurons(self, layer: int, normed: torch.Tensor, batch: Batch, tap: Tap) -> torch.Tensor:
        neurons = _changed(
            self._linear(f"h.{layer}.mlp.c_fc", normed, "neurons"), "mlp_pre", layer, batch
        )
        if tap.wants("mlp_pre", layer):
            tap.take("mlp_pre", layer, neurons)
        activate(self._activation, neurons)
        _changed(neurons, "mlp_post", layer, batch)
        if tap.wants("mlp_post", layer):
            tap.take("mlp_post", layer, neurons)
        return neurons


def _changed(value: torch.Tensor, site: str, layer: int, batch: Batch) -> torch.Tensor:
    """Let the batch's hook change a value in place; return it."""
    if batch.hook.changes(site, layer):
        batch.hook.apply(site, layer, value)
    return value


def _multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Write x W + b to `out`, so that no bit depends on threads or batch.

    oneDNN cuts wide bf16 products by the number of threads and rows where the processor has AMX, but not up to SLICE.
    """
    width = x.shape[1]
    n_slices = -(-width // SLICE) if x.dtype == torch.bfloat16 and x.device.type == "cpu" else 1
    step = -(-width // (32 * n_slices)) * 32
    if bias is None:
        torch.mm(x[:, :step], weight[:step], out=out)
    else:
        torch.addmm(bias, x[:, :step], weight[:step], out=out)
    for first in range(step, width, step):
        out.addmm_(x[:, first : first + step], weight[first : first + step])


def _next_token_loss(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
    """Return −ln p(target) in nats, NaN where the target is −1; the logits are spent, for they are large.

    This is torch.logsumexp to the bit, without its copy of the logits and at a cache's size of rows at a time.
    """
    loss = -logits_TV.gather(1, targets_T.clamp(min=0)[:, None])[:, 0]
    n_rows = max(LOSS_VALUES // logits_TV.shape[1], 16)
    for first in range(0, len(loss), n_rows):
        part = logits_TV[first : first + n_rows]
        largest = part.amax(1)
        largest.masked_fill_(largest.isinf(), 0)
        part.sub_(largest[:, None]).exp_()
        loss[first : first + n_rows] += part.sum(1).log_().add_(largest)
    return loss.masked_fill(targets_T < 0, math.nan)
