"""Who dequantises integers on a CPU: kernels that multiply, those that numba compiles, or torch."""

import re
from collections.abc import Callable, Container, Iterable
from functools import cache

import numpy as np
import torch

from offload_rt.device import compiled
from offload_rt.device.compiled import in_parts
from offload_rt.device.system import give_back_code, give_back_holes
from offload_rt.kernels import assembling
from offload_rt.model.formats import integers, on_gpu
from offload_rt.model.formats.direct import direct_for
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored, suits_kernels
from offload_rt.report import Dequantising

TORCH, NUMPY = "torch", "numpy"
GPU = "cuda"
_CODE = re.compile(r"/libllvmlite[^/]*$")
_TILE = 64  # outputs; whole tiles of the kernels
# A thread takes Python's lock for each part: with parts of 10 us threads waited for each other ten
# times as long as they computed.
_PARTS, _PART_NUMBERS = 4, 2**19


@cache
def prepare() -> compiled.Warmed:
    """Compile kernels, or load them, where they can be: LLVM takes memory for a moment."""
    if compiled.problem():
        return compiled.Warmed(seconds=0.0, compiled=0)
    from offload_rt.model.formats import compiled_integers as made

    warmed = compiled.warm([made.packed, made.packed_ordered, made.columns])
    give_back_code(_CODE)  # 70 MB of LLVM; machine code needs none of it
    give_back_holes()
    return warmed


def ready(
    stored: Iterable[Stored],
    dtype: torch.dtype,
    device: torch.device,
    *,
    exact: bool,
    in_order: Container[Stored],
) -> Dequantising:
    """See that what dequantises weights is there, before any pass.

    Args:
        stored: the weights.
        dtype: they compute in.
        device: where.
        exact: products are those of tiles of rows.
        in_order: weights of which inputs of a group follow each other.
    """
    kinds, warmed = set(), compiled.Warmed(seconds=0.0, compiled=0)
    for each in stored:
        if direct_for(each, dtype, device, exact=exact, in_order=each in in_order):
            kinds.add(assembling.who())
            continue
        kinds.add(_who(each, dtype, device))
        if _compiles(each, dtype, device) and not warmed.seconds:
            warmed = prepare()
    known = (assembling.who(), compiled.who(), on_gpu.PACKAGE, TORCH, NUMPY)
    who = [name for name in known if name in kinds]
    return Dequantising(decoder=", ".join(who), warm_s=warmed.seconds, compiled=warmed.compiled)


def _who(stored: Stored, dtype: torch.dtype, device: torch.device) -> str:
    if device.type == GPU:
        return on_gpu.PACKAGE if on_gpu.suits(stored) and on_gpu.is_there() else TORCH
    if stored.form is Form.CODED:
        return compiled.who() or NUMPY
    return compiled.who() if _compiles(stored, dtype, device) else TORCH


def bring_for(stored: Stored, dtype: torch.dtype, device: torch.device) -> integers.Bring | None:
    """What dequantises a weight faster than torch does; None where nothing does, or is warm."""
    if device.type == GPU:
        return on_gpu.bring_for(stored, device)
    if not _compiles(stored, dtype, device):
        return None
    return _packed if stored.form is Form.PACKED else _columns


def _compiles(stored: Stored, dtype: torch.dtype, device: torch.device) -> bool:
    suits = device.type == "cpu" and suits_kernels(stored, str(dtype).removeprefix("torch."))
    if not suits or compiled.problem():
        return False
    from offload_rt.model.formats.compiled_integers import rounds_to_half

    return dtype is torch.bfloat16 or rounds_to_half()


def _packed(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """compressed-tensors `pack-quantized` into `out` [O, I]."""
    from offload_rt.model.formats import compiled_integers as made

    codes = parts["weight_packed"].view(torch.uint8).view(-1).numpy()
    scales, zeros = parts["weight_scale"].float(), parts.get("weight_zero_point")
    if zeros is None:
        zeros = torch.full_like(scales, 1 << stored.bits - 1)
    else:
        zeros = integers.codes_of(zeros.t().contiguous(), stored.bits, stored.outputs)
        zeros = zeros.t().float().contiguous()
    pair, half = (scales.numpy(), zeros.numpy()), out.dtype is torch.float16
    words, index = _bits_of(out), parts.get("weight_g_idx")
    if index is None:
        _run(stored, lambda a, b: made.packed(codes, *pair, words, stored.bits, half, a, b))
        return
    groups = index.int().numpy()
    _run(
        stored,
        lambda a, b: made.packed_ordered(codes, *pair, groups, words, stored.bits, half, a, b),
    )


def _columns(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """AWQ and GPTQ into `out` [O, I]."""
    from offload_rt.model.formats import compiled_integers as made

    codes = parts["qweight"].view(-1).numpy().view(np.uint32)
    scales, index = parts["scales"].float(), parts.get("g_idx")
    if stored.form is Form.AWQ:
        form, zeros = made.AWQ, integers.awq_codes(parts["qzeros"], stored.bits)
    else:
        form, zeros = stored.bits, integers.codes_of(parts["qzeros"], stored.bits, stored.outputs)
    less = zeros.float().contiguous()
    if stored.form is Form.GPTQ:
        less += 1
    if index is None:
        index = torch.arange(stored.inputs, dtype=torch.int32)
        index = index.div_(stored.inputs // stored.groups, rounding_mode="floor")
    groups, words = index.int().numpy(), _bits_of(out)
    pair, half = (scales.numpy(), less.numpy()), out.dtype is torch.float16
    _run(stored, lambda a, b: made.columns(codes, *pair, groups, words, form, half, a, b))


def _bits_of(out: torch.Tensor) -> np.ndarray:
    return out.view(torch.int16).numpy().view(np.uint16)


def _run(stored: Stored, part: Callable[[int, int], object]) -> None:
    threads = torch.get_num_threads()
    least = max(_PART_NUMBERS // stored.inputs, stored.outputs // (_PARTS * threads), 1)
    in_parts(part, stored.outputs, -(-least // _TILE) * _TILE, threads)
