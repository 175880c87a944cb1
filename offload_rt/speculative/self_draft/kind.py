"""The target itself, with rounded copies in place of its streamed layers, as a kind of drafter.

A layer that stays on the device costs its bytes less those of its copy. No torch here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig, DraftWeights, KVPlace, RuntimeConfig
from offload_rt.costs.drafters import Drafting, DraftPart, Expected, growing_pass
from offload_rt.costs.sizes import decoding_bytes, layouts_of, number_bytes_of, recorded_bytes
from offload_rt.costs.workload import PlacedModel
from offload_rt.device.kinds import DeviceKind
from offload_rt.errors import ConfigError, PlanError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.formats.base import layer_bytes, resolve_weights
from offload_rt.model.layout import compute_dtype
from offload_rt.speculative.draft_model.kind import GROWTH_S
from offload_rt.speculative.kind import DraftedRun, DrafterKind, DrafterSeat, DraftMemory, Points
from offload_rt.speculative.ngram.kind import index_bytes
from offload_rt.speculative.ngram.suffixes import SHORTEST_QUOTED
from offload_rt.units import format_size

if TYPE_CHECKING:
    from offload_rt.speculative.base import Drafter

_PRIOR: Points = ((1, 0.9), (2, 1.7), (4, 3.2), (8, 5.5), (16, 9.0), (64, 12.0), (256, 16.0))
# With 4 bits and a scale for each 32 inputs 0.93 of the likeliest tokens of five MT-Bench answers
# were right, with 8 bits, a scale for each output and rounded activations 0.86
# (docs/RESULTS.md, "A model that drafts for itself").
_USUAL = DraftWeights.INT4
_FORMATS = (_USUAL, DraftWeights.INT8)


def _variants(
    draft: DraftConfig, target: Checkpoint, dtype: str, device: DeviceKind
) -> Sequence[DraftConfig]:
    """With copies in the format that is asked for, else in each that the device has kernels for."""
    if draft.copies is not DraftWeights.AUTO:
        return (draft,)
    name = compute_dtype(target, dtype)
    formats = [w for w in _FORMATS if name in device.kernels.get(w, ())] or [_USUAL]
    return [replace(draft, draft=f"{draft.kind}:{weights}") for weights in formats]


def _is_worth_a_look(
    draft: DraftConfig, runtime: RuntimeConfig, dtype: str, prompt_tokens: int
) -> bool:
    return dtype == "bfloat16" and runtime.kv in (KVPlace.AUTO, KVPlace.DEVICE)


def _format(draft: DraftConfig) -> DraftWeights:
    """How copies are kept."""
    return _USUAL if draft.copies is DraftWeights.AUTO else draft.copies


def copied_layer_bytes(
    checkpoint: Checkpoint, draft: DraftConfig, dtype: str, device: DeviceKind
) -> tuple[int, ...]:
    """Bytes of a copy of each layer.

    Raises:
        PlanError: the device has no kernels for it, or it is no smaller than the layer itself.
    """
    weights = _format(draft)
    name = compute_dtype(checkpoint, dtype)
    try:
        resolve_weights(weights, name, device, f"--draft {draft.kind}:")
    except ConfigError as refusal:
        raise PlanError(str(refusal)) from refusal
    *layers, _ = layouts_of(checkpoint, dtype, device)
    copies = tuple(layer_bytes(layout, weights) for layout in layers)
    own, copied = sum(layout.nbytes for layout in layers), sum(copies)
    if copied >= own:
        raise PlanError(
            f"--draft {draft.kind} keeps {weights} copies of streamed layers on the device, and "
            f"they would have {format_size(copied)} where the layers themselves have "
            f"{format_size(own)}: use another drafter"
        )
    return copies


def _parts(drafting: Drafting, target: PlacedModel, expected: Expected) -> tuple[DraftPart, ...]:
    """Passes with copies in place of the streamed layers."""
    config = drafting.config
    passes, rows = float(config.nodes), 1
    if config.as_tree:
        passes, rows = config.tree_passes * expected.made, config.tree_breadth
    own = target.over_own_rows(_format(config))
    each, load = growing_pass(own, rows, together=drafting.together)
    parts = (DraftPart(times=passes * each, load=load),)
    if not config.as_tree:
        return parts
    growth = DraftPart(times=target.sequences * expected.made, seconds=config.nodes * GROWTH_S)
    return (*parts, growth)


def _memory(drafting: Drafting, run: DraftedRun) -> DraftMemory:
    config = drafting.config
    copies = copied_layer_bytes(run.target, config, run.dtype, run.device)
    *layers, _ = layouts_of(run.target, run.dtype, run.device)
    scratch = decoding_bytes(run.target, run.dtype, run.device)  # from which they are rounded
    quotes = index_bytes(run, SHORTEST_QUOTED) if config.as_tree else 0
    number_bytes = number_bytes_of(run.target, run.dtype)
    recorded = recorded_bytes(run.target.config, number_bytes, run.device)
    return DraftMemory(
        kept_bytes=scratch + quotes + recorded,
        recorded_bytes=recorded,
        streamed_bytes=copies,
        copied_bytes=sum(copies),
        loading_bytes=max(layout.nbytes for layout in layers),
        drawn_nodes=run.drawn_nodes(config),
    )


def _history(draft: DraftConfig) -> Iterator[str]:
    yield str(draft.shape)
    yield f"copies {draft.copies}"


def _in_memory(draft: DraftConfig) -> Iterator[str]:
    kept = "rounded" if draft.copies is DraftWeights.AUTO else str(draft.copies)
    yield f"{kept} copies of the streamed layers"


def _make(seat: DrafterSeat, draft: DraftConfig) -> "Drafter":
    """Of a sequence, over the target's cache of it."""
    from offload_rt.speculative.self_draft.drafter import SelfDrafter

    drafter = seat.kept[seat.index]
    if not isinstance(drafter, SelfDrafter):
        assert seat.rounded_copy is not None  # as loaded for it
        drafter = SelfDrafter(
            seat.rounded_copy, seat.cache, draft, seat.capacity, least_gain=seat.pass_share
        )
        seat.kept[seat.index] = drafter
    drafter.begin(seat.sampling, seat.generator)
    return drafter


KIND = DrafterKind(
    label="copies that draft",
    most_tokens=256,
    most_free_tokens=1024,
    make=_make,
    parts=_parts,
    memory=_memory,
    prior=_PRIOR,
    automatic=_is_worth_a_look,
    variants=_variants,
    tree_depth=lambda draft, known: draft.tree_passes if draft.as_tree else None,
    size=lambda draft: "tree of" if draft.as_tree else "chain of",
    history=_history,
    in_memory=_in_memory,
)
