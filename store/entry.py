"""An entry of the ledger: what a worker says of a block that it finished, and the file that says it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from headwater.store.files import json_sum, to_json

ADVICE = "Run `headwater verify --repair` on the run: what it held is then computed again."


class LedgerError(RuntimeError):
    """An entry of the ledger cannot be trusted; the message names it and says what to do."""


@dataclass(frozen=True)
class Entry:
    """What a worker says of a block that it finished.

    `files` maps paths inside the run to [bytes, sum]; `casts` array → {"overflow": n, "nonfinite": n} of values
    that the stored type could not hold; `seconds` phase → seconds.
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

    @property
    def n_bytes(self) -> int:
        """Bytes of the block's files."""
        return sum(size for size, _ in self.files.values())


def encode(entry: Entry) -> bytes:
    """Return the file of an entry: JSON that carries its own checksum."""
    body = asdict(entry)
    return to_json(body | {"crc32c": json_sum(body)})


def decode(data: bytes | OSError, name: str, block: int, fingerprint: str) -> Entry:
    """Read and check the file of an entry; raise LedgerError for one that is not what its name says."""
    try:
        if isinstance(data, OSError):
            raise data
        raw: dict[str, Any] = json.loads(data)
        check = raw.pop("crc32c")
        entry = Entry(**raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise LedgerError(f"ledger entry {name} cannot be read ({error}). {ADVICE}") from error
    if check != json_sum(raw):
        raise LedgerError(f"ledger entry {name} does not match its checksum. {ADVICE}")
    if entry.fingerprint != fingerprint or entry.block != block:
        raise LedgerError(
            f"ledger entry {name} belongs to another run or block (fingerprint {entry.fingerprint[:12]}, block "
            f"{entry.block}; expected {fingerprint[:12]}, block {block}). {ADVICE}"
        )
    return entry
