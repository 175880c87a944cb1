"""Linear layers in bf16 on a CPU without instructions for bf16.

There oneDNN computes bf16 products number by number. For a few rows that does not matter, since
reading the weights is slower. For more rows the weight is widened to fp32 in blocks that stay in
the cache, and fp32 kernels multiply. Sums are kept in fp32 and rounded once, as bf16 instructions
do. Measured on two cores with AVX-512 but not its BF16 part, the 28 layers of Qwen2.5-1.5B: 1.4
against 3.1 s for 64 rows, about the same for 8, slower for fewer
(docs/RESULTS.md, "bf16 computed in fp32 blocks").
"""

from functools import partial
from weakref import ref

import torch

from offload_rt.device.system import processor

BLOCK_NUMBERS = 2**20  # of a weight and its outputs at once: 4 MiB, the second caches of two cores
LEAST_ROWS = 8
ROW_MULTIPLE = 16  # kernels write whole vectors of outputs


def widens(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether linear layers of that format are computed in fp32 blocks there."""
    return device.type == "cpu" and dtype is torch.bfloat16 and not processor()[1]


def widen_linears(module: torch.nn.Module) -> None:
    """Have every linear below `module` compute that way; its weight stays as it is."""
    for child in module.modules():
        if type(child) is torch.nn.Linear:
            forward = partial(_forward, ref(child))  # in no circle, so that memory goes at once
            child.forward = forward  # type: ignore[method-assign]


def wide_linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """[..., I] through weight [O, I] and bias [O] gives [..., O], all in bf16."""
    flat = rows.reshape(-1, rows.shape[-1])
    if flat.shape[0] < LEAST_ROWS or weight.dtype is not torch.bfloat16:  # families keep some wide
        return torch.nn.functional.linear(rows, weight, bias)
    wide = flat.float()
    out = rows.new_empty(flat.shape[0], weight.shape[0])
    step = BLOCK_NUMBERS // (weight.shape[1] + flat.shape[0])  # what it gives is fp32, too
    step = max(ROW_MULTIPLE, step // ROW_MULTIPLE * ROW_MULTIPLE)
    for start in range(0, weight.shape[0], step):
        part = slice(start, start + step)
        if bias is None:
            out[:, part] = wide @ weight[part].float().t()
        else:
            out[:, part] = torch.addmm(bias[part].float(), wide, weight[part].float().t())
    return out.view(*rows.shape[:-1], -1)


def _forward(linear_ref: ref[torch.nn.Linear], rows: torch.Tensor) -> torch.Tensor:
    linear = linear_ref()
    assert linear is not None  # it is being called
    return wide_linear(rows, linear.weight, linear.bias)
