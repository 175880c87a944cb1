"""How long the parts of a pass take on one machine: a profile, and who computes. No torch here."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from offload_rt.config import DraftWeights, HomeKind, RuntimeConfig
from offload_rt.device.base import STAGED_STREAMS, STAGING_BYTES
from offload_rt.device.kinds import KINDS, DeviceKind, Processor, named_devices, sharing
from offload_rt.errors import ConfigError
from offload_rt.model.formats.base import ROUNDED
from offload_rt.model.formats.stored import FOURS_PER_CORE, Stored, multiplies_fours
from offload_rt.profiling.decoding import decoded_per_s
from offload_rt.profiling.profile import (
    Decoder,
    HardwareProfile,
    LayerWork,
    LinkLoad,
    MemoryUse,
    Number,
    Obtained,
    WeightOrder,
)
from offload_rt.profiling.rates import (
    disk_bytes_per_s,
    link_bytes_per_s,
    memory_bytes_per_s,
    plain_bytes_per_s,
)

_NUMBER_BYTES = 2  # of a dequantised weight


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeMemory:
    """What is free now; it bounds a run that was given no limit.

    Attributes:
        device_bytes: on the device, or the first of several.
        further_bytes: on each of the others.
        further_host_bytes: of host memory, where each of the others is on a machine of its own.
    """

    device_bytes: int
    host_bytes: int
    further_bytes: tuple[int, ...] = ()
    further_host_bytes: tuple[int, ...] = ()

    @property
    def devices(self) -> tuple[int, ...]:
        """Of each device."""
        return self.device_bytes, *self.further_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """How many times as long as its profile says a machine takes just now.

    Attributes:
        reading: for copies.
        computing: for all else.
    """

    reading: float = 1.0
    computing: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What is asked of a machine.

    Attributes:
        profile: of the machine.
        processor: who computes.
        packs: whether layers that stay on the device are kept reordered (`formats/packed.py`).
        left_plain: shapes, outputs and inputs, of weights that are not where passes need not be
            row-invariant, as their products would have other bits.
        own: whether the profile was measured here; else it is a shipped one.
        levels: by which predicted seconds are corrected.
        devices: by number, those that have the layers in turn.
        further: of further machines that have layers in turn with this one, on a device each.
        network: bytes a second between those, and the seconds of a message.
    """

    profile: HardwareProfile
    processor: Processor
    packs: bool
    left_plain: frozenset[tuple[int, int]] = frozenset()
    own: bool = True
    levels: Levels = Levels()
    devices: tuple[int, ...] = (0,)
    further: "tuple[Speeds, ...]" = ()
    network: tuple[float, float] = (0.0, 0.0)

    @property
    def device(self) -> DeviceKind:
        """What a device of this kind can do."""
        return KINDS[self.processor]

    @property
    def free(self) -> FreeMemory:
        """All memory of the machine, as if nothing else ran."""
        machine = self.profile.machine
        host, count = machine.ram_bytes, len(self.devices)
        if not self.device.own_memory:
            first, *others = [host // count] * count
        else:
            first, *others = (machine.gpus[index].memory_bytes for index in self.devices)
        return FreeMemory(device_bytes=first, host_bytes=host, further_bytes=tuple(others))

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

    def home_bytes_per_s(
        self, home: HomeKind, config: RuntimeConfig, block_bytes: int, host_bytes: int = 0
    ) -> tuple[Number, ...]:
        """How fast blocks of that size come to each device from a home, while others are fed too.

        What comes from a disk is shared by all that it is read for. Of `host_bytes` in host memory
        some may be more than can be pinned (`pinned_bytes`).
        """
        if self.further:
            nodes, parts = (replace(self, further=()), *self.further), config.each_device()
            return tuple(
                node.home_bytes_per_s(home, part, block_bytes, host_bytes // len(nodes))[0]
                for node, part in zip(nodes, parts, strict=True)
            )
        count = len(self.devices)
        if home is HomeKind.DISK:
            disk = disk_bytes_per_s(self.profile, config.readers)
            return (replace(disk, value=disk.value / count),) * count
        found = []
        for index, one in zip(self.devices, config.each_device(), strict=True):
            if (rate := one.only_link_bytes_per_s) is not None:
                found.append(Number(value=rate, obtained=Obtained.MEASURED))
            elif self.device.own_memory:
                link = self.link_bytes_per_s(block_bytes, index)
                found.append(self._through_staging(link, config, host_bytes))
            else:
                found.append(memory_bytes_per_s(self.profile, MemoryUse.COPY, 1))
        return tuple(found)

    def link_bytes_per_s(self, block_bytes: int, index: int) -> Number:
        """How fast blocks of that size cross a GPU's link, while those of the others are busy."""
        load = LinkLoad.TOGETHER if len(self.devices) > 1 else LinkLoad.ALONE
        pinned = any(link.pinned for link in self.profile.links)
        if not pinned:  # it was refused when the links were measured
            load = LinkLoad.ALONE
        return link_bytes_per_s(self.profile, block_bytes, gpu=index, pinned=pinned, load=load)

    def products_bytes_per_s(
        self, link_bytes_per_s: float, stored: Iterable[Stored], threads: int | None = None
    ) -> float:
        """How fast the processor multiplies few rows with experts in host memory.

        It reads what the memory gives beside a GPU's link, which is assumed: no product was timed.
        Plain weights are no faster than the fastest layer in the profile. Quantised ones are as
        fast as the slowest of them: as its product, or as dequantising it and the plain product.

        Args:
            link_bytes_per_s: of the memory, that the link has.
            stored: their quantised weights; none: they are as they compute.
            threads: that compute; None: as many as there are cores.
        """
        all_cores = self.profile.machine.cores
        cores = min(all_cores, threads or all_cores)
        share = cores / all_cores  # of what all of them are timed to do
        read = memory_bytes_per_s(self.profile, MemoryUse.READ, cores).value
        rate = max(read - link_bytes_per_s, read / 2)
        timed = plain_bytes_per_s(self.profile, Processor.CPU)
        plain = rate if timed is None else min(rate, timed * share)
        found = dict[tuple[object, ...], float]()
        for each in stored:
            kind = each.form, each.bits, each.block, each.nbytes, each.numbers
            if kind in found:
                continue
            if multiplies_fours(each):
                number_s = 1 / (cores * FOURS_PER_CORE)
            else:
                decoded = decoded_per_s(
                    self.profile, Processor.CPU, Decoder.TORCH, each.form, each.bits
                )
                number_s = 1 / (decoded.value * share) + _NUMBER_BYTES / plain
            found[kind] = min(rate, each.nbytes / each.numbers / number_s)
        return min(found.values(), default=plain)

    def pinned_bytes(self, config: RuntimeConfig, host_bytes: int) -> int:
        """How much of what lives in host memory a GPU can read directly.

        The profile knows what the system pins at most; staging buffers are pinned first.
        """
        pinning = self.profile.pinning
        if not self.device.own_memory or pinning is None or pinning.most_bytes is None:
            return host_bytes
        staging = 2 * STAGED_STREAMS * (config.readers + 1) * STAGING_BYTES
        return min(host_bytes, max(0, pinning.most_bytes - len(self.devices) * staging))

    def _through_staging(self, link: Number, config: RuntimeConfig, host_bytes: int) -> Number:
        """The rate of a link when what is not pinned is first copied by the reading threads."""
        pinned = self.pinned_bytes(config, host_bytes)
        if pinned == host_bytes:
            return link
        copied = memory_bytes_per_s(self.profile, MemoryUse.COPY, config.readers)
        slower = min(link, copied, key=lambda rate: rate.value)
        seconds = pinned / link.value + (host_bytes - pinned) / slower.value
        return replace(slower, value=host_bytes / seconds)


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
    several = "," in device
    if device not in KINDS and not several:
        raise ConfigError(
            f"--device {device} is not known to a simulation: use auto, cpu or cuda, which is the "
            "profile's first GPU, or several as cuda:0,cuda:1"
        )
    kind, indices = named_devices(device)
    if kind.own_memory and not gpus:
        raise ConfigError(f"--device {device}: profile {profile.name} has no GPU")
    if kind.own_memory and max(indices) >= gpus:
        one = "one GPU" if gpus == 1 else f"{gpus} GPUs"
        raise ConfigError(f"--device {device}: profile {profile.name} has {one}")
    return speeds_of(profile, kind.processor, sharing(device))


def speeds_of(
    profile: HardwareProfile, processor: Processor, devices: tuple[int, ...] = (0,)
) -> Speeds:
    """Speeds of one kind of device; weights are reordered where the profile has such times."""
    mine = {curve.weights for curve in profile.layers if curve.processor is processor}
    packs = KINDS[processor].packs and WeightOrder.PACKED in mine
    return Speeds(profile=profile, processor=processor, packs=packs, devices=devices)
