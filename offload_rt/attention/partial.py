"""Attention to one part of the rows, and the exact merge of parts by their log-sum-exp.

Softmax over all rows is the mean of the softmaxes over parts, each weighted with its share of the
sum of exponentials (FlashAttention, Dao et al. 2022, section 3.1; exllamav3 and FlashInfer merge
the same way). What all query rows see is attended to by flash attention, with the query heads of a
group as rows of their KV head, so keys are read once and never copied.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch

from offload_rt.attention.blocks import KEY_BLOCK, SCORE_BYTES
from offload_rt.attention.flash import flash_of
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.attention.visible import visible_rows

MERGE_AT = 8  # parts that are kept before they are merged: fewer kernels, bounded memory
_Part: TypeAlias = tuple[torch.Tensor, torch.Tensor]  # outputs, and log-sum-exps in fp32
UNSEEN = -1e30  # the score of a row that is not seen; finite, so that a part nobody sees weighs 0


class PartialAttention:
    """Attention of one query to rows that come part by part.

    Args:
        query: [H, S, D].
        kv_heads: K.
        spec: how the layer attends; in `add` the window is up to the caller's masks.
    """

    def __init__(self, query: torch.Tensor, kv_heads: int, spec: AttentionSpec) -> None:
        self._heads, self._rows, _ = query.shape
        self._kv_heads, self._spec, self._query = kv_heads, spec, query
        self._flash = flash_of(query.device) if spec.softcap is None else None
        self._parts: list[_Part] = []  # [K, G, S, D] and [K, G, S]
        self._whole: list[_Part] = []  # what all query rows saw: [K, G * S, D] and [K, G * S]
        self._grouped: torch.Tensor | None = None  # [K, G * S, D], once it is known who attends

    def add(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None = None
    ) -> None:
        """Attend to more rows.

        Args:
            key: [K, T, D].
            value: [K, T, D].
            visible: [S, T] bool, which of them each query row sees; None: all.
        """
        if not key.shape[1]:
            return
        if visible is None and self._flash is not None:
            if self._grouped is None and self._flash.takes(key, value):  # as all others, then
                self._grouped = self._query.reshape(self._kv_heads, -1, self._query.shape[-1])
            if self._grouped is not None:
                spec = self._spec
                attended = self._flash.attend(self._grouped, key, value, spec.scaling, False, None)
                _append(self._whole, attended)
                return
        for start in range(0, key.shape[1], KEY_BLOCK):
            part = slice(start, start + KEY_BLOCK)
            seen = None if visible is None else visible[:, part]
            _append(self._parts, self._write_out(key[:, part], value[:, part], seen))

    def add_newest(
        self, key: torch.Tensor, value: torch.Tensor, tree: PendingTree | None = None
    ) -> None:
        """Attend to the newest rows of the sequence, the query's own the last of them.

        Args:
            key: [K, T, D]; row T - S + s belongs to query row s.
            value: [K, T, D].
            tree: which of the last rows each query row sees, its positions counted as `key` is;
                None: all before it, and itself.
        """
        rows, cached, window = self._rows, key.shape[1], self._spec.window
        if window is not None and cached <= window and tree is None:
            window = None
        pending = rows if tree is None else tree.positions.numel()
        committed, flash = cached - pending, self._flash
        if flash is None or not flash.takes(key, value):
            self._add_seen(key, value, tree, range(cached))
        elif tree is None and rows == 1:
            first = 0 if window is None else cached - window
            self.add(key[:, first:], value[:, first:])
        elif tree is None and flash.lower_right:
            self._add_chain(key, value, window)
        else:
            # From `first` on all query rows see all committed rows.
            first = 0 if window is None else min(max(0, cached - window), committed)
            self._add_seen(key, value, tree, range(first))
            self.add(key[:, first:committed], value[:, first:committed])
            key, value = (key, value) if tree else (key[:, committed:], value[:, committed:])
            if tree is None and (window is None or window >= rows):
                self._add_chain(key, value, None)
            else:
                self._add_seen(key, value, tree, range(key.shape[1] - pending, key.shape[1]))

    def result(self) -> torch.Tensor:
        """Return [S, H, D] over everything added; each row has seen at least one key."""
        rows = (-1, self._rows)
        parts = [(out.unflatten(1, rows), lse.unflatten(1, rows)) for out, lse in self._whole]
        parts += self._parts
        if self._spec.sinks is not None:
            sinks = self._spec.sinks.float().view(self._kv_heads, -1, 1)  # [K, G, 1]
            nothing = torch.zeros_like(parts[0][0])
            parts.append((nothing, sinks.expand(-1, -1, self._rows)))
        out = parts[0][0] if len(parts) == 1 else _merge(parts)[0]
        return out.permute(2, 0, 1, 3).flatten(1, 2).to(self._query.dtype)

    def _add_chain(self, key: torch.Tensor, value: torch.Tensor, window: int | None) -> None:
        """Attend causally to rows that end with the query's own."""
        assert self._flash is not None
        out, lse = self._flash.attend(self._query, key, value, self._spec.scaling, True, window)
        groups = (self._kv_heads, -1)
        _append(self._parts, (out.unflatten(0, groups), lse.unflatten(0, groups)))

    def _add_seen(
        self, key: torch.Tensor, value: torch.Tensor, tree: PendingTree | None, keys: range
    ) -> None:
        """Attend to `keys` of the newest rows, written out in blocks of keys.

        Blocks of one size keep oneDNN from preparing, and keeping, a kernel for every length.
        """
        cached, window = key.shape[1], self._spec.window
        pending = self._rows if tree is None else tree.positions.numel()
        if window is not None:
            keys = range(max(keys.start, cached - pending + 1 - window), keys.stop)
        for start in range(keys.start, keys.stop, KEY_BLOCK):
            block = range(start, min(start + KEY_BLOCK, keys.stop))
            seen = None
            if window is None and tree is not None and len(block) == pending == cached - start:
                seen = tree.visible
            elif window is not None or block.stop > cached - pending + (tree is None):
                seen = visible_rows(self._rows, block, cached, window, key.device, tree)
            part = slice(block.start, block.stop)
            _append(self._parts, self._write_out(key[:, part], value[:, part], seen))

    def _write_out(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> _Part:
        """Attention in fp32: [K, G, S, D] and [K, G, S]; in blocks of query rows."""
        key, value = key.float().transpose(1, 2), value.float()
        hidden = None if visible is None else ~visible
        query = self._query.unflatten(0, (self._kv_heads, -1)).float() * self._spec.scaling
        block = max(1, SCORE_BYTES // (self._heads * key.shape[2] * 4))
        outs, sums = [], []
        for start in range(0, self._rows, block):
            part = query[:, :, start : start + block]
            scores = torch.matmul(part.flatten(1, 2), key)  # [K, G * s, T]
            if self._spec.softcap is not None:
                scores = torch.tanh(scores / self._spec.softcap) * self._spec.softcap
            scores = scores.unflatten(1, part.shape[1:3])
            if hidden is not None:
                scores.masked_fill_(hidden[start : start + block], UNSEEN)
            weights = torch.softmax(scores, dim=-1)
            # The largest weight is exp(largest score - lse): fewer kernels than logsumexp.
            sums.append(scores.amax(dim=-1) - weights.amax(dim=-1).log_())
            out = torch.matmul(weights.flatten(1, 2), value)
            outs.append(out.unflatten(1, part.shape[1:3]))
        if len(outs) == 1:
            return outs[0], sums[0]
        return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def _append(parts: list[_Part], part: _Part) -> None:
    """Keep one more part; merge them when they are many."""
    parts.append(part)
    if len(parts) == MERGE_AT:
        out, sums = _merge(parts)
        parts[:] = [(out, sums.logsumexp(dim=0))]


def _merge(parts: Sequence[_Part]) -> _Part:
    """Merge outputs [*, D] of parts: in fp32, with all log-sum-exps [P, *]."""
    sums = torch.stack([lse for _, lse in parts])
    weights = torch.softmax(sums, dim=0)[..., None]
    out = parts[0][0] * weights[0]
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        out = torch.addcmul(out, part, weight)
    return out, sums
