"""Decide which layers stay on the device and how many slots the others share.

`place` keeps as many resident layers as the limit allows, spread evenly between the streamed ones,
so that the link never idles while they compute.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from offload_rt.config import HomeKind
from offload_rt.costs.experts import ExpertUse
from offload_rt.errors import ConfigError, PlanError
from offload_rt.kv.sizes import KVPlan, spread_layers
from offload_rt.units import format_size

MIN_SLOTS, MAX_AUTO_SLOTS = 2, 4
# While one slot is computed from, the others are to keep this much in flight: what keeps a disk
# busy. Layers of 7 MB came in 1.2 to 1.6 times as fast through 4 slots as through 2.
IN_FLIGHT_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertDemand:
    """What a run needs whose experts are streamed one by one.

    Attributes:
        rest_bytes: image of each layer without its experts.
        slot_bytes: of a slot that takes any expert.
        counts: experts of each layer; 0 where it has none.
        per_token: experts of a layer that a token is sent to: the fewest slots.
        image_bytes: of all experts, as they compute.
        file_bytes: of them as they are stored.
        use: what is known of those that tokens ask for.
        whole: layers that have their experts in them, all the same.
    """

    rest_bytes: tuple[int, ...]
    slot_bytes: int
    counts: tuple[int, ...]
    per_token: int
    image_bytes: int
    file_bytes: int
    use: ExpertUse = ExpertUse()
    whole: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Experts of all layers."""
        return sum(self.counts)

    @property
    def layers(self) -> int:
        """Layers that have experts."""
        return sum(count > 0 for count in self.counts)

    def keeping(self, whole: int, layer_bytes: Sequence[int]) -> "ExpertDemand":
        """The same where the last so many layers of experts have theirs in them.

        Those that come one by one then follow each other, so that each can be foreseen by the one
        before.

        Args:
            whole: how many; fewer than there are.
            layer_bytes: image of each layer with its experts.
        """
        kept = [layer for layer, count in enumerate(self.counts) if count][-whole:]
        counts = tuple(0 if layer in kept else n for layer, n in enumerate(self.counts))
        sizes = enumerate(zip(self.rest_bytes, layer_bytes, strict=True))
        return replace(
            self,
            rest_bytes=tuple(full if layer in kept else rest for layer, (rest, full) in sizes),
            counts=counts,
            image_bytes=self.image_bytes * sum(counts) // self.count,
            file_bytes=self.file_bytes * sum(counts) // self.count,
            whole=tuple(kept),
        )

    def held_bytes(self, share: float) -> int:
        """Of so much of each layer's experts, which are alike."""
        return self.image_bytes * sum(int(share * count) for count in self.counts) // self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What a run needs on the device.

    Attributes:
        layer_bytes: image of each layer.
        base_bytes: what is in no layer: embedding, final norm, head.
        host_base_bytes: an embedding in host memory, read by rows; 0: it is elsewhere.
        file_base_bytes: the same of one that stays in its file.
        spare_base_bytes: less is needed by so much where the embedding is not on the device, as it
            is here; 0: it is not, or has to be.
        kv_bytes: KV caches of all sequences.
        kv_layer_bytes: of these, what lies beside each layer; empty: the same beside all.
        state_bytes: recurrent states of all sequences, beside each layer; empty: there are none.
        workspace_bytes: activations, logits and the runtime's own needs, at most.
        context_bytes: of `workspace_bytes`, what a GPU's driver takes for itself and its kernels.
        slack_bytes: of `workspace_bytes`, what allocators take beyond what they are asked for.
        drafter_bytes: a draft model with its caches, Medusa heads, retrieval caches.
        recorded_bytes: of these, what recorded passes keep.
        pieced_bytes: of `workspace_bytes`, what passes of few rows keep that are recorded in
            pieces; 0: none are.
        wires_experts: experts are dequantised in each pass, so the host chooses them wherever they
            are.
        packed_head_bytes: a reordered copy of the output head, where the device has kernels for it;
            else 0.
        kv: how the caches are kept outside the device; None keeps them there.
        kv_passes: `kv_bytes` are those of one layer, which the next one takes over.
        beside_bytes: of `drafter_bytes`, what lies beside each layer; empty: nothing does.
        copy_bytes: of a copy that drafts, beside each layer that is streamed; empty: there is none.
        copies_all: where none is streamed there are copies of all.
        further_bytes: what each device after the first needs for passes through its layers.
        experts: how the layers lie whose experts are streamed one by one; None: they are not.
        units_bytes: of `workspace_bytes`, what passes need only where experts come one by one,
            beside `pieced_bytes`; below 0: whole layers need more.
        whole_because: why experts are not; empty where the model has none.
        of_units: what this was before layers were taken to be whole (`without_units`, `keeping`).
    """

    layer_bytes: tuple[int, ...]
    base_bytes: int
    kv_bytes: int
    workspace_bytes: int
    host_base_bytes: int = 0
    file_base_bytes: int = 0
    spare_base_bytes: int = 0
    context_bytes: int = 0
    slack_bytes: int = 0
    kv_layer_bytes: tuple[int, ...] = ()
    drafter_bytes: int = 0
    recorded_bytes: int = 0
    pieced_bytes: int = 0
    wires_experts: bool = False
    state_bytes: tuple[int, ...] = ()
    packed_head_bytes: int = 0
    kv: KVPlan | None = None
    kv_passes: bool = False
    beside_bytes: tuple[int, ...] = ()
    copy_bytes: tuple[int, ...] = ()
    copies_all: bool = False
    further_bytes: int = 0
    experts: ExpertDemand | None = None
    units_bytes: int = 0
    whole_because: str = ""
    of_units: "Demand | None" = None

    @property
    def rows_apart(self) -> bool:
        """Whether the embedding is not on the device: passes read their rows of it."""
        return self.host_base_bytes + self.file_base_bytes > 0

    @property
    def fixed_bytes(self) -> int:
        """What is there whatever the placement."""
        states = sum(self.state_bytes)
        return self.base_bytes + self.kv_bytes + states + self.workspace_bytes + self.drafter_bytes

    @property
    def least(self) -> "Demand":
        """The same with as little on the device as can be, however experts come."""
        full = self.of_units or self
        return replace(full, base_bytes=full.base_bytes - full.spare_base_bytes, spare_base_bytes=0)

    @property
    def in_pieces(self) -> bool:
        """Whether passes of few rows are recorded in pieces."""
        return self.pieced_bytes > 0

    def without_units(self, *, streams: bool) -> "Demand":
        """The same where no expert is streamed by itself, and maybe whole layers are."""
        pieced_bytes = self.pieced_bytes if self.wires_experts and not streams else 0
        spared_bytes = self.units_bytes + self.pieced_bytes - pieced_bytes
        if not spared_bytes:
            return self
        return replace(
            self,
            workspace_bytes=self.workspace_bytes - spared_bytes,
            pieced_bytes=pieced_bytes,
            units_bytes=0,
            of_units=self.of_units or self,
        )

    def knowing(self, asked: ExpertUse) -> "Demand":
        """The same with what is known of the experts that tokens ask for."""
        if self.experts is None:
            return self
        return replace(self, experts=replace(self.experts, use=asked))

    def keeping(self, whole: int) -> "Demand":
        """The same where so many layers of experts have theirs in them, and others one by one."""
        if not whole or self.experts is None:
            return self
        if whole >= self.experts.layers:
            raise ConfigError(
                f"whole_layers is {whole}, and the model has {self.experts.layers} layers of "
                "experts: one at least is left to the slots"
            )
        experts = self.experts.keeping(whole, self.layer_bytes)
        return replace(self, experts=experts, of_units=self.of_units or self)

    def share(self, layers: Sequence[int], *, first: bool) -> "Demand":
        """What a device needs that has these layers, and if it is the first what is in none."""
        beside = tuple(self.beside_bytes[i] for i in layers) if self.beside_bytes else ()
        whole = self.drafter_bytes - sum(self.beside_bytes) if first else 0
        kv = None if self.kv is None else self.kv.of_layers(layers)
        kv_bytes = self.kv_bytes
        if kv is not None:
            kv_bytes = kv.device_bytes
        elif self.kv_layer_bytes and not self.kv_passes:
            kv_bytes = sum(self.kv_layer_bytes[i] for i in layers)
        elif not self.kv_passes:
            kv_bytes = kv_bytes // len(self.layer_bytes) * len(layers)
        return Demand(
            layer_bytes=tuple(self.layer_bytes[i] for i in layers),
            base_bytes=self.base_bytes if first else 0,
            kv_bytes=kv_bytes,
            kv_layer_bytes=tuple(self.kv_layer_bytes[i] for i in layers if self.kv_layer_bytes),
            workspace_bytes=self.workspace_bytes if first else self.further_bytes,
            context_bytes=self.context_bytes,
            # Of a processor's only what drafts is many small copies.
            slack_bytes=self.slack_bytes if first or self.context_bytes else 0,
            drafter_bytes=whole + sum(beside),
            recorded_bytes=self.recorded_bytes if first else 0,
            state_bytes=tuple(self.state_bytes[i] for i in layers) if self.state_bytes else (),
            kv=kv,
            kv_passes=self.kv_passes,
            beside_bytes=beside,
            copy_bytes=tuple(self.copy_bytes[i] for i in layers) if self.copy_bytes else (),
            copies_all=self.copies_all,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stripe:
    """A device that takes part.

    Attributes:
        name: in messages.
        limit_bytes: memory the run may take there.
        link_bytes_per_s: of its link, against those of the others.
        apart: it is on a machine of its own.
    """

    name: str
    limit_bytes: int
    link_bytes_per_s: float = 1.0
    apart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """What lives where.

    Attributes:
        resident: layers kept on the device.
        streamed: layers that are copied in each pass, in order.
        slots: slots they share, on each device; 0 when none is streamed.
        slot_bytes: size of a slot.
        demand: what the placement was made for.
        device_limit_bytes: the limit it keeps to; of several devices together.
        home: where the streamed layers live.
        in_files: of a home that is split, the layers that stay in their files.
        expert_share: of a home that is split, so much of each layer's experts is in host memory.
        ahead_bytes: host memory that layers in files are read ahead into.
        shares: of several devices, what each has; layers by their numbers in the model.
        stripes: these devices.
        expert_slots: of the pool that experts come through one by one; resident layers are then
            without them. 0: experts are in their layers.
    """

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    slots: int
    slot_bytes: int
    demand: Demand
    device_limit_bytes: int
    home: HomeKind = HomeKind.DISK
    in_files: tuple[int, ...] = ()
    expert_share: float = 1.0
    ahead_bytes: int = 0
    shares: tuple["Placement", ...] = ()
    stripes: tuple[Stripe, ...] = ()
    expert_slots: int = 0

    @property
    def streams(self) -> bool:
        """Whether weights are copied in passes."""
        return bool(self.streamed or self.expert_slots)

    @property
    def layer_bytes(self) -> tuple[int, ...]:
        """Image of each layer as it is placed."""
        experts = self.demand.experts
        apart = experts is not None and self.expert_slots
        return experts.rest_bytes if experts is not None and apart else self.demand.layer_bytes

    @property
    def pooled_layers(self) -> tuple[int, ...]:
        """Layers whose experts come through the pool."""
        experts = self.demand.experts if self.expert_slots else None
        counts = () if experts is None else experts.counts
        return tuple(layer for layer, count in enumerate(counts) if count)

    @property
    def whole_layers(self) -> tuple[int, ...]:
        """Layers that have their experts in them, where those of others come through the pool."""
        experts = self.demand.experts if self.expert_slots else None
        return () if experts is None else experts.whole

    @property
    def pool_bytes(self) -> int:
        """Slots of experts."""
        experts = self.demand.experts
        return 0 if experts is None else self.expert_slots * experts.slot_bytes

    @property
    def pooled_bytes(self) -> int:
        """Of all experts that come through the pool, as they compute."""
        experts = self.demand.experts
        return 0 if experts is None or not self.expert_slots else experts.image_bytes

    @property
    def of_devices(self) -> tuple["Placement", ...]:
        """What each device has; all of it where there is but one."""
        return self.shares or (self,)

    @property
    def layers(self) -> list[int]:
        """All it places, in order."""
        return sorted((*self.resident, *self.streamed))

    @property
    def device(self) -> tuple[int, ...]:
        """The device of each layer."""
        found = {layer: d for d, own in enumerate(self.shares) for layer in own.layers}
        return tuple(found.get(layer, 0) for layer in range(len(self.demand.layer_bytes)))

    @property
    def in_words(self) -> str:
        """How many layers a device keeps and is sent, and its limit."""
        return (
            f"{len(self.resident)} layers resident, {len(self.streamed)} streamed, the limit is "
            f"{format_size(self.device_limit_bytes)}"
        )

    @property
    def kv_bytes(self) -> int:
        """KV caches, on all devices."""
        return sum(own.demand.kv_bytes for own in self.of_devices)

    @property
    def host_bytes(self) -> int:
        """Of weights and KV in host memory, where the device has its own."""
        kv = self.demand.kv
        kept_bytes = self.demand.host_base_bytes + (0 if kv is None else kv.host_bytes)
        return self.held_bytes + self.ahead_bytes + kept_bytes

    @property
    def held_bytes(self) -> int:
        """Of streamed layers and experts, those in host memory, as the device has them."""
        if not self.home.in_memory:
            return 0
        experts, pooled_bytes = self.demand.experts, self.pooled_bytes
        if experts is not None and self.expert_share < 1.0:
            pooled_bytes = experts.held_bytes(self.expert_share)
        held = set(self.streamed) - set(self.in_files)
        return sum(self.layer_bytes[i] for i in held) + pooled_bytes

    @property
    def layers_in_files(self) -> tuple[int, ...]:
        """Of the streamed layers, those that are not in host memory."""
        return self.in_files if self.home.in_memory else self.streamed

    @property
    def reads_files(self) -> bool:
        """Whether passes read weights from the model's files."""
        experts = self.expert_slots > 0 and self.expert_share < 1.0
        return self.streams and (not self.home.in_memory or bool(self.layers_in_files) or experts)

    @property
    def straight(self) -> tuple[int, ...]:
        """Where machines differ, the streamed layers of those that have none in host memory."""
        if self.home is not HomeKind.SPLIT or not any(stripe.apart for stripe in self.stripes):
            return ()
        apart = (own.streamed for own in self.shares if own.home is HomeKind.DISK)
        return tuple(sorted(layer for layers in apart for layer in layers))

    @property
    def workspace_bytes(self) -> int:
        """What passes take and give back, on all devices."""
        return sum(own.demand.workspace_bytes for own in self.of_devices)

    @property
    def context_bytes(self) -> int:
        """Of these, what drivers take."""
        return sum(own.demand.context_bytes for own in self.of_devices)

    @property
    def slack_bytes(self) -> int:
        """Of these, what allocators take beyond what they are asked for."""
        return sum(own.demand.slack_bytes for own in self.of_devices)

    @property
    def taken_rows(self) -> tuple[tuple[str, int, str], ...]:
        """The workspace in parts, for tables: a name, bytes and a remark each."""
        context, slack = self.context_bytes, self.slack_bytes
        rows = (
            ("workspace", self.workspace_bytes - context - slack, "at most"),
            ("driver's context", context, "with the kernels it loads, assumed"),
            ("allocator's slack", slack, "of buffers in whole blocks, at most"),
        )
        return tuple(row for row in rows if row[1] or row is rows[0])

    @property
    def ring_bytes(self) -> int:
        """Slots, on all devices."""
        return sum(own.slots * own.slot_bytes for own in self.of_devices)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident layers."""
        return sum(self.layer_bytes[i] for i in self.resident)

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the streamed layers and experts, as the device has them."""
        return sum(self.layer_bytes[i] for i in self.streamed) + self.pooled_bytes

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copies that draft."""
        copies = self.demand.copy_bytes
        return sum(copies[i] for i in self.copied) if copies else 0

    @property
    def copied(self) -> tuple[int, ...]:
        """The layers of which copies would draft: the streamed ones, or maybe all that stay."""
        return self.streamed or (self.resident if self.demand.copies_all else ())

    @property
    def drafter_bytes(self) -> int:
        """What a drafter keeps, copies of layers included."""
        return self.demand.drafter_bytes + self.copy_bytes

    @property
    def packs_head(self) -> bool:
        """Whether the output head is kept reordered, too: one device has all layers and room."""
        nbytes = self.demand.packed_head_bytes
        left = self.device_limit_bytes - self._plain_bytes
        return 0 < nbytes <= left and not self.streams and not self.shares

    @property
    def base_bytes(self) -> int:
        """What is in no layer, with a reordered output head if there is one."""
        return self.demand.base_bytes + self.packs_head * self.demand.packed_head_bytes

    @property
    def _plain_bytes(self) -> int:
        streamed_bytes = self.slots * self.slot_bytes + self.copy_bytes + self.pool_bytes
        return self.demand.fixed_bytes + self.resident_bytes + streamed_bytes

    @property
    def device_bytes(self) -> int:
        """Device memory the run takes, at most."""
        if self.shares:
            return sum(share.device_bytes for share in self.shares)
        return self._plain_bytes + self.packs_head * self.demand.packed_head_bytes


def place(
    demand: Demand,
    device_limit_bytes: int,
    *,
    slots: int | None = None,
    resident_layers: int | None = None,
    resident: Sequence[int] | None = None,
    expert_slots: int | None = None,
) -> Placement:
    """Choose resident layers and slots within a limit.

    Where experts can be streamed one by one and not all layers fit whole, every layer stays without
    its experts, and what is left of the limit is slots for them.

    Args:
        demand: what the run needs.
        device_limit_bytes: device memory it may take.
        slots: slots of the ring; None chooses.
        resident_layers: layers to keep on the device; None keeps as many as fit.
        resident: which layers; None spreads them evenly.
        expert_slots: slots for experts; None chooses, 0 streams layers whole.

    Raises:
        ConfigError: a count is not possible for this model.
        PlanError: it does not fit; the message names the limit that would do.
    """
    if expert_slots:
        candidates = [_pooled(demand, device_limit_bytes, expert_slots)]
    elif resident is None:
        candidates = _candidates(
            demand, device_limit_bytes, slots, resident_layers, pools=expert_slots is None
        )
    else:
        candidates = [_with_layers(demand, device_limit_bytes, slots, resident)]
    for placement in candidates:
        if placement.device_bytes <= device_limit_bytes:
            if slots is not None and slots > len(placement.streamed):
                raise ConfigError(
                    f"--slots is {slots}, but {len(placement.streamed)} layers are streamed: "
                    "lower it or leave it out"
                )
            return _with_spare_slots(placement, slots)
    smallest = _smallest(candidates)
    mib = -(-smallest.device_bytes // 2**20)
    raise PlanError(why_not(smallest, f"{mib}MiB"), smallest.device_bytes)


def smallest_bytes(
    demand: Demand,
    *,
    slots: int | None = None,
    resident_layers: int | None = None,
    expert_slots: int | None = None,
) -> int:
    """The lowest limit for which `place` finds a placement."""
    if expert_slots:
        return _pooled(demand, 0, expert_slots).device_bytes
    pools = expert_slots is None
    found = _candidates(demand, 0, slots, resident_layers, pools=pools)
    return _smallest(found).device_bytes


def _pooled(demand: Demand, limit: int, slots: int | None) -> Placement:
    """Keep every layer without its experts, and these in a pool of as many slots as fit.

    Raises:
        ConfigError: the model's experts are not streamed one by one, or are fewer.
        PlanError: one token's experts would not have a slot each.
    """
    experts = demand.experts
    if experts is None:
        why = demand.whole_because or "this model has no experts"
        raise ConfigError(f"--expert-slots has no effect, as {why}: leave it out")
    bare = Placement(
        resident=tuple(range(len(demand.layer_bytes))),
        streamed=(),
        slots=0,
        slot_bytes=0,
        demand=demand,
        device_limit_bytes=limit,
        expert_slots=experts.per_token,
    )
    if slots is not None and slots < experts.per_token:
        raise PlanError(
            f"--expert-slots is {slots}, and a token is sent to {experts.per_token} experts of a "
            f"layer at once: use {experts.per_token} or more",
            bare.device_bytes,
        )
    if slots is not None and slots > experts.count:
        raise ConfigError(
            f"--expert-slots is {slots}, the model has {experts.count} experts in all: lower it or "
            "leave it out"
        )
    if slots is None:
        room = (limit - bare.device_bytes) // experts.slot_bytes
        slots = min(experts.count, experts.per_token + max(0, room))
    return replace(bare, expert_slots=slots)


def _candidates(
    demand: Demand, limit: int, slots: int | None, resident_layers: int | None, *, pools: bool
) -> list[Placement]:
    """Every placement to consider, best first."""
    layers = len(demand.layer_bytes)
    count = checked_layers(layers, resident_layers, None)
    counts = range(layers, -1, -1) if count is None else [count]
    found = [_arrange(demand, limit, n, slots) for n in counts]
    if pools and demand.experts is not None and count is None and slots is None:
        found.insert(1, _pooled(demand, limit, None))
    if slots is None:  # one slot works too, copying and computing in turn
        fewer = range(found[-1].slots - 1, 0, -1)
        found += [_arrange(demand, limit, counts[-1], ring) for ring in fewer]
    return found


def _smallest(candidates: list[Placement]) -> Placement:
    return min(candidates, key=lambda placement: placement.device_bytes)


def _with_layers(
    demand: Demand, limit: int, slots: int | None, resident: Sequence[int]
) -> Placement:
    """Keep these layers.

    Raises:
        ConfigError: the model lacks one.
    """
    checked_layers(len(demand.layer_bytes), None, resident)
    return _keep(demand, limit, sorted(set(resident)), slots)


def checked_layers(
    layers: int, resident_layers: int | None, resident: Sequence[int] | None
) -> int | None:
    """How many layers are to stay; None where that is open.

    Raises:
        ConfigError: the model lacks one.
    """
    for layer in resident or ():
        if not 0 <= layer < layers:
            raise ConfigError(
                f"the plan keeps layer {layer} on the device, the model has layers 0 to "
                f"{layers - 1}: edit the plan, or make a new one with `offload-run plan --output`"
            )
    if resident is not None:
        return len(set(resident))
    if resident_layers is not None and resident_layers > layers:
        raise ConfigError(f"--resident-layers is {resident_layers}, the model has {layers} layers")
    return resident_layers


def _arrange(demand: Demand, limit: int, resident: int, slots: int | None) -> Placement:
    """Keep `resident` layers, spread evenly between the streamed ones."""
    return _keep(demand, limit, sorted(spread_layers(resident, len(demand.layer_bytes))), slots)


def _keep(demand: Demand, limit: int, kept: Sequence[int], slots: int | None) -> Placement:
    there = set(kept)
    streamed = tuple(i for i in range(len(demand.layer_bytes)) if i not in there)
    slot_bytes = max((demand.layer_bytes[i] for i in streamed), default=0)
    return Placement(
        resident=tuple(kept),
        streamed=streamed,
        slots=min(slots or ring_slots(slot_bytes), len(streamed)),
        slot_bytes=slot_bytes,
        demand=demand.without_units(streams=bool(streamed)),
        device_limit_bytes=limit,
    )


def ring_slots(slot_bytes: int) -> int:
    """Slots without which the link would have to wait."""
    ahead = -(-IN_FLIGHT_BYTES // max(1, slot_bytes))
    return min(max(MIN_SLOTS, 1 + ahead), MAX_AUTO_SLOTS)


def _with_spare_slots(placement: Placement, slots: int | None) -> Placement:
    """Use what is left of the limit for more slots: they even out the disk's bad moments."""
    if slots is not None or not placement.streamed:
        return placement
    spare = (placement.device_limit_bytes - placement.device_bytes) // placement.slot_bytes
    ring = min(placement.slots + spare, MAX_AUTO_SLOTS, len(placement.streamed))
    return replace(placement, slots=max(placement.slots, ring))


def why_not(smallest: Placement, limit: str) -> str:
    """What a device lacks, and the limit that would do, as it is typed."""
    demand = smallest.demand
    parts = {
        "embedding and head": demand.base_bytes,
        "KV cache": demand.kv_bytes,
        "recurrent states": sum(demand.state_bytes),
        "workspace": demand.workspace_bytes,
        "drafting": smallest.drafter_bytes,
        f"{len(smallest.resident)} resident layers": smallest.resident_bytes,
        f"{smallest.slots} x slot": smallest.slots * smallest.slot_bytes,
        f"{smallest.expert_slots} x expert": smallest.pool_bytes,
    }
    listed = ", ".join(f"{name} {format_size(size)}" for name, size in parts.items() if size)
    return (
        f"needs {format_size(smallest.device_bytes)} of device memory at least ({listed}), the "
        f"limit is {format_size(smallest.device_limit_bytes)}: use --device-memory {limit}, or "
        "make room with a shorter prompt, a smaller --max-tokens or --context"
    )
