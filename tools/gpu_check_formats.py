"""The part of `gpu_check.py` about formats: kernels for stored weights are right, and how fast."""

import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from gpu_check import ROOT
from gpu_check_parts import Bench, median_of, opened, timed, wait_for

from offload_rt.device.base import Device
from offload_rt.model.formats import together
from offload_rt.model.formats.brought import bring_for, prepare, ready
from offload_rt.model.formats.methods import BLOCKS, Form
from offload_rt.model.formats.planes import encode
from offload_rt.model.formats.stored import Stored
from offload_rt.model.formats.wired import dequantise
from offload_rt.model.layout import CODED_PART
from offload_rt.model.packed_files import NAMED, piece_weights

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
        _together(bench, device)


def _together(bench: Bench, device: Device) -> None:
    """A token's experts of a gpt-oss layer, multiplied as they are stored in one launch."""
    chosen, outputs, inputs = (4, 5760, 2880) if bench.on_gpu else (2, 96, 64)
    if not together.is_there(device.torch_device):
        bench.fact("no experts are multiplied together", device=device.name)
        return
    dice, there = torch.Generator().manual_seed(1), device.torch_device
    sizes: dict[str, Any] = {"outputs": outputs, "inputs": inputs, "groups": inputs // 32}
    stored = Stored(module="m", form=Form.MXFP4, bits=4, block=(1, 32), parts={}, **sizes)
    parts, numbers = [], []
    for _ in range(chosen):
        codes = torch.randint(0, 256, (outputs, inputs // 2), generator=dice).to(torch.uint8)
        scales = torch.randint(118, 124, (outputs, inputs // 32), generator=dice).to(torch.uint8)
        parts.append({"weight_packed": codes.to(there), "weight_scale": scales.to(there)})
        weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=there)
        dequantise(stored, parts[-1], weight)
        numbers.append(weight)
    row = torch.randn(1, inputs, dtype=torch.bfloat16, device=there)
    places = [together.places_of(each, device.address) for each in parts]
    table = torch.tensor([[0, e, e, *places[e]] for e in range(chosen)], device=there)
    out = torch.empty(chosen, outputs, dtype=torch.bfloat16, device=there)
    kept = [tensor for each in parts for tensor in each.values()]
    run = partial(together.multiply_together, row, table, kept, None, out)

    def near() -> bool | str:
        run()
        wanted = torch.stack([weight.double() @ row[0].double() for weight in numbers])
        error = float((out.double() - wanted).norm() / wanted.norm())
        return error < 0.01 or f"off by {error:.4f}"

    bench.law("experts multiplied as they are stored, and as fp64 does", near)
    host_s, seconds = median_of(
        [timed(run, partial(wait_for, device.compute)) for _ in range(SAMPLES)][1:]
    )
    nbytes = sum(tensor.nbytes for tensor in kept)
    bench.fact("MXFP4 times a row", seconds=seconds, host_s=host_s, bytes_per_s=nbytes / seconds)


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
    for name, code in NAMED.items():
        pieces = [encode(bits[at : at + each], code) for at in range(0, bits.size, each)]
        starts = np.concatenate([[0], np.cumsum([piece.size for piece in pieces])]).tolist()
        coded = Stored(form=Form.CODED, bits=code, groups=1, pieces=tuple(starts), **whole)
        data = torch.from_numpy(np.concatenate(pieces))
        yield f"bf16 in {name} bits", coded, {CODED_PART: data}
    sys.path.append(str(ROOT / "tests"))  # which write such files by hand
    from gguf_files import random_blocks

    for form, (per_block, _) in BLOCKS.items():
        outputs, inputs = (2048, 4096) if side > 4096 else (16, 4 * per_block)
        whole |= {"outputs": outputs, "inputs": inputs}
        stored = Stored(form=form, bits=4, groups=inputs // per_block, **whole)
        data = random_blocks(form, outputs, inputs, np.random.default_rng(2))
        yield f"GGUF {form}", stored, {"weight": torch.from_numpy(data)}
