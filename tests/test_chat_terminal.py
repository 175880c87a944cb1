"""Turns typed on a terminal: keys go in by a pipe, what would be drawn is not looked at."""

import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from offload_rt.cli.chat import open_reader
from offload_rt.cli.chat_history import HistoryFile
from offload_rt.cli.chat_lines import LineReader
from offload_rt.cli.chat_terminal import TerminalReader
from offload_rt.cli.console import Console
from offload_rt.cli.interrupts import Interrupted, Interrupts
from offload_rt.cli.options import Output

ENTER, ALT_ENTER, TAB, UP, BACK = "\r", "\x1b\r", "\t", "\x1b[A", "\x7f"


def pasted(text):
    return f"\x1b[200~{text}\x1b[201~"


@pytest.fixture
def keyboard(tmp_path):
    """A reader whose keys are sent at once; notes are kept."""
    with create_pipe_input() as pipe, Interrupts() as interrupts:

        class Keyboard:
            notes: list[str] = []
            path = tmp_path / "history"

            def reader(self):
                return TerminalReader(
                    interrupts,
                    HistoryFile(self.path),
                    self.notes.append,
                    ("temperature", "top-p"),
                    source=pipe,
                    screen=DummyOutput(),
                )

            def read(self, keys, offer=""):
                pipe.send_text(keys)
                return self.reader().read(offer)

        keys = Keyboard()
        keys.notes = []
        yield keys


@pytest.mark.parametrize(
    ("keys", "turn"),
    [
        ("hello" + ENTER, "hello"),
        ("one" + ALT_ENTER + "two" + ENTER, "one\ntwo"),
        ("one\\" + ENTER + "two" + ENTER, "one\ntwo"),
        ("one\\\\" + ENTER, "one\\\\"),
        ('"""' + ENTER + "one" + ENTER + '"""' + ENTER, '"""\none\n"""'),
        (pasted("one\ntwo\n/clear") + ENTER, "one\ntwo\n/clear"),
        (pasted("one\r\ntwo\rthree\n") + ENTER, "one\ntwo\nthree"),
        (pasted("  a\\\n  b") + ENTER, "  a\\\n  b"),
        (pasted("one\n") + "two" + ENTER, "one\ntwo"),
        ("/reg" + TAB + ENTER, "/regenerate"),
        ("/set tem" + TAB + ENTER, "/set temperature"),
        ("wrong\x03right" + ENTER, "right"),
        ("\x04", None),
    ],
)
def test_keys_make_turns(keyboard, keys, turn):
    assert keyboard.read(keys) == turn


def test_paths_are_completed(keyboard, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    assert keyboard.read("/file no" + TAB + ENTER) == "/file notes.txt"


def test_ctrl_c_with_nothing_typed_interrupts(keyboard):
    with pytest.raises(Interrupted):
        keyboard.read("\x03")


def test_arrow_keys_recall_earlier_sessions(keyboard):
    assert keyboard.read("one" + ALT_ENTER + "two" + ENTER) == "one\ntwo"
    assert keyboard.read(UP + ENTER) == "one\ntwo"
    assert keyboard.read("three" + ENTER) == "three"
    # Keys sent at once would come before the history is there.
    assert keyboard.read(UP + UP + BACK + ENTER) == "one\ntw"
    assert not keyboard.notes


def test_a_turn_is_offered_again(keyboard):
    assert keyboard.read(BACK + "y" + ENTER, "why x") == "why y"


def test_without_a_history_file_one_note_and_all_the_rest(keyboard, tmp_path):
    keyboard.path = tmp_path / "file" / "history"
    (tmp_path / "file").write_text("")
    reader_keys = "one" + ENTER + "two" + ENTER
    assert keyboard.read(reader_keys) == "one"
    assert len(keyboard.notes) == 1 and "not kept" in keyboard.notes[0]


def test_sigterm_ends_the_prompt_in_good_order(keyboard):
    before = signal.getsignal(signal.SIGTERM)

    def soon():
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=soon)
    thread.start()
    with pytest.raises(Interrupted):
        keyboard.read("not finished")
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("term", "kind"), [("xterm", TerminalReader), ("dumb", LineReader), ("", LineReader)]
)
def test_keys_are_read_from_terminals_that_can_move_their_cursor(monkeypatch, term, kind):
    outer, inner = pty.openpty()
    with open(outer, "rb"), open(inner) as source, open(inner, "w", closefd=False) as screen:
        monkeypatch.setenv("TERM", term)
        monkeypatch.setattr(sys, "stdin", source)
        monkeypatch.setattr(sys, "stderr", screen)
        reader = open_reader(Interrupts(), Console(Output()))
        monkeypatch.undo()
    assert type(reader) is kind and reader.interactive


def test_prompt_toolkit_is_imported_on_a_terminal_only():
    source = (
        "import sys; from offload_rt.cli.chat import open_reader\n"
        "from offload_rt.cli.interrupts import Interrupts\n"
        "print(open_reader(Interrupts(), None).interactive, 'prompt_toolkit' in sys.modules)\n"
    )
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.stdout == "False False\n", done.stderr
