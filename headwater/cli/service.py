"""The commands of the service: serve, submit, jobs, cancel."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwater.cli.command import DONE, FAILED, Command, Parser
from headwater.cli.show import print_json
from headwater.extractor.units import show_bytes

if TYPE_CHECKING:
    from headwater.service.client import Client

STRINGS = ("layers", "depths", "heads", "positions", "out", "run", "model")
SERVER = "http://127.0.0.1:8000"
SERVE = """\
Serve the runs under ROOT: their data, jobs that make and analyse them, and a page to look at them.

Only this machine can connect unless --host says otherwise, which needs a token. Jobs survive the server: it goes on
with them when it is started again. Needs the extra headwater[serve]: fastapi and uvicorn."""
SUBMIT = """\
Submit a job to a server: extract (the arguments of `headwater extract` as a TOML file or with --set), analyze or
verify. It is planned first, and its price is printed. Paths are the server's, under its ROOT; --upload sends a file."""
SUBMIT_EXAMPLES = """examples:
  headwater submit extract --upload book.txt --set model=demo text=texts/book.txt preset=patterns out=book --wait
  headwater submit extract --config run.toml --set out=book
  headwater submit analyze --set run=book analyses=sinks,massive
"""


def add_serve(parser: Parser) -> None:
    """Add the arguments of `serve`."""
    parser.description = SERVE
    parser.add_argument(
        "root", metavar="ROOT", help="directory, or s3://bucket/prefix, that holds the runs"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="address to listen at (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port",
        type=int,
        default=8000,
        metavar="N",
        help="port, 0 for any free one (default: 8000)",
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="file with the token that requests must carry; made where "
        "there is none. Other hosts than this machine need it",
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="compute extractions on a Ray cluster: auto, or its address",
    )
    parser.add_argument(
        "--models",
        metavar="DIR",
        action="append",
        help="directory of models that jobs may use, beside ROOT and hub ids; may be repeated",
    )
    parser.add_argument(
        "--texts",
        metavar="DIR",
        action="append",
        help="directory of texts that jobs may read, beside ROOT; may be repeated",
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        help="name by which the server may be called",
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GB",
        help="memory that jobs may take together (default: 0.8 of what is available)",
    )
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="jobs that run at once (default: 1)"
    )
    parser.add_argument(
        "--state",
        metavar="DIR",
        help="directory for the queue and for texts and models of jobs, where "
        "ROOT is in an object store (default: "
        "~/.local/state/headwater/ROOT)",
    )


def add_submit(parser: Parser) -> None:
    """Add the arguments of `submit`."""
    parser.description = SUBMIT
    parser.epilog = SUBMIT_EXAMPLES
    parser.add_argument("kind", metavar="KIND", help="extract, analyze or verify")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="settings; they win over those of --config",
    )
    parser.add_argument(
        "--config", metavar="FILE", help="TOML file of settings, such as `headwater extract` takes"
    )
    parser.add_argument(
        "--upload",
        metavar="FILE",
        action="append",
        default=[],
        help="file to send first, as texts/NAME",
    )
    parser.add_argument("--plan", action="store_true", help="print the price only")
    parser.add_argument(
        "--wait",
        action="store_true",
        help="show progress until the job ends; exit code 1 if it fails",
    )
    _add_server(parser)


def add_jobs(parser: Parser) -> None:
    """Add the arguments of `jobs`."""
    parser.add_argument("number", nargs="?", type=int, metavar="JOB", help="number of a job")
    _add_server(parser)


def add_cancel(parser: Parser) -> None:
    """Add the arguments of `cancel`."""
    parser.add_argument("number", type=int, metavar="JOB", help="number of the job")
    _add_server(parser)


def _add_server(parser: Parser) -> None:
    """Add how the server is reached."""
    parser.add_argument(
        "--server", default=SERVER, metavar="URL", help=f"the server's address (default: {SERVER})"
    )
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        help="file with the server's token (default: the variable HEADWATER_TOKEN)",
    )


def run_serve(options: Namespace) -> int:
    """Serve until stopped."""
    from headwater.store.versions import check_versions

    check_versions("fastapi", "starlette")
    try:
        from headwater.service.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in (
            "fastapi",
            "uvicorn",
            "pydantic",
            "starlette",
        ):
            raise
        raise ValueError(
            f"`headwater serve` needs {error.name}, which is not installed. Run `pip install fastapi uvicorn`."
        ) from error
    from headwater.service.settings import make_settings

    memory = None if options.memory is None else int(options.memory * 1e9)
    if memory is not None and memory <= 0:
        raise ValueError(f"--memory is {options.memory}; expected a number of gigabytes above 0.")
    serve(
        make_settings(
            options.root,
            options.host,
            options.port,
            options.token_file,
            options.ray,
            options.models,
            options.texts,
            options.allow_host,
            memory,
            options.parallel,
            options.state,
        )
    )
    return DONE


def run_submit(options: Namespace) -> int:
    """Upload texts, submit a job, print its price, and wait for it where that is asked for."""
    document = _read_settings(options)
    client = _client(options)
    for file in options.upload:
        _upload(client, file)
    clock = client.get("/jobs?most=1")["clock"]
    job = client.post(
        "/plan" if options.plan else "/jobs", {"kind": options.kind, "document": document}
    )
    if options.wait and not options.plan:
        job = _wait(client, job, clock)
    if options.json:
        print_json(job)
    elif options.plan:
        print(f"{job['run']}: {_price(job['price'])}")
    else:
        print(_line(job) if options.wait else f"{_line(job)}. {_price(job['price'])}")
    return FAILED if job.get("state") in ("failed", "cancelled") else DONE


def run_jobs(options: Namespace) -> int:
    """List jobs."""
    client = _client(options)
    if options.number is not None:
        found = client.get(f"/jobs/{options.number}")
        if options.json:
            print_json(found)
            return DONE
        print(_line(found))
        return DONE
    jobs = client.get("/jobs")["jobs"]
    if options.json:
        print_json(jobs)
    else:
        print("\n".join(map(_line, jobs)) or "no jobs yet")
    return DONE


def run_cancel(options: Namespace) -> int:
    """Cancel a job."""
    job = _client(options).post(f"/jobs/{options.number}/cancel")
    if options.json:
        print_json(job)
    else:
        print(
            _line(job)
            + (": it ends now, what it finished is kept" if job["state"] == "running" else "")
        )
    return DONE


def _client(options: Namespace) -> Client:
    from headwater.service.client import Client

    return Client(options.server, options.token_file)


def _read_settings(options: Namespace) -> dict[str, Any]:
    import tomllib

    values: dict[str, Any] = {}
    if options.config:
        try:
            values = tomllib.loads(Path(options.config).expanduser().read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--config {options.config} cannot be read: {error}. Expected a TOML file."
            ) from error
    for setting in options.set:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ValueError(
                f"{setting!r} is no setting; expected key=value, such as preset=patterns."
            )
        values[name] = _value(name.replace("-", "_"), text)
    return {name.replace("-", "_"): value for name, value in values.items()}


def _value(name: str, text: str) -> Any:
    """Read a value as a flag of the command line would be: numbers and switches by their look, lists by commas."""
    if text in ("true", "false"):
        return text == "true"
    if name in ("text", "sites", "labels", "analyses"):
        return text.split(",")
    return int(text) if text.isdecimal() and name not in STRINGS else text


def _upload(client: Client, file: str) -> None:
    import urllib.parse

    path = Path(file).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--upload {file} cannot be read: {error.strerror}.") from error
    sent = client.put(f"/texts/{urllib.parse.quote(path.name)}", data)
    print(f"headwater: sent {sent['text']}, {show_bytes(sent['n_bytes'])}", file=sys.stderr)


def _wait(client: Client, job: dict[str, Any], clock: int) -> dict[str, Any]:
    """Follow a job to its end, also over a restart of the server."""
    from headwater.cli.progress import Line

    line = Line(sys.stderr)
    patience = time.monotonic() + 60
    try:
        while job["state"] in ("queued", "running"):
            try:
                for changed in client.follow(clock):
                    patience = time.monotonic() + 60
                    if changed["id"] == job["id"]:
                        job = changed
                        line.show(_line(job), job["state"] not in ("queued", "running"))
                        if job["state"] not in ("queued", "running"):
                            return job
                job = client.get(f"/jobs/{job['id']}")
            except (RuntimeError, OSError):
                if time.monotonic() > patience:
                    raise
                time.sleep(1)
    finally:
        line.close()
    return job


def _line(job: dict[str, Any]) -> str:
    p = job["progress"]
    progress = f", {p['phase']} {p['done']:,}/{p['of']:,} {p['unit']}" if p.get("of") else ""
    error = f": {job['error']}" if job["error"] else ""
    return f"job {job['id']}: {job['kind']} {job['run']}, {job['state']}{progress}{error}"


def _price(price: dict[str, Any]) -> str:
    parts = [f"writes {show_bytes(price['total_bytes'])}"] if "total_bytes" in price else []
    parts += [f"reads {show_bytes(price['read_bytes'])}"] if "read_bytes" in price else []
    return ", ".join([*parts, f"{show_bytes(price['host_bytes'])} of memory"])


COMMANDS = (
    Command("serve", "serve the runs in a directory: data, jobs, and a page", add_serve, run_serve),
    Command("submit", "submit a job to a server", add_submit, run_submit),
    Command("jobs", "list a server's jobs, or show one", add_jobs, run_jobs),
    Command("cancel", "end a job of a server; what it finished is kept", add_cancel, run_cancel),
)
