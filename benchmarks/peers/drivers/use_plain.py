"""The measure of the others: transformers' forward with SDPA, which captures and stores nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import GPT2Model


def load(model: str) -> Any:
    """Return the model; SDPA is transformers' default."""
    return GPT2Model.from_pretrained(model).eval()


def plain(model: Any, tokens: str, out: str, batch: int) -> None:
    """Run the model and drop what it returns."""
    with torch.inference_mode():
        for part in torch.from_numpy(np.load(tokens)).long().split(batch):
            model(part, use_cache=False)
