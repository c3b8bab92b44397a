"""What a server refuses: paths that lead out, other Hosts and Origins, missing tokens, what is too large or slow."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import threading
from typing import ClassVar

import pytest

from headwater.benchmarks.lib.serving import Server
from headwater.cli.entry import main
from headwater.service.client import Client
from headwater.service.guard import Guard
from headwater.service.settings import Limits, Settings, make_settings

TOKEN = "a-token-of-more-than-sixteen"


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_gpt2, tiny_text):
    import headwater

    root = tmp_path_factory.mktemp("guarded")
    (root / "secret.txt").write_text("secret")
    (root.parent / "beside.txt").write_text("secret")
    run = headwater.extract(
        headwater.RunConfig(
            out=str(root / "run"), model=str(tiny_gpt2), text=(str(tiny_text),), preset="statistics"
        )
    )
    (run.path / "loss" / "c" / "99").symlink_to("/etc/passwd")
    (root / "away").symlink_to(root.parent)
    (root / "linked").symlink_to(run.path)
    return root


@pytest.fixture(scope="module")
def server(root, tmp_path_factory):
    file = tmp_path_factory.mktemp("token") / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    with Server(root, "--token-file", str(file)) as server:
        yield server


def ask(server, method, path, body=None, token=TOKEN, chunks=None, **headers):
    """Send a request as it stands, without a library that tidies paths; return status, headers and body."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.putrequest(method, path, skip_host="host" in headers, skip_accept_encoding=True)
    if token:
        headers["authorization"] = f"Bearer {token}"
    if body is not None and "content-length" not in headers:
        headers["content-length"] = str(len(body))
    if chunks is not None:
        headers["transfer-encoding"] = "chunked"
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    try:
        if body:
            connection.send(body)
        for chunk in chunks or ():
            connection.send(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
    except OSError:
        pass  # the server has answered and closed
    answer = connection.getresponse()
    found = answer.status, answer.headers, answer.read()
    connection.close()
    return found


@pytest.mark.parametrize(
    "path",
    [
        "run/../secret.txt",
        "run/../../beside.txt",
        "run/%2e%2e/secret.txt",
        "run/..%2fsecret.txt",
        "run/",
        "..%2f..%2fetc/passwd",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "run/loss/c/99",
        "away/run/zarr.json",
        "",
        "away/beside.txt",
        "run/headwater/manifest.json",
        "run/headwater/lock",
        "secret.txt",
        ".headwater/jobs.sqlite",
        "run/.%2e/.%2e/etc/passwd",
        "run/loss/../../secret.txt",
        "run/zarr.json%00",
        "run/zarr.json/",
        "run%5c..%5csecret.txt",
        "run.analysis/../secret.txt",
        "a/" * 300 + "zarr.json",
        "run/c/" + "0/" * 800 + "0",
    ],
)
def test_no_path_leaves_the_root(server, path):
    status, _, body = ask(server, "GET", f"/runs/{path}")
    assert (
        status in (404, 422)
        and b"secret" not in body.replace(b"secret.txt", b"")
        and b"root:" not in body
    )
    for tail in (
        "about",
        "arrays/loss",
        "thumbnails?sequence=0&layer=0",
        "figures/tokens?sequence=0",
        "results/sinks",
    ):
        assert ask(server, "GET", f"/runs/{path}/{tail}")[0] in (404, 422)
    assert ask(server, "GET", f"/page/{path}")[0] == 404


def test_links_within_the_root_are_followed(server):
    assert (
        ask(server, "GET", "/runs/run/zarr.json")[0]
        == ask(server, "GET", "/runs/linked/zarr.json")[0]
        == 200
    )


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1", 200),
        ("localhost:9", 200),
        ("[::1]:80", 200),
        ("evil.example", 421),
        ("evil.example:80", 421),
        ("127.0.0.1.evil.example", 421),
        ("10.0.0.1", 421),
        ("", 421),
        ("localhost.", 421),
        ("127.0.0.1@evil.example", 421),
    ],
)
def test_another_host_is_refused(server, host, status):
    """A page whose name was bound to this address sends its own name as Host."""
    assert ask(server, "GET", "/runs", host=host)[0] == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"origin": "http://127.0.0.1:{port}"}, 200),
        ({"origin": "http://127.0.0.1:1"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}, 200),
        ({"sec_fetch_site": "same-origin"}, 200),
    ],
)
def test_pages_of_another_origin_are_refused(server, headers, status):
    headers = {name: value.format(port=server.port) for name, value in headers.items()}
    assert ask(server, "GET", "/runs", **headers)[0] == status


def test_a_token_is_needed(server):
    for path in (
        "/runs",
        "/jobs",
        "/events",
        "/docs",
        "/openapi.json",
        "/runs/run/zarr.json",
        "/runs/run/about",
    ):
        assert ask(server, "GET", path, token=None)[0] == 401
        assert ask(server, "GET", path, token=TOKEN[:-1])[0] == 401
    assert ask(server, "POST", "/jobs", b"{}", token=None)[0] == 401
    assert (
        ask(server, "GET", "/", token=None)[0]
        == ask(server, "GET", "/health", token=None)[0]
        == 200
    )
    wrong = ask(
        server, "POST", "/login", b'{"token": "no"}', token=None, content_type="application/json"
    )
    assert wrong[0] == 403
    right = ask(
        server,
        "POST",
        "/login",
        json.dumps({"token": TOKEN}).encode(),
        token=None,
        content_type="application/json",
    )
    cookie = right[1]["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and TOKEN not in cookie
    assert ask(server, "GET", "/runs", token=None, cookie=cookie.partition(";")[0])[0] == 200
    assert ask(server, "GET", "/runs", token=None, cookie="headwater=no")[0] == 401


def test_large_bodies_are_refused(server):
    for length in ("1048577", "99999999999999999999"):
        assert (
            ask(server, "POST", "/jobs", content_length=length, content_type="application/json")[0]
            == 413
        )
    assert (
        ask(server, "POST", "/jobs", chunks=[b" " * 600_000] * 2, content_type="application/json")[
            0
        ]
        == 413
    )
    assert (
        ask(server, "POST", "/jobs", content_length="-1", content_type="application/json")[0] == 400
    )
    assert ask(server, "PUT", "/texts/big.txt", content_length=str((64 << 20) + 1))[0] == 413
    deep = b'{"kind": "extract", "document": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}"
    assert ask(server, "POST", "/jobs", deep, content_type="application/json")[0] in (400, 422)


@pytest.mark.parametrize("name", ["..%2fx", ".hidden", "a%2fb", "x" * 200, "a%00b", "%0a"])
def test_names_of_texts_are_plain(server, root, name):
    assert ask(server, "PUT", f"/texts/{name}", b"text")[0] in (400, 404, 405, 422)
    assert not [path for path in root.glob("texts/*")]


def test_answers_forbid_what_pages_do_not_need(server):
    _, headers, body = ask(server, "GET", "/")
    assert (
        "default-src 'none'" in headers["content-security-policy"]
        and headers["x-frame-options"] == "DENY"
    )
    assert (
        headers["x-content-type-options"] == "nosniff"
        and b"http://" not in body
        and b"https://" not in body
    )
    assert "server" not in headers


def test_a_slow_answer_ends_in_time():
    import asyncio

    async def slow(scope, receive, send):
        await asyncio.sleep(5)

    sent = []

    async def ask_slowly():
        guard = Guard(slow, Settings(root=None, limits=Limits(seconds=0.05)))
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/runs",
            "headers": [(b"host", b"localhost")],
        }

        async def send(message):
            sent.append(message)

        await asyncio.wait_for(guard(scope, None, send), 2)

    asyncio.run(ask_slowly())
    assert sent[0]["status"] == 503 and b"longer than 0.05 s" in sent[1]["body"]


def test_settings_that_are_not_safe_are_refused(tmp_path, cli):
    cli("serve", tmp_path, "--host", "0.0.0.0").error(2, "a token is needed")
    cli("serve", tmp_path / "nowhere").error(2, "is no directory")
    cli("serve", "").error(2, "ROOT is empty")
    cli("serve", tmp_path, "--models", tmp_path / "nowhere").error(2, "--models")
    open_file = tmp_path / "open"
    open_file.write_text(TOKEN)
    os.chmod(open_file, 0o644)
    cli("serve", tmp_path, "--token-file", open_file).error(2, "can be read by others")
    made = make_settings(str(tmp_path), host="0.0.0.0", token_file=str(tmp_path / "made"))
    assert len(made.token) > 30 and (tmp_path / "made").stat().st_mode & 0o777 == 0o600
    assert make_settings(str(tmp_path), token_file=str(tmp_path / "made")).token == made.token


def test_the_client_follows_no_redirect_with_its_token(monkeypatch):
    class Elsewhere(http.server.BaseHTTPRequestHandler):
        asked: ClassVar[list[str]] = []

        def do_GET(self):
            self.asked.append(self.path)
            self.send_response(302)
            self.send_header("location", "/taken")
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    monkeypatch.setenv("HEADWATER_TOKEN", TOKEN)
    with http.server.HTTPServer(("127.0.0.1", 0), Elsewhere) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match="sends on to '/taken', which is not followed"):
            Client(f"http://127.0.0.1:{other.server_port}").get("/jobs")
        other.shutdown()
    assert Elsewhere.asked == ["/jobs"]


def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    import sys

    monkeypatch.delitem(sys.modules, "headwater.service.server", raising=False)
    monkeypatch.delitem(sys.modules, "headwater.service.routes", raising=False)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", str(tmp_path)]) == 2
    assert "pip install fastapi uvicorn" in capsys.readouterr().err
