"""How long the parts of a pass take on one machine: a profile, and who computes. No torch here."""

from dataclasses import dataclass

from offload_rt.config import DraftWeights, HomeKind, RuntimeConfig
from offload_rt.device.kinds import KINDS, DeviceKind, Processor
from offload_rt.errors import ConfigError
from offload_rt.profiling.profile import (
    HardwareProfile,
    LayerWork,
    MemoryUse,
    Number,
    Obtained,
    WeightOrder,
)
from offload_rt.profiling.rates import (
    attention_s,
    disk_bytes_per_s,
    layer_s,
    link_bytes_per_s,
    memory_bytes_per_s,
)

_ROUNDED_SHARE = {DraftWeights.INT8: 0.5, DraftWeights.INT4: 0.3}  # of the bytes of 16-bit weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What the planner asks.

    Attributes:
        profile: of the machine.
        processor: who computes.
        packs: whether layers that stay on the device are kept reordered (`formats/packed.py`).
        own: whether the profile was measured here, or stands in for one that was not.
    """

    profile: HardwareProfile
    processor: Processor
    packs: bool
    own: bool = True

    def layer_s(self, work: LayerWork, tokens: int, *, resident: bool) -> Number:
        """Time of `tokens` through a layer; one that stays on the device may be reordered."""
        order = self.order(resident=resident)
        return layer_s(self.profile, work, tokens, processor=self.processor, weights=order)

    def draft_layer_s(self, work: LayerWork, tokens: int, weights: DraftWeights) -> Number:
        """Time of `tokens` through a layer of a draft model."""
        work, order = self.draft_work(work, weights)
        return layer_s(self.profile, work, tokens, processor=self.processor, weights=order)

    def draft_work(self, work: LayerWork, weights: DraftWeights) -> tuple[LayerWork, WeightOrder]:
        """What a layer of a draft model costs, and in which of the timed orders.

        Args:
            work: that of the unrounded weights.
            weights: how they are kept. Where those were not timed they count as fewer bytes.
        """
        if weights is DraftWeights.SAME:
            return work, self.order(resident=True)
        timed = {c.weights for c in self.profile.layers if c.processor is self.processor}
        if (order := WeightOrder(weights)) in timed:
            return work, order
        share = _ROUNDED_SHARE[weights]
        fewer = LayerWork(
            weight_bytes=int(work.weight_bytes * share),
            flops_per_token=int(work.flops_per_token * share),
        )
        return fewer, self.order(resident=True)

    def order(self, *, resident: bool) -> WeightOrder:
        """How weights lie where they compute."""
        return WeightOrder.PACKED if resident and self.packs else WeightOrder.PLAIN

    def attention_s(self, kv_bytes: int, tokens: int) -> Number:
        """Time of attention from `tokens` rows to keys and values on the device."""
        return attention_s(self.profile, kv_bytes, tokens, processor=self.processor)

    def home_bytes_per_s(self, home: HomeKind, config: RuntimeConfig, block_bytes: int) -> Number:
        """How fast blocks of that size come from a home."""
        if config.link_bytes_per_s is not None and home is HomeKind.HOST:
            return Number(value=config.link_bytes_per_s, obtained=Obtained.MEASURED)
        if home is HomeKind.DISK:
            return disk_bytes_per_s(self.profile, config.readers)
        if KINDS[self.processor].own_memory:
            return link_bytes_per_s(self.profile, block_bytes)
        return memory_bytes_per_s(self.profile, MemoryUse.COPY, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """What is free now; it bounds a run that was given no limit."""

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Where a run would take place.

    Attributes:
        profile: of the machine.
        processor: that computes.
    """

    profile: HardwareProfile
    processor: Processor

    @property
    def device(self) -> DeviceKind:
        """What a device of this kind can do."""
        return KINDS[self.processor]

    @property
    def speeds(self) -> Speeds:
        """How long parts of a pass take; weights are reordered where the profile has such times."""
        curves = self.profile.layers
        mine = {curve.weights for curve in curves if curve.processor is self.processor}
        packs = self.device.packs and WeightOrder.PACKED in mine
        return Speeds(profile=self.profile, processor=self.processor, packs=packs)

    @property
    def free(self) -> FreeMemory:
        """All memory of the machine, as if nothing else ran."""
        machine = self.profile.machine
        host = machine.ram_bytes
        device = machine.gpus[0].memory_bytes if self.device.own_memory else host
        return FreeMemory(device_bytes=device, host_bytes=host)


def seat_for(profile: HardwareProfile, device: str) -> Seat:
    """Choose what computes: `auto` is the GPU where the profile has one.

    Raises:
        ConfigError: there is no such device.
    """
    gpus = len(profile.machine.gpus)
    if device == "cpu" or (device == "auto" and not gpus):
        return Seat(profile=profile, processor=Processor.CPU)
    if device not in ("auto", "cuda"):
        raise ConfigError(
            f"--device {device} is not known to a simulation: use auto, cpu or cuda, which is the "
            "profile's first GPU"
        )
    if not gpus:
        raise ConfigError(f"--device cuda: profile {profile.name} has no GPU")
    return Seat(profile=profile, processor=Processor.CUDA)
