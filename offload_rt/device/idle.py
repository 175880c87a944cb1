"""Copies that are offered: made while nobody waits for any other one. No torch here.

One thread makes them, a step of a few MiB at a time. Before each step it waits until nothing that
was asked for is on its way, so a copy that is asked for waits for the step under way at most.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from offload_rt.device.base import CopyBlock


@dataclass(slots=True, eq=False)
class Steps:
    """What is left of a copy.

    Attributes:
        left: steps that have not begun.
        begun_bytes: of those that have.
        running: one of them is under way.
    """

    left: deque[CopyBlock] = field(default_factory=deque)
    begun_bytes: int = 0
    running: bool = False


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

    def add(self, blocks: Sequence[CopyBlock], *, last: bool = False) -> Steps:
        """Offer steps, behind all others if `last`; what they raise is theirs to keep."""
        steps = Steps(deque(blocks))
        with self._changed:
            if self._thread.ident is None:
                self._thread.start()
            self._offered[last].append(steps)
            self._changed.notify_all()
        return steps

    def take_back(self, steps: Steps) -> list[CopyBlock]:
        """The steps that have not begun, which are made no more."""
        with self._changed:
            left = [*steps.left]
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
            block.run()
            with self._changed:
                steps.running = False
                self._changed.notify_all()

    def _next(self) -> Steps | None:
        """What has a step to make; what has none any more is forgotten."""
        for offered in self._offered:
            while offered and not offered[0].left:
                offered.popleft()
            if offered:
                return offered[0]
        return None
