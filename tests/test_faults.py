"""An error nobody foresaw is a sentence, and its traceback is where the sentence says."""

import errno
import os
import re
import stat
from pathlib import Path

import pytest
import torch

EVIL = "\x1b]0;x\x07\nsecond line \udcff"


class PanicException(BaseException):
    """What Rust code raises that gave up."""


@pytest.fixture
def break_with(monkeypatch):
    """Let `generate` raise something in the middle."""

    def set_error(error):
        def broken(*_):
            raise error

        monkeypatch.setattr("offload_rt.cli.generate.read_prompt", broken)

    return set_error


@pytest.mark.parametrize("kind", [ZeroDivisionError, ImportError, PanicException, KeyError])
def test_a_sentence_says_where_the_traceback_is(kind, break_with, tiny_model, offload_run):
    break_with(kind(EVIL))
    done = offload_run("generate", tiny_model, "-p", "secret")
    assert (done.code, done.out) == (1, "")
    found = re.fullmatch(
        r"offload-run: error: unexpected (\w+) in cli/generate.py:\d+: (.*): "
        r"its traceback is in (.*traceback\.txt)\n",
        done.err,
    )
    assert found and found[1] == kind.__name__ and "x1b]0;x" in found[2]
    kept = Path(found[3]).read_text("utf-8")
    assert f"{kind.__name__}: " in kept and "-p secret" in kept and "\nTraceback" in kept
    assert stat.S_IMODE(os.stat(found[3]).st_mode) == 0o600


@pytest.mark.parametrize("how", ["-v", "variable"])
def test_the_traceback_is_shown_where_it_is_asked_for(
    how, break_with, tiny_model, offload_run, monkeypatch
):
    break_with(ZeroDivisionError(EVIL))
    more = [how] if how == "-v" else []
    if not more:
        monkeypatch.setenv("OFFLOAD_RT_DEBUG", "1")
    done = offload_run("generate", tiny_model, "-p", "x", *more)
    assert "Traceback (most recent call last)" in done.err and "\x1b" not in done.err
    assert done.err.splitlines()[-1].startswith("offload-run: error: unexpected ZeroDivisionError")


def test_a_traceback_that_cannot_be_kept_is_shown(
    break_with, tiny_model, offload_run, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    break_with(ZeroDivisionError())
    done = offload_run("generate", tiny_model, "-p", "x")
    assert done.code == 1 and "Traceback" in done.err
    assert "its traceback is above: cannot make the folder" in done.err


def test_a_long_message_is_cut(break_with, tiny_model, offload_run):
    break_with(ValueError("x" * 10**6))
    assert len(offload_run("generate", tiny_model, "-p", "x").err) < 1000


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_process_does(error, break_with, tiny_model, offload_run):
    break_with(error())
    with pytest.raises(error):
        offload_run("generate", tiny_model, "-p", "x")


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "cannot write the output: No space left on device"),
        (errno.EFBIG, "cannot write the output: the file system takes no file of that size"),
        (errno.ENOMEM, "out of memory: lower --device-memory"),
    ],
)
def test_what_the_system_is_short_of(number, says, break_with, tiny_model, offload_run):
    break_with(OSError(number, os.strerror(number)))
    done = offload_run("generate", tiny_model, "-p", "x")
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1


def test_the_card_that_is_short_of_memory_is_named(break_with, tiny_model, offload_run):
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 23.6 GiB"
    break_with(torch.OutOfMemoryError(said))
    done = offload_run("generate", tiny_model, "-p", "x")
    lower = "out of memory on cuda:1: lower --device-memory or --context, or free memory"
    assert (done.code, done.err) == (2, f"offload-run: error: {lower}\n")
