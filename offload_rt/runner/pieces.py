"""Passes in pieces: kernels between two steps that Python decides are recorded, and replayed.

Which experts compute is known once a layer's router has chosen them, and how many keys attention
reads grows with each token. So a pass over a mixture cannot be recorded whole (`runner/static.py`).
But what lies between those steps, norms, products, rotations, routers and the head, is the same
kernels on the same memory for as many rows. It is noted once, operator by operator, while a pass is
made, and recorded piece by piece; a pass is then its replays with the steps in turn. Steps are made
as ever, by the same code, so any cache and any home of experts will do, and no bit differs.
"""

import logging
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from offload_rt.costs.sizes import MOST_PIECED, PIECED_ROWS
from offload_rt.device.base import Device, Replay
from offload_rt.model.attention_function import Step
from offload_rt.model.network import Network, TokenBatch
from offload_rt.runner.static import EAGER_FIRST, UNUSED_PASSES

_log = logging.getLogger(__name__)


class _UnfitError(Exception):
    """A pass cannot be replayed in pieces."""


class _Kernel(NamedTuple):
    """An operator, what it was given and what it made."""

    func: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    made: Any


class _Noted(NamedTuple):
    """A step of a pass.

    Attributes:
        step: makes it.
        given: what it was given.
        result: what it made, where those of later passes are put.
    """

    step: Step
    given: Sequence[torch.Tensor]
    result: torch.Tensor


class _Notes(TorchDispatchMode):
    """Notes the operators of a pass while it is made, and the steps between them.

    Attributes:
        batch: the rows.
        context: of the pass.
        pieces: operators before each step, and behind the last.
        steps: of the pass.
    """

    def __init__(self, network: Network, batch: TokenBatch) -> None:
        super().__init__()
        self.batch, self.context = batch, network.context(batch, self._apart)
        self.pieces: list[list[_Kernel]] = [[]]
        self.steps: list[_Noted] = []

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401 - an operator of torch
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        made = func(*args, **(kwargs or {}))
        self.pieces[-1].append(_Kernel(func, args, kwargs or {}, made))
        return made

    def _apart(self, step: Step, given: Sequence[torch.Tensor]) -> torch.Tensor:
        self.__exit__(None, None, None)
        try:
            result = step(self.context, given).clone()
        finally:
            self.__enter__()
        self.steps.append(_Noted(step, given, result))
        self.pieces.append([])
        return result


@dataclass(slots=True)
class _Piece:
    """A recorded piece and the step behind it; None behind the last."""

    replay: Replay[Sequence[torch.Tensor]]
    noted: _Noted | None


@dataclass(slots=True)
class _Recording:
    """A pass that is recorded in pieces.

    Attributes:
        inputs: ids, positions and wanted rows, where those of later passes are put.
        pieces: in order.
        logits: where they are.
        used: the number of the last pass that was made so.
    """

    inputs: Sequence[torch.Tensor]
    pieces: Sequence[_Piece]
    logits: torch.Tensor
    used: int = 0

    def run(self, network: Network, batch: TokenBatch) -> torch.Tensor:
        """Make a pass of other rows, as many."""
        context = network.context(batch)
        for there, here in zip(self.inputs, _inputs(batch), strict=True):
            there.copy_(here)
        for piece in self.pieces:
            network.poll()
            piece.replay()
            if piece.noted is not None:
                step, given, result = piece.noted
                result.copy_(step(context, given))
        network.passed(context.all_rows)
        return self.logits.clone()  # the next replay may come before they are read


class Pieces:
    """The passes of one network that are made in pieces.

    Args:
        network: attached to its weights, which are all on the device but for experts.
        device: where passes run.
    """

    def __init__(self, network: Network, device: Device) -> None:
        self._network, self._device = network, device
        self._kept: OrderedDict[tuple[int, int], _Recording] = OrderedDict()  # longest unused first
        self._asked: Counter[tuple[int, int]] = Counter()
        self._passes = 0
        self._refused = False

    def logits(self, batch: TokenBatch) -> torch.Tensor | None:
        """Make a pass; None if it is not one that is made so."""
        key = len(batch.token_ids), len(batch.logit_rows)
        most = min(PIECED_ROWS, self._network.chunk_tokens)
        if self._refused or self._network.watched or key[0] > most:
            return None
        self._passes += 1
        if (found := self._kept.get(key)) is not None:
            found.used = self._passes
            self._kept.move_to_end(key)
            return found.run(self._network, batch)
        self._asked[key] += 1
        full = len(self._kept) >= MOST_PIECED
        if self._asked[key] <= EAGER_FIRST or (full and not self._unused()):
            return None
        return self._record(key, batch)

    def _unused(self) -> bool:
        """Whether the recording that was unused longest may go."""
        return self._passes - next(iter(self._kept.values())).used > UNUSED_PASSES

    def _record(self, key: tuple[int, int], batch: TokenBatch) -> torch.Tensor:
        """Make a pass, and keep it recorded."""
        inputs = [given.clone() for given in _inputs(batch)]
        ids, positions, wanted = inputs
        notes = _Notes(self._network, TokenBatch(ids, positions, batch.segments, wanted))
        with self._whole(), notes:
            logits = self._network.forward(notes.batch, notes.context)
        try:
            made = _Recorder(self._device, notes, inputs).recording(logits)
        except _UnfitError as error:
            self._refused = True
            self._kept.clear()
            _log.warning("passes over experts are launched kernel by kernel: %s", error)
            return logits
        if len(self._kept) >= MOST_PIECED:
            self._kept.popitem(last=False)
        self._kept[key] = made
        made.used = self._passes
        return logits

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """No row may leave a pass while it is noted: later pieces would be of fewer rows."""
        gone, self._network.gone = self._network.gone, None
        try:
            yield
        finally:
            self._network.gone = gone


class _Recorder:
    """Records the pieces of a pass that was noted.

    Args:
        device: where it was made.
        notes: of it.
        inputs: what it read beside weights.
    """

    def __init__(self, device: Device, notes: _Notes, inputs: Sequence[torch.Tensor]) -> None:
        self._device, self._notes, self._inputs = device, notes, inputs
        self._maker: dict[int, int] = {}  # by tensor, the piece that made it
        self._there: dict[int, torch.Tensor] = {}  # where replays leave what a tensor was

    def recording(self, logits: torch.Tensor) -> _Recording:
        """Record them.

        Raises:
            _UnfitError: one of them cannot be recorded, or its replay has other bits.
        """
        pieces, steps = self._notes.pieces, self._notes.steps
        wanted = self._wanted(logits)
        before = [tensor.clone() for tensor in self._given()]
        recorded: list[_Piece] = []
        for kernels, out, noted in zip(pieces, wanted, [*steps, None], strict=True):
            replay = self._device.record(self._work(kernels, out), self._vary)
            if replay is None:
                raise _UnfitError("a piece of them was not recorded")
            self._there.update(zip(map(id, out), replay(), strict=True))
            if noted is not None:
                noted = noted._replace(given=[self._found(each) for each in noted.given])
            recorded.append(_Piece(replay, noted))
        for tensor, value in zip(self._given(), before, strict=True):
            tensor.copy_(value)
        for piece in recorded:
            piece.replay()
        kept = {id(each): each for out in wanted for each in out}
        same = [_same_bits(self._there[number], each) for number, each in kept.items()]
        if not all(self._device.download(torch.stack(same).to(torch.int64))):
            raise _UnfitError("replays have other bits than the pass they were noted in")
        return _Recording(self._inputs, recorded, self._found(logits))

    def _given(self) -> list[torch.Tensor]:
        """What pieces read that changes, and no piece makes."""
        return [*self._inputs, *(noted.result for noted in self._notes.steps)]

    def _vary(self) -> None:
        """Put other numbers there that are as good: the first id, place and row."""
        for tensor in self._given():
            tensor.neg_() if tensor.is_floating_point() else tensor.zero_()

    def _found(self, tensor: torch.Tensor) -> torch.Tensor:
        """Where replays leave it; a tensor that no piece makes is where it was."""
        return self._there.get(id(tensor), tensor)

    def _wanted(self, logits: torch.Tensor) -> list[list[torch.Tensor]]:
        """Of each piece, what it makes that is read behind it."""
        wanted: list[dict[int, torch.Tensor]] = []
        at, filled = 0, set[int]()  # memory that pieces so far made

        def read(tensor: torch.Tensor) -> None:
            maker = self._maker.get(id(tensor))
            if maker is None and _memory(tensor) in filled:
                raise _UnfitError("no operator made a tensor that is in memory which they fill")
            if maker is not None and maker < at:
                wanted[maker][id(tensor)] = tensor

        ends = [*(noted.given for noted in self._notes.steps), [logits]]
        for kernels, end in zip(self._notes.pieces, ends, strict=True):
            wanted.append({})
            own = set[int]()  # memory that the piece made
            for kernel in kernels:
                given, made = _tensors((kernel.args, kernel.options)), _tensors(kernel.made)
                for tensor in given:
                    read(tensor)
                if not own.issuperset(map(_memory, _written(kernel))):
                    raise _UnfitError(f"{kernel.func} writes what its piece did not make")
                if len(made) < len([m for m in tree_leaves(kernel.made) if m is not None]):
                    raise _UnfitError("a value is read back between their steps")
                own.update({*map(_memory, made)} - {*map(_memory, given)})
                filled |= own
                self._maker |= dict.fromkeys(map(id, made), at)
            at += 1
            for tensor in end:
                read(tensor)
        return [list(each.values()) for each in wanted]

    def _work(
        self, kernels: Sequence[_Kernel], wanted: Sequence[torch.Tensor]
    ) -> Callable[[], Sequence[torch.Tensor]]:
        """Does what a piece did, with what its tensors hold by then."""
        there = self._there

        def work() -> Sequence[torch.Tensor]:
            now = dict(there)

            def find(tensor: torch.Tensor) -> torch.Tensor:
                return now.get(id(tensor), tensor)

            for func, args, options, made in kernels:
                args, options = tree_map_only(torch.Tensor, find, (args, options))
                again = func(*args, **options)
                now.update(zip(map(id, _tensors(made)), _tensors(again), strict=True))
            return [now[id(each)] for each in wanted]

        return work


def _inputs(batch: TokenBatch) -> Sequence[torch.Tensor]:
    return batch.token_ids, batch.positions, batch.logit_rows


def _tensors(values: object) -> list[torch.Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, torch.Tensor)]


def _written(kernel: _Kernel) -> list[torch.Tensor]:
    """The tensors among its arguments that an operator writes."""
    declared = kernel.func._schema.arguments
    named = [(each, kernel.options.get(each.name)) for each in declared]
    pairs = [*zip(declared, kernel.args, strict=False), *named]
    return [
        tensor
        for each, value in pairs
        if each.alias_info is not None and each.alias_info.is_write
        for tensor in _tensors(value)
    ]


def _memory(tensor: torch.Tensor) -> int:
    """Identifies the memory that a tensor is a view of."""
    strided = tensor.layout is torch.strided  # a reordered weight has no storage
    return int(tensor.untyped_storage()._cdata) if strided else id(tensor)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Whether two tensors have the same bits, NaN included: [] bool."""
    return (one.contiguous().view(torch.uint8) == other.contiguous().view(torch.uint8)).all()
