"""Drafts of several sequences, made together: rows they want fed go through the same passes.

A pass of a small model over the rows of four sequences reads its weights once, not four times.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from offload_rt.costs.drafters import SHARED_ROWS
from offload_rt.runner.runner import Rows, Runner
from offload_rt.speculative.base import Draft, Drafter
from offload_rt.speculative.growing import Drafting, GrowingDrafter

Made = Draft | Exception


@dataclass(frozen=True, slots=True)
class Asked:
    """A draft that is asked for; see `Drafter.propose`."""

    drafter: Drafter
    ids: Sequence[int]
    max_depth: int
    max_nodes: int


@dataclass(slots=True)
class _Making:
    """A draft in the making.

    Attributes:
        rows: that it wants fed; None once it is made.
    """

    model: Runner
    drafting: Drafting
    rows: Rows | None = None
    made: Made = Draft()

    def go_on(self, logits: torch.Tensor | None) -> None:
        """Send in what it waits for; None begins.

        Tokens that the model does not know are its own failure, not that of the pass.
        """
        try:
            self.rows = next(self.drafting) if logits is None else self.drafting.send(logits)
            self.model.require_rows(self.rows.tokens)
        except StopIteration as end:
            self.rows, self.made = None, end.value
        except Exception as error:  # noqa: BLE001 - a drafter must never cost the answer
            self.fail(error)

    def fail(self, error: Exception) -> None:
        self.drafting.close()
        self.rows, self.made = None, error


def propose_all(asked: Sequence[Asked]) -> list[Made]:
    """Make drafts of several sequences.

    Returns:
        Each draft, or what its drafter failed with; the others go on, but for those with rows in
        the very pass that failed.
    """
    made: dict[int, Made] = {}
    making: dict[int, _Making] = {}
    try:
        for place, one in enumerate(asked):
            drafter, model = one.drafter, None
            if len(asked) > 1 and isinstance(drafter, GrowingDrafter):
                model = drafter.shared_model(one.max_nodes)
            if model is None:
                made[place] = _alone(one)
                continue
            assert isinstance(drafter, GrowingDrafter)
            drafting = drafter.proposing(one.ids, one.max_depth, one.max_nodes)
            making[place] = _Making(model, drafting)
            making[place].go_on(None)
        while going := [one for one in making.values() if one.rows is not None]:
            for some in _passes(going):
                _feed(some)
    finally:
        for each in making.values():
            each.drafting.close()
    made |= {place: one.made for place, one in making.items()}
    return [made[place] for place in range(len(asked))]


def _alone(one: Asked) -> Made:
    try:
        return one.drafter.propose(one.ids, one.max_depth, one.max_nodes)
    except Exception as error:  # noqa: BLE001 - a drafter must never cost the answer
        return error


def _passes(going: Sequence[_Making]) -> Iterator[list[_Making]]:
    """Those whose rows go through one pass: of one model, and not too many."""
    some: list[_Making] = []
    rows = 0
    for one in going:
        count = len(one.rows.tokens) if one.rows is not None else 0
        if some and (rows + count > SHARED_ROWS or one.model is not some[0].model):
            yield some
            some, rows = [], 0
        some.append(one)
        rows += count
    yield some


def _feed(some: Sequence[_Making]) -> None:
    parts = [one.rows for one in some if one.rows is not None]
    try:
        logits = some[0].model.logits(parts).split([len(part.wanted) for part in parts])
    except Exception as error:  # noqa: BLE001 - as above
        for one in some:
            one.fail(error)
        return
    for one, own in zip(some, logits, strict=True):
        one.go_on(own)
