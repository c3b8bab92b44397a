"""Find the files of a checkpoint, on this disk or on the Hugging Face hub, and read what is in them.

Nothing in a checkpoint is executed: pickled files go through torch's loader for tensors only.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

LAYOUTS = (("model.safetensors", "model.safetensors.index.json"), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json")
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
OTHER_HEADS = re.compile(r"(score|classifier|multiple_choice_head|qa_outputs|v_head)\.")
MASK_BUFFERS = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")
REFUSED_PICKLE = re.compile(r"GLOBAL (\S+) (?:was not|whose module)|unrecognized function (.+)")


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read or computed with; the message says what to do next."""


def locate(model: str, revision: str | None = None) -> Path:
    """Return the nanoGPT file or the directory of a model; of a hub id only configuration and tokenizer are fetched."""
    path = Path(str(files("headwater.extractor") / "demo")) if model == "demo" else Path(model).expanduser()
    if model == "demo" and not (path / "config.json").is_file():
        raise CheckpointError("the model 'demo' is not part of this installation: its config.json is missing from the "
                              "package. Reinstall headwater, or name a directory or a hub id.")
    if path.exists():
        if revision is not None:
            raise CheckpointError(f"revision {revision!r} was given for {model!r}, which is on this disk; only hub ids "
                                  "have revisions. Leave the revision out.")
        return path
    if path.suffix in (".pt", ".bin", ".safetensors") or not HUB_ID.fullmatch(model):
        raise CheckpointError(f"there is no file or directory {model!r}; expected a Hugging Face directory, a nanoGPT "
                              "ckpt.pt, a hub id such as 'gpt2', or 'demo'. Check the path.")
    return _download(model, revision, [*TOKENIZER_FILES, *(index for _, index in LAYOUTS)])


def fetch_weights(model: str, folder: Path) -> None:
    """Fetch the weights of a hub id beside its configuration in `folder`; do nothing for a model on this disk.

    Pickled files are fetched only where there are no safetensors.
    """
    if model == "demo" or Path(model).expanduser().exists():
        return
    for whole, index in LAYOUTS:
        wanted = sorted(read_index(folder / index)) if (folder / index).is_file() else [whole]
        if not all((folder / name).is_file() for name in wanted):
            _download(model, folder.name, wanted)
        if any((folder / name).is_file() for name in wanted):
            return


def _download(model: str, revision: str | None, names: list[str]) -> Path:
    """Fetch config.json and the named files of a hub id into the hub's cache, or find them there.

    The hub is first asked once, with a time limit, since snapshot_download would wait for a silent one for ever.
    """
    import huggingface_hub
    from huggingface_hub import constants

    problem = None
    try:
        huggingface_hub.model_info(model, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # the classes differ between versions of the library and its HTTP client
        problem = error
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=["config.json", *names],
                                                      local_files_only=problem is not None))
    except Exception as error:
        raise _unavailable(model, revision, problem or error) from (problem or error)


def _unavailable(model: str, revision: str | None, error: Exception) -> CheckpointError:
    """Say why a hub id that is not in the cache cannot be had."""
    from huggingface_hub import constants, errors

    what = f"hub model {model!r}" + (f" at revision {revision!r}" if revision else "")
    hub, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    match error:
        case errors.HFValidationError():
            return CheckpointError(f"{model!r} is not a possible hub id ({_reason(error)}). Write it as "
                                   "'organisation/name', or name a directory.")
        case errors.GatedRepoError():
            return CheckpointError(f"{what} is gated: its owner grants access on request. Ask for it on {hub}/{model}, "
                                   "then log in with `hf auth login`.")
        case errors.RepositoryNotFoundError():
            return CheckpointError(f"{what} does not exist on {hub}, or is private. Check the name (expected a hub id "
                                   "such as 'gpt2', or a path); for a private model log in with `hf auth login`.")
        case errors.RevisionNotFoundError():
            return CheckpointError(f"{what} does not exist on {hub}; expected a branch, a tag or a full commit hash. "
                                   f"Look at {hub}/{model}/commits, or leave the revision out.")
    if constants.HF_HUB_OFFLINE:
        return CheckpointError(f"{what} is not complete in the cache {cache}, and HF_HUB_OFFLINE forbids to fetch it. "
                               "Unset HF_HUB_OFFLINE, set HF_HOME to the cache that has it, or name a directory.")
    return CheckpointError(f"{what} is not complete in the cache {cache} and could not be fetched from {hub}: "
                           f"{_reason(error)}. Check the connection and HF_ENDPOINT, or copy the model's directory "
                           "here and name it.")


def read_config_json(directory: Path) -> dict[str, Any]:
    """Return the contents of a Hugging Face directory's config.json."""
    path = directory / "config.json"
    if not path.is_file():
        nanogpt = directory / "ckpt.pt"
        hint = f"For a nanoGPT checkpoint name the file {nanogpt}." if nanogpt.is_file() else "Check the path."
        raise CheckpointError(f"{directory} has no config.json; expected a Hugging Face directory with config.json and "
                              f"weights. {hint}")
    return _read_json(path)


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file."""
    try:
        raw = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}). Copy or download it again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds {show(raw)}; expected a JSON object. Copy or download it again.")
    return raw


def find_tokenizer(directory: Path) -> Path | None:
    """Return the directory if it holds tokenizer.json, or vocab.json and merges.txt."""
    found = [(directory / name).is_file() for name in ("tokenizer.json", "vocab.json", "merges.txt")]
    return directory if found[0] or all(found[1:]) else None


def read_directory(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a Hugging Face directory under their canonical names."""
    for whole, index in LAYOUTS:
        if (directory / whole).is_file():
            return canonical(_read_file(directory / whole), directory)
        if (directory / index).is_file():
            return canonical(_read_shards(directory / index), directory)
    raise CheckpointError(f"{directory} has a config.json but no weights; expected one of "
                          f"{', '.join(name for pair in LAYOUTS for name in pair)}. Copy or download the weights.")


def read_index(path: Path) -> dict[str, list[str]]:
    """Return the names of the tensors in each shard that an index lists."""
    weight_map = _read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map of tensor names to files. Copy or download it again.")
    shards: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{path} places {name} in {show(shard)}; expected the name of a file in the same "
                                  "directory. Download the checkpoint again from a source that you trust.")
        shards.setdefault(shard, []).append(name)
    return shards


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    """Read every file that an index lists, and of each what the index places there."""
    tensors: dict[str, torch.Tensor] = {}
    for shard, names in sorted(read_index(index).items()):
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{path} is missing, though {index.name} places {some(names)} there. Copy or "
                                  "download it.")
        found = _read_file(path)
        if absent := [name for name in names if name not in found]:
            raise CheckpointError(f"{path} lacks {some(absent)}, though {index.name} places them there; index and "
                                  "file are not of one checkpoint. Copy or download both again.")
        tensors |= {name: found[name] for name in names}
    return tensors


def _read_file(path: Path) -> dict[str, torch.Tensor]:
    """Read one file of tensors, memory-mapped where the format allows it."""
    if path.suffix != ".safetensors":
        return tensors_in(unpickle(path), path)
    try:
        return safetensors.torch.load_file(path)
    except Exception as error:  # whatever a damaged file makes the parser raise
        raise _damaged(path, error) from error


def unpickle(path: Path) -> Any:
    """Load a pickled file without running anything in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged file makes the unpickler raise
        refused = REFUSED_PICKLE.search(str(error))
        if refused is None:
            raise _damaged(path, error) from error
        raise CheckpointError(f"{path} holds Python objects beyond tensors ({refused[1] or refused[2]}). Headwater "
                              "runs no code from checkpoints, so it does not load this file. If you trust its source, "
                              "load it elsewhere and save only its tensors.") from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    """Say why a file cannot be read."""
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            return CheckpointError(f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in the checkout.")
    unpickling = isinstance(error, pickle.UnpicklingError)  # torch's text for these advises to run the file's code
    reason = "it is not what torch.save writes" if unpickling else _reason(error)
    return CheckpointError(f"{path} ({path.stat().st_size} bytes) cannot be read: {reason}. It is cut short, damaged "
                           "or of another format; copy or download it again.")


def _reason(error: Exception) -> str:
    """Return the first line of an error's text."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def tensors_in(raw: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return the named tensors of a state dict."""
    if not isinstance(raw, dict) or not all(isinstance(t, torch.Tensor) for t in raw.values()):
        raise CheckpointError(f"{path} does not hold a plain table of named tensors. Save the model's state_dict() "
                              "there, or better, use safetensors.")
    return {str(name): tensor.detach() for name, tensor in raw.items()}


def canonical(stored: dict[str, torch.Tensor], where: Path) -> dict[str, torch.Tensor]:
    """Drop the `transformer.` prefix, the old mask buffers, and heads for other tasks."""
    tensors: dict[str, torch.Tensor] = {}
    for full, tensor in stored.items():
        name = full.removeprefix("transformer.")
        if MASK_BUFFERS.fullmatch(name) or OTHER_HEADS.match(name):
            continue
        if name in tensors:
            raise CheckpointError(f"{where} holds both {name} and transformer.{name}; expected one of them. Remove "
                                  "the one that does not belong to the model.")
        tensors[name] = tensor
    return tensors


def some(names: Iterable[str]) -> str:
    """List up to four names, and count the rest."""
    shown = list(names)
    return ", ".join(shown[:4]) + (f" and {len(shown) - 4} more" if len(shown) > 4 else "")


def show(value: Any) -> str:
    """Return a value for a message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
