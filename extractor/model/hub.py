"""Find the files of a checkpoint, on this disk or on the Hugging Face hub."""

from __future__ import annotations

import difflib
import os
import re
from contextlib import suppress
from importlib.resources import files
from pathlib import Path

from headwater.extractor.model import places as model_places
from headwater.extractor.model.weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    LAYOUTS,
    CheckpointError,
    first_line,
    foreign_format,
    read_index,
    some,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
)
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
CACHE_FOLDER = re.compile(r"models--[\w.-]+")
COMMON = ("demo", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
ALIKE = 0.7
UNAUTHORISED = 401


def locate(model: str, revision: str | None = None) -> Path:
    """Return the nanoGPT file or the directory of a model; of a hub id only configuration and tokenizer are fetched.

    A folder of the hub's cache (`models--org--name`) stands for its snapshot.
    """
    path = (
        Path(str(files("headwater.extractor") / "demo"))
        if model == "demo"
        else Path(model).expanduser()
    )
    if model == "demo" and not (path / "config.json").is_file():
        raise CheckpointError(
            "the model 'demo' is not part of this installation: its config.json is missing from the "
            "package. Reinstall headwater, or name a directory or a hub id."
        )
    if path.exists():
        if model != "demo" and not model_places.is_allowed(path):
            raise CheckpointError(
                f"the model {model!r} does not lie in a folder from which models may be read here. Name a copy that "
                "does."
            )
        if revision is not None:
            raise CheckpointError(
                f"revision {revision!r} was given for {model!r}, which is on this disk; only hub ids "
                "have revisions. Leave the revision out."
            )
        return _on_disk(model, path)
    if path.suffix in (".pt", ".bin", ".safetensors", ".gguf") or not HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"there is no file or directory {model!r}; expected a Hugging Face directory, a nanoGPT "
            f"ckpt.pt, a hub id such as 'gpt2', or 'demo'. {_near(model) or 'Check the path.'}"
        )
    wanted = [*TOKENIZER_FILES, *(index for _, index in LAYOUTS), ADAPTER_CONFIG]
    return _download(model, revision, wanted)


def _on_disk(model: str, path: Path) -> Path:
    """Return a file or directory that may be a checkpoint; refuse what is none by what it is."""
    if path.is_file():
        words = foreign_format(path)
        if words is not None:
            beside = path.parent / "config.json"
            here = f" ({path.parent})" if path.suffix == ".safetensors" and beside.is_file() else ""
            raise CheckpointError(f"{path} {words}{here}.")
        return path
    if CACHE_FOLDER.fullmatch(path.resolve().name) and (path / "snapshots").is_dir():
        return _snapshot(path)
    hides = HUB_ID.fullmatch(model) and not any(
        (path / name).exists() for name in ("config.json", ADAPTER_CONFIG, "ckpt.pt")
    )
    if hides:
        holds = "is empty" if not any(path.iterdir()) else "has no config.json"
        raise CheckpointError(
            f"{model!r} is a directory here that {holds}, so it is no model, but it stands before "
            f"the hub id of that name. For {model} from the hub, rename or remove {path.resolve()}, "
            "or run elsewhere; else check the path."
        )
    return path


def _snapshot(folder: Path) -> Path:
    """Return the snapshot that `refs/main` of a folder of the hub's cache names, or the only one."""
    snapshots = {path.name: path for path in sorted((folder / "snapshots").iterdir())}
    with suppress(OSError, ValueError):
        main = (folder / "refs" / "main").read_text("utf-8").strip()
        if main in snapshots:
            return snapshots[main]
    if len(snapshots) == 1:
        return next(iter(snapshots.values()))
    listed = f"{len(snapshots)} snapshots ({some(snapshots)})" if snapshots else "no snapshot"
    raise CheckpointError(
        f"{folder} is a folder of the hub's cache with {listed}; expected one, or refs/main to name "
        f"it. Name the hub id, {folder.resolve().name.removeprefix('models--').replace('--', '/')}, or "
        f"{folder / 'snapshots' / 'COMMIT'}."
    )


def _near(model: str) -> str:
    """Ask whether a model that is nowhere was meant to be a known one, or a directory beside it; empty for neither."""
    folder = Path(model).expanduser().parent
    beside: list[str] = []
    with suppress(OSError):
        beside = [str(path) for path in folder.iterdir() if (path / "config.json").is_file()]
    near = difflib.get_close_matches(model, [*COMMON, *beside], 1, ALIKE)
    return f"Did you mean {near[0]!r}?" if near else ""


def fetch_weights(model: str, folder: Path) -> list[str]:
    """Fetch the weights of a hub id beside its configuration in `folder`; do nothing for a model on this disk.

    Pickled files are fetched only where there are no safetensors. Where the hub has neither, return the names of what
    it has.
    """
    if model == "demo" or Path(model).expanduser().exists():
        return []
    if (folder / ADAPTER_CONFIG).is_file():
        _download(model, folder.name, list(ADAPTER_FILES))
    for whole, index in LAYOUTS:
        wanted = sorted(read_index(folder / index)) if (folder / index).is_file() else [whole]
        if not all((folder / name).is_file() for name in wanted):
            _download(model, folder.name, wanted)
        if any((folder / name).is_file() for name in wanted):
            return []
    return _names_on_hub(model, folder.name)


def _names_on_hub(model: str, revision: str) -> list[str]:
    """List the files of a hub id, for a message; nothing where the hub does not answer."""
    import huggingface_hub
    from huggingface_hub import constants

    try:
        info = huggingface_hub.model_info(
            model, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
    except Exception:  # the classes differ between versions of the library and its HTTP client
        return []
    return [file.rfilename for file in info.siblings or []]


def _download(model: str, revision: str | None, names: list[str]) -> Path:
    """Fetch config.json and the named files of a hub id into the hub's cache, or find them there.

    The hub is first asked once, with a time limit, since snapshot_download would wait for a silent one for ever.
    """
    import huggingface_hub
    from huggingface_hub import constants

    problem = None
    try:
        huggingface_hub.model_info(model, revision=revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (
        Exception
    ) as error:  # the classes differ between versions of the library and its HTTP client
        problem = error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                model,
                revision=revision,
                allow_patterns=["config.json", *names],
                local_files_only=problem is not None,
            )
        )
    except Exception as error:
        raise _unavailable(model, revision, problem or error) from (problem or error)


def _unavailable(model: str, revision: str | None, error: Exception) -> CheckpointError:
    """Say why a hub id that is not in the cache cannot be had."""
    from huggingface_hub import constants, errors

    what = f"hub model {model!r}" + (f" at revision {revision!r}" if revision else "")
    hub = constants.ENDPOINT
    cache = constants.HF_HUB_CACHE
    match error:
        case errors.HFValidationError():
            return CheckpointError(
                f"{model!r} is not a possible hub id ({first_line(error)}). Write it as "
                "'organisation/name', or name a directory."
            )
        case errors.GatedRepoError():
            return CheckpointError(
                f"{what} is gated: its owner grants access on request. Ask for it on {hub}/{model}, "
                "then log in with `hf auth login`."
            )
        case errors.RepositoryNotFoundError():
            return CheckpointError(
                f"{what} does not exist on {hub}, or is private. Check the name (expected a hub id "
                "such as 'gpt2', or a path); for a private model log in with `hf auth login`. "
                f"{_near(model)}".rstrip()
            )
        case errors.RevisionNotFoundError():
            return CheckpointError(
                f"{what} does not exist on {hub}; expected a branch, a tag or a full commit hash. "
                f"Look at {hub}/{model}/commits, or leave the revision out."
            )
    if _status(error) == UNAUTHORISED and (token := _token_place()):
        return CheckpointError(
            f"{hub} refuses the access token ({_hub_reason(error)}), so {what}, even if it is public, "
            f"could not be fetched. The token comes from {token} and is expired or wrong: remove it, "
            "or log in anew with `hf auth login`."
        )
    if constants.HF_HUB_OFFLINE:
        return CheckpointError(
            f"{what} is not complete in the cache {cache}, and HF_HUB_OFFLINE forbids to fetch it. "
            "Unset HF_HUB_OFFLINE, set HF_HOME to the cache that has it, or name a directory. "
            f"{_near(model)}".rstrip()
        )
    return CheckpointError(
        f"{what} is not complete in the cache {cache} and could not be fetched from {hub}: "
        f"{_hub_reason(error)}. Check the connection and HF_ENDPOINT, or copy the model's directory "
        f"here and name it. {_near(model)}".rstrip()
    )


def _status(error: Exception) -> int | None:
    """Return the HTTP status of a hub's answer."""
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return status


def _hub_reason(error: Exception) -> str:
    """Return the first line of an error, and the hub's own words where they are others."""
    said = getattr(error, "server_message", None)
    reason = first_line(error)
    return f"{reason}; {said}" if said and said not in reason else reason


def _token_place() -> str | None:
    """Say where the access token for the hub comes from; None where there is none."""
    import huggingface_hub
    from huggingface_hub import constants

    if not huggingface_hub.get_token():
        return None
    names = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    return f"the variable {names[0]}" if names else f"the file {constants.HF_TOKEN_PATH}"


def find_tokenizer(directory: Path) -> Path | None:
    """Return the directory if it holds tokenizer.json, or vocab.json and merges.txt, or vocab.txt."""
    forms = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
    found = any(all((directory / name).is_file() for name in form) for form in forms)
    return directory if found else None
