"""What layers that draft from the target's hidden states have in common. No torch here."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig
from offload_rt.costs.drafters import Drafting, DraftPart, Expected
from offload_rt.costs.sizes import (
    RECORDED_ROWS,
    PassShape,
    held_rows,
    image_bytes,
    kv_bytes_per_token,
    layouts_of,
    number_bytes_of,
    recorded_bytes,
    workspace_bytes,
)
from offload_rt.costs.workload import PlacedModel, Residence, parts_of
from offload_rt.device.kinds import DeviceKind
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.formats.base import layer_bytes, resolve_weights
from offload_rt.model.layout import compute_dtype
from offload_rt.profiling.profile import LayerWork
from offload_rt.speculative.draft_model.kind import GROWTH_S
from offload_rt.speculative.kind import DraftedRun, DrafterSeat, DraftMemory

if TYPE_CHECKING:
    from offload_rt.speculative.base import Drafter


def hidden_variants(
    draft: DraftConfig, numbers: Checkpoint, dtype: str, device: DeviceKind
) -> Sequence[DraftConfig]:
    """With the format of its layer chosen, which computes in the number format of `numbers`."""
    name = compute_dtype(numbers, dtype)
    return (replace(draft, draft_weights=resolve_weights(draft.draft_weights, name, device)),)


def hidden_parts(
    drafting: Drafting,
    target: PlacedModel,
    expected: Expected,
    *,
    own_head: bool = False,
    once: Collection[str] = (),
) -> tuple[DraftPart, ...]:
    """Passes of one layer and an output head, for one sequence at a time.

    Args:
        drafting: its checkpoint is the layer's.
        target: that it drafts for.
        expected: how often it is right.
        own_head: the head is the layer's own; else the target's.
        once: matrices that a draft's first pass alone goes through.
    """
    config, module, device = drafting.config, drafting.checkpoint, target.speeds.device
    assert module is not None  # as found, or opened
    parts = parts_of(module, target.dtype, device)
    passes, rows = float(config.nodes), 1
    if config.as_tree:
        passes, rows = config.tree_passes * expected.made, config.tree_breadth
    # What makes its inputs, and a head of its own.
    matrices = {e.name: prod(e.shape) for e in module.others if len(e.shape) == 2}
    mixed = round(sum(n / max(1.0, passes) if e in once else n for e, n in matrices.items()))
    number_bytes, head = number_bytes_of(module, target.dtype), parts.head
    head = LayerWork(
        weight_bytes=(0 if own_head else head.weight_bytes) + mixed * number_bytes,
        flops_per_token=(0 if own_head else head.flops_per_token) + 2 * mixed,
    )
    placed = PlacedModel(
        parts=replace(parts, head=head, rounds=frozenset()),
        speeds=target.speeds,
        residence=Residence(weights=config.draft_weights),
        context_tokens=target.context_tokens,
    )
    passing = DraftPart(times=passes * target.sequences, load=placed.draft_load(rows))
    if not config.as_tree:
        return (passing,)
    growing = DraftPart(times=target.sequences * expected.made, seconds=config.nodes * GROWTH_S)
    return passing, growing


def hidden_memory(drafting: Drafting, run: DraftedRun, *, taps: int = 1) -> DraftMemory:
    """The layer, what makes its inputs, its KV, and hidden states that it has not read yet.

    These are `held_rows`, the last one of each sequence's text, and twice those of a pass: as it is
    made, and while those of several layers are put side by side or some are dropped. The nodes of
    one draft have one each, and a recorded pass has room for its own.

    Args:
        drafting: its checkpoint is the layer's.
        run: that is planned.
        taps: layers of the target whose hidden states it reads.
    """
    config, module, device = drafting.config, drafting.checkpoint, run.device
    assert module is not None  # as found, or opened
    number_bytes = number_bytes_of(module, run.dtype)
    layer, base = layouts_of(module, run.dtype, device)
    weights = layer_bytes(layer, config.draft_weights)
    rows = sum(config.cache_rows(capacity) for capacity in run.capacities)
    read = min(run.shape.rows, run.shape.chunk_rows)
    held = held_rows(config.nodes, run.capacities, max(run.shape.rows, run.shape.chunk_rows))
    states = taps * (held + len(run.capacities) + 2 * run.shape.rows + RECORDED_ROWS)
    states += 1 + config.scratch_rows + RECORDED_ROWS
    recorded = recorded_bytes(module.config, number_bytes, device)
    passes = PassShape(
        rows=read,
        chunk_rows=run.shape.chunk_rows,
        logit_rows=config.tree_breadth if config.as_tree else 1,
        longest=run.shape.longest,
    )
    row_bytes = module.config.hidden_size * number_bytes
    beside = (taps - 1) * read * row_bytes  # what is read at once, in one piece
    return DraftMemory(
        kept_bytes=weights
        + base.nbytes
        + rows * kv_bytes_per_token(module.config, number_bytes)
        + states * row_bytes
        + recorded,
        copied_bytes=weights if config.draft_weights.rounds else 0,
        recorded_bytes=recorded,
        pass_bytes=workspace_bytes(module.config, number_bytes, passes, device) + beside,
        loading_bytes=image_bytes(module, run.dtype, device)[0],
        drawn_nodes=run.drawn_nodes(config),
    )


def make_hidden(seat: DrafterSeat, draft: DraftConfig) -> "Drafter":
    """Of a sequence, with the layer's cache of it."""
    from offload_rt.speculative.hidden_drafter import HiddenDrafter

    kept = seat.kept[seat.index]
    if isinstance(kept, HiddenDrafter):
        drafter = kept
    else:
        assert seat.module is not None  # as loaded for it
        drafter = HiddenDrafter(seat.module, seat.index, draft, seat.capacity)
        seat.kept[seat.index] = drafter
    drafter.begin(seat.sampling, seat.generator)
    return drafter
