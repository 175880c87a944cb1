"""How many weights are dequantised in a second, form by form, by whoever does it on a device.

On a CPU by torch (codes of bf16: numpy), and by numba's kernels where there are some; on a GPU by
Triton's, and by torch where there are none.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle

import numpy as np
import torch

from offload_rt.device import compiled
from offload_rt.device.base import Device
from offload_rt.model.formats import ggml, on_gpu, planes
from offload_rt.model.formats.brought import bring_for, prepare
from offload_rt.model.formats.integers import Bring
from offload_rt.model.formats.methods import BLOCKS, CODED_BITS, NESTED_BITS, Form, block_bits
from offload_rt.model.formats.stored import Flat, Stored, suits_kernels
from offload_rt.model.formats.wired import BRING
from offload_rt.model.layout import CODED_PART
from offload_rt.model.packed_files import piece_weights
from offload_rt.profiling.compute import beyond_caches, laid_bytes, laid_out
from offload_rt.profiling.profile import Decoder, DecodeSpeed
from offload_rt.profiling.timing import Curve, Tick, rate_of

_GROUP = 128  # of most checkpoints
_AT_ONCE = 8  # weights on a GPU before the host waits
_MOST_BYTES = 4  # of a weight, with what scales and lies beside it
_NUMBER_S = 0.3  # no further sample of a form is begun after that; the slowest takes 0.2 s

# Most of what checkpoints have; of forms that are alike one. The rest is a share of the first
# (`decoding.py`).
MEASURED = (
    (Form.PACKED, 4),
    (Form.PACKED, 8),
    (Form.PACKED, 3),
    (Form.AWQ, 4),
    (Form.GPTQ, 4),
    (Form.FP8, 8),
    (Form.INT8, 8),
    (Form.NVFP4, 4),
    (Form.MXFP4, 4),
    (Form.BNB4, 4),
    (Form.BNB8, 8),
    (Form.CODED, CODED_BITS),
    (Form.CODED, NESTED_BITS),
    *((form, block_bits(form)) for form in (Form.Q4_0, Form.Q8_0, Form.Q4_K, Form.Q5_K, Form.Q6_K)),
)

Parts = dict[str, torch.Tensor]


def _bytes(*shape: int, value: int = 0x12) -> torch.Tensor:
    return torch.full(shape, value, dtype=torch.uint8)


def _eights(*shape: int) -> torch.Tensor:
    """Ones in FP8."""
    return _bytes(*shape, value=0x38).view(torch.float8_e4m3fn)


def _words(*shape: int) -> torch.Tensor:
    return torch.full(shape, 0x51627384, dtype=torch.int32)


def _scales(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, 0.01, dtype=dtype)


def _pieces(count: int, bits: int) -> tuple[torch.Tensor, tuple[int, ...]]:
    """Weights in a code, as trained ones are, and where their pieces begin."""
    each = piece_weights(count)
    numbers = np.random.default_rng(1).normal(0, 0.02, each).astype(np.float32)
    words = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    made = planes.encode(words, bits)
    pieces = [
        made if count - at >= each else planes.encode(words[: count - at], bits)
        for at in range(0, count, each)
    ]
    ends = np.cumsum([0, *(piece.size for piece in pieces)])
    return torch.from_numpy(np.concatenate(pieces)), tuple(map(int, ends))


def _example(form: Form, bits: int, side: int, dtype: torch.dtype) -> tuple[Stored, Parts]:
    """A weight [side, side] and its tensors; what its numbers are does not matter."""
    groups = side // _GROUP
    stored = Stored(
        module="", form=form, outputs=side, inputs=side, bits=bits, groups=groups, parts={}
    )
    match form:
        case Form.PACKED:
            codes = _words(side, side * bits // 32)
            scales = _scales(side, groups, dtype=dtype)
            return stored, {"weight_packed": codes, "weight_scale": scales}
        case Form.AWQ | Form.GPTQ:
            words = side * bits // 32
            codes = _words(side, words) if form is Form.AWQ else _words(words, side)
            zeros = torch.zeros(groups, words, dtype=torch.int32)
            scales = _scales(groups, side, dtype=dtype)
            return stored, {"qweight": codes, "qzeros": zeros, "scales": scales}
        case Form.FP8:
            stored = replace(stored, block=(_GROUP, _GROUP))
            scales = _scales(groups, groups)
            return stored, {"weight": _eights(side, side), "weight_scale_inv": scales}
        case Form.INT8:
            codes, scales = _bytes(side, side).view(torch.int8), _scales(side, 1, dtype=dtype)
            stored = replace(stored, groups=1, block=(1, side))
            return stored, {"weight": codes, "weight_scale": scales}
        case Form.NVFP4:
            stored = replace(stored, groups=side // 16, block=(1, 16))
            parts = {"weight_scale": _eights(side, side // 16), "weight_global_scale": _scales(1)}
            return stored, {"weight_packed": _bytes(side, side // 2), **parts}
        case Form.MXFP4:
            stored = replace(stored, groups=side // 32, block=(1, 32))
            scales = _bytes(side, side // 32, value=120)
            return stored, {"weight_packed": _bytes(side, side // 2), "weight_scale": scales}
        case Form.BNB4:
            flat = Flat(block=64, dtype="bfloat16")
            parts = {"absmax": _scales(side * side // 64), "quant_map": torch.linspace(-1, 1, 16)}
            codes = _bytes(side * side // 2, 1)
            return replace(stored, groups=side // 64, flat=flat), {"weight": codes, **parts}
        case Form.BNB8:
            codes = _bytes(side, side).view(torch.int8)
            return replace(stored, groups=1), {"weight": codes, "SCB": _scales(side)}
        case Form.CODED:
            data, pieces = _pieces(side * side, bits)
            return replace(stored, groups=1, pieces=pieces), {CODED_PART: data}
    numbers, nbytes = BLOCKS[form]
    return replace(stored, groups=1), {ggml.PART: _bytes(side, side // numbers * nbytes)}


def decoders() -> list[Decoder]:
    """Who dequantises on this machine's CPU."""
    return [Decoder.TORCH, *([] if compiled.problem() else [Decoder.COMPILED])]


def measure_dequantising(
    device: Device, dtype: torch.dtype, curve: Curve, tick: Tick
) -> tuple[DecodeSpeed, ...]:
    """Dequantise weights that are in no cache into one place, as passes do.

    Args:
        device: where.
        dtype: of 16 bits.
        curve: how carefully.
        tick: called for each form.
    """
    effort = replace(curve.effort, number_s=min(curve.effort.number_s, _NUMBER_S))
    return tuple(_measure(device, dtype, replace(curve, effort=effort), tick))


def _measure(device: Device, dtype: torch.dtype, curve: Curve, tick: Tick) -> Iterator[DecodeSpeed]:
    host = device.kind.host_computes
    if host:
        prepare()
    side, cold_bytes = curve.effort.dequantised_side, beyond_caches(device, curve.effort)
    curve.memory.begin()
    memory = curve.memory.take(device, cold_bytes + _MOST_BYTES * side * side)  # of one by one
    out = torch.empty(side, side, dtype=dtype, device=device.torch_device)
    for form, bits in MEASURED:
        stored, parts = _example(form, bits, side, dtype)
        one = {word: part.to(device.torch_device) for word, part in parts.items()}
        nbytes = laid_bytes(one.values())
        places = memory.split(nbytes)[: max(1, -(-cold_bytes // nbytes))]
        copies = (laid_out([*one.values()], place) for place in places)
        weights = cycle([dict(zip(one, each, strict=True)) for each in copies])
        for decoder, bring in _brings(stored, dtype, device):
            at_once = 1 if host else _AT_ONCE
            run = partial(_some, bring, stored, weights, out, 0 if host else at_once, device)
            sample_s = curve.effort.compute_sample_s
            taken = curve.take({(0,): curve.timed(run, sample_s, computes=host)})
            (time_s,) = curve.numbers(taken).values()
            yield DecodeSpeed(
                processor=device.kind.processor,
                decoder=decoder,
                form=form.value,
                bits=bits,
                numbers_per_s=rate_of(at_once * stored.numbers, time_s),
            )
        tick()


def _brings(stored: Stored, dtype: torch.dtype, device: Device) -> Iterator[tuple[Decoder, Bring]]:
    """Who dequantises a weight on a device: both on a CPU, on a GPU who is there."""
    if not device.kind.host_computes:
        if on_gpu.is_there() and on_gpu.suits(stored):
            made = on_gpu.bring_for(stored, device.torch_device)
            assert made is not None
            yield Decoder.COMPILED, made
        elif stored.form is not Form.CODED:  # nobody decodes it
            yield Decoder.TORCH, BRING[stored.form]
        return
    if stored.form is Form.CODED:  # numpy looks up, where nothing is compiled
        yield decoders()[-1], BRING[stored.form]
        return
    yield Decoder.TORCH, BRING[stored.form]
    if suits_kernels(stored, str(dtype).removeprefix("torch.")):
        made = bring_for(stored, dtype, device.torch_device)
        if made is not None:
            yield Decoder.COMPILED, made


def _some(
    bring: Bring,
    stored: Stored,
    weights: Iterator[Parts],
    out: torch.Tensor,
    enqueued: int,
    device: Device,
) -> None:
    """One weight; or so many, and wait for them."""
    for _ in range(enqueued or 1):
        bring(stored, next(weights), out)
    if enqueued:
        device.compute.record().synchronize()
