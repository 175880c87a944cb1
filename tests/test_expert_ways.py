"""How experts come, one by one or in whole layers, is chosen by price; what batches read."""

import dataclasses
import json
from collections import deque

import pytest
import torch
from engines import all_logits, engine_for, generate
from expert_models import make_mixture
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quantised import write_gpt_oss
from test_expert_plans import routed
from test_experts import lend, pool_of, resident_answers, through_layers
from test_profile import PROJECT

from offload_rt.config import DraftConfig, RuntimeConfig
from offload_rt.costs.drafters import NO_DRAFTING, Drafting, Expected
from offload_rt.costs.experts import Distances, ExpertUse
from offload_rt.costs.machine import FreeMemory, speeds_there
from offload_rt.costs.timeline import TimedLayer, TimedPass, steady_pass
from offload_rt.errors import ConfigError, PlanError
from offload_rt.model.outline import outline_checkpoint
from offload_rt.planning import planner as planner_module
from offload_rt.planning.fit import PlacedRun, RunLoad, place_run
from offload_rt.planning.plan_file import plan_file
from offload_rt.planning.planner import Means, plan_run
from offload_rt.planning.yields import expected_yield
from offload_rt.profiling.store import load_profile

MIB, GIB = 2**20, 2**30
SIZES = {
    "vocab_size": 8000,
    "hidden_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
MODELS = {
    "mixtral": {"intermediate_size": 1536, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "moe_intermediate_size": 768,
        "intermediate_size": 1024,
        "head_dim": 64,
        "num_experts": 64,
        "num_experts_per_tok": 4,
    },
}
MACHINES = {
    name: speeds_there(load_profile(PROJECT / "profiles" / f"{name}.json"), "auto")
    for name in ("cpu-2core-avx512bf16", "rtx4090-pcie4x16")
}
NOTHING_SEEN = ExpertUse()
FREE = FreeMemory(device_bytes=64 * GIB, host_bytes=64 * GIB)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Mixtures of few large and of many small experts, from their configuration alone."""
    found = {}
    for name, own in MODELS.items():
        folder = tmp_path_factory.mktemp(name)
        config = SIZES | {"model_type": name} | own
        (folder / "config.json").write_text(json.dumps(config))
        found[name] = outline_checkpoint(folder)
    return found


def slower(speeds, disk):
    """The same machine with a disk of so many bytes a second."""
    rates = [
        dataclasses.replace(d, bytes_per_s=dataclasses.replace(d.bytes_per_s, value=disk))
        for d in speeds.profile.disk
    ]
    profile = dataclasses.replace(speeds.profile, disk=tuple(rates))
    return dataclasses.replace(speeds, profile=profile)


def planned(checkpoint, speeds, load, asked=NOTHING_SEEN, **config):
    """A plan without drafting."""
    return plan_run(
        checkpoint,
        RuntimeConfig(**config),
        speeds.device,
        load=load,
        free=FREE,
        means=Means(speeds=speeds, asked=asked),
    )


def seconds_of(plan, load, checkpoint, speeds):
    """Predicted seconds of prompts and answers together, of each token of an answer."""
    most = len(load.capacities)
    answers = (sum(load.capacities) - load.prompt_tokens) // most
    if answers <= 0:
        return plan.prediction.s_per_token
    run = PlacedRun(
        checkpoint=checkpoint,
        config=plan.runtime,
        speeds=speeds,
        placement=plan.placement,
        context_tokens=load.cached_tokens,
        sequences=most,
    )
    read_s = run.prompt_s(load.prompt_tokens // most)
    return (read_s + (answers - 1) * plan.prediction.s_per_token) / answers


@given(
    model=st.sampled_from(sorted(MODELS)),
    machine=st.sampled_from(sorted(MACHINES)),
    disk=st.floats(1e7, 1e10),
    share=st.floats(0.05, 0.99),
    sequences=st.integers(1, 256),
    prompt=st.integers(1, 300),
    answers=st.integers(0, 100),
    hits=st.none() | st.floats(0.0, 1.0),
)
@example("mixtral", "cpu-2core-avx512bf16", 2e9, 0.5, 1, 50, 1, None)
@example("qwen3_moe", "cpu-2core-avx512bf16", 2e9, 0.25, 64, 1, 100, None)
@settings(max_examples=60, deadline=None)
def test_neither_way_alone_would_be_faster(
    models, model, machine, disk, share, sequences, prompt, answers, hits
):
    """Where the user fixes one of them, its own plan is never predicted to take less."""
    checkpoint, speeds = models[model], slower(MACHINES[machine], disk)
    load = RunLoad(
        capacities=[prompt + answers] * sequences, prompt_tokens=min(prompt * sequences, 2048)
    )
    asked = ExpertUse(hit_rate=hits)
    fixed = place_run(checkpoint, RuntimeConfig(), speeds.device, load=load, free=FREE).demand
    limit = fixed.fixed_bytes + round(share * sum(fixed.layer_bytes))
    try:
        made = planned(checkpoint, speeds, load, asked, device_limit_bytes=limit)
    except PlanError:
        return
    least = seconds_of(made, load, checkpoint, speeds)
    pools = (w.placement for w in made.ways if w.one_by_one and not w.placement.whole_layers)
    slots = [placement.expert_slots for placement in pools]
    for fixed_slots in {0, *slots}:
        try:
            alone = planned(
                checkpoint, speeds, load, asked, device_limit_bytes=limit, expert_slots=fixed_slots
            )
        except PlanError:
            continue
        assert alone.placement.expert_slots == fixed_slots and not alone.ways
        assert least <= seconds_of(alone, load, checkpoint, speeds) * (1 + 1e-9)


def test_n_grams_are_there_where_no_draft_should_pay(models):
    """The text decides, and nobody has seen it: of experts one by one rows are never free."""
    checkpoint, speeds = models["qwen3_moe"], slower(MACHINES["cpu-2core-avx512bf16"], 1e9)
    load = RunLoad(capacities=[300], prompt_tokens=100)
    demand = place_run(checkpoint, RuntimeConfig(), speeds.device, load=load, free=FREE).demand
    limit = demand.fixed_bytes + sum(demand.layer_bytes) // 3
    means = Means(speeds=speeds, yields=lambda draft: expected_yield(draft.kind))

    def plan(draft, **config):
        run = dataclasses.replace(load, drafting=Drafting(DraftConfig(draft=draft)))
        runtime = RuntimeConfig(device_limit_bytes=limit, **config)
        return plan_run(checkpoint, runtime, speeds.device, load=run, free=FREE, means=means)

    none, auto = plan("none"), plan("auto")
    assert none.placement.expert_slots and not none.watches
    assert auto.watches and auto.first_nodes == 0 and auto.first == NO_DRAFTING
    assert auto.drafting.config.kind == "ngram"
    assert [one.nodes for one in auto.outlooks] == [0, 1, 2, 4, 8, 16]
    assert auto.prediction.s_per_token <= 1.02 * none.prediction.s_per_token
    assert not auto.prediction.draft_s
    assert plan_file(checkpoint, auto).options["draft"] == "none"
    whole = plan("auto", expert_slots=0)
    assert whole.placement.streamed and not whole.watches


def test_a_way_that_is_alone_is_compared_with_its_prompt(models, monkeypatch):
    """A long prompt, a short answer, and drafts that do not pay and leave room for one way of two.

    Without the seconds of its prompt that way would seem the fastest of all.
    """
    checkpoint, speeds = models["qwen3_moe"], slower(MACHINES["cpu-2core-avx512bf16"], 1e8)
    place = planner_module.place_run

    def tight(*args, load, **more):
        if load.whole and load.drafting.config.drafts:
            raise PlanError("no ring fits beside what drafts")
        return place(*args, load=load, **more)

    monkeypatch.setattr(planner_module, "place_run", tight)
    load = RunLoad(capacities=[1504], prompt_tokens=1500)
    demand = place_run(checkpoint, RuntimeConfig(), speeds.device, load=load, free=FREE).demand
    runtime = RuntimeConfig(device_limit_bytes=demand.fixed_bytes + sum(demand.layer_bytes) // 3)
    means = Means(speeds=speeds, stated=lambda draft: Expected(tokens=1 + draft.nodes / 100))

    def plan(**draft):
        run = dataclasses.replace(load, drafting=Drafting(DraftConfig(**draft)))
        return plan_run(checkpoint, runtime, speeds.device, load=run, free=FREE, means=means)

    none, auto = plan(draft="none"), plan(draft="auto")
    drafts = [plan(draft="ngram", draft_tokens=tokens) for tokens in (1, 2, 4)]
    assert len(none.ways) == len(auto.ways) == 2 and not any(made.ways for made in drafts)
    together_s = [seconds_of(made, load, checkpoint, speeds) for made in (none, *drafts)]
    assert max(made.prediction.s_per_token for made in drafts) < together_s[0] < min(together_s[1:])
    assert not auto.drafting.config.drafts
    assert seconds_of(auto, load, checkpoint, speeds) == pytest.approx(together_s[0])


def test_each_way_is_fastest_somewhere(models, tmp_path):
    """One by one for one sequence, whole layers for many, which ask for most experts anyway."""
    config = SIZES | MODELS["mixtral"] | {"model_type": "mixtral", "num_hidden_layers": 40}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint, speeds = outline_checkpoint(tmp_path), MACHINES["rtx4090-pcie4x16"]
    found = {}
    for sequences in (1, 16):
        load = RunLoad.alike(sequences, 256, NO_DRAFTING)
        demand = place_run(checkpoint, RuntimeConfig(), speeds.device, load=load, free=FREE).demand
        limit = demand.fixed_bytes + sum(demand.layer_bytes) // 2
        found[sequences] = planned(checkpoint, speeds, load, device_limit_bytes=limit)
        assert found[sequences].sequences == sequences
    assert found[1].placement.expert_slots and found[1].ways[0].one_by_one
    assert found[16].placement.streamed and not found[16].ways[0].one_by_one
    for made in found.values():
        assert made.placement is made.ways[0].placement
        assert len({way.one_by_one for way in made.ways}) == 2


@given(
    seen=st.none() | st.lists(st.floats(0, 50), min_size=33, max_size=33),
    held=st.floats(0, 32),
    sequences=st.integers(1, 4),
)
@settings(max_examples=60)
def test_a_row_of_a_text_lacks_no_more_than_one_of_fewer_rows(seen, held, sequences):
    """Whatever was seen of single rows."""
    found = {} if seen is None else {0: Distances(calls=10.0, counts=tuple(seen))}
    use, before = ExpertUse(seen=found), float("inf")
    for rows in range(2, 64):
        count = rows * sequences
        each = use.misses(count, held, experts=32, per_token=4, sequences=sequences) / count
        assert each <= before * (1 + 1e-9)
        before = each


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_a_token_of_a_batch_reads_no_more_of_whole_layers(models, machine):
    """And of slots less than of whole layers, however many sequences there are."""
    checkpoint, speeds = models["qwen3_moe"], MACHINES[machine]
    read = {}
    for whole in (False, True):
        load = RunLoad(capacities=[100], prompt_tokens=50, whole=whole)
        demand = place_run(checkpoint, RuntimeConfig(), speeds.device, load=load, free=FREE).demand
        limit = demand.fixed_bytes + sum(demand.layer_bytes) // 2
        config = RuntimeConfig(device_limit_bytes=limit)
        placement = place_run(checkpoint, config, speeds.device, load=load, free=FREE)
        assert bool(placement.streamed) == whole != bool(placement.expert_slots)
        run = PlacedRun(
            checkpoint=checkpoint,
            config=config,
            speeds=speeds,
            placement=placement,
            context_tokens=50,
        )
        read[whole] = [
            dataclasses.replace(run, sequences=count).model.load(1).moved_bytes / count
            for count in range(1, 257)
        ]
    assert all(b < a for a, b in zip(read[True], read[True][1:], strict=False))
    assert all(a < b for a, b in zip(read[False], read[True], strict=True))
    most = max(read[False])
    assert read[False][255] < most / 5 and read[False].index(most) in range(1, 20)


@pytest.mark.parametrize("repeat", [0.55, 0.2])
@pytest.mark.parametrize("held", [9, 18, 32])
def test_sequences_share_slots_as_a_pool_has_it(repeat, held):
    """Of drawn routes: each finds less again the more there are, until they ask for all."""
    own = pool_of({0: 64}, held, per_token=4)[0]
    for asked in routed(1200, 7, repeat):
        deque(lend(own, 0, asked), maxlen=0)
    seen = {kind: Distances(calls=n, counts=tuple(own.counts.distances[kind]))
            for kind, n in own.counts.calls.items()}  # fmt: skip
    use, lacked = ExpertUse(seen=seen), {}
    for sequences in (2, 4, 16, 64):
        texts = [list(routed(200, 1000 * number + 7, repeat)) for number in range(sequences)]
        pool = pool_of({0: 64}, held, per_token=4)[0]
        for token, rows in enumerate(zip(*texts, strict=True)):
            if token == 30:
                before = pool.counts.misses
            asked = reversed(dict.fromkeys(e for row in reversed(rows) for e in row))
            deque(lend(pool, 0, list(asked), rows=sequences), maxlen=0)
        lacked[sequences] = (pool.counts.misses - before) / 170
        said = use.misses(sequences, held, experts=64, per_token=4, sequences=sequences)
        assert said == pytest.approx(lacked[sequences], rel=0.15, abs=0.2 * sequences)
    assert lacked[4] > 4 * use.misses(1, held, experts=64, per_token=4)
    assert lacked[64] / 64 < lacked[16] / 16


@pytest.mark.parametrize("seconds", [0.7, 1.0, 1.4])
def test_passes_that_read_layers_ahead_are_priced_as_the_pool_makes_them(seconds):
    """Rows that ask for all experts: the next layer's come while this one computes."""
    layers, experts = 6, 8
    pool, _, compute = pool_of(dict.fromkeys(range(layers), experts), 3 * experts, per_token=2)
    took_s = through_layers(pool, compute, range(layers), 1, seconds)
    layer = TimedLayer(
        kernel_s=experts * seconds,
        experts_s=experts * seconds,
        missed_s=experts * seconds,
        missed_bytes=experts * 1000,
        in_turn=True,
        misses=(*[0.0] * experts, 1.0),
        ahead=True,
    )
    alike = TimedPass(layers=[layer] * layers, slots=0, home_bytes_per_s=(1000.0,))
    assert steady_pass(alike).pass_s == pytest.approx(took_s, rel=0.02)
    apart = TimedPass(
        layers=[dataclasses.replace(layer, ahead=False)] * layers,
        slots=0,
        home_bytes_per_s=(1000.0,),
    )
    assert steady_pass(apart).pass_s > 1.04 * took_s


@pytest.mark.parametrize("misses", [1, 3, 6])
def test_what_a_layer_lacks_is_computed_as_it_comes(misses):
    """By a pool that never holds it: the last expert's kernel alone follows its copy."""
    pool, copy, compute = pool_of({0: 64}, 8, per_token=8)
    asked = iter(range(64))
    seconds = 0.8
    for _ in range(4):
        start_s = compute.time_s
        copy.wait(compute.record())  # the router's choice is known then
        for _, buffer in lend(pool, 0, [next(asked) for _ in range(misses)]):
            compute.kernel(reads=[buffer], writes=[], seconds=seconds)
        took_s = compute.time_s - start_s
    assert copy.statistics().bytes_copied == 4 * misses * 1000
    layer = TimedLayer(
        kernel_s=misses * seconds,
        experts_s=misses * seconds,
        missed_s=misses * seconds,
        missed_bytes=misses * 1000,
        in_turn=True,
        misses=(*[0.0] * misses, 1.0),
    )
    one = TimedPass(layers=[layer], slots=0, home_bytes_per_s=(1000.0,))
    assert steady_pass(one).pass_s == pytest.approx(took_s)


@pytest.mark.parametrize("machine", sorted(MACHINES))
def test_whole_layers_are_planned_no_memory_that_only_single_experts_need(models, machine):
    checkpoint, speeds = models["mixtral"], MACHINES[machine]
    load = RunLoad(capacities=[100], prompt_tokens=50)
    demand = place_run(checkpoint, RuntimeConfig(), speeds.device, load=load, free=FREE).demand
    limit = demand.fixed_bytes + sum(demand.layer_bytes) // 2

    def placed(whole=False, **more):
        config = RuntimeConfig(device_limit_bytes=limit, **more)
        asked = dataclasses.replace(load, whole=whole)
        return place_run(checkpoint, config, speeds.device, load=asked, free=FREE)

    pool, whole, asked_for = placed(), placed(whole=True), placed(expert_slots=0)
    assert pool.expert_slots and whole.streamed
    assert whole.workspace_bytes == asked_for.workspace_bytes
    assert (whole.resident, whole.slots) == (asked_for.resident, asked_for.slots)
    apart = pool.demand.units_bytes + pool.demand.pieced_bytes
    assert pool.workspace_bytes - whole.workspace_bytes == apart != 0
    # And the least limit is looked for as if experts could come either way.
    assert whole.demand.least.workspace_bytes == pool.workspace_bytes


def test_some_layers_are_whole_where_slots_would_hold_nothing_that_is_asked_for(models):
    """Tokens that ask for the experts of a layer in turn: none is there but where all are."""
    checkpoint, speeds = models["qwen3_moe"], MACHINES["cpu-2core-avx512bf16"]
    load = RunLoad(capacities=[100], prompt_tokens=100)
    asked = ExpertUse(seen={0: Distances(calls=10.0, counts=(*[0.0] * 63, 40.0, 0.0))})
    demand = place_run(checkpoint, RuntimeConfig(), speeds.device, load=load, free=FREE).demand
    limit = demand.fixed_bytes + sum(demand.layer_bytes) * 3 // 5
    made = planned(checkpoint, speeds, load, asked, device_limit_bytes=limit)
    slots, whole = made.placement.expert_slots, made.placement.whole_layers
    assert 1 <= len(whole) <= 3 and whole == tuple(range(5 - len(whole), 5)) and slots
    assert made.placement.device_bytes <= limit
    assert made.placement.pooled_layers == tuple(range(5 - len(whole)))
    counts = {len(way.placement.whole_layers) for way in made.ways if way.one_by_one}
    assert {0, len(whole)} <= counts
    pure = [w for w in made.ways if not w.placement.whole_layers]
    assert len(pure) == 2 and made.prediction.s_per_token < min(w.s_per_token for w in pure)
    expert_bytes = demand.experts.image_bytes // demand.experts.count
    assert made.prediction.home_bytes == pytest.approx(
        (5 - len(whole)) * 4 * expert_bytes, rel=0.01
    )


@pytest.mark.parametrize(
    ("name", "dtype", "whole"),
    [
        ("mixtral", "bfloat16", 1),
        ("qwen2_moe", "float32", 3),
        ("every-second", "bfloat16", 1),
        ("gpt_oss", "bfloat16", 2),
    ],
)
def test_layers_that_are_whole_beside_slots_change_no_bit(make_tiny, name, dtype, whole):
    folder = make_mixture(make_tiny, name, dtype=dtype)
    logits, answer = resident_answers(folder)
    with engine_for(folder, expert_slots=6, whole_layers=whole) as engine:
        placement = engine.placement
        assert len(placement.whole_layers) == whole
        assert engine.network.units.keys() == set(placement.pooled_layers)
        assert not engine.network.units.keys() & set(placement.whole_layers)
        assert generate(engine, tokens=6) == answer
        engine.forget()
        assert torch.equal(all_logits(engine), logits)
        assert engine.memory().device_peak_bytes <= placement.device_bytes


def test_as_many_whole_layers_as_there_are_leave_slots_nothing(make_tiny):
    folder = make_mixture(make_tiny, "mixtral")
    refused = pytest.raises(ConfigError, match="whole_layers is 4, and the model has 4 layers of")
    with refused, engine_for(folder, expert_slots=6, whole_layers=4):
        pass


def test_quantised_experts_may_be_whole_beside_slots(make_tiny, tmp_path):
    folder = write_gpt_oss(
        make_mixture(make_tiny, "gpt_oss", intermediate_size=64), tmp_path
    ).folder
    with engine_for(folder) as engine:
        expected = all_logits(engine)
    with engine_for(folder, expert_slots=6, whole_layers=2) as engine:
        assert len(engine.network.units) == len(engine.network.layouts) - 2
        assert torch.equal(all_logits(engine), expected)


def test_a_kept_plan_keeps_the_layers_that_are_whole(offload_run, make_tiny, tmp_path):
    folder = make_mixture(make_tiny, "mixtral", tokenizer=True)
    path = tmp_path / "plan.json"
    asked = ("--context", 64, "--draft", "none", "--json")
    made = offload_run("plan", folder, *asked, "--expert-slots", 6, "--output", path)
    assert made.code == 0, made.err
    raw = json.loads(path.read_text())
    assert raw["whole_layers"] == 0
    path.write_text(json.dumps(raw | {"whole_layers": 2}))
    again = offload_run("plan", folder, *asked, "--plan", path, "--output", tmp_path / "b.json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["experts"]["whole_layers"] == [2, 3]
    assert json.loads((tmp_path / "b.json").read_text())["whole_layers"] == 2
    del raw["whole_layers"]  # as plans had it before
    path.write_text(json.dumps(raw))
    assert offload_run("plan", folder, *asked, "--plan", path).code == 0
    path.write_text(json.dumps(raw | {"whole_layers": "two"}))
    refused = offload_run("plan", folder, *asked, "--plan", path)
    assert refused.code == 2 and "whole_layers must be a number" in refused.err
