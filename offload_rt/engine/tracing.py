"""When the work of a run began and ended, for a trace (`generate --trace`).

Nothing is noted unless an engine is asked to (`Engine.trace`). Work of a stream is noted by an
event before and one behind it, so a GPU's times are the GPU's own; the host does not wait for them
before the end.
"""

import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from offload_rt.device.base import Event, Stream
from offload_rt.device.several import Stripes
from offload_rt.errors import OffloadError
from offload_rt.trace import Lane, TraceEvent

PASSES = "passes"
_MOST_OPEN = 4096  # spans kept before the older half of them is settled; they are over by then


@dataclass(slots=True)
class _Span:
    """Work of a stream, between two events and the moments they were recorded."""

    name: str
    lane: str
    device: int
    begun: tuple[Event, float]
    ended: tuple[Event, float] | None = None


class Tracer:
    """Notes when work begins and ends.

    Args:
        stripes: whose work; they must be idle, as this moment sets their clocks.
    """

    def __init__(self, stripes: Stripes) -> None:
        self._stripes = stripes
        self._spans: deque[_Span] = deque()
        self._settled: list[TraceEvent] = []
        self._layers: dict[int, Callable[[], None]] = {}
        self._start_s = math.inf
        for device in stripes.devices:
            event = device.compute.record()
            event.synchronize()
            self._start_s = min(self._start_s, device.reached_s(event, time.perf_counter()))

    def begin(self, lane: str, name: str, stream: Stream, at: int) -> Callable[[], None]:
        """Note that work begins on a device; what is returned notes that all of it is enqueued."""
        if len(self._stripes.devices) > 1:
            lane = f"{lane} {at}"
        span = _Span(name, lane, at, (stream.record(), time.perf_counter()))
        self._spans.append(span)

        def end() -> None:
            span.ended = stream.record(), time.perf_counter()

        if len(self._spans) > _MOST_OPEN:
            self._settle(_MOST_OPEN // 2)
        return end

    def of_layers(self, what: str, layer: object, stream: Stream) -> Callable[[], None]:
        """Watch the rings of layers."""
        assert isinstance(layer, int)
        at = self._stripes.device[layer]
        if what == "wait":
            return self.begin(Lane.COMPUTE, f"wait for layer {layer}", stream, at)
        return self.begin(Lane.COPY, f"weights of layer {layer}", stream, at)

    def of_experts(self, what: str, unit: object, stream: Stream) -> Callable[[], None]:
        """Watch the pool of experts."""
        assert isinstance(unit, tuple)
        layer, expert = unit
        at, name = self._stripes.device[layer], f"expert {expert} of layer {layer}"
        if what == "wait":
            return self.begin(Lane.COMPUTE, f"wait for {name}", stream, at)
        return self.begin(Lane.COPY, name if what == "copy" else f"{name}, {what}", stream, at)

    def of_kv(
        self, at: int, layers: Sequence[int], what: str, unit: object, stream: Stream
    ) -> Callable[[], None]:
        """Watch a device's ring of KV blocks, or what goes back to their home.

        Args:
            at: the device.
            layers: it has; units are called after their place among them.
            what: of `Ring.watch`, as the others.
            unit: begins with a layer.
            stream: it is in.
        """
        unit = re.sub(r"\d+", lambda own: str(layers[int(own[0])]), str(unit), count=1)
        if what == "wait":
            return self.begin(Lane.COMPUTE, f"wait for KV of {unit}", stream, at)
        if what == "copy":
            return self.begin(Lane.KV, f"KV of {unit}", stream, at)
        return self.begin(Lane.KV_BACK, f"new KV of {unit} goes home", stream, at)

    def enter_layer(self, layer: int) -> None:
        """A layer begins to compute."""
        at = self._stripes.device[layer]
        compute = self._stripes.devices[at].compute
        self._layers[layer] = self.begin(Lane.COMPUTE, f"layer {layer}", compute, at)

    def leave_layer(self, layer: int) -> None:
        """All of a layer is enqueued."""
        self._layers.pop(layer)()

    @contextmanager
    def on_host(self, lane: str, name: str) -> Iterator[None]:
        """Note what runs inside by the host's clock."""
        start_s = time.perf_counter()
        try:
            yield
        finally:
            end_s = time.perf_counter()
            self._add(name, lane, start_s, end_s)

    def events(self) -> list[TraceEvent]:
        """All that was noted, in seconds since then; waits for the work that is under way."""
        self._settle(len(self._spans))
        return self._settled

    def _settle(self, count: int) -> None:
        for _ in range(count):
            span = self._spans.popleft()
            if span.ended is None:  # it broke off
                continue
            try:
                span.ended[0].synchronize()
                device = self._stripes.devices[span.device]
                start_s, end_s = (device.reached_s(*point) for point in (span.begun, span.ended))
            except OffloadError:  # a copy failed: the run says so
                continue
            self._add(span.name, span.lane, start_s, end_s)

    def _add(self, name: str, lane: str, start_s: float, end_s: float) -> None:
        start_s, end_s = start_s - self._start_s, end_s - self._start_s
        self._settled.append(TraceEvent(name=name, lane=lane, start_s=start_s, end_s=end_s))
