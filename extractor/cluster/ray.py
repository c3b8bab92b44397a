"""Start a Ray of our own or join a cluster. This is the only module that imports ray."""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwater.extractor.idle import IDLE_THREADS
from headwater.store.scratch import scratch_folder
from headwater.store.versions import check_versions

JOIN_SECONDS = 20
START_ATTEMPTS = 3
STORE_BYTES = 80 << 20
MOST_SAID = 400
OWN_FOLDERS = Path("/tmp")  # not TMPDIR: the names of Ray's sockets must stay short
OWN_VARIABLES = {  # Ray asks clouds' metadata servers where it is, even with statistics off: send it nowhere
    "http_proxy": "http://127.0.0.1:9",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "no_proxy": "localhost,127.0.0.1",
    "NO_PROXY": "localhost,127.0.0.1",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
# The tokenizers library says on standard error that it was forked, unless this is set. Nothing tokenises after it.
FORKED = "TOKENIZERS_PARALLELISM"
# Ray's defaults starve its workers on a busy machine, and take a node that answers late for a dead one.
OWN_SETTINGS = {"worker_niceness": 0, "health_check_timeout_ms": 120_000}


class WorkersLost(RuntimeError):
    """No worker is left, or none could start; what was committed stays."""


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray: its module, and whether its only node is this machine and ends with us."""

    ray: Any
    local: bool

    def fair_threads(self, n_workers: int) -> int:
        """Share the cores among the workers: those of this machine, or of the cluster, within one node."""
        if self.local:
            return max((os.cpu_count() or 1) // n_workers, 1)
        cores = [int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"]]
        return max(min(sum(cores) // n_workers, max(cores, default=1)), 1)

    def hire(self, actor_class: type, threads: int, n_gpus: int, *arguments: Any) -> Any:
        """Start an actor that has `threads` processor threads to itself; it is not restarted when it dies."""
        variables = {
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            **IDLE_THREADS,
        }
        variables |= proxies() if self.local else {}
        options = {
            "num_cpus": 1 if self.local else threads,
            "num_gpus": n_gpus,
            "max_restarts": 0,
            "runtime_env": {"env_vars": variables},
        }
        return self.ray.remote(actor_class).options(**options).remote(*arguments)


def proxies() -> dict[str, str]:
    """Return this process's own settings of what Ray's processes are denied; an empty one is none."""
    return {
        name: os.environ.get(name, "") for name in OWN_VARIABLES if name.lower().endswith("proxy")
    }


@contextmanager
def connection(address: str | None, n_workers: int, gpus: bool = False) -> Iterator[Cluster]:
    """Start a Ray of our own, join the one at an address, or use the one that this process is connected to already.

    What was begun is ended afterwards. Raises WorkersLost where there is no cluster at the address.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with ExitStack() as stack:
        with _kept_handlers():
            import ray

            check_versions("ray")
            joined = ray.is_initialized()
            if not joined:
                with _variables({FORKED: os.environ.get(FORKED, "true")}):
                    _start(ray, address, n_workers, None if gpus else 0, stack)
        yield Cluster(ray, address is None and not joined)


def _start(
    ray: Any, address: str | None, n_workers: int, n_gpus: int | None, stack: ExitStack
) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        folder = stack.enter_context(scratch_folder("hw-ray-", OWN_FOLDERS))
        stack.enter_context(_own_token())
        stack.callback(ray.shutdown)  # before the folder goes
        stack.enter_context(_loopback())
        with _variables(OWN_VARIABLES):
            _patiently(
                lambda: ray.init(
                    address="local",  # else RAY_ADDRESS would be joined, with other arguments than these
                    num_cpus=n_workers,
                    num_gpus=n_gpus,
                    include_dashboard=False,
                    object_store_memory=STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(folder),
                    _system_config=OWN_SETTINGS,
                    **quiet,
                )
            )
        return
    stack.callback(ray.shutdown)
    host, _, port = address.rpartition(":")
    advice = "Start one with `ray start --head`, or use --workers alone."
    try:
        if port.isdecimal() and "/" not in host:
            socket.create_connection(
                (host.strip("[]"), int(port)), JOIN_SECONDS
            ).close()  # Ray would try for minutes
            advice = (
                "Something answers there: its Ray may be of another version, or ask for a token. Then set "
                "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's own."
            )
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise WorkersLost(
            f"--ray {address}: no Ray cluster can be joined there ({last_line(error)}). {advice}"
        ) from error


def _patiently(start: Callable[[], object]) -> None:
    """Start Ray; again where it gave itself up after its 30 seconds, which a busy machine can take."""
    for attempt in range(START_ATTEMPTS):
        try:
            start()
            return
        except Exception as error:  # of no class of its own
            if "timed out during startup" not in str(error):
                raise
            if attempt == START_ATTEMPTS - 1:
                text = f"Ray did not start ({last_line(error)}). End other programs, or use --workers 0."
                raise WorkersLost(text) from error


@contextmanager
def _kept_handlers() -> Iterator[None]:
    """Put back the handler of SIGTERM, which `ray.init` replaces by one that exits with another code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as stop:
        raise (KeyboardInterrupt if stop.code == signal.SIGTERM else stop) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _loopback() -> Iterator[None]:
    """Let Ray listen on 127.0.0.1 as it does on macOS; on Linux it replaces that address by one that others reach."""
    constants = sys.modules.get("ray._private.ray_constants")
    name = "ENABLE_RAY_CLUSTER"
    if constants is None or not hasattr(constants, name):
        yield
        return
    before = getattr(constants, name)
    setattr(constants, name, False)
    try:
        yield
    finally:
        setattr(constants, name, before)


@contextmanager
def _own_token() -> Iterator[None]:
    """Give a Ray of our own a token that only its processes know.

    Where a machine has none, Ray 2.60 writes one to ~/.ray/auth_token, which stays, and turns authentication on for
    every later `ray start`; without any, other users of the machine could run programs in ours.
    """
    with _variables({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}):
        _read_variables()
        yield
    _read_variables()


def _read_variables() -> None:
    """Let Ray read anew what the environment says of tokens; older versions know none."""
    raylet = sys.modules.get("ray._raylet")
    if raylet is not None and hasattr(raylet, "AuthenticationTokenLoader"):
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for a while, for the processes that are started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def cause_of_death(error: object) -> str:
    """Say why Ray lost a worker: which node had how little memory, where it was that, else the last line."""
    found = re.search(r"Memory on the node .*?(?=\. |\n|$)", str(error))
    return shorten(found[0] if found else last_line(error))


def shorten(text: str) -> str:
    """Cut a text that another program wrote."""
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]} …"


def last_line(error: object) -> str:
    """Return the last line of an error's text: Ray's begin with a traceback."""
    return str(error).strip().rsplit("\n", 1)[-1].strip()
