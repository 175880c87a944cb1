"""How much device memory a run needs, from headers and configuration alone."""

from collections.abc import Sequence
from dataclasses import replace

from offload_rt.config import DraftConfig, DraftWeights, RuntimeConfig
from offload_rt.costs.drafters import NO_DRAFTING, Drafting
from offload_rt.costs.sizes import (
    PassShape,
    draft_base_bytes,
    head_bytes,
    image_bytes,
    kv_bytes_per_token,
    layouts_of,
    number_bytes_of,
    staging_bytes,
    workspace_bytes,
)
from offload_rt.device.kinds import DeviceKind
from offload_rt.kv.sizes import retrieval_sizes
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.config import ModelConfig
from offload_rt.model.formats.base import (
    layer_bytes,
    resolve_weights,
)
from offload_rt.model.layout import compute_dtype
from offload_rt.planning.placement import Demand
from offload_rt.speculative.ngram.suffixes import SHORTEST, SHORTEST_QUOTED, lookup_bytes

MOST_SLACK_BYTES, SLACK_PART = 32 * 2**20, 16
EXPERT_SHARE = 2  # of a layer of experts: their kernels gather and copy; measured up to a quarter


def demand_of(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    device: DeviceKind,
    *,
    capacities: Sequence[int],
    shape: PassShape,
    drafting: Drafting = NO_DRAFTING,
) -> Demand:
    """Size everything a run keeps on the device.

    Args:
        checkpoint: headers of the model.
        runtime: number format, reads in flight.
        device: what computes.
        capacities: KV rows of each sequence.
        shape: the largest pass.
        drafting: who drafts.
    """
    config, dtype = checkpoint.config, runtime.dtype
    number_bytes = number_bytes_of(checkpoint, dtype)
    *layouts, base = layouts_of(checkpoint, dtype, device)
    layers = [layout.nbytes for layout in layouts]
    kept_probs = 4 * config.vocab_size * _drawn_nodes(drafting.config)
    return Demand(
        layer_bytes=tuple(layers),
        base_bytes=base.nbytes,
        kv_bytes=kv_bytes_per_token(config, number_bytes)
        * sum(capacity + drafting.config.nodes for capacity in capacities),
        workspace_bytes=max(
            workspace_bytes(config, number_bytes, shape) + kept_probs,
            draft_workspace_bytes(drafting, device, shape) + 2 * kept_probs,  # also side by side
            loading_bytes(drafting, device) - base.nbytes,
            # A copy's output head is there twice while it is made; the target's layers come later.
            head_bytes(checkpoint, rounded_copy_weights(drafting.config)),
        )
        + staging_bytes([*layouts, base], device, runtime.readers)
        + slack_bytes(checkpoint, drafting, dtype, device)
        + (max(layers) // EXPERT_SHARE if config.has_experts else 0),
        drafter_bytes=drafter_bytes(drafting, device, capacities)
        + retrieval_bytes(config, drafting.config, number_bytes, capacities)
        + rounded_copy_bytes(checkpoint, drafting.config, dtype, device),
    )


def drafter_bytes(drafting: Drafting, device: DeviceKind, capacities: Sequence[int]) -> int:
    """What a drafter takes: weights, a cache per sequence, an index of its tokens.

    Medusa heads have no cache. The index is in host memory: it counts where that is the device's.
    """
    checkpoint, config = drafting.checkpoint, drafting.config
    longer = 0  # a draft below another's begins behind that
    if config.kind == "triforce":
        config, longer = config.inner, config.nodes
    index, quotes = 0, config.kind == "model" and config.as_tree
    if not device.own_memory and (quotes or config.kind == "ngram"):
        shortest = SHORTEST_QUOTED if quotes else SHORTEST
        index = sum(lookup_bytes(capacity + longer, shortest) for capacity in capacities)
    if checkpoint is None:
        return drafting.heads_bytes + index
    number_bytes = number_bytes_of(checkpoint, "auto")
    rows = sum(config.cache_rows(capacity + longer) for capacity in capacities)
    kv = kv_bytes_per_token(checkpoint.config, number_bytes)
    return draft_weight_bytes(checkpoint, config, device) + rows * kv + index


def draft_workspace_bytes(drafting: Drafting, device: DeviceKind, shape: PassShape) -> int:
    """What a pass of a draft model takes; it comes when the target has none."""
    checkpoint, config = drafting.checkpoint, drafting.config
    if checkpoint is None:
        return 0
    if config.kind == "triforce":
        config = config.inner
    passes = replace(shape, logit_rows=config.tree_breadth)
    if config.window_tokens is not None:  # a jump may compute more rows at once than a short prompt
        seen = min(shape.longest, config.window_tokens)
        passes = replace(passes, rows=seen, longest=seen)
    return workspace_bytes(checkpoint.config, number_bytes_of(checkpoint, "auto"), passes)


def _drawn_nodes(config: DraftConfig) -> int:
    """Nodes whose probabilities are kept until they are verified, where tokens are drawn."""
    if config.kind == "triforce":
        return config.nodes + _drawn_nodes(config.inner)
    return config.nodes if config.kind == "model" and not config.as_tree else 0


def loading_bytes(drafting: Drafting, device: DeviceKind) -> int:
    """What a draft model takes only while it is loaded, before the target's weights are.

    A layer is read into memory of its own before a copy is made of it. Embedding and head are
    there whole until both are rounded.
    """
    if drafting.checkpoint is None:
        return 0
    *layers, base = image_bytes(drafting.checkpoint, "auto", device)
    weights = draft_weights_of(drafting.checkpoint, drafting.config, device)
    rounds = draft_base_bytes(drafting.checkpoint, weights, device) != base
    return max(layers) + (base if rounds else 0)


def draft_weights_of(
    checkpoint: Checkpoint, config: DraftConfig, device: DeviceKind
) -> DraftWeights:
    """How a draft model's weights are kept.

    Raises:
        ConfigError: the device has no kernels for what is asked for.
    """
    dtype = compute_dtype(checkpoint.config.dtype, checkpoint.tensors.values(), "auto")
    return resolve_weights(config.draft_weights, dtype, device)


def settled(drafting: Drafting, device: DeviceKind) -> Drafting:
    """The same with the format of a draft model's weights chosen.

    Raises:
        ConfigError: the device has no kernels for what is asked for.
    """
    if drafting.checkpoint is None:
        return drafting
    weights = draft_weights_of(drafting.checkpoint, drafting.config, device)
    return replace(drafting, config=replace(drafting.config, draft_weights=weights))


def draft_weight_bytes(checkpoint: Checkpoint, config: DraftConfig, device: DeviceKind) -> int:
    """What a draft model's weights take."""
    *layers, _ = layouts_of(checkpoint, "auto", device)
    weights = draft_weights_of(checkpoint, config, device)
    kept = sum(layer_bytes(layout, weights) for layout in layers)
    return kept + draft_base_bytes(checkpoint, weights, device)


def slack_bytes(checkpoint: Checkpoint, drafting: Drafting, dtype: str, device: DeviceKind) -> int:
    """What many small copies of weights cost the process's allocator besides their sizes.

    With Qwen2.5-0.5B in int8 (168 matrices) the process had 40 MB more while it drafted, which it
    could give back.
    """
    if device.own_memory:
        return 0
    copied = rounded_copy_bytes(checkpoint, drafting.config, dtype, device)
    if drafting.checkpoint is not None:
        copied += draft_weight_bytes(drafting.checkpoint, drafting.config, device)
    return min(MOST_SLACK_BYTES, copied // SLACK_PART)


def retrieval_bytes(
    model: ModelConfig, draft: DraftConfig, number_bytes: int, capacities: Sequence[int]
) -> int:
    """What triforce's retrieval caches take, and what building one takes for a moment."""
    if draft.kind != "triforce":
        return 0
    per_token = kv_bytes_per_token(model, number_bytes)
    row_bytes = [per_token // model.num_layers] * model.num_layers
    sizes = [retrieval_sizes(draft, row_bytes, capacity) for capacity in capacities]
    return sum(s.device_bytes for s in sizes) + max(s.build_bytes for s in sizes)


def rounded_copy_bytes(
    checkpoint: Checkpoint, draft: DraftConfig, dtype: str, device: DeviceKind
) -> int:
    """What rounded copies of the target's weights take that triforce drafts with, if it does.

    The embedding, and what else is in no layer but the head, is the target's own.

    Raises:
        ConfigError: the device has no kernels for what is asked for.
    """
    weights = rounded_copy_weights(draft)
    if weights is DraftWeights.SAME:
        return 0
    name = compute_dtype(checkpoint.config.dtype, checkpoint.tensors.values(), dtype)
    resolve_weights(weights, name, device, "--retrieval-weights")
    *layers, _ = layouts_of(checkpoint, dtype, device)
    return sum(layer_bytes(layout, weights) for layout in layers) + head_bytes(checkpoint, weights)


def rounded_copy_weights(draft: DraftConfig) -> DraftWeights:
    """How the copies are kept with which triforce drafts; `same`: it uses the target's own."""
    rounds = draft.kind == "triforce" and draft.retrieval.rounded
    return draft.retrieval.retrieval_weights if rounds else DraftWeights.SAME
