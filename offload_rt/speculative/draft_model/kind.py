"""A smaller model as a kind of drafter. No torch here."""

from dataclasses import replace
from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig, DraftWeights
from offload_rt.costs.drafters import Drafting, DraftPart, Expected, growing_pass, shared_rows
from offload_rt.costs.sizes import (
    decoding_bytes,
    draft_base_bytes,
    image_bytes,
    kv_bytes_per_token,
    layouts_of,
    number_bytes_of,
    packs,
    recorded_bytes,
    workspace_bytes,
)
from offload_rt.costs.workload import PlacedModel, Residence, parts_of
from offload_rt.device.kinds import DeviceKind
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.formats.base import layer_bytes, resolve_weights
from offload_rt.model.layout import compute_dtype
from offload_rt.speculative.kind import DraftedRun, DrafterKind, DrafterSeat, DraftMemory, Points
from offload_rt.speculative.ngram.kind import index_bytes
from offload_rt.speculative.ngram.suffixes import SHORTEST_QUOTED

if TYPE_CHECKING:
    from offload_rt.speculative.base import Drafter

# Qwen2.5-Coder-1.5B drafted for by its 0.5B, first turns of MT-Bench, greedy, the prompt's pass
# counted (docs/RESULTS.md, "Tokens per pass by draft size"). The last is between Sequoia's 6.0 for
# a 13B and 8.9 for a 70B model, of 768 nodes (profiles/published).
_PRIOR: Points = (
    (1, 0.75),
    (2, 1.35),
    (4, 2.1),
    (8, 2.9),
    (16, 3.7),
    (64, 5.3),
    (256, 7.0),
    (1024, 8.0),
)

# Host seconds of growing a tree beside its passes, for each of its nodes; measured: 8 to 10 us
# (docs/RESULTS.md, "Host time of a step").
GROWTH_S = 1e-5


def history(draft: DraftConfig) -> list[str]:
    """How the model is asked, for the name of what was seen of it."""
    shape, window = draft.shape, draft.window_tokens or "full"
    return [str(shape), f"window {window}", f"weights {draft.draft_weights}"]


def _parts(drafting: Drafting, target: PlacedModel, expected: Expected) -> tuple[DraftPart, ...]:
    """Passes of a model that is on the device whole."""
    config, model, context = drafting.config, drafting.checkpoint, target.context_tokens
    assert model is not None  # as opened for it
    placed = PlacedModel(
        parts=parts_of(model, "auto", target.speeds.device),
        speeds=target.speeds,
        residence=Residence(
            weights=config.draft_weights,
            packs_head=_packs_ends(model, config.draft_weights, target.speeds.device),
        ),
        context_tokens=min(context, config.window_tokens or context),
        sequences=target.sequences,
    )
    passes, rows = float(config.nodes), 1
    if config.as_tree:
        passes, rows = config.tree_passes * expected.made, config.tree_breadth
    each, load = growing_pass(placed, rows, together=drafting.together)
    parts = (DraftPart(times=passes * each, load=load),)
    if not config.as_tree:
        return parts
    return (
        *parts,
        DraftPart(times=target.sequences * expected.made, seconds=config.nodes * GROWTH_S),
    )


def _memory(drafting: Drafting, run: DraftedRun) -> DraftMemory:
    config, model, device = drafting.config, drafting.checkpoint, run.device
    assert model is not None  # as opened for it
    weights = draft_weights_of(model, config, device)
    weight_bytes = draft_weight_bytes(model, config, device)
    rows = sum(config.cache_rows(capacity) for capacity in run.capacities)
    kv_bytes = rows * kv_bytes_per_token(model.config, number_bytes_of(model, "auto"))
    *layers, base = image_bytes(model, "auto", device)
    # A layer is read into memory of its own before a copy is made of it. Embedding and head are
    # there whole until both are rounded, or reordered.
    rounds = draft_base_bytes(model, weights, device) != base
    rounds |= _packs_ends(model, weights, device)
    quotes = index_bytes(run, SHORTEST_QUOTED) if config.as_tree else 0
    recorded = recorded_bytes(model.config, number_bytes_of(model, "auto"), device)
    return DraftMemory(
        kept_bytes=weight_bytes + kv_bytes + quotes + recorded,
        copied_bytes=weight_bytes,
        recorded_bytes=recorded,
        pass_bytes=_pass_bytes(model, config, run),
        loading_bytes=max(layers) + (base if rounds else 0),
        drawn_nodes=run.drawn_nodes(config),
    )


def _packs_ends(model: Checkpoint, weights: DraftWeights, device: DeviceKind) -> bool:
    """Whether the output head is reordered, and takes the embedding's place where they are one."""
    return weights is DraftWeights.SAME and not model.stored and packs(model, "auto", device)


def _pass_bytes(model: Checkpoint, config: DraftConfig, run: DraftedRun) -> int:
    shape, sequences = run.shape, 1 if run.below else len(run.capacities)
    rows = config.tree_breadth if config.as_tree else 1
    most = shared_rows(rows, sequences)
    passes = replace(shape, logit_rows=most)
    if config.window_tokens is not None:  # a jump may compute more rows at once than a short prompt
        seen = min(shape.longest, config.window_tokens)
        passes = replace(passes, rows=max(seen, most), longest=seen)
    return workspace_bytes(model.config, number_bytes_of(model, "auto"), passes, run.device)


def draft_weights_of(
    checkpoint: Checkpoint, config: DraftConfig, device: DeviceKind
) -> DraftWeights:
    """How a draft model's weights are kept.

    Raises:
        ConfigError: the device has no kernels for what is asked for.
    """
    dtype = compute_dtype(checkpoint, "auto")
    return resolve_weights(config.draft_weights, dtype, device)


def draft_weight_bytes(checkpoint: Checkpoint, config: DraftConfig, device: DeviceKind) -> int:
    """Bytes of a draft model's weights as they are kept."""
    *layers, _ = layouts_of(checkpoint, "auto", device)
    weights = draft_weights_of(checkpoint, config, device)
    kept = sum(layer_bytes(layout, weights) for layout in layers)
    kept += decoding_bytes(checkpoint, "auto", device)
    return kept + draft_base_bytes(checkpoint, weights, device)


def settled(drafting: Drafting, device: DeviceKind) -> Drafting:
    """The same with the format of a draft model's weights chosen.

    Raises:
        ConfigError: the device has no kernels for what is asked for.
    """
    if drafting.checkpoint is None:
        return drafting
    weights = draft_weights_of(drafting.checkpoint, drafting.config, device)
    return replace(drafting, config=replace(drafting.config, draft_weights=weights))


def _make(seat: DrafterSeat, draft: DraftConfig) -> "Drafter":
    """Of a sequence, with the model's cache of it."""
    from offload_rt.speculative.draft_model.drafter import DraftModelDrafter

    drafter = seat.kept[seat.index]
    if not isinstance(drafter, DraftModelDrafter):
        assert seat.draft_model is not None  # as loaded for it
        drafter = DraftModelDrafter(seat.draft_model, draft, seat.capacity)
        seat.kept[seat.index] = drafter
    drafter.begin(seat.sampling, seat.generator)
    return drafter


KIND = DrafterKind(
    label="draft model",
    most_tokens=256,
    most_free_tokens=1024,
    make=_make,
    parts=_parts,
    memory=_memory,
    prior=_PRIOR,
    below=0.7,
    tree_depth=lambda draft, known: draft.tree_passes if draft.as_tree else None,
    history=history,
    size=lambda draft: "tree of" if draft.as_tree else "chain of",
)
