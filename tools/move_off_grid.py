#!/usr/bin/env python3
"""Write a checkpoint whose weights lie on no grid of 4 bits any more.

Files that were made from 4-bit ones (GGUF Q4, AWQ, GPTQ) hold at most 16 different numbers in each
group of inputs. Rounded to 4 bits again they lose nothing, so whatever is measured of 4-bit copies
would be too good. Noise of up to half a step either way takes that away: the new weights are as far
from the old ones as rounding takes weights that were never on a grid. Groups with more numbers are
left as they are.

Usage: python tools/move_off_grid.py MODEL OUT
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GROUP, NUMBERS = 32, 16  # inputs of a group, and different numbers of 4 bits
BLOCK_ROWS = 512  # moved at once


def moved(weight: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, int]:
    """A weight [O, I] with noise where it is on a grid, and how many of its groups were."""
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        return weight, 0
    made, count = weight.clone(), 0
    for start in range(0, len(weight), BLOCK_ROWS):
        groups = weight[start : start + BLOCK_ROWS].float().unflatten(1, (-1, GROUP))
        gaps = groups.sort(dim=2).values.diff(dim=2)
        on_grid = (gaps > 0).sum(dim=2) < NUMBERS
        step = (groups.amax(dim=2) - groups.amin(dim=2)) / (NUMBERS - 1)
        noise = torch.rand(groups.shape, generator=generator) - 0.5
        groups += noise * (step * on_grid)[:, :, None]
        made[start : start + BLOCK_ROWS] = groups.flatten(1).to(weight.dtype)
        count += int(on_grid.sum())
    return made, count


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(description="Move the weights of a model off a 4-bit grid.")
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, empty or new")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.out.exists() and any(args.out.iterdir()):
        print(f"move_off_grid: {args.out} is not empty: choose another folder", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    generator, groups, on_grid = torch.Generator().manual_seed(args.seed), 0, 0
    for path in sorted(args.model.iterdir()):
        if path.suffix != ".safetensors":
            if path.is_file():
                shutil.copyfile(path, args.out / path.name)
            continue
        tensors = {}
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no dict
                tensors[name], count = moved(file.get_tensor(name), generator)
                groups, on_grid = groups + tensors[name].numel() // GROUP, on_grid + count
        save_file(tensors, args.out / path.name, metadata={"format": "pt"})
    print(f"{args.out}: {on_grid} of {groups} groups of {GROUP} were on a grid and moved")
    return 0


if __name__ == "__main__":
    sys.exit(main())
