"""The target's own module drafts, as a chain or as a tree grown best first.

A row of the module is made of the target's hidden state of a token and the token after it. So a row
is decided by the tokens up to that one, and rows of accepted tokens are fed again with what the
target computed: those of a draft only pend. Hidden states come by the tap; those of a prompt are
read before the first draft, so they delay no first token.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from offload_rt.config import DraftConfig
from offload_rt.kv.prefixes import common_prefix
from offload_rt.kv.resident import ResidentKV
from offload_rt.model.network import Network
from offload_rt.runner.runner import Rows, Runner
from offload_rt.speculative.base import Draft, Verdict
from offload_rt.speculative.growing import Grower, GrowingDrafter, draw_chain
from offload_rt.speculative.hidden import HiddenTap, NewestRows


class Mtp:
    """The module, shared by the drafters of all sequences.

    Args:
        module: its network.
        target: whose hidden states it reads; its passes are tapped from now on.
        layers: of the target.
        limit: hidden states of a sequence that are kept until they are read.
        chunk_tokens: of these, how many are read at once.

    Attributes:
        tap: of the target's passes.
    """

    def __init__(
        self, module: Runner, target: Network, layers: int, *, limit: int, chunk_tokens: int
    ) -> None:
        self.module, self.chunk_tokens = module, chunk_tokens
        self._target, self._limit = target, limit
        self._rows: dict[int, NewestRows] = {}
        self.tap = HiddenTap(target, (layers - 1,))
        self.tap.on_kept = self._keep
        self.tap.on_cut = lambda index, length: self.rows(index).truncate(length)
        self.tap.reusable = self._reusable

    def rows(self, index: int) -> NewestRows:
        """Hidden states of a sequence as they leave the last layer."""
        return self._rows.setdefault(index, NewestRows(self._limit))

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """[S, E] of these after the target's final norm."""
        with torch.inference_mode():
            return self._target.normed(hidden)

    def _keep(self, index: int, kept: torch.Tensor, length: int, text: bool) -> None:
        self.rows(index).add(kept, length, text=text)

    def _reusable(self, index: int, tokens: int) -> int:
        """Without the last token's hidden state what follows it could not be drafted."""
        return tokens if self.rows(index).has(tokens - 1) else max(0, tokens - 1)


class MtpDrafter(GrowingDrafter):
    """Drafts for one sequence.

    Args:
        mtp: the shared module.
        index: the sequence.
        config: how many nodes, chain or tree.
        capacity: tokens of the sequence.
    """

    name = "mtp"

    def __init__(self, mtp: Mtp, index: int, config: DraftConfig, capacity: int) -> None:
        self._mtp, self._module, self._config = mtp, mtp.module, config
        self._hidden = mtp.rows(index)
        network, device = mtp.module.network, mtp.module.device
        rows = config.cache_rows(capacity)
        self._cache = ResidentKV(device, network.kv_shapes, network.dtype, rows)
        self._first = 0  # place of the token whose hidden state is in the first row
        self._ids: list[int] = []  # tokens that the rows were made of, and those before them
        self._made: list[torch.Tensor] = []  # [1, E] after the root, [S, E] of each pass behind it
        super().__init__(Grower(mtp.module, self._cache, capacity, feed=self._feed))

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Draft a chain, or grow a tree best first; nothing where hidden states are missing."""
        config = self._config.limited(max_nodes)
        depth = min(max_depth, config.nodes)
        if depth < 1 or (logits := self._catch_up(ids)) is None:
            return Draft()
        try:
            if config.as_tree:
                return self._grower.grow(logits, ids, depth, config, root_pends=False)
            return draw_chain(
                self._module, logits, depth, self._sampling, self._generator, self._feed_next
            )
        finally:
            self._cache.commit(())
            self._made.clear()

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing: rows of other tokens are forgotten by `_catch_up`."""

    def forget(self) -> None:
        """Drop all rows of the cache."""
        self._cache.truncate(0)
        self._ids.clear()
        self._grower.forget()

    def _catch_up(self, ids: Sequence[int]) -> torch.Tensor | None:
        """Bring the cache up to the last token; returns [1, V] logits of what follows it.

        None if the target has not read all tokens but the last one, or what it read is not kept.
        """
        hidden, last = self._hidden, len(ids) - 1
        if hidden.end != last or hidden.first >= last:
            return None
        known = common_prefix(self._ids, ids) - 1 - self._first  # a row needs the token after its
        kept = max(0, min(self._cache.length, known, last - 1 - self._first))
        if not kept or self._first + kept < hidden.first:  # it sees the text from there on only
            self._first, kept = hidden.first, 0
        self._cache.truncate(kept)
        for start in range(self._first + kept, last, self._mtp.chunk_tokens):
            stop = min(start + self._mtp.chunk_tokens, last)
            self._ids = list(ids[: start + 1])
            states = self._mtp.normed(hidden.between(start, stop))
            rows = Rows.text(self._cache, ids[start + 1 : stop + 1], hidden=states)
            logits, made = self._module.logits_and_hidden(rows)
            self._cache.commit(range(stop - start))
        self._ids, self._made = list(ids), [made]
        hidden.forget_before(last - 1)
        return logits

    def _feed(self, rows: Rows) -> torch.Tensor:
        """Feed nodes with what their parents gave; returns [R, V] logits after the wanted ones."""
        count = len(rows.tokens)
        parents = range(-1, len(rows.places) - 1) if rows.parents is None else rows.parents
        before = self._module.device.upload([1 + row for row in parents[-count:]])
        with torch.inference_mode():
            hidden = torch.cat(self._made)[before]  # the root's is the first
        logits, made = self._module.logits_and_hidden(replace(rows, hidden=hidden))
        self._made.append(made)
        return logits

    def _feed_next(self, token: int) -> torch.Tensor:
        """Feed one more token of a chain; returns [1, V] logits after it."""
        length, pending = self._cache.length, len(self._made)
        places = range(length, length + pending)
        return self._feed(Rows(cache=self._cache, tokens=[token], places=places, wanted=[0]))
