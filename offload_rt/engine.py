"""The engine: prefill, then one pass per step for every active sequence.

    run = engine.start(prompts, sampling, generation)
    run.prefill()
    while run.active:
        run.step()

Each call returns the tokens it emitted. Whoever reads them may end a sequence (`finish`), as a stop
string does.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from offload_rt.config import GenerationConfig, HomeKind, RuntimeConfig, SamplingConfig
from offload_rt.device.base import Device, HomeSource
from offload_rt.device.cpu import CpuDevice, allocate_host
from offload_rt.device.cuda import CudaDevice, TorchDriver
from offload_rt.device.host import free_memory_bytes, peak_rss_bytes
from offload_rt.errors import CapacityError, CheckpointError, ConfigError
from offload_rt.kv.resident import ResidentKV
from offload_rt.model.attention import Segment
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.layout import Packing
from offload_rt.model.network import Network, TokenBatch
from offload_rt.planning.demand import kv_bytes_per_token
from offload_rt.planning.run import FreeMemory, place_run
from offload_rt.report import (
    Counters,
    Memory,
    RunReport,
    Speculation,
    Timings,
    Transfer,
    overlap_ratio,
)
from offload_rt.sampling import make_generator, next_tokens
from offload_rt.streaming.files import FileSource, WeightFiles
from offload_rt.streaming.home import HostSource, LayerStore


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(slots=True)
class SequenceState:
    """One sequence of a run.

    Attributes:
        index: its place among the prompts.
        ids: prompt and emitted tokens.
        prompt_tokens: how many of them are the prompt's.
        max_tokens: emitted tokens at which it ends.
        finish_reason: None while it is active.
    """

    index: int
    ids: list[int]
    prompt_tokens: int
    max_tokens: int
    generator: torch.Generator
    finish_reason: FinishReason | None = None

    @property
    def emitted(self) -> list[int]:
        """Tokens generated so far."""
        return self.ids[self.prompt_tokens :]

    def finish(self, reason: FinishReason) -> None:
        """End the sequence; it takes part in no further pass."""
        self.finish_reason = self.finish_reason or reason


@dataclass(frozen=True, slots=True)
class Emitted:
    """Tokens one sequence gained in a pass."""

    sequence: SequenceState
    token_ids: list[int]


class Engine:
    """A model on a device, ready to generate.

    Args:
        checkpoint: headers of the model.
        config: where it runs and what it may use.
        capacities: KV rows to set aside, one number per sequence that runs at once.
        prompt_tokens: tokens of the largest prompt pass, all sequences together.
        on_placed: called once what lives where is decided, before weights are read; `load_bytes`
            and the device's `load` statistics then tell how far reading is.

    Raises:
        PlanError: it does not fit the limits.
        CheckpointError: the files cannot be used.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: RuntimeConfig,
        *,
        capacities: Sequence[int],
        prompt_tokens: int,
        on_placed: Callable[["Engine"], None] | None = None,
    ) -> None:
        start = time.perf_counter()
        self.checkpoint, self.config = checkpoint, config
        self._files = WeightFiles(checkpoint.files)
        with ExitStack() as undo:
            undo.callback(self._files.close)
            self.device, packing = open_device(config)
            undo.callback(self.device.close)
            free = FreeMemory(device_bytes=self.device.free_bytes(), host_bytes=free_memory_bytes())
            self.placement = place_run(
                checkpoint,
                config,
                packing,
                capacities=capacities,
                prompt_tokens=prompt_tokens,
                free=free,
            )
            if on_placed is not None:
                on_placed(self)
            self.network = Network(checkpoint, config.dtype, packing)
            self._store = self._load_weights()
            self._caches = self._allocate_caches(capacities)
            self._resources = undo.pop_all()
        self._cached_ids: list[list[int]] = [[] for _ in capacities]
        self.load_s = time.perf_counter() - start

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        generation: GenerationConfig,
        end_tokens: frozenset[int] = frozenset(),
    ) -> "Run":
        """Begin to answer prompts, all at once.

        Args:
            prompts: token ids, one list per sequence.
            sampling: how tokens are drawn; its seed must be set unless it is greedy.
            generation: when answers end.
            end_tokens: tokens that end an answer.

        Raises:
            CapacityError: a prompt is longer than its KV cache.
        """
        if len(prompts) > len(self._caches):
            raise CapacityError(f"{len(prompts)} prompts, room for {len(self._caches)} sequences")
        for ids, cache in zip(prompts, self._caches, strict=False):
            if not ids:
                raise ConfigError("a prompt is empty: give at least one token")
            if len(ids) >= cache.capacity:
                raise CapacityError(
                    f"the prompt has {len(ids)} tokens, the KV cache has room for "
                    f"{cache.capacity} with the answer: raise --context or shorten the prompt"
                )
        sequences = [
            SequenceState(
                index=i,
                ids=list(ids),
                prompt_tokens=len(ids),
                max_tokens=min(generation.max_tokens, self._caches[i].capacity - len(ids)),
                generator=make_generator((sampling.seed or 0) + i, self.device.torch_device),
            )
            for i, ids in enumerate(prompts)
        ]
        ends = frozenset() if generation.ignore_eos else end_tokens
        return Run(self, sequences, sampling, ends)

    def forward(self, rows: Sequence[tuple[int, Sequence[int]]], *, reuse: bool) -> torch.Tensor:
        """Run one pass and commit all its rows.

        Args:
            rows: cache index and new tokens of each sequence.
            reuse: the tokens are whole prompts: rows a cache already has are not computed again.

        Returns:
            [len(rows), V] logits after the last token of each.
        """
        ids: list[int] = []
        positions: list[int] = []
        segments, last = [], []
        for index, tokens in rows:
            cache, known = self._caches[index], self._cached_ids[index]
            if reuse:
                common = _common_prefix(known, tokens[:-1])
                self.truncate(index, common)
                tokens = tokens[common:]
            ids += tokens
            positions += range(cache.length, cache.length + len(tokens))
            last.append(len(ids) - 1)
            segments.append((index, Segment(cache, len(tokens)), tokens))
        batch = TokenBatch(
            self.device.upload(ids),
            self.device.upload(positions),
            [segment for _, segment, _ in segments],
            self.device.upload(last),
        )
        with torch.inference_mode(), self._whole_pass():
            logits = self.network.forward(batch)
        for index, segment, tokens in segments:
            segment.cache.commit(range(len(tokens)))
            self._cached_ids[index] += tokens
        return logits

    def truncate(self, index: int, length: int) -> None:
        """Forget all rows of a cache from `length` on."""
        self._caches[index].truncate(length)
        del self._cached_ids[index][length:]

    def counters(self) -> Counters:
        """Totals of the device at this moment."""
        copied = self.device.copy.statistics()
        return Counters(
            at_s=time.perf_counter(),
            bytes_copied=copied.bytes_copied,
            busy_s=copied.busy_s,
            stalled_s=self.device.compute.stalled_s(),
        )

    @property
    def load_bytes(self) -> int:
        """Bytes that are read before the first pass, about."""
        demand = self.placement.demand
        in_host = self.placement.streamed if self.placement.home is HomeKind.HOST else ()
        held = sum(demand.layer_bytes[i] for i in in_host)
        return demand.base_bytes + self.placement.resident_bytes + held

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of the streamed layers."""
        return self._store.bytes_per_pass

    def memory(self) -> Memory:
        """What is where, and the peaks so far."""
        return Memory(
            device_limit_bytes=self.placement.device_limit_bytes,
            device_planned_bytes=self.placement.device_bytes,
            device_peak_bytes=self.device.peak_bytes(),
            host_peak_bytes=peak_rss_bytes(),
            resident_layers=len(self.placement.resident),
            streamed_layers=len(self.placement.streamed),
            slots=self.placement.slots,
            slot_bytes=self.placement.slot_bytes,
            ledger=self.device.ledger(),
        )

    def close(self) -> None:
        """Stop copies and close the files."""
        self._resources.close()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _load_weights(self) -> LayerStore:
        base = self.device.allocate(self.network.base.nbytes, "embedding and head")
        self.device.load.copy(base, FileSource(self.network.base, self._files))
        layouts = self.network.layouts
        sources: dict[int, HomeSource] = {
            i: FileSource(layouts[i], self._files) for i in self.placement.streamed
        }
        if self.placement.home is HomeKind.HOST:
            images = [allocate_host(layouts[i].nbytes) for i in sources]
            filled = []
            for image, source in zip(images, sources.values(), strict=True):
                self.device.load.copy(image, source)
                filled.append(self.device.load.record())
            for image, event in zip(images, filled, strict=True):
                event.synchronize()
                self.device.pin(image)  # while later layers are still being read
            sources = dict(zip(sources, map(HostSource, images), strict=True))
        store = LayerStore(self.device, layouts, sources, self.placement.slots, self._files)
        self.network.attach(store, base, self.device.torch_device, self.config.prefill_chunk_tokens)
        return store

    def _allocate_caches(self, capacities: Sequence[int]) -> list[ResidentKV]:
        """Set aside KV rows, after a check that the plan counted what the network appends."""
        shapes, dtype = self.network.kv_shapes, self.network.dtype
        needed = sum(shape.numbers_per_token for shape in shapes) * dtype.itemsize
        counted = kv_bytes_per_token(self.checkpoint.config, dtype.itemsize)
        if needed > counted:
            raise CheckpointError(
                f"the network keeps {needed} bytes of KV per token, the head counts in config.json "
                f"make {counted}: correct num_key_value_heads or head_dim there"
            )
        return [ResidentKV(self.device, shapes, dtype, capacity) for capacity in capacities]

    @contextmanager
    def _whole_pass(self):  # type: ignore[no-untyped-def] # noqa: ANN202
        """Undo a pass that does not end: pending rows go, the ring starts over."""
        try:
            yield
        except BaseException:
            for cache in self._caches:
                cache.truncate(cache.length)
            self._store.restart()
            raise


@dataclass(slots=True)
class Run:
    """Answers in the making."""

    engine: Engine
    sequences: list[SequenceState]
    sampling: SamplingConfig
    end_tokens: frozenset[int]
    passes: int = 0
    _marks: list[Counters] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._marks = [self.engine.counters()]

    @property
    def active(self) -> list[SequenceState]:
        """Sequences that have not ended."""
        return [s for s in self.sequences if s.finish_reason is None]

    def prefill(self) -> list[Emitted]:
        """Take the prompts through the model in one pass and emit the first tokens."""
        self._marks = [self.engine.counters()]
        return self._advance([(s.index, s.ids) for s in self.sequences], reuse=True)

    def step(self) -> list[Emitted]:
        """Make one pass for all active sequences and emit one token each."""
        return self._advance([(s.index, s.ids[-1:]) for s in self.active], reuse=False)

    def report(self) -> RunReport:
        """What the run measured so far."""
        start, first, last = self._marks[0], self._marks[1:2], self._marks[-1]
        whole = last.since(start)
        prefill = (first[0] if first else last).since(start)
        decode = last.since(first[0] if first else last)
        emitted = sum(len(s.emitted) for s in self.sequences)
        later = emitted - len(self.sequences) if first else 0
        decode_passes = max(0, self.passes - 1)
        timed = (decode_passes, decode) if decode_passes else (min(1, self.passes), prefill)
        moved = timed[0] * self.engine.bytes_per_pass
        return RunReport(
            timings=Timings(
                load_s=self.engine.load_s,
                ttft_s=prefill.at_s,
                decode_s=decode.at_s,
                s_per_token=decode.at_s / later if later > 0 else None,
                tokens_per_s=later / decode.at_s if later > 0 else None,
            ),
            speculation=Speculation(
                drafter="none",
                accept_rule="greedy" if self.sampling.greedy else "lossless",
                passes=self.passes,
                drafted=0,
                accepted=0,
                acceptance_rate=None,
                tokens_per_pass=emitted / self.passes if self.passes else 0.0,
            ),
            transfer=Transfer(
                bytes_total=whole.bytes_copied,
                bytes_per_pass=self.engine.bytes_per_pass,
                achieved_bytes_per_s=moved / timed[1].at_s if timed[1].at_s else 0.0,
                link_bytes_per_s=whole.bytes_copied / whole.busy_s if whole.busy_s else 0.0,
                stall_s=whole.stalled_s,
                overlap_ratio=overlap_ratio(whole),
            ),
            memory=self.engine.memory(),
        )

    def _advance(self, rows: Sequence[tuple[int, Sequence[int]]], *, reuse: bool) -> list[Emitted]:
        logits = self.engine.forward(rows, reuse=reuse)
        drawn = torch.cat(
            [
                next_tokens(logits[k : k + 1], self.sampling, self.sequences[index].generator)
                for k, (index, _) in enumerate(rows)
            ]
        )
        tokens = self.engine.device.download(drawn)  # host sync
        self.passes += 1
        self._marks.append(self.engine.counters())
        emitted = []
        for (index, _), token in zip(rows, tokens, strict=True):
            sequence = self.sequences[index]
            sequence.ids.append(token)
            emitted.append(Emitted(sequence, [token]))
            if token in self.end_tokens:
                sequence.finish(FinishReason.STOP)
            elif len(sequence.emitted) >= sequence.max_tokens:
                sequence.finish(FinishReason.LENGTH)
        return emitted


def open_device(config: RuntimeConfig) -> tuple[Device, Packing]:
    """Open the device a run asks for.

    Raises:
        ConfigError: it is not known, or an option does not go with it.
        DeviceError: it is not there.
    """
    if config.link_bytes_per_s is not None and config.home is not HomeKind.HOST:
        raise ConfigError("--link-bandwidth emulates a link to host memory: add --home host")
    name = config.device
    if name == "auto":
        name = "cpu" if TorchDriver().missing(0) else "cuda:0"
    if name == "cpu":
        device = CpuDevice(readers=config.readers, link_bytes_per_s=config.link_bytes_per_s)
        return device, Packing.FILE
    if "," in name:
        raise ConfigError(f"--device {name}: several devices are not supported yet, name one")
    if not (match := re.fullmatch(r"cuda(?::(\d{1,4}))?", name)):
        raise ConfigError(f"--device {name} is not known: use auto, cpu, cuda or cuda:N")
    if config.link_bytes_per_s is not None:
        raise ConfigError("--link-bandwidth emulates a GPU's link: add --device cpu")
    return CudaDevice(int(match[1] or 0), readers=config.readers), Packing.DEVICE


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        length += 1
    return length
