"""`batch --ray`: answers of one process; lines of a killed worker are done by others."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from offload_rt.cli import batch as command
from offload_rt.config import RuntimeConfig
from offload_rt.device import opening, system
from offload_rt.device.kinds import FREE_SHARE
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.identity import digest_of
from offload_rt.serve.batch import Batch, Journal
from offload_rt.serve.spread import Job, Share, Worker, share_of, shared_out
from offload_rt.session.options import settings_from

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


def machine(alive=True, **resources):
    return {"Alive": alive, "Resources": {"CPU": 2.0, **resources}}


@pytest.mark.parametrize(
    ("device", "machines", "workers", "expected"),
    [
        ("cpu", [machine(), machine(), machine(alive=False)], None, (2, 0, 1)),
        ("cpu", [machine(GPU=2.0), machine()], 3, (3, 0, 2)),
        ("auto", [machine(), machine()], None, (2, 0, 1)),
        ("auto", [machine(GPU=2.0), machine()], None, (1, 1, 1)),
        ("auto", [machine(GPU=2.0), machine(GPU=1.0)], 3, (3, 1, 2)),
        ("cuda", [machine(GPU=4.0)], None, (1, 1, 1)),
        ("cuda:3", [machine(GPU=4.0)], 4, (4, 1, 4)),
        ("cuda:0,cuda:1", [machine(GPU=5.0), machine(GPU=1.0)], 2, (2, 2, 2)),
        ("cuda", [machine()], None, "1 of them do not fit, .* room for 0"),
        ("auto", [machine(GPU=2.0)], 3, "3 of them do not fit, .* room for 2"),
    ],
)
def test_workers_have_gpus_to_themselves_where_the_cluster_has_them(
    device, machines, workers, expected
):
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            share_of(device, machines, workers)
    else:
        share = share_of(device, machines, workers)
        assert (share.workers, share.gpus, share.together) == expected


def test_workers_on_one_machine_share_its_memory_and_threads(monkeypatch):
    monkeypatch.setattr(system, "free_memory_bytes", lambda: 1000)
    monkeypatch.setattr(system, "machine_threads", lambda: 9)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray does
    two, alone = Share(workers=2, gpus=0, together=2), Share(workers=1, gpus=0, together=1)
    made = shared_out(RuntimeConfig(device="cpu"), two)
    assert (made.threads, made.device_limit_bytes) == (4, 500 * FREE_SHARE)
    made = shared_out(RuntimeConfig(device="cpu"), alone)
    assert (made.threads, made.device_limit_bytes) == (9, None)
    said = RuntimeConfig(device="cpu", threads=3, device_limit_bytes=7)
    assert shared_out(said, two) == said
    made = shared_out(RuntimeConfig(device="cuda:3"), replace(two, gpus=1))
    assert (made.device, made.device_limit_bytes) == ("cuda:0", None)
    assert made.host_limit_bytes == 500 * FREE_SHARE


def test_what_a_worker_cannot_be_made_for_is_told_with_its_first_lines(tiny_model):
    settings = settings_from({"device": "cpu", "device_memory": "1MiB", "draft": "none"})
    ours = digest_of(open_checkpoint(tiny_model))
    for weights, kind, why in (
        (ours, "PlanError", "the limit is 1.00 MiB"),
        ("x", "ConfigError", "weights"),
    ):
        job = Job(
            model=str(tiny_model),
            weights=weights,
            settings=settings,
            needs=[(5, 5)],
            sequences=None,
        )
        worker = Worker(job, Share(workers=1, gpus=0, together=1))
        (result,) = worker({"line": [1], "text": ["the fox"]})["result"]
        told = json.loads(result)
        assert told["kind"] == kind and why in told["why"], told
        assert told["why"].startswith(f"on {socket.gethostname()}: ")


def test_progress_of_workers_has_tokens_and_time_left(tmp_path, monkeypatch):
    said = []
    gauge = SimpleNamespace(detail=lambda: "")
    console = SimpleNamespace(progress=lambda _: nullcontext(gauge))
    work = Batch(None, None, list(range(4)), Journal(tmp_path / "part", {}))

    def parts():
        for number in range(1, 4):
            body = {"usage": {"completion_tokens": 10}}
            yield number, {"response": {"body": body}}, True, "cpu"
            said.append(gauge.detail())

    times = iter(range(0, 60, 5))
    monkeypatch.setattr(command.time, "perf_counter", lambda: next(times))
    assert not command._gather(parts(), work, settings_from({}), console)
    assert said[0] == "1 of 4, 2.0 tokens/s, 15 s left"
    assert said[2] == "3 of 4, 2.0 tokens/s, 5 s left"


def test_workers_whose_passes_differ_are_no_change_of_the_command(tmp_path):
    result = {"response": {"body": {"usage": {"completion_tokens": 10}}}}
    work = Batch(None, None, list(range(4)), Journal(tmp_path / "part", {}))
    console = SimpleNamespace(progress=lambda _: nullcontext(SimpleNamespace()))

    def gather(*made):
        parts = iter([(number, result, *how) for number, how in enumerate(made, 1)])
        command._gather(parts, work, settings_from({}), console)

    cpu = True, "cpu"
    with pytest.raises(ConfigError, match="workers differ: .* give --exact on to go on"):
        gather(cpu, cpu, (False, "cpu"))
    assert work.journal.results.keys() == {1, 2}
    with pytest.raises(ConfigError, match="some compute on cpu, others on cuda: give --device"):
        gather(cpu, (True, "cuda"))
    with pytest.raises(ConfigError, match="was begun with another kind of --device"):
        gather((True, "cuda"))  # whatever the machine has where the command is given


def test_a_worker_tells_the_kind_of_its_device(tiny_model):
    settings = settings_from({"device": "auto", "device_memory": "256MiB", "draft": "none"})
    job = Job(
        model=str(tiny_model),
        weights=digest_of(open_checkpoint(tiny_model)),
        settings=settings,
        needs=[(5, 5)],
        sequences=1,
    )
    worker = Worker(job, Share(workers=1, gpus=0, together=1))
    made = worker({"line": [1], "text": ["the fox"]})
    assert made["kind"] == [opening.chosen_kind(settings.runtime).processor]
    worker._open.close()


@pytest.mark.slow
def test_a_plan_that_does_not_fit_is_one_sentence(tiny_model, source, tmp_path, offload_run):
    pytest.importorskip("ray")
    more = ["--ray", "local", "--device-memory", "1MiB"]
    done = offload_run(*words(tiny_model, source, tmp_path / "out.jsonl", *more))
    assert done.code == 3 and f"error: on {socket.gethostname()}: " in done.err, done.err
    assert "Traceback" not in done.err and "ray." not in done.err


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
