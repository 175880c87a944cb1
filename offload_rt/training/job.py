"""One training from data to heads, stage by stage; every stage goes on where it was stopped.

    corpus = make_corpus(job, encoder, talks)    with self-distillation the model writes the answers
    caches = read_states(job, corpus)            streamed once per packed batch of texts
    trained = train(job, corpus, caches)         the heads, and with Medusa-2 the model
    finish(job, corpus, trained)                 what runs load

Progress goes to a `Watch`; nothing here prints.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from offload_rt.config import RuntimeConfig
from offload_rt.device.opening import open_device
from offload_rt.engine import Engine
from offload_rt.errors import ConfigError, NumbersError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.layout import compute_dtype
from offload_rt.speculative.medusa.calibration import CALIBRATION_FILE, write_calibration
from offload_rt.speculative.medusa.heads import MedusaHeads
from offload_rt.speculative.medusa.storage import read_output_bias, read_output_head
from offload_rt.training.answers import AnswerFile, Asked, answer_all, batches
from offload_rt.training.cache import CacheShape, StateCache
from offload_rt.training.corpus import Encoder, Sample, require_samples
from offload_rt.training.folder import Folder
from offload_rt.training.frozen import FrozenTrainer
from offload_rt.training.loss import Score
from offload_rt.training.memory import check_memory
from offload_rt.training.output import draw_curve, put_heads, put_history, put_model
from offload_rt.training.settings import CorpusConfig, Method, TrainConfig
from offload_rt.training.state import Recipe
from offload_rt.training.states import Reading, read_all, reading_engine
from offload_rt.training.talks import Talk, split
from offload_rt.training.vocabulary import OutputHead, Vocabulary, choose, new_heads, shape_of
from offload_rt.units import format_size

STATE, JOINT_STATE = "training.state", "joint.state"


class Watch(Protocol):
    """Whoever is told how the training goes."""

    def progress(self, label: str) -> AbstractContextManager[Any]:
        """A stage begins; it ends with the context, which is a gauge as in `cli/console.py`."""

    def note(self, sentence: str) -> None:
        """Something the user should know."""

    def poll(self) -> None:
        """Raise to end the training in good order."""


@dataclass(slots=True)
class Job:
    """A training.

    Attributes:
        checkpoint: headers of the model.
        runtime: where it runs.
        corpus: what is trained on.
        config: how.
        output: where the heads go.
        cache: where answers and hidden states are kept.
        watch: is told how it goes.
        seconds: of each stage of this process.
    """

    checkpoint: Checkpoint
    runtime: RuntimeConfig
    corpus: CorpusConfig
    config: TrainConfig
    output: Folder
    cache: Folder
    watch: Watch
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Torch's name of the number format the model computes in."""
        return compute_dtype(self.checkpoint, self.runtime.dtype)

    def recipe(self, state: str) -> Recipe:
        """How it trains, with the file of its saved state."""
        return Recipe(config=self.config, seed=self.corpus.seed, state=self.output.path / state)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Count the body's seconds."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts to train on, and texts held out."""

    train: list[Sample]
    held_out: list[Sample]


@dataclass(slots=True)
class Caches:
    """Hidden states of a corpus."""

    train: StateCache
    held_out: StateCache

    def close(self) -> None:
        """Close their files."""
        self.train.close()
        self.held_out.close()


@dataclass(slots=True)
class Trained:
    """What a training came to.

    Attributes:
        heads: as they will be stored: in the model's number format.
        score: on held-out texts; None without any.
        history: notes of the training.
        model: the merged model of Medusa-2.
        perplexity: of held-out answers, by the model before and after; None without Medusa-2.
    """

    heads: MedusaHeads
    vocabulary: Vocabulary
    score: Score | None
    history: list[dict[str, Any]]
    model: Any = None
    perplexity: tuple[float, float] | None = None


def make_corpus(job: Job, encoder: Encoder, talks: Sequence[Talk], ends: frozenset[int]) -> Corpus:
    """Split prompts, get their answers, and turn both into tokens.

    Args:
        job: the training.
        encoder: of the model's tokenizer.
        talks: what the data file holds.
        ends: tokens that end an answer.

    Raises:
        ConfigError: nothing is left to train on.
    """
    train, held_out = split(talks, job.corpus.holdout, job.corpus.seed)
    if job.corpus.self_distill:
        corpus = _distilled(job, encoder, (train, held_out), ends)
    else:
        corpus = Corpus(encoder.samples(train), encoder.samples(held_out))
    if said := str(encoder.dropped):
        job.watch.note(said)
    require_samples(corpus.train, "train on", encoder.dropped)
    return corpus


def _distilled(
    job: Job, encoder: Encoder, sides: tuple[list[Talk], list[Talk]], ends: frozenset[int]
) -> Corpus:
    """The model's own answers to the prompts of both sides."""
    train, held_out = (encoder.prompts(talks) for talks in sides)
    asked = batches(train, held_out, job.corpus.sequences, job.corpus.temperature)
    prompts = [*train, *held_out]
    file = AnswerFile(job.cache.path / "answers.jsonl")
    if len(file) < len(prompts):
        with job.timed("answers"):
            _answer(job, asked, file, encoder.context_tokens, ends)
    samples = []
    for place, prompt in enumerate(prompts):
        ids = (*prompt, *file[place])
        samples.append(Sample(ids, ((len(prompt), len(ids)),)))
    return Corpus(encoder.usable(samples[: len(train)]), encoder.usable(samples[len(train) :]))


def _answer(
    job: Job, asked: Sequence[Asked], file: AnswerFile, context: int, ends: frozenset[int]
) -> None:
    longest = max(len(prompt) for batch in asked for prompt in batch.prompts)
    capacity = min(context, longest + job.corpus.most_answer_tokens)
    with job.watch.progress("the model answers the prompts") as gauge:
        gauge.done, gauge.total = lambda: len(file), sum(len(batch.prompts) for batch in asked)
        with Engine(
            job.checkpoint,
            job.runtime,
            capacities=[capacity] * max(len(batch.prompts) for batch in asked),
            prompt_tokens=max(sum(map(len, batch.prompts)) for batch in asked),
        ) as engine:
            engine.poll_with(job.watch.poll)
            answer_all(
                engine,
                asked,
                file,
                answer_tokens=job.corpus.most_answer_tokens,
                end_tokens=ends,
                seed=job.corpus.seed,
            )


def read_states(job: Job, corpus: Corpus) -> Caches:
    """Hidden states of all texts, read from the cache or made.

    Raises:
        ConfigError: the disk has no room for them.
        PlanError: a pass does not fit the device.
    """
    width, folder = job.checkpoint.config.hidden_size, job.cache.path
    shape = CacheShape(width=width, heads=job.corpus.heads, dtype=job.dtype)
    caches = Caches(StateCache(folder, "train", shape), StateCache(folder, "held-out", shape))
    readings = [Reading(corpus.train, caches.train), Reading(corpus.held_out, caches.held_out)]
    missing, free = sum(r.missing_bytes for r in readings), shutil.disk_usage(folder).free
    if missing > free:
        raise ConfigError(
            f"the hidden states need {format_size(missing)} in {folder}, {format_size(free)} are "
            "free there: make room, give another --cache, or fewer prompts"
        )
    if missing:
        with job.timed("states"):
            _read(job, readings)
    return caches


def _read(job: Job, readings: Sequence[Reading]) -> None:
    pass_tokens, tokens = job.corpus.pass_tokens, 0
    todo = [text for r in readings for b in r.batches(pass_tokens) for text in b]

    def count(done: int) -> None:
        nonlocal tokens
        tokens += done

    with job.watch.progress("reading hidden states") as gauge:
        gauge.done, gauge.total = lambda: tokens, sum(len(text.ids) for text in todo)
        with reading_engine(job.checkpoint, job.runtime, readings, pass_tokens) as engine:
            engine.poll_with(job.watch.poll)
            read_all(engine, readings, pass_tokens, count)


def train(job: Job, corpus: Corpus, caches: Caches | None) -> Trained:
    """Train heads, and with Medusa-2 the model.

    Args:
        job: the training.
        corpus: texts; Medusa-2 reads them itself.
        caches: their hidden states; None for Medusa-2 without a stage for the heads alone.

    Raises:
        PlanError: it does not fit the device limit.
    """
    device = open_device(job.runtime)
    where = device.torch_device
    device.close()
    output = OutputHead(read_output_head(job.checkpoint), read_output_bias(job.checkpoint))
    output = output.to(where, getattr(torch, job.dtype))
    vocabulary = _vocabulary(job, corpus, len(output.weight)).to(where)
    own = None if job.config.vocabulary is None else vocabulary
    width = job.checkpoint.config.hidden_size
    shape = shape_of(job.corpus.heads, job.config.layers, width, own)
    check_memory(job.checkpoint, job.runtime, job.config, shape, corpus.train)
    heads = new_heads(shape, output, vocabulary, job.corpus.seed).to(where)
    trained = None
    if caches is not None:
        with job.timed("heads"):
            trained = _train_frozen(job, heads, vocabulary, caches)
    if job.config.method is Method.MEDUSA_1:
        assert trained is not None
        return trained
    with job.timed("joint"):
        return _train_joint(job, corpus, heads, vocabulary, trained)


def _vocabulary(job: Job, corpus: Corpus, rows: int) -> Vocabulary:
    """Tokens heads can guess: the commonest of the answers they are trained on."""
    counts = torch.zeros(rows, dtype=torch.int64)
    for sample in corpus.train:
        for start, stop in sample.answers:
            ids = torch.tensor(sample.ids[start:stop])
            counts += torch.bincount(ids, minlength=rows)
    return choose(counts, job.config.vocabulary)


def _train_frozen(job: Job, heads: MedusaHeads, vocabulary: Vocabulary, caches: Caches) -> Trained:
    trainer = FrozenTrainer(heads, vocabulary, caches.train, job.recipe(STATE))
    history = trainer.progress.history

    def score_epoch(epoch: int) -> dict[str, object]:
        if not caches.held_out.rows:
            return {"epoch": epoch}
        score = trainer.score(caches.held_out)
        return {"epoch": epoch, "held_out_top1": score.top(1), "held_out_top5": score.top(5)}

    with job.watch.progress("training heads") as gauge:
        gauge.done, gauge.total = lambda: trainer.progress.step, trainer.steps
        gauge.detail = lambda: _detail(history)
        trainer.run(poll=job.watch.poll, on_epoch=score_epoch)
    _round(heads, getattr(torch, job.dtype))
    score = trainer.score(caches.held_out) if caches.held_out.rows else None
    return Trained(heads, vocabulary, score, history)


def _train_joint(
    job: Job,
    corpus: Corpus,
    heads: MedusaHeads,
    vocabulary: Vocabulary,
    earlier: Trained | None,
) -> Trained:
    from offload_rt.training import joint

    device, seed, watch = next(heads.parameters()).device, job.corpus.seed, job.watch
    dtype = getattr(torch, job.dtype)
    model = joint.load_model(job.checkpoint.folder, dtype, device)
    held_out = corpus.held_out
    before = joint.perplexity(model, held_out, device, watch.poll) if held_out else None
    model = joint.add_adapters(model, job.config.joint.lora_rank, seed)
    trainer = joint.JointTrainer(
        model,
        heads,
        vocabulary,
        corpus.train,
        job.recipe(JOINT_STATE),
        distill=job.corpus.self_distill,
    )
    history = trainer.progress.history
    with watch.progress("training model and heads") as gauge:
        gauge.done, gauge.total = lambda: trainer.progress.step, trainer.steps
        gauge.detail = lambda: _detail(history)
        trainer.run(poll=watch.poll)
    _round(heads, dtype)
    merged = trainer.merge()
    _require_finite(merged, dtype)
    score = trainer.score(held_out) if held_out else None
    after = joint.perplexity(merged, held_out, device, watch.poll) if held_out else None
    notes = [] if earlier is None else earlier.history
    first: int = notes[-1]["step"] if notes else 0
    later = [note | {"step": note["step"] + first} for note in history]
    both = None if before is None or after is None else (before, after)
    return Trained(heads, vocabulary, score, [*notes, *later], merged, both)


def finish(job: Job, corpus: Corpus, trained: Trained) -> dict[str, object]:
    """Write what runs load, and a record of it; returns that.

    A calibration is written where held-out answers are the model's own greedy ones; those of
    Medusa-2 were written by the model as it was.
    """
    folder, dtype = job.output.path, getattr(torch, job.dtype)
    base = job.checkpoint.folder.name
    (folder / CALIBRATION_FILE).unlink(missing_ok=True)
    if trained.model is not None:
        base = put_model(trained.model, job.checkpoint.folder, folder).name
    put_heads(trained.heads, trained.vocabulary, dtype, base, folder)
    calibrated = job.corpus.self_distill and trained.model is None and trained.score is not None
    if calibrated and trained.score is not None:
        write_calibration(trained.score.calibration(base, job.dtype), folder)
    put_history(trained.history, folder)
    if not draw_curve(trained.history, folder):
        job.watch.note(
            "no loss curve: matplotlib is not installed (pip install 'offload-rt[train]')"
        )
    result = _result(job, corpus, trained) | {"calibrated": calibrated}
    job.output.finish(result)
    for name in (STATE, JOINT_STATE):
        (folder / name).unlink(missing_ok=True)
    return result


def _result(job: Job, corpus: Corpus, trained: Trained) -> dict[str, object]:
    score = trained.score
    tops = [] if score is None else zip(score.top(1), score.top(5), strict=True)
    return {
        "method": str(job.config.method),
        "heads": [{"top1": top1, "top5": top5} for top1, top5 in tops],
        "head_rows": trained.vocabulary.rows,
        "train": _counts(corpus.train),
        "held_out": _counts(corpus.held_out),
        "loss": trained.history[-1]["loss"] if trained.history else None,
        "perplexity": trained.perplexity and list(trained.perplexity),
        "seconds": job.seconds,
    }


def _counts(samples: Sequence[Sample]) -> dict[str, int]:
    return {"texts": len(samples), "places": sum(len(sample.places) for sample in samples)}


def _round(heads: MedusaHeads, dtype: torch.dtype) -> None:
    """Give parameters the values they will have once stored: what is scored is what runs.

    Raises:
        NumbersError: one is no number, or too large for the number format.
    """
    for parameter in heads.parameters():
        parameter.data = parameter.data.to(dtype).to(torch.float32)
    _require_finite(heads, dtype)


def _require_finite(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """The loss tells of every step but the last, and nothing of rounding."""
    for name, parameter in module.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise NumbersError(
                f"{name} is NaN or infinite in {str(dtype).removeprefix('torch.')} after the last "
                "step, training has gone astray: lower --lr and give --output a new folder"
            )


def _detail(history: Sequence[dict[str, Any]]) -> str:
    if not history:
        return ""
    loss, top = history[-1]["loss"], history[-1]["top1"]
    return f"loss {loss:.2f}, right " + " ".join(f"{share:.0%}" for share in top)
