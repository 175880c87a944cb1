"""What serving costs: chats that arrive over time, one client, many that leave.

    python tools/bench_serving.py chats MODEL --device-memory 2GiB
    python tools/bench_serving.py batches MODEL --device-memory 2GiB --tokens 16 --draft auto
    python tools/bench_serving.py overhead MODEL --rounds 50
    python tools/bench_serving.py soak MODEL
    python tools/bench_serving.py batches MODEL --draft auto --against deepspeed-nvme
    python tools/bench_serving.py killed MODEL --dtype float32
    python tools/bench_serving.py killed MODEL --dtype bfloat16 --resident-layers 0
    python tools/bench_serving.py paced MODEL --resident-layers 0 --tokens 8

`chats` answers 16 chats of unequal length, all at once in a fixed batch and then arriving one after
the other. `batches` answers 1 to 64 prompts in each pass; with --against others answer them too, in
rounds that take turns (`offload-run compare`, one for each size). `overhead` has one client ask a
server and a session in turns. `soak` has 64 clients ask 500 times, of which every tenth leaves and
every twentieth sends nonsense, and compares each answer with the one made alone. `killed` kills a
batch of 500 lines ten times, and compares the file it ends with. `paced` has one process, and two
with a share of the layers each, answer in turns over emulated links. Servers are processes of their
own; clients of others are in `check_clients.py`.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
from bench_process import taken

import offload_rt
from offload_rt.costs.sizes import process_bytes
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
    work = {"chats": chats, "batches": batches, "overhead": overhead}
    work |= {"soak": soak, "killed": killed, "paced": paced}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=list(work))
    parser.add_argument("model")
    parser.add_argument("--device-memory", default="1GiB")
    parser.add_argument("--draft", default="none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--resident-layers", type=int, help="as of the command line; else auto")
    parser.add_argument("--against", help="runtimes of `offload-run compare`, for batches")
    parser.add_argument("--memory-cap", default="4GiB", help="of every process of those")
    parser.add_argument("--link-bandwidth", type=float, default=0.1, help="GB/s, for paced")
    parser.add_argument("--slots", type=int, default=4, help="of each process, for paced")
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--every", type=float, default=0.3, help="seconds between arrivals")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--sizes", default="1,4,16,64", help="of batches")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    print(json.dumps(work[given.what](given)))


def _options(given: argparse.Namespace) -> dict[str, Any]:
    found = {
        "device": "cpu",
        "device_memory": given.device_memory,
        "draft": given.draft,
        "dtype": given.dtype,
    }
    if given.resident_layers is not None:
        found["resident_layers"] = given.resident_layers
    return found


def _words(given: argparse.Namespace) -> list[str]:
    """The same for a command line."""
    pairs = _options(given).items()
    return [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", str(value))]


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
    """Tokens a second of all chats, from the first arrival to the last token.

    Nobody should wait for a first token longer than two sweeps of the weights take, its own prompt
    in one of them.
    """
    start, todo, over, sweeps = time.perf_counter(), list(asked), [], []
    while todo or crowd.busy:
        now = time.perf_counter() - start
        while todo and (name == "static" or now >= every_s * (len(asked) - len(todo))):
            crowd.join(todo.pop(0))
        if not crowd.busy:
            time.sleep(0.001)
            continue
        begun = time.perf_counter()
        over += [one.member for one in crowd.advance() if one.member.is_over]
        sweeps.append(time.perf_counter() - begun)
    took_s = time.perf_counter() - start
    firsts = [one.first_s - one.joined_s for one in over if one.first_s is not None]
    tokens = sum(len(one.token_ids) for one in over)
    return tokens / took_s, (
        f"first token after {statistics.median(firsts):.2f} s, at most {max(firsts):.2f}; a sweep"
        f" takes {statistics.median(sweeps):.2f} s, at most {max(sweeps):.2f}"
    )


@dataclass(frozen=True, slots=True)
class Server:
    """A server in a process of its own."""

    address: str
    pid: int

    def held(self) -> dict[str, int]:
        """Its threads and descriptors."""
        return {
            name: len(os.listdir(f"/proc/{self.pid}/{folder}"))
            for name, folder in (("threads", "task"), ("descriptors", "fd"))
        }

    def metrics(self, key: str | None = None) -> dict[str, float]:
        """Its numbers, by name and labels without the model's."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        text = httpx.get(f"{self.address}/metrics", headers=headers).text
        rows = re.findall(r'^([a-z0-9_:]+)\{model_name="[^"]*"([^}]*)\} (\S+)$', text, re.MULTILINE)
        return {name + labels: float(value) for name, labels, value in rows}

    def plan(self) -> dict[str, Any]:
        """What lives where in it."""
        found: dict[str, Any] = httpx.get(f"{self.address}/props").json()["plan"]
        return found

    @contextmanager
    def weighed(self) -> Iterator[list[int]]:
        """Bytes of it and its children (`bench_process.taken`), looked at five times a second."""
        found, over = [weight(self.pid)], threading.Event()

        def look() -> None:
            while not over.wait(0.2):
                found.append(weight(self.pid))

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join()


def weight(pid: int) -> int:
    """Bytes that a process and its children have."""
    parent, nbytes = psutil.Process(pid), 0
    for process in [parent, *parent.children(recursive=True)]:
        with suppress(psutil.Error, OSError, KeyError):  # it has just ended
            found = taken(process)
            nbytes += found.own_bytes + found.file_bytes
    return nbytes


@contextmanager
def served(given: argparse.Namespace, *more: str) -> Iterator[Server]:
    """Start a server, and end it."""
    command = [sys.executable, "-m", "offload_rt", "serve", given.model, "--port", "0"]
    process = subprocess.Popen([*command, *_words(given), *more], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"answers at (http://[\d.:]+)/v1", line):
                threading.Thread(target=process.stderr.read, daemon=True).start()
                yield Server(found[1], process.pid)
                return
        raise SystemExit(f"the server did not start: {said[-3:]}")
    finally:
        process.terminate()
        process.wait()


def batches(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of 1, 4, 16 and 64 answers at once, after their prompts were read."""
    prompts = [
        f'def {verb}_{noun}s({noun}s):\n    """Return the {noun}s, each of them {verb}ed.'
        for verb in ("sort", "filter", "print", "load", "split", "merg", "check", "count")
        for noun in ("word", "line", "file", "node", "date", "path", "row", "key")
    ]
    random.Random(0).shuffle(prompts)
    if given.against is not None:
        return _against(given, prompts)
    found = {}
    for size in map(int, given.sizes.split(",")):
        with offload_rt.load(given.model, **_options(given)) as session:
            session.generate(prompts[:size], raw=True, max_tokens=given.tokens, ignore_eos=True)
            report = session.report
            assert report is not None
        speculation = report.speculation
        found[size] = {
            "tokens_per_s": report.timings.tokens_per_s,
            "first_s": report.timings.ttft_s,
            "passes": speculation.passes,
            "drafter": speculation.drafter,
            "acceptance_rate": speculation.acceptance_rate,
            "draft_sizes": speculation.draft_sizes,
            "overlap": report.transfer.overlap_ratio,
        }
        print(f"{size}: {found[size]}", file=sys.stderr)
    return {"device_memory": given.device_memory, "draft": given.draft, "batches": found}


def _against(given: argparse.Namespace, prompts: list[str]) -> dict[str, Any]:
    """The same beside other runtimes: each size as many differing prompts, and rounds in turns."""
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for size in map(int, given.sizes.split(",")):
            source, report = folder / f"{size}.jsonl", folder / str(size)
            source.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts[:size]))
            command = [
                sys.executable,
                "-m",
                "offload_rt",
                "compare",
                given.model,
                "--json",
                "--raw",
            ]
            command += ["--against", given.against, "--prompts", str(source), "--ignore-eos"]
            command += ["--batch", str(size), "--rounds", str(given.rounds)]
            command += ["-n", str(given.tokens), "--memory-cap", given.memory_cap]
            done = subprocess.run(
                [*command, *_words(given), "--output", str(report)], stdout=subprocess.PIPE
            )
            if done.returncode:
                raise SystemExit(f"compare ended with {done.returncode}")
            told = json.loads(done.stdout)
            found[size] = {
                one["engine"]: {
                    "tokens_per_s": one["tokens_per_s"],
                    "ours_faster": one["faster"],
                    "ours_drafting_faster": one["faster_drafted"],
                    "same": [one["same"], one["compared"]],
                }
                for one in told["engines"]
            }
            failed = [f"{row['run']['engine']}: {row['reason']}" for row in told["failed"]]
            print(f"{size}: {found[size]} {failed}", file=sys.stderr)
    return {"device_memory": given.device_memory, "draft": given.draft, "batches": found}


def overhead(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of an answer from a server and from a session, in pairs that begin with either."""
    prompt = "Tell me a long story about the sea."
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": given.tokens,
        "ignore_eos": True,
        "stream": True,
    }
    session = offload_rt.load(given.model, **_options(given))
    with served(given, "--sequences", "1") as server, session, httpx.Client(timeout=600) as asks:
        url, took = f"{server.address}/v1/chat/completions", dict[str, list[float]]()

        def of_session() -> None:
            session.generate(prompt, max_tokens=given.tokens, ignore_eos=True)

        def of_server() -> None:
            with asks.stream("POST", url, json=body) as answer:
                for _ in answer.iter_raw():
                    pass

        for number in range(given.rounds + 1):
            pair = [("session", of_session), ("server", of_server)]
            for name, answer in pair if number % 2 else reversed(pair):
                start = time.perf_counter()
                answer()
                if number:  # the first reads what the others find
                    took.setdefault(name, []).append(time.perf_counter() - start)
    ratios = [b / a for a, b in zip(took["session"], took["server"], strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    return {
        "session_s": statistics.median(took["session"]),
        "server_s": statistics.median(took["server"]),
        "rounds": len(ratios),
        "ratio": statistics.median(ratios),
        "ratio_95": [medians[25], medians[974]],
        "quartiles": statistics.quantiles(ratios, n=4),
    }


def soak(given: argparse.Namespace) -> dict[str, Any]:
    """64 clients, of whose requests every tenth is left and every twentieth is nonsense.

    No answer may be lost or another's, and no descriptor or thread of the server be left over. The
    most memory that it and its tokenizers had is put beside the plan: that of the device, and what
    `plan` says of a process besides.
    """
    draw, wishes = random.Random(1), []
    for place in range(given.requests):
        kind = draw.choice([{}, {"temperature": 1.0, "seed": place}])
        wishes.append((_text(draw), {"max_tokens": draw.randrange(1, 16), **kind}))
    with offload_rt.load(given.model, **_options(given)) as session:
        expected = [session.generate(text, **more).text for text, more in wishes]  # type: ignore[call-overload]
    found: list[str | None] = [None] * len(wishes)
    todo = iter(enumerate(wishes))

    async def one(asks: httpx.AsyncClient, url: str) -> None:
        for place, (text, more) in todo:
            body = {"messages": [{"role": "user", "content": text}], **more, "stream": True}
            sent = json.dumps(body).encode()
            if place % 20 == 0:
                sent = _malformed(draw, sent)
            headers = {"content-type": "application/json"}
            async with asks.stream("POST", url, content=sent, headers=headers) as answer:
                if answer.status_code != 200:
                    found[place] = f"status {answer.status_code}"
                    continue
                parts = []
                async for line in answer.aiter_lines():
                    if place % 10 == 9:
                        break
                    parts.append(_said(line))
            found[place] = "".join(parts)

    async def all_of_them(url: str) -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=600, limits=limits) as asks:
            await asyncio.gather(*(one(asks, url) for _ in range(64)))

    start = time.perf_counter()
    with served(given, "--sequences", "16", "--context", "256", "--queue", "100") as server:
        url = f"{server.address}/v1/chat/completions"
        asyncio.run(_greeted(url))  # threads that work on prompts are begun when they are needed
        held, begun = server.held(), time.perf_counter()
        with server.weighed() as weights:
            asyncio.run(all_of_them(url))
        plan = server.plan()
        took_s = time.perf_counter() - begun
        time.sleep(1.0)
        held_after = server.held()
        metrics = httpx.get(f"{server.address}/metrics").text
    running = re.search(r"^vllm:num_requests_running\{.*\} (\d+)", metrics, re.MULTILINE)
    pairs = list(enumerate(zip(found, expected, strict=True)))
    kept = [both for place, both in pairs if place % 10 != 9 and place % 20]
    nonsense = [status for place, (status, _) in pairs if place % 20 == 0]
    return {
        "asked": len(wishes),
        "compared": len(kept),
        "wrong": sum(f != e for f, e in kept),
        "malformed": {str(status): nonsense.count(status) for status in set(nonsense)},
        "held": held,
        "held_after": held_after,
        "running_after": running and int(running[1]),
        "memory": {
            "peak_mib": max(weights) >> 20,
            "first_mib": weights[0] >> 20,
            "device_planned_mib": plan["device_bytes"] >> 20,
            "process_planned_mib": process_bytes() >> 20,
            "samples": len(weights),
        },
        "s": took_s,
        "start_s": begun - start,
    }


async def _greeted(url: str) -> None:
    """Ask for 64 small answers at once."""
    hello = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    async with httpx.AsyncClient(timeout=600) as asks:
        await asyncio.gather(*(asks.post(url, json=hello) for _ in range(64)))


def _text(draw: random.Random) -> str:
    return " ".join(draw.choice(_WORDS) for _ in range(draw.randrange(2, 20)))


def _said(line: str) -> str:
    """What an event of a stream adds to the text."""
    if not line.startswith("data: {"):
        return ""
    piece = json.loads(line[6:])
    if "error" in piece:
        return str(piece["error"])
    return "".join(c["delta"].get("content", "") for c in piece["choices"])


def _malformed(draw: random.Random, body: bytes) -> bytes:
    """A body that is none, or has a field that cannot be."""
    return draw.choice(
        [
            body[: draw.randrange(len(body))],
            body.replace(b'"role"', b'"rule"'),
            body.replace(b'"max_tokens": ', b'"max_tokens": -'),
            body[:-1] + b', "n": 99}',
            b"\xff" + body,
        ]
    )


def killed(given: argparse.Namespace) -> dict[str, Any]:
    """A batch that is killed at random points and begun again, against one that is not."""
    draw = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = []
        for _ in range(given.requests):
            text = _text(draw)
            more = draw.choice([{}, {"temperature": 1.0}])
            lines.append(json.dumps({"prompt": text, "max_tokens": draw.randrange(1, 12), **more}))
        (folder / "in").write_text("\n".join(lines) + "\n")
        whole, output = folder / "whole", folder / "out"
        _batch(given, folder / "in", whole).wait()
        part, deaths, passes = folder / "out.part", 0, ""
        points = sorted(draw.sample(range(1, given.requests - 1), given.kills))
        while not output.exists():
            process = _batch(given, folder / "in", output)
            while process.poll() is None and points:
                if part.exists() and part.read_bytes().count(b"\n") > points[0]:
                    time.sleep(draw.random() * 0.05)
                    process.kill()
                    points.pop(0)
                    deaths += process.wait() == -signal.SIGKILL
                    passes = part.read_text().split("\n")[1]  # what all answers are made with
                time.sleep(0.002)
            if process.wait() not in (0, -signal.SIGKILL):
                raise SystemExit(f"the batch ended with {process.returncode}")
        same = output.read_bytes() == whole.read_bytes()
    return {
        "lines": given.requests,
        "killed": deaths,
        "same_bytes": same,
        "passes": json.loads(passes)["result"] if passes else None,
    }


def _batch(given: argparse.Namespace, source: Path, output: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "offload_rt", "batch", given.model]
    command += ["--input", str(source), "--output", str(output), "--seed", "1", "-q"]
    return subprocess.Popen([*command, *_words(given)])


def paced(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of one process and of two, in pairs that begin with either."""
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        nodes = Path(folder) / "nodes.toml"
        nodes.write_text("".join(f'[[node]]\nname = "{name}"\n' for name in ("desk", "shelf")))
        texts = set()
        for number in range(given.rounds):
            for count in (1, 2) if number % 2 == 0 else (2, 1):
                text, speed = _paced(given, count, nodes)
                found[count].append(speed)
                texts.add(text)
                print(f"round {number}, {count}: {speed:.3f} tokens/s", file=sys.stderr)
    ratios = [two / one for one, two in zip(found[1], found[2], strict=True)]
    return {
        "one": found[1],
        "two": found[2],
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "same_text": len(texts) == 1,
    }


def _paced(given: argparse.Namespace, count: int, nodes: Path) -> tuple[str, float]:
    """The answer of so many processes, each with one thread and a link of its own."""
    command = [sys.executable, "-m", "offload_rt", "generate", given.model, "-p", "hello"]
    command += ["-n", str(given.tokens), "--ignore-eos", *_words(given), "--json"]
    command += ["--home", "host", "--link-bandwidth", str(given.link_bandwidth), "--threads", "1"]
    command += ["--slots", str(given.slots)]
    command += ["--nodes", str(nodes)] if count > 1 else []
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    started = [
        subprocess.Popen(
            command, env=os.environ | meeting | {"RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(count)
    ]
    out, *_ = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit(f"{count} processes ended with {[p.returncode for p in started]}")
    answer = json.loads(out)
    return answer["text"], answer["timings"]["tokens_per_s"]


if __name__ == "__main__":
    main()
