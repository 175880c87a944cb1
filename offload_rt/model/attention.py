"""The attention function registered with transformers: one segment per sequence.

Letters used for shapes everywhere: `B` batch, `S` new tokens, `T` cached tokens, `H` query heads,
`K` KV heads, `D` head size, `E` hidden size, `V` vocabulary, `N` tree nodes, `L` layers.

A pass packs the new tokens of all sequences into one row [1, S]. Linear layers see them together;
here they part: each segment appends its keys and values to its own cache and attends to that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.nn import functional

from offload_rt.errors import CapacityError, CheckpointError
from offload_rt.kv.base import AttentionSpec, KVCache, PendingTree
from offload_rt.kv.partial import PartialAttention

ATTENTION_NAME = "offload_rt"
CONTEXT_KEYWORD = "offload_context"

# Keywords of HF's attention call that we honour, or that cannot change what inference computes.
_KNOWN_OPTIONS = frozenset(
    {CONTEXT_KEYWORD, "scaling", "sliding_window", "softcap", "s_aux", "dropout", "is_causal"}
    | {"position_ids", "position_embeddings", "use_cache", "past_key_values", "layer_past"}
    | {"output_attentions", "output_hidden_states", "output_router_logits"}
)

KEY_BLOCK = 1024  # keys whose scores are written out at once
# On a CPU so few rows behind so many others are taken apart (`_attend_grouped`). Measured with 2 to
# 65 rows, 32 heads over 8 KV heads: 1.2 to 2.0 times as fast behind 2,048 rows, 1.2 to 2.2 behind
# 8,192; behind 1,024 and less sometimes slower.
GROUPED_ROWS, GROUPED_FROM = 128, 2048


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of the packed batch that belong to one sequence.

    Attributes:
        tree: which pending rows they see; None: all before them.
    """

    cache: KVCache
    tokens: int
    tree: PendingTree | None = None


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

    def parts(self) -> Iterator[tuple[KVCache, slice, PendingTree | None]]:
        """Caches and their rows, counted within the rows that are being computed now."""
        start = 0
        for segment in self.segments:
            stop = start + segment.tokens
            low, high = max(start, self.rows.start), min(stop, self.rows.stop)
            if low < high:
                tree = segment.tree and _rows_of_tree(segment.tree, low - start, high - start)
                yield segment.cache, slice(low - self.rows.start, high - self.rows.start), tree
            start = stop


def _rows_of_tree(tree: PendingTree, low: int, high: int) -> PendingTree:
    """The part of a tree for its newest rows `low` to `high`, when later ones are not there yet."""
    rows = tree.visible.shape[0]
    if (low, high) == (0, rows):
        return tree
    pending = tree.visible.shape[1] - rows + high
    return PendingTree(tree.visible[low:high, :pending], tree.positions[:pending])


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
    layer = module.layer_idx
    assert isinstance(layer, int)
    spec = read_spec(query.shape[-1], options)
    if context.strict:
        _check_options(attention_mask, options, spec)
    parts = []
    for cache, rows, tree in context.parts():
        cache.append(layer, key[0, :, rows], value[0, :, rows])
        parts.append(cache.attend(layer, query[0, :, rows], spec, tree))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).unsqueeze(0), None


class MaskKind(StrEnum):
    """The mask HF would have given to a layer; the probe passes it in place of one."""

    CAUSAL = "causal"
    SLIDING = "sliding"


def _check_options(attention_mask: object, options: dict[str, object], spec: AttentionSpec) -> None:
    """In the probe: see that what we attend to is what HF's mask would have allowed."""
    unknown = sorted(k for k, v in options.items() if v is not None and k not in _KNOWN_OPTIONS)
    if unknown:
        raise CheckpointError(f"their attention is given {', '.join(unknown)}")
    if not isinstance(attention_mask, MaskKind):
        raise CheckpointError("they make an attention mask of their own")
    if (attention_mask is MaskKind.SLIDING) != (spec.window is not None):
        raise CheckpointError(
            f"they give a {attention_mask} mask to an attention with window {spec.window}"
        )


def read_spec(head_dim: int, options: dict[str, object]) -> AttentionSpec:
    """Pick from HF's keywords those that change the result.

    Raises:
        CheckpointError: one is of a kind we would misread.
    """
    window, sinks = options.get("sliding_window"), options.get("s_aux")
    scaling = _number(options, "scaling")
    if not (window is None or type(window) is int):
        raise CheckpointError(f"their attention is given sliding_window={window!r}")
    if not (sinks is None or isinstance(sinks, torch.Tensor)):
        raise CheckpointError(f"their attention is given s_aux={sinks!r}")
    return AttentionSpec(
        scaling=head_dim**-0.5 if scaling is None else scaling,
        window=window,
        softcap=_number(options, "softcap"),
        sinks=sinks,
    )


def _number(options: dict[str, object], name: str) -> float | None:
    value = options.get(name)
    if value is None or type(value) in (int, float):
        return value  # type: ignore[return-value]
    raise CheckpointError(f"their attention is given {name}={value!r}")


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
