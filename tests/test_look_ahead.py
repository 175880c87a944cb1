"""Experts that are copied before their layer asks: `--look-ahead`."""

import os
import random
import threading
from contextlib import closing, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate
from expert_models import make_mixture
from flash_double import flash_of_a_gpu
from test_cuda_numbers import ROOM
from test_experts import lend, lru_hits, pool_of, resident_answers, traced
from value_double import LateDriver, open_as, open_double
from waits import wait_until

from offload_rt.config import GenerationConfig, HomeKind, LookAhead, RuntimeConfig, SamplingConfig
from offload_rt.device.base import CopyBlock, CopyPiece
from offload_rt.device.cpu import CpuCopyStream, CpuDevice
from offload_rt.device.cuda.device import CudaDevice
from offload_rt.device.sim import SimStream
from offload_rt.engine.decoding import Run
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model import experts as experts_module
from offload_rt.model import weight_files as files_module
from offload_rt.planning.look_ahead import LookAheadJudge
from offload_rt.streaming.experts import ExpertPool

AHEAD = {"look_ahead": LookAhead.ON}


@pytest.fixture(autouse=True)
def empty_slots(monkeypatch):
    """What is counted here is of tokens: nothing is there before."""
    monkeypatch.setattr(ExpertPool, "fill", lambda self, uses: None)


@pytest.mark.parametrize(
    ("name", "slots", "home"),
    [
        ("mixtral", 14, HomeKind.DISK),
        ("every-second", 5, HomeKind.HOST),
        ("gpt_oss", 9, HomeKind.DISK),
        ("qwen2_moe", 14, HomeKind.HOST),
    ],
)
def test_looking_ahead_changes_no_bit(make_tiny, name, slots, home):
    folder = make_mixture(make_tiny, name, dtype="bfloat16")
    logits, answer = resident_answers(folder)
    with engine_for(folder, expert_slots=slots, home=home, **AHEAD) as engine:
        assert generate(engine, tokens=6) == answer
        engine.forget()
        engine.runner.experts.foresees = True
        assert torch.equal(all_logits(engine), logits)
        counts = engine.runner.experts.counts
    assert counts.ahead > 0 or counts.unused > 0


@pytest.fixture
def flash(monkeypatch):
    """What attends on a GPU, in fp32 too."""
    with flash_of_a_gpu(torch.float32):
        yield
        monkeypatch.undo()  # kinds it put in meanwhile are to go before those that were


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize(
    ("home", "driver"),
    [(HomeKind.HOST, {}), (HomeKind.HOST, {"pin": False}), (HomeKind.DISK, {})],
)
def test_on_a_gpu_neither(make_tiny, monkeypatch, home, driver):
    """Offered copies have a stream and a thread of their own there."""
    folder = make_mixture(make_tiny)
    open_as(monkeypatch, CpuDevice())
    with engine_for(folder, resident_layers=4, **ROOM) as engine:
        resident = all_logits(engine)
    open_double(monkeypatch, **driver)
    with engine_for(folder, expert_slots=13, home=home, **AHEAD, **ROOM) as engine:
        engine.runner.experts.foresees = True
        assert torch.equal(all_logits(engine), resident)
        assert engine.runner.experts.counts.ahead > 0


def test_what_a_layer_holds_is_what_it_holds_without(make_tiny):
    """And all that is read is what was asked for, or counted as read in vain."""
    folder = make_mixture(make_tiny)
    with engine_for(folder, expert_slots=20, tokens=40, **AHEAD) as engine:
        pool = engine.runner.experts
        assert pool.share == 4  # two tokens' experts are kept free
        engine.device.copy.record().synchronize()
        copied, trace = engine.counters().bytes_copied, traced(engine)
        pool.foresees = True
        for token in PROMPT * 2:
            engine.forward([(0, [token])], reuse=False)
        pool.begin(0, 1)
        engine.device.copy.record().synchronize()
        engine.device.copy._idle.close()
        counts, each = pool.counts, engine.network.units[0][0].file_bytes
        read = engine.counters().bytes_copied - copied
    assert counts.hits == lru_hits(trace, pool.share) > 0
    assert counts.misses * each + counts.unused_bytes == read
    assert counts.ahead > 0 < counts.unused and counts.unused_bytes <= counts.unused * each


def test_the_next_router_is_asked_with_these_rows(make_tiny):
    """What is foreseen for a layer is what its router says of rows of the layer before."""
    folder, seen, asked = make_mixture(make_tiny, "mixtral"), [], []
    with engine_for(folder, expert_slots=9, **AHEAD) as engine:
        pool, lend = engine.runner.experts, engine.runner.experts.lend

        def watched(layer, given):
            seen.append(None if given.foresee is None else given.foresee())
            return lend(layer, replace(given, foresee=None))

        def noted(module, hidden, *rest):
            asked.append(hidden)
            return compute(module, hidden, *rest)

        pool.foresees, pool.lend = True, watched
        compute = experts_module.ALL_EXPERTS_FUNCTIONS[experts_module.EXPERTS_NAME]
        experts_module.ALL_EXPERTS_FUNCTIONS.register(experts_module.EXPERTS_NAME, noted)
        try:
            engine.forward([(0, PROMPT[:1])], reuse=False)
        finally:
            experts_module.ALL_EXPERTS_FUNCTIONS.register(experts_module.EXPERTS_NAME, compute)
        blocks = [layer.mlp for layer in engine.network._layers]
        rows = [hidden for hidden in asked if hidden.ndim == 2][:1]
        chosen = blocks[1].gate(rows[0])[0].float().topk(2).indices[0].tolist()
    assert seen[0] == chosen and seen[-1] is None and len(seen) == 4


def test_no_slot_is_overwritten_whatever_is_foreseen():
    dice = random.Random(5)
    for slots in (3, 7, 12, 22):
        pool, copy, compute = pool_of({0: 8, 1: 8, 2: 4}, slots, per_token=2)
        for _ in range(60):
            for layer, count in ((0, 8), (1, 8), (2, 4)):
                parts = dice.choice([1, 1, 3])
                pool.begin(layer, parts)
                for _ in range(parts):
                    needed = dice.sample(range(count), dice.randint(1, 3))
                    foreseen = dice.sample(range(4 if layer else 8), 3)
                    lent = lend(pool, layer, needed, 1, lambda foreseen=foreseen: foreseen)
                    for _, buffer in lent:
                        compute.kernel(reads=[buffer], writes=[], seconds=0.5)
                        if dice.random() < 0.02:
                            lent.close()
                            break
            held = [len(pool.held(layer)) for layer in range(3)]
            assert sum(held) + len(pool._free) == slots
        pool.begin(0, 1)
        counts, read = pool.counts, copy.statistics().bytes_copied
        assert read == 1000 * (counts.misses + counts.unused) or slots == 3
        assert counts.ahead > 0 < counts.unused_bytes or slots == 3


class NeverBegun(SimStream):
    """No offered copy has begun when it is asked for, or dropped."""

    def offer(self, dst, src, after, *, last=False):
        def ask():
            for event in after:
                self.wait(event)
            self.copy(dst, src)
            return self.record()

        return SimpleNamespace(begun_bytes=0, ask=ask, drop=SimStream("nothing").record)


def test_what_a_dropped_copy_was_to_wait_for_the_next_one_waits_for():
    """The slot of an expert that was computed with last is offered, and then filled."""
    pool, _, compute = pool_of({0: 8, 1: 8}, 7, per_token=2)
    pool._copy = NeverBegun("copy", 1e3)
    for layer, needed in [(0, [0, 1, 2]), (1, [0, 1, 2, 3]), (0, [0, 1, 2]), (1, [4])]:
        for _, buffer in lend(pool, layer, needed, 1, lambda: [7]):
            compute.kernel(reads=[buffer], writes=[], seconds=0.5)
    assert pool.counts.unused > 0 == pool.counts.unused_bytes


class Held:
    """A source of 64 bytes, which are read when they may be."""

    image, nbytes = None, 64

    def __init__(self, value, gate=None):
        self.value, self.gate, self.begun = value, gate, threading.Event()

    def pieces(self):
        return [CopyPiece(offset=0, image_bytes=64, nbytes=64, load=self._load)]

    def blocks(self, dst):
        return [CopyBlock(64, lambda: self._load(dst))]

    def _load(self, memory):
        self.begun.set()
        assert self.gate is None or self.gate.wait(5)
        return memory.tensor[:64].fill_(self.value)

    def check(self):
        pass


def test_what_is_asked_for_before_it_began_waits_for_its_slot():
    """A read for a dropped copy is still under way into the same memory."""
    gate, device = threading.Event(), CudaDevice(0, driver=LateDriver())
    with closing(device):
        buffer = device.allocate(64, "test")
        source = Held(1, gate)
        dropped = device.copy.offer(buffer, source, [])
        assert source.begun.wait(5)
        behind = dropped.drop()
        asked = device.copy.offer(buffer, Held(2), [behind]).ask()
        later = threading.Timer(0.05, gate.set)
        later.start()
        asked.synchronize()
        later.join()
        behind.synchronize()
        assert buffer.tensor.tolist() == [2] * 64


class Source:
    """Blocks that tell when they begin, and go on when they may."""

    def __init__(self, name, begun, gate, count=3):
        self.nbytes = 10 * count
        self.blocks = lambda _: [
            CopyBlock(10, lambda i=i: (begun.append((name, i)), gate(name, i)))
            for i in range(count)
        ]

    def check(self):
        pass


def test_what_is_asked_for_goes_before_what_is_offered():
    """An offered copy stops between blocks, and goes on when nothing else is on its way."""
    begun, holding = [], {("offer", 0): threading.Event(), ("asked", 0): threading.Event()}
    started = {key: threading.Event() for key in [*holding, ("offer", 1)]}

    def gate(*key):
        if key in started:
            started[key].set()
        if key in holding:
            assert holding[key].wait(5)

    stream = CpuCopyStream(2, lambda block: block.run())
    with closing(stream):
        offer = stream.offer(None, Source("offer", begun, gate), [])
        assert started["offer", 0].wait(5)
        stream.copy(None, Source("asked", begun, gate, 1))
        done = stream.record()
        assert started["asked", 0].wait(5)  # beside the block under way
        holding["offer", 0].set()
        assert not started["offer", 1].wait(0.05)  # no other block of it is begun
        holding["asked", 0].set()
        done.synchronize()  # does not wait for what is offered
        assert started["offer", 1].wait(5)
        offer.ask().synchronize()
    assert [key for key in begun if key[0] == "offer"] == [("offer", i) for i in range(3)]
    assert offer.begun_bytes == 30 or offer.begun_bytes == 20  # the last may be a reader's


@pytest.mark.parametrize("device", [CpuDevice, lambda: CudaDevice(0, driver=LateDriver())])
def test_what_is_offered_waits_for_all_streams_of_a_device(device):
    """What KV that is away asks of a stream of its own goes first, too."""
    held, others = Held(1, threading.Event()), [Held(2), Held(3)]
    with closing(device()) as device, closing(device.new_copy_stream()) as kv:
        buffers = [device.allocate(64, "test") for _ in range(3)]
        kv.copy(buffers[0], held)
        done = kv.record()
        assert held.begun.wait(5)
        offers = [
            device.copy.offer(buffer, source, (), last=last)
            for buffer, source, last in zip(buffers[1:], others, (False, True), strict=True)
        ]
        assert not others[0].begun.wait(0.05) and not others[1].begun.is_set()
        held.gate.set()
        done.synchronize()
        assert others[1].begun.wait(5)  # behind the other one
        for offer in offers:
            offer.ask().synchronize()
        assert [buffer.tensor.tolist() for buffer in buffers] == [[n] * 64 for n in (1, 2, 3)]


@pytest.mark.parametrize("device", [CpuDevice, lambda: CudaDevice(0, driver=LateDriver())])
def test_nothing_waits_for_a_stream_that_is_closed(device):
    """Neither does closing the device, which a thread of its own does here: it might never end."""
    device = device()
    closed, offered = device.new_copy_stream(), Held(2)
    closed.close()
    closed.copy(device.allocate(64, "test"), Held(1))  # nobody will
    device.copy.offer(device.allocate(64, "test"), offered, ())
    assert offered.begun.wait(5)
    closing_it = threading.Thread(target=device.close, daemon=True)
    closing_it.start()
    closing_it.join(5)
    assert not closing_it.is_alive()


def test_what_is_dropped_is_not_read_and_raises_nothing():
    gate, begun = threading.Event(), []

    def fail(*key):
        assert gate.wait(5)
        raise OSError(5, "Input/output error")

    with closing(CpuCopyStream(1, lambda block: block.run())) as stream:
        offer = stream.offer(None, Source("offer", begun, fail), [])
        wait_until(lambda: begun)
        event = offer.drop()
        gate.set()
        event.synchronize()
        assert begun == [("offer", 0)] and offer.begun_bytes == 0


class Failing:
    """A read that fails the first time, once `gate` is set, and each time if `ever`."""

    def __init__(self, *, ever=False):
        self.gate, self.begun, self.reads, self.ever = threading.Event(), threading.Event(), 0, ever

    def __call__(self, *_):
        self.reads += 1
        first = self.reads == 1
        if first:
            self.begun.set()
            assert self.gate.wait(5)
        if self.ever or first:
            raise OSError(5, "Input/output error")


@pytest.mark.parametrize("asked", ["before", "after"])
@pytest.mark.parametrize("ever", [False, True])
def test_what_failed_unasked_is_read_again_when_it_is_asked_for(asked, ever):
    """Before or after the failure, on a CPU and on a double of a GPU; told is what fails then."""
    read = Failing(ever=ever)
    with closing(CpuCopyStream(1, lambda block: block.run())) as stream:
        offer = stream.offer(None, Source("offer", [], read), [])
        if asked_for(read, offer, asked):
            assert read.reads == 4  # three blocks, and one of them twice
            stream.record().synchronize()
    read, device = Failing(ever=ever), CudaDevice(0, driver=LateDriver())
    with closing(device):
        buffer, source = device.allocate(64, "test"), Held(3)
        load = source._load
        source._load = lambda memory: (read(), load(memory))[1]
        offer = device.copy.offer(buffer, source, [])
        if asked_for(read, offer, asked):
            assert read.reads == 2 and buffer.tensor.tolist() == [3] * 64


def asked_for(read, offer, asked):
    """Ask before or after the failure; whether it is there then, else the failure is told."""
    assert read.begun.wait(5)
    event = offer.ask() if asked == "before" else None
    read.gate.set()
    if event is None:
        wait_until(lambda: not offer.begun_bytes)
    event = event or offer.ask()
    with pytest.raises(OSError, match="Input/output") if read.ever else nullcontext():
        event.synchronize()
    return not read.ever


def test_a_read_that_fails_ends_the_pass_that_asks_for_it_and_no_other(make_tiny, monkeypatch):
    folder, broken, failed = make_mixture(make_tiny), set(), []

    def preadv(fd, buffers, offset):
        if (name := threading.current_thread().name) in broken:
            failed.append(name)
            raise OSError(5, "Input/output error")
        return os.preadv(fd, buffers, offset)

    monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "preadv", preadv)
    logits, _ = resident_answers(folder)
    with engine_for(folder, expert_slots=13, **AHEAD) as engine:
        engine.runner.experts.foresees = True
        broken.add("idle-copies")  # whether it is asked for or not
        passes = 0
        while passes < 3 or not failed:
            assert passes < 30
            assert torch.equal(all_logits(engine), logits)
            engine.forget()
            passes += 1
        broken.update(f"reader-{i}" for i in range(4))
        with pytest.raises(CheckpointError, match="Input/output error; check the disk"):
            all_logits(engine)


def test_a_report_and_a_trace_tell_of_it(make_tiny):
    folder = make_mixture(make_tiny)
    with engine_for(folder, tokens=12, expert_slots=13, **AHEAD) as engine:
        tracer = engine.trace()
        run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=12))
        run.prefill()
        while run.active:
            run.step()
        engine.runner.experts.begin(0, 1)
        names = [event.name for event in tracer.events()]
        found = run.report().experts
    assert found.looked_ahead == 1.0 and 0 < found.ahead <= found.misses
    assert sum(name.endswith(", foreseen") for name in names) == found.ahead + found.unused > 0
    assert 0 <= found.unused_bytes <= found.unused * found.slot_bytes


@pytest.mark.parametrize(("faster", "share"), [(0.8, 1.0), (1.25, 0.0), (1.0, 0.0)])
def test_it_is_kept_where_passes_get_faster_and_nowhere_else(faster, share):
    dice, judge = random.Random(1), LookAheadJudge(LookAhead.AUTO)
    for _ in range(2 + 2 * 32):
        looks = judge.looks(1)
        judge.observe(1, (faster if looks else 1.0) * dice.uniform(0.9, 1.1))
    later = []
    for _ in range(200):
        later.append(judge.looks(1))
        judge.observe(1, (faster if later[-1] else 1.0) * dice.uniform(0.9, 1.1))
    assert sum(later) / len(later) == share
    tried = []
    for _ in range(256):
        tried.append(judge.looks(1))
        judge.observe(1, 1.0)
    assert True in tried and False in tried  # it is tried again


def test_a_clear_loss_is_seen_after_few_passes():
    judge, lost = LookAheadJudge(LookAhead.AUTO), 0
    for number in range(100):
        looks = judge.looks(4)
        lost += looks
        judge.observe(4, (1.6 if looks else 1.0) + 0.1 * (number % 3))
    assert lost == 6
    assert [LookAheadJudge(mode).looks(1) for mode in (LookAhead.ON, LookAhead.OFF)] == [
        True,
        False,
    ]


def test_where_it_has_no_effect_it_is_refused(make_tiny, tiny_model, monkeypatch):
    with pytest.raises(ConfigError, match="with --expert-slots 0 layers are whole"):
        RuntimeConfig(expert_slots=0, **AHEAD)
    for folder in (tiny_model, make_mixture(make_tiny)):  # with room for all of it
        with pytest.raises(ConfigError, match="--look-ahead on has no effect on"):
            engine_for(folder, **AHEAD).__enter__()


def test_a_router_that_cannot_be_asked_alone_is_left_out(make_tiny, monkeypatch):
    def refuse(self, hidden):
        raise TypeError("missing 1 required positional argument")

    monkeypatch.setattr(experts_module.NextRouter, "__call__", refuse)
    folder = make_mixture(make_tiny)
    with pytest.raises(ConfigError, match="--look-ahead on: no router of qwen3_moe models"):
        engine_for(folder, expert_slots=9, **AHEAD).__enter__()
    with engine_for(folder, expert_slots=9) as engine:
        assert generate(engine, tokens=6) == resident_answers(folder)[1]
        assert engine.runner.experts.counts.unused == 0 == engine.foresight.share


def test_without_a_free_slot_no_pass_looks_ahead(make_tiny):
    """Two experts for each of four layers, which a token is sent to."""
    folder = make_mixture(make_tiny)
    with pytest.raises(ConfigError, match=r"with 8 --expert-slots: none is free .* give 9,"):
        engine_for(folder, expert_slots=8, **AHEAD).__enter__()
    for slots, looks in ((8, False), (9, True)):
        with engine_for(folder, expert_slots=slots) as engine:
            generate(engine, tokens=6)
            assert (engine.foresight.share > 0) == looks == engine.runner.experts.may_foresee
