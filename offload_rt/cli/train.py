"""`offload-run train-medusa`: heads for a model, trained on its own answers or on given ones."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload_rt.cli import options
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.held import held
from offload_rt.cli.interrupts import Interrupted, Interrupts
from offload_rt.cli.options import Output, runtime_of
from offload_rt.cli.talk_file import read_talks, require_answers
from offload_rt.cli.train_options import check_effects, corpus_of, flags, train_of, training_options
from offload_rt.config import DraftConfig, RuntimeConfig
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import open_checkpoint, resolve_model
from offload_rt.model.packed_files import refuse_packed
from offload_rt.printable import printable
from offload_rt.session.adapters import refuse_beside
from offload_rt.session.observer import Gauge
from offload_rt.session.opening import Model, context_limit, open_model
from offload_rt.speculative.medusa.calibration import best_trees, read_calibration
from offload_rt.training.settings import (
    CorpusConfig,
    Method,
    TrainConfig,
    WarmUp,
)
from offload_rt.training.talks import Talk
from offload_rt.writing import sweep

if TYPE_CHECKING:
    from offload_rt.training.corpus import Encoder
    from offload_rt.training.job import Job

RECORD, CORPUS_RECORD, CACHE = "training.json", "corpus.json", "cache"
_NODES = DraftConfig(draft="medusa:m").nodes


@dataclass(frozen=True, slots=True)
class _Watch:
    """Shows progress, and ends the training on Ctrl-C."""

    console: Console
    interrupts: Interrupts

    def progress(self, label: str) -> AbstractContextManager[Gauge]:
        return self.console.progress(label)

    def note(self, sentence: str) -> None:
        self.console.note(sentence)

    def poll(self) -> None:
        self.interrupts.check()


@click.command("train-medusa")
@click.argument("model")
@training_options
@options.json_option
@options.placement_options
@options.runtime_options
@options.output_options
@click.pass_obj
def train_medusa(interrupts: Interrupts, model: str, **values: Any) -> int:  # noqa: ANN401
    """Train Medusa heads for MODEL.

    Hidden states are read by streaming the model once per large batch of texts, so heads can be
    trained for a model larger than memory. The same command line goes on where it was stopped.
    Use the heads with `--draft medusa:OUTPUT`.
    """
    output = Output(json=values["json"], verbose=values["verbose"], quiet=values["quiet"])
    corpus, config, runtime = corpus_of(values), train_of(values), runtime_of(values)
    check_effects(corpus, config, runtime)
    quiet_libraries(output)
    checkpoint, console = open_checkpoint(resolve_model(model)), Console(output)
    refuse_beside(checkpoint.folder, "and heads are trained for one of the two")
    if checkpoint.stored and config.method is Method.MEDUSA_2:
        raise ConfigError(
            f"--method medusa-2 trains weights, and those of {checkpoint.name} are quantised: use "
            "medusa-1, or the model it was made from"
        )
    if config.method is Method.MEDUSA_2:
        refuse_packed(checkpoint.folder, "and --method medusa-2 trains its weights")
    talks = read_talks(values["data"])
    if not corpus.self_distill:
        require_answers(talks, values["data"])
    opened = open_model(checkpoint, runtime, console)
    context = context_limit(opened, runtime.context_tokens)
    from offload_rt.training.corpus import Dropped, Encoder  # imports torch

    encoder = Encoder(opened.tokenizer, _end_of(opened, corpus.raw), context, corpus.raw, Dropped())
    watch = _Watch(console, interrupts)
    with ExitStack() as folders:
        job = _job(opened, (corpus, config, runtime), values, encoder, watch, folders)
        if job.output.result is not None:
            console.note(f"{job.output.path} is trained already, with these settings")
            _show(job.output.result, job.output.path, output)
            return 0
        try:
            with interrupts.raising(False):
                result = _train(job, opened, talks, encoder)
        except Interrupted:
            console.note(f"stopped; what is done is kept in {job.output.path}: run the same again")
            raise
    _show(result, job.output.path, output)
    return 0


def _end_of(opened: Model, raw: bool) -> int:
    """The token behind an answer.

    Raises:
        ConfigError: the model has none.
    """
    from offload_rt.text import answer_end_token

    end = answer_end_token(opened.tokenizer, opened.end_tokens, raw=raw)
    if end is None:
        raise ConfigError(f"{opened.name} names no token that ends an answer: it cannot be trained")
    return end


def _train(
    job: "Job", opened: Model, talks: list[Talk], encoder: "Encoder"
) -> Mapping[str, object]:
    """All stages; returns what came of them."""
    from offload_rt.training.job import finish, make_corpus, read_states, train

    corpus = make_corpus(job, encoder, talks, opened.end_tokens)
    caches = None if _skips_states(job.config) else read_states(job, corpus)
    try:
        trained = train(job, corpus, caches)
    finally:
        if caches is not None:
            caches.close()
    result = finish(job, corpus, trained)
    if job.cache.path == job.output.path / CACHE:
        shutil.rmtree(job.cache.path, ignore_errors=True)
    return result


def _skips_states(config: TrainConfig) -> bool:
    """Whether nobody needs cached hidden states: Medusa-2 that begins with both."""
    return config.method is Method.MEDUSA_2 and config.joint.warm_up is WarmUp.SINE


def _job(
    opened: Model,
    configs: tuple[CorpusConfig, TrainConfig, RuntimeConfig],
    values: Mapping[str, Any],
    encoder: "Encoder",
    watch: _Watch,
    folders: ExitStack,
) -> "Job":
    """The training with its folders, made or gone on with and ours until `folders` ends.

    Raises:
        ConfigError: a folder was made with other settings, or another training is at it.
    """
    from offload_rt.training.folder import model_identity, open_folder
    from offload_rt.training.job import Job

    corpus, config, runtime = configs
    folder = Path(values["folder"])
    of_corpus: dict[str, object] = {
        "MODEL": f"{opened.name} ({model_identity(opened.checkpoint)[:12]})",
        "--data": f"{Path(values['data']).name} ({_digest(values['data'])[:12]})",
        "--context": encoder.context_tokens,
        "end of an answer": encoder.end_token,
        "--dtype": str(runtime.dtype),
        **flags(corpus),
    }
    settings = of_corpus | flags(config) | flags(config.joint)
    output = cache = open_folder(folder, RECORD, settings, "--output")
    if output.result is None:
        folders.enter_context(held(folder, "--output"))
        sweep(folder)
        output = cache = open_folder(folder, RECORD, settings, "--output")  # may be done by now
    if output.result is None:
        path = Path(values["cache"] or folder / CACHE)
        cache = open_folder(path, CORPUS_RECORD, of_corpus, "--cache")
        folders.enter_context(held(path, "--cache"))
        sweep(path)
    return Job(opened.checkpoint, runtime, corpus, config, output, cache, watch)


def _digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error


def _show(result: Mapping[str, Any], folder: Path, output: Output) -> None:
    calibration = read_calibration(folder) if result["calibrated"] else None
    expected = None
    if calibration is not None:
        expected = best_trees(calibration.accuracy, _NODES).tokens_per_pass(_NODES)
    if output.json:
        record = {"output": str(folder), **result}
        if expected is not None:
            record["tokens_per_pass"] = {str(_NODES): expected}
        click.echo(json.dumps(record))
        return
    click.echo("\n".join(map(printable, _lines(result, folder, expected))))


def _lines(result: Mapping[str, Any], folder: Path, expected: float | None) -> list[str]:
    places = result["held_out"]["places"]
    lines = [
        f"head {number}  right {head['top1']:.0%} at once, {head['top5']:.0%} among 5 tokens, "
        f"of {places} held-out places"
        for number, head in enumerate(result["heads"], start=1)
    ]
    if expected is not None:
        lines.append(f"a tree of {_NODES} nodes is expected to give {expected:.2f} tokens/pass")
    model = "MODEL"
    if result["perplexity"]:
        before, after = result["perplexity"]
        lines.append(f"perplexity of held-out answers {before:.3f} before, {after:.3f} after")
    if result["method"] == Method.MEDUSA_2:
        model = str(folder / "model")
    if expected is None:
        lines.append(
            f"find the best trees with `offload-run medusa calibrate {folder} {model} "
            "--prompts FILE`"
        )
    lines.append(f"draft with `offload-run generate {model} --draft medusa:{folder}`")
    return lines
