"""Copies that are offered: made while nobody waits for any other one. No torch here.

One thread makes them, a step of a few MiB at a time. Before each step it waits until nothing that
was asked for is on its way, so a copy that is asked for waits for the step under way at most.

Nobody has asked for what fails here, so it is told to nobody. The step counts as one that has not
begun, and is left to whoever asks for the copy; only how it ends then is an answer.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from offload_rt.device.base import CopyBlock

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


class IdleCopies:
    """Makes steps in the order they were offered, those last that may be last.

    Args:
        quiet: blocks until nothing that was asked for is on its way.
    """

    def __init__(self, quiet: Callable[[], None]) -> None:
        self._quiet = quiet
        self._offered: tuple[deque[Steps], deque[Steps]] = deque(), deque()  # these come last
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="idle-copies", daemon=True)

    def add(
        self,
        blocks: Sequence[CopyBlock],
        run: Callable[[CopyBlock], None],
        *,
        last: bool = False,
    ) -> Steps:
        """Offer steps, which `run` makes on the thread; behind all others if `last`."""
        steps = Steps(run, deque(blocks))
        with self._changed:
            if self._thread.ident is None:
                self._thread.start()
            self._offered[last].append(steps)
            self._changed.notify_all()
        return steps

    def take_back(self, steps: Steps, fails: Callable[[CopyBlock], None]) -> list[CopyBlock]:
        """The steps that have not begun, or failed, which are made no more.

        Args:
            steps: of a copy.
            fails: is called with the one under way, if it does; before `wait_for` returns.
        """
        with self._changed:
            steps.fails, left = fails, [*steps.left]
            steps.left.clear()
        return left

    def wait_for(self, steps: Steps) -> None:
        """Block until none of them is under way."""
        with self._changed:
            self._changed.wait_for(lambda: not steps.running)

    def close(self) -> None:
        """Drop what has not begun, wait for what has."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._next() is not None)
                if self._closed:
                    return
            self._quiet()
            with self._changed:
                if self._closed or (steps := self._next()) is None:
                    continue
                block = steps.left.popleft()
                steps.running, steps.begun_bytes = True, steps.begun_bytes + block.nbytes
            failed = self._fails(steps, block)
            with self._changed:
                if failed:
                    self._give_back(steps, block)
                steps.running = False
                self._changed.notify_all()

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
        for offered in self._offered:
            while offered and (offered[0].failed or not offered[0].left):
                offered.popleft()
            if offered:
                return offered[0]
        return None
