"""Which tensors of the files are a quantised weight, and of what size; checked before any is read.

A module is quantised if and only if its tensors' names say so. Their shapes must agree with each
other and with what `config.json` states. No torch here.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.files import parse_json_object, read_part, shown
from offload_rt.model.formats.methods import Block, Form, Method, listed
from offload_rt.model.formats.stored import Flat, Stored, StoredTensors
from offload_rt.model.header import TensorExtent

_SIDES = 2**20  # rows or columns of a weight; a few times the largest published
_WORD_BITS = 32
_FLOATS = ("BF16", "F16", "F32")
_POWERS = ("U8", "F8_E8M0")  # bytes that are exponents of two
_PLAIN = "weight"  # what is quantised in some forms, and in all others is not
STATE = "quant_state.bitsandbytes__"
_STATE_LIMIT_BYTES = 2**16
_TYPES = {"nf4", "fp4"}
_DTYPES = {"bfloat16", "float16", "float32"}
_FLAT_BLOCKS = [2**power for power in range(5, 13)]


@dataclass(frozen=True, slots=True)
class _Parts:
    """The tensors of a form's module, by the last word of their names.

    Attributes:
        codes: what holds the numbers, and the formats it may have; any if there is none.
        needed: besides.
        more: that there may be.
        facts: that are read or of no use, and never streamed.
    """

    codes: tuple[str, Sequence[str]]
    needed: tuple[str, ...]
    more: tuple[str, ...] = ()
    facts: tuple[str, ...] = ()

    @property
    def streamed(self) -> tuple[str, ...]:
        """All that lies in an image."""
        return (self.codes[0], *self.needed, *self.more)


# The experts of a layer in one tensor each of codes and of scales, and what these are of one.
PARTED = re.compile(r"(?P<matrix>.*\.experts\.(?:gate_up|down)_proj)_(?P<word>blocks|scales)$")
_OF_ONE = {"blocks": "weight_packed", "scales": "weight_scale"}
_MOST_EXPERTS = 2**12
_PAIRS = 16  # bytes of a block of codes

_ACTIVATIONS = ("input_scale", "input_zero_point", "input_global_scale", "activation_scale")
_WORDS = _Parts(("qweight", ["I32"]), ("qzeros", "scales"))
_PARTS = {
    Form.PACKED: _Parts(
        ("weight_packed", ["I32"]),
        ("weight_scale",),
        ("weight_zero_point", "weight_g_idx"),
        ("weight_shape", *_ACTIVATIONS),
    ),
    Form.AWQ: _WORDS,
    Form.GPTQ: _Parts(_WORDS.codes, _WORDS.needed, ("g_idx",)),
    Form.GPTQ_V2: _Parts(_WORDS.codes, _WORDS.needed, ("g_idx",)),
    Form.FP8: _Parts(
        (_PLAIN, ["F8_E4M3"]),
        (),
        ("weight_scale", "weight_scale_inv"),
        (*_ACTIVATIONS, "input_scale_ub"),
    ),
    Form.INT8: _Parts((_PLAIN, ["I8"]), ("weight_scale",), ("weight_zero_point",), _ACTIVATIONS),
    Form.NVFP4: _Parts(
        ("weight_packed", ["U8"]), ("weight_scale", "weight_global_scale"), (), _ACTIVATIONS
    ),
    Form.NVFP4_PRODUCT: _Parts(
        (_PLAIN, ["U8"]), ("weight_scale", "weight_scale_2"), (), _ACTIVATIONS
    ),
    Form.MXFP4: _Parts(("weight_packed", ["U8"]), ("weight_scale",), (), _ACTIVATIONS),
    Form.BNB4: _Parts(
        (_PLAIN, ["U8", *_FLOATS]),
        ("absmax", "quant_map"),
        ("nested_absmax", "nested_quant_map"),
        tuple(f"{STATE}{kind}" for kind in sorted(_TYPES)),
    ),
    Form.BNB8: _Parts((_PLAIN, ["I8"]), ("SCB",), (), ("weight_format",)),
}
# bitsandbytes names them below the weight: q_proj.weight.absmax.
_BELOW = frozenset((*_PARTS[Form.BNB4].streamed[1:], *_PARTS[Form.BNB4].facts))
_KNOWN = frozenset(word for parts in _PARTS.values() for word in (*parts.streamed, *parts.facts))


def find_stored(
    folder: Path, method: Method | None, tensors: Mapping[str, TensorExtent]
) -> StoredTensors:
    """Find the quantised weights among the tensors of a folder.

    Args:
        folder: the model folder; sizes that are data are read from its files.
        method: what config.json states; None: nothing is quantised.
        tensors: by name.

    Raises:
        CheckpointError: tensors of a weight are missing, too many, or contradict each other or
            config.json.
    """
    if method is None:
        return StoredTensors({}, frozenset())
    modules: dict[str, dict[str, TensorExtent]] = {}
    for name, extent in tensors.items():
        module, word = split_name(name)
        if word in _KNOWN:
            modules.setdefault(module, {})[word] = extent
    found, facts = dict[str, Stored](), set[str]()
    for module, parts in modules.items():
        if parts.keys() == {_PLAIN} and parts[_PLAIN].dtype in _FLOATS:
            continue
        stored = _Reader(folder, method, module, parts).read()
        found |= {extent.name: stored for extent in stored.parts.values()}
        facts |= {e.name for word, e in parts.items() if word in _PARTS[stored.form].facts}
    if not found:
        raise CheckpointError(
            f"{folder}: config.json says that weights are quantised ({method.name}), the files "
            "have none that are: files and config are not of one model"
        )
    return StoredTensors(found, frozenset(facts))


def each_expert(
    folder: Path, method: Method | None, tensors: Mapping[str, TensorExtent]
) -> Mapping[str, TensorExtent]:
    """The tensors of a folder, with those of all experts of a layer cut into those of each.

    Of gpt-oss: `gate_up_proj_blocks` U8 [E, O, I / 32, 16] and `gate_up_proj_scales` [E, O, I / 32]
    become `0.gate_up_proj.weight_packed` [O, I / 2] and so on.

    Raises:
        CheckpointError: codes or scales are missing, or do not divide into experts alike.
    """
    if method is None or not method.fused:
        return tensors
    fused = dict[str, dict[str, TensorExtent]]()
    for name, extent in tensors.items():
        if match := PARTED.match(name):
            fused.setdefault(match["matrix"], {})[match["word"]] = extent
    found = dict(tensors)
    for matrix, parts in fused.items():
        count, outputs, groups = _Reader(folder, method, matrix, parts).fused()
        moe, _, part = matrix.rpartition(".")
        for word, extent in parts.items():
            del found[extent.name]
            columns = groups * (_PAIRS if word == "blocks" else 1)
            nbytes = extent.nbytes // count
            for expert in range(count):
                name = f"{moe}.{expert}.{part}.{_OF_ONE[word]}"
                found[name] = replace(
                    extent,
                    name=name,
                    shape=(outputs, columns),
                    offset=extent.offset + expert * nbytes,
                    nbytes=nbytes,
                )
    return found


def split_name(name: str) -> tuple[str, str]:
    """Module and last word of a tensor's name."""
    module, _, below = name.rpartition(f".{_PLAIN}.")
    if module and below in _BELOW:
        return module, below
    module, _, word = name.rpartition(".")
    return module, word


class _Reader:
    """Makes a weight of its tensors."""

    def __init__(
        self, folder: Path, method: Method, module: str, parts: dict[str, TensorExtent]
    ) -> None:
        self._folder, self._method, self._module, self._parts = folder, method, module, parts

    def read(self) -> Stored:
        """The weight, all sizes checked."""
        form = self._form()
        known = _PARTS[form]
        codes, dtypes = known.codes
        plain = self._parts.get(_PLAIN)
        if plain is not None and (codes != _PLAIN or plain.dtype not in dtypes):
            others = sorted(self._parts.keys() - {_PLAIN})
            if others and plain.dtype in _FLOATS:
                raise self._error(
                    f"has a weight that is not quantised and {others[0]} for one that is"
                )
        facts = ("weight_shape",) if form is Form.PACKED else ()
        missing = [w for w in (codes, *known.needed, *facts) if w not in self._parts]
        if form is Form.FP8 and not self._parts.keys() & set(known.more):
            missing = ["weight_scale"]
        if missing:
            raise self._error(f"has {shown(next(iter(self._parts)))} but no {missing[0]}")
        for word in self._parts:
            if word not in known.streamed and word not in known.facts:
                raise self._error(f"has {word}, of which weights in {self._method.name} have none")
        return _READ[form](self, form)

    def fused(self) -> tuple[int, int, int]:
        """Experts, outputs and groups of inputs of the matrices that are in one tensor."""
        missing = _OF_ONE.keys() - self._parts.keys()
        if missing:
            raise self._error(f"has {next(iter(self._parts))} but no {missing.pop()}")
        codes, scales = self._parts["blocks"], self._parts["scales"]
        fits = len(codes.shape) == 4 and codes.shape == (*scales.shape, _PAIRS)
        if not fits or {codes.dtype, scales.dtype} != {"U8"}:
            raise self._error(
                f"has blocks that are {codes.dtype} {list(codes.shape)} and scales that are "
                f"{scales.dtype} {list(scales.shape)}: expected are U8 [experts, outputs, inputs / "
                f"32, {_PAIRS}] and the same without the last"
            )
        count, outputs, groups, _ = codes.shape
        if not 1 <= count <= _MOST_EXPERTS or not outputs or not groups:
            raise self._error(
                f"has blocks {list(codes.shape)}, accepted are 1 to {_MOST_EXPERTS} experts"
            )
        return count, outputs, groups

    def _form(self) -> Form:
        """That which the tensors say; the only one there is, if there is one."""
        forms = self._method.forms
        if len(forms) == 1:
            return next(iter(forms))

        def fits(form: Form) -> bool:
            codes, dtypes = _PARTS[form].codes
            there = self._parts.get(codes)
            needed = set(_PARTS[form].needed)
            return there is not None and there.dtype in dtypes and needed <= self._parts.keys()

        fitting = sorted(filter(fits, forms), key=lambda form: -len(_PARTS[form].needed))
        if not fitting:
            words = ", ".join(sorted(self._parts))
            raise self._error(f"has {words}, which are no weight in {listed(forms)}")
        return fitting[0]

    def packed(self, form: Form) -> Stored:
        """compressed-tensors: `weight_packed` I32 [O, ceil(I b / 32)], `weight_scale` [O, G]."""
        outputs, inputs = self._shape()
        codes, scales = self._matrix("weight_packed", "I32"), self._matrix("weight_scale", *_FLOATS)
        if codes[0] != outputs:
            raise self._error(f"weight_packed is {list(codes)}, weight_shape {[outputs, inputs]}")
        bits = [b for b in self._method.bits if _words(inputs, b) == codes[1]]
        if len(bits) != 1:
            raise self._error(
                f"weight_packed has {codes[1]} words for {inputs} inputs, config.json says "
                f"{listed(self._method.bits)} bits"
            )
        groups = self._groups(scales, outputs, inputs)
        if self._has_zeros("weight_zero_point"):
            self._exactly("weight_zero_point", ("I32",), (_words(outputs, bits[0]), groups))
        if "weight_g_idx" in self._parts:
            self._exactly("weight_g_idx", ("I32", "I64"), (inputs,))
        return self._stored(form, outputs, inputs, bits[0], groups)

    def words(self, form: Form) -> Stored:
        """AWQ: `qweight` I32 [I, O / 8]; GPTQ: [I b / 32, O]; both: `scales` [G, O]."""
        (bits,) = self._method.bits
        rows, columns = self._matrix("qweight", "I32")
        groups, outputs = self._matrix("scales", *_FLOATS)
        inputs = rows if form is Form.AWQ else rows * _WORD_BITS // bits
        wide = columns * _WORD_BITS // bits if form is Form.AWQ else columns
        if wide != outputs or not 1 <= inputs <= _SIDES or not 1 <= outputs <= _SIDES:
            raise self._error(
                f"qweight is {[rows, columns]} of {bits} bits, which is {wide} outputs and "
                f"{inputs} inputs, scales are of {outputs} outputs"
            )
        groups = self._groups((outputs, groups), outputs, inputs)
        self._exactly("qzeros", ("I32",), (groups, _words(outputs, bits)))
        if "g_idx" in self._parts:
            self._exactly("g_idx", ("I32", "I64"), (inputs,))
        return self._stored(form, outputs, inputs, bits, groups)

    def grid(self, form: Form) -> Stored:
        """FP8 and int8: `weight` [O, I], and a grid of scales."""
        outputs, inputs = self._sides(_PLAIN, *_PARTS[form].codes[1])
        scale = "weight_scale_inv" if "weight_scale_inv" in self._parts else "weight_scale"
        if {"weight_scale_inv", "weight_scale"} <= self._parts.keys():
            raise self._error("has both weight_scale and weight_scale_inv")
        dtypes = (*_FLOATS, *_POWERS) if form is Form.FP8 else _FLOATS
        block = self._grid(scale, dtypes, outputs, inputs)
        if form is Form.INT8 and self._has_zeros("weight_zero_point"):
            self._exactly("weight_zero_point", ("I8",), self._parts[scale].shape)
        return self._stored(form, outputs, inputs, 8, -(-inputs // block[1]), block=block)

    def pairs(self, form: Form) -> Stored:
        """FP4: U8 [O, I / 2], scales [O, G], and in NVFP4 one number."""
        codes = _PARTS[form].codes[0]
        outputs, columns = self._sides(codes, "U8")
        inputs = 2 * columns
        dtypes = _POWERS if form is Form.MXFP4 else ("F8_E4M3",)
        block = self._grid("weight_scale", dtypes, outputs, inputs)
        for word in _PARTS[form].needed[1:]:
            extent = self._parts[word]
            if extent.dtype != "F32" or math.prod(extent.shape) != 1 or len(extent.shape) > 2:
                raise self._error(
                    f"{word} is {extent.dtype} {list(extent.shape)}, not one number of F32"
                )
        return self._stored(form, outputs, inputs, 4, -(-inputs // block[1]), block=block)

    def flat(self, form: Form) -> Stored:
        """Pairs of bitsandbytes in the order of the matrix, whose shape is in a JSON text."""
        words = [word for word in self._parts if word.startswith(STATE)]
        if len(words) != 1:
            raise self._error(f"has {len(words)} of {STATE}nf4 and {STATE}fp4, expected is one")
        state = self._state(self._parts[words[0]])
        if state.get("quant_type") != words[0].removeprefix(STATE):
            raise self._error(f"has {words[0]} that says {shown(state.get('quant_type'))}")
        shape, block, dtype = state.get("shape"), state.get("blocksize"), state.get("dtype")
        if not (
            isinstance(shape, list)
            and len(shape) == 2
            and all(type(side) is int and 1 <= side <= _SIDES for side in shape)
        ):
            raise self._error(f"is stated to be of shape {shown(shape)}, expected are two sides")
        known = isinstance(block, int) and block in _FLAT_BLOCKS and dtype in _DTYPES
        if not isinstance(block, int) or not known or math.prod(shape) % block:
            raise self._error(
                f"is stated to have blocks of {shown(block)} of {shown(dtype)}, which a weight of "
                f"{shape} has not"
            )
        outputs, inputs = shape
        scales = outputs * inputs // block
        codes = self._parts[_PLAIN]
        if codes.dtype not in _PARTS[form].codes[1] or 2 * codes.nbytes != outputs * inputs:
            raise self._error(
                f"weight has {codes.nbytes} bytes of {codes.dtype}, stated is a shape of {shape}"
            )
        self._exactly("quant_map", ("F32",), (16,))
        nested, offset = self._nested(state, scales)
        facts = Flat(block=block, dtype=str(dtype), nested=nested, offset=offset)
        groups = max(1, inputs // block)
        return self._stored(form, outputs, inputs, 4, groups, flat=facts)

    def _nested(self, state: Mapping[str, object], scales: int) -> tuple[int | None, float]:
        """How many scales share one, and what is added to them; None: they are fp32."""
        size, offset = state.get("nested_blocksize"), state.get("nested_offset")
        words = {"nested_absmax", "nested_quant_map"}
        if size is None and not words & self._parts.keys():
            self._exactly("absmax", ("F32",), (scales,))
            return None, 0.0
        missing = sorted(words - self._parts.keys())
        number = isinstance(offset, int | float) and not isinstance(offset, bool)
        if missing or size not in _FLAT_BLOCKS or not number or not math.isfinite(offset):  # type: ignore[arg-type]
            raise self._error(
                f"is stated to have scales in blocks of {shown(size)} and an offset of "
                f"{shown(offset)}" + (f", and has no {missing[0]}" if missing else "")
            )
        assert isinstance(size, int) and isinstance(offset, int | float)
        self._exactly("absmax", ("U8",), (scales,))
        self._exactly("nested_absmax", ("F32",), (-(-scales // size),))
        self._exactly("nested_quant_map", ("F32",), (256,))
        return size, float(offset)

    def _state(self, extent: TensorExtent) -> dict[str, object]:
        if extent.dtype != "U8" or extent.nbytes > _STATE_LIMIT_BYTES:
            raise self._error(
                f"has a quant_state of {extent.nbytes} bytes of {extent.dtype}, accepted are "
                f"{_STATE_LIMIT_BYTES} of U8"
            )
        where = f"{self._folder}: tensor {shown(extent.name)}"
        return parse_json_object(self._data(extent), where)

    def rows(self, form: Form) -> Stored:
        """Integers of bitsandbytes: `weight` I8 [O, I], `SCB` F32 [O]."""
        outputs, inputs = self._sides(_PLAIN, "I8")
        self._exactly("SCB", ("F32",), (outputs,))
        order = self._parts.get("weight_format")
        if order is not None:
            data = self._data(order) if order.nbytes <= 8 else b"?"
            if any(data):
                raise self._error("has a weight_format other than rows")
        return self._stored(form, outputs, inputs, 8, 1, block=(1, inputs))

    def _stored(  # noqa: PLR0913 - what it is made of
        self,
        form: Form,
        outputs: int,
        inputs: int,
        bits: int,
        groups: int,
        *,
        block: tuple[int, int] = (1, 1),
        flat: Flat | None = None,
    ) -> Stored:
        streamed = _PARTS[form].streamed
        return Stored(
            module=self._module,
            form=form,
            outputs=outputs,
            inputs=inputs,
            bits=bits,
            groups=groups,
            parts={word: self._parts[word] for word in streamed if word in self._parts},
            block=block,
            flat=flat,
        )

    def _has_zeros(self, word: str) -> bool:
        """Whether there are zero points, as config.json must say."""
        there = word in self._parts
        if not there and self._method.symmetric == {False}:
            raise self._error(f"has no {word}, config.json says that it is not symmetric")
        if there and self._method.symmetric == {True}:
            raise self._error(f"has a {word}, config.json says that it is symmetric")
        return there

    def _groups(self, scales: tuple[int, int], outputs: int, inputs: int) -> int:
        """How many groups of inputs the scales [O, G] are of."""
        rows, groups = scales
        stated = {size for _, size in self._method.blocks}
        if rows != outputs or not groups or inputs % groups:
            raise self._error(
                f"scales of {rows} outputs and {groups} groups do not fit a weight of {outputs} "
                f"outputs and {inputs} inputs"
            )
        size = inputs // groups
        if size not in stated and not (groups == 1 and None in stated):
            said = ", ".join("all" if g is None else str(g) for g in stated)
            raise self._error(
                f"{groups} groups of {size} inputs, config.json says groups of {said}"
            )
        return groups

    def _grid(self, word: str, dtypes: Sequence[str], outputs: int, inputs: int) -> tuple[int, int]:
        """Outputs and inputs that share a scale, of a tensor of scales and what is stated."""
        extent = self._parts[word]
        for stated in self._method.blocks:
            block = (stated[0] or outputs, stated[1] or inputs)
            grid = -(-outputs // block[0]), -(-inputs // block[1])
            shapes = {
                grid,
                *({grid[:1]} if grid[1] == 1 else ()),
                *({()} if grid == (1, 1) else ()),
            }
            if extent.shape in shapes and extent.dtype in dtypes:
                return block
        said = listed(_in_words(block) for block in self._method.blocks)
        raise self._error(
            f"{word} is {extent.dtype} {list(extent.shape)} for a weight of {[outputs, inputs]}, "
            f"config.json says one of {' or '.join(dtypes)} for each {said}"
        )

    def _shape(self) -> tuple[int, int]:
        """What `weight_shape`, which is data, says."""
        extent = self._parts["weight_shape"]
        if extent.dtype not in ("I64", "I32") or extent.shape != (2,):
            raise self._error(
                f"weight_shape is {extent.dtype} {list(extent.shape)}, not two numbers"
            )
        data = self._data(extent)
        half = extent.element_bytes
        sides = [int.from_bytes(data[i : i + half], "little", signed=True) for i in (0, half)]
        if not all(1 <= side <= _SIDES for side in sides):
            raise self._error(f"weight_shape is {sides}, accepted are sides from 1 to {_SIDES}")
        return sides[0], sides[1]

    def _data(self, extent: TensorExtent) -> bytes:
        return read_part(self._folder, extent.path.name, extent.nbytes, extent.offset)

    def _sides(self, word: str, *dtypes: str) -> tuple[int, int]:
        outputs, columns = self._matrix(word, *dtypes)
        if not (1 <= outputs <= _SIDES and 1 <= columns <= _SIDES):
            raise self._error(
                f"{word} is {[outputs, columns]}, accepted are sides from 1 to {_SIDES}"
            )
        return outputs, columns

    def _matrix(self, word: str, *dtypes: str) -> tuple[int, int]:
        extent = self._parts[word]
        if extent.dtype not in dtypes or len(extent.shape) != 2:
            raise self._error(
                f"{word} is {extent.dtype} {list(extent.shape)}, not a matrix of "
                f"{' or '.join(dtypes)}"
            )
        return extent.shape[0], extent.shape[1]

    def _exactly(self, word: str, dtypes: tuple[str, ...], shape: tuple[int, ...]) -> None:
        extent = self._parts[word]
        if extent.dtype not in dtypes or extent.shape != shape:
            raise self._error(
                f"{word} is {extent.dtype} {list(extent.shape)}, not {' or '.join(dtypes)} "
                f"{list(shape)}"
            )

    def _error(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder}: quantised module {shown(self._module)} {what}: download it again, "
            "or take the model it was made from"
        )


_READ: Mapping[Form, Callable[[_Reader, Form], Stored]] = {
    Form.PACKED: _Reader.packed,
    Form.AWQ: _Reader.words,
    Form.GPTQ: _Reader.words,
    Form.GPTQ_V2: _Reader.words,
    Form.FP8: _Reader.grid,
    Form.INT8: _Reader.grid,
    Form.NVFP4: _Reader.pairs,
    Form.NVFP4_PRODUCT: _Reader.pairs,
    Form.MXFP4: _Reader.pairs,
    Form.BNB4: _Reader.flat,
    Form.BNB8: _Reader.rows,
}


def _words(numbers: int, bits: int) -> int:
    return -(-numbers * bits // _WORD_BITS)


def _in_words(block: Block) -> str:
    return " x ".join("all" if side is None else str(side) for side in block)
