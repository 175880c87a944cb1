"""`batch --ray`: answers of one process; lines of a killed worker are done by others."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = str(Path(sys.executable).with_name("offload-run"))
SMALL = ["--device", "cpu", "--device-memory", "256MiB", "--dtype", "float32", "--draft", "none"]
LIMIT_S = 240


@pytest.fixture
def source(tmp_path):
    lines = [{"prompt": f"the quick fox {n}", "temperature": 0.7 * (n % 2)} for n in range(16)]
    (path := tmp_path / "in.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return path


def words(model, source, output, *more):
    return ["batch", model, "--input", source, "--output", output, "-n", "12", *SMALL, *more]


def workers(parent):
    """Processes of Ray's actors that this one started, however deep."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            said = (folder / "cmdline").read_bytes()
            if said.startswith(b"ray::MapWorker") and parent in _above(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def _above(process):
    seen = []
    while process > 1:
        process = int(
            (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[1]
        )
        seen.append(process)
    return seen


def test_what_does_not_go_together_is_refused(tiny_model, source, tmp_path, offload_run):
    more = ["--ray-workers", "2"]
    said = offload_run(*words(tiny_model, source, tmp_path / "out", *more)).err
    assert "--ray-workers has no effect without --ray" in said
    more = ["--ray", "local", "--nodes", source]
    said = offload_run(*words(tiny_model, source, tmp_path / "out", *more)).err
    assert "--ray has the whole model on each machine" in said
    if importlib.util.find_spec("ray") is None:
        done = offload_run(*words(tiny_model, source, tmp_path / "out", "--ray", "local"))
        assert (done.code, "pip install offload-rt[ray]" in done.err) == (2, True)


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_answer_as_one_process(
    tiny_model, source, tmp_path, offload_run
):
    pytest.importorskip("ray")
    alone, spread = tmp_path / "alone.jsonl", tmp_path / "spread.jsonl"
    assert offload_run(*words(tiny_model, source, alone)).code == 0
    more = ["--ray", "local", "--ray-workers", "2", "--sequences", "2"]
    process = subprocess.Popen(
        [PROGRAM, *map(str, words(tiny_model, source, spread, *more))], stderr=subprocess.PIPE
    )
    part, until = spread.with_name("spread.jsonl.part"), time.monotonic() + LIMIT_S
    while time.monotonic() < until and process.poll() is None:
        if len(found := workers(process.pid)) == 2:
            os.kill(found[0], signal.SIGKILL)
            break
        time.sleep(0.05)
    else:
        raise AssertionError(f"no two workers: {part.exists()}, {process.communicate()}")
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err.decode()[-2000:]
    assert spread.read_bytes() == alone.read_bytes()
