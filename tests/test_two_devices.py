"""Two devices that have a model's layers in turn: where they are, and that no bit changes."""

import dataclasses
import json
import re
from contextlib import suppress

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate
from hybrids import make_hybrid
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import DEEP

from offload_rt.config import (
    DraftConfig,
    DraftShape,
    DraftWeights,
    HomeKind,
    KVPlace,
    RetrievalConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.costs.machine import FreeMemory
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.errors import ConfigError, PlanError
from offload_rt.kv.sizes import KV_SLOTS, plan_kv
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.planning.fit import RunLoad, place_run
from offload_rt.planning.placement import Demand, Stripe, place
from offload_rt.planning.striping import place_striped, smallest_limits, with_spare_blocks

MIB = 2**20
LAYERS = 6
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LINKS = {"link_bytes_per_s": (1e9, 1e9), "home": HomeKind.HOST}


@st.composite
def demands(draw):
    layers = draw(st.integers(2, 60))
    size = draw(st.integers(1, 300 * MIB))
    uneven = draw(st.booleans())
    return Demand(
        layer_bytes=tuple(size + (i * MIB if uneven else 0) for i in range(layers)),
        base_bytes=draw(st.integers(0, 500 * MIB)),
        kv_bytes=layers * draw(st.integers(0, 20 * MIB)),
        workspace_bytes=draw(st.integers(0, 300 * MIB)),
        further_bytes=draw(st.integers(0, 300 * MIB)),
        drafter_bytes=(beside := draw(st.integers(0, 9 * MIB))) * layers + MIB,
        beside_bytes=(beside,) * layers,
    )


@st.composite
def machines(draw):
    sizes = st.integers(2**30, 20 * 2**30)
    rates = st.floats(1.0, 4.0)
    return [
        Stripe(name=f"cuda:{i}", limit_bytes=draw(sizes), link_bytes_per_s=draw(rates))
        for i in range(draw(st.integers(2, 3)))
    ]


def with_states(demand, every):
    """The same of a model of which every so-manieth layer attends, and the others keep a state."""
    layers = range(len(demand.layer_bytes))
    attends = [(i + 1) % every == 0 for i in layers]
    kv = tuple(demand.kv_bytes if each else 0 for each in attends)
    states = tuple(0 if each else 3 * MIB for each in attends)
    changed = {"kv_bytes": sum(kv), "kv_layer_bytes": kv, "state_bytes": states}
    return dataclasses.replace(demand, **changed)


@given(
    demand=demands() | st.builds(with_states, demands(), st.integers(1, 4)),
    stripes=machines(),
    slots=st.none() | st.integers(1, 3),
)
def test_each_device_keeps_its_limit_and_each_layer_has_one(demand, stripes, slots):
    try:
        made = place_striped(demand, stripes, slots=slots)
    except (PlanError, ConfigError):
        assume(False)
    layers = range(len(demand.layer_bytes))
    assert sorted(i for own in made.shares for i in own.layers) == list(layers)
    assert made.layers == list(layers)
    assert made.device == tuple(
        next(d for d, own in enumerate(made.shares) if i in own.layers) for i in layers
    )
    for own, stripe in zip(made.shares, stripes, strict=True):
        assert own.device_bytes <= own.device_limit_bytes == stripe.limit_bytes
        assert bool(own.slots) == bool(own.streamed)
    # All that is in a layer is counted once, and what is in none on the first.
    fixed = sum(own.demand.fixed_bytes for own in made.shares)
    assert fixed == demand.fixed_bytes + demand.further_bytes * (len(stripes) - 1)
    assert made.device_bytes == sum(own.device_bytes for own in made.shares)


@given(
    limits=st.lists(st.integers(300 * MIB, 3000 * MIB), min_size=1, max_size=3),
    row_kib=st.integers(1, 16),
    capacities=st.lists(st.integers(1000, 60_000), min_size=1, max_size=2),
    unit=st.sampled_from([1, 2 * MIB]),
)
def test_what_is_left_of_every_device_is_for_blocks_of_kv(limits, row_kib, capacities, unit):
    row_bytes = [1024 * row_kib] * LAYERS
    kv = plan_kv(
        KVPlace.HOST,
        RuntimeConfig(),
        CUDA,
        row_bytes=row_bytes,
        capacities=capacities,
        scratch_tokens=8,
    )
    demand = Demand(
        layer_bytes=(10 * MIB,) * LAYERS,
        base_bytes=MIB,
        kv_bytes=kv.device_bytes,
        workspace_bytes=MIB,
        further_bytes=MIB,
        kv=kv,
    )
    stripes = [Stripe(name=f"cuda:{i}", limit_bytes=limit) for i, limit in enumerate(limits)]
    try:
        made = with_spare_blocks(place_striped(demand, stripes), unit)
    except (PlanError, ConfigError):
        assume(False)
    before = {s.slots for s in kv.sizes}
    assert before == {KV_SLOTS}
    full = True
    for share in made.of_devices:
        assert share.device_bytes <= share.device_limit_bytes
        assert share.demand.kv_bytes == share.demand.kv.device_bytes
        blocks = sum(-(-s.slot_bytes // unit) * unit for s in kv.sizes)
        full &= share.device_limit_bytes - share.device_bytes >= blocks
        assert [s.slots for s in share.demand.kv.sizes] == [s.slots for s in made.demand.kv.sizes]
    layers = max(len(share.layers) for share in made.of_devices)
    most = [max(KV_SLOTS, layers * -(-s.capacity // s.block_tokens)) for s in kv.sizes]
    slots = [s.slots for s in made.demand.kv.sizes]
    assert all(KV_SLOTS <= n <= up_to for n, up_to in zip(slots, most, strict=True))
    assert not full or slots == most  # else no device has room for another block


@pytest.mark.parametrize(
    ("kind", "config", "grows"),
    [
        (CUDA, {"device": "cuda", "kv": KVPlace.HOST}, True),
        (CUDA, {"device": "cuda", "kv": KVPlace.HOST, "kv_block_tokens": 512}, False),
        (CPU, {"device": "cpu", "kv": KVPlace.DISK}, False),
    ],
)
def test_a_gpu_holds_as_many_blocks_of_kv_as_it_has_room_for(make_tiny, kind, config, grows):
    checkpoint = open_checkpoint(make_tiny("llama", **IDS))
    free = FreeMemory(device_bytes=2**32, host_bytes=2**34)
    load = RunLoad(capacities=[900_000], prompt_tokens=32)
    placed = place_run(checkpoint, RuntimeConfig(**config), kind, load=load, free=free)
    (sizes,) = placed.demand.kv.sizes
    blocks = len(sizes.row_bytes) * -(-sizes.capacity // sizes.block_tokens)
    assert blocks > KV_SLOTS and sizes.slots == (blocks if grows else KV_SLOTS)


@given(demand=demands(), stripes=machines())
def test_each_device_fills_its_own_memory_and_no_link_has_a_layer_too_many(demand, stripes):
    demand = dataclasses.replace(
        demand, layer_bytes=(max(demand.layer_bytes),) * len(demand.layer_bytes)
    )
    try:
        made = place_striped(demand, stripes)
    except (PlanError, ConfigError):
        assume(False)
    layer = demand.layer_bytes[0]
    busy = [len(o.streamed) / s.link_bytes_per_s for o, s in zip(made.shares, stripes, strict=True)]
    for own, stripe in zip(made.shares, stripes, strict=True):
        if own.streamed:  # in place of a slot another layer stays, if all but the ring is full
            spare = own.device_limit_bytes - own.device_bytes
            assert spare < layer or own.slots > 2
        # With one layer more it would be the busiest, unless it has no room for its KV.
        more = (len(own.streamed) + 1) / stripe.link_bytes_per_s
        kv = (
            demand.share([0, 1], first=False).fixed_bytes
            - demand.share([0], first=False).fixed_bytes
        )
        room = own.device_limit_bytes - own.device_bytes
        assert more >= max(busy) - 1e-9 or room < layer + kv or max(busy) == 0


@given(demand=demands(), limit=st.integers(1, 40 * 2**30), slots=st.none() | st.integers(1, 6))
def test_one_device_is_placed_as_ever(demand, limit, slots):
    def tried(make):
        try:
            return make()
        except (PlanError, ConfigError) as error:
            return str(error)

    stripe = Stripe(name="cuda:0", limit_bytes=limit)
    one = tried(lambda: place_striped(demand, [stripe], slots=slots))
    assert one == tried(lambda: place(demand, limit, slots=slots))


@given(demand=demands(), stripes=machines())
def test_a_refusal_names_the_device_and_limits_that_work(demand, stripes):
    try:
        made = place_striped(demand, stripes)
    except ConfigError:  # a device without layers
        assume(False)
    except PlanError as error:
        said = re.search(r"^(cuda:\d) needs .* use --device-memory ([0-9MiB,]+),", str(error))
        assert said is not None
        limits = [int(part.removesuffix("MiB")) * MIB for part in said[2].split(",")]
        assert limits[int(said[1][-1])] > stripes[int(said[1][-1])].limit_bytes
    else:
        limits = smallest_limits(made)
    roomy = [dataclasses.replace(s, limit_bytes=n) for s, n in zip(stripes, limits, strict=True)]
    with suppress(ConfigError):  # it fits, though a device has no layer
        place_striped(demand, roomy)


def test_layers_that_are_sent_come_in_turn():
    demand = Demand(layer_bytes=(MIB,) * 10, base_bytes=0, kv_bytes=0, workspace_bytes=0)
    two = [Stripe(name=name, limit_bytes=2 * MIB) for name in ("a", "b")]
    made = place_striped(demand, two, resident_layers=0)
    assert made.device == (0, 1) * 5
    slow = [two[0], dataclasses.replace(two[1], link_bytes_per_s=0.25)]
    assert place_striped(demand, slow, resident_layers=0).device.count(1) == 2
    roomy = [dataclasses.replace(stripe, limit_bytes=99 * MIB) for stripe in two]
    assert place_striped(demand, roomy).device == (0,) * 5 + (1,) * 5  # nothing is sent


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny("llama", num_hidden_layers=LAYERS, dtype="bfloat16")


@pytest.fixture(scope="module")
def resident_logits(model):
    with engine_for(model) as engine:
        return all_logits(engine)


@pytest.mark.parametrize(("resident", "slots"), [(0, 1), (0, 3), (1, 2), (3, None)])
def test_two_devices_change_no_bit(model, resident_logits, resident, slots):
    options = LINKS | {"resident_layers": resident, "slots": slots}
    with engine_for(model, device="cpu,cpu", **options) as engine:
        assert len(set(engine.placement.device)) == len(engine.devices) == 2
        assert torch.equal(all_logits(engine), resident_logits)
        for device in engine.devices:
            device.copy.record().synchronize()
        halves = [device.copy.statistics().bytes_copied for device in engine.devices]
        assert engine.counters().bytes_copied == sum(halves)
        assert min(halves) > 0.3 * max(halves)


def test_two_devices_without_a_ring(model, resident_logits):
    """All resident, as on two GPUs: in a row."""
    with engine_for(model, device="cpu,cpu") as engine:
        assert engine.placement.device == (0,) * 3 + (1,) * 3
        assert torch.equal(all_logits(engine), resident_logits)


def test_two_devices_have_the_recurrent_states_of_their_layers(make_tiny):
    folder, prompt = make_hybrid(make_tiny, "lfm2"), PROMPT * 2
    room = {"prompts": [prompt], "draft": DraftConfig(draft="ngram", draft_tokens=4)}
    with engine_for(folder, **room) as engine:
        expected = generate(engine, [prompt])
    with engine_for(folder, device="cpu,cpu", resident_layers=1, **room) as engine:
        mixers = {mixer.layer for mixer in engine.network.mixers}
        assert all(mixers & {*own.layers} for own in engine.placement.shares)
        assert generate(engine, [prompt]) == expected
        states = sum(sum(own.demand.state_bytes) for own in engine.placement.shares)
        assert engine.devices.ledger()["recurrent states"] == states > 0


def test_a_pass_that_breaks_off_leaves_no_trace(model, resident_logits):
    with engine_for(model, device="cpu,cpu", resident_layers=0, slots=2, **LINKS) as engine:
        layer = engine.network._layers[3]
        forward = layer.forward
        layer.forward = lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            engine.forward([(0, PROMPT)], reuse=True)
        layer.forward = forward
        assert torch.equal(all_logits(engine), resident_logits)


KV = {"kv": KVPlace.HOST, "kv_block_tokens": 16}
WRITTEN = 11  # retrieval caches are rebuilt after 8
RETRIEVAL = RetrievalConfig(budget_tokens=32, chunk_tokens=4, rebuild_tokens=8)
COPIES = dataclasses.replace(RETRIEVAL, retrieval_weights=DraftWeights.INT8)


@pytest.fixture(scope="module")
def whole(make_tiny):
    """A model in fp32, prompts for it, and the answers of one device."""
    folder = make_tiny("llama", **DEEP, **IDS)
    prompts = [PROMPT * 4, PROMPT[::-1]]
    with engine_for(folder, prompts=prompts, tokens=WRITTEN) as engine:
        return folder, prompts, generate(engine, prompts, WRITTEN)


@pytest.mark.parametrize(
    ("draft", "more"),
    [
        (None, KV),
        (DraftConfig(draft="ngram", draft_tokens=6), {}),
        (DraftConfig(draft="model:self", draft_tokens=4, shape=DraftShape.CHAIN), KV),
        (DraftConfig(draft="model:self", draft_tokens=12, shape=DraftShape.TREE), {}),
        (DraftConfig(draft="model:self", draft_tokens=12, shape=DraftShape.TREE), KV),
        (DraftConfig(draft="self:int4", draft_tokens=12), {}),
        (DraftConfig(draft="triforce", draft_tokens=5, retrieval=RETRIEVAL), KV),
        (DraftConfig(draft="triforce", draft_tokens=5, retrieval=COPIES), KV),
    ],
    ids=["kv", "ngram", "chain-kv", "tree", "tree-kv", "self", "triforce", "triforce-copies"],
)
def test_answers_are_those_of_one_device(whole, draft, more):
    folder, prompts, answers = whole
    options = LINKS | {"resident_layers": 2} | more
    if draft is not None:
        draft = dataclasses.replace(draft, draft=draft.draft.replace(":self", f":{folder}"))
        options["draft"] = draft
    with engine_for(folder, prompts=prompts, tokens=WRITTEN, device="cpu,cpu", **options) as engine:
        assert generate(engine, prompts, WRITTEN) == answers
        counted = engine.counters()
        assert bool(counted.kv_bytes_copied) == bool(more)
        ledger = engine.devices.ledger()
        names = ("KV blocks", "KV recent rows", "KV staging", "KV cache", "retrieval cache")
        assert {name for name in names if name in ledger} == {
            *(["KV cache"] if not more or (draft and draft.model) else []),
            *(names[:3] if more else []),
            *(["retrieval cache"] if draft and draft.over_retrieval else []),
        }
        for own, device in zip(engine.placement.shares, engine.devices, strict=True):
            assert not more or all(device.ledger()[name] for name in names[:3])
            assert own.device_bytes <= own.device_limit_bytes


def test_a_trace_tells_devices_apart_and_layers_by_their_numbers(whole):
    folder, prompts, _ = whole
    options = LINKS | KV | {"resident_layers": 2, "device": "cpu,cpu"}
    with engine_for(folder, prompts=prompts, **options) as engine:
        tracer = engine.trace()
        generate(engine, prompts)
        events, device = tracer.events(), engine.placement.device
    for lane in ("copy of weights", "copy of KV", "compute"):
        named = {
            (int(event.lane[-1]), int(re.search(r"layer (\d+)", event.name)[1]))
            for event in events
            if event.lane.startswith(lane)
        }
        there = engine.placement.streamed if lane == "copy of weights" else range(4)
        assert named == {(device[layer], layer) for layer in there}


def test_sampled_answers_are_those_of_one_device(whole):
    folder, prompts, _ = whole
    answers = []
    for options in ({}, LINKS | {"device": "cpu,cpu", "resident_layers": 1}):
        with engine_for(folder, prompts=prompts, **options) as engine:
            answers.append(
                generate(engine, prompts, sampling=SamplingConfig(temperature=1, seed=3))
            )
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device_limit_bytes": (1, 2, 3)}, "--device-memory has 3 values, --device cpu,cpu"),
        ({"link_bytes_per_s": (1.0,)}, "--link-bandwidth has 1 values"),
    ],
)
def test_as_many_values_as_devices(values, message):
    with pytest.raises(ConfigError, match=message):
        RuntimeConfig(device="cpu,cpu", **values)


def test_one_value_is_that_of_each_device():
    config = RuntimeConfig(
        device="cuda:0,cuda:1", device_limit_bytes=7, link_bytes_per_s=(1.0, 2.0)
    )
    one, two = config.each_device()
    assert (one.device, one.device_limit_bytes, one.link_bytes_per_s) == ("cuda:0", 7, 1.0)
    assert (two.device, two.device_limit_bytes, two.link_bytes_per_s) == ("cuda:1", 7, 2.0)


TWO = ["--device", "cuda:0,cuda:1", "--device-memory", "22GiB,20GiB"]
BOTH = ["--host-memory", "64GiB", "--profile", "2x-rtx4090-pcie4x16", "--json"]
LARGE = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 64}
LARGE |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}


@pytest.fixture
def outline(tmp_path):
    """The config.json of a model of 26 GiB: too large for one card, and for two with a context."""
    known = {"model_type": "llama", "max_position_embeddings": 131072, "dtype": "bfloat16"}
    known |= {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
    known |= {"tie_word_embeddings": False, "rope_theta": 1e4, "hidden_act": "silu"}
    known |= {"bos_token_id": 1, "eos_token_id": 2}
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(known | LARGE))
    return folder


def test_a_plan_of_two_gpus_comes_back_as_it_was(outline, offload_run, tmp_path):
    known = ["--draft", "none", *BOTH[2:]]
    one = offload_run(
        "plan", outline, *TWO, *known, "--host-memory", "64GiB", "--output", tmp_path / "p.json"
    )
    two = offload_run("plan", outline, "--plan", tmp_path / "p.json", *BOTH[2:])
    assert two.code == 0, two.err
    assert json.loads(two.out)["devices"] == json.loads(one.out)["devices"]
    written = json.loads((tmp_path / "p.json").read_text())
    written["options"]["device_limit_bytes"] = "1GiB,lots"
    (tmp_path / "p.json").write_text(json.dumps(written))
    refused = offload_run("plan", outline, "--plan", tmp_path / "p.json", *BOTH[2:])
    assert refused.code == 2 and "'lots' is not a memory size" in refused.err


def test_plan_and_simulate_say_the_same_of_two_gpus(outline, offload_run):
    for more in (["--resident-layers", "30"], ["--kv", "host", "-c", "100000"]):
        given = [outline, *TWO, "--draft", "none", *more, *BOTH]
        made = [offload_run(verb, *given) for verb in ("plan", "simulate")]
        assert [one.code for one in made] == [0, 0], [one.err for one in made]
        plan, simulated = (json.loads(one.out) for one in made)
        assert plan["predicted"]["s_per_token"] == pytest.approx(simulated["s_per_token"], rel=0.01)
        one = json.loads(
            offload_run(
                "plan", outline, "--device", "cuda:0", "--device-memory", "22GiB", *given[5:]
            ).out
        )
        assert [one["name"] for one in plan["devices"]] == ["cuda:0", "cuda:1"]
        for name in ("device_bytes", "device_limit_bytes", "kv_bytes"):
            assert sum(one[name] for one in plan["devices"]) == plan[name]
        table = " ".join(offload_run("plan", *given[:-1]).out.split())
        assert re.search(r" cuda:0 .* layers resident, .* the limit is 22.0 GiB", table)
        typed = re.search(r"--device-memory (\d+MiB,\d+MiB) works too", table)[1]
        assert offload_run("plan", outline, *TWO[:3], typed, *given[5:]).code == 0
        # Half of the bytes on each link, less what the second card keeps.
        assert plan["predicted"]["transfer_s"] < 0.55 * one["predicted"]["transfer_s"]
