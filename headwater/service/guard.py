"""What every request passes before anything else: Host, Origin, token, size, time; and what every answer carries."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from itertools import pairwise

from headwater.service.connections import Connections, Patience
from headwater.service.documents import Json
from headwater.service.settings import Settings, allowed_hosts

Scope = MutableMapping[str, Json]
Message = MutableMapping[str, Json]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "headwater"
OPEN_PATHS = frozenset({"/", "/login", "/health"})
STREAMS = "/events"
PIECE_BYTES = 256 << 10
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
)


class Refused(Exception):
    """A request that goes no further: a status and one sentence."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class Guard:
    """Wrap an ASGI application with the checks of this module."""

    def __init__(self, app: App, settings: Settings) -> None:
        self.app = app
        self.settings = settings
        self.limits = settings.limits
        self._names = allowed_hosts(settings)
        self.connections = Connections(settings.limits)
        self._slow: set[asyncio.Task[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        answer = _Answer(send, Patience(self.limits))
        try:
            headers = read_headers(scope)
            self._check_host(headers)
            self._check_origin(scope, headers)
            self._check_token(scope, headers)
            body = self._limited(scope, headers, receive, answer)
            if scope["path"] == STREAMS or _is_upload(scope):
                await self.app(scope, body, answer)
            else:
                await self._in_time(scope, body, answer)
        except Refused as refused:
            await answer.refuse(refused)
        except SlowReaderError:
            self.connections.abort(scope.get("client"))

    async def _in_time(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        """Answer within the time limit, or say that it was not possible; a thread that works on is left alone."""
        task = asyncio.ensure_future(self.app(scope, receive, answer))
        plans = scope["method"] == "POST" and scope["path"] in ("/plan", "/jobs")
        seconds = self.limits.seconds
        if plans:
            seconds += self.limits.plan_seconds
        try:
            await asyncio.wait({task}, timeout=seconds)
            # A thread cannot be interrupted. Its task is kept, so that it is not collected, and its end forgotten.
            if not task.done() and not answer.started:
                self._slow.add(task)
                task.add_done_callback(self._forget)
                await answer.refuse(
                    Refused(503, f"this took longer than {seconds:g} s. Ask for less.")
                )
                return
            await task
        except asyncio.CancelledError:
            task.cancel()
            raise

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._slow.discard(task)
        if not task.cancelled():
            task.exception()

    def _check_host(self, headers: dict[str, str]) -> None:
        """Refuse names that are not this server's, which is how DNS rebinding shows."""
        # A page of another site can make its own name point to this machine, and then reads answers as its own; the
        # browser still sends that name as Host.
        name = host_name(headers.get("host", ""))
        if name in self._names:
            return
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            address = None
        if address is None or (self.settings.loopback and not address.is_loopback):
            raise Refused(
                421, "this server does not answer to that Host; `serve --allow-host NAME` adds one."
            )

    def _check_origin(self, scope: Scope, headers: dict[str, str]) -> None:
        """Refuse requests that another site's page makes."""
        origin = headers.get("origin")
        host = headers.get("host", "").lower()
        if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "requests from pages of another origin are refused.")
        # Browsers send Origin with what changes something, and Sec-Fetch-Site with everything. A link from elsewhere
        # that a person follows is fine.
        elsewhere = headers.get("sec-fetch-site", "none") not in ("none", "same-origin")
        if elsewhere and not (
            scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"
        ):
            raise Refused(403, "requests from pages of another site are refused.")

    def _check_token(self, scope: Scope, headers: dict[str, str]) -> None:
        token = self.settings.token
        if token is None or scope["path"] in OPEN_PATHS or scope["path"].startswith("/page/"):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and same(given.strip(), token):
            return
        # The cookie is a hash, so that the token itself is not kept by browsers; SameSite=strict keeps it from others.
        if same(read_cookie(headers.get("cookie", "")), cookie_value(token)):
            return
        raise Refused(
            401, "a token is needed: send `Authorization: Bearer TOKEN`, or log in on the page."
        )

    def _limited(
        self, scope: Scope, headers: dict[str, str], receive: Receive, answer: _Answer
    ) -> Receive:
        """Count the bytes of a body as they come, and do not wait for them for ever."""
        limit = self.limits.body_bytes
        if _is_upload(scope):
            limit = self.limits.text_bytes
        too_large = Refused(
            413, f"the request is larger than the {limit:,} bytes that are taken here."
        )
        # The length that is announced is refused at once; one that is not, or is wrong, is counted as it comes.
        if int(headers.get("content-length", "0") or 0) > limit:
            raise too_large
        too_slow = Refused(408, "the rest of the request did not come in time.")
        patience = Patience(self.limits)
        seen = 0
        more = True

        async def counted() -> Message:
            nonlocal seen, more
            if not more:  # from here on, what comes is the end of the connection
                return await receive()
            try:
                message: Message = await patience.wait(receive())
            except TimeoutError:
                await answer.refuse(too_slow)
                raise too_slow from None
            n_bytes = len(message.get("body", b""))
            patience.earn(n_bytes)
            seen += n_bytes
            more = bool(message.get("more_body", False))
            if seen > limit:
                # Answered here, since the application may turn what is raised into an answer of its own.
                await answer.refuse(too_large)
                raise too_large
            return message

        return counted


class SlowReaderError(Exception):
    """A client does not read its answer; the connection is to be ended."""


class _Answer:
    """Send an answer once, with the headers of every answer, in pieces that the client must take in time.

    Of a piece, and not of a whole body, the server holds a copy until it is read. Errors that libraries write as plain
    text are sent as a Problem.
    """

    def __init__(self, send: Send, patience: Patience) -> None:
        self._send = send
        self.started = False
        self._refused = False
        self._patience = patience
        self._plain = None

    _plain: Message | None

    async def __call__(self, message: Message) -> None:
        if self._refused:
            return
        if message["type"] == "http.response.start":
            self.started = True
            there = {name for name, _ in message["headers"]}
            extra = [(name, value) for name, value in HEADERS if name not in there]
            message = {**message, "headers": [*message["headers"], *extra]}
            kind = dict(message["headers"]).get(b"content-type", b"")
            # Held back until its body is there: a Problem has another length.
            if message["status"] >= 400 and kind.startswith(b"text/plain"):
                self._plain = message
                return
            await self._piece(message, 0)
        elif self._plain is not None:
            await self._send_problem(self._plain, message)
        else:
            await self._send_body(message)

    async def _send_body(self, message: Message) -> None:
        body = message.get("body", b"")
        more = message.get("more_body", False)
        ends = [*range(PIECE_BYTES, len(body), PIECE_BYTES), len(body)]
        for begin, end in pairwise([0, *ends]):
            last = end == len(body)
            # A body that is one piece is sent as it is, without a copy.
            part = body
            if begin > 0 or not last:
                part = bytes(body[begin:end])
            await self._piece({**message, "body": part, "more_body": more or not last}, len(part))

    async def _send_problem(self, start: Message, message: Message) -> None:
        self._plain = None
        text = message.get("body", b"").decode("utf-8", "replace")
        body = json.dumps({"detail": text or "this cannot be answered."}).encode()
        replaced = (b"content-type", b"content-length")
        headers = [pair for pair in start["headers"] if pair[0] not in replaced]
        headers += [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await self._piece({**start, "headers": headers}, 0)
        await self._piece({"type": "http.response.body", "body": body}, len(body))

    async def _piece(self, message: Message, n_bytes: int) -> None:
        try:
            await self._patience.wait(self._send(message), n_bytes)
        except TimeoutError:
            self._refused = True
            raise SlowReaderError from None

    async def refuse(self, refused: Refused) -> None:
        """Send a refusal, unless an answer is under way."""
        if self.started:
            return
        body = json.dumps({"detail": refused.text}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        if refused.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        # The rest of the body is still on its way, and would be read as the next request.
        if refused.status in (408, 413):
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": refused.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})
        self._refused = True


def _is_upload(scope: Scope) -> bool:
    return bool(scope["method"] == "PUT" and scope["path"].startswith("/texts/"))


def read_headers(scope: Scope) -> dict[str, str]:
    """Return the headers by lower-case name; refuse a name that decides something and stands there twice."""
    found: dict[str, str] = {}
    for raw_name, raw_value in scope["headers"]:
        name = raw_name.decode("latin-1").lower()
        # Of two, a proxy in front may believe one and this server the other.
        if name in found and name in ("host", "origin", "authorization", "content-length"):
            raise Refused(400, f"the header {name} stands there twice.")
        found[name] = raw_value.decode("latin-1")
    if not found.get("content-length", "0").isdecimal():
        raise Refused(400, "the header content-length is no number.")
    return found


def host_name(header: str) -> str:
    """Return the name in a Host header, without port and brackets."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    # More than one colon is an IPv6 address without brackets, which has no port.
    if header.count(":") == 1:
        header = header.partition(":")[0]
    return header.lower()


def same(a: str, b: str) -> bool:
    """Compare secrets in a time that does not tell them."""
    return hmac.compare_digest(a.encode(), b.encode())


def cookie_value(token: str) -> str:
    """Return what a browser keeps of a token."""
    return hashlib.sha256(f"headwater page {token}".encode()).hexdigest()


def read_cookie(header: str) -> str:
    """Return the value of our cookie, "" without one."""
    try:
        morsel = SimpleCookie(header).get(COOKIE)
    except CookieError:
        return ""
    if morsel is None:
        return ""
    return morsel.value
