"""What serving costs: chats that arrive over time, one client, many that leave, a real client.

    python tools/bench_serving.py chats MODEL --device-memory 2GiB
    python tools/bench_serving.py overhead MODEL --device-memory 2GiB
    python tools/bench_serving.py soak MODEL
    python tools/bench_serving.py client MODEL

`chats` answers 16 chats of unequal length, all at once in a fixed batch and then arriving one after
the other. `overhead` has one client ask a server and a session in turns. `soak` has 64 clients ask
500 times, of which every tenth leaves, and compares each answer with the one made alone. `client`
drives a server with the `openai` package. Servers are processes of their own.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

import offload_rt
from offload_rt.engine import Request
from offload_rt.session.adapters import open_answering
from offload_rt.session.crowd import Crowd
from offload_rt.session.options import settings_from
from offload_rt.session.session import Logged
from offload_rt.session.shared import Shared, shared_engine
from offload_rt.text import build_prompt

_TOPICS = ("the sea", "a clock", "bread", "the moon", "old maps", "rain", "a bridge", "tea")
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog")


def main() -> None:
    """Run one of them and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["chats", "overhead", "soak", "client"])
    parser.add_argument("model")
    parser.add_argument("--device-memory", default="1GiB")
    parser.add_argument("--draft", default="none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=float, default=0.3, help="seconds between arrivals")
    parser.add_argument("--requests", type=int, default=500)
    given = parser.parse_args()
    work = {"chats": chats, "overhead": overhead, "soak": soak, "client": client}[given.what]
    print(json.dumps(work(given)))


def _options(given: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": "cpu",
        "device_memory": given.device_memory,
        "draft": given.draft,
        "dtype": given.dtype,
    }


def chats(given: argparse.Namespace) -> dict[str, Any]:
    """16 chats at once, and arriving over time, in one engine."""
    settings = settings_from(_options(given))
    model, settings = open_answering(given.model, settings, Logged())
    draw, asked = random.Random(0), []
    for place in range(16):
        text = f"Tell me {draw.randrange(2, 9)} things about {_TOPICS[place % len(_TOPICS)]}."
        length = draw.randrange(given.tokens // 4, given.tokens + 1)
        ids = build_prompt(model.tokenizer, text)
        asked.append(Request(ids=ids, max_tokens=length))
    longest = max(len(one.ids) + one.max_tokens for one in asked)
    room = Shared(sequences=16, context_tokens=longest, kv_tokens=16 * longest)
    found: dict[str, list[float]] = {"static": [], "arriving": []}
    with shared_engine(model, settings, Logged(), [room]) as (engine, _):
        for number in range(given.rounds):
            for name in ("static", "arriving"):
                engine.forget()
                speed, waits = _crowded(Crowd(model, engine), asked, given.every, name)
                found[name].append(speed)
                print(f"round {number}, {name}: {speed:.2f} tokens/s, {waits}", file=sys.stderr)
        layers = {"resident": len(engine.placement.resident), "bytes": engine.bytes_per_pass}
    ratios = [b / a for a, b in zip(found["static"], found["arriving"], strict=True)]
    return {**found, "ratio": statistics.median(ratios), "layers": layers}


def _crowded(crowd: Crowd, asked: list[Request], every_s: float, name: str) -> tuple[float, str]:
    """Tokens a second of all chats, from the first arrival to the last token."""
    start, todo, over = time.perf_counter(), list(asked), []
    while todo or crowd.busy:
        now = time.perf_counter() - start
        while todo and (name == "static" or now >= every_s * (len(asked) - len(todo))):
            crowd.join(todo.pop(0))
        if not crowd.busy:
            time.sleep(0.001)
            continue
        over += [one.member for one in crowd.advance() if one.member.is_over]
    took_s = time.perf_counter() - start
    firsts = [one.first_s - one.joined_s for one in over if one.first_s is not None]
    tokens = sum(len(one.token_ids) for one in over)
    return tokens / took_s, f"first token after {statistics.median(firsts):.2f} s"


@contextmanager
def served(given: argparse.Namespace, *more: str) -> Iterator[str]:
    """A server in a process of its own; its address."""
    command = [sys.executable, "-m", "offload_rt", "serve", given.model, "--port", "0"]
    for name, value in _options(given).items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    process = subprocess.Popen([*command, *more], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if found := re.search(r"answers at (http://[\d.:]+)/v1", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield found[1]
                return
        raise SystemExit("the server did not start")
    finally:
        process.terminate()
        process.wait()


def overhead(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an answer from a server and from a session, in turns."""
    prompt = "Tell me a long story about the sea."
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": given.tokens,
        "ignore_eos": True,
        "stream": True,
    }
    own, theirs = [], []
    session = offload_rt.load(given.model, **_options(given))
    with served(given, "--sequences", "1") as address, session, httpx.Client(timeout=600) as asks:
        for number in range(given.rounds + 1):
            start = time.perf_counter()
            session.generate(prompt, max_tokens=given.tokens, ignore_eos=True)
            middle = time.perf_counter()
            with asks.stream("POST", f"{address}/v1/chat/completions", json=body) as answer:
                for _ in answer.iter_lines():
                    pass
            end = time.perf_counter()
            if number:  # the first reads what the others find
                own.append(middle - start)
                theirs.append(end - middle)
    ratios = [b / a for a, b in zip(own, theirs, strict=True)]
    return {"session_s": own, "server_s": theirs, "ratio": statistics.median(ratios)}


def soak(given: argparse.Namespace) -> dict[str, Any]:
    """64 clients, of whose requests every tenth is left; no answer may be lost or another's."""
    draw, wishes = random.Random(1), []
    for place in range(given.requests):
        text = " ".join(draw.choice(_WORDS) for _ in range(draw.randrange(2, 20)))
        kind = draw.choice([{}, {"temperature": 1.0, "seed": place}])
        wishes.append((text, {"max_tokens": draw.randrange(1, 16), **kind}))
    with offload_rt.load(given.model, **_options(given)) as session:
        expected = [session.generate(text, **more).text for text, more in wishes]  # type: ignore[call-overload]
    found: list[str | None] = [None] * len(wishes)
    todo = iter(enumerate(wishes))

    async def one(asks: httpx.AsyncClient, url: str) -> None:
        for place, (text, more) in todo:
            body = {"messages": [{"role": "user", "content": text}], **more, "stream": True}
            async with asks.stream("POST", url, json=body) as answer:
                if answer.status_code != 200:
                    found[place] = f"status {answer.status_code}"
                    continue
                parts = []
                async for line in answer.aiter_lines():
                    if place % 10 == 9:
                        break
                    if line.startswith("data: {"):
                        piece = json.loads(line[6:])
                        parts += [c["delta"].get("content", "") for c in piece.get("choices", [])]
                        if "error" in piece:
                            parts.append(str(piece["error"]))
            found[place] = "".join(parts)

    async def all_of_them(address: str) -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=600, limits=limits) as asks:
            url = f"{address}/v1/chat/completions"
            await asyncio.gather(*(one(asks, url) for _ in range(64)))

    start = time.perf_counter()
    with served(given, "--sequences", "16", "--context", "256", "--queue", "100") as address:
        begun = time.perf_counter()
        asyncio.run(all_of_them(address))
        took_s = time.perf_counter() - begun
        time.sleep(0.5)
        metrics = httpx.get(f"{address}/metrics").text
    running = re.search(r"^vllm:num_requests_running\{.*\} (\d+)", metrics, re.MULTILINE)
    kept = [
        (f, e) for place, (f, e) in enumerate(zip(found, expected, strict=True)) if place % 10 != 9
    ]
    return {
        "asked": len(wishes),
        "compared": len(kept),
        "wrong": sum(f != e for f, e in kept),
        "running_after": running and int(running[1]),
        "s": took_s,
        "start_s": begun - start,
    }


def client(given: argparse.Namespace) -> dict[str, Any]:
    """What a program that uses the `openai` package sees."""
    import openai

    turns: Any = [{"role": "user", "content": "What is the capital of France?"}]
    with served(given, "--api-key", "a-long-secret") as address:
        known = openai.OpenAI(base_url=f"{address}/v1", api_key="a-long-secret", max_retries=0)
        (model,) = known.models.list().data
        whole = known.chat.completions.create(
            model=model.id, messages=turns, max_completion_tokens=12, logprobs=True, top_logprobs=2
        )
        pieces = known.chat.completions.create(
            model=model.id,
            messages=turns,
            max_completion_tokens=12,
            stream=True,
            stream_options={"include_usage": True},
        )
        parts = list(pieces)
        text = "".join(p.choices[0].delta.content or "" for p in parts if p.choices)
        plain = known.completions.create(
            model=model.id, prompt=[[1, 2, 3]], max_tokens=1, echo=True, logprobs=1
        )
        refusals = {}
        wrong = openai.OpenAI(base_url=f"{address}/v1", api_key="another-key", max_retries=0)
        for name, ask in {
            "key": lambda: wrong.models.list(),
            "model": lambda: known.chat.completions.create(model="other", messages=turns),
            "n": lambda: known.chat.completions.create(model=model.id, messages=turns, n=99),
        }.items():
            try:
                ask()
            except openai.APIStatusError as error:
                refusals[name] = type(error).__name__
    assert whole.usage is not None and parts[-1].usage is not None
    content = whole.choices[0].logprobs and whole.choices[0].logprobs.content
    return {
        "model": model.id,
        "text": whole.choices[0].message.content,
        "stream_is_the_same": text == whole.choices[0].message.content,
        "logprobs": len(content or ()),
        "usage": [whole.usage.completion_tokens, parts[-1].usage.completion_tokens],
        "scored": plain.choices[0].logprobs is not None,
        "refusals": refusals,
    }


if __name__ == "__main__":
    main()
