"""Answers in text: an engine started for a model, and what becomes of prompts."""

import dataclasses
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from offload_rt.config import AcceptRule, GenerationConfig, KVPlace, SamplingConfig
from offload_rt.device.system import compute_threads
from offload_rt.errors import OffloadError
from offload_rt.planning.history import add_asked, add_seen, experience_key, model_key, use_of
from offload_rt.planning.levels import LevelKey, add_levels, levels_of
from offload_rt.report import RunReport
from offload_rt.session.means import (
    asked_path,
    check_plan,
    experience_path,
    levels_path,
    means_for,
    reproducible,
    speeds_of_run,
)
from offload_rt.session.observer import Interrupted, Interrupts, Observer
from offload_rt.session.opening import Model, check_drafter
from offload_rt.session.settings import Settings
from offload_rt.speculative.draft_model.pair import open_draft_checkpoint

if TYPE_CHECKING:
    from offload_rt.device.kinds import DeviceKind
    from offload_rt.engine import Engine
    from offload_rt.planning.planner import Means

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a prompt.

    Attributes:
        token_ids: tokens up to the one that completed a stop string.
        finish_reason: `stop`, `length` or `abort`.
        seed: what sampling started from; None for a greedy answer without one.
        report: what the run measured, with all answers that ran together.
        logprobs: of the tokens, where they were asked for: by the model itself, without temperature
            and the like.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    seed: int | None
    report: RunReport
    logprobs: tuple[float, ...] | None = None


def seeded(sampling: SamplingConfig) -> SamplingConfig:
    """The same with a seed drawn when sampling needs one and none was given."""
    if sampling.greedy or sampling.seed is not None:
        return sampling
    from offload_rt.sampling import resolve_seed

    return dataclasses.replace(sampling, seed=resolve_seed(None))


@contextmanager
def started_engine(  # noqa: PLR0913 - what an engine is made of
    model: Model,
    settings: Settings,
    observer: Observer,
    *,
    capacities: Sequence[int],
    prompt_tokens: int,
    kv_tokens: int | None = None,
    running: int | None = None,
    repeats: bool = False,
) -> Iterator["Engine"]:
    """An engine for sequences of `capacities` KV rows, loaded under a gauge and closed at the end.

    What it saw of drafting, and of the pace of passes, is kept for later plans.

    Args:
        model: opened.
        settings: how it is run.
        observer: is told how far loading is.
        capacities: KV rows, one number per sequence.
        prompt_tokens: of the largest prompt pass.
        kv_tokens: rows that they share; None: each has its capacity.
        running: sequences that usually run, for whom it is to be fastest; None: all.
        repeats: answers are to be those of other engines of the model, whoever drafts there; they
            are so with a seed, if who drafts is left open.
    """
    check_plan(settings.plan, model.checkpoint)
    check_drafter(model, settings.draft, raw=settings.raw)
    sampling = settings.sampling
    draft = reproducible(settings.draft, sampling, settings.runtime)
    if draft.over_retrieval and prompt_tokens <= draft.retrieval.budget_tokens:
        observer.note(
            f"the prompt's {prompt_tokens} tokens are within --retrieval-budget "
            f"{draft.retrieval.budget_tokens}: drafts read all of it"
        )
    from offload_rt.engine import Engine

    with observer.progress(f"loading {model.name}") as gauge:

        def show(engine: Engine) -> None:
            gauge.done = engine.devices.loaded_bytes
            gauge.total = engine.load_bytes

        def means(device: "DeviceKind") -> "Means":
            speeds = speeds_of_run(settings, device)
            return means_for(model.checkpoint, settings.sampling, speeds, draft)

        engine = Engine(
            model.checkpoint,
            settings.runtime,
            capacities=capacities,
            prompt_tokens=prompt_tokens,
            kv_tokens=kv_tokens,
            running=running,
            draft=draft,
            repeats=repeats or (settings.draft.automatic and sampling.repeats),
            means=None if settings.runtime.kv is KVPlace.NONE else means,
            on_placed=show,
            nodes=settings.nodes,
        )
    if settings.draft.accept is AcceptRule.TYPICAL and not engine.draft.drafts:
        observer.note(
            "--accept typical has no effect here: of --draft auto, nobody is predicted to draft "
            "faster than the model decodes alone; name who drafts"
        )
    if sampling.repeats and not engine.repeats_answers:  # found out as it was loaded
        engine.controller = None
    with engine:
        try:
            yield engine
        finally:
            for keep in (partial(_keep_seen, model, settings), _keep_asked, _keep_pace):
                try:
                    keep(engine)
                except OffloadError:  # a run that is done stays so, and its own error is told
                    _log.debug("not all that the run found is kept", exc_info=True)


def _keep_seen(model: Model, settings: Settings, engine: "Engine") -> None:
    """Add what drafting gave to what is known of it."""
    if not engine.draft.drafts:
        return
    drafter = open_draft_checkpoint(model.checkpoint, engine.draft)
    key = experience_key(model.checkpoint, engine.draft, drafter, settings.sampling)
    add_seen(experience_path(), key, engine.tally.seen())


def _keep_asked(engine: "Engine") -> None:
    """Add which experts tokens asked for to what is known of it."""
    if (pool := engine.runner.experts) is not None:
        key = model_key(engine.checkpoint)
        add_asked(asked_path(), key, use_of(pool.counts))


def _keep_pace(engine: "Engine") -> None:
    """Add how long passes took to what is known of this hour; of an emulated link it is nothing."""
    config, plan, pool = engine.config, engine.plan, engine.runner.experts
    emulated = config.link_bytes_per_s is not None or config.threads is not None
    if plan.placed is None or emulated:
        return
    speeds, streams = plan.placed.speeds, engine.placement.streams
    asked = None if pool is None else use_of(pool.counts)
    for took in engine.pace.kinds:
        price = partial(plan.foretold, took.rows - 1, took.running, asked=asked)
        key = LevelKey.of(
            speeds, compute_threads(), engine.checkpoint, streams=streams, running=took.running
        )
        try:
            found = levels_of(took, price, speeds.levels)
        except OffloadError:  # of other kinds it may be told all the same
            _log.debug("what passes took is not compared", exc_info=True)
            continue
        add_levels(levels_path(), key, found, time.time())


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that an answer has gained.

    Attributes:
        index: which answer, by the place of its prompt.
    """

    index: int
    text: str


class Answers:
    """Answers in the making to prompts that run together: each `advance` is one pass.

    Args:
        model: whose tokenizer makes text of tokens.
        engine: has room for the prompts.
        prompts: token ids, one list per answer.
        sampling: how tokens are drawn; with a seed unless it is greedy.
        generation: when answers end.
        seeds: of each answer; None: that of `sampling`, and one more for each.
    """

    def __init__(
        self,
        model: Model,
        engine: "Engine",
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        generation: GenerationConfig,
        seeds: Sequence[int] | None = None,
    ) -> None:
        from offload_rt.engine import Run

        self._model, self._engine = model, engine
        self._seeds = seeds
        if seeds is None and sampling.seed is not None:
            self._seeds = sampling.seeds(len(prompts))
        self._streams = [model.tokenizer.stream(generation.stop) for _ in prompts]
        self._run = Run.start(engine, prompts, sampling, generation, model.end_tokens, self._seeds)

    def leave_out_drafts(self) -> None:
        """Decode token by token, whoever could draft."""
        self._run.leave_out_drafts()

    def keep_logprobs(self) -> None:
        """Keep the log-probabilities of the answers' tokens."""
        for sequence in self._run.sequences:
            sequence.top_logprobs = 0

    @property
    def active(self) -> bool:
        """Whether an answer goes on."""
        return bool(self._run.active)

    @property
    def has_text(self) -> bool:
        """Whether any text has come."""
        return any(stream.text for stream in self._streams)

    def advance(self, observer: Observer, interrupts: Interrupts) -> list[Piece]:
        """Make the next pass, the prompts' first; returns the text that is safe to show.

        An interrupt ends a pass between two layers, and with it all answers: their reason is
        `abort`. Anywhere else it could leave a copy half enqueued, and whoever waits for it would
        wait on.
        """
        from offload_rt.engine import FinishReason

        with interrupts.raising(False):
            self._engine.poll_with(interrupts.check)
            try:
                if self._run.passes:
                    self._run.step()
                else:
                    self._prefill(observer)
            except Interrupted:
                for sequence in self._run.active:
                    sequence.finish(FinishReason.ABORT)
            return self._pieces()

    def finish(self) -> tuple[list[Piece], list[Answer]]:
        """The text that was held back, and the answers; none may go on."""
        rest = [Piece(index, stream.finish()) for index, stream in enumerate(self._streams)]
        report, answers = self._run.report(), []
        for sequence, stream in zip(self._run.sequences, self._streams, strict=True):
            assert sequence.finish_reason is not None
            stopped = stream.stopped is not None
            tokens = tuple(sequence.emitted[: stream.kept_tokens])
            answers.append(
                Answer(
                    text=stream.text,
                    token_ids=tokens,
                    prompt_tokens=sequence.prompt_tokens,
                    finish_reason="stop" if stopped else sequence.finish_reason.value,
                    seed=None if self._seeds is None else self._seeds[sequence.index],
                    report=report,
                    logprobs=None
                    if sequence.top_logprobs is None
                    else tuple(one.logprob for one in sequence.logprobs[: len(tokens)]),
                )
            )
        return [piece for piece in rest if piece.text], answers

    def _prefill(self, observer: Observer) -> None:
        """Read the prompts under a bar of their tokens: how far they are through the layers.

        Where layers are streamed to a GPU the host is ahead of it, so what has arrived counts.
        """
        engine = self._engine
        prompt = sum(sequence.prompt_tokens for sequence in self._run.sequences)
        network, layers = engine.network, self._model.checkpoint.config.num_layers
        start, copied = network.rows_done, engine.devices.copied().bytes_copied
        waits = 0 if engine.device.kind.host_computes else engine.bytes_per_pass

        def done() -> int:
            new = network.pass_rows or prompt  # what the cache has already is not read again
            read = (network.rows_done - start) / layers
            if waits:
                arrived = engine.devices.copied().bytes_copied - copied
                read = min(read, new * arrived / waits)
            return prompt - new + int(read)

        network.pass_rows = 0
        with observer.progress("reading the prompt") as gauge:
            gauge.done, gauge.total = done, prompt
            gauge.detail = lambda: f"{min(done(), prompt)} of {prompt} tokens"
            self._run.prefill()

    def _pieces(self) -> list[Piece]:
        """Push the tokens streams have not seen; a stop string in them ends the sequence."""
        from offload_rt.engine import FinishReason

        pieces = []
        for sequence, stream in zip(self._run.sequences, self._streams, strict=True):
            text = stream.push(sequence.emitted[stream.kept_tokens :])
            if stream.stopped is not None:
                sequence.finish(FinishReason.STOP)
            if text:
                pieces.append(Piece(sequence.index, text))
        return pieces
