"""What a user asks for: one frozen configuration, from Python, flags or TOML, and what of it fixes the bytes."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from headwater.extractor.sites import PRESETS, SITES, SQUARE, VECTOR, RequestError, Selection, split_names
from headwater.store.layout import CODECS

FLOATS = ("float16", "float32")
COMPUTES = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class RunConfig:
    """Everything that `headwater extract` can be told; the fields are its flags.

    `text` are files, directories, globs or "-"; `tokens` a .npy file of ids [sequence, position] instead. `sites`
    wins over `preset`. `dtype` and `codec` are a default and exceptions, such as "float16,resid=float32". `block` is
    the number of sequences that are committed together.
    """

    out: str
    model: str = "demo"
    revision: str | None = None
    text: tuple[str, ...] = ()
    tokens: str | None = None
    preset: str = "residual"
    sites: tuple[str, ...] = ()
    layers: str | None = None
    depths: str | None = None
    heads: str | None = None
    positions: str | None = None
    seq_len: int | None = None
    mode: str = "pack"
    within_documents: bool = False
    bos: bool = False
    tokenizer: str | None = None
    column: str | None = None
    labels: tuple[str, ...] = ()
    jsonl: bool = False
    max_sequences: int | None = None
    max_tokens: int | None = None
    compute: str = "fp32"
    dtype: str = "float16"
    codec: str = "none"
    block: int | None = None
    top_k: int = 10
    on_overflow: str = "fail"
    threads: int | None = None
    other_processor: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (
            ("preset", tuple(PRESETS)),
            ("mode", ("pack", "document")),
            ("compute", COMPUTES),
            ("on_overflow", ("fail", "keep")),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise RequestError(
                    f"--{name.replace('_', '-')} {value!r} is not known; expected one of {', '.join(allowed)}."
                )
        for name in ("seq_len", "max_sequences", "max_tokens", "block", "top_k", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise RequestError(f"--{name.replace('_', '-')} is {value!r}; expected a whole number from 1 on.")
        if self.block is not None and self.block & (self.block - 1):
            raise RequestError(f"--block is {self.block}; expected a power of two, so that shards divide it.")
        per_array(self.dtype, FLOATS, "dtype")
        per_array(self.codec, tuple(CODECS), "codec")

    @property
    def requested(self) -> tuple[str, ...]:
        """The sites as asked for, by name or by preset."""
        return self.sites or PRESETS[self.preset]

    def dtype_of(self, site: str) -> str:
        """Return the stored dtype of a site: statistics are float32 unless they are named, integers int32."""
        default, named = per_array(self.dtype, FLOATS, "dtype")
        if SITES[site].integer:
            return "int32"
        return named.get(site) or (default or "float16" if SITES[site].group in (VECTOR, SQUARE) else "float32")

    def codec_of(self, site: str) -> str:
        """Return the codec of a site's chunks."""
        default, named = per_array(self.codec, tuple(CODECS), "codec")
        return named.get(site) or default or "none"

    def canonical(self, selection: Selection, seq_len: int, block: int) -> dict[str, Any]:
        """Return what fixes the bytes of a run beside weights and tokens, with every default filled in."""
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
        }

    def to_json(self) -> dict[str, Any]:
        """Return the configuration as JSON values, defaults left out."""
        plain = {f.name: f.default for f in fields(self)}
        return {name: value for name, value in asdict(self).items() if value != plain[name]}


def fingerprint(canonical: Mapping[str, Any], weights_digest: str, tokens_digest: str) -> str:
    """Hash what fixes the bytes of a run."""
    parts = {"config": canonical, "weights": weights_digest, "tokens": tokens_digest}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def per_array(text: str, allowed: tuple[str, ...], what: str) -> tuple[str | None, dict[str, str]]:
    """Read "default,site=value,…"; return the default (or None) and the exceptions."""
    default, named = None, {}
    for part in split_names(text):
        site, equals, value = part.rpartition("=")
        if value == "bfloat16":
            raise RequestError(
                f"--{what} {part!r}: zarr-python has no bfloat16, so runs do not store it. Use float16 "
                "or float32 (bf16 can be the --compute)."
            )
        if value not in allowed:
            raise RequestError(f"--{what} {part!r}: {value!r} is not known; expected one of {', '.join(allowed)}.")
        if equals and site not in SITES:
            raise RequestError(f"--{what} {part!r}: there is no site {site!r}; see `headwater sites`.")
        if equals:
            named[site] = value
        else:
            default = value
    return default, named


def make_config(flags: Mapping[str, Any], file: str | None = None) -> RunConfig:
    """Merge a TOML file and flags (flags win, None means not given); raise RequestError for unknown keys."""
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(Path(file).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(
                f"--config {file} cannot be read: {error}. It must be a TOML file whose keys are the "
                "flags, such as seq_len = 512."
            ) from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    known = {f.name for f in fields(RunConfig)}
    if unknown := sorted(values.keys() - known):
        raise RequestError(
            f"--config {file}: {unknown[0]!r} is not a setting; expected some of {', '.join(sorted(known))}."
        )
    values |= {name: value for name, value in flags.items() if value is not None}
    for name in ("text", "sites", "labels"):
        if isinstance(values.get(name), str):
            values[name] = split_names(values[name]) if name != "text" else (values[name],)
        if name in values:
            values[name] = tuple(values[name])
    for name in ("dtype", "codec"):
        if isinstance(values.get(name), Mapping):
            values[name] = ",".join(f"{k}={v}" if k != "default" else v for k, v in values[name].items())
    for name in ("layers", "depths", "heads", "positions"):
        if isinstance(values.get(name), int):
            values[name] = str(values[name])
    if "out" not in values:
        raise RequestError("--out is missing; name the directory of the run.")
    return RunConfig(**values)


def with_out(config: RunConfig, out: str) -> RunConfig:
    """Return the configuration with another place to write to."""
    return replace(config, out=out)
