"""Repeated tokens, head by head: where heads look when one token, or one cluster of tokens, fills the row.

The first layers decide there whether a position passes for the first one (Yona et al. 2025, arXiv 2503.08908);
`false_sinks` has the verdict by layer, this has what the heads do, with edits if wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from headwater.extractor.edits.grammar import Edit

if TYPE_CHECKING:
    from headwater.extractor.model.forward import Model

QUANTITIES = {
    "attn_sink": "first_token_share",
    "attn_self": "self_share",
    "attn_prev": "previous_share",
    "attn_entropy": "entropy",
}
CONVENTIONS = (
    "Rows of one token n times, or of n draws from a cluster, alone or behind the beginning-of-text token; `different` "
    "is a row of different tokens drawn at random. Means over all queries but the first, by layer and head: mass on "
    "the first key, on the own position, on the previous one; entropy over ln(visible keys), 1 where attention is "
    "uniform. norm_ratio, by depth: mean residual norm of the other positions over that of the first."
)


def repeated(
    model: Model,
    tokens: Sequence[int | Sequence[int]],
    lengths: Sequence[int] = (16, 64),
    bos: int | None = None,
    n_layers: int = 3,
    edits: Sequence[Edit] = (),
    seed: int = 0,
) -> Any:
    """Run repeated-token rows and return what the heads of the first `n_layers` layers do, as a dataset."""
    import xarray

    from headwater.extractor.in_memory import capture

    c = model.config
    rng = np.random.default_rng(seed)
    clusters = [list(np.atleast_1d(entry)) for entry in tokens]
    flat = [t for cluster in clusters for t in cluster]
    if not flat or not all(0 <= t < c.d_vocab for t in flat):
        raise ValueError(f"--tokens are {flat}; expected token ids from 0 to {c.d_vocab - 1}.")
    if not lengths or min(lengths) < 2 or max(lengths) + (bos is not None) > c.n_ctx:
        raise ValueError(
            f"--lengths are {list(lengths)}; expected 2 to {c.n_ctx - (bos is not None)}."
        )
    n_layers = min(n_layers, c.n_layer)
    starts = [None] if bos is None else [None, bos]
    names = ["+".join(map(str, cluster)) for cluster in clusters] + ["different"]
    shape = (len(starts), len(lengths), len(names))
    heads = {name: np.zeros((*shape, n_layers, c.n_head)) for name in QUANTITIES.values()}
    ratio = np.zeros((*shape, n_layers + 1))
    for i, start in enumerate(starts):
        for j, length in enumerate(lengths):
            rows = [rng.choice(cluster, length) for cluster in clusters]
            rows.append(rng.choice(c.d_vocab, length, replace=length > c.d_vocab))
            ids = np.array([row if start is None else [start, *row] for row in rows], np.int32)
            run = capture(
                model,
                ids,
                [*QUANTITIES, "resid_norm"],
                layers=f":{n_layers}",
                depths=f":{n_layers + 1}",
                edits=edits,
            )
            for site, name in QUANTITIES.items():
                value = run[site].values[..., 1:].astype(np.float64)
                if name == "entropy":
                    value = value / np.log(np.arange(2, value.shape[-1] + 2))
                heads[name][i, j] = value.mean(-1).transpose(1, 0, 2)
            norm = run["resid_norm"].values.astype(np.float64)
            ratio[i, j] = (norm[..., 1:].mean(-1) / norm[..., 0]).T
    dims = ("start", "length", "repeated")
    data: dict[str, Any] = {
        name: ((*dims, "layer", "head"), value) for name, value in heads.items()
    }
    data["norm_ratio"] = (*dims, "depth"), ratio
    coords = {
        "start": ["token", "bos"][: len(starts)],
        "length": list(lengths),
        "repeated": names,
        "layer": np.arange(n_layers),
        "head": np.arange(c.n_head),
        "depth": np.arange(n_layers + 1),
    }
    attributes = {
        "analysis": "repeated",
        "conventions": CONVENTIONS,
        "edits": [str(e) for e in edits],
        "seed": seed,
    }
    return xarray.Dataset(data, coords, attributes)
