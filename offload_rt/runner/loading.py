"""Bring a network's weights to the device: resident layers for good, others through a ring.

A resident layer is kept as it is in its file, or as a copy that is reordered or rounded. Copies are
made one layer after the other from one passing image, so that no more than that is held twice.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from offload_rt.attention.blocks import SCORE_BYTES
from offload_rt.config import DraftWeights, HomeKind, LookAhead
from offload_rt.costs.sizes import ahead_bytes, draft_base_bytes, head_bytes, packed_head_bytes
from offload_rt.device.base import Device, DeviceBuffer, HomeSource
from offload_rt.device.host_memory import allocate_host
from offload_rt.device.several import Stripes
from offload_rt.device.system import give_back_holes, give_back_large_blocks
from offload_rt.errors import ConfigError
from offload_rt.kv.sizes import spread_layers
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.experts import ExpertLender
from offload_rt.model.formats.base import layer_bytes
from offload_rt.model.formats.brought import ready
from offload_rt.model.formats.checked import check_numbers
from offload_rt.model.formats.left_plain import note_left_plain
from offload_rt.model.formats.packed import can_pack, worth_packing
from offload_rt.model.formats.stored import Stored, scratch_bytes
from offload_rt.model.formats.wired import dequantise
from offload_rt.model.layout import LayerLayout, set_apart
from offload_rt.model.network import NOBODY, Base, MatricesOf, Network
from offload_rt.model.weight_files import FileSource, WeightFiles
from offload_rt.runner.experts import Pool, homes_of, lenders_of, open_pool
from offload_rt.runner.runner import Across, LayerRing, LayerRings, Runner
from offload_rt.streaming.ahead import ReadAhead
from offload_rt.streaming.direct_io import BUFFERED
from offload_rt.streaming.experts import MissRates
from offload_rt.streaming.memory_home import MemoryHome
from offload_rt.streaming.ring import Cycle, Ring
from offload_rt.units import format_size

BASE, RESIDENT, SLOTS = "embedding and head", "resident layers", "slots"  # in the device's ledger
EXPERTS = "experts"
DRAFT, COPY = "draft model", "rounded copy"
SCRATCH = "dequantised weight"
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Streaming:
    """Which layers of a network are copied in each pass.

    Attributes:
        layers: their indices, rising.
        slots: buffers of the ring of each device, at most.
        home: where they are copied from.
        spare_bytes: memory of each device that is free until all weights are there.
        packs_head: there is memory for a reordered copy of the output head.
        expert_slots: buffers of the experts' pool; 0 where experts are in their layers.
        in_files: of a home that is split, the layers that stay in their files.
        expert_share: of a home that is split, so much of each layer's experts is in host memory.
        look_ahead: whether experts are copied before their layer asks.
        misses: what experts cost that no slot holds, if the host may compute them; else None.
        readers: reads in flight.
        reads_files: whether passes read from the model's files.
    """

    layers: Sequence[int]
    slots: int
    home: HomeKind
    spare_bytes: Sequence[int]
    packs_head: bool = False
    expert_slots: int = 0
    in_files: Sequence[int] = ()
    expert_share: float = 1.0
    look_ahead: LookAhead = LookAhead.OFF
    misses: MissRates | None = None
    readers: int = 4
    reads_files: bool = False


def load_base(
    network: Network,
    device: Device,
    files: WeightFiles,
    purpose: str,
    apart: TensorExtent | None = None,
) -> Base:
    """Enqueue reading what is in no layer; quantised ends are dequantised now.

    Args:
        network: whose it is.
        device: where it goes.
        files: where it is read from.
        purpose: in the ledger of device memory.
        apart: of the embedding, of which each pass reads its rows: of host memory, where kernels
            do, or of the file where the device has no memory of its own.

    Raises:
        CheckpointError: a scale of these is no number.
    """
    check_numbers(network.base.made, files)
    rest, images = network.base, list[tuple[LayerLayout, DeviceBuffer]]()
    rows = None
    if apart is not None:
        without, own = set_apart(network.base, apart.name)
        if not device.kind.own_memory:
            rest, rows = without, partial(files.rows, apart)
        elif (there := _in_host(device, own, files)) is not None:
            rest = without
            images.append((own, there))
    image = device.allocate(rest.nbytes, purpose)
    device.load.copy(image, FileSource(rest, files))
    make_weights(rest, files, image.tensor)
    return Base([*images, (rest, image)], rows)


def _in_host(device: Device, layout: LayerLayout, files: WeightFiles) -> DeviceBuffer | None:
    """Read an image into host memory; None where kernels cannot read it there."""
    image = allocate_host(layout.nbytes)
    device.load.copy(image, FileSource(layout, files))
    device.load.record().synchronize()
    device.pin(image)
    if (found := device.mapped(image)) is None:
        _log.warning(
            "%s of the embedding are on %s, not in host memory as planned: kernels cannot read "
            "them there; raise `ulimit -l` or the memory limit of the container or of WSL",
            format_size(layout.nbytes),
            device.name,
        )
    return found


def make_weights(layout: LayerLayout, files: WeightFiles, image: torch.Tensor) -> None:
    """Dequantise the weights that an image has room for."""
    places = {placement.name: placement for placement in layout.placements}
    for each in layout.made:
        place = places[f"{each.module}.weight"]
        data = image[place.offset : place.offset + place.nbytes]
        out = data.view(getattr(torch, place.dtype)).view(place.shape)
        parts = {w: files.read(extent, each).to(image.device) for w, extent in each.parts.items()}
        dequantise(each, parts, out)


def load_target(  # noqa: PLR0913 - what a runner is made of
    checkpoint: Checkpoint,
    network: Network,
    stripes: Stripes,
    files: WeightFiles,
    base: Base | None,
    streaming: Streaming,
    chunk_tokens: int,
    undo: ExitStack,
    across: Across | None = None,
) -> Runner:
    """Load a network of which layers may be streamed, without changing what it computes.

    Args:
        checkpoint: headers of the model.
        network: its modules.
        stripes: where its layers are.
        files: where weights are read from; streamed layers too, if that is their home.
        base: from `load_base`; None where another machine has it.
        streaming: which layers are streamed.
        chunk_tokens: prompt rows that go through a layer at once.
        undo: ends what reads layers ahead.
        across: other machines that have the layers that no device here has.
    """
    layouts = network.layouts
    if checkpoint.config.writes_out_scores and not stripes.devices[0].kind.own_memory:
        # Kept among others they leave holes: a pass that needs 125 MB took 155 to 269.
        give_back_large_blocks(SCORE_BYTES // 2)
    in_order = _prepare_stored(checkpoint, network, stripes.shares(range(len(layouts))), files)
    resident = [i for i in range(len(layouts)) if i not in streaming.layers]
    for (device, mine), spare in zip(stripes.shares(resident), streaming.spare_bytes, strict=True):
        nbytes = max((layouts[i].nbytes for i in mine), default=0)
        packs = _packs(network, device) and nbytes <= spare
        _keep(network, device, files, mine, RESIDENT, packs=packs, exact=True)
    _note_buffered(streaming, files)
    streamed_bytes, rings, ring_of = 0, list[LayerRing](), dict[int, LayerRing]()
    slot_bytes = max((layouts[i].nbytes for i in streaming.layers), default=0)
    for device, mine in stripes.shares(streaming.layers):
        sources: Mapping[int, HomeSource] = {i: FileSource(layouts[i], files) for i in mine}
        if streaming.home.in_memory:
            sources = _homes(device, sources, layouts, streaming, undo)
        if sources:
            count = min(streaming.slots, len(mine))
            slots = [device.allocate(slot_bytes, SLOTS) for _ in range(count)]
            rings.append(Ring(Cycle(sources), slots, device.copy, device.compute, strict=True))
            rings[-1].restart()
            ring_of |= dict.fromkeys(mine, rings[-1])
            streamed_bytes += sum(source.nbytes for source in sources.values())
    first = stripes.devices[0]
    pool, lenders = None, NOBODY
    if streaming.expert_slots:
        pool, lenders = _open_experts(network, first, files, streaming, in_order)
    for device in stripes.devices:
        device.load.record().synchronize()
    crossing = across or (stripes if len(stripes.devices) > 1 else None)
    network.attach(LayerRings(ring_of), base, first.torch_device, chunk_tokens, crossing, lenders)
    _lend_hosts(network, stripes.shares(range(len(layouts))))
    _foresee(network, checkpoint, pool, streaming.look_ahead)
    if streaming.packs_head and can_pack(network.dtype, first.torch_device):
        with torch.inference_mode():
            packed = network.pack_head()
        if packed:
            first.enter(packed_head_bytes(checkpoint, network.dtype.itemsize), BASE)
    return Runner(
        checkpoint,
        network,
        first,
        rings=rings,
        streamed_bytes=streamed_bytes,
        experts=pool,
        across=across,
    )


def load_drafting(  # noqa: PLR0913 - what a runner is made of, most of it by keyword
    checkpoint: Checkpoint,
    device: Device,
    *,
    chunk_tokens: int,
    target_ids: int,
    weights: DraftWeights = DraftWeights.SAME,
    dtype: str = "auto",
    target_base: Base | None = None,
    stripes: Stripes | None = None,
    layers: Sequence[int] | None = None,
    shares_head: bool = False,
    network: Network | None = None,
) -> Runner:
    """Load a network that drafts: none of it is streamed.

    Args:
        checkpoint: headers of the draft model.
        device: where it runs.
        chunk_tokens: prompt rows that go through a layer at once.
        target_ids: width of the target's logits; ids from there on are never drafted.
        weights: how its matrices are kept, `auto` settled.
        dtype: number format it computes in.
        target_base: of the target, if this is a rounded copy of it: what is in no layer is shared,
            but for the output head.
        stripes: where its layers are; None: all on `device`.
        layers: of a rounded copy, those that are copied; it will `Network.borrow` the others. None:
            all.
        shares_head: of a rounded copy, that the output head is the target's, too.
        network: of the checkpoint, if it is there already.
    """
    network = network or Network(checkpoint, dtype, device.kind.packing)
    purpose = DRAFT if target_base is None else COPY
    rounds = weights is not DraftWeights.SAME
    packs = not rounds and _packs(network, device)
    files = WeightFiles(checkpoint.files)
    try:
        mine = range(len(network.layouts)) if layers is None else layers
        shares = [(device, mine)] if stripes is None else [*stripes.shares(mine)]
        _prepare_stored(checkpoint, network, shares, files)
        base = target_base or load_base(network, device, files, purpose)
        for one, copied in shares:
            _keep(network, one, files, copied, purpose, packs=packs, weights=weights)
            one.load.record().synchronize()
    finally:
        files.close()
    network.attach(None, base, device.torch_device, chunk_tokens, stripes)
    _lend_hosts(network, shares)
    if rounds and not shares_head:
        with torch.inference_mode():
            if target_base is None:  # in the ledger is what stays
                network.round_ends(weights)
                kept_bytes = draft_base_bytes(checkpoint, weights, device.kind)
                device.enter(kept_bytes - network.base.nbytes, purpose)
            else:
                network.round_head(weights)
                device.enter(head_bytes(checkpoint, weights, dtype), purpose)
        del base
        give_back_holes()
    elif packs and layers is None and target_base is None:
        with torch.inference_mode():
            network.pack_ends()  # they take as much as before
        del base
        give_back_holes()
    return Runner(checkpoint, network, device, target_ids=target_ids)


def _lend_hosts(network: Network, shares: Iterable[tuple[Device, Sequence[int]]]) -> None:
    """Let experts on devices with memory of their own ask the host by way of the device."""
    for device, layers in shares:
        if not device.kind.host_computes:
            network.lend_host(device, layers)


def _prepare_stored(
    checkpoint: Checkpoint,
    network: Network,
    shares: Iterable[tuple[Device, Sequence[int]]],
    files: WeightFiles,
) -> frozenset[Stored]:
    """Check what describes quantised weights, and give layers memory to dequantise into.

    Returns:
        those of which inputs of a group follow each other.

    Raises:
        CheckpointError: a scale is no number, or an input is in a group that is not there.
    """
    stored = dict.fromkeys(checkpoint.stored.values())
    in_order = check_numbers(stored, files)
    for device, layers in shares if stored else ():
        network.dequantising = ready(
            stored, network.dtype, device.torch_device, exact=network.exact, in_order=in_order
        )
        nbytes = scratch_bytes(stored, network.dtype.itemsize, device.kind.processor)
        network.lend_scratch(layers, device.allocate(nbytes, SCRATCH), in_order)
    return frozenset(in_order)


def _at_home(network: Network, in_order: frozenset[Stored]) -> MatricesOf:
    """Matrices of experts that the host computes; what dequantises them is ready."""
    stored = [s for own in network.units.values() for unit in own for s in unit.stored]
    ready(stored, network.dtype, torch.device("cpu"), exact=False, in_order=in_order)
    return network.compute_at_home(in_order)


def _packs(network: Network, device: Device) -> bool:
    """Whether reordered copies may be kept; of quantised weights they would be larger."""
    return not network.dequantises and can_pack(network.dtype, device.torch_device)


def _keep(  # noqa: PLR0913 - the same, and how
    network: Network,
    device: Device,
    files: WeightFiles,
    layers: Sequence[int],
    purpose: str,
    *,
    packs: bool,
    weights: DraftWeights = DraftWeights.SAME,
    exact: bool = False,
) -> None:
    """Let a network have layers for good; those that stay as they are may still be on their way.

    Args:
        network: theirs.
        device: where they stay.
        files: where they are read from.
        layers: their indices.
        purpose: in the ledger of device memory.
        packs: keep reordered copies.
        weights: how matrices are kept.
        exact: pack only what computes the same numbers then; else it drafts.
    """
    layouts = network.layouts
    kinds = {network.linear_shapes(index): index for index in reversed(layers)}
    whole = frozenset[tuple[int, int]]().union(*kinds) if packs else frozenset()
    shapes = worth_packing(whole, exact=network.exact)
    copies = bool(layers) and (bool(shapes) or weights is not DraftWeights.SAME)
    if copies:
        passing = device.allocate(max(layouts[i].nbytes for i in layers), purpose)
        there = -1

        def bring(index: int) -> DeviceBuffer:
            nonlocal there
            if index != there:
                device.load.copy(passing, FileSource(layouts[index], files))
                device.load.record().synchronize()
            there = index
            return passing

        if exact:  # of each kind of layer the first
            for index in sorted(kinds.values(), reverse=True):
                shapes -= network.unlike_when_packed(index, bring(index))
            if not network.exact:  # else some stay plain that have kernels as they are
                note_left_plain(whole - shapes, shapes)
        copies = bool(shapes) or weights is not DraftWeights.SAME
        for index in layers if copies else ():
            bring(index)
            with torch.inference_mode():
                network.keep(index, passing, pack=shapes, weights=weights, drafts=not exact)
            device.load.wait(device.compute.record())  # until it has been read
            device.enter(layer_bytes(layouts[index], weights), purpose)
            give_back_holes()
        device.enter(-passing.nbytes, purpose)  # it goes now
        del passing
    if not copies:
        for index in layers:
            image = device.allocate(layouts[index].nbytes, purpose)
            device.load.copy(image, FileSource(layouts[index], files))
            network.keep(index, image)


def _note_buffered(streaming: Streaming, files: WeightFiles) -> None:
    """Say that passes read through the page cache, if they do."""
    if streaming.reads_files and not files.direct:
        _log.warning(BUFFERED, "experts" if streaming.expert_slots else "streamed layers")


def _sources(
    network: Network, device: Device, files: WeightFiles, streaming: Streaming
) -> Mapping[int, Sequence[HomeSource]]:
    """Where experts come from; those whose home is host memory are read now."""
    units = network.units
    sources: dict[int, Sequence[HomeSource]] = {
        layer: [FileSource(unit, files) for unit in own] for layer, own in units.items()
    }
    if streaming.home.in_memory:
        for layer, own in units.items():
            by_expert = dict(enumerate(sources[layer]))
            held = spread_layers(int(streaming.expert_share * len(own)), len(own))
            there = {i: source for i, source in by_expert.items() if i in held}
            sources[layer] = [*(by_expert | _in_memory(device, there, own)).values()]
    return sources


def _open_experts(
    network: Network,
    device: Device,
    files: WeightFiles,
    streaming: Streaming,
    in_order: frozenset[Stored],
) -> tuple[Pool, Mapping[int, ExpertLender]]:
    """Set slots for experts aside, and have who computes some of them ready."""
    units, sources = network.units, _sources(network, device, files, streaming)
    slot_bytes = max(unit.nbytes for own in units.values() for unit in own)
    slots = [device.allocate(slot_bytes, EXPERTS) for _ in range(streaming.expert_slots)]
    keeps_free = streaming.look_ahead is LookAhead.ON
    pool = open_pool(device, units, slots, network.per_token, sources, keeps_free=keeps_free)
    homes = None
    if streaming.misses is not None:
        pool.rates, homes = streaming.misses, homes_of(sources, _at_home(network, in_order))
    return pool, lenders_of(pool, units, network.matrices_of, homes)


def _foresee(network: Network, checkpoint: Checkpoint, pool: Pool | None, mode: LookAhead) -> None:
    """Let layers of experts ask the next one's router, where there are slots for what it says.

    Raises:
        ConfigError: they are to, and none can.
    """
    if pool is None:
        return
    found = 0 if mode is LookAhead.OFF else network.foresee()
    pool.may_foresee = found > 0 and pool.leaves_free
    if mode is LookAhead.ON and not found:
        raise ConfigError(
            f"--look-ahead on: no router of {checkpoint.config.model_type} models can be asked "
            "before its layer: leave it out"
        )


def _homes(
    device: Device,
    files: Mapping[int, HomeSource],
    layouts: Sequence[LayerLayout],
    streaming: Streaming,
    undo: ExitStack,
) -> Mapping[int, HomeSource]:
    """Layers in host memory, and those that stay in their files, which are read ahead."""
    staying = {i: source for i, source in files.items() if i in streaming.in_files}
    held = {i: source for i, source in files.items() if i not in staying}
    homes: dict[int, HomeSource] = dict(_in_memory(device, held, layouts))
    if staying:
        largest = max(layouts[i].nbytes for i in staying)
        memory = allocate_host(ahead_bytes(largest, streaming.readers))
        device.pin(memory)
        ahead = ReadAhead(staying, memory, streaming.readers)
        undo.callback(ahead.close)
        homes |= {i: ahead.source(i) for i in staying}
    return {i: homes[i] for i in files}


def _in_memory(
    device: Device, files: Mapping[int, HomeSource], layouts: Sequence[LayerLayout]
) -> dict[int, HomeSource]:
    """Read layers into host memory; each is pinned while later ones are still being read."""
    images = [allocate_host(layouts[i].nbytes) for i in files]
    filled = []
    for image, source in zip(images, files.values(), strict=True):
        device.load.copy(image, source)
        filled.append(device.load.record())
    for image, event in zip(images, filled, strict=True):
        event.synchronize()
        device.pin(image)
    return dict(zip(files, map(MemoryHome, images), strict=True))
