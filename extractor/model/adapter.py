"""Apply a LoRA adapter that lies beside base weights, as peft saves it: W + scale · B A, summed in float32."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from headwater.extractor.model.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    CheckpointError,
    read_file,
    read_json,
    show,
    some,
)

FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight")
HEAD = "lm_head"
MOST_ALPHA = 1e9
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "alpha_pattern": ({}, None),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", None),
}


def adapter_of(directory: Path) -> str | None:
    """Say in a few words which adapter lies beside a directory's weights; None without one."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return None
    raw = _read_config(directory / ADAPTER_CONFIG)
    return f"the LoRA adapter of rank {raw['r']} beside the weights is applied"


def apply_adapter(directory: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors under canonical names with the directory's adapter merged into them; unchanged without one.

    What is changed becomes float32 (float64 stays). B A is [out, in] whatever the adapter's fan_in_fan_out, so it is
    transposed for GPT-2's linear weights [in, out], and not for the output head, which is untied from the embedding.
    Raises CheckpointError for everything beyond plain LoRA.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        return tensors
    raw = _read_config(directory / ADAPTER_CONFIG)
    merged = dict(tensors)
    for module, (a_RI, b_OR) in _factors(directory).items():
        name = f"{module}.weight"
        base = tensors.get("wte.weight" if module == HEAD and name not in tensors else name)
        if base is None:
            raise CheckpointError(
                f"{directory}: the adapter changes {module}, which the weights do not have. Use the "
                "adapter with the base model that it was trained on."
            )
        rank = a_RI.shape[0]
        scale = raw["lora_alpha"] / (math.sqrt(rank) if raw.get("use_rslora") else rank)
        wide = torch.promote_types(base.dtype, torch.float32)
        delta_OI = b_OR.to(wide) @ a_RI.to(wide)
        delta = delta_OI if module == HEAD else delta_OI.T
        if delta.shape != base.shape:
            raise CheckpointError(
                f"{directory}: the adapter's change of {module} has shape {list(delta.shape)}, but "
                f"the weight has {list(base.shape)}. Use the adapter with its own base model."
            )
        merged[name] = torch.add(base.to(wide), delta, alpha=scale)
    return merged


def _read_config(path: Path) -> dict[str, Any]:
    """Return an adapter's configuration; raise CheckpointError unless it is plain LoRA."""
    raw = read_json(path)
    advice = (
        "Merge the adapter with peft's merge_and_unload() and save_pretrained(), and name that "
        "directory; or move the adapter away for the base model alone."
    )
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(
            f"{path}: peft_type is {show(raw.get('peft_type'))}; Headwater applies LORA only. {advice}"
        )
    for name, neutral in PLAIN.items():
        if name in raw and raw[name] not in neutral:
            raise CheckpointError(
                f"{path}: {name} is {show(raw[name])}, which Headwater does not apply; expected "
                f"{neutral[0]!r}. {advice}"
            )
    for name in ("r", "lora_alpha"):
        value: Any = raw.get(name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) < MOST_ALPHA or (name == "r" and value < 1):
            raise CheckpointError(
                f"{path}: {name} is {show(value)}; expected a number. Copy or download it again."
            )
    return raw


def _factors(directory: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A [rank, in] and B [out, rank] of every module that the adapter changes."""
    path = next((directory / name for name in ADAPTER_FILES if (directory / name).is_file()), None)
    if path is None:
        raise CheckpointError(
            f"{directory} has an {ADAPTER_CONFIG} but neither {' nor '.join(ADAPTER_FILES)}. Copy or "
            f"download the adapter's weights, or remove {ADAPTER_CONFIG} for the base model alone."
        )
    found: dict[str, dict[str, torch.Tensor]] = {}
    foreign = []
    for full, tensor in read_file(path).items():
        match = FACTOR.fullmatch(full)
        if match is None or tensor.ndim != 2:
            foreign.append(full)
            continue
        module = match[1].removeprefix("base_model.model.").removeprefix("transformer.")
        found.setdefault(module, {})[match[2]] = tensor
    if foreign:
        raise CheckpointError(
            f"{path} holds {some(foreign)}, which is more than plain LoRA on linear layers. Merge the "
            "adapter with peft's merge_and_unload() and save_pretrained(), and name that directory."
        )
    for module, pair in found.items():
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise CheckpointError(
                f"{path}: the factors A and B of {module} do not fit each other. Copy or download "
                "the adapter again."
            )
    return {module: (pair["A"], pair["B"]) for module, pair in found.items()}
