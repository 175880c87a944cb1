"""The target drafts for itself, with rounded copies in place of its streamed layers."""

import copy
import json

import pytest
from engines import PROMPT, engine_for, generate
from quantised import compressed_tensors, write_twins
from test_planner import FREE, speeds
from test_rounded import module_bytes
from tiny import DEEP

from offload_rt.config import (
    DraftConfig,
    DraftShape,
    GenerationConfig,
    HomeKind,
    KVPlace,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.costs.drafters import Drafting
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.engine import Run
from offload_rt.errors import ConfigError, PlanError
from offload_rt.model import network
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.planning.fit import RunLoad, place_run
from offload_rt.planning.planner import Means, plan_run
from offload_rt.planning.yields import expected_yield
from offload_rt.speculative.self_draft.kind import copied_layer_bytes

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
INT4 = DraftConfig(draft="self:int4", draft_tokens=12)
STREAMED = {"resident_layers": 1, "slots": 2}


def finished(engine, tokens, prompt=PROMPT):
    run = Run.start(engine, [prompt], SamplingConfig(), GenerationConfig(max_tokens=tokens))
    run.prefill()
    while run.active:
        run.step()
    return run


@pytest.mark.parametrize("shape", [DraftShape.CHAIN, DraftShape.TREE])
@pytest.mark.parametrize("home", [HomeKind.DISK, HomeKind.HOST])
def test_copies_that_lose_nothing_are_always_right(make_tiny, monkeypatch, shape, home):
    """So rows, places and all that is shared are those of the target's own passes."""
    monkeypatch.setattr(network, "rounded_linear", lambda linear, weights: copy.deepcopy(linear))
    folder = make_tiny("llama", **DEEP, **IDS)
    draft = DraftConfig(draft="self:int4", draft_tokens=6, shape=shape)
    with engine_for(folder, tokens=29, draft=draft, home=home, **STREAMED) as engine:
        report = finished(engine, 29).report().speculation
        assert set(report.acceptance_per_depth) == {1.0}
        if shape is DraftShape.CHAIN:
            assert report.passes == 1 + 4  # the prompt's, then 7 tokens each


def test_what_is_resident_is_there_once(make_tiny):
    options = {"resident_layers": 2, "slots": 2, "home": HomeKind.HOST}  # the embedding is here
    with engine_for(make_tiny("llama", **DEEP, **IDS), draft=INT4, **options) as engine:
        own, copied = engine.network, engine._rounded_copy.network
        for index in range(4):
            is_own = copied._layers[index] is own._layers[index]
            assert is_own == (index in engine.placement.resident)
        for get in ("get_input_embeddings", "get_output_embeddings"):
            one, other = (getattr(n._model, get)().weight for n in (own, copied))
            assert one.data_ptr() == other.data_ptr()


def test_drafting_streams_nothing(make_tiny):
    with engine_for(make_tiny("llama", **DEEP, **IDS), tokens=30, draft=INT4, **STREAMED) as engine:
        before = engine.link_bytes()
        run = finished(engine, 30)
        moved = run.report().speculation.passes * engine.bytes_per_pass
        ahead = engine.placement.slots * engine.placement.slot_bytes
        assert run.counts.drafted > 0 and abs(engine.link_bytes() - before - moved) <= ahead


@pytest.fixture(scope="module")
def wide(make_tiny):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "dtype": "bfloat16", "vocab_size": 3200}
    shape["large"] = True
    return make_tiny("llama", num_hidden_layers=8, max_position_embeddings=8192, **shape)


@pytest.mark.parametrize("weights", ["int4", "int8"])
def test_what_is_planned_is_what_is_kept(wide, weights):
    draft = DraftConfig(draft=f"self:{weights}", draft_tokens=24)
    with engine_for(wide, draft=draft, resident_layers=5, slots=2) as engine:
        sizes = copied_layer_bytes(engine.checkpoint, draft, "auto", CPU)
        planned = sum(sizes[i] for i in engine.placement.streamed)
        assert engine.placement.copy_bytes == planned < sum(sizes)
        layers = [engine._rounded_copy.network._layers[i] for i in engine.placement.streamed]
        held = sum(module_bytes(m) for layer in layers for m in layer.modules())
        assert held <= planned <= held * 1.02 + 2**16
        generate(engine, tokens=6)
        memory = engine.memory()
        assert memory.ledger["rounded copy"] == pytest.approx(planned, rel=0.02)
        assert memory.device_peak_bytes <= memory.device_planned_bytes


def test_a_draft_pass_that_breaks_off_leaves_no_row(make_tiny):
    folder = make_tiny("llama", **DEEP, **IDS)
    with engine_for(folder, tokens=20, draft=INT4, **STREAMED) as engine:
        run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=20))
        run.prefill()
        (sequence,), cache = run.sequences, engine._caches[0]
        layer = engine._rounded_copy.network._layers[3]
        forward, calls = layer.forward, []

        def fails_later(*args, **options):
            calls.append(1)
            return forward(*args, **options) if len(calls) < 3 else 1 / 0

        layer.forward = fails_later
        with pytest.raises(ZeroDivisionError):
            sequence.drafter.propose(sequence.ids, 12)
        assert cache.length == len(PROMPT) and not any(cache._pending)
        layer.forward = forward
        while run.active:
            run.step()
        with engine_for(folder, tokens=20) as plain:
            assert [sequence.emitted] == generate(plain, tokens=20)


# --- refused -------------------------------------------------------------------------------------


def test_it_needs_rows_on_the_device_and_layers_that_are_streamed(make_tiny):
    folder = make_tiny("llama", **DEEP, **IDS)
    with (
        pytest.raises(ConfigError, match="--draft self reads .* --kv disk .* use --kv device"),
        engine_for(folder, draft=INT4, kv="disk", **STREAMED),
    ):
        pass
    with (
        pytest.raises(PlanError, match="all 4 stay on the device: .* lower --device-memory"),
        engine_for(folder, draft=INT4),
    ):
        pass


def test_a_model_of_8_bits_drafts_in_4_and_one_of_4_is_refused(make_tiny, tmp_path):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    source = make_tiny("llama", **sizes, **IDS)
    eight = write_twins(source, tmp_path / "eight", *compressed_tensors(8, 64)).folder
    with engine_for(eight, tokens=12) as engine:
        plain = generate(engine, tokens=12)
    with engine_for(eight, tokens=12, draft=INT4, **STREAMED) as engine:
        assert generate(engine, tokens=12) == plain
        assert engine.counters() and engine.tally.seen().hits == (engine.tally._asked, 1.0)
        assert engine.memory().device_peak_bytes <= engine.memory().device_planned_bytes
    four = write_twins(source, tmp_path / "four", *compressed_tensors(4, 64)).folder
    refused = pytest.raises(PlanError, match=r"int4 copies .* would have .* layers themselves have")
    with refused, engine_for(four, draft=INT4, **STREAMED):
        pass


# --- planned -------------------------------------------------------------------------------------


def planned(folder, draft, *, rate=1e8, **runtime):
    return plan_run(
        open_checkpoint(folder),
        RuntimeConfig(device="cpu", **runtime),
        CPU,
        load=RunLoad(capacities=[400], prompt_tokens=300, drafting=Drafting(draft)),
        free=FREE,
        means=Means(speeds=speeds(rate), yields=lambda c: expected_yield(c.kind)),
    )


def test_a_resident_layer_costs_its_bytes_less_its_copy(wide):
    checkpoint = open_checkpoint(wide)
    sizes = copied_layer_bytes(checkpoint, INT4, "auto", CPU)

    def placed(**options):
        return place_run(
            checkpoint,
            RuntimeConfig(device="cpu", slots=2, **options),
            CPU,
            load=RunLoad(capacities=[400], prompt_tokens=300, drafting=Drafting(INT4)),
            free=FREE,
        )

    few, more = (placed(resident_layers=count) for count in (3, 4))
    layer = few.demand.layer_bytes[0]
    spent = more.device_bytes - few.device_bytes
    assert spent == pytest.approx(layer - sizes[0], abs=2**15) and spent > layer // 2
    assert placed(device_limit_bytes=more.device_bytes).resident == more.resident
    assert placed(device_limit_bytes=more.device_bytes - 1).resident == few.resident


def test_the_planner_keeps_fewer_layers_than_fit_where_that_is_faster(wide):
    limit = 144 * 2**20
    draft = DraftConfig(draft="self:int4", draft_tokens=64)
    for rate in (1e8, 1e11):
        chosen = planned(wide, draft, rate=rate, device_limit_bytes=limit)
        counts = range(len(chosen.placement.resident) + 4)
        for count in counts:
            try:
                other = planned(
                    wide, draft, rate=rate, device_limit_bytes=limit, resident_layers=count
                )
            except PlanError:
                continue
            assert chosen.prediction.s_per_token <= 1.02 * other.prediction.s_per_token


def test_auto_considers_both_formats_and_the_words_settle_them(wide):
    made = planned(wide, DraftConfig(draft="auto"), resident_layers=2)
    looked = {c.draft.draft for c in made.considered if c.draft.kind == "self"}
    assert looked == {"self:int4", "self:int8"}
    away = planned(wide, DraftConfig(draft="auto"), resident_layers=2, kv=KVPlace.DISK)
    assert not any(c.draft.kind == "self" for c in away.considered)
    asked = planned(wide, DraftConfig(draft="self", draft_tokens=16), resident_layers=2)
    assert asked.drafting.config.draft in looked
    with pytest.raises(PlanError, match="on a GPU is for bf16 models"):
        copied_layer_bytes(open_checkpoint(wide), INT4, "float32", CUDA)


def test_plan_simulate_and_generate_say_what_drafts(tmp_path, make_tiny, offload_run):
    folder = make_tiny("llama", tokenizer=True, **DEEP, **IDS)
    place = ("--device", "cpu", "--resident-layers", 2)
    flags = (*place, "--draft", "self:int4", "--draft-tokens", 12)
    path = tmp_path / "plan.json"
    done = offload_run("plan", folder, *flags, "--context", 64, "--output", path)
    assert done.code == 0 and "int4 copies of the streamed layers" in " ".join(done.out.split())
    saved = json.loads(path.read_text())["options"]
    assert saved["draft"] == "self:int4"
    plan = json.loads(offload_run("plan", folder, *flags, "--context", 64, "--json").out)
    checkpoint = open_checkpoint(folder)
    sizes = copied_layer_bytes(checkpoint, INT4, "auto", CPU)
    assert plan["drafter_bytes"] > 2 * sizes[0] > 0
    given = ("--tokens-per-pass", "6", "--profile", "cpu-2core-avx512bf16", "--json")
    told = offload_run("simulate", folder, *flags, *given)
    assert told.code == 0, told.err
    assert json.loads(told.out)["drafting_s"] > 0
    text = ("generate", folder, "-p", "the quick brown", "-n", 12, "--json")
    answers = [
        json.loads(offload_run(*text, *more).out)["text"]
        for more in (place, flags, ("--plan", path, "--device", "cpu"))
    ]
    assert answers[0] == answers[1] == answers[2]


def test_a_pass_with_copies_costs_what_is_rounded_and_what_is_not(wide):
    """By hand: resident layers as they are, copies at their share, the head as it is."""
    from offload_rt.costs.workload import PlacedModel, Residence, parts_of

    there = speeds()
    parts = parts_of(open_checkpoint(wide), "auto", CPU)
    model = PlacedModel(
        parts=parts, speeds=there, residence=Residence(streamed=(1, 4, 7), slots=2),
        context_tokens=50,
    )  # fmt: skip
    load = model.over_own_rows(INT4.copies).draft_load(4)
    own = model.load(4)
    assert load.streamed == () and load.tokens == 4 and load.head == own.head
    assert load.head_weights is own.head_weights
    for index, layer in enumerate(load.layers):
        copied, plain = index in (1, 4, 7), parts.layers[index].work(4)
        rounded, order = there.draft_work(plain, INT4.copies)
        assert layer.work == (rounded if copied else plain)
        assert layer.weights is (order if copied else there.order(resident=True))
        assert order is not there.order(resident=True)
