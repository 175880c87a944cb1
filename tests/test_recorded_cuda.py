"""Recorded passes on a GPU that is not there: launches, host syncs, refusals, torch's graphs."""

import threading
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from engines import PROMPT
from fake_cuda import fake_gpu
from test_fake_cuda import gpu  # noqa: F401 - a fixture
from test_speculation import IDS
from value_double import LateDriver

from offload_rt.config import (
    DraftConfig,
    DraftShape,
    GenerationConfig,
    HomeKind,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.device.cuda.device import CudaDevice
from offload_rt.device.cuda.torch_driver import WARM_UPS, TorchDriver
from offload_rt.engine import Engine, Run
from offload_rt.errors import DeviceError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.runner import runner as runner_module
from offload_rt.runner import static

GAMMA = 3


def steps(gpu, make_tiny, count, *, sampling=None):  # noqa: F811
    """What each step of a run with a draft model launched, waited for and uploaded."""
    target = make_tiny("llama", num_hidden_layers=2, **IDS)
    small = make_tiny("llama", num_hidden_layers=1, hidden_size=32, **IDS)
    draft = DraftConfig(draft=f"model:{small}", draft_tokens=GAMMA, shape=DraftShape.CHAIN)
    runtime = RuntimeConfig(device="cuda:0", home=HomeKind.HOST, resident_layers=1, slots=1)
    made, tokens = [], GenerationConfig(max_tokens=1 + count * (GAMMA + 1))
    checkpoint = open_checkpoint(target)
    with (
        fake_gpu(gpu),
        Engine(checkpoint, runtime, capacities=[120], prompt_tokens=17, draft=draft) as engine,
    ):
        run = Run.start(engine, [PROMPT], sampling or SamplingConfig(), tokens)
        gpu.strict = True
        run.prefill()
        propose = run.sequences[0].drafter.propose

        def watched(*arguments):
            gpu.trace.clear()
            before = gpu.downloads, gpu.uploads, gpu.captures
            drafted = propose(*arguments)
            kinds = [entry[0] for entry in gpu.trace]
            after = gpu.downloads, gpu.uploads, gpu.captures
            counts = [b - a for a, b in zip(before, after, strict=True)]
            made.append((kinds.count("kernel"), kinds.count("replay"), *counts, len(drafted.tree)))
            return drafted

        run.sequences[0].drafter.propose = watched
        for _ in range(count):
            run.step()
        gpu.strict = False
        ledger = engine.device.ledger()
    return made, ledger


def test_a_greedy_chain_is_launched_at_once_and_waited_for_once(gpu, make_tiny, monkeypatch):  # noqa: F811
    """gamma passes: one upload, one launch and what puts the numbers there, one host sync."""
    waits = gpu.host_syncs[threading.current_thread().name]
    made, ledger = steps(gpu, make_tiny, 5)
    assert gpu.host_syncs[threading.current_thread().name] - waits <= 10  # of loading
    eager, last = made[0], made[-1]
    kernels, replays, downloads, uploads, captures, drafted = last
    assert (replays, downloads, uploads, captures, drafted) == (1, 1, 1, 0, GAMMA)
    assert kernels <= 3
    # The first ones are made kernel by kernel: what comes up once in a while is never recorded.
    assert eager[0] > 50 * kernels and eager[1:] == (0, GAMMA, GAMMA, 0, GAMMA)
    assert sum(captures for *_, captures, _ in made) == gpu.captures == 1
    assert ledger["recorded passes"] == 4096 * gpu.captures
    assert ledger["logits of recorded passes"] == 32 * 300 * 4


def test_each_pass_of_a_sampled_chain_is_launched_at_once(gpu, make_tiny, monkeypatch):  # noqa: F811
    """Its tokens are drawn by the host's generator: as many syncs and uploads as launches."""
    monkeypatch.setattr(static, "EAGER_FIRST", 0)
    sampling = SamplingConfig(temperature=0.7, seed=1)
    made, _ = steps(gpu, make_tiny, 3, sampling=sampling)
    kernels, replays, downloads, uploads, captures, _ = made[-1]
    assert captures == 0 and replays == downloads == uploads >= 2
    assert kernels <= 40 * replays  # of choosing tokens, whatever the layers


# --- what cannot be recorded ---------------------------------------------------------------------


def test_a_refused_capture_is_said_once_and_drafting_goes_on(gpu, make_tiny, monkeypatch, caplog):  # noqa: F811
    monkeypatch.setattr(static, "EAGER_FIRST", 0)
    gpu.refuses_captures = True
    made, ledger = steps(gpu, make_tiny, 3)
    assert [(replays, drafted) for _, replays, *_, drafted in made] == [(0, GAMMA)] * 3
    said = [record.message for record in caplog.records if "recorded" in record.message]
    assert said == [
        "cuda:0: some passes are not recorded as a graph (operation not permitted when stream is "
        "capturing): they run kernel by kernel"
    ]
    assert "recorded passes" not in ledger


def test_no_room_for_what_recordings_compute_is_said_once(gpu, make_tiny, monkeypatch, caplog):  # noqa: F811
    def no_room(*_):
        raise DeviceError("cuda:0 has no 9.0 MiB left")

    monkeypatch.setattr(runner_module, "Recordings", no_room)
    made, _ = steps(gpu, make_tiny, 2)
    assert [drafted for *_, drafted in made] == [GAMMA] * 2
    said = [record.message for record in caplog.records if "recorded" in record.message]
    assert said == ["draft passes are not recorded: cuda:0 has no 9.0 MiB left"]


class Unsound(LateDriver):
    """A driver whose graphs do something else than what was captured."""

    def __init__(self, capture):
        super().__init__()
        self.replaces = capture

    def capture(self, work, device):
        return self.replaces(work), 0


def stale(work):
    result = work().clone()
    return lambda: result


def raises(error):
    def capture(work):
        work()
        raise error

    return capture


UNSOUND = {
    "stale": (stale, "a replayed graph computed something else"),
    "an error of the program": (raises(KeyError("x")), "'x'"),
    "no message": (raises(RuntimeError()), "RuntimeError"),
    "lines": (raises(RuntimeError("no memory\nat all")), "no memory"),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_a_graph_that_is_not_the_work_is_not_used(case, caplog):
    """The check has other numbers than the capture had: one that keeps its result is found."""
    capture, reason = UNSOUND[case]
    device = CudaDevice(0, driver=Unsound(capture))
    given, calls = torch.tensor([1.0, torch.nan]), []

    def work():
        calls.append(1)
        return given * 2

    assert device.record(work, given.neg_) is None
    assert device.record(work, given.neg_) is None  # what was said is not said again
    assert [record.message for record in caplog.records] == [
        f"cuda:0: some passes are not recorded as a graph ({reason}): they run kernel by kernel"
    ]
    assert len(calls) == (4 if case == "stale" else 2)
    device.close()


def test_a_graph_that_is_the_work_is_used_nan_or_not():
    device = CudaDevice(0, driver=LateDriver())
    given = torch.tensor([1.0, torch.nan])
    replay = device.record(lambda: given * 2, given.neg_)
    given.copy_(torch.tensor([3.0, 4.0]))
    assert replay().tolist() == [6.0, 8.0]
    device.close()


# --- torch's graphs, with every call of `torch.cuda` replaced ------------------------------------


class Calls:
    """What the driver asks of torch, in order; it is the graphs and the streams, too."""

    def __init__(self, monkeypatch, *, end=None):
        self.made, self.mode, self.current, self.end = [], 0, "compute", end
        self.reserved = iter((100, 170))
        replaced = {
            "Stream": lambda _: self.stream("side"),
            "CUDAGraph": lambda: self,
            "stream": self.within,
            "device": lambda _: nullcontext(),
            "current_stream": lambda _: self.stream("compute"),
            "graph_pool_handle": lambda: "pool",
            "synchronize": lambda _: self.made.append("synchronize"),
            "memory_reserved": lambda _: next(self.reserved, 0),
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": self.set_mode,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def stream(self, name):
        def wait_stream(other):
            self.made.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    @contextmanager
    def within(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def set_mode(self, mode):
        self.mode = {"error": 2}.get(mode, mode)

    def capture_begin(self, pool, capture_error_mode):
        assert self.current == "side" and self.mode == 0
        assert (pool, capture_error_mode) == ("pool", "thread_local")
        self.made.append("begin")

    def capture_end(self):
        self.made.append("end")
        if self.end is not None:
            raise self.end

    def replay(self):
        assert self.current == "compute"
        self.made.append("replay")

    def work(self):
        assert self.current == "side"
        assert self.mode == (0 if "begin" in self.made else 2), "a host sync would not be found"
        self.made.append("work")
        return torch.ones(1)


def test_a_capture_warms_up_beside_the_compute_stream_and_comes_back_to_it(monkeypatch):
    calls, driver = Calls(monkeypatch), TorchDriver()
    replay, grown = driver.capture(calls.work, torch.device("cuda", 0))
    assert calls.made == [
        "side waits for compute",
        *["work"] * WARM_UPS,
        "compute waits for side",
        "synchronize",
        "begin",
        "work",
        "end",
    ]
    assert replay().tolist() == [1.0] and calls.made[-1] == "replay" and grown == 70
    assert (calls.current, calls.mode) == ("compute", 0)
    calls.made.clear()
    driver.capture(calls.work, torch.device("cuda", 0))
    assert calls.made.count("work") == 2  # libraries are there now


def test_a_host_sync_is_found_before_a_capture_has_begun(monkeypatch):
    calls = Calls(monkeypatch)

    def work():
        assert calls.mode == 2
        raise RuntimeError("called a synchronizing CUDA operation")

    with pytest.raises(RuntimeError, match="synchronizing"):
        TorchDriver().capture(work, torch.device("cuda", 0))
    assert "begin" not in calls.made and (calls.current, calls.mode) == ("compute", 0)


@pytest.mark.parametrize("end", [None, RuntimeError("operation failed due to a previous error")])
def test_a_capture_that_fails_is_ended_and_tells_why(monkeypatch, end):
    calls = Calls(monkeypatch, end=end)

    def work():
        if "begin" in calls.made:
            raise RuntimeError("operation not permitted")
        return calls.work()

    with pytest.raises(RuntimeError, match="not permitted"):
        TorchDriver().capture(work, torch.device("cuda", 0))
    assert calls.made[-1] == "end" and (calls.current, calls.mode) == ("compute", 0)
