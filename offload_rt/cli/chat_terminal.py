"""Turns of a chat from a terminal: editing, pasted text, history and completion.

prompt_toolkit is imported with this module, which only a chat on a terminal does.
"""

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.history import History
from prompt_toolkit.input import Input, create_input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.output.vt100 import Vt100_Output
from prompt_toolkit.shortcuts import CompleteStyle

from offload_rt.cli.chat_history import HistoryFile
from offload_rt.cli.chat_words import NAMES, going_on
from offload_rt.cli.console import unguarded
from offload_rt.cli.interrupts import Interrupted, Interrupts

_SIGN, _GOES_ON = "> ", "  "
_WITH_PATH = ("file", "load", "save")


class TerminalReader:
    """Asks for turns on a terminal.

    Enter ends a turn, unless it is unfinished; Alt-Enter begins a line in any case, and Ctrl-C
    first empties what is typed. Pasted text stays one turn because terminals mark it (bracketed
    paste).

    Args:
        interrupts: told of a signal that comes while a turn is typed.
        history: what was typed before.
        tell: shows a note.
        settings: names that `/set` knows, for completion.
        source: keys; None: standard input.
        screen: where turns are shown; None: the terminal of standard error, else of output.
    """

    interactive, offers, line_end = True, True, ""

    def __init__(
        self,
        interrupts: Interrupts,
        history: HistoryFile,
        tell: Callable[[str], None],
        settings: Iterable[str] = (),
        *,
        source: Input | None = None,
        screen: Output | None = None,
    ) -> None:
        self._interrupts, self._history, self._tell = interrupts, history, tell
        self._told: str | None = None
        self._prompt: PromptSession[str] = PromptSession(
            _SIGN,
            multiline=True,
            prompt_continuation=_GOES_ON,
            history=_Recalled(history),
            completer=_Words(tuple(settings)),
            complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE,
            enable_suspend=True,
            key_bindings=_keys(),
            input=source or create_input(sys.stdin),
            output=screen or _screen(),
        )

    def read(self, offer: str = "") -> str | None:
        """The next turn or command; Ctrl-D with nothing typed ends the input."""
        with self._interrupts.raising(False):  # the terminal has to be put right first
            try:
                typed = self._ask(offer)
            finally:
                self._tell_problem()
        self._interrupts.check()
        return typed

    def _tell_problem(self) -> None:
        problem = self._history.problem
        if problem is not None and problem != self._told:
            self._told = problem
            self._tell(problem)

    def _ask(self, offer: str) -> str | None:
        before = signal.getsignal(signal.SIGTERM)

        def end() -> None:
            if callable(before):
                before(signal.SIGTERM, None)
            if not self._prompt.app.is_done:
                self._prompt.app.exit(exception=KeyboardInterrupt())

        def begin() -> None:  # in the loop of the prompt, which ends with it
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end)

        try:
            return self._prompt.prompt(default=offer, pre_run=begin).rstrip("\n")
        except EOFError:
            return None
        except KeyboardInterrupt:
            raise Interrupted from None
        finally:
            signal.signal(signal.SIGTERM, before)


class _Recalled(History):
    """The history file as prompt_toolkit wants it."""

    def __init__(self, file: HistoryFile) -> None:
        super().__init__()
        self._file = file

    def load_history_strings(self) -> Iterable[str]:
        return reversed(self._file.load())

    def store_string(self, string: str) -> None:
        self._file.add(string)


class _Words(Completer):
    """Completes names of commands and settings, and paths."""

    def __init__(self, settings: tuple[str, ...]) -> None:
        self._settings = settings
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        typed = document.text_before_cursor
        name, space, rest = typed.removeprefix("/").partition(" ")
        if not typed.startswith("/") or "\n" in typed:
            return
        if not space:
            yield from _beginning(NAMES, name)
        elif name == "set":
            yield from _beginning(self._settings, rest.rpartition(" ")[2])
        elif name in _WITH_PATH:
            yield from self._paths.get_completions(Document(rest), complete_event)


def _beginning(words: Iterable[str], typed: str) -> Iterable[Completion]:
    for word in sorted(words):
        if word.startswith(typed):
            yield Completion(word, start_position=-len(typed))


def _keys() -> KeyBindings:
    keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=typing)
    def end_turn(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        longer = going_on(buffer.text)
        if longer is None:
            buffer.validate_and_handle()
        else:
            buffer.set_document(Document(longer))

    @keys.add("c-c", filter=typing & Condition(lambda: bool(get_app().current_buffer.text)))
    def forget_turn(event: KeyPressEvent) -> None:
        event.current_buffer.reset()

    @keys.add("escape", "enter", filter=typing)
    def begin_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return keys


def _screen() -> Output:
    stream: TextIO = sys.stderr if sys.stderr.isatty() else sys.stdout
    screen = Vt100_Output.from_pty(unguarded(stream), os.environ.get("TERM"))
    # Asking where the cursor is would let an answer of the terminal's come while we answer.
    screen.enable_cpr = False
    return screen
