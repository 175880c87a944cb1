"""What happens before torch is imported: something is shown, and what is wrong is refused."""

import contextlib
import os
import pty
import subprocess
import sys
from contextlib import contextmanager

import pytest
from tiny import DEEP

from offload_rt.cli import run
from offload_rt.cli.console import Console
from offload_rt.config import RuntimeConfig
from offload_rt.device import kinds
from offload_rt.device.cuda import present
from offload_rt.device.cuda.nvml import Driver, Gpu
from offload_rt.errors import ConfigError, DeviceError
from offload_rt.session import opening
from offload_rt.session.observer import Gauge

WRONG = [
    (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
    (["--device", "tpu"], "--device tpu is not known"),
    (["--device", "cuda:0,cuda:0"], "names cuda:0 twice: name each once"),
    (["--device", "cpu,cuda:0"], "mixes kinds of devices"),
    (["--device", "cpu,cpu"], "2 emulated links: add --link-bandwidth 1,1"),
    (["--context", "100000"], "--context is 100000"),
    (["--draft", "/no/such/model"], "/no/such/model"),
    (["--draft", "medusa:/no/such/heads"], "/no/such/heads"),
    (["-f", "/no/such/file"], "cannot read the prompt"),
    (["--temp", "-1"], "--temperature is -1"),
]


def test_what_is_wrong_is_refused_before_torch(tiny_model):
    source = (
        "import json, sys\n"
        "before = {*sys.modules}\n"
        "from offload_rt.cli import app, run\n"
        "print({'importlib.metadata'} & ({*sys.modules} - before))\n"  # 13 of 103 ms
        "for words in json.loads(sys.argv[1]):\n"
        "    print(run(words), sorted({'torch', 'transformers'} & sys.modules.keys()))\n"
    )
    import json

    base = [str(tiny_model)]
    lines = [[*base, *([] if "-f" in wrong else ["-p", "x"]), *wrong] for wrong, _ in WRONG]
    for verb in ("bench", "chat", "train-medusa"):
        more = {"bench": ["--prompts", __file__], "train-medusa": ["--output", "o", "--data", "d"]}
        lines.append([verb, *base, "--device", "cuda:99", *more.get(verb, [])])
    done = subprocess.run(
        [sys.executable, "-c", source, json.dumps(lines)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    slow, *shown = done.stdout.splitlines()
    assert slow == "set()" and len(shown) == len(lines), done.stderr
    assert all(line in ("2 []", "4 []") for line in shown), shown
    for _, sentence in WRONG:
        assert sentence in done.stderr


def test_a_terminal_shows_something_before_torch(tiny_model, monkeypatch):
    """Nothing heavy can be imported, and yet there is a line by then; it is wiped out after."""
    outer, inner = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    os.set_blocking(outer, False)
    monkeypatch.setitem(sys.modules, "offload_rt.engine", None)
    with open(inner, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        with contextlib.suppress(ImportError):
            run([str(tiny_model), "-p", "x"])
        shown = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(outer, 4096):
                shown += piece
    os.close(outer)
    assert shown.startswith(b"\ropening ")
    assert b"\ropening " + tiny_model.name.encode() + b" ..." in shown
    assert b" ...\r\x1b[K" in shown


def test_waiting_shows_nothing_off_a_terminal(tiny_model, offload_run):
    done = offload_run(tiny_model, "-p", "x", "-n", 2)
    assert done.code == 0 and "opening" not in done.err


@pytest.mark.parametrize("collects", [True, False])
def test_after_an_import_garbage_is_looked_for_as_before(collects, monkeypatch):
    calls = []
    monkeypatch.setattr(opening.gc, "isenabled", lambda: collects)
    for name in ("disable", "enable"):
        monkeypatch.setattr(opening.gc, name, lambda name=name: calls.append(name))
    with pytest.raises(KeyboardInterrupt), opening._uncollected():
        assert calls == ["disable"]
        raise KeyboardInterrupt
    assert calls == ["disable", "enable"][: 1 + collects]


def gpus(count, *names):
    known = {"total_bytes": 2**30, "free_bytes": 2**30, "capability": (9, 0)}
    found = tuple(Gpu(name=name, **known) for name in names or ("one",) * count)
    return Driver(version="1", cuda_version=(13, 0), gpus=found)


@pytest.mark.parametrize(
    ("name", "torch", "driver", "message"),
    [
        ("cuda", "2.14.1+cu130", None, "no NVIDIA GPU answers"),
        ("cuda:1", "2.14.1+cu130", gpus(1), "this machine has one GPU: use cuda:0"),
        ("cuda:2", "2.14.1", gpus(2), "this machine has 2 GPUs: use cuda:0 to cuda:1"),
        ("cuda", "2.14.1+cpu", gpus(1), "built without CUDA"),
        ("cuda:1", "2.14.1", gpus(2), None),
        ("cuda:0,cuda:1", "2.14.1", gpus(2), None),
        ("cuda:0,cuda:1", "2.14.1", gpus(1), "this machine has one GPU: use cuda:0"),
        ("cuda:0,cuda:2", "2.14.1", gpus(2), "this machine has 2 GPUs"),
        ("cuda:0,cuda:1", "2.14.1", gpus(2, "RTX 4090", "RTX 3060"), "GPU 1 a RTX 3060"),
        ("auto", "2.14.1+cpu", None, None),
        ("cpu", "2.14.1+cpu", None, None),
    ],
)
def test_devices_by_what_the_driver_says(name, torch, driver, message, monkeypatch):
    monkeypatch.setattr(present, "version", lambda _: torch)
    monkeypatch.setattr("offload_rt.device.cuda.nvml.find_driver", lambda: driver)
    monkeypatch.setattr(present, "_cuda_devices", lambda: 0)
    if message is None:
        kinds.check_device(RuntimeConfig(device=name))
        return
    with pytest.raises(DeviceError, match=message):
        kinds.check_device(RuntimeConfig(device=name))


def test_a_gpu_without_nvml_is_asked_of_cuda(monkeypatch):
    monkeypatch.setattr(present, "version", lambda _: "2.14.1")
    monkeypatch.setattr("offload_rt.device.cuda.nvml.find_driver", lambda: None)
    monkeypatch.setattr(present, "_cuda_devices", lambda: 1)
    kinds.check_device(RuntimeConfig(device="cuda:0"))
    for name in ("cuda:1", "cuda:0,cuda:1"):
        with pytest.raises(DeviceError, match="one GPU"):
            kinds.check_device(RuntimeConfig(device=name))


def test_two_devices_of_one_memory_are_two_emulated_links():
    with pytest.raises(ConfigError, match="2 emulated links: add --link-bandwidth 1,1"):
        kinds.check_device(RuntimeConfig(device="cpu,cpu"))
    kinds.check_device(RuntimeConfig(device="cpu,cpu", link_bytes_per_s=1e9))


@pytest.mark.parametrize(("resident", "words"), [(4, 20), (1, 20), (4, 300)])
def test_the_prompts_bar_counts_tokens(resident, words, make_tiny, offload_run, monkeypatch):
    """Of a resident model too, and of prompts that go through layers in chunks of 512."""
    model = make_tiny("llama", tokenizer=True, max_position_embeddings=4096, **DEEP)
    seen: dict[str, list] = {}
    gauges = []

    @contextmanager
    def progress(self, label):
        gauges.append((label, gauge := Gauge()))
        yield gauge

    from offload_rt.cli.interrupts import Interrupts

    def check(self):
        label, gauge = gauges[-1]
        seen.setdefault(label, []).append((gauge.done(), gauge.total, gauge.detail()))

    monkeypatch.setattr(Console, "progress", progress)
    monkeypatch.setattr(Interrupts, "check", check)
    prompt = ("-p", "the quick fox " * words, "-n", 1, "--raw", "--draft", "none")
    done = offload_run(model, *prompt, "--resident-layers", resident)
    assert done.code == 0, done.err
    steps = seen["reading the prompt"][-5:]
    counts, totals = [s[0] for s in steps], {s[1] for s in steps}
    (total,) = totals
    assert counts == sorted(counts) and 0 < counts[-1] <= total
    assert (total > 512) is (words == 300)
    assert len(set(counts)) > 2, counts
    assert steps[-1][2] == f"{counts[-1]} of {total} tokens"
    assert gauges[-1][1].done() == total
