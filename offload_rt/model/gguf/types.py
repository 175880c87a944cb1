"""Types of tensors in GGUF files: which are read, and the bytes of all that are known. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from offload_rt.model.formats.methods import BLOCKS, Form, block_name


@dataclass(frozen=True, slots=True)
class TensorType:
    """A type.

    Attributes:
        name: as people call it.
        numbers: of a block; they follow each other in a row.
        block_bytes: of a block.
        dtype: safetensors name of plain numbers; None: blocks.
        form: of blocks that are read.
    """

    name: str
    numbers: int
    block_bytes: int
    dtype: str | None = None
    form: Form | None = None

    @property
    def is_read(self) -> bool:
        """Whether such weights are computed with."""
        return self.dtype is not None or self.form is not None


def _blocks(form: Form) -> TensorType:
    return TensorType(block_name(form), *BLOCKS[form], form=form)


# By their number in a file (ggml.h, `enum ggml_type`; sizes: ggml-common.h).
TYPES: Mapping[int, TensorType] = MappingProxyType(
    {
        0: TensorType("F32", 1, 4, dtype="F32"),
        1: TensorType("F16", 1, 2, dtype="F16"),
        2: _blocks(Form.Q4_0),
        3: _blocks(Form.Q4_1),
        6: _blocks(Form.Q5_0),
        7: _blocks(Form.Q5_1),
        8: _blocks(Form.Q8_0),
        9: TensorType("Q8_1", 32, 36),
        10: _blocks(Form.Q2_K),
        11: _blocks(Form.Q3_K),
        12: _blocks(Form.Q4_K),
        13: _blocks(Form.Q5_K),
        14: _blocks(Form.Q6_K),
        15: TensorType("Q8_K", 256, 292),
        16: TensorType("IQ2_XXS", 256, 66),
        17: TensorType("IQ2_XS", 256, 74),
        18: TensorType("IQ3_XXS", 256, 98),
        19: TensorType("IQ1_S", 256, 50),
        20: _blocks(Form.IQ4_NL),
        21: TensorType("IQ3_S", 256, 110),
        22: TensorType("IQ2_S", 256, 82),
        23: _blocks(Form.IQ4_XS),
        24: TensorType("I8", 1, 1),
        25: TensorType("I16", 1, 2),
        26: TensorType("I32", 1, 4),
        27: TensorType("I64", 1, 8),
        28: TensorType("F64", 1, 8),
        29: TensorType("IQ1_M", 256, 56),
        30: TensorType("BF16", 1, 2, dtype="BF16"),
        34: TensorType("TQ1_0", 256, 54),
        35: TensorType("TQ2_0", 256, 66),
        39: _blocks(Form.BLOCK_MXFP4),
    }
)
READ_TYPES = ", ".join(each.name for each in TYPES.values() if each.is_read)
