"""CUDA through torch: the only file that names `torch.cuda`.

Every call that acts on the current GPU is made under this driver's own, on whatever thread: a
thread begins with GPU 0, and pinning memory or leaving a stream there would make a context of 300
to 500 MB on it.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from offload_rt.device.cuda.driver import DriverEvent, MadeT
from offload_rt.device.cuda.present import absent_gpu, old_driver

WARM_UPS = 3  # before a capture: libraries choose kernels and take workspaces (torch's own advice)
REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU, not only the current one


def uses_gpu() -> bool:
    """Whether this process has begun to use one."""
    return torch.cuda.is_initialized()


def runs_flash(index: int) -> bool:
    """Whether GPU `index` is new enough for flash attention: Ampere, of 2020, or later."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(index) >= (8, 0)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Have the GPU of a tensor be the current one meanwhile, for who launches kernels himself."""
    return torch.cuda.device_of(tensor)


@dataclass(frozen=True, slots=True)
class TorchEvent:
    """A `torch.cuda.Event`."""

    event: torch.cuda.Event

    def synchronize(self) -> None:
        """Block the host until it is reached."""
        self.event.synchronize()

    def done(self) -> bool:
        """Whether it is reached."""
        return bool(self.event.query())

    def seconds_until(self, later: DriverEvent) -> float:
        """Seconds from this event to a later one."""
        assert isinstance(later, TorchEvent)
        return float(self.event.elapsed_time(later.event)) / 1000


@dataclass(frozen=True, slots=True)
class TorchStream:
    """A `torch.cuda.Stream`."""

    stream: torch.cuda.Stream

    def record(self) -> TorchEvent:
        """Record an event; a host that waits for it sleeps instead of spinning."""
        event = torch.cuda.Event(enable_timing=True, blocking=True)
        event.record(self.stream)
        return TorchEvent(event)

    def wait(self, event: DriverEvent) -> None:
        """Order all later work after `event`."""
        assert isinstance(event, TorchEvent)
        self.stream.wait_event(event.event)

    def copy(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        """Enqueue a copy between host and device."""
        # The stream alone would go back to the thread's GPU, and make a context there.
        with torch.cuda.device(self.stream.device), torch.cuda.stream(self.stream):
            dst.copy_(src, non_blocking=True)

    def synchronize(self) -> None:
        """Block the host until the stream is empty."""
        self.stream.synchronize()


class TorchDriver:
    """CUDA through torch, of one GPU once it is opened."""

    def __init__(self) -> None:
        self._device = torch.device("cuda", 0)
        self._graphs: tuple[torch.cuda.Stream, Any] | None = None  # and the pool of their memory

    def missing(self, index: int) -> str | None:
        """Why GPU `index` cannot be used and what to do, or None if it can."""
        if torch.version.cuda is None:
            return (
                f"torch {torch.__version__} is built without CUDA: install a CUDA build of torch, "
                "or use --device cpu"
            )
        if not torch.cuda.is_available():
            return old_driver(torch.version.cuda) or (
                f"torch {torch.__version__} finds no NVIDIA GPU or no driver for CUDA "
                f"{torch.version.cuda}: check that nvidia-smi works, or use --device cpu"
            )
        return absent_gpu(index, torch.cuda.device_count())

    def open(self, device: torch.device) -> tuple[TorchStream, TorchStream]:
        """Return the current stream and a new one, and restart the count of peak memory."""
        self._device = device
        torch.cuda.init()  # what follows does not do it by itself
        # From Hopper on cuDNN's attention comes first where torch chooses, and builds a plan of 40
        # to 400 ms (published) for each new number of keys: for each pass here.
        torch.backends.cuda.enable_cudnn_sdp(False)
        with torch.cuda.device(device):
            torch.cuda.reset_peak_memory_stats(device)
            return TorchStream(torch.cuda.current_stream(device)), self.stream(device)

    def stream(self, device: torch.device) -> TorchStream:
        """Return one more new stream."""
        return TorchStream(torch.cuda.Stream(device))

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Return [nbytes] uint8 of device memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Free and total bytes; what torch holds in reserve without using it counts as free."""
        free, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + idle, total

    def peak_bytes(self, device: torch.device) -> int:
        """Most bytes allocated at once since `open`."""
        return int(torch.cuda.max_memory_allocated(device))

    def peak_reserved_bytes(self, device: torch.device) -> int:
        """Most bytes that torch's allocator had taken at once since `open`."""
        return int(torch.cuda.max_memory_reserved(device))

    def register(self, address: int, nbytes: int) -> str | None:
        """Pin host memory."""
        with torch.cuda.device(self._device):
            runtime = torch.cuda.cudart()
            result = runtime.cudaHostRegister(address, nbytes, REGISTER_PORTABLE)
            if int(result) == 0:
                return None
            self._clear_error()
            return str(runtime.cudaGetErrorString(result))

    def unregister(self, address: int) -> None:
        """Unpin host memory."""
        with torch.cuda.device(self._device):
            torch.cuda.cudart().cudaHostUnregister(address)

    def allocate_pinned(self, nbytes: int) -> torch.Tensor | None:
        """Ask for memory that is pinned from the start (`cudaHostAlloc`)."""
        with torch.cuda.device(self._device):
            try:
                return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError:
                return None

    def mapped(self, memory: torch.Tensor, device: torch.device) -> torch.Tensor | None:
        """Take the address that the driver gives the memory on the device."""
        runtime, address = _loaded_runtime(), ctypes.c_void_p()
        if runtime is None or not hasattr(runtime, "cudaHostGetDevicePointer"):
            return None
        with torch.cuda.device(device):
            host = ctypes.c_void_p(memory.data_ptr())
            if runtime.cudaHostGetDevicePointer(ctypes.byref(address), host, 0):
                self._clear_error()
                return None
            try:
                made = torch.as_tensor(_OnDevice(address.value or 0, memory), device=device)
            except RuntimeError:
                return None
        return made if made.data_ptr() == address.value else None  # else it is a copy

    def address(self, tensor: torch.Tensor) -> int:
        """As torch knows it."""
        return tensor.data_ptr()

    def upload(self, source: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Enqueue the copy in the current stream."""
        with torch.cuda.device(device):
            return source.to(device, non_blocking=True)

    def receive(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Copy between GPUs; where one cannot reach the other the driver goes by host memory."""
        return tensor.to(device, non_blocking=True)

    def download(self, values: torch.Tensor) -> list[int]:
        """Return the values of an integer tensor."""
        return [int(v) for v in values.flatten().tolist()]  # host sync

    def fetch(self, data: torch.Tensor) -> torch.Tensor:
        """Return bytes in host memory."""
        return data.cpu()  # host sync

    def capture(
        self, work: Callable[[], MadeT], device: torch.device
    ) -> tuple[Callable[[], MadeT], int]:
        """Capture a CUDA graph; all graphs of a run share one pool of memory.

        They may, as they are replayed in one stream and each result is used before the next replay,
        or keeps its memory from later captures while somebody refers to it (`runner/pieces.py`).
        Feeder threads go on calling CUDA meanwhile, so only this thread's calls can spoil it.
        """
        with torch.cuda.device(device):
            warm_ups = 1
            if self._graphs is None:
                self._graphs = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
                warm_ups = WARM_UPS
            side, pool = self._graphs
            compute = torch.cuda.current_stream(device)
            side.wait_stream(compute)
            # A host sync would spoil the capture, after which torch before 2.13 is not quite sound
            # (pytorch PR 180395). So it is found before one has begun.
            with torch.cuda.stream(side), _refusing_host_syncs():
                for _ in range(warm_ups):
                    work()
            compute.wait_stream(side)
            torch.cuda.synchronize(device)
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(device)
            # `torch.cuda.graph` does the same, and gives all cached memory back before each.
            with torch.cuda.stream(side):
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    result = work()
                except BaseException:
                    with suppress(RuntimeError):  # the capture was spoilt: what spoilt it is raised
                        graph.capture_end()
                    raise
                graph.capture_end()
            grown = torch.cuda.memory_reserved(device) - before

        def replay() -> MadeT:
            with torch.cuda.device(device):
                graph.replay()
            return result

        return replay, max(0, grown)

    def _clear_error(self) -> None:
        """Take a refused call's error from the thread.

        It stays there, and the next kernel launch would report it as its own.
        """
        runtime = _loaded_runtime()
        if runtime is not None:
            runtime.cudaGetLastError()
            return
        try:
            torch.zeros(1, device=self._device)  # this launch is to report it, once
        except RuntimeError:
            return


class _OnDevice:
    """Host memory as other libraries hand device memory over (CUDA Array Interface, version 2).

    Args:
        address: of the device.
        memory: [n] uint8, which lives as long as this.
    """

    def __init__(self, address: int, memory: torch.Tensor) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (memory.numel(),),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2,
        }


@contextmanager
def _refusing_host_syncs() -> Iterator[None]:
    """Have kernels that make the host wait raise an error.

    The mode is that of all threads. Those that feed copies wait for events alone, which it allows.
    """
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@cache
def _loaded_runtime() -> ctypes.CDLL | None:
    """The CUDA runtime that torch calls, wherever it was loaded from; None if it is linked in."""
    with open("/proc/self/maps") as file:
        paths = {line.split()[-1] for line in file if "libcudart.so" in line}
    for path in [*sorted(paths), None]:  # None: what any library made known to all
        try:
            runtime = ctypes.CDLL(path)
            runtime.cudaGetLastError.restype = ctypes.c_int
        except (OSError, AttributeError):
            continue
        return runtime
    return None
