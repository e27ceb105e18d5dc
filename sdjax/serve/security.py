"""Who may ask: the Host and the Origin of a request are checked, then its key; bodies are bounded.

A page of another site that a browser shows may send requests here (CSRF), and may have its name resolve to this
machine (DNS rebinding): the first have another Origin than the Host, the second a Host that is not this machine's.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import re
import socket
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sdjax.serve.errors import body_of
from sdjax.serve.held import Busy, Held

LOCAL = "localhost"
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
TOO_LARGE = "body: {:,} bytes at most"
RETRY = "5"  # seconds after which a client may try again where the server is busy
SLOWEST = 60  # seconds in which something of a body must come
CLOSE = {"Connection": "close"}
"""Of what is refused: its body is not read"""
CHALLENGE = {"WWW-Authenticate": 'Basic realm="sdjax", charset="UTF-8"'}


@dataclass(frozen=True)
class Rules:
    """Who may ask for what."""

    is_local: bool = True
    """whether only this machine is listened to"""
    own: str = ""
    """the name that it listens to"""
    hosts: tuple[str, ...] = ()
    """further names of this server; .example.com: all below it"""
    key: str | None = None
    open: frozenset[str] = frozenset()
    """paths that are answered without the key"""
    body: int = 2**26
    """bytes at most"""
    bodies: int = 2**28
    """bytes of the bodies of all requests that are not answered yet, at most"""

    def knows(self, host: str) -> bool:
        """Whether a request to this Host is meant for this server."""
        name = host_name(host)
        if _is_address(name) or name == LOCAL or (name and name == self.own) or self.adds(name):
            return True  # no name is behind an address, which could be made to point here
        own = socket.gethostname().lower()
        return not self.is_local and name in (own, own.partition(".")[0], f"{own}.local")

    def adds(self, name: str) -> bool:
        """Whether a name is one of the further ones."""
        return any(name == own or (own.startswith(".") and name.endswith(own)) for own in self.hosts)

    def is_same_site(self, method: str, headers: Headers) -> bool:
        """Whether no page of another site sends it. Who follows a link to here may see the page."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None:
            host = origin.partition("://")[2].lower()
            return host == headers.get("host", "").lower() or self.adds(host_name(host))  # behind a proxy they differ
        is_visit = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        return site in ("none", "same-origin") or is_visit

    def has_key(self, authorization: str, own_header: str) -> bool:
        """Whether the key is there: as a Bearer, as the password of Basic, or in X-API-Key."""
        if self.key is None:
            return True
        kind, _, value = authorization.partition(" ")
        authorized = {"bearer": value.strip(), "basic": _password(value)}.get(kind.lower(), "")
        return any(hmac.compare_digest(given.encode(), self.key.encode()) for given in (authorized, own_header))


def host_name(host: str) -> str:
    """'LOCALHOST:7860' -> 'localhost'; '[::1]:7860' -> '::1'."""
    match = re.fullmatch(r"\[([^\]]*)\](?::\d+)?|([^:\[\]]*)(?::\d+)?", host.strip().lower())
    return (match[1] or match[2] or "").rstrip(".") if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _password(value: str) -> str:
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""


class Guard:
    """Middleware that answers what is refused, and counts the bytes of bodies."""

    def __init__(self, app: ASGIApp, rules: Rules):
        self._app, self._rules = app, rules
        self.bodies = Held(rules.bodies, "the bodies of other requests take all the memory that there is for them")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if refused := self._refused(scope, headers):
            await refused(scope, receive, send)
            return
        body = _Body(receive, self._rules.body, self.bodies)
        try:
            await self._app(scope, body.receive, _with_headers(send))
        finally:
            body.close()

    def _refused(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        if not self._rules.knows(headers.get("host", "")):
            return refusal(scope, 403, "this host name is not known here; see --allow-host")
        if not self._rules.is_same_site(scope["method"], headers):
            return refusal(scope, 403, "requests of pages of other sites are refused")
        is_open = scope["path"] in self._rules.open
        if not is_open and not self._rules.has_key(headers.get("authorization", ""), headers.get("x-api-key", "")):
            is_script = headers.get("sec-fetch-mode", "navigate") != "navigate"  # which asks for the key itself
            return refusal(scope, 401, "the key is missing or wrong", None if is_script else CHALLENGE)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self._rules.body:
            return refusal(scope, 413, TOO_LARGE.format(self._rules.body))
        return None


class _Body:
    """The body of a request as it comes: counted until the request is answered.

    `receive` raises an HTTPException where it is longer than `most`, where those of all are too long, and where nothing
    of it has come for SLOWEST.
    """

    def __init__(self, receive: Receive, most: int, all: Held):
        self._receive, self._most, self._all = receive, most, all
        self._read, self._is_whole = 0, False

    async def receive(self) -> Message:
        message = await (self._receive() if self._is_whole else self._next())
        count = len(message.get("body", b""))
        if self._read + count > self._most:
            raise HTTPException(413, TOO_LARGE.format(self._most))
        try:
            self._all.take(count)
        except Busy as error:
            raise HTTPException(429, f"body: {error}", {"Retry-After": RETRY}) from None
        self._read += count
        self._is_whole = not message.get("more_body", False)
        return message

    async def _next(self) -> Message:
        try:
            return await asyncio.wait_for(self._receive(), SLOWEST)
        except TimeoutError:
            raise HTTPException(408, f"body: nothing has come for {SLOWEST} seconds") from None

    def close(self) -> None:
        """Counts it no longer."""
        self._all.give(self._read)
        self._read = 0


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return sent


def refusal(scope: Scope, status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An answer that says why, in one line."""
    return JSONResponse(body_of(scope["path"], status, detail), status, headers={**HEADERS, **CLOSE, **(headers or {})})
