"""The program `offload-run`: one file per verb, and the only place that prints.

Exit codes: 0 done, 1 `doctor` found something broken or an error nobody foresaw, 2 usage or
configuration, 3 no plan fits, 4 model files, 130 interrupted, 143 terminated, 141 whoever read our
output is gone. Errors are one line on stderr, with `--json` too; of those nobody foresaw a file
keeps the traceback. Importing this package imports nothing heavy; verbs load torch when they need
it.
"""

import os
import signal
import sys
from collections.abc import Sequence


def main() -> int:
    """Run the command line of this process; returns the exit code."""
    _reopen_standard_streams()
    code = run(sys.argv[1:], alone=True)
    # What is left is the interpreter's end: a Ctrl-C there must not print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def _reopen_standard_streams() -> None:
    """Give closed standard streams to /dev/null, lest a model file gets their number."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))


def run(arguments: Sequence[str], *, alone: bool = False) -> int:
    """Run one command line; errors a user can meet become a line on stderr and an exit code.

    Args:
        arguments: of the command line.
        alone: nothing else runs in this process.
    """
    from offload_rt.cli.interrupts import Interrupted, Interrupts

    with Interrupts() as interrupts:
        try:
            from offload_rt.cli.app import run_verb
            from offload_rt.cli.console import guarded_streams
            from offload_rt.model.sparing import spare_compiler

            if alone:
                spare_compiler()
            with guarded_streams():
                return run_verb(arguments, interrupts)
        except Interrupted:
            sys.stderr.write("offload-run: interrupted\n")
            return interrupts.exit_code
        except BaseException as error:  # the one place that takes any: it ends the process
            from offload_rt.cli.console import guarded_streams
            from offload_rt.cli.faults import is_fault, report_fault

            if not is_fault(error):
                raise
            with guarded_streams():
                return report_fault(error, arguments)
