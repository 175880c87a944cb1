"""Token trees: drafted alternatives that one pass checks together.

Node i continues node `parents[i]`, or the root (-1), which is the last token of the sequence.
Parents come before children. A chain is a tree in which each node continues the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from offload_rt.attention.spec import ROOT as ROOT  # of a tree of tokens, too
from offload_rt.attention.spec import PendingTree
from offload_rt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TokenTree:
    """Drafted tokens and what each continues.

    Attributes:
        tokens: N token ids.
        parents: N indices; each is below its own, or ROOT.
        depths: N distances from the root, from 1.

    Raises:
        ConfigError: the lengths differ, or a parent does not come before its child.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    depths: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.parents):
            raise ConfigError(f"{len(self.tokens)} tokens but {len(self.parents)} parents")
        depths: list[int] = []
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise ConfigError(f"node {node} of a token tree cannot continue node {parent}")
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        object.__setattr__(self, "depths", tuple(depths))

    def __len__(self) -> int:
        return len(self.tokens)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> "TokenTree":
        """A tree without branches."""
        return cls(tuple(tokens), tuple(range(ROOT, len(tokens) - 1)))

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def children(self) -> dict[int, list[int]]:
        """Children of every node that has any, the root included, in order."""
        found: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            found.setdefault(parent, []).append(node)
        return found

    def followed(self, tokens: Sequence[int]) -> tuple[tuple[int, ...], bool]:
        """Nodes that tokens behind the root follow, and whether more of them might come."""
        places = enumerate(zip(self.parents, self.tokens, strict=True))
        children = {place: node for node, place in places}
        path = list[int]()
        for token in tokens:
            node = children.get((path[-1] if path else ROOT, token))
            if node is None:
                return tuple(path), False
            path.append(node)
        return tuple(path), True

    def row_parents(self) -> list[int]:
        """[N + 1] as rows of a pass, the root first: the row that each continues, ROOT for it."""
        return [ROOT, *(parent + 1 for parent in self.parents)]

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root's child down to `node`; empty for the root."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))


def looks_back(parents: Sequence[int]) -> list[int]:
    """What is sent of a tree: the row that each continues; one that continues none, itself."""
    return [row if parent == ROOT else parent for row, parent in enumerate(parents)]


def pending_tree(
    parents: Sequence[int], back: torch.Tensor, positions: torch.Tensor, rows: int
) -> PendingTree:
    """Make what pending rows see, where they attend.

    In rounds that double how far a row looks back along its path. A row that continues none of them
    looks back at itself, which changes nothing.

    Args:
        parents: P pending rows, the one that each continues, before it; ROOT: none of them.
        back: [P] what `looks_back` makes of them, on the device.
        positions: [P] places in the sequence, likewise.
        rows: S, the newest of them, which look.
    """
    depths: list[int] = []
    for parent in parents:
        depths.append(0 if parent == ROOT else depths[parent] + 1)
    visible = torch.eye(len(parents), dtype=torch.bool, device=back.device)  # [P, P]
    for _ in range(max(depths).bit_length()):
        visible |= visible[back]
        back = back[back]
    return PendingTree(visible[len(parents) - rows :], positions, parents)
