"""A quantised weight as it is stored, and the memory that dequantising it needs. No torch here."""

import importlib.util
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from offload_rt.device import compiled
from offload_rt.device.system import processor_flags, takes_matrix_registers
from offload_rt.model.formats.methods import BLOCKS as GGML
from offload_rt.model.formats.methods import CODED_BITS, Form
from offload_rt.model.header import TensorExtent

# Numbers of a weight that are dequantised at once; on a CPU by one thread, so that they stay in its
# second cache (docs/RESULTS.md, "Dequantising on the way").
BLOCK_NUMBERS = {"cpu": 2**19, "cuda": 2**22}
BLOCKS = {"cpu": 8, "cuda": 1}  # at once, by as many threads
KERNEL_BITS, KERNEL_INPUTS = (4, 8), 32  # which have such; inputs of a group: multiples
_KERNEL_FORMS = (Form.PACKED, Form.AWQ, Form.GPTQ, Form.GPTQ_V2)
_TRITON = (Form.FP8, Form.INT8, Form.NVFP4, Form.NVFP4_PRODUCT, Form.MXFP4, Form.CODED)
_WORD_BITS = 32
_KERNEL_FORMATS = ("bfloat16", "float16")
# Who multiplies with stored weights (`kernels/stored.py`) needs this, and so many outputs at once.
_FLAG, _PANEL = "avx512_bf16", 64
_FOURS, _LOOKS_UP = 32, "avx512f"  # inputs of a scale of MXFP4; who multiplies it needs that
# Inputs of a weight in 12 bits: multiples of one, fewer than the other (`kernels/twelve.py`).
_CODED_INPUTS, _LONGEST = 64, 2**19
# Outputs of a part: torch adds up those of fewer than 192 in another order (fp32, 16 rows, one
# thread: docs/RESULTS.md, "Output heads in parts").
_LEAST = 256
_BLOCK_BYTES = 16  # of intermediate results, for a number of a block


@dataclass(frozen=True, slots=True, kw_only=True)
class Flat:
    """What bitsandbytes states of a 4-bit weight, whose blocks follow each other flat.

    Attributes:
        block: numbers that share a scale.
        dtype: torch's name of the format that numbers are rounded to first.
        nested: scales that share one of their own; None: scales are fp32.
        offset: added to such scales.
    """

    block: int
    dtype: str
    nested: int | None = None
    offset: float = 0.0


TOGETHER_ROWS = 8  # of a pass; each reads the weights of its experts by itself
# Weights of MXFP4 that a core multiplies in a second, assumed: two thirds of the best of 40
# products on a Xeon with AVX-512 (9.5e9, beside other work).
FOURS_PER_CORE = 6e9
HOST_ROWS = 8  # of a pass, whose experts a processor may compute where they lie
AT_ONCE_EXPERTS = 8  # that a processor multiplies with in one call
AT_ONCE_FEW = 32  # rows of an expert up to which that is so where it need not be row-invariant
AT_ONCE_ROWS = 64  # that are sent to those, at least; as many as the pass has, if it has more


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stored:
    """A quantised weight. One is equal to itself only, and so can be a key.

    Attributes:
        module: its name in the files, without a final `.weight`.
        form: how it is stored.
        outputs: O of the weight [O, I].
        inputs: I.
        bits: of a number, in whole ones.
        groups: G, scales along the inputs.
        parts: the tensors that are streamed, by what they are: the last word of their names.
        block: outputs and inputs that share a scale, where scales are a grid.
        flat: what is stated of blocks that follow each other flat.
        source: the tensor of the files that these parts are made from when they are loaded
            (`rounding.py`), or that they are, coded; None: they are tensors of the files.
        heads: of a weight whose rows come in pairs, one of each half of a head (GGUF's llama);
            0: rows are in order.
        pieces: of a coded weight, where each piece begins in its one part, and last where they end.
        at_once: outputs that are dequantised at once, of a weight too large for all; 0: all are.
    """

    module: str
    form: Form
    outputs: int
    inputs: int
    bits: int
    groups: int
    parts: Mapping[str, TensorExtent]
    block: tuple[int, int] = (1, 1)
    flat: Flat | None = None
    source: TensorExtent | None = None
    heads: int = 0
    pieces: tuple[int, ...] = ()
    at_once: int = 0

    @property
    def of_expert(self) -> bool:
        """Whether it is a matrix of one of a layer's experts."""
        return ".experts." in self.module

    @property
    def numbers(self) -> int:
        """Of the weight."""
        return self.outputs * self.inputs

    @property
    def scratch_numbers(self) -> int:
        """Of the weight that are dequantised at once."""
        return (self.at_once or self.outputs) * self.inputs

    def cuts(self) -> list[slice]:
        """Outputs that are dequantised at once, some after the other; no few are left over."""
        step = self.at_once or self.outputs
        starts = [*range(0, self.outputs, step)]
        if starts[1:] and step >= 2 * _LEAST and self.outputs - starts[-1] < _LEAST:
            starts[-1] -= _LEAST
        return [slice(*pair) for pair in itertools.pairwise([*starts, self.outputs])]

    @property
    def group(self) -> int:
        """Inputs that share a scale."""
        return self.inputs // self.groups

    @property
    def operand_bytes(self) -> int:
        """Of scales and zero points in fp32, that a kernel of ours takes besides the codes."""
        return 0 if self.form in GGML else 8 * self.groups * self.outputs

    @property
    def nbytes(self) -> int:
        """In an image, and in the files unless there is a source."""
        return sum(extent.nbytes for extent in self.parts.values())

    @property
    def rounds(self) -> bool:
        """Whether it is rounded when it is loaded; its parts are in no file."""
        return self.source is not None and not self.pieces

    @property
    def file_bytes(self) -> int:
        """In the files."""
        return self.nbytes if self.source is None else self.source.file_bytes


@dataclass(frozen=True, slots=True)
class StoredTensors:
    """The quantised weights of a model.

    Attributes:
        by_part: the weight that a tensor is a part of, by the tensor's name.
        facts: names of tensors that describe weights and are not streamed.
    """

    by_part: Mapping[str, Stored]
    facts: frozenset[str]


def suits_kernels(stored: Stored, dtype: str) -> bool:
    """Whether compiled kernels dequantise a weight on a CPU, where there are any.

    Args:
        stored: the weight.
        dtype: torch's name of the format it computes in.
    """
    return (
        stored.form in _KERNEL_FORMS
        and stored.bits in KERNEL_BITS
        and stored.group % KERNEL_INPUTS == 0
        and dtype in _KERNEL_FORMATS
    )


def multiplies(stored: Stored, dtype: str, *, exact: bool = False) -> bool:
    """Whether a CPU's kernels multiply with a weight as it is stored, here and now.

    Args:
        stored: the weight.
        dtype: torch's name of the format it computes in.
        exact: passes are row-invariant, where kernels may multiply in matrix registers.
    """
    return could_multiply(stored, dtype) and kernels_multiply(exact=exact)


def kernels_multiply(*, exact: bool = False) -> bool:
    """Whether there are such kernels for bf16, here and now; `exact` as of `multiplies`."""
    return (
        _FLAG in processor_flags()
        and (exact or not takes_matrix_registers("bfloat16"))
        and not compiled.problem()  # numba brings llvmlite, and is what can be switched off
    )


def kernels_multiply_plain() -> bool:
    """Whether kernels of LLVM's multiply plain bf16 in row-invariant passes, here and now.

    They do whether numba is switched off or not (`kernels/assembling.py`).
    """
    return _FLAG in processor_flags() and importlib.util.find_spec("llvmlite") is not None


def could_multiply(stored: Stored, dtype: str) -> bool:
    """Whether such kernels take a weight, where there are any."""
    coded = stored.form is Form.CODED and stored.bits == CODED_BITS and stored.inputs < _LONGEST
    step = _CODED_INPUTS if coded else KERNEL_INPUTS
    if stored.form is Form.PACKED:
        step = 512 // stored.bits  # 16 words
    return (
        dtype == "bfloat16"
        and (coded or stored.form in GGML or suits_kernels(stored, dtype))
        and stored.outputs % _PANEL == 0
        and stored.inputs % step == 0
    )


def suits_triton(form: str, bits: int) -> bool:
    """Whether there is a kernel of Triton's that dequantises such weights on a GPU."""
    if form in _KERNEL_FORMS:
        return _WORD_BITS % bits == 0
    return form in _TRITON or form in GGML


def multiplies_fours(stored: Stored) -> bool:
    """Whether a processor like this one multiplies few rows with MXFP4 as it is stored."""
    suits = multiplied_together(stored.form) and stored.block == (1, _FOURS)
    return suits and _LOOKS_UP in processor_flags() and not compiled.problem()


def scratch_bytes(stored: Iterable[Stored], number_bytes: int, processor: str) -> int:
    """What dequantising needs besides the images: room for the largest weight and for blocks.

    Args:
        stored: weights of a model.
        number_bytes: of a number it computes with.
        processor: `cpu` or `cuda`.
    """
    stored = list(stored)
    largest = max((each.scratch_numbers for each in stored), default=0)
    # On a GPU one kernel decodes these, and no torch is there to do it in steps.
    parts = [s for s in stored if not (processor == "cuda" and s.form is Form.CODED)]
    block = max(BLOCK_NUMBERS[processor], max((each.inputs for each in parts), default=0))
    most = max((each.scratch_numbers for each in parts), default=0)
    block = min(most, block * BLOCKS[processor])
    return largest * number_bytes + block * _BLOCK_BYTES


def multiplied_together(form: str) -> bool:
    """Whether a GPU multiplies few rows with experts of this form as stored (`together.py`)."""
    return form == Form.MXFP4
