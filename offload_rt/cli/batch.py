"""`offload-run batch`: many prompts from a file, answered together."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload_rt.cli import options
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.interrupts import Interrupted, Interrupts
from offload_rt.cli.options import output_of, settings_of
from offload_rt.config import MOST_SEQUENCES
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.session.across import across, be_guest, is_guest
from offload_rt.session.adapters import adapted, open_answering
from offload_rt.session.settings import Settings
from offload_rt.units import format_speed
from offload_rt.writing import check_target

if TYPE_CHECKING:
    from offload_rt.serve.batch import Line


@click.command()
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    help="File with requests of OpenAI's batches, objects with prompt or messages, or a prompt in "
    "each line.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="File for answers, in the order of the input. What is done is kept in FILE.part: the same "
    "command goes on where it was cut off.",
)
@click.option(
    "--sequences",
    type=click.IntRange(1, MOST_SEQUENCES),
    default=None,
    show_default="auto",
    help="Answers in the making at once; auto is the number predicted to be fastest for all.",
)
@click.option(
    "--ray",
    metavar="ADDRESS",
    default=None,
    show_default="this machine alone",
    help="Answer on all machines of a Ray cluster, each with the whole model: HOST:PORT, auto for "
    "the one of RAY_ADDRESS, or local to start one here.",
)
@click.option(
    "--ray-workers",
    type=click.IntRange(1, 4096),
    default=None,
    show_default="one for each machine",
    help="Workers of --ray, each with a model of its own.",
)
@options.nodes_option
@options.adapter_option
@options.max_tokens_option
@options.sampling_options
@options.draft_options
@options.accept_option
@options.placement_options
@options.wire_option
@options.runtime_options
@options.plan_options
@options.output_options
@click.argument("model")
@click.pass_obj
def batch(interrupts: Interrupts, model: str, **values: Any) -> int:  # noqa: ANN401
    """Answer all prompts of a file, many in each pass over the weights.

    Each line of the output is one of OpenAI's batches: custom_id, response, error. A line that
    cannot be answered says why in its error and stops nothing. Each sampled line has a seed of its
    own: its body's, or --seed and the line's number. Ctrl-C keeps what is done.
    """
    _check(values)
    source, output_path = values["source"], values["output"]
    fixed = {"stop": (), "ignore_eos": False, "system": None}
    settings, output = settings_of({**values, **fixed}), output_of(values)
    from offload_rt.serve.batch import (
        KIND,
        WEIGHTS,
        Batch,
        Journal,
        as_begun,
        mark_of,
        passes_of,
        read_batch,
        understood,
    )

    quiet_libraries(output)
    console = Console(output)
    if is_guest(nodes := values["nodes"]):
        with interrupts.raising(False):
            return be_guest(model, settings, console)
    lines, digest = read_batch(source)
    check_target(output_path)
    opened, settings = open_answering(model, settings, console)
    from offload_rt.cli.plan import device_there
    from offload_rt.device.opening import chosen_kind
    from offload_rt.serve.spread import Job, answered, maker_of
    from offload_rt.session.crowd import Crowd
    from offload_rt.session.shared import fastest_room, shared_engine

    maker = maker_of(opened, settings)
    with console.progress("reading the input") as gauge:
        found: list[Line] = []
        gauge.done, gauge.total = lambda: len(found), len(lines)
        for number, text in lines:
            interrupts.check()
            found.append(understood(maker, number, text))
    mark = mark_of(digest, opened, settings, maker.offer.version, found)
    journal = Journal(output_path.with_name(output_path.name + ".part"), mark)
    asked = [line for line in found if line.request is not None]
    left = [line for line in asked if line.number not in journal.results]
    if not left:
        work = Batch(None, maker, found, journal)  # type: ignore[arg-type]  # nobody is asked
        work.refuse()
        return _end(work, output_path, console)
    if journal.results:
        console.note(f"{len(journal.results)} of {len(found)} lines are done already")
    # Those that are done too: the same command is to find the same room, plan and drafter again.
    needs = [(len(line.request.ids), line.request.max_tokens) for line in asked if line.request]
    settings = as_begun(settings, journal, console)
    if values["ray"] is not None:
        job = Job(
            model=model,
            weights=mark[WEIGHTS],
            settings=settings,
            needs=needs,
            sequences=values["sequences"],
        )
        work = Batch(None, maker, found, journal)  # type: ignore[arg-type]  # Ray is asked
        work.refuse()
        parts = answered(job, work.left, lines, values["ray"], values["ray_workers"])
        stopped = _gather(parts, work, settings, console)
        return _end(work, output_path, console) if not stopped else interrupts.exit_code
    journal.settle({KIND: str(chosen_kind(settings.runtime).processor)})
    opened = adapted(opened, settings, console)
    with ExitStack() as run:
        settings = run.enter_context(across(nodes, opened.checkpoint, settings, console))
        device, free = device_there(settings.runtime)
        if settings.nodes is not None:
            free = settings.nodes.with_free(free)
        rooms = fastest_room(opened, settings, device, free, needs, values["sequences"])
        engine, room = run.enter_context(shared_engine(opened, settings, console, rooms))
        journal.settle(passes_of(settings, found, exact=engine.exact.on))
        console.note(f"{len(left)} lines, {room.sequences} at once, {room.kv_tokens} tokens of KV")
        crowd = Crowd(opened, engine, patient=True, check=interrupts.check)
        work, start = Batch(crowd, maker, found, journal), time.perf_counter()
        before = len(journal.results)
        with console.progress("answering") as gauge, interrupts.raising(False):
            gauge.done, gauge.total = lambda: len(journal.results), len(found)

            def detail() -> str:
                return _progress(work, len(found), before, time.perf_counter() - start)

            gauge.detail = detail
            try:
                work.run(interrupts.check)
            except Interrupted:
                _note_stop(work, console)
                return interrupts.exit_code
        took_s = time.perf_counter() - start
        if work.emitted:
            speed = format_speed(took_s / work.emitted)
            sizes = (f"{size} where up to {n} are made" for n, size in engine.draft_sizes.items())
            drafted = f"; tokens drafted for each: {', '.join(sizes)}" if engine.draft_sizes else ""
            console.note(f"{work.emitted} tokens in {took_s:.1f} s, {speed}{drafted}")
    return _end(work, output_path, console)


def _check(values: dict[str, Any]) -> None:
    """Refuse what cannot be, before anything is read."""
    if find_spec("pydantic") is None:
        raise ConfigError("batch needs pydantic: install it with `pip install offload-rt[serve]`")
    if values["ray"] is None and values["ray_workers"] is not None:
        raise ConfigError("--ray-workers has no effect without --ray")
    if values["ray"] is not None and values["nodes"] is not None:
        raise ConfigError(
            "--ray has the whole model on each machine, --nodes a share of it: leave out one"
        )
    if values["ray"] is not None and find_spec("ray") is None:
        raise ConfigError("--ray needs Ray: install it with `pip install offload-rt[ray]`")


def _gather(
    parts: Iterator[tuple[int, Any, bool, str]],
    work: Any,  # noqa: ANN401
    settings: Settings,
    console: Console,
) -> bool:
    """Keep results as they come; whether that was stopped.

    Raises:
        ConfigError: passes are not as those that began the journal, or not the same on all workers.
    """
    from offload_rt.serve.batch import KIND, passes_of, tokens_of

    journal, start = work.journal, time.perf_counter()
    before = len(journal.results)
    passes = {exact: passes_of(settings, work.lines, exact=exact) for exact in (True, False)}
    first: dict[str, str] = {}
    try:
        with console.progress("answering") as gauge:
            gauge.done, gauge.total = lambda: len(journal.results), len(work.lines)
            gauge.detail = lambda: _progress(
                work, len(work.lines), before, time.perf_counter() - start
            )
            for number, result, exact, kind in parts:
                made = passes[exact] | {KIND: kind}
                first = first or made
                if kind != first[KIND]:
                    raise ConfigError(
                        f"workers differ: some compute on {first[KIND]}, others on {kind}: give "
                        "--device cpu or cuda"
                    )
                if made != first:
                    raise ConfigError(
                        "workers differ: passes are row-invariant on some and not on others: give "
                        f"--exact {journal.exact} to go on, or remove {journal.path} and give "
                        "--exact on or off"
                    )
                journal.settle(made)
                journal.add([(number, result)])
                work.emitted += tokens_of(result)
    except Interrupted:
        _note_stop(work, console)
        return True
    return False


def _note_stop(work: Any, console: Console) -> None:  # noqa: ANN401
    done, lines = len(work.journal.results), len(work.lines)
    console.note(f"stopped: {done} of {lines} lines are done and kept, the same command goes on")


def _progress(work: Any, lines: int, before: int, took_s: float) -> str:  # noqa: ANN401
    """How far it is, how fast, and how long it will take."""
    done = len(work.journal.results)
    said = f"{done} of {lines}"
    if work.emitted and took_s > 0.0:
        said += f", {work.emitted / took_s:.1f} tokens/s"
    if done > before:
        left_s = took_s * (lines - done) / (done - before)
        said += f", {left_s / 60:.0f} min left" if left_s >= 90 else f", {left_s:.0f} s left"
    return said


def _end(work: Any, output: Path, console: Console) -> int:  # noqa: ANN401
    """Write the output."""
    failed, count = work.failed, len(work.lines)
    work.write(output)
    console.note(f"{output}: {count - failed} of {count} lines answered")
    if failed:
        console.note(f"{failed} were not: their `error` says why")
    return OffloadError.exit_code if failed == count else 0
