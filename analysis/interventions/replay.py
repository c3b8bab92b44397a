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
        hidden = None if self.hidden is None else self.hidden[prompts]
        return Prefix([k[prompts] for k in self.keys], [v[prompts] for v in self.values], hidden)


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
        self.config, self.dtype = checkpoint.config, DTYPES[compute]
        self.weights = {name: tensor.to(self.dtype) for name, tensor in checkpoint.tensors.items()}
        self.unembedding = self.weights["wte.weight" if self.config.tied else "lm_head.weight"].T
        self.activation = SMOOTH[self.config.activation]

    def scale(self, layer: int) -> float:
        """Return the factor on q·k at a layer."""
        scale = 1 / math.sqrt(self.config.d_head) if self.config.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.config.scale_attn_by_inverse_layer_idx else scale

    def embed(self, tokens_PT: torch.Tensor) -> torch.Tensor:
        """Return depth 0 of prompts that begin at position 0, [P, T, D]."""
        return (
            self.weights["wte.weight"][tokens_PT] + self.weights["wpe.weight"][: tokens_PT.shape[1]]
        )

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
        x = see("resid", depth, x_PSRD)
        for layer in range(depth, self.config.n_layer if last is None else last):
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

        b = f"h.{layer}."
        if "attn_out" in held:
            x = x + kept("attn_out")
        else:
            scale = kept("ln1_scale") if "ln_scale" in held else None
            normed = self._norm(b + "ln_1", x, scale, "ln1_scale", layer, see)
            z = self._attention(
                layer, normed, prefix, kept("pattern") if "pattern" in held else None, see
            )
            x = x + see("attn_out", layer, self._linear(b + "attn.c_proj", z))
        x = see("resid_mid", layer, x)
        if "mlp_out" in held:
            return x + kept("mlp_out")
        scale = kept("ln2_scale") if "ln_scale" in held else None
        normed = self._norm(b + "ln_2", x, scale, "ln2_scale", layer, see)
        pre = see("mlp_pre", layer, self._linear(b + "mlp.c_fc", normed))
        if "mlp_linear" in held:
            post = kept("mlp_post") + kept("slope") * (pre - kept("mlp_pre"))
        else:
            post = self.activation(pre)
        post = see("mlp_post", layer, post)
        return x + see("mlp_out", layer, self._linear(b + "mlp.c_proj", post))

    def _attention(
        self,
        layer: int,
        normed: torch.Tensor,
        prefix: Prefix | None,
        kept: torch.Tensor | None,
        see: See,
    ) -> torch.Tensor:
        c, (p, s, r, _) = self.config, normed.shape
        q, k, v = self._linear(f"h.{layer}.attn.c_attn", normed).chunk(3, -1)
        q, k, v = (
            t.reshape(p, s, r, c.n_head, c.d_head).transpose(2, 3) for t in (q, k, v)
        )  # [P, S, N, R, H]
        q, k, v = (see(site, layer, value) for site, value in (("q", q), ("k", k), ("v", v)))
        n_before = 0 if prefix is None else prefix.keys[layer].shape[2]
        if kept is None:
            q = q * self.scale(layer)
            own = q @ k.transpose(-1, -2) if r > 1 else (q * k).sum(-1, keepdim=True)
            if r > 1:
                own = own.masked_fill(
                    torch.ones(r, r, dtype=torch.bool, device=own.device).triu(1), -torch.inf
                )
            scores = (
                own if prefix is None else torch.cat([self._against(q, prefix, layer), own], -1)
            )
            scores = see("attn_scores", layer, scores)
            pattern = torch.softmax(scores, -1)
        else:
            pattern = kept.expand(p, s, *kept.shape[2:])
        pattern = see("pattern", layer, pattern)
        mine = pattern[..., n_before:]
        z = mine @ v if r > 1 else mine * v
        if prefix is not None:
            rows = pattern[..., :n_before].transpose(1, 2).reshape(p * c.n_head, s * r, n_before)
            earlier = torch.bmm(
                rows, prefix.values[layer].reshape(p * c.n_head, n_before, c.d_head)
            )
            z = z + earlier.view(p, c.n_head, s, r, c.d_head).transpose(1, 2)
        z = see("z", layer, z)
        return z.transpose(2, 3).reshape(p, s, r, c.d_model)

    def _against(self, q_PSNRH: torch.Tensor, prefix: Prefix, layer: int) -> torch.Tensor:
        """Return the scores against the keys before, [P, S, N, R, L]."""
        p, s, n, r, h = q_PSNRH.shape
        keys = prefix.keys[layer]
        rows = q_PSNRH.transpose(1, 2).reshape(p * n, s * r, h)
        scores = (
            torch.bmm(rows, keys.reshape(p * n, -1, h).transpose(1, 2))
            .view(p, n, s, r, -1)
            .transpose(1, 2)
        )
        return (
            scores
            if prefix.hidden is None
            else scores.masked_fill(prefix.hidden[:, None, None, None], -torch.inf)
        )

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
        return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(
            *x.shape[:-1], weight.shape[1]
        )


def _see(look: Look | None) -> See:
    def see(site: str, layer: int, value: torch.Tensor) -> torch.Tensor:
        new = None if look is None else look(site, layer, value)
        return value if new is None else new

    return see


class Prompts:
    """Prompts that were run once: their states at the last R positions and everything before as a prefix."""

    def __init__(self, replay: Replay, ids: Sequence[Sequence[int]], n_last: int = 1) -> None:
        lengths = torch.tensor([len(row) for row in ids])
        if int(lengths.min()) < n_last or int(lengths.max()) > replay.config.n_ctx:
            raise ValueError(
                f"prompts have {int(lengths.min())} to {int(lengths.max())} tokens; expected from {n_last} (the "
                f"positions that are computed again) to {replay.config.n_ctx} (the model's context)."
            )
        width = int(lengths.max())
        tokens = torch.zeros(len(ids), width, dtype=torch.int64)
        for row, values in zip(tokens, ids, strict=True):
            row[: len(values)] = torch.tensor(values)
        self.replay = replay
        self.tokens = tokens
        self.lengths = lengths
        self.n_last = n_last
        keys: list[torch.Tensor] = []
        values_: list[torch.Tensor] = []
        states: list[torch.Tensor] = []
        places = (lengths - n_last)[:, None] + torch.arange(n_last)
        rows = torch.arange(len(ids))[:, None]

        def look(site: str, layer: int, value: torch.Tensor) -> None:
            if site in ("k", "v"):
                (keys if site == "k" else values_).append(
                    value[:, 0, :, : width - n_last].contiguous()
                )
            elif site == "resid":
                states.append(value[:, 0][rows, places].unsqueeze(1))

        with torch.no_grad():
            replay.run(replay.embed(tokens)[:, None], 0, look=look)
        self.states = states
        hidden = torch.arange(width - n_last) >= (lengths - n_last)[:, None]
        self.prefix = (
            Prefix(keys, values_, hidden if bool(hidden.any()) else None)
            if width > n_last
            else None
        )

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
        return None if self.prefix is None else self.prefix.of(prompts)
