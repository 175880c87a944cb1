"""Attention from the last rows of a sequence to all of them, by the fastest exact kernel."""

import torch
from torch.nn import functional

from offload_rt.attention.blocks import GROUPED_FROM, GROUPED_ROWS
from offload_rt.attention.exact import attend_exact
from offload_rt.attention.flash import flash_of
from offload_rt.attention.partial import PartialAttention
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.attention.visible import visible_rows
from offload_rt.errors import CapacityError


def attend_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    tree: PendingTree | None = None,
) -> torch.Tensor:
    """Attend from the last S of T rows to all of them, causally or along a tree.

    Args:
        query: [H, S, D].
        key: [K, T, D]; row T - S + s belongs to query row s.
        value: [K, T, D].
        spec: how the layer attends.
        tree: which of the last rows each query row sees; None: all before it, and itself.

    Returns:
        [S, H, D].
    """
    if key.shape[1] < query.shape[1]:
        raise CapacityError(f"{query.shape[1]} queries but only {key.shape[1]} cached rows")
    if spec.exact:
        return attend_exact(query, key, value, spec, tree)
    if spec.window is not None and tree is None:  # older rows are out of everybody's sight
        first = max(0, key.shape[1] - query.shape[1] + 1 - spec.window)
        key, value = key[:, first:], value[:, first:]
    out = _attend_at_once(query, key, value, spec, tree)
    if out is not None:
        return out
    attention = PartialAttention(query, key.shape[0], spec)
    attention.add_newest(key, value, tree)
    return attention.result()


def _attend_at_once(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    tree: PendingTree | None,
) -> torch.Tensor | None:
    """Attend in one call of a kernel where that is possible and fastest; None where parts are."""
    flash = flash_of(query.device)
    if flash is None or not flash.takes(key, value):
        return None
    if spec.softcap is not None or spec.sinks is not None:
        return None
    (heads, rows, size), (kv_heads, cached, _) = query.shape, key.shape
    window = spec.window if spec.window is not None and cached > spec.window else None
    if tree is None:
        if rows == 1:  # query heads of a group are rows of their KV head
            grouped = query.reshape(kv_heads, heads // kv_heads, size)
            return flash.attend(grouped, key, value, spec.scaling, False, None)[0].reshape(
                1, heads, size
            )
        if flash.lower_right or (rows == cached and window is None):
            return flash.attend(query, key, value, spec.scaling, True, window)[0].transpose(0, 1)
    committed = cached - (rows if tree is None else tree.positions.numel())
    many = committed >= GROUPED_FROM or (tree is None and rows > GROUPED_ROWS)
    if flash.lower_right or (many and window is None):
        return None
    mask = visible_rows(rows, range(cached), cached, spec.window, query.device, tree)
    out = functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        scale=spec.scaling,
        enable_gqa=heads != kv_heads,
    )
    return out[0].transpose(0, 1)
