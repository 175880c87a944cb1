"""The part of `gpu_check.py` about formats: kernels that dequantise are right, and how fast."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gpu_check_parts import Bench, median_of, opened, timed, wait_for

from offload_rt.model.formats.brought import bring_for, prepare, ready
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.planes import encode
from offload_rt.model.formats.stored import Stored
from offload_rt.model.formats.wired import dequantise
from offload_rt.model.layout import CODED_PART
from offload_rt.model.packed_files import piece_weights

GROUP, SAMPLES = 128, 12
Weight = tuple[str, Stored, dict[str, torch.Tensor]]


def check(bench: Bench) -> None:
    """Each form: equal to the CPU's in every bit, then seconds of a weight of a large model."""
    with opened(bench) as device:
        there = device.torch_device
        prepare()  # `ready` need not, where a weight is multiplied as it is stored
        for name, stored, parts in _weights(8192 if bench.on_gpu else 256):
            expected = torch.empty(stored.outputs, stored.inputs, dtype=torch.bfloat16)
            dequantise(stored, parts, expected)
            moved = {word: part.to(there) for word, part in parts.items()}
            out = torch.empty_like(expected, device=there)
            ready([stored], out.dtype, there, exact=False, in_order=())
            bring = bring_for(stored, out.dtype, there) or dequantise

            def once() -> None:
                bring(stored, moved, out)  # noqa: B023 - called in this turn

            def equal() -> bool:
                once()
                return torch.equal(out.cpu().view(torch.int16), expected.view(torch.int16))  # noqa: B023

            bench.law(f"{name} is that of the CPU in every bit", equal)
            wait = [timed(once, lambda: wait_for(device.compute)) for _ in range(SAMPLES)]
            host_s, seconds = median_of(wait)
            nbytes = sum(part.nbytes for part in parts.values())
            bench.fact(
                name,
                seconds=seconds,
                host_s=host_s,
                weights_per_s=stored.numbers / seconds,
                written_bytes_per_s=out.nbytes / seconds,
                moved_bytes_per_s=(nbytes + out.nbytes) / seconds,
            )


def _weights(side: int) -> Iterator[Weight]:
    """A square weight in each form that has a kernel."""
    dice = torch.Generator().manual_seed(0)
    whole: dict[str, Any] = {"module": "m", "outputs": side, "inputs": side, "parts": {}}
    groups = side // GROUP
    scales = torch.rand(side, groups, generator=dice).to(torch.bfloat16) * 0.01
    words = torch.randint(-(2**31), 2**31, (side, side // 8), generator=dice).to(torch.int32)
    packed = Stored(form=Form.PACKED, bits=4, groups=groups, **whole)
    yield "W4 groups", packed, {"weight_packed": words, "weight_scale": scales}
    zeros = torch.randint(0, 2**28, (groups, side // 8), generator=dice).to(torch.int32)
    columns = {"qzeros": zeros, "scales": scales.t().contiguous().half()}
    awq = Stored(form=Form.AWQ, bits=4, groups=groups, **whole)
    yield "AWQ", awq, {"qweight": words, **columns}
    gptq = Stored(form=Form.GPTQ_V2, bits=4, groups=groups, **whole)
    index = (torch.arange(side) // GROUP)[torch.randperm(side, generator=dice)].to(torch.int32)
    rows = words.view(side // 8, side)
    yield "GPTQ act-order", gptq, {"qweight": rows, "g_idx": index, **columns}
    small = torch.randint(0, 127, (side, side), generator=dice).to(torch.uint8)
    block = (GROUP, GROUP)
    fp8 = Stored(form=Form.FP8, bits=8, groups=groups, block=block, **whole)
    grid = torch.rand(groups, groups, generator=dice)
    yield (
        "FP8 blocks",
        fp8,
        {
            "weight": small.view(torch.float8_e4m3fn),
            "weight_scale_inv": grid,
        },
    )
    mxfp4 = Stored(form=Form.MXFP4, bits=4, groups=side // 32, block=(1, 32), **whole)
    powers = torch.randint(110, 130, (side, side // 32), generator=dice).to(torch.uint8)
    yield "MXFP4", mxfp4, {"weight_packed": small[:, : side // 2].clone(), "weight_scale": powers}
    numbers = (torch.randn(side * side, generator=dice) * 0.02).to(torch.bfloat16)
    bits, each = numbers.view(torch.int16).numpy().view(np.uint16), piece_weights(side * side)
    pieces = [encode(bits[at : at + each]) for at in range(0, bits.size, each)]
    starts = np.concatenate([[0], np.cumsum([piece.size for piece in pieces])]).tolist()
    coded = Stored(form=Form.CODED, bits=12, groups=1, pieces=tuple(starts), **whole)
    yield "bf16 in 12 bits", coded, {CODED_PART: torch.from_numpy(np.concatenate(pieces))}
