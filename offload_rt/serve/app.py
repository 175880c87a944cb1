"""The routes: what is asked over HTTP becomes orders at the desk, and what is told of them answers.

Nothing is imported here from click or torch; a request is read by `wire`, answered by `bodies`.
"""

import asyncio
import base64
import hashlib
import itertools
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from sse_starlette import EventSourceResponse, ServerSentEvent

from offload_rt.engine.sequence import Request, TokenLogprob
from offload_rt.errors import ConfigError, OffloadError, SessionError
from offload_rt.serve.bodies import Envelope, Json, Tally, Words
from offload_rt.serve.desk import Desk, Order, State, Told, known_tokens
from offload_rt.serve.document import document
from offload_rt.serve.guards import App, Guards, Rules, error_headers
from offload_rt.serve.metrics import Metrics
from offload_rt.serve.orders import PLAIN_TOKENS, Maker, Offer, several
from offload_rt.serve.reading import Reading, T
from offload_rt.serve.wire import (
    MOST_CHOICES,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    Drawn,
    TokenizeBody,
    Turn,
    WireError,
    check_tokens,
    read_body,
)
from offload_rt.text import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Service:
    """A desk, and what requests to it need besides.

    Attributes:
        prompts: a tokenizer in a process of its own: a long prompt keeps no answer waiting.
        end_tokens: that end an answer.
        maker: makes requests of the engine of what clients send.
        reading: of texts that are not to be answered.
        log: takes a line for each answer.
        draining: no more requests are taken.
    """

    desk: Desk
    offer: Offer
    prompts: Tokenizer
    end_tokens: frozenset[int]
    maker: Maker = field(init=False)
    reading: Reading = field(init=False)
    metrics: Metrics = field(default_factory=Metrics)
    log: Callable[[str], None] = lambda line: None
    draining: bool = False
    _asked: int = 0
    _texts: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.desk.on_over, self.desk.on_gain = self._count, self.metrics.gain
        self.maker = Maker(self.offer, self.prompts, self.end_tokens)
        self.reading = Reading(self.maker)

    def _count(self, order: Order, told: Told) -> None:
        if told.over in ("stop", "length"):
            self.metrics.add(told.tally)

    @property
    def unanswered(self) -> int:
        """Answers that were counted in and are not told to their end."""
        return self._asked

    # --- before anything is done

    def check_open(self) -> None:
        """See that requests are taken.

        Raises:
            WireError: none are any more.
        """
        if self.desk.broken is not None:
            raise WireError(self.desk.broken, status=503, kind="server_error")
        if self.draining:
            raise WireError("the server ends", status=503, kind="server_error", retry_s=10)

    def take(self, choices: int) -> None:
        """Count answers in that are to be made.

        Raises:
            WireError: there are too many, or none are made any more.
        """
        self.check_open()
        most = self.offer.sequences + self.offer.queue
        if self._asked + choices > most:
            raise WireError(
                f"{self._asked} answers are in the making or wait, {most} are accepted: try again",
                status=429,
                kind="rate_limit_error",
                code="queue_full",
                retry_s=self._wait_s(),
            )
        self._asked += choices

    def give_back(self, choices: int) -> None:
        """They are made."""
        self._asked -= choices

    def _wait_s(self) -> int:
        """After how long an answer should have ended, about: what is left of all, by the speed."""
        speed = max(self.desk.state.tokens_per_s, 1.0)
        return int(min(120.0, max(1.0, self.offer.max_tokens / speed)))

    # --- prompts

    async def chat_ids(
        self, turns: Sequence[Turn], tools: list[dict[str, Any]] | None
    ) -> list[int]:
        """Token ids of a conversation."""
        return await asyncio.to_thread(self.maker.chat_ids, turns, tools)

    async def plain_ids(self, prompt: str | list[int]) -> list[int]:
        """Token ids of a text, as it is."""
        if not isinstance(prompt, str):
            return prompt
        return await asyncio.to_thread(self.maker.plain_ids, prompt)

    async def words(self, told: Iterable[TokenLogprob], more: Iterable[int] = ()) -> Words:
        """Texts of the tokens that are told of."""
        wanted = (known_tokens([*told]) | set(more)) - self._texts.keys()
        if wanted:
            ids = sorted(wanted)
            self._texts |= zip(ids, await asyncio.to_thread(self.prompts.texts, ids), strict=True)
        return Words(self._texts)

    async def read(self, work: Callable[[Maker], T]) -> T:
        """The result of some work on texts that are not to be answered.

        Raises:
            WireError: none is done now, or the work raised it.
        """
        self.check_open()
        return await self.reading.read(work)

    def end(self) -> None:
        """Read no more prompts and texts: those that are being read come to nothing."""
        self.reading.end()
        self.prompts.end()

    def line(self, http: HttpRequest, tally: Tally, reasons: Sequence[str], prompt: str) -> None:
        """Log an answer; its prompt only where that is asked for."""
        took_s = tally.queue_s + tally.prompt_s + tally.answer_s
        came = f"{tally.prompt_tokens} + {tally.answer_tokens} tokens, {took_s:.2f} s, "
        came = came + ", ".join(reasons) if reasons else "its client left"
        said = f"{http.state.request_id} {http.scope['path']}: {came}"
        self.log(f"{said}: {prompt!r}" if self.offer.logs_prompts else said)


class Choices:
    """Orders of one request, and what is told of them.

    Args:
        service: whose desk they are placed at.
        requests: of each choice, with the prompt's place.
        stop: texts that end each.
        most: that are at the desk at once; None: all.
    """

    def __init__(
        self,
        service: Service,
        requests: Sequence[Request],
        stop: tuple[str, ...],
        most: int | None = None,
    ) -> None:
        loop, self._service = asyncio.get_running_loop(), service
        self._told: asyncio.Queue[tuple[int, Told]] = asyncio.Queue()

        def teller(index: int) -> Callable[[Told], None]:
            def tell(told: Told) -> None:
                with suppress(RuntimeError):  # the loop is closed: the server has ended
                    loop.call_soon_threadsafe(self._told.put_nowait, (index, told))

            return tell

        self.orders = [Order(one, stop, teller(i)) for i, one in enumerate(requests)]
        self._unplaced, self._most = iter(self.orders), most
        self.last: dict[int, Told] = {}
        self.scores: dict[int, Sequence[TokenLogprob]] = {}  # of prompts

    def place(self, most: int | None = None) -> None:
        """Have them answered, or so many of those that are not yet at the desk."""
        try:
            for order in itertools.islice(self._unplaced, most or self._most):
                self._service.desk.place(order)
        except SessionError as error:
            self.withdraw()
            raise WireError(str(error), status=503, kind="server_error") from error

    async def told(self) -> AsyncIterator[tuple[int, Told]]:
        """All that is told, until all have ended.

        Raises:
            WireError: one has failed.
        """
        while len(self.last) < len(self.orders):
            index, told = await self._told.get()
            self.scores.setdefault(index, told.prompt_logprobs)
            if told.over is not None:
                self.last[index] = told
                self.place(1)
            if told.error is not None or told.over == "abort":
                raise _failure(told)
            yield index, told

    def withdraw(self) -> None:
        """Nobody waits for those any more that have not ended."""
        for index, order in enumerate(self.orders):
            if index not in self.last:
                self._service.desk.withdraw(order)

    def tally(self) -> Tally:
        """What all took that have ended."""
        by_prompt: dict[int, Tally] = {}
        for index, told in self.last.items():
            key = id(self.orders[index].request.ids)
            by_prompt[key] = by_prompt.get(key, Tally()).plus(told.tally)
        found = Tally()
        for one in by_prompt.values():
            found = found.beside(one)
        return found

    def reasons(self) -> list[str]:
        """Why those ended that have."""
        return [told.over or "" for told in self.last.values()]


def _failure(told: Told) -> WireError:
    """Why there is no answer."""
    if told.error is None:
        return WireError("the server ended the answer", status=503, kind="server_error")
    if isinstance(told.error, ConfigError):
        return WireError(str(told.error))
    return WireError(str(told.error), status=500, kind="server_error")


async def _gone(http: HttpRequest) -> None:
    """Wait until the client has gone away."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _or_gone(http: HttpRequest, work: Any) -> Any:  # noqa: ANN401 - what the work returns
    """The result of a coroutine; None if the client went away before it was there."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, gone):
            one.cancel()
            with suppress(asyncio.CancelledError, OffloadError):
                await one


def _envelope(service: Service, *, chat: bool) -> Envelope:
    offer, prefix = service.offer, "chatcmpl" if chat else "cmpl"
    return Envelope(
        id=f"{prefix}-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=offer.names[0],
        fingerprint=f"offload_rt-{offer.version}",
        chat=chat,
    )


async def _chat(service: Service, http: HttpRequest) -> Response:
    body = read_body(ChatBody, await http.body())
    body.check()
    service.maker.check_model(body.model)
    stop, top, tools = body.stops(), body.top(), body.told_tools()
    count = body.n or 1
    service.take(count)
    held = _Held(service, count)
    try:
        ids = await service.chat_ids(body.messages, tools)
        request = service.maker.request(
            body, ids, body.asked_tokens(), service.offer.max_tokens, top
        )
        choices = Choices(service, several(request, count), stop)
        teller = _Teller(service, http, choices, held, body, _envelope(service, chat=True))
        return await teller.respond()
    except BaseException:
        held.free()
        raise


async def _plain(service: Service, http: HttpRequest) -> Response:
    body = read_body(CompletionBody, await http.body())
    body.check()
    service.maker.check_model(body.model)
    stop, prompts, count = body.stops(), body.prompts(), body.n or 1
    if len(prompts) * count > max(MOST_CHOICES, len(prompts)):
        raise WireError(f"n is {count} for {len(prompts)} prompts, accepted is 1", param="n")
    # Prompts of one request are no reason to refuse it: lm-eval sends many. Those that the engine
    # answers are at the desk, and as many behind them.
    offer = service.offer
    places = min(count * len(prompts), 2 * offer.sequences, offer.sequences + offer.queue)
    service.take(places)
    held = _Held(service, places)
    try:
        requests: list[Request] = []
        scores = bool(body.echo) and body.logprobs is not None
        for prompt in prompts:
            ids = await service.plain_ids(prompt)
            one = service.maker.request(body, ids, body.max_tokens, PLAIN_TOKENS, body.logprobs)
            requests += several(replace(one, scores=scores), count)
        choices = Choices(service, requests, stop, places)
        teller = _Teller(service, http, choices, held, body, _envelope(service, chat=False))
        if body.echo:
            for index, request in enumerate(requests):
                given = prompts[index // count]
                if not isinstance(given, str):
                    given = await asyncio.to_thread(service.prompts.decode, list(request.ids))
                teller.before[index] = given
        return await teller.respond()
    except BaseException:
        held.free()
        raise


@dataclass(slots=True)
class _Held:
    """Answers that were counted in, until they are given back once."""

    service: Service
    choices: int

    def free(self) -> None:
        self.service.give_back(self.choices)
        self.choices = 0


@dataclass(slots=True)
class _Teller:
    """Makes an HTTP answer of what is told of choices.

    Attributes:
        before: of each choice, text of the prompt that is put before the answer.
    """

    service: Service
    http: HttpRequest
    choices: Choices
    held: _Held
    body: Drawn
    envelope: Envelope
    before: dict[int, str] = field(default_factory=dict)

    async def respond(self) -> Response:
        """The whole answer, or a stream of it."""
        self.choices.place()
        if not self.body.stream:
            try:
                found = await _or_gone(self.http, self._whole())
                return JSONResponse(found) if found is not None else Response(status_code=499)
            finally:
                self._over()
        return EventSourceResponse(
            self._events(),
            ping=self.service.offer.ping_s,
            ping_message_factory=lambda: ServerSentEvent(comment="still working", sep="\n"),
            sep="\n",
        )

    def _over(self) -> None:
        """Give back what is held; those that have not ended are not waited for."""
        self.choices.withdraw()
        self.held.free()
        ids = self.choices.orders[0].request.ids
        prompt = ""
        if self.service.offer.logs_prompts:
            with suppress(OffloadError):
                prompt = self.service.prompts.decode(list(ids))
        self.service.line(self.http, self.choices.tally(), self.choices.reasons(), prompt)

    async def _whole(self) -> Json:
        texts: dict[int, list[str]] = {}
        parts: dict[int, list[Told]] = {}
        async for index, told in self.choices.told():
            texts.setdefault(index, []).append(told.text)
            parts.setdefault(index, []).append(told)
        found = []
        for index in range(len(self.choices.orders)):
            logprobs = await self._logprobs(index, parts[index], prompt=True)
            text = self.before.get(index, "") + "".join(texts[index])
            reason = self.choices.last[index].over or "stop"
            found.append(self.envelope.choice(index, text, reason, logprobs))
        return self.envelope.whole(found, self.choices.tally())

    async def _logprobs(
        self, index: int, parts: Sequence[Told], *, prompt: bool = False, start: int = 0
    ) -> Json | None:
        """`logprobs` of some of what a choice was told, behind those of its prompt if asked for."""
        request = self.choices.orders[index].request
        if request.logprobs is None:
            return None
        found: list[TokenLogprob | None] = [one for told in parts for one in told.logprobs]
        tokens = [token for told in parts for token in told.tokens]
        if prompt and request.scores:
            found = [None, *self.choices.scores[index], *found]
            tokens = [*request.ids, *tokens]
        words = await self.service.words([one for one in found if one is not None], tokens)
        if self.envelope.chat:
            return words.chat([one for one in found if one is not None])
        return words.plain(tokens, found, start)

    async def _events(self) -> AsyncIterator[ServerSentEvent]:
        """Pieces of the answer; an error is one of them."""
        scored: set[int] = set()
        try:
            for index in range(len(self.choices.orders)):
                if self.envelope.chat:
                    yield _event(self.envelope.piece(index, {"role": "assistant", "content": ""}))
                elif index in self.before and not self.choices.orders[index].request.scores:
                    yield _event(self.envelope.piece(index, self.before[index]))
            told_chars: dict[int, int] = {i: len(text) for i, text in self.before.items()}
            async for index, told in self.choices.told():
                if index not in scored and self.choices.orders[index].request.scores:
                    scored.add(index)  # a prompt comes with its scores, once they are known
                    scores = await self._logprobs(index, [], prompt=True)
                    yield _event(self.envelope.piece(index, self.before[index], logprobs=scores))
                if told.text or told.logprobs:
                    start = told_chars.get(index, 0)
                    told_chars[index] = start + len(told.text)
                    logprobs = await self._logprobs(index, [told], start=start)
                    delta: Json | str = {"content": told.text}
                    delta = delta if self.envelope.chat else told.text
                    yield _event(self.envelope.piece(index, delta, logprobs=logprobs))
                if told.over is not None:
                    last: Json | str = {} if self.envelope.chat else ""
                    yield _event(self.envelope.piece(index, last, reason=told.over))
            options = self.body.stream_options
            if options is not None and options.include_usage:
                yield _event(self.envelope.usage(self.choices.tally()))
            yield ServerSentEvent("[DONE]", sep="\n")
        except WireError as error:
            yield _event(error.body())
        finally:
            self._over()


def _event(body: Json) -> ServerSentEvent:
    return ServerSentEvent(json.dumps(body, ensure_ascii=False, separators=(",", ":")), sep="\n")


def page() -> tuple[str, str]:
    """The page, and the policy that lets a browser run what is in it and nothing else."""
    text = resources.files("offload_rt.serve").joinpath("page.html").read_text("utf-8")
    sources = {}
    for tag in ("script", "style"):
        (inner,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        sources[tag] = f"{tag}-src 'sha256-{digest}'"
    policy = f"default-src 'none'; {sources['script']}; {sources['style']}; connect-src 'self'"
    return text, f"{policy}; img-src data:; base-uri 'none'; form-action 'none'"


def _look(offer: Offer, state: State) -> Json:
    """What the page shows."""
    drafted = state.drafted_tokens
    return {
        "model": offer.names[0],
        "context_tokens": offer.context_tokens,
        "max_tokens": offer.max_tokens,
        "kv_tokens": offer.kv_tokens,
        "sequences": offer.sequences,
        "plan": offer.plan,
        "running": state.running,
        "waiting": state.waiting,
        "reserved_tokens": state.reserved_tokens,
        "tokens_per_s": state.tokens_per_s,
        "link_share": state.link_share,
        "compute_share": state.compute_share,
        "link_bytes_per_s": state.link_bytes_per_s,
        "acceptance_rate": state.accepted_tokens / drafted if drafted else None,
    }


def make_app(service: Service, rules: Rules) -> App:
    """The application, behind its guards."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _tell_errors(app)
    _add_looks(app, service)
    _add_answers(app, service)
    _add_texts(app, service)
    return Guards(app, rules, service.metrics.refuse)


def _tell_errors(app: FastAPI) -> None:
    """Every error has the protocol's shape, and none tells of paths or code."""

    @app.exception_handler(WireError)
    async def refused(_: HttpRequest, error: WireError) -> Response:
        headers = {key.decode(): value.decode() for key, value in error_headers(error)}
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def unknown(request: HttpRequest, error: HTTPException) -> Response:
        why = "there is no such route here"
        if allowed := (error.headers or {}).get("Allow"):
            why = f"this route is not for {request.method}: use {allowed}"
        said = WireError(why, status=error.status_code)
        return JSONResponse(said.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broke(_: HttpRequest, error: Exception) -> Response:
        _log.error("a request failed", exc_info=error)
        said = WireError("the server failed to answer this", status=500, kind="server_error")
        return JSONResponse(said.body(), 500, {"x-should-retry": "false"})


def _add_looks(app: FastAPI, service: Service) -> None:
    """Routes that tell how things are."""
    offer, desk, (text, policy) = service.offer, service.desk, page()
    told = document(offer.version, offer.names)

    @app.get("/")
    async def front() -> Response:
        headers = {"content-security-policy": policy, "cache-control": "no-store"}
        return HTMLResponse(text, headers=headers)

    @app.get("/health")
    async def health() -> Response:
        if desk.broken is not None or service.draining:
            return JSONResponse({"status": "broken" if desk.broken else "ending"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        found = service.metrics.text(desk.state, offer.names[0], offer.kv_tokens, offer.memory)
        return PlainTextResponse(found, media_type="text/plain; version=0.0.4")

    @app.get("/openapi.json")
    async def openapi() -> Response:
        return JSONResponse(told)

    @app.get("/props")
    async def props() -> Response:
        return JSONResponse(_look(offer, desk.state))


def _add_answers(app: FastAPI, service: Service) -> None:
    """Routes of the protocol."""
    offer, created = service.offer, int(time.time())

    @app.get("/v1/models")
    async def models() -> Response:
        data = [_model(offer, name, created) for name in offer.names]
        return JSONResponse({"object": "list", "data": data})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        service.maker.check_model(name)
        return JSONResponse(_model(offer, name, created))

    @app.post("/v1/chat/completions")
    async def chat(http: HttpRequest) -> Response:
        return await _chat(service, http)

    @app.post("/v1/completions")
    async def completions(http: HttpRequest) -> Response:
        return await _plain(service, http)


def _add_texts(app: FastAPI, service: Service) -> None:
    """Routes about text and tokens."""

    @app.post("/tokenize")
    async def tokenize(http: HttpRequest) -> Response:
        body = read_body(TokenizeBody, await http.body())
        if (turns := body.messages) is not None:
            ids = await service.read(lambda maker: maker.chat_ids(turns, None))
        elif (given := body.content if body.prompt is None else body.prompt) is not None:
            special = body.add_special_tokens is not False
            ids = await service.read(lambda maker: maker.plain_ids(given, special))
        else:
            raise WireError("give prompt or messages", param="prompt")
        most = service.offer.context_tokens
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": most})

    @app.post("/detokenize")
    async def detokenize(http: HttpRequest) -> Response:
        body = read_body(DetokenizeBody, await http.body())
        check_tokens(body.tokens, "tokens")
        found = await service.read(lambda maker: maker.text(body.tokens))
        return JSONResponse({"prompt": found, "content": found})

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        known = service.prompts
        by_id = {token_id: token for token, token_id in known.special_tokens.items()}
        end, begin = known.eos_token_id, known.begin_token_id
        told = {
            "tokenizer_class": "offload_rt",
            "vocab_size": len(known),
            "eos_token": None if end is None else by_id.get(end),
            "bos_token": None if begin is None else by_id.get(begin),
            "pad_token": None,
            "chat_template": known.chat_template,
        }
        return JSONResponse(told)


def _model(offer: Offer, name: str, created: int) -> Json:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "offload_rt",
        "max_model_len": offer.context_tokens,
    }
