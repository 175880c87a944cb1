"""What a session tells whoever watches it, and how it is stopped."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


class Interrupted(BaseException):
    """Ends a pass between two layers; no Exception, so that nothing swallows it."""


class Interrupts(Protocol):
    """Says when to stop."""

    def check(self) -> None:
        """Raise `Interrupted` if somebody wants a stop."""
        ...

    def raising(self, allowed: bool) -> AbstractContextManager[None]:
        """Let a signal interrupt the body wherever it is, or only where it calls `check`."""
        ...


@dataclass(slots=True)
class Gauge:
    """How far something is.

    Attributes:
        done: bytes so far, or whatever is counted; may be called from another thread.
        total: bytes in the end; 0 when nobody knows.
        detail: more words about it; may be called from another thread.
    """

    done: Callable[[], int] = int
    total: int = 0
    detail: Callable[[], str] = str


@runtime_checkable
class Observer(Protocol):
    """Is told what goes on."""

    def note(self, sentence: str) -> None:
        """Take one line about something the user should know."""
        ...

    def waiting(self, label: str, *, stays: bool = True) -> AbstractContextManager[None]:
        """Be told what is waited for while the body runs, and whether it is worth a line."""
        ...

    def progress(self, label: str) -> AbstractContextManager[Gauge]:
        """Watch the gauge, which the body fills in, while it runs."""
        ...
