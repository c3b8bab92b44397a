"""What a user asks for: one frozen configuration, from Python, flags or TOML, and what of it fixes the bytes."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from headwater.extractor.edits.grammar import Edit, identity, read_edits, refuse_calls
from headwater.extractor.edits.places import digest_source
from headwater.extractor.selection import Selection
from headwater.extractor.settings import TEXT_ONLY, flag_of, read_per_site, read_setting
from headwater.extractor.sites import PRESETS, SITES, RequestError

# What a request may say of a run that exists, and leave all that the run is made from to the run itself.
NOT_STORED = (
    "out",
    "threads",
    "other_processor",
    "workers",
    "ray",
    "device",
    "allow_call",
    "max_unpacked",
)


@dataclass(frozen=True)
class RunConfig:
    """Everything that `headwater extract` can be told; the fields are its flags.

    `text` are files, directories, globs or "-"; `tokens` a file of ids [sequence, position] or [position] instead.
    `sites` wins over `preset`. `dtype` and `codec` are a default and exceptions, such as "float16,resid=float32".
    `block` is the number of sequences that are committed together. `edits` change the forward pass: lines, tables or
    Edit objects.
    `allow_call` names the functions, module:name, that edits out of a run's manifest or a TOML file may call.
    """

    out: str | os.PathLike[str]
    model: str = "demo"
    revision: str | None = None
    activation: str | None = None
    text: Sequence[str] = ()
    tokens: str | None = None
    preset: str = "residual"
    sites: Sequence[str] = ()
    layers: str | None = None
    depths: str | None = None
    heads: str | None = None
    positions: str | None = None
    edits: Sequence[Edit | str | Mapping[str, Any]] = ()
    seq_len: int | None = None
    mode: str = "pack"
    stride: int | None = None
    within_documents: bool = False
    bos: bool = False
    special_tokens: str = "ids"
    tokenizer: str | None = None
    column: str | None = None
    labels: Sequence[str] = ()
    jsonl: bool = False
    max_sequences: int | None = None
    max_tokens: int | None = None
    max_unpacked: int | None = None
    compute: str = "fp32"
    dtype: str = "float16"
    codec: str = "none"
    block: int | None = None
    top_k: int = 10
    on_overflow: str = "fail"
    threads: int | None = None
    workers: int = 0
    ray: str | None = None
    other_processor: bool = False
    device: str = "cpu"
    allow_call: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Bring every value to its own type; raise RequestError for one that is wrong or of no use here."""
        for item in fields(self):
            value = read_setting(item.name, getattr(self, item.name), item.default is None)
            object.__setattr__(self, item.name, value)
        for item in fields(self) if self.tokens is not None else ():
            if item.name in TEXT_ONLY and getattr(self, item.name) != item.default:
                raise RequestError(
                    f"{flag_of(item.name)} says how text becomes sequences, but --tokens gives them as they are. "
                    "Leave one of them out."
                )

    @property
    def requested(self) -> tuple[str, ...]:
        """The sites as asked for, by name or by preset."""
        return tuple(self.sites) or PRESETS[self.preset]

    @property
    def names_only_out(self) -> bool:
        """Whether what a run is made from is left to the run itself."""
        return not self.to_json().keys() - set(NOT_STORED)

    def dtype_of(self, site: str) -> str:
        """Return the stored dtype of a site: statistics are float32 unless they are named, integers int32."""
        default, named = read_per_site(self.dtype, "dtype")
        narrow = default if SITES[site].dtype == "float16" else None
        return named.get(site) or narrow or SITES[site].dtype

    def codec_of(self, site: str) -> str:
        """Return the codec of a site's chunks."""
        default, named = read_per_site(self.codec, "codec")
        return named.get(site) or default or "none"

    def canonical(self, selection: Selection, seq_len: int, block: int) -> dict[str, Any]:
        """Return what fixes the bytes of a run beside weights and tokens, with every default filled in."""
        edits = [identity(edit, digest_source) for edit in self.edits if isinstance(edit, Edit)]
        return {
            "sites": list(selection.sites),
            "layers": list(selection.layers),
            "depths": list(selection.depths),
            "heads": list(selection.heads),
            "positions": None if selection.positions is None else list(selection.positions),
            "seq_len": seq_len,
            "compute": self.compute,
            "dtype": {site: self.dtype_of(site) for site in selection.sites},
            "codec": {site: self.codec_of(site) for site in selection.sites},
            "block": block,
            "top_k": self.top_k if {"top_logits", "top_tokens"} & set(selection.sites) else None,
            "on_overflow": self.on_overflow,
            **({"edits": edits} if edits else {}),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values, defaults left out."""
        plain = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


def fingerprint(canonical: Mapping[str, Any], weights_digest: str, tokens_digest: str) -> str:
    """Hash what fixes the bytes of a run."""
    parts = {"config": canonical, "weights": weights_digest, "tokens": tokens_digest}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_config(
    flags: Mapping[str, Any], file: str | None = None, out: str | None = None
) -> RunConfig:
    """Merge a TOML file and flags; raise RequestError for what is wrong in either.

    Flags win; None means not given, and flags that are no setting are left out. A flag `preset` replaces the file's
    `sites` too, and `text` its `tokens`. `out` is the default of `--out`, which otherwise must be there.
    """
    stored = {} if file is None else _read_toml(file)
    settings = [item.name for item in fields(RunConfig)]
    given = {name: value for name, value in flags.items() if value is not None and name in settings}
    for pair in (("preset", "sites"), ("text", "tokens")):
        for values, where in ((given, ""), (stored, f" in {file}")):
            if all(name in values for name in pair):
                raise RequestError(
                    f"--{pair[0]} and --{pair[1]} were both given{where}; expected one of them."
                )
        if any(name in given for name in pair):
            stored = {name: value for name, value in stored.items() if name not in pair}
    if "allow_call" in stored:
        raise RequestError(
            f"allow_call in {file} cannot allow itself; give --allow-call on the command line."
        )
    if "edits" in stored and "edits" not in given:
        stored["edits"] = read_edits(stored["edits"])
        refuse_calls(stored["edits"], str(file), given.get("allow_call", ()))
    values = ({} if out is None else {"out": out}) | stored | given
    if "out" not in values:
        raise RequestError("--out is missing; name the directory of the run.")
    try:
        return RunConfig(**values)
    except RequestError as error:
        named = re.match(r"--([a-z-]+)", str(error))
        if named and named[1].replace("-", "_") in stored.keys() - given.keys():
            raise RequestError(
                f"{error} (That is {named[1].replace('-', '_')} in {file}.)"
            ) from error
        raise


def _read_toml(file: str) -> dict[str, Any]:
    """Return the settings in a TOML file; `seq-len` is the same as `seq_len`."""
    try:
        raw = tomllib.loads(Path(file).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--config {file} cannot be read: {error}. It must be a TOML file whose keys are the flags, such as "
            "seq_len = 512."
        ) from error
    values = {name.replace("-", "_"): value for name, value in raw.items()}
    known = [item.name for item in fields(RunConfig)]
    for name in values.keys() - set(known):
        near = difflib.get_close_matches(name, known, 1)
        raise RequestError(
            f"--config {file}: {name!r} is not a setting{f'; did you mean {near[0]!r}?' if near else '.'} Settings are "
            f"the flags of `headwater extract`: {', '.join(known)}."
        )
    return values
