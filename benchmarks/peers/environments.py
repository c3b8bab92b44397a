"""The peers, and a virtual environment for each: made once under a cache folder with pip, and used again."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import torch

DRIVERS = Path(__file__).resolve().parent / "drivers"


@dataclass(frozen=True)
class Peer:
    """A way to capture: its driver, what pip must install for it (nothing: it runs in this environment), its storage.

    `slow` peers are timed in one round only, without one to warm up.
    """

    name: str
    driver: str
    storage: str
    packages: tuple[str, ...] = ()
    slow: bool = False


PLAIN = Peer("plain", "use_plain.py", "nothing")
HEADWATER = Peer("headwater", "use_headwater.py", "sharded Zarr")
PEERS = (
    HEADWATER,
    Peer("transformers", "use_transformers.py", "numpy.save"),
    Peer(
        "TransformerLens",
        "use_transformer_lens.py",
        "safetensors",
        ("transformer-lens>=4", "safetensors"),
    ),
    Peer("nnsight", "use_nnsight.py", "zarr-python", ("nnsight", "zarr>=3")),
    Peer("SAELens", "use_sae_lens.py", "Arrow", ("sae-lens",), slow=True),
)


class PeerMissing(RuntimeError):
    """A peer that cannot be measured here; the message says why."""


def cache_folder(given: str | None) -> Path:
    """Return the folder that keeps environments, models and references between benchmarks."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    if given:
        folder = Path(given)
    else:
        folder = Path(base) / "headwater-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def python_of(peer: Peer, cache: Path, install: bool = True) -> str:
    """Return the interpreter of a peer's environment, which is made if it isn't there; raise PeerMissing.

    The environment gets the torch version of this one, so that the same matrix products are compared.
    """
    if not peer.packages:
        return sys.executable
    home = cache / peer.name.lower()
    wanted = [*peer.packages, f"torch=={torch.__version__.split('+')[0]}"]
    ready = home / "ready.txt"
    python = home / "bin" / "python"
    if ready.is_file() and ready.read_text("utf-8").split("\n") == wanted:
        return str(python)
    if not install:
        raise PeerMissing(
            "its environment was not made yet: run `python -m headwater.benchmarks peers --prepare`"
        )
    venv.create(home, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-input", *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise PeerMissing(
            "pip cannot install it: " + " ".join(done.stderr.strip().splitlines()[-1:])
        )
    ready.write_text("\n".join(wanted), "utf-8")
    return str(python)


def version_of(peer: Peer, python: str) -> str:
    """Return the version of a peer's package."""
    if peer.packages:
        package = peer.packages[0].split(">")[0]
    else:
        package = peer.name.replace("plain", "transformers")
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run(
        [python, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()
