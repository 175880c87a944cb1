"""Traces as the viewers read them, and timelines of a simulated pass."""

import json
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_costs_one_road import LARGE, SMALL

from offload_rt.cli import plan_timeline
from offload_rt.cli.plan_timeline import timeline_lines
from offload_rt.costs.timeline import (
    SpanKind,
    TimedLayer,
    TimedPass,
    steady_pass,
    steady_spans,
)
from offload_rt.trace import Lane, TraceEvent, chrome_trace, write_trace


def event(name, lane, start_s, end_s, **details):
    return TraceEvent(name=name, lane=lane, start_s=start_s, end_s=end_s, details=details)


EVENTS = [
    event("layer 0", Lane.COMPUTE, 0.5, 0.75, tokens=3),
    event("layer 1", Lane.COPY, 0.0, 0.5, bytes=100),
    event("other", "a lane of its own", 0.0, 1.0),
]


def test_an_event_is_a_complete_one_in_microseconds_in_its_lane():
    made = chrome_trace(EVENTS, "a run")
    lanes = {e["args"]["name"]: e["tid"] for e in made["traceEvents"] if e["name"] == "thread_name"}
    assert list(lanes) == [Lane.COPY, Lane.COMPUTE, "a lane of its own"]
    (layer,) = [e for e in made["traceEvents"] if e["name"] == "layer 0"]
    assert (layer["ph"], layer["ts"], layer["dur"]) == ("X", 500_000, 250_000)
    assert layer["tid"] == lanes[Lane.COMPUTE] and layer["args"] == {"tokens": 3}
    (process,) = [e for e in made["traceEvents"] if e["name"] == "process_name"]
    assert process["args"] == {"name": "a run"}
    starts = [e["ts"] for e in made["traceEvents"] if e["ph"] == "X"]
    assert starts == sorted(starts)


def test_a_file_holds_the_same(tmp_path):
    path = tmp_path / "trace.json"
    write_trace(path, iter(EVENTS), "a run")
    assert json.loads(path.read_text()) == chrome_trace(EVENTS, "a run")


def passes(draw):
    """Small passes: some layers streamed, some with KV at home."""
    layers = [
        TimedLayer(
            kernel_s=draw(st.floats(0.01, 1.0)),
            home_bytes=draw(st.sampled_from([None, 10, 50])),
            kv_bytes=draw(st.sampled_from([0, 7, 30])),
            kv_kernel_s=0.1,
            back_bytes=1,
        )
        for _ in range(draw(st.integers(1, 5)))
    ]
    rate = draw(st.floats(10.0, 200.0))
    return TimedPass(
        layers=layers,
        slots=2,
        kv_slots=2,
        kv_block_bytes=10,
        home_bytes_per_s=(rate,),
        kv_bytes_per_s=rate,
        back_bytes_per_s=rate,
        end_s=draw(st.floats(0.0, 0.5)),
    )


@given(st.composite(passes)())
@settings(max_examples=60, deadline=None)
def test_a_simulated_pass_is_drawn_as_long_as_it_is_and_no_link_carries_two_copies(work):
    done, spans = steady_pass(work), steady_spans(work)
    computing = [s for s in spans if s.kind in (SpanKind.LAYER, SpanKind.ATTENTION, SpanKind.END)]
    attending = sum(0.1 for layer in work.layers if layer.kv_bytes)
    kernels_s = sum(layer.kernel_s for layer in work.layers) + attending + work.end_s
    assert sum(s.end_s - s.start_s for s in computing) == pytest.approx(kernels_s)
    assert max(s.end_s for s in spans) <= done.pass_s * 1.05 + 1e-9
    for kinds in ((SpanKind.WEIGHTS, SpanKind.KV), tuple(s.kind for s in computing)):
        mine = sorted((s.start_s, s.end_s) for s in spans if s.kind in kinds)
        assert all(b >= a - 1e-9 for (_, a), (b, _) in zip(mine, mine[1:], strict=False))


def test_text_says_how_busy_a_lane_is():
    head, copy, compute, *_ = timeline_lines(EVENTS)
    assert head.startswith("one step of 1 s")
    assert copy == f"  {Lane.COPY:<17}{'#' * 30}"
    assert compute == f"  {Lane.COMPUTE:<17}{' ' * 30}{'#' * 15}"
    assert timeline_lines([]) == []


@pytest.fixture
def models(tmp_path):
    for name, config in (("large", LARGE | {"model_type": "llama"}), ("small", SMALL)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.fixture
def draw(offload_run, models):
    """Plans a run that streams weights and KV with a draft model, and draws a step."""

    def run(name, *more):
        return offload_run(
            *("plan", models / "large", "--device", "cuda", "--device-memory", "3GiB"),
            *("--host-memory", "99GiB", "--profile", "rtx4090-pcie4x16", "--kv", "host"),
            *("--resident-layers", 1, "--slots", 2, "--draft", f"model:{models / 'small'}"),
            *("--draft-tokens", 4, "--timeline", models / name, *more),
        )

    return run


def test_a_step_is_drawn_in_every_form(draw, models):
    done = draw("step.json", "--json")
    predicted = json.loads(done.out)["predicted"]
    events = [
        e for e in json.loads((models / "step.json").read_text())["traceEvents"] if e["ph"] == "X"
    ]
    assert {e["cat"] for e in events} == set(Lane)
    drafting = [e["dur"] / 1e6 for e in events if e["cat"] == Lane.DRAFTING]
    assert drafting == [pytest.approx(predicted["draft_s"])]
    copied = sum(e["dur"] / 1e6 for e in events if e["cat"] in (Lane.COPY, Lane.KV))
    assert copied == pytest.approx(predicted["transfer_s"], rel=0.02)
    end_s = max(e["ts"] + e["dur"] for e in events) / 1e6
    assert end_s == pytest.approx(predicted["pass_s"] + predicted["draft_s"], abs=2e-3)

    assert draw("step.html").code == 0
    page = (models / "step.html").read_text()
    assert not re.findall(r"https?://(?!www\.w3\.org)|<script|@import|url\(", page)
    picture = ElementTree.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    bars = picture.findall(".//{*}rect")
    assert len(bars) == len(events)
    assert any(bar.find("{*}title").text.startswith("weights of layer") for bar in bars)

    assert draw("step.png").code == 0
    assert (models / "step.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", [("plan", "--timeline"), ("generate", "--trace")])
def test_a_picture_in_a_folder_that_is_not_there_is_refused_first(option, tiny_model, offload_run):
    verb, name = option
    wanted = tiny_model / "no" / "such" / "step.json"
    prompt = ("-p", "a") if verb == "generate" else ()
    refused = offload_run(verb, tiny_model, *prompt, name, wanted)
    assert refused.code == 2 and "make it first" in refused.err
    assert not (tiny_model / "no").exists()


def test_a_timeline_fits_the_terminal(draw, monkeypatch):
    for width in (60, 80):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = draw("step.json", "-v").out.splitlines()
        assert any(line.startswith("  copy of weights  ") for line in lines)
        assert max(map(len, lines)) <= width


def test_what_cannot_be_drawn_is_said_before_planning(draw, models, monkeypatch):
    done = draw("step.gif")
    assert done.code == 2 and "ends in no known form" in done.err
    monkeypatch.setattr(plan_timeline, "find_spec", lambda name: None)
    done = draw("step.png")
    assert done.code == 2 and "pip install matplotlib" in done.err
    assert not (models / "step.png").exists()
