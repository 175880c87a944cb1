"""Products of few rows with all experts that are there, in one launch, on a GPU.

Codes are multiplied as they are stored: nothing is dequantised. A number of the result is one sum
in fp32, rounded once, in an order of its own: other bits than the product with the dequantised
weight has, and the same ones for experts that come as for those that stay.
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
    kind = _KINDS[out.dtype]
    given, biases = given.contiguous(), given if biases is None else biases.contiguous()
    numbers = (given, biases, out)
    words = [n.view(torch.uint16) if kind == 0 else n for n in numbers]
    with on_device_of(out):
        _launch()(table, *words, biases is not given, kind)


@multiply_together.register_fake
def _(
    given: torch.Tensor,
    table: torch.Tensor,
    stored: Sequence[torch.Tensor],
    biases: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """Nothing but `out` changes."""


@cache
def _launch() -> Callable[..., None]:
    """What starts the kernel; triton is imported now."""
    from offload_rt.model.formats import triton_rows as made

    def launch(
        table: torch.Tensor,
        given: torch.Tensor,
        biases: torch.Tensor,
        out: torch.Tensor,
        has_bias: bool,
        kind: int,
    ) -> None:
        outputs, inputs = out.shape[1], given.shape[1]
        blocks = table.shape[0], -(-outputs // made.ROWS)
        more = (has_bias, kind, made.FIELDS, made.ROWS, made.PAIRS)
        made.mxfp4[blocks](table, given, biases, out, outputs, inputs, *more)

    return launch
