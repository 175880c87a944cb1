"""GPUs of several processes that send to each other, by NCCL as torch has it.

Untested on GPUs: what uses it runs on a double (`tests/nodes_double.py`).
"""

from datetime import timedelta
from typing import Any

import torch

OPEN_S = 60.0  # until all have joined
# Of a send or receive, after which torch ends the process. It counts from when that is enqueued,
# maybe behind a long prompt's kernels. A node that is gone is noticed on the line.
CROSS_S = 86_400.0


class NcclGroup:
    """All processes of a run, each with a GPU of its own.

    Raises:
        RuntimeError: NCCL cannot be used here, or not with the others.
    """

    def __init__(self, store: Any, number: int, count: int, device: torch.device) -> None:  # noqa: ANN401
        import torch.distributed as dist

        self._dist: Any = dist
        dist.init_process_group(
            "nccl",
            store=dist.PrefixStore("offload-rt/nccl", store),
            rank=number,
            world_size=count,
            device_id=device,  # connects now, so that it fails now
            timeout=timedelta(seconds=OPEN_S),
        )
        # Before torch 2.14 there was only the second, which warns since then.
        limit = getattr(dist, "set_timeout", None) or self._dist.distributed_c10d._set_pg_timeout
        limit(timedelta(seconds=CROSS_S))

    def isend(self, tensor: torch.Tensor, dst: int) -> Any:  # noqa: ANN401 - torch's own
        """Begin to send to a process, behind what the current stream has enqueued."""
        return self._dist.isend(tensor, dst)

    def irecv(self, tensor: torch.Tensor, src: int) -> Any:  # noqa: ANN401 - torch's own
        """Begin to receive from a process."""
        return self._dist.irecv(tensor, src)

    def close(self, *, abort: bool = False) -> None:
        """Leave; `abort` ends kernels that wait for a process that is gone."""
        if not self._dist.is_initialized():
            return
        if abort:
            self._dist.distributed_c10d._abort_process_group()
        else:
            self._dist.destroy_process_group()


def nccl_version() -> str:
    """NCCL's version, as torch has it here; empty: it has none."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_nccl_available() and torch.cuda.is_available()):
        return ""
    return ".".join(map(str, torch.cuda.nccl.version()))
