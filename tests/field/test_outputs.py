"""Whatever `--output` names is written whole, or left as it was with one sentence; no verb differs.

Nothing but a plain file is replaced, no link is followed, nothing is left behind, and answers and
hidden states are their owner's alone.
"""

import errno
import io
import json
import os
import resource
import stat
import sys
from contextlib import contextmanager

import pytest

from offload_rt.baselines.rows import MachineRow, PromptRow, Setup, begin
from offload_rt.cli import run
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.profiling.store import find_profile, machine_name
from offload_rt.training.answers import AnswerFile
from offload_rt.training.cache import CacheShape, StateCache

HEADS = 2
CONVERT = "convert_medusa"


def setup_of():
    return Setup(
        model="m",
        files=[],
        dtype="float32",
        device="cpu",
        device_bytes=1,
        cap_bytes=None,
        cap="none",
        page_cache="dropped",
        prompt_file="p",
        prompts=[PromptRow(name="a", category="c", tokens=1, digest="d")],
        max_tokens=2,
        ends=True,
        draft="",
        batches=[1],
        engines=["ours"],
        machine=MachineRow(cpu="c", cores=1, ram_bytes=1, gpus=[]),
        weights_bytes=1,
        command="c",
    )


def make_heads(folder):
    """Medusa heads of zeros for the tiny model, written without torch."""
    folder.mkdir()
    header, at = {}, 0
    for head in range(HEADS):
        for name, shape in (
            (f"{head}.0.linear.weight", (64, 64)),
            (f"{head}.0.linear.bias", (64,)),
            (f"{head}.1.weight", (300, 64)),
        ):
            size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
            at += size
    text = json.dumps(header).encode()
    path = folder / "medusa_lm_head.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(at))
    config = {"medusa_num_heads": HEADS, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def commands(tiny_model, tmp_path, prompt_file):
    """What each verb is asked to write, by the name of the file it ends up in."""
    heads = make_heads(tmp_path / "heads")

    def bench(target):
        return ["bench", tiny_model, "--prompts", prompt_file, "--limit", 1, "-n", 2, "--output"], (
            target.parent
        )

    return {
        "plan.json": lambda target: ["plan", tiny_model, "--output", target],
        "bench.md": lambda target: [*bench(target)[0], target.parent],
        "bench.json": lambda target: [*bench(target)[0], target.parent],
        "medusa_lm_head.safetensors": lambda target: [CONVERT, heads, target.parent],
        "config.json": lambda target: [CONVERT, heads, target.parent],
    }


@pytest.fixture
def write(offload_run, convert_medusa):
    """Run one of them."""

    def run(command):
        first, *rest = command
        return convert_medusa(*rest) if first == CONVERT else offload_run(*command)

    return run


NAMES = ["plan.json", "bench.md", "bench.json", "medusa_lm_head.safetensors", "config.json"]
KINDS = {
    "link": lambda path: path.symlink_to(path.parent.parent / "real"),
    "pipe": os.mkfifo,
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_plain_file_is_left(name, kind, commands, write, tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / name
    KINDS[kind](target)
    before = os.lstat(target)
    done = write(commands[name](target))
    assert done.code == 2 and done.err.count("\n") == 1 and name in done.err
    assert (os.lstat(target).st_ino, os.lstat(target).st_mode) == (before.st_ino, before.st_mode)
    assert (tmp_path / "real").read_text() == "old"
    assert not [path for path in os.listdir(tmp_path / "out") if path.endswith(".tmp")]


@contextmanager
def short_files(nbytes):
    """No file may have more bytes: a full disk, as a file sees it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["plan.json", "bench.md", "medusa_lm_head.safetensors"])
def test_a_limit_of_file_sizes_is_told_and_leaves_nothing(name, commands, write, tmp_path):
    (tmp_path / "out").mkdir()
    command = commands[name](tmp_path / "out" / name)
    with short_files(256):
        done = write(command)
    assert done.code == 2 and "a file may have at most 256 B here (ulimit -f)" in done.err
    assert os.listdir(tmp_path / "out") == []
    assert ("tokens/s" in done.out) is (name == "bench.md")  # what was measured is not lost


def test_convert_leaves_no_folder_it_made(commands, write, tmp_path):
    command = commands["config.json"](tmp_path / "out" / "config.json")
    with short_files(256):
        assert write(command).code == 2
    assert not (tmp_path / "out").exists()
    assert write(command).code == 0


def test_an_open_file_or_a_device_may_be_named(tiny_model, offload_run, tmp_path):
    assert offload_run("plan", tiny_model, "--output", "/dev/null").code == 0
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode)
    with (tmp_path / "open").open("w+") as file:
        done = offload_run("plan", tiny_model, "--output", f"/dev/fd/{file.fileno()}")
        assert (done.code, json.load(file.seek(0) or file)["layers"]) == (0, 2)


def test_a_plan_is_replaced_by_a_plan(tiny_model, offload_run, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")
    path.chmod(0o640)
    assert offload_run("plan", tiny_model, "--output", path).code == 0
    assert json.loads(path.read_text())["layers"] == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_profile_of_the_working_folder_is_not_taken_by_name(
    tiny_model, offload_run, tmp_path, monkeypatch
):
    """A folder one steps into must not decide what plans rest on."""
    (tmp_path / "profiles").mkdir()
    other = find_profile("rtx4090-pcie4x16").read_text()
    (tmp_path / "profiles" / f"{machine_name()}.json").write_text(other)
    monkeypatch.chdir(tmp_path)
    assert "rtx4090" not in offload_run("plan", tiny_model).out


def test_answers_and_hidden_states_are_their_owners_alone(tmp_path):
    StateCache(tmp_path, "train", CacheShape(width=4, heads=1, dtype="float32")).close()
    answers = AnswerFile(tmp_path / "answers.jsonl")
    answers.add([[1], [2]])
    answers.cut(1)
    begin(tmp_path / "raw.jsonl", setup_of())
    made = sorted(os.listdir(tmp_path))
    assert made == ["answers.jsonl", "raw.jsonl", "train.labels", "train.states"]
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in made} == {0o600}


@pytest.mark.parametrize("text", [b"\xff\n", b"[" * 10**5 + b"\n", b"[1.5]\n", b"\n\n"])
def test_answers_that_are_none(text, tmp_path):
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(CheckpointError, match="a, line 1 is not an answer"):
        AnswerFile(tmp_path / "a")


def test_answers_in_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a")
    with pytest.raises(ConfigError, match="a: it is no plain file"):
        AnswerFile(tmp_path / "a")


@pytest.mark.parametrize("name", ["answers.jsonl", "raw.jsonl", "train.labels"])
def test_what_grows_is_never_written_through_a_link(name, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "real").touch()
    (tmp_path / "out" / name).symlink_to(tmp_path / "real")
    write = {
        "answers.jsonl": lambda path: AnswerFile(path).add([[1]]),
        "raw.jsonl": lambda path: begin(path, setup_of()),
        "train.labels": lambda path: StateCache(
            path.parent, "train", CacheShape(width=4, heads=1, dtype="float32")
        ),
    }[name]
    with pytest.raises(ConfigError, match=f"{name}.*link|link.*{name}|symbolic"):
        write(tmp_path / "out" / name)
    assert (tmp_path / "real").read_bytes() == b""


class Short(io.RawIOBase):
    """A raw stream that takes little at once, and then no more."""

    def __init__(self, room):
        self.room, self.got = room, b""

    def writable(self):
        return True

    def write(self, data):
        if len(self.got) >= self.room:
            raise OSError(errno.EFBIG, "File too large")
        part = bytes(data[:100])
        self.got += part
        return len(part)


@pytest.mark.parametrize(("room", "code"), [(10**6, 0), (300, 2)])
def test_stdout_without_a_buffer_gets_all_or_an_error(
    room, code, tiny_model, offload_run, monkeypatch
):
    """As PYTHONUNBUFFERED makes it: Python alone would write once and lose the rest."""
    raw = Short(room)
    stream = io.TextIOWrapper(raw, encoding="utf-8", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(["plan", str(tiny_model), "--json"]) == code
    if not code:
        assert json.loads(raw.got)["resident"] == [0, 1]
