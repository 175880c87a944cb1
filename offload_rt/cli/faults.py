"""What becomes of an error nobody foresaw: one sentence, and a file with its traceback."""

import errno
import os
import platform
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from offload_rt.errors import ConfigError
from offload_rt.printable import encodable, printable
from offload_rt.writing import make_folder, size_limit, write_text

DEBUG = "OFFLOAD_RT_DEBUG"
EXIT_CODE = 1
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_OUT_OF_MEMORY = "out of memory{}: lower --device-memory or --context, or free memory"
_CARD = re.compile(r"\bGPU (\d+)\b")  # as torch's own sentence names it
_NAME = "traceback.txt"
_PACKAGE = Path(__file__).parents[1]
_SHOWN_CHARACTERS = 300


def of_system(error: BaseException) -> str:
    """What the system is short of; empty where it is not that."""
    lacks_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if lacks_memory or (
        isinstance(error, RuntimeError | OSError) and "allocate memory" in str(error)
    ):
        card = _CARD.search(str(error))
        return _OUT_OF_MEMORY.format(f" on cuda:{card[1]}" if card else "")
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EFBIG:
        return f"cannot write the output: {size_limit()}"
    return f"cannot write the output: {os.strerror(number)}" if number in _DISK_FULL else ""


def is_fault(error: BaseException) -> bool:
    """Whether it is an error of ours or a library's; Rust's panics are no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def report_fault(error: BaseException, arguments: Sequence[str]) -> int:
    """Say what happened and where its traceback is; returns the exit code.

    With --verbose or OFFLOAD_RT_DEBUG, or where no file can be written, the traceback is shown.
    """
    trace = "".join(traceback.format_exception(error))
    shows = bool(os.environ.get(DEBUG)) or not {"-v", "--verbose"}.isdisjoint(arguments)
    with told():
        try:
            where = f"its traceback is in {_keep(trace, arguments)}"
        except ConfigError as failed:
            shows, where = True, f"its traceback is above: {failed}"
        if shows:
            sys.stderr.write(trace)
        sys.stderr.write(f"offload-run: error: {_sentence(error)}: {where}\n")
    return EXIT_CODE


@contextmanager
def told() -> Iterator[None]:
    """Let the body write to stderr; where that is closed or full the exit code has to do."""
    try:
        yield
        sys.stderr.flush()
    except OSError:
        silence()


def silence() -> None:
    """Send what is still buffered nowhere, so that the interpreter's end does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _sentence(error: BaseException) -> str:
    said = " ".join(str(error).split())
    if len(said) > _SHOWN_CHARACTERS:
        said = f"{said[:_SHOWN_CHARACTERS]}..."
    return printable(f"unexpected {type(error).__name__}{_place(error)}: {said or 'nothing said'}")


def _place(error: BaseException) -> str:
    """The last line of ours that it came by."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents]
    if not ours:
        return ""
    return f" in {Path(ours[-1].filename).relative_to(_PACKAGE)}:{ours[-1].lineno}"


def _keep(trace: str, arguments: Sequence[str]) -> Path:
    """Write a traceback, its owner's alone as prompts may be in it; returns the file.

    Raises:
        ConfigError: it cannot be written.
    """
    from importlib.metadata import version  # 13 ms, of 103 that every verb would wait for

    import platformdirs

    path = make_folder(platformdirs.user_state_path("offload-rt")) / _NAME
    head = f"offload-run {version('offload-rt')}, Python {platform.python_version()}\n"
    command = printable(shlex.join(["offload-run", *arguments]))
    write_text(path, encodable(f"{head}{command}\n\n{trace}", "utf-8"), private=True)
    return path
