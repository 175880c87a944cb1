"""Tiny models in quantised formats, each with the plain model of the same numbers beside it.

Codes are random, so all of them occur. Dequantised numbers come from a formula in fp64, not from
what the package does: a product of a few bits and a 24-bit scale is exact there, so one rounding to
the format of the computation is the whole law.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True, slots=True)
class Twins:
    """A quantised model folder, and one of plain weights that are the same numbers."""

    folder: Path
    plain: Path


def write_twins(source, folder, convert, stated, dtype=torch.float32, keep=lambda name: False):
    """Quantise the linears of a plain model's layers.

    Args:
        source: its folder.
        folder: where both go.
        convert: [O, I] and a generator to the tensors of a module by last words, and [O, I] fp64.
        stated: quantization_config.
        dtype: of the plain weights.
        keep: names of modules that stay.
    """
    generator = torch.Generator().manual_seed(1)
    quantised, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, word = name.rpartition(".")
        plain[name] = quantised[name] = tensor
        if ".layers." in name and tensor.dim() == 2 and word == "weight" and not keep(module):
            del quantised[name]
            parts, numbers = convert(tensor.float(), generator)
            quantised |= {f"{module}.{part}": value for part, value in parts.items()}
            plain[name] = numbers.to(dtype).contiguous()
    config = json.loads((source / "config.json").read_text())
    for name, tensors, more in (
        ("quantised", quantised, {"quantization_config": stated}),
        ("plain", plain, {}),
    ):
        (folder / name).mkdir(parents=True)
        for path in source.glob("*.json"):
            (folder / name / path.name).write_bytes(path.read_bytes())
        (folder / name / "config.json").write_text(json.dumps(config | more))
        _save_aligned(tensors, folder / name / "model.safetensors")
    return Twins(folder / "quantised", folder / "plain")


def _save_aligned(tensors, path):
    """Begin tensors at multiples of 64 bytes, as memory does: fp32 kernels sum by alignment."""
    for spaces in range(0, 64, 8):
        save_file(tensors, path, metadata={"format": "pt" + " " * spaces})
        if (8 + int.from_bytes(path.read_bytes()[:8], "little")) % 64 == 0:
            return
    raise AssertionError


def random_groups(weight, generator, *, bits, groups, scale_dtype, symmetric):
    """Random codes [O, I] and zeros [O, G] from 0, scales that keep activations in range."""
    outputs, inputs = weight.shape
    top = 2**bits
    codes = torch.randint(0, top, (outputs, inputs), generator=generator)
    scales = torch.rand(outputs, groups, generator=generator) + 0.5
    scales = (scales * (4 * inputs**-0.5 / top)).to(scale_dtype)
    zeros = torch.full((outputs, groups), top // 2)
    if not symmetric:
        zeros = torch.randint(0, top, (outputs, groups), generator=generator)
    return codes, scales, zeros


def dequantised(codes, scales, zeros, index):
    """[O, I] fp64 of codes [O, I], scales and zeros [O, G] and groups [I]."""
    return (codes - zeros[:, index]).double() * scales.double()[:, index]


def streams(codes, bits):
    """[R, N] codes as little-endian bit streams of int32 words, one per row, by Python integers."""
    rows = []
    for row in codes.tolist():
        whole = sum(code << bits * at for at, code in enumerate(row))
        words = -(-len(row) * bits // 32)
        rows.append([(whole >> 32 * word & 0xFFFFFFFF) for word in range(words)])
    wide = torch.tensor(rows)
    return torch.where(wide < 2**31, wide, wide - 2**32).to(torch.int32)


def compressed_tensors(bits, group, *, symmetric=True, scale_dtype=torch.bfloat16, shuffled=False):
    """compressed-tensors pack-quantized: what converts a weight, and what config.json says."""

    def convert(weight, generator):
        outputs, inputs = weight.shape
        groups = 1 if group is None else inputs // group
        options = {"bits": bits, "groups": groups, "scale_dtype": scale_dtype}
        codes, scales, zeros = random_groups(weight, generator, symmetric=symmetric, **options)
        index = torch.arange(inputs) // (inputs // groups)
        parts = {
            "weight_packed": streams(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor([outputs, inputs]),
        }
        if not symmetric:
            parts["weight_zero_point"] = streams(zeros.t(), bits).t().contiguous()
        if shuffled:
            index = index[torch.randperm(inputs, generator=generator)]
            parts["weight_g_idx"] = index.to(torch.int32)
        return parts, dequantised(codes, scales, zeros, index)

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    weights |= {"actorder": "group"} if shuffled else {}
    stated = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return convert, stated


def awq(group):
    """AWQ "gemm" with fp16 scales."""

    def convert(weight, generator):
        outputs, inputs = weight.shape
        options = {"bits": 4, "groups": inputs // group, "scale_dtype": torch.float16}
        codes, scales, zeros = random_groups(weight, generator, symmetric=False, **options)
        index = torch.arange(inputs) // group

        def words(rows):
            """Nibble k of a word is output (0, 2, 4, 6, 1, 3, 5, 7)[k] of its eight."""
            nibbles = rows.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
            return streams(nibbles.flatten(1), 4)

        parts = {
            "qweight": words(codes.t()),
            "qzeros": words(zeros.t()),
            "scales": scales.t().contiguous(),
        }
        return parts, dequantised(codes, scales, zeros, index)

    stated = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return convert, stated | {"zero_point": True}


def gptq(bits, group, *, shuffled=False, version="gptq"):
    """GPTQ with fp16 scales; `shuffled`: as desc_act orders groups."""

    def convert(weight, generator):
        outputs, inputs = weight.shape
        options = {"bits": bits, "groups": inputs // group, "scale_dtype": torch.float16}
        codes, scales, zeros = random_groups(weight, generator, symmetric=False, **options)
        zeros = zeros.clamp(min=1)  # v1 stores one less
        index = torch.arange(inputs) // group
        if shuffled:
            index = index[torch.randperm(inputs, generator=generator)]
        parts = {
            "qweight": streams(codes, bits).t().contiguous(),
            "qzeros": streams(zeros.t() - (1 if version == "gptq" else 0), bits),
            "scales": scales.t().contiguous(),
            "g_idx": index.to(torch.int32),
        }
        return parts, dequantised(codes, scales, zeros, index)

    stated = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": shuffled}
    return convert, stated | {"checkpoint_format": version}
