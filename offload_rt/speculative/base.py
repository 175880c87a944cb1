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
