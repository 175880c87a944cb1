"""How often heads are right, and the trees with the most accepted tokens to expect.

A head's accuracy at a rank is the share of places where its token of that rank was what the model
itself wrote there. With it a node of a tree is worth the product of the accuracies on its path, and
the expected number of accepted tokens is the sum over the nodes (arXiv:2401.10774, 2.3.3). A child
is never worth more than its parent. So choosing the best node of all again and again makes the best
tree of every size, each the beginning of the next. No torch here.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from offload_rt.costs.acceptance import grow_tree
from offload_rt.errors import CheckpointError
from offload_rt.model.files import read_json_object, shown
from offload_rt.speculative.medusa.trees import DEFAULT_TREE, Choice, MedusaTree, cut, named_trees
from offload_rt.writing import write_text

CALIBRATION_FILE = "medusa_calibration.json"
RANKS = 32  # ranks that are counted; upstream counts 20 and uses 10
MAX_RANKS = 256
_VERSION = 1
_LIMIT_BYTES = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How often heads were right.

    Attributes:
        model: the model that was listened to.
        dtype: number format it computed in.
        places: per head, places it was judged at; later heads have fewer, as texts end.
        hits: per head and rank, places where its token of that rank was the model's.
    """

    model: str
    dtype: str
    places: tuple[int, ...]
    hits: tuple[tuple[int, ...], ...]

    @property
    def accuracy(self) -> list[list[float]]:
        """[K][R] share of places at which head k was right at rank r."""
        return [
            [hit / max(places, 1) for hit in hits]
            for places, hits in zip(self.places, self.hits, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class NestedTrees:
    """Trees of every size, each the beginning of the next.

    Attributes:
        choices: nodes, the most valuable first.
        values: what each adds to the expected number of accepted tokens.
    """

    choices: tuple[Choice, ...]
    values: tuple[float, ...]

    def tree(self, nodes: int) -> MedusaTree:
        """The best tree of at most that many nodes."""
        return MedusaTree(self.choices[:nodes])

    def tokens_per_pass(self, nodes: int) -> float:
        """Tokens a pass is expected to emit with that tree, the model's own one included."""
        return 1.0 + math.fsum(self.values[:nodes])


def best_trees(accuracy: Sequence[Sequence[float]], nodes: int) -> NestedTrees:
    """Grow the best tree of up to `nodes` nodes; all smaller ones are its beginnings.

    A node that is never right is left out, so there may be fewer.

    Args:
        accuracy: [K][R] of each head at each rank.
        nodes: at most.
    """
    grown = grow_tree(accuracy, nodes)
    return NestedTrees(grown.choices, grown.values)


def tree_for(folder: Path, heads: int, nodes: int) -> MedusaTree:
    """The tree heads draft with: by their calibration, or a named one cut to size.

    Args:
        folder: where the heads are, and their calibration if they have one.
        heads: how many they are.
        nodes: at most.

    Raises:
        CheckpointError: the calibration is of other heads, or not readable.
    """
    calibration = read_calibration(folder)
    if calibration is None:
        return cut(named_trees()[DEFAULT_TREE], nodes=nodes, heads=heads)
    if len(calibration.places) != heads:
        raise CheckpointError(
            f"{folder / CALIBRATION_FILE} is of {len(calibration.places)} heads, there are "
            f"{heads}: remove it, and calibrate again with `offload-run medusa calibrate`"
        )
    return best_trees(calibration.accuracy, nodes).tree(nodes)


def read_calibration(folder: Path) -> Calibration | None:
    """Read the calibration next to heads, if there is one.

    Raises:
        CheckpointError: it is not what `write_calibration` writes.
    """
    path = folder / CALIBRATION_FILE
    if not os.path.lexists(path):
        return None
    raw = read_json_object(folder, CALIBRATION_FILE, _LIMIT_BYTES)
    again = "remove it, and calibrate again with `offload-run medusa calibrate`"
    if raw.get("version") != _VERSION:
        raise CheckpointError(
            f"{path} has version {shown(raw.get('version'))}, known is {_VERSION}: {again}"
        )
    places, hits = raw.get("places"), raw.get("hits")
    if not isinstance(places, list) or not isinstance(hits, list) or not _fit(places, hits):
        raise CheckpointError(f"{path} has counts that do not fit together: {again}")
    return Calibration(
        model=str(raw.get("model", "")),
        dtype=str(raw.get("dtype", "")),
        places=tuple(places),
        hits=tuple(map(tuple, hits)),
    )


def write_calibration(calibration: Calibration, folder: Path) -> Path:
    """Write it next to the heads, whole or not at all; returns the file.

    Raises:
        ConfigError: the folder cannot be written to.
    """
    path = folder / CALIBRATION_FILE
    write_text(path, json.dumps({"version": _VERSION} | asdict(calibration)) + "\n")
    return path


def _fit(places: list[object], hits: list[object]) -> bool:
    """Whether each head has whole counts, no more hits together than places."""
    if len(places) != len(hits) or not places:
        return False
    for total, row in zip(places, hits, strict=True):
        if not isinstance(row, list) or not 1 <= len(row) <= MAX_RANKS:
            return False
        if not all(type(count) is int and count >= 0 for count in [total, *row]):
            return False
        if sum(row) > total:  # type: ignore[operator]
            return False
    return True
