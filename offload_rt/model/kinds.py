"""Kinds of weights that are not read, recognised before anything is computed from their sizes.

A quantised checkpoint has the `config.json` of its original with one key more, or one file more
beside it. Whoever overlooks that plans 16-bit weights which are not there.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from offload_rt.model.files import read_json_object, shown
from offload_rt.model.formats.methods import READ_METHODS
from offload_rt.units import format_size

READ = f"bf16, fp16 and fp32 weights in safetensors files are read, and {READ_METHODS}"
KEYS = ("quantization", "quantization_config", "compression_config")
# What older tools leave beside a config.json that says nothing.
_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}
_METHODS = {"hf_quant_config.json": "modelopt"}
_FILE_LIMIT_BYTES = 2**20
_NAMES = {
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
    "mxfp8": "MXFP8",
    "nvfp4": "NVFP4",
    "modelopt": "ModelOpt",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "eetq": "EETQ",
    "vptq": "VPTQ",
    "spqr": "SpQR",
    "quanto": "Quanto",
    "torchao": "torchao",
    "quark": "Quark",
    "bitnet": "BitNet",
    "higgs": "HIGGS",
    "fp_quant": "FP-Quant",
    "compressed-tensors": "compressed-tensors",
    "gguf": "GGUF",
    "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound",
}
_BITS = ("bits", "w_bit", "num_bits", "nbits", "weight_bits")
_UNKNOWN = "of an unknown method"
_ORIGINAL = {"MXFP4", "FP8"}  # often published so: there may be no 16-bit original


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of quantised weights.

    Attributes:
        name: as people call it.
        bits: of a weight, or None where nothing says.
        said: what says so.
        stated: what it says; None where that is a file beside config.json that says too little.
    """

    name: str
    bits: float | None
    said: str
    stated: object = field(default=None, compare=False)

    def __str__(self) -> str:
        return self.name if self.bits is None else f"{self.name}, {self.bits:g}-bit"

    @property
    def instead(self) -> str:
        """What to take in its place."""
        if self.name in _ORIGINAL:
            return "take a bf16 copy of this model"
        return "take the model it was made from"


def find_kind(folder: Path, raw: Mapping[str, object]) -> Kind | None:
    """The kind of quantised weights that a model folder holds, or None.

    Args:
        folder: the model folder; only names are looked at.
        raw: its `config.json`, or the part of it about the text model.
    """
    for key in KEYS:
        if (stated := raw.get(key)) is not None:
            name = _name(key, stated)
            said = f"{key} in config.json"
            return Kind(name, _bits(stated), said, stated) if name else None
    for name, kind in _FILES.items():
        if os.path.lexists(folder / name):
            return Kind(kind, None, name, _stated_beside(folder, name))
    return None


def _stated_beside(folder: Path, name: str) -> object:
    """What a file beside config.json says, in its words; of some tools alone it is enough."""
    method = _METHODS.get(name)
    if method is None:
        return None
    return read_json_object(folder, name, _FILE_LIMIT_BYTES) | {"quant_method": method}


def weights_note(folder: Path) -> str:
    """Size of the weight files of a folder as part of a sentence; empty where there are none."""
    sizes = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith((".safetensors", ".gguf", ".packed")) and entry.is_file():
                    sizes.append(entry.stat().st_size)
    except OSError:
        return ""
    return f", {format_size(sum(sizes))} here" if sizes else ""


def _name(key: str, stated: object) -> str | None:
    """What a kind is called; None where its key says that nothing is quantised."""
    if not isinstance(stated, dict):
        return _UNKNOWN
    method = stated.get("quant_method") or stated.get("quant_algo")
    if key == "quantization" and method is None:
        return "MLX"  # mlx-lm writes both keys, the second without a method
    if method == "bitsandbytes" or "load_in_4bit" in stated or "load_in_8bit" in stated:
        # both switches off: left over from training, and what is stored is as it was
        loaded = stated.get("load_in_4bit"), stated.get("load_in_8bit")
        return None if loaded == (False, False) else "bitsandbytes"
    return _NAMES.get(str(method).lower(), shown(method)) if method else _UNKNOWN


def _bits(stated: object) -> float | None:
    """Bits of a weight, wherever a kind's settings have them."""
    waiting = [stated]
    while waiting:
        value = waiting.pop()
        if not isinstance(value, dict):
            continue
        for key in _BITS:
            bits = value.get(key)
            if isinstance(bits, int | float) and not isinstance(bits, bool) and 0 < bits <= 16:
                return float(bits)
        if value.get("load_in_4bit") is True:
            return 4.0
        if value.get("load_in_8bit") is True:
            return 8.0
        waiting.extend(value.values())
    return None
