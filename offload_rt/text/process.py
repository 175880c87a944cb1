"""The process in which tokenizers and chat templates of model folders run, and its limits.

Both are programs of strangers. A template can loop or double a string, a normalizer can grow its
text, a pattern can backtrack for ever. The library that runs them panics, allocates without asking
and holds the interpreter. So they run in a child process:

- it is small (no torch), and begun without copying this process, as memory that is pinned or read
  into must not be forked;
- it has limits of processor time and memory for each request, and is killed without harm when it
  exceeds them or when Ctrl-C interrupts the wait;
- it never outlives this process: the kernel ends it (SIGIO) once the other end of `life` is closed.
"""

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload_rt.units import format_size

_START_S = 300.0  # to import what it needs: 1.4 s on an idle machine
# Limits are of processor time, so that a busy machine fails nobody; this bounds what only waits.
_WALL_PER_CPU = 20.0
_WALL_FIXED_S = 60.0
_LENGTH_BYTES = 8
_PACKAGES = str(Path(__file__).resolve().parents[2])
_CODE = (
    "import sys; sys.path[:] = {path!r}; from offload_rt.text.worker import main; main({life:d})"
)
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "warning",  # some say that token ids will be wrong
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # SIGPROF and memory are of one thread
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "RUST_BACKTRACE": "0",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may use.

    Attributes:
        cpu_s: processor time.
        memory_bytes: address space on top of what the process has.
    """

    cpu_s: float
    memory_bytes: int


class RequestError(Exception):
    """A request came to nothing; the message says why, to be put behind what was asked.

    Attributes:
        raised: what was asked raised it; else the message is what the process did, or exceeded.
        config: config.json is at fault, not the tokenizer.
    """

    def __init__(self, reason: str, *, raised: bool = False, config: bool = False) -> None:
        super().__init__(reason)
        self.raised, self.config = raised, config


class Pending:
    """A request whose reply nobody has read yet."""

    def __init__(self, process: "TextProcess", limits: Limits) -> None:
        self._process, self.limits = process, limits
        self._outcome: dict[str, Any] | RequestError | None = None

    def result(self) -> Any:  # noqa: ANN401 - what the operation of `worker` returns
        """Wait for the reply.

        Raises:
            RequestError: there is none.
        """
        self._process.settle(self)
        outcome = self._outcome
        assert outcome is not None
        if isinstance(outcome, RequestError):
            raise outcome
        if "error" in outcome:
            raised, config = not outcome["last"], outcome["config"]
            raise RequestError(outcome["error"], raised=raised, config=config)
        return outcome["value"]

    def close(self, outcome: "dict[str, Any] | RequestError") -> None:
        """Say what came of it."""
        self._outcome = outcome

    @property
    def open(self) -> bool:
        """Whether the reply is still to be read."""
        return self._outcome is None


class TextProcess:
    """The child; started by the first request, and again by the first after it was ended.

    Attributes:
        generation: counts the children that ended; what they held is gone.
    """

    def __init__(self) -> None:
        self.generation = 0
        self._child: _Child | None = None
        self._unread: Pending | None = None
        self._forgotten: list[int] = []
        self._ended = False
        self._lock = threading.RLock()
        atexit.register(self.close)

    @property
    def pid(self) -> int | None:
        """Of the child, while there is one."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Have it running; it imports what it needs while we do something else."""
        with self._lock:
            if self._child is not None and not self._child.ours:  # we are a fork
                self._child, self._unread = None, None
                self.generation += 1
            self._child = self._child or _Child()
            if self._ended:  # meanwhile, by a thread that saw no child
                self._child.stop()

    def forget(self, number: int) -> None:
        """Have a tokenizer dropped with the next request; called by the garbage collector."""
        self._forgotten.append(number)

    def begin(self, operation: str, limits: Limits, **arguments: object) -> Pending:
        """Send a request, after the reply of the one before has come."""
        with self._lock:
            if self._unread is not None:
                self.settle(self._unread)
            if self._ended:
                (pending := Pending(self, limits)).close(RequestError("was ended"))
                return pending
            self.start()
            forgotten, self._forgotten = self._forgotten, []
            message = {
                "operation": operation,
                "arguments": arguments,
                "forgotten": forgotten,
                "cpu_s": limits.cpu_s,
                "memory_bytes": limits.memory_bytes,
            }
            pending = self._unread = Pending(self, limits)
            assert self._child is not None
            try:
                with _EndedUnlessDone(self):
                    self._child.send(message)
            except BrokenPipeError:
                self._fail(pending, self._child.end_reason(limits))
            return pending

    def request(self, operation: str, limits: Limits, **arguments: object) -> Any:  # noqa: ANN401
        """Send a request and wait for the reply.

        Raises:
            RequestError: there is none.
        """
        with self._lock:
            return self.begin(operation, limits, **arguments).result()

    def settle(self, pending: Pending) -> None:
        """Read the reply of a request."""
        with self._lock:
            if not pending.open:
                return
            if self._child is None or pending is not self._unread:
                pending.close(RequestError("the process that reads text was ended meanwhile"))
                return
            try:
                with _EndedUnlessDone(self):
                    reply = self._child.receive(pending.limits)
                pending.close(reply)
                self._unread = None
                if reply.get("last"):
                    self.close()
            except RequestError as error:
                self._fail(pending, str(error))

    def close(self) -> None:
        """End it; the next request starts another."""
        with self._lock:
            child, self._child, self._unread = self._child, None, None
            if child is not None:
                self.generation += 1
                child.kill()

    def end(self) -> None:
        """End it for good, at once, from any thread; requests that wait fail."""
        self._ended = True
        if (child := self._child) is not None:
            child.stop()

    def _fail(self, pending: Pending, reason: str) -> None:
        pending.close(RequestError(reason))
        self.close()


class _EndedUnlessDone:
    """Ends the process when its conversation is broken off, by Ctrl-C above all."""

    def __init__(self, process: TextProcess) -> None:
        self._process = process

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, RequestError | BrokenPipeError):
            self._process.close()


class _Child:
    """One life of the process."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._started = False
        life, self._life = os.pipe()
        path = [place for place in sys.path if place]
        if _PACKAGES not in path:
            path.append(_PACKAGES)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _CODE.format(path=path, life=life)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(life,),
                env=os.environ | _ENVIRONMENT,
                start_new_session=True,  # a terminal's Ctrl-C is for us
                bufsize=0,
            )
        finally:
            os.close(life)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._replies = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def ours(self) -> bool:
        """False in a fork of the process that started it."""
        return self._owner == os.getpid()

    def send(self, message: Mapping[str, object]) -> None:
        data = json.dumps(message).encode()
        data = len(data).to_bytes(_LENGTH_BYTES, "big") + data
        view = memoryview(data)
        while view:
            view = view[os.write(self._requests.fileno(), view) :]

    def receive(self, limits: Limits) -> dict[str, Any]:
        """Wait for a reply.

        Raises:
            RequestError: it ended without one, or gave none in time.
        """
        wall_s = _WALL_FIXED_S + _WALL_PER_CPU * limits.cpu_s
        until_s = time.monotonic() + wall_s + (0.0 if self._started else _START_S)
        length = int.from_bytes(self._read(_LENGTH_BYTES, until_s, limits), "big")
        if length > limits.memory_bytes:
            raise RequestError(f"wrote {format_size(length)}")
        reply = json.loads(self._read(length, until_s, limits))
        self._started = True
        assert isinstance(reply, dict)  # our own code wrote it
        return reply

    def _read(self, count: int, until_s: float, limits: Limits) -> bytes:
        parts = []
        while count > 0:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not select.select([self._replies], [], [], left_s)[0]:
                raise RequestError("gave no answer for minutes and was ended")
            data = os.read(self._replies.fileno(), min(count, 1 << 20))
            if not data:
                raise RequestError(self.end_reason(limits))
            parts.append(data)
            count -= len(data)
        return b"".join(parts)

    def end_reason(self, limits: Limits) -> str:
        """Why it is gone; it closed its pipes, so it ends."""
        code = self._process.wait()
        if not self._started and code != -signal.SIGPROF:
            return f"could not be read: the process for it ended with {code} before it began"
        if code == -signal.SIGPROF:
            return f"ran for more than {limits.cpu_s:.3g} s"
        if code == -signal.SIGABRT:  # how the library leaves when it gets no memory
            return f"needed more than {format_size(limits.memory_bytes)} of memory"
        return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"

    def stop(self) -> None:
        """Have it end; whoever waits for a reply reads the end of it."""
        with suppress(ProcessLookupError):
            self._process.kill()

    def kill(self) -> None:
        os.close(self._life)
        with suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with suppress(BrokenPipeError):
                pipe.close()


@functools.cache
def text_process() -> TextProcess:
    """The one of this process."""
    return TextProcess()
