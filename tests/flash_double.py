"""CUDA's flash attention over CPU tensors, so that tests on a CPU run the branches meant for a GPU.

It is written from what the kernel of torch 2.14 accepts and computes (`mha_fwd` of torch's
`flash_api.cpp`): two number formats, head sizes, rows that lie side by side, heads in groups, a
causal mask and a window that end at the last key.
"""

from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import torch

from offload_rt.attention import flash
from offload_rt.device.kinds import CPU, KINDS, Flash, Processor


def flash_forward(
    query,
    key,
    value,
    cum_seq_q,
    cum_seq_k,
    max_q,
    max_k,
    dropout,
    causal,
    debug,
    *,
    scale,
    window_size_left=None,
    window_size_right=None,
):
    """[1, S, H, D] and [1, T, K, D] give [1, S, H, D] and [1, H, S]."""
    (_, rows, heads, size), (_, cached, kv_heads, _) = query.shape, key.shape
    assert (cum_seq_q, cum_seq_k, dropout, debug) == (None, None, 0.0, False)
    assert (max_q, max_k) == (rows, cached) and value.shape == key.shape
    assert query.dtype == key.dtype == value.dtype and size % 8 == 0 and size <= 256
    assert all(rows.stride(-1) == 1 for rows in (query, key, value))
    left = -1 if window_size_left is None or window_size_left >= cached else window_size_left
    right = -1 if window_size_right is None or window_size_right >= cached else window_size_right
    if causal and rows > 1:
        right = 0
    own = torch.arange(cached - rows, cached)[:, None]
    at = torch.arange(cached)[None]
    hidden = torch.zeros(rows, cached, dtype=torch.bool)
    if left >= 0:
        hidden |= at < own - left
    if right >= 0:
        hidden |= at > own + right
    each = heads // kv_heads
    key, value = (x.repeat_interleave(each, dim=2)[0].transpose(0, 1) for x in (key, value))
    scores = query[0].transpose(0, 1).float() @ key.float().transpose(1, 2) * scale
    scores = scores.masked_fill(hidden, float("-inf"))
    out = (scores.softmax(dim=-1) @ value.float()).to(query.dtype).transpose(0, 1)
    nothing = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    into = torch.empty_like(query)  # in the order of the query, as the kernel's is
    return into.copy_(out), scores.logsumexp(dim=-1)[None], *nothing, torch.zeros(0)


@contextmanager
def flash_of_a_gpu(*dtypes):
    """Let tensors on the CPU take a GPU's way through attention.

    Args:
        dtypes: what the kernel shall compute in besides its own, for tests with closer bounds.
    """
    kernel = flash._KERNELS[Flash.LOWER_RIGHT]
    wider = replace(kernel, dtypes=kernel.dtypes | set(dtypes))
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_forward, "CPU")
    try:
        with (
            patch.dict(KINDS, {Processor.CPU: replace(CPU, flash=Flash.LOWER_RIGHT)}),
            patch.dict(flash._KERNELS, {Flash.LOWER_RIGHT: wider}),
        ):
            flash.flash_of.cache_clear()
            yield
    finally:
        flash.flash_of.cache_clear()
        library._destroy()
