"""A model's likeliest tokens after each token, kept from the passes that checked drafts.

"Token Recycling" (arXiv:2408.08696): a verification pass yields the likeliest next tokens after
each drafted token, rejected ones included. What comes after the same token the next time is often
among them, so they are a draft that costs nothing. Here they are kept under the last two tokens
and, for pairs that were not seen, under the last one.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from offload_rt.sampling import NO_TOKEN

RANKS = 8  # tokens kept of a row
ORDERS = (1, 2)  # numbers of last tokens a row is found by
CONTEXT = max(ORDERS)  # last tokens that are looked at
_LATE, _LIKELIEST = 200, 4  # contexts and tokens of each that are looked at for unknown ones
_UNITS = 2**20  # parts of a probability, which so comes with the ids in one download


@dataclass(frozen=True, slots=True)
class Likely:
    """The likeliest tokens after each row of a pass, the likeliest first.

    Attributes:
        tokens: [S][K] ids.
        probs: [S][K] their probabilities among those K.
    """

    tokens: Sequence[Sequence[int]]
    probs: Sequence[Sequence[float]]

    @classmethod
    def read(cls, numbers: Sequence[int], after: Sequence[int]) -> "Likely":
        """Read what `pack_likely` made.

        Args:
            numbers: its result.
            after: the token chosen after each row; where there is none, none is likely.
        """
        width = len(numbers) // len(after)
        parts = [
            numbers[row * width : (row + 1) * width] if token != NO_TOKEN else []
            for row, token in enumerate(after)
        ]
        return cls(
            [part[: width // 2] for part in parts],
            [[share / _UNITS for share in part[width // 2 :]] for part in parts],
        )


def pack_likely(logits: torch.Tensor) -> torch.Tensor:
    """Enqueue what `Likely.read` reads; the host does not wait.

    Args:
        logits: [S, V] any float type.

    Returns:
        [S * 2 K] int64 on the device; K is `RANKS`, or V if that is less.
    """
    best = logits.topk(min(RANKS, logits.shape[-1]), dim=-1)
    shares = best.values.float().softmax(dim=-1) * _UNITS
    return torch.cat([best.indices, shares.to(torch.int64)], dim=-1).flatten()


class Followers:
    """What was likely after the same last tokens when a model last saw them.

    Args:
        most: contexts that are kept, the latest.
        orders: by how many last tokens, ascending.
    """

    def __init__(self, most: int, orders: Sequence[int] = ORDERS) -> None:
        self._most, self._orders = most, orders
        self._kept: OrderedDict[tuple[int, ...], tuple[array[int], array[float]]] = OrderedDict()

    def learn(self, context: Sequence[int], tokens: Sequence[int], probs: Sequence[float]) -> None:
        """Keep what was likely after the last tokens of a context; nothing if nothing was."""
        if not tokens:
            return
        found = array("q", tokens), array("f", probs)
        kept = self._kept
        for order in self._orders:
            if order <= len(context):
                key = tuple(context[-order:])
                kept[key] = found
                kept.move_to_end(key)
        while len(kept) > self._most:
            kept.popitem(last=False)

    def after(self, context: Sequence[int]) -> tuple[int, Sequence[int], Sequence[float]]:
        """What was likely after the last tokens of a context.

        Returns:
            By how many of them it was found, 0 if it was not; tokens and their probabilities.
        """
        for order in self._orders[::-1]:
            key = tuple(context[-order:])
            if (found := self._kept.get(key)) is not None and len(key) == order:
                return order, *found
        return 0, (), ()

    def unknown(self) -> Iterator[int]:
        """Tokens that were likely of late, the latest first, after which nothing is known."""
        seen: set[int] = set()
        for key in islice(reversed(self._kept), _LATE):
            for token in self._kept[key][0][:_LIKELIEST]:
                if token not in seen and (token,) not in self._kept:
                    yield token
                seen.add(token)

    def forget(self) -> None:
        """Keep nothing."""
        self._kept.clear()
