"""`offload-run chat`: a conversation."""

import dataclasses
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from offload_rt.cli import options
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.interrupts import Interrupted, Interrupts
from offload_rt.cli.options import settings_of
from offload_rt.cli.prompt import decode
from offload_rt.cli.session import (
    Answer,
    Answering,
    Model,
    context_limit,
    open_model,
    seeded,
    started_engine,
)
from offload_rt.cli.stats import format_stats
from offload_rt.config import SamplingConfig
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import open_checkpoint, resolve_model

if TYPE_CHECKING:
    from offload_rt.text import Message

AUTO_CONTEXT_TOKENS = 4096
_SEEDS = 2**63
_HELP = """\
  /clear   forget the conversation
  /stats   measurements of the last answer
  /exit    leave; Ctrl-D does too, and Ctrl-C at an empty prompt
  Ctrl-C   stops an answer and keeps what there is of it"""


@click.command()
@click.argument("model")
@options.run_options
@click.pass_obj
def chat(interrupts: Interrupts, model: str, **values: Any) -> int:  # noqa: ANN401
    """Talk with a model.

    Each line of stdin is a turn; /help lists the commands. With --context auto the conversation
    may have 4096 tokens, or what the model was made for if that is less.
    """
    settings = settings_of(values)
    quiet_libraries(settings.output)
    console = Console(settings.output)
    opened = open_model(open_checkpoint(resolve_model(model)))
    if opened.tokenizer.chat_template is None:
        raise ConfigError(
            f"{opened.name} has no chat template: use `offload-run generate --raw` with one text"
        )
    context = auto_context(opened, settings.runtime.context_tokens)
    with started_engine(
        opened, settings, console, capacity=context, prompt_tokens=context
    ) as engine:
        sampling = seeded(settings.sampling)
        session = _Session(
            Answering(opened, engine, settings, console, interrupts), sampling, context
        )
        return session.run()


def auto_context(model: Model, context_tokens: int | None) -> int:
    """Tokens of a conversation: as given, or a size that suits most."""
    limit = context_limit(model, context_tokens)
    return limit if context_tokens is not None else min(limit, AUTO_CONTEXT_TOKENS)


@dataclass(slots=True)
class _Session:
    """A conversation and what was said so far."""

    answering: Answering
    sampling: SamplingConfig
    capacity: int
    history: "list[Message]" = field(default_factory=list)
    last: Answer | None = None

    def run(self) -> int:
        """Take turns until the input ends; returns the exit code."""
        interrupts, terminal = self.answering.interrupts, sys.stdin.isatty()
        if terminal:
            self._welcome()
        warned = False
        while True:
            try:
                line = _read_line(terminal)
                warned = False
            except Interrupted:
                if warned or interrupts.terminated or not terminal:
                    return interrupts.exit_code
                interrupts.clear()
                warned = True
                click.echo("\n(Ctrl-C again or Ctrl-D leaves)", err=True)
                continue
            except ConfigError as error:
                _complain(str(error))
                continue
            if line is None or line == "/exit":
                return 0
            with interrupts.raising(False):  # an answer's passes let a signal in again
                self._take(line)
            if interrupts.terminated:
                return interrupts.exit_code
            interrupts.clear()

    def _welcome(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401 - importing it gives input() line editing
        model = self.answering.model
        self.answering.console.note(f"talking with {model.name}; /help lists the commands")

    def _take(self, line: str) -> None:
        """Obey a command or answer a turn; an error ends the turn, not the session."""
        if line == "/clear":
            self.history.clear()
        elif line == "/help":
            click.echo(_HELP, err=True)
        elif line == "/stats":
            stats = format_stats(self.answering, self.last) if self.last else "  no answer yet"
            click.echo(stats, err=True)
        elif line.startswith("/"):
            _complain(f"no command {line.split()[0]}: /help lists them")
        elif line.strip():
            try:
                self._answer(line)
            except ConfigError as error:
                _complain(str(error))

    def _answer(self, line: str) -> None:
        from offload_rt.text import Message, build_prompt

        turns = [*self.history, Message(role="user", content=line)]
        answering = self.answering
        ids = build_prompt(answering.model.tokenizer, turns, system=answering.settings.system)
        if len(ids) >= self.capacity:
            raise ConfigError(
                f"the conversation has {len(ids)} tokens, there is room for {self.capacity} with "
                "the answer: /clear forgets it, or start again with a larger --context"
            )
        self.last = answering.answer(ids, self._turn_sampling())
        if self.last.text:
            self.history = [*turns, Message(role="assistant", content=self.last.text)]
        full = len(ids) + len(self.last.token_ids) >= self.capacity
        if full and self.last.finish_reason == "length":
            answering.console.note(
                f"the answer ends here because the conversation fills its {self.capacity} tokens: "
                "/clear forgets it, or start again with a larger --context"
            )

    def _turn_sampling(self) -> SamplingConfig:
        """The session's sampling with a seed of this turn's own, so that turns differ."""
        if self.sampling.seed is None:
            return self.sampling
        seed = (self.sampling.seed + len(self.history) // 2) % _SEEDS
        return dataclasses.replace(self.sampling, seed=seed)


def _complain(sentence: str) -> None:
    click.echo(f"offload-run: error: {sentence}", err=True)


def _read_line(terminal: bool) -> str | None:
    """The next turn without its line break; None at the end of the input.

    Raises:
        ConfigError: it is not UTF-8.
    """
    if not terminal:
        data = sys.stdin.buffer.readline()
        return decode(data, "stdin") if data else None
    try:
        if sys.stdout.isatty():
            return input("> ")
        click.echo("> ", nl=False, err=True)  # stdout is for answers
        return input()
    except EOFError:
        click.echo(err=True)
        return None
    except UnicodeDecodeError as error:
        raise ConfigError("the line is not UTF-8: set the terminal to UTF-8") from error
