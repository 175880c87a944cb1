"""Devices of tests record passes, as a GPU does when it captures a graph.

A recording has kernels and the memory they work on, and nothing else. So whatever of a pass hides
in Python, a length or a row's number, stays what it was when the pass was recorded, and the pass
computes something else. `make_fx` says the same, in 2 ms an operator; `tests/test_static.py`
compares both.
"""

from collections import Counter
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from offload_rt.device.cpu import CpuDevice
from offload_rt.device.kinds import CPU
from offload_rt.kv import static
from offload_rt.runner import static as runner_static


class Recording(TorchDispatchMode):
    """Keeps each operator with its arguments, and where its results are."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "_local_scalar_dense" in func.name():
            raise RuntimeError("a value is read back while work is recorded")
        made = func(*args, **(kwargs or {}))
        self.kernels.append((func, args, kwargs or {}, made))
        return made

    def replay(self):
        for func, args, kwargs, made in self.kernels:
            again = func(*args, **kwargs)
            for place, result in zip(tree_leaves(made), tree_leaves(again), strict=True):
                if place.data_ptr() != result.data_ptr():  # neither a view nor written in place
                    place.copy_(result)


def capture(work):
    """In place of a driver's `capture`."""
    with Recording() as recording:
        result = work()
    counts["recorded"] += 1

    def replay():
        counts["replayed"] += 1
        with torch.inference_mode():
            recording.replay()
        return result

    return replay


def record(device, work, vary):
    """In place of a device's `record`: a replay is compared with the work each time."""
    replay = capture(work)
    vary()
    wanted = [made.clone() for made in tree_leaves(work())]
    for made, one in zip(tree_leaves(replay()), wanted, strict=True):
        same = made.contiguous().view(torch.uint8) == one.contiguous().view(torch.uint8)
        assert same.all(), "something hides"
    counts["replayed"] -= 1
    return replay


counts = Counter()  # so that tests see that something was


def record_everything(monkeypatch):
    """Have passes that draft recorded; floors are low enough for short sequences."""
    counts.clear()
    monkeypatch.setattr(CpuDevice, "kind", replace(CPU, records=True))
    monkeypatch.setattr(CpuDevice, "record", record)
    monkeypatch.setattr(static, "FLOOR_ROWS", 16)
    monkeypatch.setattr(runner_static, "EAGER_FIRST", 0)
    return counts
