"""The shapes of Medusa's trees: of which head and which rank each node is.

A tree is written as upstream writes it: a list of tuples, where (i, j) is head 1's token of rank i
and after it head 2's of rank j. Ranks count from 0, the root is implied. A list in the order of
value, as upstream's are, holds a tree for every number of nodes: its beginning. No torch here.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

from offload_rt.errors import ConfigError
from offload_rt.model.files import shown

Choice = tuple[int, ...]

DEFAULT_TREE = "mc_sim_7b_63"  # upstream's for models it has no other tree for
UPSTREAM_RANKS = 10  # ranks each head has in upstream's trees
PADDING = -1


@dataclass(frozen=True, slots=True)
class MedusaTree:
    """A tree of ranks, its nodes by depth and then by value of their tuples, as upstream has them.

    Attributes:
        choices: N tuples; see the module.
        parents: N indices of other nodes, or -1 for the root.
    """

    choices: tuple[Choice, ...]
    parents: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.choices, key=lambda choice: (len(choice), choice)))
        place = {choice: node for node, choice in enumerate(ordered)} | {(): -1}
        object.__setattr__(self, "choices", ordered)
        object.__setattr__(self, "parents", tuple(place[choice[:-1]] for choice in ordered))

    def __len__(self) -> int:
        return len(self.choices)

    @property
    def heads(self) -> int:
        """Heads it needs: the depth of its deepest node."""
        return max(map(len, self.choices), default=0)

    @property
    def ranks(self) -> int:
        """Ranks it needs of each head."""
        return 1 + max((choice[-1] for choice in self.choices), default=-1)

    def down_to(self, depth: int) -> int:
        """Number of nodes that are no deeper; they come first."""
        return sum(len(choice) <= depth for choice in self.choices)

    def indices(self, ranks: int = UPSTREAM_RANKS) -> list[int]:
        """Where each node's token is in the list [root, `ranks` tokens of head 1, of head 2, ...].

        N + 1 numbers, the root's first (upstream's `tree_indices`, whose `ranks` is always 10).

        Raises:
            ConfigError: a node has a rank beyond; upstream reads the next head's token there.
        """
        if self.ranks > ranks:
            raise ConfigError(f"a tree needs {self.ranks} ranks of a head, there are {ranks}")
        return [0, *(1 + ranks * (len(c) - 1) + c[-1] for c in self.choices)]

    def paths(self) -> list[list[int]]:
        """Rows of nodes from the root (0) to each leaf, padded with -1 to the same length.

        Node i is i + 1 here, as the root is a node (upstream's `retrieve_indices`).
        """
        inner = set(self.parents)
        rows = []
        for leaf in range(len(self)):
            if leaf not in inner:
                row, node = [], leaf
                while node >= 0:
                    row.append(node + 1)
                    node = self.parents[node]
                rows.append([0, *reversed(row)])
        width = self.heads + 1
        return [row + [PADDING] * (width - len(row)) for row in rows] or [[0]]


def check_choices(
    choices: Iterable[Sequence[int]], *, heads: int, ranks: int, complete: bool = False
) -> tuple[Choice, ...]:
    """Check a list of nodes; returns it in an order in which parents come before children.

    Args:
        choices: tuples of ranks.
        heads: heads there are, so levels a tree may have.
        ranks: tokens of each head that are looked at, the limit of a rank.
        complete: add what is missing on the way to a node (lists of leaves, as TensorRT-LLM has).

    Raises:
        ConfigError: a node is no tuple of ranks, appears twice, has no parent, is too deep, or a
            rank is beyond the limit.
    """
    found: dict[Choice, None] = {}
    for given in choices:
        choice = _checked(given, heads, ranks)
        if choice in found and not complete:
            raise ConfigError(f"node {list(choice)} is in the tree twice: leave one out")
        if complete:
            found |= {choice[:depth]: None for depth in range(1, len(choice) + 1)}
        found[choice] = None
    for choice in found:
        if choice[:-1] and choice[:-1] not in found:
            raise ConfigError(
                f"node {list(choice)} of a tree has no parent: add {list(choice[:-1])}"
            )
    return _parents_first(found)


def cut(choices: Sequence[Choice], *, nodes: int, heads: int) -> MedusaTree:
    """The tree of the first `nodes` nodes that need no more than `heads` heads.

    Args:
        choices: in the order of value, parents before their children.
        nodes: at most.
        heads: there are.
    """
    usable = [choice for choice in choices if len(choice) <= heads]
    return MedusaTree(tuple(usable[:nodes]))


@cache
def named_trees() -> dict[str, tuple[Choice, ...]]:
    """Upstream's trees by name, in the order of value."""
    text = (files("offload_rt.speculative.medusa") / "named_trees.json").read_text("utf-8")
    trees = json.loads(text)["trees"]
    return {name: tuple(map(tuple, choices)) for name, choices in trees.items()}


def _checked(given: Sequence[int], heads: int, ranks: int) -> Choice:
    is_list = isinstance(given, list | tuple) and all(type(rank) is int for rank in given)
    if not is_list or not given:
        raise ConfigError(f"{shown(given)} is no node of a tree: give a list of ranks from 0")
    if len(given) > heads:
        raise ConfigError(
            f"node {list(given)} of a tree needs {len(given)} heads, there are {heads}"
        )
    if not all(0 <= rank < ranks for rank in given):
        raise ConfigError(
            f"node {list(given)} of a tree has a rank outside 0 to {ranks - 1}, the limit"
        )
    return tuple(given)


def _parents_first(found: Iterable[Choice]) -> tuple[Choice, ...]:
    """The same order, but a node that comes too early waits for its parent."""
    known: dict[Choice, None] = {(): None}
    waiting: dict[Choice, list[Choice]] = {}
    for choice in found:
        ready = [choice] if choice[:-1] in known else []
        if not ready:
            waiting.setdefault(choice[:-1], []).append(choice)
        while ready:
            node = ready.pop(0)
            known[node] = None
            ready += waiting.pop(node, [])
    return tuple(choice for choice in known if choice)
