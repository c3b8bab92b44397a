"""Find the files that arguments name, and say by their names and first bytes what they are."""

from __future__ import annotations

import codecs
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from headwater.extractor.text.unpack import (
    PACKINGS,
    STDIN,
    TextError,
    packing_of,
    zip_member,
)

KINDS = {
    "text": (
        ".txt",
        ".text",
        ".md",
        ".markdown",
        ".rst",
        ".tex",
        ".py",
        ".c",
        ".h",
        ".cpp",
        ".js",
        ".ts",
        ".rs",
        ".go",
        ".java",
        ".sh",
    ),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet", ".pq"),
    "arrow": (".arrow", ".feather", ".ipc"),
    "csv": (".csv", ".tsv"),
}
SUFFIXES = tuple(chain.from_iterable(KINDS.values()))
# What a dataset's folder holds beside its tables.
CARDS = re.compile(r"(readme|licen[cs]e|citation|changelog)(\.(md|markdown|txt|text|rst))?", re.I)
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CARD_START = b"---\n"  # the YAML with which the card of a dataset begins
URL = re.compile(r"([a-z][a-z0-9+.-]+)://", re.I)
FETCH = {
    "s3": "Copy it here first, for example with `aws s3 cp`",
    "gs": "Copy it here first, for example with `gsutil cp`",
    "hf": "Fetch it first, for example with `hf download --repo-type dataset`",
    "file": "Write the path alone",
}


def expand_paths(arguments: Sequence[str]) -> list[Path]:
    """List the files that arguments name: files, directories, globs with `**`, and "-" for standard input.

    Of a directory the files with a known suffix are taken, at every depth, in sorted order; hidden ones are skipped,
    and where there are tables or JSON lines, so are README, LICENSE and the metadata of the `datasets` library. Of a
    folder that `datasets` saved to disk, the files that its state.json lists are taken. A file that several arguments
    name is read once. Raises TextError for an argument that names no file.
    """
    return list(dict.fromkeys(chain.from_iterable(_matches(argument) for argument in arguments)))


def kind_of(path: Path) -> str:
    """Tell the format of a file, one of KINDS, by its suffix; of a zip archive also by that of its one file."""
    packing = packing_of(path)
    name = path.name.lower().removesuffix(packing)
    if packing == ".zip" and not name.endswith(SUFFIXES) and path.is_file():
        name = zip_member(path).lower()
    suffix = Path(name).suffix
    return next((kind for kind, suffixes in KINDS.items() if suffix in suffixes), "text")


def _matches(argument: str) -> list[Path]:
    path = Path(argument).expanduser()
    if argument == "-":
        return [STDIN]
    refuse_url("--text", argument)
    if argument and path.is_dir():
        if found := _documents_of(path):
            return found
        raise TextError(
            f"directory {argument!r} holds no file ending in {', '.join(SUFFIXES)}, plain or compressed "
            f"({' '.join(PACKINGS)}). Name the files themselves, or a glob."
        )
    if argument and path.exists():
        return [path]
    if found := [
        Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(name)
    ]:
        return found
    raise TextError(
        f"there is no file {argument!r}, and as a glob it matches none; expected a file, a directory, a "
        "glob, or '-' for standard input. Check the path."
    )


def refuse_url(flag: str, argument: str) -> None:
    """Raise TextError for an address, and say how to fetch what it names."""
    if (url := URL.match(argument)) and not Path(argument).exists():
        advice = FETCH.get(url[1].lower(), "Fetch it first, for example with `curl -LO`")
        if flag == "--text" and url[1] != "file":
            pipe = ", or pipe it into `--text -`"
        else:
            pipe = ""
        raise TextError(
            f"{flag} {argument!r} is an address, and Headwater reads text and ids from this machine only, so that "
            f"it can compare them when a run goes on. {advice}{pipe}."
        )


def _documents_of(directory: Path) -> list[Path]:
    """List a directory's files without what only describes its tables."""
    found = list(_walk(directory))
    described = [path for path in found if _describes(path)]
    others = set(found) - set(described)
    if any(kind_of_name(path.name) != "text" for path in others):
        return [path for path in found if path in others]
    return found


def _describes(path: Path) -> bool:
    """Tell whether a file is a card, metadata, or the script of a dataset, which stands beside a card."""
    if path.suffix == ".py" and (card := path.with_name("README.md")).is_file():
        with card.open("rb") as file:
            return file.read(len(CARD_START)) == CARD_START
    return bool(CARDS.fullmatch(path.name)) or path.name.lower() in METADATA


def kind_of_name(name: str) -> str:
    """Tell the format by a name alone."""
    return kind_of(Path("/nowhere") / name)


def _walk(directory: Path) -> Iterator[Path]:
    if listed := _saved_to_disk(directory):
        yield from listed
        return
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _walk(entry)
        elif entry.is_file() and unpacked_name(entry).endswith(SUFFIXES):
            yield entry


def unpacked_name(path: Path) -> str:
    return path.name.lower().removesuffix(packing_of(path))


def _saved_to_disk(directory: Path) -> list[Path]:
    """List the files of a folder that `datasets.Dataset.save_to_disk` wrote, in their order; none of another."""
    try:
        state = json.loads((directory / "state.json").read_bytes())
        names = [item["filename"] for item in state["_data_files"]]
        if state.get("_indices_files") or not all(Path(name).name == name for name in names):
            return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []
    found = [directory / name for name in names]
    if all(path.is_file() for path in found):
        return found
    return []


def first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)


def how_to_convert(start: bytes) -> str:
    """Say how to make UTF-8 of a file that begins with these bytes."""
    marked = start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "WINDOWS-1252"
    if marked:
        encoding = "UTF-16"
    sure = "Convert"
    if marked:
        sure = "It is UTF-16: convert"
    return f"{sure} it, for example with `iconv -f {encoding} -t UTF-8`."


def name_all(names: Iterable[str]) -> str:
    shown = [repr(name) for name in names]
    return (
        ", ".join(shown[:12]) + (f" and {len(shown) - 12} more" if len(shown) > 12 else "")
        or "none"
    )
