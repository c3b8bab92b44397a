"""An entry of the ledger: what a worker says of a block that it finished, and the file that says it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from headwater.store.files import json_sum, to_json
from headwater.store.raw import check_files, from_raw

# What two makers of one run must have in common for their last bits to agree, by its name in a manifest's `made_by`.
MADE_BY = ("processor", "torch", "products", "kernels", "headwater")
ADVICE = "Run `headwater verify --repair` on the run: what it held is then computed again."


class LedgerError(RuntimeError):
    """An entry of the ledger cannot be trusted; the message names it and says what to do."""


@dataclass(frozen=True)
class Entry:
    """What a worker says of a block that it finished.

    `files` maps paths inside the run to [bytes, sum]; `casts` array → {"overflow": n, "nonfinite": n} of values
    that the stored type could not hold; `seconds` phase → seconds; `made_by` names the processor and the versions that
    computed the block, and is empty in entries of older versions, which do not say; `source` is the mark of the block
    that a derived one was computed from.
    """

    block: int
    attempt: int
    fingerprint: str
    first: int
    last: int
    n_tokens: int
    files: dict[str, list[int]]
    casts: dict[str, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    worker: str = ""
    made_by: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def n_bytes(self) -> int:
        """Bytes of the block's files."""
        return sum(size for size, _ in self.files.values())


def mark_of(attempt: int, files: Iterable[tuple[str, int, int]]) -> str:
    """Return what tells a committed block from the same one computed again: its attempt and a digest of its sums."""
    listed = "\n".join(f"{path} {size} {crc}" for path, size, crc in sorted(files))
    return f"{attempt}.{hashlib.sha256(listed.encode()).hexdigest()[:16]}"


def digest_of(marks: Mapping[int, str], blocks: Iterable[int]) -> str:
    """Return a digest of the marks of some blocks."""
    listed = "\n".join(f"{block} {marks.get(block)}" for block in sorted(blocks))
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def encode(entry: Entry) -> bytes:
    """Return the file of an entry: JSON that carries its own checksum."""
    # Sorted keys and a checksum of the values: the same block gives the same bytes on every machine.
    body = asdict(entry)
    if not entry.source:
        del body["source"]
    return to_json(body | {"crc32c": json_sum(body)})


def decode(data: bytes | OSError, name: str, block: int, fingerprint: str) -> Entry:
    """Read and check the file of an entry; raise LedgerError for one that is not what its name says."""
    try:
        if isinstance(data, OSError):
            raise data
        raw: dict[str, Any] = json.loads(data)
        check = raw.pop("crc32c")
        entry = from_raw(Entry, raw)
        check_files(entry.files)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise LedgerError(f"ledger entry {name} cannot be read ({error}). {ADVICE}") from error
    if check != json_sum(raw):
        raise LedgerError(f"ledger entry {name} does not match its checksum. {ADVICE}")
    if entry.fingerprint != fingerprint or entry.block != block:
        raise LedgerError(
            f"ledger entry {name} belongs to another run or block (fingerprint {entry.fingerprint[:12]}, block "
            f"{entry.block}; expected {fingerprint[:12]}, block {block}). {ADVICE}"
        )
    return entry


def different(made_by: Mapping[str, str], of_run: Mapping[str, str]) -> dict[str, str]:
    """Return in what a maker differs from a run's `made_by`; what either does not say is no difference.

    Runs of older versions do not say what multiplied: torch did.
    """
    stored = {"products": "torch", **of_run}
    return {
        what: made_by[what]
        for what in MADE_BY
        if what in made_by and what in stored and made_by[what] != stored[what]
    }
