"""Capture with SAELens: a CacheActivationsRunner, which stores one hook point a run, so one run for every depth; Arrow.

The runner loads its model each time; here it is given one that is loaded already, so that loading is not timed.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import sae_lens.cache_activations_runner as runner
from datasets import Dataset, load_from_disk
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from sae_lens.load_model import load_model


def load(model: str) -> Any:
    """Return the model's name and depths after loading it once for all runners."""
    loaded: Any = load_model("AutoModelForCausalLM", model, "cpu")
    runner.load_model = lambda **_: loaded
    return model, loaded.model.config


def residual(model: Any, tokens: str, out: str, batch: int) -> None:
    """Store the residual stream at all depths."""
    name, config = model
    ids = np.load(tokens)
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    for depth in range(config.n_layer + 1):
        settings = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name=name,
            model_class_name="AutoModelForCausalLM",
            model_batch_size=batch,
            hook_name=f"transformer.h.{depth - 1}" if depth else "transformer.drop",
            d_in=config.n_embd,
            training_tokens=ids.size,
            context_size=ids.shape[1],
            new_cached_activations_path=os.path.join(out, str(depth)),
            shuffle=False,
            dtype="float16",
            device="cpu",
            prepend_bos=False,
            streaming=False,
            buffer_size_gb=batch * ids.shape[1] * config.n_embd * 2 / 1e9,
        )
        CacheActivationsRunner(settings, override_dataset=rows).run()


def read(out: str, site: str, layer: int, sequence: int, position: int, batch: int) -> np.ndarray:
    """Read one vector [d_model] of a state back."""
    stored: Any = load_from_disk(os.path.join(out, str(layer)))
    column = next(name for name in stored.column_names if name != "token_ids")
    return np.asarray(stored.with_format("numpy")[sequence][column][position])
