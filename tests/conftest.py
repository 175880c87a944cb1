"""Tiny random checkpoints, written once per test session; nothing is downloaded."""

import gc
import io
import json
import logging
import os
import sys
from itertools import count
from types import SimpleNamespace

import pytest
from tiny import DEEP, write_model, write_tokenizer
from tool_runs import TOOLS

from offload_rt.device.compiled import kept_in
from offload_rt.device.system import settle_math

# Kernels as without matrix registers, on any processor: with them oneDNN adds up in another order,
# and kernels of our own have not its bits. It reads this when it computes first.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
settle_math()  # as the command line does: workers keep few kernels
kept_in()  # it is asked once, and not by a test that has a folder of caches of its own
gc.disable()  # until all is imported: it lives on, and is looked through for nothing


def pytest_collection_finish():
    """Collect from now on what the tests make, and let what is logged reach the root.

    pytest puts two handlers on each logger that does not propagate, and takes them off, three
    times a test: 60 of torch's are 0.66 of the 0.93 ms of processor time that it takes.
    """
    gc.freeze()
    gc.enable()
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "torch" and isinstance(logger, logging.Logger):
            logger.propagate = True


_numbers = count()


@pytest.fixture(autouse=True)
def own_data_folder(request, tmp_path_factory, monkeypatch):
    """Keep profiles, what drafting gave, defaults and what is typed away from the user's own.

    A test without `tmp_path` has a folder that nobody has made: to make one costs a look at all.
    """
    if "tmp_path" in request.fixturenames:
        folder = request.getfixturevalue("tmp_path")
    else:
        folder = tmp_path_factory.getbasetemp() / "own" / str(next(_numbers))
    for kind in ("DATA", "CONFIG", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(folder / kind.lower()))


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory):
    """Write a tiny random model of any family; the same arguments give the same folder."""
    made = {}

    def make(model_type="llama", *, tokenizer=False, **config):
        key = json.dumps([model_type, tokenizer, config], sort_keys=True)
        if key not in made:
            folder = tmp_path_factory.mktemp(model_type)
            write_model(folder, model_type, **config)
            made[key] = write_tokenizer(folder) if tokenizer else folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny):
    """A Llama of 2 layers in fp32 with a byte-level tokenizer; tests must not change it."""
    return make_tiny("llama", tokenizer=True)


@pytest.fixture(scope="session")
def deep_model(make_tiny):
    """The same of 4 layers, for what is about layers and slots and not about answers."""
    return make_tiny("llama", tokenizer=True, **DEEP)


def pytest_addoption(parser):
    parser.addoption(
        "--recorded",
        action="store_true",
        help="passes that draft are recorded and replayed in all tests (tests/recorded.py)",
    )


@pytest.fixture
def recording(monkeypatch):
    """Passes that draft are recorded and replayed; counts of both."""
    from recorded import record_everything

    return record_everything(monkeypatch)


@pytest.fixture(autouse=True)
def recording_if_asked(request):
    """The same in every test of a run with --recorded, but for those of passes that are not."""
    if request.config.getoption("--recorded") and not request.node.get_closest_marker("eager"):
        request.getfixturevalue("recording")


@pytest.fixture
def offload_run(capsys, monkeypatch):
    """Run a command line with bytes on stdin; returns exit code, stdout and stderr."""

    from offload_rt.cli import run

    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        capsys.readouterr()  # what the test itself, opening a model, has had said
        code = run([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def run_tool(capsys, monkeypatch):
    """Run a program of `tools/` (`tool_runs.loaded`) with arguments; returns its output."""

    def run(tool, *arguments):
        monkeypatch.setattr(sys, "argv", [tool.__file__, *map(str, arguments)])
        capsys.readouterr()
        tool.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def convert_medusa(capsys, monkeypatch):
    """Run `tools/convert_medusa.py` with arguments; returns its exit code and what it printed."""
    monkeypatch.syspath_prepend(TOOLS)
    import convert_medusa

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [convert_medusa.__file__, *map(str, arguments)])
        capsys.readouterr()
        try:
            code = convert_medusa.main()
        except SystemExit as stopped:  # argparse
            code = stopped.code
        return SimpleNamespace(code=code, **capsys.readouterr()._asdict())

    return run


@pytest.fixture
def prompt_file(tmp_path):
    """A file with four prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"the {word} fox\n" for word in ["quick", "brown", "lazy", "dog"]))
    return path


@pytest.fixture(autouse=True, scope="module")
def _what_lives_on_is_frozen():
    """Each engine of the tests is preceded by a collection, of what the file's tests made only.

    Imports and caches of earlier files are a million objects and more, half a second a time; what
    lives on here is theirs, for the fixtures of the file before are gone.
    """
    gc.collect()
    gc.freeze()
