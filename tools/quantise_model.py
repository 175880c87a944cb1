"""Write a model folder with the linear layers quantised, in a format that others publish.

For benches: rounding is to the nearest, without data, so that text gets worse than with tools that
look at activations; bytes and speed are the same.

    python tools/quantise_model.py MODEL FOLDER --bits 4 --group 128
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

_KEPT = ("*.json", "*.txt", "*.jinja", "*.model")


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [R, N] as rows of int32, each one stream, low bits first."""
    rows, count = codes.shape
    each = 32 // bits
    if not 32 % bits and not count % each:  # whole words, in an eighth of the time
        words = torch.zeros(rows, count // each, dtype=torch.int32)
        for n in range(each):
            words |= codes[:, n::each].to(torch.int32) << n * bits
        return words
    shifts = torch.arange(bits)
    stream = (codes.long()[..., None] >> shifts & 1).view(rows, -1)
    filled = torch.nn.functional.pad(stream, (0, -stream.shape[1] % 32)).view(rows, -1, 32)
    words = (filled << torch.arange(32)).sum(-1)
    return words.where(words < 2**31, words - 2**32).to(torch.int32)


def round_groups(
    weight: torch.Tensor, bits: int, group: int | None, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round a weight [O, I] to the nearest codes.

    Returns:
        Codes [O, I] from 0, scales [O, G] in the weight's format, zero points [O, G].
    """
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    top = 2**bits - 1
    if symmetric:
        scale = groups.abs().amax(2) / (top // 2)
        zero = torch.full_like(scale, top // 2 + 1)
    else:
        low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale.clamp(min=1e-9)).round()
    scale = scale.clamp(min=1e-6).to(weight.dtype)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(0, top)
    return codes.flatten(1).to(torch.int32), scale, zero.to(torch.int32)


def compressed_tensors(
    weight: torch.Tensor, bits: int, group: int | None, symmetric: bool
) -> dict[str, torch.Tensor]:
    """The tensors of a module in compressed-tensors' pack-quantized, by the last word of names."""
    codes, scale, zero = round_groups(weight, bits, group, symmetric)
    parts = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack(zero.t(), bits).t().contiguous()
    return parts


def stated(bits: int, group: int | None, symmetric: bool) -> dict[str, object]:
    """What config.json says of such weights."""
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, **strategy}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def main() -> None:
    """Read shard by shard, write shard by shard."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=128, help="0: one scale for an output")
    parser.add_argument("--asymmetric", action="store_true")
    options = parser.parse_args()
    group, symmetric = options.group or None, not options.asymmetric
    options.folder.mkdir()
    for pattern in _KEPT:
        for path in options.model.glob(pattern):
            if not path.name.endswith(".index.json"):
                shutil.copy(path, options.folder)
    config = json.loads((options.folder / "config.json").read_text())
    config["quantization_config"] = stated(options.bits, group, symmetric)
    (options.folder / "config.json").write_text(json.dumps(config, indent=1))
    places: dict[str, str] = {}
    for path in sorted(options.model.glob("*.safetensors")):
        made: dict[str, torch.Tensor] = {}
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                tensor = file.get_tensor(name)
                module, _, word = name.rpartition(".")
                if word == "weight" and ".layers." in name and tensor.dim() == 2:
                    parts = compressed_tensors(tensor, options.bits, group, symmetric)
                    made |= {f"{module}.{part}": numbers for part, numbers in parts.items()}
                else:
                    made[name] = tensor
        save_file(made, options.folder / path.name, metadata={"format": "pt"})
        places |= dict.fromkeys(made, path.name)
    if len(set(places.values())) > 1:
        index = {"metadata": {}, "weight_map": places}
        (options.folder / "model.safetensors.index.json").write_text(json.dumps(index))


if __name__ == "__main__":
    main()
