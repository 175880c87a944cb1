"""A checkpoint's own module for drafting as a kind of drafter. No torch here."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig
from offload_rt.costs.drafters import Drafting, DraftPart, Expected
from offload_rt.costs.sizes import (
    RECORDED_ROWS,
    PassShape,
    image_bytes,
    kv_bytes_per_token,
    layouts_of,
    number_bytes_of,
    recorded_bytes,
    workspace_bytes,
)
from offload_rt.costs.workload import PlacedModel, Residence, parts_of
from offload_rt.device.kinds import DeviceKind
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.formats.base import layer_bytes, resolve_weights
from offload_rt.model.layout import compute_dtype
from offload_rt.profiling.profile import LayerWork
from offload_rt.speculative.draft_model.kind import GROWTH_S
from offload_rt.speculative.kind import DraftedRun, DrafterKind, DrafterSeat, DraftMemory, Points
from offload_rt.speculative.mtp.checkpoint import PROJECTION, find_module

if TYPE_CHECKING:
    from offload_rt.speculative.base import Drafter

# One token: 0.65, the mean of code, prose and questions (Qwen3.8-27B; tenstorrent/vllm issue 442).
# More: accepted by place in chains of 8 on GSM8K, 0.76, 0.62, 0.51, 0.42, 0.36, 0.31, 0.27, 0.24
# (vLLM issue 48892), taken down by what the first of them is above that mean.
_PRIOR: Points = ((1, 0.65), (2, 1.18), (4, 1.98), (8, 2.98))


def _variants(
    draft: DraftConfig, target: Checkpoint, dtype: str, device: DeviceKind
) -> Sequence[DraftConfig]:
    """With the format of its layer chosen; none where the target carries no module."""
    try:
        module = find_module(target)
    except CheckpointError:  # asked for by name it was refused before
        module = None
    if module is None:
        return ()
    name = compute_dtype(module.config.dtype, module.tensors.values(), dtype)
    return (replace(draft, draft_weights=resolve_weights(draft.draft_weights, name, device)),)


def _parts(drafting: Drafting, target: PlacedModel, expected: Expected) -> tuple[DraftPart, ...]:
    """Passes of one layer and the target's output head, for one sequence at a time."""
    config, module, device = drafting.config, drafting.checkpoint, target.speeds.device
    assert module is not None  # as found in the target's files
    parts = parts_of(module, target.dtype, device)
    mixed = module.tensors[PROJECTION].shape[0] * module.tensors[PROJECTION].shape[1]
    number_bytes, head = number_bytes_of(module, target.dtype), parts.head
    head = LayerWork(
        weight_bytes=head.weight_bytes + mixed * number_bytes,
        flops_per_token=head.flops_per_token + 2 * mixed,
    )
    placed = PlacedModel(
        parts=replace(parts, head=head, rounds=frozenset()),
        speeds=target.speeds,
        residence=Residence(weights=config.draft_weights),
        context_tokens=target.context_tokens,
    )
    passes, rows = float(config.nodes), 1
    if config.as_tree:
        passes, rows = config.tree_passes * expected.made, config.tree_breadth
    passing = DraftPart(times=passes * target.sequences, load=placed.draft_load(rows))
    if not config.as_tree:
        return (passing,)
    growing = DraftPart(times=target.sequences * expected.made, seconds=config.nodes * GROWTH_S)
    return passing, growing


def _memory(drafting: Drafting, run: DraftedRun) -> DraftMemory:
    """The layer, what mixes its inputs, its KV, and hidden states that it has not read yet.

    Of these there are two of the longest prompt's: those of before stay until the next pass is
    done. The nodes of one draft have one each, and a recorded pass has room for its own.
    """
    config, module, device = drafting.config, drafting.checkpoint, run.device
    assert module is not None  # as found in the target's files
    number_bytes = number_bytes_of(module, run.dtype)
    layer, base = layouts_of(module, run.dtype, device)
    weights = layer_bytes(layer, config.draft_weights)
    rows = sum(config.cache_rows(capacity) for capacity in run.capacities)
    states = 2 * run.shape.rows + 1 + config.scratch_rows + 2 * RECORDED_ROWS
    recorded = recorded_bytes(module.config, number_bytes, device)
    passes = PassShape(
        rows=min(run.shape.rows, run.shape.chunk_rows),
        chunk_rows=run.shape.chunk_rows,
        logit_rows=config.tree_breadth if config.as_tree else 1,
        longest=run.shape.longest,
    )
    return DraftMemory(
        kept_bytes=weights
        + base.nbytes
        + rows * kv_bytes_per_token(module.config, number_bytes)
        + states * module.config.hidden_size * number_bytes
        + recorded,
        copied_bytes=weights if config.draft_weights.rounds else 0,
        recorded_bytes=recorded,
        pass_bytes=workspace_bytes(module.config, number_bytes, passes, device),
        loading_bytes=image_bytes(module, run.dtype, device)[0],
        drawn_nodes=0 if config.as_tree else config.nodes,
    )


def _make(seat: DrafterSeat, draft: DraftConfig) -> "Drafter":
    """Of a sequence, with the module's cache of it."""
    from offload_rt.speculative.mtp.drafter import MtpDrafter

    drafter = seat.kept[seat.index]
    if not isinstance(drafter, MtpDrafter):
        assert seat.mtp is not None  # as loaded for it
        drafter = MtpDrafter(seat.mtp, seat.index, draft, seat.capacity)
        seat.kept[seat.index] = drafter
    drafter.begin(seat.sampling, seat.generator)
    return drafter


KIND = DrafterKind(
    label="MTP module",
    most_tokens=64,
    make=_make,
    parts=_parts,
    memory=_memory,
    prior=_PRIOR,
    automatic=lambda draft, runtime, dtype, prompt_tokens: True,
    variants=_variants,
    tree_depth=lambda draft, known: draft.tree_passes if draft.as_tree else None,
    size=lambda draft: "tree of" if draft.as_tree else "chain of",
    history=lambda draft: (str(draft.shape), f"weights {draft.draft_weights}"),
    in_memory=lambda draft: ("its layer and KV, hidden states of the target",),
    inside=find_module,
)
