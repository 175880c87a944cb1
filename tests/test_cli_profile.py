"""`profile`: what it prints and writes, what it refuses, and that an end never harms a file."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from expert_models import make_mixture
from forks import Forked
from test_measure import QUICK

from offload_rt.cli import profile as verb
from offload_rt.cli.checks import diagnose
from offload_rt.cli.machine import inspect_machine
from offload_rt.cli.options import Output
from offload_rt.cli.profile_table import profile_table
from offload_rt.device.system import file_system
from offload_rt.profiling import decoding, neighbours
from offload_rt.profiling.codec import decode
from offload_rt.profiling.store import BUSY, load_profile, machine_name, save_profile
from offload_rt.profiling.timing import REPAIRED

LIMIT_S = 60


@pytest.fixture
def quick(tmp_path, monkeypatch):
    """A small measurement on a quiet machine, and a user's folder of its own."""
    monkeypatch.setattr(neighbours, "_waited_s", lambda: 0.0)
    monkeypatch.setattr(neighbours, "_stolen_s", lambda: 0.0)
    monkeypatch.setattr(verb.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(verb, "EFFORT", QUICK)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data" / "offload-rt" / "profiles"


def test_a_measurement_is_written_and_printed(quick, offload_run):
    done = offload_run("profile", "--device", "cpu")
    path = quick / f"{machine_name()}.json"
    assert done.code == 0, done.err
    assert done.err == f"offload-run: written to {path}\n"
    made = load_profile(path)
    assert made.name == machine_name() and made.layers and os.listdir(quick) == [path.name]
    for text in (made.machine.cpu, "host memory, GB/s", "layers, ms", "measured", "attention"):
        assert text in done.out
    shown = offload_run("profile", "--show")
    assert (shown.code, shown.out, shown.err) == (0, done.out, "")


@pytest.mark.parametrize("idle", [True, False])
def test_threads_wait_as_in_runs_where_nothing_else_computes(idle, monkeypatch):
    """Else they sleep at once, and the quickest run counts."""
    slept, efforts = [], []
    monkeypatch.setattr(neighbours, "is_idle", lambda: idle)
    monkeypatch.setattr(verb, "wait_asleep", lambda: slept.append(True))
    took = lambda name, *, effort, **_: efforts.append(effort)  # noqa: E731
    monkeypatch.setattr("offload_rt.profiling.measure.measure", took)
    verb._measure("here", "cpu", None, Output())
    assert (bool(slept), efforts[0].idle) == (not idle, idle)


@pytest.mark.parametrize("percent", [0.0, 9.0, 50.0])
def test_a_machine_is_idle_where_little_of_it_computes(percent, monkeypatch):
    monkeypatch.setattr(neighbours.psutil, "cpu_percent", lambda interval: percent)
    assert neighbours.is_idle() == (percent < 10.0)


def test_a_busy_machine_is_said_on_stderr_and_kept(quick, offload_run, monkeypatch):
    waited = count(step=10**6)
    monkeypatch.setattr(neighbours, "_waited_s", lambda: next(waited))
    monkeypatch.setattr(verb.os, "getloadavg", lambda: (99.0, 0.0, 0.0))
    done = offload_run("profile", "--device", "cpu")
    before, after, written = done.err.splitlines()
    assert before.startswith(f"offload-run: {BUSY} (load average 99.0") and "longer" in before
    assert after.startswith(f"offload-run: {BUSY} (threads waited for a core")
    assert written.startswith("offload-run: written to ")
    assert f"note: {BUSY}" in offload_run("profile", "--show").out
    (finding,) = [f for f in diagnose(inspect_machine(None)) if f.what == "profile"]
    assert finding.detail.startswith(BUSY) and "offload-run profile" in finding.fix


def test_a_profile_made_too_early_for_a_model_is_said(quick, offload_run, make_tiny, monkeypatch):
    """By `plan` and `doctor`, of mixtures; its few rows of an expert were timed without kernels."""
    monkeypatch.setattr(decoding, "kernels_multiply_plain", lambda: True)
    assert offload_run("profile", "--device", "cpu").code == 0
    path = quick / f"{machine_name()}.json"
    made, says = load_profile(path), "older than the kernels that multiply few rows of an expert"
    mixture, dense = make_mixture(make_tiny, dtype="bfloat16"), make_tiny("llama")
    wide = make_mixture(make_tiny, dtype="float32")

    def said(model, few_rows):
        experts = tuple(replace(c, few_rows=None if c.exact else few_rows) for c in made.experts)
        save_profile(replace(made, experts=experts), path)
        (finding,) = [f for f in diagnose(inspect_machine(model)) if f.what == "profile"]
        asked = ("plan", model, "--context", 64, "--draft", "none", "--exact", "off")
        lines = " ".join(offload_run(*asked).out.split())
        assert ("run `offload-run profile` again" in lines) is (says in lines)
        old = json.loads(offload_run(*asked, "--json").out)["predicted"]["old_profile"]
        return says in finding.detail, says in lines, old

    assert said(mixture, None) == (True, True, True)
    assert said(mixture, 32) == said(mixture, 0) == (False, False, False)
    assert said(dense, None) == said(wide, None) == (False, False, False)


def test_a_profile_that_timed_layers_as_torch_multiplies_is_said(
    quick, offload_run, make_tiny, monkeypatch
):
    """By `plan` and `doctor`, where row-invariant passes multiply in matrix registers now."""
    assert offload_run("profile", "--device", "cpu").code == 0
    path, model = quick / f"{machine_name()}.json", make_tiny("llama", dtype="bfloat16")
    machine = replace(load_profile(path).machine, kernels=True, matrix_registers=True)
    made = replace(load_profile(path), machine=machine)
    monkeypatch.setattr(decoding, "kernels_multiply_plain", lambda: True)
    monkeypatch.setattr(decoding, "takes_matrix_registers", lambda _: True)
    for marked in (False, True):
        save_profile(replace(made, layers_exact=marked), path)
        (finding,) = [f for f in diagnose(inspect_machine(None)) if f.what == "profile"]
        lines = offload_run("plan", model, "--context", 64, "--exact", "on").out
        for text in (finding.detail, " ".join(lines.split())):
            assert ("older than the kernels that multiply in matrix" in text) is not marked


def test_a_repaired_number_is_named(offload_run, tmp_path):
    made = load_profile(Path(__file__).parent.parent / "profiles" / "cpu-2core-avx512.json")
    curve, path = made.layers[0], tmp_path / "mine.json"
    said = []
    for source in ("", REPAIRED):
        first = replace(curve.times[0], layer_s=replace(curve.times[0].layer_s, source=source))
        times = (
            first,
            *(replace(t, layer_s=replace(t.layer_s, source="")) for t in curve.times[1:]),
        )
        save_profile(replace(made, layers=(replace(curve, times=times),), heads=()), path)
        said.append(offload_run("profile", "--show", path).out.count(", 1 repaired)"))
    assert said == [0, 1]


def test_json_is_the_file(quick, offload_run, tmp_path):
    path = tmp_path / "new" / "mine.json"
    done = offload_run("profile", "--device", "cpu", "--output", path, "--json", "-q")
    assert (done.code, done.err) == (0, "")
    assert done.out == path.read_text() and decode(done.out).name == "mine"
    assert not quick.exists()
    assert offload_run("profile", "--show", path, "--json").out == done.out


def test_show_says_what_has_changed(quick, offload_run):
    offload_run("profile", "--device", "cpu")
    path = quick / f"{machine_name()}.json"
    made = load_profile(path)
    save_profile(replace(made, versions=replace(made.versions, torch="1.0")), path)
    done = offload_run("profile", "--show")
    assert done.code == 0
    expected = f"offload-run: torch was 1.0 in profile {made.name}, is {made.versions.torch} here"
    assert done.err == f"{expected}: measure again with `offload-run profile`\n"
    assert offload_run("profile", "--show", machine_name()).err == ""


@pytest.mark.parametrize("name", ["rtx4090-pcie4x16", "2x-rtx4090-pcie4x8", "a100-80gb-pcie4x16"])
def test_show_a_shipped_profile(name, quick, offload_run):
    done = offload_run("profile", "--show", name)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{name}, ") and "(assumed" in done.out
    assert all(len(line) < 200 for line in done.out.splitlines())
    assert ("GPU 1 h2d pinned, together" in done.out) is name.startswith("2x")


def test_a_table_row():
    path = Path(__file__).parent.parent / "profiles" / "rtx4090-pcie4x16.json"
    table = profile_table(load_profile(path))
    disk = table.splitlines()[table.splitlines().index("disk, GB/s by reads in flight") + 1]
    assert disk.split() == ["ext4,", "direct", "1:", "2.8", "4:", "5.04", "32:", "5.6", "(assumed)"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--show", "absent"], "no profile 'absent' (there are: 2x-rtx4090-pcie4x16"),
        (["--show", "/no/such.json"], "/no/such.json cannot be read (No such file"),
        (["--show"], "no profile"),
        (["--show", "x", "--device", "cpu"], "--device has no effect with --show"),
        (["--show", "x", "--folder", "/tmp"], "--folder has no effect with --show"),
        (["--show", "x", "--output", "y.json"], "--output has no effect with --show"),
        (["--output", "x"], "--output 'x' must be a file name that ends in .json"),
        (["--output", "/dev/null/x.json"], "cannot write /dev/null/x.json: /dev/null is no folder"),
        (["--output", "folder.json"], "cannot write folder.json: it is a folder"),
        (["--folder", "/no/such"], "/no/such is no folder"),
        (["-q", "-v"], "contradict"),
    ],
)
def test_refusals_are_a_sentence(arguments, says, quick, offload_run, tmp_path):
    (tmp_path / "folder.json").mkdir()
    done = offload_run("profile", *arguments)
    assert (done.code, done.out) == (2, "")
    assert says in done.err and len(done.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--output", "x"], ["--output", "/dev/null/x.json"]])
def test_a_bad_place_is_refused_before_anything_is_measured(
    arguments, quick, offload_run, monkeypatch
):
    monkeypatch.setattr("offload_rt.profiling.measure.measure", None)  # calling it would fail
    assert offload_run("profile", *arguments).code == 2


def test_a_damaged_profile_is_a_sentence_with_the_way_out(quick, offload_run):
    quick.mkdir(parents=True)
    path = quick / f"{machine_name()}.json"
    path.write_text('{"schema_version": 9}')
    done = offload_run("profile", "--show")
    assert done.code == 2
    assert done.err == (
        f"offload-run: error: {path} is not a usable profile: schema_version is 9, this program "
        f"reads 1; make a new one with `offload-run profile --output {path}`\n"
    )
    assert offload_run("profile", "--device", "cpu").code == 0  # and that works


ENDLESS = """
import sys
from dataclasses import replace
sys.path.insert(0, sys.argv[1])
from test_measure import QUICK
from offload_rt.cli import profile, run
profile.EFFORT = replace(QUICK, most_samples=10**7, number_s=600.0)
sys.exit(run(["profile", "--device", "cpu", "-v", "--output", sys.argv[2]]))
"""
SAVING = """
import os, signal, sys
from pathlib import Path
from offload_rt.profiling import store
made = store.load_profile(store.find_profile("rtx4090-pcie4x16"))
if sys.argv[1]:
    setattr(store.os, sys.argv[1], lambda *_: os.kill(os.getpid(), signal.SIGKILL))
store.save_profile(made, Path(sys.argv[2]))
"""


def python(program, *arguments, folder):
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"TMPDIR": str(folder)}
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    return Forked(command, **pipes, env=environment)


def measuring(path):
    """A process that measures for minutes, and has begun to."""
    process = python(ENDLESS, Path(__file__).parent, path, folder=path.parent)
    seen = b""
    while b"measuring disk" not in seen:
        seen += (new := process.stderr.read1())
        assert new, seen
    return process


@pytest.fixture
def old(tmp_path):
    """A file that is there already; tests look at its bytes."""
    if file_system(tmp_path) in ("tmpfs", "ramfs"):
        pytest.skip("the folder for tests is in memory")
    path = tmp_path / "mine.json"
    path.write_text("the old one")
    return path


def test_an_interrupted_measurement_leaves_the_old_file_and_nothing_else(old):
    process = measuring(old)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 130
    assert err.endswith(b"offload-run: interrupted\n") and b"Traceback" not in err
    assert old.read_text() == "the old one" and os.listdir(old.parent) == [old.name]


def test_a_killed_measurement_leaves_the_old_file_and_nothing_else(old):
    process = measuring(old)
    process.kill()
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == -signal.SIGKILL
    assert old.read_text() == "the old one" and os.listdir(old.parent) == [old.name]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_process_killed_while_it_saves_leaves_the_old_file(where, old):
    process = python(SAVING, where, old, folder=old.parent)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == -signal.SIGKILL
    assert old.read_text() == "the old one"


def test_the_same_process_left_alone_replaces_it(old):
    process = python(SAVING, "", old, folder=old.parent)
    _, err = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, err
    assert json.loads(old.read_text())["name"] == "rtx4090-pcie4x16"
