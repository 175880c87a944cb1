"""Who takes part in the next pass: one sweep of the weights serves everybody.

    scheduler = Scheduler(engine)
    sequence = scheduler.join(Request(ids=prompt, max_tokens=64))
    while scheduler.busy:
        for emitted in scheduler.sweep(): ...

Sequences join and leave between sweeps, and one that nobody waits for any more leaves between two
layers. What one of them answers does not depend on the others: each has its own cache, randomness
and drafter.

**Admission** is first come, first served. A sequence is admitted when there is a cache for it and
memory for its prompt and its whole answer, so none is ever put aside for another. The first of the
queue is not overtaken, but by those that would read what another is just reading: they wait to copy
it. Sequences end, so nobody waits for ever.

**Prompts** are read in the sweeps in which others write. How many tokens a sweep reads is shared as
equally as they can use it, so a short prompt is not behind a long one. It is as many as make the
sweep take twice the time of one that reads nothing: nobody who writes waits longer than for one
sweep more. Where nobody writes it is four times that, and no less than a quarter of a second: who
comes meanwhile waits for no more. The plan foresees these times, and sweeps correct them.

**Prefixes**: rows that there are of the same first tokens are not computed again (`seats.py`).
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from offload_rt.engine.decoding import Run, check_prompt, new_sequence, seat
from offload_rt.engine.engine import Engine
from offload_rt.engine.seats import Found, Seats
from offload_rt.engine.sequence import Emitted, FinishReason, Request, SequenceState
from offload_rt.errors import CapacityError, ConfigError, DeviceError, OffloadError
from offload_rt.kv.prefixes import common_prefix
from offload_rt.nodes.line import NodeError

_log = logging.getLogger(__name__)

LEAST_READ = 8  # tokens of a sweep: products of so many rows take about as long as of one
SHARED_TOKENS = 32  # of a prompt, for which it is worth while to wait until another has read them
_SWEEPS_WHERE_NOBODY_WRITES = 4.0
_NO_WAIT_S = 0.25  # of a sweep, which nobody minds who comes meanwhile
_MEMORY = 16  # sweeps an average looks back, about


class _AllLeft(BaseException):
    """Ends a pass between two layers; no Exception, so that nothing swallows it."""


@dataclass(slots=True)
class Pace:
    """How many prompt tokens a sweep may read, from how long sweeps took.

    Attributes:
        first: tokens while nothing is known.
        plain_s: of a sweep that reads nothing, as foreseen and then as seen; 0: not known.
        row_s: that each token read adds, likewise.
    """

    first: int
    plain_s: float = 0.0
    row_s: float = 0.0
    _plain: int = 0
    _reads: int = 0

    def tokens(self, writes: bool) -> int:
        """Tokens of the next sweep, in which somebody writes, or nobody does."""
        if not self.row_s or not self.plain_s:
            return self.first
        alone_s = max(_SWEEPS_WHERE_NOBODY_WRITES * self.plain_s, _NO_WAIT_S)
        return max(LEAST_READ, int(min((self.plain_s if writes else alone_s) / self.row_s, 2**30)))

    def note(self, took_s: float, rows: int) -> None:
        """Take in a sweep that read so many tokens."""
        if not rows:
            took_s = min(took_s, 3.0 * self.plain_s) if self._plain else took_s
            self._plain = min(self._plain + 1, _MEMORY)
            self.plain_s += (took_s - self.plain_s) / self._plain
        elif rows >= LEAST_READ:
            self._reads = min(self._reads + 1, _MEMORY)
            row_s = max(took_s - self.plain_s, 0.0) / rows
            self.row_s += (row_s - self.row_s) / self._reads


def shares(most: int, wants: Sequence[int]) -> list[int]:
    """Share `most` among those who want something: equally, and nobody gets more than he wants."""
    given = [0] * len(wants)
    for left, place in zip(
        range(len(wants), 0, -1), sorted(range(len(wants)), key=lambda i: wants[i]), strict=True
    ):
        given[place] = min(wants[place], -(-most // left))
        most -= given[place]
    return given


@dataclass(slots=True)
class Totals:
    """What was done so far, for whoever watches.

    Attributes:
        sweeps: passes over the weights.
        read_tokens: of prompts, computed.
        reused_tokens: of prompts, found in a cache.
        emitted_tokens: of answers.
        drafts: that had a token, of `drafted_tokens` together.
        accepted_tokens: of these, tokens kept; by their depth in the draft `accepted_at`.
        ended: sequences, by why.
    """

    sweeps: int = 0
    read_tokens: int = 0
    reused_tokens: int = 0
    emitted_tokens: int = 0
    drafts: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: Sequence[int] = ()
    ended: dict[FinishReason, int] = field(default_factory=dict)


class Scheduler:
    """Sequences of an engine that come and go. One thread has it; only `leave` is for any thread.

    Args:
        engine: makes the passes.
        patient: nobody waits for the single answer, so a sweep reads as many tokens as there is
            memory for.
        check: called before each layer; what it raises ends the pass in good order.
        clock: seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        patient: bool = False,
        check: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._patient, self._check, self._clock = engine, patient, check, clock
        self.run = Run(engine, [], engine.draft.accept, engine.draft.kind)
        self.totals = Totals()
        self._waiting: deque[SequenceState] = deque()
        self._seats = Seats(engine)
        plan = engine.plan
        foreseen_s = 0.0 if plan.prediction is None else plan.prediction.step_s
        self._pace = Pace(engine.config.prefill_chunk_tokens, foreseen_s, plan.row_s)
        self._taking_part: dict[int, SequenceState] = {}  # by cache
        engine.poll_with(self._poll)
        engine.leave_with(self._has_left)

    @property
    def waiting(self) -> Sequence[SequenceState]:
        """Sequences that are not admitted yet, in their order."""
        return self._waiting

    @property
    def running(self) -> Sequence[SequenceState]:
        """Sequences that have a cache."""
        return self.run.sequences

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self.run.sequences)

    @property
    def kept_tokens(self) -> int:
        """Rows of KV that are set aside for sequences or hold what they were."""
        return self._seats.kept_tokens

    def join(self, request: Request) -> SequenceState:
        """Have a prompt answered.

        Raises:
            CapacityError: there will never be memory for it.
            ConfigError: the prompt is empty, has a token that the embedding has no row for, or is
                to be scored where that cannot be.
        """
        engine = self._engine
        most = min(max(engine.capacities), engine.kv_tokens)
        check_prompt(engine, request.ids, most + (not request.max_tokens))
        needed = len(request.ids) + request.max_tokens
        if needed > most:
            raise CapacityError(
                f"the prompt has {len(request.ids)} tokens, its answer may have "
                f"{request.max_tokens}: {needed} together, there is room for {most}: shorten the "
                "prompt, or ask for a shorter answer"
            )
        if request.draft_tokens is not None and request.draft_tokens < 0:
            raise ConfigError(f"draft_tokens is {request.draft_tokens}, accepted is 0 or more")
        sequence = new_sequence(engine, request)
        self._waiting.append(sequence)
        return sequence

    def leave(self, sequence: SequenceState) -> None:
        """Nobody waits for this one any more: it ends before the next layer; from any thread."""
        sequence.leaving = True

    def sweep(self) -> list[Emitted]:
        """Make one pass for all who can take part.

        Returns:
            What sequences gained; one that ended is among them, if only with nothing.
        """
        ended = [s for s in (*self._waiting, *self.run.sequences) if s.leaving]
        for sequence in ended:
            sequence.finish(FinishReason.ABORT)
            if sequence.index < 0:
                self._waiting.remove(sequence)
                self._count_end(sequence)
        self._let_go()
        self._admit()
        reading = self._parts()
        read = {sequence for sequence, _ in reading}
        writing = [s for s in self.run.sequences if s not in read and self._is_read(s)]
        emitted = self._swept(reading, writing) if reading or writing else []
        told = {one.sequence for one in emitted}
        over = [s for s in self.run.sequences if s.finish_reason is not None and s not in told]
        self._let_go()
        emitted += [Emitted(sequence, []) for sequence in (*ended, *over)]
        self._count(emitted)
        return emitted

    def forget(self) -> None:
        """Forget what caches of ended sequences hold."""
        self._seats.forget_all()

    def _admit(self) -> None:
        """Give caches to sequences of the queue, in their order."""
        for sequence in list(self._waiting):
            need = len(sequence.ids) + sequence.max_tokens
            if not self._seats.may_hold(need):
                return
            # Each row of a prompt that is scored has something to say.
            found = Found() if sequence.request.scores else self._seats.find(sequence.ids)
            if self._is_being_read(sequence, found.tokens):
                continue
            index = self._seats.take(sequence.ids, need, found)
            if index is None:
                return
            self._waiting.remove(sequence)
            seat(self._engine, sequence, index)
            sequence.reused = self._engine.kept_tokens(index)
            if self._by_times(sequence):
                sequence.drafter = sequence.retrieval = None
            self.run.sequences.append(sequence)
            self.totals.reused_tokens += sequence.reused

    def _is_being_read(self, sequence: SequenceState, common: int) -> bool:
        """Whether another is just reading more of a prompt than any cache holds yet."""
        if self._engine.prefixes is None or sequence.request.scores:
            return False
        ids = sequence.ids[:-1]
        return any(
            common_prefix(other.request.ids, ids) >= common + SHARED_TOKENS
            for other in self.run.sequences
            if not self._is_read(other)
        )

    def _by_times(self, sequence: SequenceState) -> bool:
        """Whether measured times would decide about drafts of an answer that is to come again."""
        decides = self._engine.controller is not None and not self._engine.repeats_answers
        return sequence.sampling.repeats and decides and sequence.request.draft_tokens is None

    def _is_read(self, sequence: SequenceState) -> bool:
        """Whether all of a prompt is in its cache."""
        return self._engine.kept_tokens(sequence.index) >= sequence.prompt_tokens

    def _parts(self) -> list[tuple[SequenceState, int]]:
        """Who reads in this sweep, and how many tokens."""
        engine = self._engine
        reading = [s for s in self.run.sequences if not self._is_read(s)]
        writing = len(self.run.sequences) - len(reading)
        most = engine.pass_rows - writing * (1 + engine.draft.nodes)
        if not self._patient:
            most = min(most, self._pace.tokens(writes=writing > 0))
        most = max(most, 1)
        wants = [len(s.ids) - engine.kept_tokens(s.index) for s in reading]
        scored = engine.config.prefill_chunk_tokens  # whose hidden states are all kept
        wants = [
            min(want, scored) if s.request.scores else want
            for s, want in zip(reading, wants, strict=True)
        ]
        pairs = zip(reading, shares(most, wants), strict=True)
        return [(sequence, count) for sequence, count in pairs if count]

    def _swept(
        self, reading: Sequence[tuple[SequenceState, int]], writing: Sequence[SequenceState]
    ) -> list[Emitted]:
        """Make a pass; where it fails, find out whose fault that is, and let the others go on."""
        taking_part = [*(sequence for sequence, _ in reading), *writing]
        start = self._clock()
        try:
            with self._polled(taking_part):
                emitted = self.run.sweep(reading, writing)
        except _AllLeft:
            for sequence in taking_part:
                sequence.finish(FinishReason.ABORT)
            return []
        except NodeError:  # no pass can be made any more
            raise
        except (OffloadError, RuntimeError, MemoryError, OSError) as error:
            for sequence in taking_part:
                self._engine.truncate(sequence.index, self._committed(sequence))
            if len(taking_part) == 1:
                taking_part[0].fail(_as_ours(error))
                self._forget_quietly(taking_part[0].index)
                return []
            _log.warning("a pass failed (%s): it is made again in two parts", error)
            half = max(1, len(reading) // 2) if len(reading) > 1 else len(reading)
            if not writing or len(reading) > 1:
                return self._swept(reading[:half], ()) + self._swept(reading[half:], writing)
            if reading:
                return self._swept(reading, ()) + self._swept((), writing)
            half = len(writing) // 2
            return self._swept((), writing[:half]) + self._swept((), writing[half:])
        self._pace.note(self._clock() - start, sum(count for _, count in reading))
        self.totals.sweeps += 1
        self.totals.read_tokens += sum(count for _, count in reading)
        return emitted

    def _committed(self, sequence: SequenceState) -> int:
        """Rows of a sequence that are kept, whatever became of the last pass."""
        return min(self._engine.kept_tokens(sequence.index), len(sequence.ids) - 1)

    def _forget_quietly(self, index: int) -> None:
        """Let a cache begin anew after an error, if it can."""
        try:
            self._seats.forget(index)
        except (OffloadError, RuntimeError) as error:
            _log.warning("a cache could not be emptied: %s", error)

    @contextmanager
    def _polled(self, taking_part: Sequence[SequenceState]) -> Iterator[None]:
        self._taking_part = {sequence.index: sequence for sequence in taking_part}
        try:
            yield
        finally:
            self._taking_part = {}

    def _poll(self) -> None:
        self._check()
        if self._taking_part and all(s.leaving for s in self._taking_part.values()):
            raise _AllLeft

    def _has_left(self, index: int) -> bool:
        return index in self._taking_part and self._taking_part[index].leaving

    def _let_go(self) -> None:
        """Take sequences that ended out; their caches stay as they are until they are needed."""
        for sequence in [s for s in self.run.sequences if s.finish_reason is not None]:
            self.run.sequences.remove(sequence)
            self._seats.give_back(sequence.index)
            self._count_end(sequence)

    def _count_end(self, sequence: SequenceState) -> None:
        assert sequence.finish_reason is not None
        ended, reason = self.totals.ended, sequence.finish_reason
        ended[reason] = ended.get(reason, 0) + 1

    def _count(self, emitted: Sequence[Emitted]) -> None:
        totals, counts = self.totals, self.run.counts
        totals.emitted_tokens += sum(len(one.token_ids) for one in emitted)
        totals.drafted_tokens, totals.accepted_tokens = counts.drafted, counts.accepted
        totals.drafts, totals.accepted_at = (counts.reached or [0])[0], counts.kept


def _as_ours(error: Exception) -> OffloadError:
    """An error of a pass, as one that can be told."""
    return error if isinstance(error, OffloadError) else DeviceError(f"a pass failed: {error}")
