"""The server: each answer is its offline answer, whoever else asks, leaves or sends nonsense."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import uvicorn
from engines import reference_model
from serving import ask, get, post, serving

import offload_rt
from offload_rt.engine import Run
from offload_rt.errors import CheckpointError, DeviceError
from offload_rt.serve import app as app_module
from offload_rt.serve import guards, reading, running
from offload_rt.serve.desk import Desk
from offload_rt.serve.guards import Rules
from offload_rt.session.crowd import Crowd
from offload_rt.session.shared import Shared
from offload_rt.text import process, tokenizer
from offload_rt.text.process import TextProcess

CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
HI = [{"role": "user", "content": "the quick fox"}]
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


@pytest.fixture(scope="module")
def server(tiny_model):
    with serving(tiny_model, options={"dtype": "float32"}) as found:
        yield found


@pytest.fixture(scope="module")
def offline(tiny_model):
    small = {"device": "cpu", "device_memory": "512MiB", "dtype": "float32"}
    with offload_rt.load(tiny_model, draft="none", **small) as model:
        yield model


def said(answer):
    return answer.json["choices"][0]["message"]["content"]


def streamed(events, index=0):
    choices = [e["choices"][0] for e in events if e["choices"]]
    return "".join(c["delta"].get("content", "") for c in choices if c["index"] == index)


def settled(server):
    """Wait until nobody is answered, and nothing is set aside."""
    until = time.monotonic() + 10
    while server.desk.unfinished or server.desk.state.running or server.service._asked:
        assert time.monotonic() < until
        time.sleep(0.01)


# --- answers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 1.2, "top_k": 9, "seed": 3},
        {"stop": ["e"]},
    ],
)
def test_an_answer_is_the_offline_one(server, offline, options):
    expected = offline.generate(HI, max_tokens=10, **options)
    body = {"model": "tiny", "messages": HI, "max_completion_tokens": 10, **options}
    whole = post(server.app, CHAT, body)
    assert whole.status == 200 and said(whole) == expected.text
    choice = whole.json["choices"][0]
    assert choice["finish_reason"] == expected.finish_reason
    assert choice["message"]["role"] == "assistant" and choice["logprobs"] is None
    usage = whole.json["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (
        expected.prompt_tokens,
        len(expected.token_ids),
    )
    options = body | {"stream": True, "stream_options": {"include_usage": True}}
    stream = post(server.app, CHAT, options)
    assert stream.headers["content-type"].startswith("text/event-stream")
    assert stream.headers["cache-control"] == "no-store"
    first, *_, last, told = stream.events
    assert streamed(stream.events) == expected.text and stream.text.endswith("data: [DONE]\n\n")
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert last["choices"][0] == {
        "index": 0,
        "delta": {},
        "logprobs": None,
        "finish_reason": expected.finish_reason,
    }
    assert told["choices"] == [] and told["usage"]["completion_tokens"] == len(expected.token_ids)
    assert len({(e["id"], e["model"], e["created"]) for e in stream.events}) == 1
    assert first["object"] == "chat.completion.chunk"


def wishes(count):
    draw, found = random.Random(2), []
    for place in range(count):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randrange(2, 25)))
        options = draw.choice([{}, {"temperature": 1.0, "seed": place}, {"stop": "fo"}])
        options = options | {"max_tokens": draw.randrange(1, 14)}
        found.append(({"messages": [{"role": "user", "content": text}], **options}, text, options))
    return found


def test_no_answer_is_lost_or_mixed_up(server, offline):
    """32 at once, as streams and whole, of which every fifth client leaves at some time."""
    asked = wishes(32)
    expected = [offline.generate(text, **options).text for _, text, options in asked]

    async def one(place, body):
        streams = place % 2 == 0
        asking = ask(server.app, "POST", CHAT, body | ({"stream": True} if streams else {}))
        if place % 5 == 4:
            await asyncio.sleep(0.01 * place)
            asking.leave()
            await asking.over()
            return None
        await asking.over()
        assert asking.status == 200
        return streamed(asking.events) if streams else said(asking)

    async def all_of_them():
        return await asyncio.gather(*(one(i, body) for i, (body, _, _) in enumerate(asked)))

    found = asyncio.run(all_of_them())
    kept = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None]
    assert len(kept) == 26 and all(f == e for f, e in kept)
    settled(server)


def test_choices_have_seeds_of_their_own(server, offline):
    body = {"messages": HI, "n": 3, "temperature": 1.1, "seed": 40, "max_tokens": 9}
    expected = [
        offline.generate(HI, temperature=1.1, seed=40 + i, max_tokens=9).text for i in range(3)
    ]
    whole = post(server.app, CHAT, body)
    assert [c["message"]["content"] for c in whole.json["choices"]] == expected
    assert [c["index"] for c in whole.json["choices"]] == [0, 1, 2] and len(set(expected)) > 1
    stream = post(server.app, CHAT, body | {"stream": True})
    assert [streamed(stream.events, i) for i in range(3)] == expected
    assert whole.json["usage"]["prompt_tokens"] == offline.generate(HI, max_tokens=1).prompt_tokens


def test_completions_score_as_lm_eval_asks(server, tiny_model):
    """Token-id prompts with echo and logprobs, all rows against transformers."""
    prompts = [[7, 41, 3, 99], [120, 5, 63, 18, 230, 77]]
    body = {"prompt": prompts, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
    found = post(server.app, PLAIN, body | {"model": "tiny", "seed": 1234}).json
    model, words = reference_model(tiny_model), server.service.prompts
    for ids, choice in zip(prompts, found["choices"], strict=True):
        told = choice["logprobs"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        whole = [*ids, int(logits[-1].argmax())]
        assert told["tokens"] == words.texts(whole) and told["token_logprobs"][0] is None
        expected = [float(logits[i, t]) for i, t in enumerate(whole[1:])]
        assert told["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
        best = [logits[i].max(-1) for i in range(len(ids))]
        assert told["top_logprobs"][0] is None
        for top, (value, token) in zip(told["top_logprobs"][1:], best, strict=True):
            assert top == {words.texts([int(token)])[0]: pytest.approx(float(value), abs=1e-4)}
        assert choice["text"].startswith(words.decode(ids)) and len(told["text_offset"]) == len(
            whole
        )
    only = post(server.app, PLAIN, body | {"max_tokens": 0}).json
    lengths = [len(choice["logprobs"]["tokens"]) for choice in only["choices"]]
    assert lengths == [4, 6] and only["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("most", [0, 1, 6])
def test_scores_of_a_prompt_are_streamed_before_the_answer(server, most):
    body = {"prompt": [[7, 41, 3, 99], [5]], "max_tokens": most, "echo": True, "logprobs": 2}
    whole = post(server.app, PLAIN, body).json["choices"]
    events = post(server.app, PLAIN, body | {"stream": True}).events
    for expected in whole:
        pieces = [c for e in events for c in e["choices"] if c["index"] == expected["index"]]
        assert "".join(one["text"] for one in pieces) == expected["text"]
        told = [one["logprobs"] for one in pieces if one["logprobs"]]
        assert len(told[0]["tokens"]) == len(body["prompt"][expected["index"]])
        for name, values in expected["logprobs"].items():
            found = [value for part in told for value in part[name]]
            assert found == values or name == "text_offset", name


def test_plain_completions(server, offline):
    texts = ["the quick", "lazy dog jumps"]
    expected = [offline.generate(text, raw=True, max_tokens=6).text for text in texts]
    found = post(server.app, PLAIN, {"prompt": texts, "max_tokens": 6}).json
    assert [c["text"] for c in found["choices"]] == expected and found[
        "object"
    ] == "text_completion"
    usual = offline.generate(texts[0], raw=True, max_tokens=16).text
    assert post(server.app, PLAIN, {"prompt": texts[0]}).json["choices"][0]["text"] == usual
    told = post(server.app, PLAIN, {"prompt": texts[0], "max_tokens": 6, "logprobs": 2}).json
    found = told["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 6
    body = {"prompt": texts[0], "max_tokens": 6, "stream": True, "echo": True}
    stream = post(server.app, PLAIN, body).events
    assert "".join(e["choices"][0]["text"] for e in stream) == texts[0] + expected[0]


def test_logprobs_of_a_chat(server):
    body = {"messages": HI, "max_tokens": 5, "logprobs": True, "top_logprobs": 3}
    told = post(server.app, CHAT, body).json["choices"][0]["logprobs"]["content"]
    assert len(told) == 5 and all(len(one["top_logprobs"]) == 3 for one in told)
    for one in told:  # greedy, so it is the likeliest
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0
        assert bytes(one["bytes"]).decode() == one["token"]
    stream = post(server.app, CHAT, body | {"stream": True}).events
    parts = [c["logprobs"]["content"] for e in stream for c in e["choices"] if c["logprobs"]]
    assert [one["token"] for part in parts for one in part] == [one["token"] for one in told]
    wrong = post(server.app, CHAT, {"messages": HI, "top_logprobs": 2})
    assert wrong.status == 400 and wrong.json["error"]["param"] == "top_logprobs"


def test_tools_reach_the_template(make_tiny, tmp_path):
    import shutil

    folder = shutil.copytree(make_tiny("llama", tokenizer=True), tmp_path / "tools")
    template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}"
        "{{ m.role }}:{{ m.content }}{{ m.tool_calls[0].id if m.tool_calls }};{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(template)
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {}}}
    turns = [*HI, {"role": "assistant", "content": None, "tool_calls": [{"id": "c1"}]}]
    turns.append({"role": "tool", "content": "fox", "tool_call_id": "c1"})
    with serving(folder, room=Shared(sequences=1, context_tokens=200, kv_tokens=200)) as server:
        seen, real = [], server.service.prompts.encode
        server.service.prompts.encode = lambda text, **o: seen.append(text) or real(text, **o)
        body = {"messages": turns, "tools": [tool], "max_tokens": 1}
        assert post(server.app, CHAT, body).status == 200
        assert post(server.app, CHAT, body | {"tool_choice": "none"}).status == 200
        assert seen[0] == "[look_up]user:the quick fox;assistant:c1;tool:fox;"
        assert not seen[1].startswith("[look_up]")
        forced = post(server.app, CHAT, body | {"tool_choice": "required"})
        assert forced.status == 400 and forced.json["error"]["param"] == "tool_choice"


# --- who leaves, and what fails


def slowed(monkeypatch, seconds):
    real = Run.sweep

    def sweep(self, *arguments):
        time.sleep(seconds)
        return real(self, *arguments)

    monkeypatch.setattr(Run, "sweep", sweep)


@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_frees_what_was_set_aside(server, monkeypatch, streams):
    slowed(monkeypatch, 0.02)
    body = {"messages": HI, "max_tokens": 80, "stream": streams, "ignore_eos": True}

    async def leaving():
        askings = [ask(server.app, "POST", CHAT, body) for _ in range(6)]  # two of them wait
        while server.desk.state.running < 4:
            await asyncio.sleep(0.01)
        for asking in askings:
            asking.leave()
        await asyncio.gather(*(asking.over() for asking in askings))
        start = server.desk.state.sweeps
        while server.desk.unfinished:
            await asyncio.sleep(0.01)
        return server.desk.state.sweeps - start

    assert asyncio.run(asyncio.wait_for(leaving(), 30)) <= 2
    settled(server)
    assert server.desk.state.reserved_tokens == 0
    assert post(server.app, CHAT, {"messages": HI, "max_tokens": 2}).status == 200


@pytest.mark.parametrize("streams", [True, False])
def test_who_goes_away_while_the_prompt_is_read_holds_nothing(server, monkeypatch, streams):
    """Before anything of the answer was sent."""
    maker = type(server.service.maker)
    real = maker.plain_ids
    monkeypatch.setattr(maker, "plain_ids", lambda *a, **k: time.sleep(0.2) or real(*a, **k))
    body = {"prompt": "the fox", "max_tokens": 200, "stream": streams, "ignore_eos": True}

    async def leaving():
        asking = ask(server.app, "POST", PLAIN, body)
        await asyncio.sleep(0.05)
        assert server.service.unanswered == 1 and not server.desk.unfinished
        asking.leave()
        await asking.over()

    asyncio.run(leaving())
    settled(server)


def test_the_end_waits_for_what_was_counted_in():
    """A prompt that is being made tokens is no order yet, and a stream may be told late."""
    desk = SimpleNamespace(unfinished=0, withdraw_all=lambda: None)
    service = SimpleNamespace(desk=desk, draining=False, unanswered=1, log=lambda line: None)
    server = running.Server(uvicorn.Config(None), service, drain_s=30.0)
    server.handle_exit(15, None)
    time.sleep(0.2)
    assert service.draining and not server.should_exit
    service.unanswered = 0
    until = time.monotonic() + 10
    while not server.should_exit:
        assert time.monotonic() < until
        time.sleep(0.01)
    impatient = running.Server(uvicorn.Config(None), service, drain_s=0.1)
    service.draining, service.unanswered = False, 1
    impatient.handle_exit(15, None)
    while not impatient.should_exit:
        assert time.monotonic() < until
        time.sleep(0.01)


@asynccontextmanager
async def listening(app):
    """An application behind our uvicorn; gives its address."""
    at = running._listen("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(app, http=running._Impatient, lifespan="off", log_config=None)
    )
    server.capture_signals = nullcontext
    task = asyncio.ensure_future(server.serve(sockets=[at]))
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield at.getsockname()
    finally:
        server.should_exit = True
        await task


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
BODILESS = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"


BEFORE = {  # what is asked, how long its answer takes, what comes then
    "first": ([], 0.4, b"GET / HT"),
    "second": ([GET], 0.4, b"GET / HT"),
    "third": ([GET, GET], 0.4, b"GET / HT"),
    "answered before its body": ([BODILESS], 0.0, b"x"),
}


def test_a_connection_that_does_not_say_what_it_wants_is_closed(monkeypatch):
    """Neither at first nor after it was answered; one that waits for its answer is not."""
    monkeypatch.setattr(running, "HEADERS_S", 0.3)

    async def asked(before, takes_s, last):
        async def app(scope, receive, send):
            await asyncio.sleep(takes_s)
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        async with listening(app) as address:
            reader, writer = await asyncio.open_connection(*address)
            for request in before:
                writer.write(request)
                assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(
                    b"HTTP/1.1 204"
                )
            writer.write(last)
            start = time.monotonic()
            assert await asyncio.wait_for(reader.read(), 3) == b""
            writer.close()
        return time.monotonic() - start

    async def all_of_them():
        return await asyncio.gather(*(asked(*one) for one in BEFORE.values()))

    took = dict(zip(BEFORE, asyncio.run(all_of_them()), strict=True))
    assert all(seconds < 3.0 for seconds in took.values()), took


def test_a_client_that_takes_next_to_nothing_is_cut_off(monkeypatch):
    """What is sent is kept for nobody for ever; who is slow but takes it gets all of it."""
    monkeypatch.setattr(running, "SEND_S", 0.3)
    looked, look = [], running._Impatient._look

    def looks(own, before):
        looked.append(own.transport.get_extra_info("sockname"))
        look(own, before)

    monkeypatch.setattr(running._Impatient, "_look", looks)

    async def all_of_them():
        next_to_nothing = [(takes, whole) for takes in (0, 1) for whole in (True, False)]
        slow = [(2**23, 1.2, True), (2**21, 0.6, False)]  # longer than is looked after
        cut_off = [_takes_little(*one) for one in next_to_nothing]
        return await asyncio.gather(*cut_off, *(_takes_all(*one) for one in slow))

    *cut_off, in_one_piece, _ = asyncio.run(all_of_them())  # many are taken one by one
    assert {*cut_off, in_one_piece} <= {*looked}


@asynccontextmanager
async def _sending(size, whole):
    """A server that sends so much; gives its address, and what says that the client is gone."""
    pieces = [b"x" * size] if whole else [b"x" * 2**16] * (size // 2**16)
    gone = asyncio.Event()

    async def app(scope, receive, send):
        length = [(b"content-length", b"%d" % size)]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await receive()
        for place, piece in enumerate(pieces):
            more = place < len(pieces) - 1
            await send({"type": "http.response.body", "body": piece, "more_body": more})
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    async with listening(app) as address:
        yield address, gone


async def _takes_little(takes, whole):
    loop = asyncio.get_running_loop()
    async with _sending(2**23, whole) as (address, gone):
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.setblocking(False)
            await loop.sock_connect(client, address)
            await loop.sock_sendall(client, GET)
            start = time.monotonic()
            while not gone.is_set() or _connections(address):
                assert time.monotonic() - start < 5, (takes, whole)
                if takes:
                    await loop.sock_recv(client, takes)
                await asyncio.sleep(0.02)
    return address


async def _takes_all(size, takes_s, whole):
    loop, found = asyncio.get_running_loop(), 0
    async with _sending(size, whole) as (address, _):
        with socket.socket() as client:
            client.setblocking(False)
            await loop.sock_connect(client, address)
            await loop.sock_sendall(client, LAST)
            start = time.monotonic()
            while part := await loop.sock_recv(client, 2**17):
                found += len(part)
                await asyncio.sleep(start + takes_s * found / size - time.monotonic())
            assert time.monotonic() - start > running.SEND_S
    assert 0 < found - size < 200, (whole, found)  # headers
    return address


def _connections(address):
    """Connections of a port that somebody here has not closed."""
    port = f":{address[1]:04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    return [row for row in rows if row[1].endswith(port) and row[3] == "01"]


SENT = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = b'{"prompt": "the", "max_tokens": 1}'
CHUNKED = b"22\r\n" + BODY + b"\r\n0\r\n\r\n"
INNER = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 34\r\nContent-Length: 35\r\n",
        b"Content-Length: 34, 35\r\n",
        b"Content-Length: +34\r\n",
        b"Content-Length: -1\r\n",
        b"Content-Length: 34\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Content-Length: 34\r\nHost: evil.example\r\n",
        b"Content-Length: 34\r\nX: a\x00b\r\n",
        b"Content-Length: 34\r\nX: " + b"a" * 200_000 + b"\r\n",
    ],
)
def test_a_request_is_where_its_headers_say_or_nowhere(server, headers):
    """What is behind the one that is refused is not answered as another."""

    async def asked():
        async with listening(server.app) as address:
            reader, writer = await asyncio.open_connection(*address)
            body = CHUNKED if b"chunked" in headers else BODY
            writer.write(SENT + headers + b"\r\n" + body + INNER)
            found = b""
            with suppress(ConnectionResetError):  # what was not read of it
                while part := await asyncio.wait_for(reader.read(4096), 10):
                    found += part
            writer.close()
            return found

    found = asyncio.run(asked())
    assert found.startswith(b"HTTP/1.1 400 ") or (not found and len(headers) > 65536)
    assert found.count(b"HTTP/1.1 ") <= 1


def test_comments_come_while_a_pass_takes_long(tiny_model, monkeypatch):
    slowed(monkeypatch, 0.3)
    room = Shared(sequences=1, context_tokens=128, kv_tokens=128)
    with serving(tiny_model, room=room, ping_s=0.06) as server:
        body = {"messages": HI, "max_tokens": 2, "stream": True}
        stream = post(server.app, CHAT, body)
        assert stream.text.count(": still working\n\n") >= 3
        assert len(stream.events) >= 2


def test_a_fault_within_an_answer_is_told_and_costs_only_that(server, offline, monkeypatch):
    real = server.engine.sweep

    def sweep(texts, drafts, whole=()):
        if any(tokens[:2] == [9, 9] for _, tokens in texts):
            raise DeviceError("no memory for that at 0x7f0012345678")
        return real(texts, drafts, whole)

    monkeypatch.setattr(server.engine, "sweep", sweep)

    async def both():
        bad = ask(server.app, "POST", PLAIN, {"prompt": [9, 9, 9], "max_tokens": 5})
        streaming = {"prompt": [9, 9, 8], "max_tokens": 5, "stream": True}
        worse = ask(server.app, "POST", PLAIN, streaming)
        good = ask(server.app, "POST", CHAT, {"messages": HI, "max_tokens": 8})
        return await asyncio.gather(bad.over(), worse.over(), good.over())

    bad, worse, good = asyncio.run(both())
    assert bad.status == 500 and bad.headers["x-should-retry"] == "false"
    assert "no memory" in bad.json["error"]["message"]
    assert worse.status == 200 and "no memory" in worse.events[-1]["error"]["message"]
    assert said(good) == offline.generate(HI, max_tokens=8).text
    settled(server)


def test_an_engine_that_breaks_says_so(tiny_model, monkeypatch):
    room = Shared(sequences=1, context_tokens=128, kv_tokens=128)
    with serving(tiny_model, room=room) as server:

        def broken(*_):
            raise ValueError("a fault of the program at 0x7f00")

        monkeypatch.setattr(Run, "sweep", broken)
        first = post(server.app, CHAT, {"messages": HI})
        later = post(server.app, CHAT, {"messages": HI})
        assert (first.status, later.status, get(server.app, "/health").status) == (500, 503, 503)
        assert later.headers["x-should-retry"] == "false"


def test_whatever_fails_as_an_order_is_taken_in_nobody_waits_for_ever(tiny_model, monkeypatch):
    def broken(*_):
        raise RuntimeError("no more of it")

    room = Shared(sequences=2, context_tokens=128, kv_tokens=256)
    with serving(tiny_model, room=room) as server:
        monkeypatch.setattr(Crowd, "join", broken)
        found = post(server.app, CHAT, {"messages": HI, "max_tokens": 4, "n": 2})
        assert found.status == 500 and "the engine failed" in found.text
        settled(server)


def test_an_order_that_is_being_taken_in_is_withdrawn_with_all(server, monkeypatch):
    real = Crowd.join

    def joined(*given):
        assert server.desk.unfinished == 1
        server.desk.withdraw_all()
        return real(*given)

    monkeypatch.setattr(Crowd, "join", joined)
    found = post(server.app, CHAT, {"messages": HI, "max_tokens": 80, "ignore_eos": True})
    assert found.status == 503 and "the server ended the answer" in found.text
    settled(server)


def test_more_than_may_wait_are_refused(tiny_model, monkeypatch):
    slowed(monkeypatch, 0.02)
    room = Shared(sequences=1, context_tokens=128, kv_tokens=128)
    with serving(tiny_model, room=room, queue=2) as server:

        async def many():
            body = {"messages": HI, "max_tokens": 4}
            askings = [ask(server.app, "POST", CHAT, body) for _ in range(9)]
            await asyncio.gather(*(asking.over() for asking in askings))
            return askings

        found = asyncio.run(many())
        assert sorted(a.status for a in found) == [200] * 3 + [429] * 6
        for refused in (a for a in found if a.status == 429):
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json["error"]["code"] == "queue_full"
        server.service.draining = True
        assert post(server.app, CHAT, {"messages": HI}).status == 503
        assert get(server.app, "/health").json == {"status": "ending"}


@pytest.mark.parametrize("stream", [False, True])
def test_a_list_has_as_many_places_as_are_counted(server, offline, monkeypatch, stream):
    """The rest of it comes to the desk as others of it end, and all are answered."""
    placed, real = [], Desk.place

    def place(self, order):
        real(self, order)
        placed.append(self.unfinished)

    monkeypatch.setattr(Desk, "place", place)
    monkeypatch.setattr(server.service, "offer", replace(server.service.offer, queue=7))
    texts = [f"the {one} {other}" for one in WORDS for other in WORDS][:30]
    body = {"prompt": texts, "max_tokens": 2, "temperature": 0.8, "seed": 3, "stream": stream}

    async def both():
        first = ask(server.app, "POST", PLAIN, body)
        while not placed:
            await asyncio.sleep(0.001)
        second = await ask(server.app, "POST", PLAIN, body).over()
        return await first.over(), second

    first, second = asyncio.run(both())
    assert (first.status, second.status) == (200, 429) and "8 answers are in" in second.text
    assert len(placed) == 30 and max(placed) <= 8
    found = [""] * 30
    for event in first.events if stream else [first.json]:
        for choice in event["choices"]:
            found[choice["index"]] += choice["text"]
    options = {"raw": True, "max_tokens": 2, "temperature": 0.8, "seed": 3}
    for place in (0, 9, 29):
        assert found[place] == offline.generate(texts[place], **options).text
    settled(server)


def test_the_document_tells_of_every_route(server):
    told = get(server.app, "/openapi.json").json
    routes = {
        (route.path.replace(":path", ""), method.lower())
        for route in server.app.app.routes
        for method in route.methods - {"HEAD"}
    }
    assert {(p, m) for p, operations in told["paths"].items() for m in operations} == routes
    chat = told["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = told["components"]["schemas"][chat["$ref"].rpartition("/")[2]]
    assert body["required"] == ["messages"] and body["properties"].keys() >= {"seed", "stop", "n"}
    assert body["properties"]["model"]["enum"] == ["tiny", None]
    assert {path for path, method in routes if method == "post"} == guards.READING
    wrong = get(server.app, CHAT)
    assert wrong.status == 405 and wrong.headers["allow"] == "POST"
    assert "this route is not for GET: use POST" in wrong.text
    wrong = post(server.app, "/health", b"x", {"content-type": "text/plain"})
    assert wrong.status == 405 and wrong.headers["allow"] == "GET"


# --- what is refused


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"", None),
        (b"[]", None),
        (b"\xff\xfe", None),
        (b"{" * 100_000, None),
        (b"[" * 200_000, None),
        (b'{"messages": ' + b"9" * 5000 + b"}", None),
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}] * 5000}, "messages"),
        ({"messages": [{"content": "a"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages.0.content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages.0.content",
        ),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', None),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}', "temperature"),
        ({"messages": HI, "temperature": -1}, "temperature"),
        ({"messages": HI, "temperature": 1, "top_p": 0}, "top_p"),
        ({"messages": HI, "max_tokens": 2**63}, "max_tokens"),
        ({"messages": HI, "max_tokens": -1}, "max_tokens"),
        ({"messages": HI, "max_tokens": True}, "max_tokens"),
        ({"messages": HI, "max_tokens": "7"}, "max_tokens"),
        ({"messages": HI, "max_tokens": 1.5}, "max_tokens"),
        ({"messages": HI, "n": 10**9}, "n"),
        ({"messages": HI, "n": 0}, "n"),
        ({"messages": HI, "top_logprobs": 10**9, "logprobs": True}, "top_logprobs"),
        ({"messages": HI, "stop": ["a"] * 5}, "stop"),
        ({"messages": HI, "stop": "x" * 201}, "stop"),
        ({"messages": HI, "stop": [""]}, "stop"),
        ({"messages": HI, "stop": {"a": 1}}, "stop"),
        ({"messages": HI, "logit_bias": {str(i): 5 for i in range(10**5)}}, "logit_bias"),
        ({"messages": HI, "presence_penalty": 1.0}, "presence_penalty"),
        ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": HI, "tools": [{}] * 200}, "tools"),
        ({"messages": HI, "functions": [{"name": "x"}]}, "functions"),
        ({"messages": HI, "chat_template": "{{ 1 }}"}, "chat_template"),
        ({"messages": HI, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"messages": HI, "guided_json": {}, "guided_regex": "(a+)+$"}, "guided_regex"),
        ({"messages": HI, "seed": 2**70}, "seed"),
    ],
)
def test_nonsense_is_one_sentence(server, body, param):
    found = post(server.app, CHAT, body)
    assert found.status == 400, found.text
    error = found.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert not re.search(r"0x[0-9a-f]{6}|Traceback|\.py\b|/tmp/|/srv/", found.text)
    assert len(found.text) < 1500


@pytest.mark.parametrize(
    "prompt", ["", [], [[]], [""], [300], [-1], [2**70], {"a": 1}, ["a", 7], [[1], "", [2]], None]
)
def test_prompts_that_are_none(server, prompt):
    for more in ({}, {"echo": True}):
        found = post(server.app, PLAIN, {"prompt": prompt} | more)
        assert found.status == 400 and found.json["error"]["message"], found.text
    assert post(server.app, PLAIN, {"prompt": "the", "suffix": "x"}).status == 400
    assert get(server.app, "/health").status == 200


@pytest.mark.parametrize(
    "text",
    [
        "a\x00b",
        "\x00",
        "\u202efox\u202c the",
        "\u200bfox\u2066",
        "\ufefffox",
        "\x1b[31mfox\x07",
        "\x85",
    ],
    ids=ascii,
)
def test_any_character_may_be_asked(server, offline, text):
    asked = [{"role": "user", "content": text + " the"}]
    found = post(server.app, CHAT, {"messages": asked, "max_tokens": 3})
    assert found.status == 200 and said(found) == offline.generate(asked, max_tokens=3).text
    found = post(server.app, PLAIN, {"prompt": text, "max_tokens": 1, "echo": True})
    assert found.status == 200 and found.json["choices"][0]["text"].startswith(text)
    named = post(server.app, CHAT, {"messages": asked, "model": text})
    assert named.status == 404 and len(named.json["error"]["message"]) < 200


def test_no_address_in_a_request_is_asked(server, monkeypatch, tmp_path):
    """Neither here nor in the processes that read texts."""
    asked = tmp_path / "asked"
    hook = (
        "import sys; sys.addaudithook(lambda event, given: event.startswith(('socket.connect', "
        "'socket.getaddrinfo', 'socket.sendto', 'urllib.')) and "
        f"open({str(asked)!r}, 'a').write(event + chr(10))); "
    )
    monkeypatch.setattr(process, "_CODE", hook + process._CODE)
    monkeypatch.setattr(process, "subprocess", subprocess)  # no forks: what they import, too
    for reader in (server.service.prompts._process, server.service.reading._process):
        reader.close()  # the next begins with the hook
    events, records = [], [True]
    names = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.")

    def seen(event, given):
        if records and event.startswith(names):
            events.append(event)

    sys.addaudithook(seen)
    url = "http://127.0.0.1:9/x.png"
    text = {"type": "text", "text": f"look at {url} and file:///etc/passwd"}
    tool = {"type": "function", "function": {"name": "t", "parameters": {"$ref": url}}}
    for parts, status in (
        ([text], 200),
        ([text, {"type": "image_url", "image_url": {"url": url}}], 400),
        ([text, {"type": "input_audio", "input_audio": {"url": url}}], 400),
        ([text, {"type": "file", "file": {"file_id": url}}], 400),
    ):
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
        assert post(server.app, CHAT, body).status == status
        post(server.app, CHAT, body | {"tools": [tool], "user": url, "metadata": {"url": url}})
        post(server.app, "/tokenize", {"messages": body["messages"]})
    assert post(server.app, PLAIN, {"prompt": url, "max_tokens": 1}).status == 200
    assert post(server.app, CHAT, {"messages": HI, "model": url}).status == 404
    assert events == [] and not asked.exists()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)
    records.clear()
    assert "socket.connect" in events


def test_a_prompt_that_is_too_long_says_both_numbers(server):
    found = post(server.app, PLAIN, {"prompt": [5] * 256})
    assert found.status == 400 and found.json["error"]["code"] == "context_length_exceeded"
    assert "256 tokens" in found.text and "room for 256" in found.text
    longest = post(server.app, PLAIN, {"prompt": [5] * 255, "max_tokens": 50, "ignore_eos": True})
    assert longest.json["choices"][0]["finish_reason"] == "length"
    assert longest.json["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("chats", [True, False])
def test_a_text_that_cannot_fit_is_refused_before_it_is_made_tokens(server, monkeypatch, chats):
    """A few of 8 MB would keep the prompts of all others waiting."""
    made = []
    tokenizer = type(server.service.prompts)
    real = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda *a, **k: made.append(a) or real(*a, **k))
    longest = max(map(len, server.service.prompts.get_vocab()))
    route, param = (CHAT, "messages") if chats else (PLAIN, "prompt")

    def asked(text):
        given = [{"role": "user", "content": text}] if chats else text
        found = post(server.app, route, {param: given})
        assert found.status == 400 and found.json["error"]["code"] == "context_length_exceeded"
        return found.json["error"]["message"]

    assert f"{256 * longest + 1} characters" in asked("x" * (256 * longest + 1)) and not made
    assert "tokens, there is room for 256" in asked("x" * (250 * longest)) and made
    made.clear()
    for role in ("user", "assistant") if chats else ("",):
        given = "x" * (256 * longest + 1)
        given = [{"role": role, "content": given}, *HI] if chats else given
        for path in (route, "/tokenize"):
            found = post(server.app, path, {param: given})
            assert found.json["error"]["code"] == "context_length_exceeded" and not made


def test_a_tokenizer_that_fails_at_a_long_text_is_a_sentence(server, monkeypatch):
    def fails(self):
        raise CheckpointError(f"the tokenizer of {self.folder} took more than 10 s")

    monkeypatch.setattr(type(server.service.prompts), "get_vocab", fails)
    monkeypatch.setattr(server.service.maker, "_longest", 0)
    monkeypatch.setattr(server.service.reading, "_own", None)
    long = "x" * (8 * 256 + 1)
    chat = {"messages": [{"role": "user", "content": long}]}
    for path in (CHAT, PLAIN, "/tokenize"):
        found = post(server.app, path, chat if path == CHAT else {"prompt": long})
        assert found.status == 400 and "took more than 10 s" in found.text, found.text
        assert str(server.service.prompts.folder) not in found.text


def test_texts_that_are_not_to_be_answered_keep_no_prompt_waiting(server, monkeypatch):
    """They are counted too, those of clients that left among them."""
    go, real = threading.Event(), TextProcess.request

    def request(self, operation, limits, **given):
        with self._lock:
            if given.get("text") == "slow":
                assert go.wait(20)
            return real(self, operation, limits, **given)

    monkeypatch.setattr(TextProcess, "request", request)
    monkeypatch.setattr(reading, "MOST_TEXTS", 3)

    async def asked():
        slow = [ask(server.app, "POST", "/tokenize", {"prompt": "slow"}) for _ in range(3)]
        await asyncio.sleep(0.1)
        slow[1].leave()
        more = [await ask(server.app, "POST", "/detokenize", {"tokens": [5]}).over()]
        more.append(await ask(server.app, "POST", "/tokenize", {"messages": HI}).over())
        bodies = [{"prompt": "the fox", "max_tokens": 2}] * 9  # more than threads of asyncio's own
        answers = [ask(server.app, "POST", PLAIN, body) for body in bodies]
        answers = [await asyncio.wait_for(one.over(), 15) for one in answers]
        assert not any(one.status for one in slow)
        go.set()
        return [await one.over() for one in slow], more, answers

    slow, more, answers = asyncio.run(asked())
    assert [one.status for one in (*slow, *answers)] == [200] * 12
    assert slow[0].json["count"] == len(slow[0].json["tokens"]) > 0
    for one in more:
        assert one.status == 429 and int(one.headers["retry-after"]) >= 1
    assert post(server.app, "/tokenize", {"prompt": "the"}).status == 200


def test_the_end_waits_for_no_text(tiny_model):
    """Neither for one that is being read nor for those behind it, whatever holds them up."""
    room = Shared(sequences=1, context_tokens=128, kv_tokens=128)
    with serving(tiny_model, room=room) as server:
        readers = (server.service.prompts._process, server.service.reading._process)
        assert post(server.app, "/tokenize", {"prompt": "the"}).status == 200
        for reader in readers:
            os.kill(reader.pid, signal.SIGSTOP)

        async def ended():
            body = {"prompt": "the fox"}
            asked = [ask(server.app, "POST", path, body) for path in (PLAIN, "/tokenize") * 2]
            await asyncio.sleep(0.2)
            assert not any(one.task.done() for one in asked)
            server.service.end()
            await asyncio.wait([one.task for one in asked], timeout=10)
            return [one.task.done() for one in asked]

        assert all(asyncio.run(ended()))
        assert [reader.pid for reader in readers] == [None, None]


def test_head_is_answered_as_get_is(server):
    """As who watches a server asks; over a socket uvicorn leaves the body out."""

    async def asked(path):
        return await ask(server.app, "HEAD", path).over()

    for path, status in (("/health", 200), ("/", 200), ("/nothing", 404), (CHAT, 405)):
        assert asyncio.run(asked(path)).status == status
    assert asyncio.run(asked("/health")).headers["content-type"] == "application/json"


def test_another_model_is_not_here(server):
    found = post(server.app, CHAT, {"model": "gpt\x1b[31m", "messages": HI})
    assert found.status == 404 and found.json["error"]["code"] == "model_not_found"
    assert "there is tiny" in found.json["error"]["message"] and "\\u001b" not in found.text
    assert get(server.app, "/v1/models").json["data"][0]["id"] == "tiny"
    assert get(server.app, "/v1/models/tiny").json["id"] == "tiny"
    assert get(server.app, "/v1/models/other").status == get(server.app, "/v2").status == 404
    assert get(server.app, CHAT).status == 405


def test_a_template_that_loops_costs_one_request(make_tiny, tmp_path, monkeypatch):
    """It runs in a process of its own, so answers and /health go on meanwhile."""
    import shutil

    monkeypatch.setattr(tokenizer, "_RENDER_S", 0.6)
    folder = shutil.copytree(make_tiny("llama", tokenizer=True), tmp_path / "bomb")
    loop = "{% for i in range(99999) %}"
    end = "{% endfor %}"
    bomb = "{% if 'bomb' in messages[-1].content %}" + loop * 2 + end * 2 + "{% endif %}"
    escape = "{{ cycler.__init__.__globals__ if 'escape' in messages[-1].content }}"
    turns = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(bomb + escape + turns)
    with serving(folder, room=Shared(sequences=2, context_tokens=128, kv_tokens=200)) as server:

        async def together():
            body = {"messages": [{"role": "user", "content": "bomb"}]}
            bad = ask(server.app, "POST", CHAT, body)
            plain = ask(server.app, "POST", PLAIN, {"prompt": [1, 2, 3], "max_tokens": 4})
            await plain.over()
            await ask(server.app, "GET", "/health").over()
            meanwhile = not bad.task.done()
            return await bad.over(), plain, meanwhile

        bad, plain, meanwhile = asyncio.run(together())
        assert bad.status == 400 and "ran for more than" in bad.text and str(folder) not in bad.text
        assert plain.status == 200 and meanwhile
        escaping = {"messages": [{"role": "user", "content": "escape"}], "max_tokens": 1}
        assert post(server.app, CHAT, escaping).status == 400
        assert post(server.app, CHAT, {"messages": HI, "max_tokens": 1}).status == 200


# --- guards


def test_bodies_are_small_whole_and_json(server, monkeypatch):
    large = post(server.app, CHAT, [b"x" * 2**20] * 9)
    told = post(server.app, CHAT, b"{}", {"content-length": str(2**40)})
    assert large.status == told.status == 413 and str(guards.MOST_BODY_BYTES) in large.text
    for kind in ("text/plain", "application/x-www-form-urlencoded", None):
        refused = post(server.app, CHAT, {"messages": HI}, {"content-type": kind})
        assert refused.status == 415 and "send that header" in refused.text
    many = {f"x-{i}": "1" for i in range(200)}
    assert post(server.app, CHAT, {"messages": HI}, many).status == 431
    monkeypatch.setattr(guards, "BODY_S", 0.05)

    async def slow():
        asking = ask(server.app, "POST", CHAT, [b"{", b"x"])
        asking._body.pop()  # the rest never comes
        return await asking.over()

    assert asyncio.run(slow()).status == 408


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "a/health?x=", "", None]
)
def test_a_name_that_is_not_ours_is_refused(server, host):
    found = post(server.app, CHAT, {"messages": HI}, {"host": host})
    assert found.status == 403 and found.json["error"]["type"] == "permission_error"
    for ours in ("localhost:8080", "[::1]:80", "127.0.0.1", "LOCALHOST"):
        assert get(server.app, "/health", {"host": ours}).status == 200


def test_pages_of_other_places_may_not_ask(server):
    other = {"origin": "https://evil.example"}
    found = post(server.app, CHAT, {"messages": HI}, other)
    assert found.status == 403 and "access-control-allow-origin" not in found.headers
    assert get(server.app, "/props", {"origin": "null"}).status == 403
    for none in ("http://[", "http://[::1", "http://a]b", "http://a\u00bcb", "//", "", "\x00"):
        refused = get(server.app, "/props", {"origin": none})
        assert refused.status == 403 and refused.json["error"]["type"] == "permission_error"
    own = {"origin": "http://127.0.0.1:8080", "host": "127.0.0.1:8080"}
    assert get(server.app, "/props", own).status == 200
    allowed = replace(server.app, rules=Rules(origins=("https://chat.example",)))

    async def preflight(app, origin):
        return await ask(app, "OPTIONS", CHAT, b"", {"origin": origin}).over()

    good = asyncio.run(preflight(allowed, "https://chat.example"))
    assert good.status == 204
    assert good.headers["access-control-allow-origin"] == "https://chat.example"
    assert asyncio.run(preflight(allowed, "https://evil.example")).status == 403
    assert asyncio.run(preflight(server.app, "https://chat.example")).status == 403


def test_every_route_but_two_wants_the_key(server, monkeypatch):
    keyed = replace(server.app, rules=Rules(key="abcdefgh-secret"))
    routes = {(m, r.path) for r in server.app.app.routes for m in getattr(r, "methods", ())}
    assert len(routes) > 9
    compared = []
    real = guards.hmac.compare_digest
    monkeypatch.setattr(
        guards.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b)
    )

    async def status(method, path, headers):
        asking = ask(keyed, method, path.replace("{name:path}", "tiny"), b"{}", headers)
        return (await asking.over()).status

    for method, path in routes:
        public = path in ("/", "/health")
        for wrong in ({}, {"authorization": "Bearer abcdefgh"}, {"authorization": "Basic x"}):
            found = asyncio.run(status(method, path, wrong))
            assert (found == 401) is not public, (method, path)
        right = {"authorization": "Bearer abcdefgh-secret"}
        assert asyncio.run(status(method, path, right)) != 401
    assert b"abcdefgh" in compared


def test_answers_are_named_and_faults_tell_nothing(server, monkeypatch):
    named = get(server.app, "/health", {"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    for bad in ("a b", "x" * 200, "\x1b[31m"):
        assert re.fullmatch(
            r"req-\w+", get(server.app, "/health", {"x-request-id": bad}).headers["x-request-id"]
        )
    assert get(server.app, "/health").headers["x-content-type-options"] == "nosniff"

    def broken(*_):
        raise RuntimeError("secret at 0x7f001234 in /srv/x.py")

    monkeypatch.setattr(app_module, "_look", broken)

    async def fault():
        asking = ask(server.app, "GET", "/props")
        with pytest.raises(RuntimeError):  # starlette tells the server of it too
            await asking.over()
        return asking

    found = asyncio.run(fault())
    assert found.status == 500 and "secret" not in found.text and "error" in found.json


def test_logs_have_no_prompts_unless_asked(tiny_model):
    room = Shared(sequences=1, context_tokens=128, kv_tokens=128)
    for asked in (False, True):
        with serving(tiny_model, room=room, logs_prompts=asked) as server:
            lines = []
            server.service.log = lines.append
            post(server.app, CHAT, {"messages": HI, "max_tokens": 2})
            assert len(lines) == 1 and "2 tokens" in lines[0]
            assert ("quick fox" in lines[0]) is asked


# --- looks


def test_metrics_are_what_prometheus_reads(server):
    post(server.app, CHAT, {"messages": HI, "max_tokens": 6})
    settled(server)
    text = get(server.app, "/metrics").text
    values, kinds = {}, {}
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            kinds[line.split()[2]] = line.split()[3]
        elif not line.startswith("#"):
            name, value = re.fullmatch(r"([a-z0-9_:]+\{[^{}]*\}) (-?[0-9.e+-]+)", line).groups()
            assert name not in values
            values[name] = float(value)
    names = {name.partition("{")[0] for name in values}
    ours = {re.sub(r"_(bucket|sum|count)$", "", n) if n not in kinds else n for n in names}
    assert ours <= kinds.keys() and all(f"# HELP {n} " in text for n in kinds)
    label = '{model_name="tiny"}'
    assert values["vllm:num_requests_running" + label] == 0
    assert values["vllm:generation_tokens_total" + label] >= 6
    drafted = values["vllm:spec_decode_num_draft_tokens_total" + label]
    accepted = values["vllm:spec_decode_num_accepted_tokens_total" + label]
    by_place = sum(v for n, v in values.items() if "_per_pos_total" in n)
    assert 0 <= accepted == by_place <= drafted
    for name in ("layer_bytes_total", "link_bytes_per_second", "overlap_ratio", "acceptance_rate"):
        assert f"offload_rt:{name}{label}" in values
    bucket = [v for n, v in values.items() if n.startswith("vllm:e2e_request_latency_seconds_b")]
    assert bucket == sorted(bucket)
    assert bucket[-1] == values["vllm:e2e_request_latency_seconds_count" + label] > 0
    later = get(server.app, "/metrics").text
    assert "vllm:generation_tokens_total" in later and later.count("\n") == text.count("\n")


def metric(server, name, **labels):
    text = "".join(f',{key}="{value}"' for key, value in labels.items())
    found = re.search(
        rf"^{re.escape(name)}{{model_name=\"tiny\"{text}}} (\S+)$",
        get(server.app, "/metrics").text,
        re.MULTILINE,
    )
    return float(found[1])


def test_ends_and_gaps_are_counted_as_vllm_counts_them(tiny_model, monkeypatch):
    """Each reason is there from the start, and of tokens that come together one gap is seen."""
    ended, gaps = "vllm:request_success_total", "vllm:inter_token_latency_seconds"
    room = Shared(sequences=1, context_tokens=128, kv_tokens=128)
    with serving(tiny_model, room=room, options={"draft": "none"}) as server:
        reasons = ("stop", "length", "abort", "error")
        assert [metric(server, ended, finished_reason=one) for one in reasons] == [0] * 4
        assert metric(server, f"{gaps}_count") == 0
        slowed(monkeypatch, 0.05)
        body = {"messages": HI, "ignore_eos": True}
        assert post(server.app, CHAT, body | {"max_tokens": 6}).status == 200
        settled(server)
        assert metric(server, f"{gaps}_count") == 5
        assert metric(server, f"{gaps}_sum") >= 0.25
        found = post(server.app, CHAT, body | {"max_tokens": 40, "stop": ["e", "a", "o", "i"]})
        assert found.json["choices"][0]["finish_reason"] == "stop"

        async def leaving():
            asking = ask(server.app, "POST", CHAT, body | {"max_tokens": 60})
            while not server.desk.state.running:
                await asyncio.sleep(0.01)
            asking.leave()
            await asking.over()

        asyncio.run(leaving())
        settled(server)
        assert [metric(server, ended, finished_reason=one) for one in reasons] == [1, 1, 1, 0]


def test_the_page_needs_nothing_from_elsewhere(server):
    found = get(server.app, "/")
    assert found.status == 200 and found.headers["content-type"].startswith("text/html")
    assert not re.search(
        r"https?://|//cdn|innerHTML|@import|<script src|<link rel=.stylesheet", found.text
    )
    policy = found.headers["content-security-policy"]
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2
    told = get(server.app, "/props").json
    for name in re.findall(r"now\.(\w+)", found.text):
        assert name in told, name


def test_text_and_tokens_there_and_back(server):
    ids = post(server.app, "/tokenize", {"prompt": "the quick fox"}).json
    assert ids["count"] == len(ids["tokens"]) and ids["max_model_len"] == 256
    assert (
        post(server.app, "/detokenize", {"tokens": ids["tokens"]}).json["prompt"] == "the quick fox"
    )
    chat = post(server.app, "/tokenize", {"messages": HI}).json["tokens"]
    assert len(chat) > len(ids["tokens"])
    for wrong in ({}, {"prompt": 7}, {"messages": []}):
        assert post(server.app, "/tokenize", wrong).status == 400
    for wrong in (
        {},
        {"tokens": [-1]},
        {"tokens": [2**70]},
        {"tokens": "a"},
        {"tokens": [5] * 257},
    ):
        assert post(server.app, "/detokenize", wrong).status == 400
    info = get(server.app, "/tokenizer_info").json
    assert info["eos_token"] == "<|im_end|>" and info["chat_template"]
    assert json.dumps(info)
