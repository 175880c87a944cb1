"""The devices of a run: one, or several that have the model's layers in turn.

Each is a whole device (`base.Device`) with memory, streams and a link of its own. Only hidden
states go from one to another. What is in no layer, and what drafts, is on the first.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from offload_rt.device.base import CopyStatistics, Device, DeviceUsage, sum_usage


@dataclass(frozen=True, slots=True)
class Stripes:
    """Devices, and the number of each layer's."""

    devices: "Devices"
    device: Sequence[int]
    here: None = None  # all of them are

    def place(self, device: int) -> torch.device:
        """Where tensors of a device live."""
        return self.devices[device].torch_device

    def hop(self, tensor: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """`Devices.hop`."""
        return self.devices.hop(tensor, source, target)

    def shares(self, layers: Sequence[int]) -> Iterator[tuple[Device, list[int]]]:
        """Each device with those of some layers that it has."""
        for number, device in enumerate(self.devices):
            yield device, [layer for layer in layers if self.device[layer] == number]


class Devices:
    """One device or several.

    Args:
        devices: of one kind, in the order in which --device names them.
    """

    def __init__(self, devices: Sequence[Device]) -> None:
        self._devices = tuple(devices)

    def __len__(self) -> int:
        return len(self._devices)

    def __getitem__(self, index: int) -> Device:
        return self._devices[index]

    def __iter__(self) -> Iterator[Device]:
        return iter(self._devices)

    @property
    def name(self) -> str:
        """As --device names them."""
        return ",".join(device.name for device in self)

    def hop(self, tensor: torch.Tensor, source: int, target: int) -> torch.Tensor:
        """A tensor of one device on another, for kernels enqueued there from now on.

        The target reads it after the kernels of the source that made it, and the source goes on
        after that, so that the memory may be used again there. The host does not wait. Devices that
        compute in the same memory have nothing to do.
        """
        here, there = self[source], self[target]
        if here.torch_device == there.torch_device:
            return tensor
        there.compute.follow(here.compute.record())
        made = there.receive(tensor)
        here.compute.follow(there.compute.record())
        return made

    def ledger(self) -> dict[str, int]:
        """Bytes allocated so far by purpose, on all of them."""
        total = Counter[str]()
        for device in self:
            total.update(device.ledger())
        return dict(total)

    def free_bytes(self) -> list[int]:
        """Memory a run may take on each; what they share, each has a part of.

        A run's own context is counted with what it needs, and there already.
        """
        free = [device.free_bytes() + device.kind.context_bytes for device in self]
        return free if self[0].kind.own_memory else [one // len(self) for one in free]

    def peak_bytes(self) -> int:
        """Most memory this run has used at once on all of them."""
        peaks = [device.peak_bytes() for device in self]
        return sum(peaks) if self[0].kind.own_memory else max(peaks)

    def usage(self) -> DeviceUsage:
        """What they hold of host memory, and the device memory taken, beside what was used."""
        return sum_usage([device.usage() for device in self])

    def copied(self) -> CopyStatistics:
        """What crossed the links for layers: bytes together, and the time of the busiest link."""
        found = [device.copy.statistics() for device in self]
        return CopyStatistics(
            bytes_copied=sum(one.bytes_copied for one in found),
            busy_s=max(one.busy_s for one in found),
        )

    def loaded_bytes(self) -> int:
        """Bytes that were read for what stays on them."""
        return sum(device.load.statistics().bytes_copied for device in self)

    def stalled_s(self) -> float:
        """Seconds computation waited for copies: layers follow each other, so waits add up."""
        return sum(device.compute.stalled_s() for device in self)
