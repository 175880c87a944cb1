"""Tiny models in quantised formats, each with the plain model of the same numbers beside it.

Codes are random, so all of them occur. Dequantised numbers come from a formula in fp64, not from
what the package does: a product of a few bits and a 24-bit scale is exact there. It is rounded to
fp32 and then to the format of the computation, which is the whole law. The formulas were compared
with the libraries that define the formats (`tools/check_formats.py`).
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


@dataclass(frozen=True, slots=True)
class Twins:
    """A quantised model folder, and one of plain weights that are the same numbers."""

    folder: Path
    plain: Path


def write_twins(source, folder, convert, stated, dtype=torch.float32, ends=(), kept=()):
    """Quantise the linears of a plain model's layers, and ends: an embedding, a head.

    Args:
        source: its folder.
        folder: where both go.
        convert: [O, I] and a generator to the tensors of a module by last words, and [O, I] fp64;
            or such by words of modules' names.
        stated: quantization_config.
        dtype: of the plain weights.
        ends: names of modules outside of layers.
        kept: last words of names of modules that stay as they are.
    """
    generator = torch.Generator().manual_seed(1)
    quantised, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, word = name.rpartition(".")
        plain[name] = quantised[name] = tensor
        inside = ".layers." in name and tensor.dim() == 2 and word == "weight"
        inside = inside and module.rpartition(".")[2] not in kept
        if inside or (module in ends and word == "weight"):
            del quantised[name]
            one = convert[_of_module(convert, module)] if isinstance(convert, dict) else convert
            parts, numbers = one(tensor.float(), generator)
            quantised |= {f"{module}.{part}": value for part, value in parts.items()}
            plain[name] = numbers.float().to(dtype).contiguous()
    return _write(source, folder, quantised, plain, stated)


def write_gpt_oss(source, folder, dtype=torch.float32):
    """As gpt-oss is published: the experts of a layer in MXFP4, all else as it is."""
    generator = torch.Generator().manual_seed(1)
    quantised, plain = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            quantised[name] = plain[name] = tensor
            continue
        each = [fours("mxfp4")[0](one.t().float(), generator) for one in tensor]
        codes = torch.stack([parts["weight_packed"] for parts, _ in each])
        quantised[f"{name}_blocks"] = codes.unflatten(-1, (-1, 16))
        quantised[f"{name}_scales"] = torch.stack([parts["weight_scale"] for parts, _ in each])
        plain[name] = torch.stack([numbers.t() for _, numbers in each]).to(dtype).contiguous()
    stated = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    return _write(source, folder, quantised, plain, stated)


def _write(source, folder, quantised, plain, stated):
    """Both folders."""
    config = json.loads((source / "config.json").read_text())
    for name, tensors, more in (
        ("quantised", quantised, {"quantization_config": stated}),
        ("plain", plain, {}),
    ):
        (folder / name).mkdir(parents=True)
        for path in source.glob("*.json"):
            (folder / name / path.name).write_bytes(path.read_bytes())
        (folder / name / "config.json").write_text(json.dumps(config | more))
        save_aligned(tensors, folder / name / "model.safetensors")
    return Twins(folder / "quantised", folder / "plain")


def _of_module(convert, module):
    """The word of a module's name that says how it is quantised."""
    return next(word for word in convert if word in module)


def save_aligned(tensors, path):
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


def _grid(scales, block, shape):
    """Each number's scale, of scales [ceil(O / bo), ceil(I / bi)]."""
    wide = scales.double().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return wide[: shape[0], : shape[1]]


def _block(block, shape):
    """Sides of a block, None being all."""
    return tuple(side or whole for side, whole in zip(block, shape, strict=True))


def _random_scales(block, shape, generator, top):
    """fp32 scales of a grid that keep activations in range."""
    sides = [-(-whole // side) for whole, side in zip(shape, _block(block, shape), strict=True)]
    return (torch.rand(*sides, generator=generator) + 0.5) * (4 * shape[1] ** -0.5 / top)


def fp8_numbers(shape, generator):
    """Random FP8 numbers, none of them NaN."""
    codes = torch.randint(0, 256, shape, generator=generator)
    codes = torch.where(codes & 127 == 127, codes - 1, codes)
    return codes.to(torch.uint8).view(torch.float8_e4m3fn)


def grid(block, kind="float", *, scale_dtype=torch.float32, name="weight_scale", zeros=False):
    """FP8 or int8 with a scale for each block (outputs, inputs), whose shape is as stored.

    `scale_dtype` uint8: exponents of two.
    """

    def convert(weight, generator):
        shape = tuple(weight.shape)
        if kind == "float":
            codes = fp8_numbers(shape, generator)
        else:
            codes = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
        scales = _random_scales(block, shape, generator, 256 if kind == "float" else 128)
        if scale_dtype is torch.uint8:
            stored = scales.log2().round().add(127).to(torch.uint8)
            wide = torch.exp2(stored.double() - 127)
        else:
            stored = scales.to(scale_dtype)
            wide = stored.double()
        sides = _block(block, shape)
        parts = {"weight": codes, name: stored.reshape(1) if block == (None, None) else stored}
        numbers = codes.double()
        if zeros:
            offset = torch.randint(-128, 128, stored.shape, generator=generator)
            parts["weight_zero_point"] = offset.to(torch.int8)
            numbers = numbers - _grid(offset, sides, shape)
        return parts, (numbers * _grid(wide, sides, shape)).float()

    return convert


_STRATEGIES = {(None, None): "tensor", (1, None): "channel"}


def compressed_bytes(block, kind="float", *, form=None, activations=False, **options):
    """compressed-tensors float-quantized and int-quantized."""
    zeros = options.get("zeros", False)
    strategy = _STRATEGIES.get(block) or ("group" if block[0] == 1 else "block")
    weights = {"num_bits": 8, "type": kind, "symmetric": not zeros, "strategy": strategy}
    weights |= {"group_size": block[1]} if strategy == "group" else {}
    weights |= {"block_structure": list(block)} if strategy == "block" else {}
    scheme = {"targets": ["Linear"], "weights": weights}
    scheme |= {"input_activations": {"num_bits": 8, "type": kind}} if activations else {}
    return grid(block, kind, **options), _stated(form or f"{kind}-quantized", scheme)


def _stated(form, *schemes):
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {f"group_{i}": each for i, each in enumerate(schemes)},
        "ignore": ["lm_head"],
    }


def fp8(block, scale_dtype=torch.float32):
    """FP8 with blocks, as DeepSeek and Qwen publish it."""
    sides = None if block == (None, None) else list(block)
    convert = grid(block, name="weight_scale_inv", scale_dtype=scale_dtype)
    stated = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": sides}
    return convert, stated | {"modules_to_not_convert": ["lm_head"]}


def fbgemm():
    """FP8 with a scale for each output."""
    stated = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    return grid((1, None)), stated | {"modules_to_not_convert": ["lm_head"]}


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()


def fours(kind):
    """FP4: `nvfp4` and `mxfp4` of compressed-tensors, and `modelopt`."""
    size = 32 if kind == "mxfp4" else 16

    def convert(weight, generator):
        outputs, inputs = weight.shape
        codes = torch.randint(0, 16, (outputs, inputs), generator=generator)
        packed = (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)
        scales = _random_scales((1, size), (outputs, inputs), generator, 6)
        if kind == "mxfp4":
            stored = scales.log2().round().add(127).to(torch.uint8)
            parts = {"weight_packed": packed, "weight_scale": stored}
            wide = torch.exp2(stored.double() - 127)
        else:
            whole = 448 / scales.max()
            stored = (scales * whole).to(torch.float8_e4m3fn)
            if kind == "nvfp4":
                parts = {"weight_packed": packed, "weight_global_scale": whole.view(1)}
                wide = (stored.double() / whole.double()).float().double()
            else:
                parts = {"weight": packed, "weight_scale_2": 1 / whole}
                wide = (stored.double() * (1 / whole).double()).float().double()
            parts["weight_scale"] = stored
        return parts, (E2M1[codes] * _grid(wide, (1, size), weight.shape)).float()

    if kind == "modelopt":
        return convert, {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}
    strategy = "group" if kind == "mxfp4" else "tensor_group"
    weights = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": size}
    scheme = {"targets": ["Linear"], "weights": weights | {"symmetric": True}}
    return convert, _stated(f"{kind}-pack-quantized", scheme)


def modelopt_fp8():
    """ModelOpt's FP8: one scale for a weight."""
    stated = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    convert = grid((None, None))

    def scalar(weight, generator):
        parts, numbers = convert(weight, generator)
        return parts | {"weight_scale": parts["weight_scale"].reshape(())}, numbers

    return scalar, stated


# bitsandbytes 0.50.2, functional.get_4bit_type
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453)
NF4 += (-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0)
NF4 += (0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
NF4 += (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
_FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0)
_FP4 += (0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
TABLES = {"nf4": NF4, "fp4": (*_FP4, 0.0, *(-number for number in _FP4[1:]))}


def bnb4(kind="nf4", *, nested=False, dtype="bfloat16", block=64):
    """bitsandbytes with 4 bits; `nested`: scales have scales."""

    def convert(weight, generator):
        outputs, inputs = weight.shape
        table = torch.tensor(TABLES[kind])
        codes = torch.randint(0, 16, (outputs * inputs,), generator=generator)
        packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8).view(-1, 1)
        scales = _random_scales((1, block), (1, codes.numel()), generator, 1)[0]
        scales *= math.sqrt(codes.numel() / inputs)
        state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": [outputs, inputs]}
        parts = {"weight": packed, "weight.quant_map": table}
        if nested:
            offset, map2 = scales.mean().item(), torch.linspace(-1, 1, 256)
            largest = torch.rand(-(-scales.numel() // 256), generator=generator) * offset
            index = torch.randint(0, 256, scales.shape, generator=generator)
            parts |= {"weight.absmax": index.to(torch.uint8), "weight.nested_quant_map": map2}
            parts["weight.nested_absmax"] = largest
            each = largest.double().repeat_interleave(256)[: scales.numel()]
            scales = ((map2.double()[index] * each).float().double() + offset).float()
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        else:
            parts["weight.absmax"] = scales
        data = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = data
        numbers = table.double()[codes].view(-1, block) * scales.double()[:, None]
        numbers = numbers.float().to(getattr(torch, dtype)).float()
        return parts, numbers.view(outputs, inputs)

    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
    return convert, stated | {"bnb_4bit_quant_type": kind, "bnb_4bit_use_double_quant": nested}


def bnb8():
    """bitsandbytes with 8 bits."""

    def convert(weight, generator):
        codes = torch.randint(-127, 128, weight.shape, generator=generator).to(torch.int8)
        largest = _random_scales((1, None), weight.shape, generator, 1)[:, 0]
        numbers = (codes.double() * largest.double()[:, None]).float().double()
        numbers = (numbers * torch.tensor(7.874015718698502e-3).double()).float()
        parts = {"weight": codes, "SCB": largest, "weight_format": torch.zeros(1).byte()[0]}
        return parts, numbers

    return convert, {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False}


CASES = {
    "W4 g32": compressed_tensors(4, 32),
    "W4 g32 asymmetric": compressed_tensors(4, 32, symmetric=False),
    "W4 channel": compressed_tensors(4, None),
    "W8 channel": compressed_tensors(8, None),
    "W8 g16 asymmetric": compressed_tensors(8, 16, symmetric=False),
    "W3 g32": compressed_tensors(3, 32),
    "W4 g32 fp32 scales": compressed_tensors(4, 32, scale_dtype=torch.float32),
    "W4 g16 act-order": compressed_tensors(4, 16, symmetric=False, shuffled=True),
    "AWQ g32": awq(32),
    "GPTQ 4 g32": gptq(4, 32),
    "GPTQ 3 g16 act-order": gptq(3, 16, shuffled=True),
    "GPTQ 8 g32 act-order v2": gptq(8, 32, shuffled=True, version="gptq_v2"),
    "FP8 tensor": compressed_bytes((None, None)),
    "FP8 channel": compressed_bytes((1, None), activations=True),
    "FP8 channel bf16 scales": compressed_bytes((1, None), scale_dtype=torch.bfloat16),
    "FP8 block": compressed_bytes((32, 32)),
    "FP8 group": compressed_bytes((1, 32)),
    "MXFP8": compressed_bytes((1, 32), form="mxfp8-quantized", scale_dtype=torch.uint8),
    "FP8 naive": compressed_bytes((1, None), form="naive-quantized"),
    "W8A8 channel": compressed_bytes((1, None), "int", activations=True),
    "W8 tensor": compressed_bytes((None, None), "int"),
    "W8 channel bytes asymmetric": compressed_bytes(
        (1, None), "int", zeros=True, scale_dtype=torch.bfloat16
    ),
    "W8 group bytes asymmetric": compressed_bytes((1, 16), "int", zeros=True),
    "NVFP4": fours("nvfp4"),
    "MXFP4": fours("mxfp4"),
    "fp8 blocks": fp8((32, 48)),
    "fp8 blocks bf16 scales": fp8((64, 64), torch.bfloat16),
    "fp8 blocks of powers": fp8((1, 32), torch.uint8),
    "fp8 one scale": fp8((None, None)),
    "fbgemm_fp8": fbgemm(),
    "ModelOpt FP8": modelopt_fp8(),
    "ModelOpt NVFP4": fours("modelopt"),
    "nf4": bnb4(),
    "nf4 nested": bnb4(nested=True),
    "nf4 fp32": bnb4(dtype="float32"),
    "fp4 nested fp16": bnb4("fp4", nested=True, dtype="float16", block=128),
    "int8": bnb8(),
}


def mixed(modules):
    """compressed-tensors with a format for each kind of modules: words of their names to cases."""
    schemes = []
    for case in modules.values():
        stated = CASES[case][1]
        (scheme,) = stated["config_groups"].values()
        schemes.append(scheme | {"format": stated["format"]})
    return {word: CASES[case][0] for word, case in modules.items()}, _stated(
        "mixed-precision", *schemes
    )


def example(case, shape=(64, 128)):
    """The tensors of one module, and its numbers as the law has them."""
    convert, _ = CASES[case]
    return convert(torch.empty(shape), torch.Generator().manual_seed(3))


def digest_of(parts, numbers):
    """Of stored bytes and fp32 numbers."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**parts, "numbers": numbers.float()}.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
