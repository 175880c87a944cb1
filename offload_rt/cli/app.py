"""The group of verbs, and what becomes of an error."""

import errno
import os
import sys
from collections.abc import Sequence

import click

from offload_rt.cli.bench import bench
from offload_rt.cli.chat import chat
from offload_rt.cli.compare import compare
from offload_rt.cli.doctor import doctor
from offload_rt.cli.generate import generate
from offload_rt.cli.interrupts import Interrupts
from offload_rt.cli.medusa import medusa
from offload_rt.cli.plan import plan
from offload_rt.cli.profile import profile
from offload_rt.cli.simulate import simulate_verb
from offload_rt.cli.train import train_medusa
from offload_rt.errors import OffloadError
from offload_rt.printable import printable

_PIPE_CLOSED = 141  # what a shell shows for a process that SIGPIPE ended
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_OUT_OF_MEMORY = "out of memory: lower --device-memory or --context, or free memory"


@click.group(
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    }
)
@click.version_option(
    package_name="offload-rt", prog_name="offload-run", message="%(prog)s %(version)s"
)
def cli() -> None:
    """Run language models that do not fit in device memory.

    Layers that do not fit are streamed through a ring of slots; the output is that of the whole
    model. MODEL is a folder with safetensors files, a hub id in the local Hugging Face cache, or
    `demo`. Nothing is ever downloaded.

    Exit codes: 0 done, 1 doctor found something broken, 2 usage or configuration, 3 no plan fits,
    4 model files, 130 interrupted.
    """


for _verb in (
    generate,
    chat,
    plan,
    simulate_verb,
    profile,
    bench,
    compare,
    medusa,
    train_medusa,
    doctor,
):
    cli.add_command(_verb)


def run_verb(arguments: Sequence[str], interrupts: Interrupts) -> int:
    """Run one command line; returns the exit code."""
    try:
        # Not cli.main(): it has its own idea of what becomes of a closed pipe.
        with cli.make_context("offload-run", list(arguments), obj=interrupts) as context:
            code: int = cli.invoke(context)
        sys.stdout.flush()
        return code
    except click.exceptions.Exit as leave:  # --help and --version
        sys.stdout.flush()
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except OffloadError as error:
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail(_OUT_OF_MEMORY, OffloadError.exit_code)
    except BrokenPipeError:
        _silence()
        return _PIPE_CLOSED
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        _silence()
        return _fail(f"cannot write the output: {error.strerror}", OffloadError.exit_code)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" and "allocate memory" not in str(error):
            raise
        return _fail(_OUT_OF_MEMORY, OffloadError.exit_code)


def _fail(sentence: str, code: int) -> int:
    click.echo(f"offload-run: error: {printable(sentence)}", err=True)
    return code


def _silence() -> None:
    """Send what is still buffered nowhere, so that the interpreter's end does not complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
