"""What a drafter owes the engine, and what it is told."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from offload_rt.runner.tree import TokenTree
from offload_rt.speculative.ngram.followers import Likely


@dataclass(frozen=True, slots=True)
class Draft:
    """Tokens proposed for one step.

    Attributes:
        tree: what is proposed.
        probs: [N, V] the distribution each token was drawn from, after temperature and filters,
            earlier siblings taken out; None when the tokens were not drawn but chosen.
        nested: the first m nodes are what would have been proposed with m as limit, or nearly so.
        made: of the passes a draft model may make for a tree of that size, the share it did make.
        likely: of each node the probability of its path by the drafter; empty: it does not tell.
    """

    tree: TokenTree = TokenTree()
    probs: torch.Tensor | None = None
    nested: bool = True
    made: float | None = None
    likely: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a draft.

    Attributes:
        path: accepted nodes, from the root down; may be empty.
        token: the target's own next token after them.
    """

    path: tuple[int, ...]
    token: int

    @property
    def rows(self) -> list[int]:
        """Rows of the pass that stay: the root's and those of accepted nodes."""
        return [0, *(node + 1 for node in self.path)]


class Laws:
    """Distributions that drawn tokens come from, as rows of one matrix: none is there twice.

    Of 200 tokens over 120,000 ids they are 96 MB; put together in the end they were 192.

    Args:
        most: how many there will be.
    """

    def __init__(self, most: int) -> None:
        self._most, self._count = most, 0
        self._rows: torch.Tensor | None = None

    def add(self, probs: torch.Tensor) -> torch.Tensor:
        """Keep [1, V] of the next token; returns it where it is kept."""
        if self._rows is None:
            self._rows = probs.new_empty(self._most, probs.shape[1])
        self._count += 1
        return self._rows[self._count - 1 : self._count].copy_(probs)

    @property
    def rows(self) -> torch.Tensor | None:
        """[N, V] of all tokens so far; None of none."""
        return None if self._rows is None else self._rows[: self._count]


class Unlearned:
    """Of drafters that do not want to know the target's likeliest tokens."""

    learns = False

    def learn(self, ids: Sequence[int], tree: TokenTree, likely: Likely) -> None:
        """Nothing."""


class Drafter(Protocol):
    """Proposes tokens for one sequence."""

    @property
    def name(self) -> str:
        """What the report calls it."""

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Propose what may follow.

        Args:
            ids: the sequence so far; its last token is the root of the tree.
            max_depth: deeper nodes cannot be of use.
            max_nodes: propose no more, at least 1; None is the drafter's own number, which this
                never exceeds.
        """

    @property
    def learns(self) -> bool:
        """Whether it wants to `learn`."""

    def learn(self, ids: Sequence[int], tree: TokenTree, likely: Likely) -> None:
        """Learn the target's likeliest tokens after the last of `ids` and after each node."""

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Learn what became of the last proposal."""

    def forget(self) -> None:
        """Drop what is kept of the sequence, so that the next proposal starts cold."""
