"""The tensors that quantised weights would have, from what `config.json` states alone.

For planning a model one has not downloaded. What is not stated is as the tools write it: scales of
compressed-tensors in bf16, of GPTQ and AWQ in fp16, of others in fp32. No torch here.
"""

import fnmatch
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from offload_rt.model.files import shown
from offload_rt.model.formats.methods import CHANNEL, WHOLE, Block, Form, Method

_log = logging.getLogger(__name__)

_WORD_BITS = 32
_STEP = 256  # scales that share one, where bitsandbytes nests them
_BEYOND = re.compile(r"[\\\[\](){}|+?]")  # what of a regular expression is not read
_PATTERN = "re:"

Tensors = dict[str, tuple[str, tuple[int, ...]]]  # number format and shape by words


@dataclass(frozen=True, slots=True)
class OneForm:
    """What all quantised weights of a model have in common.

    Attributes:
        form: of them.
        bits: of a number.
        block: outputs and inputs that share a scale; None: all.
        zeros: there are zero points.
        scale: number format of the scales.
    """

    form: Form
    bits: int
    block: Block
    zeros: bool
    scale: str


def one_form(method: Method) -> OneForm | None:
    """What all weights have in common; None where modules differ."""
    blocks = set(method.blocks)
    if blocks == {CHANNEL, WHOLE}:
        blocks = {CHANNEL}
    if any(len(found) != 1 for found in (method.forms, method.bits, blocks, method.symmetric)):
        return None
    (form,), (bits,), (block,), (symmetric,) = method.forms, method.bits, blocks, method.symmetric
    return OneForm(form, bits, block, not symmetric, method.scale)


def tensors_of(one: OneForm, outputs: int, inputs: int) -> Tensors | None:
    """The tensors that a weight [outputs, inputs] would be stored as; None: it cannot be."""
    size = one.block[1] or inputs
    if inputs % size and one.form not in (Form.FP8, Form.INT8):
        return None
    made = _TENSORS.get(one.form)  # none of GGUF: its rows' order is the file's
    return None if made is None else made(one, outputs, inputs)


def is_kept(method: Method, module: str) -> bool:
    """Whether config.json says that a module is not quantised.

    Names are whole words of a module's, or have a `*`. Of regular
    expressions those are read that a `*` can stand for: a file must not choose what takes long.
    """
    return any(_names(name, module) for name in method.kept)


def say_unread(method: Method, folder: str) -> None:
    """Tell of patterns that are not read, of which weights are counted as quantised."""
    unread = [name for name in method.kept if name.startswith(_PATTERN) and _glob(name) is None]
    if unread:
        _log.warning(
            "%s: the pattern %s of modules that are not quantised is not read: sizes are as if "
            "they were",
            shown(folder),
            shown(unread[0]),
        )


def _names(name: str, module: str) -> bool:
    if name.startswith(_PATTERN):
        glob = _glob(name)
        return glob is not None and fnmatch.fnmatchcase(module, glob)
    if "*" in name:
        return fnmatch.fnmatchcase(module, name)
    return f".{name}." in f".{module}."


def _glob(name: str) -> str | None:
    """A regular expression that is matched from the start, as a pattern with `*`."""
    text = name.removeprefix(_PATTERN).removeprefix("^").replace(r"\.", ".").replace(r"\d+", ".*")
    ends = text.endswith("$")
    text = text.removesuffix("$")
    if _BEYOND.search(text) or len(text) > 200:
        return None
    return text.replace(".*", "*") + ("" if ends or text.endswith(".*") else "*")


def _grid(one: OneForm, outputs: int, inputs: int) -> tuple[int, int]:
    rows, columns = one.block[0] or outputs, one.block[1] or inputs
    return -(-outputs // rows), -(-inputs // columns)


def _words(numbers: int, bits: int) -> int:
    return -(-numbers * bits // _WORD_BITS)


def _packed(one: OneForm, outputs: int, inputs: int) -> Tensors:
    _, groups = _grid(one, outputs, inputs)
    tensors: Tensors = {
        "weight_packed": ("I32", (outputs, _words(inputs, one.bits))),
        "weight_scale": (one.scale, (outputs, groups)),
    }
    if one.zeros:
        tensors["weight_zero_point"] = ("I32", (_words(outputs, one.bits), groups))
    return tensors


def _of_words(one: OneForm, outputs: int, inputs: int) -> Tensors:
    groups = _grid(one, outputs, inputs)[1]
    awq = one.form is Form.AWQ
    codes = (inputs, outputs // 8) if awq else (_words(inputs, one.bits), outputs)
    tensors: Tensors = {
        "qweight": ("I32", codes),
        "qzeros": ("I32", (groups, _words(outputs, one.bits))),
        "scales": (one.scale, (groups, outputs)),
    }
    return tensors if awq else tensors | {"g_idx": ("I32", (inputs,))}


def _bytes(one: OneForm, outputs: int, inputs: int) -> Tensors:
    grid = _grid(one, outputs, inputs)
    code = "F8_E4M3" if one.form is Form.FP8 else "I8"
    tensors: Tensors = {"weight": (code, (outputs, inputs)), "weight_scale": (one.scale, grid)}
    return tensors | ({"weight_zero_point": ("I8", grid)} if one.zeros else {})


def _fours(one: OneForm, outputs: int, inputs: int) -> Tensors:
    product = one.form is Form.NVFP4_PRODUCT
    code = "U8" if one.form is Form.MXFP4 else "F8_E4M3"
    tensors: Tensors = {
        "weight" if product else "weight_packed": ("U8", (outputs, inputs // 2)),
        "weight_scale": (code, _grid(one, outputs, inputs)),
    }
    if one.form is Form.MXFP4:
        return tensors
    return tensors | {"weight_scale_2" if product else "weight_global_scale": ("F32", (1,))}


def _flat(one: OneForm, outputs: int, inputs: int) -> Tensors:
    scales = -(-outputs * inputs // (one.block[1] or 64))
    tensors: Tensors = {
        "weight": ("U8", (outputs * inputs // 2, 1)),
        "absmax": (one.scale, (scales,)),
        "quant_map": ("F32", (16,)),
    }
    if one.scale == "U8":
        tensors["nested_absmax"] = ("F32", (-(-scales // _STEP),))
        tensors["nested_quant_map"] = ("F32", (_STEP,))
    return tensors


def _rows(one: OneForm, outputs: int, inputs: int) -> Tensors:
    return {"weight": ("I8", (outputs, inputs)), "SCB": ("F32", (outputs,))}


_TENSORS: Mapping[Form, Callable[[OneForm, int, int], Tensors]] = {
    Form.PACKED: _packed,
    Form.AWQ: _of_words,
    Form.GPTQ: _of_words,
    Form.GPTQ_V2: _of_words,
    Form.FP8: _bytes,
    Form.INT8: _bytes,
    Form.NVFP4: _fours,
    Form.NVFP4_PRODUCT: _fours,
    Form.MXFP4: _fours,
    Form.BNB4: _flat,
    Form.BNB8: _rows,
}
