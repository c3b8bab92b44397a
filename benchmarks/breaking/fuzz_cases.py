"""The cases of the fuzzer: for each parser of foreign files a spoiled input, and the command that reads it."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from headwater.benchmarks.breaking import faults
from headwater.benchmarks.breaking.mutate import (
    EXTREMES,
    json_bytes,
    mutate_bytes,
    mutate_json,
    mutate_text,
    mutate_words,
)
from headwater.benchmarks.lib.rows import Row
from headwater.extractor.run import extract
from headwater.store.files import json_sum, to_json

MARK = "code-ran"  # the file that every planted piece of code makes, in the case's folder
PLANTED = "planted"  # a module beside the case: importing it makes MARK
CALL = f"resid call={PLANTED}:edit"
EXTRACT = ["extract", "--out", "new", "--seq-len", "8", "--max-sequences", "4", "--threads", "1"]
# Imported before the forks, so that a case takes no longer than its own work.
PRELOADED = (
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "pyarrow.csv",
    "pyarrow.ipc",
    "pyarrow.parquet",
    "safetensors.torch",
    "tokenizers",
    "xarray",
    "zarr",
    "headwater.analysis.plots.report",
    "headwater.analysis.suite.analyze",
    "headwater.extractor.in_memory",
    "headwater.service.jobs.requests",
    "headwater.service.jobs.tasks",
)
Command = Callable[[], int] | list[str]
Parser = Callable[[Path, Random], Command]


def make_material(home: Path) -> Path:
    """Write valid inputs of every kind, which the cases spoil: a model, texts, ids, a run and its results."""
    import torch

    torch.set_num_threads(1)  # so that a fork finds no thread pool that it would wait for
    for name in PRELOADED:
        import_module(name)
    home.mkdir(parents=True)
    code = faults.in_child(lambda: _make_material(home))
    if code:
        raise RuntimeError(f"the inputs could not be made: exit code {code}.")
    return home


def _make_material(home: Path) -> None:
    from headwater.cli import entry as cli

    extract(faults.make_case(home))
    with redirect_stdout(None), redirect_stderr(None):
        assert cli.main(["analyze", str(home / "run"), "norms", "sinks"]) == 0
    (home / PLANTED).with_suffix(".py").write_text(
        f"open({MARK!r}, 'w').close()\n\ndef edit(x):\n    open({MARK!r}, 'w').close()\n    return x\n"
    )
    rows = [json.loads(line) for line in (home / "text.jsonl").read_text().splitlines()]
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.ipc
    import pyarrow.parquet

    table = pa.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, home / "text.parquet")
    pyarrow.csv.write_csv(table, home / "text.csv")
    with pyarrow.ipc.new_file(str(home / "text.arrow"), table.schema) as file:
        file.write_table(table)
    text = (home / "text.jsonl").read_bytes()
    (home / "text.jsonl.gz").write_bytes(gzip.compress(text))
    (home / "text.jsonl.bz2").write_bytes(bz2.compress(text))
    (home / "text.jsonl.xz").write_bytes(lzma.compress(text))
    (home / "text.jsonl.zst").write_bytes(_zstd(text))
    with zipfile.ZipFile(home / "text.jsonl.zip", "w") as archive:
        archive.writestr("text.jsonl", text)
    ids = np.arange(64, dtype=np.uint16).reshape(4, 16) % 250
    (home / "pairs.jsonl").write_text('{"a": "abcd", "b": "abce"}\n')
    np.save(home / "ids.npy", ids)
    np.savez(home / "ids.npz", ids)
    ids.tofile(home / "ids.bin")
    np.save(home / "values.npy", np.ones(32, np.float32))
    (home / "request.toml").write_text(
        'model = "model"\ntext = ["text.jsonl"]\nsites = ["resid", "pattern"]\nseq_len = 8\n'
        'layers = "0"\ndtype = "float16"\nlabels = ["kind"]\nblock = 4\nedits = ["resid[1] zero"]\n'
    )


def _zstd(data: bytes) -> bytes:
    import pyarrow as pa

    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


def _spoil(path: Path, random: Random) -> None:
    path.write_bytes(mutate_bytes(path.read_bytes(), random))


def _spoil_json(path: Path, random: Random) -> None:
    path.write_bytes(json_bytes(mutate_json(json.loads(path.read_bytes()), random), random))


def _of_text(name: str, *more: str) -> list[str]:
    return [*EXTRACT, "--model", "model", "--text", name, *more]


def config(folder: Path, random: Random) -> Command:
    """A model's config.json, planned and loaded."""
    _spoil_json(folder / "model/config.json", random)
    return ["plan", "--model", "model", "--text", "text.jsonl", "--seq-len", "8", "--preset", "all"]


def safetensors(folder: Path, random: Random) -> Command:
    """The weights: their header, or any of their bytes."""
    path = folder / "model/model.safetensors"
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    if random.random() < 0.5:
        header = json_bytes(mutate_json(json.loads(data[8 : 8 + size]), random), random)
        length = random.choice((len(header), len(header), 2**40, 2**63, 0))
        path.write_bytes(struct.pack("<Q", length) + header + data[8 + size :])
    else:
        path.write_bytes(mutate_bytes(data, random))
    return _of_text("text.jsonl")


class _Planted:
    """What a hostile pickle holds: a call that makes MARK when it is loaded."""

    def __init__(self, call: Callable[..., Any], *arguments: object) -> None:
        self.call = call
        self.arguments = arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call, self.arguments


def _hostile(folder: Path, random: Random) -> _Planted:
    import os

    mark = str(folder / MARK)
    calls = (
        _Planted(os.system, f"touch {mark}"),
        _Planted(open, mark, "w"),
        _Planted(exec, f"open({mark!r}, 'w')"),
        _Planted(np.save, mark, np.zeros(1)),
    )
    return random.choice(calls)


def _nanogpt(width: int, positions: int, vocabulary: int) -> Row:
    """Return the tensors of a nanoGPT model of one layer without biases."""
    import torch

    shapes = {
        "wte": (vocabulary, width),
        "wpe": (positions, width),
        "h.0.ln_1": (width,),
        "h.0.attn.c_attn": (3 * width, width),
        "h.0.attn.c_proj": (width, width),
        "h.0.ln_2": (width,),
        "h.0.mlp.c_fc": (4 * width, width),
        "h.0.mlp.c_proj": (width, 4 * width),
        "ln_f": (width,),
    }
    return {f"transformer.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}


def checkpoint(folder: Path, random: Random) -> Command:
    """A nanoGPT checkpoint: spoiled bytes, spoiled members, or a pickle that calls a function."""
    import torch

    path = folder / "ckpt.pt"
    sizes = {
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 8,
        "block_size": 16,
        "vocab_size": 257,
        "bias": False,
    }
    tensors = _nanogpt(width=8, positions=16, vocabulary=257)
    way = random.randrange(4)
    if way == 0:
        path.write_bytes(pickle.dumps({"model": _hostile(folder, random), "model_args": sizes}))
    elif way == 1:
        extra = _hostile(folder, random)
        torch.save({"model": tensors, "model_args": sizes, "extra": extra}, path)
    elif way == 2:
        torch.save({"model": tensors, "model_args": mutate_json(sizes, random)}, path)
    else:
        torch.save({"model": tensors, "model_args": sizes}, path)
        _spoil(path, random)
    return [*EXTRACT[:3], "--threads", "1", "--model", "ckpt.pt", "--tokens", "ids.npy"]


def weights_bin(folder: Path, random: Random) -> Command:
    """A pytorch_model.bin, spoiled or hostile."""
    import torch
    from safetensors.torch import load_file

    tensors = load_file(folder / "model/model.safetensors")
    (folder / "model/model.safetensors").unlink()
    path = folder / "model/pytorch_model.bin"
    if random.random() < 0.5:
        path.write_bytes(pickle.dumps(_hostile(folder, random), protocol=random.choice((2, 4))))
    else:
        torch.save(tensors, path)
        _spoil(path, random)
    return _of_text("text.jsonl")


def tokenizer(folder: Path, random: Random) -> Command:
    """A tokenizer.json and what may lie beside it."""
    _spoil_json(folder / "model/tokenizer.json", random)
    beside = {
        "tokenizer_config.json": {
            "bos_token": "<|endoftext|>",
            "add_bos_token": True,
            "model_max_length": 64,
        },
        "special_tokens_map.json": {"bos_token": {"content": "<|endoftext|>"}, "pad_token": "x"},
        "added_tokens.json": {"<new>": 257},
    }
    for name, document in beside.items():
        if random.random() < 0.3:
            (folder / "model" / name).write_bytes(json_bytes(mutate_json(document, random), random))
    return _of_text("text.jsonl")


def vocabulary(folder: Path, random: Random) -> Command:
    """A tokenizer of vocab.json and merges.txt, or of vocab.txt."""
    home = folder / "model"
    words = json.loads((home / "tokenizer.json").read_bytes())["model"]["vocab"]
    words |= {"ab": 257, "cd": 258}
    (home / "tokenizer.json").unlink()
    if random.random() < 0.3:
        (home / "vocab.txt").write_bytes(mutate_bytes("\n".join(words).encode(), random))
    else:
        (home / "vocab.json").write_bytes(json_bytes(mutate_json(words, random), random))
        (home / "merges.txt").write_bytes(mutate_bytes(b"#version: 0.2\na b\nc d\n", random))
    return _of_text("text.jsonl", "--sites", "resid")


def adapter(folder: Path, random: Random) -> Command:
    """A LoRA adapter beside the weights."""
    import torch
    from safetensors.torch import save_file

    document = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["c_attn"],
        "fan_in_fan_out": True,
        "task_type": "CAUSAL_LM",
    }
    prefix = "base_model.model.transformer.h.0.attn.c_attn."
    pair = {
        f"{prefix}lora_A.weight": torch.ones(2, 32),
        f"{prefix}lora_B.weight": torch.ones(96, 2),
    }
    save_file(pair, folder / "model/adapter_model.safetensors")
    (folder / "model/adapter_config.json").write_text(json.dumps(document))
    if random.random() < 0.5:
        _spoil_json(folder / "model/adapter_config.json", random)
    else:
        _spoil(folder / "model/adapter_model.safetensors", random)
    return _of_text("text.jsonl")


def table(folder: Path, random: Random) -> Command:
    """A table or lines of JSON as text, with labels."""
    name = random.choice(("text.jsonl", "text.csv", "text.parquet", "text.arrow"))
    _spoil(folder / name, random)
    return _of_text(name, "--labels", "kind,rank", "--mode", "document")


def arrow(folder: Path, random: Random) -> Command:
    """An Arrow file whose buffers are spoiled: offsets that point outside of it."""
    path = folder / "text.arrow"
    data = bytearray(path.read_bytes())
    for _ in range(random.randint(1, 3)):
        at = random.randrange(0, len(data) - 8, 8)
        data[at : at + 4] = struct.pack("<i", random.choice((-1, 2**31 - 1, 10**6, 314_000_000, 7)))
    path.write_bytes(data)
    return _of_text("text.arrow")


def compressed(folder: Path, random: Random) -> Command:
    """Compressed text, spoiled, or much larger than its file."""
    suffix = random.choice(("gz", "bz2", "xz", "zst", "zip"))
    path = folder / f"text.jsonl.{suffix}"
    if random.random() < 0.1:
        bomb = io.BytesIO()
        with gzip.GzipFile(fileobj=bomb, mode="wb", compresslevel=9) as file:
            for _ in range(random.choice((64, 400))):
                file.write(b"a" * (1 << 20))
        path = folder / "text.txt.gz"
        path.write_bytes(bomb.getvalue())
    else:
        _spoil(path, random)
    return _of_text(path.name)


def ids(folder: Path, random: Random) -> Command:
    """Files of token ids."""
    name = random.choice(("ids.npy", "ids.npz", "ids.bin", "ids.pt"))
    path = folder / name
    if name == "ids.pt" or random.random() < 0.1:
        path.write_bytes(pickle.dumps(_hostile(folder, random)))
    else:
        _spoil(path, random)
    return [*EXTRACT[:3], "--threads", "1", "--model", "model", "--tokens", name]


def request(folder: Path, random: Random) -> Command:
    """A configuration file in TOML."""
    path = folder / "request.toml"
    path.write_text(mutate_text(path.read_text(), random), "utf-8", errors="replace")
    if random.random() < 0.3:
        _spoil(path, random)
    return ["plan", "--config", "request.toml"]


def edits(folder: Path, random: Random) -> Command:
    """Edits as text and their values in .npy files."""
    texts = (
        "resid[1] zero",
        "resid position=0,2:4 dim=3 scale=0.5",
        "z[0] head=1 set=values.npy",
        "mlp_post[1] dim=0:8 mean=run",
        "resid[0] add=values.npy position=last",
        "pattern[0] head=0 freeze",
        "resid patch=run",
    )
    edit = mutate_text(random.choice(texts), random)
    if random.random() < 0.4:
        _spoil(folder / "values.npy", random)
    command = _of_text("text.jsonl", f"--edit={edit}".replace("\0", ""))
    if random.random() < 0.3:
        return ["plan", *command[1:]]
    return command


def command_line(folder: Path, random: Random) -> Command:
    """Words of commands."""
    commands = (
        [
            *EXTRACT,
            "--model",
            "model",
            "--text",
            "text.jsonl",
            "--sites",
            "resid,pattern",
            "--layers",
            "0:2",
        ],
        ["analyze", "run", "sinks", "massive", "--again"],
        ["info", "run", "--json"],
        ["verify", "run", "--quick"],
        ["status", "run"],
        ["sites", "--model", "model"],
        ["compare", "run", "run"],
        ["project", "run", "--on", "svd", "--out", "projected"],
        ["patch", "--model", "model", "--pairs", "pairs.jsonl", "--out", "patched"],
    )
    return mutate_words(random.choice(commands), random)


def manifest(folder: Path, random: Random) -> Command:
    """A run's manifest with a right checksum: spoiled members, or a planted edit that calls a function."""
    path = folder / "run/headwater/manifest.json"
    document = json.loads(path.read_bytes())
    if random.random() < 0.3:
        document["config"]["edits"] = [{"edit": CALL, "digest": ""}]
    else:
        document = mutate_json({k: v for k, v in document.items() if k != "crc32c"}, random)
    _sign(path, document)
    for entry in sorted((folder / "run/headwater/ledger").glob("*.json"))[:1]:
        entry.unlink()  # a block is missing, so that going on computes something
    return random.choice(
        (
            ["extract", "--out", "run"],
            ["info", "run"],
            ["verify", "run"],
            ["status", "run"],
            ["analyze", "run", "norms"],
        )
    )


def ledger(folder: Path, random: Random) -> Command:
    """An entry of the ledger, with a right checksum or none."""
    path = random.choice(sorted((folder / "run/headwater/ledger").glob("*.json")))
    document = json.loads(path.read_bytes())
    if random.random() < 0.5:
        _sign(path, mutate_json({k: v for k, v in document.items() if k != "crc32c"}, random))
    else:
        _spoil(path, random)
    return random.choice(
        (
            ["verify", "run"],
            ["status", "run"],
            ["extract", "--out", "run"],
            ["verify", "run", "--repair"],
            ["analyze", "run", "norms"],
        )
    )


def planted_names(folder: Path, random: Random) -> Command:
    """Files in a run that name other files: what stage 0 left unfinished."""
    (folder / "precious").mkdir()
    (folder / "precious" / "kept").write_text("x")
    new = folder / "new" / "headwater"
    new.mkdir(parents=True)
    lines = (
        "../precious",
        str(folder / "precious"),
        "resid/../../precious",
        "",
        ".",
        "a\0b",
        "x" * 300,
    )
    (new / "unfinished").write_text("\n".join(random.sample(lines, 3)) + "\n")
    if random.random() < 0.3:
        (folder / "new/tokens").symlink_to(folder / "precious")

    def run() -> int:
        from headwater.cli import entry as cli

        code = cli.main(_of_text("text.jsonl"))
        if not (folder / "precious" / "kept").exists():
            (folder / MARK).touch()  # a file outside the run is gone: as bad as code that ran
        return code

    return run


def metadata(folder: Path, random: Random) -> Command:
    """A zarr.json of a run or of its results."""
    run = folder / random.choice(("run", "run.analysis"))
    path = random.choice(sorted(run.rglob("zarr.json")))
    if random.random() < 0.7:
        _spoil_json(path, random)
    else:
        _spoil(path, random)
    return random.choice(
        (["analyze", "run", "norms"], ["report", "run"], ["verify", "run"], ["info", "run"])
    )


def documents(folder: Path, random: Random) -> Command:
    """What a run says of its texts, and the tokenizer that it carries."""
    paths = [p for p in (folder / "run").iterdir() if p.is_file() and p.name != "zarr.json"]
    _spoil(random.choice(sorted(paths)), random)
    return random.choice(
        (
            ["analyze", "run", "sinks"],
            ["verify", "run"],
            ["report", "run"],
            ["extract", "--out", "run"],
        )
    )


def job(folder: Path, random: Random) -> Command:
    """Documents of jobs, resolved and run as the server does; no edit may call a function."""
    valid: tuple[tuple[str, Row], ...] = (
        (
            "extract",
            {
                "out": "made",
                "model": "model",
                "text": ["text.jsonl"],
                "seq_len": 8,
                "sites": ["resid"],
            },
        ),
        ("analyze", {"run": "run", "analyses": ["norms"]}),
        ("verify", {"run": "run", "quick": True}),
        (
            "patch",
            {"run": "run", "model": "model", "pairs": "pairs.jsonl", "edits": ["resid[1] zero"]},
        ),
        ("ablate", {"run": "run", "model": "model", "edits": ["resid[1] zero"]}),
        ("extract", {"out": "run"}),
    )
    kind, document = random.choice(valid)
    spoiled = mutate_json(document, random)
    if isinstance(spoiled, dict) and random.random() < 0.5:
        key = random.choice(
            ("edit", "edits", "target", "targets", "call", "help", "config", "values")
        )
        hostile = (
            CALL,
            [CALL],
            f"resid 'position=0 call={PLANTED}:edit\\' zero",
            EXTREMES[-1],
            True,
        )
        spoiled[key] = random.choice(hostile)

    def run() -> int:
        from headwater.extractor.edits.places import switch_calls_off
        from headwater.service.jobs import tasks
        from headwater.service.jobs.requests import read_document, resolve
        from headwater.service.places import DeniedError, NotHereError
        from headwater.service.settings import make_settings
        from headwater.store.manifest import read_manifest

        switch_calls_off("a worker runs no code that a request or a run names.")
        made_from = read_manifest(folder / "run").model["name"]
        try:
            settings = make_settings(str(folder), models=[str(Path(made_from).parent)])
            resolved = resolve(settings, kind, read_document(spoiled))
        except (DeniedError, NotHereError) as error:  # what the server answers with 403 and 404
            raise ValueError(str(error)) from error
        for task in (tasks.PLANS[kind], tasks.RUNS[kind]):
            task(json.loads(json.dumps(resolved)), lambda *_, **__: None)
        return 0

    return run


def _sign(path: Path, document: Any) -> None:
    """Write a document with the checksum that Headwater would give it."""
    if isinstance(document, dict):
        body = document
    else:
        body = {"x": document}
    try:
        path.write_bytes(to_json(body | {"crc32c": json_sum(body)}))
    except (ValueError, UnicodeError):  # what JSON cannot hold has no checksum either
        path.write_text(json.dumps(body | {"crc32c": 0}))


PARSERS: dict[str, Parser] = {
    "config": config,
    "safetensors": safetensors,
    "checkpoint": checkpoint,
    "weights_bin": weights_bin,
    "adapter": adapter,
    "tokenizer": tokenizer,
    "vocabulary": vocabulary,
    "table": table,
    "arrow": arrow,
    "compressed": compressed,
    "ids": ids,
    "request": request,
    "edits": edits,
    "command_line": command_line,
    "manifest": manifest,
    "ledger": ledger,
    "planted_names": planted_names,
    "metadata": metadata,
    "documents": documents,
    "job": job,
}
