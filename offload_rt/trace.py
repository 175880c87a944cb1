"""What happened when, as a Chrome trace: chrome://tracing and https://ui.perfetto.dev show it.

A simulated pass and a real run write the same lanes, so that they can be laid side by side. No
torch here.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from offload_rt.writing import write_text

_US = 1e6  # the format counts in microseconds


class Lane(StrEnum):
    """What is busy, from top to bottom."""

    COPY = "copy of weights"
    KV = "copy of KV"
    KV_BACK = "KV going home"
    COMPUTE = "compute"
    DRAFTING = "drafting"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceEvent:
    """Something that takes time.

    Attributes:
        name: of what is done, as `layer 3`.
        lane: what is busy with it: one of `Lane`, with a device's number behind if there are
            several.
        start_s: from any zero that all events share.
        end_s: from the same.
        details: numbers about it, with the unit in their name.
    """

    name: str
    lane: str
    start_s: float
    end_s: float
    details: Mapping[str, int | float] = field(default_factory=dict)


def lanes_of(events: Iterable[TraceEvent]) -> list[str]:
    """The lanes there are, those of `Lane` first and in its order."""
    there = list(dict.fromkeys(event.lane for event in events))
    known = [lane for wanted in Lane for lane in there if lane.startswith(wanted)]
    return known + [lane for lane in there if lane not in known]


def chrome_trace(events: Iterable[TraceEvent], process: str) -> dict[str, object]:
    """The object that the viewers read.

    Args:
        events: in any order.
        process: heading of the lanes: what ran, and whether it was simulated.
    """
    events = list(events)
    numbers = {lane: number for number, lane in enumerate(lanes_of(events), start=1)}
    made: list[dict[str, object]] = [_named("process_name", 0, process)]
    for lane, number in numbers.items():
        made.append(_named("thread_name", number, lane))
        made.append(_about("thread_sort_index", number, {"sort_index": number}))
    for event in sorted(events, key=lambda one: (one.start_s, -one.end_s)):
        made.append(
            {
                "ph": "X",
                "name": event.name,
                "cat": event.lane,
                "pid": 1,
                "tid": numbers[event.lane],
                "ts": _US * event.start_s,
                "dur": _US * (event.end_s - event.start_s),
                "args": dict(event.details),
            }
        )
    return {"traceEvents": made, "displayTimeUnit": "ms"}


def write_trace(path: Path, events: Iterable[TraceEvent], process: str) -> None:
    """Write a trace file, whole or not at all.

    Raises:
        ConfigError: it could not be written.
    """
    write_text(path, json.dumps(chrome_trace(events, process)) + "\n")


def _named(kind: str, number: int, name: str) -> dict[str, object]:
    return _about(kind, number, {"name": name})


def _about(kind: str, number: int, details: Mapping[str, object]) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": 1, "tid": number, "args": dict(details)}
