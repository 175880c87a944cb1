"""Medusa heads draft: a tree of fixed shape is filled with their likeliest tokens.

The heads need the hidden state the model's output head was fed for the last committed token. A tap
(`speculative/hidden.py`) tells of the rows that a sequence keeps, and the last of them is what the
next draft is made from. So heads are evaluated at one place per sequence and step, for all
sequences together. Which tokens are accepted only the verifier decides.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from offload_rt.device.base import Device
from offload_rt.device.kinds import Packing
from offload_rt.errors import NumbersError
from offload_rt.model.network import Network
from offload_rt.runner.static import Recorded
from offload_rt.runner.tree import TokenTree
from offload_rt.sampling import NO_TOKEN
from offload_rt.speculative.base import Draft, Unlearned, Verdict
from offload_rt.speculative.hidden import HiddenTap
from offload_rt.speculative.medusa.calibration import tree_for
from offload_rt.speculative.medusa.checkpoint import HeadsCheckpoint
from offload_rt.speculative.medusa.load import load_heads, load_token_map
from offload_rt.speculative.medusa.trees import MedusaTree


@dataclass(frozen=True, slots=True)
class _State:
    """The state of a sequence.

    Attributes:
        length: committed tokens.
        hidden: [E] hidden state of the last of them, after the final norm.
    """

    length: int
    hidden: torch.Tensor


class Medusa:
    """Heads on the device, shared by the drafters of all sequences.

    Args:
        checkpoint: headers of the heads.
        network: the model; its output head is watched from now on.
        device: where both are.
        packing: how the heads are laid out there.
        nodes: of a draft, at most.

    Attributes:
        heads: how many.
        tree: what drafts look like.
        tap: of the model's passes.
        on_kept: called with a sequence and the hidden states, [E] each, of tokens it committed; of
            a prompt only the last one's. For calibration.
    """

    def __init__(
        self,
        checkpoint: HeadsCheckpoint,
        network: Network,
        device: Device,
        packing: Packing,
        *,
        nodes: int,
    ) -> None:
        self.heads = checkpoint.names.shape.heads
        self._folder = checkpoint.folder
        self._trees = {nodes: tree_for(self._folder, self.heads, nodes)}
        self.tree = self._trees[nodes]
        self._device = device
        self._known_ids = network.head_rows
        self._heads = load_heads(checkpoint, device, packing, network.dtype, network.head_logits)
        self._token_map = load_token_map(checkpoint, device, self._known_ids)
        self._states: dict[int, _State] = {}
        self._guesses: dict[int, list[list[int]]] = {}
        self._recorded: dict[int, Recorded | None] = {}  # by sequences that are drafted for
        self.on_kept: Callable[[int, Sequence[torch.Tensor]], None] = lambda index, kept: None
        self.tap = HiddenTap(network)
        self.tap.on_kept = self._committed

    def tree_of(self, nodes: int | None) -> MedusaTree:
        """The tree of at most that many nodes; None is the largest."""
        if nodes is None or nodes >= len(self.tree):
            return self.tree
        if nodes not in self._trees:
            self._trees[nodes] = tree_for(self._folder, self.heads, nodes)
        return self._trees[nodes]

    def drafter(self, index: int) -> "MedusaDrafter":
        """The drafter of a sequence."""
        return MedusaDrafter(self, index)

    def top_tokens(self, index: int, length: int) -> list[list[int]] | None:
        """The likeliest tokens of each head, [K][ranks], after a sequence of that many tokens.

        None if the model has not read exactly those.
        """
        state = self._states.get(index)
        if state is None or state.length != length or not self.tree.ranks:
            return None
        if index not in self._guesses:
            self._guess()
        return self._guesses[index]

    def ranked(self, hidden: torch.Tensor, ranks: int, heads: int | None = None) -> torch.Tensor:
        """The likeliest tokens of each head.

        Args:
            hidden: [R, E].
            ranks: how many.
            heads: the first K; None is all.

        Returns:
            [R, K, ranks] int64 ids, the likeliest first; `NO_TOKEN` where logits are no numbers.
        """
        with torch.inference_mode():
            logits = self._heads(hidden, heads)  # [K, R, V]
            if self._token_map is None:
                logits = logits[..., : self._known_ids]
            best = logits.topk(min(ranks, logits.shape[-1]), dim=-1)
            ids = best.indices if self._token_map is None else self._token_map[best.indices]
            ids = torch.where(best.values[..., :1].isfinite(), ids, NO_TOKEN)
            return ids.transpose(0, 1)

    def _ranked_here(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the tree needs of `ranked`; recorded, where the device has passes recorded."""
        work = partial(self.ranked, ranks=self.tree.ranks, heads=self.tree.heads)
        if not self._device.kind.records:
            return work(hidden)
        count = len(hidden)
        if count not in self._recorded:
            self._recorded[count] = Recorded.make(self._device, work, hidden, torch.Tensor.neg_)
        return (self._recorded[count] or work)(hidden)

    def _committed(self, index: int, kept: torch.Tensor, length: int, text: bool) -> None:
        """A sequence keeps rows [k, E]."""
        self._states[index] = _State(length, kept[-1].clone())
        self._guesses.pop(index, None)
        self.on_kept(index, kept.unbind())

    def _guess(self) -> None:
        """Evaluate the heads for all sequences that have moved."""
        moved = [index for index in self._states if index not in self._guesses]
        hidden = torch.stack([self._states[index].hidden for index in moved])
        ids = self._ranked_here(hidden)
        flat, (_, heads, ranks) = self._device.download(ids.flatten()), ids.shape  # host sync
        for index in moved:
            own, flat = flat[: heads * ranks], flat[heads * ranks :]
            if NO_TOKEN in own:
                raise NumbersError("the logits of a head are NaN or infinite")
            self._guesses[index] = [own[i : i + ranks] for i in range(0, len(own), ranks)]


class MedusaDrafter(Unlearned):
    """Drafts for one sequence.

    Args:
        medusa: the shared heads.
        index: the sequence.
    """

    name = "medusa"

    def __init__(self, medusa: Medusa, index: int) -> None:
        self._medusa, self._index = medusa, index

    def propose(self, ids: Sequence[int], max_depth: int, max_nodes: int | None = None) -> Draft:
        """Fill the tree, down to `max_depth`; empty if the hidden state is not that of `ids`."""
        found = self._medusa.top_tokens(self._index, len(ids) - 1)
        if found is None:
            return Draft()
        tree = self._medusa.tree_of(max_nodes)
        return Draft(fill(tree, found, max_depth), nested=False)  # nodes go by depth

    def observe(self, draft: Draft, verdict: Verdict) -> None:
        """Nothing: what was kept comes by the tap."""

    def forget(self) -> None:
        """Nothing: the next prompt's pass leaves a hidden state of its own."""


def fill(tree: MedusaTree, tokens: Sequence[Sequence[int]], max_depth: int) -> TokenTree:
    """Put tokens where a tree has ranks.

    Args:
        tree: the shape.
        tokens: [K][ranks] of each head; a rank a small vocabulary lacks is left out.
        max_depth: deeper nodes are left out.
    """
    place = {-1: -1}
    found: list[int] = []
    parents: list[int] = []
    for node in range(tree.down_to(max_depth)):
        choice, parent = tree.choices[node], tree.parents[node]
        guesses = tokens[len(choice) - 1]
        if parent in place and choice[-1] < len(guesses):
            place[node] = len(found)
            found.append(guesses[choice[-1]])
            parents.append(place[parent])
    return TokenTree(tuple(found), tuple(parents))
