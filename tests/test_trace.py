"""Traces as the viewers read them, and timelines of a simulated pass."""

import json

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
