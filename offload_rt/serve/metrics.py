"""Numbers for Prometheus, in its text format 0.0.4: vLLM's names for what vLLM has, else ours.

A viewer made for vLLM shows these as they are. `offload_rt:...` are bytes moved, the link, overlap.
"""

import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from offload_rt.engine.sequence import FinishReason
from offload_rt.report import overlap_ratio
from offload_rt.serve.bodies import Tally
from offload_rt.serve.desk import State

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_PER_TOKEN = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_TOKENS = (1, 10, 30, 100, 300, 1000, 3000, 10000, 30000, 100000)


@dataclass(slots=True)
class Histogram:
    """Counts of values by upper bounds."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def rows(self, name: str, labels: str) -> Iterable[str]:
        """Lines of the format."""
        below = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            written = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f'{name}_bucket{{{labels},le="{written}"}} {below}'
        yield f"{name}_sum{{{labels}}} {self.total:.9g}"
        yield f"{name}_count{{{labels}}} {below}"


def _histograms() -> dict[str, tuple[str, Histogram]]:
    return {
        "vllm:time_to_first_token_seconds": ("Until the first token.", Histogram(_SECONDS)),
        "vllm:inter_token_latency_seconds": (
            "Between tokens of an answer that came one after the other.",
            Histogram(_PER_TOKEN),
        ),
        "vllm:request_time_per_output_token_seconds": (
            "Per token after the first, of an answer.",
            Histogram(_PER_TOKEN),
        ),
        "vllm:e2e_request_latency_seconds": ("Of a whole answer.", Histogram(_SECONDS)),
        "vllm:request_queue_time_seconds": ("Until admitted.", Histogram(_SECONDS)),
        "vllm:request_prefill_time_seconds": ("Until the first token.", Histogram(_SECONDS)),
        "vllm:request_decode_time_seconds": ("From there to the end.", Histogram(_SECONDS)),
        "vllm:request_prompt_tokens": ("Of a prompt.", Histogram(_TOKENS)),
        "vllm:request_generation_tokens": ("Of an answer.", Histogram(_TOKENS)),
    }


@dataclass(slots=True)
class Metrics:
    """What was measured of answers.

    Attributes:
        refused: requests that were answered with an error, by status.
    """

    refused: dict[int, int] = field(default_factory=dict)
    _of: dict[str, tuple[str, Histogram]] = field(default_factory=_histograms)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, tally: Tally) -> None:
        """Count an answer that came to its end."""
        whole_s = tally.queue_s + tally.prompt_s + tally.answer_s
        values = {
            "vllm:time_to_first_token_seconds": tally.queue_s + tally.prompt_s,
            "vllm:e2e_request_latency_seconds": whole_s,
            "vllm:request_queue_time_seconds": tally.queue_s,
            "vllm:request_prefill_time_seconds": tally.prompt_s,
            "vllm:request_decode_time_seconds": tally.answer_s,
            "vllm:request_prompt_tokens": tally.prompt_tokens,
            "vllm:request_generation_tokens": tally.answer_tokens,
        }
        if tally.answer_tokens > 1:
            later = tally.answer_s / (tally.answer_tokens - 1)
            values["vllm:request_time_per_output_token_seconds"] = later
        with self._lock:
            for name, value in values.items():
                self._of[name][1].add(value)

    def gain(self, since_s: float) -> None:
        """Count a time between tokens."""
        with self._lock:
            self._of["vllm:inter_token_latency_seconds"][1].add(since_s)

    def refuse(self, status: int) -> None:
        """Count a request that was answered with an error."""
        with self._lock:
            self.refused[status] = self.refused.get(status, 0) + 1

    def text(self, state: State, model: str, kv_tokens: int, memory: Mapping[str, int]) -> str:
        """All of it.

        Args:
            state: of the engine.
            model: as clients name it.
            kv_tokens: there is memory for.
            memory: bytes of what lives where.
        """
        name = model.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        label = f'model_name="{name}"'
        lines: list[str] = []
        ended = dict(state.ended)

        def put(metric: str, kind: str, about: str, rows: Iterable[tuple[str, float]]) -> None:
            lines.append(f"# HELP {metric} {about}")
            lines.append(f"# TYPE {metric} {kind}")
            lines.extend(f"{metric}{{{label}{more}}} {value:.15g}" for more, value in rows)

        for metric, kind, about, value in _plain(state, kv_tokens):
            put(metric, kind, about, [("", value)])
        put(
            "vllm:request_success_total",
            "counter",
            "Answers by why they ended; abort is a client that left, as vLLM counts it.",
            [(f',finished_reason="{reason}"', ended.get(reason, 0)) for reason in FinishReason],
        )
        put(
            "vllm:spec_decode_num_accepted_tokens_per_pos_total",
            "counter",
            "Drafted tokens that were accepted, by their place in the draft.",
            [(f',position="{place}"', count) for place, count in enumerate(state.accepted_at)],
        )
        put(
            "offload_rt:draft_size",
            "gauge",
            "Tokens drafted for each answer where up to so many are written, by measured times.",
            [(f',running="{running}"', size) for running, size in state.draft_sizes],
        )
        put(
            "offload_rt:memory_bytes",
            "gauge",
            "What lives where.",
            [(f',part="{part}"', nbytes) for part, nbytes in memory.items()],
        )
        with self._lock:
            put(
                "offload_rt:refused_requests_total",
                "counter",
                "Requests answered with an error, by status.",
                [(f',status="{status}"', n) for status, n in sorted(self.refused.items())],
            )
            for metric, (about, histogram) in self._of.items():
                lines += [f"# HELP {metric} {about}", f"# TYPE {metric} histogram"]
                lines += histogram.rows(metric, label)
        return "\n".join(lines) + "\n"


def _plain(state: State, kv_tokens: int) -> Iterable[tuple[str, str, str, float]]:
    """Name, kind, what it is, and value of everything that is one number."""
    counters = state.counters
    gauge, counter = "gauge", "counter"
    yield "vllm:num_requests_running", gauge, "Answers in the making.", state.running
    yield "vllm:num_requests_waiting", gauge, "Admitted by nobody yet.", state.waiting
    used = state.reserved_tokens / max(1, kv_tokens)
    yield "vllm:kv_cache_usage_perc", gauge, "Of KV memory, set aside; 1 is all.", used
    yield "vllm:prompt_tokens_total", counter, "Of prompts, computed.", state.read_tokens
    yield "vllm:generation_tokens_total", counter, "Of answers.", state.emitted_tokens
    asked = state.read_tokens + state.reused_tokens
    yield "vllm:prefix_cache_queries_total", counter, "Tokens of prompts, looked up.", asked
    hits = state.reused_tokens
    yield "vllm:prefix_cache_hits_total", counter, "Of these, found in a cache.", hits
    yield "vllm:spec_decode_num_drafts_total", counter, "Drafts.", state.drafts
    drafted = state.drafted_tokens
    yield "vllm:spec_decode_num_draft_tokens_total", counter, "Tokens drafted.", drafted
    kept = state.accepted_tokens
    yield "vllm:spec_decode_num_accepted_tokens_total", counter, "Of these, accepted.", kept
    yield "offload_rt:sweeps_total", counter, "Passes over the weights.", state.sweeps
    yield "offload_rt:sweep_seconds_total", counter, "Time in passes.", state.sweep_s
    yield (
        "offload_rt:layer_bytes_total",
        counter,
        "Bytes of streamed layers that arrived.",
        counters.bytes_copied,
    )
    yield (
        "offload_rt:kv_bytes_total",
        counter,
        "Bytes of keys and values that were moved.",
        counters.kv_bytes_copied,
    )
    yield (
        "offload_rt:link_busy_seconds_total",
        counter,
        "Time with a copy under way.",
        counters.busy_s,
    )
    yield (
        "offload_rt:stall_seconds_total",
        counter,
        "Time computing waited for copies.",
        counters.stalled_s,
    )
    yield (
        "offload_rt:link_bytes_per_second",
        gauge,
        "Of layers of late, while copies were under way.",
        state.link_bytes_per_s,
    )
    sweeps = replace(counters, at_s=state.sweep_s, busy_s=min(counters.busy_s, state.sweep_s))
    overlap = overlap_ratio(sweeps)
    yield "offload_rt:overlap_ratio", gauge, "Copying and computing side by side.", overlap
    rate = kept / drafted if drafted else 0.0
    yield "offload_rt:acceptance_rate", gauge, "Accepted of drafted tokens.", rate
    yield "offload_rt:tokens_per_second", gauge, "Emitted of late.", state.tokens_per_s
