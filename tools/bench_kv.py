"""Host time that a block of offloaded KV costs on a GPU, measured over CPU tensors.

The real device code runs over a driver that does nothing, and blocks and what is chosen from them
are so small that computing takes next to no time: what is left is what the host does for each
block. It is processor time, the least of all passes, so that other work matters little. Needs no
GPU.

Usage: python tools/bench_kv.py [--rounds 50] [--group 1]
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

from offload_rt.device.system import settle_math

settle_math()  # before torch is imported

import torch  # noqa: E402
from gpu_check_parts import fill, read_once  # noqa: E402

from offload_rt.config import RetrievalConfig  # noqa: E402
from offload_rt.device.cuda.device import CudaDevice  # noqa: E402
from offload_rt.kv import sizes as kv_sizes  # noqa: E402
from offload_rt.kv.base import KVShape  # noqa: E402
from offload_rt.kv.home import RamHome  # noqa: E402
from offload_rt.kv.offloaded import KVSpace, OffloadedKV  # noqa: E402
from offload_rt.kv.retrieval import RetrievalKV  # noqa: E402
from offload_rt.kv.sizes import KVSizes, RetrievalSizes  # noqa: E402

LAYERS, ROWS, BLOCK = 2, 1600, 32
SHAPE = KVShape(heads=2, key_dim=8, value_dim=8)


class Idle:
    """A driver, a stream of it and an event: everything is done at once, and nothing is."""

    def missing(self, index: int) -> str | None:
        """It is there."""
        return None

    def open(self, device: torch.device) -> tuple["Idle", "Idle"]:
        """Two streams."""
        return self, self

    def stream(self, device: torch.device) -> "Idle":
        """One more."""
        return self

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Host memory."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def memory(self, device: torch.device) -> tuple[int, int]:
        """Free and total."""
        return 2**33, 2**33

    def peak_bytes(self, device: torch.device) -> int:
        """Not counted."""
        return 0

    def register(self, address: int, nbytes: int) -> str | None:
        """Pinned."""
        return None

    def unregister(self, address: int) -> None:
        """Nothing."""

    def allocate_pinned(self, nbytes: int) -> torch.Tensor | None:
        """There is none."""
        return None

    def upload(self, source: torch.Tensor, device: torch.device) -> torch.Tensor:
        """A copy."""
        return source.clone()

    def receive(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The same."""
        return tensor

    def download(self, values: torch.Tensor) -> list[int]:
        """The values."""
        return [int(value) for value in values.flatten()]

    def record(self) -> "Idle":
        """An event."""
        return self

    def wait(self, event: object) -> None:
        """Nothing to wait for."""

    def copy(self, dst: torch.Tensor, src: torch.Tensor) -> None:
        """Nothing: it is the link's time that would be taken."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def done(self) -> bool:
        """It is."""
        return True

    def seconds_until(self, later: "Idle") -> float:
        """None."""
        return 0.0


def pass_s(
    cache: OffloadedKV, row: torch.Tensor, query: torch.Tensor, watcher: RetrievalKV | None
) -> float:
    """Processor time of a pass of one row [K, 1, D]."""
    began = time.thread_time()
    read_once(cache, row, query, LAYERS, watcher)
    return time.thread_time() - began


def main(argv: Sequence[str] | None = None) -> int:
    """Print microseconds per block, plain and with a build of a retrieval cache."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--group", type=int, default=1, help="query heads of a KV head")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    idle: Any = Idle()
    device = CudaDevice(0, driver=idle)
    device.torch_device = torch.device("cpu")
    row_bytes = (SHAPE.numbers_per_token * 4,) * LAYERS
    kv_sizes.PAGE_BYTES = row_bytes[0]  # so that rows this small may go home by 32
    sizes = KVSizes(row_bytes=row_bytes, capacity=ROWS + 64, block_tokens=BLOCK)
    config = RetrievalConfig(budget_tokens=64)
    with torch.inference_mode():
        space, home = KVSpace(device, sizes.staging_bytes), RamHome(device, sizes)
        cache = OffloadedKV(space, [SHAPE] * LAYERS, torch.float32, sizes, home)
        chosen = RetrievalSizes(
            row_bytes=row_bytes, config=config, capacity=ROWS + 64, scratch_tokens=64
        )
        retrieval = RetrievalKV(device, [SHAPE] * LAYERS, torch.float32, chosen)
        fill(cache, SHAPE, LAYERS, torch.empty(0), ROWS)
        row = torch.randn(SHAPE.heads, 1, SHAPE.key_dim)
        query = row.repeat_interleave(options.group, dim=0)
        blocks = LAYERS * ROWS // BLOCK
        for name, watcher in (("plain", None), ("with a build", retrieval)):
            least = min(pass_s(cache, row, query, watcher) for _ in range(options.rounds))
            print(f"{name}: {least / blocks * 1e6:.0f} us a block")
        space.close()
    device.close()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
