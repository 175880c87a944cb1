"""The engine: a model on a device, and the passes it makes. How answers are made: `decoding`."""

import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from offload_rt.attention.blocks import PIECE
from offload_rt.config import (
    DraftConfig,
    Exact,
    KVPlace,
    LookAhead,
    RuntimeConfig,
    SamplingConfig,
    Wire,
)
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.machine import FreeMemory
from offload_rt.costs.sizes import held_rows, kv_bytes_per_token
from offload_rt.device.base import Device
from offload_rt.device.kinds import DeviceKind
from offload_rt.device.opening import chosen_kind, open_device
from offload_rt.device.several import Devices, Stripes
from offload_rt.device.system import free_memory_bytes, peak_rss_bytes, put_tables_aside
from offload_rt.engine.tracing import Tracer
from offload_rt.errors import CapacityError, CheckpointError, PlanError
from offload_rt.folders import cache_folder
from offload_rt.kernels import products, registers
from offload_rt.kernels.rows import ROW_TILE
from offload_rt.kv.allocate import allocate_caches, kv_bytes_copied, offloaded_parts
from offload_rt.kv.base import KVCache, KVShape
from offload_rt.kv.followed import ChosenRows, FollowedKV, WatchedCache
from offload_rt.kv.passing import PassingKV
from offload_rt.kv.pool import KVPool
from offload_rt.kv.prefixes import Prefix, Prefixes, common_prefix
from offload_rt.kv.retrieval import RetrievalKV
from offload_rt.kv.sizes import KVPlan, retrieval_sizes
from offload_rt.kv.states import STATES, HybridKV, MixerStates
from offload_rt.kv.striped import StripedKV, StripedRetrieval
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.exactness import are_quickest, passes_problem
from offload_rt.model.formats import brought, direct, on_gpu
from offload_rt.model.formats.stored import HOST_ROWS
from offload_rt.model.kept import layers_keep
from offload_rt.model.layout import compute_dtype
from offload_rt.model.network import Base, Network
from offload_rt.model.sparing import is_spared
from offload_rt.model.weight_files import WeightFiles
from offload_rt.nodes.crossing import AwayKV, AwayPool, Lead
from offload_rt.nodes.stage import Order
from offload_rt.planning.controller import Controller
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.levels import Pace
from offload_rt.planning.look_ahead import LookAheadJudge
from offload_rt.planning.placement import Placement
from offload_rt.planning.planner import Means, plan_wires
from offload_rt.planning.yields import Tally
from offload_rt.report import Counters, DeviceMemory, Exactness, Memory, RetrievalCounts
from offload_rt.runner.loading import BASE, Streaming, load_base, load_drafting, load_target
from offload_rt.runner.runner import Rows, Runner
from offload_rt.runner.tree import TokenTree
from offload_rt.speculative.base import Drafter
from offload_rt.speculative.draft_model.pair import open_draft_checkpoint
from offload_rt.speculative.hidden_drafter import HiddenModule, ModulePlace
from offload_rt.speculative.kind import DrafterSeat
from offload_rt.speculative.kinds import kind_of
from offload_rt.speculative.medusa.checkpoint import heads_bytes, open_draft_heads
from offload_rt.speculative.medusa.drafter import Medusa
from offload_rt.streaming.experts import ExpertCounts

NO_DRAFT = DraftConfig()


class Engine:
    """A model on a device, ready to generate.

    Args:
        checkpoint: headers of the model.
        config: where it runs and what it may use.
        capacities: KV rows to set aside, one number per sequence that runs at once.
        prompt_tokens: tokens of the largest prompt pass, all sequences together.
        kv_tokens: KV rows of all sequences together: each has as many as it asks for (`reserve`),
            at most its capacity. None sets all capacities aside. Caches that are not on the device
            are set aside whole either way.
        running: sequences that usually run, for whom the plan is to be fastest; None: all.
        draft: who drafts, and how much.
        repeats: answers are to be those of other engines of the model, whoever drafts there.
        means: gives what a planner needs to choose what is left open, for a device of that
            kind; None: as many layers stay on the device as fit, and a drafter's default number
            of tokens is drafted.
        on_placed: called once what lives where is decided, before weights are read; `load_bytes`
            and the device's `load` statistics then tell how far reading is.
        nodes: other machines that take part; `config.machines` names all.

    Raises:
        PlanError: it does not fit the limits.
        CheckpointError: the files cannot be used.
    """

    def __init__(  # noqa: PLR0913 - what a run is made of, all by keyword
        self,
        checkpoint: Checkpoint,
        config: RuntimeConfig,
        *,
        capacities: Sequence[int],
        prompt_tokens: int,
        kv_tokens: int | None = None,
        running: int | None = None,
        draft: DraftConfig = NO_DRAFT,
        repeats: bool = False,
        means: Callable[[DeviceKind], Means] | None = None,
        on_placed: Callable[["Engine"], None] | None = None,
        nodes: Lead | None = None,
    ) -> None:
        start = time.perf_counter()
        self.checkpoint = checkpoint
        self.capacities, self._prompt_tokens = tuple(capacities), prompt_tokens
        drafting = open_draft_checkpoint(checkpoint, draft)
        heads = open_draft_heads(checkpoint, draft)
        self._files = WeightFiles(checkpoint.files)
        with ExitStack() as undo:
            undo.callback(self._files.close)
            models = [each for each in (checkpoint, drafting) if each is not None]
            self.devices = open_devices(config, undo, models)
            self.device = self.devices[0]
            device, packing = self.device.kind, self.device.kind.packing
            sequences = len(capacities)
            heads_device_bytes = heads_bytes(heads, checkpoint, config.dtype, device, sequences)
            first, *others = self.devices.free_bytes()
            free = FreeMemory(
                device_bytes=first, host_bytes=free_memory_bytes(), further_bytes=tuple(others)
            )
            if nodes is not None:
                free = nodes.with_free(free)
            load = RunLoad(
                capacities=capacities,
                prompt_tokens=prompt_tokens,
                drafting=Drafting(draft, drafting, heads_device_bytes),
                kv_tokens=kv_tokens,
                running=running,
            )
            self._kv_tokens = kv_tokens
            self._pools: list[Any] = []  # KVPool, or what other nodes follow
            if config.wire is Wire.AUTO and device.own_memory and not on_gpu.is_there():
                config = replace(config, wire=Wire.RAW)  # nothing would decode codes there
            known = None if means is None else means(device)
            self.checkpoint, self.plan = plan_wires(
                checkpoint,
                config,
                device,
                load=load,
                free=free,
                means=known,
            )
            checkpoint = self.checkpoint
            self.config, self.placement = self.plan.runtime, self.plan.placement
            self.draft = draft = self.plan.drafting.config
            self._stripes = Stripes(self.devices, self.placement.device)
            self._nodes = nodes
            if on_placed is not None:
                on_placed(self)
            apart = self.placement.pooled_layers
            self.network = Network(checkpoint, config.dtype, packing, experts_apart=apart)
            self._check_kv()
            self._check_apart()
            self.exact = self._exactness(needed=repeats)
            self.network.exact = self.exact.on
            self.network.tiles = self.device.kind.tile_rows if self.exact.on else 0
            # First, as rounding takes memory for a moment that the target's layers fill later.
            self._draft_model, self.module = self._load_drafting(self.plan.drafting.checkpoint)
            if nodes is not None:
                self._send_orders(nodes)
            embedding = None
            if self.placement.demand.rows_apart:
                embedding = checkpoint.tensors[checkpoint.embedding.name]
            base = load_base(self.network, self.device, self._files, BASE, embedding)
            self._rounded_copy = self._load_rounded_copy(base)
            self.runner = self._load_target(base, undo)
            if self._rounded_copy is not None and self._copied_layers is not None:
                self._rounded_copy.network.borrow(self.network, self.placement.resident)
            self._caches = self._allocate_caches([c + draft.pending_rows for c in capacities], undo)
            self.medusa: Medusa | None = None
            if heads is not None:
                self.medusa = Medusa(heads, self.network, self.device, packing, nodes=draft.nodes)
            tapping = self.medusa or self.module
            self._tap = None if tapping is None else tapping.tap
            self._drafters: list[Drafter | None] = [None] * len(capacities)
            self.controller: Controller | None = None
            if outlooks := self.plan.outlooks:
                first, alone = self.plan.first_nodes, self.plan.alone
                self.controller = Controller(outlooks, first, sequences=sequences, alone=alone)
            self.tally, self.pace = Tally(), Pace()
            pool = self.runner.experts
            may = pool is not None and pool.may_foresee
            mode = self.config.look_ahead if may else LookAhead.OFF
            shares = pool is not None and pool.rates is not None
            self.foresight = LookAheadJudge(mode, above=HOST_ROWS if shares else 0)
            self.tracer: Tracer | None = None
            shared = bool(self._pools) and not self.network.mixers  # a state is no row
            self.prefixes = Prefixes(self._pools) if shared else None
            if nodes is not None:
                nodes.wait_ready()
            self._fill_slots(known)  # last: nothing else is read any more
            self._resources = undo.pop_all()
        self._cached_ids: list[list[int]] = [[] for _ in capacities]
        self._last_ids: list[list[int]] = [[] for _ in capacities]
        self.load_s = time.perf_counter() - start

    def forward(self, rows: Sequence[tuple[int, Sequence[int]]], *, reuse: bool) -> torch.Tensor:
        """Run one pass and commit all its rows.

        Args:
            rows: cache index and new tokens of each sequence.
            reuse: the tokens are whole prompts: rows a cache already has are not computed again.

        Returns:
            [len(rows), V] logits after the last token of each.
        """
        fresh = []
        for index, tokens in rows:
            if reuse:
                tokens = tokens[self.truncate(index, self.cached_tokens(index, tokens)) :]
            fresh.append((index, tokens))
        logits = self._pass([Rows.text(self._caches[index], tokens) for index, tokens in fresh])
        for index, tokens in fresh:
            self.commit(index, tokens, range(len(tokens)))
        return logits

    def check(self, rows: Sequence[tuple[int, int, TokenTree]]) -> list[torch.Tensor]:
        """Run one pass over drafts; rows stay pending until `commit`.

        Args:
            rows: cache index, root token and drafted tree of each sequence.

        Returns:
            For each sequence [N + 1, V] logits, after the root and after each node.
        """
        logits = self._pass(
            [Rows.draft(self._caches[index], root, tree) for index, root, tree in rows]
        )
        return list(logits.split([len(tree) + 1 for _, _, tree in rows]))

    def sweep(
        self,
        texts: Sequence[tuple[int, Sequence[int]]],
        drafts: Sequence[tuple[int, int, TokenTree]],
        whole: Collection[int] = (),
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Run one pass over texts and drafts; all rows stay pending until `commit`.

        Args:
            texts: cache index and new tokens of each sequence that reads.
            drafts: cache index, root token and drafted tree of each that writes.
            whole: sequences of which every row's logits are wanted.

        Returns:
            Of each text [1, V] logits after its last token, or [S, V] after each; of each draft
            [N + 1, V], after the root and after each node.
        """
        caches = self._caches
        parts = [
            Rows.text(caches[index], tokens, range(len(tokens)) if index in whole else None)
            for index, tokens in texts
        ]
        parts += [Rows.draft(caches[index], root, tree) for index, root, tree in drafts]
        rows = list(self._pass(parts).split([len(part.wanted) for part in parts]))
        return rows[: len(texts)], rows[len(texts) :]

    def not_finite(self, extent: TensorExtent) -> tuple[int, int]:
        """How many of a tensor's numbers are NaN or infinite: in its file, and as computed with."""
        return self._files.not_finite(extent, self.network.dtype)

    def hidden(
        self, texts: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Read texts in one pass and forget them.

        Args:
            texts: tokens of each, no more than its sequence has room for.
            wanted: places of each, counted from 0.

        Returns:
            [R, E] hidden states of the wanted places, text after text: after the final norm, as
            the output head is fed them.
        """
        for index, text in enumerate(texts):
            self.checkpoint.require_rows(text)
            self.truncate(index, 0)
        caches = self._caches[: len(texts)]
        parts = [Rows.text(*part) for part in zip(caches, texts, wanted, strict=True)]
        hidden = self.runner.hidden(parts)
        for cache in caches:
            cache.truncate(0)
        return hidden

    def draft_pass(self, cache: KVCache, root: int, tree: TokenTree) -> torch.Tensor:
        """Run one pass of the target or its rounded copy over a drafter's cache; rows stay pending.

        Returns:
            [N + 1, V] logits, after the root and after each node.
        """
        runner = self._rounded_copy or self.runner
        return runner.draft_logits(Rows.draft(cache, root, tree))

    def commit(self, index: int, tokens: Sequence[int], keep: Sequence[int]) -> None:
        """Keep these pending rows of a cache; `tokens` are theirs."""
        self._caches[index].commit(keep)
        self._cached_ids[index] += tokens
        if self._tap is not None:
            self._tap.committed(index, keep, len(self._cached_ids[index]))

    def _pass(self, parts: Sequence[Rows]) -> torch.Tensor:
        """Run one pass; returns the wanted logits of all sequences, one after the other."""
        logits = self.runner.logits(parts)
        if self._tap is not None:
            self._tap.passed(
                [(self._caches.index(p.cache), len(p.tokens), len(p.wanted)) for p in parts]
            )
        return logits

    @property
    def repeats_answers(self) -> bool:
        """Whether a sampled answer of a seed is the same, however much is drafted and when."""
        return self.exact.on and not self.draft.answers_rest_on_it

    def drafter(
        self, index: int, sampling: SamplingConfig, generator: torch.Generator
    ) -> Drafter | None:
        """The drafter of a sequence, ready for a new answer; None if nobody drafts.

        Args:
            index: the sequence's cache.
            sampling: how the answer's tokens are drawn.
            generator: source of the drafts' randomness.
        """
        if not self.draft.drafts:
            return None
        for runner in (self.runner, *self._drafting):
            runner.records_at_once = sampling.seed is not None  # an answer is the same again
        seat = DrafterSeat(
            device=self.device,
            index=index,
            capacity=self.capacities[index],
            cache=self._caches[index],
            sampling=sampling,
            generator=generator,
            kept=self._drafters,
            draft_model=self._draft_model,
            medusa=self.medusa,
            module=self.module,
            draft_pass=self.draft_pass,
            rounded_copy=self._rounded_copy,
            pass_share=self.plan.pass_share,
        )
        return kind_of(self.draft.kind).make(seat, self.draft)

    def retrieval_counts(self, index: int) -> RetrievalCounts | None:
        """With triforce, how the drafting below the drafts of a sequence's newest answer went."""
        cache = self._caches[index]
        return cache.counts if isinstance(cache, FollowedKV) else None

    def cached_tokens(self, index: int, tokens: Sequence[int]) -> int:
        """How many rows of a prompt are in a cache already and would not be computed again."""
        common = common_prefix(self._cached_ids[index], tokens[:-1])
        cache = self._caches[index]
        if isinstance(cache, HybridKV):
            return cache.states.reach(common)
        return common if self._tap is None else self._tap.reusable(index, common)

    @property
    def shares_kv(self) -> bool:
        """Whether sequences have as many rows as they ask for, of one memory for all."""
        return bool(self._pools)

    @property
    def kv_tokens(self) -> int:
        """Tokens of all sequences together that there is memory for."""
        return self._kv_tokens if self._kv_tokens and self._pools else sum(self.capacities)

    def kept_tokens(self, index: int) -> int:
        """Committed rows of a cache."""
        return len(self._cached_ids[index])

    def reserve(self, index: int, tokens: int) -> None:
        """Set so many rows aside for a sequence, and those that its drafts need.

        Raises:
            CapacityError: so many are not free, or are more than its capacity.
        """
        if tokens > self.capacities[index]:
            raise CapacityError(
                f"{tokens} tokens of one sequence, there is room for {self.capacities[index]}"
            )
        for pool in self._pools:
            pool.resize(index, tokens + self.draft.pending_rows)

    def release(self, index: int) -> None:
        """Let go of all rows of a sequence that are not committed."""
        for pool in self._pools:
            pool.resize(index, self.kept_tokens(index))

    def room_for(self, index: int) -> int:
        """Tokens that `reserve` would grant a sequence now."""
        free = [pool.free_rows + pool.caches[index].capacity for pool in self._pools]
        return min([self.capacities[index], *(rows - self.draft.pending_rows for rows in free)])

    def last_ids(self, index: int) -> Sequence[int]:
        """What a free cache held last, and its drafter may know yet."""
        return self._last_ids[index]

    def find_rows(self, ids: Sequence[int]) -> Prefix:
        """Rows there are of a prompt, of an ended sequence or of one that goes on.

        Only where there are `prefixes`.
        """
        assert self.prefixes is not None
        wanted = ids[:-1]
        found = self.prefixes.find(wanted)
        known = [common_prefix(wanted, own) for own in self._cached_ids]
        index = max(range(len(known)), key=known.__getitem__)
        if found.tokens >= known[index]:
            return found
        return self.prefixes.of_cache(index, known[index])

    def begin(self, index: int, ids: Sequence[int], tokens: int, prefix: Prefix) -> None:
        """Set rows aside for a sequence as `reserve` does, of which the first are there already.

        Only where there are `prefixes`; ended sequences are forgotten as far as it has to be.
        """
        assert self.prefixes is not None
        rows = tokens + self.draft.pending_rows
        prefix = self.prefixes.make_room(rows, prefix)
        self.prefixes.begin(index, rows, prefix)
        known = self._cached_ids[index] = list(ids[: prefix.tokens])
        if self._tap is not None:
            self._tap.truncated(index, common_prefix(self._last_ids[index], known))
            self.truncate(index, self._tap.reusable(index, len(known)))

    def put_away(self, index: int) -> None:
        """A sequence ended: keep its rows for others, or for one that goes on in the same cache."""
        self.truncate(index, self.kept_tokens(index))
        if self.prefixes is None:
            self.release(index)
            return
        self.prefixes.keep(index, self._cached_ids[index])
        self._caches[index].truncate(0)  # what follows the rows
        self._last_ids[index], self._cached_ids[index] = self._cached_ids[index], []

    def truncate(self, index: int, length: int) -> int:
        """Forget the rows of a cache from `length` on, if it has any there.

        Returns:
            the rows that are left: fewer where a recurrent state has to go back further.
        """
        cache = self._caches[index]
        cache.truncate(min(length, cache.length))
        del self._cached_ids[index][cache.length :]
        if self._tap is not None:
            self._tap.truncated(index, cache.length)
        return cache.length

    def forget(self) -> None:
        """Forget every sequence, drafters' caches too: the next prompt starts as the first did."""
        for index in range(len(self._caches)):
            self.truncate(index, 0)
        if self.prefixes is not None:
            self.prefixes.clear()
        for drafter in self._drafters:
            if drafter is not None:
                drafter.forget()

    def trace(self) -> Tracer:
        """Note from now on when copies, layers, drafts and KV traffic begin and end."""
        self.tracer = tracer = Tracer(self._stripes)
        enter, leave = tracer.enter_layer, tracer.leave_layer
        self.runner.watch(tracer.of_layers, tracer.of_experts, enter, leave)
        for cache in self._caches:
            for part in offloaded_parts(cache):
                number = next(n for n, d in enumerate(self.devices) if d is part.device)
                layers = self.placement.of_devices[number].layers
                part.watch(partial(tracer.of_kv, number, layers))
        return tracer

    def announce(self, rows: int) -> None:
        """Tell the pool of experts what the next pass is, and settle whether it foresees some.

        Args:
            rows: of it; 0 if it reads a prompt, too.
        """
        if (pool := self.runner.experts) is not None:
            pool.reads_prompt = rows == 0
            pool.foresees = rows > 0 and self.foresight.looks(rows)

    def traced(self, lane: str, name: str) -> AbstractContextManager[None]:
        """Note what runs inside, if anything is noted."""
        return nullcontext() if self.tracer is None else self.tracer.on_host(lane, name)

    def poll_with(self, poll: Callable[[], None]) -> None:
        """Have passes call `poll` before each layer; what it raises ends the pass in good order."""
        for network in self._networks:
            network.poll = poll

    def leave_with(self, gone: Callable[[int], bool]) -> None:
        """Have passes ask before each layer whether a sequence has left; it goes on without it."""
        index_of = {id(cache): index for index, cache in enumerate(self._caches)}
        self.network.gone = lambda cache: id(cache) in index_of and gone(index_of[id(cache)])

    @property
    def draft_sizes(self) -> dict[int, int]:
        """Tokens drafted for each of up to so many sequences, where measured times decide that."""
        return {} if self.controller is None else self.controller.chosen

    @property
    def pass_rows(self) -> int:
        """Rows of the largest pass there is memory for."""
        checked = len(self.capacities) * (1 + self.draft.nodes)
        return max(self._prompt_tokens, checked)

    @property
    def _networks(self) -> Sequence[Network]:
        return [self.network, *(runner.network for runner in self._drafting)]

    @property
    def _drafting(self) -> Sequence[Runner]:
        """What drafts with a network of its own."""
        module = None if self.module is None else self.module.module
        return [r for r in (self._draft_model, self._rounded_copy, module) if r is not None]

    @property
    def sequences(self) -> int:
        """How many may run at once."""
        return len(self._caches)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[R, V] logits of [R, E] rows that `hidden` gave."""
        with torch.inference_mode():
            return self.network.logits(hidden)

    def counters(self) -> Counters:
        """Totals of the device at this moment."""
        copied, pool = self.devices.copied(), self.runner.experts
        away = () if self._nodes is None else self._nodes.moved
        asked = ExpertCounts() if pool is None else pool.counts
        return Counters(
            at_s=time.perf_counter(),
            bytes_copied=copied.bytes_copied + sum(one.bytes_copied for one in away),
            kv_bytes_copied=kv_bytes_copied(self._caches),
            busy_s=max([copied.busy_s, *(one.busy_s for one in away)]),
            stalled_s=self.stalled_s,
            expert_hits=asked.hits,
            expert_misses=asked.misses,
            expert_ahead=asked.ahead,
            expert_on_host=asked.on_host,
            expert_unused=asked.unused,
            expert_unused_bytes=asked.unused_bytes,
            expert_host_bytes=asked.host_bytes,
            expert_file_bytes=asked.file_bytes,
            expert_filled=asked.filled,
            expert_filled_bytes=0 if pool is None else pool.filled_bytes,
            expert_calls=sum(asked.calls.values()),
        )

    @property
    def stalled_s(self) -> float:
        """Time that computation waited for copies so far, on all machines."""
        away = () if self._nodes is None else self._nodes.moved
        return self.devices.stalled_s() + sum(one.stalled_s for one in away)

    def link_bytes(self) -> int:
        """Bytes of layers and KV that have crossed the link so far; waits for nothing."""
        return self.devices.copied().bytes_copied + kv_bytes_copied(self._caches)

    @property
    def load_bytes(self) -> int:
        """Bytes that are read before the first pass, about."""
        demand = self.placement.demand
        held = self.placement.held_bytes
        copied = 0
        if self.draft.copies.rounds:
            layers = self._copied_layers
            own = demand.layer_bytes
            copied = sum(own if layers is None else (own[i] for i in layers))
        ends = demand.base_bytes + demand.host_base_bytes
        return ends + self.placement.resident_bytes + held + copied

    @property
    def bytes_per_pass(self) -> int:
        """Bytes of the streamed layers."""
        return self.runner.bytes_per_pass

    def memory(self) -> Memory:
        """What is where, and the peaks so far."""
        usage = self.devices.usage()
        return Memory(
            device_limit_bytes=self.placement.device_limit_bytes,
            device_planned_bytes=self.placement.device_bytes,
            device_peak_bytes=self.devices.peak_bytes(),
            device_reserved_bytes=usage.reserved_bytes,
            device_driver_bytes=usage.driver_bytes,
            host_pinned_bytes=usage.pinning.pinned_bytes,
            host_unpinned_bytes=usage.pinning.refused_bytes,
            pin_refusal=usage.pinning.reason,
            host_peak_bytes=peak_rss_bytes(),
            resident_layers=len(self.placement.resident),
            streamed_layers=len(self.placement.streamed),
            slots=self.placement.slots,
            slot_bytes=self.placement.slot_bytes,
            ledger=self.devices.ledger(),
            devices=self._memories(),
        )

    def _memories(self) -> tuple[DeviceMemory, ...]:
        """Of several devices, each."""
        near = len(self.devices)
        found = [self._memory_of(number) for number in range(len(self.placement.shares[:near]))]
        for number, holds in enumerate(self._nodes.tell() if self._nodes else (), near):
            own = self.placement.shares[number]
            found.append(
                DeviceMemory(
                    name=self.config.machines[number],
                    limit_bytes=own.device_limit_bytes,
                    planned_bytes=own.device_bytes,
                    peak_bytes=holds.peak_bytes,
                    resident_layers=len(own.resident),
                    streamed_layers=len(own.streamed),
                    link_bytes=self._nodes.moved[number - 1].bytes_copied if self._nodes else 0,
                )
            )
        return tuple(found)

    def _memory_of(self, number: int) -> DeviceMemory:
        own, device = self.placement.shares[number], self.devices[number]
        return DeviceMemory(
            name=self.config.machines[number] if self.config.machines else device.name,
            limit_bytes=own.device_limit_bytes,
            planned_bytes=own.device_bytes,
            peak_bytes=device.peak_bytes() if device.kind.own_memory else None,
            resident_layers=len(own.resident),
            streamed_layers=len(own.streamed),
            link_bytes=device.copy.statistics().bytes_copied,
        )

    def close(self) -> None:
        """Stop copies, close the files and let go of the weights; counts can still be read."""
        self._resources.close()
        for network in self._networks:
            network.release()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _fill_slots(self, known: Means | None) -> None:
        """Have experts copied for the time until tokens ask, unless that is not wanted."""
        pool = self.runner.experts
        if pool is not None and self.config.look_ahead is not LookAhead.OFF:
            pool.fill({} if known is None else known.asked.uses)

    def _load_drafting(
        self, checkpoint: Checkpoint | None
    ) -> tuple[Runner | None, HiddenModule | None]:
        """The draft model, or a layer that reads hidden states, if one drafts."""
        chunk_tokens = self.config.prefill_chunk_tokens
        load = kind_of(self.draft.kind).load if self.draft.drafts else None
        if load is not None:
            place = ModulePlace(
                checkpoint=self.checkpoint,
                module=checkpoint,
                target=self.network,
                device=self.device,
                draft=self.draft,  # its weights are settled by the plan
                chunk_tokens=chunk_tokens,
                target_ids=self._target_ids,
                limit=held_rows(
                    self.draft.nodes, self.capacities, max(self.pass_rows, chunk_tokens)
                ),
            )
            return None, load(place)
        if checkpoint is None:
            return None, None
        model = load_drafting(
            checkpoint,
            self.device,
            chunk_tokens=chunk_tokens,
            target_ids=self._target_ids,
            weights=self.draft.draft_weights,
        )
        return model, None

    def _load_rounded_copy(self, base: Base) -> Runner | None:
        """What drafts instead of the target's own weights, or of some of them."""
        if not self.draft.copies.rounds:
            return None
        self.device.load.record().synchronize()  # the embedding is there
        return load_drafting(
            self.checkpoint,
            self.device,
            chunk_tokens=self.config.prefill_chunk_tokens,
            target_ids=self._target_ids,
            weights=self.draft.copies,  # settled by the plan
            dtype=self.config.dtype,
            target_base=base,
            stripes=self._stripes if len(self.devices) > 1 else None,
            layers=self._copied_layers,
            shares_head=self.draft.words.over_own_rows,
        )

    @property
    def _copied_layers(self) -> Sequence[int] | None:
        """The layers of which there are rounded copies; None: all."""
        return self.placement.streamed or None

    @property
    def _target_ids(self) -> int:
        return (self.checkpoint.head or self.checkpoint.embedding).shape[0]

    def _load_target(self, base: Base, undo: ExitStack) -> Runner:
        placement, near = self.placement, len(self.devices)
        here = placement if self._nodes is None else placement.shares[0]
        streaming = Streaming(
            layers=here.streamed,
            slots=placement.slots,
            home=here.home,
            spare_bytes=[_spare_bytes(own) for own in placement.of_devices[:near]],
            packs_head=placement.packs_head,
            expert_slots=placement.expert_slots,
            in_files=here.in_files,
            expert_share=placement.expert_share,
            look_ahead=self.config.look_ahead,
            misses=self.plan.misses,
            readers=self.config.readers,
            reads_files=here.reads_files,
        )
        chunk_tokens = self.config.prefill_chunk_tokens
        return load_target(
            self.checkpoint,
            self.network,
            self._stripes,
            self._files,
            base,
            streaming,
            chunk_tokens,
            undo,
            self._nodes,
        )

    def _send_orders(self, nodes: Lead) -> None:
        """Have other machines load their shares while this one loads its own."""
        placement, draft = self.placement, self.draft
        rows = self._kv_tokens
        if rows is not None:
            rows += len(self.capacities) * draft.pending_rows
        orders = [
            Order(
                node=number,
                device=placement.device,
                streamed=own.streamed,
                slots=own.slots,
                home=own.home,
                in_files=own.in_files,
                readers=self.config.readers,
                spare_bytes=_spare_bytes(own),
                capacities=[rows + draft.pending_rows for rows in self.capacities],
                kv_rows=rows,
                state_bytes=sum(own.demand.state_bytes),
                device_bytes=own.device_bytes,
                dtype=self.config.dtype,
                wire=self.config.wire,
                exact=self.network.exact,
                chunk_tokens=self.config.prefill_chunk_tokens,
                by_group=nodes.by_group,
            )
            for number, own in enumerate(placement.shares)
            if number
        ]
        nodes.order(placement.device, [asdict(order) for order in orders])

    def _exactness(self, *, needed: bool) -> Exactness:
        """Whether passes are row-invariant, or why not; `needed` even where nobody drafts.

        Raises:
            PlanError: they are to be, and cannot.
        """
        config, kv = self.config, self.placement.demand.kv
        kind, dtype = self.device.kind, str(self.network.dtype).removeprefix("torch.")
        needed = needed or self.placement.streams or kv is not None or self.draft.drafts
        needed = needed or (are_quickest(dtype, kind) and not registers.problem())
        found = passes_problem(config, kind, needed=needed, kv_away=kv is not None)
        tiles = kind.tile_rows
        places = dict[torch.device, int]()  # what is planned on each
        for device, share in zip(self.devices, self.placement.of_devices, strict=False):
            places.setdefault(device.torch_device, share.device_bytes)
        first = self.device.torch_device
        for place, planned in places.items():  # of several machines this one's
            found = found or self.network.exact_problem(
                place, tiles, limit_bytes=planned, ends=place == first
            )
        if found and config.exact is Exact.ON:
            raise PlanError(
                f"--exact on: {self.checkpoint.name} cannot have row-invariant passes here, as "
                f"{found}: leave --exact out"
            )
        if found:
            return Exactness(why=found)
        return Exactness(rows=tiles or ROW_TILE, key_block=PIECE, prompt=True)

    def _check_apart(self) -> None:
        """See that layers can be where they are to be.

        Raises:
            CheckpointError: they are on several devices, and read more than their rows.
        """
        if len(self.config.device_names) > 1 and self.network.apart:
            option = "--nodes" if self.config.machines else f"--device {self.config.device}"
            raise CheckpointError(
                f"{option}: layers of {self.checkpoint.config.model_type} models run on one device "
                f"only, as {self.network.apart}: name one"
            )

    def _check_kv(self) -> None:
        """See that the plan counted what the network keeps per token.

        Raises:
            CheckpointError: the family's cache is not what its head counts make.
        """
        shapes, dtype = self.network.kv_shapes, self.network.dtype
        config = self.checkpoint.config
        needed = sum(shape.numbers_per_token for shape in shapes) * dtype.itemsize
        counted = kv_bytes_per_token(config, dtype.itemsize)
        if self.config.kv is KVPlace.NONE:  # planned is an average layer, allocated the largest
            needed = max(shape.numbers_per_token for shape in shapes) * len(shapes) * dtype.itemsize
        if needed > counted:
            raise CheckpointError(
                f"{config.model_type} models cannot be streamed yet: they keep {needed} bytes of "
                f"KV per token where the head counts in config.json make {counted}"
            )
        counted = sum(kept.state_bytes(dtype.itemsize) for kept in layers_keep(config))
        needed = sum(mixer.state_bytes for mixer in self.network.mixers)
        if needed > counted:
            raise CheckpointError(
                f"{config.model_type} models cannot be streamed yet: their layers keep states of "
                f"{needed} bytes where the sizes in config.json make {counted}"
            )

    def _allocate_caches(self, capacities: Sequence[int], undo: ExitStack) -> list[KVCache]:
        """Set aside KV rows of all sequences."""
        placement, device = self.placement, self.placement.device
        full: dict[int, Sequence[KVCache]] = {}
        chosen: dict[int, Sequence[RetrievalKV]] = {}
        near = placement.of_devices[: len(self.devices)]
        for number, (where, own) in enumerate(zip(self.devices, near, strict=True)):
            attending = [at for at, i in enumerate(own.layers) if i in self.network.attending]
            shapes = [self.network.kv_shapes[own.layers[at]] for at in attending]
            if shapes or self._nodes is not None:
                plan = own.demand.kv and own.demand.kv.of_layers(attending)
                full[number] = self._full_caches(where, shapes, plan, capacities, undo)
                chosen[number] = self._retrieval_caches(where, shapes)
        indices = range(len(capacities))
        if self.network.mixers:  # of which the rows' layers are numbered
            device = tuple(device[layer] for layer in self.network.attending)
        if self._nodes is not None:
            full[1] = [AwayKV(self._nodes, i, rows) for i, rows in enumerate(full[0])]
            self._pools = [AwayPool(self._nodes, pool) for pool in self._pools]
        several = len(self.devices) > 1 or self._nodes is not None
        caches: list[Any] = list(full.get(0, ()))
        if several:
            caches = [StripedKV({d: c[i] for d, c in full.items()}, device) for i in indices]
        if self.network.mixers:
            return [self._with_states(rows) for rows in caches]
        if not self.draft.over_retrieval:
            return caches
        retrieval: list[ChosenRows] = list(chosen[0])
        if several:
            parts = [{d: c[i] for d, c in chosen.items()} for i in indices]
            retrieval = [StripedRetrieval(each, device) for each in parts]
        return [FollowedKV(*pair) for pair in zip(caches, retrieval, strict=True)]

    def _with_states(self, rows: KVCache) -> HybridKV:
        """A cache of a sequence with the recurrent states beside it."""
        network, near = self.network, set[int]()
        for device, own in zip(self.devices, self.placement.of_devices, strict=False):
            device.enter(sum(own.demand.state_bytes) // len(self.capacities), STATES)
            near.update(own.layers)
        layers = [mixer.layer for mixer in network.mixers if mixer.layer in near]
        elsewhere = self._nodes is not None
        states = MixerStates(layers, self.device.kind.state_rows, elsewhere=elsewhere)
        return HybridKV(rows, states, network.attending)

    def _full_caches(
        self,
        device: Device,
        shapes: Sequence[KVShape],
        plan: KVPlan | None,
        capacities: Sequence[int],
        undo: ExitStack,
    ) -> Sequence[WatchedCache | PassingKV]:
        """The caches of a device's layers."""
        dtype = self.network.dtype
        if self.config.kv is KVPlace.NONE:
            return [PassingKV(device, shapes, dtype, rows) for rows in capacities]
        where: KVPlan | KVPool | Sequence[int] = plan or capacities
        if plan is None and self._kv_tokens is not None:
            rows = self._kv_tokens + len(capacities) * self.draft.pending_rows
            where = KVPool(device, shapes, dtype, rows=rows, sequences=len(capacities))
            self._pools.append(where)
        folder = self.config.kv_folder
        return allocate_caches(device, shapes, dtype, plan=where, folder=folder, undo=undo)

    def _retrieval_caches(self, device: Device, shapes: Sequence[KVShape]) -> list[RetrievalKV]:
        """What triforce drafts over, of a device's layers; nothing where others draft."""
        if not self.draft.over_retrieval:
            return []
        dtype = self.network.dtype
        row_bytes = [shape.numbers_per_token * dtype.itemsize for shape in shapes]
        sizes = [retrieval_sizes(self.draft, row_bytes, tokens) for tokens in self.capacities]
        return [RetrievalKV(device, shapes, dtype, own) for own in sizes]


def _spare_bytes(own: Placement) -> int:
    """The ring, or the caches and the workspace of a pass, which come later than weights."""
    ring_bytes = own.slots * own.slot_bytes + own.pool_bytes
    return ring_bytes + own.demand.kv_bytes + own.demand.workspace_bytes


def open_devices(config: RuntimeConfig, undo: ExitStack, models: Sequence[Checkpoint]) -> Devices:
    """Open the devices a run asks for; `undo` closes them.

    Args:
        config: asks for them.
        undo: closes them.
        models: the model, and the one that drafts.
    """
    first, *others = config.each_device()
    if config.machines:
        others = []  # each is another machine's
    if chosen_kind(first).host_computes:
        if is_spared():  # the process is ours alone, so nobody in it uses a GPU
            put_tables_aside(cache_folder())
        products.prepare()  # first, as a CPU's memory is counted from when it was opened
        for model in models:
            name = compute_dtype(model, config.dtype)
            direct.prepare(dict.fromkeys(model.stored.values()), name)
        if any(each.stored for each in models):
            brought.prepare()
    opened = [open_device(first)]
    undo.callback(opened[0].close)
    for one in others:
        opened.append(open_device(one, opened[0]))
        undo.callback(opened[-1].close)
    return Devices(opened)
