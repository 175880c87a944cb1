"""Dequantising integers with a scale, and perhaps a zero point, for each group of inputs.

A weight is (code - zero) x scale: the difference is exact, the product is rounded once to fp32 and
once to the number format of the computation. Where scale and result have one 16-bit format, the
product of a code's few bits and the scale is exact in fp32, and kernels of that format round it
once, to the same bits.

Where they have two formats, as AWQ's and GPTQ's fp16 scales and bf16 have, groups of 4-bit codes
are rows of an embedding on an x86 CPU: FBGEMM's kernels for those take an fp16 scale and an offset
at the end of each. A product has 15 bits at most, and so has its difference to a zero point's:
nothing is rounded before the number format of the computation.

Work goes in blocks of outputs, so that what it passes through stays in the cache.
"""

from collections.abc import Callable
from functools import cache, lru_cache

import torch

from offload_rt.model.formats.blocks import WHOLE, outputs_in_blocks
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored

_WORD_BITS = 32
_PAIR_BYTES = 4  # of an fp16 scale and offset
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # which of a word's codes is each of its outputs'


def bring_packed(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """compressed-tensors `pack-quantized` into `out` [O, I].

    Codes lie low bits first along the inputs, raised by half of their range, as zero points do
    along the outputs.
    """
    middle = 1 << stored.bits - 1
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        zeros = codes_of(zeros.t().contiguous(), stored.bits, stored.outputs).t()
    outputs_in_blocks(
        stored,
        out.device,
        lambda rows: numbers(
            parts["weight_packed"][rows],
            parts["weight_scale"][rows],
            middle if zeros is None else zeros[rows],
            stored.bits,
            out[rows],
            parts.get("weight_g_idx"),
        ),
    )


def bring_awq(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """AWQ's words of 8 outputs each, `qweight` [I, O / 8] and `qzeros` [G, O / 8]."""

    def bring(rows: slice) -> None:
        words = slice(rows.start // WHOLE, rows.stop // WHOLE)
        zeros, scales = awq_codes(parts["qzeros"][:, words], stored.bits), parts["scales"][:, rows]
        of_scales, of_zeros = (t.t().unflatten(0, (-1, WHOLE)) for t in (scales, zeros))
        # Words are turned, not codes: torch gathers slowly, and there are an eighth as many.
        turned = parts["qweight"][:, words].t().contiguous()  # [o / 8, I]
        places = out[rows].unflatten(0, (-1, WHOLE))
        for output, code in enumerate(_AWQ_ORDER):
            codes = turned.bitwise_right_shift(stored.bits * code).bitwise_and_(15)
            _scale(
                codes.to(exact_format(scales, out)),
                of_scales[:, output],
                of_zeros[:, output],
                places[:, output],
                None,
            )

    outputs_in_blocks(stored, out.device, bring)


def awq_codes(words: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, W] words of AWQ to [R, 8 W] codes."""
    order = torch.tensor(_AWQ_ORDER, device=words.device)
    codes = codes_of(words.contiguous(), bits, words.shape[1] * WHOLE)
    return codes.unflatten(1, (-1, WHOLE))[..., order].flatten(1)


def bring_gptq(stored: Stored, parts: dict[str, torch.Tensor], out: torch.Tensor) -> None:
    """GPTQ's streams along the inputs, `qweight` [I b / 32, O], zero points along the outputs."""
    zeros = codes_of(parts["qzeros"], stored.bits, stored.outputs).t()
    zeros = zeros.to(torch.int32) + (1 if stored.form is Form.GPTQ else 0)
    outputs_in_blocks(
        stored,
        out.device,
        lambda rows: numbers(
            parts["qweight"][:, rows].t().contiguous(),
            parts["scales"][:, rows].t(),
            zeros[rows],
            stored.bits,
            out[rows],
            parts.get("g_idx"),
        ),
    )


def numbers(
    words: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | int,
    bits: int,
    out: torch.Tensor,
    index: torch.Tensor | None,
) -> None:
    """Dequantise some outputs.

    Args:
        words: [o, W] int32, codes low bits first.
        scales: [o, G].
        zeros: [o, G], or one for all.
        bits: of a code.
        out: [o, I].
        index: [I] the group of each input; None: they follow each other.
    """
    if bits == 4 and index is None and _as_rows(words, scales, zeros, out):
        return
    whole = zeros if isinstance(zeros, int) else 0
    codes = codes_less(words, bits, whole, out, exact_format(scales, out))
    _scale(codes, scales, None if isinstance(zeros, int) else zeros, out, index)


def _as_rows(
    words: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | int, out: torch.Tensor
) -> bool:
    """Dequantise codes of 4 bits as rows of an embedding, if nothing is rounded so."""
    groups, inputs = scales.shape[1], out.shape[1]
    group = inputs // groups
    shaped = group % WHOLE == 0 and words.shape[1] * WHOLE == inputs
    quick = exact_format(scales, out).itemsize == 2  # for which look-ups give 16 bits at once
    if words.device.type != "cpu" or quick or not shaped or not _has_rows():
        return False
    wide = scales.float()
    less = wide * zeros
    pairs = torch.stack([wide, -less if isinstance(zeros, int) else torch.zeros_like(wide)], -1)
    halves = pairs.half()
    if not torch.equal(halves.float(), pairs) or not bool((wide > 0).all()):
        return False  # with a scale below 0 a product of 0 is -0, and a difference is not
    codes = words.contiguous().view(torch.uint8).view(-1, group // 2)
    rows = torch.cat([codes, halves.view(torch.uint8).view(-1, _PAIR_BYTES)], 1)
    order = torch.arange(len(rows) + 1, dtype=torch.int32)
    found: torch.Tensor = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets(
        rows, order[:-1], order, include_last_offset=True
    ).view(-1, groups, group)
    if not isinstance(zeros, int):
        found.sub_(less[..., None])
    out.copy_(found.view(out.shape))
    return True


@cache
def _has_rows() -> bool:
    """Whether torch was built with FBGEMM, which has them."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def exact_format(scales: torch.Tensor, out: torch.Tensor) -> torch.dtype:
    """A format in which the product with a scale is rounded once only."""
    return out.dtype if scales.dtype is out.dtype else torch.float32


def _scale(
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out: torch.Tensor,
    index: torch.Tensor | None,
) -> None:
    """Codes [o, I], which are overwritten, less zeros [o, G], times scales [o, G]."""
    each = None if zeros is None else zeros.to(codes.dtype)
    scales = scales.to(codes.dtype)
    if index is not None:
        index = index.long()
        if each is not None:
            codes.sub_(each[:, index])
        out.copy_(codes.mul_(scales[:, index]))
        return
    grouped = codes.view(codes.shape[0], scales.shape[1], -1)
    if each is not None:
        grouped.sub_(each[:, :, None])
    if codes.dtype is out.dtype:
        torch.mul(grouped, scales[:, :, None], out=out.view_as(grouped))
    else:
        out.copy_(grouped.mul_(scales[:, :, None]).view_as(out))


def codes_less(
    words: torch.Tensor, bits: int, zero: int, out: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """[o, W] words as [o, I] codes less a zero point, in a format that holds them exactly.

    They lie in `out` [o, I] where that has this format.
    """
    count = out.shape[1]
    if bits == 4 and dtype.itemsize == 2 and count % 8 == 0:
        fours = words.contiguous().view(torch.int16).flatten().to(torch.int32).bitwise_and_(0xFFFF)
        found = out if dtype is out.dtype else out.new_empty(out.shape, dtype=dtype)
        flat = found.view(torch.int64).view(-1)
        torch.index_select(_fours(zero, dtype, words.device), 0, fours, out=flat)
        return found
    return codes_of(words, bits, count).to(dtype).sub_(zero)


@lru_cache(maxsize=8)
def _fours(zero: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[65536] int64: four numbers of 16 bits for each four codes; half a second cache."""
    codes = torch.arange(2**16)
    each = torch.stack([codes >> shift & 15 for shift in (0, 4, 8, 12)], dim=1) - zero
    return each.to(dtype).view(torch.int64).flatten().to(device)


def codes_of(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """[R, W] int32, each row one stream of codes, low bits first, to [R, count]."""
    rows, mask = words.shape[0], (1 << bits) - 1
    if bits == 8:
        return words.contiguous().view(torch.uint8)[:, :count]
    if _WORD_BITS % bits == 0:
        shifts = torch.arange(0, _WORD_BITS, bits, dtype=torch.int32, device=words.device)
        return ((words[..., None] >> shifts) & mask).view(rows, -1)[:, :count]
    start = torch.arange(count, device=words.device) * bits
    first, shift = start // _WORD_BITS, start % _WORD_BITS
    second = (first + 1).clamp(max=words.shape[1] - 1)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    joined = wide[:, first] | wide[:, second] << _WORD_BITS
    return (joined >> shift & mask).to(torch.int32)


Bring = Callable[[Stored, dict[str, torch.Tensor], torch.Tensor], None]
BRING: dict[Form, Bring] = {
    Form.PACKED: bring_packed,
    Form.AWQ: bring_awq,
    Form.GPTQ: bring_gptq,
    Form.GPTQ_V2: bring_gptq,
}
