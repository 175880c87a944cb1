"""Times of a mixture's experts, through the code that computes them (`model/experts.py`).

An expert has small matrices, and those a token is sent to were not used lately: no cache has them.
So here they are views of one memory that is larger than the caches, taken in no order.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import cycle, islice
from typing import Any

import torch

from offload_rt.device.base import Device
from offload_rt.model.exact import Regular, make_exact, multiply_few_rows_at_once
from offload_rt.model.experts import ExpertWeights, compute_experts, lend_experts, multiply_at_once
from offload_rt.model.formats.stored import Stored
from offload_rt.profiling.compute import beyond_caches
from offload_rt.profiling.curves import Place
from offload_rt.profiling.profile import ExpertCurve, LayerTime
from offload_rt.profiling.timing import Curve, Sample, Tick
from offload_rt.streaming.experts import Asked

PER_TOKEN = 4  # experts of a call; those of a token usually are 2 to 8
_RANDOM_NUMBERS = 2**18
_SEED = 0


class ColdExperts:
    """Lends experts of one shape that lie in a memory, each of them in another place.

    Args:
        memory: [n] numbers.
        hidden: of the states.
        intermediate: of an expert.
    """

    foresees = computes = False
    stored: Mapping[str, Stored] = {}

    def __init__(self, memory: torch.Tensor, hidden: int, intermediate: int) -> None:
        self._memory, self._shape = memory, (hidden, intermediate)
        self.count = max(PER_TOKEN, len(memory) // (3 * hidden * intermediate))
        order = list(range(self.count))
        random.Random(_SEED).shuffle(order)
        self._turns = cycle(order)

    def next(self) -> list[int]:
        """Those of a call, which were not used for as long as can be."""
        return [*islice(self._turns, PER_TOKEN)]

    def begin(self, parts: int) -> None:
        """Nothing is kept for a pass."""

    def on_host(self, needed: Sequence[int]) -> list[int]:
        """None: all are where they compute."""
        return []

    def at_home(self, expert: int) -> ExpertWeights:
        """Its matrices."""
        hidden, intermediate = self._shape
        numbers = hidden * intermediate
        first = expert * 3 * numbers % (len(self._memory) - 3 * numbers + 1)
        gate, up, down = self._memory[first : first + 3 * numbers].split(numbers)
        return {
            "gate_up_proj.0": gate.view(intermediate, hidden),
            "gate_up_proj.1": up.view(intermediate, hidden),
            "down_proj": down.view(hidden, intermediate),
        }

    def lend(self, asked: Asked) -> Iterator[Sequence[tuple[int, ExpertWeights]]]:
        """All are there."""
        for first in range(0, len(asked.needed), asked.there):
            group = asked.needed[first : first + asked.there]
            yield [(expert, self.at_home(expert)) for expert in group]


@torch.inference_mode()
def measure_experts(device: Device, dtype_name: str, curve: Curve, tick: Tick) -> list[ExpertCurve]:
    """Time experts by the rows each is sent, in usual and in row-invariant passes.

    Args:
        device: the CPU.
        dtype_name: of the numbers.
        curve: how much is measured, and what could not be.
        tick: called after each number.
    """
    curve = curve.for_part()
    effort, dtype = curve.effort, getattr(torch, dtype_name)
    largest = max(3 * hidden * intermediate for hidden, intermediate in effort.experts)
    cold_bytes = beyond_caches(device, effort)
    numbers = max(cold_bytes // dtype.itemsize, PER_TOKEN * largest)
    curve.memory.begin()
    memory = curve.memory.take(device, numbers * dtype.itemsize).view(dtype)
    _randomise(memory)
    return [
        found
        for exact in (False, True)
        for found in _curves(device, memory, dtype, curve, tick, exact=exact)
    ]


def _curves(
    device: Device,
    memory: torch.Tensor,
    dtype: torch.dtype,
    curve: Curve,
    tick: Tick,
    *,
    exact: bool,
) -> list[ExpertCurve]:
    """Of each size, in turns."""
    effort, few_rows = curve.effort, dict[int, int]()
    passes: dict[Place, Sample] = {}
    for hidden, intermediate in effort.experts:
        nbytes = 3 * hidden * intermediate * dtype.itemsize
        experts = ColdExperts(memory, hidden, intermediate)
        module = _experts(hidden, intermediate, experts.count)
        lend_experts(module, experts)
        if exact:
            make_exact(module)
            multiply_at_once(module)
        else:
            kernels = dtype is torch.bfloat16
            few_rows[nbytes] = multiply_few_rows_at_once(module) if kernels else 0
        for rows in effort.expert_rows:
            run = _call(module, experts, torch.randn(rows, hidden).to(dtype), exact=exact)
            passes[nbytes, rows] = curve.timed(run, effort.compute_sample_s, computes=True)
    taken = {
        place: [s / PER_TOKEN for s in seconds] for place, seconds in curve.take(passes).items()
    }
    found = curve.numbers(taken)
    for _ in found:
        tick()
    return [
        ExpertCurve(
            processor=device.kind.processor,
            exact=exact,
            few_rows=few_rows.get(nbytes),
            weight_bytes=nbytes,
            times=tuple(
                LayerTime(tokens=rows, layer_s=found[nbytes, rows]) for rows in effort.expert_rows
            ),
        )
        for nbytes in sorted({place[0] for place in found})
    ]


def _experts(hidden: int, intermediate: int, count: int) -> Any:  # noqa: ANN401 - a family's class
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_local_experts=count
    )
    with torch.device("meta"):
        return MixtralExperts(config).eval()


def _call(
    module: Any,  # noqa: ANN401
    experts: ColdExperts,
    hidden: torch.Tensor,
    *,
    exact: bool,
) -> Callable[[], None]:
    """Rows that all are sent to the same experts, as a pass computes them."""
    weights = torch.full((len(hidden), PER_TOKEN), 1 / PER_TOKEN)

    def run() -> None:
        index = torch.tensor([experts.next()] * len(hidden))
        with Regular() if exact else nullcontext():
            compute_experts(module, hidden, index, weights)

    return run


def _randomise(memory: torch.Tensor) -> None:
    """Give it one random block over and over: drawing all would be too slow."""
    block = (torch.randn(_RANDOM_NUMBERS) / 64).to(memory.dtype)
    for part in memory.split(_RANDOM_NUMBERS):
        part.copy_(block[: len(part)])
