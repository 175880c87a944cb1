"""`offload-run bench`: a set of prompts through one model, measured."""

import dataclasses
import gc
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from offload_rt.cli import options
from offload_rt.cli.answering import Answering
from offload_rt.cli.bench_report import as_json, as_markdown
from offload_rt.cli.bench_results import BASELINE, DRAFTED, BenchReport, EngineFacts, Measured
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.interrupts import Interrupted, Interrupts
from offload_rt.cli.options import Output, output_of, settings_of
from offload_rt.cli.prompt_set import PromptItem, read_prompt_set, spread
from offload_rt.cli.stats import versions
from offload_rt.config import DraftConfig, SamplingConfig
from offload_rt.errors import ConfigError
from offload_rt.session.adapters import adapted, open_for_answers
from offload_rt.session.answering import Answer, seeded, started_engine
from offload_rt.session.means import reproducible
from offload_rt.session.opening import Model, answer_capacity, check_drafter, open_model
from offload_rt.session.recommended import with_recommended
from offload_rt.session.settings import Settings
from offload_rt.session.summary import dtype_name
from offload_rt.writing import make_folder, write_text

_FILES = ("bench.md", "bench.json")


@click.command()
@click.argument("model")
@options.prompt_set_options
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    default=1,
    help="Times everything is measured; the report has medians.",
)
@click.option(
    "--against-none",
    is_flag=True,
    help="Measure without drafting too, in turns: each round makes an engine without and one with "
    "the drafter, each with the whole memory limit to itself.",
)
@click.option(
    "--output",
    "directory",
    default=None,
    show_default="none",
    help="Folder for bench.md and bench.json; made if missing.",
)
@options.raw_option
@options.json_option
@options.run_options
@click.pass_obj
def bench(interrupts: Interrupts, model: str, **values: Any) -> int:  # noqa: ANN401
    """Measure answers to a set of prompts.

    Prints a Markdown table on stdout. Prompts are answered one after the other, each from empty
    KV caches, a draft model's too. Ctrl-C prints what is done, exit code 130.
    """
    settings, output = settings_of(values), output_of(values)
    if values["against_none"] and not settings.draft.drafts:
        raise ConfigError(
            "--against-none compares with a drafter: add --draft ngram, model:MODEL or medusa:HEADS"
        )
    quiet_libraries(output)
    checkpoint = open_for_answers(model, settings)
    items = read_prompt_set(values["prompts"])
    given = values["directory"]
    directory = None if given is None else make_folder(Path(given), *_FILES)
    console = Console(output)
    if settings.own_sampling is not None:
        settings = with_recommended(settings, checkpoint.folder, console)
    opened = open_model(checkpoint, settings.runtime, console, settings.draft)
    # Only a seed of the user's fixes what is drafted; one that is drawn for him does not.
    fixed = reproducible(settings.draft, settings.sampling, settings.runtime)
    settings = dataclasses.replace(settings, draft=fixed)
    if values["against_none"] and not settings.draft.drafts:
        raise ConfigError(
            "--against-none has nothing to compare: with --seed, --draft auto drafts nothing, so "
            "name a drafter or leave --seed out"
        )
    sampling = seeded(settings.sampling)
    check_drafter(opened, settings.draft, raw=settings.raw)
    chosen = spread(items, values["limit"])
    prompts = _encode(opened, settings, chosen)
    opened = adapted(opened, settings, console)
    measuring = _Measuring(opened, settings, sampling, console, interrupts, prompts)
    interrupted = measuring.run(values["rounds"], values["against_none"])
    report = BenchReport(
        model=opened.name,
        settings=dataclasses.replace(settings, sampling=sampling),
        prompt_file=Path(values["prompts"]).name,
        prompts_in_file=len(items),
        prompts_chosen=len(chosen),
        rounds=values["rounds"],
        interrupted=interrupted,
        versions=versions(),
        engines=measuring.engines,
        runs=measuring.runs,
    )
    _write(report, directory, output)
    return interrupts.exit_code if interrupted else 0


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A prompt and its token ids."""

    item: PromptItem
    ids: Sequence[int]


@dataclass(slots=True)
class _Measuring:
    """Prompts, and what was measured so far.

    Attributes:
        sampling: that of `settings`, with a seed.
        engines: facts about the engine of each phase.
        runs: finished answers; one that was interrupted is not among them.
        compares: texts of engines are compared, so both have row-invariant passes if they can.
    """

    model: Model
    settings: Settings
    sampling: SamplingConfig
    console: Console
    interrupts: Interrupts
    prompts: Sequence[_Encoded]
    engines: dict[str, EngineFacts] = field(default_factory=dict)
    runs: list[Measured] = field(default_factory=list)
    compares: bool = False

    def run(self, rounds: int, against_none: bool) -> bool:
        """Measure everything; returns whether it was interrupted.

        Raises:
            Interrupted: before anything was measured.
        """
        self.compares = against_none
        plain = dataclasses.replace(self.settings, draft=DraftConfig(), plan=None)
        phases = [(DRAFTED if self.settings.draft.drafts else BASELINE, self.settings)]
        if against_none:
            phases.insert(0, (BASELINE, plain))
        longest = max(len(prompt.ids) for prompt in self.prompts)
        capacity = answer_capacity(self.model, self.settings, longest, self.console)
        # One engine after the other: both at once would have to share the memory limit.
        per_engine = 1 if against_none else rounds
        try:
            for first in range(0, rounds, per_engine):
                for phase, settings in phases:
                    numbers = range(first, first + per_engine)
                    self._measure(phase, settings, numbers, capacity, longest)
                    gc.collect()  # or the next engine finds less free memory
        except Interrupted:
            if not self.runs:
                raise
            return True
        return False

    def _measure(
        self, phase: str, settings: Settings, rounds: range, capacity: int, longest: int
    ) -> None:
        """Answer all prompts in one engine, as often as there are rounds for it."""
        with started_engine(
            self.model,
            settings,
            self.console,
            capacities=[capacity],
            prompt_tokens=longest,
            repeats=self.compares,
        ) as engine:
            answering = Answering(
                self.model,
                engine,
                settings,
                Console(Output(quiet=True)),
                self.interrupts,
                writes=False,
            )
            with self.console.progress(f"measuring {phase}") as gauge:
                done = _Count()
                gauge.done, gauge.total = done, len(self.prompts) * len(rounds)
                for number in rounds:
                    for prompt in self.prompts:
                        engine.forget()
                        answer = answering.answer(prompt.ids, self.sampling)
                        if answer.finish_reason == "abort":
                            raise Interrupted
                        self.runs.append(_measured(phase, number, prompt.item, answer))
                        done.value += 1
                        self.engines[phase] = EngineFacts(
                            draft=engine.draft,
                            device=engine.devices.name,
                            dtype=dtype_name(engine),
                            placement=engine.placement,
                            memory=answer.report.memory,
                            bytes_per_pass=engine.bytes_per_pass,
                            load_s=engine.load_s,
                        )


@dataclass(slots=True)
class _Count:
    """A number a progress bar reads."""

    value: int = 0

    def __call__(self) -> int:
        return self.value


def _measured(phase: str, number: int, item: PromptItem, answer: Answer) -> Measured:
    return Measured(
        phase=phase,
        round=number,
        item=item,
        prompt_tokens=answer.prompt_tokens,
        token_ids=answer.token_ids,
        finish_reason=answer.finish_reason,
        timings=answer.report.timings,
        speculation=answer.report.speculation,
    )


def _encode(model: Model, settings: Settings, items: Sequence[PromptItem]) -> list[_Encoded]:
    from offload_rt.text import build_prompt

    return [
        _Encoded(
            item,
            build_prompt(model.tokenizer, item.text, system=settings.system, raw=settings.raw),
        )
        for item in items
    ]


def _write(report: BenchReport, directory: Path | None, output: Output) -> None:
    """Print the table and write both files; what cannot be written is on stdout all the same."""
    table, record = as_markdown(report), json.dumps(as_json(report))
    try:
        for name, text in zip(_FILES, (table, record), strict=True):
            if directory is not None:
                write_text(directory / name, text + "\n")
    finally:
        click.echo(record if output.json else table)
