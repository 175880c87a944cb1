"""The command line as a process: signals, pipes, terminals, what it imports and reads."""

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forks
import pytest
from waits import wait_until

from offload_rt.cli.interrupts import Interrupts

PROGRAM = str(Path(sys.executable).with_name("offload-run"))
ENDLESS = ["-p", "hello", "-n", "30000", "--ignore-eos"]
LIMIT_S = 60  # loading torch takes long where the machine is busy
SETTLE_S = 0.3  # readline prints its prompt before it listens for signals


@pytest.fixture(scope="session")
def endless_model(make_tiny):
    """One that can go on for minutes."""
    return make_tiny("llama", tokenizer=True, max_position_embeddings=40_000)


def start(*arguments, program=forks.PROGRAM, **options):
    pipes = {"stdin": subprocess.DEVNULL} | dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    command = [program, *map(str, arguments)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    pipes["env"] = environment  # buffered as for users: what is left in it may fail at the end
    started = forks.Forked if program == forks.PROGRAM else subprocess.Popen
    return started(command, **(pipes | options))


def finish(process):
    """Exit code and the rest of both outputs."""
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out or b"", (err or b"").decode()


def python(source, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", source, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ctrl_c_keeps_the_partial_answer_and_the_stats(endless_model):
    process = start("generate", endless_model, *ENDLESS)
    first = process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    code, rest, err = finish(process)
    assert (code, len(first)) == (130, 1)
    assert rest.endswith(b"\n")
    assert re.search(r"tokens +\d+ in, \d+ out, ended by abort", err)
    assert "Traceback" not in err and "ignored" not in err


def test_ctrl_c_while_torch_is_imported(tiny_model):
    process = start("generate", tiny_model, "-p", "x", program=PROGRAM)
    maps = Path(f"/proc/{process.pid}/maps")
    wait_until(lambda: "libtorch" in maps.read_text() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    assert finish(process) == (130, b"", "offload-run: interrupted\n")


def test_ctrl_c_while_the_prompt_is_read(tiny_model):
    process = start("generate", tiny_model, stdin=subprocess.PIPE)
    wchan = Path(f"/proc/{process.pid}/syscall")
    wait_until(lambda: wchan.read_text().startswith("0 0x0 "))  # read of file 0
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out, err) == (130, b"", "offload-run: interrupted\n")


def test_a_second_ctrl_c_leaves_at_once():
    source = (
        "import sys, time\n"
        "from offload_rt.cli.interrupts import Interrupted, Interrupts\n"
        "with Interrupts():\n"
        "    try:\n"
        "        print('go', flush=True); time.sleep(60)\n"
        "    except Interrupted:\n"
        "        print('once', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    for expected in (b"go\n", b"once\n"):
        assert process.stdout.readline() == expected
        process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 130


def test_closed_pipe_is_quiet(endless_model):
    process = start("generate", endless_model, *ENDLESS)
    process.stdout.read(5)
    process.stdout.close()
    process.stdout = None
    code, _, err = finish(process)
    assert (code, err) == (141, "")


def test_full_disk_is_a_sentence(tiny_model):
    with open("/dev/full", "w") as full:
        code, _, err = finish(start("plan", tiny_model, program=PROGRAM, stdout=full))
    assert (code, err) == (
        2,
        "offload-run: error: cannot write the output: No space left on device\n",
    )


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def replace(path):
    other = path.with_name("other")
    shutil.copy(path, other)
    other.rename(path)


@pytest.mark.parametrize("change", [truncate, replace])
def test_weights_changed_while_running(change, tiny_model, tmp_path, offload_run, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    checks, check = [], Interrupts.check

    def checked(interrupts):
        checks.append(len(checks))
        if len(checks) == 14:  # of two layers each, so after some tokens
            change(folder / "model.safetensors")
        check(interrupts)

    monkeypatch.setattr(Interrupts, "check", checked)
    streamed = ("--resident-layers", "0", "--slots", "1", "--draft", "none")
    done = offload_run("generate", folder, "-p", "hello", "-n", 40, "--ignore-eos", *streamed)
    assert len(checks) >= 14
    assert done.code == 4 and done.out
    assert re.fullmatch(
        r"offload-run: error: model\.safetensors [^\n]*while running[^\n]*\n", done.err
    )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"]])
def test_help_is_quick_and_imports_no_torch(arguments):
    source = (
        "import sys, time; start = time.process_time()\n"
        "from offload_rt.cli import run\n"
        "code = run(sys.argv[1:])\n"
        "heavy = {'torch', 'transformers', 'numpy', 'rich'} & sys.modules.keys()\n"
        "own = {'psutil', 'offload_rt.model.gguf.folder'} & sys.modules.keys()\n"
        "print(code, sorted(heavy), time.process_time() - start < 0.5, sorted(own))\n"
    )
    last = python(source, *arguments).splitlines()[-1]
    assert last.startswith("0 [] True")
    assert arguments[0] == "generate" or last.endswith("True []")


def test_plan_reads_headers_only(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    path = folder / "model.safetensors"
    header_bytes = int.from_bytes(path.read_bytes()[:8], "little")
    header = json.loads(path.read_bytes()[8 : 8 + header_bytes])
    grow_vocabulary(folder, path, header)
    source = (
        "import sys\n"
        "from offload_rt.cli import run\n"
        "code = run(sys.argv[1:])\n"
        "line = open('/proc/self/io').readline().split()\n"
        "heavy = {'torch', 'numba', 'numpy'} & sys.modules.keys()\n"
        "print(code, sorted(heavy), int(line[1]) < 16 * 2**20)\n"
    )
    lines = python(source, "plan", folder, "--device-memory", "8GiB").splitlines()
    assert lines[-1] == "0 [] True"


def grow_vocabulary(folder, path, header):
    """Make the embedding and head a gigabyte each, all holes."""
    rows = 2**22
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    offset = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        begin, end = tensor["data_offsets"]
        nbytes = end - begin
        if tensor["shape"][0] == 300:
            tensor["shape"][0] = rows
            nbytes = rows * tensor["shape"][1] * 4
        tensor["data_offsets"] = [offset, offset + nbytes]
        offset += nbytes
    data = json.dumps(header).encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data)
    os.truncate(path, 8 + len(data) + offset)


class Terminal:
    """A pseudo terminal and what was printed there."""

    def __init__(self):
        self.end, self.inner = pty.openpty()
        self.shown = b""

    def wait_for(self, text, count=1):
        self.wait_until(lambda: self.shown.count(text) >= count)

    def wait_until(self, happened):
        deadline = time.monotonic() + LIMIT_S
        while not happened():
            left = max(0.0, deadline - time.monotonic())
            assert select.select([self.end], [], [], left)[0], self.shown
            self._read()

    def wait_for_end(self, process):
        os.close(self.inner)
        while self._read():
            pass
        os.close(self.end)
        return process.wait(LIMIT_S)

    def type(self, text):
        os.write(self.end, text)

    def _read(self):
        try:
            data = os.read(self.end, 4096)
        except OSError:  # Linux: the other side is closed
            return b""
        self.shown += data
        return data


def test_chat_on_a_terminal(endless_model):
    terminal = Terminal()
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.inner)
    options = ("-n", "30000", "--ignore-eos", "--context", "40000")
    environment = os.environ | {"TERM": "dumb"}
    process = start("chat", endless_model, *options, env=environment, **streams)
    terminal.wait_for(b"> ")
    terminal.type(b"hello\n")
    shown = len(terminal.shown)
    terminal.wait_until(lambda: len(terminal.shown) > shown + 200)  # the echo, some of the answer
    process.send_signal(signal.SIGINT)
    terminal.wait_for(b"\n> ")
    terminal.type(b"/stats\n")
    terminal.wait_for(b"ended by abort")
    terminal.wait_for(b"\n> ", 2)
    time.sleep(SETTLE_S)
    process.send_signal(signal.SIGINT)
    terminal.wait_for(b"Ctrl-C again")
    terminal.wait_for(b"\n> ", 3)
    time.sleep(SETTLE_S)
    process.send_signal(signal.SIGINT)
    assert terminal.wait_for_end(process) == 130
    assert b"Traceback" not in terminal.shown


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_closed_standard_streams_are_no_traceback(tiny_model, closed):
    number = {"<&-": 0, ">&-": 1, "2>&-": 2}[closed]
    source = (
        "import os, sys\n"
        f"os.close({number}); sys.{('stdin', 'stdout', 'stderr')[number]} = None\n"
        "from offload_rt.cli import main\n"
        "sys.exit(main())\n"
    )
    words = ("generate", str(tiny_model), "-p", "hello", "-n", "3", "--device", "cpu")
    done = forks.run([sys.executable, "-c", source, *words])
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    command = f"{PROGRAM} plan {tiny_model} {closed}"  # that Python leaves such a stream None
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
