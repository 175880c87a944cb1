"""What all workers share: the talk with the comparison, and what the system says of this process.

A worker is run by the Python of its engine's environment, where offload_rt's dependencies need not
be: this package, and the two it is in, import nothing but Python and the engine.

One JSON object per line. To each request on stdin goes one reply to stdout, in its order:

    {"do": "load", ...}      {"ok": true, "load_s": 3.1, "facts": {...}}
    {"do": "answer", ...}    {"ok": true, "token_ids": [[...]], "ttft_s": 0.4, ...}
    {"do": "gap", ...}       {"ok": true, "logits": [16.1, 16.0], "best": 77}

A request that fails is answered with `{"ok": false, "error": ...}`, and the worker ends.

Importing this file moves stdout: libraries print there while they are imported, so scripts import
it before them.
"""

import ctypes
import gc
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

_PR_SET_PDEATHSIG = 1  # prctl.h


def _take_stdout() -> TextIO:
    """Keep stdout for replies; what libraries print goes to stderr."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")


_replies = _take_stdout()


class Engine(Protocol):
    """What runs a model."""

    def load(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Make ready to answer; returns facts: the exact configuration, versions, threads."""

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_tokens: frozenset[int],
        clock: "Clock",
    ) -> list[list[int]]:
        """Continue all prompts at once, greedily; an end token is the last of its answer."""

    def device_peak_bytes(self) -> int | None:
        """Most device memory in use so far; None on the CPU, where the process tells."""

    def link_bytes(self) -> int | None:
        """Bytes of weights and KV this engine moved to the device; None if it does not count."""

    def gap(self, ids: Sequence[int], tokens: Sequence[int]) -> dict[str, Any]:
        """Logits of some tokens after a sequence, and the likeliest token: `logits`, `best`."""


@dataclass(slots=True)
class Clock:
    """When tokens came, and what had been read by then."""

    engine: Engine
    marks: list["Mark"] = field(default_factory=list)

    def tick(self, tokens: int) -> None:
        """A pass has ended (the first time: none has begun); `tokens` are emitted in all."""
        self.marks.append(Mark(time.perf_counter(), tokens, read_bytes(), self.engine.link_bytes()))

    def measured(self, token_ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """Times and bytes of the prompts' pass and of the passes after it."""
        start, first, last = self.marks[0], self.marks[1], self.marks[-1]
        moved = None
        if last.link_bytes is not None and first.link_bytes is not None:
            moved = last.link_bytes - first.link_bytes
        return {
            "token_ids": [list(ids) for ids in token_ids],
            "ttft_s": first.at_s - start.at_s,
            "decode_s": last.at_s - first.at_s,
            "first_tokens": first.tokens,
            "passes": len(self.marks) - 1,
            "prompt_read_bytes": first.read_bytes - start.read_bytes,
            "decode_read_bytes": last.read_bytes - first.read_bytes,
            "decode_link_bytes": moved,
        }


@dataclass(frozen=True, slots=True)
class Mark:
    """The state at the end of a pass.

    Attributes:
        tokens: emitted so far, all sequences together.
        read_bytes: by this process from disks.
        link_bytes: as the engine counts them.
    """

    at_s: float
    tokens: int
    read_bytes: int
    link_bytes: int | None


def serve(engine: Engine) -> int:
    """Answer requests until stdin ends; returns the exit code."""
    # Were the comparison killed, this process would go on measuring for nobody.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    before = 0
    for line in sys.stdin.buffer:
        request = json.loads(line)
        if request["do"] == "load":
            before = resident_bytes()
        try:
            reply = {"ok": True} | _handle(engine, request)
        except BaseException as error:  # noqa: BLE001 - it is the reason the report shows
            traceback.print_exc()
            reply = {"ok": False, "error": _one_line(error)}
        if reply["ok"]:
            device = engine.device_peak_bytes()
            peak = _status_bytes("VmHWM")
            reply["host_peak_bytes"] = peak
            reply["device_peak_bytes"] = max(0, peak - before) if device is None else device
            _restart_peak()
        _replies.write(json.dumps(reply) + "\n")
        _replies.flush()
        if not reply["ok"]:
            return 1
    return 0


def read_bytes() -> int:
    """Bytes this process has had read from disks so far, page faults included; 0 if unknown."""
    return _number("/proc/self/io", "read_bytes")


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    return _status_bytes("VmRSS")


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _handle(engine: Engine, request: dict[str, Any]) -> dict[str, Any]:
    if request["do"] == "load":
        start = time.perf_counter()
        facts = engine.load(request)
        return {"load_s": time.perf_counter() - start, "facts": facts}
    if request["do"] == "answer":
        gc.collect()
        clock = Clock(engine)
        token_ids = engine.answer(
            request["prompts"], request["max_tokens"], frozenset(request["end_tokens"]), clock
        )
        return clock.measured(token_ids)
    return engine.gap(request["ids"], request["tokens"])


def _restart_peak() -> None:
    """Count the peak of this process from now on: loading has one of its own."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _status_bytes(key: str) -> int:
    return _number("/proc/self/status", key) * 1024


def _number(path: str, key: str) -> int:
    try:
        with open(path) as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name == key:
                    return int(rest.split()[0])
    except OSError:
        pass
    return 0
