"""Compute the last positions of prompts again and again, from any depth on, with everything before them kept.

Keys and values of earlier positions are computed once; only the positions that change cost anything. Plain torch
functions without side effects, so gradients pass. Shapes: P prompts, S steps (variants of a prompt), R recomputed
positions, L positions before them, N heads, H d_head, D d_model, M d_mlp, V d_vocab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from headwater.extractor.model.activations import SMOOTH, value_and_slope
from headwater.extractor.model.weights import Checkpoint

DTYPES = {"fp32": torch.float32, "fp64": torch.float64}
SWITCHES = ("attn_out", "pattern", "mlp_out", "mlp_linear", "ln_scale")
Switch = tuple[str, int]
Look = Callable[[str, int, torch.Tensor], torch.Tensor | None]
See = Callable[[str, int, torch.Tensor], torch.Tensor]


@dataclass
class Prefix:
    """Keys and values [P, N, L, H] of every layer for the positions before, and which of them a prompt lacks [P, L]."""

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    hidden: torch.Tensor | None = None

    def of(self, prompts: slice) -> Prefix:
        """Return the prefix of some prompts."""
        keys = [k[prompts] for k in self.keys]
        values = [v[prompts] for v in self.values]
        if self.hidden is None:
            return Prefix(keys, values)
        return Prefix(keys, values, self.hidden[prompts])


@dataclass
class Point:
    """What the switches hold on to, by (site, layer): values of one step, [P, 1, …]."""

    values: dict[Switch, torch.Tensor] = field(default_factory=dict)

    def take(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Keep the first step."""
        self.values[site, layer] = value[:, :1].detach().clone()


class Replay:
    """A GPT-2 as a function of its residual stream at any depth."""

    def __init__(self, checkpoint: Checkpoint, compute: str = "fp32") -> None:
        if compute not in DTYPES:
            raise ValueError(f"compute is {compute!r}; expected one of {', '.join(DTYPES)}.")
        self.config = checkpoint.config
        self.dtype = DTYPES[compute]
        self.weights = {name: tensor.to(self.dtype) for name, tensor in checkpoint.tensors.items()}
        unembedding = "lm_head.weight"
        if self.config.tied:
            unembedding = "wte.weight"
        self.unembedding = self.weights[unembedding].T
        self.activation = SMOOTH[self.config.activation]

    def scale(self, layer: int) -> float:
        """Return the factor on q·k at a layer."""
        scale = 1.0
        if self.config.scale_attn_weights:
            scale = 1 / math.sqrt(self.config.d_head)
        if self.config.scale_attn_by_inverse_layer_idx:
            scale = scale / (layer + 1)
        return scale

    def embed(self, tokens_PT: torch.Tensor) -> torch.Tensor:
        """Return depth 0 of prompts that begin at position 0, [P, T, D]."""
        tokens = self.weights["wte.weight"][tokens_PT]
        positions = self.weights["wpe.weight"][: tokens_PT.shape[1]]
        return tokens + positions

    def run(
        self,
        x_PSRD: torch.Tensor,
        depth: int,
        prefix: Prefix | None = None,
        switches: frozenset[Switch] = frozenset(),
        point: Point | None = None,
        look: Look | None = None,
        last: int | None = None,
    ) -> torch.Tensor:
        """Take the residual stream from a depth to the depth `last` (the end by default).

        `switches` are (switch, layer) whose part is held at `point`. `look` sees every site as [P, S, …] and may return
        another value to be used (not for the scales): `resid` by depth; q, k, v and z [P, S, N, R, H], attn_scores and
        pattern [P, S, N, R, L + R], attn_out, resid_mid, mlp_pre, mlp_post, mlp_out, ln1_scale, ln2_scale by layer.
        """
        see = _see(look)
        if last is None:
            last = self.config.n_layer
        x = see("resid", depth, x_PSRD)
        for layer in range(depth, last):
            held = {name for name in SWITCHES if (name, layer) in switches}
            x = self._layer(layer, x, prefix, held, point, see)
            x = see("resid", layer + 1, x)
        return x

    def logits(
        self,
        x: torch.Tensor,
        scale: torch.Tensor | None = None,
        look: Look | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return logits [..., V] of the last depth, in `out`; `scale` is what ln_f divides by where it is held."""
        normed = self._norm("ln_f", x, scale, "ln_final_scale", 0, _see(look))
        if out is None:
            return normed @ self.unembedding
        rows = out.view(-1, out.shape[-1])
        torch.mm(normed.reshape(-1, normed.shape[-1]), self.unembedding, out=rows)
        return out

    def _layer(
        self,
        layer: int,
        x: torch.Tensor,
        prefix: Prefix | None,
        held: set[str],
        point: Point | None,
        see: See,
    ) -> torch.Tensor:
        def kept(site: str) -> torch.Tensor:
            assert point is not None
            return point.values[site, layer]

        def kept_if(switch: str, site: str) -> torch.Tensor | None:
            if switch not in held:
                return None
            return kept(site)

        b = f"h.{layer}."
        if "attn_out" in held:
            x = x + kept("attn_out")
        else:
            scale = kept_if("ln_scale", "ln1_scale")
            normed = self._norm(b + "ln_1", x, scale, "ln1_scale", layer, see)
            pattern = kept_if("pattern", "pattern")
            z = self._attention(layer, normed, prefix, pattern, see)
            x = x + see("attn_out", layer, self._linear(b + "attn.c_proj", z))
        x = see("resid_mid", layer, x)
        if "mlp_out" in held:
            return x + kept("mlp_out")
        scale = kept_if("ln_scale", "ln2_scale")
        normed = self._norm(b + "ln_2", x, scale, "ln2_scale", layer, see)
        pre = see("mlp_pre", layer, self._linear(b + "mlp.c_fc", normed))
        if "mlp_linear" in held:
            # The tangent at the point: f(p) + f′(p) (x − p).
            post = kept("mlp_post") + kept("slope") * (pre - kept("mlp_pre"))
        else:
            post = self.activation(pre)
        post = see("mlp_post", layer, post)
        return x + see("mlp_out", layer, self._linear(b + "mlp.c_proj", post))

    def _attention(
        self,
        layer: int,
        normed_PSRD: torch.Tensor,
        prefix: Prefix | None,
        kept: torch.Tensor | None,
        see: See,
    ) -> torch.Tensor:
        """Return the heads' outputs side by side, [P, S, R, D]; `kept` is a pattern to use in place of the softmax."""
        c = self.config
        p, s, r, _ = normed_PSRD.shape

        def by_head(value_PSRD: torch.Tensor) -> torch.Tensor:
            return value_PSRD.reshape(p, s, r, c.n_head, c.d_head).transpose(2, 3)

        q, k, v = self._linear(f"h.{layer}.attn.c_attn", normed_PSRD).chunk(3, -1)
        q_PSNRH = see("q", layer, by_head(q))
        k_PSNRH = see("k", layer, by_head(k))
        v_PSNRH = see("v", layer, by_head(v))
        if kept is None:
            scaled = q_PSNRH * self.scale(layer)
            scores = self._own_scores(scaled, k_PSNRH)
            if prefix is not None:
                earlier = self._against(scaled, prefix, layer)
                scores = torch.cat([earlier, scores], -1)
            scores = see("attn_scores", layer, scores)
            pattern = torch.softmax(scores, -1)
        else:
            pattern = kept.expand(p, s, *kept.shape[2:])
        pattern = see("pattern", layer, pattern)
        n_before = pattern.shape[-1] - r
        mine = pattern[..., n_before:]
        # For one position the pattern is a factor, which costs less than a batch of products of 1 × 1 matrices.
        z = mine * v_PSNRH if r == 1 else mine @ v_PSNRH
        if prefix is not None:
            z = z + self._from_before(pattern[..., :n_before], prefix, layer)
        z = see("z", layer, z)
        return z.transpose(2, 3).reshape(p, s, r, c.d_model)

    def _own_scores(self, q_PSNRH: torch.Tensor, k_PSNRH: torch.Tensor) -> torch.Tensor:
        """Return the causal scores of the recomputed positions with one another, [P, S, N, R, R]."""
        r = q_PSNRH.shape[3]
        if r == 1:
            return (q_PSNRH * k_PSNRH).sum(-1, keepdim=True)
        scores = q_PSNRH @ k_PSNRH.transpose(-1, -2)
        later = torch.ones(r, r, dtype=torch.bool, device=scores.device).triu(1)
        return scores.masked_fill(later, -torch.inf)

    def _from_before(self, pattern_PSNRL: torch.Tensor, prefix: Prefix, layer: int) -> torch.Tensor:
        """Return what the positions before give to z, [P, S, N, R, H]."""
        p, s, n, r, n_before = pattern_PSNRL.shape
        # All steps of a prompt share its values: their rows are one matrix, and the values are not repeated.
        rows = pattern_PSNRL.transpose(1, 2).reshape(p * n, s * r, n_before)
        values = prefix.values[layer].reshape(p * n, n_before, self.config.d_head)
        return torch.bmm(rows, values).view(p, n, s, r, -1).transpose(1, 2)

    def _against(self, q_PSNRH: torch.Tensor, prefix: Prefix, layer: int) -> torch.Tensor:
        """Return the scores against the keys before, [P, S, N, R, L]."""
        p, s, n, r, h = q_PSNRH.shape
        rows = q_PSNRH.transpose(1, 2).reshape(p * n, s * r, h)
        keys = prefix.keys[layer].reshape(p * n, -1, h)
        products = torch.bmm(rows, keys.transpose(1, 2))
        scores = products.view(p, n, s, r, -1).transpose(1, 2)
        if prefix.hidden is None:
            return scores
        return scores.masked_fill(prefix.hidden[:, None, None, None], -torch.inf)

    def _norm(
        self,
        name: str,
        x: torch.Tensor,
        scale: torch.Tensor | None,
        site: str,
        layer: int,
        see: See,
    ) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        bias = self.weights[f"{name}.bias"]
        if scale is None:
            normed, _, inverse = torch.native_layer_norm(
                x, [x.shape[-1]], weight, bias, self.config.layer_norm_epsilon
            )
            see(site, layer, inverse.reciprocal())
            return normed
        return (x - x.mean(-1, keepdim=True)) / scale * weight + bias

    def _linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights[f"{name}.weight"]
        bias = self.weights[f"{name}.bias"]
        rows = x.reshape(-1, x.shape[-1])
        product = torch.addmm(bias, rows, weight)
        return product.view(*x.shape[:-1], weight.shape[1])


def _see(look: Look | None) -> See:
    """Return what passes every site by `look` and hands on what is to be used."""

    def see(site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        if look is None:
            return value
        new = look(site, layer, value)
        if new is None:
            return value
        return new

    return see


class Prompts:
    """Prompts that were run once: their states at the last R positions and everything before as a prefix."""

    def __init__(self, replay: Replay, ids: Sequence[Sequence[int]], n_last: int = 1) -> None:
        lengths = torch.tensor([len(row) for row in ids])
        width = int(lengths.max())
        if int(lengths.min()) < n_last or width > replay.config.n_ctx:
            raise ValueError(
                f"prompts have {int(lengths.min())} to {width} tokens; expected from {n_last} (the "
                f"positions that are computed again) to {replay.config.n_ctx} (the model's context)."
            )
        # Padding at the right end is seen by no real position: attention is causal.
        tokens = torch.zeros(len(ids), width, dtype=torch.int64)
        for row, values in zip(tokens, ids, strict=True):
            row[: len(values)] = torch.tensor(values)
        self.replay = replay
        self.tokens = tokens
        self.lengths = lengths
        self.n_last = n_last
        self.states: list[torch.Tensor] = []
        n_before = width - n_last
        first_again = lengths - n_last
        places = first_again[:, None] + torch.arange(n_last)
        rows = torch.arange(len(ids))[:, None]
        kept: dict[str, list[torch.Tensor]] = {"k": [], "v": []}

        def look(site: str, layer: int, value: torch.Tensor) -> None:
            if site in kept:
                before = value[:, 0, :, :n_before]
                kept[site].append(before.contiguous())
            elif site == "resid":
                self.states.append(value[:, 0][rows, places].unsqueeze(1))

        with torch.no_grad():
            replay.run(replay.embed(tokens)[:, None], 0, look=look)
        self.prefix: Prefix | None = None
        if n_before:
            hidden = torch.arange(n_before) >= first_again[:, None]
            self.prefix = Prefix(kept["k"], kept["v"])
            if bool(hidden.any()):
                self.prefix.hidden = hidden

    def point(self, depth: int, prompts: slice) -> Point:
        """Run from a depth on once more and keep what the switches need, of some prompts."""
        point = Point()
        x = self.states[depth][prompts]
        with torch.no_grad():
            end = self.replay.run(x, depth, self.before(prompts), look=point.take)
            self.replay.logits(end, look=point.take)
        for layer in range(depth, self.replay.config.n_layer):
            pre = point.values["mlp_pre", layer]
            point.values["slope", layer] = value_and_slope(self.replay.config.activation, pre)[1]
        return point

    def before(self, prompts: slice) -> Prefix | None:
        """Return the prefix of some prompts."""
        if self.prefix is None:
            return None
        return self.prefix.of(prompts)
