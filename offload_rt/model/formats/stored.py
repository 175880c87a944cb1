"""Which tensors of the files are a quantised weight, and of what size; checked before any is read.

A module is quantised if and only if its tensors' names say so. Their shapes must agree with each
other and with what `config.json` states. No torch here.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.files import open_inside, shown
from offload_rt.model.formats.methods import Form, Method
from offload_rt.model.header import TensorExtent

# Numbers of a weight that are dequantised at once. On two cores blocks of 2^18, which stay in the
# second cache, took six times as long: threads wait for each other at each kernel, probably
# (docs/RESULTS.md, "Dequantising on the way").
BLOCK_NUMBERS = {"cpu": 2**22, "cuda": 2**22}
# Weights dequantised in a second, assumed until profiles have them. Of a CPU: two cores (measured,
# same section); of a GPU half of what a 4090's memory allows (350 GB/s written).
DECODED_PER_S = {"cpu": 1.2e9, "cuda": 175e9}
_BLOCK_BYTES = 16  # of intermediate results, for a number of a block
_SIDES = 2**20  # rows or columns of a weight; a few times the largest published
_WORDS = ("qweight", "qzeros", "scales")
_PARTS = {
    Form.PACKED: ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
    Form.AWQ: _WORDS,
    Form.GPTQ: (*_WORDS, "g_idx"),
    Form.GPTQ_V2: (*_WORDS, "g_idx"),
}
_NEEDED = {
    Form.PACKED: ("weight_packed", "weight_scale", "weight_shape"),
    Form.AWQ: _WORDS,
    Form.GPTQ: _WORDS,
    Form.GPTQ_V2: _WORDS,
}
_FACTS = ("weight_shape", "input_scale", "input_zero_point")  # read or of no use, never streamed
_FLOATS = ("BF16", "F16", "F32")
_WORD_BITS = 32


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """A quantised weight. One is equal to itself only, and so can be a key.

    Attributes:
        module: its name in the files, without a final `.weight`.
        form: how it is stored.
        outputs: O of the weight [O, I].
        inputs: I.
        bits: of a number.
        groups: G, scales along the inputs.
        parts: the tensors that are streamed, by the last word of their names.
    """

    module: str
    form: Form
    outputs: int
    inputs: int
    bits: int
    groups: int
    parts: Mapping[str, TensorExtent]

    @property
    def numbers(self) -> int:
        """Of the weight."""
        return self.outputs * self.inputs

    @property
    def nbytes(self) -> int:
        """In the files, and in an image."""
        return sum(extent.nbytes for extent in self.parts.values())


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The quantised weights of a model.

    Attributes:
        by_part: the weight that a tensor is a part of, by the tensor's name.
        facts: names of tensors that describe weights and are not streamed.
    """

    by_part: Mapping[str, Stored]
    facts: frozenset[str]


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
    words = {word for form in method.forms for word in _PARTS[form]}
    modules: dict[str, dict[str, TensorExtent]] = {}
    for name, extent in tensors.items():
        module, _, word = name.rpartition(".")
        if word in words or word in _FACTS or word == "weight":
            modules.setdefault(module, {})[word] = extent
    found, facts = dict[str, Stored](), set[str]()
    for module, parts in modules.items():
        if parts.keys() <= {"weight"}:
            continue
        stored = _Reader(folder, method, module, parts).read()
        found |= {f"{module}.{word}": stored for word in stored.parts}
        facts |= {f"{module}.{word}" for word in parts if word in _FACTS}
    if not found:
        raise CheckpointError(
            f"{folder}: config.json says that weights are quantised ({method.name}), the files "
            "have none that are: files and config are not of one model"
        )
    return StoredTensors(found, frozenset(facts))


def scratch_bytes(stored: Iterable[Stored], number_bytes: int, processor: str) -> int:
    """What dequantising needs besides the images: room for the largest weight and for one block.

    Args:
        stored: weights of a model.
        number_bytes: of a number it computes with.
        processor: `cpu` or `cuda`.
    """
    largest = max((each.numbers for each in stored), default=0)
    block = max(BLOCK_NUMBERS[processor], max((each.inputs for each in stored), default=0))
    return largest * number_bytes + min(largest, block) * _BLOCK_BYTES if largest else 0


class _Reader:
    """Makes a weight of its tensors."""

    def __init__(
        self, folder: Path, method: Method, module: str, parts: dict[str, TensorExtent]
    ) -> None:
        self._folder, self._method, self._module, self._parts = folder, method, module, parts

    def read(self) -> Stored:
        """The weight, all sizes checked."""
        if ".experts." in self._module:
            raise self._error("is of an expert: quantised experts are not read in this version")
        if "weight" in self._parts:
            others = sorted(self._parts.keys() - {"weight"})
            raise self._error(f"has a weight that is not quantised and {others[0]} for one that is")
        (form,) = self._method.forms
        missing = [word for word in _NEEDED[form] if word not in self._parts]
        if missing:
            raise self._error(f"has {shown(next(iter(self._parts)))} but no {missing[0]}")
        return self.packed() if form is Form.PACKED else self.words(form)

    def packed(self) -> Stored:
        """compressed-tensors: `weight_packed` I32 [O, ceil(I b / 32)], `weight_scale` [O, G]."""
        outputs, inputs = self._shape()
        codes, scales = self._matrix("weight_packed", "I32"), self._matrix("weight_scale", *_FLOATS)
        if codes[0] != outputs:
            raise self._error(f"weight_packed is {list(codes)}, weight_shape {[outputs, inputs]}")
        bits = [b for b in self._method.bits if _words(inputs, b) == codes[1]]
        if len(bits) != 1:
            raise self._error(
                f"weight_packed has {codes[1]} words for {inputs} inputs, config.json says "
                f"{_listed(self._method.bits)} bits"
            )
        groups = self._groups(scales, outputs, inputs)
        zeros = self._parts.get("weight_zero_point")
        if zeros is None and self._method.symmetric == {False}:
            raise self._error("has no weight_zero_point, config.json says that it is not symmetric")
        if zeros is not None:
            if self._method.symmetric == {True}:
                raise self._error("has a weight_zero_point, config.json says that it is symmetric")
            self._exactly("weight_zero_point", ("I32",), (_words(outputs, bits[0]), groups))
        if "weight_g_idx" in self._parts:
            self._exactly("weight_g_idx", ("I32", "I64"), (inputs,))
        return self._stored(Form.PACKED, outputs, inputs, bits[0], groups)

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
        if "g_idx" in self._parts and form is not Form.AWQ:
            self._exactly("g_idx", ("I32", "I64"), (inputs,))
        return self._stored(form, outputs, inputs, bits, groups)

    def _stored(self, form: Form, outputs: int, inputs: int, bits: int, groups: int) -> Stored:
        return Stored(
            module=self._module,
            form=form,
            outputs=outputs,
            inputs=inputs,
            bits=bits,
            groups=groups,
            parts={word: self._parts[word] for word in _PARTS[form] if word in self._parts},
        )

    def _groups(self, scales: tuple[int, int], outputs: int, inputs: int) -> int:
        """How many groups of inputs the scales [O, G] are of."""
        rows, groups = scales
        stated = self._method.groups
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

    def _shape(self) -> tuple[int, int]:
        """What `weight_shape`, which is data, says."""
        extent = self._parts["weight_shape"]
        if extent.dtype not in ("I64", "I32") or extent.shape != (2,):
            raise self._error(
                f"weight_shape is {extent.dtype} {list(extent.shape)}, not two numbers"
            )
        with open_inside(self._folder, extent.path.name) as file:
            data = file.read(extent.nbytes, extent.offset)
        half = extent.element_bytes
        sides = [int.from_bytes(data[i : i + half], "little", signed=True) for i in (0, half)]
        if len(data) != extent.nbytes or not all(1 <= side <= _SIDES for side in sides):
            raise self._error(f"weight_shape is {sides}, accepted are sides from 1 to {_SIDES}")
        return sides[0], sides[1]

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


def _words(numbers: int, bits: int) -> int:
    return -(-numbers * bits // _WORD_BITS)


def _listed(values: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(values)))
