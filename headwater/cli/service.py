"""The commands of the service: serve, submit, jobs, cancel."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from headwater.cli.command import DONE, FAILED, Command, Parser
from headwater.cli.show import print_json
from headwater.extractor.units import show_bytes
from headwater.service.documents import Json, JsonObject

if TYPE_CHECKING:
    from headwater.extractor.settings import Request
    from headwater.service.client import Client

# Settings of jobs without a request class whose values stay text, whatever they look like.
STRINGS = ("out", "run", "model")
EXTRA = ("fastapi", "uvicorn", "pydantic", "starlette")
NUMBERS = ("integer", "number")
# A job in another state has ended.
ACTIVE = ("queued", "running")
# How long a server may be gone, as while it is started again, before --wait gives up.
PATIENCE_SECONDS = 60
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

    # Before the import: an old one fails there with a message about something else.
    check_versions("fastapi", "starlette")
    try:
        from headwater.service.server import serve
    except ModuleNotFoundError as error:
        # Another missing module is a fault of the installation, not the extra that was left out.
        if (error.name or "").partition(".")[0] not in EXTRA:
            raise
        raise ValueError(
            f"`headwater serve` needs {error.name}, which is not installed. Run `pip install fastapi uvicorn`."
        ) from error
    from headwater.service.settings import make_settings

    memory = None
    if options.memory is not None:
        memory = int(options.memory * 1e9)
        if memory <= 0:
            raise ValueError(
                f"--memory is {options.memory}; expected a number of gigabytes above 0."
            )
    settings = make_settings(
        root=options.root,
        host=options.host,
        port=options.port,
        token_file=options.token_file,
        ray=options.ray,
        models=options.models,
        texts=options.texts,
        hosts=options.allow_host,
        memory=memory,
        parallel=options.parallel,
        state=options.state,
    )
    serve(settings)
    return DONE


def run_submit(options: Namespace) -> int:
    """Upload texts, submit a job, print its price, and wait for it where that is asked for."""
    document = _read_settings(options)
    client = _client(options)
    for file in options.upload:
        _upload(client, file)
    submission = {"kind": options.kind, "document": document}
    if options.plan:
        planned = client.post("/plan", submission)
        _print(options, planned, f"{planned['run']}: {_price(planned['price'])}")
        return DONE
    # The clock from before the job, so that no change of it is missed.
    clock = client.get("/jobs?most=1")["clock"]
    job = client.post("/jobs", submission)
    if options.wait:
        job = _wait(client, job, clock)
        _print(options, job, _line(job))
    else:
        _print(options, job, f"{_line(job)}. {_price(job['price'])}")
    return FAILED if job["state"] in ("failed", "cancelled") else DONE


def run_jobs(options: Namespace) -> int:
    """List jobs."""
    client = _client(options)
    if options.number is not None:
        found = client.get(f"/jobs/{options.number}")
        _print(options, found, _line(found))
        return DONE
    jobs = client.get("/jobs")["jobs"]
    _print(options, jobs, "\n".join(map(_line, jobs)) or "no jobs yet")
    return DONE


def run_cancel(options: Namespace) -> int:
    """Cancel a job."""
    job = _client(options).post(f"/jobs/{options.number}/cancel")
    ends = ""
    if job["state"] == "running":
        ends = ": it ends now, what it finished is kept"
    _print(options, job, f"{_line(job)}{ends}")
    return DONE


def _print(options: Namespace, answer: Json, text: str) -> None:
    """Print the server's answer itself for --json, else the text that says it."""
    if options.json:
        print_json(answer)
    else:
        print(text)


def _client(options: Namespace) -> Client:
    from headwater.service.client import Client

    return Client(options.server, options.token_file)


def _read_settings(options: Namespace) -> JsonObject:
    import tomllib

    values: JsonObject = {}
    if options.config:
        try:
            values = tomllib.loads(Path(options.config).expanduser().read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--config {options.config} cannot be read: {error}. Expected a TOML file."
            ) from error
    # Set on the command line, so it wins over the file.
    for setting in options.set:
        name, equals, text = setting.partition("=")
        if not equals or not name:
            raise ValueError(
                f"{setting!r} is no setting; expected key=value, such as preset=patterns."
            )
        values[name] = _value(options.kind, name.replace("-", "_"), text)
    return {name.replace("-", "_"): value for name, value in values.items()}


def _value(kind: str, name: str, text: str) -> Json:
    """Read a value as the flag of the setting would be; one of no request by its look."""
    from headwater.analysis.interventions.requests import REQUESTS
    from headwater.extractor.request import RunConfig
    from headwater.extractor.settings import options_of

    requests: dict[str, type[Request]] = {"extract": RunConfig, **REQUESTS}
    schema: Mapping[str, Json] = {}
    if kind in requests:
        schemas = {one.name: one.kind.schema for one in options_of(requests[kind])}
        schema = schemas.get(name, {})
    if text in ("true", "false") and schema.get("type", "boolean") == "boolean":
        return text == "true"
    # A selection of indices is text, and may be one number; so may a name.
    is_text = "anyOf" in schema or name in STRINGS
    if text.isdecimal() and not is_text and schema.get("type", "integer") in NUMBERS:
        return int(text)
    if name == "analyses" or (name != "edits" and _is_list_of_text(schema)):
        return text.split(",")
    return text


def _is_list_of_text(schema: Mapping[str, Json]) -> bool:
    return {"type": "array", "items": {"type": "string"}} in schema.get("anyOf", ())


def _upload(client: Client, file: str) -> None:
    import urllib.parse

    path = Path(file).expanduser()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"--upload {file} cannot be read: {error.strerror}.") from error
    # The server keeps texts by their last name; a folder of this machine means nothing there.
    sent = client.put(f"/texts/{urllib.parse.quote(path.name)}", data)
    print(f"headwater: sent {sent['text']}, {show_bytes(sent['n_bytes'])}", file=sys.stderr)


def _wait(client: Client, job: JsonObject, clock: int) -> JsonObject:
    """Follow a job to its end, also over a restart of the server."""
    from headwater.cli.progress import Line

    line = Line(sys.stderr)
    patience = time.monotonic() + PATIENCE_SECONDS
    try:
        while job["state"] in ACTIVE:
            try:
                for changed in client.follow(clock):
                    patience = time.monotonic() + PATIENCE_SECONDS
                    if changed["id"] != job["id"]:
                        continue
                    job = changed
                    line.show(_line(job), always=job["state"] not in ACTIVE)
                    if job["state"] not in ACTIVE:
                        return job
                # The stream of events ended before the job: ask once how it is, then follow again.
                job = client.get(f"/jobs/{job['id']}")
            except (RuntimeError, OSError):
                if time.monotonic() > patience:
                    raise
                time.sleep(1)
    finally:
        line.close()
    return job


def _line(job: JsonObject) -> str:
    """Say in one line what a job is, how far it is, and what went wrong."""
    progress = job["progress"]
    done = ""
    if progress.get("of"):
        amount = f"{progress['done']:,}/{progress['of']:,} {progress['unit']}"
        done = f", {progress['phase']} {amount}"
    error = ""
    if job["error"]:
        error = f": {job['error']}"
    name = f"job {job['id']}: {job['kind']} {job['run']}"
    return f"{name}, {job['state']}{done}{error}"


def _price(price: JsonObject) -> str:
    """Say what a job will write, read and need."""
    parts = []
    if "total_bytes" in price:
        parts.append(f"writes {show_bytes(price['total_bytes'])}")
    if "read_bytes" in price:
        parts.append(f"reads {show_bytes(price['read_bytes'])}")
    parts.append(f"{show_bytes(price['host_bytes'])} of memory")
    return ", ".join(parts)


COMMANDS = (
    Command("serve", "serve the runs in a directory: data, jobs, and a page", add_serve, run_serve),
    Command("submit", "submit a job to a server", add_submit, run_submit),
    Command("jobs", "list a server's jobs, or show one", add_jobs, run_jobs),
    Command("cancel", "end a job of a server; what it finished is kept", add_cancel, run_cancel),
)
