"""What a user asks for: one frozen configuration, from Python, flags or TOML, and what of it fixes the bytes."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, overload

from headwater.extractor.edits.grammar import Edit, identity, read_edits, refuse_calls
from headwater.extractor.edits.places import digest_source
from headwater.extractor.selection import Selection
from headwater.extractor.settings import (
    BLOCK,
    CALLS,
    COUNT,
    DEVICE,
    EDIT_LINES,
    INDICES,
    MODEL,
    NAMES,
    OUT,
    PATH,
    PATHS,
    PLAIN,
    PRESET,
    SWITCH,
    TEXT,
    THREADS,
    WORKERS,
    flag_of,
    one_of,
    option,
    per_site,
    read_fields,
    read_per_site,
)
from headwater.extractor.sites import PRESETS, SITES, RequestError

Config = TypeVar("Config", bound="RunConfig")

HUB = "model, text and place"
CAPTURE = "what to capture"
CHANGE = "what to change on the way (docs/interventions.md)"
SEQUENCES = "how text becomes sequences of tokens"
COMPUTE = "how to compute and store"


@dataclass(frozen=True)
class RunConfig:
    """Everything that `headwater extract` can be told; the fields are its flags.

    `text` are files, directories, globs or "-"; `tokens` a file of ids [sequence, position] or [position] instead.
    `sites` wins over `preset`. `dtype` and `codec` are a default and exceptions, such as "float16,resid=float32".
    `block` is the number of sequences that are committed together. `edits` change the forward pass: lines, tables or
    Edit objects.
    `allow_call` names the functions, module:name, that edits out of a run's manifest or a TOML file may call.
    """

    # Of a field, `text_only` says that it is about text, and of no use to --tokens; `stored=False` that a request which
    # says nothing else leaves all that the run is made from to a run that exists.
    out: str | os.PathLike[str] = field(
        metadata=option(
            OUT,
            HUB,
            "directory to make; if it is an unfinished run, go on with it",
            "RUN",
            stored=False,
        )
    )
    model: str = field(
        default="demo",
        metadata=option(
            TEXT,
            HUB,
            "directory in Hugging Face's format, nanoGPT's ckpt.pt, a hub id such as gpt2, or demo, a small trained "
            "model that comes with Headwater (default: demo)",
            "M",
            leads=MODEL,
        ),
    )
    revision: str | None = field(
        default=None,
        metadata=option(TEXT, HUB, "branch, tag or commit of a hub id", "R", leads=PLAIN),
    )
    activation: str | None = field(
        default=None,
        metadata=option(
            TEXT,
            HUB,
            "activation function of a checkpoint that does not name one, as nanoGPT's: gelu_new (by tanh), relu, … "
            "(default: gelu, exact, for nanoGPT)",
            "F",
            leads=PLAIN,
        ),
    )
    text: Sequence[str] = field(
        default=(),
        metadata=option(
            PATHS,
            HUB,
            "files (.txt .md .jsonl .csv .tsv .parquet .arrow; text, lines and CSV also as .gz .bz2 .xz .zst or .zip; "
            "anything else is plain text), directories, globs, pipes, or - for standard input",
            "PATH",
        ),
    )
    tokens: str | None = field(
        default=None,
        metadata=option(
            PATH,
            HUB,
            "instead of text: whole numbers [sequence, position], -1 for padding at either end, or one long row to "
            "be cut at --seq-len; .npy, .npz, .pt, or .bin (uint16, as nanoGPT writes)",
            "IDS.npy",
        ),
    )
    preset: str = field(
        default="residual",
        metadata=option(
            PRESET,
            CAPTURE,
            "residual, patterns (with residual), statistics (small: no vectors, no patterns) or all (default: "
            "residual)",
            "P",
        ),
    )
    sites: Sequence[str] = field(
        default=(),
        metadata=option(
            NAMES,
            CAPTURE,
            "sites by name instead of a preset, such as resid,pattern or blocks.3.hook_resid_post; `headwater sites` "
            "lists them",
            "A,B",
        ),
    )
    layers: str | None = field(
        default=None,
        metadata=option(
            INDICES,
            CAPTURE,
            "layers from 0: 3, 0,4:8 (4 to 7), :2, -1 (the last) (default: all)",
            "L",
        ),
    )
    depths: str | None = field(
        default=None,
        metadata=option(
            INDICES,
            CAPTURE,
            "depths of the residual stream: 0 the embeddings, d what layer d - 1 left (default: all)",
            "D",
        ),
    )
    heads: str | None = field(
        default=None, metadata=option(INDICES, CAPTURE, "heads (default: all)", "H")
    )
    positions: str | None = field(
        default=None,
        metadata=option(
            INDICES,
            CAPTURE,
            "positions of residual streams, q, k, v, z and neurons: 0:16, or last, the last token of each sequence "
            "(default: all)",
            "P",
        ),
    )
    edits: Sequence[Edit | str | Mapping[str, Any]] = field(
        default=(),
        metadata=option(
            EDIT_LINES,
            CHANGE,
            "change a value, once or several times: 'resid[4] position=first dim=447 scale=0.5'. A site, then any of "
            "position, token, head, dim, key, then scale, set, zero, add, mean, patch, freeze, linearise, noise or "
            "call",
            "EDIT",
            flag="--edit",
        ),
    )
    seq_len: int | None = field(
        default=None,
        metadata=option(
            COUNT, SEQUENCES, "positions in a sequence (default: as many as the model has)", "N"
        ),
    )
    mode: str = field(
        default="pack",
        metadata=option(
            one_of("pack", "document"),
            SEQUENCES,
            "pack: join documents and cut full sequences; document: one sequence for each document, cut at --seq-len "
            "or padded (default: pack)",
            "MODE",
            text_only=True,
        ),
    )
    stride: int | None = field(
        default=None,
        metadata=option(
            COUNT,
            SEQUENCES,
            "make several sequences, each N tokens after the one before, of a document (with --mode document) or a "
            "row of --tokens that is longer than a sequence; tokens that two of them hold are computed twice",
            "N",
        ),
    )
    within_documents: bool = field(
        default=False,
        metadata=option(
            SWITCH,
            SEQUENCES,
            "with pack: attention and positions start anew at each document of a sequence",
            text_only=True,
        ),
    )
    bos: bool = field(
        default=False,
        metadata=option(
            SWITCH,
            SEQUENCES,
            "begin each sequence with the beginning-of-text token",
            text_only=True,
        ),
    )
    special_tokens: str = field(
        default="ids",
        metadata=option(
            one_of("ids", "text"),
            SEQUENCES,
            "what special tokens such as <|endoftext|> that stand in the text become: ids, as in transformers, or "
            "text, ordinary pieces (default: ids)",
            "S",
            text_only=True,
        ),
    )
    tokenizer: str | None = field(
        default=None,
        metadata=option(
            TEXT,
            SEQUENCES,
            "tokenizer.json, its directory, or a hub id (default: the model's own)",
            "T",
            leads=MODEL,
            text_only=True,
        ),
    )
    column: str | None = field(
        default=None,
        metadata=option(
            TEXT,
            SEQUENCES,
            "column or JSON key that holds the text, lists of token ids (input_ids), or the turns of a conversation "
            "(default: text)",
            "NAME",
            leads=PLAIN,
            text_only=True,
        ),
    )
    labels: Sequence[str] = field(
        default=(),
        metadata=option(
            NAMES,
            SEQUENCES,
            "columns to keep beside the sequences, as label_A, label_B",
            "A,B",
            text_only=True,
        ),
    )
    jsonl: bool = field(
        default=False,
        metadata=option(
            SWITCH,
            SEQUENCES,
            "read standard input, and files of whatever name, as JSON lines",
            text_only=True,
        ),
    )
    max_sequences: int | None = field(
        default=None, metadata=option(COUNT, SEQUENCES, "stop after N sequences", "N")
    )
    max_tokens: int | None = field(
        default=None,
        metadata=option(COUNT, SEQUENCES, "stop after N tokens", "N", text_only=True),
    )
    max_unpacked: int | None = field(
        default=None,
        metadata=option(
            COUNT,
            SEQUENCES,
            "bytes that one compressed file may unpack to (default: 128 GiB)",
            "N",
            refused="max_unpacked protects the server's memory and disk; unpack the text before you send it.",
            text_only=True,
            stored=False,
        ),
    )
    compute: str = field(
        default="fp32",
        metadata=option(
            one_of("fp32", "bf16", "fp16"),
            COMPUTE,
            "fp32, bf16 or fp16 for products with weights; the rest is fp32 (default: fp32)",
            "C",
        ),
    )
    dtype: str = field(
        default="float16",
        metadata=option(
            per_site("dtype"),
            COMPUTE,
            "float16 or float32, with exceptions: float16,resid=float32 (default: float16)",
            "D",
        ),
    )
    codec: str = field(
        default="none",
        metadata=option(
            per_site("codec"),
            COMPUTE,
            "none, zstd-1 or zstd-3, with exceptions: none,pattern=zstd-1 (default: none)",
            "C",
        ),
    )
    block: int | None = field(
        default=None,
        metadata=option(
            BLOCK,
            COMPUTE,
            "sequences that are finished together, a power of two (default: about 16,000 tokens)",
            "B",
        ),
    )
    top_k: int = field(
        default=10,
        metadata=option(
            COUNT,
            CAPTURE,
            "how many of the largest logits top_logits keeps (default: 10)",
            "K",
        ),
    )
    on_overflow: str = field(
        default="fail",
        metadata=option(
            one_of("fail", "keep"),
            COMPUTE,
            "what to do with values that float16 cannot hold: fail, or keep them as infinity (default: fail)",
            "O",
        ),
    )
    threads: int | None = field(
        default=None,
        metadata=option(
            THREADS,
            COMPUTE,
            "processor threads of each worker (default: all cores, shared among the workers)",
            "N",
            stored=False,
        ),
    )
    workers: int = field(
        default=0,
        metadata=option(
            WORKERS,
            COMPUTE,
            "worker processes, through Ray; 0 computes in this one (default: 0)",
            "N",
            stored=False,
        ),
    )
    ray: str | None = field(
        default=None,
        metadata=option(
            TEXT,
            COMPUTE,
            "Ray cluster to use: auto, or its address; every node must see --out",
            "ADDRESS",
            refused="ray is the server's to choose; leave it out. `headwater serve --ray` says where jobs run.",
            stored=False,
        ),
    )
    other_processor: bool = field(
        default=False,
        metadata=option(
            SWITCH,
            COMPUTE,
            "go on with a run that another kind of processor, torch or Headwater began, or with workers of one; last "
            "bits may differ",
            stored=False,
        ),
    )
    device: str = field(
        default="cpu",
        metadata=option(
            DEVICE,
            COMPUTE,
            "cpu, or cuda (cuda:1) to compute with the kernels on a GPU (default: cpu)",
            "D",
            stored=False,
        ),
    )
    allow_call: Sequence[str] = field(
        default=(),
        metadata=option(
            CALLS,
            CHANGE,
            "let the edits of a run that goes on, or of --config, call this function; a file alone never runs code",
            "MODULE:NAME",
            refused="allow_call is not for jobs; this server runs no code that a request names.",
            stored=False,
        ),
    )

    def __post_init__(self) -> None:
        """Bring every value to its own type; raise RequestError for one that is wrong or of no use here."""
        read_fields(self)
        if self.tokens is None:
            return
        for item in fields(self):
            if item.metadata.get("text_only") and getattr(self, item.name) != item.default:
                raise RequestError(
                    f"{flag_of(item.name)} says how text becomes sequences, but --tokens gives them as they are. "
                    "Leave one of them out.",
                    flag=item.name,
                )

    @property
    def requested(self) -> tuple[str, ...]:
        """The sites as asked for, by name or by preset."""
        return tuple(self.sites) or PRESETS[self.preset]

    @property
    def names_only_out(self) -> bool:
        """Whether what a run is made from is left to the run itself."""
        stored = {item.name for item in fields(self) if item.metadata.get("stored", True)}
        return not self.to_json().keys() & stored

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


@overload
def make_config(
    flags: Mapping[str, Any], file: str | None = None, out: str | None = None
) -> RunConfig: ...


@overload
def make_config(
    flags: Mapping[str, Any], file: str | None, out: str | None, kind: type[Config]
) -> Config: ...


def make_config(
    flags: Mapping[str, Any],
    file: str | None = None,
    out: str | None = None,
    kind: type[RunConfig] = RunConfig,
) -> RunConfig:
    """Merge a TOML file and flags; raise RequestError for what is wrong in either.

    Flags win; None means not given, and flags that are no setting are left out. A flag `preset` replaces the file's
    `sites` too, and `text` its `tokens`. `out` is the default of `--out`, which otherwise must be there. `kind` is the
    class of the request.
    """
    settings = [item.name for item in fields(kind)]
    stored = {} if file is None else _read_toml(file, settings)
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
        return kind(**values)
    except RequestError as error:
        if error.flag in stored.keys() - given.keys():
            raise RequestError(f"{error} (That is {error.flag} in {file}.)", error.flag) from error
        raise


def _read_toml(file: str, known: Sequence[str]) -> dict[str, Any]:
    """Return the settings in a TOML file; `seq-len` is the same as `seq_len`."""
    try:
        raw = tomllib.loads(Path(file).expanduser().read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--config {file} cannot be read: {error}. It must be a TOML file whose keys are the flags, such as "
            "seq_len = 512."
        ) from error
    values = {name.replace("-", "_"): value for name, value in raw.items()}
    for name in values.keys() - set(known):
        near = difflib.get_close_matches(name, known, 1)
        raise RequestError(
            f"--config {file}: {name!r} is not a setting{f'; did you mean {near[0]!r}?' if near else '.'} Settings are "
            f"the flags of `headwater extract`: {', '.join(known)}."
        )
    return values
