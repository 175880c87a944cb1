"""Flash attention with its log-sum-exp: what torch has for each kind of device, behind one call.

Both operators know query heads in groups. They differ in their causal mask: the CPU's begins at
the first key, so it is right only where keys and queries are the same rows. CUDA's ends at the last
key, as the newest rows of a sequence need it, and knows windows (FlashAttention 2.1 and later).
What a kernel refuses is written out (`partial.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from offload_rt.device.kinds import KINDS, Flash

_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ON_CUDA = torch.ops.aten._flash_attention_forward.default
Attended = tuple[torch.Tensor, torch.Tensor]  # [H, S, D], and the log-sum-exp [H, S] in fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class FlashKernel:
    """One of torch's flash kernels.

    Attributes:
        lower_right: its causal mask ends at the last key, and it knows windows.
        dtypes: what it computes in.
        head_sizes: D it takes, the same for keys and values.
        attend: calls it with query [H, S, D], keys and values [K, T, D], scaling, whether causally,
            and the window of a causal call, if any.
    """

    lower_right: bool
    dtypes: frozenset[torch.dtype]
    head_sizes: range
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, bool, int | None], Attended]

    def takes(self, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether it attends to such rows [K, T, D]."""
        size = key.shape[-1]
        return size == value.shape[-1] and size in self.head_sizes and key.dtype in self.dtypes


@cache
def flash_of(device: torch.device) -> FlashKernel | None:
    """The kernel for tensors on a device; None where the GPU is too old for it."""
    kind = KINDS[device.type]  # type: ignore[index]
    return _KERNELS[kind.flash] if kind.runs_flash(device.index or 0) else None


def _upper_left(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    causal: bool,
    window: int | None,
) -> Attended:
    assert window is None and (not causal or query.shape[1] == key.shape[1])
    out, lse = _ON_CPU(query[None], key[None], value[None], 0.0, causal, scale=scaling)
    return out[0], lse[0]


def _lower_right(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    causal: bool,
    window: int | None,
) -> Attended:
    # What `_scaled_dot_product_flash_attention` calls, which has no window: [B, S, H, D].
    inputs = (rows.transpose(0, 1)[None] for rows in (query, key, value))
    out, lse, *_ = _ON_CUDA(
        *inputs,
        None,
        None,
        query.shape[1],
        key.shape[1],
        0.0,
        causal,
        False,
        scale=scaling,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return out[0].transpose(0, 1), lse[0]


_KERNELS = {
    Flash.UPPER_LEFT: FlashKernel(
        lower_right=False,
        dtypes=frozenset({torch.bfloat16, torch.float16, torch.float32}),
        head_sizes=range(1, 2**31),
        attend=_upper_left,
    ),
    Flash.LOWER_RIGHT: FlashKernel(
        lower_right=True,
        dtypes=frozenset({torch.bfloat16, torch.float16}),
        head_sizes=range(8, 257, 8),
        attend=_lower_right,
    ),
}
