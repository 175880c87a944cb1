"""Compare the dequantised numbers of `quantised.py` with the libraries that define the formats.

Not a test: the libraries are large, and none is needed to run this package. What was found equal is
recorded by digest in `formats_checked.json`, so that the formulas cannot drift afterwards
(`test_formats.py`).

    pip install --no-deps --target LIBS compressed-tensors bitsandbytes loguru
    pip install --no-deps --target LIBS gptqmodel logbar device-smi tokenicer threadpoolctl \\
        pypcre defuser
    PYTHONPATH=LIBS python tests/check_libraries.py [compressed-tensors bitsandbytes fp8 awq gptq]
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from quantised import CASES, digest_of, example

RECORD = Path(__file__).with_name("formats_checked.json")


def compressed_tensors(parts, stated):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    (scheme,) = stated["config_groups"].values()
    whole = QuantizationScheme.model_validate(scheme | {"format": stated["format"]})
    compressor = BaseCompressor.get_value_from_registry(stated["format"])
    return compressor.decompress(dict(parts), whole)["weight"]


def bitsandbytes(parts, stated):
    from bitsandbytes import functional

    if "SCB" in parts:
        return functional.int8_vectorwise_dequant(parts["weight"], parts["SCB"])
    facts = {name.removeprefix("weight."): t for name, t in parts.items() if name != "weight"}
    state = functional.QuantState.from_dict(facts, device=torch.device("cpu"))
    return functional.dequantize_4bit(parts["weight"], state)


def fp8(parts, stated):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    scales = parts["weight_scale_inv"]
    return Fp8Dequantize(None)._dequantize_one(
        parts["weight"], scales.view(1, 1) if scales.dim() < 2 else scales, torch.float32
    )


def awq(parts, stated):
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    words = parts["qweight"], parts["qzeros"], parts["scales"].float()
    return dequantize_gemm(*words, stated["bits"], stated["group_size"]).t()


def gptq(parts, stated):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    linear = TorchLinear(
        bits=stated["bits"],
        group_size=stated["group_size"],
        sym=False,
        desc_act=stated["desc_act"],
        in_features=parts["g_idx"].numel(),
        out_features=parts["scales"].shape[1],
        bias=False,
        register_buffers=True,
    )
    for name, tensor in parts.items():
        getattr(linear, name).copy_(tensor)
    if stated["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(linear, bits=stated["bits"], pack_dtype=torch.int32)
    linear.post_init()
    return linear.dequantize_weight().t()


LIBRARIES = {
    "compressed-tensors": ("compressed-tensors", compressed_tensors),
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
    "fp8": ("transformers", fp8),
    "awq": ("gptqmodel", awq),
    "gptq": ("gptqmodel", gptq),
}


def say(line):
    sys.stdout.write(f"{line}\n")


def main():
    methods = sys.argv[1:] or LIBRARIES.keys()
    sys.argv[1:] = []  # gptqmodel reads them
    record = json.loads(RECORD.read_text())
    for case, (_, stated) in CASES.items():
        if stated["quant_method"] not in methods:
            continue
        parts, numbers = example(case)
        library, dequantise = LIBRARIES.get(stated["quant_method"], (None, None))
        if dequantise is None:
            say(f"{case}: no library is asked")
            continue
        try:
            theirs = dequantise(parts, stated)
        except Exception as error:  # noqa: BLE001 - whatever it does not do
            say(f"{case}: {library} fails: {type(error).__name__} {str(error)[:150]}")
            continue
        ours = numbers.float().to(theirs.dtype)
        if not torch.equal(ours, theirs):
            wrong = int((ours != theirs).sum())
            say(f"{case}: DIFFERS in {wrong} of {ours.numel()} ({theirs.dtype})")
            continue
        record[case] = {
            "digest": digest_of(parts, numbers),
            "library": f"{library} {version(library)}",
            "in": str(theirs.dtype).removeprefix("torch."),
        }
        say(f"{case}: equal in {theirs.dtype}")
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
