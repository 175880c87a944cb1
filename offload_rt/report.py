"""What a run measured, as records; `generate --json` prints them with these very names."""

from dataclasses import dataclass, field, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went.

    Attributes:
        load_s: building the network, reading resident layers, filling the ring.
        ttft_s: from the start of the prompt's pass to the first token; None if there is none.
        decode_s: from the first token to the last.
        s_per_token: decode time per token after the first; None when there is none.
        tokens_per_s: its inverse.
    """

    load_s: float
    ttft_s: float | None
    decode_s: float
    s_per_token: float | None
    tokens_per_s: float | None


@dataclass(slots=True, kw_only=True)
class RetrievalCounts:
    """How the drafting below TriForce's drafts went.

    Attributes:
        passes: of the target over the retrieval cache.
        drafted: tokens proposed to those passes.
        accepted: of them, tokens kept.
        builds: times the retrieval cache was built, the prompt's included.
        newest_builds: of them, how often of the newest tokens only, as a sink cache is.
    """

    passes: int = 0
    drafted: int = 0
    accepted: int = 0
    builds: int = 0
    newest_builds: int = 0

    def add(self, *, drafted: int, accepted: int) -> None:
        """Count one pass."""
        self.passes += 1
        self.drafted += drafted
        self.accepted += accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How drafting went.

    Attributes:
        passes: target passes, the prompt's included.
        drafted: tokens proposed.
        accepted: of them, tokens kept.
        acceptance_rate: accepted / drafted; None when nothing was drafted.
        tokens_per_pass: tokens emitted / passes, the prompt's pass and what it emitted left out (it
            drafts nothing); None if there was no other.
        acceptance_per_depth: for each depth of a draft, how often one was accepted there of the
            times all before it were.
        draft_s: time spent drafting; the link goes on meanwhile.
        draft_share: that time / `decode_s`; None when nothing was asked of a drafter.
        draft_link_bytes: bytes of layers and KV that crossed the link in `draft_s`.
        retrieval: with triforce, the drafting below its drafts.
        draft_sizes: tokens drafted for each sequence where up to so many took part in a pass, as
            measured times decided last; empty where the size is fixed.
    """

    drafter: str
    accept_rule: str
    passes: int
    drafted: int
    accepted: int
    acceptance_rate: float | None
    tokens_per_pass: float | None
    acceptance_per_depth: list[float]
    draft_s: float
    draft_share: float | None
    draft_link_bytes: int
    retrieval: RetrievalCounts | None = None
    draft_sizes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What crossed the link. Rates and overlap are those of the layers, without the KV cache.

    Attributes:
        bytes_total: all bytes that arrived from the first pass to the end of the last: layers,
            those fetched ahead included, and `kv_bytes_total`.
        kv_bytes_total: of them, keys and values of an offloaded KV cache, written to its home or
            read back (not those attended to where they are); 0 where the cache is on the device.
        bytes_per_pass: bytes of the streamed layers; where experts come one by one, the mean of
            the passes that `achieved_bytes_per_s` is of.
        achieved_bytes_per_s: bytes of the decode passes over their time (of the prompt's pass when
            there was no other).
        link_bytes_per_s: bytes of layers that arrived over the time in which at least one of their
            copies was in flight.
        stall_s: time computation waited for copies.
        overlap_ratio: of the time that copying and computing could have run side by side, the part
            in which they did: (copying + computing - wall) / min(copying, computing).
    """

    bytes_total: int
    kv_bytes_total: int
    bytes_per_pass: int
    achieved_bytes_per_s: float
    link_bytes_per_s: float
    stall_s: float
    overlap_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """What was where on one of several devices.

    Attributes:
        name: as in --device.
        peak_bytes: what the run used at most; None where devices share their memory.
        link_bytes: of layers that arrived, those fetched ahead included.
    """

    name: str
    limit_bytes: int
    planned_bytes: int
    peak_bytes: int | None
    resident_layers: int
    streamed_layers: int
    link_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What was where.

    Attributes:
        device_limit_bytes: what the run was allowed.
        device_planned_bytes: what the placement counted on.
        device_peak_bytes: what it used at most; on CPU the growth of the process from the moment
            the device was opened.
        device_reserved_bytes: what the allocator had taken of it at most, used or not.
        device_driver_bytes: what the GPU's driver counts for this process, its context included;
            None where there is no such count.
        host_pinned_bytes: of host memory that a GPU reads directly.
        host_unpinned_bytes: of it, that was to be pinned and was refused: copied once more.
        pin_refusal: why; empty if nothing was refused.
        host_peak_bytes: peak of the whole process, imports and tokenizer included.
        ledger: bytes of everything that was allocated once, by purpose.
        devices: of several, each; the numbers above are of all together.
    """

    device_limit_bytes: int
    device_planned_bytes: int
    device_peak_bytes: int
    device_reserved_bytes: int
    device_driver_bytes: int | None
    host_pinned_bytes: int
    host_unpinned_bytes: int
    pin_refusal: str
    host_peak_bytes: int
    resident_layers: int
    streamed_layers: int
    slots: int
    slot_bytes: int
    ledger: dict[str, int]
    devices: tuple[DeviceMemory, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantising:
    """Who turns quantised weights into those that compute.

    Attributes:
        decoder: `llvmlite 0.48.0`, which multiplies with them as they are stored, `numba 0.68.1`,
            `triton`, `torch` (`numpy` for bf16 in codes), or several with commas where some weights
            suit no kernel.
        warm_s: seconds it took to compile kernels or to load those that were kept.
        compiled: kernels that were compiled then, not loaded.
    """

    decoder: str
    warm_s: float = 0.0
    compiled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertUse:
    """How experts came that are streamed one by one: in decode passes, unless it says prompt.

    Attributes:
        slots: device buffers for them, of `slot_bytes` each.
        experts: of all layers.
        per_token: of a layer, that a token is sent to.
        hits: experts that were there when a layer asked for them.
        misses: experts that were asked for and had to be copied.
        ahead: of these, those whose copy began before their layer asked.
        on_host: of the misses, those that the processor computed where they lie; they were copied
            afterwards, as far as the link had time (`--expert-misses`).
        unused: others that were copied ahead, and given up before any layer asked;
            `unused_bytes` of them had begun to be copied, and of what the processor computed and
            no layer asked for again in time.
        filled: of all hits, prompts' too, those that slots were filled with when the model was
            loaded, before anybody asked. `filled_bytes` were copied so since then; bytes of a
            pass or a token leave them out, the link's own totals have them.
        host_bytes: of experts that were copied, from host memory; `file_bytes` from files.
        looked_ahead: share of the passes that foresaw what their next layers would ask for
            (`--look-ahead`).
        hit_rate: hits / (hits + misses); None when nothing was asked for.
        union: different experts that a layer asked for in a pass, on average.
        bytes_per_token: copied, for each emitted token.
        prompt_misses: misses of the prompt's pass, of `prompt_asked`; `prompt_ahead` and
            `prompt_unused` are as above.
        distances: of all passes of one row so far but prompts', how often an expert was asked for
            that was the n-th most recently used of its layer, counted from 0; last of those not
            used before, but for those that slots were filled with: these come behind all used ones.
            Those before the n-th are the hits of n slots a layer.
    """

    slots: int
    slot_bytes: int
    experts: int
    per_token: int
    hits: int
    misses: int
    ahead: int
    on_host: int
    unused: int
    unused_bytes: int
    filled: int
    filled_bytes: int
    host_bytes: int
    file_bytes: int
    looked_ahead: float
    hit_rate: float | None
    union: float | None
    bytes_per_token: float | None
    prompt_misses: int
    prompt_asked: int
    prompt_ahead: int
    prompt_unused: int
    distances: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exactness:
    """Whether a row's logits are the same bits in any pass (`--exact`).

    Attributes:
        rows: products see multiples of so many rows, or give the bits of such; None: it is off.
        key_block: columns of keys that attention takes together; None: it is off.
        prompt: rows of prompts are of the same class as those of answers.
        why: the reason that it is off; None: it is on.
    """

    rows: int | None = None
    key_block: int | None = None
    prompt: bool = False
    why: str | None = None

    @property
    def on(self) -> bool:
        """Whether it is."""
        return self.why is None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunReport:
    """Everything measured in one run of the engine.

    Attributes:
        dequantising: of the model's weights; None where they are not quantised.
        experts: how those came that are streamed one by one; None where layers are whole.
        exact: whether drafting, and the cut of a text into passes, changed no bit.
    """

    timings: Timings
    speculation: Speculation
    transfer: Transfer
    memory: Memory
    dequantising: Dequantising | None = None
    experts: ExpertUse | None = None
    exact: Exactness = Exactness(why="nobody asked")


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Running totals of a device at one moment; a phase is the difference of two.

    Attributes:
        at_s: clock.
        bytes_copied: bytes of layers that arrived.
        kv_bytes_copied: bytes of the KV cache that arrived, at its home or back from there.
        busy_s: time with a copy in flight.
        stalled_s: time computation waited.
        expert_hits: experts that were there when a layer asked for them.
        expert_misses: experts that were asked for and had to come.
        expert_ahead: of these, those whose copy began before a layer asked.
        expert_on_host: of the misses, those that the host computed.
        expert_unused: experts that came ahead and were given up before a layer asked.
        expert_unused_bytes: of these, that had begun to be copied.
        expert_host_bytes: of experts that were copied, from host memory; `expert_file_bytes` from
            files.
        expert_filled: of the hits, those that slots were filled with when the model was loaded.
        expert_filled_bytes: of `bytes_copied`, what slots were filled with so.
        expert_calls: times a layer asked.
    """

    at_s: float
    bytes_copied: int
    kv_bytes_copied: int
    busy_s: float
    stalled_s: float
    expert_hits: int = 0
    expert_misses: int = 0
    expert_ahead: int = 0
    expert_on_host: int = 0
    expert_unused: int = 0
    expert_unused_bytes: int = 0
    expert_host_bytes: int = 0
    expert_file_bytes: int = 0
    expert_filled: int = 0
    expert_filled_bytes: int = 0
    expert_calls: int = 0

    def since(self, start: "Counters") -> "Counters":
        """The phase from `start` to here."""
        each = {f.name: getattr(self, f.name) - getattr(start, f.name) for f in fields(self)}
        return Counters(**each)


def overlap_ratio(phase: Counters) -> float:
    """Of the time copying and computing could have shared, the part they did."""
    computing_s = phase.at_s - phase.stalled_s
    possible_s = min(phase.busy_s, computing_s)
    if possible_s <= 0.0:
        return 0.0
    return min(1.0, max(0.0, (phase.busy_s + computing_s - phase.at_s) / possible_s))
