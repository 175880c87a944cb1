"""The first line of a prediction: how fast, what binds it, and what more memory would give."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from operator import add

from offload_rt.cli.columns import hanging
from offload_rt.config import HomeKind, RuntimeConfig
from offload_rt.costs.machine import FreeMemory
from offload_rt.costs.sizes import PACKED, StoredSizes
from offload_rt.costs.step import Prediction
from offload_rt.device.kinds import DeviceKind
from offload_rt.errors import OffloadError
from offload_rt.planning.fit import host_limits
from offload_rt.planning.placement import Placement
from offload_rt.units import format_size, format_speed

_GAIN = 1.05  # times as fast as before; less is not worth a word
_STEPS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768)


@dataclass(frozen=True, slots=True, kw_only=True)
class More:
    """What more memory would give, by planning with it.

    Attributes:
        memory: `device` or `host`.
        bytes: how much more.
        limit_bytes: the limit with it.
        s_per_token: predicted with that limit.
    """

    memory: str
    bytes: int
    limit_bytes: int
    s_per_token: float


def pinning_line(host_bytes: int, pinned_bytes: int) -> list[str]:
    """What of host memory cannot be pinned, if anything."""
    if pinned_bytes == host_bytes:
        return []
    words = "can be pinned on this machine; the rest is copied once more on its way"
    return [f"  of {format_size(host_bytes)} in host memory {format_size(pinned_bytes)} {words}"]


def split_lines(placement: Placement) -> list[str]:
    """How much of a home that is split is where."""
    if placement.home is not HomeKind.SPLIT:
        return []
    held = format_size(placement.held_bytes)
    if placement.expert_slots:
        return [f"  of each layer's experts {placement.expert_share:.0%} in host memory ({held})"]
    staying = len(placement.in_files)
    return [
        f"  {len(placement.streamed) - staying} of them in host memory ({held}), {staying} in the "
        f"files, read ahead into {format_size(placement.ahead_bytes)}"
    ]


def more_memory(
    config: RuntimeConfig,
    device: DeviceKind,
    free: FreeMemory,
    found: tuple[Placement, float],
    predict: Callable[[RuntimeConfig, FreeMemory], float],
) -> More | None:
    """Find what more memory makes a run faster, by predicting it with that.

    On the device: the rest, where half as much again holds everything; else a quarter, then twice
    that, as long as it does not help. On the host: what streamed layers lack to live there instead
    of in the files, for a GPU, on each machine. The one of more tokens/s is told.

    Args:
        config: what is asked for.
        device: the kind that computes.
        free: memory that is free.
        found: the placement, and its seconds per token.
        predict: seconds per token with other limits and as much memory; may refuse them.
    """
    placement, s_per_token = found

    def try_device(more: int) -> More | None:
        shares = placement.of_devices
        limits = tuple(own.device_limit_bytes + more // len(shares) for own in shares)
        roomy = replace(config, device_limit_bytes=limits if limits[1:] else limits[0])
        first, *others = map(max, free.devices, limits)
        there = replace(free, device_bytes=first, further_bytes=tuple(others))
        return _tried("device", more, sum(limits), lambda: predict(roomy, there))

    def try_host(more: Sequence[int]) -> More | None:
        limits = tuple(map(add, host_limits(config, free), more))
        if config.machines:
            roomy = replace(config, machine_host_bytes=limits)
        else:
            roomy = replace(config, host_limit_bytes=limits[0])
        first, *others = map(max, (free.host_bytes, *free.further_host_bytes), limits)
        there = replace(free, host_bytes=first, further_host_bytes=tuple(others))
        return _tried("host", sum(more), sum(limits), lambda: predict(roomy, there))

    def helps(made: More | None) -> bool:
        return made is not None and s_per_token >= _GAIN * made.s_per_token

    tries: list[More | None] = [
        next(filter(helps, map(try_device, _device_steps(placement))), None)
    ]
    if any(lacking := _lacking_on_host(config, device, free, placement)):
        tries.append(try_host([_round_up(nbytes) for nbytes in lacking]))
    return min((made for made in tries if made and helps(made)), key=_seconds, default=None)


def _seconds(made: More) -> float:
    return made.s_per_token


def _tried(memory: str, more: int, limit: int, predict: Callable[[], float]) -> More | None:
    try:
        s_per_token = predict()
    except OffloadError:  # what the user fixed does not go with it
        return None
    return More(memory=memory, bytes=more, limit_bytes=limit, s_per_token=s_per_token)


def _device_steps(placement: Placement) -> list[int]:
    """How much more device memory to try, in order."""
    limit, lacking = placement.device_limit_bytes, _lacking_on_device(placement)
    if not lacking:
        return []
    steps = [lacking] if lacking <= limit // 2 else [limit // 4, limit // 2, limit]
    return list(dict.fromkeys(_round_up(min(step, lacking)) for step in steps))


def _lacking_on_device(placement: Placement) -> int:
    """Device memory that would be needed beyond the limit to stream nothing at all."""
    demand = placement.demand
    if not placement.streams and demand.kv is None:
        return 0
    kv_bytes = 0 if demand.kv is None else sum(sizes.home_bytes for sizes in demand.kv.sizes)
    fixed_bytes = sum(own.demand.fixed_bytes for own in placement.of_devices)
    whole = fixed_bytes + sum(demand.layer_bytes) + kv_bytes
    return max(0, whole - placement.device_limit_bytes)


def _lacking_on_host(
    config: RuntimeConfig, device: DeviceKind, free: FreeMemory, placement: Placement
) -> list[int]:
    """Host memory that each machine's streamed layers lack to live there, where they would."""
    if config.home is not HomeKind.AUTO or device.home is not HomeKind.HOST:
        return []
    shares = placement.shares if config.machines else (placement,)
    return [
        max(0, own.streamed_bytes - limit) if own.streams and own.home is not HomeKind.HOST else 0
        for own, limit in zip(shares, host_limits(config, free), strict=True)
    ]


def headline(name: str, s_per_token: float, bound: str, more: More | None) -> str:
    """How fast, what binds it, and what more memory would give."""
    line = f"{name}: {format_speed(s_per_token)}, bound by {bound}"
    if more is not None:
        line += (
            f"; {format_size(more.bytes)} more {more.memory} memory would give "
            f"{format_speed(more.s_per_token)}"
        )
    return line


def _round_up(nbytes: int) -> int:
    """The next size that people would name: 0, 1, 1.5, 2, 3, 4, 6, 8, 12 ... MiB or GiB."""
    if not nbytes:
        return 0
    for unit in (2**20, 2**30):
        for steps in _STEPS:
            if steps * unit >= nbytes:
                return int(steps * unit)
    return nbytes


def quantised_lines(sizes: StoredSizes | None) -> list[str]:
    """What is quantised, and its sizes: in files, on the link and on the device; as it computes."""
    if sizes is None:
        return []
    if sizes.rounded is not None:
        text = (
            f"  {sizes.method} (--wire): {format_size(sizes.file_bytes)} in the files, "
            f"{format_size(sizes.wire_bytes)} in memory and on the way, "
            f"{format_size(sizes.computed_bytes)} as they compute, one at a time: answers are "
            "those of the rounded weights"
        )
        return [hanging(text, 4)]
    what = "packed" if sizes.method.startswith(PACKED) else "quantised"
    return [
        hanging(
            f"  {what}: {sizes.method}, {format_size(sizes.file_bytes)} in the files and on the "
            f"way, {format_size(sizes.computed_bytes)} as they compute, one at a time: the numbers "
            "that are stored, bit for bit",
            4,
        )
    ]


def prediction_record(made: Prediction) -> dict[str, object]:
    """A prediction as `--json` has it, of `plan` and `simulate`: a name means the same in both.

    Of some numbers there are two names, as each verb once had its own.
    """
    return asdict(made) | {
        "s_per_pass": made.step_s,  # with drafting, which `pass_s` is without
        "tokens_per_s": 1.0 / made.s_per_token,
        "bytes_per_pass": made.bytes_per_pass,
        "back_bytes_per_pass": made.kv_back_bytes,
        "on_host_bytes_per_pass": made.on_host_bytes,
        "drafting_s": made.draft_s,
    }
