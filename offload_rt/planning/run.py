"""What lives where for one run, from headers, limits and what is free. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offload_rt.config import HomeKind, RuntimeConfig
from offload_rt.errors import ConfigError, PlanError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.layout import Packing, compute_dtype, plan_layout
from offload_rt.planning.demand import PassShape, demand_of
from offload_rt.planning.placement import Placement, place
from offload_rt.units import format_size

FREE_SHARE = 0.85  # of free memory, when no limit is given: the rest is left to others


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """What is free now; it bounds a run that was given no limit."""

    device_bytes: int
    host_bytes: int


def place_run(
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    packing: Packing,
    *,
    capacities: Sequence[int],
    prompt_tokens: int,
    free: FreeMemory,
) -> Placement:
    """Decide what lives where for a run of this shape.

    Args:
        checkpoint: headers of the model.
        config: limits and choices of the user.
        packing: how layer images are laid out on the device.
        capacities: KV rows to set aside, one number per sequence that runs at once.
        prompt_tokens: tokens of the largest prompt pass, all sequences together.
        free: memory that is free now.

    Raises:
        ConfigError: an option does not go with the home of the streamed layers.
        PlanError: it does not fit the device limit, or its home the host limit.
    """
    shape = PassShape(
        rows=max(prompt_tokens, len(capacities)),
        chunk_rows=config.prefill_chunk_tokens,
        logit_rows=len(capacities),
        longest=max(capacities),
    )
    demand = demand_of(
        checkpoint, dtype=config.dtype, packing=packing, capacities=capacities, shape=shape
    )
    limit = config.device_limit_bytes or int(free.device_bytes * FREE_SHARE)
    placement = place(demand, limit, slots=config.slots, resident_layers=config.resident_layers)
    host_limit = config.host_limit_bytes or int(free.host_bytes * FREE_SHARE)
    home = choose_home(config.home, packing, placement, host_limit)
    on_gpu = packing is Packing.DEVICE  # there the limit may be why the home is the disk
    unused = config.home is HomeKind.DISK or (home is HomeKind.DISK and not on_gpu)
    if unused and config.host_limit_bytes is not None:
        raise ConfigError("--host-memory limits streamed layers in host memory: add --home host")
    return replace(placement, home=home)


def bytes_per_pass(
    checkpoint: Checkpoint, config: RuntimeConfig, packing: Packing, placement: Placement
) -> int:
    """Bytes of the streamed layers, which cross the link in each pass."""
    if placement.home is HomeKind.HOST:
        return sum(placement.demand.layer_bytes[i] for i in placement.streamed)
    name = compute_dtype(checkpoint.config.dtype, checkpoint.tensors.values(), config.dtype)
    layers = [checkpoint.layers[i] for i in placement.streamed]
    return sum(plan_layout(layer, "", name, packing).file_bytes for layer in layers)


def choose_home(
    home: HomeKind, packing: Packing, placement: Placement, host_limit: int
) -> HomeKind:
    """Where streamed layers live when the user leaves it open.

    On a GPU in host memory if they fit there, else in the files; on a CPU in the files, since
    memory that could hold them had better be the device's.

    Raises:
        PlanError: host memory was asked for and they do not fit.
    """
    host_bytes = sum(placement.demand.layer_bytes[i] for i in placement.streamed)
    fits = host_bytes <= host_limit
    if home is HomeKind.AUTO:
        return HomeKind.HOST if packing is Packing.DEVICE and fits else HomeKind.DISK
    if home is HomeKind.HOST and not fits:
        raise PlanError(
            f"the streamed layers need {format_size(host_bytes)} of host memory, the limit is "
            f"{format_size(host_limit)}: raise --host-memory or use --home disk"
        )
    return home
