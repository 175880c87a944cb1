"""The kinds of devices, and what each can do. No torch here.

Whatever is decided by the kind of a device is a trait here: code asks for the trait, never for the
name. To add a kind: its record below, its name in `Processor`, its device, and how it is opened
(`opening.py`).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from offload_rt.config import DraftWeights, HomeKind, KVPlace, RuntimeConfig
from offload_rt.device.cuda.present import free_gpus, missing_gpu, unequal_gpus
from offload_rt.device.system import free_memory_bytes
from offload_rt.errors import ConfigError, DeviceError

FREE_SHARE = 0.85  # of free memory of a host, when no limit is given: the rest is left to others
# Of a GPU: nobody else's memory grows there, and its own context is counted (`context_bytes`).
_KEPT_BYTES = 2**29
_ANY_FLOAT = frozenset({"bfloat16", "float16", "float32"})


class Processor(StrEnum):
    """What computes, by its name in --device, torch and profiles; GPUs of one run are equal."""

    CPU = "cpu"
    CUDA = "cuda"


class Packing(StrEnum):
    """How the image of a layer is aligned (`model/layout.py`)."""

    FILE = "file"
    DEVICE = "device"


class Flash(StrEnum):
    """Which flash attention torch has (`attention/flash.py`), by where its causal mask is right."""

    UPPER_LEFT = "upper left"
    LOWER_RIGHT = "lower right"


def _flash_on_gpu(index: int) -> bool:
    from offload_rt.device.cuda.torch_driver import runs_flash  # imports torch

    return runs_flash(index)


def _always(index: int) -> bool:
    return True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceKind:
    """What a kind of device is, can do, and does by default.

    Attributes:
        processor: its name: that of --device, of torch, and of its times in a profile.
        called: with an article, in sentences.
        noun: what a machine may lack.
        numbered: a machine may have several, chosen by `name:N`.
        free_bytes: asks for the free memory of each that is there.
        missing: why number N cannot be used and what to do, or None; as far as is known without
            torch.
        unequal: why layers cannot be spread over these numbers, or None.
        packing: how layer images lie in its memory.
        own_memory: its memory is apart from the host's, across a link. Else it is this process's
            memory, so staging, indices of tokens and the allocator's slack count as the device's.
        usable_bytes: of so much free memory, what a run may use that is given no limit.
        context_bytes: of the driver's context and the kernels it loads when they are first used,
            in the device's memory.
        buffer_bytes: memory is taken in whole multiples of it, for a large buffer.
        host_computes: the calling thread computes; what else it does makes a pass longer.
        home: where streamed layers live by default, if they fit there.
        kv_home: where KV lives by default that does not fit on the device.
        kv_on_disk: KV may live in a file.
        kv_block_bytes: of KV that is copied at once, unless a user says.
        attends_at_home: it can attend to KV in host memory where it lies.
        flash: the flash attention it has.
        runs_flash: whether number N is new enough for it; asked when there are tensors on it.
        packs: it has matrix kernels for which resident layers are reordered (`formats/packed.py`).
        state_rows: of a piece in which layers with a recurrent state compute (`kv/states.py`). Up
            to so many rows go through them again in each pass.
        tile_rows: of a tile that layers are given in row-invariant passes (`model/tiles.py`), as
            kernels are picked by all of a shape; 0: linears and activations see to it.
        records: launching kernels takes longer than small ones run, so passes of fixed shape are
            recorded and replayed (`runner/static.py`).
        decodes: weights may lie there in codes of bf16 and be decoded when they compute.
        multiplies_few: it has kernels that multiply few rows with experts as they are stored, all
            of a pass at once (`formats/together.py`).
        kernels: to what weights may be rounded, and for which formats of the model.
        draft_weights: how a bf16 draft model is kept unless --draft-weights says.
        copy_weights: to what a bf16 model is rounded to draft for itself.
        rows_are_free: more rows in a verification pass take next to no time (assumed of a GPU), so
            n-grams draft where nothing is known, too.
        worthwhile: share of n-gram drafts that must be accepted for a pass over the retrieval cache
            to check them. On a CPU a pass of 8 rows took 0.11 s where one of a single row took 0.06
            (8-bit copies of a 1.5B model).
        stand_in: shipped profile for a machine that was not measured.
        stand_in_without_bf16: the same where the host's processor has no bf16 instructions.
    """

    processor: Processor
    called: str
    noun: str
    numbered: bool
    free_bytes: Callable[[], Sequence[int]]
    missing: Callable[[int], str | None]
    unequal: Callable[[Sequence[int]], str | None]
    packing: Packing
    own_memory: bool
    usable_bytes: Callable[[int], int]
    context_bytes: int
    buffer_bytes: int
    host_computes: bool
    home: HomeKind
    kv_home: KVPlace
    kv_on_disk: bool
    kv_block_bytes: int
    attends_at_home: bool
    flash: Flash
    runs_flash: Callable[[int], bool]
    packs: bool
    state_rows: int
    tile_rows: int
    records: bool
    decodes: bool
    multiplies_few: bool
    kernels: Mapping[DraftWeights, frozenset[str]]
    draft_weights: DraftWeights
    copy_weights: DraftWeights
    rows_are_free: bool
    worthwhile: float
    stand_in: str
    stand_in_without_bf16: str

    @property
    def names(self) -> tuple[str, ...]:
        """What --device may be for it."""
        name = self.processor
        if self.numbered:
            return name, f"{name}:N", f"{name}:0,{name}:1"
        return name, f"{name},{name}"


CPU = DeviceKind(
    processor=Processor.CPU,
    called="the CPU",
    noun="CPU",
    numbered=False,
    free_bytes=lambda: [free_memory_bytes()],
    missing=lambda index: None,
    unequal=lambda indices: None,
    packing=Packing.FILE,
    own_memory=False,
    usable_bytes=lambda free_bytes: int(free_bytes * FREE_SHARE),
    context_bytes=0,
    buffer_bytes=1,
    host_computes=True,
    home=HomeKind.DISK,  # memory that could hold them had better be the device's
    kv_home=KVPlace.DISK,
    kv_on_disk=True,
    kv_block_bytes=4 * 2**20,
    attends_at_home=True,
    flash=Flash.UPPER_LEFT,
    runs_flash=_always,
    packs=True,
    state_rows=16,
    tile_rows=0,
    records=False,
    decodes=True,
    multiplies_few=False,
    kernels={DraftWeights.INT8: _ANY_FLOAT, DraftWeights.INT4: _ANY_FLOAT},
    draft_weights=DraftWeights.INT8,
    copy_weights=DraftWeights.INT8,
    rows_are_free=False,
    worthwhile=0.6,
    stand_in="cpu-2core-avx512bf16",
    stand_in_without_bf16="cpu-2core-avx512",
)

CUDA = DeviceKind(
    processor=Processor.CUDA,
    called="a GPU",
    noun="NVIDIA GPU",
    numbered=True,
    free_bytes=free_gpus,
    missing=missing_gpu,
    unequal=unequal_gpus,
    packing=Packing.DEVICE,
    own_memory=True,
    usable_bytes=lambda free_bytes: max(0, free_bytes - _KEPT_BYTES),
    context_bytes=2**29,  # assumed: 0.4 to 0.6 GB are reported; reports have the driver's own count
    buffer_bytes=2**21,  # torch's allocator, for blocks of 10 MiB and more
    host_computes=False,
    home=HomeKind.HOST,
    kv_home=KVPlace.HOST,
    kv_on_disk=False,
    kv_block_bytes=32 * 2**20,
    attends_at_home=False,
    flash=Flash.LOWER_RIGHT,
    runs_flash=_flash_on_gpu,
    packs=False,
    state_rows=64,
    tile_rows=64,  # a piece of attention (`attention/blocks.py`)
    records=True,
    decodes=True,
    multiplies_few=True,
    kernels={DraftWeights.INT4: frozenset({"bfloat16"})},
    draft_weights=DraftWeights.SAME,
    copy_weights=DraftWeights.INT4,
    rows_are_free=True,
    worthwhile=0.1,
    stand_in="rtx4090-pcie4x16",
    stand_in_without_bf16="rtx4090-pcie4x16",
)

# Best first: --device auto is the first of which there is one.
KINDS = {kind.processor: kind for kind in (CUDA, CPU)}


def named_devices(name: str) -> tuple[DeviceKind, tuple[int, ...]]:
    """The kind and the numbers that a --device other than `auto` names.

    Raises:
        ConfigError: it is no device's name, or several that cannot share a model.
    """
    found = [_named(part, name) for part in name.split(",")]
    kind, indices = found[0][0], tuple(index for _, index in found)
    if any(other is not kind for other, _ in found):
        raise ConfigError(f"--device {name} mixes kinds of devices: name several GPUs, or one")
    twice = next((index for index in indices if indices.count(index) > 1), None)
    if kind.numbered and twice is not None:
        raise ConfigError(f"--device {name} names {kind.processor}:{twice} twice: name each once")
    return kind, indices


def sharing(device: str) -> tuple[int, ...]:
    """The numbers of several devices; one is planned for as the machine's first.

    Raises:
        ConfigError: it is no device's name, or several that cannot share a model.
    """
    return named_devices(device)[1] if "," in device else (0,)


def _named(part: str, name: str) -> tuple[DeviceKind, int]:
    word, colon, number = part.partition(":")
    kind = KINDS[Processor(word)] if word in KINDS else None
    if kind is None or (colon and not (kind.numbered and re.fullmatch(r"\d{1,4}", number))):
        *most, last = ["auto", *(name for kind in reversed(KINDS.values()) for name in kind.names)]
        raise ConfigError(f"--device {name} is not known: use {', '.join(most)} or {last}")
    return kind, int(number or 0)


def likely_kind(name: str) -> DeviceKind:
    """The kind that a --device asks for, without torch; of any other name the best there is."""
    kind = KINDS.get(re.split("[:,]", name)[0])  # type: ignore[arg-type]
    return kind or next(kind for kind in KINDS.values() if kind.free_bytes())


def check_device(runtime: RuntimeConfig) -> None:
    """Refuse devices that are not known or not there; torch may still find more that is wrong.

    Raises:
        ConfigError: --device is no device's name, or names several that cannot share a model.
        DeviceError: there is no such GPU, or torch is built without CUDA.
    """
    name = runtime.device
    if name == "auto":
        return
    kind, indices = named_devices(name)
    reasons = [kind.missing(index) for index in indices]
    reason = next(filter(None, reasons), None) or (kind.unequal(indices) if indices[1:] else None)
    if reason is not None:
        raise DeviceError(f"--device {name} cannot be used: {reason}")
    check_links(runtime)


def check_links(runtime: RuntimeConfig) -> None:
    """Refuse several devices of one memory without the links that are all there is to them.

    Raises:
        ConfigError: no links are emulated.
    """
    name, count = runtime.device, len(runtime.device_names)
    kind = likely_kind(name)
    if count > 1 and not kind.own_memory and runtime.link_bytes_per_s is None:
        raise ConfigError(
            f"--device {name} stands for {count} emulated links: add --link-bandwidth "
            f"{','.join('1' * count)} and --home host or --kv host, or name one device"
        )
