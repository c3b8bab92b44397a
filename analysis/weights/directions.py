"""What the weights say without a run: spectra and directions of OV and QK circuits, W_in and W_out, as tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from headwater.analysis.weights.circuits import head_weights, narrow_svd, qk_correlation, thin_svd
from headwater.extractor.model.weights import Checkpoint, load_checkpoint
from headwater.store.version import __version__

if TYPE_CHECKING:
    import xarray

    from headwater.analysis.engine.results import Variables

FOLDS = ("raw", "folded")

# Directions whose products with the vocabulary are in memory at once: 128 × 50,257 × 4 bytes are 26 MB.
ROWS = 128
CONVENTIONS = (
    "Raw weights in float64, biases and LayerNorm left out. OV = W_V W_O: ov_read is the side read from the residual "
    "stream (through W_E), ov_write the side written to it (through W_U). QK = W_Q W_Kᵀ: qk_query and qk_key are its "
    "two sides (through W_E), without the factor 1/√d_head; a QK circuit compares tokens, it writes none. w_in: "
    "directions of the residual stream that the neurons read (through W_E), raw and with ln_2's γ folded in; "
    "w_out: directions that they write (through W_U). sigma: singular values, all of them. The sign of a pair of "
    "directions makes the largest entry by size of ov_write, qk_key, w_in or w_out positive. token: the vocabulary's "
    "largest products with +direction and with −direction, no LayerNorm after. qk_correlation: Pearson's r between two "
    "heads of W_E W_Q W_Kᵀ W_Eᵀ over all pairs of tokens."
)


@dataclass(frozen=True)
class Family:
    """Directions of one kind [..., rank, D], their names of dimensions, and the matrix that reads them."""

    name: str
    dims: tuple[str, ...]
    directions: torch.Tensor
    through: str


def weights(
    model: str, n_directions: int = 30, n_top: int = 20, revision: str | None = None
) -> xarray.Dataset:
    """Decompose the weights of a model; no run is needed.

    Returns a dataset. For ov_write, ov_read, qk_query, qk_key [layer, head], w_in [fold, layer] and w_out [layer]: the
    first `n_directions` as `<name>` [..., rank, d_model] and their tokens of both signs as `<name>_token` and
    `<name>_logit` [sign, ..., rank, top]; ov_sigma, qk_sigma [layer, head, component], w_in_sigma [fold, layer,
    mlp_component], w_out_sigma [layer, mlp_component], qk_correlation [layer, head, other_head], and token strings as
    `token_text` [d_vocab] where the model has a tokenizer.
    """
    if n_directions < 1 or n_top < 1:
        raise ValueError(
            f"n_directions and n_top are {n_directions} and {n_top}; expected at least 1 each."
        )
    return weights_of(load_checkpoint(model, revision), n_directions, n_top)


def weights_of(checkpoint: Checkpoint, n_directions: int = 30, n_top: int = 20) -> xarray.Dataset:
    """Decompose the weights of a loaded checkpoint; see `weights`."""
    import xarray

    c = checkpoint.config
    families, data = _decompose(checkpoint, n_directions)
    n_top = min(n_top, c.d_vocab)
    for family in families:
        matrix_VD = unembedding(checkpoint, family.through)
        tokens, logits = read_tokens(family.directions, matrix_VD, n_top)
        source = {"through": family.through}
        data[family.name] = (*family.dims, "d_model"), family.directions.numpy(), source
        data[f"{family.name}_token"] = ("sign", *family.dims, "top"), tokens
        data[f"{family.name}_logit"] = ("sign", *family.dims, "top"), logits
    strings = token_strings(checkpoint)
    if strings is not None:
        data["token_text"] = ("d_vocab",), strings
    layers = np.arange(c.n_layer)
    coords = {
        "layer": layers,
        "layer_fraction": ("layer", (layers + 0.5) / c.n_layer),
        "head": np.arange(c.n_head),
        "other_head": np.arange(c.n_head),
        "fold": list(FOLDS),
        "sign": [1, -1],
    }
    arguments = {"n_directions": n_directions, "n_top": n_top}
    attributes = model_provenance(checkpoint, "weights", arguments, CONVENTIONS)
    return xarray.Dataset(data, coords, attributes)


def read_tokens(
    directions: torch.Tensor, matrix_VD: torch.Tensor, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the n tokens whose rows have the largest products with ±directions: ids and products [2, ..., n].

    Products are in float32; the second sign holds those with −direction, largest first.
    """
    flat = directions.reshape(-1, directions.shape[-1]).float()
    ids = []
    values = []
    for at in range(0, len(flat), ROWS):
        product = flat[at : at + ROWS] @ matrix_VD.float().T
        plus = product.topk(n)
        minus = (-product).topk(n)
        ids.append(torch.stack([plus.indices, minus.indices]))
        values.append(torch.stack([plus.values, minus.values]))
    shape = (2, *directions.shape[:-1], n)
    all_ids = torch.cat(ids, 1).reshape(shape)
    all_values = torch.cat(values, 1).reshape(shape)
    return all_ids.numpy(), all_values.numpy()


def unembedding(checkpoint: Checkpoint, through: str = "W_U") -> torch.Tensor:
    """Return W_E or W_U with a row for every token: [d_vocab, d_model]."""
    if through == "W_E" or checkpoint.config.tied:
        return checkpoint.tensors["wte.weight"]
    return checkpoint.tensors["lm_head.weight"]


def token_strings(checkpoint: Checkpoint) -> np.ndarray | None:
    """Return the string of every token id, or None for a model without a tokenizer."""
    if checkpoint.tokenizer is None:
        return None
    from headwater.extractor.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.tokenizer)
    strings = tokenizer.token_strings(range(checkpoint.config.d_vocab))
    return np.array(strings, dtype=object)


def _decompose(checkpoint: Checkpoint, n: int) -> tuple[list[Family], Variables]:
    """Return all families of directions, and the spectra and correlations as variables."""
    c = checkpoint.config
    t = checkpoint.tensors
    embedding = t["wte.weight"].double()
    found: dict[str, list[torch.Tensor]] = {}

    def keep(name: str, value: torch.Tensor) -> None:
        found.setdefault(name, []).append(value)

    def keep_circuits(name: str, left_NDH: torch.Tensor, right_NHD: torch.Tensor) -> None:
        parts = [thin_svd(left_NDH[i], right_NHD[i]) for i in range(c.n_head)]
        keep(f"{name}_left", torch.stack([left[:n] for left, _, _ in parts]))
        keep(f"{name}_sigma", torch.stack([sigma for _, sigma, _ in parts]))
        keep(f"{name}_right", torch.stack([right[:n] for _, _, right in parts]))

    for layer in range(c.n_layer):
        w_q, w_k, w_v, w_o = head_weights(checkpoint, layer)
        keep_circuits("ov", w_v, w_o)
        keep_circuits("qk", w_q, w_k.transpose(1, 2))
        keep("qk_correlation", qk_correlation(w_q, w_k, embedding))
        w_in = t[f"h.{layer}.mlp.c_fc.weight"].double()
        gamma = t[f"h.{layer}.ln_2.weight"].double()
        # What ln_2 multiplies a coordinate by, the neurons read it with: (γ ⊙ x) W = x (diag(γ) W).
        folded = gamma[:, None] * w_in
        for fold, matrix in zip(FOLDS, (w_in, folded), strict=True):
            _, sigma, directions = narrow_svd(matrix.T)
            keep(f"w_in_sigma_{fold}", sigma)
            keep(f"w_in_{fold}", directions[:n])
        _, sigma, directions = narrow_svd(t[f"h.{layer}.mlp.c_proj.weight"].double())
        keep("w_out_sigma", sigma)
        keep("w_out", directions[:n])
    s = {name: torch.stack(values) for name, values in found.items()}
    w_in_directions = torch.stack([s[f"w_in_{fold}"] for fold in FOLDS])
    w_in_sigma = torch.stack([s[f"w_in_sigma_{fold}"] for fold in FOLDS])
    head = ("layer", "head", "rank")
    mlp = ("layer", "mlp_rank")
    families = [
        Family("ov_read", head, s["ov_left"], "W_E"),
        Family("ov_write", head, s["ov_right"], "W_U"),
        Family("qk_query", head, s["qk_left"], "W_E"),
        Family("qk_key", head, s["qk_right"], "W_E"),
        Family("w_in", ("fold", *mlp), w_in_directions, "W_E"),
        Family("w_out", mlp, s["w_out"], "W_U"),
    ]
    spectra: Variables = {
        "ov_sigma": (("layer", "head", "component"), s["ov_sigma"].numpy()),
        "qk_sigma": (("layer", "head", "component"), s["qk_sigma"].numpy()),
        "w_in_sigma": (("fold", "layer", "mlp_component"), w_in_sigma.numpy()),
        "w_out_sigma": (("layer", "mlp_component"), s["w_out_sigma"].numpy()),
        "qk_correlation": (("layer", "head", "other_head"), s["qk_correlation"].numpy()),
    }
    return families, spectra


def model_provenance(
    checkpoint: Checkpoint, analysis: str, arguments: Mapping[str, object], conventions: str
) -> dict[str, str | int]:
    """Return the attributes of a result that comes from a model's weights."""
    import xarray

    versions = {
        "headwater": __version__,
        "numpy": np.__version__,
        "torch": torch.__version__,
        "xarray": xarray.__version__,
    }
    return {
        "analysis": analysis,
        "arguments": json.dumps(arguments, sort_keys=True),
        "conventions": conventions,
        "passes": 0,
        "model": checkpoint.name,
        "model_digest": checkpoint.digest,
        "versions": json.dumps(versions, sort_keys=True),
    }
