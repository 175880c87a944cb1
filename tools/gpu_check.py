"""Check a machine's GPU: laws, then measurements, one JSON line per fact, flushed to a file.

Each part runs in a process of its own with a time limit; a part that fails or hangs stops nothing.
Models are made on the spot (`gpu_check_models.py`). `--device cpu` runs all parts with tiny sizes,
so that a machine without a GPU can tell whether the parts themselves work.

Left out: published models and real text (all weights are random, so no acceptance rate is one that
a user has), prompts of more than 32,000 tokens, several machines, WSL2's limit of pinned memory, a
whole run on two GPUs but those of `tests/gpu` (links and hops are measured), energy, and races that
torch's checker of streams does not see (compute-sanitizer is not run).

Usage: bash tools/gpu_check.sh [--device cuda:0|cpu] [--parts machine,laws,...] [--out FILE]
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from offload_rt.device.system import settle_math

ROOT = Path(__file__).resolve().parent.parent
LIMITS_S = {  # seconds of each part: in all 8 minutes
    "machine": 15,
    "suite": 65,
    "laws": 45,
    "sanitizer": 35,
    "link": 25,
    "streaming": 40,
    "drafts": 30,
    "launches": 35,
    "graphs": 35,
    "formats": 30,
    "kv": 35,
    "triforce": 45,
    "plan": 45,
}
ENVIRONMENT = {"sanitizer": {"TORCH_CUDA_SANITIZER": "1", "CUDA_LAUNCH_BLOCKING": "1"}}
NO_GPU = 3

Fact = dict[str, Any]


def tell(out: Path, part: str, fact: str, **values: object) -> None:
    """Append a fact; it is on the disk when this returns."""
    with out.open("a") as file:
        file.write(json.dumps({"part": part, "fact": fact, **values}, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_part(name: str, arguments: argparse.Namespace) -> None:
    """Run one part in a process group of its own, until its time is over."""
    command = [sys.executable, __file__, "--inner", name, "--device", arguments.device]
    command += ["--out", str(arguments.out)]
    began = time.monotonic()
    own = os.environ | (ENVIRONMENT.get(name, {}) if arguments.device != "cpu" else {})
    child = subprocess.Popen(command, start_new_session=True, cwd=ROOT, env=own)
    try:
        ended = str(child.wait(timeout=arguments.limit or LIMITS_S[name]))
    except subprocess.TimeoutExpired:
        ended = "time is over"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)  # and what it started
        child.wait()
    tell(arguments.out, name, "ended", how=ended, seconds=round(time.monotonic() - began, 1))


def summarise(facts: Sequence[Fact], say: Callable[[str], None]) -> bool:
    """Say which laws held, and which figures were predicted; returns whether all is well."""
    laws = [fact for fact in facts if "held" in fact]
    broken = [fact for fact in laws if not fact["held"]]
    bad = [fact for fact in facts if fact["fact"] == "ended" and fact["how"] != "0"]
    say(f"{len(laws) - len(broken)} of {len(laws)} laws held")
    for fact in broken:
        say(f"  BROKEN {fact['part']}: {fact['fact']}: {fact.get('why', '')}")
    for fact in bad:
        say(f"  FAILED part {fact['part']}: {fact['how']} after {fact['seconds']} s")
    for fact in facts:
        if {"measured", "predicted"} <= fact.keys() and fact["predicted"]:
            off = fact["measured"] / fact["predicted"] - 1
            values = f"{fact['measured']:.4g} measured, {fact['predicted']:.4g} predicted"
            say(f"  {fact['part']}: {fact['fact']}: {values} ({off:+.0%})")
    return bool(laws) and not broken and not bad


def read_facts(out: Path) -> list[Fact]:
    """All facts of a file."""
    return [json.loads(line) for line in out.read_text().splitlines()]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu with tiny sizes")
    parser.add_argument("--parts", default=",".join(LIMITS_S), help="in this order")
    parser.add_argument("--out", type=Path, help="a file of JSON lines; default: in results/")
    parser.add_argument("--limit", type=float, help="seconds of every part")
    parser.add_argument("--inner", choices=LIMITS_S, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.parts = arguments.parts.split(",")
    if unknown := set(arguments.parts) - LIMITS_S.keys():
        parser.error(f"there is no part {', '.join(sorted(unknown))}: use {', '.join(LIMITS_S)}")
    if arguments.out is None:
        arguments.out = ROOT / "results" / time.strftime("gpu_check_%Y%m%dT%H%M%SZ.jsonl")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts and summarise them; or, inside, run one."""
    arguments = _parse(argv)
    if arguments.inner is not None:
        settle_math()  # before torch is imported
        import gpu_check_parts

        gpu_check_parts.run(arguments.inner, arguments.device, arguments.out)
        return 0
    if arguments.device != "cpu":
        asks = "import sys, torch; sys.exit(not torch.cuda.is_available())"
        if subprocess.run([sys.executable, "-c", asks], stderr=subprocess.DEVNULL).returncode:
            print("gpu_check: torch finds no CUDA GPU, nothing was checked", file=sys.stderr)
            return NO_GPU
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("")
    for name in arguments.parts:
        run_part(name, arguments)
    well = summarise(read_facts(arguments.out), print)
    print(f"all facts: {arguments.out}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
