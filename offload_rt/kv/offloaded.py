"""A KV cache whose committed rows live outside the device and stream through it in blocks.

Where a row of an offloaded layer is, and until when (`home_rows`, `recent`, `sent`, `written` are
of `_Layer`):

    state       where                          until
    staged      `KVSpace.memory`               the next layer stages, or the commit; then it is on
                                               its way, or recent if there are too few for a write
    recent      `recent`                       a commit has enough for a write, or forgets it
    on its way  `recent`, and the home in      `sent`, then its memory may be overwritten, and
                [0, home_rows)                 `written`, then its block may be read
    at home     the home in [0, home_rows)     `truncate` forgets it
    fetched     a slot of the ring             the slot is refilled; after `truncate` the rows
                                               behind the last whole write are recent again

A pass attends to the home's rows block by block as they come in (`streaming/ring.py`), to the
recent ones where they are, and merges the parts (`attention/partial.py`). Only committed rows of a
step go home, so a rejected row never does.

A prompt has more pending rows than `recent` holds. It runs layer by layer, so all its rows of one
layer are staged in one place on the device, shared by all layers and sequences; attention there is
that of a resident cache, and when the next layer begins, the rows go home, once. They are at the
home before they are committed, behind the committed ones, and are only kept as a chain.

Rows are token by token, here as at the home (`home.py`): [K, T, D] are strided views.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch

from offload_rt.attention.exact import PART, exact_attention
from offload_rt.attention.partial import PartialAttention
from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.attention.visible import visible_rows
from offload_rt.device.base import Device, DeviceBuffer, Event, HomeSource, TwoWayStream
from offload_rt.errors import CapacityError, ConfigError
from offload_rt.kv.base import KVShape, RowWatcher
from offload_rt.kv.home import KVHome
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.sizes import KVSizes
from offload_rt.streaming.ring import Ring, RingWatch

Rows = tuple[torch.Tensor, torch.Tensor]  # keys [K, T, D] and values [K, T, D], views


@dataclass(frozen=True, slots=True)
class LentRows:
    """Rows of a block where they were lent: memory [T, numbers of a row], and views of it."""

    memory: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def first(self, rows: int) -> "LentRows":
        """Only the first ones."""
        if rows == self.memory.shape[0]:
            return self
        return LentRows(self.memory[:rows], self.keys[:, :rows], self.values[:, :rows])


@dataclass(frozen=True, slots=True)
class RowFormat:
    """How one token's keys and values lie in memory."""

    shape: KVShape
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        return self.shape.numbers_per_token * self.dtype.itemsize

    def memory(self, buffer: torch.Tensor) -> torch.Tensor:
        """[n] uint8 as [rows, numbers of a row]; what does not make a whole row is left out."""
        whole = buffer.numel() // self.nbytes * self.nbytes
        return buffer[:whole].view(self.dtype).view(-1, self.shape.numbers_per_token)

    def views(self, rows: torch.Tensor) -> Rows:
        """Keys and values in rows [T, numbers of a row]."""
        shape = self.shape
        keys, values = rows.split(
            [shape.heads * shape.key_dim, shape.heads * shape.value_dim], dim=1
        )
        return (
            keys.unflatten(1, (shape.heads, shape.key_dim)).transpose(0, 1),
            values.unflatten(1, (shape.heads, shape.value_dim)).transpose(0, 1),
        )

    def lent(self, buffer: torch.Tensor) -> LentRows:
        """[n] uint8 as rows."""
        memory = self.memory(buffer)
        return LentRows(memory, *self.views(memory))

    def put(self, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write keys [K, S, D] and values into rows [S, numbers of a row]."""
        keys, values = self.views(rows)
        keys.copy_(key)
        values.copy_(value)


class KVSpace:
    """What the offloaded caches of a run share: its streams and the memory prompts stage in.

    Rows come in one stream and go home in another, so that a link with two directions uses both.
    Staged rows leave after the kernels that wrote them; the memory is written again only after
    `drained`, the event behind that copy.

    Args:
        device: where the memory is taken.
        staging_bytes: all rows of the largest layer of the longest sequence; 0 if none is staged.

    Attributes:
        copy: rows come from a home in it.
        back: rows go home in it.
        staged: the layer whose rows are staged now, and its cache.
    """

    def __init__(self, device: Device, staging_bytes: int) -> None:
        self.device = device
        self.copy, self.back = device.new_copy_stream(), device.new_copy_stream()
        self.memory = device.allocate(staging_bytes, "KV staging").tensor
        self.staged: tuple[OffloadedKV, _Layer] | None = None
        self.drained: Event | None = None
        self._homes: list[KVHome] = []

    def own(self, home: KVHome) -> None:
        """Close this home at the end."""
        self._homes.append(home)

    def claim(self, cache: "OffloadedKV", layer: "_Layer") -> None:
        """Give the staging memory to a layer; the rows of the one that had it go home."""
        if self.staged is not None:
            self.staged[0].unstage()
        if self.drained is not None:
            self.device.compute.wait(self.drained)
        self.staged, self.drained = (cache, layer), None

    def close(self) -> None:
        """End the copies, then close the homes."""
        self.copy.close()
        self.back.close()
        for home in self._homes:
            home.close()


@dataclass(frozen=True, slots=True)
class _Renamed:
    """A watcher to whom a layer of `ResidentKV` is called by its index in the network."""

    watcher: RowWatcher
    layer: int

    def see(self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Look at rows [K, T, D]."""
        self.watcher.see(self.layer, first, key, value)


@dataclass(eq=False, slots=True)
class _Layer:
    """Rows of one offloaded layer.

    Attributes:
        index: which layer.
        recent: [recent tokens, numbers of a row] device memory.
        home_rows: rows at the home, or on their way.
        start: where in `recent` the row after those is.
        count: rows from there on, pending ones included.
        window: the layer's, once it is known.
        written: rows from the second number on may still be on their way until the event.
        sent: until this event a write may still read `recent`.
        lent: views of each of the ring's buffers.
    """

    index: int
    format: RowFormat
    recent: torch.Tensor
    home_rows: int = 0
    start: int = 0
    count: int = 0
    window: int | None = None
    written: tuple[Event, int] | None = None
    sent: Event | None = None
    lent: dict[int, LentRows] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All rows, pending ones included."""
        return self.home_rows + self.count

    def local(self) -> torch.Tensor:
        """The rows after those at the home: [count, numbers of a row]."""
        return self.recent[self.start : self.start + self.count]


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of one layer; two are equal only if they hold as many rows."""

    layer: int
    index: int
    rows: int

    def __str__(self) -> str:
        return f"layer {self.layer}, block {self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KVOptions:
    """How an offloaded cache is used.

    Attributes:
        attend_on_host: attend to the home's rows where they are; nothing is copied (CPU only).
    """

    attend_on_host: bool = False


@dataclass(eq=False, slots=True)
class _Order:
    """The order of blocks: layer by layer, cyclically, as many as there are now."""

    layers: Sequence[_Layer]
    home: KVHome
    sizes: KVSizes
    length: int = 0
    at: dict[int, int] = field(default_factory=dict)  # place in `layers` by layer index

    def blocks_of(self, layer: _Layer) -> range:
        """Indices of the blocks with a row that any pending row may look at."""
        size = self.sizes.block_tokens
        first = 0 if layer.window is None else max(0, self.length - layer.window + 1)
        return range(first // size, -(-layer.home_rows // size))

    def block(self, layer: _Layer, index: int) -> Block:
        """A block with the rows it has now."""
        size = self.sizes.block_tokens
        return Block(layer.index, index, min(size, layer.home_rows - index * size))

    def first(self) -> Block | None:
        """The first block of the first layer that has any."""
        return self._first_from(0)

    def after(self, block: Block) -> Block | None:
        """The next block of the layer, or the first of the next layer that has any."""
        at = self.at[block.layer]
        layer = self.layers[at]
        if block.index + 1 in self.blocks_of(layer):
            return self.block(layer, block.index + 1)
        return self._first_from(at + 1)

    def source(self, block: Block) -> HomeSource:
        """The bytes of a block."""
        return self.home.source(block.layer, block.index * self.sizes.block_tokens, block.rows)

    def written(self, block: Block) -> Event | None:
        """The event behind the last write to a block."""
        written = self.layers[self.at[block.layer]].written
        end = block.index * self.sizes.block_tokens + block.rows
        return written[0] if written is not None and end > written[1] else None

    def _first_from(self, at: int) -> Block | None:
        for step in range(len(self.layers)):
            layer = self.layers[(at + step) % len(self.layers)]
            if blocks := self.blocks_of(layer):
                return self.block(layer, blocks.start)
        return None


class OffloadedKV:
    """Keys and values of one sequence, outside the device but for the newest rows.

    Ordering beside that of `Ring`: a write home is enqueued after the kernels that made its rows,
    and, where it overwrites rows that were forgotten, after the reads of them. Their memory is
    overwritten, and their block read, only after the event behind it.

    Args:
        space: shared with the other sequences.
        shapes: sizes per layer.
        dtype: number format of keys and values.
        sizes: what it takes, as the plan counted it.
        home: where the committed rows live.
        options: how it is used.
    """

    def __init__(
        self,
        space: KVSpace,
        shapes: Sequence[KVShape],
        dtype: torch.dtype,
        sizes: KVSizes,
        home: KVHome,
        options: KVOptions | None = None,
    ) -> None:
        self.capacity = sizes.capacity
        self._space, self._device, self._sizes, self._home = space, space.device, sizes, home
        self._options = options or KVOptions()
        self._length = 0
        self._watch: RingWatch | None = None
        self._kept = {layer: i for i, layer in enumerate(sorted(sizes.resident))}
        kept_shapes = [shapes[layer] for layer in self._kept]
        self._resident = (
            ResidentKV(self._device, kept_shapes, dtype, sizes.capacity) if kept_shapes else None
        )
        formats = {layer: RowFormat(shapes[layer], dtype) for layer in sizes.offloaded}
        self._layers = self._allocate_recent(formats)
        places = {layer: at for at, layer in enumerate(self._layers)}
        self._order = _Order(list(self._layers.values()), home, sizes, at=places)
        self._ring: Ring[Block, DeviceBuffer, HomeSource] | None = None
        if not self._options.attend_on_host:
            buffers = [
                self._device.allocate(sizes.slot_bytes, "KV blocks") for _ in range(sizes.slots)
            ]
            self._ring = Ring(self._order, buffers, space.copy, self._device.compute)
        elif not (self._device.kind.attends_at_home and self._rows_are_in_memory()):
            raise ConfigError("attending where the KV is needs it in memory, and --device cpu")

    @property
    def length(self) -> int:
        """Committed tokens."""
        return self._length

    @property
    def copies(self) -> Sequence[TwoWayStream]:
        """The streams its rows cross the link in, shared by all sequences."""
        return self._space.copy, self._space.back

    @property
    def device(self) -> Device:
        """Where its newest rows and its ring are."""
        return self._device

    def watch(self, watch: RingWatch) -> None:
        """Have `watch` told of blocks that are read, waited for and written (`Ring.watch`)."""
        self._watch = watch
        if self._ring is not None:
            self._ring.watch = watch

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Nothing: every pass is alike to this cache."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add pending rows: key [K, S, D], value [K, S, D]."""
        if layer in self._kept:
            assert self._resident is not None
            self._resident.append(self._kept[layer], key, value)
            return
        state, rows = self._layers[layer], key.shape[1]
        total = state.total + rows
        if total > self.capacity:
            raise CapacityError(
                f"the KV cache has room for {self.capacity} tokens, {total} are needed: "
                "raise --context"
            )
        if total - self._length > self._sizes.scratch_tokens and not self._is_staged(state):
            self._stage(state)
        if self._is_staged(state):
            target = self._staging(state)[state.total : total]
        else:
            self._wait_until_sent(state)
            if state.start + state.count + rows > state.recent.shape[0]:
                self._move_recent(state, state.local())
            end = state.start + state.count
            target = state.recent[end : end + rows]
        state.format.put(target, key, value)
        state.count += rows

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
        watcher: RowWatcher | None = None,
    ) -> torch.Tensor:
        """Attend from the last rows appended: query [H, S, D] gives [S, H, D]."""
        if layer in self._kept:
            assert self._resident is not None
            shown = watcher and _Renamed(watcher, layer)
            return self._resident.attend(self._kept[layer], query, spec, tree, shown)
        state = self._layers[layer]
        state.window = spec.window
        if self._is_staged(state):
            keys, values = state.format.views(self._staging(state)[: state.total])
            if watcher is not None:
                watcher.see(layer, 0, keys, values)
            return attend_rows(query, keys, values, spec, tree)
        assert state.count >= query.shape[1]  # each layer attends right after it appended
        if state.home_rows == 0:
            keys, values = state.format.views(state.local())
            if watcher is not None:
                watcher.see(layer, 0, keys, values)
            return attend_rows(query, keys, values, spec, tree)
        attend = self._attend_exactly if spec.exact else self._attend_by_blocks
        return attend(state, query, spec, tree, watcher)

    def _attend_by_blocks(
        self,
        state: _Layer,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None,
        watcher: RowWatcher | None,
    ) -> torch.Tensor:
        """Attend to the recent rows and to those at the home, block by block as they come in."""
        keys, values = state.format.views(state.local())
        local_tree = tree and replace(tree, positions=tree.positions - state.home_rows)
        parts = PartialAttention(query, state.format.shape.heads, spec)
        parts.add_newest(keys, values, local_tree)
        count, device = query.shape[1], query.device
        for start, lent in self._lend_home_rows(state):
            visible = None
            if spec.window is not None and state.total - start > spec.window:
                place = range(start, start + lent.memory.shape[0])
                visible = visible_rows(count, place, state.total, spec.window, device, tree)
            parts.add(lent.keys, lent.values, visible)
            if watcher is not None:
                watcher.see(state.index, start, lent.keys, lent.values)
        if watcher is not None:
            watcher.see(state.index, state.home_rows, keys, values)
        return parts.result()

    def _attend_exactly(
        self,
        state: _Layer,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None,
        watcher: RowWatcher | None,
    ) -> torch.Tensor:
        """The same with the bits of a resident cache: rows are put together in whole parts."""
        layout, pending = state.format, query.shape[1] if tree is None else tree.positions.numel()
        committed = state.total - pending
        shape = layout.shape.heads, layout.shape.value_dim
        attention = exact_attention(query, shape, spec, committed, tree)
        tail = state.recent.new_zeros(state.total - attention.tail, state.recent.shape[1])
        part = tail.new_zeros(min(PART, attention.tail), tail.shape[1])
        reached = 0

        def put(start: int, rows: torch.Tensor) -> None:
            nonlocal reached
            while reached + PART <= min(start, attention.tail):  # left out by the window
                attention.add(reached, *layout.views(part))
                reached += PART
            if watcher is not None:
                watcher.see(state.index, start, *layout.views(rows))
            done = 0
            while done < len(rows) and start + done < attention.tail:
                at = (start + done) % PART
                count = min(PART - at, len(rows) - done)
                part[at : at + count] = rows[done : done + count]
                done += count
                if at + count == PART:
                    attention.add(reached, *layout.views(part))
                    reached += PART
            if done < len(rows):
                at = start + done - attention.tail
                tail[at : at + len(rows) - done] = rows[done:]

        for start, lent in self._lend_home_rows(state):
            put(start, lent.memory)
        put(state.home_rows, state.local())
        return attention.result(*layout.views(tail))

    def commit(self, keep: Sequence[int]) -> None:
        """Keep these pending rows, in this order; forget the rest; full writes go home."""
        pending = min((state.total for state in self._layers.values()), default=0) - self._length
        if self._layers and any(not 0 <= row < pending for row in keep):
            raise CapacityError(f"cannot keep rows {list(keep)}: {pending} rows are pending")
        if self._space.staged is not None and self._space.staged[0] is self:
            self.unstage()
        chain = list(keep) == list(range(len(keep)))
        if not chain and any(s.home_rows > self._length for s in self._layers.values()):
            raise CapacityError(
                f"of {pending} pending rows only the first ones can be kept: more than "
                f"{self._sizes.scratch_tokens} are a prompt"
            )
        if self._resident is not None:
            self._resident.commit(keep)
        if not chain:
            self._gather(keep)
        self._set_length(self._length + len(keep))

    def truncate(self, length: int) -> None:
        """Forget pending rows and all committed rows from `length` on."""
        if not 0 <= length <= self._length:
            raise CapacityError(f"cannot go back to {length} tokens: {self._length} are cached")
        if self._space.staged is not None and self._space.staged[0] is self:
            self._space.staged = None  # `recent` still has the committed rows
        if self._resident is not None:
            self._resident.truncate(length)
        self._set_length(length)

    def unstage(self) -> None:
        """Send the staged rows home; the newest, which do not fill a write, become recent."""
        assert self._space.staged is not None
        state = self._space.staged[1]
        rows = self._staging(state)[: state.total]
        home_rows = self._sizes.home_rows(state.total)
        self._space.staged = None
        self._move_recent(state, rows[home_rows:])
        state.count = state.total - home_rows
        self._send_home(state, rows[state.home_rows : home_rows])
        self._space.drained = self._space.back.record()

    def _set_length(self, length: int) -> None:
        """Forget all rows from `length` on, send home what fills a write, fetch what comes next."""
        home_rows = self._sizes.home_rows(length)
        self._length = self._order.length = length
        for state in self._layers.values():
            if state.home_rows > length:
                self._fetch_back(state, home_rows, length)
            state.count = length - state.home_rows
            if home_rows > state.home_rows:
                sent = home_rows - state.home_rows
                rows = state.local()[:sent]
                state.start, state.count = state.start + sent, state.count - sent
                self._send_home(state, rows)
                state.sent = self._space.back.record()
        if self._ring is not None:
            self._ring.refresh()

    def _send_home(self, state: _Layer, rows: torch.Tensor) -> None:
        """Write the next rows [n, numbers of a row] to the home."""
        if not rows.shape[0]:
            return
        back = self._space.back
        back.wait(self._device.compute.record())
        if state.written is not None:  # from then on only this write is waited for
            self._space.copy.wait(state.written[0])
        target = self._home.target(state.index, state.home_rows, rows.shape[0])
        end = None if self._watch is None else self._watch("write", f"layer {state.index}", back)
        back.store(target, rows.reshape(-1).view(torch.uint8))
        state.written = back.record(), state.home_rows
        if end is not None:
            end()
        state.home_rows += rows.shape[0]

    def _fetch_back(self, state: _Layer, home_rows: int, length: int) -> None:
        """Bring the rows between a write's border and `length` back on the device."""
        index = home_rows // self._sizes.block_tokens
        first = index * self._sizes.block_tokens
        if home_rows < length:
            block = Block(state.index, index, length - first)
            lent = nullcontext(None) if self._ring is None else self._ring.fetch(block)
            with lent as buffer:
                rows = self._lent(state, block, buffer)
                self._move_recent(state, rows.memory[home_rows - first :])
        state.home_rows, state.start = home_rows, 0
        self._space.back.wait(self._space.copy.record())

    def _lend_home_rows(self, state: _Layer) -> Iterator[tuple[int, LentRows]]:
        """Lend the rows at the home that the window allows, block by block.

        Each comes with the number of its first row.
        """
        for index in self._order.blocks_of(state):
            block, start = self._order.block(state, index), index * self._sizes.block_tokens
            if self._ring is None:
                yield start, self._lent(state, block, None)
                continue
            with self._ring.lend(block) as buffer:
                yield start, self._lent(state, block, buffer)

    def _lent(self, state: _Layer, block: Block, buffer: DeviceBuffer | None) -> LentRows:
        """The rows of a block in a buffer of the ring, or, without one, at the home."""
        if buffer is not None:
            lent = state.lent.get(id(buffer))
            if lent is None:
                lent = state.lent[id(buffer)] = state.format.lent(buffer.tensor)
            return lent.first(block.rows)
        if (written := self._order.written(block)) is not None:
            self._device.compute.wait(written)
        first = block.index * self._sizes.block_tokens
        memory = self._home.rows(block.layer, first, block.rows)
        assert memory is not None
        return state.format.lent(memory)

    def _is_staged(self, state: _Layer) -> bool:
        return self._space.staged is not None and self._space.staged[1] is state

    def _staging(self, state: _Layer) -> torch.Tensor:
        return state.format.memory(self._space.memory)

    def _stage(self, state: _Layer) -> None:
        """Gather all rows of a layer in the staging memory: from the home, then the recent ones."""
        self._space.claim(self, state)
        staging = self._staging(state)
        window, state.window = state.window, None
        for start, lent in self._lend_home_rows(state):
            staging[start : start + lent.memory.shape[0]].copy_(lent.memory)
        state.window = window
        staging[state.home_rows : state.total].copy_(state.local())

    def _move_recent(self, state: _Layer, rows: torch.Tensor) -> None:
        """Make `rows` the beginning of the recent memory, once no write reads it any more."""
        self._wait_until_sent(state)
        state.recent[: rows.shape[0]] = rows.clone()
        state.start = 0

    def _wait_until_sent(self, state: _Layer) -> None:
        if state.sent is not None:
            self._device.compute.wait(state.sent)
            state.sent = None

    def _gather(self, keep: Sequence[int]) -> None:
        """Put the kept pending rows behind the committed ones."""
        rows = self._device.upload(list(keep))
        for state in self._layers.values():
            begin = state.start + self._length - state.home_rows
            kept = state.recent[begin : state.start + state.count][rows]
            state.recent[begin : begin + len(keep)] = kept

    def _allocate_recent(self, formats: dict[int, RowFormat]) -> dict[int, _Layer]:
        layers = {}
        for index, row_format in formats.items():
            assert row_format.nbytes == self._sizes.row_bytes[index]
            size = self._sizes.recent_tokens * row_format.nbytes
            memory = self._device.allocate(size, "KV recent rows").tensor
            layers[index] = _Layer(index, row_format, row_format.memory(memory))
        return layers

    def _rows_are_in_memory(self) -> bool:
        offloaded = self._sizes.offloaded
        return not offloaded or self._home.rows(offloaded[0], 0, 0) is not None
