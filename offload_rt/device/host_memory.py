"""Host memory for homes, staging and the CPU's own buffers: page-aligned, of exactly its size."""

import mmap
from dataclasses import dataclass

import torch

from offload_rt.errors import DeviceError
from offload_rt.units import format_size


@dataclass(frozen=True, slots=True)
class HostBuffer:
    """Page-aligned anonymous memory of exactly the size asked for.

    Attributes:
        tensor: [nbytes] uint8 over the memory; views of it keep the memory alive.
        view: the same bytes for system calls.
    """

    tensor: torch.Tensor
    view: memoryview

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.tensor.numel()


def allocate_host(nbytes: int) -> HostBuffer:
    """Map `nbytes` of zeroed memory; pages are taken when they are first touched.

    Raises:
        DeviceError: the system refuses the mapping.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # Python's default, shared, gets no huge pages
    try:
        memory = mmap.mmap(-1, max(nbytes, 1), flags=flags)
    except (OSError, ValueError, OverflowError) as error:
        raise DeviceError(f"cannot map {format_size(nbytes)} of memory: {error}") from error
    if nbytes >= 2**21:
        # A direct read into huge pages is one disk request, into small ones it is hundreds:
        # 2.8 GB/s against 1.1 to 2.6 here, depending on how scattered the small ones lie.
        memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)[:nbytes]
    tensor = torch.frombuffer(memory, dtype=torch.uint8, count=nbytes) if nbytes else torch.empty(0)
    return HostBuffer(tensor, view)
