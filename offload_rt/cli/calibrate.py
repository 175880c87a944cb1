"""`offload-run medusa calibrate`: how often heads are right about what the model writes."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from offload_rt.cli import options
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.interrupts import Interrupts
from offload_rt.cli.options import Output, runtime_of
from offload_rt.cli.prompt_set import read_prompt_set, spread
from offload_rt.config import DraftConfig, GenerationConfig, RuntimeConfig, SamplingConfig
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint, open_checkpoint, resolve_model
from offload_rt.printable import printable
from offload_rt.session.opening import Model, context_limit, open_model
from offload_rt.speculative.medusa.calibration import (
    CALIBRATION_FILE,
    RANKS,
    Calibration,
    best_trees,
    write_calibration,
)
from offload_rt.writing import check_target

if TYPE_CHECKING:
    import torch

    from offload_rt.engine import Engine
    from offload_rt.speculative.medusa.drafter import Medusa

SEQUENCES = 8  # answers at once: weights are streamed once for all of them
_NODES = DraftConfig(draft="medusa:m").nodes


@click.command()
@click.argument("heads")
@click.argument("model")
@options.prompt_set_options
@click.option(
    "-n",
    "--max-tokens",
    type=click.IntRange(min=2),
    default=64,
    help="Tokens of each answer that are listened to.",
)
@click.option("--raw", is_flag=True, help="Give prompts as they are, without the chat template.")
@click.option(
    "--output",
    "directory",
    default=None,
    show_default="HEADS",
    help="Folder for the result; runs look for it next to the heads.",
)
@options.json_option
@options.placement_options
@options.runtime_options
@options.output_options
@click.pass_obj
def calibrate(interrupts: Interrupts, heads: str, model: str, **values: Any) -> int:  # noqa: ANN401
    """Measure how often HEADS are right about MODEL's own greedy answers.

    The result is kept next to the heads and shapes the trees of later runs.
    """
    output = Output(json=values["json"], verbose=values["verbose"], quiet=values["quiet"])
    config, draft = runtime_of(values), DraftConfig(draft=f"medusa:{heads}")
    quiet_libraries(output)
    checkpoint, console = open_checkpoint(resolve_model(model)), Console(output)
    items = spread(read_prompt_set(values["prompts"]), values["limit"])
    folder = Path(values["directory"] or resolve_model(heads))
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: make it first, or leave --output out")
    check_target(folder / CALIBRATION_FILE)
    opened = open_model(checkpoint, config, console)
    from offload_rt.text import build_prompt

    prompts = [build_prompt(opened.tokenizer, item.text, raw=values["raw"]) for item in items]
    capacity = _capacity(opened, config, prompts, values["max_tokens"])
    engine = _loaded(checkpoint, config, draft, prompts, capacity, console)
    with engine, interrupts.raising(False):
        engine.poll_with(interrupts.check)
        calibration = listen(
            engine, prompts, values["max_tokens"], opened.end_tokens, console=console
        )
    path = write_calibration(calibration, folder)
    _show(calibration, path, output)
    return 0


def _loaded(
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    draft: DraftConfig,
    prompts: Sequence[Sequence[int]],
    capacity: int,
    console: Console,
) -> "Engine":
    """An engine for as many prompts at once as are worth it; whoever called closes it."""
    from offload_rt.engine import Engine

    together = min(SEQUENCES, len(prompts))
    with console.progress(f"loading {checkpoint.name}") as gauge:

        def show(engine: Engine) -> None:
            gauge.done = engine.devices.loaded_bytes
            gauge.total = engine.load_bytes

        return Engine(
            checkpoint,
            config,
            capacities=[capacity] * together,
            prompt_tokens=sum(sorted(map(len, prompts))[-together:]),
            draft=draft,
            on_placed=show,
        )


def listen(
    engine: "Engine",
    prompts: Sequence[Sequence[int]],
    tokens: int,
    end_tokens: frozenset[int],
    *,
    console: Console,
) -> Calibration:
    """Have the model answer, with the heads drafting, and judge the heads by the answers."""
    from offload_rt.speculative.medusa.judge import Judge

    heads = engine.medusa
    assert heads is not None  # the engine was made with heads
    judge = Judge(heads.ranked, heads.heads, RANKS)
    with console.progress("listening to answers") as gauge:
        done = 0
        gauge.done, gauge.total = lambda: done, len(prompts)
        for start in range(0, len(prompts), engine.sequences):
            batch = prompts[start : start + engine.sequences]
            for hidden, written in _answers(engine, heads, batch, tokens, end_tokens):
                judge.add(hidden, written)
            done = start + len(batch)
    dtype = str(engine.network.dtype).removeprefix("torch.")
    return judge.result(engine.checkpoint.name, dtype)


def _answers(
    engine: "Engine",
    heads: "Medusa",
    prompts: Sequence[Sequence[int]],
    tokens: int,
    end_tokens: frozenset[int],
) -> list[tuple[list["torch.Tensor"], list[int]]]:
    """Greedy answers, and the hidden states that made their tokens."""
    from offload_rt.engine import Run

    states: list[list[torch.Tensor]] = [[] for _ in prompts]

    def keep(index: int, kept: Sequence["torch.Tensor"]) -> None:
        states[index].extend(kept)

    heads.on_kept = keep
    run = Run.start(
        engine, prompts, SamplingConfig(), GenerationConfig(max_tokens=tokens), end_tokens
    )
    run.prefill()
    while run.active:
        run.step()
    pairs = zip(states, run.sequences, strict=True)
    return [(hidden, sequence.emitted) for hidden, sequence in pairs]


def _capacity(
    model: Model, config: RuntimeConfig, prompts: Sequence[Sequence[int]], tokens: int
) -> int:
    """KV rows of a sequence.

    Raises:
        ConfigError: the longest prompt does not fit with its answer.
    """
    room, longest = context_limit(model, config.context_tokens), max(map(len, prompts))
    if longest + tokens > room:
        raise ConfigError(
            f"the longest prompt has {longest} tokens and an answer up to {tokens}, there is room "
            f"for {room}: lower --max-tokens or leave that prompt out"
        )
    return longest + tokens if config.context_tokens is None else room


def _show(calibration: Calibration, path: Path, output: Output) -> None:
    expected = best_trees(calibration.accuracy, _NODES).tokens_per_pass(_NODES)
    if output.json:
        record = {
            "file": str(path),
            "places": list(calibration.places),
            "accuracy": calibration.accuracy,
            "tokens_per_pass": {str(_NODES): expected},
        }
        click.echo(json.dumps(record))
        return
    for head, row in enumerate(calibration.accuracy, start=1):
        shares = f"{row[0]:.0%} at once, {sum(row[:5]):.0%} among 5 tokens"
        click.echo(f"head {head}  right {shares}, of {calibration.places[head - 1]} places")
    click.echo(f"a tree of {_NODES} nodes is expected to give {expected:.2f} tokens/pass")
    click.echo(f"kept in {printable(str(path))}")
