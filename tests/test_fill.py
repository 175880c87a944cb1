"""Slots of experts are filled when a model is loaded, while nothing else is read."""

import os
import random
import threading
import time
import tracemalloc
from collections import Counter, deque
from contextlib import closing

import pytest
import torch
from engines import PROMPT, all_logits, engine_for
from expert_models import make_mixture
from fake_cuda import FakeCuda, key
from test_experts import lend, pool_of, resident_answers
from test_look_ahead import Source
from waits import wait_until

from offload_rt.config import GenerationConfig, HomeKind, LookAhead, SamplingConfig
from offload_rt.device.cpu import CpuCopyStream
from offload_rt.device.cuda.device import CudaDevice
from offload_rt.device.host_memory import allocate_host
from offload_rt.engine.decoding import Run
from offload_rt.model import weight_files as files_module
from offload_rt.planning.history import use_of
from offload_rt.streaming.experts import ExpertPool
from offload_rt.streaming.memory_home import MemoryHome


def settled(engine):
    """Once slots have all they are to be filled with."""
    pool = engine.runner.experts
    each = engine.network.units[0][0].file_bytes
    whole_bytes = pool.share * len(pool._held) * each
    wait_until(lambda: pool.filled_bytes >= whole_bytes and not is_reading(pool))
    return pool, each


def is_reading(pool):
    return any(slot.offer._made is not None for slot in pool._filling)


@pytest.mark.parametrize("slots", [9, 20, 32])
def test_a_prompt_reads_only_what_its_layers_do_not_hold(make_tiny, slots):
    """Each layer has its share; what was filled is counted apart from all else."""
    folder = make_mixture(make_tiny)
    logits, _ = resident_answers(folder)
    with engine_for(folder, expert_slots=slots) as engine:
        pool, each = settled(engine)
        loaded = engine.counters().bytes_copied - pool.filled_bytes
        filled = {layer: pool.held(layer) for layer in range(4)}
        assert all(held == [*reversed(range(pool.share))] for held in filled.values())
        run = Run.start(engine, [PROMPT[:5]], SamplingConfig(), GenerationConfig(max_tokens=1))
        run.prefill()
        engine.device.copy.record().synchronize()
        counts, found = pool.counts, run.report().experts
        assert counts.filled == counts.hits > 0 and found.filled == counts.filled
        moved = engine.counters().bytes_copied - loaded
        assert moved == (counts.misses + counts.unused) * each + pool.filled_bytes
        assert counts.host_bytes + counts.file_bytes == moved - pool.filled_bytes
        assert found.filled_bytes == pool.filled_bytes == pool.share * 4 * each
        engine.forget()
        assert torch.equal(all_logits(engine), logits)


@pytest.mark.parametrize("home", [HomeKind.DISK, HomeKind.HOST])
def test_whatever_has_come_when_tokens_ask_no_bit_differs(make_tiny, monkeypatch, home):
    """And whatever earlier runs used."""
    folder = make_mixture(make_tiny, "mixtral", dtype="bfloat16")
    logits, _ = resident_answers(folder)
    dice, fill = random.Random(5), ExpertPool.fill

    def filled(pool, uses):
        assert not uses
        fill(pool, {layer: [dice.randrange(4) for _ in range(8)] for layer in range(4)})

    monkeypatch.setattr(ExpertPool, "fill", filled)
    for pause in (0.0, 2e-4, 2e-3):

        def preadv(fd, buffers, offset, pause=pause):
            if threading.current_thread().name == "idle-copies":
                time.sleep(pause)
            return os.preadv(fd, buffers, offset)

        monkeypatch.setattr(files_module, "PIECE_BYTES", 4096)
        monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "preadv", preadv)
        with engine_for(folder, expert_slots=13, home=home) as engine:
            assert torch.equal(all_logits(engine), logits)
            counts = engine.runner.experts.counts
            assert counts.hits + counts.misses == sum(map(sum, counts.distances.values()))


def test_nothing_that_is_asked_for_waits_for_what_fills_slots(make_tiny, monkeypatch):
    """Reads that fill stop at once and never go on; the pass has its experts all the same."""
    gate, begun = threading.Event(), threading.Event()

    def preadv(fd, buffers, offset):
        if threading.current_thread().name == "idle-copies":
            begun.set()
            assert gate.wait(20)
        return os.preadv(fd, buffers, offset)

    folder, row = make_mixture(make_tiny), [(0, PROMPT[:1])]
    with engine_for(folder, expert_slots=13, look_ahead=LookAhead.OFF) as engine:
        expected = engine.forward(row, reuse=False)
        asked = engine.runner.experts._recent[0]
    order = ExpertPool._in_place
    first = next(e for e in range(8) if e not in asked)  # of the first layer, and of all others

    def in_place(self, layer, experts):
        return sorted(order(self, layer, experts), key=lambda expert: expert != first)

    monkeypatch.setattr(ExpertPool, "_in_place", in_place)
    monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "preadv", preadv)
    with engine_for(folder, expert_slots=13) as engine:
        assert begun.wait(20)
        try:
            assert torch.equal(engine.forward(row, reuse=False), expected)
        finally:
            gate.set()


def test_what_failed_while_slots_were_filled_is_read_when_a_token_asks(make_tiny, monkeypatch):
    """Reads that nobody asked for all fail; no pass ends of it, and each reads what it needs."""
    failed = []

    def preadv(fd, buffers, offset):
        if threading.current_thread().name == "idle-copies":
            failed.append(offset)
            raise OSError(5, "Input/output error")
        return os.preadv(fd, buffers, offset)

    folder = make_mixture(make_tiny)
    logits, _ = resident_answers(folder)
    monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "preadv", preadv)
    with engine_for(folder, expert_slots=20) as engine:
        pool = engine.runner.experts
        # Each is tried once, and none is on its way any more.
        wait_until(lambda: len(failed) >= 20 and not pool.filled_bytes)
        assert torch.equal(all_logits(engine), logits)
        assert pool.counts.filled == pool.filled_bytes == 0 < pool.counts.misses


def test_a_model_that_is_closed_meanwhile_reads_no_more(make_tiny, monkeypatch):
    reads, second = [], threading.Event()

    def preadv(fd, buffers, offset):
        if threading.current_thread().name == "idle-copies":
            reads.append(offset)
            second.wait(0.05)
        return os.preadv(fd, buffers, offset)

    monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "preadv", preadv)
    folder = make_mixture(make_tiny)
    with engine_for(folder, expert_slots=32):
        wait_until(lambda: reads)
    assert len(reads) <= 4  # of 32 experts
    with engine_for(folder, expert_slots=32, look_ahead=LookAhead.OFF) as engine:
        engine.forward([(0, PROMPT)], reuse=False)
        assert engine.runner.experts.filled_bytes == engine.runner.experts.counts.filled == 0
    assert len(reads) <= 4


def test_what_may_be_last_comes_after_all_else_that_is_offered():
    begun, gates = [], {("last", 0): threading.Event()}

    def gate(*key):
        if key in gates:
            assert gates[key].wait(5)

    with closing(CpuCopyStream(1, lambda block: block.run())) as stream:
        last = stream.offer(None, Source("last", begun, gate), (), last=True)
        wait_until(lambda: begun)
        first = stream.offer(None, Source("first", begun, gate), ())
        gates["last", 0].set()
        wait_until(lambda: len(begun) >= 6)
        assert begun[1:4] == [("first", i) for i in range(3)]
        assert first.begun_bytes == last.begun_bytes == 30


def test_of_copies_that_wait_to_be_last_one_takes_memory():
    """No plan counts what they take: not while they wait, and not when they are there."""
    count, gate, last = 3000, threading.Event(), threading.Event()

    def read(*key):
        assert gate.wait(20)
        if key == (count - 1, 11):
            last.set()

    with closing(CpuCopyStream(1, lambda block: block.run())) as stream:
        sources = [Source(i, deque(maxlen=0), read, count=12) for i in range(count)]
        tracemalloc.start()
        try:
            offers = [stream.offer(None, source, (), last=True) for source in sources]
            waiting, _ = tracemalloc.get_traced_memory()
            gate.set()
            assert last.wait(60)
            offers.pop().ask().synchronize()
            there, most = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert all(offer.begun_bytes == 120 for offer in offers)
        assert max(waiting, there, most) < 150 * count  # bytes; one that is cut takes 3 KB


def test_a_copy_that_cannot_be_cut_keeps_no_other_from_its_turn():
    """Whoever asks for it is told."""
    begun, broken = [], Source("broken", [], lambda *_: None)

    def refuse(_):
        raise OSError(9, "Bad file descriptor")

    broken.blocks = refuse
    with closing(CpuCopyStream(1, lambda block: block.run())) as stream:
        offers = [
            stream.offer(None, source, (), last=True)
            for source in (broken, Source("good", begun, lambda *_: None))
        ]
        wait_until(lambda: len(begun) >= 3)
        with pytest.raises(OSError, match="Bad file"):
            offers[0].ask()


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("when", "name", "reads"), [("waits", "b", 0), ("made", "a", 1), ("there", "a", 3)]
)
def test_a_copy_that_may_be_last_is_asked_for_or_dropped_at_any_time(when, name, reads, kept):
    """Each block is read once if it is asked for, and else no more once it is dropped."""
    begun, hold = [], threading.Event()

    def gate(*key):
        if key == ("a", 0):
            assert hold.wait(5)

    with closing(CpuCopyStream(1, lambda block: block.run())) as stream:
        offers = {
            each: stream.offer(None, Source(each, begun, gate), (), last=True) for each in "ab"
        }
        wait_until(lambda: begun)
        if when == "there":
            hold.set()
            wait_until(lambda: offers["a"]._made is None)
        event = offers[name].ask() if kept else offers[name].drop()
        threading.Timer(0.02, hold.set).start()
        event.synchronize()
        own = [at for one, at in begun if one == name]
        assert sorted(own) == [*range(3 if kept else reads)]
        assert offers[name].begun_bytes == 10 * reads


@pytest.mark.parametrize("slots", [16, 23, 40])
def test_what_nobody_asked_for_is_replaced_first(slots):
    """A token's experts stay, whatever slots were filled with."""
    pool, copy, compute = pool_of(dict.fromkeys(range(5), 8), slots, per_token=2)
    pool.fill({})
    share = slots // 5
    assert [pool.held(layer) for layer in range(5)] == [[*reversed(range(share))]] * 5
    assert copy.statistics().bytes_copied == pool.filled_bytes == 5 * share * 1000
    asked = [7, 6]
    for layer in range(5):
        for _, buffer in lend(pool, layer, asked):
            compute.kernel(reads=[buffer], writes=[], seconds=0.5)
    pool.begin(0, 1)
    counts = pool.counts
    kept = [e for e in (7, 6) if e < share]
    assert counts.filled == counts.hits == 5 * len(kept)
    assert counts.misses == 5 * (2 - len(kept)) and counts.unused == counts.unused_bytes == 0
    assert all(pool.held(layer)[-2:] == asked for layer in range(5))
    assert counts.file_bytes + counts.host_bytes == 1000 * counts.misses


def test_slots_are_filled_with_what_earlier_runs_used_most(monkeypatch):
    """The first is the last to be replaced; of layers of another size nothing is known."""
    pool, copy, _ = pool_of(dict.fromkeys(range(3), 8), 12, per_token=2)
    offered, offer = [], copy.offer

    def noted(buffer, source, *more, **named):
        offered.append(source)
        return offer(buffer, source, *more, **named)

    monkeypatch.setattr(copy, "offer", noted)
    pool.fill({0: [0, 5, 0, 9, 5, 0, 0, 1], 1: [0, 1, 2], 7: [1] * 8})
    first = [3, 1, 4, 7]
    assert offered[:4] == [pool._source(0, expert) for expert in first]
    assert pool.held(0) == first[::-1]
    assert pool.held(1) == pool.held(2) == [3, 2, 1, 0]


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("skewed", [True, False])
def test_history_has_what_a_fill_gave_as_hits_and_nothing_else_of_it(skewed, known):
    """A load, not something asked for: one run says the hits of all sizes, filled or not."""
    dice, layers, experts = random.Random(7), range(3), 16
    weights = [1 / (1 + e) if skewed else 1 for e in range(experts)]
    tokens = [
        [list(dict.fromkeys(dice.choices(range(experts), weights, k=2))) for _ in layers]
        for _ in range(12)
    ]

    def counted(share, uses):
        pool = pool_of(dict.fromkeys(layers, experts), share * len(layers), per_token=2)[0]
        if uses is not None:
            pool.fill(uses)
        for token in tokens:
            for layer in layers:
                deque(lend(pool, layer, token[layer]), maxlen=0)
        return pool.counts

    plain = counted(experts, None)
    uses = plain.uses if known else {}
    asked = Counter((layer, e) for token in tokens for layer in layers for e in token[layer])
    assert all(plain.uses[layer][e] == asked[layer, e] for layer in layers for e in range(experts))
    for share in (3, 5, 8, 11, 16):
        own = counted(share, uses)
        assert own.filled > 0 and own.calls == plain.calls and own.uses == plain.uses
        assert sum(own.distances[0]) == own.hits + own.misses == sum(plain.distances[0])
        assert sum(own.distances[0][:share]) == own.hits
        assert own.distances[0][-1] == plain.distances[0][-1] - own.filled
        moved = [a - b for a, b in zip(own.distances[0][:-1], plain.distances[0], strict=False)]
        assert min(moved) >= 0 and sum(moved) == sum(moved[:share]) == own.filled
        use = use_of(own)  # as passes of the run are priced afterwards
        said = use.misses(1, share, experts, per_token=2)
        assert said * own.calls[0] == pytest.approx(own.misses)
        for other in (3, 5, 8, 11, 16):
            if other <= share:
                assert sum(own.distances[0][:other]) == counted(other, uses).hits


@pytest.mark.parametrize("pinned", [True, False])
def test_on_a_gpu_slots_are_filled_in_turn_and_kernels_wait_for_them(pinned):
    """All copies are out of pinned memory; those that come last among the experts lie first."""
    gpu = FakeCuda()
    device, cpu = CudaDevice(0, driver=gpu), torch.device("cpu")
    device.torch_device = cpu  # its memory is real: fake tensors are of one thread
    gpu.computes[cpu] = gpu.compute
    with closing(device):
        homes = [[MemoryHome(allocate_host(1000)) for _ in range(4)] for _ in range(2)]
        for home in homes[0] + homes[1] if pinned else []:
            device.pin(home.image)
        pool = ExpertPool(
            counts={0: 4, 1: 4},
            slots=[device.allocate(1000, "slots") for _ in range(6)],
            per_token=2,
            copy=device.copy,
            compute=device.compute,
            source=lambda layer, expert: homes[layer][expert],
            place=lambda layer, expert: ("", -expert),
            in_file=lambda layer, expert: False,
        )
        pool.fill({})
        wait_until(lambda: pool.filled_bytes >= 6000 and not is_reading(pool))
        held = [pool._held[layer][expert] for layer in range(2) for expert in (3, 2, 1)]
        copies = [at[1] for at in gpu.trace if at[0] == "copy"]
        assert copies == [gpu.names[key(slot.buffer.tensor)] for slot in held]
        for layer, needed in [(0, [3, 2]), (1, [3, 2]), (0, [1, 0]), (1, [1, 0])]:
            for _, buffer in lend(pool, layer, needed):  # the last ones where others were read
                with gpu.lock:
                    slot = gpu.buffers[key(buffer.tensor)]
                    gpu.compute.kernel(reads=[slot], writes=[], seconds=0.5)
        assert (pool.counts.filled, pool.counts.misses) == (6, 2)
        assert gpu.copied_bytes == 8000 and gpu.unpinned_copies == 0


class Waiting:
    """What is offered and has not begun."""

    begun_bytes = 0

    def __init__(self, copy, buffer, source):
        self._copied = copy, buffer, source

    def ask(self):
        copy, buffer, source = self._copied
        copy.copy(buffer, source)
        return copy.record()

    def drop(self):
        return self._copied[0].record()


def test_a_prompt_copies_ahead_what_only_waits_to_be_filled(monkeypatch):
    """A fill that has not begun is behind all else: what a prompt asks for next is in front."""
    pool, copy, _ = pool_of({0: 8, 1: 8}, 16, per_token=2)
    offered = lambda buffer, source, after, last=False: Waiting(copy, buffer, source)  # noqa: E731
    monkeypatch.setattr(copy, "offer", offered)
    pool.fill({})
    assert len(pool.held(1)) == pool.share == 8
    pool.begin(0, 1)
    assert sorted(expert for expert, _ in lend(pool, 0, range(8), rows=20)) == [*range(8)]
    assert [slot.ahead for slot in pool._held[1].values()] == [True] * 8
    pool.begin(1, 1)
    assert sorted(expert for expert, _ in lend(pool, 1, range(8), rows=20)) == [*range(8)]
    assert pool.counts.ahead == 8 and pool.counts.unused == pool.filled_bytes == 0
