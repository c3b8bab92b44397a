"""Read the files of a checkpoint: JSON, safetensors and pickles, each only as far as it keeps within its own size.

Nothing in a checkpoint is executed: pickled files go through torch's loader for tensors only.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

LAYOUTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
MOST_JSON = 64 << 20
MOST_HEADER = 16 << 20
MOST_PICKLE = 64 << 20
OTHER_HEADS = re.compile(r"(score|classifier|multiple_choice_head|qa_outputs|v_head)\.")
MASK_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
REFUSED_PICKLE = re.compile(r"GLOBAL (\S+) (?:was not|whose module)|unrecognized function (.+)")
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|module)\."
)
BODY = re.compile(r"((?:.+?\.)??)(?:transformer\.)?wte\.weight")
VARIANT = re.compile(r"(?:pytorch_)?model\.[\w-]+\.(?:safetensors|bin)")
CONVERT = (
    "Convert them where transformers 4 is installed: "
    "GPT2LMHeadModel.from_pretrained(DIRECTORY, {}=True).save_pretrained(NEW)"
)
FORMATS = (
    (
        r"\.(gguf|ggml)$",
        b"GGUF",
        "is in llama.cpp's format (GGUF), which Headwater does not read. Name the Hugging Face "
        "directory or hub id that it was made from",
    ),
    (r"\.h5$", b"\x89HDF", "holds TensorFlow weights. " + CONVERT.format("from_tf")),
    (
        r"\.ckpt\.(index|meta|data-\S+)$",
        None,
        "is a TensorFlow checkpoint. Name the same model's hub id, such as gpt2, or convert it to "
        "a Hugging Face directory",
    ),
    (r"\.msgpack$", None, "holds Flax weights. " + CONVERT.format("from_flax")),
    (r"\.onnx$", None, "is an ONNX graph. Name the Hugging Face directory that it was made from"),
    (r"\.incomplete$", None, "is a download that did not end. Download the model again"),
    (
        r"\.safetensors$",
        None,
        "holds tensors without their configuration. Name the directory that has it beside its "
        "config.json",
    ),
)


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read or computed with; the message says what to do next."""


def read_config_json(directory: Path) -> dict[str, Any]:
    """Return the contents of a Hugging Face directory's config.json."""
    path = directory / "config.json"
    if path.is_file():
        return read_json(path)
    if (directory / ADAPTER_CONFIG).is_file():
        base = read_json(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        raise CheckpointError(
            f"{directory} is only an adapter, for the base model {show(base)}. Put the base's "
            "config.json and weights into the same directory, or merge them with peft's "
            "merge_and_unload() and save_pretrained(), and name that directory."
        )
    nanogpt = directory / "ckpt.pt"
    hint = (
        f"For a nanoGPT checkpoint name the file {nanogpt}."
        if nanogpt.is_file()
        else _others(directory) or "Check the path."
    )
    raise CheckpointError(
        f"{directory} has no config.json; expected a Hugging Face directory with config.json and "
        f"weights. {hint}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file of at most MOST_JSON bytes."""
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise ValueError(f"it has {size:,} bytes, more than {MOST_JSON:,}")
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} cannot be read as JSON ({error}). Copy or download it again."
        ) from error
    if not isinstance(raw, dict):
        raise CheckpointError(
            f"{path} holds {show(raw)}; expected a JSON object. Copy or download it again."
        )
    return raw


def read_directory(
    directory: Path, elsewhere: Iterable[str] = ()
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors of a Hugging Face directory under their canonical names, and what was done to the names.

    `elsewhere` are names of files that the hub has and that were not fetched, for the message where none is readable.
    """
    for whole, index in LAYOUTS:
        if (directory / whole).is_file():
            return canonical(read_file(directory / whole), str(directory))
        if (directory / index).is_file():
            return canonical(_read_shards(directory / index), str(directory))
    raise CheckpointError(
        f"{directory} has a config.json but no weights; expected one of "
        f"{', '.join(name for pair in LAYOUTS for name in pair)}. "
        f"{_others(directory, elsewhere) or 'Copy or download the weights.'}"
    )


def _others(directory: Path, elsewhere: Iterable[str] = ()) -> str:
    """Say what else is in a directory and what to do with it; empty where there is nothing."""
    names = sorted({*(path.name for path in directory.iterdir()), *elsewhere})
    for name in names:
        if VARIANT.fullmatch(name):
            kind = name.rpartition(".")[2]
            plain = next(whole for whole, _ in LAYOUTS if whole.endswith(kind))
            return f"It has {name}; if you want that variant, copy or link it as {plain}."
        if words := foreign_format(directory / name):
            return f"Its {name} {words}."
    return f"It holds {some(names)}." if names else ""


def foreign_format(path: Path) -> str | None:
    """Say of what format a file is that is not read by itself, and what to do; None for one that may be."""
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(4)
    for ending, magic, words in FORMATS:
        if re.search(ending, path.name) or (magic is not None and start == magic):
            return words
    return None


def read_index(path: Path) -> dict[str, list[str]]:
    """Return the names of the tensors in each shard that an index lists."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{path} has no weight_map of tensor names to files. Copy or download it again."
        )
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(
                f"{path} places {name} in {show(shard)}; expected the name of a file in the same "
                "directory. Download the checkpoint again from a source that you trust."
            )
        shards.setdefault(shard, []).append(name)
    return shards


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """Read every file that an index lists, and of each what the index places there."""
    tensors: dict[str, torch.Tensor] = {}
    for shard, names in sorted(read_index(index).items()):
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(
                f"{path} is missing, though {index.name} places {some(names)} there. Copy or "
                "download it."
            )
        found = read_file(path)
        if absent := [name for name in names if name not in found]:
            raise CheckpointError(
                f"{path} lacks {some(absent)}, though {index.name} places them there; index and "
                "file are not of one checkpoint. Copy or download both again."
            )
        tensors |= {name: found[name] for name in names}
    return tensors


def read_file(path: Path) -> dict[str, torch.Tensor]:
    """Read one file of tensors, memory-mapped where the format allows it."""
    if path.suffix != ".safetensors":
        return tensors_in(unpickle(path), path)
    try:
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > MOST_HEADER and header <= path.stat().st_size:
            raise ValueError(f"its header asks for {header:,} bytes, more than {MOST_HEADER:,}")
        return safetensors.torch.load_file(path)
    except Exception as error:  # whatever a damaged file makes the parser raise
        raise _damaged(path, error) from error


def unpickle(path: Path) -> Any:
    """Load a pickled file without running anything in it."""
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        refused = REFUSED_PICKLE.search(str(error))
        if refused is None:
            raise _damaged(path, error) from error
        raise CheckpointError(
            f"{path} holds Python objects beyond tensors ({refused[1] or refused[2]}). Headwater "
            "runs no code from checkpoints, so it does not load this file. If you trust its source, "
            "load it elsewhere and save only its tensors."
        ) from error


def _check_archive(path: Path) -> None:
    """Refuse an archive that unpacks to more than it holds; torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        items = archive.infolist()
    if sum(item.file_size for item in items) > path.stat().st_size:
        raise ValueError("its parts are compressed, which torch.save does not do")
    largest = max((item.file_size for item in items if item.filename.endswith(".pkl")), default=0)
    if largest > MOST_PICKLE:
        raise ValueError(f"its pickle has {largest:,} bytes, more than {MOST_PICKLE:,}")


def _damaged(path: Path, error: Exception) -> CheckpointError:
    """Say why a file cannot be read."""
    if path.suffix != ".safetensors" and (words := foreign_format(path)):
        return CheckpointError(f"{path} {words}.")
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return CheckpointError(
                f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in the checkout."
            )
    unpickling = isinstance(
        error, pickle.UnpicklingError
    )  # torch's text for these advises to run the file's code
    reason = "it is not what torch.save writes" if unpickling else first_line(error)
    return CheckpointError(
        f"{path} ({path.stat().st_size} bytes) cannot be read: {reason}. It is cut short, damaged "
        "or of another format; copy or download it again."
    )


def tensors_in(raw: Any, path: Path | str) -> dict[str, torch.Tensor]:
    """Return the named tensors of a state dict; refuse one that claims more elements than the file holds."""
    if not isinstance(raw, dict) or not all(isinstance(t, torch.Tensor) for t in raw.values()):
        raise CheckpointError(
            f"{path} does not hold a plain table of named tensors. Save the model's state_dict() "
            "there, or better, use safetensors."
        )
    for name, tensor in raw.items():
        if not _is_whole(tensor):
            raise CheckpointError(
                f"{path}: {show(name)} of shape {list(tensor.shape)} has more elements than are "
                "stored. Save contiguous tensors, in a file that you trust."
            )
    return {str(name): tensor.detach() for name, tensor in raw.items()}


def _is_whole(tensor: torch.Tensor) -> bool:
    """Say whether every element of a tensor has memory of its own; what is not dense is refused later by its layout."""
    if tensor.device.type != "cpu":
        return False
    if tensor.layout != torch.strided:
        return True
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def canonical(
    stored: dict[str, torch.Tensor], where: str
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return tensors under GPT-2's own names, and notes on what was taken off the names.

    The prefix `transformer.`, the old mask buffers and heads for other tasks go without a note. What compiling,
    distributing or a larger module puts around the names, such as `_orig_mod.`, `module.` or `policy.`, goes with one.
    """
    plain = {name: WRAPPERS.sub("", name) for name in stored}
    outer = _outer_prefix(plain.values(), where)
    tensors: dict[str, torch.Tensor] = {}
    taken = {outer} - {""}
    for full, tensor in stored.items():
        taken.update(WRAPPERS.findall(full))
        name = plain[full].removeprefix(outer).removeprefix("transformer.")
        if MASK_BUFFERS.fullmatch(name) or OTHER_HEADS.match(name):
            continue
        if name in tensors:
            raise CheckpointError(
                f"{where} holds {name} twice, as {full} and under another prefix; expected one of "
                "them. Remove the one that does not belong to the model."
            )
        tensors[name] = tensor
    notes = [f"{', '.join(sorted(taken))} was taken off the names of its tensors"] if taken else []
    return tensors, notes


def _outer_prefix(names: Iterable[str], where: str) -> str:
    """Return what stands before `transformer.` in the names of the one GPT-2 among them."""
    matches = (BODY.fullmatch(name) for name in names)
    found = {match[1] for match in matches if match is not None}
    if len(found) > 1:
        raise CheckpointError(
            f"{where} holds several models, whose tensors begin with {', '.join(map(repr, sorted(found)))}; "
            "expected one. Save the one that you mean by itself."
        )
    return next(iter(found), "")


def first_line(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def some(names: Iterable[str]) -> str:
    """List up to four names, and count the rest."""
    shown = list(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def show(value: Any) -> str:
    """Return a value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
