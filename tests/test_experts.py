"""Experts one by one: the laws of `streaming/experts.py` and `model/experts.py`."""

import json
import os
import random
import re
import threading
import time
from collections import Counter, deque
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate, reference_model
from expert_models import FAMILIES, MIXTURES, make_mixture
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeExperts

from offload_rt.config import DraftConfig, GenerationConfig, HomeKind, LookAhead, SamplingConfig
from offload_rt.costs.sizes import experts_of as images_of
from offload_rt.device.kinds import CPU, Packing
from offload_rt.device.sim import SimBuffer, SimStream
from offload_rt.engine.decoding import Run
from offload_rt.errors import (
    CheckpointError,
    ConfigError,
    NumbersError,
    PlanError,
    StreamOrderError,
)
from offload_rt.model import config as config_module
from offload_rt.model import experts as experts_module
from offload_rt.model import weight_files as files_module
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.expert_layout import plan_units
from offload_rt.model.network import experts_of
from offload_rt.streaming.experts import Asked, ExpertPool, shares_of


@pytest.fixture(autouse=True)
def empty_slots(monkeypatch):
    """What is counted here is of tokens: nothing is there before."""
    monkeypatch.setattr(ExpertPool, "fill", lambda self, uses: None)


@cache
def resident_answers(folder, steps=3, tokens=6):
    """Logits and an answer with all in memory."""
    with engine_for(folder) as engine:
        assert not engine.placement.streams
        logits = all_logits(engine, steps=steps)
        engine.forget()
        return logits, generate(engine, tokens=tokens)


def layers_of(name):
    """Two, where a file has as many experts for each of them as pools of these tests are for."""
    alike = ("mixtral", "qwen3_moe", "olmoe", "qwen2_moe", "granitemoe")
    return {"num_hidden_layers": 2} if name in alike else {}


# Forms of files, and of the families one whose routers have numbers in fp32, one with states.
IN_BF16 = [name for name in MIXTURES if name not in FAMILIES] + ["deepseek_v3", "qwen3_next"]


@pytest.mark.parametrize("name", IN_BF16)
def test_any_number_of_slots_gives_the_same_bits_as_all_in_memory(make_tiny, name):
    folder = make_mixture(make_tiny, name, dtype="bfloat16", **layers_of(name))
    logits, answer = resident_answers(folder, steps=2, tokens=4)
    # Of two forms each size of a pool, of the others two and each home, of families one.
    places = (3, HomeKind.DISK), (9, HomeKind.HOST), (14, HomeKind.DISK)
    most = 1 if name in FAMILIES else 3 if name in ("mixtral", "gpt_oss") else 2
    for slots, home in places[:most]:
        with engine_for(folder, expert_slots=slots, home=home) as engine:
            assert engine.placement.expert_slots == slots
            assert generate(engine, tokens=4) == answer
            engine.forget()
            assert torch.equal(all_logits(engine, steps=2), logits)  # whatever came before


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_have_the_bits_of_all_in_memory_and_are_those_of_transformers(make_tiny, name):
    folder = make_mixture(make_tiny, name, **layers_of(name))
    with engine_for(folder) as engine:
        assert not engine.placement.streams
        resident = all_logits(engine)
    with engine_for(folder, expert_slots=5) as engine, torch.no_grad():
        ours = all_logits(engine)
        theirs = reference_model(folder)(torch.tensor([PROMPT + PROMPT[:3]])).logits[0]
    assert torch.equal(ours, resident)
    theirs = theirs[len(PROMPT) - 1 :]
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("readers", [1, 5])
def test_the_order_of_arrival_changes_nothing(make_tiny, readers, monkeypatch):
    folder = make_mixture(make_tiny, "mixtral", dtype="bfloat16")
    expected, _ = resident_answers(folder)
    dice, lock = random.Random(readers), threading.Lock()

    def preadv(fd, buffers, offset):
        with lock:
            delay = dice.random() * 5e-4
        time.sleep(delay)
        return os.preadv(fd, buffers, offset)

    monkeypatch.setattr(files_module, "PIECE_BYTES", 4096)
    monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "preadv", preadv)
    with engine_for(folder, expert_slots=7, readers=readers) as engine:
        assert torch.equal(all_logits(engine), expected)


def test_places_are_summed_in_their_order_whoever_came_first(monkeypatch):
    """Of one layer, as a model's residual stream is too large to show the last bits of a sum."""
    torch.manual_seed(0)
    config = {"hidden_size": 64, "intermediate_size": 32, "num_experts": 8}
    module = OlmoeExperts(OlmoeConfig(**config, num_experts_per_tok=3)).requires_grad_(False)
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    index = torch.stack([torch.randperm(8)[:3] for _ in range(9)])
    hidden, weights = torch.randn(9, 64), torch.rand(9, 3)

    def computed(*places):
        return experts_module.compute_experts(module, hidden, index[:, places], weights[:, places])

    expected = computed(0, 1, 2)
    assert not torch.equal(computed(2, 1, 0), expected)  # another order has other bits
    own, dice = experts_module._own, random.Random(1)

    def in_any_order(*args):
        found = [(expert, dict(lent)) for expert, lent in own(*args)]
        return dice.sample(found, len(found))

    monkeypatch.setattr(experts_module, "_own", in_any_order)
    assert all(torch.equal(computed(0, 1, 2), expected) for _ in range(9))


def traced(engine):
    """What each layer asks for from now on: layer, experts, those held before and after."""
    pool, trace = engine.runner.experts, []
    lend = pool.lend

    def watched(layer, asked):
        pool.begin(layer, 1) if layer != pool._layer else None
        before = [e for e, slot in pool._held[layer].items() if not slot.ahead]
        yield from lend(layer, asked)
        trace.append((layer, list(asked.needed), before))

    pool.lend = watched
    return trace


def lru_hits(trace, share):
    """Twenty lines: hits of a least recently used order of each layer."""
    held, hits = {}, 0
    for layer, needed, _ in trace:
        own = held.setdefault(layer, deque())
        hits += sum(expert in own for expert in needed)
        for expert in needed:
            if expert in own:
                own.remove(expert)
            own.append(expert)
        while len(own) > share:
            own.popleft()
    return hits


@pytest.mark.parametrize("slots", [4, 7, 10, 16])
def test_hits_are_those_of_a_least_recently_used_order(make_tiny, slots):
    folder = make_mixture(make_tiny, num_hidden_layers=2)
    with engine_for(folder, expert_slots=slots, tokens=40) as engine:
        engine.forward([(0, PROMPT[:1])], reuse=True)
        pool = engine.runner.experts
        for layer in range(2):
            pool._free += pool._held[layer].values()
            pool._held[layer].clear()
        trace, before = traced(engine), (pool.counts.hits, pool.counts.misses)
        for token in PROMPT * 2:
            engine.forward([(0, [token])], reuse=False)
        hits, misses = pool.counts.hits - before[0], pool.counts.misses - before[1]
    assert hits + misses == sum(len(needed) for _, needed, _ in trace) == 2 * len(PROMPT) * 2 * 2
    assert hits == lru_hits(trace, pool.share) > 0


def test_hits_of_every_size_are_in_one_histogram(make_tiny):
    """Stack distances of one run are the hits of runs with other numbers of slots."""
    folder, counts = make_mixture(make_tiny, num_hidden_layers=2), {}
    for slots in (4, 8, 12, 16):
        with engine_for(folder, expert_slots=slots, tokens=40) as engine:
            for token in PROMPT * 2:
                engine.forward([(0, [token])], reuse=False)
            counts[engine.runner.experts.share] = engine.runner.experts.counts
    for share, own in counts.items():
        for other in counts.values():
            assert sum(other.distances[0][:share]) == own.hits


@pytest.mark.parametrize("name", ["mixtral", "granitemoe"])
def test_bytes_read_are_those_of_the_misses_none_twice_in_a_pass(make_tiny, name):
    folder = make_mixture(make_tiny, name, dtype="bfloat16")
    with engine_for(folder, expert_slots=9, tokens=40) as engine:
        units, pool = engine.network.units, engine.runner.experts
        engine.device.copy.record().synchronize()
        for part in [PROMPT[:1]] * 3 + [PROMPT[:5]] * 3:
            trace, copied = traced(engine), engine.counters().bytes_copied
            engine.forward([(0, part)], reuse=False)
            engine.device.copy.record().synchronize()
            missed = [(at, e) for at, needed, held in trace for e in needed if e not in held]
            assert len(missed) == len(set(missed))
            read = engine.counters().bytes_copied - copied
            assert read == sum(units[layer][e].file_bytes for layer, e in missed)
        assert pool.counts.misses > 0 == pool.counts.ahead


def test_a_prompt_in_parts_reads_each_expert_once(make_tiny):
    """As long as the pool holds the experts of a layer; then decoding begins with its share."""
    folder, prompt = make_mixture(make_tiny), [3 + i * 7 % 250 for i in range(60)]
    with engine_for(folder, prompts=[prompt], expert_slots=9) as engine:
        engine.device.copy.record().synchronize()
        copied = engine.counters().bytes_copied
        engine.forward([(0, prompt)], reuse=True)
        engine.device.copy.record().synchronize()
        pool, counts = engine.runner.experts, engine.runner.experts.counts
        assert counts.misses <= 4 * 8 < counts.hits and counts.ahead > 8
        each = engine.network.units[0][0].file_bytes
        read = engine.counters().bytes_copied - copied
        assert read == (counts.misses + counts.unused) * each
        pool.begin(0, 1)
        assert all(len(pool.held(layer)) in (0, 1, 2) for layer in range(4))
        assert len(pool.held(3)) == pool.share


def test_a_trace_and_a_report_tell_what_was_copied_ahead(make_tiny):
    folder, prompt = make_mixture(make_tiny), [3 + i * 7 % 250 for i in range(60)]
    options = {"expert_slots": 20, "look_ahead": LookAhead.OFF}
    with engine_for(folder, prompts=[prompt], tokens=4, **options) as engine:
        tracer = engine.trace()
        run = Run.start(engine, [prompt], SamplingConfig(), GenerationConfig(max_tokens=4))
        run.prefill()
        while run.active:
            run.step()
        names = Counter(event.name for event in tracer.events())
        ahead = sum(count for name, count in names.items() if name.endswith(", ahead"))
        copied = ahead + sum(c for name, c in names.items() if re.fullmatch(COPIED, name))
        found, counts = run.report().experts, engine.runner.experts.counts
    assert found.prompt_ahead == counts.ahead > 8 and found.ahead == 0
    assert ahead == counts.ahead + counts.unused == found.prompt_ahead + found.prompt_unused
    assert counts.misses == found.misses + found.prompt_misses
    assert copied == counts.misses + counts.unused
    assert any(name.startswith("wait for expert ") for name in names)


COPIED = r"expert \d of layer \d"


@pytest.mark.parametrize("layers", [1, 3])
def test_a_pass_that_asks_for_more_than_there_is_does_not_lose_all_it_has(layers):
    """A cycle through more experts than slots: those that are there come first and are hits.

    Of several layers each keeps its share; one order for all would have replaced every expert of a
    pass by the time the next one asks for it.
    """
    pool = pool_of(dict.fromkeys(range(layers), 16), slots=8 * layers, per_token=2)[0]
    for turn in range(4):
        for layer in range(layers):
            lent = [expert for expert, _ in lend(pool, layer, range(12), rows=6)]
            assert sorted(lent) == list(range(12))
        assert pool.counts.hits == 8 * layers * turn


def pool_of(counts, slots, per_token):
    """A pool on simulated streams, where any access that is not ordered raises."""
    copy, compute = SimStream("copy", 1e3), SimStream("compute")
    homes = {(layer, e): SimBuffer(1000) for layer, count in counts.items() for e in range(count)}
    pool = ExpertPool(
        counts=counts,
        slots=[SimBuffer(1000) for _ in range(slots)],
        per_token=per_token,
        copy=copy,
        compute=compute,
        source=lambda layer, expert: homes[layer, expert],
        place=lambda layer, expert: ("", expert),
        in_file=lambda layer, expert: expert % 2 == 1,
    )
    return pool, copy, compute


def lend(pool, layer, *asked, **named):
    """The experts that a pool lends, one after the other; the rest as of `Asked`."""
    for group in pool.lend(layer, Asked(*asked, **named)):
        yield from group


def test_no_slot_is_overwritten_before_it_was_computed_from():
    """Random passes of several layers; breaking off leaves the pool good, too."""
    dice = random.Random(3)
    for slots in (2, 3, 7, 20):
        pool, _, compute = pool_of({0: 8, 1: 8, 2: 4}, slots, per_token=2)
        for _ in range(60):
            for layer, count in ((0, 8), (1, 8), (2, 4)):
                parts = dice.choice([1, 1, 3])
                pool.begin(layer, parts)
                for _ in range(parts):
                    needed = dice.sample(range(count), dice.randint(1, count))
                    lent = lend(pool, layer, needed)
                    for number, (_, buffer) in enumerate(lent):
                        compute.kernel(reads=[buffer], writes=[], seconds=0.5)
                        if dice.random() < 0.02:
                            lent.close()
                            break
                        assert number < len(needed)
            held = [len(pool.held(layer)) for layer in range(3)]
            assert sum(held) + len(pool._free) == slots


def through_layers(pool, compute, layers, parts, seconds):
    """Rows that ask for all experts of each layer, in so many parts; returns when they are done."""
    for layer in layers:
        pool.begin(layer, parts)
        for _ in range(parts):
            for _, buffer in lend(pool, layer, range(8), rows=99):
                compute.kernel(reads=[buffer], writes=[], seconds=seconds / parts)
    return compute.time_s


@pytest.mark.parametrize(("slots", "parts"), [(40, 2), (16, 2), (24, 1), (3, 1)])
@pytest.mark.parametrize("seconds", [0.7, 1.4])
def test_a_prompt_takes_the_time_of_its_reads_or_of_its_computing(slots, parts, seconds):
    """An expert is read in 1 s; the first is waited for, and the last computed, alone."""
    pool, copy, compute = pool_of(dict.fromkeys(range(5), 8), slots, per_token=2)
    took_s = through_layers(pool, compute, range(5), parts, seconds)
    counts = pool.counts
    assert copy.statistics().bytes_copied == 5 * 8 * 1000
    assert (counts.misses, counts.unused) == (5 * 8, 0) and counts.ahead >= 4 * min(7, slots - 1)
    alone_s = 8.0 if parts > 1 else 3.0  # of the first layer all are there before the last part
    assert took_s <= max(40.0, 40 * seconds) + alone_s


def test_what_was_copied_ahead_in_vain_is_counted_and_given_up_first():
    pool, copy, _ = pool_of({0: 8, 1: 8, 2: 8}, 24, per_token=2)
    for layer, needed in ((0, range(8)), (1, [3]), (2, [1])):
        for _ in lend(pool, layer, needed):
            pass
    pool.begin(0, 1)
    counts, read = pool.counts, copy.statistics().bytes_copied // 1000
    assert (counts.hits, counts.misses, counts.ahead) == (0, 8 + 1 + 1, 1)
    assert pool.held(1)[-1] == 3 and len(pool.held(1)) == pool.share == 8
    assert counts.unused == 0 and read == 8 + 8 + 1  # seven may still be asked for
    for expert in range(8):
        for _ in lend(pool, 1, [expert]):
            pass
    assert (counts.hits, counts.misses, counts.ahead) == (1, 8 + 1 + 1 + 7, 8)
    small = pool_of({0: 8, 1: 8, 2: 8}, 12, per_token=2)[0]
    for layer, needed in ((0, range(8)), (1, [3]), (2, [1])):
        for _ in lend(small, layer, needed):
            pass
    assert small.counts.ahead == 1 and small.counts.unused == 8 - small.share
    assert 3 in small.held(1)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_layer_keeps_its_share_for_what_its_last_rows_asked_for(parts):
    pool = pool_of({0: 8, 1: 8}, 12, per_token=2)[0]
    pool.begin(0, parts)
    for _ in range(parts):
        for _ in lend(pool, 0, range(8)):
            pass
    assert pool.held(0) == list(range(8 - pool.share, 8)) and len(pool.held(1)) == 12 - pool.share


def test_a_wait_that_is_left_out_is_found(monkeypatch):
    monkeypatch.setattr(SimStream, "wait", lambda stream, event: None)
    pool, _, compute = pool_of({0: 4}, 2, per_token=2)
    with pytest.raises(StreamOrderError):
        for _, buffer in lend(pool, 0, [0, 1]):
            compute.kernel(reads=[buffer], writes=[], seconds=1.0)


def test_shares_leave_a_token_room():
    assert shares_of(480, 30, 4) == (16, 0)
    assert shares_of(9, 4, 2) == (2, 1)
    assert shares_of(7, 4, 2) == (1, 3)
    assert shares_of(2, 4, 2) == (0, 2)
    for slots in range(4, 200):
        share, spare = shares_of(slots, 7, 4)
        assert 7 * share + spare == slots and share + spare >= 4


def test_a_read_error_ends_the_pass_with_the_files_sentence(make_tiny, monkeypatch):
    folder, broken = make_mixture(make_tiny), []

    def preadv(fd, buffers, offset):
        if broken:
            raise OSError(5, "Input/output error")
        return os.preadv(fd, buffers, offset)

    monkeypatch.setitem(files_module.WeightFiles.__init__.__kwdefaults__, "preadv", preadv)
    with engine_for(folder, expert_slots=4) as engine:
        all_logits(engine)
        broken.append(True)
        with pytest.raises(CheckpointError, match="Input/output error; check the disk"):
            all_logits(engine, prompt=PROMPT[::-1])


def test_a_file_that_changes_ends_the_run(make_tiny, tmp_path):
    folder = copied(make_mixture(make_tiny), tmp_path)
    with engine_for(folder, expert_slots=4) as engine:
        all_logits(engine)
        path = folder / "model.safetensors"
        with path.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\1" * 8)
        with pytest.raises(CheckpointError, match="changed while running"):
            all_logits(engine, prompt=PROMPT[::-1])


def test_an_interrupted_pass_leaves_no_trace(make_tiny):
    folder = make_mixture(make_tiny)
    expected, _ = resident_answers(folder)
    with engine_for(folder, expert_slots=5) as engine:
        left = iter(range(7))

        def poll():
            if next(left, None) is None:
                raise KeyboardInterrupt

        engine.network.poll = poll
        with pytest.raises(KeyboardInterrupt):
            engine.forward([(0, PROMPT)], reuse=True)
        engine.network.poll = lambda: None
        assert torch.equal(all_logits(engine), expected)


def test_swapped_experts_and_an_evicted_slot_are_seen(make_tiny, monkeypatch):
    """What the first law would not show if all experts computed alike."""
    folder = make_mixture(make_tiny)
    expected, _ = resident_answers(folder)
    with engine_for(folder, expert_slots=9) as engine:
        pool = engine.runner.experts
        source = pool._source
        pool._source = lambda layer, expert: source(layer, {0: 1, 1: 0}.get(expert, expert))
        assert not torch.equal(all_logits(engine), expected)
    with engine_for(folder, expert_slots=3) as engine:
        pool = engine.runner.experts
        take = pool._take
        monkeypatch.setattr(pool, "_take", lambda layer, lent: take(layer, set()))
        with pytest.raises((KeyError, AssertionError)):
            all_logits(engine)


@pytest.mark.parametrize("draft", ["ngram", "model:{}"])
def test_greedy_with_a_drafter_is_greedy_without(make_tiny, draft):
    folder = make_mixture(make_tiny)
    _, plain = resident_answers(folder)
    config = DraftConfig(draft=draft.format(folder), draft_tokens=5)
    with engine_for(folder, expert_slots=6, draft=config) as engine:
        assert generate(engine, tokens=6) == plain


def test_memory_keeps_to_the_plan_and_all_that_is_left_is_slots(make_tiny):
    folder = make_mixture(
        make_tiny,
        "mixtral",
        hidden_size=256,
        intermediate_size=512,
        num_local_experts=16,
        num_hidden_layers=2,
        dtype="bfloat16",
    )
    options = {"prefill_chunk_tokens": 512}
    with pytest.raises(PlanError) as refusal, engine_for(folder, device_limit_bytes=1, **options):
        pass
    least = -(-refusal.value.needed_bytes // 2**18) * 2**18
    fewest = None
    for limit in (least, least + 5 * 2**20):
        with engine_for(folder, device_limit_bytes=limit, **options) as engine:
            generate(engine)
            placement, ledger = engine.placement, engine.device.ledger()
            experts = placement.demand.experts
            assert placement.resident == (0, 1) and not placement.streamed
            assert ledger["experts"] == placement.expert_slots * experts.slot_bytes
            assert ledger["resident layers"] == sum(experts.rest_bytes)
            assert engine.memory().device_peak_bytes <= placement.device_bytes <= limit
            assert limit - placement.device_bytes < experts.slot_bytes
            fewest = fewest or placement.expert_slots
    assert fewest == experts.per_token < placement.expert_slots < experts.count


def test_too_few_slots_are_refused_with_the_number(make_tiny):
    folder = make_mixture(make_tiny, "olmoe")
    with (
        pytest.raises(PlanError, match="is sent to 3 experts of a layer at once: use 3 or more"),
        engine_for(folder, expert_slots=2),
    ):
        pass


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"expert_slots": 33}, "--expert-slots is 33, the model has 32 experts"),
        ({"expert_slots": 9, "slots": 2}, "leave out one of them"),
        ({"expert_slots": 9, "device": "cpu,cpu"}, "--expert-slots is for one device"),
    ],
)
def test_options_that_contradict_are_errors(make_tiny, config, message):
    if config.get("device"):
        config = config | {"link_bytes_per_s": (1e9, 1e9), "home": HomeKind.HOST}
    with pytest.raises(ConfigError, match=message), engine_for(make_mixture(make_tiny), **config):
        pass


def test_slots_of_experts_have_no_effect_on_a_dense_model(tiny_model):
    with (
        pytest.raises(ConfigError, match="no effect, as this model has no experts: leave it out"),
        engine_for(tiny_model, expert_slots=4),
    ):
        pass


def test_no_slots_stream_whole_layers(make_tiny):
    sizes = {"hidden_size": 128, "moe_intermediate_size": 256, "num_hidden_layers": 3}
    folder = make_mixture(make_tiny, num_experts=32, **sizes)
    with pytest.raises(PlanError) as refusal, engine_for(folder, device_limit_bytes=1):
        pass
    limit = refusal.value.needed_bytes + 20 * 2**20
    with engine_for(folder, device_limit_bytes=limit, expert_slots=0) as engine:
        assert engine.placement.streamed and not engine.placement.expert_slots
        whole = all_logits(engine)
    with engine_for(folder, device_limit_bytes=limit) as engine:
        assert engine.placement.expert_slots and not engine.placement.streamed
        assert torch.equal(all_logits(engine), whole)


# ---- files ----


def copied(folder, target, change=None):
    """The model with other tensors."""
    for path in folder.iterdir():
        if path.name != "model.safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_each_expert_of_a_file_is_one_run_of_bytes(make_tiny):
    """Neighbours of one file are read at once; pages of several experts may overlap."""
    for name in ("mixtral", "qwen3_moe"):
        checkpoint = open_checkpoint(make_mixture(make_tiny, name, dtype="bfloat16"))
        units = plan_units(experts_of(checkpoint, "bfloat16"), "bfloat16", Packing.FILE)
        assert [len(unit.runs) for own in units.values() for unit in own] == [1] * 32
    checkpoint = open_checkpoint(make_mixture(make_tiny, "gpt_oss", dtype="bfloat16"))
    units = plan_units(experts_of(checkpoint, "bfloat16"), "bfloat16", Packing.FILE)
    assert {len(unit.runs) for own in units.values() for unit in own} == {2}


def test_experts_over_several_shards(make_tiny, tmp_path):
    folder = make_mixture(make_tiny, "mixtral")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    where = {}
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        mine = names[shard::3]
        save_file({name: tensors[name] for name in mine}, tmp_path / file, {"format": "pt"})
        where |= dict.fromkeys(mine, file)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    expected, _ = resident_answers(tmp_path)
    with engine_for(tmp_path, expert_slots=5) as engine:
        assert {len(unit.runs) for unit in engine.network.units[0]} <= {2, 3}
        assert torch.equal(all_logits(engine), expected)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "mixtral",
            lambda t: t.update({SECOND: t[SECOND][:, :100].contiguous()}),
            r"expert 1 has .*down_proj' \[64, 100\].*expert 0 has .*'down_proj' \[64, 128\]",
        ),
        ("mixtral", lambda t: t.pop(SECOND), "expert 1 has .*expert 0 has .*down_proj"),
        (
            "granitemoe",
            lambda t: t.update({FUSED: t[FUSED][:7].contiguous()}),
            r"\[7, 256, 64\]: does not divide into the 8 experts",
        ),
    ],
)
def test_experts_that_are_not_alike_are_refused(make_tiny, tmp_path, name, change, message):
    folder = copied(make_mixture(make_tiny, name), tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        experts_of(open_checkpoint(folder), "float32")
    for slots in (4, 0):
        with pytest.raises(CheckpointError), engine_for(folder, expert_slots=slots):
            pass


SECOND = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
FUSED = "model.layers.2.block_sparse_moe.input_linear.weight"


def test_a_router_of_no_numbers_is_named(make_tiny, tmp_path):
    def break_router(tensors):
        tensors["model.layers.1.mlp.gate.weight"][3] = float("nan")

    folder = copied(make_mixture(make_tiny), tmp_path, break_router)
    with (
        engine_for(folder, expert_slots=9) as engine,
        pytest.raises(NumbersError, match=r"from layer 1 on.*mlp\.gate\.weight"),
    ):
        generate(engine)


def test_more_experts_a_token_than_there_are_is_refused(make_tiny, tmp_path):
    folder = copied(make_mixture(make_tiny), tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"num_experts_per_tok": 9}
    (folder / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(CheckpointError, match="sent to 9 experts of a layer, which has 8"),
        engine_for(folder),
    ):
        pass


def test_a_family_that_passes_the_interface_by_is_streamed_whole(
    make_tiny, monkeypatch, offload_run
):
    """Whoever computes experts in a way of its own: found out by the pass over shapes."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    def loop(self, hidden, top_k_index, top_k_weights):
        return hidden * self.down_proj.mean()  # needs the weights

    monkeypatch.setattr(modeling_qwen3_moe.Qwen3MoeExperts, "forward", loop)
    sizes = {"max_position_embeddings": 99, "moe_intermediate_size": 256, "hidden_size": 128}
    folder = make_mixture(make_tiny, "qwen3_moe", **sizes)
    checkpoint = open_checkpoint(folder)
    found = experts_of(checkpoint, "float32")
    assert not found.layers and "does not compute its experts by" in found.reason
    with pytest.raises(PlanError) as refusal, engine_for(folder, device_limit_bytes=1):
        pass
    limit = refusal.value.needed_bytes + checkpoint.layer_bytes(0)
    with engine_for(folder, device_limit_bytes=limit) as engine, torch.no_grad():
        assert engine.placement.streamed and engine.runner.experts is None
        ours = all_logits(engine)
        theirs = reference_model(folder)(torch.tensor([PROMPT + PROMPT[:3]])).logits[0]
    theirs = theirs[len(PROMPT) - 1 :]
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    with (
        pytest.raises(ConfigError, match="no effect, as this family does not compute its experts"),
        engine_for(folder, expert_slots=9),
    ):
        pass
    asked = ("plan", folder, "--context", 64, "--draft", "none", "--device-memory")
    done = offload_run(*asked, f"{limit}B", "--json")
    assert done.code == 0, done.err
    assert "does not compute its experts by" in json.loads(done.out)["whole_because"]


def test_experts_by_a_name_that_is_not_known_are_found_by_their_tensors(make_tiny, monkeypatch):
    number = config_module._NUMBERS["experts"]
    monkeypatch.setitem(config_module._NUMBERS, "experts", (("no_such_name",), *number[1:]))
    checkpoint = open_checkpoint(make_mixture(make_tiny))
    assert not checkpoint.config.has_experts and checkpoint.has_experts
    assert not isinstance(images_of(checkpoint, "float32", CPU), str)


@given(
    st.lists(st.integers(1, 100), min_size=1, max_size=12),
    st.integers(1, 130),
)
def test_experts_at_once_have_few_rows(counts, most):
    """What a pass takes besides its slots is bounded: one expert may have more rows, alone."""
    lent = [(expert, {}) for expert in range(len(counts))]
    places = {expert: range(count) for expert, count in enumerate(counts)}
    groups = list(experts_module._cut(lent, places, most))
    assert [one for group in groups for one in group] == lent
    for group in groups:
        assert len(group) == 1 or sum(counts[expert] for expert, _ in group) <= most


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
def test_a_matrix_has_the_outputs_that_it_has_however_it_lies(transposed, concatenated):
    """Aria's are transposed and have gate and up one after the other."""
    module = SimpleNamespace(is_transposed=transposed, is_concatenated=concatenated)
    whole = torch.empty(12, 40) if transposed else torch.empty(40, 12)
    assert experts_module._outputs(module, {"gate_up_proj": whole}, "gate_up_proj") == 40
    halves = {"gate_up_proj.0": torch.empty(20, 12), "gate_up_proj.1": torch.empty(20, 12)}
    if not transposed:
        assert experts_module._outputs(module, halves, "gate_up_proj") == 40
