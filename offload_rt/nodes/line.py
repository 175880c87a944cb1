"""A line between two nodes: frames over a socket, none of which is waited for without a limit.

Frames are a kind, a record of JSON, and bytes. Whoever works while the other waits sends a sign of
life every few seconds from a thread of its own, so that a long pass and a dead machine look
different. A process that ends closes its socket, which the other sees at once; a machine that is
gone without a word is missed after `silence_s`.

Nothing is encrypted or signed: this is for networks whose machines trust each other.
"""

import json
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum

from offload_rt.errors import OffloadError
from offload_rt.units import format_size

_HEAD = struct.Struct("!BIQ")  # kind, bytes of the record, bytes behind it
_MOST_RECORD, _MOST_DATA = 2**26, 2**36  # of a node that has joined
_MOST_HELLO = 4096  # bytes of what one says that has not
SILENCE_S = 30.0


class Kind(Enum):
    """What a frame is."""

    HELLO = 1  # who joins, and with what
    ORDER = 2  # what a node has to load
    READY = 3  # it is loaded
    PASS = 4  # rows of a pass, and what became of those before
    ROWS = 5  # hidden states
    DROP = 6  # the pass is over before its end
    TELL = 7  # what was copied, and memory; asked and answered
    END = 8  # the run is over; with a sentence if something failed
    ALIVE = 9
    MEET = 10  # whether hidden states cross by NCCL; what is free then


class NodeError(OffloadError):
    """Another machine of the run ended, is silent, or does not fit in."""


@dataclass(slots=True)
class Frame:
    """What came over a line."""

    kind: Kind
    record: dict[str, object]
    data: bytearray = field(default_factory=bytearray)


def greets(connection: socket.socket) -> bool | None:
    """Whether a whole HELLO of a node that joins has come; it is not taken. None: not yet.

    Nothing is set aside for what a stranger announces, and nobody waits for it.
    """
    try:
        there = connection.recv(_HEAD.size + _MOST_HELLO, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    except OSError:
        return False
    if len(there) < _HEAD.size:
        return None if there else False
    kind, head, data = _HEAD.unpack_from(there)
    if kind != Kind.HELLO.value or head > _MOST_HELLO or data:
        return False
    return len(there) >= _HEAD.size + head or None


class Line:
    """One end of a connection.

    Args:
        connection: it.
        name: of the node at the other end, in sentences.
        silence_s: after which it counts as gone.
    """

    def __init__(self, connection: socket.socket, name: str, silence_s: float = SILENCE_S) -> None:
        self.name, self._silence_s = name, silence_s
        self._socket = connection
        connection.settimeout(silence_s)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self._works, self._closed = threading.Event(), threading.Event()
        self._signs = threading.Thread(target=self._sign, name="signs of life", daemon=True)
        self._signs.start()

    def works(self, busy: bool) -> None:
        """Say whether the other end waits for this one; only then signs of life are sent."""
        if busy:
            self._works.set()
        else:
            self._works.clear()

    def send(
        self,
        kind: Kind,
        record: Mapping[str, object] | None = None,
        data: memoryview | bytes = b"",
    ) -> None:
        """Send a frame.

        Raises:
            NodeError: the other end is gone.
        """
        head = json.dumps(record or {}).encode()
        try:
            with self._sending:
                self._socket.sendall(_HEAD.pack(kind.value, len(head), len(data)) + head)
                if len(data):
                    self._socket.sendall(data)
        except OSError as error:
            raise self._gone(error) from error

    def take(self) -> Frame:
        """The next frame that is not a sign of life.

        Raises:
            NodeError: the other end is gone, silent, or ends the run.
        """
        while (frame := self._read()).kind is Kind.ALIVE:
            pass
        if frame.kind is Kind.END and (why := frame.record.get("why")):
            raise NodeError(f"{self.name} ended: {why}")
        return frame

    def expect(self, kind: Kind) -> Frame:
        """The next frame, which must be of that kind.

        Raises:
            NodeError: it is not, or as `take`.
        """
        return self.checked(self.take(), kind)

    def checked(self, frame: Frame, kind: Kind) -> Frame:
        """A frame that must be of that kind.

        Raises:
            NodeError: it is not.
        """
        if frame.kind is not kind:
            raise NodeError(
                f"{self.name} sent {frame.kind.name} where {kind.name} is due: use one version of "
                "offload-run on all nodes"
            )
        return frame

    def end(self, why: str = "") -> None:
        """Tell the other end that the run is over, if it is there, and close."""
        with suppress(NodeError):
            self.send(Kind.END, {"why": why})
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._closed.set()
        self._works.set()
        self._socket.close()

    def _read(self) -> Frame:
        try:
            kind, head, data = _HEAD.unpack(self._bytes(_HEAD.size))
            if head > _MOST_RECORD or data > _MOST_DATA:
                raise ValueError
            found, record = Kind(kind), json.loads(self._bytes(head))
            if not isinstance(record, dict):
                raise ValueError
            return Frame(found, record, self._bytes(data))
        except OSError as error:
            raise self._gone(error) from error
        except MemoryError as error:
            raise NodeError(
                f"{self.name} sends {format_size(data)} at once, and there is no memory for it"
            ) from error
        except (ValueError, RecursionError) as error:
            raise NodeError(
                f"what came from {self.name} is no frame of offload-run: something else uses "
                "this port"
            ) from error

    def _bytes(self, count: int) -> bytearray:
        made = bytearray(count)
        view, there = memoryview(made), 0
        while there < count:
            if not (more := self._socket.recv_into(view[there:])):
                raise ConnectionResetError
            there += more
        return made

    def _gone(self, error: OSError) -> NodeError:
        if isinstance(error, TimeoutError):
            return NodeError(f"{self.name} has been silent for {self._silence_s:.0f} s")
        return NodeError(f"{self.name} ended: its connection is closed")

    def _sign(self) -> None:
        while not self._closed.wait(self._silence_s / 6):
            self._works.wait()
            try:
                if not self._closed.is_set():
                    self.send(Kind.ALIVE)
            except NodeError:
                return
