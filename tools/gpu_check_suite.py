"""A plugin of pytest for the part `suite` of `gpu_check.py`: each result is told as it comes.

So a run that is ended keeps its facts, and a test that hangs in Python is ended by itself.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from gpu_check import tell

PART = "suite"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where facts go, and how long a test may be."""
    parser.addoption("--facts", type=Path, required=True)
    parser.addoption("--test-seconds", type=float, default=20.0)


def pytest_configure(config: pytest.Config) -> None:
    """Tell what follows."""
    config.pluginmanager.register(Telling(config.option.facts, config.option.test_seconds))


class Telling:
    """Hooks of one run.

    Args:
        out: the file of facts.
        seconds: of a test's fixtures, and of the test, each.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        self._out, self._seconds = out, seconds

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read is a law that did not hold."""
        if report.failed:
            tell(self._out, PART, report.nodeid, held=False, why=report.longreprtext[-500:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test that ran, or whose fixtures failed."""
        if report.failed or (report.passed and report.when == "call"):
            why = report.longreprtext[-500:]
            held = report.passed
            tell(self._out, PART, report.nodeid, held=held, why=why, seconds=report.duration)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_setup(self) -> Iterator[None]:
        """Fixtures are made in this time."""
        with self._in_time():
            yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """A test ends in this time."""
        with self._in_time():
            yield

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        def late(*_: object) -> None:
            raise TimeoutError(f"not done after {self._seconds:g} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, self._seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
