"""How the nodes of a run find each other: by what torchrun tells each process.

torchrun gives every process its number (RANK), their count and a store that all reach. The first
node listens at a port of its own and leaves its address there, with a number by which those who
come are told from strangers. That is no authentication: the network has to be trusted.
"""

import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from offload_rt.errors import ConfigError, OffloadError
from offload_rt.nodes.line import SILENCE_S, Kind, Line, NodeError, greets
from offload_rt.nodes.roster import Roster

JOIN_S = 300.0  # until all have joined
HELLO_S = 10.0  # until somebody who connects has said who it is
_LOOK_S = 0.02
_MOST_WAITING = 64
_ADDRESS = "offload-rt/address"
_FIRST = "node 0"


@dataclass(frozen=True, slots=True)
class Rank:
    """This process among those that torchrun started."""

    number: int
    count: int

    @classmethod
    def read(cls) -> "Rank":
        """What torchrun says.

        Raises:
            ConfigError: it did not start this process.
        """
        try:
            found = cls(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
        except (KeyError, ValueError):
            raise ConfigError(
                "--nodes needs a process on each node, started by torchrun: torchrun --nnodes 2 "
                "--nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --no-python "
                "offload-run ... on each"
            ) from None
        return found

    def check(self, roster: Roster) -> None:
        """See that there is a process for each node.

        Raises:
            ConfigError: there are more or fewer.
        """
        if self.count != len(roster.nodes):
            raise ConfigError(
                f"--nodes names {len(roster.nodes)} machines and torchrun started {self.count} "
                "processes: start one for each"
            )


class _Comers:
    """Connections of those who have not said yet who they are; none holds up the others."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        server.settimeout(_LOOK_S)
        self._waiting: dict[socket.socket, float] = {}  # since when

    def greeting(self) -> Iterator[socket.socket]:
        """Those whose whole greeting is there, after a short wait for more of them."""
        try:
            connection, _ = self._server.accept()
            self._waiting[connection] = time.monotonic()
        except (TimeoutError, ConnectionError):
            pass
        for connection, since in list(self._waiting.items()):
            late = time.monotonic() - since > HELLO_S or len(self._waiting) > _MOST_WAITING
            if said := greets(connection):
                del self._waiting[connection]
                yield connection
            elif late or said is False:
                del self._waiting[connection]
                connection.close()

    def close(self) -> None:
        """Send the others away."""
        for connection in self._waiting:
            connection.close()


class Host:
    """The first node's side: where the others find it, and lines to them.

    At its end it tells the others whether something failed.
    """

    def __init__(self) -> None:
        self._store = rendezvous_store()
        self._lines = dict[int, Line]()
        self._announced = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        why = str(error) if isinstance(error, OffloadError) else ""
        if isinstance(error, Exception):
            why = why or f"unexpected {type(error).__name__}"
            if not self._announced:
                self._store.set(_ADDRESS, f"- {why}")
        for line in self._lines.values():
            line.end(why)

    def gather(self, roster: Roster, rank: Rank, digest: str) -> list[Line]:
        """Wait for the others; a line to each, in their order.

        Raises:
            ConfigError: there are more or fewer processes than nodes in the file.
            NodeError: one did not come, or has other files.
        """
        rank.check(roster)
        until, host = time.monotonic() + JOIN_S, os.environ["MASTER_ADDR"]
        try:
            server = socket.create_server((host, 0))
        except OSError as error:
            raise NodeError(f"{_FIRST} cannot listen at {host}: {error.strerror}") from error
        token = secrets.token_hex(16)
        with server, closing(_Comers(server)) as comers:
            self._store.set(_ADDRESS, f"{server.getsockname()[1]} {token}")
            self._announced = True
            while len(self._lines) < rank.count - 1:
                if time.monotonic() > until:
                    names = [node.name for node in roster.nodes]
                    missing = next(n for i, n in enumerate(names) if i and i not in self._lines)
                    raise NodeError(
                        f"{missing} did not join within {JOIN_S:.0f} s: see what its process says"
                    )
                for connection in comers.greeting():
                    self._admit(Line(connection, "a node that joins"), roster, digest, token)
        return [self._lines[number] for number in sorted(self._lines)]

    def _admit(self, line: Line, roster: Roster, digest: str, token: str) -> None:
        """Take a node in, if it is one.

        Raises:
            NodeError: its files are others.
        """
        try:
            hello = line.expect(Kind.HELLO).record
        except NodeError:
            line.close()  # a stranger
            return
        number = hello.get("node")
        known = isinstance(number, int) and 0 < number < len(roster.nodes)
        if hello.get("token") != token or not isinstance(number, int) or not known:
            line.end("this is another run")
            return
        line.name = f"{roster.nodes[number].name} (node {number}, {hello.get('host')})"
        self._lines[number] = line
        if hello.get("digest") != digest:
            raise NodeError(
                f"{line.name} has another model than {_FIRST}: config.json, or names, sizes "
                "or weights of tensors differ: copy the same folder to all"
            )
        line.works(True)


def join(rank: Rank, digest: str) -> Line:
    """As another node, find the first one; the line to it.

    Raises:
        NodeError: it is not there.
    """
    until = time.monotonic() + JOIN_S
    store = rendezvous_store()
    try:
        store.wait([_ADDRESS], timedelta(seconds=JOIN_S))
        port, token = store.get(_ADDRESS).decode().split(maxsplit=1)
    except RuntimeError as error:
        raise NodeError(f"{_FIRST} did not begin: see what its process says") from error
    if port == "-":
        raise NodeError(f"{_FIRST} ended: {token}")
    host = os.environ["MASTER_ADDR"]
    try:
        left = max(1.0, until - time.monotonic())
        connection = socket.create_connection((host, int(port)), timeout=left)
    except OSError as error:
        raise NodeError(f"{_FIRST} at {host}:{port} cannot be reached: {error}") from error
    line = Line(connection, f"{_FIRST} ({host})", SILENCE_S)
    hello = {"node": rank.number, "token": token, "digest": digest, "host": socket.gethostname()}
    line.send(Kind.HELLO, hello)
    return line


def rendezvous_store() -> Any:  # noqa: ANN401 - torch has no types for it
    """The store of torchrun's rendezvous."""
    from torch.distributed import rendezvous

    try:
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=JOIN_S)))
    except (RuntimeError, ValueError) as error:
        raise NodeError(f"the nodes' rendezvous failed: {str(error).splitlines()[0]}") from error
    return store
