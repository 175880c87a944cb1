#!/usr/bin/env python3
"""Write a Mixtral checkpoint that computes the same function as a small Llama one.

Benchmarks of streamed experts need gigabytes of them, routed as real ones are, and text that means
something. Every expert is the source's MLP with its neurons in another order, and the weights of a
token's experts sum to one, so any routing computes the source's function but for rounding, and
parts of two experts mixed spoil the text at once. With `--differ` experts differ in their numbers,
so that a wrong expert shows in the bits; the text then is the checkpoint's own.

Routers are made from hidden states of the source on real text: their rows are centres of clusters
of a layer's MLP inputs, in the directions that change slowest from token to token, all alike. With
`--routing easy` (128 of these directions) as many of a token's experts were the token's before,
too, as in Qwen3-30B-A3B, with `hard` (all of them) as few as in GLM-4.7-Flash (0.45 and 0.26).

Usage: python tools/make_bench_mixture.py OUT --experts 64    (5.2 G parameters, 10.3 GB)
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from make_bench_model import (
    Source,
    Tensor,
    copy_tokenizer,
    cut_in_shards,
    in_order,
    make_room,
    say,
    write_shards,
)

from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import demo_folder
from offload_rt.units import parse_size

PARTS = {"w1": "gate", "w2": "down", "w3": "up"}
ROUNDS = 25  # of k-means
LEAST_VARIANCE = 1e-6  # of the largest: directions with less are noise
COPIED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "vocab_size", "rms_norm_eps", "max_position_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "head_dim", "rope_theta"),
    *("rope_parameters", "dtype", "torch_dtype"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """What routers are like.

    Attributes:
        features: slow directions that they listen to; None: all.
        skew: power of the lengths of centres, which make shares of experts uneven; 0: all alike.
    """

    features: int | None
    skew: float


ROUTINGS = {"easy": Routing(features=128, skew=0.5), "hard": Routing(features=None, skew=0.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """What is asked for.

    Attributes:
        experts: of each layer; `top_k` of them compute a token.
        differ: relative noise on each expert's weights.
    """

    experts: int
    top_k: int
    routing: Routing
    differ: float


def mlp_inputs(source: Path, texts: Sequence[str], tokens: int) -> tuple[torch.Tensor, ...]:
    """Inputs of each layer's MLP over texts, [L, T, H], and where a text begins, [T] bool."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, kept in zip(model.model.layers, seen, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, fed, kept=kept: kept.append(fed[0][0].half()))
    begins: list[bool] = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens]
        with torch.inference_mode():
            model(ids, logits_to_keep=1)
        begins += [True] + [False] * (ids.shape[1] - 1)
    return torch.stack([torch.cat(kept) for kept in seen]), torch.tensor(begins)


def slow_directions(
    states: torch.Tensor, begins: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean [H] of states [T, H], and whitening directions [H, F].

    Slowest first: slow feature analysis, Wiskott and Sejnowski 2002.
    """
    x = states.double()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    keep = values > values.max() * LEAST_VARIANCE
    white = vectors[:, keep] / values[keep].sqrt()
    z, pair = (x - mean) @ white, ~begins[1:]
    lag = z[:-1][pair].T @ z[1:][pair] / pair.sum()
    turn = torch.linalg.eigh((lag + lag.T) / 2).eigenvectors
    return mean, white @ turn.flip(1)


def make_router(
    states: torch.Tensor, begins: torch.Tensor, mixture: Mixture, seed: int
) -> torch.Tensor:
    """A router [experts, H] whose scores have a standard deviation of 1 over the states [T, H]."""
    mean, directions = slow_directions(states, begins)
    directions = directions[:, : mixture.routing.features]
    z = (states.double() - mean) @ directions
    centres = k_means(z, mixture.experts, seed)
    lengths = centres.norm(dim=1, keepdim=True).clamp(min=1e-9)
    rows = (centres / lengths * lengths**mixture.routing.skew) @ directions.T
    rows -= (rows @ mean)[:, None] / (mean @ mean) * mean  # a router has no bias to undo the mean
    return (rows / (states.double() @ rows.T).std()).float()


def k_means(z: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Centres [count, F] of rows [T, F], begun with k-means++ (Arthur and Vassilvitskii 2007)."""
    generator = torch.Generator().manual_seed(seed)
    centres = z[torch.randint(len(z), (1,), generator=generator)]
    far = torch.full((len(z),), torch.inf, dtype=z.dtype)
    for _ in range(count - 1):
        far = torch.minimum(far, torch.cdist(z, centres[-1:])[:, 0] ** 2)
        centres = torch.cat([centres, z[torch.multinomial(far + 1e-12, 1, generator=generator)]])
    for _ in range(ROUNDS):
        own = torch.cdist(z, centres).argmin(1)
        sums = torch.zeros_like(centres).index_add_(0, own, z)
        members = torch.bincount(own, minlength=count)
        means = sums / members.clamp(min=1)[:, None]
        centres = torch.where(members[:, None] > 0, means, centres)
    return centres


class Upcycling:
    """Makes every tensor of the mixture, in the order of its modules."""

    def __init__(self, source: Source, mixture: Mixture, routers: Sequence[torch.Tensor]) -> None:
        self._source, self._mixture, self._routers = source, mixture, routers

    def tensors(self) -> Iterator[Tensor]:
        """All tensors, as files of the hub have them: expert after expert."""
        shape = self._source.shape
        yield self._kept("model.embed_tokens.weight", (shape.vocab, shape.hidden))
        query, kv = shape.heads * shape.head_size, shape.kv_heads * shape.head_size
        for layer, router in enumerate(self._routers):
            prefix = f"model.layers.{layer}."
            for part, rows in (("q", query), ("k", kv), ("v", kv)):
                yield self._kept(f"{prefix}self_attn.{part}_proj.weight", (rows, shape.hidden))
            yield self._kept(f"{prefix}self_attn.o_proj.weight", (shape.hidden, query))
            moe = f"{prefix}block_sparse_moe."
            yield self._made(f"{moe}gate.weight", tuple(router.shape), partial(_itself, router))
            for expert in range(self._mixture.experts):
                for name, part in PARTS.items():
                    size = (shape.intermediate, shape.hidden)
                    yield self._made(
                        f"{moe}experts.{expert}.{name}.weight",
                        size[::-1] if part == "down" else size,
                        partial(self._expert, layer, expert, part),
                    )
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield self._kept(f"{prefix}{norm}.weight", (shape.hidden,))
        yield self._kept("model.norm.weight", (shape.hidden,))
        if self._source.has_head:
            yield self._kept("lm_head.weight", (shape.vocab, shape.hidden))

    def _kept(self, name: str, shape: tuple[int, ...]) -> Tensor:
        return self._made(name, shape, lambda: self._source.read(name))

    def _made(self, name: str, shape: tuple[int, ...], make: Callable[[], torch.Tensor]) -> Tensor:
        return Tensor(
            name=name, shape=shape, make=lambda: make().to(self._source.dtype).contiguous()
        )

    def _expert(self, layer: int, expert: int, part: str) -> torch.Tensor:
        """A matrix of the MLP with the neurons in the order of this expert."""
        weight = self._source.read(f"model.layers.{layer}.mlp.{part}_proj.weight")
        generator = torch.Generator().manual_seed(layer * 100_003 + expert)
        order = torch.randperm(self._source.shape.intermediate, generator=generator)
        weight = weight[:, order] if part == "down" else weight[order]
        if not self._mixture.differ:
            return weight
        generator.manual_seed((layer * 100_003 + expert) * 3 + list(PARTS.values()).index(part))
        noise = torch.randn(weight.shape, generator=generator)
        return weight.float() * (1 + self._mixture.differ * noise)


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def mixture_config(source: Source, mixture: Mixture) -> dict[str, object]:
    """The config.json of the mixture."""
    kept = {key: source.config[key] for key in COPIED if key in source.config}
    return kept | {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": mixture.experts,
        "num_experts_per_tok": mixture.top_k,
        "sliding_window": None,
        "head_dim": source.shape.head_size,
        "tie_word_embeddings": not source.has_head,
    }


def write_mixture(
    out: Path, source: Source, mixture: Mixture, routers: Sequence[torch.Tensor], limit: int
) -> None:
    """Write shards, each sorted by name as safetensors does, index, tokenizer and config.json."""
    tensors = list(Upcycling(source, mixture, routers).tensors())
    shards = cut_in_shards(tensors, source.dtype.itemsize, limit)
    write_shards(out, [in_order(shard) for shard in shards], source.dtype)
    copy_tokenizer(source.folder, out)
    (out / "config.json").write_text(json.dumps(mixture_config(source, mixture), indent=2) + "\n")


def _texts(paths: Sequence[Path]) -> list[str]:
    """What routers are made from: files that are named, else this project's pages and programs."""
    root = Path(__file__).resolve().parent.parent
    found = list(paths) or sorted([*root.glob("docs/*.md"), *root.glob("tools/*.py")])
    return [path.read_text(encoding="utf-8") for path in found]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a mixture of experts that computes the same function as a small Llama."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--experts", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--top-k", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--routing", choices=ROUTINGS, default="hard", help="default: %(default)s")
    parser.add_argument(
        "--differ", type=float, default=0.0, help="relative noise on experts; default: %(default)s"
    )
    parser.add_argument("--text", type=Path, nargs="*", default=[], help="what routers hear")
    parser.add_argument(
        "--tokens", type=int, default=200, help="of each text; default: %(default)s"
    )
    parser.add_argument("--source", type=Path, help="folder of the small model; default: the demo")
    parser.add_argument("--shard-size", default="2GiB", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace the model files in OUT")
    args = parser.parse_args(argv)
    if not 1 <= args.top_k <= args.experts:
        parser.error(f"--top-k {args.top_k} is not 1 to --experts {args.experts}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    folder = demo_folder() if args.source is None else args.source
    mixture = Mixture(
        experts=args.experts,
        top_k=args.top_k,
        routing=ROUTINGS[args.routing],
        differ=args.differ,
    )
    try:
        source = Source(folder)
        limit = parse_size(args.shard_size)
        make_room(args.out, folder, force=args.force)
        states, begins = mlp_inputs(folder, _texts(args.text), args.tokens)
        say(f"routers from {len(begins)} tokens")
        routers = [make_router(own, begins, mixture, seed) for seed, own in enumerate(states)]
        write_mixture(args.out, source, mixture, routers, limit)
    except ConfigError as error:
        say(f"error: {error}")
        return 2
    except OSError as error:
        say(f"error: cannot write {args.out}: {error}")
        return 2
    print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
