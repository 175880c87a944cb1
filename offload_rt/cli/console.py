"""Standard output for the answer, standard error for the rest."""

import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO, cast

import click

from offload_rt.cli.columns import columns, hanging
from offload_rt.cli.options import Output
from offload_rt.device.system import settle_math
from offload_rt.printable import encodable, printable, printable_lines, printable_prose
from offload_rt.session.observer import Gauge

_POLL_S = 0.1

_QUIET_LIBRARIES = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


def quiet_libraries(output: Output) -> None:
    """Keep libraries off the network and off our stderr; call it before they are imported."""
    os.environ.update(_QUIET_LIBRARIES)
    settle_math()
    warnings.simplefilter("default" if output.verbose else "ignore")
    root, ours = logging.getLogger(), logging.getLogger("offload_rt")
    for handler in [h for h in ours.handlers if isinstance(h, _Notes)]:
        ours.removeHandler(handler)  # of an earlier command line in this process
    if output.verbose:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        ours.setLevel(logging.DEBUG)
        return
    if not root.handlers:
        root.addHandler(logging.NullHandler())  # without one Python prints warnings itself
    if not output.quiet:
        ours.addHandler(_Notes(Console(output)))


class _Guarded:
    """A standard stream that shows whatever is written to it: nothing steers the terminal.

    Tables, notes, errors, log records, tracebacks and what libraries print all pass here. JSON
    passes as it is, for it is ASCII without controls. What the stream's encoding lacks is escaped.
    """

    def __init__(self, stream: TextIO) -> None:
        self.unguarded = stream

    @property
    def encoding(self) -> str:
        """Never ASCII, for click goes around a stream of that and writes UTF-8 beside it."""
        real = _encoding(self.unguarded)
        return "utf-8" if encodable("\u00b1", real) != "\u00b1" else real

    def write(self, text: str) -> int:
        _put(self.unguarded, printable_lines(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the stream has
        return getattr(self.unguarded, name)


@contextmanager
def guarded_streams() -> Iterator[None]:
    """Let everything the body writes to stdout and stderr be safe to show."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(TextIO, _Guarded(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unguarded(stream: TextIO) -> TextIO:
    """The stream itself, for who moves the cursor and makes safe what it shows between."""
    return stream.unguarded if isinstance(stream, _Guarded) else stream


def _encoding(stream: TextIO) -> str:
    return stream.encoding or "utf-8"  # None where a test or a notebook reads along


def _put(stream: TextIO, text: str) -> None:
    """Write all of a text, what the encoding lacks escaped."""
    encoding = _encoding(stream)
    if not isinstance(raw := getattr(stream, "buffer", None), io.RawIOBase):
        stream.write(encodable(text, encoding))
        return
    # PYTHONUNBUFFERED: Python would write once, and lose what a full disk did not take.
    data = memoryview(text.encode(encoding, "backslashreplace"))
    while data:
        data = data[raw.write(data) or 0 :]


def write_answer(text: str) -> None:
    """Write a piece of the answer to stdout at once; exactly, unless it is a terminal."""
    if sys.stdout.isatty():
        text = printable_prose(text)
    stdout = unguarded(sys.stdout)
    _put(stdout, text)
    stdout.flush()


@dataclass(frozen=True, slots=True)
class Console:
    """Messages on stderr."""

    output: Output

    def note(self, sentence: str) -> None:
        """One line about something the user should know."""
        if not self.output.quiet:
            click.echo(f"offload-run: {printable(sentence)}", err=True)

    def block(self, text: str, indent: int = 0) -> None:
        """Lines that need no prefix; a terminal's are broken, and go on below column `indent`."""
        if self.output.quiet:
            return
        if sys.stderr.isatty():
            width = columns(2)
            text = "\n".join(hanging(line, indent, width) for line in text.splitlines())
        click.echo(text, err=True)

    @contextmanager
    def waiting(self, label: str, *, stays: bool = True) -> Iterator[None]:
        """Say at once what a terminal waits for, before what a bar needs is imported.

        The line is gone afterwards; where nothing is drawn it is a note that `stays`, or nothing.
        """
        if self.output.quiet or not sys.stderr.isatty():
            yield
            return
        if not draws(True):
            if stays:
                self.note(label)
            yield
            return
        stderr = unguarded(sys.stderr)
        stderr.write(f"\r{encodable(printable(label)[: columns(2) - 5], _encoding(stderr))} ...")
        stderr.flush()
        try:
            yield
        finally:
            stderr.write("\r\x1b[K")
            stderr.flush()

    @contextmanager
    def progress(self, label: str) -> Iterator[Gauge]:
        """Show a bar while the body runs; on a terminal only, and gone afterwards."""
        gauge = Gauge()
        if self.output.quiet or not draws(sys.stderr.isatty()):
            yield gauge
            return
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=RichConsole(file=unguarded(sys.stderr)),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        label = printable(label)
        task, ended = bar.add_task(label, total=None), threading.Event()

        def follow() -> None:
            while not ended.wait(_POLL_S):
                if gauge.total:
                    detail = printable(gauge.detail())
                    shown = f"{label}: {detail}" if detail else label
                    done = min(gauge.done(), gauge.total)
                    bar.update(task, completed=done, total=gauge.total, description=shown)

        thread = threading.Thread(target=follow, name="progress", daemon=True)
        with bar:
            thread.start()
            try:
                yield gauge
            finally:
                ended.set()
                thread.join()


class _Notes(logging.Handler):
    """Shows each warning of our own code once, as a line like any other."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._console = console
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        sentence = " ".join(record.getMessage().split())
        if sentence not in self._seen:
            self._seen.add(sentence)
            self._console.note(sentence)


def draws(is_terminal: bool) -> bool:
    """Whether bars and colours are wanted: on a terminal that can, unless NO_COLOR says no."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return is_terminal and not plain
