"""Folders that are written once, with the checksums of their files: results beside a run."""

from __future__ import annotations

import json
from collections.abc import Iterator

import google_crc32c

from headwater.store.files import json_sum, to_json
from headwater.store.place import Place
from headwater.store.raw import check_files

SUMS = "sums.json"


def results_folder(run: Place) -> Place:
    """Return the folder of a run's results, `RUN.analysis`."""
    path = run.resolve()
    return path.with_name(f"{path.name}.analysis")


def seal(folder: Place) -> None:
    """Write the lengths and checksums of all files of a folder into its SUMS."""
    names = sorted(_names(folder))
    # The sums go last: a folder with SUMS is whole, one without was interrupted.
    sums = {}
    for name, data in zip(names, folder.read_all(names), strict=True):
        if isinstance(data, OSError):
            raise data
        sums[name] = [len(data), int(google_crc32c.value(data))]
    (folder / SUMS).write_bytes(to_json({"files": sums, "crc32c": json_sum(sums)}))


def broken_files(folder: Place) -> Iterator[tuple[str, str]]:
    """Yield the files that are not as they were sealed, with what is wrong; nothing for a folder without SUMS."""
    try:
        raw = json.loads((folder / SUMS).read_bytes())
        sums: dict[str, list[int]] = raw["files"]
        if raw["crc32c"] != json_sum(sums):
            raise ValueError
        check_files(sums)
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, AttributeError):
        yield SUMS, "does not match its checksum"
        return
    for name, data in zip(sums, folder.read_all(sums), strict=True):
        if isinstance(data, FileNotFoundError):
            yield name, "is missing"
        elif isinstance(data, OSError):
            yield name, f"cannot be read: {data}"
        elif [len(data), int(google_crc32c.value(data))] != sums[name]:
            yield name, "does not match its checksum"


def broken_results(run: Place) -> Iterator[tuple[str, str, str]]:
    """Yield result, file and what is wrong of the results beside a run."""
    folder = results_folder(run)
    for name in folder.folders():
        for file, what in broken_files(folder / name):
            yield name, file, what


def delete_folder(folder: Place) -> None:
    """Delete a result."""
    folder.delete_tree()


def _names(folder: Place) -> Iterator[str]:
    yield from (name for name in folder.names_below() if name != SUMS)
