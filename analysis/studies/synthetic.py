"""A one-layer model whose attention has a closed form: a query that moves between two of many orthonormal keys."""

from __future__ import annotations

import numpy as np
import torch

from headwater.extractor.model.weights import Checkpoint, ModelConfig


def softmax_model(n: int, s: float, d_model: int = 32) -> tuple[Checkpoint, list[int], list[int]]:
    """Make a model and two prompts of n tokens: from A to B, the last position's query goes from key 3 to key 6.

    Keys are orthonormal and the score with the favoured key is s, with LayerNorm's scale frozen exactly along the whole
    path. The last position's own key scores 0, as do all others. Then the weight of key 6 is
    `plateau_paths.softmax_curve(α, s, n)`.
    """
    if not 8 <= n <= d_model - 1 or d_model < 2 * n:
        raise ValueError(
            f"n is {n} and d_model {d_model}; expected n from 8 on and d_model at least 2 n."
        )
    basis = _centred_basis(d_model)
    keys = basis[:n]
    queries = basis[n : 2 * n]
    config = ModelConfig(
        n_layer=1,
        n_head=1,
        d_model=d_model,
        d_head=d_model,
        d_mlp=1,
        n_ctx=n,
        d_vocab=2 * n,
        activation="relu",
        layer_norm_epsilon=0.0,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        reorder_and_upcast_attn=False,
        tied=True,
        eos_token_id=None,
        bos_token_id=None,
    )
    tensors = {
        name: torch.zeros(shape, dtype=torch.float64) for name, shape in config.shapes().items()
    }
    for name in tensors:
        if "ln_" in name and name.endswith("weight"):
            tensors[name].fill_(1)
    tensors["wte.weight"] = torch.from_numpy(np.concatenate([keys, queries]))
    w_q = torch.from_numpy(queries.T @ keys) * s / np.sqrt(d_model)
    w_k = torch.from_numpy(keys.T @ keys)
    w_v = torch.from_numpy(keys.T @ keys)
    tensors["h.0.attn.c_attn.weight"] = torch.cat([w_q, w_k, w_v], 1)
    tensors["h.0.attn.c_proj.weight"] = torch.eye(d_model, dtype=torch.float64)
    earlier = list(range(n - 1))
    return Checkpoint("softmax", config, tensors, "", None), [*earlier, n + 3], [*earlier, n + 6]


def _centred_basis(d: int) -> np.ndarray:
    """Return d − 1 orthonormal rows whose entries add up to 0."""
    rng = np.random.default_rng(0)
    q, _ = np.linalg.qr(np.concatenate([np.ones((d, 1)), rng.standard_normal((d, d - 1))], 1))
    return np.ascontiguousarray(q[:, 1:].T)
