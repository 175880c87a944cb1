"""Make the caches of a run as they were planned."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from offload_rt.config import KVPlace
from offload_rt.device.base import Device
from offload_rt.kv.base import KVCache, KVShape
from offload_rt.kv.followed import FollowedKV, WatchedCache
from offload_rt.kv.home import FileHome, RamHome
from offload_rt.kv.offloaded import KVOptions, KVSpace, OffloadedKV
from offload_rt.kv.pool import KVPool
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.sizes import KVPlan
from offload_rt.kv.states import HybridKV
from offload_rt.kv.striped import StripedKV


def allocate_caches(
    device: Device,
    shapes: Sequence[KVShape],
    dtype: torch.dtype,
    *,
    plan: KVPlan | KVPool | Sequence[int],
    folder: str | None,
    undo: ExitStack,
) -> list[WatchedCache]:
    """Take memory, and a home if there is one, for every sequence.

    Args:
        device: where the memory is taken.
        shapes: sizes per layer.
        dtype: number format of keys and values.
        plan: how they are kept outside the device, or KV rows of each sequence on it, or memory
            there that they share.
        folder: where a file is made.
        undo: gives back homes and copies, before the device is closed.

    Raises:
        PlanError: the disk has no room.
        DeviceError: memory or a file cannot be had.
    """
    if isinstance(plan, KVPool):
        return list(plan.caches)
    if not isinstance(plan, KVPlan):
        return [ResidentKV(device, shapes, dtype, capacity) for capacity in plan]
    plan = plan.of_rows([shape.numbers_per_token * dtype.itemsize for shape in shapes])
    space = KVSpace(device, max(sizes.staging_bytes for sizes in plan.sizes))
    undo.callback(space.close)
    options = KVOptions(attend_on_host=plan.attend_on_host)
    caches: list[WatchedCache] = []
    for sizes in plan.sizes:
        where = Path(folder) if folder is not None else None
        home = FileHome(sizes, where) if plan.place is KVPlace.DISK else RamHome(device, sizes)
        space.own(home)
        caches.append(OffloadedKV(space, shapes, dtype, sizes, home, options))
    return caches


def kv_bytes_copied(caches: Sequence[KVCache]) -> int:
    """Bytes these caches have moved between device and home so far, both ways."""
    parts = [part for cache in caches for part in offloaded_parts(cache)]
    streams = {stream for part in parts for stream in part.copies}
    return sum(stream.statistics().bytes_copied for stream in streams)


def offloaded_parts(cache: KVCache) -> list[OffloadedKV]:
    """What of a cache has a home outside the device."""
    full = cache.full if isinstance(cache, FollowedKV) else cache
    full = full.rows if isinstance(full, HybridKV) else full
    parts = full.parts if isinstance(full, StripedKV) else [full]
    return [part for part in parts if isinstance(part, OffloadedKV)]
