"""The shapes of Medusa's trees: of which head and which rank each node is.

A tree is written as upstream writes it: a list of tuples, where (i, j) is head 1's token of rank i
and after it head 2's of rank j. Ranks count from 0, the root is implied. A list in the order of
value, as upstream's are, holds a tree for every number of nodes: its beginning. No torch here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files

Choice = tuple[int, ...]

DEFAULT_TREE = "mc_sim_7b_63"  # upstream's for models it has no other tree for
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
