"""Time passes of a quantised model against its 16-bit original, both streamed from disk, in turns.

Usage: bench_formats.py ORIGINAL QUANTISED [QUANTISED ...] [--tokens 1,64] [--rounds 4] [--json]

Every layer is streamed. The models take turns (A B A B ...), so that a disk or a neighbour that
changes does so for all; a turn times `--passes` passes after one that is not timed. With
NUMBA_DISABLE_JIT=1 torch dequantises, whatever is installed.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from offload_rt.config import RuntimeConfig
from offload_rt.device.system import settle_math
from offload_rt.errors import OffloadError
from offload_rt.model.checkpoint import open_checkpoint, resolve_model
from offload_rt.units import format_rate, format_size, parse_size


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds; returns what `--json` prints."""
    from offload_rt.engine import Engine

    widths = [int(text) for text in arguments.tokens.split(",")]
    config = RuntimeConfig(
        device_limit_bytes=parse_size(arguments.device_memory), resident_layers=0
    )
    with ExitStack() as stack:
        engines = [
            stack.enter_context(
                Engine(
                    open_checkpoint(resolve_model(model)),
                    config,
                    capacities=[max(widths) + 1],
                    prompt_tokens=max(widths),
                )
            )
            for model in arguments.models
        ]
        seconds: dict[tuple[int, int], list[float]] = {}
        for number in range(arguments.rounds):
            for width in widths:
                for which, engine in enumerate(engines):
                    taken = turn(engine, width, arguments.passes)
                    seconds.setdefault((which, width), []).append(taken)
                line = "  ".join(f"{seconds[w, width][-1]:.3f}" for w in range(len(engines)))
                print(f"round {number + 1}, {width} tokens: {line} s", file=sys.stderr)
        return {
            "models": [Path(model).name for model in arguments.models],
            "bytes_per_pass": [engine.bytes_per_pass for engine in engines],
            "by_tokens": {
                str(width): [row(seconds, which, width) for which in range(len(engines))]
                for width in widths
            },
        }


def turn(engine: Any, tokens: int, passes: int) -> float:  # noqa: ANN401 - imported late
    """Seconds of a pass, the median of some after one that is not timed."""
    ids, taken = list(range(5, 5 + tokens)), []
    for _ in range(passes + 1):
        before = engine.counters()
        engine.truncate(0, 0)
        engine.forward([(0, ids)], reuse=False)
        taken.append(engine.counters().since(before).at_s)
    engine.device.copy.record().synchronize()  # the link is idle before another takes its turn
    return statistics.median(taken[1:])


def row(seconds: dict[tuple[int, int], list[float]], which: int, width: int) -> dict[str, Any]:
    """Medians of one model, and of its speed by that of the first in the same round."""
    mine, first = seconds[which, width], seconds[0, width]
    ratios = [one / other for one, other in zip(first, mine, strict=True)]
    return {
        "s_per_pass": statistics.median(mine),
        "speed": statistics.median(ratios),
        "speed_lowest": min(ratios),
        "speed_highest": max(ratios),
    }


def show(result: dict[str, Any]) -> None:
    """Print the medians as a table."""
    print(f"{'tokens':>7} {'bytes':>10} {'disk':>10} {'s/pass':>8} {'speed':>7}  model")
    for width, rows in result["by_tokens"].items():
        for name, nbytes, one in zip(result["models"], result["bytes_per_pass"], rows, strict=True):
            rate = format_rate(nbytes / one["s_per_pass"])
            print(
                f"{width:>7} {format_size(nbytes):>10} {rate:>10} {one['s_per_pass']:>8.3f} "
                f"{one['speed']:>7.2f}  {name}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Parse arguments, measure, print."""
    settle_math()  # before torch is there: threads that wait sleep, as in runs
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", help="folders; the first is what others are against")
    parser.add_argument("--device-memory", default="3GiB", help="limit of each (default: 3GiB)")
    parser.add_argument("--tokens", default="1,64", help="tokens per pass (default: 1,64)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds (default: 4)")
    parser.add_argument("--passes", type=int, default=2, help="timed passes a turn (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    try:
        result = measure(arguments)
    except OffloadError as error:
        print(f"bench_formats: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result, indent=1)) if arguments.json else show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
