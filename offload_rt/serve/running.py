"""uvicorn around the application: how it starts, and how it ends without losing an answer.

The first SIGTERM or Ctrl-C drains: no more requests are taken, those in the making are finished,
for so long as `drain_s` says; then they end. A second one ends all at once.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from offload_rt.serve.app import Service
from offload_rt.serve.guards import App

HEADERS_S = 20.0  # in which the headers of a request must have come
SEND_S, SEND_BYTES = 60.0, 2**16  # in which a client must take so much of what waits for it, or all
_CONNECTIONS = 1024
_LEAVE_S = 2.0  # for what is told last to reach its client


class _Impatient(H11Protocol):
    """Closes a connection that does not come to say what it wants, for the first time or again.

    And one that does not take what it is sent: the next piece of an answer is made when nothing of
    the last waits here, so a reader that is slow has the kernel's buffers and one piece.
    """

    _patience: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # tell of every byte that waits
        self._patience = self.loop.call_later(HEADERS_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        """Wait for the rest of headers; uvicorn waits for the first byte of a further request."""
        super().data_received(data)
        # Answered before its body came: what is left of that is thrown away, and not for ever.
        early = self.conn.our_state is h11.DONE
        if self.conn.their_state is not h11.IDLE and not early:
            self._be_patient()
        elif self._patience is None:
            self._patience = self.loop.call_later(HEADERS_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._be_patient()
        self._stop_looking()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """See that the client takes what waits."""
        super().pause_writing()
        self._look_later()

    def resume_writing(self) -> None:
        """It has taken all."""
        super().resume_writing()
        self._stop_looking()

    def _look_later(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(SEND_S, self._look, left)

    def _look(self, before: int) -> None:
        if self.transport.get_write_buffer_size() > before - SEND_BYTES:
            self.transport.abort()  # to close would wait for it
        else:
            self._look_later()

    def _stop_looking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _be_patient(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _give_up(self) -> None:
        self._patience = None
        if not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's, with an end of our own."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: float) -> None:
        super().__init__(config)
        self._service, self._drain_s = service, drain_s

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain; the second time, end."""
        if self._service.draining:
            self._service.desk.withdraw_all()
            self.should_exit = self.force_exit = True
            return
        self._service.draining = True
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        """Wait for what is in the making, then have it end."""
        desk, until_s = self._service.desk, time.monotonic() + self._drain_s
        if left := desk.unfinished:
            self._service.log(f"{left} answers are finished, for up to {self._drain_s:g} s")
        # Of those that were counted in some are no orders yet, and others are not told to the end.
        while (desk.unfinished or self._service.unanswered) and time.monotonic() < until_s:
            time.sleep(0.05)
        desk.withdraw_all()
        self.should_exit = True


def run_server(
    app: App,
    service: Service,
    *,
    host: str,
    port: int,
    drain_s: float,
    on_started: Callable[[str], None],
) -> None:
    """Answer requests until a signal ends it; in the main thread.

    Args:
        app: the application.
        service: behind it.
        host: address to listen at.
        port: 0 takes a free one.
        drain_s: for which answers in the making are finished at the end.
        on_started: called with the address, once requests are taken.

    Raises:
        OSError: it cannot listen there.
    """
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_Impatient,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=_CONNECTIONS,
        timeout_graceful_shutdown=int(_LEAVE_S),
    )
    listening = _listen(host, port)
    at = listening.getsockname()
    shown = f"[{at[0]}]" if ":" in at[0] else at[0]
    server = Server(config, service, drain_s)

    async def serve() -> None:
        task = asyncio.ensure_future(server.serve(sockets=[listening]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started:
            on_started(f"http://{shown}:{at[1]}")
        try:
            await task
        finally:  # asyncio waits for the threads that wait for a text
            service.end()

    asyncio.run(serve())


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
    except OSError:
        found.close()
        raise
    return found
