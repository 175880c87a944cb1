"""The planner's choice is the fastest of what it may choose, and nothing fixed is changed."""

import dataclasses
import itertools
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_profile import PROJECT

from offload_rt.config import (
    AcceptRule,
    DraftConfig,
    DraftShape,
    DraftWeights,
    DType,
    HomeKind,
    KVPlace,
    RuntimeConfig,
    SamplingConfig,
    Wire,
)
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.machine import FreeMemory, Levels, Speeds
from offload_rt.device.kinds import CPU, Processor
from offload_rt.errors import ConfigError, PlanError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.wire import wired
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.planner import Means, make_plan, plan_run
from offload_rt.planning.yields import Seen, Yield, expected_yield
from offload_rt.profiling.store import load_profile
from offload_rt.session.means import means_for, reproducible
from offload_rt.speculative.kind import SIZES
from offload_rt.speculative.kinds import kind_of

GIB, MIB = 2**30, 2**20
FREE = FreeMemory(device_bytes=8 * GIB, host_bytes=8 * GIB)
PROFILE = load_profile(PROJECT / "profiles" / "cpu-2core-avx512bf16.json")
LAYERS = 12


@pytest.fixture(scope="module")
def checkpoint(make_tiny):
    return open_checkpoint(
        make_tiny("llama", num_hidden_layers=LAYERS, max_position_embeddings=8192)
    )


def speeds(disk=None, processor=Processor.CPU):
    made = PROFILE
    if disk is not None:
        rates = [
            dataclasses.replace(d, bytes_per_s=dataclasses.replace(d.bytes_per_s, value=disk))
            for d in PROFILE.disk
        ]
        made = dataclasses.replace(PROFILE, disk=tuple(rates))
    return Speeds(profile=made, processor=processor, packs=True)


def plan(
    checkpoint,
    draft="auto",
    *,
    disk=None,
    gives=None,
    prompt=100,
    drafter=None,
    repeats=False,
    **runtime,
):
    """Plan with a yield for all drafters, or what each kind's prior is."""
    config = draft if isinstance(draft, DraftConfig) else DraftConfig(draft=draft)
    drafting = Drafting(config, drafter)
    return plan_run(
        checkpoint,
        RuntimeConfig(device="cpu", **runtime),
        CPU,
        load=RunLoad(capacities=[prompt + 50], prompt_tokens=prompt, drafting=drafting),
        free=FREE,
        means=Means(
            speeds=speeds(disk),
            yields=lambda c: gives or expected_yield(c.kind),
            repeats=repeats,
        ),
    )


@cache
def roomy(folder, draft="auto"):
    """Without a limit; the model drafts for itself where one is to."""
    checkpoint = open_checkpoint(folder)
    return plan(checkpoint, draft, drafter=checkpoint if draft == "model:self" else None)


def layer_bytes(checkpoint):
    return roomy(checkpoint.folder).placement.demand.layer_bytes[0]


def limit_for(checkpoint, resident, slots=2, draft="none"):
    """A limit under which so many layers stay on the device with that drafter."""
    fixed = roomy(checkpoint.folder, draft).placement.demand.fixed_bytes
    return fixed + (resident + slots) * layer_bytes(checkpoint) + 1000


def test_it_takes_the_best_of_everything_it_looked_at(checkpoint):
    for limit in (None, limit_for(checkpoint, 4, draft="ngram")):
        made = plan(checkpoint, device_limit_bytes=limit, disk=1e7)
        best = min(c.prediction.s_per_token for c in made.considered)
        assert made.prediction.s_per_token <= best * 1.021  # it may leave the controller room
        assert made.placement.device_bytes <= (limit or 8 * GIB)


@given(
    disk=st.floats(1e6, 1e9),
    rate=st.floats(0.0, 0.95),
    hits=st.floats(0.1, 1.0),
    resident=st.integers(0, LAYERS - 3),
)
@settings(max_examples=10, deadline=None)
def test_no_number_of_tokens_and_no_ring_would_be_faster(checkpoint, disk, rate, hits, resident):
    points = tuple((n, sum(rate ** (i + 1) for i in range(n))) for n in SIZES)
    gives, limit = Yield(points, hits), limit_for(checkpoint, resident)
    made = plan(checkpoint, disk=disk, gives=gives, device_limit_bytes=limit)
    assert made.placement.device_bytes <= limit
    known = {"disk": disk, "gives": gives, "device_limit_bytes": limit}
    alone = [plan(checkpoint, "none", **known)]
    for tokens, slots in itertools.product((1, 4, 16, 32), (None, 2, 4)):
        config = DraftConfig(draft="ngram", draft_tokens=tokens)
        try:
            alone.append(plan(checkpoint, config, slots=slots, **known))
        except (PlanError, ConfigError):
            continue
    best = min(p.prediction.s_per_token for p in alone)
    assert made.prediction.s_per_token <= best * 1.05  # rings are tried for the best few only


def test_ngrams_begin_small_until_something_was_seen(checkpoint):
    """A first answer does not draft 32 at a time, of which 1 in 20 may be accepted."""
    known = {"resident_layers": 4, "disk": 1e6}  # rows are free
    first = plan(checkpoint, **known)
    assert first.drafting.config.kind == "ngram" and first.first_nodes == 8
    assert max(c.draft.nodes for c in first.considered) == 8
    assert max(step.nodes for step in first.outlooks) > 8  # there is room to go up
    seen = Seen(accepted={32: (40.0, 3.0), 8: (40.0, 0.5)}, hits=(40.0, 1.0))
    later = plan(checkpoint, gives=expected_yield("ngram", seen), **known)
    assert later.first_nodes >= 32
    asked = plan(checkpoint, DraftConfig(draft="ngram", draft_tokens=32), **known)
    assert asked.drafting.config.nodes == 32


def test_what_is_given_is_kept(checkpoint):
    config = DraftConfig(draft="ngram", draft_tokens=5)
    made = plan(checkpoint, config, slots=3, resident_layers=2)
    assert (made.drafting.config, made.outlooks) == (config, ())
    assert (made.placement.slots, len(made.placement.resident)) == (3, 2)
    assert plan(checkpoint, "none").drafting.config.kind == "none"
    made = plan(checkpoint, "ngram", gives=Yield(((1, 0.0),)))  # asked for, though it loses
    assert made.drafting.config.kind == "ngram" and made.outlooks[0].nodes == 0


def test_drafting_that_gives_nothing_is_not_chosen(checkpoint, make_tiny):
    assert plan(checkpoint, gives=Yield(((1, 0.0),))).drafting.config.kind == "none"
    wide = make_tiny("llama", num_hidden_layers=LAYERS, intermediate_size=4096)
    checkpoint = open_checkpoint(wide)  # whose layers are larger than what n-grams take
    most = DraftConfig(draft="ngram", draft_tokens=kind_of("ngram").most_tokens)
    slow = {"disk": 1e6, "device_limit_bytes": limit_for(checkpoint, 4, draft=most)}
    much = plan(checkpoint, gives=Yield(((1, 1.0), (64, 64.0))), **slow)
    assert much.drafting.config.nodes == kind_of("ngram").most_tokens


def test_the_controllers_sizes_are_those_there_is_room_for(checkpoint):
    limit = limit_for(checkpoint, 0, draft="ngram")
    made = plan(checkpoint, "ngram", disk=1e6, device_limit_bytes=limit)
    nodes = [outlook.nodes for outlook in made.outlooks]
    assert nodes[0] == 0 and nodes[-1] == made.drafting.config.nodes
    assert nodes == sorted(set(nodes))
    assert made.outlooks[0].tokens == 1.0


def test_memory_for_many_and_the_fastest_for_one(checkpoint):
    """A server has room for 16, of whom mostly one asks: he gets drafts, all together get fewer."""
    gives, made = Yield(((1, 0.8), (64, 6.0))), {}
    for count, running in ((1, None), (16, None), (16, 1)):
        load = RunLoad(
            capacities=[150] * count,
            prompt_tokens=100,
            drafting=Drafting(DraftConfig(draft="auto")),
            kv_tokens=150 * count,
            running=running,
        )
        made[count, running] = plan_run(
            checkpoint,
            RuntimeConfig(device="cpu", resident_layers=1),
            CPU,
            load=load,
            free=FREE,
            means=Means(speeds=speeds(1e9), yields=lambda c: gives),
        )
    one, many, server = made.values()
    assert server.placement.kv_bytes >= many.placement.kv_bytes > 10 * one.placement.kv_bytes
    assert server.drafting.config.nodes > many.drafting.config.nodes
    assert server.prediction.s_per_token == pytest.approx(one.prediction.s_per_token, rel=0.05)
    best = min(server.outlooks, key=lambda outlook: outlook.s_per_token)
    assert server.first_nodes == best.nodes < server.drafting.config.nodes
    assert (one.running, many.running, server.running) == (None, None, 1)
    for plan, steps in ((many, many.outlooks), (server, server.alone)):
        known = plan.foretold(4, plan.running or plan.sequences, Levels())
        assert known.pass_s == next(s.pass_s for s in steps if s.nodes == 4)
    some = [many.foretold(4, running, Levels()).pass_s for running in (1, 2, 9, 16)]
    assert some == sorted(some) and some[0] < some[-1]
    assert min(server.alone, key=lambda outlook: outlook.s_per_token).nodes > best.nodes


def best_at(nodes):
    """A drafter that gives no more beyond so many nodes."""
    return Yield(((1, 1.0), (nodes, nodes / 2)))


def test_a_run_may_draft_more_than_it_begins_with(checkpoint):
    """Acceptance was a guess: with memory to spare the controller has sizes above it to try."""
    made = plan(checkpoint, "model:self", drafter=checkpoint, gives=best_at(8), disk=1e7)
    assert made.first_nodes < made.drafting.config.nodes <= 4 * made.first_nodes
    assert [o.nodes for o in made.outlooks][-1] == made.drafting.config.nodes
    fixed = DraftConfig(draft="model:self", draft_tokens=made.first_nodes)
    alone = plan(checkpoint, fixed, drafter=checkpoint, gives=best_at(8), disk=1e7)
    assert made.prediction.s_per_token == pytest.approx(alone.prediction.s_per_token, rel=0.02)
    assert made.prediction.tokens_per_pass == alone.prediction.tokens_per_pass
    assert alone.first_nodes == alone.drafting.config.nodes == made.first_nodes


@given(limit=st.integers(0, 40), nodes=st.sampled_from([2, 4, 8, 16]))
@settings(max_examples=15, deadline=None)
def test_room_for_more_costs_the_first_steps_next_to_nothing(checkpoint, limit, nodes):
    smallest = roomy(checkpoint.folder, "model:self").smallest_bytes
    memory = smallest + limit * layer_bytes(checkpoint) // 4
    known = {"drafter": checkpoint, "gives": best_at(nodes), "disk": 1e7}
    made = plan(checkpoint, "model:self", device_limit_bytes=memory, **known)
    fixed = DraftConfig(draft="model:self", draft_tokens=made.first_nodes)
    alone = plan(checkpoint, fixed, device_limit_bytes=memory, **known)
    assert made.placement.device_bytes <= memory
    assert made.prediction.s_per_token <= 1.021 * alone.prediction.s_per_token


def test_a_slow_link_is_said_to_bind_and_a_fast_one_not(checkpoint):
    limit = limit_for(checkpoint, 2)
    slow = plan(checkpoint, "none", disk=1e5, device_limit_bytes=limit).prediction
    fast = plan(checkpoint, "none", disk=1e13, device_limit_bytes=limit).prediction
    assert (slow.limit, fast.limit) == ("transfer", "compute")
    assert slow.home_bytes == fast.home_bytes > 0 and slow.s_per_token > fast.s_per_token


def test_what_a_token_of_a_prompt_adds_hides_behind_a_slow_disk(checkpoint):
    fast, slow = (
        plan(checkpoint, "none", disk=rate, prompt=500, resident_layers=4).row_s
        for rate in (1e12, 1e6)
    )
    assert 0 <= slow < fast / 2


def test_trees_that_end_early_take_less_time(checkpoint):
    draft = DraftConfig(draft=f"model:{checkpoint.folder}", draft_tokens=64)
    points = ((64, 5.0),)
    half, whole = (
        plan(checkpoint, draft, drafter=checkpoint, gives=Yield(points, made=made)).prediction
        for made in (0.5, 1.0)
    )
    assert half.draft_s == pytest.approx(whole.draft_s / 2)
    chain = dataclasses.replace(draft, shape=DraftShape.CHAIN)
    half, whole = (
        plan(checkpoint, chain, drafter=checkpoint, gives=Yield(points, made=made)).prediction
        for made in (0.5, 1.0)
    )
    assert half.draft_s == whole.draft_s > 0.0


def test_a_draft_model_takes_room_and_time(checkpoint):
    own = plan(checkpoint, "model:self", drafter=checkpoint, disk=1e6)
    assert own.placement.demand.drafter_bytes > 0
    assert own.prediction.draft_s > 0.0


def test_auto_looks_at_a_model_that_is_given_beside_the_others(checkpoint):
    """What is said of the model is not for the others, and it is loaded only if it is chosen."""
    given = DraftConfig(
        draft="auto:small", shape=DraftShape.CHAIN, draft_weights=DraftWeights.SAME, draft_window=99
    )
    slow = plan(checkpoint, given, drafter=checkpoint, disk=1e6, resident_layers=4)
    assert {c.draft.draft for c in slow.considered} == {"none", "ngram", "model:small"}
    for config in (c.draft for c in slow.considered):
        own = config.kind == "model"
        assert config.shape is (DraftShape.CHAIN if own else DraftShape.AUTO)
        assert (config.draft_window == 99) is own
    assert slow.drafting.config.kind == "model" and slow.drafting.checkpoint is checkpoint
    quick = plan(checkpoint, given, drafter=checkpoint, gives=Yield(((1, 0.01),)))
    assert quick.drafting.config.kind == "none" and quick.drafting.checkpoint is None
    assert quick.placement.demand.drafter_bytes == 0


def test_a_window_leaves_a_model_that_auto_looks_at_the_sizes_it_has_room_for(checkpoint):
    def sizes(window):
        given = DraftConfig(draft="auto:small", draft_window=window)
        made = plan(checkpoint, given, drafter=checkpoint, disk=1e6, resident_layers=4)
        return {c.draft.nodes for c in made.considered if c.draft.kind == "model"}

    assert sizes(64) == {size for size in SIZES if 16 + size + 1 <= 64}
    assert sizes(18) == {1}
    with pytest.raises(ConfigError, match="accepted is auto, full or 18 or more.*; raise it$"):
        DraftConfig(draft="auto:small", draft_window=17)


def test_auto_draws_nothing_where_a_sampled_answer_is_to_be_the_same_again(checkpoint):
    """Then networks grow trees, whose nodes are chosen; a chain that is asked for is left out."""
    small, sampling = DraftConfig(draft="auto:small"), SamplingConfig(temperature=1.0, seed=1)
    assert not small.answers_rest_on_it
    runtime = RuntimeConfig(device="cpu", dtype=DType.FLOAT32, resident_layers=2)
    assert reproducible(small, sampling, runtime) == small
    known = {"drafter": checkpoint, "disk": 1e6, "resident_layers": 4, "repeats": True}
    made = plan(checkpoint, small, **known)
    assert made.drafting.config.model == "small"
    shapes = {c.draft.kind: c.draft.shape for c in made.considered}
    grown = {kind: shape for kind, shape in shapes.items() if kind not in ("none", "ngram")}
    assert grown == {"model": DraftShape.TREE}
    chain = plan(checkpoint, dataclasses.replace(small, shape=DraftShape.CHAIN), **known)
    assert {c.draft.kind for c in chain.considered} == {"none", "ngram"}
    far = plan(checkpoint, prompt=4000, kv=KVPlace.DISK, repeats=True)
    assert {c.draft.kind for c in far.considered} == {"none", "ngram"}  # triforce draws


def test_triforce_is_looked_at_where_kv_is_offloaded(checkpoint):
    far = plan(checkpoint, prompt=4000, kv=KVPlace.DISK)
    kinds = {c.draft.kind for c in far.considered}
    assert kinds == {"none", "ngram", "triforce"}
    near = plan(checkpoint, prompt=4000, kv=KVPlace.DEVICE)
    assert {c.draft.kind for c in near.considered} == {"none", "ngram"}


@pytest.mark.parametrize("accept", [AcceptRule.LOSSLESS, AcceptRule.TYPICAL])
@pytest.mark.parametrize("shape", [DraftShape.CHAIN, DraftShape.TREE])
@pytest.mark.parametrize("name", ["model:self", "self:int4"])
def test_what_is_drafted_alone_is_planned_alone(make_tiny, name, shape, accept):
    """Of four sequences, what a sampled answer rests on takes four times the passes."""
    checkpoint = open_checkpoint(make_tiny("llama", hidden_size=256, intermediate_size=512))
    draft = DraftConfig(draft=name, draft_tokens=6, shape=shape, accept=accept)
    drafting = Drafting(draft, checkpoint if draft.model else None)
    load = RunLoad(capacities=[100] * 4, prompt_tokens=200, drafting=drafting)

    def passes(sampling):
        made = plan_run(
            checkpoint,
            RuntimeConfig(device="cpu", dtype=DType.BFLOAT16, resident_layers=1),
            CPU,
            load=load,
            free=FREE,
            means=means_for(checkpoint, sampling, speeds(), DraftConfig(draft="ngram")),
        )
        return made.prediction.draft_passes

    rests = shape is DraftShape.CHAIN or accept is AcceptRule.TYPICAL
    alone = passes(SamplingConfig(temperature=1.0))
    assert alone == (4 if rests else 1) * passes(SamplingConfig())


def test_nothing_fits_and_the_refusal_names_a_limit_that_does(checkpoint):
    with pytest.raises(PlanError, match="use --device-memory") as refused:
        plan(checkpoint, device_limit_bytes=MIB)
    needed = refused.value.needed_bytes
    made = plan(checkpoint, device_limit_bytes=needed)
    assert made.placement.device_bytes <= needed
    assert made.smallest_bytes == needed


@pytest.mark.parametrize(
    ("resident", "runtime"),
    [
        (None, {"kv": KVPlace.HOST}),
        (0, {"home": HomeKind.HOST}),
        (2, {"home": HomeKind.HOST}),
        (None, {"wire": Wire.INT8, "resident_layers": 1}),
    ],
)
def test_auto_refuses_with_what_is_said_where_nothing_drafts(checkpoint, resident, runtime):
    """Where host memory binds, a drafter that nobody asked for asks for more of the device's."""
    runtime = {"host_limit_bytes": 64 * 2**10, **runtime}
    if resident is not None:
        limit = limit_for(checkpoint, resident)
    if "wire" in runtime:
        checkpoint = wired(checkpoint, runtime["wire"])
    said = []
    for draft in ("none", "auto"):
        for more in (0, 2**12, 2**13):
            if resident is not None:
                runtime["device_limit_bytes"] = limit + more
            with pytest.raises(PlanError) as refused:
                plan(checkpoint, draft, **runtime)
            said.append((str(refused.value), refused.value.needed_bytes))
    assert len(said) == 6 and said[:3] == said[3:]
    assert all("host" in sentence and not needed for sentence, needed in said)


def test_without_speeds_a_drafter_must_be_named(checkpoint):
    load = RunLoad(capacities=[50], prompt_tokens=20, drafting=Drafting(DraftConfig(draft="auto")))
    with pytest.raises(ConfigError, match="name a drafter"):
        make_plan(checkpoint, RuntimeConfig(), CPU, load=load, free=FREE, means=None)


def test_named_layers_stay_and_missing_ones_are_refused(checkpoint):
    made = plan(checkpoint, "none", resident=(0, 3, 4))
    assert made.placement.resident == (0, 3, 4)
    with pytest.raises(ConfigError, match=f"layer {LAYERS} .* layers 0 to {LAYERS - 1}"):
        plan(checkpoint, "none", resident=(0, LAYERS))
    with pytest.raises(PlanError, match="12 resident layers"):
        limit = limit_for(checkpoint, 4)
        plan(checkpoint, "none", resident=tuple(range(12)), device_limit_bytes=limit)


@given(
    nodes=st.integers(0, 400),
    more=st.integers(1, 50),
    kind=st.sampled_from(["model", "medusa", "ngram", "triforce"]),
    seen=st.dictionaries(
        st.sampled_from(SIZES), st.tuples(st.floats(0, 500), st.floats(0, 1)), max_size=4
    ),
)
def test_more_nodes_never_give_less(nodes, more, kind, seen):
    counted = {size: (steps, share * size) for size, (steps, share) in seen.items()}
    gives = expected_yield(kind, Seen(accepted=counted, hits=(10.0, 0.5)))
    assert gives.accepted(0) == 0.0
    assert gives.accepted(nodes + more) >= gives.accepted(nodes) - 1e-9
    assert 0.0 <= gives.hits <= 1.0


def test_what_was_seen_takes_the_place_of_what_was_expected():
    prior = expected_yield("model")
    seen = expected_yield("model", Seen(accepted={16: (500.0, 9.0)}, hits=(500.0, 1.0)))
    assert seen.accepted(16) == pytest.approx(9.0, rel=0.05)
    # Neighbours move with it, in proportion.
    ratio = seen.accepted(64) / prior.accepted(64)
    assert ratio == pytest.approx(9.0 / prior.accepted(16), rel=0.1)
    assert expected_yield("ngram", Seen(hits=(1000.0, 0.9))).hits == pytest.approx(0.9, abs=0.01)
