"""How the tensors of one layer lie in a device buffer, and which file bytes go where.

The image of a layer is one buffer. `Packing.FILE` keeps file runs as they are, each at an offset
equal to its file offset modulo the page size, so that a direct read lands in place.
`Packing.DEVICE` starts every tensor at a multiple of 256 bytes, as GPU kernels like it; reads are
then copied piece by piece while the home is filled. No torch here: `plan` sizes slots from it.
"""

import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from pathlib import Path
from types import MappingProxyType

from offload_rt.device.base import PAGE_BYTES, PIECE_BYTES
from offload_rt.device.kinds import Packing
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import DTYPE_BYTES, Checkpoint, TensorExtent
from offload_rt.model.files import shown
from offload_rt.model.formats.methods import BLOCKS, SCALES, Form
from offload_rt.model.formats.stored import Stored
from offload_rt.model.names import EXPERT
from offload_rt.model.packed_files import CODED_DTYPE, piece_weights

DEVICE_ALIGN_BYTES = 256
CACHE_LINE_BYTES = 64

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
CODES = {name: code for code, name in FLOATS.items()}
# Of parts of quantised weights, which lie in an image as they are stored.
_WHOLE = {"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"}
_SMALL = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "uint8"}
_NAMES = FLOATS | _WHOLE | _SMALL
_BYTES = {name: DTYPE_BYTES[code] for code, name in _NAMES.items()}

CODED_PART = "weight_coded"  # of a weight in 12 or 10.75 bits
GROUP = 32  # inputs of a scale, of weights that are rounded by request
# Of compressed-tensors' integers.
CODES_PART, SCALES_PART = "weight_packed", "weight_scale"

NOTHING_STORED: Mapping[str, Stored] = MappingProxyType({})

# There the experts of a layer are one parameter too: gate rows, then up rows.
FUSED = {
    "w1": ("gate_up_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", 0),
    "down_proj": ("down_proj", 0),
}

# Of layers with a recurrent state: convolutions of queries, keys and values, where a family's class
# has no modules of these names.
_STACKED = re.compile(r"(?P<module>.*)\.(?P<part>[qkv])_conv1d\.weight$")
_STACKED_PART = "q_conv1d"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a parameter lies in the image.

    Attributes:
        name: what it is called in the files; the experts of a layer are one parameter.
        dtype: torch's name of its number format on the device.
        offset: bytes from the start of the image.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size in the image."""
        return prod(self.shape) * _BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedRun:
    """What a run makes of the numbers of a weight [O, I] (`formats/rounding.py`).

    Attributes:
        inputs: I.
        dtype: safetensors name of the format of the weight, and of its scales.
        bits: of a code.
        group: inputs that share a scale.
        scales_offset: bytes from the start of the image; codes lie where the run says.
    """

    inputs: int
    dtype: str
    bits: int
    group: int
    scales_offset: int

    @property
    def code_bytes(self) -> int:
        """Of an output."""
        return self.inputs * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Of an output."""
        return self.inputs // self.group * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that stay as they are and can be checked by themselves, of at most `PIECE_BYTES`.

    Attributes:
        begin: in the file.
        end: in the file.
        form: coded, then it is one piece; or whole blocks of GGUF.
        weights: of a piece.
        bits: of its code.
    """

    begin: int
    end: int
    form: Form
    weights: int = 0
    bits: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRun:
    """Consecutive file bytes that go to consecutive image bytes.

    Attributes:
        in_place: file and image offset agree modulo the page size and the pages are this run's
            alone, so that whole pages can be read straight into the image.
        convert: safetensors and torch names of the formats to convert between, or None.
        coded: where each coded piece begins in the file, and last where they end; empty: the bytes
            lie there as they are.
        coded_bits: of the code.
        rounded: what is made of them; None: they stay what they are.
        kept: parts of quantised weights that are checked when they are read; not all are.
    """

    path: Path
    file_offset: int
    nbytes: int
    image_offset: int
    in_place: bool
    convert: tuple[str, str] | None = None
    coded: tuple[int, ...] = ()
    coded_bits: int = 0
    rounded: RoundedRun | None = None
    kept: tuple[Kept, ...] = ()

    @property
    def file_bytes(self) -> int:
        """Bytes that are read for it."""
        return self.coded[-1] - self.coded[0] if self.coded else self.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """The image of a layer: its size, what lies where, and where the bytes come from.

    Attributes:
        stored: the quantised weights in it.
        made: weights that are dequantised when it is loaded; no run brings them.
    """

    nbytes: int
    placements: tuple[Placement, ...]
    runs: tuple[FileRun, ...]
    stored: tuple[Stored, ...] = ()
    made: tuple[Stored, ...] = ()

    @property
    def file_bytes(self) -> int:
        """Bytes that are read for it, page padding not counted."""
        return sum(run.file_bytes for run in self.runs)

    @property
    def rounds(self) -> bool:
        """Whether weights are rounded when they are read, which is once."""
        return any(run.rounded is not None for run in self.runs)

    @property
    def packed_weights(self) -> int:
        """Weights that are decoded when they are read."""
        coded = (run.nbytes for run in self.runs if run.coded and run.rounded is None)
        return sum(coded) // DTYPE_BYTES[CODED_DTYPE]

    @property
    def packed_bits(self) -> int:
        """Of the code of these; 0 where there are none."""
        return max((run.coded_bits for run in self.runs), default=0)


def compute_dtype(checkpoint: Checkpoint, wanted: str) -> str:
    """Torch's name of the number format of a model's computation.

    `auto` is the checkpoint's own: what config.json says, else that of the first floating tensor.
    """
    if wanted != "auto":
        return wanted
    if (stated := checkpoint.config.dtype) in CODES:
        return stated
    extents = checkpoint.tensors.values()
    found = next((FLOATS[e.dtype] for e in extents if e.dtype in FLOATS), None)
    if found is None:
        raise CheckpointError("the checkpoint has no bf16, fp16 or fp32 tensors to compute with")
    return found


def plan_layouts(
    checkpoint: Checkpoint,
    dtype: str,
    packing: Packing,
    stays_fp32: re.Pattern[str] | None = None,
    without: Container[str] = (),
) -> tuple[LayerLayout, ...]:
    """Lay out every layer, and last what is in no layer; see `plan_layout`.

    `stays_fp32` is the family's own unless it is given. Tensors `without` have images of their own.
    """
    stays_fp32 = stays_fp32 or checkpoint.family.stays_fp32(dtype)
    stored, ends = checkpoint.stored, checkpoint.stored_ends
    stacks = _STACKED_PART not in checkpoint.family.names
    layers = [
        plan_layout(
            [e for e in each if e.name not in without],
            dtype,
            packing,
            stays_fp32,
            stored,
            stacks=stacks,
        )
        for each in checkpoint.layers
    ]
    base = plan_layout(checkpoint.others, dtype, packing, stays_fp32, stored, made=ends)
    return *layers, base


def set_apart(layout: LayerLayout, name: str) -> tuple[LayerLayout, LayerLayout]:
    """The images of a layout without one tensor, and of that tensor alone.

    Args:
        layout: what is in no layer.
        name: of a tensor whose bytes runs bring.
    """
    groups = [[p for p in layout.placements if (p.name == name) is own] for own in (False, True)]
    rest, own = (_laid_out(layout, placements) for placements in groups)
    return replace(rest, made=layout.made, stored=layout.stored), own


def _laid_out(layout: LayerLayout, placements: Sequence[Placement]) -> LayerLayout:
    """An image of some tensors of another one."""
    end, placed, runs = 0, list[Placement](), list[FileRun]()
    for each in placements:
        offset = _round_up(end, DEVICE_ALIGN_BYTES)
        mine = range(each.offset, each.offset + max(1, each.nbytes))
        for run in layout.runs:
            if run.in_place and each.offset in range(
                run.image_offset, run.image_offset + run.nbytes
            ):
                # In pages of its own, where it may be one of several tensors of a run now.
                start = run.file_offset + each.offset - run.image_offset
                offset = _round_up(end, PAGE_BYTES) + start % PAGE_BYTES
                kept = tuple(k for k in run.kept if start <= k.begin < start + each.nbytes)
                runs.append(
                    replace(
                        run,
                        file_offset=start,
                        nbytes=each.nbytes,
                        image_offset=offset,
                        kept=kept,
                    )
                )
                end = _round_up(offset + each.nbytes, PAGE_BYTES)
                break
            if run.image_offset in mine:
                runs.append(replace(run, image_offset=run.image_offset - each.offset + offset))
        placed.append(replace(each, offset=offset))
        end = max(end, offset + each.nbytes)
    nbytes = _round_up(end, PAGE_BYTES)
    return LayerLayout(nbytes=nbytes, placements=tuple(placed), runs=tuple(runs))


def torch_name(code: str) -> str:
    """Torch's name of a number format that an image can hold."""
    return _NAMES[code]


def plan_layout(  # noqa: PLR0913 - what an image is made of, most of it by default
    extents: Sequence[TensorExtent],
    dtype: str,
    packing: Packing,
    stays_fp32: re.Pattern[str] | None = None,
    stored: Mapping[str, Stored] = NOTHING_STORED,
    made: Mapping[str, Stored] = NOTHING_STORED,
    *,
    align_bytes: int = 1,
    stacks: bool = False,
) -> LayerLayout:
    """Lay out the tensors of one layer (or of what is in no layer).

    Args:
        extents: the tensors, in file order.
        dtype: torch's name of the format floating tensors get on the device.
        packing: what the layout is for.
        stays_fp32: what names match that get fp32 instead.
        stored: quantised weights by names of their tensors, which lie there as they are.
        made: such of which the dequantised weight lies there instead.
        align_bytes: tensors that do not start at a multiple of it in the file are copied to one.
        stacks: convolutions of queries, keys and values are one parameter of the network.

    Raises:
        CheckpointError: a tensor is of a format that cannot be computed with, or experts of a layer
            do not fit together.
    """
    builder = _Builder(dtype, packing, stays_fp32, stored, align_bytes)
    experts: dict[str, list[tuple[int, int, TensorExtent]]] = {}
    convolutions: dict[str, dict[str, TensorExtent]] = {}
    for extent in extents:
        name = extent.name
        if name in made:
            builder.make(made[name])
        elif name in stored and stored[name].rounds:
            builder.round(stored[name])
        elif name not in stored and (match := EXPERT.match(name)):
            target, part = FUSED[match["part"]]
            key = f"{match['moe']}.{target}"
            experts.setdefault(key, []).append((int(match["expert"]), part, extent))
        elif stacks and (match := _STACKED.match(name)):
            key = f"{match['module']}.conv1d.weight"
            convolutions.setdefault(key, {})[match["part"]] = extent
        else:
            builder.add(name, extent)
    for name, pieces in experts.items():
        if all(part == 1 for _, part, _ in pieces):  # of experts without a gate
            name = name.replace(".gate_up_proj", ".up_proj")
            pieces = [(expert, 0, extent) for expert, _, extent in pieces]
        builder.add_fused(name, sorted(pieces, key=lambda piece: piece[:2]))
    for name, parts in convolutions.items():
        builder.add_stacked(name, [parts[part] for part in "qkv" if part in parts])
    return builder.finish()


class _Builder:
    """Grows an image tensor by tensor."""

    def __init__(
        self,
        dtype: str,
        packing: Packing,
        stays_fp32: re.Pattern[str] | None,
        stored: Mapping[str, Stored],
        align_bytes: int,
    ) -> None:
        self._align_bytes = align_bytes
        self._dtype, self._packing, self._stays_fp32 = dtype, packing, stays_fp32
        self._stored = stored
        self._end = 0
        self._placements: list[Placement] = []
        self._made: dict[Stored, None] = {}
        self._rounded: set[Stored] = set()
        self._runs: list[FileRun] = []

    def add(self, name: str, extent: TensorExtent) -> None:
        """Place one tensor behind what is there."""
        dtype = self._device_dtype(name, extent)
        element_bytes = _BYTES[dtype]
        as_is = _NAMES[extent.dtype] == dtype and self._packing is Packing.FILE and not extent.coded
        if as_is and extent.offset % max(element_bytes, self._align_bytes) == 0:
            offset = self._append_in_place(extent)
        else:
            offset = self._reserve(prod(extent.shape) * element_bytes)
            self._runs.append(self._piece(extent, dtype, offset))
        if name in self._stored and (kept := checked_parts(self._stored[name], extent)):
            self._runs[-1] = replace(self._runs[-1], kept=(*self._runs[-1].kept, *kept))
        self._placements.append(
            Placement(name=name, dtype=dtype, shape=extent.shape, offset=offset)
        )

    def make(self, stored: Stored) -> None:
        """Leave room for a dequantised weight, once."""
        if stored not in self._made:
            self._made[stored] = None
            shape = (stored.outputs, stored.inputs)
            offset = self._reserve(prod(shape) * _BYTES[self._dtype])
            name = f"{stored.module}.weight"
            placed = Placement(name=name, dtype=self._dtype, shape=shape, offset=offset)
            self._placements.append(placed)

    def round(self, stored: Stored) -> None:
        """Place the parts of a weight that is rounded when it is read, once."""
        source = stored.source
        if source is None or stored in self._rounded:
            return
        self._rounded.add(stored)
        offsets = {}
        for word, extent in stored.parts.items():
            offsets[word] = self._reserve(extent.nbytes)
            dtype = _NAMES[extent.dtype]
            placed = Placement(
                name=extent.name, dtype=dtype, shape=extent.shape, offset=offsets[word]
            )
            self._placements.append(placed)
        self._runs.append(
            FileRun(
                path=source.path,
                file_offset=source.offset,
                nbytes=source.nbytes,
                image_offset=offsets[CODES_PART],
                in_place=False,
                coded=source.coded,
                coded_bits=source.coded_bits,
                rounded=RoundedRun(
                    inputs=stored.inputs,
                    dtype=source.dtype,
                    bits=stored.bits,
                    group=stored.group,
                    scales_offset=offsets[SCALES_PART],
                ),
            )
        )

    def add_fused(self, name: str, pieces: Sequence[tuple[int, int, TensorExtent]]) -> None:
        """Place the experts of a layer as one parameter [experts, parts * rows, columns]."""
        rows, columns = pieces[0][2].shape
        parts = 1 + max(part for _, part, _ in pieces)
        experts = len(pieces) // parts
        expected = [(e, p, (rows, columns)) for e in range(experts) for p in range(parts)]
        if [(e, p, extent.shape) for e, p, extent in pieces] != expected:
            raise CheckpointError(
                f"{shown(name)}: the {len(pieces)} expert tensors are not {experts} experts of "
                f"{parts} x {rows} x {columns} each: download the checkpoint again"
            )
        dtype = self._device_dtype(name, pieces[0][2])
        piece_bytes = rows * columns * DTYPE_BYTES[CODES[dtype]]
        start = self._reserve(piece_bytes * len(pieces))
        for index, (_, _, extent) in enumerate(pieces):
            self._runs.append(self._piece(extent, dtype, start + index * piece_bytes))
        shape = (experts, parts * rows, columns)
        self._placements.append(Placement(name=name, dtype=dtype, shape=shape, offset=start))

    def add_stacked(self, name: str, pieces: Sequence[TensorExtent]) -> None:
        """Place tensors [C, ...] as one parameter, one behind the other."""
        rest = pieces[0].shape[1:]
        if len(pieces) != 3 or any(extent.shape[1:] != rest for extent in pieces):
            raise CheckpointError(
                f"{shown(name)} is made of three tensors, the files have {len(pieces)} with shapes "
                f"{[list(extent.shape) for extent in pieces]}: download the checkpoint again"
            )
        dtype = self._device_dtype(name, pieces[0])
        sizes = [prod(extent.shape) * _BYTES[dtype] for extent in pieces]
        start = self._reserve(sum(sizes))
        for index, extent in enumerate(pieces):
            self._runs.append(self._piece(extent, dtype, start + sum(sizes[:index])))
        shape = (sum(extent.shape[0] for extent in pieces), *rest)
        self._placements.append(Placement(name=name, dtype=dtype, shape=shape, offset=start))

    def finish(self) -> LayerLayout:
        """Return the image, its end rounded up to a page."""
        return LayerLayout(
            nbytes=_round_up(self._end, PAGE_BYTES),
            placements=tuple(self._placements),
            runs=tuple(self._runs),
            made=tuple(self._made),
            stored=tuple(
                dict.fromkeys(
                    self._stored[p.name] for p in self._placements if p.name in self._stored
                )
            ),
        )

    def _device_dtype(self, name: str, extent: TensorExtent) -> str:
        if name in self._stored and extent.dtype in _NAMES:
            return _NAMES[extent.dtype]
        if extent.dtype not in FLOATS:
            raise CheckpointError(
                f"tensor {shown(extent.name)} in {shown(extent.path.name)} is {extent.dtype}: only "
                "BF16, F16 and F32 weights are supported, take an unquantised checkpoint"
            )
        stays = self._stays_fp32 is not None and self._stays_fp32.search(name)
        return "float32" if stays else self._dtype

    def _append_in_place(self, extent: TensorExtent) -> int:
        last = self._runs[-1] if self._runs else None
        follows = (
            last is not None
            and last.in_place
            and last.path == extent.path
            and last.file_offset + last.nbytes == extent.offset
        )
        if last is not None and follows:
            offset = last.image_offset + last.nbytes
            self._runs[-1] = replace(last, nbytes=last.nbytes + extent.nbytes)
        else:
            offset = _round_up(self._end, PAGE_BYTES) + extent.offset % PAGE_BYTES
            self._runs.append(
                FileRun(
                    path=extent.path,
                    file_offset=extent.offset,
                    nbytes=extent.nbytes,
                    image_offset=offset,
                    in_place=True,
                )
            )
        # The last page of a run is read whole: nothing else may lie in it.
        self._end = _round_up(offset + extent.nbytes, PAGE_BYTES)
        return offset

    def _reserve(self, nbytes: int) -> int:
        align = DEVICE_ALIGN_BYTES if self._packing is Packing.DEVICE else CACHE_LINE_BYTES
        offset = _round_up(self._end, align)
        self._end = offset + nbytes
        return offset

    def _piece(self, extent: TensorExtent, dtype: str, offset: int) -> FileRun:
        same = _NAMES[extent.dtype] == dtype
        return FileRun(
            path=extent.path,
            file_offset=extent.offset,
            nbytes=extent.nbytes,
            image_offset=offset,
            in_place=False,
            convert=None if same else (extent.dtype, dtype),
            coded=extent.coded,
            coded_bits=extent.coded_bits,
        )


def checked_parts(stored: Stored, extent: TensorExtent) -> list[Kept]:
    """What of a weight's tensor is checked when it is read."""
    start = extent.offset
    if stored.form in SCALES:
        step = PIECE_BYTES // BLOCKS[stored.form][1] * BLOCKS[stored.form][1]
        return [
            Kept(start + at, start + min(at + step, extent.nbytes), stored.form)
            for at in range(0, extent.nbytes, step)
        ]
    each, numbers = piece_weights(stored.numbers), stored.numbers
    return [
        Kept(
            start + begin, start + end, stored.form, min(each, numbers - number * each), stored.bits
        )
        for number, (begin, end) in enumerate(pairwise(stored.pieces))
    ]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
