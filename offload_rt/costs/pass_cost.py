"""What a pass costs: the real rings, run on the simulated device with a profile's times.

There is no second formula for overlap that could drift from what runs: `timeline.py` has the
rings themselves enqueue the copies, waits and kernels of a few passes, and the virtual clock
says how long one takes once the rings are full. How long each copy and each layer takes comes from
the profile.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache, partial
from math import ceil
from typing import Any

from offload_rt.config import HomeKind, RuntimeConfig
from offload_rt.costs.experts import chances_of
from offload_rt.costs.machine import Levels, Speeds
from offload_rt.costs.timeline import (
    Span,
    SteadyPass,
    TimedLayer,
    TimedPass,
    steady_pass,
    steady_spans,
)
from offload_rt.device.base import COPY_BYTES
from offload_rt.device.kinds import KINDS, Processor
from offload_rt.errors import ConfigError
from offload_rt.kernels.rows import MOST_ROWS
from offload_rt.model.formats.methods import Form
from offload_rt.model.packed_files import code_name
from offload_rt.profiling.decoding import (
    compiles,
    decoded_per_s,
    multiplies,
    rows_apart,
    times_old_experts,
    times_unlike,
)
from offload_rt.profiling.profile import (
    Decoder,
    Direction,
    HardwareProfile,
    LayerWork,
    LinkLoad,
    Number,
    Obtained,
    WeightOrder,
)
from offload_rt.profiling.rates import (
    OLD_EXPERTS,
    OLD_LAYERS,
    OTHER_LAYERS,
    PIECES_S,
    attention_s,
    disk_bytes_per_s,
    disk_delay_s,
    disk_slowdown,
    expert_s,
    head_s,
    layer_s,
    link_bytes_per_s,
    replay_s,
    scan_s,
)

_steady = lru_cache(maxsize=256)(steady_pass)  # a search prices most passes more than once

# Of this program, on a CPU, to lend a streamed layer and to begin the copy that follows it. The
# thread that computes was measured to run 5 ms longer for 25 layers, whatever the number of rows.
_LEND_S = 2e-4
# Transfer and kernels take turns if together they fill so much of a pass and each so much of it.
_APART, _PART = 0.9, 0.25
# What slows kernels lasts as long as the reads, whose share of the pass depends on the kernels.
_SETTLING = 2
_ROUNDING = 1e-9  # of a pass


class Limit(StrEnum):
    """What a pass spends its time on.

    `latency`: transfer and kernels take turns; more slots would let them overlap.
    """

    TRANSFER = "transfer"
    COMPUTE = "compute"
    DRAFTING = "drafting"
    LATENCY = "latency"


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Weights that are dequantised in each pass.

    Attributes:
        numbers: how many.
        form: how they are stored.
        bits: of one.
        decoder: who does it, where there are kernels.
        direct: kernels of a CPU multiply with them as they are stored, where there are any.
    """

    numbers: int
    form: str
    bits: int
    decoder: Decoder
    direct: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """What a layer with a recurrent state computes piece by piece (`kv/states.py`).

    Attributes:
        work: its products.
        rows: of a piece.
        state_numbers: of its state.
    """

    work: LayerWork
    rows: int
    state_numbers: int

    def pieces(self, rows: int, branches: float) -> float:
        """How many there are for the rows of a sequence.

        Half a piece stands before these on average, and half of one is padding behind them. Each
        path down a tree but the first takes one more: trees are 5 to 18 deep, pieces 16 and 64
        (docs/RESULTS.md, "Trees on models with recurrent states").
        """
        return branches + (rows - 1) / self.rows


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWork:
    """Products of a layer with plain experts.

    Attributes:
        count: of experts that some row is sent to, on average.
        nbytes: of one.
        rows: that are sent to each of them, on average.
        rest: what else the layer computes.
    """

    count: float
    nbytes: int
    rows: float
    rest: LayerWork


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoad:
    """One layer in a pass.

    Attributes:
        work: its weights and arithmetic.
        expert_work: of this, what experts are; None: nothing, or they are quantised.
        mixing: of this, what it computes piece by piece; None: nothing.
        home_bytes: what crosses the link if it is streamed.
        read_bytes: what is read from its files before that, if it stays there.
        kv_bytes: cached keys and values on the device that the pass attends to.
        kv_home_bytes: those at the home, which cross the link in blocks.
        kv_back_bytes: new ones that go home, per pass.
        device: that holds the layer.
        weights: how they lie where they compute.
        plain_part: of its products, those with weights that lie plain all the same.
        decoded: which of them are dequantised first.
        experts_decoded: which are, of experts that some token is sent to.
        unpacked: weights that readers decode on their way (`model/packed_files.py`).
        unpacked_bits: of their code.
        missed_bytes: of experts, that cross the link once the router has chosen them.
        expert_part: of its products, those of experts.
        missed_part: of its experts' kernels, those of experts that cross the link.
        choosing_s: of the host, until it knows which experts these are.
        expert_bytes: of one of them at its home.
        foreseen: share of these that is offered to the link a layer before.
        host_s: until experts are computed where they lie, from when the router has chosen, and what
            crosses the link meanwhile is there; 0: none is.
        behind_bytes: of those, which cross the link for later.
        ahead: experts cross once the router of the layer before has chosen, as rows ask for nearly
            all of a layer.
        in_turn: copied experts are computed each as it comes; else all once the last is there.
    """

    work: LayerWork
    home_bytes: int
    expert_work: ExpertWork | None = None
    mixing: Mixing | None = None
    read_bytes: int = 0
    kv_bytes: int = 0
    kv_home_bytes: int = 0
    kv_back_bytes: int = 0
    device: int = 0
    weights: WeightOrder = WeightOrder.PLAIN
    plain_part: float = 0.0
    decoded: tuple[Decoded, ...] = ()
    experts_decoded: tuple[Decoded, ...] = ()
    unpacked: int = 0
    unpacked_bits: int = 0
    missed_bytes: int = 0
    expert_part: float = 0.0
    missed_part: float = 0.0
    choosing_s: float = 0.0
    expert_bytes: int = 0
    foreseen: float = 0.0
    host_s: float = 0.0
    behind_bytes: int = 0
    ahead: bool = False
    in_turn: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PassLoad:
    """What a pass over the model has to do.

    Attributes:
        layers: in order.
        streamed: indices of those whose home is elsewhere, ascending.
        slots: device buffers they share, on each device.
        tokens: that go through the layers at once.
        tile: rows of a product are filled up to a multiple of it, but where kernels for few rows
            compute.
        dtype: number format that it computes in.
        sequences: that these belong to, as many to each; a token attends to its own alone.
        branches: paths down the tree that the tokens of each are; 1: they are a chain.
        head: final projection, for as many rows; None to leave it out.
        head_weights: how its weights lie.
        head_decoded: of them, what is dequantised.
        between_s: what the device computes before the next pass, a drafter's time for one: the
            ring is refilled meanwhile.
        between_passes: that it does so in; each uploads its tokens.
        kv_slots: device buffers that blocks of KV share, on each device.
        kv_block_bytes: of such a block.
        kv_block_s: of the host's time to enqueue what a block needs, where kernels run beside it.
        hop_bytes: of the hidden state, which goes on when the next layer is on another device; the
            first one has embedding and head.
        recorded: it is replayed (`runner/static.py`), so it is launched at once.
        pieced: it is replayed but for attention and experts (`runner/pieces.py`).
        ahead_bytes: host memory that layers in files are read ahead into.
        expert_share: of each layer's experts, so many are in host memory, the others in files.
        straight: of machines that differ, those whose layers come from their files at once.
    """

    layers: Sequence[LayerLoad]
    streamed: Sequence[int]
    slots: int
    tokens: int = 1
    tile: int = 1
    dtype: str = "bfloat16"
    sequences: int = 1
    branches: float = 1.0
    head: LayerWork | None = None
    head_weights: WeightOrder = WeightOrder.PLAIN
    head_decoded: tuple[Decoded, ...] = ()
    between_s: float = 0.0
    between_passes: int = 0
    kv_slots: int = 0
    kv_block_bytes: int = 0
    kv_block_s: float = 0.0
    hop_bytes: int = 0
    recorded: bool = False
    pieced: bool = False
    ahead_bytes: int = 0
    expert_share: float = 1.0
    straight: frozenset[int] = frozenset()

    def rows(self, weights: WeightOrder) -> int:
        """Rows that are multiplied with weights that lie so."""
        if weights is WeightOrder.PACKED and self.tokens <= MOST_ROWS:
            return self.tokens
        return -(-self.tokens // self.tile) * self.tile

    @property
    def moved_bytes(self) -> int:
        """Weights that cross links."""
        missed = sum(layer.missed_bytes + layer.behind_bytes for layer in self.layers)
        return sum(self.layers[i].home_bytes for i in self.streamed) + missed

    @property
    def devices(self) -> int:
        """Devices that hold layers."""
        return 1 + max((layer.device for layer in self.layers), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkRates:
    """Bytes a second of all that crosses links.

    Attributes:
        home: weights, by device.
        kv: blocks of KV, by device; empty if it stays there.
        back: KV that goes home, by device.
        hop_s: seconds until a hidden state is on another device; None with one device.
        readers: reads in flight, where weights come from a disk; None where they do not.
        files: layers that stay in their files, into host memory, on each machine; empty where none
            does.
    """

    home: tuple[Number, ...]
    kv: tuple[Number, ...] = ()
    back: tuple[Number, ...] = ()
    hop_s: Number | None = None
    readers: int | None = None
    files: tuple[Number, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PassTimes:
    """Seconds of the parts of a pass, and where they are from.

    Attributes:
        layer_s: each layer's kernels.
        experts_s: of these, what experts take that come one by one; empty: nothing.
        head_s: the head's, and of a recorded pass what it takes beside its layers.
        home_bytes_per_s: of the link or disk that streamed layers come over.
        numbers: all that the times rest on.
        kv_s: each layer's attention to KV from the home, or what the host takes to enqueue it, if
            that is longer; empty if there is none.
        device_bytes_per_s: of each device's own link; empty: all have `home_bytes_per_s`.
        kv_bytes_per_s: of blocks of KV, by device; empty: that of weights.
        back_bytes_per_s: of KV on its way home, likewise.
        hop_s: until a hidden state is on another device.
        home_delay_s: from when a layer's last byte has come until the copy is whole.
        slowdown: how much longer each layer, and last the head, takes while weights come; empty:
            as long.
        read_slowdown: how much longer weights take to come while layers compute.
        piece_s: that a piece of a copy takes, which an upload to a GPU may have to wait for; 0
            where nothing crosses such a link, or a disk feeds it and leaves it idle mostly.
        files_bytes_per_s: of layers that stay in their files, into host memory, on each machine.
        own_disks: each device reads its layers from a disk of its own.
    """

    layer_s: tuple[float, ...]
    head_s: float
    home_bytes_per_s: float
    numbers: tuple[Number, ...]
    kv_s: tuple[float, ...] = ()
    device_bytes_per_s: tuple[float, ...] = ()
    kv_bytes_per_s: tuple[float, ...] = ()
    back_bytes_per_s: tuple[float, ...] = ()
    hop_s: float = 0.0
    home_delay_s: float = 0.0
    slowdown: tuple[float, ...] = ()
    read_slowdown: float = 1.0
    piece_s: float = 0.0
    experts_s: tuple[float, ...] = ()
    files_bytes_per_s: tuple[float, ...] = ()
    own_disks: bool = False

    def with_others(self, others: "Sequence[PassTimes]", device: Sequence[int]) -> "PassTimes":
        """The same with layers of other machines as long as they take there.

        Args:
            others: all the same on the second machine, the third, and so on.
            device: the machine of each layer.
        """
        if not others:
            return self
        all_of_them = [self, *others]

        def theirs(of: Callable[[PassTimes], tuple[float, ...]]) -> tuple[float, ...]:
            each = [of(times) for times in all_of_them]
            places = [*device, 0][: len(each[0])]  # last may be the head, which is the first's
            return tuple(each[node][layer] for layer, node in enumerate(places))

        return replace(
            self,
            layer_s=theirs(lambda times: times.layer_s),
            kv_s=theirs(lambda times: times.kv_s),
            slowdown=theirs(lambda times: times.slowdown),
            numbers=tuple(number for times in all_of_them for number in times.numbers),
            own_disks=True,
        )

    def slowed(self, levels: Levels) -> "PassTimes":
        """The same where copies and kernels take so many times as long."""
        reading, computing = levels.reading, levels.computing

        def longer(seconds: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(computing * each for each in seconds)

        def slower(rates: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(rate / reading for rate in rates)

        return replace(
            self,
            layer_s=longer(self.layer_s),
            experts_s=longer(self.experts_s),
            kv_s=longer(self.kv_s),
            head_s=computing * self.head_s,
            home_bytes_per_s=self.home_bytes_per_s / reading,
            device_bytes_per_s=slower(self.device_bytes_per_s),
            kv_bytes_per_s=slower(self.kv_bytes_per_s),
            back_bytes_per_s=slower(self.back_bytes_per_s),
            files_bytes_per_s=slower(self.files_bytes_per_s),
            hop_s=reading * self.hop_s,
            home_delay_s=reading * self.home_delay_s,
            piece_s=reading * self.piece_s,
        )

    @property
    def obtained(self) -> Obtained:
        """How the worst of the numbers is known."""
        return max((n.obtained for n in self.numbers), key=list(Obtained).index)

    @property
    def old_profile(self) -> bool:
        """Whether a part is priced by a guess, as the profile was made before it was so."""
        return any(n.source in (OLD_EXPERTS, OLD_LAYERS) for n in self.numbers)


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCost:
    """One pass in the steady state, `between_s` included.

    Attributes:
        pass_s: from its begin to the begin of the next.
        compute_s: in which kernels run, `between_s` included.
        stall_s: in which no kernel runs: a copy or a hop is waited for.
        home_bytes: weights that cross the link.
        obtained: how the worst number behind it is known.
        old_profile: a guess is among them, as the profile was made before a part was as it is.
        transfer_s: in which the busiest link carries weights or KV to its device.
        between_s: of which the drafter takes, see `PassLoad`, and what its uploads wait.
        kv_home_bytes: KV that crosses the link.
        kv_back_bytes: KV that goes home.
    """

    pass_s: float
    compute_s: float
    stall_s: float
    home_bytes: int
    obtained: Obtained
    transfer_s: float = 0.0
    between_s: float = 0.0
    kv_home_bytes: int = 0
    kv_back_bytes: int = 0
    old_profile: bool = False

    @property
    def limit(self) -> Limit:
        """What would have to be faster: the longest part, unless the parts take turns."""
        kernels_s = self.compute_s - self.between_s
        apart_s, inside_s = self.transfer_s + kernels_s, self.pass_s - self.between_s
        if min(self.transfer_s, kernels_s) > _PART * inside_s >= _PART * _APART * apart_s:
            return Limit.LATENCY
        busy = {
            Limit.TRANSFER: self.transfer_s,
            Limit.COMPUTE: kernels_s,
            Limit.DRAFTING: self.between_s,
        }
        return max(busy, key=lambda limit: busy[limit])


def link_rates(
    profile: HardwareProfile, load: PassLoad, *, together: bool | None = None
) -> LinkRates:
    """Look up the speeds of GPUs' links, for pinned memory and copies of the sizes there are.

    Args:
        profile: of the machine.
        load: the pass.
        together: other links carry bytes at the same time; None: if layers are on several devices.

    Raises:
        ProfileError: the profile lacks a link.
    """
    several = load.devices > 1 if together is None else together
    busy = LinkLoad.TOGETHER if several else LinkLoad.ALONE
    layer_bytes = _block_bytes(load, 2**28)
    gpus = range(load.devices)
    rates = LinkRates(
        home=tuple(link_bytes_per_s(profile, layer_bytes, gpu=i, load=busy) for i in gpus),
        hop_s=_hop_s(profile, load.hop_bytes) if load.devices > 1 else None,
    )
    size = load.kv_block_bytes
    if not size:
        return rates
    there, back = (
        tuple(link_bytes_per_s(profile, size, gpu=i, direction=way, load=busy) for i in gpus)
        for way in (Direction.H2D, Direction.D2H)
    )
    return replace(rates, kv=there, back=back)


def _block_bytes(load: PassLoad, otherwise: int) -> int:
    """Size of the largest copy of weights: a layer, or one expert."""
    experts = max((layer.expert_bytes for layer in load.layers), default=0)
    return max((load.layers[i].home_bytes for i in load.streamed), default=experts or otherwise)


def _hop_s(profile: HardwareProfile, nbytes: int) -> Number:
    """Two copies, by way of host memory: consumer GPUs do not reach each other directly."""
    out = link_bytes_per_s(profile, max(1, nbytes), direction=Direction.D2H)
    back = link_bytes_per_s(profile, max(1, nbytes), gpu=1)
    worst = max(out, back, key=lambda number: list(Obtained).index(number.obtained))
    return replace(worst, value=nbytes / out.value + nbytes / back.value)


def home_rates(
    speeds: Speeds,
    config: RuntimeConfig,
    load: PassLoad,
    home: HomeKind,
    kv: HomeKind | None,
    host_bytes: int = 0,
) -> LinkRates:
    """Look up the speeds of a run's homes, for copies of the sizes there are.

    Args:
        speeds: of the machine.
        config: reads in flight, an emulated link.
        load: the pass.
        home: of the weights.
        kv: home of blocks of KV; None if the device has them all.
        host_bytes: of weights and KV in host memory.

    Raises:
        ProfileError: the profile lacks a speed.
    """
    largest = max(layer.work.weight_bytes for layer in load.layers) if load.layers else 1
    block_bytes = _block_bytes(load, largest)
    homes = speeds.home_bytes_per_s(home, config, block_bytes, host_bytes)
    if load.straight:
        disks = speeds.home_bytes_per_s(HomeKind.DISK, config, block_bytes)
        both = enumerate(zip(homes, disks, strict=True))
        homes = tuple(disk if node in load.straight else link for node, (link, disk) in both)
    rates = LinkRates(
        home=_with_decoding(homes, load, speeds.profile),
        readers=config.readers if home is HomeKind.DISK else None,
    )
    if home is HomeKind.SPLIT:
        machines = (speeds, *speeds.further)
        files = tuple(disk_bytes_per_s(node.profile, config.readers) for node in machines)
        if any(layer.read_bytes for layer in load.layers):
            rates = replace(rates, files=files)
        else:  # misses of a layer come one after the other
            share, rest = load.expert_share, (1.0 - load.expert_share) / files[0].value
            mixed = (replace(n, value=1.0 / (share / n.value + rest)) for n in rates.home)
            rates = replace(rates, home=tuple(mixed))
    if speeds.further:
        rate, latency_s = speeds.network
        others = len(speeds.further)
        # By way of the first node: once around is twice as many messages as there are others.
        messages = 2 * others / (1 + others)
        there_s = messages * (latency_s + load.hop_bytes / rate)
        rates = replace(rates, hop_s=Number(value=there_s, obtained=Obtained.ASSUMED))
    elif len(speeds.devices) > 1 and speeds.device.own_memory:
        rates = replace(rates, hop_s=_hop_s(speeds.profile, load.hop_bytes))
    if kv is None or not load.kv_block_bytes:
        return rates
    each = speeds.home_bytes_per_s(kv, config, load.kv_block_bytes, host_bytes)
    return replace(rates, kv=each, back=each)


def _with_decoding(
    rates: tuple[Number, ...], load: PassLoad, profile: HardwareProfile
) -> tuple[Number, ...]:
    """Rates of weights that readers decode: a pass takes what reading does, and the decoding.

    So it was measured, with processors to spare (docs/RESULTS.md, "bf16 from disk in 12 bits").
    """
    found = list(rates)
    for device, rate in enumerate(rates):
        layers = [load.layers[i] for i in load.streamed if load.layers[i].device == device]
        if unpacked := sum(layer.unpacked for layer in layers):
            nbytes = sum(layer.home_bytes for layer in layers)
            decoder = Decoder.COMPILED if compiles(profile) else Decoder.TORCH
            bits = layers[0].unpacked_bits  # one folder has one code
            per_s = decoded_per_s(profile, Processor.CPU, decoder, Form.CODED, bits).value
            decoding = unpacked / (per_s * nbytes)  # seconds for a byte
            value = 1 / (1 / rate.value + decoding)
            why = f"assumed: readers read and then decode {code_name(bits)} bits"
            found[device] = Number(value=value, obtained=Obtained.ASSUMED, source=why)
    return tuple(found)


def pass_times(
    profile: HardwareProfile, load: PassLoad, processor: Processor, rate: Number | LinkRates
) -> PassTimes:
    """Look up how long each part of a pass takes.

    A layer takes its weights and arithmetic (`rates.layer_s`) and its attention to cached rows.

    Args:
        profile: of the machine.
        load: the pass.
        processor: who computes it.
        rate: bytes a second of the home: `rates.link_bytes_per_s` at the size of a layer, or
            `rates.disk_bytes_per_s` with the reads in flight; with streamed KV or several devices
            those of all links.

    Raises:
        ProfileError: the profile lacks a number.
    """
    rates = rate if isinstance(rate, LinkRates) else LinkRates(home=(rate,))
    from_disk = rates.readers is not None and load.moved_bytes > 0
    numbers = [*rates.home, *rates.kv, *rates.back, *([rates.hop_s] if rates.hop_s else [])]
    numbers += rates.files
    sizes = {n for layer in load.layers for n in (layer.kv_bytes, layer.kv_home_bytes) if n}
    replayed = load.recorded or load.pieced
    exact = load.tile > 1
    host_computes, bf16 = KINDS[processor].host_computes, load.dtype == "bfloat16"
    apart_rows = rows_apart(profile) if exact and host_computes else 0
    unlike = host_computes and bf16 and times_unlike(profile, exact=exact)
    label = _assumed(exact=exact) if unlike else {}

    def timed(how: Callable[..., Number], work: LayerWork, order: WeightOrder) -> Number:
        def ask(rows: int) -> Number:
            by = {"processor": processor, "weights": order, "recorded": replayed}
            return replace(how(profile, work, rows, **by), **label.get(order, {}))

        products, rest = divmod(load.rows(order), apart_rows or sys.maxsize)
        if not products:
            return ask(rest)
        parts = [(products, ask(apart_rows)), *([(1, ask(rest))] if rest else [])]
        return replace(parts[0][1], value=sum(count * each.value for count, each in parts))

    def apart(work: ExpertWork | None) -> Number | None:
        """The seconds of experts, if they were timed by themselves."""
        if work is None or replayed:
            return None
        ask = partial(expert_s, profile, processor=processor, exact=exact, old=old)
        each = ask(work.nbytes, work.rows)
        return None if each is None else replace(each, value=work.count * each.value)

    asked = {layer.expert_work for layer in load.layers}
    old = any(asked) and not exact and bf16 and times_old_experts(profile)
    experts = {each: apart(each) for each in asked}

    products = [
        layer.expert_work.rest if layer.expert_work and experts[layer.expert_work] else layer.work
        for layer in load.layers
    ]
    lie = [(layer.weights, layer.plain_part) for layer in load.layers]
    works = [(work, *how) for work, how in zip(products, lie, strict=True)]
    layer_time = partial(timed, layer_s)
    work_s = {each: _partly_plain(layer_time, *each) for each in set(works)}
    numbers += [number for number in experts.values() if number is not None]
    asking = load.tokens // load.sequences
    kv_s = {n: attention_s(profile, n, asking, processor=processor, exact=exact) for n in sizes}
    heads = [timed(head_s, head, load.head_weights) for head in ([load.head] if load.head else [])]
    heads += [replay_s(profile, processor)] if replayed else []
    numbers += [*work_s.values(), *kv_s.values(), *heads]
    decoding = _decoding(profile, load, processor, exact=exact)
    decoded_s = partial(_decoded_s, decoding)
    numbers += [number for number, _ in decoding.values()]
    seconds = {key: number.value for key, number in work_s.items()}
    lending = dict.fromkeys(load.streamed, _LEND_S if KINDS[processor].host_computes else 0.0)
    attending = {0: 0.0} | {size: number.value for size, number in kv_s.items()}

    mixed_s: dict[tuple[Mixing | None, WeightOrder], float]
    mixed_s = {(None, order): 0.0 for order in WeightOrder}
    for mixing, order in {(layer.mixing, layer.weights) for layer in load.layers}:
        if mixing is None:
            continue
        piece = layer_s(profile, mixing.work, mixing.rows, processor=processor, weights=order)
        scan = scan_s(profile, mixing.state_numbers, processor)
        count = load.sequences * mixing.pieces(asking, load.branches)
        whole_s = timed(layer_s, mixing.work, order).value  # as the layer has it
        mixed_s[mixing, order] = max(0.0, count * (piece.value + scan.value) - whole_s)
        numbers += [piece, scan]

    def experts_s(layer: LayerLoad, whole_s: float) -> float:
        """What experts take of the seconds of a layer's products, and dequantising them."""
        known = experts[layer.expert_work]
        own_s = whole_s * layer.expert_part if known is None else known.value
        return own_s + decoded_s(layer.experts_decoded)

    products_s = [
        seconds[work] + (known.value if (known := experts[layer.expert_work]) else 0)
        for work, layer in zip(works, load.layers, strict=True)
    ]
    one_by_one = any(layer.expert_part for layer in load.layers)
    head_seconds = sum(head.value for head in heads)
    return PassTimes(
        experts_s=tuple(map(experts_s, load.layers, products_s)) if one_by_one else (),
        layer_s=tuple(
            products_s[index]
            + mixed_s[layer.mixing, layer.weights]
            + decoded_s((*layer.decoded, *layer.experts_decoded), products_s[index])
            + attending[layer.kv_bytes]
            + layer.choosing_s
            + (PIECES_S if load.pieced else 0.0)
            + lending.get(index, 0.0)
            for index, layer in enumerate(load.layers)
        ),
        head_s=head_seconds + decoded_s(load.head_decoded, head_seconds),
        home_bytes_per_s=rates.home[0].value,
        numbers=tuple(numbers),
        kv_s=tuple(
            max(attending[layer.kv_home_bytes], _enqueued_s(load, layer.kv_home_bytes))
            for layer in load.layers
        ),
        device_bytes_per_s=tuple(number.value for number in rates.home),
        kv_bytes_per_s=tuple(number.value for number in rates.kv),
        back_bytes_per_s=tuple(number.value for number in rates.back),
        hop_s=rates.hop_s.value if rates.hop_s else 0.0,
        home_delay_s=disk_delay_s(profile, rates.readers) if from_disk and rates.readers else 0.0,
        slowdown=_slowdown(profile, load) if from_disk and host_computes else (),
        read_slowdown=profile.beside_computing.factor.value
        if from_disk and host_computes and profile.beside_computing
        else 1.0,
        piece_s=_piece_s(rates, processor),
        files_bytes_per_s=tuple(number.value for number in rates.files),
    )


def _assumed(*, exact: bool) -> dict[WeightOrder, dict[str, Any]]:
    """How numbers are known of layers that were timed in other passes; rounded ones are not."""
    source = OLD_LAYERS if exact else OTHER_LAYERS
    known = {"obtained": Obtained.ASSUMED, "source": source}
    return dict.fromkeys((WeightOrder.PLAIN, WeightOrder.PACKED), known)


def _partly_plain(
    timed: Callable[[LayerWork, WeightOrder], Number],
    work: LayerWork,
    order: WeightOrder,
    plain_part: float,
) -> Number:
    """Seconds of products of which a part lies plain."""
    made = timed(work, order)
    if not plain_part:
        return made
    plain_s = timed(work, WeightOrder.PLAIN).value
    return replace(made, value=plain_part * plain_s + (1.0 - plain_part) * made.value)


def _decoding(
    profile: HardwareProfile, load: PassLoad, processor: Processor, *, exact: bool
) -> Mapping[Decoded, tuple[Number, bool]]:
    """Of each kind of quantised weights how many a second, and whether as they are multiplied.

    Kernels of a CPU that multiply with them as they are stored bring them as compiled kernels
    dequantise: integers of 4 and 8 bits about as fast as those were timed, others are taken to be
    like them (docs/RESULTS.md, "Plans of formats against runs").
    """
    kinds = {
        replace(each, numbers=0)
        for layer in load.layers
        for each in (*layer.decoded, *layer.experts_decoded, *load.head_decoded)
    }
    host_computes = KINDS[processor].host_computes
    # Of quantised weights alone it is asked who multiplies them: who knows that imports numba.
    multiplied = bool(kinds) and host_computes and multiplies(profile, exact=exact)
    direct = {each for each in kinds if multiplied and each.direct}
    compiled = kinds > direct and (not host_computes or compiles(profile))
    found = dict[Decoded, tuple[Number, bool]]()
    for each in kinds:
        decoder, form, bits = each.decoder if compiled else Decoder.TORCH, each.form, each.bits
        if each in direct:
            decoder = Decoder.COMPILED
            if form != Form.CODED:
                form, bits = Form.PACKED, 8 if bits > 4 else 4
        per_s = decoded_per_s(profile, processor, decoder, form, bits)
        found[each] = per_s, each in direct
    return found


def _decoded_s(
    decoding: Mapping[Decoded, tuple[Number, bool]],
    parts: Sequence[Decoded],
    product_s: float = 0.0,
) -> float:
    """What weights take beside a product: before it, or longer, if they are multiplied as stored.

    Args:
        decoding: as `_decoding` finds it.
        parts: the weights.
        product_s: what the product takes with as many weights of 16 bits.
    """
    taken_s = {False: 0.0, True: 0.0}
    for each in parts:
        per_s, direct = decoding[replace(each, numbers=0)]
        taken_s[direct] += each.numbers / per_s.value
    return taken_s[False] + max(0.0, taken_s[True] - product_s)


def _enqueued_s(load: PassLoad, nbytes: int) -> float:
    """What the host takes to enqueue a layer's blocks of KV."""
    return -(-nbytes // load.kv_block_bytes) * load.kv_block_s if nbytes else 0.0


def _piece_s(rates: LinkRates, processor: Processor) -> float:
    if rates.readers is not None or not KINDS[processor].own_memory:
        return 0.0
    return COPY_BYTES / rates.home[0].value


def _slowdown(profile: HardwareProfile, load: PassLoad) -> tuple[float, ...]:
    parts = [(layer.work.weight_bytes, layer.weights) for layer in load.layers]
    parts.append((load.head.weight_bytes if load.head else 0, load.head_weights))
    factor = {part: disk_slowdown(profile, *part) for part in set(parts)}
    return tuple(factor[part] for part in parts)


def cost_of(load: PassLoad, times: PassTimes) -> PassCost:
    """Run passes of the rings in virtual time until they repeat themselves.

    Raises:
        ConfigError: layers or KV are streamed, but there is no slot, or no speed.
    """
    done, times = _settled(load, times)
    between_s = load.between_s + done.draft_wait_s
    kernels_s = sum(times.layer_s) + sum(times.kv_s) + times.head_s + between_s
    stall_s = done.pass_s - kernels_s
    return PassCost(
        pass_s=done.pass_s,
        compute_s=kernels_s,
        stall_s=stall_s if stall_s > _ROUNDING * done.pass_s else 0.0,
        home_bytes=load.moved_bytes,
        obtained=times.obtained,
        old_profile=times.old_profile,
        transfer_s=done.transfer_s,
        between_s=between_s,
        kv_home_bytes=sum(layer.kv_home_bytes for layer in load.layers),
        kv_back_bytes=sum(layer.kv_back_bytes for layer in load.layers),
    )


def spans_of(load: PassLoad, times: PassTimes) -> list[Span]:
    """What the streams do in one of those passes.

    Raises:
        ConfigError: layers or KV are streamed, but there is no slot, or no speed.
    """
    _, times = _settled(load, times)
    return steady_spans(_timed_pass(load, times))


def _settled(load: PassLoad, times: PassTimes) -> tuple[SteadyPass, PassTimes]:
    """Passes that repeat themselves, with kernels as slow as they are beside their copies."""
    _check(load, times)
    done, alone = _steady(_timed_pass(load, times)), times
    for _ in range(_SETTLING if times.slowdown else 0):
        kernels_s = sum(times.layer_s) + sum(times.kv_s) + times.head_s
        both_s = max(0.0, done.transfer_s + kernels_s - (done.pass_s - load.between_s))
        reading = min(1.0, done.transfer_s / done.pass_s)
        computing = min(1.0, both_s / done.transfer_s) if done.transfer_s else 0.0
        times = _beside(alone, reading, computing)
        done = _steady(_timed_pass(load, times))
    return done, times


def _beside(times: PassTimes, reading: float, computing: float) -> PassTimes:
    """The times of kernels and of copies from a disk that go on beside each other.

    Args:
        times: of each alone.
        reading: share of a pass, and so of kernels, in which weights come.
        computing: share of the time in which they come, in which kernels run.
    """
    *layers, head = [1.0 + reading * (factor - 1.0) for factor in times.slowdown]
    longer = 1.0 + computing * (times.read_slowdown - 1.0)
    return replace(
        times,
        layer_s=tuple(s * f for s, f in zip(times.layer_s, layers, strict=True)),
        kv_s=tuple(s * f for s, f in zip(times.kv_s, layers, strict=True)) if times.kv_s else (),
        experts_s=tuple(s * f for s, f in zip(times.experts_s, layers, strict=False)),
        head_s=times.head_s * head,
        home_bytes_per_s=times.home_bytes_per_s / longer,
        device_bytes_per_s=tuple(rate / longer for rate in times.device_bytes_per_s),
    )


def _timed_pass(load: PassLoad, times: PassTimes) -> TimedPass:
    rates = times.device_bytes_per_s or (times.home_bytes_per_s,) * load.devices
    rates = rates[: load.devices]  # a draft model's passes know one device
    return TimedPass(
        layers=_timed_layers(load, times),
        slots=load.slots,
        kv_slots=load.kv_slots,
        kv_block_bytes=load.kv_block_bytes,
        home_bytes_per_s=rates,
        kv_bytes_per_s=times.kv_bytes_per_s or rates,
        back_bytes_per_s=times.back_bytes_per_s or rates,
        home_delay_s=times.home_delay_s,
        hop_s=times.hop_s,
        end_s=times.head_s,
        draft_s=load.between_s,
        draft_passes=load.between_passes,
        piece_s=times.piece_s,
        files_bytes_per_s=times.files_bytes_per_s,
        own_disks=times.own_disks,
        ahead_bytes=load.ahead_bytes,
    )


def _check(load: PassLoad, times: PassTimes) -> None:
    if load.streamed and load.slots < 1:
        raise ConfigError(f"{len(load.streamed)} layers are streamed through {load.slots} slots")
    offloaded = sum(layer.kv_home_bytes > 0 for layer in load.layers)
    if offloaded and (load.kv_slots < 1 or load.kv_block_bytes < 1):
        raise ConfigError(
            f"the KV of {offloaded} layers is streamed through {load.kv_slots} slots of "
            f"{load.kv_block_bytes} bytes"
        )
    speeds = len(times.device_bytes_per_s) or load.devices
    if speeds < load.devices:
        raise ConfigError(f"there are {load.devices} devices, but the speeds of {speeds} links")


def _timed_layers(load: PassLoad, times: PassTimes) -> tuple[TimedLayer, ...]:
    streamed = set(load.streamed)
    experts_s = times.experts_s or (0.0,) * len(load.layers)
    return tuple(
        TimedLayer(
            kernel_s=times.layer_s[index],
            home_bytes=layer.home_bytes if index in streamed else None,
            read_bytes=layer.read_bytes if index in streamed else 0,
            kv_bytes=layer.kv_home_bytes,
            kv_kernel_s=times.kv_s[index] if times.kv_s else 0.0,
            back_bytes=layer.kv_back_bytes,
            device=layer.device,
            missed_bytes=layer.missed_bytes,
            experts_s=experts_s[index] if layer.expert_part else 0.0,
            missed_s=experts_s[index] * layer.missed_part,
            misses=_misses(layer),
            foreseen_bytes=round(layer.foreseen * layer.missed_bytes),
            host_s=layer.host_s,
            behind_bytes=layer.behind_bytes,
            ahead=layer.ahead,
            in_turn=layer.in_turn,
        )
        for index, layer in enumerate(load.layers)
    )


def _misses(layer: LayerLoad) -> tuple[float, ...]:
    """How likely it is that so many of a layer's experts cross the link; empty if none does.

    Where the host computes some of them, it is averaged already what is waited for.
    """
    if not layer.missed_bytes or not layer.expert_bytes or layer.host_s:
        return ()
    mean = layer.missed_bytes / layer.expert_bytes
    return chances_of(mean, max(1, ceil(mean / layer.missed_part - _ROUNDING)))
