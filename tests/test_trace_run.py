"""`generate --trace`: when passes, layers, copies and drafts of a run began and ended."""

import json
from collections import Counter

import pytest
from engines import PROMPT, engine_for
from fake_cuda import fake_gpu
from test_fake_cuda import PROMPTS, gpu  # noqa: F401 - a fixture

from offload_rt.config import (
    DraftConfig,
    GenerationConfig,
    HomeKind,
    KVPlace,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.engine import Engine, Run, tracing
from offload_rt.engine.tracing import PASSES
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.trace import Lane

SLACK_S = 1e-9


def of(events, lane, prefix=""):
    """Events of a lane by when they began, the outer ones first."""
    found = [e for e in events if e.lane == lane and e.name.startswith(prefix)]
    return sorted(found, key=lambda e: (e.start_s, -e.end_s))


def follow_or_nest(events):
    open_ends = []
    for event in events:
        while open_ends and open_ends[-1] <= event.start_s + SLACK_S:
            open_ends.pop()
        if open_ends and event.end_s > open_ends[-1] + SLACK_S:
            return False
        open_ends.append(event.end_s)
    return True


def answer(engine, tokens):
    run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=tokens))
    run.prefill()
    while run.active:
        run.step()
    return run


@pytest.fixture(scope="module")
def traced(request):
    """Events of a run that streams and drafts, the run itself, and its streamed layers."""
    make_tiny = request.getfixturevalue("make_tiny")
    folder = make_tiny("llama", num_hidden_layers=6)
    setting = {"resident_layers": 2, "slots": 2, "kv": KVPlace.DISK, "kv_block_tokens": 4}
    # With several readers a copy can be done before the one ahead of it, and then has no length.
    draft = DraftConfig(draft="ngram", draft_tokens=4)
    with engine_for(folder, tokens=24, draft=draft, readers=1, **setting) as engine:
        plain = answer(engine, 24).sequences[0].emitted
        engine.forget()
        tracer = engine.trace()
        run = answer(engine, 24)
        assert run.sequences[0].emitted == plain
        return tracer.events(), run, engine.placement.streamed


def test_each_layer_computes_once_in_each_pass(traced):
    events, run, _ = traced
    passes = of(events, PASSES)
    assert [e.name for e in passes][:1] == ["prompt"] and len(passes) == run.passes
    layers = of(events, Lane.COMPUTE, "layer")
    assert Counter(e.name for e in layers) == {f"layer {i}": run.passes for i in range(6)}
    for number, (one, layer) in enumerate(zip(range(len(layers)), layers, strict=True)):
        own = passes[number // 6]
        assert own.start_s <= layer.start_s <= layer.end_s <= own.end_s
        assert layer.name == f"layer {one % 6}"


def test_what_is_waited_for_has_come_when_the_wait_is_over(traced):
    events, run, streamed = traced
    for layer in streamed:
        waits, copies = (of(events, lane, f"{word}layer {layer}") for lane, word in
                         ((Lane.COMPUTE, "wait for "), (Lane.COPY, "weights of ")))  # fmt: skip
        assert len(waits) == run.passes
        # What was fetched ahead before the trace began is not in it.
        assert len(waits) - 1 <= len(copies) <= len(waits) + 1
        ahead = run.passes - len([c for c in copies if c.end_s <= waits[-1].end_s + SLACK_S])
        assert ahead in (0, 1)
        for copy, wait in zip(copies, waits[ahead:], strict=False):
            assert copy.start_s < copy.end_s <= wait.end_s + 1e-4  # the host reads its clock later


def test_a_copy_is_as_long_as_the_link_needs(make_tiny):
    folder = make_tiny("llama", num_hidden_layers=4)
    with engine_for(folder, resident_layers=2, slots=1, home=HomeKind.HOST) as engine:
        layer_bytes = engine.bytes_per_pass / 2
    link = {"home": HomeKind.HOST, "link_bytes_per_s": layer_bytes / 0.005}
    with engine_for(folder, resident_layers=2, slots=1, **link) as engine:
        tracer = engine.trace()
        run = answer(engine, 3)
        copies = of(tracer.events(), Lane.COPY)
    assert len(copies) == 2 * run.passes
    assert all(copy.end_s - copy.start_s >= 0.0049 for copy in copies)


def test_lanes_follow_or_nest(traced):
    events, _, _ = traced
    assert {e.lane for e in events} == {PASSES, *Lane}
    assert all(e.start_s <= e.end_s for e in events)
    for lane in (PASSES, *Lane):
        assert follow_or_nest(of(events, lane)), lane


def test_kv_is_written_and_read_back(traced):
    events, _, _ = traced
    assert of(events, Lane.KV_BACK, "new KV of layer 3 goes home") and of(
        events, Lane.KV, "KV of layer 3, block 0"
    )
    assert of(events, Lane.COMPUTE, "wait for KV of layer 3, block 0")


def test_a_long_run_settles_as_it_goes(make_tiny, monkeypatch):
    monkeypatch.setattr(tracing, "_MOST_OPEN", 10)
    with engine_for(make_tiny("llama"), resident_layers=1, slots=1) as engine:
        tracer = engine.trace()
        run = answer(engine, 8)
        assert len(tracer._spans) <= 11
        layers = len(engine.network.layouts)
        assert len(of(tracer.events(), Lane.COMPUTE, "layer")) == layers * run.passes


def test_a_pass_that_broke_off_leaves_what_was_done(make_tiny):
    def stop():
        raise KeyboardInterrupt

    with engine_for(make_tiny("llama"), resident_layers=1, slots=1) as engine:
        tracer = engine.trace()
        run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=4))
        run.prefill()
        before = len(of(tracer.events(), Lane.COMPUTE, "layer"))
        engine.poll_with(stop)
        with pytest.raises(KeyboardInterrupt):
            run.step()
        assert (
            before == len(of(tracer.events(), Lane.COMPUTE, "layer")) == len(engine.network.layouts)
        )
        assert [e.name for e in of(tracer.events(), PASSES)] == ["prompt", "pass, 0 drafted"]


def test_a_gpus_times_are_its_own(gpu, make_tiny):  # noqa: F811
    """Virtual time: a copy is over when compute stops waiting, and the host does not wait."""
    runtime = RuntimeConfig(
        device="cuda:0", home=HomeKind.HOST, resident_layers=0, slots=1, prefill_chunk_tokens=8
    )
    checkpoint = open_checkpoint(make_tiny(num_hidden_layers=3))
    with (
        fake_gpu(gpu),
        Engine(checkpoint, runtime, capacities=[20, 20], prompt_tokens=14) as engine,
    ):
        run = Run.start(engine, PROMPTS, SamplingConfig(), GenerationConfig(max_tokens=4))
        tracer = engine.trace()
        gpu.strict = True
        run.prefill()
        run.step()
        gpu.strict = False
        events = tracer.events()
    copies, waits = of(events, Lane.COPY), of(events, Lane.COMPUTE, "wait")
    assert [w.name for w in waits] == [f"wait for layer {i}" for i in (0, 1, 2) * 2]
    assert [c.name for c in copies] == [f"weights of layer {i}" for i in (1, 2, 0, 1, 2, 0)]
    for copy, wait in zip(copies, waits[1:], strict=False):
        assert copy.start_s < copy.end_s == pytest.approx(wait.end_s, abs=1e-12)


def test_the_command_line_writes_it(tiny_model, offload_run, tmp_path):
    file = tmp_path / "run.json"
    args = ("generate", tiny_model, "-p", "Hi", "-n", 4, "--resident-layers", 1, "--json")
    plain, done = offload_run(*args), offload_run(*args, "--trace", file)
    assert (plain.code, done.code) == (0, 0)
    assert json.loads(done.out)["text"] == json.loads(plain.out)["text"]
    found = json.loads(file.read_text())["traceEvents"]
    assert {e["args"]["name"] for e in found if e["name"] == "thread_name"} >= {PASSES, Lane.COPY}


def test_a_file_that_cannot_be_is_refused_before_the_model_is_read(offload_run, tmp_path):
    done = offload_run("generate", "no/such/model", "-p", "Hi", "--trace", tmp_path)
    assert done.code == 2 and str(tmp_path) in done.err and "no/such/model" not in done.err
