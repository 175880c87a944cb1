"""Hidden states of the target's passes, for drafters that guess from them.

One tap for all of them. Medusa's heads read what the output head was fed for the newest token, a
checkpoint's own module what leaves the last layer for every token, others what leaves some layers.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from offload_rt.model.network import Network


class HiddenTap:
    """Hidden states of the rows that sequences keep.

    Args:
        network: the target; its passes are watched from now on.
        layers: what leaves these is kept of all rows, side by side, before the final norm. None:
            what the output head is fed, after that norm, of rows whose logits are wanted; of a
            prompt that is the last one only.

    Attributes:
        on_kept: called with a sequence, [k, E] (or [k, n E] of n layers) of rows it keeps, its
            committed tokens, and whether they are of a text that was given.
        on_cut: called with a sequence and its tokens when later ones are forgotten.
        reusable: of so many tokens that a prompt of a sequence begins with as the text before it,
            how many need not be read again.
    """

    def __init__(self, network: Network, layers: Sequence[int] | None = None) -> None:
        self._network, self._layers = network, layers
        self._fed: torch.Tensor | None = None
        self._passed: dict[int, torch.Tensor] = {}  # [rows, E] per sequence
        self.on_kept: Callable[[int, torch.Tensor, int, bool], None] = lambda *kept: None
        self.on_cut: Callable[[int, int], None] = lambda index, length: None
        self.reusable: Callable[[int, int], int] = lambda index, tokens: tokens
        if layers is None:
            network.watch_head(self._keep)
        else:
            network.tap(layers)

    def passed(self, parts: Sequence[tuple[int, int, int]]) -> None:
        """A pass is done.

        Args:
            parts: sequence, its rows, and those of them whose logits were wanted.
        """
        hidden = self._fed
        if self._layers is not None:
            tapped = self._network.tapped()
            hidden = tapped[0] if len(tapped) == 1 else torch.cat(tapped, dim=-1)
        assert hidden is not None  # every pass goes through the output head
        counts = [wanted if self._layers is None else rows for _, rows, wanted in parts]
        rows = [hidden[end - n : end] for n, end in zip(counts, accumulate(counts), strict=True)]
        self._passed = {index: part for (index, _, _), part in zip(parts, rows, strict=True)}
        self._fed = None

    def committed(self, index: int, keep: Sequence[int], length: int) -> None:
        """Rows of the last pass are kept.

        Args:
            index: the sequence.
            keep: its rows.
            length: committed tokens now.
        """
        rows = self._passed.pop(index, None)
        if rows is None or not keep:
            return
        if self._layers is None and len(rows) == 1:  # of a prompt only the last one is known
            kept = rows
        elif isinstance(keep, range):
            kept = rows[keep.start : keep.stop]
        else:
            kept = torch.stack([rows[row] for row in keep])  # a list as index would be uploaded
        self.on_kept(index, kept, length, isinstance(keep, range))

    def truncated(self, index: int, length: int) -> None:
        """A sequence has forgotten its tokens from `length` on, and rows of the last pass."""
        self._passed.pop(index, None)
        self.on_cut(index, length)

    def _keep(self, fed: torch.Tensor) -> None:
        self._fed = fed


class NewestRows:
    """The newest hidden states of one sequence, by the places of their tokens.

    And that of the last token of the newest text that was given: an answer may be written anew in
    the text that follows, so that is where many go back to. Nothing else of a pass stays with them.

    Attributes:
        first: place of the first row.
        end: place behind the last one.
    """

    def __init__(self) -> None:
        self._parts: list[torch.Tensor] = []
        self._mark: tuple[int, torch.Tensor] | None = None  # the place behind that token
        self.first = self.end = 0

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def nbytes(self) -> int:
        """Memory that they have."""
        parts = [*self._parts, *([] if self._mark is None else [self._mark[1]])]
        return sum({p.data_ptr(): p.untyped_storage().nbytes() for p in parts}.values())

    def add(self, rows: torch.Tensor, end: int, *, text: bool = False) -> None:
        """Add [k, E] of the tokens before place `end`; what does not lead up to them is dropped."""
        if text:
            self._mark = end, rows[-1:].clone()
        if end - len(rows) != self.end:
            self._parts.clear()
            self.first = end - len(rows)
        whole = rows.untyped_storage().nbytes() == rows.nbytes
        self._parts.append(rows if whole else rows.clone())  # a view would keep all of a pass
        self.end = end

    def between(self, start: int, stop: int) -> torch.Tensor:
        """[stop - start, E] of the tokens at these places, which are kept."""
        assert self.first <= start < stop <= self.end
        at, found = self.first, []
        for part in self._parts:
            cut = part[max(0, start - at) : max(0, stop - at)]
            found += [cut] if len(cut) else []
            at += len(part)
        return found[0] if len(found) == 1 else torch.cat(found)

    def truncate(self, length: int) -> None:
        """Forget the rows of tokens from place `length` on."""
        if length >= self.end:
            return
        cut = self.end - length
        while self._parts and cut >= len(self._parts[-1]):
            cut -= len(self._parts.pop())
        if self._parts and cut:
            self._parts[-1] = self._parts[-1][:-cut].clone()
        if self._mark is not None and self._mark[0] == length and not self._parts:
            self._parts = [self._mark[1]]
        if self._mark is not None and self._mark[0] > length:
            self._mark = None
        self.first, self.end = length - sum(map(len, self._parts)), length

    def has(self, place: int) -> bool:
        """Whether the hidden state of a token is kept, or would be if later ones were forgotten."""
        marked = self._mark is not None and self._mark[0] == place + 1
        return marked or self.first <= place < self.end

    def forget_before(self, place: int) -> None:
        """Forget the rows of tokens before a place."""
        while self._parts and self.first + len(self._parts[0]) <= place:
            self.first += len(self._parts.pop(0))
        if self._parts and self.first < place:  # a copy, so that the others' memory is free
            self._parts[0] = self._parts[0][place - self.first :].clone()
            self.first = place
