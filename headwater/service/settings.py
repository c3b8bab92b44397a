"""What a server was told when it started: its root, who may reach it, what jobs may read, and its limits."""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from headwater.extractor.machine import available_memory
from headwater.store.local import LocalPath
from headwater.store.objects import ObjectPath, is_url
from headwater.store.place import Place, plain_place

STATE = ".headwater"
# What reaches this machine alone; anything else needs a token.
LOOPBACK = ("localhost", "127.0.0.1", "::1")
# Too long to be guessed at the rate that a server answers.
TOKEN_LENGTH = 16


@dataclass(frozen=True)
class Limits:
    """Bytes and seconds that one request may take, what all may take together, and how many runs are listed.

    A connection may let the server wait `stall_seconds`, and longer by the time that its bytes take at `slowest` a
    second; it has `header_seconds` for the head of a request. `flight_bytes` bounds the slices that are made or wait
    for their readers.
    """

    body_bytes: int = 1 << 20
    text_bytes: int = 64 << 20
    slice_bytes: int = 64 << 20
    read_bytes: int = 1 << 30
    document_bytes: int = 64 << 10
    flight_bytes: int = 384 << 20
    uploads: int = 32
    connections: int = 2000
    header_seconds: float = 30.0
    stall_seconds: float = 30.0
    slowest: float = 64e3
    seconds: float = 60.0
    plan_seconds: float = 120.0
    runs: int = 5000
    queued: int = 1000


@dataclass(frozen=True)
class Settings:
    """A server's settings. `models` and `texts` are the folders that jobs may read, beside the root and hub ids.

    `memory` bounds the bytes that running jobs may need together by their plans; `parallel` how many run at once. A
    root in an object store has a folder on this machine, `beside`, for what cannot lie there.
    """

    root: Place
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    ray: str | None = None
    models: tuple[Path, ...] = ()
    texts: tuple[Path, ...] = ()
    hosts: tuple[str, ...] = ()
    memory: int = 0
    parallel: int = 1
    beside: Path | None = None
    limits: Limits = Limits()

    @property
    def local(self) -> Path:
        """The folder on this machine with the queue and with texts and models of jobs: the root itself if it can."""
        if isinstance(self.root, Path):
            return self.root
        assert self.beside is not None
        return self.beside

    @property
    def state(self) -> Path:
        """The folder of the queue and its lock."""
        return self.local / STATE

    @property
    def loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    @property
    def url(self) -> str:
        """The address to open on this machine."""
        name = self.host
        # "All addresses" is nothing that a browser can open.
        if name in ("0.0.0.0", "::", ""):
            name = "127.0.0.1"
        # The colons of an IPv6 address need brackets beside that of the port.
        if ":" in name:
            name = f"[{name}]"
        return f"http://{name}:{self.port}"


def is_loopback(host: str) -> bool:
    """Say whether an address to listen on is reached from this machine alone."""
    try:
        return host in LOOPBACK or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def make_settings(
    root: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: str | None = None,
    ray: str | None = None,
    models: list[str] | None = None,
    texts: list[str] | None = None,
    hosts: list[str] | None = None,
    memory: int | None = None,
    parallel: int = 1,
    state: str | None = None,
) -> Settings:
    """Check what `headwater serve` was given; raise ValueError for what cannot be served."""
    if not isinstance(port, int) or not 0 <= port < 65536:
        raise ValueError(f"--port is {port!r}; expected a number from 0 (any free one) to 65535.")
    if not isinstance(parallel, int) or not 1 <= parallel <= 64:
        raise ValueError(f"--parallel is {parallel!r}; expected a number from 1 to 64.")
    if not is_loopback(host) and token_file is None:
        raise ValueError(
            f"--host {host} lets other machines connect, so a token is needed: give --token-file FILE (it is made "
            "where there is none), or keep to 127.0.0.1 and use an SSH tunnel."
        )
    if not root.strip():
        raise ValueError(
            "ROOT is empty, perhaps a variable that is not set; name the directory that holds your runs."
        )
    # One spelling of a root, since its queue and its lock are found by it.
    root = plain_place(root)
    place: Place
    beside = None
    if is_url(root):
        place, beside = _prefix(root, state)
    else:
        place = _folder(root, state)
    token = None
    if token_file is not None:
        token = read_token(token_file)
    return Settings(
        root=place,
        host=host,
        port=port,
        token=token,
        ray=ray,
        models=_folders("--models", models),
        texts=_folders("--texts", texts),
        hosts=tuple(hosts or ()),
        # A fifth is left to the server itself, to the page cache, and to what plans do not foresee.
        memory=memory or int(0.8 * available_memory()),
        parallel=parallel,
        beside=beside,
    )


def _folder(root: str, state: str | None) -> LocalPath:
    """Return a root on this machine, which keeps its queue itself."""
    folder = LocalPath(root).expanduser()
    if state is not None:
        raise ValueError(
            f"--state is {state}, but the directory {root} keeps its own queue. Leave --state out."
        )
    if not folder.is_dir():
        raise ValueError(
            f"ROOT {root} is no directory; make it, or name the directory that holds your runs."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"ROOT {root} may not be written by you; the queue of jobs is kept there. Name another."
        )
    return folder.resolve()


def _prefix(root: str, state: str | None) -> tuple[ObjectPath, Path]:
    """Return a root in an object store, after asking it, and the folder beside it; that is made where it is missing."""
    place = ObjectPath(root)
    # Asked once, so that a wrong address or key is refused at the start and not at the first request.
    place.is_dir()
    base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "headwater"
    # One folder a root: the whole address, quoted, is its name.
    beside = base / urllib.parse.quote(str(place), "")
    if state is not None:
        beside = Path(state).expanduser()
    try:
        beside.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--state {beside} cannot be made: {error.strerror}. Name another folder."
        ) from error
    if not os.access(beside, os.W_OK | os.X_OK):
        raise ValueError(
            f"--state {beside} may not be written by you; the queue of jobs is kept there. Name another."
        )
    return place, beside.resolve()


def read_token(file: str) -> str:
    """Return the token in a file that only its owner may read; make file and token where there is none."""
    path = Path(file).expanduser()
    # O_EXCL makes the file or finds it, and never fills one that others put there with their rights.
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    except OSError as error:
        raise ValueError(
            f"--token-file {file} cannot be made: {error.strerror}. Name another place."
        ) from error
    else:
        with os.fdopen(handle, "w") as made:
            made.write(secrets.token_urlsafe(32) + "\n")
    try:
        mode = path.stat().st_mode
        token = path.read_text().strip()
    except (OSError, ValueError) as error:
        raise ValueError(f"--token-file {file} cannot be read: {error}.") from error
    if mode & 0o077:
        raise ValueError(
            f"--token-file {file} can be read by others (mode {mode & 0o777:o}). Run `chmod 600 {file}`."
        )
    if len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise ValueError(
            f"--token-file {file} holds no token; expected one word of at least {TOKEN_LENGTH} ASCII characters. "
            "Delete the file to have one made."
        )
    return token


def allowed_hosts(settings: Settings) -> frozenset[str]:
    """Return the names by which a browser may call the server; addresses are checked apart."""
    names = {name.lower() for name in settings.hosts} | {"localhost"}
    if not settings.loopback:
        names |= {settings.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
    return frozenset(names)


def _folders(flag: str, names: list[str] | None) -> tuple[Path, ...]:
    found = tuple(Path(name).expanduser().resolve() for name in names or ())
    for path in found:
        if not path.is_dir():
            raise ValueError(f"{flag} {path} is no directory; name one that jobs may read from.")
    return found
