"""A worker: an engine in a process of its own, below the cap, spoken to in lines of JSON."""

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from offload_rt.baselines.cap import Cap
from offload_rt.writing import open_growing

_LINE_LIMIT_BYTES = 64 * 2**20
_END_S = 10.0  # to leave by itself once stdin is closed
_SHOWN_CHARACTERS = 200


class WorkerFailedError(Exception):
    """A worker gave no answer; the message says why, in a sentence for the report."""


class Worker:
    """One process; leaving the block ends it and everything it started.

    Args:
        arguments: its command line.
        environment: of the process.
        cap: keeps it below a limit; closed with the worker.
        log: file for what it and its libraries print.
    """

    def __init__(
        self, arguments: Sequence[str], environment: Mapping[str, str], cap: Cap, log: Path
    ) -> None:
        self._cap, self._log = cap, log
        self._pending = b""
        with os.fdopen(open_growing(log, os.O_WRONLY | os.O_TRUNC), "wb") as errors:
            self._process = subprocess.Popen(
                cap.command(arguments),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is for us, and the group can be ended as one
                bufsize=0,
            )
        assert self._process.stdin is not None
        os.set_blocking(self._process.stdin.fileno(), False)  # it may hang without reading

    def request(self, message: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        """Send a request and wait for its reply.

        Raises:
            WorkerFailedError: it ended, took too long, said that it cannot, or said nonsense.
        """
        until_s = time.monotonic() + timeout_s
        late = f"it gave no answer within {timeout_s:g} s and was ended"
        self._write(json.dumps(message).encode() + b"\n", until_s, late)
        line = self._read_line(until_s, late)
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not isinstance(reply.get("ok"), bool):
            raise WorkerFailedError(f"it printed what is no reply: {_shown(line)}")
        if not reply["ok"]:
            raise WorkerFailedError(" ".join(str(reply.get("error", "it gave no reason")).split()))
        return reply

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._leave()
        finally:
            self._kill()
            self._cap.close()

    def _leave(self) -> None:
        """Close stdin and wait a little, so that the engine can tidy up."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(_END_S)
        except (OSError, subprocess.TimeoutExpired):
            return

    def _kill(self) -> None:
        """End the whole process group, whoever of it is left."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()

    def _write(self, data: bytes, until_s: float, late: str) -> None:
        assert self._process.stdin is not None
        descriptor = self._process.stdin.fileno()
        while data:
            left = until_s - time.monotonic()
            if left <= 0 or not select.select([], [descriptor], [], left)[1]:
                raise WorkerFailedError(late)
            try:
                data = data[os.write(descriptor, data) :]
            except BrokenPipeError:
                raise WorkerFailedError(self._end_reason()) from None

    def _read_line(self, until_s: float, late: str) -> bytes:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        while b"\n" not in self._pending:
            left = until_s - time.monotonic()
            if left <= 0 or not select.select([descriptor], [], [], left)[0]:
                raise WorkerFailedError(late)
            data = os.read(descriptor, 2**16)
            if not data:
                raise WorkerFailedError(self._end_reason())
            self._pending += data
            if len(self._pending) > _LINE_LIMIT_BYTES:
                raise WorkerFailedError(f"it printed a line of more than {_LINE_LIMIT_BYTES} bytes")
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _end_reason(self) -> str:
        """Why a process that closed its pipes is gone."""
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return "it closed its output without an answer"
        if self._cap.struck():
            return "killed by the memory cap"
        if code < 0:
            name = signal.Signals(-code).name
            hint = ", as the kernel does to processes above a memory limit" if code == -9 else ""
            return f"ended by {name}{hint}"
        return f"ended with exit code {code}: {self._last_words()}"

    def _last_words(self) -> str:
        """The last line it printed that says something; of a traceback that is the error."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - 2**16))
                lines = file.read().splitlines()
        except OSError:
            lines = []
        spoken = [line for line in lines if line.strip()]
        return _shown(spoken[-1]) if spoken else "it printed nothing"


def _shown(line: bytes) -> str:
    text = " ".join(line[: 4 * _SHOWN_CHARACTERS].decode("utf-8", "replace").split())
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."
