"""Named scratch tensors that are allocated once and used again, so that no forward pass touches a fresh page."""

from __future__ import annotations

from math import prod

import torch


class Workspace:
    """Hand out scratch tensors by name; a name keeps its memory and grows when a larger shape is asked for."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._flat: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def get(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Return a contiguous tensor of `shape` with arbitrary contents, valid until the name is asked for again."""
        size = prod(shape)
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            flat = self._flat[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held at present."""
        return sum(flat.numel() * flat.element_size() for flat in self._flat.values())
