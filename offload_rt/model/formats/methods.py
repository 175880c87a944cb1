"""What `config.json` says of quantised weights: which methods are read, and what they state.

The tensors decide what a module is (`found.py`); what is stated here confirms them, and says what
their shapes cannot. No torch here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from offload_rt.model.files import shown

READ_METHODS = (
    "compressed-tensors (integers, FP8, MXFP8, MXFP4, NVFP4), AWQ (gemm), GPTQ (2, 3, 4 and 8 "
    "bits), FP8 (fp8, fbgemm_fp8), MXFP4 (gpt-oss), bitsandbytes (nf4, fp4, int8), ModelOpt "
    "(FP8, NVFP4); and GGUF files (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K, IQ4_NL, IQ4_XS, "
    "MXFP4)"
)
UNROUNDED = "activations are not rounded, as the method has it"
# Bits of a bf16 weight in the two codes of packed folders, 12 and 10.75, in whole ones.
CODED_BITS, NESTED_BITS = 12, 11
_BITS = range(2, 9)
_LARGEST_GROUP = 2**20
_MIXED = "mixed-precision"

# Outputs and inputs of a weight that share a scale; None: all of them.
Block = tuple[int | None, int | None]
WHOLE: Block = (None, None)
CHANNEL: Block = (1, None)


class Form(StrEnum):
    """How the weights of a module are stored.

    `packed`: compressed-tensors' bit streams along the inputs.
    `awq`: 8 outputs to a word, shuffled.
    `gptq`: bit streams along the inputs, zero points less one.
    `gptq_v2`: the same with zero points as they are.
    `fp8`: FP8 (E4M3) numbers.
    `int8`: integers of 8 bits or less, a byte each.
    `nvfp4`: pairs of FP4 (E2M1), FP8 scales that one number of the weight divides.
    `nvfp4_product`: the same with scales that it multiplies.
    `mxfp4`: pairs of FP4, scales that are powers of two.
    `bnb4`: bitsandbytes' pairs of indices into a table of 16 numbers.
    `bnb8`: bitsandbytes' integers, with the largest number of each output.
    `coded`: bf16 in 12 or 10.75 bits, of packed folders (`planes.py`); no method of config.json.
    `q4_0` to `block_mxfp4`: blocks of GGUF, each with scales of its own (`ggml.py`).
    `paired`: plain numbers of GGUF in its order of rows.
    """

    PACKED = "packed"
    AWQ = "awq"
    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"
    FP8 = "fp8"
    INT8 = "int8"
    NVFP4 = "nvfp4"
    NVFP4_PRODUCT = "nvfp4_product"
    MXFP4 = "mxfp4"
    BNB4 = "bnb4"
    BNB8 = "bnb8"
    CODED = "coded"
    Q4_0 = "q4_0"
    Q4_1 = "q4_1"
    Q5_0 = "q5_0"
    Q5_1 = "q5_1"
    Q8_0 = "q8_0"
    Q2_K = "q2_k"
    Q3_K = "q3_k"
    Q4_K = "q4_k"
    Q5_K = "q5_k"
    Q6_K = "q6_k"
    IQ4_NL = "iq4_nl"
    IQ4_XS = "iq4_xs"
    BLOCK_MXFP4 = "block_mxfp4"
    PAIRED = "paired"


# Numbers and bytes of a block of GGUF (ggml-common.h); blocks of a row follow each other.
BLOCKS: Mapping[Form, tuple[int, int]] = {
    Form.Q4_0: (32, 18),
    Form.Q4_1: (32, 20),
    Form.Q5_0: (32, 22),
    Form.Q5_1: (32, 24),
    Form.Q8_0: (32, 34),
    Form.Q2_K: (256, 84),
    Form.Q3_K: (256, 110),
    Form.Q4_K: (256, 144),
    Form.Q5_K: (256, 176),
    Form.Q6_K: (256, 210),
    Form.IQ4_NL: (32, 18),
    Form.IQ4_XS: (256, 136),
    Form.BLOCK_MXFP4: (32, 17),
}


# Where in it fp16 numbers begin that scale its codes, or are added; MXFP4 has a power of two.
SCALES: Mapping[Form, tuple[int, ...]] = {
    Form.Q4_0: (0,),
    Form.Q4_1: (0, 2),
    Form.Q5_0: (0,),
    Form.Q5_1: (0, 2),
    Form.Q8_0: (0,),
    Form.Q2_K: (80, 82),
    Form.Q3_K: (108,),
    Form.Q4_K: (0, 2),
    Form.Q5_K: (0, 2),
    Form.Q6_K: (208,),
    Form.IQ4_NL: (0,),
    Form.IQ4_XS: (0,),
}


def block_name(form: Form) -> str:
    """What GGUF calls blocks of this form."""
    return str(form).removeprefix("block_").upper()


def block_bits(form: Form) -> int:
    """Bits of a code in such a block: the first digit of its name."""
    return int(next(filter(str.isdigit, form)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is stated of a model's quantised weights.

    Attributes:
        name: of the method, with the bits of a weight.
        forms: that modules may have.
        bits: of a weight.
        blocks: outputs and inputs that share a scale.
        symmetric: whether scales have no zero points; both, where modules differ.
        scale: number format that scales have, as far as it is known.
        kept: what config.json calls the modules that stay as they were.
        notes: what is not done that the method does.
        fused: weights are those of experts, all of a layer in one tensor.
    """

    name: str
    forms: frozenset[Form]
    bits: frozenset[int]
    blocks: frozenset[Block]
    symmetric: frozenset[bool] = frozenset({True})
    scale: str = "F32"
    kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fused: bool = False


def read_method(name: str, stated: object) -> Method | str:
    """Read `quantization_config`.

    Returns:
        What is stated, or why such weights are not read.
    """
    if not isinstance(stated, dict):
        return "this method is not read"
    method = stated.get("quant_method")
    if method is None and _loads(stated):
        method = "bitsandbytes"
    reader = _READERS.get(method.lower()) if isinstance(method, str) else None
    return "this method is not read" if reader is None else reader(name, stated)


@dataclass(frozen=True, slots=True)
class _Format:
    """A format of compressed-tensors.

    Attributes:
        form: of its weights.
        kind: of numbers, as config.json has it.
        bits: that are read.
        strategies: that are read: what shares a scale.
        group: the one size of groups there is, if there is one.
    """

    form: Form
    kind: str
    bits: Sequence[int]
    strategies: tuple[str, ...]
    group: int | None = None


_GRIDS = ("tensor", "channel", "group", "block")
_FORMATS = {
    "pack-quantized": _Format(Form.PACKED, "int", _BITS, ("group", "channel")),
    "int-quantized": _Format(Form.INT8, "int", _BITS, _GRIDS),
    "float-quantized": _Format(Form.FP8, "float", (8,), _GRIDS),
    "mxfp8-quantized": _Format(Form.FP8, "float", (8,), ("group",), 32),
    "nvfp4-pack-quantized": _Format(Form.NVFP4, "float", (4,), ("tensor_group",), 16),
    "mxfp4-pack-quantized": _Format(Form.MXFP4, "float", (4,), ("group",), 32),
}
_NAIVE = {"int": _FORMATS["int-quantized"], "float": _FORMATS["float-quantized"]}


def _compressed_tensors(name: str, stated: Mapping[str, object]) -> Method | str:
    groups = stated.get("config_groups")
    schemes: list[Any] = list(groups.values()) if isinstance(groups, dict) else []
    if not schemes or not all(isinstance(each, dict) for each in schemes):
        return "its config_groups are not an object of objects"
    sparsity = stated.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    if sparse != "dense":
        return f"its sparsity_config {shown(sparse)} is not read"
    if stated.get("transform_config"):
        return "its transform_config changes what the network computes"
    found = [_scheme(each, stated.get("format")) for each in schemes]
    if (wrong := next((each for each in found if isinstance(each, str)), None)) is not None:
        return wrong
    weights = [each["weights"] for each in schemes]
    rounds = any(each.get("input_activations") for each in schemes)
    notes = [UNROUNDED] if rounds else []
    if stated.get("kv_cache_scheme"):
        notes.append("the KV cache is not rounded, as kv_cache_scheme has it")
    bits = sorted({each["num_bits"] for each in weights})
    several = f"compressed-tensors, {'- and '.join(map(str, bits))}-bit"
    return Method(
        name=name if len(bits) == 1 else several,
        forms=frozenset(each.form for each in found if isinstance(each, _Format)),
        bits=frozenset(bits),
        blocks=frozenset(block for each in weights for block in _blocks(each)),
        symmetric=frozenset(each.get("symmetric", True) is not False for each in weights),
        scale="U8" if stated.get("format") == "mxfp8-quantized" else "BF16",
        kept=_names(stated.get("ignore")),
        notes=tuple(notes),
    )


def _scheme(scheme: Mapping[str, Any], overall: object) -> _Format | str:
    """The format of a group of modules, or why it is not read."""
    weights, name = scheme.get("weights"), scheme.get("format") or overall
    if name in (None, _MIXED) and overall == _MIXED:
        return "a group of its modules has no format"
    kind = weights.get("type", "int") if isinstance(weights, dict) else None
    form = _NAIVE.get(str(kind)) if name == "naive-quantized" else _FORMATS.get(str(name))
    if not isinstance(weights, dict) or (form is None and name in (*_FORMATS, "naive-quantized")):
        return "its weights are not integers or FP8"
    if form is None:
        return f"its format {shown(name)} is not read"
    if kind != form.kind:
        word = "integers" if form.kind == "int" else "floats"
        return f"its weights are not {word}, as {shown(name)} has them"
    return _unread(weights, form) or form


def _unread(weights: Mapping[str, Any], form: _Format) -> str | None:
    """Why weights stated so are not read, or None."""
    count, size = weights.get("num_bits"), weights.get("group_size")
    if type(count) is not int or count not in form.bits:
        read = f"{form.bits[0]} to {form.bits[-1]}" if len(form.bits) > 1 else str(form.bits[0])
        return f"its num_bits is {shown(count)}, read are {read}"
    strategy = _strategy(weights)
    if strategy not in form.strategies:
        return f"its strategy {shown(strategy)} is not read"
    if strategy in ("group", "tensor_group") and (
        not _is_size(size) or (form.group is not None and size != form.group)
    ):
        return f"its group_size is {shown(size)}"
    sides = weights.get("block_structure")
    if strategy == "block" and not _is_block(sides):
        return f"its block_structure is {shown(sides)}, expected are two sizes"
    if weights.get("symmetric") is False and form.form not in (Form.PACKED, Form.INT8):
        return "its floats have zero points"
    return None


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value < _LARGEST_GROUP


def _is_block(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_size, value))


def _strategy(weights: Mapping[str, Any]) -> object:
    grouped = weights.get("group_size") not in (None, -1)
    return weights.get("strategy") or ("group" if grouped else "channel")


def _blocks(weights: Mapping[str, Any]) -> list[Block]:
    """What may share a scale; where no strategy is stated, an output or everything."""
    strategy = _strategy(weights)
    if strategy in ("group", "tensor_group"):
        return [(1, weights["group_size"])]
    if strategy == "block":
        outputs, inputs = weights["block_structure"]
        return [(outputs, inputs)]
    if strategy == "tensor":
        return [WHOLE]
    return [CHANNEL] if weights.get("strategy") else [CHANNEL, WHOLE]


def _names(stated: object) -> tuple[str, ...]:
    return tuple(n for n in stated if isinstance(n, str)) if isinstance(stated, list) else ()


def _awq(name: str, stated: Mapping[str, Any]) -> Method | str:
    version, bits = str(stated.get("version", "gemm")).lower(), stated.get("bits", 4)
    if version != "gemm":
        return f"its version {shown(version)} is not read"
    if bits != 4:
        return f"its bits are {shown(bits)}, read are 4"
    return _of_words(name, stated, Form.AWQ)


def _gptq(name: str, stated: Mapping[str, Any]) -> Method | str:
    form, bits = stated.get("checkpoint_format") or "gptq", stated.get("bits")
    if form not in (Form.GPTQ, Form.GPTQ_V2) or stated.get("is_marlin_format"):
        return f"its checkpoint_format {shown('marlin' if form == 'gptq' else form)} is not read"
    if stated.get("dynamic"):
        return "its modules differ (dynamic)"
    if stated.get("pack_dtype", "int32") not in ("int32", None):
        return f"its pack_dtype {shown(stated.get('pack_dtype'))} is not read"
    if bits not in (2, 3, 4, 8):
        return f"its bits are {shown(bits)}, read are 2, 3, 4 and 8"
    return _of_words(name, stated, Form(str(form)))


def _of_words(name: str, stated: Mapping[str, Any], form: Form) -> Method | str:
    size = stated.get("group_size", 128)
    if not (size == -1 or _is_size(size)):
        return f"its group_size is {shown(size)}"
    return Method(
        name=name,
        forms=frozenset({form}),
        bits=frozenset({stated.get("bits", 4)}),
        blocks=frozenset({CHANNEL if size == -1 else (1, size)}),
        symmetric=frozenset({False}),
        scale="F16",
        kept=_names(stated.get("modules_to_not_convert")),
    )


def _fp8(name: str, stated: Mapping[str, Any]) -> Method | str:
    sides = stated.get("weight_block_size", [128, 128])
    if sides is not None and not _is_block(sides):
        return f"its weight_block_size is {shown(sides)}, expected are two sizes"
    if stated.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        return f"its fmt {shown(stated['fmt'])} is not read"
    block: Block = WHOLE if sides is None else (sides[0], sides[1])
    return _of_fp8(name, block, stated.get("modules_to_not_convert"))


def _fbgemm(name: str, stated: Mapping[str, Any]) -> Method | str:
    return _of_fp8(name, CHANNEL, stated.get("modules_to_not_convert"))


def _of_fp8(name: str, block: Block, kept: object) -> Method:
    return Method(
        name=name,
        forms=frozenset({Form.FP8}),
        bits=frozenset({8}),
        blocks=frozenset({block}),
        kept=_names(kept),
        notes=(UNROUNDED,),
    )


def _loads(stated: Mapping[str, Any]) -> bool:
    return stated.get("load_in_4bit") is True or stated.get("load_in_8bit") is True


def _bitsandbytes(name: str, stated: Mapping[str, Any]) -> Method | str:
    four = stated.get("load_in_4bit") is True
    if not _loads(stated):
        return "neither load_in_4bit nor load_in_8bit is true"
    kind = stated.get("bnb_4bit_quant_type", "fp4")
    if four and kind not in ("nf4", "fp4"):
        return f"its bnb_4bit_quant_type is {shown(kind)}, read are nf4 and fp4"
    kept = stated.get("llm_int8_skip_modules")
    return Method(
        name=name,
        forms=frozenset({Form.BNB4 if four else Form.BNB8}),
        bits=frozenset({4 if four else 8}),
        blocks=frozenset({(1, 64) if four else CHANNEL}),
        scale="U8" if four and stated.get("bnb_4bit_use_double_quant") is True else "F32",
        kept=_names(kept),
        notes=() if four else (UNROUNDED,),
    )


def _modelopt(name: str, stated: Mapping[str, Any]) -> Method | str:
    inner = stated.get("quantization")  # of hf_quant_config.json
    facts: Mapping[str, Any] = inner if isinstance(inner, dict) else stated
    algorithm = facts.get("quant_algo")
    kept = _names(facts.get("exclude_modules") or facts.get("ignore"))
    notes = [UNROUNDED]
    if facts.get("kv_cache_quant_algo") or facts.get("kv_cache_scheme"):
        notes.append("the KV cache is not rounded, as kv_cache_quant_algo has it")
    if algorithm not in ("FP8", "NVFP4"):
        return f"its quant_algo {shown(algorithm)} is not read"
    fp8 = algorithm == "FP8"
    return Method(
        name=name,
        forms=frozenset({Form.FP8 if fp8 else Form.NVFP4_PRODUCT}),
        bits=frozenset({8 if fp8 else 4}),
        blocks=frozenset({WHOLE if fp8 else (1, 16)}),
        kept=kept,
        notes=tuple(notes),
    )


def _mxfp4(name: str, stated: Mapping[str, Any]) -> Method | str:
    return Method(
        name=name,
        forms=frozenset({Form.MXFP4}),
        bits=frozenset({4}),
        blocks=frozenset({(1, 32)}),
        scale="U8",
        kept=_names(stated.get("modules_to_not_convert")),
        fused=True,
    )


def _gguf(name: str, stated: Mapping[str, Any]) -> Method | str:
    """What a folder made of GGUF files states (`model/gguf/`); others do not say enough."""
    types = stated.get("types")
    known = {block_name(form): form for form in BLOCKS}
    if not isinstance(types, list) or not types or not all(each in known for each in types):
        return "its types are not stated, give the .gguf file"
    forms = [known[each] for each in types]
    return Method(
        name=f"{name}, {' and '.join(types)}",
        forms=frozenset(forms),
        bits=frozenset(map(block_bits, forms)),
        blocks=frozenset({(1, BLOCKS[form][0]) for form in forms}),
        scale="F16",
    )


_READERS: Mapping[str, Callable[[str, Mapping[str, Any]], Method | str]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
    "fp8": _fp8,
    "fbgemm_fp8": _fbgemm,
    "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "gguf": _gguf,
}


def listed(values: Iterable[object]) -> str:
    """Several values of which one is right, as words of a message."""
    return " or ".join(map(str, sorted(values, key=str)))
