"""Work whose first half runs on several threads at once and whose second half runs in order.

Feeding a GPU from files needs both: several reads in flight, and copies that are enqueued to the
driver in exactly the order the program asked for, between the event waits that make them safe.
"""

import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import Generic, TypeVar

from offload_rt.errors import DeviceError

LocalT = TypeVar("LocalT")

Action = Callable[[], None]
Prepare = Callable[[LocalT], Action]


def nothing() -> None:
    """The second half of work that has only a first one."""


class OrderedQueue(Generic[LocalT]):
    """Runs `prepare` steps in parallel and what they return one by one, in the order of submission.

    Tickets are drawn in order, so the ticket whose turn it is is always held by a thread that does
    not wait for another one: no deadlock, whatever the number of threads. The first error stops
    everything after it, except actions marked `always`. One thread submits.

    Args:
        threads: first halves in flight at once; the threads start when first needed.
        make_local: makes what each thread keeps for itself.

    Attributes:
        error: what the first failure raised.
    """

    def __init__(self, threads: int, make_local: Callable[[], LocalT]) -> None:
        self.error: BaseException | None = None
        self._make_local = make_local
        self._queue: SimpleQueue[tuple[int, Prepare[LocalT], bool] | None] = SimpleQueue()
        self._lock = threading.RLock()
        self._turn = threading.Condition(self._lock)
        self._issued = self._finished = 0
        self._threads = [
            threading.Thread(target=self._work, name=f"feeder-{i}", daemon=True)
            for i in range(threads)
        ]

    def act(self, action: Action, *, always: bool = False) -> None:
        """Run `action` in its turn: at once, on this thread, when nothing is under way."""
        with self._lock:
            if self._issued == self._finished:
                self._run(action, always)
                return
        self.prepare(lambda _: action, always=always)

    def prepare(self, prepare: Prepare[LocalT], *, always: bool = False) -> None:
        """Run `prepare` on a thread of the queue, then what it returns in its turn."""
        for thread in self._threads:
            if thread.ident is None:
                thread.start()
        with self._turn:
            self._queue.put((self._issued, prepare, always))
            self._issued += 1

    def is_empty(self) -> bool:
        """Whether all that was submitted so far has run."""
        with self._lock:
            return self._issued == self._finished

    def wait_until_empty(self) -> None:
        """Block until all that was submitted so far has run."""
        with self._turn:
            self._turn.wait_for(self.is_empty)

    def close(self) -> None:
        """Drop what is not started, wait for what is, end the threads."""
        self.error = self.error or DeviceError("the device was closed while a copy was waiting")
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _is_next(self, number: int) -> bool:
        return self._finished == number

    def _run(self, action: Action, always: bool) -> None:
        if self.error is not None and not always:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 - handed to whoever waits for an event
            self.error = self.error or error

    def _work(self) -> None:
        local = self._make_local()
        while (item := self._queue.get()) is not None:
            number, prepare, always = item
            action, failure = nothing, None
            if self.error is None or always:
                try:
                    action = prepare(local)
                except Exception as error:  # noqa: BLE001 - handed to whoever waits for an event
                    failure = error
            with self._turn:
                self._turn.wait_for(partial(self._is_next, number))
                self.error = self.error or failure
                self._run(action, always)
                self._finished += 1
                self._turn.notify_all()
