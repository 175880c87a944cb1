"""A small model with the target's tokenizer drafts, as a chain or as a tree grown best first.

The draft model stays on the device. Rows of a draft that were not accepted are forgotten by
comparing token ids before the next draft, so there is no bookkeeping of what was kept. The rows of
a context that has jumped (`window`) are forgotten the same way.
"""

from collections.abc import Sequence

import torch

from offload_rt.config import DraftConfig
from offload_rt.errors import NumbersError
from offload_rt.kv.prefixes import common_prefix
from offload_rt.kv.resident import ResidentKV
from offload_rt.runner.runner import Rows, Runner
from offload_rt.runner.tree import TokenTree
from offload_rt.sampling import NO_TOKEN
from offload_rt.speculative.base import Draft, Verdict
from offload_rt.speculative.draft_model.window import seen_tokens
from offload_rt.speculative.growing import (
    NO_NUMBERS,
    Drafting,
    Feeding,
    Grower,
    GrowingDrafter,
)


class DraftModelDrafter(GrowingDrafter):
    """Drafts for one sequence.

    Args:
        model: the shared draft model.
        config: how many nodes, chain or tree, and how much of the sequence it sees.
        capacity: tokens of the longest sequence.
    """

    name = "model"

    def __init__(self, model: Runner, config: DraftConfig, capacity: int) -> None:
        rows = config.cache_rows(capacity)
        self._cache = ResidentKV(model.device, model.network.kv_shapes, model.network.dtype, rows)
        # Tokens whose rows are in the cache; a row is decided by its token and those before it.
        self._ids: list[int] = []
        super().__init__(model, Grower(model, self._cache, capacity), config)

    def proposing(
        self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None
    ) -> Drafting:
        """Make a draft of logits that are sent in."""
        config = self._config.limited(max_nodes)
        depth = min(max_depth, config.nodes)
        if depth < 1:
            return Draft()
        if not config.as_tree and (drafted := self._recorded_chain(ids, depth)) is not None:
            return drafted
        logits = yield from self._add(self._unread(ids))
        if not config.as_tree:
            return (yield from self._draw_chain(logits, depth, lambda token: self._add([token])))
        draft = yield from self._grower.grow(logits, ids, depth, config, root_pends=False)
        self._cache.commit(())
        return draft

    def feed(self, rows: Rows) -> torch.Tensor:
        """Feed rows; where all of a chain is one recording, single passes would be used no more."""
        return self._model.draft_logits(rows, recorded=not self._chains_whole)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing: rows that were not accepted are forgotten by `_unread`."""

    def forget(self) -> None:
        """Drop all rows of the cache."""
        self._cache.truncate(0)
        self._ids.clear()
        self._grower.forget()

    def _unread(self, ids: Sequence[int]) -> Sequence[int]:
        """Forget rows of other tokens; returns what is seen of `ids` and has no rows."""
        seen = seen_tokens(ids, self._config.window_tokens)
        common = common_prefix(self._ids, seen[:-1])
        self._cache.truncate(common)
        del self._ids[common:]
        return seen[common:]

    def _add(self, tokens: Sequence[int]) -> Feeding:
        """Add tokens; gives [1, V] logits after the last."""
        logits = yield Rows.text(self._cache, tokens)
        self._keep(tokens)
        return logits

    @property
    def _chains_whole(self) -> bool:
        """Whether a draft is one recording, where passes are recorded."""
        return self._sampling.greedy and not self._config.as_tree

    def _keep(self, tokens: Sequence[int]) -> None:
        self._cache.commit(range(len(tokens)))
        self._ids += tokens

    def _recorded_chain(self, ids: Sequence[int], depth: int) -> Draft | None:
        """All of a greedy chain with one host sync, where passes are recorded."""
        if not self._chains_whole:
            return None
        unread = self._unread(ids)
        drawn = self._model.draft_chain(Rows.text(self._cache, unread), depth)
        if drawn is None:
            return None
        tokens = self._model.device.download(drawn)  # host sync
        if NO_TOKEN in tokens:
            self._cache.truncate(self._cache.length)
            raise NumbersError(NO_NUMBERS)
        self._keep([*unread, *tokens[:-1]])
        return Draft(TokenTree.chain(tokens))
