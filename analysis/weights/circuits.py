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
    # left = Q₁R₁ and rightᵀ = Q₂R₂, so left @ right = Q₁ (R₁R₂ᵀ) Q₂ᵀ, and with the SVD UΣVᵀ of the middle
    # [H, H] the directions are Q₁U and Q₂V. No D × D matrix is formed, and no σ is squared.
    q_left, r_left = torch.linalg.qr(left_DH)
    q_right, r_right = torch.linalg.qr(right_HD.T)
    u, sigma, v = torch.linalg.svd(r_left @ r_right.T)
    left_HD = (q_left @ u).T
    right = v @ q_right.T
    return fix_signs(left_HD, sigma, right)


def narrow_svd(w_AB: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the SVD of a matrix as directions: left [r, A], σ [r], right [r, B]; signs as in `thin_svd`."""
    u, sigma, v = torch.linalg.svd(w_AB, full_matrices=False)
    return fix_signs(u.T, sigma, v)


def fix_signs(
    left: torch.Tensor, sigma: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turn pairs of directions so that the largest entry by size of every right one is positive."""
    # An SVD fixes a pair only up to one common sign.
    largest = right.abs().argmax(1, keepdim=True)
    sign = right.gather(1, largest).sign()
    return left * sign, sigma, right * sign


def head_weights(checkpoint: Checkpoint, layer: int) -> tuple[torch.Tensor, ...]:
    """Return W_Q, W_K, W_V [N, D, H] and W_O [N, H, D] of a layer, float64."""
    c = checkpoint.config
    attention = f"h.{layer}.attn"
    joined = checkpoint.tensors[f"{attention}.c_attn.weight"].double()
    qkv_D3NH = joined.view(c.d_model, 3, c.n_head, c.d_head)
    w_q, w_k, w_v = qkv_D3NH.permute(1, 2, 0, 3).unbind(0)
    output = checkpoint.tensors[f"{attention}.c_proj.weight"].double()
    w_o = output.view(c.n_head, c.d_head, c.d_model)
    return w_q, w_k, w_v, w_o


def qk_correlation(
    w_q_NDH: torch.Tensor, w_k_NDH: torch.Tensor, embedding_VD: torch.Tensor
) -> torch.Tensor:
    """Correlate the heads' scores of all pairs of tokens: Pearson's r of W_E W_Q W_Kᵀ W_Eᵀ over V², [N, N].

    Exact and without any V × V matrix: ⟨A, B⟩ = tr(Q_Aᵀ G Q_B · K_Bᵀ G K_A) with G = W_Eᵀ W_E.
    """
    gram_DD = embedding_VD.T @ embedding_VD
    q_NNHH = torch.einsum("adh,de,beg->abhg", w_q_NDH, gram_DD, w_q_NDH)
    k_NNHH = torch.einsum("adh,de,beg->abhg", w_k_NDH, gram_DD, w_k_NDH)
    inner_NN = (q_NNHH * k_NNHH).sum((-1, -2))

    # The sum of a head's scores over all pairs is that of the summed embedding with itself.
    total_D = embedding_VD.sum(0)
    q_total_NH = torch.einsum("d,ndh->nh", total_D, w_q_NDH)
    k_total_NH = torch.einsum("d,ndh->nh", total_D, w_k_NDH)
    sum_N = (q_total_NH * k_total_NH).sum(-1)

    # Sums over V² pairs throughout: V² cov = ⟨A, B⟩ − ΣA ΣB / V². The factor V² cancels in r.
    n_pairs = len(embedding_VD) ** 2
    covariance_NN = inner_NN - torch.outer(sum_N, sum_N) / n_pairs
    scale_N = covariance_NN.diagonal().clamp(min=0).sqrt()
    return covariance_NN / torch.outer(scale_N, scale_N)
