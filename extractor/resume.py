"""Whether a request may go on with a run: what the run was made from, and in what the two differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from headwater.extractor.edits.grammar import refuse_calls, stored_edits
from headwater.extractor.maker import maker
from headwater.extractor.model.weights import Checkpoint
from headwater.extractor.plan import Geometry, Plan, geometry, make_plan
from headwater.extractor.request import RunConfig
from headwater.extractor.text.documents import STDIN, describe_sources
from headwater.extractor.text.paths import expand_paths
from headwater.extractor.text.source import outside, text_request
from headwater.store.entry import different
from headwater.store.manifest import Manifest, RunError
from headwater.store.place import Place


def stored_request(config: RunConfig, run: Place, manifest: Manifest) -> RunConfig:
    """Fill a request that names only --out with what the run was made from; refuse a run that `project` made."""
    m = manifest
    if "derived" in m.config:
        raise RunError(
            f"{run} was not extracted: `headwater project` made it from another run. Go on with that command, or name "
            "another --out."
        )
    if not config.names_only_out:
        return config
    c = m.config
    edits = stored_edits(m.config)
    refuse_calls(edits, f"the manifest of {run}", config.allow_call)
    text: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in _text_of(m).items()
    }
    if text["text"] and "special_tokens" not in text:  # as runs were made before there was a choice
        text["special_tokens"] = "text"
    sizes = m.model["config"]
    whole = {"layers": sizes["n_layer"], "depths": sizes["n_layer"] + 1, "heads": sizes["n_head"]}
    listed: dict[str, Any] = {
        k: ",".join(map(str, c[k])) for k, size in whole.items() if len(c[k]) < size
    }
    positions = c["positions"]
    return replace(
        config,
        model=m.model["name"],
        revision=m.model["revision"],
        activation=m.model["config"]["activation"],
        sites=tuple(c["sites"]),
        **listed,
        positions=None
        if positions is None
        else "last"
        if positions == [-1]
        else ",".join(map(str, positions)),
        seq_len=c["seq_len"] if text["text"] else None,
        compute=c["compute"],
        block=c["block"],
        on_overflow=c["on_overflow"],
        dtype=",".join(f"{site}={dtype}" for site, dtype in c["dtype"].items() if dtype != "int32")
        or config.dtype,
        codec=",".join(f"{site}={codec}" for site, codec in c["codec"].items()),
        top_k=c["top_k"] or config.top_k,
        edits=edits,
        **text,
    )


def check_same(config: RunConfig, checkpoint: Checkpoint, run: Place, manifest: Manifest) -> Plan:
    """Return the plan of a run that this request may go on with; raise RunError where it is another's."""
    shape = Geometry(manifest.n_positions, manifest.block, manifest.micro)
    wanted = replace(config, block=config.block or manifest.block)
    if config.tokens is None:
        shape = replace(geometry(wanted, checkpoint.config), micro=manifest.micro)
    plan = make_plan(wanted, checkpoint.config, shape, manifest.n_sequences)
    asked: dict[str, Any] = {"edits": []} | plan.canonical
    asked |= {"model weights": checkpoint.digest[:12], **text_request(config)}
    # A setting that the run's Headwater did not know is not compared: its text is there, and is not made again.
    stored = {"edits": []} | manifest.config | _text_of(manifest)
    stored |= {"model weights": manifest.model["digest"][:12]}
    if differing := _differing(stored, asked):
        listed = "; ".join(differing[:4]) + (
            f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
        )
        raise RunError(
            f"{run} was made with another configuration: {listed}. Give the same arguments to resume it (or "
            "only --out), or another --out for another run."
        )
    _check_sources(config, manifest)
    check_maker(config, manifest, run, config.device)
    return plan


def check_maker(
    config: RunConfig, manifest: Manifest, run: Place, device: str, who: str = "this"
) -> None:
    """Raise RunError where this process would give other last bits than what made the run, unless that is accepted."""
    other = {} if config.other_processor else different(maker(device), manifest.made_by)
    for what, here in other.items():
        raise RunError(
            f"{run} was made with {what} {manifest.made_by.get(what, 'torch')}; {who} is {here}, whose results may "
            "differ in the last bits. Resume it on the same kind, or accept the mixture with --other-processor."
        )


def _check_sources(config: RunConfig, manifest: Manifest) -> None:
    """Raise RunError where a source file was changed since its text was committed; one that is gone is not needed."""
    stored = {item["path"]: item for item in manifest.text["sources"]}
    there = [Path(path) for path in stored if path != str(STDIN) and Path(path).is_file()]
    for now in describe_sources(there):
        if now["sha256"] != stored[now["path"]]["sha256"]:
            raise RunError(
                f"{now['path']} has changed since its text was committed into {config.out}. The run keeps "
                "the old text: restore the file (or move it away) to resume, or start another run."
            )
    if config.text and "-" not in config.text:
        try:
            added = [
                str(p)
                for p in outside(Path(config.out), expand_paths(config.text))
                if str(p) not in stored
            ]
        except ValueError:
            added = []
        if added:
            raise RunError(
                f"{added[0]} is new since the text was committed into {config.out}. More text is another "
                "run: choose another --out (analyses take several runs), or move the file away."
            )


def _text_of(manifest: Manifest) -> dict[str, Any]:
    """Return what chose a run's text, and nothing else: a file must not say where Ray is, whose answers are code."""
    known = text_request(RunConfig(out="."))
    return {k: v for k, v in manifest.text["request"].items() if k in known}


def _differing(stored: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Say what differs between two configurations; what is set for each site, only for sites that both have."""
    found = []
    for name, value in stored.items():
        if name not in asked:
            found.append(
                f"{name} is {_short(value)} in the run, and this Headwater does not know it"
            )
            continue
        pairs = {name: (value, asked[name])}
        if isinstance(value, dict):
            pairs = {
                f"{name} of {site}": (value[site], asked[name][site])
                for site in value.keys() & asked[name].keys()
            }
        found += [
            f"{what} is {_short(a)} in the run, {_short(b)} in the request"
            for what, (a, b) in sorted(pairs.items())
            if a != b
        ]
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
