"""Quantised weights that `config.json` says nothing of: what their tensors tell. No torch here."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.files import shown
from offload_rt.model.formats.found import PARTED, split_name
from offload_rt.model.header import TensorExtent
from offload_rt.model.kinds import READ, weights_note

_FLOATS = "compressed-tensors (float-quantized), FP8 or ModelOpt"
# The first that has such a word beside it, or is of such numbers.
_READ = (
    ("absmax", "", "bitsandbytes (4 bits)"),
    ("SCB", "", "bitsandbytes (8 bits)"),
    ("g_idx", "", "GPTQ"),
    ("weight_packed", "I32", "compressed-tensors (pack-quantized)"),
    ("weight_global_scale", "", "compressed-tensors (nvfp4-pack-quantized)"),
    ("weight_packed", "U8", "compressed-tensors (mxfp4-pack-quantized)"),
    ("weight_scale_2", "", "ModelOpt (NVFP4)"),
    ("weight_scale_inv", "", "FP8"),
    ("weight", "F8_E4M3", _FLOATS),
    ("weight_scale", "", "compressed-tensors (int-quantized)"),
)
_UNREAD = {
    "q_weight": "EXL2",
    "trellis": "EXL3",
    "W_q": "HQQ",
    "codebooks": "AQLM",
    "weight_scales": "EETQ",
    "biases": "MLX",
}


def refuse_unstated(
    folder: Path, extent: TensorExtent, tensors: Iterable[TensorExtent]
) -> CheckpointError:
    """What is said of a tensor that is no plain weight, and of no quantised one that is stated.

    Args:
        folder: the model folder.
        extent: the tensor.
        tensors: those of the files.
    """
    module, _ = split_name(extent.name)
    beside = {word: e for e in tensors for at, word in [split_name(e.name)] if at == module}
    what = f"{extent.path}, tensor {shown(extent.name)}, is {extent.dtype}"
    size = weights_note(folder)
    if method := _told(extent.name, beside):
        return CheckpointError(
            f"{what}, as weights of {method} are{size}, and config.json has no quantization_config "
            "that says so: take the config.json that these files came with"
        )
    method = next((name for word, name in _UNREAD.items() if word in beside), "")
    as_in = f"weights of {method} are" if method else "in quantised weights of an unknown method"
    return CheckpointError(f"{what}, as {as_in}{size}: {READ}, use the model it was made from")


def _told(name: str, beside: Mapping[str, TensorExtent]) -> str:
    """The method that is read whose tensors have these names; empty: none."""
    if PARTED.search(name):
        return "MXFP4"
    for word, dtype, method in _READ:
        if word in beside and dtype in ("", beside[word].dtype):
            return method
    if {"qweight", "scales"} <= beside.keys():
        columns, outputs = beside["qweight"].shape[-1:], beside["scales"].shape[-1:]
        return "GPTQ" if columns == outputs else "AWQ"
    return ""
