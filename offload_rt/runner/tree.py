"""Token trees: drafted alternatives that one pass checks together.

Node i continues node `parents[i]`, or the root (-1), which is the last token of the sequence.
Parents come before children. A chain is a tree in which each node continues the one before.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from offload_rt.attention.spec import PendingTree
from offload_rt.device.base import Device
from offload_rt.errors import ConfigError

ROOT = -1


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

    def path(self, node: int) -> tuple[int, ...]:
        """Nodes from the root's child down to `node`; empty for the root."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return tuple(reversed(nodes))

    def visible(self) -> list[list[bool]]:
        """[N + 1, N + 1]: row 0 is the root; a node sees its ancestors and itself."""
        size = len(self) + 1
        seen = [[True] + [False] * (size - 1)]
        for node, parent in enumerate(self.parents):
            seen.append(seen[parent + 1][:])
            seen[-1][node + 1] = True
        return seen


def pending_tree(
    device: Device, visible: Sequence[Sequence[bool]], positions: Sequence[int]
) -> PendingTree:
    """Bring what pending rows see to the device, without making the host wait.

    Args:
        device: where attention runs.
        visible: [S, P], on the host.
        positions: P places in the sequence.
    """
    flat = device.upload([int(seen) for row in visible for seen in row])
    return PendingTree(flat.view(len(visible), -1).to(torch.bool), device.upload(positions))
