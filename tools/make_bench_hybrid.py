#!/usr/bin/env python3
"""Write a random checkpoint of Qwen3-Next's shape whose MTP module is always right.

Benchmarks of hybrid models need gigabytes of weights, layers that keep recurrent states beside
layers that attend, and a drafter of known acceptance. Names and shapes of all tensors come from the
configuration (`offload_rt.model.outline`); the sizes of a layer are Qwen3-Next-80B-A3B's, but for
how many experts it has, and how many layers and tokens there are.

* What writes to the residual stream is zero, so the next token depends on the last one alone. All
  else is random: layers are read and computed, and experts routed, as those of any model are.
* The module's projection takes the normed embedding of the token it is fed, which is then what the
  target's output head is fed at that token. Embeddings are signs times 2^-5, whose norms are exact.

Usage: python tools/make_bench_hybrid.py OUT --experts 64    (8 layers: 2.1 G parameters, 4.3 GB)
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from make_bench_model import (
    Filler,
    Tensor,
    copy_tokenizer,
    cut_in_shards,
    in_order,
    make_room,
    say,
    write_shards,
)

from offload_rt.errors import OffloadError
from offload_rt.model.checkpoint import TensorExtent, demo_folder
from offload_rt.model.outline import outline_checkpoint
from offload_rt.speculative.mtp.checkpoint import PROJECTION, find_module
from offload_rt.units import parse_size

PERIOD = 4  # layers of which the last one attends
SHAPE: Mapping[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "rope_theta": 10_000_000,
    "max_position_embeddings": 262144,
    "full_attention_interval": PERIOD,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "num_experts_per_tok": 10,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "mtp_num_hidden_layers": 1,
}
WRITING = (".o_proj.weight", ".out_proj.weight", ".down_proj.weight")  # to the residual stream
_FROM_SOURCE = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


class Random:
    """Makes every tensor, in the order of the checkpoint.

    Args:
        filler: of random weights.
    """

    def __init__(self, filler: Filler) -> None:
        self._filler = filler

    def tensors(self, folder: Path) -> Iterator[Tensor]:
        """All tensors of the model that `config.json` of a folder describes, and its module's."""
        target = outline_checkpoint(folder)
        module = find_module(target)
        assert module is not None  # the configuration says that there is one
        for extent in target.tensors.values():
            yield self._tensor(extent)
        for extent in module.tensors.values():
            kind, _, below = extent.name.partition(".")
            yield self._tensor(extent if kind == "mtp" else replace(extent, name=f"mtp.{below}"))

    def _tensor(self, extent: TensorExtent) -> Tensor:
        name, shape = extent.name, extent.shape
        make = partial(self._filler.random, *shape)
        if name == PROJECTION:
            make = partial(_first_half, *shape)
        elif name.endswith("embed_tokens.weight"):
            make = partial(self._signs, *shape)
        elif name.endswith("linear_attn.norm.weight"):
            make = partial(torch.ones, *shape, dtype=torch.bfloat16)
        elif len(shape) == 1 or name.endswith(WRITING):  # other norms are of 1 + weight
            make = partial(torch.zeros, *shape, dtype=torch.bfloat16)
        return Tensor(name=name, shape=shape, make=make)

    def _signs(self, *shape: int) -> torch.Tensor:
        return self._filler.random(*shape).ge_(0).sub_(0.5).mul_(2.0**-4)


def _first_half(rows: int, columns: int) -> torch.Tensor:
    return torch.eye(rows, columns, dtype=torch.bfloat16)


def write_hybrid(
    out: Path, source: Path, config: Mapping[str, Any], *, seed: int, limit: int
) -> None:
    """Write shards, index, the source's tokenizer and config.json.

    Args:
        out: an empty folder.
        source: folder of a model whose tokenizer is taken.
        config: of the model, but for what depends on the tokenizer.
        seed: of the random weights.
        limit: bytes of a shard.
    """
    kept = json.loads((source / "config.json").read_text())
    raw = dict(config) | {key: kept[key] for key in _FROM_SOURCE if key in kept}
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    tensors = list(Random(Filler(seed, torch.bfloat16)).tensors(out))
    (out / "config.json").unlink()  # a folder with a configuration is complete
    shards = cut_in_shards(tensors, torch.bfloat16.itemsize, limit)
    write_shards(out, [in_order(shard) for shard in shards], torch.bfloat16)
    copy_tokenizer(source, out)
    (out / "config.json").write_text(json.dumps(raw, indent=2) + "\n")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a random model of Qwen3-Next's shape whose MTP module is always right."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    sizes = {"layers": 8, "experts": 64, "seed": 0}
    for option, default in sizes.items():
        parser.add_argument(f"--{option}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--source", type=Path, help="whose tokenizer is taken; default: the demo")
    parser.add_argument("--shard-size", default="2GiB", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace the model files in OUT")
    args = parser.parse_args(argv)
    if args.layers < PERIOD or args.layers % PERIOD:
        parser.error(f"--layers {args.layers} is no multiple of {PERIOD}")
    if args.experts < SHAPE["num_experts_per_tok"] and args.experts:
        parser.error(
            f"--experts {args.experts} is less than the {SHAPE['num_experts_per_tok']} that compute"
            " a token; 0: one MLP instead"
        )
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    source = demo_folder() if args.source is None else args.source
    sizes = {"num_hidden_layers": args.layers, "num_experts": args.experts}
    try:
        limit = parse_size(args.shard_size)
        make_room(args.out, source, force=args.force)
        write_hybrid(args.out, source, {**SHAPE, **sizes}, seed=args.seed, limit=limit)
    except OffloadError as error:
        say(f"error: {error}")
        return 2
    except (OSError, ValueError) as error:
        say(f"error: cannot write {args.out}: {error}")
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
