"""Weights in blocks: what torch does to one passes through the cache, several threads at once."""

from collections.abc import Callable

import torch

from offload_rt.device.compiled import in_parts
from offload_rt.model.formats.stored import BLOCK_NUMBERS, BLOCKS, Stored

WHOLE = 8  # outputs: blocks begin at multiples, as AWQ's words do


def outputs_in_blocks(stored: Stored, device: torch.device, bring: Callable[[slice], None]) -> None:
    """Dequantise some outputs after the other; see `in_blocks`."""
    step = max(WHOLE, BLOCK_NUMBERS[device.type] // stored.inputs // WHOLE * WHOLE)
    in_blocks(stored.outputs, step, device, bring)


def in_blocks(count: int, step: int, device: torch.device, bring: Callable[[slice], None]) -> None:
    """Work through a range in blocks; on a CPU each in one thread, several beside each other.

    Torch's own threads would wait for each other at each of a block's few operations.
    """
    if device.type != "cpu":
        for start in range(0, count, step):
            bring(slice(start, min(start + step, count)))
        return
    threads, state = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def part(start: int, stop: int) -> None:
        torch.set_num_threads(1)  # of this thread
        with torch.inference_mode(state):
            for first in range(start, stop, step):
                bring(slice(first, min(first + step, stop)))

    try:
        in_parts(part, count, step, min(threads, BLOCKS[device.type]))
    finally:
        torch.set_num_threads(threads)
