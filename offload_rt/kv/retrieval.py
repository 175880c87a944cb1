"""The retrieval cache of TriForce: chunks of a long context that matter now, and the newest rows.

After "TriForce" (arXiv:2404.11912, section 4.1): per layer and KV head, chunks of consecutive
tokens are scored against a query; the first chunk and the best others are kept, at their own
positions. The paper scores a chunk by its mean key. Here it is the attention the chunk receives,
summed over the query heads of its KV head. It costs as much as one more row of attention; with
Qwen2.5-Coder-1.5B, 6,000 tokens of a novel and a budget of 1,024, 0.87 of a summary's tokens were
then predicted right, 0.79 with mean keys, 0.64 with a sink cache. The newest tokens are always
there. With several query heads per KV head the sum is exact only if all rows arrive in one block;
otherwise each head is normalised over the rows seen so far.

It is built while a pass over the full cache reads every row anyway (`see`): a running best-of over
the rows as they come by, so nothing of the full cache is read twice and none of it is held. Between
two builds it follows the full cache: the rows a pass adds there are added here (`followed.py`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.device.base import Device
from offload_rt.errors import CapacityError
from offload_rt.kv.base import KVShape
from offload_rt.kv.resident import split_rows, stores_alike
from offload_rt.kv.sizes import RetrievalSizes
from offload_rt.kv.static import RowMemory, RowsBefore

PINNED = float("inf")
EMPTY = -1.0  # of a place that nothing is kept in yet: below every sum of exponentials
# Exponents against the largest logit of the first rows, which have the sink; what is above it by
# more counts as this, and so many of them add up without overflow.
HIGHEST = 60.0
_RING = 16  # buffers of a ring whose views are kept while a layer is built, at most


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the rows of every layer are.

    Attributes:
        chunks: chunks that are kept, the first one included.
        tail_start: position of the first row behind them; from there on no position is missing.
    """

    chunks: int = 0
    tail_start: int = 0


class _Views:
    """Views of rows that are seen again with other contents, as a ring's buffers are.

    There are few buffers and many blocks, and to make a view is a call for each block.
    """

    def __init__(self) -> None:
        self._made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(self, rows: torch.Tensor, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The view that `make` makes of rows; both are kept, so nothing else has their `id`."""
        found = self._made.get(id(rows))
        if found is None:
            found = rows, make(rows)
            if len(self._made) < _RING:
                self._made[id(rows)] = found
        return found[1]


@dataclass(slots=True)
class _Build:
    """A layer that is being built.

    Attributes:
        query: [K, R, D] the R rows of each KV head's group that ask, times the scaling; None keeps
            the newest.
        softcap: of the layer.
        stores: keys and values of the kept chunks, [K, chunks, c, D] views.
        kept: [K, R, chunks] of what was kept so far: sum of exponentials in a chunk; `EMPTY` where
            nothing is kept yet.
        total: [K, R, 1] the same of all rows so far, if several ask.
        below_top: [K, R, 1] less the largest logit of the first rows that came; exponents are
            against it.
        carry: keys, values and exponentials of a chunk whose other rows have not come yet.
        next_row: position of the row that comes next.
        turned: [K, D, T] views of keys [K, T, D] that were seen.
        cut: [K, M, c, D] views of keys and values.
    """

    query: torch.Tensor | None
    softcap: float | None
    stores: Sequence[torch.Tensor]
    kept: torch.Tensor
    total: torch.Tensor
    below_top: torch.Tensor | None = None
    carry: Sequence[torch.Tensor] | None = None
    next_row: int = 0
    turned: _Views = field(default_factory=_Views)
    cut: _Views = field(default_factory=_Views)

    @property
    def asks_alone(self) -> bool:
        """Whether one row asks, so that what it attends to in all does not matter."""
        return self.kept.shape[1] == 1

    def exponentials(self, keys: torch.Tensor, part_rows: int) -> torch.Tensor:
        """[K, R, T] of the products with more keys [K, T, D], in fp32; `total` has them then."""
        assert self.query is not None
        if keys.shape[1] <= part_rows:
            turned = self.turned.of(keys, lambda keys: keys.transpose(1, 2))
            logits = self._against_top(turned.float())
        else:
            parts = keys.transpose(1, 2).split(part_rows, dim=2)
            logits = torch.cat([self._against_top(part.float()) for part in parts], dim=2)
        exponentials = logits.clamp_(max=HIGHEST).exp_()
        if not self.asks_alone:
            self.total += exponentials.sum(dim=2, keepdim=True)
        return exponentials

    def _against_top(self, keys: torch.Tensor) -> torch.Tensor:
        """[K, R, T] logits of keys [K, D, T], less the largest of the first rows."""
        assert self.query is not None
        if self.below_top is not None and self.softcap is None:
            return torch.baddbmm(self.below_top, self.query, keys)
        logits = torch.bmm(self.query, keys)
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.below_top is None:
            self.below_top = -logits.amax(dim=2, keepdim=True)
        return logits + self.below_top

    def scores(self, sums: torch.Tensor) -> torch.Tensor:
        """[K, M] the attention chunks receive, or what grows with it, from their [K, R, M]."""
        if self.asks_alone:
            return sums[:, 0]
        return (sums / self.total).sum(dim=1)


class RetrievalKV:
    """Selected keys and values of one sequence, on the device.

    Positions are those of the sequence and keys are rotated by them, so the order of rows does not
    matter to attention. `length` counts the whole sequence, whatever is kept of it.

    Args:
        device: where the memory is taken.
        shapes: sizes per layer.
        dtype: number format of keys and values.
        sizes: what it takes, as the plan counted it.

    Attributes:
        shares: parts of the budget that may be the newest tokens.
        built_at: tokens of the sequence it was last built from; None while it is not built.
    """

    def __init__(
        self,
        device: Device,
        shapes: Sequence[KVShape],
        dtype: torch.dtype,
        sizes: RetrievalSizes,
    ) -> None:
        self.capacity, self.shares = sizes.capacity, sizes.config.shares
        self._device, self._sizes = device, sizes
        memory = device.allocate(sizes.device_bytes, "retrieval cache").tensor.view(dtype)
        self._keys, self._values = split_rows(memory, shapes, sizes.rows)
        self._alike = stores_alike(memory, shapes, sizes.rows)
        self.memory = RowMemory(self._keys, self._values, sizes.rows)
        self._length = 0
        self._layout = _Layout()
        self._pending = [0] * len(shapes)
        self._part_rows = sizes.part_rows(host_computes=device.kind.host_computes)
        self._builds: dict[int, _Build] = {}
        self._build_rows = 0  # rows of the full cache that a build sees; 0 between builds
        self.built_at: int | None = None

    @property
    def length(self) -> int:
        """Committed tokens of the sequence, kept or not."""
        return self._length

    @property
    def is_due(self) -> bool:
        """Whether it was never built, or is due to be built again."""
        if self.built_at is None:
            return True
        sizes = self._sizes
        if self._layout.tail_start == 0 and self._length + 2 * sizes.scratch_tokens <= sizes.rows:
            return False  # all of the context is there, with room for more
        return self._length - self.built_at >= sizes.config.rebuild_tokens

    @property
    def is_complete(self) -> bool:
        """Whether nothing of the context is left out."""
        layout = self._layout
        return layout.tail_start == layout.chunks * self._sizes.config.chunk_tokens

    def leaves_out(self, length: int) -> bool:
        """Whether a build from that many rows keeps but a part of them."""
        return length > self._sizes.config.budget_tokens

    def begin_pass(self, rows: int, *, keeps_all: bool) -> None:
        """Nothing: every pass is alike to this cache."""

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Add pending rows: key [K, S, D], value [K, S, D]."""
        start = self._row_of(self._length) + self._pending[layer]
        stop = start + key.shape[1]
        if stop > self._sizes.rows:
            raise CapacityError(
                f"the retrieval cache has {self._sizes.rows} rows, {stop} are needed"
            )
        self._keys[layer][:, start:stop] = key
        self._values[layer][:, start:stop] = value
        self._pending[layer] += key.shape[1]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        spec: AttentionSpec,
        tree: PendingTree | None = None,
    ) -> torch.Tensor:
        """Attend from the last rows appended: query [H, S, D] gives [S, H, D]."""
        length = self._length + self._pending[layer]
        first, stop = 0, self._row_of(length)
        if spec.window is not None:
            first = self._window_first
        if tree is not None:
            tree = PendingTree(tree.visible, tree.positions - (length - stop + first))
        keys, values = (store[layer][:, first:stop] for store in (self._keys, self._values))
        return attend_rows(query, keys, values, replace(spec, exact=False), tree)

    def rows_before(self) -> RowsBefore:
        """What a recorded pass finds."""
        return RowsBefore(
            committed=self._row_of(self._length),
            pending=min(self._pending),
            window_first=self._window_first,
        )

    def appended(self, rows: int) -> None:
        """A recorded pass wrote that many pending rows of every layer."""
        self._pending = [pending + rows for pending in self._pending]

    def commit(self, keep: Sequence[int]) -> None:
        """Keep these pending rows, in this order; forget the rest."""
        pending = min(self._pending)
        if any(not 0 <= row < pending for row in keep):
            raise CapacityError(f"cannot keep rows {list(keep)}: {pending} rows are pending")
        start = self._row_of(self._length)
        if list(keep) != list(range(len(keep))):
            rows = self._device.upload([start + row for row in keep])
            for store in self._alike:
                store[:, start : start + len(keep)] = store[:, rows]
        self._set_length(self._length + len(keep))

    def truncate(self, length: int) -> None:
        """Forget pending rows and all committed rows from `length` on; may leave it unbuilt."""
        if self._build_rows or length < self._layout.tail_start:
            self._builds, self._build_rows, self.built_at = {}, 0, None
        self._set_length(length)

    def begin_build(self, length: int, recent_share: float) -> None:
        """Begin to choose anew in every layer.

        Args:
            length: rows of the sequence to choose from, the first ones.
            recent_share: part of the budget that is the newest of them.
        """
        sizes = self._sizes
        start = sizes.tail_start(length, recent_share)
        chunks = min(sizes.max_chunks(recent_share), start // sizes.config.chunk_tokens)
        self._layout, self._build_rows, self._builds = _Layout(chunks, start), length, {}
        self._set_length(length)

    def end_build(self) -> None:
        """Use what was chosen."""
        self.built_at, self._build_rows, self._builds = self._build_rows, 0, {}

    def begin_layer(self, layer: int, query: torch.Tensor, spec: AttentionSpec) -> None:
        """Begin to choose for a layer.

        Args:
            layer: layer index.
            query: [H, S, D] of the S rows that ask.
            spec: how the layer attends; with a window its newest chunks are kept.
        """
        heads, chunks = self._keys[layer].shape[0], self._layout.chunks
        asked = None
        if spec.window is None:
            grouped = query.unflatten(0, (heads, -1))  # [K, G, S, D]
            asked = grouped.flatten(1, 2).float() * spec.scaling
        rows = 0 if asked is None else asked.shape[1]
        kept = torch.full((heads, rows, chunks), EMPTY, device=query.device)
        total = torch.zeros(heads, rows, 1, device=query.device)
        shape = (heads, chunks, self._sizes.config.chunk_tokens)
        stores = [
            store[layer][:, : chunks * shape[2]].view(*shape, store[layer].shape[2])
            for store in (self._keys, self._values)
        ]
        self._builds[layer] = _Build(asked, spec.softcap, stores, kept, total)

    def see(self, layer: int, first: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Choose from rows [K, T, D] of the full cache, from position `first` on, in order."""
        build, layout = self._builds[layer], self._layout
        count = min(first + key.shape[1], self._build_rows) - first
        newest = layout.tail_start
        if build.query is None:  # the kept chunks are the newest, but for the pinned first
            pinned = 0 if self.is_complete else 1
            newest -= (layout.chunks - pinned) * self._sizes.config.chunk_tokens
        start = max(first, newest)
        if start < first + count:
            rows = slice(self._row_of(start), self._row_of(first + count))
            self._keys[layer][:, rows] = key[:, start - first : count]
            self._values[layer][:, rows] = value[:, start - first : count]
        old = min(first + count, layout.tail_start) - first
        if build.query is None or old <= 0:
            return
        assert build.next_row == first
        build.next_row = first + old
        sums = build.exponentials(key if count == key.shape[1] else key[:, :count], self._part_rows)
        if old < key.shape[1]:
            key, value, sums = key[:, :old], value[:, :old], sums[:, :, :old]
        self._choose(build, first, key, value, sums)

    def _choose(
        self,
        build: _Build,
        first: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        sums: torch.Tensor,
    ) -> None:
        """Cut keys and values [K, T, D] and exponentials [K, R, T] into chunks.

        A part of one waits for the rest.
        """
        size = self._sizes.config.chunk_tokens
        if build.carry is not None:
            lacking, old = size - build.carry[0].shape[1], build.carry
            build.carry = None
            self._choose(
                build,
                first,
                torch.cat([old[0], keys[:, :lacking]], dim=1),
                torch.cat([old[1], values[:, :lacking]], dim=1),
                torch.cat([old[2], sums[:, :, :lacking]], dim=2),
            )
            first += size
            keys, values, sums = keys[:, lacking:], values[:, lacking:], sums[:, :, lacking:]
        count, rest = divmod(keys.shape[1], size)
        if rest:
            at = count * size
            build.carry = keys[:, at:].clone(), values[:, at:].clone(), sums[:, :, at:].clone()
            keys, values, sums = keys[:, :at], values[:, :at], sums[:, :, :at]
        if not count or not self._layout.chunks:
            return
        sums = sums.reshape(*sums.shape[:2], count, size).sum(dim=3)
        if first < size:
            sums[:, :, 0] = PINNED
        keys, values = (
            build.cut.of(rows, lambda rows: rows.unflatten(1, (count, size)))
            for rows in (keys, values)
        )
        if self._device.kind.host_computes:
            self._exchange(build, keys, values, sums)
            return
        most = max(1, self._part_rows // size)
        if count <= most:
            self._select(build, keys, values, sums)
            return
        for start in range(0, count, most):
            part = slice(start, start + most)
            self._select(build, keys[:, part], values[:, part], sums[:, :, part])

    def _exchange(
        self,
        build: _Build,
        keys: torch.Tensor,
        values: torch.Tensor,
        sums: torch.Tensor,
    ) -> None:
        """Let the best of chunks [K, M, c, D] take the places of the worst kept.

        Only what changes places is read and written; the host waits to know what that is.
        """
        held, offered = build.scores(build.kept), build.scores(sums)
        width = min(held.shape[1], offered.shape[1])
        worst, best = held.topk(width, largest=False), offered.topk(width)
        heads, place = (best.values > worst.values).nonzero(as_tuple=True)
        slots, chunks = worst.indices[heads, place], best.indices[heads, place]
        for store, rows in zip(build.stores, (keys, values), strict=True):
            store[heads, slots] = rows[heads, chunks]
        build.kept[heads, :, slots] = sums[heads, :, chunks]

    def _select(
        self,
        build: _Build,
        keys: torch.Tensor,
        values: torch.Tensor,
        sums: torch.Tensor,
    ) -> None:
        """Keep the best of what was kept and of chunks [K, M, c, D], in any order.

        All that is kept is written anew: the host needs not know what it is, and there are half as
        many kernels as if places were exchanged.
        """
        every = torch.cat([build.kept, sums], dim=2)
        best = build.scores(every).topk(build.kept.shape[2], sorted=False).indices
        # Strides say at once what several views would; each is a call, for each block.
        head = best.stride(0)
        build.kept = every.gather(2, best.as_strided(build.kept.shape, (head, 0, 1)))
        index: torch.Tensor | None = None
        for store, rows in zip(build.stores, (keys, values), strict=True):
            if index is None or index.shape != store.shape:
                index = best.as_strided(store.shape, (head, 1, 0, 0))
            torch.gather(torch.cat([store, rows], dim=1), 1, index, out=store)

    @property
    def _window_first(self) -> int:
        """Where the rows of a layer with a window begin.

        A window is counted in rows, so only rows without a gap may be there: the kept chunks of
        such a layer are the newest ones, but for the first.
        """
        return 0 if self.is_complete else self._sizes.config.chunk_tokens

    def _set_length(self, length: int) -> None:
        self._length = length
        self._pending = [0] * len(self._pending)

    def _row_of(self, position: int) -> int:
        """The row of a token from `tail_start` on; of a layer with a window, before it too."""
        layout = self._layout
        return layout.chunks * self._sizes.config.chunk_tokens + position - layout.tail_start
