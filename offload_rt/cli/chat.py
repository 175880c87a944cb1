"""`offload-run chat`: a conversation."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from offload_rt.cli import options
from offload_rt.cli.answering import Answering
from offload_rt.cli.chat_file import read_conversation, read_text, write_conversation
from offload_rt.cli.chat_history import HistoryFile, history_path
from offload_rt.cli.chat_lines import LineReader, Reader
from offload_rt.cli.chat_settings import NAMES, change_settings, show_settings
from offload_rt.cli.chat_talk import Talk, fullness
from offload_rt.cli.chat_words import (
    Order,
    Refused,
    Text,
    as_typed,
    help_text,
    read_words,
    split_path,
    unmarked,
    whole_path,
)
from offload_rt.cli.console import Console, quiet_libraries
from offload_rt.cli.faults import of_system, report_fault
from offload_rt.cli.interrupts import Interrupted, Interrupts
from offload_rt.cli.options import Output, output_of, settings_of
from offload_rt.cli.stats import STATS_INDENT, format_stats
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.printable import printable
from offload_rt.session.adapters import adapted, open_answering
from offload_rt.session.answering import started_engine
from offload_rt.session.opening import AUTO_CONTEXT_TOKENS, Model, context_limit
from offload_rt.session.settings import check_accept

_OFFER_CHARS = 20_000  # a longer turn is no use to edit
_LINES_ONLY = ("", "dumb", "unknown")  # terminals that cannot move their cursor


@click.command()
@click.argument("model")
@options.run_options
@click.pass_obj
def chat(interrupts: Interrupts, model: str, **values: Any) -> int:  # noqa: ANN401
    """Talk with a model.

    On a terminal a pasted text is one turn, and the arrow keys bring back what was typed before;
    from a pipe each line is a turn. Lines between two triple quotes belong together, and a
    backslash at the end of a line adds the next. /help lists the commands. With --context auto the
    conversation may have 4096 tokens, or what the model was made for if that is less.
    """
    settings, output = settings_of(values), output_of(values)
    quiet_libraries(output)
    console = Console(output)
    opened, settings = open_answering(model, settings, console)
    if opened.tokenizer.chat_template is None:
        raise ConfigError(
            f"{opened.name} has no chat template: use `offload-run generate --raw` with one text"
        )
    context = auto_context(opened, settings.runtime.context_tokens)
    opened = adapted(opened, settings, console)
    with started_engine(
        opened, settings, console, capacities=[context], prompt_tokens=context
    ) as engine:
        talk = Talk(Answering(opened, engine, settings, console, interrupts), context)
        return _Session(talk, open_reader(interrupts, console)).run()


def auto_context(model: Model, context_tokens: int | None) -> int:
    """Tokens of a conversation: as given, or a size that suits most."""
    limit = context_limit(model, context_tokens)
    return limit if context_tokens is not None else min(limit, AUTO_CONTEXT_TOKENS)


def open_reader(interrupts: Interrupts, console: Console) -> Reader:
    """Where turns come from: a terminal with keys, or lines."""
    shown = sys.stderr.isatty() or sys.stdout.isatty()
    if not (sys.stdin.isatty() and shown) or os.environ.get("TERM", "") in _LINES_ONLY:
        return LineReader()
    from offload_rt.cli.chat_terminal import TerminalReader

    return TerminalReader(interrupts, HistoryFile(history_path()), console.note, NAMES)


@dataclass(slots=True)
class _Session:
    """A conversation with who types.

    Attributes:
        offer: a turn that was not answered, shown again to be edited.
        over: the user wants to leave.
    """

    talk: Talk
    reader: Reader
    offer: str = ""
    over: bool = False

    def run(self) -> int:
        """Take turns until the input ends; returns the exit code."""
        interrupts, interactive = self.talk.answering.interrupts, self.reader.interactive
        if interactive:
            self._note(f"talking with {self.talk.answering.model.name}; /help lists the commands")
        warned = False
        while not self.over:
            offer, self.offer = self.offer, ""
            try:
                typed = self.reader.read(offer)
                warned = False
            except Interrupted:
                if warned or interrupts.terminated or not interactive:
                    return interrupts.exit_code
                interrupts.clear()
                warned = True
                click.echo(f"{self.reader.line_end}(Ctrl-C again or Ctrl-D leaves)", err=True)
                continue
            except ConfigError as error:
                _complain(str(error))
                continue
            if typed is None:
                break
            with interrupts.raising(False):  # an answer's passes let a signal in again
                self._attempt(typed)
            if interrupts.terminated:
                return interrupts.exit_code
            interrupts.clear()
        return 0 if interactive else self.talk.failure

    def _attempt(self, typed: str) -> None:
        """Do what was typed; an error ends that, not the conversation."""
        try:
            self._take(typed)
        except Interrupted:
            self._note("stopped")
        except BrokenPipeError:  # nobody reads the answers
            raise
        except Exception as error:
            sentence = str(error) if isinstance(error, OffloadError) else of_system(error)
            hopeless = not sentence or self.talk.broken is not None or isinstance(error, OSError)
            if hopeless and not self.reader.offers:
                raise  # nobody is there to type /save
            if sentence:
                _complain(sentence)
            else:
                report_fault(error, sys.argv[1:])
        else:
            return
        self._offer_again(typed)

    def _take(self, typed: str) -> None:
        match read_words(typed):
            case Text(text):
                if text.strip():
                    self._answer(text, typed)
            case Order(name, argument):
                _ORDERS[name](self, argument)
            case Refused(sentence):
                raise ConfigError(sentence)

    def _answer(self, text: str, typed: str) -> None:
        self.talk.answer(text)
        if self.talk.unanswered is not None:
            self._offer_again(typed)

    def _offer_again(self, typed: str) -> None:
        if len(typed) <= _OFFER_CHARS:
            self.offer = typed

    def _system(self, argument: str) -> None:
        if not argument:
            system = self.talk.settings.system
            _show("  no system prompt" if system is None else system)
            return
        text = unmarked(argument)
        self.talk.instruct(None if text in ("", '""', "''") else text)
        done = "removed" if self.talk.settings.system is None else "set"
        self._note(f"the system prompt is {done}")

    def _set(self, argument: str) -> None:
        if not argument:
            _show(show_settings(self.talk.settings))
            return
        context = click.get_current_context()
        self.talk.settings, names = change_settings(self.talk.settings, argument, context)
        self.talk.answering.console.block(show_settings(self.talk.settings, names))

    def _file(self, argument: str) -> None:
        path, text = split_path(argument)
        content = read_text(_path(path))
        if not content.strip():
            raise ConfigError(f"{path} is empty: name a file with text")
        turn = f"{content}\n\n{text}" if text else content
        self._answer(turn, f"/file {argument}")

    def _regenerate(self, _: str) -> None:
        self.talk.again()

    def _undo(self, _: str) -> None:
        what = "the last turn" if self.talk.unanswered is None else "the turn without an answer"
        turn = self.talk.undo()
        self._note(f"{what} is taken back; {self._turns()} left")
        if self.reader.offers:
            self._offer_again(as_typed(turn))

    def _clear(self, _: str) -> None:
        self.talk.clear()

    def _save(self, argument: str) -> None:
        path = _path(whole_path(argument))
        write_conversation(path, self.talk.record())
        self._note(f"{self._turns()} written to {path}")

    def _load(self, argument: str) -> None:
        path = _path(whole_path(argument))
        record = read_conversation(path)
        if record.settings is not None:
            check_accept(record.settings[0], self.talk.settings.draft)
        self.talk.resume(record)
        used, capacity = self.talk.used(), self.talk.capacity
        name = self.talk.answering.model.name
        held = f", held with {record.model}" if record.model not in ("", name) else ""
        self._note(f"{self._turns()} from {path}{held}; {fullness(used, capacity)}")
        if used >= capacity:
            self._note(f"the next turn has no room: {self.talk.room_advice(used)}")
        if record.unanswered is not None:
            self._note("the last turn has no answer: /regenerate answers it")

    def _context(self, _: str) -> None:
        used, capacity = self.talk.used(), self.talk.capacity
        _show(
            f"  {fullness(used, capacity)}, {max(0, capacity - used)} tokens left for turns and "
            f"answers; {self._turns()}"
        )

    def _stats(self, _: str) -> None:
        last = self.talk.last
        if last is None:
            _show("  no answer yet")
        else:
            _show(format_stats(self.talk.answering, last), STATS_INDENT)

    def _help(self, _: str) -> None:
        _show(help_text())

    def _exit(self, _: str) -> None:
        self.over = True

    def _turns(self) -> str:
        count = len(self.talk.said)
        return "1 turn" if count == 1 else f"{count} turns"

    def _note(self, sentence: str) -> None:
        self.talk.answering.console.note(sentence)


_ORDERS: dict[str, Callable[[_Session, str], None]] = {
    "system": _Session._system,
    "set": _Session._set,
    "file": _Session._file,
    "regenerate": _Session._regenerate,
    "undo": _Session._undo,
    "clear": _Session._clear,
    "save": _Session._save,
    "load": _Session._load,
    "context": _Session._context,
    "stats": _Session._stats,
    "help": _Session._help,
    "exit": _Session._exit,
}


def _path(typed: str) -> Path:
    """The path of a file.

    Raises:
        ConfigError: there can be none of that name.
    """
    try:
        if "\0" in typed:
            raise ConfigError("a NUL character is in the name of the file: leave it out")
        return Path(typed).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"cannot find {typed}: {error}") from error


def _complain(sentence: str) -> None:
    click.echo(f"offload-run: error: {printable(sentence)}", err=True)


def _show(text: str, indent: int = 0) -> None:
    """Show what was asked for, with --quiet too."""
    Console(Output()).block(text, indent)
