"""Memory as weights and KV of runs lie in, which parts of a measurement take in turns."""

import torch

from offload_rt.device.base import Device
from offload_rt.device.host_memory import LARGE_PAGE_BYTES, HostBuffer, allocate_host
from offload_rt.errors import DeviceError

_ROOM_PART = 4  # of free memory


class RunMemory:
    """Lends memory; on a CPU in large pages, and the same again to the next part.

    What was given back to the system is given anew more slowly than it is filled, most of all by a
    virtual machine whose host takes it away meanwhile.
    """

    def __init__(self) -> None:
        self._held: HostBuffer | None = None
        self._taken = 0

    def begin(self) -> None:
        """Nothing that was taken is used any more."""
        self._taken = 0

    def take(self, device: Device, nbytes: int) -> torch.Tensor:
        """[nbytes] of it; what is smaller than a large page, or more than there is, is new.

        So is all where the system does not map a quarter of free memory at once.

        Raises:
            DeviceError: it refuses new memory.
        """
        if not device.kind.host_computes:
            return torch.empty(nbytes, dtype=torch.uint8, device=device.torch_device)
        if self._held is None:
            try:
                self._held = allocate_host(device.free_bytes() // _ROOM_PART)
            except DeviceError:
                return allocate_host(nbytes).tensor
        start = -(-self._taken // LARGE_PAGE_BYTES) * LARGE_PAGE_BYTES
        if not LARGE_PAGE_BYTES <= nbytes <= self._held.nbytes - start:
            return allocate_host(nbytes).tensor
        self._taken = start + nbytes
        return self._held.tensor[start : self._taken]
