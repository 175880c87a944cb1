"""TriForce with rounded copies of the target's weights: same answers, nothing streamed to draft."""

import json

import pytest
import torch
from engines import PROMPT, engine_for, generate
from fake_cuda import build_for_real, fake_gpu
from test_fake_cuda import gpu  # noqa: F401 - a fixture
from test_planner import FREE, speeds
from test_rounded import module_bytes
from tiny import DEEP

from offload_rt.config import (
    DraftConfig,
    DraftWeights,
    GenerationConfig,
    HomeKind,
    RetrievalConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.workload import PlacedModel, Residence, parts_of
from offload_rt.device.kinds import CPU
from offload_rt.engine import Engine, Run
from offload_rt.errors import OffloadError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats import rounded as quantized
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.planner import Means, plan_run
from offload_rt.planning.yields import expected_yield
from offload_rt.runner import loading
from offload_rt.speculative.triforce.kind import rounded_copy_parts

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 320}
SAME, INT8, INT4 = DraftWeights.SAME, DraftWeights.INT8, DraftWeights.INT4
MODULES = {INT8: quantized.Int8Linear, INT4: quantized.Int4Linear}
LONG = PROMPT * 4


def triforce(weights, draft="triforce", tokens=5, **retrieval):
    kept = {"budget_tokens": 32, "chunk_tokens": 4, "rebuild_tokens": 9} | retrieval
    config = RetrievalConfig(retrieval_weights=weights, **kept)
    return DraftConfig(draft=draft, draft_tokens=tokens, retrieval=config)


def finished(engine, prompt, tokens, sampling=None):
    run = Run.start(
        engine, [prompt], sampling or SamplingConfig(), GenerationConfig(max_tokens=tokens)
    )
    run.prefill()
    while run.active:
        run.step()
    return run


@pytest.mark.parametrize(
    ("family", "weights", "place"),
    [
        ("llama", INT4, {}),
        ("gemma2", INT8, {"kv": "disk", "kv_block_tokens": 18}),
        ("phi", INT8, {"resident_layers": 1, "slots": 2}),
    ],
)
def test_answers_do_not_change(make_tiny, family, weights, place):
    """Law 3, and it is the copies that draft. More of it: `test_speculation.py`."""
    config = {"head_dim": 16, **DEEP, **IDS}
    if family == "gemma2":
        config |= {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2}
    folder = make_tiny(family, **(config if family != "phi" else DEEP | IDS))
    with engine_for(folder, prompts=[LONG], tokens=20) as engine:
        plain = generate(engine, [LONG], tokens=20)
    draft = triforce(weights)
    with engine_for(folder, prompts=[LONG], tokens=20, draft=draft, **place) as engine:
        copy = engine._rounded_copy.network
        kinds = {type(m) for i in engine.placement.copied for m in copy._layers[i].modules()}
        assert MODULES[weights] in kinds and torch.nn.Linear not in kinds
        for index in set(engine.placement.resident) - set(engine.placement.copied):
            assert copy._layers[index] is engine.network._layers[index]
        run = finished(engine, LONG, 20)
        assert [s.emitted for s in run.sequences] == plain
        if weights is INT8:  # 4 bits change a random model of this size too much
            assert run.report().speculation.accepted > 2


def test_a_draft_that_leaves_nothing_out_is_mostly_right(make_tiny):
    """So the copies read the exact rows of the retrieval cache at the right positions."""
    folder = make_tiny("llama", **DEEP, **IDS)
    with engine_for(
        folder, prompts=[LONG], tokens=40, draft=triforce(INT8, budget_tokens=128)
    ) as engine:
        speculation = finished(engine, LONG, 40).report().speculation
    assert min(speculation.acceptance_per_depth) > 0.7


@pytest.mark.parametrize("place", [{}, {"resident_layers": 1, "slots": 2}])
def test_sampled_drafts_are_drawn_from_what_the_copies_say(make_tiny, monkeypatch, place):
    """The distribution that goes with a draft is the copies', not the target's: law 4 needs it."""
    folder = make_tiny("llama", **DEEP, **IDS)
    sampling = SamplingConfig(temperature=1.0, seed=3)
    with engine_for(folder, prompts=[LONG], tokens=20, draft=triforce(INT4), **place) as engine:
        laws, real = [], engine._rounded_copy.draft_logits

        def check(part):
            logits = real(part)
            laws.append(torch.softmax(logits.double(), dim=-1))
            return logits

        monkeypatch.setattr(engine._rounded_copy, "draft_logits", check)
        run = Run.start(engine, [LONG], sampling, GenerationConfig(max_tokens=20))
        run.prefill()
        draft = run.sequences[0].drafter.propose(run.sequences[0].ids, 5)
        rows = torch.cat(laws)
        for own in draft.probs:
            assert min(float((row - own.double()).abs().max()) for row in rows) < 1e-6


def test_drafting_streams_no_weights(make_tiny):
    """What crosses the link is what the target's own passes need, drafting has none of it."""
    folder = make_tiny("llama", **DEEP, **IDS)
    place = {"resident_layers": 1, "slots": 2}
    for weights in (SAME, INT8):
        with engine_for(
            folder, prompts=[LONG], tokens=12, draft=triforce(weights), **place
        ) as engine:
            before, each = engine.link_bytes(), engine.bytes_per_pass
            speculation = finished(engine, LONG, 12).report().speculation
            passes = speculation.passes
            if weights is SAME:
                passes += speculation.retrieval.passes
            ahead = engine.placement.slots * engine.placement.slot_bytes
            assert abs(engine.link_bytes() - before - passes * each) <= ahead


@pytest.mark.parametrize(
    ("resident", "kept_in"), [(0, [INT4]), (3, [INT8]), (None, [SAME, INT4, INT8])]
)
def test_what_is_planned_is_what_is_kept(make_tiny, resident, kept_in):
    """Of the streamed layers, or of all where none is, and of the head; all else is shared."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "dtype": "bfloat16", "vocab_size": 3200}
    shape["large"] = True
    shape |= {"num_hidden_layers": 8, "tie_word_embeddings": True}
    folder = make_tiny("llama", **shape)
    checkpoint, sizes = open_checkpoint(folder), []
    for weights in kept_in:
        draft = triforce(weights)
        layers, head = rounded_copy_parts(checkpoint, draft, "auto", CPU)
        place = {"resident_layers": resident} | ({} if resident is None else {"slots": 2})
        with engine_for(folder, prompts=[LONG], draft=draft, **place) as engine:
            copied = engine.placement.streamed or range(8)
            assert len(copied) == 8 - (resident or 0)
            sizes.append(sum(layers[i] for i in copied) + head)
            assert engine.placement.copy_bytes == sizes[-1] - head
            memory = engine.memory()
            if weights is SAME:
                assert engine._rounded_copy is None and "rounded copy" not in memory.ledger
                continue
            model = engine._rounded_copy.network._model
            embedding = model.get_input_embeddings()
            own = engine.network._model.get_input_embeddings()
            assert embedding.weight.data_ptr() == own.weight.data_ptr()  # the target's
            shared = [embedding, model.get_submodule("model.norm")]  # what is in no layer
            for index in set(range(8)) - set(copied):
                shared += engine.network._layers[index].modules()
            held = sum(module_bytes(m) for m in model.modules() if m not in shared)
            assert held <= sizes[-1] <= held * 1.02 + 2**16
            assert memory.ledger["rounded copy"] == pytest.approx(sizes[-1], rel=0.02)
            generate(engine, [LONG], tokens=6)
            memory = engine.memory()
            assert memory.device_peak_bytes <= memory.device_planned_bytes
    assert sizes == sorted({*sizes}) and (sizes[0] == 0) is (SAME in kept_in)


# --- planning ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(make_tiny):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "dtype": "bfloat16", "vocab_size": 3200}
    shape["large"] = True
    folder = make_tiny("llama", num_hidden_layers=12, max_position_embeddings=8192, **shape)
    return open_checkpoint(folder)


def planned(checkpoint, draft, *, device=CPU, **runtime):
    return plan_run(
        checkpoint,
        RuntimeConfig(device="cpu", **runtime),
        device,
        load=RunLoad(capacities=[4100], prompt_tokens=4000, drafting=Drafting(draft)),
        free=FREE,
        means=Means(speeds=speeds(1e8), yields=lambda c: expected_yield(c.kind)),
    )


def test_auto_takes_whichever_is_faster_and_fits(wide):
    auto = triforce(DraftWeights.AUTO, budget_tokens=256)
    own = planned(wide, triforce(SAME, budget_tokens=256), resident_layers=2)
    copies = planned(wide, triforce(INT8, budget_tokens=256), resident_layers=2)
    assert copies.prediction.s_per_token < own.prediction.s_per_token / 2  # own are streamed
    both = planned(wide, auto, resident_layers=2)
    assert both.drafting.config.retrieval.retrieval_weights is INT8
    assert both.prediction == copies.prediction
    assert {c.draft.retrieval.retrieval_weights for c in both.considered} == {SAME, INT8}
    small = own.smallest_bytes + 2**16  # no room for copies
    assert small < copies.smallest_bytes
    tight = planned(wide, auto, device_limit_bytes=small)
    assert tight.drafting.config.retrieval.retrieval_weights is SAME
    layers, head = rounded_copy_parts(wide, copies.drafting.config, "auto", CPU)
    copied = sum(layers) + head
    copied -= sum(layers[i] for i in copies.placement.resident)
    spent = copies.placement.drafter_bytes - own.placement.drafter_bytes
    assert spent == copied > 0


@pytest.mark.parametrize("streamed", [(1, 4, 7), ()])
def test_a_pass_with_copies_costs_what_is_rounded_and_what_is_not(wide, streamed):
    """By hand: copies of the streamed layers, or of all where none is; the head is rounded."""
    there = speeds()
    parts = parts_of(wide, "auto", CPU)
    model = PlacedModel(
        parts=parts, speeds=there, residence=Residence(streamed=streamed, slots=2),
        context_tokens=50,
    )  # fmt: skip
    load = model.over_retrieval(4, 32, INT8)
    assert load.streamed == () and load.tokens == 4
    assert (load.head, load.head_weights) == there.draft_work(model.load(4).head, INT8)
    for index, layer in enumerate(load.layers):
        plain = parts.layers[index].work(4)
        own = plain, there.order(resident=True)
        made = there.draft_work(plain, INT8) if index in streamed or not streamed else own
        assert (layer.work, layer.weights) == made


def test_auto_drafting_takes_copies_where_weights_are_streamed(wide):
    """KV off the device and layers streamed: own weights would stream for each draft pass."""
    made = planned(wide, DraftConfig(draft="auto"), resident_layers=2, kv="disk")
    names = {(c.draft.kind, c.draft.retrieval.retrieval_weights) for c in made.considered}
    assert ("triforce", INT8) in names and ("triforce", SAME) in names


def test_without_a_planner_own_weights_draft(make_tiny):
    folder = make_tiny("llama", dtype="bfloat16", **DEEP, **IDS)
    draft = triforce(DraftWeights.AUTO)
    with engine_for(folder, prompts=[LONG], draft=draft) as engine:
        assert engine.draft.retrieval.retrieval_weights is SAME and engine._rounded_copy is None


# --- the command line ----------------------------------------------------------------------------


def test_the_flag_is_used_shown_and_kept_in_plans(offload_run, tiny_model, tmp_path):
    memory = ("--device", "cpu", "--device-memory", "256MiB")
    flags = ("--draft", "triforce", "--draft-tokens", 4, "--retrieval-weights", "int8")
    common = ("generate", tiny_model, "-p", "the quick brown", "-n", 12, *memory)
    plain = offload_run(*common, "--draft", "none", "--json")
    done = offload_run(*common, *flags, "--json")
    assert done.code == 0, done.err
    out = json.loads(done.out)
    assert out["plan"]["retrieval_weights"] == "int8"
    assert out["text"] == json.loads(plain.out)["text"]
    shown = offload_run(*common, *flags)
    assert "triforce (int8)" in shown.err and "of int8 copies over at most" in shown.err
    path = tmp_path / "plan.json"
    done = offload_run("plan", tiny_model, *flags, *memory, "--context", 64, "--output", path)
    assert done.code == 0 and "int8 copies of layers" in done.out
    assert json.loads(path.read_text())["options"]["retrieval_weights"] == "int8"
    done = offload_run(*common, "--plan", path, "--json")
    assert done.code == 0 and json.loads(done.out)["plan"]["retrieval_weights"] == "int8"


@pytest.mark.parametrize("draft", ["none", "ngram", "auto"])
def test_the_flag_is_refused_where_nothing_reads_it(offload_run, tiny_model, draft):
    done = offload_run(
        "generate", tiny_model, "-p", "a", "--draft", draft, "--retrieval-weights", "int8"
    )
    assert done.code == 2 and "--retrieval-... options are for --draft triforce" in done.err


# --- a GPU ---------------------------------------------------------------------------------------


def test_int4_copies_on_a_gpu(gpu, make_tiny, monkeypatch):  # noqa: F811
    """Fake tensors: no device is mixed up, and no draft pass waits but for its verdict."""
    monkeypatch.setattr(loading, "Network", build_for_real(loading.Network))
    folder = make_tiny("llama", dtype="bfloat16", num_hidden_layers=2, vocab_size=320)
    runtime = RuntimeConfig(
        device="cuda:0", home=HomeKind.HOST, resident_layers=1, slots=1, prefill_chunk_tokens=16
    )
    draft = triforce(INT4, tokens=3, budget_tokens=12, chunk_tokens=3, rebuild_tokens=2)
    prompt = [(7 * i) % 290 for i in range(30)]
    with (
        fake_gpu(gpu),
        Engine(
            open_checkpoint(folder), runtime, capacities=[70], prompt_tokens=43, draft=draft
        ) as engine,
    ):
        run = Run.start(engine, [prompt], SamplingConfig(), GenerationConfig(max_tokens=20))
        gpu.strict = True
        run.prefill()
        for step in range(1, 4):
            run.step()
            inner = sum(s.retrieval.passes for s in run.sequences)
            assert inner >= step and gpu.downloads == 1 + step + inner
        gpu.strict = False
        copied = [engine._rounded_copy.network._layers[i] for i in engine.placement.streamed]
        kinds = {type(m) for layer in copied for m in layer.modules()}
        assert quantized.Int4Linear in kinds and torch.nn.Linear not in kinds


def test_int8_copies_on_a_gpu_are_refused(gpu, make_tiny):  # noqa: F811
    folder = make_tiny("llama", dtype="bfloat16", num_hidden_layers=2)
    runtime = RuntimeConfig(device="cuda:0")
    refused = pytest.raises(OffloadError, match="--retrieval-weights int8 is for the CPU")
    with fake_gpu(gpu), refused:
        Engine(
            open_checkpoint(folder), runtime, capacities=[40], prompt_tokens=9, draft=triforce(INT8)
        )


def test_what_it_gives_is_kept_apart(make_tiny):
    """Copies are right less often: their counts are their own, and old counts stay found."""
    from offload_rt.planning.history import experience_key

    target = open_checkpoint(make_tiny("llama", **IDS))
    keys = [experience_key(target, triforce(w), None, SamplingConfig()) for w in (SAME, INT8, INT4)]
    assert len(set(keys)) == 3
    auto = triforce(DraftWeights.AUTO)
    assert experience_key(target, auto, None, SamplingConfig()) == keys[0]
    assert "target in" not in keys[0]
