"""What `config.json` says of quantised weights: which methods are read, and what they state.

The tensors decide what a module is (`stored.py`); what is stated here confirms them, and says what
their shapes cannot. No torch here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from offload_rt.model.files import shown

READ_METHODS = (
    "compressed-tensors (integers of 2 to 8 bits, packed), AWQ (gemm) and GPTQ (2, 3, 4 and 8 bits)"
)
_BITS = range(2, 9)
_PACKED = "pack-quantized"
_LARGEST_GROUP = 2**20


class Form(StrEnum):
    """How the weights of a module are stored.

    `packed`: compressed-tensors' bit streams along the inputs.
    `awq`: 8 outputs to a word, shuffled.
    `gptq`: bit streams along the inputs, zero points less one.
    `gptq_v2`: the same with zero points as they are.
    """

    PACKED = "packed"
    AWQ = "awq"
    GPTQ = "gptq"
    GPTQ_V2 = "gptq_v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """What is stated of a model's quantised weights.

    Attributes:
        name: of the method, with the bits of a weight.
        forms: that modules may have.
        bits: of a weight.
        groups: inputs that share a scale; None: all of them.
        symmetric: whether groups have no zero points; both, where modules differ.
        notes: what is not done that the method does.
    """

    name: str
    forms: frozenset[Form]
    bits: frozenset[int]
    groups: frozenset[int | None]
    symmetric: frozenset[bool]
    notes: tuple[str, ...] = ()


def read_method(name: str, stated: object) -> Method | str:
    """Read `quantization_config`.

    Args:
        name: of the method, as it is shown.
        stated: the object of the file.

    Returns:
        What is stated, or why such weights are not read.
    """
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    if not isinstance(stated, dict) or method not in _READERS:
        return "this method is not read"
    return _READERS[method](name, stated)


def _compressed_tensors(name: str, stated: Mapping[str, object]) -> Method | str:
    groups = stated.get("config_groups")
    schemes: list[Any] = list(groups.values()) if isinstance(groups, dict) else []
    if not schemes or not all(isinstance(each, dict) for each in schemes):
        return "its config_groups are not an object of objects"
    if (refused := _beyond(stated, schemes)) is not None:
        return refused
    weights = [each["weights"] for each in schemes]
    if (wrong := next(filter(None, map(_unread_integers, weights)), None)) is not None:
        return wrong
    rounds = any(each.get("input_activations") for each in schemes)
    notes = ["activations are not rounded, as the method has it"] if rounds else []
    if stated.get("kv_cache_scheme"):
        notes.append("the KV cache is not rounded, as kv_cache_scheme has it")
    return Method(
        name=name,
        forms=frozenset({Form.PACKED}),
        bits=frozenset(each["num_bits"] for each in weights),
        groups=frozenset(_group(each) for each in weights),
        symmetric=frozenset(each.get("symmetric", True) is not False for each in weights),
        notes=tuple(notes),
    )


def _beyond(stated: Mapping[str, object], schemes: Sequence[Any]) -> str | None:
    """What of such a checkpoint is not read, if anything."""
    sparsity = stated.get("sparsity_config")
    sparse = sparsity.get("format", "dense") if isinstance(sparsity, dict) else "dense"
    if sparse != "dense":
        return f"its sparsity_config {shown(sparse)} is not read"
    if stated.get("transform_config"):
        return "its transform_config changes what the network computes"
    formats = {each.get("format") or stated.get("format") for each in schemes}
    if formats != {_PACKED}:
        return f"its format {_listed(formats - {_PACKED})} is not read"
    weights = [each.get("weights") for each in schemes]
    if not all(isinstance(each, dict) and each.get("type") == "int" for each in weights):
        return "its weights are not integers"
    return None


def _unread_integers(weights: Mapping[str, Any]) -> str | None:
    """Why integers stated so are not read, or None."""
    count, size = weights.get("num_bits"), weights.get("group_size")
    if type(count) is not int or count not in _BITS:
        return f"its num_bits is {shown(count)}, read are 2 to 8"
    strategy = _strategy(weights)
    if strategy not in ("group", "channel"):
        return f"its strategy {shown(strategy)} is not read"
    if strategy == "group" and not (type(size) is int and 0 < size < _LARGEST_GROUP):
        return f"its group_size is {shown(size)}"
    return None


def _strategy(weights: Mapping[str, Any]) -> object:
    grouped = weights.get("group_size") not in (None, -1)
    return weights.get("strategy") or ("group" if grouped else "channel")


def _group(weights: Mapping[str, Any]) -> int | None:
    return weights["group_size"] if _strategy(weights) == "group" else None


def _listed(values: Sequence[object] | set[object]) -> str:
    return ", ".join(sorted(map(shown, values)))


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
    if type(size) is not int or not (size == -1 or 0 < size < _LARGEST_GROUP):
        return f"its group_size is {shown(size)}"
    return Method(
        name=name,
        forms=frozenset({form}),
        bits=frozenset({stated.get("bits", 4)}),
        groups=frozenset({None if size == -1 else size}),
        symmetric=frozenset({False}),
    )


_READERS: Mapping[object, Callable[[str, Mapping[str, Any]], Method | str]] = {
    "compressed-tensors": _compressed_tensors,
    "awq": _awq,
    "gptq": _gptq,
}
