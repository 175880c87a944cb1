"""Products of few rows with all experts that are there, in one launch, on a GPU.

Codes are multiplied as they are stored, nothing is dequantised; and numbers as they are. A number
of the result is one sum in fp32, rounded once, in an order of its own: other bits than a product of
torch's has, and the same ones for experts that come as for those that stay.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch

from offload_rt.device.cuda.torch_driver import on_device_of
from offload_rt.model.formats import on_gpu
from offload_rt.model.formats.stored import Stored, multiplied_together

_CODES, _SCALES = "weight_packed", "weight_scale"
_BLOCK = 32  # weights of a scale
_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def suits(stored: Stored) -> bool:
    """Whether a weight can be multiplied so."""
    return multiplied_together(stored.form) and stored.block == (1, _BLOCK)


def is_there(device: torch.device) -> bool:
    """Whether there is a kernel."""
    return device.type == "cuda" and on_gpu.is_there()


def places_of(parts: dict[str, torch.Tensor], address: Callable[[torch.Tensor], int]) -> list[int]:
    """Where codes and scales lie."""
    return [address(parts[_CODES]), address(parts[_SCALES])]


@torch.library.custom_op("offload_rt::multiply_together", mutates_args={"out"})
def multiply_together(
    given: torch.Tensor,
    table: torch.Tensor,
    stored: Sequence[torch.Tensor],
    biases: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Multiply each row with the weight of its expert.

    Args:
        given: [., I].
        table: [n, 5] int64: row of `given`, row of `out`, expert, and where its codes and its
            scales lie.
        stored: these, which must be there.
        biases: [experts, O].
        out: [., O] takes n rows.
    """
    with on_device_of(out):
        _launch()(table, *_words(given, biases, out))


@torch.library.custom_op("offload_rt::multiply_plain_together", mutates_args={"out"})
def multiply_plain(  # noqa: PLR0913 - as the kernel
    given: torch.Tensor,
    table: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: torch.Tensor | None,
    out: torch.Tensor,
    half: int,
    transposed: bool,
) -> None:
    """Multiply each row with the weight of its expert, of numbers in the format of rows.

    Args:
        given: [., I].
        table: [n, 5] int64: row of `given`, row of `out`, expert, and where both halves lie.
        weights: these, which must be there; they are contiguous.
        biases: [experts, O].
        out: [., O] takes n rows.
        half: outputs of a half; all of them: there is but one.
        transposed: a weight is [I, O], not [O, I]; it is whole then.
    """
    with on_device_of(out):
        _launch()(table, *_words(given, biases, out), half, transposed)


for _product in (multiply_together, multiply_plain):
    _product.register_fake(lambda *_, **__: None)  # nothing but `out` changes


def _words(
    given: torch.Tensor, biases: torch.Tensor | None, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool, int]:
    """What both kernels take of these: as words of 16 bits where they are bf16."""
    kind = _KINDS[out.dtype]
    numbers = given.contiguous(), (given if biases is None else biases).contiguous(), out
    words = [n.view(torch.uint16) if kind == 0 else n for n in numbers]
    return words[0], words[1], words[2], biases is not None, kind


@cache
def _launch() -> Callable[..., None]:
    """What starts a kernel; triton is imported now."""
    from offload_rt.model.formats import triton_rows as made

    def launch(  # noqa: PLR0913 - as the kernels
        table: torch.Tensor,
        given: torch.Tensor,
        biases: torch.Tensor,
        out: torch.Tensor,
        has_bias: bool,
        kind: int,
        half: int = 0,
        transposed: bool = False,
    ) -> None:
        outputs, inputs, entries = out.shape[1], given.shape[1], table.shape[0]
        if not half:
            more = (has_bias, kind, made.FIELDS, made.ROWS, made.PAIRS)
            blocks = entries, -(-outputs // made.ROWS)
            made.mxfp4[blocks](table, given, biases, out, outputs, inputs, *more)
            return
        # What is next to each other in memory is read together.
        rows, columns = (made.COLUMNS, made.ROWS) if transposed else (made.ROWS, made.COLUMNS)
        steps = (1, outputs) if transposed else (inputs, 1)
        blocks = entries, -(-half // rows) * (outputs // half)
        sizes = outputs, inputs, half, *steps
        more = has_bias, kind, made.FIELDS, rows, columns
        made.plain[blocks](table, given, biases, out, *sizes, *more)

    return launch
