"""What a model's pass would take on a machine one need not own: its headers and a profile.

The placement is that of a run (`run.py`), for a device with the profile's memory; from it and the
tensors' sizes follow the layers' work and the bytes that cross links. No torch here.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod

from offload_rt.config import HomeKind, KVPlace, RuntimeConfig
from offload_rt.costs.machine import Seat
from offload_rt.costs.pass_cost import (
    LayerLoad,
    LinkRates,
    PassCost,
    PassLoad,
    cost_of,
    pass_times,
)
from offload_rt.costs.sizes import kv_bytes_per_token, layouts_of, number_bytes_of
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.layout import LayerLayout
from offload_rt.planning.placement import Placement
from offload_rt.profiling.profile import LayerWork

_EXPERT_MATRICES = 3  # gate, up and down


def pass_load(
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    seat: Seat,
    placement: Placement,
    *,
    context_tokens: int,
    tokens: int,
) -> PassLoad:
    """What a pass over a placed model has to do.

    Args:
        checkpoint: headers of the model.
        config: number format.
        seat: where it runs.
        placement: what lives where.
        context_tokens: already in the KV cache.
        tokens: in the pass.
    """
    *layouts, _ = layouts_of(checkpoint, config.dtype, seat.device)
    from_files, streamed = placement.home is HomeKind.DISK, set(placement.streamed)
    layers = [
        LayerLoad(
            work=work,
            home_bytes=layouts[index].file_bytes if from_files else layouts[index].nbytes,
            weights=seat.speeds.order(resident=index not in streamed),
        )
        for index, work in enumerate(layer_works(checkpoint, layouts))
    ]
    number_bytes = number_bytes_of(checkpoint, config.dtype)
    head = checkpoint.head or checkpoint.embedding
    load = PassLoad(
        layers=layers,
        streamed=placement.streamed,
        slots=placement.slots,
        tokens=tokens,
        head=LayerWork(
            weight_bytes=prod(head.shape) * number_bytes, flops_per_token=2 * prod(head.shape)
        ),
    )
    return _with_kv(load, checkpoint, placement, context_tokens, number_bytes)


def layer_works(checkpoint: Checkpoint, layouts: Sequence[LayerLayout]) -> list[LayerWork]:
    """What each layer costs to compute.

    Args:
        checkpoint: headers of the model.
        layouts: the image of each layer.
    """
    return [
        LayerWork(weight_bytes=layout.nbytes, flops_per_token=_flops(checkpoint, layer))
        for layout, layer in zip(layouts, checkpoint.layers, strict=True)
    ]


def _with_kv(
    load: PassLoad,
    checkpoint: Checkpoint,
    placement: Placement,
    context_tokens: int,
    number_bytes: int,
) -> PassLoad:
    """Add keys and values, on the device or in blocks from their home."""
    model, plan = checkpoint.config, placement.demand.kv
    row_bytes = kv_bytes_per_token(model, number_bytes) // model.num_layers
    seen = [_seen_tokens(checkpoint, i, context_tokens) for i in range(model.num_layers)]
    if plan is None or plan.attend_on_host:
        layers = [
            replace(layer, kv_bytes=tokens * row_bytes)
            for layer, tokens in zip(load.layers, seen, strict=True)
        ]
        return replace(load, layers=layers)
    sizes = plan.sizes[0]
    at_home = sizes.home_rows(context_tokens)
    layers = []
    for index, (layer, tokens) in enumerate(zip(load.layers, seen, strict=True)):
        home = min(tokens, at_home) if index in sizes.offloaded else 0
        layers.append(
            replace(
                layer,
                kv_bytes=(tokens - home) * row_bytes,
                kv_home_bytes=home * row_bytes,
                kv_back_bytes=row_bytes if index in sizes.offloaded else 0,
            )
        )
    return replace(load, layers=layers, kv_slots=sizes.slots, kv_block_bytes=sizes.slot_bytes)


def _seen_tokens(checkpoint: Checkpoint, layer: int, context_tokens: int) -> int:
    """Tokens of the context a layer attends to: its window's, where the file says it has one."""
    config = checkpoint.config
    kinds = config.raw.get("layer_types")
    slides = isinstance(kinds, list) and "sliding" in str(kinds[layer])
    if config.sliding_window is None or not slides:
        return context_tokens
    return min(context_tokens, config.sliding_window)


def _flops(checkpoint: Checkpoint, layer: Sequence[TensorExtent]) -> int:
    """Two for each weight of a matrix that a token meets; of experts those it is sent to."""
    sent = checkpoint.config.raw.get("num_experts_per_tok")
    separate = sum(".experts." in e.name and len(e.shape) == 2 for e in layer) // _EXPERT_MATRICES
    total = 0.0
    for extent in layer:
        share = 1.0
        if ".experts." in extent.name and isinstance(sent, int):
            experts = extent.shape[0] if len(extent.shape) > 2 else separate
            share = min(1.0, sent / max(1, experts))
        total += share * prod(extent.shape) * (len(extent.shape) > 1)
    return round(2 * total)


def price(
    seat: Seat, config: RuntimeConfig, placement: Placement
) -> Callable[[PassLoad], PassCost]:
    """Return what tells the cost of a pass there, its homes being those of the placement."""

    def cost(load: PassLoad) -> PassCost:
        rates = _rates(seat, config, placement, load)
        return cost_of(load, pass_times(seat.profile, load, seat.processor, rates))

    return cost


def _rates(seat: Seat, config: RuntimeConfig, placement: Placement, load: PassLoad) -> LinkRates:
    speeds, kv = seat.speeds, placement.demand.kv
    layer_bytes = placement.demand.layer_bytes
    block_bytes = max((layer_bytes[i] for i in placement.streamed), default=max(layer_bytes))
    home = speeds.home_bytes_per_s(placement.home, config, block_bytes)
    if kv is None or not load.kv_block_bytes:
        return LinkRates(home=(home,))
    where = HomeKind.DISK if kv.place is KVPlace.DISK else HomeKind.HOST
    rate = speeds.home_bytes_per_s(where, config, load.kv_block_bytes)
    return LinkRates(home=(home,), kv=rate, back=rate)
