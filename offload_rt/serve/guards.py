"""What stands before the routes: who may ask, from where, and how much.

In this order, and before anything of a request is read: the Host (a name that somebody else's DNS
points here is refused, else any page in a browser could ask), the Origin (pages of other places are
refused unless allowed), the key, the size. Then the body is read, in limited time.
"""

import asyncio
import hmac
import json
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from offload_rt.serve.wire import WireError

MOST_BODY_BYTES = 8 * 2**20
MOST_HEADERS = 100
BODY_S = 30.0  # in which a body must have come
AMBIGUOUS = "ambiguous_length"  # a proxy before us may see the end of the request elsewhere
PUBLIC = frozenset({"/", "/health"})
READING = frozenset({"/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"})
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_ID = re.compile(r"[\x21-\x7e]{1,128}")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Who may ask.

    Attributes:
        key: that requests must bring; None: none.
        hosts: names under which it may be asked; empty: any.
        origins: of pages elsewhere that may ask.
    """

    key: str | None = None
    hosts: tuple[str, ...] = LOOPBACK
    origins: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Guards:
    """An ASGI application that lets through to another what keeps the rules."""

    app: App
    rules: Rules
    on_refusal: Callable[[int], None] = lambda status: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or have it answered."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = _headers(scope)
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = name
        origin = headers.get("origin")
        allowed = origin if origin in self.rules.origins else None

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                more = [
                    (b"x-request-id", name.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
                if allowed is not None:
                    more.append((b"access-control-allow-origin", allowed.encode()))
                    more.append((b"vary", b"origin"))
                message["headers"] = [*message.get("headers", []), *more]
                if message["status"] >= 400:
                    self.on_refusal(message["status"])
            await send(message)

        try:
            self._check(scope, headers)
            if scope["method"] == "OPTIONS":
                await _preflight(named, allowed)
                return
            if scope["path"] not in PUBLIC:
                self._check_key(headers)
            received = await _whole_body(scope, headers, receive)
        except WireError as error:
            await refuse(named, error)
            return
        await self.app(_as_get(scope), received, named)

    def _check(self, scope: Scope, headers: dict[str, str]) -> None:
        """Whether it may be asked like that at all."""
        if len(scope["headers"]) > MOST_HEADERS:
            raise WireError(
                f"the request has {len(scope['headers'])} headers, accepted are {MOST_HEADERS}",
                status=431,
            )
        if {"content-length", "transfer-encoding"} <= headers.keys():
            raise WireError("the request has a length and chunks: send one of them", code=AMBIGUOUS)
        hosts = [value for key, value in scope["headers"] if key == b"host"]
        host = _name_of(headers.get("host", ""))
        if len(hosts) != 1 or (self.rules.hosts and host not in self.rules.hosts):
            raise WireError(
                "this server is not asked under that Host: use 127.0.0.1 or localhost, or start it "
                "with --allowed-host",
                status=403,
                kind="permission_error",
            )
        origin = headers.get("origin")
        if origin is None or origin in self.rules.origins:
            return
        if _place_of(origin) != headers.get("host"):
            raise WireError(
                "pages of another origin may not ask this server: start it with --cors-origin",
                status=403,
                kind="permission_error",
            )

    def _check_key(self, headers: dict[str, str]) -> None:
        """Whether the key is right, in a time that does not tell how much of it is."""
        if self.rules.key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.rules.key.encode())
        if scheme.lower() != "bearer" or not right:
            raise WireError(
                "the API key is missing or wrong: send it as `Authorization: Bearer KEY`",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )


def _as_get(scope: Scope) -> Scope:
    """A HEAD as a GET; uvicorn leaves the body out, by its own scope."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope


async def refuse(send: Send, error: WireError) -> None:
    """Answer with an error."""
    data = json.dumps(error.body()).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(data)).encode()),
        *error_headers(error),
    ]
    if error.status in (408, 413, 431) or error.code == AMBIGUOUS:  # what is left is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": data})


def error_headers(error: WireError) -> list[tuple[bytes, bytes]]:
    """Whether to try again, and when; clients of OpenAI obey."""
    if error.retry_s is not None:
        return [(b"retry-after", str(error.retry_s).encode())]
    return [(b"x-should-retry", b"false")] if error.status >= 500 else []


async def _preflight(send: Send, allowed: str | None) -> None:
    """Tell a browser whether a page may ask."""
    headers = []
    if allowed is not None:
        headers = [
            (b"access-control-allow-methods", b"GET, POST"),
            (b"access-control-allow-headers", b"authorization, content-type, x-request-id"),
            (b"access-control-max-age", b"600"),
        ]
    status = 403 if allowed is None else 204
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _whole_body(scope: Scope, headers: dict[str, str], receive: Receive) -> Receive:
    """Read the body; returns what gives it to the routes, and then what else comes."""
    too_large = WireError(f"the body is larger than {MOST_BODY_BYTES} bytes", status=413)
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 12 or int(length) > MOST_BODY_BYTES:
        raise too_large
    if scope["method"] == "POST" and scope["path"] in READING:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # another could be sent by any page without asking first
            why = "the content-type is not application/json: send that header (curl -H)"
            raise WireError(why, status=415)
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise WireError("the client went away", status=408)
                size += len(part := message.get("body", b""))
                if size > MOST_BODY_BYTES:
                    raise too_large
                parts.append(part)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise WireError(f"the body did not come within {BODY_S:.0f} s", status=408) from None
    whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

    async def again() -> Message:
        return whole.pop() if whole else await receive()

    return again


def _headers(scope: Scope) -> dict[str, str]:
    return {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}


def _place_of(origin: str) -> str | None:
    """Host and port of an Origin; None where it is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:  # such as `http://[`
        return None


def _name_of(host: str) -> str:
    """A Host without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
