"""Singular values and directions of the weights of a GPT-2, by thin factors; raw weights, in float64.

Shapes: D d_model, H d_head, M d_mlp, N heads. Linear weights are [in, out]: rows are multiplied from the left.
"""

from __future__ import annotations

import torch

from headwater.extractor.model.weights import Checkpoint


def thin_svd(
    left_DH: torch.Tensor, right_HD: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the SVD of left @ right by QR of the factors: left directions [H, D], σ [H], right directions [H, D].

    x @ (left @ right) = Σ σ_i (x · left_i) right_i. The largest entry of every right direction is positive.
    """
    q_left, r_left = torch.linalg.qr(left_DH)
    q_right, r_right = torch.linalg.qr(right_HD.T)
    u, sigma, v = torch.linalg.svd(r_left @ r_right.T)
    return fix_signs((q_left @ u).T, sigma, (v @ q_right.T))


def narrow_svd(w_AB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the SVD of a matrix as directions: left [r, A], σ [r], right [r, B]; signs as in `thin_svd`."""
    u, sigma, v = torch.linalg.svd(w_AB, full_matrices=False)
    return fix_signs(u.T, sigma, v)


def fix_signs(
    left: torch.Tensor, sigma: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn pairs of directions so that the largest entry by size of every right one is positive."""
    sign = right.gather(1, right.abs().argmax(1, keepdim=True)).sign()
    return left * sign, sigma, right * sign


def head_weights(checkpoint: Checkpoint, layer: int) -> tuple[torch.Tensor, ...]:
    """Return W_Q, W_K, W_V [N, D, H] and W_O [N, H, D] of a layer, float64."""
    c = checkpoint.config
    qkv = (
        checkpoint.tensors[f"h.{layer}.attn.c_attn.weight"]
        .double()
        .view(c.d_model, 3, c.n_head, c.d_head)
    )
    w_o = (
        checkpoint.tensors[f"h.{layer}.attn.c_proj.weight"]
        .double()
        .view(c.n_head, c.d_head, c.d_model)
    )
    return (*qkv.permute(1, 2, 0, 3).unbind(0), w_o)


def qk_correlation(
    w_q_NDH: torch.Tensor, w_k_NDH: torch.Tensor, embedding_VD: torch.Tensor
) -> torch.Tensor:
    """Correlate the heads' scores of all pairs of tokens: Pearson's r of W_E W_Q W_Kᵀ W_Eᵀ over V², [N, N].

    Exact and without any V × V matrix: ⟨A, B⟩ = tr(Q_Aᵀ G Q_B · K_Bᵀ G K_A) with G = W_Eᵀ W_E.
    """
    gram = embedding_VD.T @ embedding_VD
    total = embedding_VD.sum(0)
    q, k = (torch.einsum("adh,de,beg->abhg", w, gram, w) for w in (w_q_NDH, w_k_NDH))
    inner = (q * k).sum((-1, -2))
    mean = (
        torch.einsum("d,ndh->nh", total, w_q_NDH) * torch.einsum("d,ndh->nh", total, w_k_NDH)
    ).sum(-1)
    covariance = inner - torch.outer(mean, mean) / len(embedding_VD) ** 2
    scale = covariance.diagonal().clamp(min=0).sqrt()
    return covariance / torch.outer(scale, scale)
