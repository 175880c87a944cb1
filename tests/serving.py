"""A server in this process for tests: its application, asked without a network."""

import asyncio
import json
import threading
from contextlib import contextmanager, suppress
from types import SimpleNamespace

import pytest
from forks import fork_tokenizers

from offload_rt.config import SamplingConfig
from offload_rt.serve.app import Service, make_app
from offload_rt.serve.desk import Desk
from offload_rt.serve.guards import Rules
from offload_rt.serve.orders import Offer
from offload_rt.session.adapters import open_answering
from offload_rt.session.options import settings_from
from offload_rt.session.session import Logged
from offload_rt.session.shared import Shared, shared_engine
from offload_rt.text import Tokenizer
from offload_rt.text.process import TextProcess

HOST = {"host": "127.0.0.1", "content-type": "application/json"}


@contextmanager
def serving(folder, **options):
    """An application over a model, with its service; what reads its texts are forks."""
    with pytest.MonkeyPatch.context() as patch:
        fork_tokenizers(patch)
        with _serving(folder, **options) as found:
            yield found


@contextmanager
def _serving(folder, *, room=None, rules=None, options=(), **offer):
    chosen = {"device": "cpu", "device_memory": "512MiB", "draft": "ngram", **dict(options)}
    settings = settings_from(chosen)
    model, settings = open_answering(str(folder), settings, Logged())
    checkpoint = model.checkpoint
    room = room or Shared(sequences=4, context_tokens=256, kv_tokens=600)
    process = TextProcess()
    prompts = Tokenizer(checkpoint.folder, checkpoint.embedding.shape[0], process).wait()
    with shared_engine(model, settings, Logged(), [room]) as (engine, _):
        desk = Desk(model)
        thread = threading.Thread(target=lambda: _quiet(desk, engine), daemon=True)
        thread.start()
        made = Offer(
            **{
                "names": ("tiny",),
                "sampling": SamplingConfig(),
                "max_tokens": 12,
                "context_tokens": room.context_tokens,
                "kv_tokens": engine.kv_tokens,
                "sequences": room.sequences,
                "plan": {"drafter": "ngram"},
                **offer,
            }
        )
        service = Service(desk, made, prompts, model.end_tokens)
        try:
            app = make_app(service, rules or Rules())
            yield SimpleNamespace(app=app, service=service, desk=desk, engine=engine, model=model)
        finally:
            desk.withdraw_all()
            desk.close()
            thread.join(30)
            service.end()
            process.close()


def _quiet(desk, engine):
    with suppress(Exception):  # a test that breaks it looks at `broken`
        desk.work(engine)


class Asking:
    """One request under way.

    Attributes:
        status: once it is there.
        headers: likewise.
        parts: of the body, as they came.
    """

    def __init__(self, app, method, path, body=b"", headers=None, query=b""):
        self.status, self.headers, self.parts = None, {}, []
        self._gone, self._changed = asyncio.Event(), asyncio.Condition()
        given = HOST | (headers or {})
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": [(k.encode(), v.encode()) for k, v in given.items() if v is not None],
            "client": ("127.0.0.1", 5),
            "server": ("127.0.0.1", 8080),
        }
        pieces = body if isinstance(body, list) else [body]
        self._body = [
            {"type": "http.request", "body": piece, "more_body": place < len(pieces) - 1}
            for place, piece in enumerate(pieces)
        ]
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self):
        if self._body:
            return self._body.pop(0)
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        async with self._changed:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            elif message.get("body"):
                self.parts.append(message["body"].decode())
            self._changed.notify_all()

    def leave(self):
        """The client goes away."""
        self._gone.set()

    async def until(self, ready):
        """Wait until something holds of the parts."""
        async with self._changed:
            await asyncio.wait_for(self._changed.wait_for(lambda: ready(self.parts)), 20)

    async def over(self):
        """Wait for the end."""
        await asyncio.wait_for(self.task, 60)
        return self

    @property
    def text(self):
        return "".join(self.parts)

    @property
    def json(self):
        return json.loads(self.text)

    @property
    def events(self):
        """Of a stream, without comments."""
        lines = [line[6:] for line in self.text.split("\n\n") if line.startswith("data: ")]
        assert lines[-1] == "[DONE]" or "error" in lines[-1]
        return [json.loads(line) for line in lines if line != "[DONE]"]


def ask(app, method, path, body=b"", headers=None):
    """One request, begun; for use within `asyncio.run`."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    return Asking(app, method, path, body, headers)


def post(app, path, body, headers=None):
    """One request, answered."""

    async def one():
        return await ask(app, "POST", path, body, headers).over()

    return asyncio.run(one())


def get(app, path, headers=None):
    """One request, answered."""

    async def one():
        return await ask(app, "GET", path, b"", headers).over()

    return asyncio.run(one())
