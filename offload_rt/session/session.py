"""A model that is loaded and answers: what `offload_rt.load` returns.

Memory for keys and values is set aside when the model is loaded: for `context` tokens (4096, or
what the model was made for if that is less) and one sequence. A call that needs more, a longer
prompt or several at once, plans and loads the model again for what it needs, and the log says so;
with `context=` memory is what was asked for and longer prompts are refused, as on the command line.
`score` keeps no keys and values at all, so it too loads the model anew, and the next answer does.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Unpack, overload

from offload_rt.config import MOST_SEQUENCES, KVPlace
from offload_rt.device.system import settle_math
from offload_rt.errors import ConfigError, PlanError, SessionError
from offload_rt.report import RunReport
from offload_rt.session.adapters import adapted, open_answering
from offload_rt.session.answering import Answer, Answers, Piece, seeded, started_engine
from offload_rt.session.interrupting import Stops
from offload_rt.session.keywords import AnswerOptions, LoadOptions
from offload_rt.session.observer import Gauge, Interrupted, Observer
from offload_rt.session.opening import (
    AUTO_CONTEXT_TOKENS,
    NO_DRAFT,
    Model,
    answer_capacity,
    context_limit,
)
from offload_rt.session.options import (
    ANSWER_KEYWORDS,
    KEYWORDS,
    answer_settings,
    check_keywords,
    settings_from,
)
from offload_rt.session.recommended import with_recommended
from offload_rt.session.scoring import Score, Text, Texts, encoded_pair, is_ids
from offload_rt.session.settings import Settings
from offload_rt.session.shared import kept_near
from offload_rt.session.summary import PlanSummary, summary_of

if TYPE_CHECKING:
    from offload_rt.engine import Engine
    from offload_rt.text import Message, Tokenizer

Turn = Mapping[str, str]
Prompt = str | Sequence[Turn] | Sequence[int]

_ROUND_TOKENS = 1024
_BUSY = (
    "the model is in use, by another thread or a stream that is not over: wait for it, or close "
    "the stream"
)
_ACCEPTED = (
    'accepted is a text, a conversation such as [{"role": "user", "content": "Hi"}], or token ids'
)
_log = logging.getLogger(__name__)


class Logged:
    """Notes go to the log of `offload_rt`; of the rest nothing is shown."""

    def note(self, sentence: str) -> None:
        """Log one line."""
        _log.warning("%s", sentence)

    def waiting(self, label: str, *, stays: bool = True) -> AbstractContextManager[None]:
        """Log what is waited for."""
        _log.info("%s", label)
        return nullcontext()

    def progress(self, label: str) -> AbstractContextManager[Gauge]:
        """Log what begins."""
        _log.info("%s", label)
        return nullcontext(Gauge())


@dataclass(frozen=True, slots=True)
class Room:
    """What an engine has memory for.

    Attributes:
        capacities: KV rows of each sequence, largest first.
        prompt_tokens: of all prompts of a pass together.
        reads: texts are only read: nothing is kept of one.
    """

    capacities: tuple[int, ...]
    prompt_tokens: int
    reads: bool = False

    def holds(self, other: "Room") -> bool:
        """Whether what needs the other room finds it in this one."""
        pairs = zip(self.capacities, other.capacities, strict=False)
        return (
            self.reads == other.reads
            and len(self.capacities) >= len(other.capacities)
            and all(mine >= theirs for mine, theirs in pairs)
            and self.prompt_tokens >= other.prompt_tokens
        )


@dataclass(frozen=True, slots=True)
class _Asked:
    """A prompt as tokens.

    Attributes:
        index: its place among the prompts.
        rows: of KV that it needs with its answer.
    """

    index: int
    ids: list[int]
    rows: int


class Stream:
    """Pieces of an answer as they come; `answer` is all of it, once there are no more."""

    def __init__(self, pieces: Iterator[Piece], answers: list[Answer]) -> None:
        self._pieces, self._answers = pieces, answers
        self._closed = False

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Piece:
        return next(self._pieces)

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            SessionError: it is not over, or was given up.
        """
        if not self._answers and self._closed:
            raise SessionError("the stream was closed before its end: there is no whole answer")
        if not self._answers:
            raise SessionError("the stream is not over: read all pieces before its answer")
        return self._answers[0]

    def close(self) -> None:
        """Give up the answer."""
        close: Callable[[], None] = self._pieces.close  # type: ignore[attr-defined]
        close()
        self._closed = True


class Session:
    """A model that is loaded; made by `offload_rt.load`.

    One thread uses it at a time. As a context manager it closes itself, and gives up a stream that
    is not over. At the end of the program it is closed, too.
    """

    def __init__(
        self, model: Model, settings: Settings, defaults: AnswerOptions, observer: Observer
    ) -> None:
        self._model, self._settings, self._observer = model, settings, observer
        self._defaults = defaults
        self._stops = Stops()
        self._lock = threading.Lock()
        self._closed = False
        self._open = ExitStack()
        self._streaming: weakref.ref[Stream] | None = None
        weakref.finalize(self, self._open.close)
        self._engine: Engine | None = None
        self._room: Room | None = None
        self._fullest: int | None = None  # sequences, where more did not fit
        self._limit = context = context_limit(model, settings.runtime.context_tokens)
        if settings.runtime.context_tokens is None:
            context = min(context, AUTO_CONTEXT_TOKENS)
        self._report: RunReport | None = None
        self._plan = summary_of(self._engine_for(Room((context,), context)))

    @property
    def plan(self) -> PlanSummary:
        """What lives where, who drafts, how fast that should be and what binds; as loaded last."""
        return self._plan

    @property
    def tokenizer(self) -> "Tokenizer":
        """The model's tokenizer."""
        return self._model.tokenizer

    @property
    def max_tokens(self) -> int:
        """Most tokens of a prompt with its answer, or of a text that is scored."""
        return self._limit

    @property
    def report(self) -> RunReport | None:
        """What the last answer, or the last of several that ran together, measured."""
        return self._report

    @overload
    def generate(  # type: ignore[overload-overlap]  # a text is a sequence
        self, prompts: str, *, logprobs: bool = ..., **options: Unpack[AnswerOptions]
    ) -> Answer: ...
    @overload
    def generate(
        self,
        prompts: Sequence[Turn] | Sequence[int],
        *,
        logprobs: bool = ...,
        **options: Unpack[AnswerOptions],
    ) -> Answer: ...
    @overload
    def generate(
        self, prompts: Sequence[Prompt], *, logprobs: bool = ..., **options: Unpack[AnswerOptions]
    ) -> list[Answer]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        logprobs: bool = False,
        **options: Unpack[AnswerOptions],
    ) -> Answer | list[Answer]:
        """Answer a prompt, or several.

        A text goes through the model's chat template, as on the command line; `raw=True` gives it
        as it is. A conversation is a list of turns, `{"role": "user", "content": "Hi"}`; a list of
        numbers is the prompt's token ids. Of any other list as many prompts are answered together
        as fit: each pass over the weights serves all of them. Their seeds are `seed`, `seed + 1`,
        ...; 0 comes after the largest.

        A sampled answer with a seed of its own is the same again. Where passes are not
        row-invariant (`report.exact`) it is made from a fresh cache, and without drafts unless
        their number is fixed (`draft_tokens=4`): measured times would decide about it.

        Args:
            prompts: a text, a conversation, token ids, or a list of those.
            logprobs: keep the log-probability of each token.
            options: those of `load` that are about answers; what is left out is as given there.

        Returns:
            The answer, or a list of answers in the order of the prompts.

        Raises:
            OffloadError: there is no answer.
        """
        alone = is_one(prompts)
        batch = [prompts] if alone else list(prompts)
        with self._used():
            settings = self._settings_for(options, logprobs)
            asked = [self._asked(i, prompt, settings) for i, prompt in enumerate(batch)]  # type: ignore[arg-type]
            answers: dict[int, Answer] = {}
            for wave in self._waves(asked):
                made: list[Answer] = []
                for _ in self._answered(wave, settings, made, logprobs):
                    pass
                answers |= {one.index: answer for one, answer in zip(wave, made, strict=True)}
            self._raise_interrupt()
        found = [answers[one.index] for one in asked]
        return found[0] if alone else found

    def stream(
        self, prompt: Prompt, *, logprobs: bool = False, **options: Unpack[AnswerOptions]
    ) -> Stream:
        """Answer a prompt piece by piece; see `generate`.

        Raises:
            OffloadError: the prompt or an option is refused; later, there is no answer.
        """
        with self._used():
            settings = self._settings_for(options, logprobs)
            asked = self._asked(0, prompt, settings)
        answers: list[Answer] = []

        def pieces() -> Iterator[Piece]:
            with self._used():
                self._streaming = this
                (wave,) = self._waves([asked])
                yield from self._answered(wave, settings, answers, logprobs)
                self._raise_interrupt()

        stream = Stream(pieces(), answers)
        this = weakref.ref(stream)  # no more: one that is dropped is to end at once
        return stream

    def score(self, pairs: Sequence[tuple[Text, Text]]) -> list[Score]:
        """How likely the model finds continuations of contexts, many texts in a pass.

        Texts are taken as they are, without the chat template, or as token ids. Spaces at the end
        of a context are counted as the continuation's, for that is how tokens are cut. An empty
        context is the token that begins a text.

        Args:
            pairs: a context and what may follow it.

        Returns:
            For each the sum of the log-probabilities of the continuation's tokens, in fp32.

        Raises:
            ConfigError: a continuation is empty, or a text longer than the model was made for.
            SessionError: `stop` was called meanwhile.
            OffloadError: the model cannot be loaded for it.
        """
        if not isinstance(pairs, Iterable):
            raise ConfigError(f"the pairs are {pairs!r:.60}, accepted is a list of pairs")
        with self._used():
            texts = Texts(
                [encoded_pair(self._model, i, pair, self._limit) for i, pair in enumerate(pairs)]
            )
            while texts.left:
                engine = self._reading_engine(texts)
                assert self._room is not None
                try:
                    with self._failing_safely(engine), self._stops.raising(False):
                        engine.poll_with(self._stops.check)
                        texts.read(engine, self._room.capacities, self._room.prompt_tokens)
                except Interrupted:
                    self._raise_interrupt()
                    raise SessionError("the scores were stopped: ask for them again") from None
            return texts.scores()

    def stop(self) -> None:
        """End the answers in the making, from another thread; their reason is `abort`.

        Scores in the making end with a SessionError.
        """
        self._stops.stop()

    def close(self) -> None:
        """Let go of the model and keep what was learned of drafting; a second time does nothing."""
        if self._closed:
            return
        if not self._lock.acquire(blocking=False):
            raise SessionError(_BUSY)
        try:
            self._closed = True
            self._drop()
        finally:
            self._lock.release()

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *exception: object) -> None:
        stream = self._streaming() if self._streaming is not None else None
        if stream is not None:
            with suppress(ValueError):  # another thread is reading it: closing says so
                stream.close()
        self.close()

    @contextmanager
    def _used(self) -> Iterator[None]:
        """Have it for one thread.

        Raises:
            SessionError: it is closed, or another has it.
        """
        if not self._lock.acquire(blocking=False):
            raise SessionError(_BUSY)
        try:
            if self._closed:
                raise SessionError(
                    f"{self._model.name} is closed: load it again with offload_rt.load"
                )
            self._stops.clear()
            yield
        finally:
            self._lock.release()

    def _raise_interrupt(self) -> None:
        if self._stops.signalled:
            raise KeyboardInterrupt

    def _settings_for(self, options: AnswerOptions, logprobs: object) -> Settings:
        """The settings of an answer.

        Raises:
            ConfigError: one is refused.
        """
        check_keywords(options, ANSWER_KEYWORDS, "an answer")
        if not isinstance(logprobs, bool):
            raise ConfigError(f"logprobs is {logprobs!r:.60}, accepted is True or False")
        settings = answer_settings(self._settings, self._defaults, options)
        return with_recommended(settings, self._model.checkpoint.folder, self._observer)

    def _asked(self, index: int, prompt: Prompt, settings: Settings) -> _Asked:
        """A prompt as tokens, if there is room for it."""
        from offload_rt.text import build_prompt

        if is_ids(prompt):
            ids = [int(token) for token in prompt]  # type: ignore[arg-type]
            self._model.checkpoint.require_rows(ids)
        else:
            ids = build_prompt(
                self._model.tokenizer, _turns(prompt), system=settings.system, raw=settings.raw
            )
        return _Asked(index, ids, answer_capacity(self._model, settings, len(ids), self._observer))

    def _answered(
        self, wave: Sequence[_Asked], settings: Settings, made: list[Answer], logprobs: bool
    ) -> Iterator[Piece]:
        """Answer prompts together; the answers are put into `made`."""
        engine, sampling = self._engine, settings.sampling
        assert engine is not None
        repeats, firm = sampling.repeats, engine.repeats_answers
        if repeats and not firm:
            engine.forget()
        by_times = engine.controller is not None or self._settings.draft.automatic
        sampling = seeded(sampling)
        seeds = sampling.seeds(1 + max(one.index for one in wave))
        with self._failing_safely(engine):
            answers = Answers(
                self._model,
                engine,
                [one.ids for one in wave],
                sampling,
                settings.generation,
                seeds=None if sampling.seed is None else [seeds[one.index] for one in wave],
            )
            if repeats and by_times and not firm:
                answers.leave_out_drafts()
            if logprobs:
                answers.keep_logprobs()
            while answers.active:
                yield from answers.advance(self._observer, self._stops)
            rest, found = answers.finish()
        made += found
        self._report = found[0].report
        yield from rest

    @contextmanager
    def _failing_safely(self, engine: "Engine") -> Iterator[None]:
        """Bring an engine back to its start after an error; let go of it if that cannot be."""
        try:
            yield
        except BaseException:
            try:
                engine.forget()
            except Exception:  # noqa: BLE001 - the first error is the one to tell
                self._drop()
            raise

    def _waves(self, asked: Sequence[_Asked]) -> list[list[_Asked]]:
        """Prompts in groups that run together, with an engine for them; the largest first."""
        largest = sorted(asked, key=lambda one: (-one.rows, one.index))
        if self._room is None or not self._room.holds(_room_for(largest)):
            together = self._make_room(largest)
        else:
            together = len(self._room.capacities)
        groups = range(0, len(largest), together)
        return [sorted(largest[at : at + together], key=lambda one: -one.rows) for at in groups]

    def _make_room(self, largest: Sequence[_Asked]) -> int:
        """An engine for as many prompts at once as fit; returns how many."""
        count = min(len(largest), MOST_SEQUENCES)
        now = self._room
        if now is not None and self._fullest is not None:
            count = min(count, self._fullest)
            if now.holds(_room_for(largest[:count])):
                return count
        while True:
            room = _rounded(_room_for(largest[:count]), self._limit)
            try:
                self._engine_for(room, kept_near(self._settings) if count > 1 else None)
            except PlanError:
                if count == 1:
                    raise
                count = (count + 1) // 2
                self._fullest = count
            else:
                return count

    def _reading_engine(self, texts: Texts) -> "Engine":
        """An engine that reads as many texts in a pass as fit."""
        most = texts.most_tokens
        while True:
            room = Room(*texts.room(most), reads=True)
            try:
                return self._engine_for(room)
            except PlanError:
                if most <= texts.longest:
                    raise
                most = max(texts.longest, most // 2)

    def _engine_for(self, room: Room, settings: Settings | None = None) -> "Engine":
        """The engine, made again where it has no such room; with other settings, if given."""
        if self._engine is not None and self._room is not None and self._room.holds(room):
            return self._engine
        again = self._engine is not None
        self._drop()
        settings = settings or self._settings
        if room.reads:
            runtime = replace(
                settings.runtime,
                kv=KVPlace.NONE,
                kv_folder=None,
                kv_block_tokens=None,
                resident=None,
            )
            settings = replace(settings, runtime=runtime, draft=NO_DRAFT, plan=None)
        engine = self._open.enter_context(
            started_engine(
                self._model,
                settings,
                self._observer,
                capacities=room.capacities,
                prompt_tokens=room.prompt_tokens,
                repeats=settings.draft.automatic,  # a seed may come with any answer
            )
        )
        self._engine, self._room, self._plan = engine, room, summary_of(engine)
        if again:
            what = "to read texts" if room.reads else f"for {len(room.capacities)} sequences"
            _log.info("%s was loaded again %s: %s", self._model.name, what, self._plan)
        return engine

    def _drop(self) -> None:
        self._engine = self._room = None
        self._open.close()


def load(
    model: str | PathLike[str], *, observer: Observer | None = None, **options: Unpack[LoadOptions]
) -> Session:
    """Plan and load a model.

    Options are those of `offload-run generate`, without the dashes: `device_memory="20GiB"` is
    `--device-memory 20GiB`. What is left out is as there, so `draft` is `auto` and answers are
    greedy. Options of answers are the defaults of all answers; each may have its own.

    Args:
        model: a folder with safetensors files, a hub id in the local cache, or `demo`. Nothing is
            downloaded.
        observer: is told what goes on; None: notes go to the log of `offload_rt`.
        options: see `LoadOptions`, and `offload-run generate --help-all` for what they mean.

    Raises:
        OffloadError: an option is refused, the files cannot be used, or it does not fit.
    """
    if not isinstance(model, str | os.PathLike) or not isinstance(os.fspath(model), str):
        raise ConfigError(f"the model is {model!r:.60}, accepted is a folder, a hub id or demo")
    if not (observer is None or isinstance(observer, Observer)):
        raise ConfigError(
            f"the observer is {observer!r:.60}, accepted is an object with note, waiting and "
            "progress"
        )
    check_keywords(options, KEYWORDS, "load")
    settings, observer = settings_from(options), observer or Logged()
    settle_math()
    opened, settings = open_answering(os.fspath(model), settings, observer)
    context_limit(opened, settings.runtime.context_tokens)
    opened = adapted(opened, settings, observer)
    defaults: Any = {name: value for name, value in options.items() if name in ANSWER_KEYWORDS}
    return Session(opened, settings, defaults, observer)


def is_one(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether it is one prompt, not several: a text, or the turns of a conversation."""
    if isinstance(prompts, str):
        return True
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise ConfigError(f"the prompt is {prompts!r:.60}, {_ACCEPTED}")
    return bool(prompts) and (isinstance(prompts[0], Mapping) or is_ids(prompts))


def _turns(prompt: object) -> "str | list[Message]":
    """A prompt as the chat template takes it.

    Raises:
        ConfigError: it is empty, or no prompt at all.
    """
    from offload_rt.text import Message

    if isinstance(prompt, str):
        prompt = prompt.removeprefix("\ufeff")  # of a file that was read
        if not prompt.strip():
            raise ConfigError("the prompt is empty: give some text")
        return prompt
    if not isinstance(prompt, Sequence):
        raise ConfigError(f"the prompt is {prompt!r:.60}, {_ACCEPTED}")
    turns = []
    for turn in prompt:
        match turn:
            case {"role": str(role), "content": str(content), **rest} if not rest:
                turns.append(Message(role=role, content=content))
            case _:
                raise ConfigError(f"a turn of the prompt is {turn!r:.60}, {_ACCEPTED}")
    return turns


def _room_for(asked: Sequence[_Asked]) -> Room:
    """What prompts need that run together."""
    rows = sorted((one.rows for one in asked), reverse=True)
    return Room(tuple(rows), sum(len(one.ids) for one in asked))


def _rounded(room: Room, limit: int) -> Room:
    """A little more, so that prompts of about the same size find it again."""
    step = _ROUND_TOKENS if len(room.capacities) == 1 else _ROUND_TOKENS // 8
    rows = tuple(min(limit, -(-count // step) * step) for count in room.capacities)
    tokens = -(-room.prompt_tokens // _ROUND_TOKENS) * _ROUND_TOKENS
    return Room(rows, min(tokens, sum(rows)))
