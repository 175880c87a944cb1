"""Plans of mixtures after one run against runs, with several memories for the pool of experts.

    python tools/validate_pools.py MIXTURE [MIXTURE ...] --first 3GiB --sizes 1.5GiB,2GiB,...

Of each mixture one run with `--first` of device memory says how fast this machine reads and
computes just now, and which experts tokens ask for. With that, and nothing that was learnt later,
every size is planned and run. What is learnt is kept in a folder of its own; this machine's profile
is used if there is one. Seconds are those of tokens after the first.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload_rt.device.system import users_environment
from offload_rt.profiling.store import machine_name, user_folder
from offload_rt.units import parse_size

_PROMPT = "Tell me how a bicycle stays upright, and why it is harder when it is slow."
_SIZES = "1.5GiB,2GiB,3GiB,4GiB,5.4GiB,8GiB"
_COLUMNS = (
    "| mixture | memory | predicted s/token | measured | ratio | computing | waiting | levels |"
)


class Bench:
    """Runs the program with what it has learnt in a folder.

    Args:
        folder: for that.
        tokens: of an answer.
        more: options of all runs.
    """

    def __init__(self, folder: Path, tokens: int, more: list[str]) -> None:
        self._tokens, self._more = tokens, more
        self._data = folder / "offload-rt"
        self._environment: Mapping[str, str] = users_environment() | {"XDG_DATA_HOME": str(folder)}
        profile = user_folder() / f"{machine_name()}.json"
        if profile.is_file():
            (self._data / "profiles").mkdir(parents=True)
            shutil.copy(profile, self._data / "profiles")

    def plan(self, model: Path, memory: str) -> dict[str, Any]:
        """What is planned with so much memory."""
        context = ("--context", str(64 + self._tokens))
        return self._said("plan", str(model), "--device-memory", memory, *context)

    def run(self, model: Path, memory: str) -> dict[str, Any]:
        """What a run with so much memory measures."""
        answer = ("-p", _PROMPT, "-n", str(self._tokens), "--ignore-eos")
        return self._said("generate", str(model), "--device-memory", memory, *answer)

    def learnt(self) -> dict[Path, bytes]:
        """All that was learnt so far."""
        return {path: path.read_bytes() for path in self._data.glob("*.json")}

    def forget(self, learnt: Mapping[Path, bytes]) -> None:
        """Know that alone."""
        for path in self._data.glob("*.json"):
            path.unlink()
        for path, data in learnt.items():
            path.write_bytes(data)

    def _said(self, *words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "offload_rt", *words, *self._more, "--json"]
        done = subprocess.run(command, env=self._environment, check=True, stdout=subprocess.PIPE)
        found: dict[str, Any] = json.loads(done.stdout)
        return found


def measured(run: Mapping[str, Any]) -> float:
    """Seconds per token of a run."""
    return float(run["timings"]["s_per_token"])


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mixtures", nargs="+", type=Path)
    parser.add_argument("--first", default="3GiB", help="memory of the run that is learnt from")
    parser.add_argument("--sizes", default=_SIZES, help="memories that are planned and run")
    parser.add_argument("--tokens", type=int, default=40, help="of each answer")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output", type=Path, help="a file for all that was said, as JSON lines")
    parser.add_argument("more", nargs="*", help="after --: options of all runs")
    values = parser.parse_args()
    sizes = values.sizes.split(",")
    for size in (values.first, *sizes):
        parse_size(size)
    more = values.more or ["--draft", "none"]
    print(_COLUMNS + "\n" + "|---" * _COLUMNS.count(" | ") + "|---|")
    ratios = []
    for mixture in values.mixtures:
        for _ in range(values.rounds):
            with tempfile.TemporaryDirectory() as folder:
                bench = Bench(Path(folder), values.tokens, more)
                bench.run(mixture, values.first)
                learnt = bench.learnt()
                for size in sizes:
                    bench.forget(learnt)
                    plan, run = bench.plan(mixture, size), bench.run(mixture, size)
                    ratios.append(measured(run) / plan["predicted"]["s_per_token"])
                    print(_row(mixture, size, plan, run), flush=True)
                    if values.output:
                        with values.output.open("a") as file:
                            print(json.dumps({"size": size, "plan": plan, "run": run}), file=file)
    near = sum(abs(ratio - 1.0) <= 0.15 for ratio in ratios)
    print(f"\n{near} of {len(ratios)} within 15 %, median {statistics.median(ratios):.2f}")
    return 0


def _row(mixture: Path, size: str, plan: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    predicted, s_per_token = plan["predicted"], measured(run)
    levels = ", ".join(f"{term} {level:.2f}" for term, level in plan["levels"].items())
    return (
        f"| {mixture.name} | {size} | {predicted['s_per_token']:.3f} | {s_per_token:.3f} |"
        f" {s_per_token / predicted['s_per_token']:.2f} | {predicted['compute_s']:.3f} |"
        f" {predicted['stall_s']:.3f} | {levels} |"
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
