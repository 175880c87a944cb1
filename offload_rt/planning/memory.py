"""How much device memory a run needs, from headers and configuration alone."""

from collections.abc import Sequence
from dataclasses import replace

from offload_rt.config import Exact, HomeKind, LookAhead, RuntimeConfig
from offload_rt.costs.drafters import NO_DRAFTING, Drafting
from offload_rt.costs.sizes import (
    PassShape,
    decoding_bytes,
    experts_of,
    kv_row_bytes,
    layouts_of,
    number_bytes_of,
    packed_head_bytes,
    packs,
    pieced_bytes,
    staging_bytes,
    state_bytes,
    workspace_bytes,
)
from offload_rt.device.kinds import DeviceKind
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.ends import head_is_stored
from offload_rt.model.exactness import stays_as_it_lies
from offload_rt.model.expert_layout import ExpertImages
from offload_rt.model.formats.stored import AT_ONCE_EXPERTS, AT_ONCE_ROWS
from offload_rt.model.kept import keeps_states
from offload_rt.model.layout import compute_dtype, set_apart
from offload_rt.planning.placement import Demand, ExpertDemand
from offload_rt.speculative.kind import DraftedRun
from offload_rt.speculative.kinds import draft_memory, kind_of

MOST_SLACK_BYTES, SLACK_PART = 32 * 2**20, 16
OTHER_BUFFERS = 16  # large ones besides layers: slots, caches, a head; smaller ones share 20 MiB
EXPERT_SHARE = 2  # of a layer of experts: their kernels gather and copy; measured up to a quarter


def demand_of(  # noqa: PLR0913 - what a run is made of, most of it by keyword
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    device: DeviceKind,
    *,
    capacities: Sequence[int],
    shape: PassShape,
    drafting: Drafting = NO_DRAFTING,
    apart: bool = False,
) -> Demand:
    """Size everything a run keeps on the device.

    Args:
        checkpoint: headers of the model.
        runtime: number format, reads in flight.
        device: what computes.
        capacities: KV rows of each sequence.
        shape: the largest pass.
        drafting: who drafts.
        apart: the embedding is in host memory, or in its file where the device has no other.
    """
    config, dtype = checkpoint.config, runtime.dtype
    number_bytes = number_bytes_of(checkpoint, dtype)
    *layouts, base = layouts_of(checkpoint, dtype, device)
    apart_bytes = 0
    if apart:
        base, own = set_apart(base, checkpoint.embedding.name)
        apart_bytes = own.nbytes
    layers = [layout.nbytes for layout in layouts]
    run = DraftedRun(
        target=checkpoint, dtype=dtype, device=device, capacities=capacities, shape=shape
    )
    draft = draft_memory(drafting, run)
    stored = [each for layout in layouts for each in layout.stored]
    wires = any(each.of_expert for each in stored)
    images = experts_of(checkpoint, dtype, device)
    experts = max(layers) // EXPERT_SHARE if checkpoint.has_experts else 0
    staging, units_bytes = staging_bytes([*layouts, base], device, runtime.readers), 0
    units = None if isinstance(images, str) or not _streams_experts(runtime) else images
    if not isinstance(images, str):
        rows_bytes = _expert_rows_bytes(checkpoint, images.per_token, number_bytes, shape)
        if device.host_computes:  # gate and up of those that are multiplied at once
            operands = (each.operand_bytes for each in stored if each.of_expert)
            rows_bytes += 2 * AT_ONCE_EXPERTS * max(operands, default=0)
        if device.host_computes or wires or shape.tile:  # the same function in whole layers
            experts = rows_bytes
        if units is not None:
            # A thread of its own reads what is offered (`device/idle.py`).
            offers = runtime.look_ahead is not LookAhead.OFF
            there = staging_bytes([*layouts, base], device, runtime.readers + offers)
            units_bytes = rows_bytes - experts + there - staging
    shares = head_is_stored(checkpoint) or not all(each.of_expert for each in stored)
    chosen = (wires or units is not None) and not shares
    in_pieces = chosen and _in_pieces(checkpoint, runtime, device, drafting)
    pieces = pieced_bytes(config, number_bytes, device) if in_pieces else 0
    scratch = decoding_bytes(checkpoint, dtype, device)
    slack = _slack_bytes(draft.copied_bytes, device) + _rounding_bytes(len(layers), device)
    kept_probs = 4 * config.vocab_size * draft.drawn_nodes
    pending = drafting.config.pending_rows
    kv_rows = sum(capacity + pending for capacity in capacities)
    kv_layers = tuple(nbytes * kv_rows for nbytes in kv_row_bytes(config, number_bytes))
    states = state_bytes(config, number_bytes, rows=device.state_rows, pending=1 + pending)
    return Demand(
        layer_bytes=tuple(layers),
        base_bytes=base.nbytes,
        host_base_bytes=apart_bytes if device.own_memory else 0,
        file_base_bytes=0 if device.own_memory else apart_bytes,
        kv_bytes=sum(kv_layers),
        kv_layer_bytes=kv_layers if any(states) else (),
        state_bytes=tuple(len(capacities) * nbytes for nbytes in states) if any(states) else (),
        workspace_bytes=max(
            workspace_bytes(config, number_bytes, shape, device) + kept_probs,
            draft.pass_bytes + kept_probs,
            draft.loading_bytes - base.nbytes,
            draft.head_bytes,  # there twice while it is copied
        )
        + staging
        + slack
        + scratch
        + device.context_bytes
        + experts
        + units_bytes
        + pieces,
        context_bytes=device.context_bytes,
        slack_bytes=slack,
        pieced_bytes=pieces,
        wires_experts=wires,
        drafter_bytes=draft.kept_bytes,
        recorded_bytes=draft.recorded_bytes,
        packed_head_bytes=_packed_head_bytes(checkpoint, runtime, device),
        beside_bytes=draft.beside_bytes,
        copy_bytes=draft.streamed_bytes,
        copies_all=draft.copies_all,
        experts=None if units is None or draft.streamed_bytes else _experts(units, device),
        units_bytes=units_bytes,
        whole_because=images if isinstance(images, str) else "",
        # What devices of one memory compute in, they compute in by turns.
        further_bytes=scratch
        + staging_bytes(layouts, device, runtime.readers)
        + (
            workspace_bytes(config, number_bytes, replace(shape, logit_rows=0), device)
            + draft.building_bytes
            + device.context_bytes
            + _rounding_bytes(len(layers), device)
            + experts
            if device.own_memory or runtime.machines
            else 0
        ),
    )


def may_be_apart(checkpoint: Checkpoint, runtime: RuntimeConfig, device: DeviceKind) -> bool:
    """Whether passes may read their rows of the embedding where it is: the head is another matrix.

    That is host memory, or, for a device that computes there, the file that layers are read of.
    """
    embedding = checkpoint.embedding
    made = {f"{each.module}.weight" for each in checkpoint.stored_ends.values()}
    dequantised = embedding.name in made or embedding.name in checkpoint.stored_ends
    if checkpoint.head is None or dequantised or runtime.machines:
        return False
    # What is recorded cannot read a file.
    reads = runtime.home in (HomeKind.AUTO, HomeKind.DISK) and not device.records
    from_file = device.home is HomeKind.DISK and reads and not embedding.coded
    return device.own_memory or from_file


def _packed_head_bytes(checkpoint: Checkpoint, runtime: RuntimeConfig, device: DeviceKind) -> int:
    """A reordered copy of the output head, if one is made."""
    if not packs(checkpoint, runtime.dtype, device) or head_is_stored(checkpoint):
        return 0
    dtype = compute_dtype(checkpoint, runtime.dtype)
    outputs, inputs = (checkpoint.head or checkpoint.embedding).shape
    if stays_as_it_lies((outputs, inputs), runtime.exact, dtype, device):
        return 0
    return packed_head_bytes(checkpoint, number_bytes_of(checkpoint, runtime.dtype))


def _in_pieces(
    checkpoint: Checkpoint, runtime: RuntimeConfig, device: DeviceKind, drafting: Drafting
) -> bool:
    """Whether passes of few rows are recorded in pieces (`runner/pieces.py`), on one device.

    If the host chooses the experts, and no linear beside them dequantises into shared memory.
    """
    config = checkpoint.config
    fits = device.records and checkpoint.has_experts and not keeps_states(config)
    watched = drafting.config.nodes > 0 and kind_of(drafting.config.kind).watches
    apart = len(runtime.device_names) > 1 or bool(runtime.machines)
    return fits and not watched and not apart and runtime.exact is not Exact.ON


def _streams_experts(runtime: RuntimeConfig) -> bool:
    """Whether experts are streamed one by one where the model's can be: on one device."""
    return runtime.expert_slots != 0 and len(runtime.device_names) == 1


def _experts(images: ExpertImages, device: DeviceKind) -> ExpertDemand:
    unit = max(1, device.buffer_bytes)  # an allocator gives whole ones
    return ExpertDemand(
        rest_bytes=tuple(layout.nbytes for layout in images.rest),
        slot_bytes=-(-images.slot_bytes // unit) * unit,
        counts=tuple(len(images.units.get(layer, ())) for layer in range(len(images.rest))),
        per_token=images.per_token,
        image_bytes=images.image_bytes,
        file_bytes=images.file_bytes,
    )


def _expert_rows_bytes(
    checkpoint: Checkpoint, per_token: int, number_bytes: int, shape: PassShape
) -> int:
    """What a layer's experts compute in (`model/experts.py`).

    Each row has a place for each of its experts, and these are weighted and summed in fp32. The
    rows that are multiplied at once, all of a chunk or `AT_ONCE_ROWS` at most: themselves, two
    halves and both together, the product of the halves in fp32 and rounded, and what it becomes.
    """
    config, rows = checkpoint.config, min(shape.chunk_rows, shape.rows)
    places = per_token * config.hidden_size * (2 * number_bytes + 4)
    inner = config.intermediate_size * (6 * number_bytes + 4)
    at_once = max(rows, min(AT_ONCE_ROWS, per_token * rows))
    return rows * places + at_once * (inner + 2 * config.hidden_size * number_bytes)


def _slack_bytes(copied_bytes: int, device: DeviceKind) -> int:
    """What many small copies of weights cost the process's allocator besides their sizes.

    With Qwen2.5-0.5B in int8 (168 matrices) the process had 40 MB more while it drafted, which it
    could give back.
    """
    return 0 if device.own_memory else min(MOST_SLACK_BYTES, copied_bytes // SLACK_PART)


def _rounding_bytes(layers: int, device: DeviceKind) -> int:
    """What an allocator takes beyond what is asked of it, at most: less than a unit per buffer."""
    return (layers + OTHER_BUFFERS) * (device.buffer_bytes - 1)
