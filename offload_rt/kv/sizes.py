"""Sizes of KV caches that are not wholly on the device. No torch here.

The same records size the caches (`kv/offloaded.py`, `kv/retrieval.py`) and the plan, so that their
bytes cannot differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from offload_rt.config import DraftConfig, KVPlace, RetrievalConfig, RuntimeConfig
from offload_rt.device.base import PAGE_BYTES
from offload_rt.device.kinds import DeviceKind
from offload_rt.errors import ConfigError

# Rows gather on the device and go home this many at a time: a write for each token would be a
# small disk request per layer, and the ring would hold a stale last block after each step.
WRITE_TOKENS = 32
MIN_BLOCK_TOKENS = 512
KV_SLOTS = 4
MIN_SCRATCH_TOKENS = 32
# Rows that a build looks at in one go: so few that copies of their keys in fp32 stay in a CPU's
# cache; on a GPU, where each go is a dozen launches, a block of KV.
KEY_BLOCK = 2048
BUILD_BYTES = 32 * 2**20
# Rows on their way to a file pass through memory of this size, one per reader thread.
WRITE_PIECE_BYTES = 2**20


def block_tokens_for(row_bytes: int, device: DeviceKind) -> int:
    """Tokens of a block that is large enough for the link to be fast and the host to keep up."""
    # Copies below 1 MiB lose bandwidth on PCIe (offloading.md 4.1) and on disk (`PIECE_BYTES`). A
    # pass over 16k tokens of Qwen2.5-1.5B's KV from disk ran at 1.2, 1.0 and 0.4 GB/s with blocks
    # of 4, 2 and 0.5 MiB (2 cores; without copies 1.0 to 1.2). The host of a GPU needs 0.05
    # ms for a block, 0.15 if rows are chosen (docs/RESULTS.md, "Host time of a block of KV"), while
    # 4 MiB cross PCIe 4.0 in 0.17.
    units = device.kv_block_bytes // row_bytes // MIN_BLOCK_TOKENS
    return max(MIN_BLOCK_TOKENS, units * MIN_BLOCK_TOKENS)


def spread_layers(count: int, layers: int) -> frozenset[int]:
    """`count` layers of `layers`, evenly between the others."""
    return frozenset((2 * i + 1) * layers // (2 * count) for i in range(count))


@dataclass(frozen=True, slots=True, kw_only=True)
class KVSizes:
    """What one sequence's offloaded cache takes.

    Attributes:
        row_bytes: per layer, keys and values of one token.
        capacity: tokens there is room for.
        block_tokens: tokens that are copied at once.
        slots: device buffers for blocks.
        scratch_tokens: pending rows that stay on the device in every layer; more are a prompt.
        resident: layers whose rows stay on the device.
    """

    row_bytes: tuple[int, ...]
    capacity: int
    block_tokens: int
    slots: int = KV_SLOTS
    scratch_tokens: int = 64
    resident: frozenset[int] = frozenset()

    @property
    def offloaded(self) -> tuple[int, ...]:
        """Layers whose rows live at the home."""
        return tuple(i for i in range(len(self.row_bytes)) if i not in self.resident)

    @property
    def write_tokens(self) -> int:
        """Rows that go home at once: whole pages in every layer, at most a block."""
        pages = [PAGE_BYTES // math.gcd(PAGE_BYTES, self.row_bytes[i]) for i in self.offloaded]
        unit = math.lcm(*pages)
        return min(-(-WRITE_TOKENS // unit) * unit, self.block_tokens)

    def home_rows(self, length: int) -> int:
        """Rows at the home when `length` are committed; the others wait on the device."""
        whole = length - length % self.block_tokens
        rest = length - whole
        return whole + rest - rest % self.write_tokens

    @property
    def recent_tokens(self) -> int:
        """Rows per layer that stay on the device: those that wait for a write, and pending ones."""
        return self.write_tokens + self.scratch_tokens

    def block_stride(self, layer: int) -> int:
        """Bytes from one block of a layer to the next at the home: whole pages."""
        return -(-self.block_tokens * self.row_bytes[layer] // PAGE_BYTES) * PAGE_BYTES

    @property
    def layer_blocks(self) -> int:
        """Blocks of a layer, at most."""
        return -(-self.capacity // self.block_tokens)

    def layer_home_bytes(self, layer: int) -> int:
        """Bytes a layer takes at the home."""
        return self.layer_blocks * self.block_stride(layer)

    @property
    def home_bytes(self) -> int:
        """Bytes at the home."""
        return sum(self.layer_home_bytes(i) for i in self.offloaded)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one device block."""
        return max((self.block_stride(i) for i in self.offloaded), default=0)

    @property
    def recent_bytes(self) -> int:
        """Bytes of the rows of offloaded layers that stay on the device."""
        return self.recent_tokens * sum(self.row_bytes[i] for i in self.offloaded)

    @property
    def resident_bytes(self) -> int:
        """Bytes of the layers that stay on the device."""
        return self.capacity * sum(self.row_bytes[i] for i in self.resident)

    @property
    def device_bytes(self) -> int:
        """Device memory of this sequence: ring, recent rows, resident layers."""
        return self.slots * self.slot_bytes + self.recent_bytes + self.resident_bytes

    @property
    def staging_bytes(self) -> int:
        """Device memory for all rows of one layer while a prompt goes through it."""
        return self.capacity * max((self.row_bytes[i] for i in self.offloaded), default=0)


def shared_kv_bytes(sizes: Sequence[KVSizes], *, writers: int) -> int:
    """Device memory all sequences share.

    Args:
        sizes: of each sequence.
        writers: threads that write to a file, each through memory of its own; 0 without a file.
    """
    return max((s.staging_bytes for s in sizes), default=0) + writers * WRITE_PIECE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPlan:
    """Where the keys and values of a run live, outside the device.

    Attributes:
        place: `host` or `disk`.
        sizes: of each sequence.
        writers: threads that write to the file; 0 without one.
        attend_on_host: attend where they lie, copying nothing.
    """

    place: KVPlace
    sizes: tuple[KVSizes, ...]
    writers: int
    attend_on_host: bool

    @property
    def device_bytes(self) -> int:
        """Device memory of all sequences."""
        own = sum(sizes.device_bytes for sizes in self.sizes)
        return own + shared_kv_bytes(self.sizes, writers=self.writers)

    @property
    def host_bytes(self) -> int:
        """Host memory they take as home."""
        return sum(s.home_bytes for s in self.sizes) if self.place is KVPlace.HOST else 0

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a pass over all there is room for copies to the device."""
        return 0 if self.attend_on_host else sum(s.home_bytes for s in self.sizes)

    def of_layers(self, layers: Sequence[int]) -> "KVPlan":
        """The part of these layers, on a device of their own; there they are numbered from 0."""
        sizes = [
            replace(
                s,
                row_bytes=tuple(s.row_bytes[layer] for layer in layers),
                resident=frozenset(at for at, layer in enumerate(layers) if layer in s.resident),
            )
            for s in self.sizes
        ]
        return replace(self, sizes=tuple(sizes))

    def of_rows(self, row_bytes: Sequence[int]) -> "KVPlan":
        """The same plan for rows of the sizes the network has, at most those planned."""
        sizes = tuple(replace(s, row_bytes=tuple(row_bytes)) for s in self.sizes)
        return replace(self, sizes=sizes)


def kv_places(config: RuntimeConfig, device: DeviceKind) -> tuple[KVPlace, ...]:
    """Places to try, best first.

    Raises:
        ConfigError: the device cannot read KV from there.
    """
    if config.kv is KVPlace.DISK and not device.kv_on_disk:
        raise ConfigError("--kv disk is for --device cpu: use --kv host")
    if config.kv is not KVPlace.AUTO:
        return (config.kv,)
    return KVPlace.DEVICE, device.kv_home


def plan_kv(
    place: KVPlace,
    config: RuntimeConfig,
    device: DeviceKind,
    *,
    row_bytes: Sequence[int],
    capacities: Sequence[int],
    scratch_tokens: int,
) -> KVPlan | None:
    """Size offloaded caches; None if `place` is the device, or no layer keeps rows.

    Args:
        place: where committed rows live.
        config: choices of the user.
        device: what computes.
        row_bytes: keys and values of one token in each layer.
        capacities: KV rows of each sequence.
        scratch_tokens: rows a step may leave pending.

    Raises:
        ConfigError: a place is asked for, and no layer keeps rows.
    """
    if place in (KVPlace.DEVICE, KVPlace.NONE):
        return None
    if not any(row_bytes):
        if config.kv is KVPlace.AUTO:
            return None
        raise ConfigError(
            f"--kv {config.kv} has no effect, as no layer of this model keeps keys and values: "
            "leave it out"
        )
    emulated = config.link_bytes_per_s is not None  # a link to host memory
    attend_on_host = device.attends_at_home and place is KVPlace.HOST and not emulated
    block_tokens = config.kv_block_tokens or block_tokens_for(max(row_bytes), device)
    sizes = tuple(
        KVSizes(
            row_bytes=tuple(row_bytes),
            capacity=capacity,
            block_tokens=min(capacity, block_tokens),
            slots=0 if attend_on_host else KV_SLOTS,
            scratch_tokens=max(MIN_SCRATCH_TOKENS, scratch_tokens),
        )
        for capacity in capacities
    )
    writers = config.readers if place is KVPlace.DISK else 0
    return KVPlan(place=place, sizes=sizes, writers=writers, attend_on_host=attend_on_host)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrievalSizes:
    """What one sequence's retrieval cache takes.

    Rows of a layer, in order: the kept chunks, then the newest tokens, then pending ones.

    Attributes:
        row_bytes: per layer, keys and values of one token.
        config: budget, chunks and how often it is built.
        capacity: tokens of the longest sequence.
        scratch_tokens: spare rows for pending tokens.
    """

    row_bytes: tuple[int, ...]
    config: RetrievalConfig
    capacity: int
    scratch_tokens: int

    def max_chunks(self, recent_share: float) -> int:
        """Chunks there is room for, the pinned first one included.

        Recent tokens begin at the border of a chunk, so there are up to a chunk more of them than
        their share.
        """
        config = self.config
        recent = int(config.budget_tokens * recent_share) + config.chunk_tokens - 1
        return max(1, (config.budget_tokens - recent) // config.chunk_tokens)

    def tail_start(self, length: int, recent_share: float) -> int:
        """Where the recent tokens begin after a build at this length: at the border of a chunk."""
        config = self.config
        if length <= config.budget_tokens:
            return 0  # all of the context fits, in its own order
        chunk = config.chunk_tokens
        recent = config.budget_tokens - self.max_chunks(recent_share) * chunk - (chunk - 1)
        return (length - recent) // chunk * chunk

    @property
    def rows(self) -> int:
        """Rows of a layer; what is generated between two builds enters besides the budget."""
        between_builds = self.config.budget_tokens + self.config.rebuild_tokens
        return min(between_builds, self.capacity) + 2 * self.scratch_tokens

    @property
    def device_bytes(self) -> int:
        """Device memory of this sequence."""
        return self.rows * sum(self.row_bytes)

    def part_rows(self, *, host_computes: bool) -> int:
        """Rows of a layer that a build looks at in one go."""
        if host_computes:
            return KEY_BLOCK
        return max(KEY_BLOCK, BUILD_BYTES // max(self.row_bytes))

    def build_bytes(self, *, host_computes: bool) -> int:
        """Device memory a build allocates and frees again: rows on their way.

        On the host these are chunks that change places, else keys or values of all that is kept and
        of a part, or a part's keys in fp32.
        """
        row, kept = max(self.row_bytes), min(self.config.budget_tokens, self.capacity)
        if host_computes:
            return 4 * kept * row
        part = min(self.part_rows(host_computes=False), self.capacity)
        return max((kept + part) * row // 2, 2 * part * row)


def retrieval_sizes(draft: DraftConfig, row_bytes: Sequence[int], capacity: int) -> RetrievalSizes:
    """Size the retrieval cache of one sequence.

    Args:
        draft: how much is drafted; pending are the root, a draft, and what is drafted for it.
        row_bytes: per layer, keys and values of one token.
        capacity: tokens of the longest sequence.
    """
    return RetrievalSizes(
        row_bytes=tuple(row_bytes),
        config=draft.retrieval,
        capacity=capacity,
        scratch_tokens=1 + draft.nodes + draft.inner.nodes,
    )
