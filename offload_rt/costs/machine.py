"""How long the parts of a pass take on one machine: a profile, and who computes. No torch here."""

from dataclasses import dataclass

from offload_rt.config import DraftWeights, HomeKind, RuntimeConfig
from offload_rt.device.kinds import KINDS, DeviceKind, Processor
from offload_rt.errors import ConfigError
from offload_rt.model.formats.base import ROUNDED
from offload_rt.profiling.profile import (
    HardwareProfile,
    LayerWork,
    MemoryUse,
    Number,
    Obtained,
    WeightOrder,
)
from offload_rt.profiling.rates import (
    disk_bytes_per_s,
    link_bytes_per_s,
    memory_bytes_per_s,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """What is free now; it bounds a run that was given no limit."""

    device_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What is asked of a machine.

    Attributes:
        profile: of the machine.
        processor: who computes.
        packs: whether layers that stay on the device are kept reordered (`formats/packed.py`).
        own: whether the profile was measured here; else it is a shipped one.
    """

    profile: HardwareProfile
    processor: Processor
    packs: bool
    own: bool = True

    @property
    def device(self) -> DeviceKind:
        """What a device of this kind can do."""
        return KINDS[self.processor]

    @property
    def free(self) -> FreeMemory:
        """All memory of the machine, as if nothing else ran."""
        machine = self.profile.machine
        host = machine.ram_bytes
        device = machine.gpus[0].memory_bytes if self.device.own_memory else host
        return FreeMemory(device_bytes=device, host_bytes=host)

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
        share = ROUNDED[weights].share
        fewer = LayerWork(
            weight_bytes=int(work.weight_bytes * share),
            flops_per_token=int(work.flops_per_token * share),
        )
        return fewer, self.order(resident=True)

    def order(self, *, resident: bool) -> WeightOrder:
        """How weights lie where they compute."""
        return WeightOrder.PACKED if resident and self.packs else WeightOrder.PLAIN

    def home_bytes_per_s(self, home: HomeKind, config: RuntimeConfig, block_bytes: int) -> Number:
        """How fast blocks of that size come from a home."""
        if config.link_bytes_per_s is not None and home is HomeKind.HOST:
            return Number(value=config.link_bytes_per_s, obtained=Obtained.MEASURED)
        if home is HomeKind.DISK:
            return disk_bytes_per_s(self.profile, config.readers)
        if self.device.own_memory:
            return link_bytes_per_s(self.profile, block_bytes)
        return memory_bytes_per_s(self.profile, MemoryUse.COPY, 1)


def speeds_there(profile: HardwareProfile, device: str) -> Speeds:
    """Speeds of the profile's machine: `auto` is its GPU where it has one.

    Weights are reordered where the profile has such times.

    Raises:
        ConfigError: there is no such device.
    """
    gpus = len(profile.machine.gpus)
    if device == "auto":
        return next(
            speeds_of(profile, processor)
            for processor, kind in KINDS.items()
            if gpus or not kind.own_memory
        )
    if device not in KINDS:
        raise ConfigError(
            f"--device {device} is not known to a simulation: use auto, cpu or cuda, which is the "
            "profile's first GPU"
        )
    processor = Processor(device)
    if KINDS[processor].own_memory and not gpus:
        raise ConfigError(f"--device {device}: profile {profile.name} has no GPU")
    return speeds_of(profile, processor)


def speeds_of(profile: HardwareProfile, processor: Processor) -> Speeds:
    """Speeds of one kind of device; weights are reordered where the profile has such times."""
    mine = {curve.weights for curve in profile.layers if curve.processor is processor}
    packs = KINDS[processor].packs and WeightOrder.PACKED in mine
    return Speeds(profile=profile, processor=processor, packs=packs)
