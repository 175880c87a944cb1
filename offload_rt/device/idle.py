"""Copies that are offered: made while nobody waits for any other one. No torch here.

One thread makes them, a step of a few MiB at a time. Before each step it waits until nothing that
was asked for is on its way, so a copy that is asked for waits for the step under way at most.

A copy that is offered behind all others is cut into steps when its turn comes, and what that took
is let go when it is there: of thousands that wait, one takes the memory of a copy at a time.

Nobody has asked for what fails here, so it is told to nobody. The step counts as one that has not
begun, and is left to whoever asks for the copy; only how it ends then is an answer.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from offload_rt.device.base import CopyBlock, DeviceBuffer, Event, HomeSource, Offer

ItemT = TypeVar("ItemT")
_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Steps:
    """What is left of a copy.

    Attributes:
        run: makes one of them.
        left: steps that have not begun.
        begun_bytes: of those that have.
        running: one of them is under way.
        failed: one of them did, and none is made any more but by whoever asks.
        fails: whoever took back what was left has the step under way too, if it fails.
    """

    run: Callable[[CopyBlock], None]
    left: deque[CopyBlock] = field(default_factory=deque)
    begun_bytes: int = 0
    running: bool = False
    failed: bool = False
    fails: Callable[[CopyBlock], None] | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing of it is made any more."""
        return self.failed or not self.left


class LateStream(Protocol):
    """A copy stream, as copies see it that are offered behind all others."""

    def copy(self, dst: DeviceBuffer, src: HomeSource) -> None:
        """As of `CopyStream`."""

    def record(self) -> Event:
        """As of `Stream`."""

    def reached(self) -> Event:
        """Return an event behind all that was offered and is there."""

    def offer_last(self, dst: DeviceBuffer, src: HomeSource) -> Offer:
        """Cut a copy into steps that are the last ones."""


class LateOffer:
    """A copy that is offered behind all others, and cut into steps when its turn comes."""

    __slots__ = ("_begun_bytes", "_dst", "_idle", "_is_settled", "_made", "_src", "_stream")

    def __init__(
        self, stream: LateStream, idle: "IdleCopies", dst: DeviceBuffer, src: HomeSource
    ) -> None:
        self._stream, self._idle, self._dst, self._src = stream, idle, dst, src
        self._made: Offer | None = None  # from its turn until it is there
        self._begun_bytes = 0  # once it is
        self._is_settled = False  # asked for, or dropped
        idle.add_late(self)

    @property
    def begun_bytes(self) -> int:
        """Of it, that have begun to be copied."""
        with self._idle.changed:
            return self._begun_bytes if self._made is None else self._made.begun_bytes

    def ask(self) -> Event:
        """Have what is left copied in its turn."""
        made = self._settle()
        if made is not None:
            return made.ask()
        if self._begun_bytes:
            return self._stream.reached()
        self._stream.copy(self._dst, self._src)
        return self._stream.record()

    def drop(self) -> Event:
        """Copy no more of it."""
        made = self._settle()
        return self._stream.reached() if made is None else made.drop()

    def _settle(self) -> Offer | None:
        with self._idle.changed:
            self._is_settled = True
            return self._made

    def begin(self) -> None:
        """Its turn has come; one that cannot be cut is left to whoever asks. On the thread."""
        if self._is_settled:
            return
        try:
            self._made = self._stream.offer_last(self._dst, self._src)
        except Exception:  # noqa: BLE001 - others are to have their turn
            _log.debug("a copy that nobody asked for was not begun", exc_info=True)

    def end(self, *, failed: bool) -> None:
        """It is there, or else to be copied anew by whoever asks; on the thread."""
        if not self._is_settled:
            self._made, self._begun_bytes = None, 0 if failed else self._src.nbytes


class IdleCopies:
    """Makes steps in the order they were offered, and then those of late offers.

    Args:
        quiet: blocks until nothing that was asked for is on its way.

    Attributes:
        changed: who holds it sees no change of what is offered.
    """

    def __init__(self, quiet: Callable[[], None]) -> None:
        self._quiet = quiet
        self._offered = deque[Steps]()
        self._late = deque[LateOffer]()  # whose turn has not come
        self._turn: LateOffer | None = None
        self._last: Steps | None = None  # of that
        self.changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="idle-copies", daemon=True)

    def add(
        self,
        blocks: Sequence[CopyBlock],
        run: Callable[[CopyBlock], None],
        *,
        last: bool = False,
    ) -> Steps:
        """Offer steps, which `run` makes on the thread; if `last`, those of a late offer."""
        steps = Steps(run, deque(blocks))
        if last:  # on the thread
            self._last = steps
        else:
            self._add(self._offered, steps)
        return steps

    def add_late(self, late: LateOffer) -> None:
        """Offer a copy behind all that is offered otherwise, whenever it is."""
        self._add(self._late, late)

    def _add(self, queue: deque[ItemT], item: ItemT) -> None:
        with self.changed:
            if self._thread.ident is None:
                self._thread.start()
            queue.append(item)
            self.changed.notify_all()

    def take_back(self, steps: Steps, fails: Callable[[CopyBlock], None]) -> list[CopyBlock]:
        """The steps that have not begun, or failed, which are made no more.

        Args:
            steps: of a copy.
            fails: is called with the one under way, if it does; before `wait_for` returns.
        """
        with self.changed:
            steps.fails, left = fails, [*steps.left]
            steps.left.clear()
        return left

    def wait_for(self, steps: Steps) -> None:
        """Block until none of them is under way."""
        with self.changed:
            self.changed.wait_for(lambda: not steps.running)

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._closed or self._next() is not None)
                if self._closed:
                    return
            self._quiet()
            with self.changed:
                if self._closed or (steps := self._next()) is None:
                    continue
                block = steps.left.popleft()
                steps.running, steps.begun_bytes = True, steps.begun_bytes + block.nbytes
            failed = self._fails(steps, block)
            with self.changed:
                if failed:
                    self._give_back(steps, block)
                steps.running = False
                self.changed.notify_all()

    def _fails(self, steps: Steps, block: CopyBlock) -> bool:
        try:
            steps.run(block)
        except Exception as error:  # noqa: BLE001 - it may be read well when it is asked for
            _log.debug("a copy that nobody asked for failed: %s", error)
            return True
        return False

    def _give_back(self, steps: Steps, block: CopyBlock) -> None:
        """Leave a step that failed to whoever asks, or has."""
        steps.failed = True
        steps.begun_bytes -= block.nbytes
        if steps.fails is None:
            steps.left.appendleft(block)
        else:
            steps.fails(block)

    def _next(self) -> Steps | None:
        """What has a step to make; what has none any more, or failed, is forgotten."""
        while self._offered and self._offered[0].is_over:
            self._offered.popleft()
        if self._offered:
            return self._offered[0]
        while self._last is None or self._last.is_over:
            if self._turn is not None and self._last is not None:
                self._turn.end(failed=self._last.failed)
            self._last = self._turn = None
            if not self._late:
                return None
            self._turn = self._late.popleft()
            self._turn.begin()
        return self._last
