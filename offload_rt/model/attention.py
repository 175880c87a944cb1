"""The attention function registered with transformers: one segment per sequence.

Letters used for shapes everywhere: `B` batch, `S` new tokens, `T` cached tokens, `H` query heads,
`K` KV heads, `D` head size, `E` hidden size, `V` vocabulary, `N` tree nodes, `L` layers.

A pass packs the new tokens of all sequences into one row [1, S]. Linear layers see them together;
here they part: each segment appends its keys and values to its own cache and attends to that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from offload_rt.errors import CapacityError, CheckpointError
from offload_rt.kv.base import AttentionSpec, KVCache

ATTENTION_NAME = "offload_rt"
CONTEXT_KEYWORD = "offload_context"

# Keywords of HF's attention call that we honour, or that cannot change what inference computes.
_KNOWN_OPTIONS = frozenset(
    {CONTEXT_KEYWORD, "scaling", "sliding_window", "softcap", "s_aux", "dropout", "is_causal"}
    | {"position_ids", "position_embeddings", "use_cache", "past_key_values", "layer_past"}
    | {"output_attentions", "output_hidden_states", "output_router_logits"}
)

# Scores of the explicit path (sinks, soft cap) are made for as many query rows as fit in this.
SCORE_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of the packed batch that belong to one sequence."""

    cache: KVCache
    tokens: int


class PassContext:
    """What the attention function must know about the pass; travels as a keyword of HF's forward.

    Args:
        segments: the sequences, in the order their rows are packed.
        strict: refuse options of HF's attention call that we do not know.

    Attributes:
        rows: the packed rows that are being computed now.
    """

    def __init__(self, segments: Sequence[Segment], *, strict: bool = False) -> None:
        self.segments, self.strict = segments, strict
        self.rows = range(sum(segment.tokens for segment in segments))

    def parts(self) -> Iterator[tuple[KVCache, slice]]:
        """Caches and their rows, counted within the rows that are being computed now."""
        start = 0
        for segment in self.segments:
            stop = start + segment.tokens
            low, high = max(start, self.rows.start), min(stop, self.rows.stop)
            if low < high:
                yield segment.cache, slice(low - self.rows.start, high - self.rows.start)
            start = stop


def attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attend for one layer; called by the attention modules of transformers.

    Args:
        module: HF's attention module; its `layer_idx` says which cache layer this is.
        query: [1, H, S, D] rotated.
        key: [1, K, S, D] rotated.
        value: [1, K, S, D].
        attention_mask: None, since no mask function is registered under our name.
        options: what HF passes besides; those that change the result are honoured.

    Returns:
        [1, S, H, D] and no weights.
    """
    context = options.get(CONTEXT_KEYWORD)
    if not isinstance(context, PassContext):
        raise CheckpointError("their layers do not pass keywords on to their attention")
    if context.strict:
        _check_options(attention_mask, options)
    layer = module.layer_idx
    assert isinstance(layer, int)
    spec = read_spec(query.shape[-1], options)
    parts = []
    for cache, rows in context.parts():
        cache.append(layer, key[0, :, rows], value[0, :, rows])
        parts.append(cache.attend(layer, query[0, :, rows], spec))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


def _check_options(attention_mask: torch.Tensor | None, options: dict[str, object]) -> None:
    if attention_mask is not None:
        raise CheckpointError("they make an attention mask of their own")
    unknown = sorted(k for k, v in options.items() if v is not None and k not in _KNOWN_OPTIONS)
    if unknown:
        raise CheckpointError(f"their attention is given {', '.join(unknown)}")


def read_spec(head_dim: int, options: dict[str, object]) -> AttentionSpec:
    """Pick from HF's keywords those that change the result."""
    scaling, window = options.get("scaling"), options.get("sliding_window")
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    return AttentionSpec(
        scaling=scaling if isinstance(scaling, float) else head_dim**-0.5,
        window=window if isinstance(window, int) else None,
        softcap=softcap if isinstance(softcap, float) else None,
        sinks=sinks if isinstance(sinks, torch.Tensor) else None,
    )


def attend_rows(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """Attend causally from the last S of T rows to all of them.

    Args:
        query: [H, S, D].
        key: [K, T, D]; row T - S + s belongs to query row s.
        value: [K, T, D].
        spec: how the layer attends.

    Returns:
        [S, H, D].
    """
    if key.shape[1] < query.shape[1]:
        raise CapacityError(f"{query.shape[1]} queries but only {key.shape[1]} cached rows")
    if spec.softcap is not None or spec.sinks is not None:
        return _attend_explicitly(query, key, value, spec)
    (heads, rows, _), (kv_heads, cached, _) = query.shape, key.shape
    windowed = spec.window is not None and cached > spec.window
    if rows == 1 and not windowed:
        # Query heads of a group are rows of their KV head: no copy of keys, no mask.
        grouped = query.view(kv_heads, heads // kv_heads, -1)
        out = functional.scaled_dot_product_attention(
            grouped[None], key[None], value[None], scale=spec.scaling
        )
        return out.reshape(1, heads, -1)
    causal = rows == cached and not windowed
    out = functional.scaled_dot_product_attention(
        query[None],
        key[None],
        value[None],
        attn_mask=None if causal else visible_rows(rows, cached, spec.window, query.device),
        is_causal=causal,
        scale=spec.scaling,
        enable_gqa=heads != kv_heads,
    )
    return out[0].transpose(0, 1)


def visible_rows(rows: int, cached: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return [S, T] bool: whether each of the last S tokens may look at each of T tokens."""
    at = torch.arange(cached, device=device)
    ahead = at[None, :] - at[cached - rows :, None]  # [S, T] how far the key is after the query
    visible = ahead <= 0
    if window is not None:
        visible &= ahead > -window
    return visible


def _attend_explicitly(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: AttentionSpec
) -> torch.Tensor:
    """Softmax written out, for what the fused kernels do not know; in blocks of query rows."""
    (heads, rows, _), (kv_heads, cached, _) = query.shape, key.shape
    groups = heads // kv_heads
    block = max(1, SCORE_BYTES // (heads * cached * 4))
    visible = visible_rows(rows, cached, spec.window, query.device)
    out = query.new_empty(rows, heads, value.shape[-1])
    for start in range(0, rows, block):
        part = query[:, start : start + block].unflatten(0, (kv_heads, groups))  # [K, G, S, D]
        scores = torch.matmul(part, key[:, None].transpose(2, 3)) * spec.scaling  # [K, G, S, T]
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        scores = scores.masked_fill(~visible[start : start + block], float("-inf"))
        if spec.sinks is not None:
            sinks = spec.sinks.view(kv_heads, groups, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
        mixed = torch.matmul(weights[..., :cached], value[:, None])  # [K, G, S, D]
        out[start : start + block] = mixed.flatten(0, 1).transpose(0, 1)
    return out
