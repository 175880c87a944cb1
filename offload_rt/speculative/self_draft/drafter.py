"""The target drafts for itself: rounded copies in place of its streamed layers, the rest as it is.

After SubSpec (arXiv:2509.18344). The copies stay on the device, so a draft pass streams nothing.
Resident layers, embedding, final norm and output head are the target's own, and so are the rows of
its KV cache up to the last committed token: a draft pass reads exactly what the target computed.
Its own rows, the root's and those of the nodes, pend behind them and are forgotten before the pass
that checks the draft. Nothing has to catch up, and a draft that fails leaves nothing behind.
"""

from collections.abc import Sequence

import torch

from offload_rt.config import DraftConfig
from offload_rt.kv.base import KVCache
from offload_rt.runner.runner import Rows, Runner
from offload_rt.runner.tree import TokenTree
from offload_rt.speculative.base import Draft, Verdict
from offload_rt.speculative.growing import Drafting, Feeding, Grower, GrowingDrafter

# Temperature of the copies' distribution where answers are greedy. The mean log of the probability
# of what the target chose was -0.20 at 0.25 to 0.3, -0.41 at 1 (352 tokens of MT-Bench answers;
# docs/RESULTS.md, "A model that drafts for itself").
SHARPENED = 0.3


class SelfDrafter(GrowingDrafter):
    """Drafts for one sequence.

    Args:
        model: the target with copies in place of its streamed layers.
        cache: the target's, of the sequence.
        config: how many nodes, chain or tree.
        capacity: tokens of the longest sequence.
        least_gain: accepted tokens that a draft pass must be expected to add.
    """

    name = "self"

    def __init__(
        self,
        model: Runner,
        cache: KVCache,
        config: DraftConfig,
        capacity: int,
        *,
        least_gain: float = 0.0,
    ) -> None:
        self._cache, self._least_gain = cache, least_gain
        grower = Grower(model, cache, capacity, greedy_temperature=SHARPENED)
        super().__init__(model, grower, config)

    def proposing(
        self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None
    ) -> Drafting:
        """Make a draft behind the target's own rows, of logits that are sent in."""
        config = self._config.limited(max_nodes)
        depth = min(max_depth, config.nodes)
        if depth < 1:
            return Draft()
        assert self._cache.length == len(ids) - 1  # what is committed is all but the root
        try:
            logits = yield Rows.draft(self._cache, ids[-1], TokenTree())
            if not config.as_tree:
                return (yield from self._chain(logits, depth))
            return (
                yield from self._grower.grow(
                    logits, ids, depth, config, root_pends=True, least_gain=self._least_gain
                )
            )
        finally:
            self._cache.truncate(self._cache.length)

    def feed(self, rows: Rows) -> torch.Tensor:
        """Feed rows."""
        return self._model.draft_logits(rows)

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing: the rows of a draft are gone already."""

    def forget(self) -> None:
        """Drop what was read of the text; the cache is the target's."""
        self._grower.forget()

    def _chain(self, logits: torch.Tensor, depth: int) -> Drafting:
        """The copies' own continuation."""
        cache, pending = self._cache, 1  # the root

        def feed(token: int) -> Feeding:
            nonlocal pending
            place = cache.length + pending
            pending += 1
            return (
                yield Rows(
                    cache=cache, tokens=[token], places=range(cache.length, place + 1), wanted=[0]
                )
            )

        return self._draw_chain(logits, depth, feed)
