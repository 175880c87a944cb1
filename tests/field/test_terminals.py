"""Nothing a folder, a file or an argument holds steers the terminal, whatever verb shows it."""

import io
import json
import logging
import os
import shutil
import struct
import sys
import traceback

import pytest

from offload_rt.cli import run
from offload_rt.cli.console import Console, Output, guarded_streams, write_answer
from offload_rt.errors import ConfigError
from offload_rt.printable import printable_lines

EVIL = "\x1b]0;OWNED\x07\x1b[2J\x9b\u202e\u2066\udcfe\x7f"


class Screen(io.TextIOWrapper):
    """A terminal's stand-in that keeps what it was sent."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    def isatty(self):
        return True

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


@pytest.fixture
def show(monkeypatch):
    """Run a command line on a screen; returns the exit code and all that was shown."""
    monkeypatch.setenv("TERM", "dumb")

    def call(*arguments, encoding="utf-8"):
        screen = Screen(encoding)
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        code = run([os.fsdecode(argument) for argument in arguments])
        return code, screen.text()

    return call


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def add_tensor(folder, name):
    """Give a further tensor of no bytes this name."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    end = len(data) - 8 - size
    header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


DAMAGES = {
    "tensor": lambda folder: add_tensor(folder, f"model.layers.0.{EVIL}"),
    "model_type": lambda folder: changed(folder / "config.json", model_type=EVIL),
    "activation": lambda folder: changed(folder / "config.json", hidden_act=EVIL),
    "template": lambda folder: (folder / "chat_template.jinja").write_text(
        "{{ raise_exception(" + json.dumps(EVIL) + ") }}"
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_model_folder_holds(damage, tiny_model, show, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    DAMAGES[damage](folder)
    code, shown = show("generate", folder, "-p", "x", "-n", "1")
    assert code in (0, 2, 4) and "x1b" in shown
    assert printable_lines(shown) == shown and "Traceback" not in shown


VERBS = {
    "plan": ["plan", "{model}"],
    "plan --json": ["plan", "{model}", "--json"],
    "simulate": ["simulate", "{model}", "--profile", "rtx4090-pcie4x16"],
    "doctor": ["doctor", "{model}"],
    "generate": ["generate", "{model}", "-p", "x", "-n", "2"],
    "generate -v": ["generate", "{model}", "-p", "x", "-n", "2", "-v"],
    "bench": ["bench", "{model}", "--prompts", "{prompts}", "--limit", "1", "-n", "2"],
    "no file": ["generate", "{model}", "-f", "/nowhere" + EVIL],
    "no model": ["plan", "/nowhere" + EVIL],
    "no verb": [EVIL],
    "no option": ["plan", "--x" + EVIL],
    "no number": ["generate", "{model}", "-n", EVIL],
    "no profile": ["plan", "{model}", "--profile", EVIL],
    "no drafter": ["plan", "{model}", "--draft", EVIL],
    "no plan": ["plan", "{model}", "--plan", EVIL],
    "no heads": ["medusa", "info", EVIL],
    "no rows": ["compare", "--report-only", EVIL],
}


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("verb", VERBS)
def test_what_a_name_holds(verb, encoding, tiny_model, show, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / f"{EVIL}\nfake\u65e5")
    prompts = tmp_path / f"prompts{EVIL}\nfake"
    prompts.write_text("hello\n")
    words = [part.format(model=folder, prompts=prompts) for part in VERBS[verb]]
    code, shown = show(*words, encoding=encoding)
    assert code in ((0, 1) if "{model}" in VERBS[verb] and not verb.startswith("no ") else (2, 4))
    assert printable_lines(shown) == shown and "Traceback" not in shown
    assert "\nfake" not in shown


def test_whatever_a_library_writes(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with guarded_streams():
        logging.StreamHandler().handle(logging.makeLogRecord({"msg": EVIL}))
        sys.stderr.writelines([EVIL])
        try:
            raise ValueError(EVIL)
        except ValueError:
            traceback.print_exc()
    shown = screen.text()
    assert printable_lines(shown) == shown and shown.count("\\x1b[2J") == 3
    assert sys.stderr is screen


def test_a_progress_label_is_no_markup(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    with Console(Output(json=False, verbose=False, quiet=False)).progress("[bold]\x1b]0;x\x07"):
        pass
    assert "[bold]\\x1b]0;x\\x07" in screen.text()


@pytest.mark.parametrize("terminal", [True, False])
def test_an_answer_that_the_encoding_lacks(terminal, monkeypatch):
    screen = Screen("latin-1")
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    with guarded_streams():
        write_answer("é\u65e5\x1b")
    assert screen.text() == "é\\u65e5" + ("\\x1b" if terminal else "\x1b")


def test_no_message_floods_the_terminal():
    message = str(ConfigError(f"tensor {'x' * 10**6} is unknown: give another"))
    assert message.startswith("tensor xxx") and message.endswith("unknown: give another")
    assert len(message) < 2100
