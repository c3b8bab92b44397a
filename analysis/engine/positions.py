"""Keep single positions of a forward pass, at every site from which the residual stream can be taken apart."""

from __future__ import annotations

import torch

from headwater.extractor.model.tap import NoTap

SITES = ("resid", "attn_out", "mlp_out", "z", "mlp_post")


class PositionTap(NoTap):
    """Keep one position, or several, of the first sequence at every site of SITES: `values[site][layer]`."""

    def __init__(self, at: int | torch.Tensor) -> None:
        self.at = at
        self.values: dict[str, dict[int, torch.Tensor]] = {site: {} for site in SITES}

    def wants(self, site: str, layer: int) -> bool:
        """Want every site of SITES at every layer."""
        return site in SITES

    def take(self, site: str, layer: int, value: torch.Tensor) -> None:
        """Copy the positions."""
        self.values[site][layer] = value[0, self.at].clone()
