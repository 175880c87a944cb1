"""Measure what the processes of a run take beside the run's device memory, and of what kind it is.

    python tools/bench_process.py ~/models/qwen-0.5b --device-memory 700MiB

runs `offload-run generate` on the CPU and looks at its processes ten times a second. Printed is the
moment with the most memory, by process:

- its own: anonymous memory, which a limit on a group of processes counts and cannot take back;
- files: mapped files, a page that several processes map counted in parts; read from there again
  when the system takes it back.

What is beside the device memory is the sum of both without the peak that the run itself reports.
Options this tool does not know are passed on.
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

_MIB = 2**20
_PROMPT = "Explain how a steam engine works, in three short paragraphs."
_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The memory of a process.

    Attributes:
        own_bytes: anonymous.
        file_bytes: of mapped files, each page divided by the processes that map it.
    """

    name: str
    own_bytes: int
    file_bytes: int


def taken(process: psutil.Process) -> Taken:
    """What a process has now, by the kernel's sums over its mappings."""
    sizes = {}
    for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, size, _ = line.split()
        sizes[name.rstrip(":")] = int(size) * 1024
    own, files = sizes["Pss_Anon"], sizes["Pss_File"] + sizes["Pss_Shmem"]
    name = "tokenizer" if "text.worker" in " ".join(process.cmdline()) else "run"
    return Taken(name=name, own_bytes=own, file_bytes=files)


def most_taken(command: list[str]) -> tuple[list[Taken], str]:
    """Run a command; the moment at which it and its children had the most, and what it printed."""
    most: list[Taken] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        parent = psutil.Process(running.pid)
        while running.poll() is None:
            now = []
            with suppress(psutil.Error):
                for process in [parent, *parent.children(recursive=True)]:
                    with suppress(psutil.Error, OSError, KeyError):  # it has just ended
                        now.append(taken(process))
            if _sum(now) > _sum(most):
                most = now
            time.sleep(_INTERVAL_S)
        assert running.stdout is not None
        printed = running.stdout.read()
    if running.returncode:
        raise SystemExit(f"`{' '.join(command)}` ended with {running.returncode}")
    return most, printed


def _sum(several: list[Taken]) -> int:
    return sum(each.own_bytes + each.file_bytes for each in several)


def main() -> None:
    """Run, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=12, help="of the answer")
    options, passed_on = parser.parse_known_args()
    command = [sys.executable, "-m", "offload_rt", "generate", options.model, "--prompt", _PROMPT]
    command += ["--max-tokens", str(options.tokens), "--device", "cpu", "--json", *passed_on]
    most, printed = most_taken(command)
    device_bytes = json.loads(printed)["memory"]["device_peak_bytes"]
    print(f"{'MiB':<12}{'its own':>10}{'files':>10}")
    for each in most:
        print(f"{each.name:<12}{each.own_bytes / _MIB:>10.0f}{each.file_bytes / _MIB:>10.0f}")
    beside = (_sum(most) - device_bytes) / _MIB
    print(f"device memory {device_bytes / _MIB:.0f}, beside it {beside:.0f}")


if __name__ == "__main__":
    main()
