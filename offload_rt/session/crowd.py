"""Answers of many, in text, that come and go: what the server and the batch verb hold.

A `Crowd` has a `Scheduler` and the text of each answer. One thread has it; `leave` is for any.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from offload_rt.errors import OffloadError
from offload_rt.session.opening import Model
from offload_rt.text import RemoteStream

if TYPE_CHECKING:
    from offload_rt.engine import Engine, Request, SequenceState
    from offload_rt.engine.scheduler import Scheduler
    from offload_rt.engine.sequence import TokenLogprob


@dataclass(eq=False, slots=True)
class Member:
    """One answer in the making.

    Attributes:
        sequence: its tokens.
        stream: makes text of them.
        joined_s: when it was asked for, by the crowd's clock.
        admitted_s: when it got a cache.
        first_s: when its first token came.
        last_s: when its last one came as yet.
        over_s: when it ended.
        told: its tokens that were told of.
    """

    sequence: "SequenceState"
    stream: RemoteStream
    joined_s: float
    admitted_s: float | None = None
    first_s: float | None = None
    last_s: float | None = None
    over_s: float | None = None
    told: int = 0

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self.over_s is not None

    @property
    def finish_reason(self) -> str:
        """`stop`, `length`, `abort` or `error`; of one that is over."""
        if self.stream.stopped is not None:
            return "stop"
        assert self.sequence.finish_reason is not None
        return self.sequence.finish_reason.value

    @property
    def token_ids(self) -> list[int]:
        """Tokens up to the one that completed a stop string."""
        return self.sequence.emitted[: self.told]

    @property
    def logprobs(self) -> "list[TokenLogprob]":
        """Of those, where they were asked for."""
        return self.sequence.logprobs[: self.told]


@dataclass(frozen=True, slots=True)
class Gained:
    """What an answer gained in a sweep.

    Attributes:
        text: that is safe to show.
        tokens: how many more are told of.
        since_s: since the last ones before them; None: there were none, or there are none now.
    """

    member: Member
    text: str
    tokens: int
    since_s: float | None = None


@dataclass(slots=True)
class Crowd:
    """Answers of many in the making: each `advance` is one sweep.

    Args:
        model: whose tokenizer makes text of tokens.
        engine: makes the sweeps.
        patient: nobody waits for the single answer (`Scheduler`).
        check: called before each layer; what it raises ends the sweep in good order.
        clock: seconds.
    """

    model: Model
    engine: "Engine"
    patient: bool = False
    check: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.perf_counter
    scheduler: "Scheduler" = field(init=False)
    _members: "dict[SequenceState, Member]" = field(default_factory=dict)

    def __post_init__(self) -> None:
        from offload_rt.engine.scheduler import Scheduler

        self.scheduler = Scheduler(self.engine, patient=self.patient, check=self.check)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._members) or self.scheduler.busy

    def join(self, request: "Request", stop: Sequence[str] = ()) -> Member:
        """Have a prompt answered.

        Raises:
            OffloadError: it cannot be (`Scheduler.join`), or a stop string is empty.
        """
        stream = self.model.tokenizer.stream(stop)
        try:
            sequence = self.scheduler.join(request)
        except OffloadError:
            stream.finish()
            raise
        member = Member(sequence, stream, self.clock())
        self._members[sequence] = member
        return member

    def leave(self, member: Member) -> None:
        """Nobody waits for this one any more; from any thread."""
        self.scheduler.leave(member.sequence)

    def advance(self) -> list[Gained]:
        """Make a sweep; returns what answers gained, those that ended among them."""
        from offload_rt.engine import FinishReason

        waiting = [m for m in self._members.values() if m.admitted_s is None]
        start = self.clock()
        emitted = self.scheduler.sweep()
        now = self.clock()
        for member in waiting:
            if member.sequence.index >= 0:
                member.admitted_s = start
        members = [self._members[one.sequence] for one in emitted]
        texts = self._pushed(members)
        found = []
        for member, text in zip(members, texts, strict=True):
            if member.stream.stopped is not None:
                member.sequence.finish(FinishReason.STOP)
            new = member.stream.kept_tokens - member.told
            member.told += new
            since_s = now - member.last_s if new and member.last_s is not None else None
            if new:
                member.first_s, member.last_s = member.first_s or now, now
            if member.sequence.finish_reason is not None:
                text += self._ended(member)
                member.over_s = now
                del self._members[member.sequence]
            found.append(Gained(member, text, new, since_s))
        return found

    def _pushed(self, members: Sequence[Member]) -> list[str]:
        """The text of new tokens; if the tokenizer fails, these answers end with that."""
        pairs = [(m.stream, m.sequence.emitted[m.told :]) for m in members]
        try:
            return RemoteStream.push_each(pairs)
        except OffloadError as error:
            for member in members:
                member.sequence.fail(error)
            return [""] * len(members)

    def _ended(self, member: Member) -> str:
        """What a stream still held."""
        try:
            return member.stream.finish()
        except OffloadError as error:
            member.sequence.fail(error)
            return ""
