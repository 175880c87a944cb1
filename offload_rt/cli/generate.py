"""`offload-run generate`: one prompt, one answer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from offload_rt.cli import options
from offload_rt.cli.console import Console, quiet_libraries, write_answer
from offload_rt.cli.interrupts import Interrupts
from offload_rt.cli.options import output_of, settings_of
from offload_rt.cli.prompt import read_prompt
from offload_rt.session.across import across, be_guest, is_guest
from offload_rt.session.adapters import adapted, open_for_answers
from offload_rt.trace import write_trace
from offload_rt.writing import check_target

CommandT = TypeVar("CommandT", bound=Callable[..., Any])


def _answering(command: CommandT) -> CommandT:
    """Give a command the options of `generate`."""
    for add in (
        options.run_options,
        options.nodes_option,
        options.json_option,
        click.option(
            "--raw", is_flag=True, help="Give the prompt as it is, without the chat template."
        ),
        click.option(
            "-f",
            "--prompt-file",
            type=click.Path(),
            default=None,
            show_default="read stdin",
            help="File with the prompt; - is stdin. One final line break is left out.",
        ),
        click.option(
            "-p",
            "--prompt",
            default=None,
            show_default="read stdin",
            help="The prompt, if not the words behind MODEL.",
        ),
        click.argument("words", metavar="[PROMPT]...", nargs=-1),
        click.argument("model"),
    ):
        command = add(command)
    return command


@click.command()
@click.option(
    "--trace",
    type=click.Path(),
    default=None,
    show_default="none",
    help="File for a timeline of the run (passes, layers, copies, drafts): see ui.perfetto.dev.",
)
@_answering
@click.pass_obj
def generate(interrupts: Interrupts, model: str, **values: Any) -> int:  # noqa: ANN401
    """Answer one prompt.

    The answer goes to stdout as it is made, followed by one line break; everything else goes to
    stderr. Ctrl-C ends the answer early: what there is stays, exit code 130.
    """
    return _answer(interrupts, model, values)


@click.command()
@_answering
@click.pass_obj
def run(interrupts: Interrupts, model: str, **values: Any) -> int:  # noqa: ANN401
    """Answer a prompt as `generate` does, or talk as `chat` does.

    With a PROMPT, -p, -f or text on stdin it answers once; on a terminal without any it talks.
    `run` itself may be left out. Options are those of `generate` and `chat`.
    """
    return _answer(interrupts, model, values)


def _answer(interrupts: Interrupts, model: str, values: dict[str, Any]) -> int:
    trace = None if values.get("trace") is None else Path(values["trace"])
    settings, output = settings_of(values), output_of(values)
    if trace is not None:
        check_target(trace)
    quiet_libraries(output)
    console = Console(output)
    if is_guest(nodes := values["nodes"]):
        with interrupts.raising(False):
            return be_guest(model, settings, console)
    with console.waiting(f"opening {model}", stays=False):
        checkpoint = open_for_answers(model, settings)
    prompt = read_prompt(values["prompt"], values["prompt_file"], values["words"])
    from offload_rt.cli.answering import Answering
    from offload_rt.session.answering import seeded, started_engine
    from offload_rt.session.opening import answer_capacity, open_model
    from offload_rt.session.recommended import with_recommended

    settings = with_recommended(settings, checkpoint.folder, console)
    opened = open_model(checkpoint, settings.runtime, console, settings.draft)
    from offload_rt.cli.stats import STATS_INDENT, as_json, format_stats
    from offload_rt.text import build_prompt

    ids = build_prompt(opened.tokenizer, prompt, system=settings.system, raw=settings.raw)
    capacity = answer_capacity(opened, settings, len(ids), console)
    opened = adapted(opened, settings, console)
    with (
        across(nodes, opened.checkpoint, settings, console) as settings,
        started_engine(
            opened, settings, console, capacities=[capacity], prompt_tokens=len(ids)
        ) as engine,
    ):
        tracer = None if trace is None else engine.trace()
        answering = Answering(opened, engine, settings, console, interrupts, writes=not output.json)
        answer = answering.answer(ids, seeded(settings.sampling))
        if trace is not None and tracer is not None:
            write_trace(trace, tracer.events(), f"{opened.name}, measured")
        if output.json:
            write_answer(json.dumps(as_json(answering, answer)) + "\n")
        else:
            console.block(format_stats(answering, answer), STATS_INDENT)
    return interrupts.exit_code if answer.finish_reason == "abort" else 0
