"""How many weights a CPU dequantises in a second, by torch and by compiled kernels."""

from collections.abc import Iterator
from functools import partial
from itertools import cycle

import torch

from offload_rt.device import compiled
from offload_rt.device.base import Device
from offload_rt.model.formats.brought import bring_for, prepare
from offload_rt.model.formats.integers import BRING, Bring
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored
from offload_rt.profiling.profile import Decoder, DecodeSpeed
from offload_rt.profiling.timing import Curve, Tick, Timed, rate_of

_SIDE, _GROUP = 4096, 128  # of a matrix of a 7B model, and of most checkpoints
_MEASURED = ((Form.PACKED, 4), (Form.PACKED, 8), (Form.AWQ, 4), (Form.GPTQ, 4))


def decoders() -> list[Decoder]:
    """Who dequantises on this machine."""
    return [Decoder.TORCH, *([] if compiled.problem() else [Decoder.COMPILED])]


def ticks() -> int:
    """How many numbers are measured."""
    return len(_MEASURED) * len(decoders())


def measure_dequantising(
    device: Device, dtype: torch.dtype, curve: Curve, tick: Tick
) -> tuple[DecodeSpeed, ...]:
    """Dequantise weights that are in no cache into one place, as passes do.

    Args:
        device: a CPU.
        dtype: of 16 bits.
        curve: how carefully.
        tick: called for each number.
    """
    return tuple(_measure(device, dtype, curve, tick))


def _measure(device: Device, dtype: torch.dtype, curve: Curve, tick: Tick) -> Iterator[DecodeSpeed]:
    prepare()
    out = torch.empty(_SIDE, _SIDE, dtype=dtype)
    for form, bits in _MEASURED:
        stored = Stored(
            module="",
            form=form,
            outputs=_SIDE,
            inputs=_SIDE,
            bits=bits,
            groups=_SIDE // _GROUP,
            parts={},
        )
        one = _parts(form, bits, dtype)
        nbytes = sum(part.nbytes for part in one.values())
        count = max(1, -(-curve.effort.cold_bytes // nbytes))
        weights = [{word: part.clone() for word, part in one.items()} for _ in range(count)]
        for decoder in decoders():
            bring = BRING[form]
            if decoder is Decoder.COMPILED:
                bring = bring_for(stored, dtype, device.torch_device) or bring
            timed = Timed(
                partial(_next, bring, stored, cycle(weights), out),
                curve.effort.compute_sample_s,
                computes=True,
            )
            (time_s,) = curve.numbers(curve.take({(0,): timed})).values()
            yield DecodeSpeed(
                processor=device.kind.processor,
                decoder=decoder,
                form=form.value,
                bits=bits,
                numbers_per_s=rate_of(stored.numbers, time_s),
            )
            tick()


def _next(
    bring: Bring, stored: Stored, weights: Iterator[dict[str, torch.Tensor]], out: torch.Tensor
) -> None:
    bring(stored, next(weights), out)


def _parts(form: Form, bits: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors of a weight [_SIDE, _SIDE]; what its numbers are does not matter."""
    groups, words = _SIDE // _GROUP, _SIDE * bits // 32
    codes = torch.full((_SIDE * words,), 0x51627384, dtype=torch.int32)
    scales = torch.full((_SIDE * groups,), 0.01, dtype=dtype)
    if form is Form.PACKED:
        return {
            "weight_packed": codes.view(_SIDE, words),
            "weight_scale": scales.view(_SIDE, groups),
        }
    shape = (_SIDE, words) if form is Form.AWQ else (words, _SIDE)
    return {
        "qweight": codes.view(shape),
        "qzeros": torch.zeros(groups, words, dtype=torch.int32),
        "scales": scales.view(groups, _SIDE),
    }
