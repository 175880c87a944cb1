"""Attention from the last rows of a sequence to all of them, by the fastest exact kernel."""

import torch
from torch.nn import functional

from offload_rt.attention.partial import PartialAttention
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.errors import CapacityError

KEY_BLOCK = 1024  # keys whose scores are written out at once
# On a CPU few rows behind many others are attended group by group (`_attend_grouped`). Measured
# with 2 to 65 rows, 32 heads over 8 KV heads: 1.2 to 2.0 times as fast behind 2,048 rows, 1.2 to
# 2.2 behind 8,192; behind 1,024 and less sometimes slower.
GROUPED_ROWS, GROUPED_FROM = 128, 2048


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
    if spec.window is not None and tree is None:  # older rows are out of everybody's sight
        first = max(0, key.shape[1] - query.shape[1] + 1 - spec.window)
        key, value = key[:, first:], value[:, first:]
    if spec.softcap is not None or spec.sinks is not None:
        return _attend_explicitly(query, key, value, spec, tree)
    (heads, rows, _), (kv_heads, cached, _) = query.shape, key.shape
    windowed = spec.window is not None and cached > spec.window
    if rows == 1 and not windowed and tree is None:
        # Query heads of a group are rows of their KV head: no copy of keys, no mask.
        grouped = query.view(kv_heads, heads // kv_heads, -1)
        out = functional.scaled_dot_product_attention(
            grouped[None], key[None], value[None], scale=spec.scaling
        )
        return out.reshape(1, heads, -1)
    pending = rows if tree is None else tree.positions.numel()
    few = rows <= GROUPED_ROWS and cached - pending >= GROUPED_FROM
    if few and not windowed and query.device.type == "cpu":
        return _attend_grouped(query, key, value, spec, tree, cached - pending)
    causal = rows == cached and not windowed and tree is None
    mask = None if causal else visible_rows(rows, cached, spec.window, query.device, tree)
    out = functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=mask,
        is_causal=causal,
        scale=spec.scaling,
        enable_gqa=heads != kv_heads,
    )
    return out[0].transpose(0, 1)


def _attend_grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    tree: PendingTree | None,
    committed: int,
) -> torch.Tensor:
    """Attend to what all rows see without a mask, heads of a group together, and then to the rest.

    The CPU's kernel reads keys once per query head where there is a mask, else once per KV head.
    """
    attention = PartialAttention(query, key.shape[0], spec)
    attention.add(key[:, :committed], value[:, :committed])
    if tree is None:
        visible = visible_rows(query.shape[1], key.shape[1] - committed, None, query.device)
    else:
        visible = tree.visible
    attention.add(key[:, committed:], value[:, committed:], visible)
    return attention.result()


def visible_rows(
    rows: int,
    cached: int,
    window: int | None,
    device: torch.device,
    tree: PendingTree | None = None,
) -> torch.Tensor:
    """Return [S, T] bool: whether each of the last S tokens may look at each of T tokens."""
    at = torch.arange(cached, device=device, dtype=torch.int32)
    if tree is not None:
        at[cached - tree.positions.numel() :] = tree.positions.to(torch.int32)
    own = at[cached - rows :, None]
    visible = at[None, :] <= own
    if tree is not None:
        visible[:, cached - tree.positions.numel() :] = tree.visible
    if window is not None:
        visible &= at[None, :] > own - window
    return visible


def _attend_explicitly(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    tree: PendingTree | None,
) -> torch.Tensor:
    """Softmax written out, for what the fused kernels do not know; in blocks of keys.

    Blocks of one size also keep oneDNN from preparing, and keeping, a kernel for every length.
    """
    cached = key.shape[1]
    visible = visible_rows(query.shape[1], cached, spec.window, query.device, tree)
    attention = PartialAttention(query, key.shape[0], spec)
    for start in range(0, cached, KEY_BLOCK):
        part = slice(start, min(start + KEY_BLOCK, cached))
        attention.add(key[:, part], value[:, part], visible[:, part])
    return attention.result()
