"""A recorded pass costs one launch: by figures of a profile, and by assumption without them."""

import dataclasses
import json
from dataclasses import replace

import pytest
from test_costs_one_road import CHAIN, FREE, GIB, LARGE, MACHINES, SMALL, model_of
from test_measure import QUICK, cpu, nothing  # noqa: F401 - a fixture
from test_profile import curve, profile, shape

from offload_rt.cli.profile_table import profile_table
from offload_rt.config import DraftConfig, DraftShape, DraftWeights, RetrievalConfig, RuntimeConfig
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.pass_cost import cost_of, link_rates, pass_times
from offload_rt.costs.sizes import recorded_bytes
from offload_rt.costs.workload import PlacedModel, Residence, parts_of
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.kinds import CPU, CUDA, Processor
from offload_rt.planning.fit import PlacedRun, RunLoad, place_run
from offload_rt.planning.given_rates import expect
from offload_rt.profiling.codec import encode, read_tree
from offload_rt.profiling.compute import measure_recorded, measure_replay
from offload_rt.profiling.profile import (
    LayerWork,
    Number,
    Obtained,
    RecordedCurve,
    ReplayTime,
    WeightOrder,
)
from offload_rt.profiling.rates import KERNEL_S, LAYER_KERNELS, REPLAY_S, layer_s, replay_s
from offload_rt.profiling.timing import Curve
from offload_rt.speculative.draft_model.kind import settled

GPU = MACHINES["gpu"]
WORK = LayerWork(weight_bytes=30 * 2**20, flops_per_token=30 * 2**20)
TIMED = Number(value=1e-4, obtained=Obtained.MEASURED, spread=0.0, samples=5)


def layer(made, work=WORK, tokens=1, **how):
    return layer_s(made, work, tokens, processor=Processor.CUDA, **how)


def timed_on_gpu(of_launched, seconds=TIMED):
    """The profile with recorded layers that take so long, whatever their size."""
    curves = tuple(
        RecordedCurve(
            processor=c.processor,
            weights=c.weights,
            shape=c.shape,
            times=tuple(replace(t, layer_s=seconds) for t in c.times if t.tokens <= 32),
        )
        for c in of_launched.layers
        if c.processor is Processor.CUDA
    )
    return replace(
        of_launched,
        recorded=curves,
        replays=(ReplayTime(processor=Processor.CUDA, replay_s=TIMED),),
    )


def test_without_a_figure_a_recorded_layer_is_its_bytes_and_its_kernels_and_says_it_is_assumed():
    """The shipped profile has 0.59 ms for a layer of 30 MiB, which are there in 0.04."""
    launched, recorded = layer(GPU.profile), layer(GPU.profile, recorded=True)
    assert launched.value == pytest.approx(5.9e-4)
    best = 0.002122 / 1711276032  # of the largest timed layer
    expected = WORK.weight_bytes * best + LAYER_KERNELS * KERNEL_S
    assert recorded.value == pytest.approx(expected) and recorded.value < launched.value / 4
    assert (
        recorded.obtained is Obtained.ASSUMED and "no layer of a recorded pass" in recorded.source
    )
    replay = replay_s(GPU.profile, Processor.CUDA)
    assert (replay.value, replay.obtained) == (REPLAY_S, Obtained.ASSUMED)
    large = LayerWork(weight_bytes=2**31, flops_per_token=2**31)
    assert layer(GPU.profile, large, recorded=True) == layer(GPU.profile, large)  # no slower


def test_more_tokens_cost_a_recorded_layer_their_arithmetic():
    made = profile(layers=(replace(curve(4, {1: 1.0, 32: 1.5}), processor=Processor.CUDA),))
    work = shape(4).work
    one, many = (layer(made, work, n, recorded=True).value for n in (1, 32))
    assert many - one == pytest.approx(0.5)


def test_figures_of_recorded_layers_are_used_for_those_alone():
    made = timed_on_gpu(GPU.profile)
    assert layer(made, recorded=True).value == pytest.approx(1e-4)
    assert layer(made, recorded=True).obtained is Obtained.MEASURED
    assert layer(made) == layer(GPU.profile)
    assert replay_s(made, Processor.CUDA) == TIMED
    assert read_tree(json.loads(encode(made))) == made
    shown = profile_table(made)
    assert "layers of recorded passes, ms by tokens in a pass" in shown
    assert "a recorded pass beside its layers, ms" in shown
    assert "recorded" not in profile_table(GPU.profile)


def placed(checkpoint, speeds=GPU, **where):
    return PlacedModel(
        parts=parts_of(checkpoint, "auto", speeds.device),
        speeds=speeds,
        residence=Residence(**where),
        context_tokens=100,
    )


def test_what_is_recorded_are_small_passes_over_kept_weights_of_one_gpu(tmp_path):
    model = model_of(tmp_path, SMALL)
    assert placed(model).draft_load(8).recorded
    assert not placed(model).load(8).recorded  # the target's own are not
    assert not placed(model).draft_load(33).recorded
    assert not placed(model, MACHINES["cpu"]).draft_load(8).recorded
    assert not placed(model, streamed=(1,), slots=1).draft_load(8).recorded
    assert not placed(model, device=(0, 1) * 2).draft_load(8).recorded
    experts = SMALL | {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2}
    sparse = model_of(tmp_path / "sparse", experts | {"moe_intermediate_size": 1408})
    assert any(layer.expert_bytes for layer in parts_of(sparse, "auto", CUDA).layers)
    assert not placed(sparse).draft_load(8).recorded
    assert placed(model, streamed=(1,), slots=1).over_retrieval(2, 64, DraftWeights.INT4).recorded
    assert (
        not placed(model, streamed=(1,), slots=1).over_retrieval(2, 64, DraftWeights.SAME).recorded
    )


def test_a_recorded_pass_has_one_launch_however_many_layers(tmp_path):
    for layers in (4, 24):
        model = model_of(tmp_path / str(layers), SMALL | {"num_hidden_layers": layers})
        load = placed(model).draft_load(1)
        made = timed_on_gpu(GPU.profile)
        times = pass_times(made, load, Processor.CUDA, link_rates(made, load))
        kv_s = sum(times.layer_s) - layers * 1e-4  # attention to cached rows
        assert 0 <= kv_s < 1e-5 * layers
        assert cost_of(load, times).pass_s == pytest.approx(sum(times.layer_s) + times.head_s)
        launched = replace(load, recorded=False)
        head_s = pass_times(made, launched, Processor.CUDA, link_rates(made, load)).head_s
        assert times.head_s != head_s  # its one launch is with the head


DRAFTS = {
    "chain": DraftConfig(draft="model:x", draft_tokens=4, shape=DraftShape.CHAIN),
    "tree": DraftConfig(draft="model:x", draft_tokens=64, shape=DraftShape.TREE),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_plans_and_simulations_draft_in_less_time_than_launches_took(tmp_path, name):
    """And with figures in the profile by these: a draft is so many times the recorded pass."""
    target = model_of(tmp_path / "large", LARGE | {"model_type": "llama"})
    small = model_of(tmp_path / "small", SMALL)
    config, seconds = RuntimeConfig(resident_layers=0, slots=2), {}
    kinds = {"launched": replace(CUDA, records=False), "recorded": CUDA}
    for way, kind in kinds.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("offload_rt.costs.machine.KINDS", {Processor.CUDA: kind})
            drafting = settled(Drafting(DRAFTS[name], small), GPU.device)
            load = RunLoad(capacities=[4096], prompt_tokens=4096, drafting=drafting)
            placement = place_run(target, config, kind, load=load, free=FREE)
            run = PlacedRun(
                checkpoint=target,
                config=config,
                speeds=GPU,
                placement=placement,
                context_tokens=4096,
            )
            seconds[way] = run.predict(drafting, expect(drafting.config, CHAIN)).draft_s
    assert 0 < seconds["recorded"] < seconds["launched"] / 2


def test_what_recorded_passes_keep_is_in_the_plan(tmp_path):
    """More for more ids and wider layers, none where none are made, and it is a drafter's."""
    target = model_of(tmp_path / "large", LARGE | {"model_type": "llama"})
    small = model_of(tmp_path / "small", SMALL)
    retrieval = RetrievalConfig(retrieval_weights=DraftWeights.SAME)
    over = DraftConfig(draft="triforce:x", draft_tokens=8, retrieval=retrieval)
    for draft, models in ((DRAFTS["chain"], [small]), (over, [small, target])):
        demands = []
        for kind in (CUDA, replace(CUDA, records=False)):
            drafting = settled(Drafting(draft, small), kind)
            load = RunLoad(capacities=[4096], prompt_tokens=4096, drafting=drafting)
            config = RuntimeConfig(resident_layers=0, slots=2)
            demands.append(place_run(target, config, kind, load=load, free=FREE).demand)
        with_them, without = demands
        expected = sum(recorded_bytes(model.config, 2, CUDA) for model in models)
        assert with_them.recorded_bytes == expected > 0 == without.recorded_bytes
        assert with_them.drafter_bytes - without.drafter_bytes == expected < GIB
    assert recorded_bytes(target.config, 2, CPU) == 0
    wide = dataclasses.replace(small.config, vocab_size=2 * small.config.vocab_size)
    assert recorded_bytes(wide, 2, CUDA) > recorded_bytes(small.config, 2, CUDA)


def test_layers_of_recorded_passes_are_timed_where_passes_are_recorded(cpu, recording):  # noqa: F811
    effort, ticks = replace(QUICK, recorded_tokens=(1, 4)), []
    shapes = effort.layer_shapes("float32", 4)[:1]
    found = measure_recorded(shapes, cpu, WeightOrder.PLAIN, Curve(effort), lambda: ticks.append(1))
    assert [time.tokens for time in found[0].times] == [1, 4] and len(ticks) == 2
    assert all(time.layer_s.value > 0 for time in found[0].times)
    assert recording["recorded"] == 2 and recording["replayed"] >= 4
    (replay,) = measure_replay(cpu, Curve(effort), nothing)
    assert 0 < replay.replay_s.value < found[0].times[0].layer_s.value * 8


def test_where_none_can_be_recorded_none_is_timed(cpu, recording, monkeypatch):  # noqa: F811
    monkeypatch.setattr(CpuDevice, "record", lambda device, work, vary: None)
    shapes = QUICK.layer_shapes("float32", 4)[:1]
    assert measure_recorded(shapes, cpu, WeightOrder.PLAIN, Curve(QUICK), nothing) == []
    assert measure_replay(cpu, Curve(QUICK), nothing) == []
