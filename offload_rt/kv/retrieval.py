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

from collections.abc import Sequence
from dataclasses import dataclass

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
KEY_BLOCK = 2048  # keys whose fp32 copies are made at once, so that they stay in the CPU's cache
EMPTY = -1.0  # score of a place that nothing is kept in yet: below every chunk's


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the rows of every layer are.

    Attributes:
        chunks: chunks that are kept, the first one included.
        tail_start: position of the first row behind them; from there on no position is missing.
    """

    chunks: int = 0
    tail_start: int = 0


@dataclass(slots=True)
class _Build:
    """A layer that is being built.

    Attributes:
        query: [K, R, D] the R rows of each KV head's group that ask, times the scaling; None keeps
            the newest.
        softcap: of the layer.
        masses: [K, chunks, R] of what was kept so far: log of the sum of exponentials in a chunk.
        total: [K, R] the same of all rows so far.
        empty: [K, chunks] which places nothing is kept in yet.
        carry: keys, values and logits of a chunk whose other rows have not come yet: [K, c, *].
        next_row: position of the row that comes next.
    """

    query: torch.Tensor | None
    softcap: float | None
    masses: torch.Tensor
    total: torch.Tensor
    empty: torch.Tensor
    carry: Sequence[torch.Tensor] | None = None
    next_row: int = 0

    def logits(self, keys: torch.Tensor) -> torch.Tensor:
        """[K, T, R] products with keys [K, T, D], in fp32; those of one row lie side by side."""
        assert self.query is not None
        blocks = keys.split(KEY_BLOCK, dim=1)
        found = torch.cat([torch.matmul(self.query, k.float().transpose(1, 2)) for k in blocks], 2)
        if self.softcap is not None:
            found = torch.tanh(found / self.softcap) * self.softcap
        return found.transpose(1, 2)

    def scores(self, masses: torch.Tensor) -> torch.Tensor:
        """[K, M] the attention chunks receive, from their masses [K, M, R]."""
        return torch.exp(masses - self.total[:, None]).sum(dim=2)


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
        return attend_rows(query, keys, values, spec, tree)

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
        masses = torch.zeros(heads, chunks, rows, device=query.device)
        total = torch.full((heads, rows), float("-inf"), device=query.device)
        empty = torch.ones(heads, chunks, dtype=torch.bool, device=query.device)
        self._builds[layer] = _Build(asked, spec.softcap, masses, total, empty)

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
        logits = build.logits(key[:, :count])
        build.total = torch.logaddexp(build.total, logits.logsumexp(dim=1))
        self._choose(layer, build, first, [key[:, :old], value[:, :old], logits[:, :old]])

    def _choose(self, layer: int, build: _Build, first: int, rows: Sequence[torch.Tensor]) -> None:
        """Cut keys, values and logits [K, T, *] into chunks; a part of one waits for the rest."""
        size = self._sizes.config.chunk_tokens
        if build.carry is not None:
            lacking = size - build.carry[0].shape[1]
            pairs = zip(build.carry, rows, strict=True)
            joined = [torch.cat([old, new[:, :lacking]], dim=1) for old, new in pairs]
            build.carry = None
            self._choose(layer, build, first, joined)
            first, rows = first + size, [part[:, lacking:] for part in rows]
        whole, rest = divmod(rows[0].shape[1], size)
        if rest:
            build.carry = [part[:, whole * size :].clone() for part in rows]
        if whole:
            cut = [part[:, : whole * size].unflatten(1, (whole, size)) for part in rows]
            self._keep_best(layer, build, first // size, *cut)

    def _keep_best(
        self,
        layer: int,
        build: _Build,
        number: int,
        keys: torch.Tensor,
        values: torch.Tensor,
        logits: torch.Tensor,
    ) -> None:
        """Let chunks [K, M, c, *], from chunk `number` on, compete with those kept."""
        kept, size = self._layout.chunks, self._sizes.config.chunk_tokens
        if not kept:
            return
        masses = _chunk_masses(logits)  # [K, M, R]
        if number == 0:
            masses[:, 0] = PINNED
        held = build.scores(build.masses).masked_fill(build.empty, EMPTY)
        host_computes = self._device.kind.host_computes
        slots, chunks, real = _exchange(held, build.scores(masses), narrow=host_computes)
        heads = torch.arange(keys.shape[0], device=keys.device)[:, None].expand_as(slots)
        if host_computes:  # only what changes places is read and written
            heads, slots, chunks = heads[real], slots[real], chunks[real]
        offers = [
            (build.masses, masses),
            (build.empty, torch.zeros_like(masses[..., 0], dtype=torch.bool)),
        ]
        for store, offered in ((self._keys, keys), (self._values, values)):
            offers.append((store[layer][:, : kept * size].unflatten(1, (kept, size)), offered))
        for place, offered in offers:
            coming = offered[heads, chunks]
            if slots.dim() > 1:
                changes = real.view(*real.shape, *[1] * (place.dim() - 2))
                coming = torch.where(changes, coming, place[heads, slots])
            place[heads, slots] = coming

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


def _chunk_masses(logits: torch.Tensor) -> torch.Tensor:
    """Log of the sum of exponentials in each chunk: [K, M, c, R] gives [K, M, R].

    Against the largest of all, which takes one pass less than against the largest of each; what is
    so far below it that it becomes 0 receives no attention.
    """
    by_row = logits.permute(0, 3, 1, 2)  # [K, R, M, c]
    top = by_row.amax(dim=(2, 3), keepdim=True)
    sums = torch.exp(by_row - top).sum(dim=3)
    return (sums.log() + top[..., 0]).transpose(1, 2).contiguous()


def _exchange(
    kept: torch.Tensor, offered: torch.Tensor, *, narrow: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pair what leaves with what comes in, so that the best of both are there afterwards.

    Args:
        kept: [K, N] scores.
        offered: [K, M] scores.
        narrow: make W only as large as it must be; for that the host waits.

    Returns:
        slots [K, W] of `kept`, chunks [K, W] of `offered`, and [K, W] whether the pair changes
        places.
    """
    count = kept.shape[1]
    best = torch.cat([kept, offered], dim=1).topk(count, dim=1).indices
    chosen = torch.zeros(
        kept.shape[0], count + offered.shape[1], dtype=torch.int32, device=kept.device
    ).scatter_(1, best, 1)
    stays, comes = chosen[:, :count], chosen[:, count:]
    number = comes.sum(dim=1, keepdim=True)  # of exchanges, per head
    width = min(count, offered.shape[1])
    if narrow:
        width = int(number.max())
    slots = stays.argsort(dim=1, stable=True)[:, :width]
    chunks = comes.argsort(dim=1, descending=True, stable=True)[:, :width]
    return slots, chunks, torch.arange(width, device=kept.device) < number
