"""The program `offload-run`: one file per verb, and the only place that prints.

Exit codes: 0 done, 1 `doctor` found something broken, 2 usage or configuration, 3 no plan fits,
4 model files, 130 interrupted, 143 terminated, 141 whoever read our output is gone. Errors are one
line on stderr, with `--json` too. Importing this package imports nothing heavy; verbs load torch
when they need it.
"""

import signal
import sys
from collections.abc import Sequence


def main() -> int:
    """Run the command line of this process; returns the exit code."""
    code = run(sys.argv[1:])
    # What is left is the interpreter's end: a Ctrl-C there must not print a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def run(arguments: Sequence[str]) -> int:
    """Run one command line; errors a user can meet become a line on stderr and an exit code."""
    from offload_rt.cli.interrupts import Interrupted, Interrupts

    with Interrupts() as interrupts:
        try:
            from offload_rt.cli.app import run_verb

            return run_verb(arguments, interrupts)
        except Interrupted:
            sys.stderr.write("offload-run: interrupted\n")
            return interrupts.exit_code
