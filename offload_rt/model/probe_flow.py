"""What a pass over shapes makes of what: sources of tensors, followed through every operation.

A layer runs where its weights are: on another machine than the embedding and other layers, and over
some rows of a pass at a time. Both are right if all it reads of a pass are its rows and what
positions make of them. `Reads` sees to it by where tensors come from, not by their names.
"""

from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from offload_rt.errors import CheckpointError
from offload_rt.model.attention_function import row_axis

_OF_A_SHAPE = ("_like", "new_")  # in names of operators that read no numbers


class Flow(TorchDispatchMode):
    """Follows what tensors bear on, through every operation; views are one with what they view."""

    def __init__(self) -> None:
        super().__init__()
        self._sources: dict[int, frozenset[object]] = {}
        self._alive: list[torch.Tensor] = []  # so that no number is given twice

    def mark(self, tensor: torch.Tensor, *sources: object) -> None:
        """Let a tensor depend on these, too."""
        self._alive.append(tensor)
        self._sources[tensor.untyped_storage()._cdata] = self.of(tensor).union(sources)

    def of(self, tensor: torch.Tensor) -> frozenset[object]:
        """What a tensor depends on."""
        return self._sources.get(tensor.untyped_storage()._cdata, frozenset())

    def read(self, sources: frozenset[object]) -> None:
        """Be told what an operator reads depends on."""

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        """Run an operator; what it makes, or writes to, depends on all it is given."""
        out = func(*args, **(kwargs or {}))
        if any(part in func._schema.name for part in _OF_A_SHAPE):
            return out
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if found := frozenset[object]().union(*map(self.of, given)):
            self.read(found)
            written = args[:1] if func._schema.is_mutable else ()
            for tensor in tree_leaves((out, written)):
                if isinstance(tensor, torch.Tensor):
                    self.mark(tensor, *found)
        return out


TOKENS, PLACES = "the tokens", "positions"  # of a pass
_GIVEN = "what a layer is given"  # row by row, of what tokens make


class Reads(Flow):
    """Sees what layers read of a pass beside their rows.

    Args:
        rows: of the pass.
        layers: how many there are.

    Attributes:
        apart: why layers cannot be on several devices; empty if they can.
    """

    def __init__(self, rows: int, layers: int) -> None:
        super().__init__()
        self._rows, self._last, self.apart = rows, layers - 1, ""
        self._newest, self._inside = -1, False  # the layer that began last, and whether it runs

    def enter(self, layer: int, hidden: torch.Tensor, options: dict[str, Any]) -> tuple[Any, Any]:
        """Begin a layer; what it is given to read, of which all that is as it should be is new."""
        self._inside = False
        self._newest = layer
        given = tree_map(partial(self._given, layer), options)
        rows = self._new(hidden, layer)
        self._inside = True
        return (rows,), given

    def leave(self) -> None:
        """End it."""
        self._inside = False

    def _new(self, tensor: torch.Tensor, *sources: object) -> torch.Tensor:
        new = torch.empty_like(tensor)
        self.mark(new, *sources)
        return new

    def _given(self, layer: int, value: object) -> object:
        if not isinstance(value, torch.Tensor) or not (found := self.of(value)):
            return value
        if not row_axis(value.shape, self._rows) or found - {TOKENS, PLACES}:
            return value
        return self._new(value, *[_GIVEN] if TOKENS in found else [layer])

    def read(self, sources: frozenset[object]) -> None:
        """See where something comes from that is read now.

        Raises:
            CheckpointError: a layer is to be run that cannot be, over some of the rows of a pass.
        """
        newest = self._newest
        strange = sources - {newest}
        others = sorted(source for source in strange if isinstance(source, int))
        if self._inside:
            reads = f"layer {newest} reads, beside its rows,"
            if others:
                raise CheckpointError(f"{reads} what layer {others[0]} computed")
            if found := strange & {TOKENS, PLACES}:
                raise CheckpointError(
                    f"{reads} what {min(map(str, found))} made, and is not given it by rows"
                )
            if strange:
                self.apart = self.apart or f"{reads} what the tokens made"
        elif newest == self._last and newest in sources and TOKENS in sources:
            raise CheckpointError("they read tokens again behind the last layer")
        elif others or (newest in sources and TOKENS in sources):
            what = f"layer {others[0]}" if others else "the tokens"
            self.apart = self.apart or f"behind layer {newest} they read what {what} made"
