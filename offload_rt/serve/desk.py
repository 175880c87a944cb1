"""The one thread that has the engine: takes orders in, sweeps, and tells of what answers gained.

Orders come from the thread of the event loop. What passes between the two is a list behind a lock,
and whatever is told is a record that nobody changes. An order can be withdrawn at any time: its
sequence leaves before the next layer.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from offload_rt.engine.sequence import FinishReason, Request, TokenLogprob
from offload_rt.errors import OffloadError, SessionError
from offload_rt.report import Counters
from offload_rt.serve.bodies import Tally
from offload_rt.session.crowd import Crowd, Member
from offload_rt.session.opening import Model

if TYPE_CHECKING:
    from offload_rt.engine import Engine

_log = logging.getLogger(__name__)

_RATE_S = 1.0  # over which rates are taken, at least
_NO_COUNTERS = Counters(at_s=0.0, bytes_copied=0, kv_bytes_copied=0, busy_s=0.0, stalled_s=0.0)


@dataclass(frozen=True, slots=True)
class Told:
    """What an order gained.

    Attributes:
        text: that is safe to show.
        tokens: ids, up to the one that completed a stop string.
        logprobs: of those, where they were asked for.
        over: why it ended; None: more will come.
        error: why there is no answer.
        prompt_logprobs: of the prompt's tokens but the first, where they were asked for; before
            or with the first token.
        tally: what it took; at the end.
    """

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    over: str | None = None
    error: OffloadError | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    tally: Tally = Tally()


@dataclass(eq=False, slots=True)
class Order:
    """One answer that is wanted.

    Attributes:
        tell: takes what is told of it; called from the engine's thread.
        member: once it is taken in.
        withdrawn: nobody waits for it any more.
    """

    request: Request
    stop: tuple[str, ...]
    tell: Callable[[Told], None]
    member: Member | None = None
    withdrawn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the engine does and has done, at the end of a sweep.

    Attributes:
        counters: of the device.
        draft_sizes: tokens that are drafted for each where up to so many write.
        sweep_s: time in sweeps, all together.
        tokens_per_s: emitted of late.
        link_share: of the time of late in which copies were under way.
        compute_share: of it in which a sweep was made and did not wait for copies.
        link_bytes_per_s: that arrived of late, while copies were under way.
    """

    running: int = 0
    waiting: int = 0
    reserved_tokens: int = 0
    kept_tokens: int = 0
    sweeps: int = 0
    read_tokens: int = 0
    reused_tokens: int = 0
    emitted_tokens: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: tuple[int, ...] = ()
    ended: tuple[tuple[str, int], ...] = ()
    draft_sizes: tuple[tuple[int, int], ...] = ()
    counters: Counters = _NO_COUNTERS
    sweep_s: float = 0.0
    tokens_per_s: float = 0.0
    link_share: float = 0.0
    compute_share: float = 0.0
    link_bytes_per_s: float = 0.0


@dataclass(slots=True)
class Desk:
    """Takes orders for one engine.

    Args:
        model: that answers.
        on_over: called from the engine's thread with each order that has ended.
        on_gain: likewise with the seconds between tokens of an answer that came one after the
            other; what came in one sweep came together.

    Attributes:
        state: what the engine does; replaced after each sweep.
        broken: why it can answer nothing any more.
    """

    model: Model
    on_over: Callable[[Order, Told], None] = lambda order, told: None
    on_gain: Callable[[float], None] = lambda since_s: None
    state: State = field(default_factory=State)
    broken: str | None = None
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _arrived: list[Order] = field(default_factory=list)
    _orders: dict[Member, Order] = field(default_factory=dict)
    _ends: bool = False
    _marks: list[State] = field(default_factory=list)
    _loaded: Counters = _NO_COUNTERS  # what loading took

    @property
    def unfinished(self) -> int:
        """Orders that have not ended."""
        with self._changed:
            return len(self._arrived) + len(self._orders)

    def place(self, order: Order) -> None:
        """Have an order answered.

        Raises:
            SessionError: the engine can answer nothing any more.
        """
        with self._changed:
            if self.broken is not None or self._ends:
                raise SessionError(self.broken or "the server ends: ask another one")
            self._arrived.append(order)
            self._changed.notify()

    def withdraw(self, order: Order) -> None:
        """Nobody waits for an order any more."""
        order.withdrawn = True
        if order.member is not None:
            order.member.sequence.leaving = True

    def withdraw_all(self) -> None:
        """The same of all."""
        with self._changed:
            orders = [*self._arrived, *self._orders.values()]
        for order in orders:
            self.withdraw(order)

    def close(self) -> None:
        """Have `work` return once no order is left."""
        with self._changed:
            self._ends = True
            self._changed.notify()

    def work(self, engine: "Engine") -> None:
        """Answer orders until `close`; the engine is this thread's."""
        crowd, self._loaded = Crowd(self.model, engine), engine.counters()
        self._look(crowd, engine, 0.0)
        try:
            while self._take_in(crowd):
                start = time.perf_counter()
                gained = crowd.advance()
                took_s = time.perf_counter() - start
                for one in gained:
                    if one.since_s is not None:
                        self.on_gain(one.since_s)
                    self._tell(one.member, one.text, one.tokens)
                self._look(crowd, engine, took_s)
        except Exception as error:
            _log.exception("the engine failed")
            self._fail(f"the engine failed ({type(error).__name__}: {error}): start it again")
            raise

    def _take_in(self, crowd: Crowd) -> bool:
        """Wait for something to do; returns whether there is."""
        with self._changed:
            if not (self._arrived or crowd.busy or self._ends):
                self._rest()
            while not (self._arrived or crowd.busy or self._ends):
                self._changed.wait()
            arrived = [*self._arrived]
            if self._ends and not arrived and not crowd.busy:
                return False
        for order in arrived:  # each is in one of the lists all the time: all may be to end
            try:
                member = crowd.join(order.request, order.stop)
            except OffloadError as error:
                with self._changed:
                    self._arrived.remove(order)
                self._over(order, Told(over=FinishReason.ERROR, error=error))
                continue
            with self._changed:
                self._arrived.remove(order)
                order.member = member
                self._orders[member] = order
            if order.withdrawn:  # before it was a member
                crowd.leave(member)
        return True

    def _tell(self, member: Member, text: str, tokens: int) -> None:
        """Tell of what an answer gained."""
        order = self._orders[member]
        kept, logprobs = member.token_ids, member.logprobs
        sequence, first = member.sequence, member.told == tokens
        told = Told(
            text=text,
            tokens=tuple(kept[len(kept) - tokens :]),
            logprobs=tuple(logprobs[len(kept) - tokens :]),
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
        )
        if not member.is_over:
            order.tell(told)
            return
        with self._changed:
            del self._orders[member]
        self._over(
            order,
            replace(
                told,
                over=member.finish_reason,
                error=sequence.error,
                tally=tally_of(member),
            ),
        )

    def _over(self, order: Order, told: Told) -> None:
        self.on_over(order, told)
        order.tell(told)

    def _fail(self, why: str) -> None:
        """End all orders, and take no more."""
        with self._changed:
            self.broken = why
            orders = [*self._arrived, *self._orders.values()]
            self._arrived, self._orders = [], {}
        for order in orders:
            self._over(order, Told(over=FinishReason.ERROR, error=SessionError(why)))

    def _rest(self) -> None:
        """Nothing is done for a while, so nothing is fast."""
        self._marks.clear()
        self.state = replace(
            self.state, tokens_per_s=0.0, link_share=0.0, compute_share=0.0, link_bytes_per_s=0.0
        )

    def _look(self, crowd: Crowd, engine: "Engine", took_s: float) -> None:
        """Note what the engine has done."""
        scheduler, before = crowd.scheduler, self.state
        totals = scheduler.totals
        state = State(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            reserved_tokens=sum(len(s.request.ids) + s.max_tokens for s in scheduler.running),
            kept_tokens=scheduler.kept_tokens,
            sweeps=totals.sweeps,
            read_tokens=totals.read_tokens,
            reused_tokens=totals.reused_tokens,
            emitted_tokens=totals.emitted_tokens,
            drafts=totals.drafts,
            drafted_tokens=totals.drafted_tokens,
            accepted_tokens=totals.accepted_tokens,
            accepted_at=tuple(totals.accepted_at),
            ended=tuple((str(reason), count) for reason, count in totals.ended.items()),
            draft_sizes=tuple(engine.draft_sizes.items()),
            counters=engine.counters().since(self._loaded),
            sweep_s=before.sweep_s + took_s,
        )
        self._marks.append(state)
        while len(self._marks) > 2 and state.counters.at_s - self._marks[1].counters.at_s > _RATE_S:
            del self._marks[0]
        self.state = _with_rates(state, self._marks[0])


def _with_rates(state: State, mark: State) -> State:
    """A state with the rates since another."""
    since = state.counters.since(mark.counters)
    if since.at_s <= 0.0:
        return state
    swept_s = state.sweep_s - mark.sweep_s
    return replace(
        state,
        tokens_per_s=(state.emitted_tokens - mark.emitted_tokens) / since.at_s,
        link_share=min(1.0, since.busy_s / since.at_s),
        compute_share=min(1.0, max(0.0, swept_s - since.stalled_s) / since.at_s),
        link_bytes_per_s=since.bytes_copied / since.busy_s if since.busy_s else 0.0,
    )


def tally_of(member: Member) -> Tally:
    """What an answer took."""
    sequence, over_s = member.sequence, member.over_s or member.joined_s
    admitted_s = over_s if member.admitted_s is None else member.admitted_s
    first_s = over_s if member.first_s is None else member.first_s
    return Tally(
        prompt_tokens=sequence.prompt_tokens,
        reused_tokens=sequence.reused,
        answer_tokens=member.told,
        drafted=sequence.drafted,
        accepted=sequence.accepted,
        queue_s=admitted_s - member.joined_s,
        prompt_s=first_s - admitted_s,
        answer_s=over_s - first_s,
    )


def known_tokens(told: Sequence[TokenLogprob]) -> set[int]:
    """All tokens whose texts are needed to tell of these."""
    found = {one.token for one in told}
    return found | {token for one in told for token, _ in one.likeliest}
