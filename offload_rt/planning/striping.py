"""Decide which device has which layers, and which of them stay there.

Layers follow each other, so kernels of several devices take turns whoever has which layer. Their
links do not: each can bring in its layers all the time. So what crosses the links is dealt out by
link time, one layer here and the next there, and each ring runs ahead while the other device
computes. Layers that stay fill each device's own memory. If nothing is copied at all, each device
has its layers in a row, so that hidden states hop but once.

With one device this is `placement.place`.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import mul

from offload_rt.errors import ConfigError, PlanError
from offload_rt.kv.sizes import KVPlan, KVSizes, spread_layers
from offload_rt.planning.placement import (
    MAX_AUTO_SLOTS,
    Demand,
    Placement,
    Stripe,
    checked_layers,
    place,
    ring_slots,
    smallest_bytes,
    why_not,
)


def place_striped(
    demand: Demand,
    stripes: Sequence[Stripe],
    *,
    slots: int | None = None,
    resident_layers: int | None = None,
    resident: Sequence[int] | None = None,
    expert_slots: int | None = None,
) -> Placement:
    """Choose devices, resident layers and slots within the limits.

    Args:
        demand: what the run needs, on all devices together.
        stripes: the devices; the first has what is in no layer.
        slots: of each device's ring; None chooses.
        resident_layers: layers to keep on the devices; None keeps as many as fit.
        resident: which layers; None spreads them evenly.
        expert_slots: of one device's pool of experts; None chooses, 0 streams layers whole.

    Raises:
        ConfigError: a count is not possible for this model, or a device would have no layer.
        PlanError: it does not fit a device; the message names it and the limit that would do.
    """
    if len(stripes) == 1:
        return place(
            demand,
            stripes[0].limit_bytes,
            slots=slots,
            resident_layers=resident_layers,
            resident=resident,
            expert_slots=expert_slots,
        )
    if expert_slots:
        raise ConfigError(
            "--expert-slots is for one device, on several layers are streamed whole: leave it out"
        )
    layers = len(demand.layer_bytes)
    counts = checked_layers(layers, resident_layers, resident)
    kept = list(range(layers, -1, -1)) if counts is None else [counts]
    # One slot works too, copying and computing in turn.
    rings = range(ring_slots(max(demand.layer_bytes)), 0, -1) if slots is None else [slots]
    for ring in rings:
        # With fewer layers kept there is more room: the first that fits is looked for by halves.
        low, high = 0, len(kept)
        found = None
        while low < high:
            middle = (low + high) // 2
            split = _split(demand, stripes, kept[middle], ring)
            if split is None:
                low = middle + 1
            else:
                high, found = middle, split
        if found is not None:
            made = _arrange(demand, stripes, found, ring, resident)
            for share, stripe in zip(made.shares, stripes, strict=True):
                if not share.layers:
                    raise ConfigError(
                        f"{stripe.name} would have none of the model's layers: leave it out of "
                        "--device, or raise its --device-memory"
                    )
            most = max(len(share.streamed) for share in made.shares)
            if slots is not None and slots > most:
                raise ConfigError(
                    f"--slots is {slots}, but {most} layers are streamed to a device: lower it or "
                    "leave it out"
                )
            return made if slots is not None else _with_spare_slots(made)
    raise _refusal(demand, stripes, kept[-1], slots, resident)


def with_spare_blocks(placement: Placement, buffer_bytes: int) -> Placement:
    """Use what is left of all limits for more blocks of KV.

    A link brings in what the ring has room for while nothing of it is asked for: while a drafter
    works, or another device computes its layers.

    Args:
        placement: with KV that is copied.
        buffer_bytes: memory is taken in whole multiples of it.
    """
    kv = placement.demand.kv
    assert kv is not None
    own = placement.of_devices
    left = min(share.device_limit_bytes - share.device_bytes for share in own)
    layers = max(len(share.layers) for share in own)

    def with_slots(slots: int) -> tuple[KVSizes, ...]:
        most = [max(s.slots, min(slots, layers * s.layer_blocks)) for s in kv.sizes]
        return tuple(replace(s, slots=n) for s, n in zip(kv.sizes, most, strict=True))

    def more_bytes(slots: int) -> int:
        units = [-(-s.slot_bytes // buffer_bytes) for s in kv.sizes]
        more = [b.slots - a.slots for a, b in zip(kv.sizes, with_slots(slots), strict=True)]
        return sum(map(mul, more, units)) * buffer_bytes

    most = layers * max(s.layer_blocks for s in kv.sizes)
    sizes = with_slots(bisect_right(range(most + 1), left, key=more_bytes) - 1)
    demand = _with_kv(placement.demand, replace(kv, sizes=sizes))
    shares = tuple(
        replace(share, demand=_with_kv(share.demand, demand.kv.of_layers(share.layers)))
        for share in placement.shares
        if demand.kv is not None
    )
    return replace(placement, demand=demand, shares=shares)


def _with_kv(demand: Demand, kv: KVPlan) -> Demand:
    return replace(demand, kv=kv, kv_bytes=kv.device_bytes)


def smallest_limits(
    placement: Placement,
    *,
    slots: int | None = None,
    resident_layers: int | None = None,
    expert_slots: int | None = None,
) -> tuple[int, ...]:
    """The lowest limits under which there is a placement for the same, with links as they are."""
    demand, stripes = placement.demand.least, placement.stripes
    if len(stripes) < 2:
        least = smallest_bytes(
            demand, slots=slots, resident_layers=resident_layers, expert_slots=expert_slots
        )
        return (least,)
    smallest = _smallest(demand, stripes, resident_layers or 0, slots, None)
    return tuple(share.device_bytes for share in smallest.shares)


@dataclass(frozen=True, slots=True)
class _Split:
    """How many layers each device keeps, and how many it is sent."""

    kept: tuple[int, ...]
    sent: tuple[int, ...]


class _Counts:
    """Layers dealt out so far, by count: as if all were as large as the largest.

    Args:
        demand: what the run needs.
        stripes: the devices.
        slots: of each ring.
        bounded: keep to the limits.
    """

    def __init__(
        self, demand: Demand, stripes: Sequence[Stripe], slots: int, *, bounded: bool
    ) -> None:
        found = [_beside(demand, first=not device) for device in range(len(stripes))]
        self._fixed, self._each = [fixed for fixed, _ in found], [each for _, each in found]
        self._layer_bytes = max(demand.layer_bytes)
        self._copy_bytes, self._copies_all = max(demand.copy_bytes, default=0), demand.copies_all
        self._slots = slots
        self._kv_bytes = (
            0 if demand.kv is None else demand.kv.streamed_bytes // len(demand.layer_bytes)
        )
        self._stripes, self._bounded = stripes, bounded
        self.kept, self.sent = [0 for _ in stripes], [0 for _ in stripes]

    def link_s(self, device: int, *, more: int = 0) -> float:
        """Seconds its link is busy in a pass, if it is sent `more` layers."""
        sent = self.sent[device] + more
        nbytes = sent * self._layer_bytes + (sent + self.kept[device]) * self._kv_bytes
        return nbytes / self._stripes[device].link_bytes_per_s

    def room(self, device: int, *, kept: int = 0, sent: int = 0) -> int:
        """Bytes that are left of its limit with so many more layers."""
        keeps, gets = self.kept[device] + kept, self.sent[device] + sent
        used = self._fixed[device] + self._each[device] * (keeps + gets)
        used += keeps * self._layer_bytes + min(self._slots, gets) * self._layer_bytes
        streams = any(self.sent) or sent > 0 or not self._copies_all
        used += (gets if streams else keeps) * self._copy_bytes
        return self._stripes[device].limit_bytes - used

    def send(self) -> bool:
        """Send one more layer where the link is idle soonest; whether a device has room."""
        fit = [d for d in self._devices if not self._bounded or self.room(d, sent=1) >= 0]
        if fit:
            self.sent[min(fit, key=lambda d: self.link_s(d, more=1))] += 1
        return bool(fit)

    def keep(self) -> bool:
        """Keep one more layer where fewest bytes come in, then where fewest layers are."""
        fit = [d for d in self._devices if not self._bounded or self.room(d, kept=1) >= 0]
        if fit:
            key = self.link_s if self._kv_bytes else lambda d: 0.0
            self.kept[min(fit, key=lambda d: (key(d), self.kept[d] + self.sent[d]))] += 1
        return bool(fit)

    def even_out(self) -> None:
        """Send layers elsewhere as long as the busiest link is less busy then."""
        for _ in range(sum(self.sent)):
            busy = max(self._devices, key=self.link_s)
            idle = min(self._devices, key=lambda d: self.link_s(d, more=1))
            gains = self.link_s(idle, more=1) < self.link_s(busy)
            if not (gains and self.sent[busy] and self.room(idle, sent=1) >= 0):
                return
            self.sent[busy] -= 1
            self.sent[idle] += 1

    @property
    def _devices(self) -> range:
        return range(len(self._stripes))


def _beside(demand: Demand, *, first: bool) -> tuple[int, int]:
    """What a device has whatever its layers, and beside each of them, at most."""

    def held(*layers: int) -> int:
        return demand.share(layers, first=first).fixed_bytes

    if len(demand.layer_bytes) < 2:
        return held(0), 0
    # Where layers keep different things, as rows or a state, each is looked at.
    others = range(1, len(demand.layer_bytes) if demand.kv_layer_bytes else 2)
    own = held(0, 1) - held(1)
    return held(0) - own, max([own, *(held(0, layer) - held(0) for layer in others)])


def _split(
    demand: Demand, stripes: Sequence[Stripe], kept: int, slots: int, *, bounded: bool = True
) -> _Split | None:
    """Deal layers out of which `kept` stay; None if they do not fit."""
    counts = _Counts(demand, stripes, slots, bounded=bounded)
    fits = all(counts.send() for _ in range(len(demand.layer_bytes) - kept))
    fits = fits and all(counts.keep() for _ in range(kept))
    if not fits or (bounded and any(counts.room(d) < 0 for d in range(len(stripes)))):
        return None
    counts.even_out()
    return _Split(tuple(counts.kept), tuple(counts.sent))


def _arrange(
    demand: Demand,
    stripes: Sequence[Stripe],
    split: _Split,
    slots: int,
    resident: Sequence[int] | None,
) -> Placement:
    """Say which layers these are."""
    layers = len(demand.layer_bytes)
    stay = set(spread_layers(sum(split.kept), layers) if resident is None else resident)
    kept = sorted(stay)
    streamed = [layer for layer in range(layers) if layer not in stay]
    crosses = bool(streamed) or demand.kv is not None
    # Between machines hops take long, so each has as many layers in a row as its ring holds.
    runs = stripes[0].apart or not crosses
    rounds = max(1, -(-max(split.sent) // slots)) if crosses else 1
    homes = dict(
        zip(kept, _in_rows(split.kept, rounds) if runs else _deal(split.kept), strict=True)
    )
    homes |= dict(
        zip(streamed, _in_rows(split.sent, rounds) if runs else _deal(split.sent), strict=True)
    )
    slot_bytes = max((demand.layer_bytes[layer] for layer in streamed), default=0)
    ring = min(slots, max(split.sent))
    shares = []
    for device, stripe in enumerate(stripes):
        mine = [layer for layer in range(layers) if homes[layer] == device]
        sent = tuple(layer for layer in mine if layer not in stay)
        shares.append(
            Placement(
                resident=tuple(layer for layer in mine if layer in stay),
                streamed=sent,
                slots=min(ring, len(sent)),
                slot_bytes=slot_bytes if sent else 0,
                # Layers keep their numbers.
                demand=replace(
                    demand.share(mine, first=device == 0),
                    layer_bytes=demand.layer_bytes,
                    copy_bytes=demand.copy_bytes,
                    copies_all=demand.copies_all and not streamed,
                ),
                device_limit_bytes=stripe.limit_bytes,
            )
        )
    return Placement(
        resident=tuple(kept),
        streamed=tuple(streamed),
        slots=ring,
        slot_bytes=slot_bytes,
        demand=demand,
        device_limit_bytes=sum(stripe.limit_bytes for stripe in stripes),
        shares=tuple(shares),
        stripes=tuple(stripes),
    )


def _deal(counts: Sequence[int]) -> list[int]:
    """A device for each of sum(counts) layers: in turn, as evenly as the counts allow."""
    total, dealt, order = sum(counts), [0] * len(counts), []
    for number in range(1, total + 1):
        behind = [count * number / total - done for count, done in zip(counts, dealt, strict=True)]
        device = behind.index(max(behind))
        dealt[device] += 1
        order.append(device)
    return order


def _in_rows(counts: Sequence[int], rounds: int) -> list[int]:
    """A device for each of sum(counts) layers: in each round every device has some in a row."""
    dealt = []
    for number in range(rounds):
        for device, count in enumerate(counts):
            dealt += [device] * (count * (number + 1) // rounds - count * number // rounds)
    return dealt


def _with_spare_slots(placement: Placement) -> Placement:
    """Use what is left of all limits for more slots."""
    streaming = [share for share in placement.shares if share.streamed]
    if not streaming:
        return placement
    left = min(
        (share.device_limit_bytes - share.device_bytes) // share.slot_bytes for share in streaming
    )
    most = max(len(share.streamed) for share in streaming)
    slots = max(placement.slots, min(placement.slots + left, MAX_AUTO_SLOTS, most))
    shares = tuple(
        replace(share, slots=min(slots, len(share.streamed))) for share in placement.shares
    )
    return replace(placement, slots=slots, shares=shares)


def _smallest(
    demand: Demand,
    stripes: Sequence[Stripe],
    kept: int,
    slots: int | None,
    resident: Sequence[int] | None,
) -> Placement:
    split = _split(demand, stripes, kept, slots or 1, bounded=False)
    assert split is not None  # without limits everything fits
    return _arrange(demand, stripes, split, slots or 1, resident)


def _refusal(
    demand: Demand,
    stripes: Sequence[Stripe],
    kept: int,
    slots: int | None,
    resident: Sequence[int] | None,
) -> PlanError:
    """What to say of the device that lacks most."""
    smallest = _smallest(demand, stripes, kept, slots, resident)
    shares = smallest.shares
    device = max(
        range(len(shares)), key=lambda d: shares[d].device_bytes - shares[d].device_limit_bytes
    )
    limits = [
        max(share.device_bytes, stripe.limit_bytes) if at != device else share.device_bytes
        for at, (share, stripe) in enumerate(zip(shares, stripes, strict=True))
    ]
    why = why_not(shares[device], ",".join(f"{-(-limit // 2**20)}MiB" for limit in limits))
    return PlanError(f"{stripes[device].name} {why}", smallest.device_bytes)
