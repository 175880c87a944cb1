"""Measure how much of the disk's own rate a decode pass reaches.

Usage: bench_streaming.py MODEL --device-memory 2GiB [--tokens 1,64] [--rounds 5] [--json]

Engine passes and raw reads of the same bytes take turns (A B A B ...), so that a disk whose speed
drifts drifts for both. Raw reads are as plain as they can be: the same blocks of the same files,
O_DIRECT, as many in flight as the engine keeps, into small buffers that nothing else touches. A
round times `--passes` engine passes after one that is not timed, so that the layers fetched ahead
at the start are made up for at the end.
"""

import argparse
import ctypes
import json
import mmap
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import psutil

from offload_rt.config import RuntimeConfig
from offload_rt.device.base import PAGE_BYTES, PIECE_BYTES
from offload_rt.errors import OffloadError
from offload_rt.model.checkpoint import open_checkpoint, resolve_model
from offload_rt.model.layout import LayerLayout
from offload_rt.units import format_rate, format_size, parse_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One turn of both.

    Attributes:
        tokens: tokens in an engine pass.
        s_per_pass: wall time of an engine pass.
        stall_s: of it, time computation waited for weights.
    """

    tokens: int
    s_per_pass: float
    stall_s: float
    engine_bytes_per_s: float
    raw_bytes_per_s: float

    @property
    def ratio(self) -> float:
        """Engine rate over raw rate."""
        return self.engine_bytes_per_s / self.raw_bytes_per_s


def raw_buffers(readers: int) -> SimpleQueue[memoryview]:
    """One block for each reader, in huge pages as the engine's slots are.

    Without them one read is many small disk requests: 1.1 to 2.6 GB/s instead of 2.8 here.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, (readers + 1) * PIECE_BYTES, flags=flags)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.write(bytes(len(memory)))
    align = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PIECE_BYTES
    view = memoryview(memory)[align:]
    buffers: SimpleQueue[memoryview] = SimpleQueue()
    for reader in range(readers):
        buffers.put(view[reader * PIECE_BYTES : (reader + 1) * PIECE_BYTES])
    return buffers


def raw_rate(layouts: Sequence[LayerLayout], buffers: SimpleQueue[memoryview]) -> float:
    """Read the pages of these layers with one thread a buffer; returns bytes per second."""
    fds = {
        run.path: os.open(run.path, os.O_RDONLY | os.O_DIRECT)
        for layout in layouts
        for run in layout.runs
    }
    blocks = []
    for layout in layouts:
        for run in layout.runs:
            first = run.file_offset - run.file_offset % PAGE_BYTES
            end = run.file_offset + run.nbytes
            blocks += [(fds[run.path], at, end - at) for at in range(first, end, PIECE_BYTES)]

    def read(block: tuple[int, int, int]) -> int:
        fd, offset, rest = block
        buffer = buffers.get()
        size = min(PIECE_BYTES, -(-rest // PAGE_BYTES) * PAGE_BYTES)
        count = os.preadv(fd, [buffer[:size]], offset)
        buffers.put(buffer)
        if count < min(size, rest):
            raise OSError(f"read {count} of {size} bytes at {offset}")
        return count

    start = time.perf_counter()
    with ThreadPoolExecutor(buffers.qsize()) as pool:
        total = sum(pool.map(read, blocks))
    seconds = time.perf_counter() - start
    for fd in fds.values():
        os.close(fd)
    return total / seconds


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    """Run the rounds; returns what `--json` prints."""
    from offload_rt.engine import Engine

    checkpoint = open_checkpoint(resolve_model(arguments.model))
    widths = [int(text) for text in arguments.tokens.split(",")]
    config = RuntimeConfig(
        device_limit_bytes=parse_size(arguments.device_memory), readers=arguments.readers
    )
    rounds: list[Round] = []
    buffers = raw_buffers(arguments.readers)  # before the engine, whose memory is being measured
    rss_before = psutil.Process().memory_info().rss
    with Engine(
        checkpoint, config, capacities=[max(widths) + 1], prompt_tokens=max(widths)
    ) as engine:
        streamed = [engine.network.layouts[i] for i in engine.placement.streamed]
        if not streamed:
            raise OffloadError("the whole model is resident: lower --device-memory")
        for number in range(arguments.rounds):
            for tokens in widths:
                row = one_round(engine, streamed, tokens, arguments.passes, buffers)
                rounds.append(row)
                print(
                    f"round {number + 1}: {tokens:3d} tokens  {row.s_per_pass:6.3f} s/pass  engine "
                    f"{format_rate(row.engine_bytes_per_s)}  raw {format_rate(row.raw_bytes_per_s)}"
                    f"  ratio {row.ratio:.3f}  stall {row.stall_s:.3f} s",
                    file=sys.stderr,
                )
        memory = engine.memory()
        bytes_per_pass = engine.bytes_per_pass
    by_width = {str(n): summary([r for r in rounds if r.tokens == n]) for n in widths}
    return {
        "model": Path(arguments.model).name,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rounds": arguments.rounds,
        "bytes_per_pass": bytes_per_pass,
        "device_limit_bytes": memory.device_limit_bytes,
        "device_planned_bytes": memory.device_planned_bytes,
        "device_peak_bytes": memory.device_peak_bytes,
        "rss_growth_bytes": memory.host_peak_bytes - rss_before,
        "resident_layers": memory.resident_layers,
        "streamed_layers": memory.streamed_layers,
        "slots": memory.slots,
        **by_width[str(widths[0])],
        "by_tokens": by_width,
        "rows": [asdict(r) for r in rounds],
    }


def one_round(
    engine: "Engine",  # type: ignore[name-defined] # noqa: F821 - imported late, it loads torch
    streamed: Sequence[LayerLayout],
    tokens: int,
    timed_passes: int,
    buffers: SimpleQueue[memoryview],
) -> Round:
    """Time engine passes, then raw reads of the same layers."""
    ids = list(range(5, 5 + tokens))

    def passes(count: int) -> None:
        for _ in range(count):
            engine.truncate(0, 0)
            engine.forward([(0, ids)], reuse=False)

    passes(1)
    before = engine.counters()
    passes(timed_passes)
    phase = engine.counters().since(before)
    engine.device.copy.record().synchronize()  # the link is idle before raw reads start
    return Round(
        tokens=tokens,
        s_per_pass=phase.at_s / timed_passes,
        stall_s=phase.stalled_s / timed_passes,
        engine_bytes_per_s=timed_passes * engine.bytes_per_pass / phase.at_s,
        raw_bytes_per_s=raw_rate(streamed, buffers),
    )


def summary(rounds: Sequence[Round]) -> dict[str, float]:
    """Medians over the rounds of one width."""
    return {
        "ratio_median": statistics.median(r.ratio for r in rounds),
        "ratio_min": min(r.ratio for r in rounds),
        "engine_bytes_per_s": statistics.median(r.engine_bytes_per_s for r in rounds),
        "raw_bytes_per_s": statistics.median(r.raw_bytes_per_s for r in rounds),
        "s_per_pass": statistics.median(r.s_per_pass for r in rounds),
        "stall_s": statistics.median(r.stall_s for r in rounds),
    }


def show(result: dict[str, object]) -> None:
    """Print the medians as a table."""
    print(f"\n{'tokens':>7} {'engine':>10} {'raw':>10} {'ratio':>7} {'s/pass':>8} {'stall':>8}")
    by_tokens = result["by_tokens"]
    assert isinstance(by_tokens, dict)
    for tokens, row in by_tokens.items():
        print(
            f"{tokens:>7} {format_rate(row['engine_bytes_per_s']):>10} "
            f"{format_rate(row['raw_bytes_per_s']):>10} {row['ratio_median']:>7.3f} "
            f"{row['s_per_pass']:>7.3f}s {row['stall_s']:>7.3f}s"
        )
    sizes = {k: format_size(v) for k, v in result.items() if isinstance(v, int) and "bytes" in k}
    print(
        f"\n{result['resident_layers']} resident and {result['streamed_layers']} streamed layers, "
        f"{result['slots']} slots, {sizes['bytes_per_pass']} per pass\n"
        f"device memory: peak {sizes['device_peak_bytes']}, "
        f"planned {sizes['device_planned_bytes']}, limit {sizes['device_limit_bytes']}; "
        f"process grew by {sizes['rss_growth_bytes']}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="folder, hub id in the local cache, or demo")
    parser.add_argument("--device-memory", default="2GiB", help="limit (default: 2GiB)")
    parser.add_argument("--tokens", default="1,64", help="tokens per pass (default: 1,64)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default: 5)")
    parser.add_argument("--passes", type=int, default=2, help="timed passes a round (default: 2)")
    parser.add_argument("--readers", type=int, default=4, help="reads in flight (default: 4)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    try:
        result = measure(arguments)
    except OffloadError as error:
        print(f"bench_streaming: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
