"""How hidden states cross: in host memory over the line, or from GPU to GPU by NCCL.

A frame on the line announces them either way, with the pass they are of: so a node that is gone is
noticed there, before anything waits for it on a GPU. Whoever takes a frame takes its rows too, even
of a pass that was given up, so sends and receives of two nodes stay in pairs.

NCCL has streams of its own. A send begins behind what the current stream, that of the pass, has
enqueued; `wait` has that stream, not the host, wait until it is over, so its memory may be used
again. A receive fills memory that is read behind its `wait`. Nothing else is to be computed between
a node's rows going and coming back, so these waits cost nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from offload_rt.nodes.line import Frame, Kind, Line


class Work(Protocol):
    """Something on its way."""

    def wait(self) -> object:
        """Have the current stream wait until it is over."""


class Group(Protocol):
    """Nodes that reach each other's devices."""

    def isend(self, tensor: torch.Tensor, dst: int) -> Work:
        """Begin to send to a node, behind what the current stream has enqueued."""

    def irecv(self, tensor: torch.Tensor, src: int) -> Work:
        """Begin to receive from a node."""

    def close(self, *, abort: bool = False) -> None:
        """Leave; `abort` ends what waits for a node that is gone."""


class Carrier(Protocol):
    """Brings hidden states to the other end of a line, and from there."""

    def send(self, line: Line, tensor: torch.Tensor, record: Mapping[str, Any]) -> None:
        """Send [1, S, E] with a record.

        Raises:
            NodeError: the other end is gone.
        """

    def take(self, frame: Frame, like: torch.Tensor) -> torch.Tensor:
        """The [1, S, E] that a frame announces, in the number format and on the device of `like`.

        They have to be taken of each frame, also where nobody needs them.
        """

    def close(self, *, abort: bool = False) -> None:
        """Nothing more will come; `abort`: as the other end is gone."""


class ByLine:
    """In host memory, with the frame.

    Pinned staging would save little: a GPU copies to pageable memory at some GB/s, networks for
    which there is no NCCL carry 1.25 at most.
    """

    def send(self, line: Line, tensor: torch.Tensor, record: Mapping[str, Any]) -> None:
        """Send [1, S, E] with a record."""
        there = tensor.detach().cpu().contiguous()  # host sync
        data = there.view(torch.uint8).numpy().reshape(-1).data
        line.send(Kind.ROWS, {**record, "shape": list(there.shape)}, data)

    def take(self, frame: Frame, like: torch.Tensor) -> torch.Tensor:
        """The [1, S, E] of a frame."""
        found = torch.frombuffer(frame.data, dtype=torch.uint8).view(like.dtype)
        return found.view(*_shape(frame)).to(like.device)

    def close(self, *, abort: bool = False) -> None:
        """Nothing."""


class ByGroup:
    """From device to device, beside the frame."""

    def __init__(self, group: Group, peer: int) -> None:
        self._group, self._peer = group, peer

    def send(self, line: Line, tensor: torch.Tensor, record: Mapping[str, Any]) -> None:
        """Send [1, S, E] with a record."""
        sent = tensor.detach().contiguous()
        work = self._group.isend(sent, self._peer)
        line.send(Kind.ROWS, {**record, "shape": list(sent.shape)})
        work.wait()

    def take(self, frame: Frame, like: torch.Tensor) -> torch.Tensor:
        """The [1, S, E] that a frame announces."""
        made = torch.empty(_shape(frame), dtype=like.dtype, device=like.device)
        self._group.irecv(made, self._peer).wait()
        return made

    def close(self, *, abort: bool = False) -> None:
        """Leave the group."""
        self._group.close(abort=abort)


def why_not_nccl(names: Sequence[str], versions: Sequence[str]) -> str:
    """Why nodes with these versions of NCCL cannot use it; empty: they can."""
    for name, version in zip(names, versions, strict=True):
        if not version:
            return f"torch has no NCCL on {name}"
        if version != versions[0]:
            return f"{names[0]} has NCCL {versions[0]} and {name} {version}"
    return ""


def _shape(frame: Frame) -> list[int]:
    shape = frame.record.get("shape")
    assert isinstance(shape, list)  # checked by who took the frame
    return shape
