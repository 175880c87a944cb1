"""A layer that drafts from the target's hidden states, as a chain or as a tree grown best first.

A checkpoint's own module is one, an EAGLE-3 head is another. A row of it is made of hidden states
of a token and of the token after it. So a row is decided by the tokens up to that one, and rows of
accepted tokens are fed again with what the target computed: those of a draft only pend. Hidden
states come by the tap; those of a prompt are read before the first draft, so they delay no first
token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from offload_rt.config import DraftConfig, SamplingConfig
from offload_rt.costs.sizes import RECORDED_ROWS, newest_rows
from offload_rt.device.base import Device
from offload_rt.errors import NumbersError
from offload_rt.kv.prefixes import common_prefix
from offload_rt.kv.resident import ResidentKV
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.network import Network
from offload_rt.runner.runner import Rows, Runner
from offload_rt.runner.static import Carried, HiddenRows
from offload_rt.runner.tree import TokenTree
from offload_rt.sampling import NO_TOKEN
from offload_rt.speculative.base import Draft, Verdict
from offload_rt.speculative.growing import (
    NO_NUMBERS,
    Drafting,
    Feeding,
    Grower,
    GrowingDrafter,
)
from offload_rt.speculative.hidden import HiddenTap, NewestRows

STATES = "hidden states of a draft"  # in the device's ledger


@dataclass(frozen=True, slots=True, kw_only=True)
class ModulePlace:
    """Where a layer that drafts is loaded.

    Attributes:
        checkpoint: headers of the target.
        module: headers of the layer, if it is in files of its own.
        target: lends embedding and output head; its weights may come later.
        device: where the layer runs, and what the target lends is.
        draft: how much is drafted; formats of weights are settled.
        chunk_tokens: rows that go through a layer at once.
        target_ids: width of the target's logits.
        limit: hidden states of all sequences together that are kept until they are read.
    """

    checkpoint: Checkpoint
    module: Checkpoint | None
    target: Network
    device: Device
    draft: DraftConfig
    chunk_tokens: int
    target_ids: int
    limit: int


class HiddenModule:
    """The layer, shared by the drafters of all sequences.

    Args:
        name: what reports call its drafters.
        module: its network.
        place: where it was loaded; the target's passes are tapped from now on.
        layers: of the target, what leaves which is read.
        prepare: makes of [S, n E], what left these n layers side by side, what it is fed: [S, E].

    Attributes:
        tap: of the target's passes.
        hidden: what it goes on from in a draft: that of the root, then of each node's row.
    """

    def __init__(
        self,
        name: str,
        module: Runner,
        place: ModulePlace,
        *,
        layers: Sequence[int],
        prepare: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self.name, self.module, self.chunk_tokens = name, module, place.chunk_tokens
        target, device = place.target, place.device
        size, pending = target.hidden_size, place.draft.scratch_rows

        def rows(count: int, width: int) -> torch.Tensor:
            memory = device.allocate(count * width * target.dtype.itemsize, STATES).tensor
            # A recorded pass reads rows that nobody wrote, for rows that nobody looks at.
            return memory.view(target.dtype).view(count, width).zero_()

        made, given = (
            rows(1 + pending + RECORDED_ROWS, size),
            rows(RECORDED_ROWS, len(layers) * size),
        )
        self.hidden = HiddenRows(made, given, prepare)
        self._limit, self._newest = place.limit, newest_rows(place.draft.nodes)
        self._rows: dict[int, NewestRows] = {}  # the longest not drafted for first
        self.tap = HiddenTap(target, layers)
        self.tap.on_kept = self._keep
        self.tap.on_cut = lambda index, length: self.rows(index).truncate(length)
        self.tap.reusable = self._reusable

    def rows(self, index: int) -> NewestRows:
        """Hidden states of a sequence as they leave the tapped layers."""
        return self._rows.setdefault(index, NewestRows())

    def drafts_for(self, index: int) -> None:
        """An answer begins or is drafted for: others' hidden states are dropped before its."""
        self._rows[index] = self._rows.pop(index)

    @property
    def held_bytes(self) -> int:
        """Of hidden states that are kept until they are read."""
        return sum(rows.nbytes for rows in self._rows.values())

    def _keep(self, index: int, kept: torch.Tensor, length: int, text: bool) -> None:
        """Of sequences that nobody drafts for, the oldest make room; a few of each stay."""
        over = sum(map(len, self._rows.values())) + len(kept) - self._limit
        for rows in self._rows.values():
            if over > 0 and (gone := min(over, len(rows) - self._newest)) > 0:
                rows.forget_before(rows.first + gone)
                over -= gone
        self.rows(index).add(kept, length, text=text)

    def _reusable(self, index: int, tokens: int) -> int:
        """Without the last token's hidden state what follows it could not be drafted."""
        return tokens if self.rows(index).has(tokens - 1) else max(0, tokens - 1)


class HiddenDrafter(GrowingDrafter):
    """Drafts for one sequence.

    Args:
        module: the shared layer.
        index: the sequence.
        config: how many nodes, chain or tree.
        capacity: tokens of the sequence.
    """

    def __init__(
        self, module: HiddenModule, index: int, config: DraftConfig, capacity: int
    ) -> None:
        self._shared, self._index = module, index
        self._hidden = module.rows(index)
        network, device = module.module.network, module.module.device
        rows = config.cache_rows(capacity)
        self._cache = ResidentKV(device, network.kv_shapes, network.dtype, rows)
        self._first = 0  # place of the token whose hidden state is in the first row
        self._ids: list[int] = []  # tokens that the rows were made of, and those before them
        self._whole = False  # where passes are recorded, a draft is one
        # A row needs what its parent's gave, so none is fed ahead.
        grower = Grower(module.module, self._cache, capacity, ahead=False)
        super().__init__(module.module, grower, config)

    @property
    def name(self) -> str:
        """What the report calls it."""
        return self._shared.name

    def begin(self, sampling: SamplingConfig, generator: torch.Generator) -> None:
        """Start a new answer, as `GrowingDrafter` does."""
        self._shared.drafts_for(self._index)
        super().begin(sampling, generator)

    def shared_model(self, max_nodes: int | None) -> None:
        """None: what its passes go on from is kept of one draft at a time."""

    def proposing(
        self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None
    ) -> Drafting:
        """Make a draft of logits that are sent in; nothing where hidden states are missing."""
        config = self._config.limited(max_nodes)
        depth = min(max_depth, config.nodes)
        if depth < 1 or (unread := self._unread(ids)) is None:
            return Draft()
        self._whole = self._sampling.greedy and not config.as_tree
        if self._whole and (draft := self._recorded_chain(unread, ids, depth)) is not None:
            return draft
        logits = yield unread
        self._read(unread, ids)
        try:
            if config.as_tree:
                return (yield from self._grower.grow(logits, ids, depth, config, root_pends=False))
            return (yield from self._draw_chain(logits, depth, self._feeding()))
        finally:
            self._cache.commit(())

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing: rows of other tokens are forgotten by `_unread`."""

    def forget(self) -> None:
        """Drop all rows of the cache."""
        self._cache.truncate(0)
        self._ids.clear()
        self._grower.forget()

    def _unread(self, ids: Sequence[int]) -> Rows | None:
        """Forget rows of other tokens, and read what is missing but for the newest rows.

        Returns:
            Those; None if the target has not read all tokens but the last one, or what it read is
            not kept.
        """
        hidden, last = self._hidden, len(ids) - 1
        if hidden.end != last or hidden.first >= last:
            return None
        known = common_prefix(self._ids, ids) - 1 - self._first  # a row needs the token after its
        kept = max(0, min(self._cache.length, known, last - 1 - self._first))
        if not kept or self._first + kept < hidden.first:  # it sees the text from there on only
            self._first, kept = hidden.first, 0
        self._cache.truncate(kept)
        start = self._first + kept
        while True:
            stop = min(start + self._shared.chunk_tokens, last)
            self._ids = list(ids[: start + 1])
            carried = Carried(rows=self._shared.hidden, given=hidden.between(start, stop))
            rows = Rows.text(self._cache, ids[start + 1 : stop + 1], carried=carried)
            if stop == last:
                return rows
            self._model.draft_logits(rows, recorded=False)
            self._cache.commit(range(stop - start))
            start = stop

    def _read(self, rows: Rows, ids: Sequence[int]) -> None:
        """The first pending rows are those, of the last tokens."""
        self._cache.commit(range(len(rows.tokens)))
        self._ids = list(ids)
        self._hidden.forget_before(len(ids) - 2)
        self._shared.drafts_for(self._index)

    def _recorded_chain(self, unread: Rows, ids: Sequence[int], depth: int) -> Draft | None:
        """All of a greedy chain with one host sync, where passes are recorded."""
        drawn = self._model.draft_chain(unread, depth)
        if drawn is None:
            return None
        tokens = self._model.device.download(drawn)  # host sync
        if NO_TOKEN in tokens:
            self._cache.truncate(self._cache.length)
            raise NumbersError(NO_NUMBERS)
        self._read(unread, ids)
        return Draft(TokenTree.chain(tokens))

    def feed(self, rows: Rows) -> torch.Tensor:
        """Feed nodes with what their parents gave, or what the target gave with that."""
        if rows.carried is None:
            count, pending = len(rows.tokens), len(rows.places)
            parents = range(-1, pending - 1) if rows.parents is None else rows.parents
            carried = Carried(
                rows=self._shared.hidden,
                reads=[1 + row for row in parents[-count:]],  # the root's is the first
                writes=1 + pending - count,
            )
            rows = replace(rows, carried=carried)
        return self._model.draft_logits(rows, recorded=not self._whole)

    def _feeding(self) -> Callable[[int], Feeding]:
        """Feeds one more token of a chain; gives [1, V] logits after it."""
        cache, pending = self._cache, 0

        def feed(token: int) -> Feeding:
            nonlocal pending
            pending += 1
            places = range(cache.length, cache.length + pending)
            return (yield Rows(cache=cache, tokens=[token], places=places, wanted=[0]))

        return feed
