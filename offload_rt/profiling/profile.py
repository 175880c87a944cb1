"""What the parts of one machine can do, and how each number is known. No torch here.

A profile is one JSON file whose keys are the fields below, units in their names. The planner looks
numbers up through `rates.py`; `store.py` reads and writes files, `codec.py` checks what it reads.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from offload_rt.device.kinds import Processor

SCHEMA_VERSION = 1


class Obtained(StrEnum):
    """How a number is known, best first."""

    MEASURED = "measured"
    PUBLISHED = "published"
    ASSUMED = "assumed"


class Direction(StrEnum):
    """The way bytes cross a link."""

    H2D = "h2d"
    D2H = "d2h"


class LinkLoad(StrEnum):
    """What else the machine does while a link is used.

    `together`: all GPUs copy at once, and the number is that of each. `cpu_busy`: every core copies
    memory meanwhile.
    """

    ALONE = "alone"
    TOGETHER = "together"
    CPU_BUSY = "cpu_busy"


class MemoryUse(StrEnum):
    """What is done with host memory: only read it, or copy it (bytes copied, not bytes moved)."""

    READ = "read"
    COPY = "copy"


class Decoder(StrEnum):
    """What dequantises weights: torch's operations, or kernels compiled for the processor.

    Of a CPU numba compiles them, and without it numpy decodes codes of bf16; of a GPU Triton does.
    """

    TORCH = "torch"
    COMPILED = "compiled"


class WeightOrder(StrEnum):
    """How a layer's weights lie: as in the checkpoint, reordered, or rounded.

    See `packed.py` and `rounded.py` in `model/formats/`; a rounded layer's shape still tells the
    bytes of what was rounded.
    """

    PLAIN = "plain"
    PACKED = "packed"
    INT8 = "int8"
    INT4 = "int4"


def _up_to(most: float, least: float = 1) -> Any:  # noqa: ANN401 - a field may have any type
    """A number that is checked when a profile is read."""
    return field(metadata={"least": least, "most": most})


_BYTES = 2**50
_BYTES_PER_S = 10e12  # ten times the HBM of 2026; no link or disk comes near
_COUNT = 2**24


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One number; the unit is in the name of the field that holds it.

    Attributes:
        value: what the hardware does undisturbed, if measured: by the lower decile of the times.
        spread: difference between the quartiles of the samples, in the unit of `value`.
        samples: how many were measured.
        source: where a published number is from, why an assumed one is reasonable, how a measured
            one was repaired.
    """

    value: float
    obtained: Obtained
    spread: float | None = None
    samples: int = field(default=0, metadata={"least": 0, "most": _COUNT})
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Versions:
    """What the numbers were measured with; empty where that is not installed or not known."""

    offload_rt: str = ""
    python: str = ""
    torch: str = ""
    transformers: str = ""
    driver: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuIdentity:
    """One GPU and its link.

    Attributes:
        link_generation: of PCIe, read while bytes crossed it: an idle link shows a lower one.
        link_width: PCIe lanes in use; 0 (of both) when the driver does not say.
    """

    name: str
    memory_bytes: int = _up_to(_BYTES)
    link_generation: int = field(default=0, metadata={"least": 0, "most": 16})
    link_width: int = field(default=0, metadata={"least": 0, "most": 64})


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the numbers belong to.

    Attributes:
        cores: threads that compute: those this process may use, within its cgroup's quota.
        kernels: there are some that multiply bf16 with weights as they are stored
            (`kernels/stored.py`); None: that is not known.
        matrix_registers: torch multiplies bf16 in them, in another order than those kernels, which
            multiply in row-invariant passes only.
    """

    cpu: str
    cores: int = _up_to(_COUNT)
    ram_bytes: int = _up_to(_BYTES)
    kernels: bool | None = None
    matrix_registers: bool = False
    gpus: tuple[GpuIdentity, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """Copies of one block size between host memory and a GPU.

    Attributes:
        pinned: the host memory is page-locked.
    """

    gpu: int = _up_to(63, least=0)
    direction: Direction
    pinned: bool
    load: LinkLoad
    block_bytes: int = _up_to(_BYTES)
    bytes_per_s: Number = _up_to(_BYTES_PER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """Reads of one block size at one queue depth.

    Attributes:
        direct: past the page cache (O_DIRECT).
    """

    file_system: str
    direct: bool
    block_bytes: int = _up_to(_BYTES)
    queue_depth: int = _up_to(_COUNT)
    bytes_per_s: Number = _up_to(_BYTES_PER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySpeed:
    """Bandwidth of host memory with a number of threads."""

    use: MemoryUse
    threads: int = _up_to(_COUNT)
    block_bytes: int = _up_to(_BYTES)
    bytes_per_s: Number = _up_to(_BYTES_PER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class PinSpeed:
    """Page-locking of host memory that was touched before.

    Attributes:
        block_bytes: locked at once.
        most_bytes: that could be locked together; None if as much as was tried.
    """

    block_bytes: int = _up_to(_BYTES)
    bytes_per_s: Number = _up_to(_BYTES_PER_S)
    most_bytes: int | None = field(default=None, metadata={"least": 0, "most": _BYTES})


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """What one token asks of a decoder layer, attention to past tokens not counted.

    Attributes:
        weight_bytes: read once per pass, whatever the number of tokens.
        flops_per_token: two per weight that is used.
    """

    weight_bytes: int
    flops_per_token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """A decoder layer as Llama's: four attention projections and a gated MLP."""

    hidden: int = _up_to(_COUNT)
    intermediate: int = _up_to(_COUNT)
    heads: int = _up_to(_COUNT)
    kv_heads: int = _up_to(_COUNT)
    head_dim: int = _up_to(_COUNT)
    dtype: str
    weight_bytes: int = _up_to(_BYTES)

    @property
    def work(self) -> LayerWork:
        """What the layer costs to compute."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        weights = attention + 3 * self.hidden * self.intermediate
        return LayerWork(weight_bytes=self.weight_bytes, flops_per_token=2 * weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTime:
    """Seconds of one pass through a layer."""

    tokens: int = _up_to(_COUNT)
    layer_s: Number = _up_to(3600)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCurve:
    """The verify curve of one layer: its time by tokens in the pass, weights where they compute."""

    processor: Processor
    weights: WeightOrder
    shape: LayerShape
    times: tuple[LayerTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedCurve:
    """The same of a layer within a recorded pass (`runner/static.py`): no kernel is launched."""

    processor: Processor
    weights: WeightOrder
    shape: LayerShape
    times: tuple[LayerTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayTime:
    """A recorded pass beside its layers.

    Attributes:
        processor: that makes it.
        replay_s: its upload, its launch, and until the host knows that it ended.
    """

    processor: Processor
    replay_s: Number = _up_to(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadCurve:
    """An output head's time by rows, weights where they compute: one matrix, wide and shallow."""

    processor: Processor
    weights: WeightOrder = WeightOrder.PLAIN
    weight_bytes: int = _up_to(_BYTES)
    times: tuple[LayerTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCurve:
    """An expert's time by the rows it is sent, with weights that no cache has.

    Its part of all that a layer does with its experts is in it.

    Attributes:
        exact: that of row-invariant passes (`model/exact.py`).
        few_rows: up to so many rows kernels multiplied, though passes need not be row-invariant; 0:
            torch did with any number; None: passes are row-invariant, or the profile is from before
            kernels could (`decoding.times_old_experts`).
        weight_bytes: of its matrices: gate, up and down.
    """

    processor: Processor
    exact: bool = False
    few_rows: int | None = field(default=None, metadata={"least": 0, "most": _COUNT})
    weight_bytes: int = _up_to(_BYTES)
    times: tuple[LayerTime, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpeed:
    """Quantised weights that become numbers of 16 bits, by all threads together.

    Attributes:
        form: how they are stored (`Form` of `model/formats/methods.py`).
        bits: of one.
        numbers_per_s: weights in a second.
    """

    processor: Processor
    decoder: Decoder
    form: str
    bits: int = _up_to(64)
    numbers_per_s: Number = _up_to(_BYTES_PER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSlowdown:
    """How much longer a CPU takes for a layer while the disk is read.

    What is read goes through the memory that computing reads, and its interrupts through the cores.

    Attributes:
        weights: how they lie.
        tokens: in the pass.
        factor: seconds beside reads over seconds alone, 1 or more.
    """

    weights: WeightOrder = WeightOrder.PLAIN
    weight_bytes: int = _up_to(_BYTES)
    tokens: int = _up_to(_COUNT)
    factor: Number = _up_to(1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadSlowdown:
    """How much longer reads from the disk take while a CPU computes.

    Attributes:
        factor: seconds beside a layer over seconds alone, 1 or more.
    """

    factor: Number = _up_to(1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpeed:
    """Attention of some query rows to cached keys and values of one layer.

    Attributes:
        kv_bytes: keys and values attended to.
        queries_per_head: query heads per KV head; each reads the same bytes.
        exact: that of row-invariant passes (`attention/exact.py`).
    """

    processor: Processor
    query_tokens: int = _up_to(_COUNT)
    queries_per_head: int = _up_to(_COUNT)
    kv_bytes: int = _up_to(_BYTES)
    s_per_kv_byte: Number = _up_to(1e-3)
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareProfile:
    """One machine.

    Attributes:
        name: that of its file.
        date: ISO 8601 day.
        method: a sentence on how the numbers came about.
        notes: what could not be measured, and why.
        pinning: None on a machine without a GPU.
        layers_exact: of the CPU, layers and heads were timed as in row-invariant passes.
        heads: empty where none was measured: they then count as layers of their size.
        experts: empty where none was measured: they then count as parts of their layers.
        recorded: layers of recorded passes; empty where none was measured: then what is left of
            `layers` without launches is assumed.
        replays: one for each processor whose passes are recorded; likewise.
        beside_disk: empty where it was not measured: computing then is as fast as alone.
        beside_computing: None where it was not measured: reads then are as fast as alone.
        dequantising: empty where it was not measured: it then takes what is assumed.
    """

    schema_version: int = _up_to(_COUNT)
    name: str
    date: str
    method: str
    notes: tuple[str, ...] = ()
    versions: Versions
    machine: Machine
    links: tuple[LinkSpeed, ...] = ()
    disk: tuple[DiskSpeed, ...] = ()
    host_memory: tuple[MemorySpeed, ...] = ()
    pinning: PinSpeed | None = None
    layers: tuple[LayerCurve, ...] = ()
    layers_exact: bool = False
    heads: tuple[HeadCurve, ...] = ()
    experts: tuple[ExpertCurve, ...] = ()
    recorded: tuple[RecordedCurve, ...] = ()
    replays: tuple[ReplayTime, ...] = ()
    beside_disk: tuple[DiskSlowdown, ...] = ()
    beside_computing: ReadSlowdown | None = None
    dequantising: tuple[DecodeSpeed, ...] = ()
    attention: tuple[AttentionSpeed, ...] = ()
