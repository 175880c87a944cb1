"""What verbs that answer share: a model opened, an engine started, an answer streamed."""

import dataclasses
import filecmp
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offload_rt.cli.console import Console, write_answer
from offload_rt.cli.early import check_context, check_early
from offload_rt.cli.interrupts import Interrupted, Interrupts
from offload_rt.cli.options import Settings
from offload_rt.config import DraftConfig, RuntimeConfig, SamplingConfig
from offload_rt.device.system import compute_threads
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.report import RunReport
from offload_rt.speculative.pair import check_vocabularies, open_draft_checkpoint
from offload_rt.text import (
    RemoteStream,
    Tokenizer,
    end_token_ids,
    load_tokenizer,
    template_ids,
)

if TYPE_CHECKING:
    from offload_rt.engine import Engine, Run, SequenceState
    from offload_rt.model.layout import Packing
    from offload_rt.planning.planner import Means
    from offload_rt.planning.speeds import Speeds


NO_DRAFT = DraftConfig()


@dataclass(frozen=True, slots=True)
class Model:
    """A model folder, opened.

    Attributes:
        end_tokens: tokens that end an answer.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    end_tokens: frozenset[int]

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.checkpoint.name

    @property
    def max_positions(self) -> int:
        """Longest sequence it was made for."""
        return self.checkpoint.config.max_positions


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a prompt.

    Attributes:
        token_ids: tokens up to the one that completed a stop string.
        finish_reason: `stop`, `length` or `abort`.
        seed: what sampling started from; None for a greedy answer without one.
        report: what the run measured.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    seed: int | None
    report: RunReport


def open_model(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    console: Console,
    draft: DraftConfig = NO_DRAFT,
    *,
    runs: bool = True,
) -> Model:
    """Load the tokenizer that belongs to a checkpoint; refuse first what is known to be wrong.

    Args:
        checkpoint: headers of the model.
        runtime: where it is to run.
        console: shows what is waited for.
        draft: who is to draft.
        runs: it will run in this process, so what that needs is imported meanwhile.

    Raises:
        ConfigError: as `check_early`.
        DeviceError: as `check_early`.
        CheckpointError: the tokenizer or what drafts cannot be used.
    """
    check_early(checkpoint, runtime, draft)
    with console.waiting(f"opening {checkpoint.name}"):
        tokenizer = Tokenizer(checkpoint.folder, checkpoint.embedding.shape[0])
        if runs:
            import offload_rt.engine  # noqa: F401 - takes as long as the tokenizer's process
        tokenizer.wait()
        return Model(checkpoint, tokenizer, end_token_ids(tokenizer, checkpoint.folder))


def check_drafter(model: Model, draft: DraftConfig, *, raw: bool) -> None:
    """Refuse a draft model that does not speak the model's tokens.

    Raises:
        ConfigError: it has another tokenizer, or no row for a token of the chat template.
        CheckpointError: its files cannot be used.
    """
    checkpoint = open_draft_checkpoint(model.checkpoint, draft)
    if checkpoint is None:
        return
    rows = checkpoint.embedding.shape[0]
    highest = max(template_ids(model.tokenizer, raw=raw), default=0)
    if highest >= rows:
        raise ConfigError(
            f"--draft model: {checkpoint.name} knows {rows} tokens, and the chat template "
            f"of {model.name} writes token {highest} ({model.tokenizer.token(highest)!r}): it "
            "could draft nothing, take another draft model or --raw"
        )
    ours, theirs = (c.folder / "tokenizer.json" for c in (model.checkpoint, checkpoint))
    if ours.exists() and theirs.exists() and filecmp.cmp(ours, theirs, shallow=False):
        return  # loading one takes seconds
    other = load_tokenizer(checkpoint.folder)
    check_vocabularies(model.tokenizer.get_vocab(), other.get_vocab(), checkpoint.name)


def context_limit(model: Model, context_tokens: int | None) -> int:
    """Longest conversation that is possible: --context, or all the model was made for.

    Raises:
        ConfigError: --context is longer than that.
    """
    if context_tokens is not None:
        check_context(model.checkpoint, context_tokens)
    return context_tokens or model.max_positions


def answer_capacity(model: Model, settings: Settings, prompt_tokens: int, console: Console) -> int:
    """KV rows for a prompt and its answer.

    Raises:
        ConfigError: the prompt alone is too long.
    """
    context, wanted = settings.runtime.context_tokens, settings.generation.max_tokens
    room = context_limit(model, context)
    limit = f"{model.name} was made for up to {model.checkpoint.config.longest} with the answer"
    if context is not None:
        limit = f"--context sets memory aside for {room} with the answer"
    if prompt_tokens >= room:
        advice = "" if context is None else " or raise --context"
        raise ConfigError(
            f"the prompt has {prompt_tokens} tokens, {limit}: shorten the prompt{advice}"
        )
    if prompt_tokens + wanted > room:
        console.note(
            f"the answer is limited to {room - prompt_tokens} of {wanted} tokens: the prompt has "
            f"{prompt_tokens}, {limit}"
        )
    return min(prompt_tokens + wanted, room) if context is None else room


def seeded(sampling: SamplingConfig) -> SamplingConfig:
    """The same with a seed drawn when sampling needs one and none was given."""
    if sampling.greedy or sampling.seed is not None:
        return sampling
    from offload_rt.sampling import resolve_seed

    return dataclasses.replace(sampling, seed=resolve_seed(None))


@contextmanager
def started_engine(
    model: Model, settings: Settings, console: Console, *, capacity: int, prompt_tokens: int
) -> Iterator["Engine"]:
    """An engine for one sequence at a time, loaded under a progress bar and closed at the end."""
    from offload_rt.cli.planning import check_plan, means_for, reproducible, speeds_for

    check_plan(settings.plan, model.checkpoint)
    check_drafter(model, settings.draft, raw=settings.raw)
    draft = reproducible(settings.draft, settings.sampling)
    if draft.kind == "triforce" and prompt_tokens <= draft.retrieval.budget_tokens:
        console.note(
            f"the prompt's {prompt_tokens} tokens are within --retrieval-budget "
            f"{draft.retrieval.budget_tokens}: drafts read all of it"
        )
    from offload_rt.engine import Engine

    speeds: Speeds | None = None
    with console.progress(f"loading {model.name}") as gauge:

        def show(engine: Engine) -> None:
            gauge.done = lambda: engine.device.load.statistics().bytes_copied
            gauge.total = engine.load_bytes

        def means(packing: "Packing") -> "Means":
            nonlocal speeds
            speeds = speeds_for(settings.profile, packing)
            return means_for(model.checkpoint, settings.sampling, speeds, draft)

        engine = Engine(
            model.checkpoint,
            settings.runtime,
            capacities=[capacity],
            prompt_tokens=prompt_tokens,
            draft=draft,
            means=means,
            on_placed=show,
        )
    with engine:
        try:
            yield engine
        finally:
            _keep_seen(model, settings, engine)
            _keep_pace(engine, speeds)


def _keep_seen(model: Model, settings: Settings, engine: "Engine") -> None:
    """Add what drafting gave to what is known of it."""
    from offload_rt.cli.planning import experience_path
    from offload_rt.planning.experience import add_seen, experience_key

    drafter = open_draft_checkpoint(model.checkpoint, engine.draft)
    key = experience_key(model.checkpoint, engine.draft, drafter, settings.sampling)
    add_seen(experience_path(), key, engine.tally.seen())


def _keep_pace(engine: "Engine", speeds: "Speeds | None") -> None:
    """Add how long passes took to what is known of this hour; of an emulated link it is nothing."""
    from offload_rt.cli.planning import levels_path
    from offload_rt.planning.levels import LevelKey, add_level

    config, ratio = engine.config, engine.pace.ratio
    emulated = config.link_bytes_per_s is not None or config.threads is not None
    if speeds is None or ratio is None or emulated:
        return
    streams = bool(engine.placement.streamed)
    key = LevelKey.of(speeds, compute_threads(), engine.checkpoint, streams=streams)
    add_level(levels_path(), key, ratio * engine.plan.level, time.time())


@dataclass(frozen=True, slots=True)
class Answering:
    """Everything that stays the same from one answer to the next."""

    model: Model
    engine: "Engine"
    settings: Settings
    console: Console
    interrupts: Interrupts

    def answer(self, prompt_ids: Sequence[int], sampling: SamplingConfig) -> Answer:
        """Answer a prompt; text goes to stdout as it comes, unless JSON is wanted.

        A Ctrl-C ends the answer: what there is of it is returned with the reason `abort`.
        """
        stream = self.model.tokenizer.stream(self.settings.generation.stop)
        run = self.engine.start(
            [prompt_ids], sampling, self.settings.generation, self.model.end_tokens
        )
        (sequence,) = run.sequences
        with self.interrupts.raising(False):
            try:
                self._generate(run, sequence, stream)
            except Exception:
                if stream.text and not self.settings.output.json:
                    write_answer("\n")  # what is said of it begins a line
                raise
            rest = stream.finish()
            if not self.settings.output.json:
                write_answer(rest + "\n")
        assert sequence.finish_reason is not None
        return Answer(
            text=stream.text,
            token_ids=tuple(sequence.emitted[: stream.kept_tokens]),
            prompt_tokens=sequence.prompt_tokens,
            finish_reason="stop" if stream.stopped is not None else sequence.finish_reason.value,
            seed=sampling.seed,
            report=run.report(),
        )

    def _generate(self, run: "Run", sequence: "SequenceState", stream: RemoteStream) -> None:
        """Run passes until the sequence ends; an interrupt ends a pass between two layers.

        Anywhere else it could leave a copy half enqueued, and whoever waits for it would wait on.
        """
        from offload_rt.engine import FinishReason

        self.engine.poll_with(self.interrupts.check)
        try:
            self._prefill(run, sequence)
            self._show(stream, sequence)
            while run.active:
                run.step()
                self._show(stream, sequence)
        except Interrupted:
            sequence.finish(FinishReason.ABORT)
            self._show(stream, sequence)

    def _prefill(self, run: "Run", sequence: "SequenceState") -> None:
        """Read the prompt under a bar of its tokens: how far they are through the layers.

        Where layers are streamed to a GPU the host is ahead of it, so what has arrived counts.
        """
        engine, prompt = self.engine, sequence.prompt_tokens
        network, layers = engine.network, self.model.checkpoint.config.num_layers
        start, copied = network.rows_done, engine.device.copy.statistics().bytes_copied
        waits = engine.bytes_per_pass if engine.device.name.startswith("cuda") else 0

        def done() -> int:
            new = network.pass_rows or prompt  # what the cache has already is not read again
            read = (network.rows_done - start) / layers
            if waits:
                arrived = engine.device.copy.statistics().bytes_copied - copied
                read = min(read, new * arrived / waits)
            return prompt - new + int(read)

        network.pass_rows = 0
        with self.console.progress("reading the prompt") as gauge:
            gauge.done, gauge.total = done, prompt
            gauge.detail = lambda: f"{min(done(), prompt)} of {prompt} tokens"
            run.prefill()

    def _show(self, stream: RemoteStream, sequence: "SequenceState") -> None:
        """Push the tokens the stream has not seen; a stop string in them ends the sequence."""
        from offload_rt.engine import FinishReason

        piece = stream.push(sequence.emitted[stream.kept_tokens :])
        if piece and not self.settings.output.json:
            write_answer(piece)
        if stream.stopped is not None:
            sequence.finish(FinishReason.STOP)
