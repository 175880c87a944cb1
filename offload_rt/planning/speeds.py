"""How long the parts of a pass take on one machine: a profile, and who computes. No torch here."""

from dataclasses import dataclass

from offload_rt.config import DraftWeights, HomeKind, RuntimeConfig
from offload_rt.profiling.profile import (
    HardwareProfile,
    LayerWork,
    MemoryUse,
    Number,
    Obtained,
    Processor,
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
        packs: whether layers that stay on the device are kept reordered (`model/packed.py`).
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
        if self.processor is Processor.CUDA:
            return link_bytes_per_s(self.profile, block_bytes)
        return memory_bytes_per_s(self.profile, MemoryUse.COPY, 1)
