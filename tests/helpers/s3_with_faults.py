"""A real S3 server (moto) on loopback, and before it a proxy that throttles, drops and refuses requests as it is told.

Run as a process: it prints the address of the proxy and that of the server, and ends with its standard input. `PUT
/faults` on the proxy sets what goes wrong: {"throttle": p, "drop": p, "drop_answer": p, "cut": p, "no_conditions":
bool, "conflict": n conditional PUTs answered by 409, "only": regular expression over "METHOD path", "most": n faults,
"seed": n}. `GET /faults` tells how often each happened.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import socket
import sys
import threading
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from moto.server import ThreadedMotoServer

KINDS = ("throttle", "drop", "drop_answer", "cut")
SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
NOT_THERE = b"<Error><Code>NotImplemented</Code><Message>No conditions here.</Message></Error>"

CONFLICT = b"<Error><Code>ConditionalRequestConflict</Code><Message>Two met.</Message></Error>"


class Faults:
    """What goes wrong, and how often it did."""

    def __init__(self):
        self.lock = threading.Lock()
        self.set({})

    def set(self, rules):
        with self.lock:
            self.rules, self.random, self.done = (
                rules,
                random.Random(rules.get("seed", 0)),
                Counter(),
            )

    def conflicts(self):
        with self.lock:
            met = self.done["conflict"] < self.rules.get("conflict", 0)
            self.done["conflict"] += met
            return met

    def choose(self, request):
        with self.lock:
            self.done["requests"] += 1
            if not re.search(self.rules.get("only", ""), request):
                return None
            if sum(self.done[kind] for kind in KINDS) >= self.rules.get("most", sys.maxsize):
                return None
            at = self.random.random()
            for kind in KINDS:
                at -= self.rules.get(kind, 0)
                if at < 0:
                    self.done[kind] += 1
                    return kind
        return None


class Proxy(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        if self.path == "/faults":
            if self.command == "PUT":
                self.server.faults.set(json.loads(body))
            return self.answer(200, {}, json.dumps(self.server.faults.done).encode())
        conditions = {"if-none-match", "if-match"} & {*map(str.lower, self.headers)}
        if conditions and self.server.faults.rules.get("no_conditions"):
            self.server.faults.done["not_implemented"] += 1
            return self.answer(501, {}, NOT_THERE)
        if conditions and self.server.faults.conflicts():
            return self.answer(409, {}, CONFLICT)
        fault = self.server.faults.choose(f"{self.command} {self.path}")
        if fault == "throttle":
            return self.answer(503, {}, SLOW_DOWN)
        if fault == "drop":
            return self.hang_up()
        upstream = http.client.HTTPConnection(*self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, dict(self.headers))
        answer = upstream.getresponse()
        data, headers = answer.read(), dict(answer.getheaders())
        upstream.close()
        if fault == "drop_answer":
            return self.hang_up()
        self.answer(answer.status, headers, data, cut=fault == "cut")

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

    def answer(self, status, headers, data, cut=False):
        self.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                self.send_header(name, value)
        length = next((v for n, v in headers.items() if n.lower() == "content-length"), len(data))
        self.send_header("Content-Length", str(length if self.command == "HEAD" else len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.wfile.flush()
        if cut:
            self.hang_up()

    def hang_up(self):
        """Drop the connection without an answer, or in the middle of one."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_):
        pass

    def handle(self):
        with suppress(ConnectionError, ValueError):
            super().handle()


def main():
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    proxy.daemon_threads = True
    proxy.faults, proxy.upstream = Faults(), server.get_host_and_port()
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    here, there = (
        f"http://127.0.0.1:{proxy.server_address[1]}",
        "http://{}:{}".format(*proxy.upstream),
    )
    print(json.dumps([here, there]), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
