#!/usr/bin/env python3
"""Write a large Llama checkpoint that computes the same function as a small one.

Benchmarks of streaming need gigabytes of weights; tests of their output need text that means
something. Every matrix of the source model is placed in the corner of a larger one:

* The residual stream has `hidden` values, of which those past the source's are always zero: the
  embedding is padded with zeros, and so are the rows of `o_proj` and `down_proj`.
* RMSNorm over more values, most of them zero, sees a smaller mean square. Norm weights times
  sqrt(d / D) and epsilon times d / D undo that (exactly when D = 4^k d; otherwise the norm weights
  are rounded to the checkpoint's dtype once more).
* Further attention heads and feed-forward units are random, and the columns of `o_proj` and
  `down_proj` that read them are zero. Further layers have zero `o_proj` and `down_proj`: they pass
  the residual stream on unchanged.
* Columns that only ever meet zeros are random, so the weights look like weights to a compressor.

Usage: python tools/make_bench_model.py OUT --hidden 3072 --layers 30    (3.2 G parameters, 6.3 GB)
"""

import argparse
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import demo_folder
from offload_rt.units import format_size, parse_size

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)
RANDOM_STD = 0.02  # initializer_range of the Llama family
RANDOM_VALUES = 16_000_057  # a prime, so that rows of no matrix repeat in step with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a Llama network that padding can change, and those it keeps."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocab: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensor:
    """One tensor of the checkpoint: its name, its size, and how to make it when its turn comes."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], torch.Tensor]


class Source:
    """The small checkpoint, read tensor by tensor."""

    def __init__(self, folder: Path) -> None:
        try:
            self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
            self._file_of = {
                name: path
                for path in sorted(folder.glob("*.safetensors"))
                for name in _tensor_names(path)
            }
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"cannot read the source model in {folder}: {error}") from error
        self.folder = folder
        self._check()
        self.shape = Shape(
            hidden=self.config["hidden_size"],
            layers=self.config["num_hidden_layers"],
            intermediate=self.config["intermediate_size"],
            heads=self.config["num_attention_heads"],
            kv_heads=self.config["num_key_value_heads"],
            head_size=self.config.get("head_dim")
            or self.config["hidden_size"] // self.config["num_attention_heads"],
            vocab=self.config["vocab_size"],
        )
        self.has_head = "lm_head.weight" in self._file_of
        self.dtype = self.read("model.norm.weight").dtype
        if self.dtype not in DTYPES:
            raise ConfigError(f"{folder} holds {self.dtype} weights, expected bf16, fp16 or fp32")

    def _check(self) -> None:
        if (kind := self.config.get("model_type")) != "llama":
            raise ConfigError(f"{self.folder} holds a {kind!r} model, only 'llama' can be padded")
        if self.config.get("attention_bias") or self.config.get("mlp_bias"):
            raise ConfigError(f"{self.folder} holds a model with biases, which cannot be padded")
        if "model.norm.weight" not in self._file_of:
            raise ConfigError(f"{self.folder} holds no safetensors file with model.norm.weight")

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ConfigError: the checkpoint has no such tensor.
        """
        if name not in self._file_of:
            raise ConfigError(f"{self.folder} holds no tensor {name}")
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        return tensor


class Filler:
    """Random weights at the speed of a memory copy: windows of one random block."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        block = torch.randn(RANDOM_VALUES, generator=generator) * RANDOM_STD
        self._block = block.to(dtype)
        self._at = 0

    def random(self, *shape: int) -> torch.Tensor:
        """A tensor that continues where the last one ended in the random block."""
        out = torch.empty(shape, dtype=self._block.dtype)
        flat, done = out.view(-1), 0
        while done < flat.numel():
            count = min(flat.numel() - done, RANDOM_VALUES - self._at)
            flat[done : done + count] = self._block[self._at : self._at + count]
            done += count
            self._at = (self._at + count) % RANDOM_VALUES
        return out


class Padding:
    """Makes every tensor of the large network, in the order of the checkpoint."""

    def __init__(self, source: Source, target: Shape, seed: int) -> None:
        self._source, self._target = source, target
        self._filler = Filler(seed, source.dtype)

    def tensors(self) -> Iterator[Tensor]:
        """All tensors; `make` of each must be called in this order to be the same for a seed."""
        t, d = self._target, self._source.shape.hidden
        yield Tensor(
            name="model.embed_tokens.weight",
            shape=(t.vocab, t.hidden),
            make=lambda: self._zero_around("model.embed_tokens.weight", t.vocab, t.hidden),
        )
        for layer in range(t.layers):
            yield from self._layer(layer)
        yield Tensor(name="model.norm.weight", shape=(t.hidden,), make=self._norm(0, "model.norm"))
        if self._source.has_head:
            yield Tensor(
                name="lm_head.weight",
                shape=(t.vocab, t.hidden),
                make=lambda: self._random_around("lm_head.weight", t.vocab, t.hidden, d),
            )

    def _layer(self, layer: int) -> Iterator[Tensor]:
        t = self._target
        query, kv = t.heads * t.head_size, t.kv_heads * t.head_size
        reading = {  # from the residual stream
            "self_attn.q_proj": (query, t.hidden),
            "self_attn.k_proj": (kv, t.hidden),
            "self_attn.v_proj": (kv, t.hidden),
            "mlp.gate_proj": (t.intermediate, t.hidden),
            "mlp.up_proj": (t.intermediate, t.hidden),
        }
        writing = {  # to the residual stream
            "self_attn.o_proj": (t.hidden, query),
            "mlp.down_proj": (t.hidden, t.intermediate),
        }
        prefix = f"model.layers.{layer}."
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield Tensor(
                name=f"{prefix}{part}.weight",
                shape=(t.hidden,),
                make=self._norm(layer, prefix + part),
            )
        for part, shape in reading.items():
            yield self._matrix(layer, f"{prefix}{part}.weight", shape, zeros=False)
        for part, shape in writing.items():
            yield self._matrix(layer, f"{prefix}{part}.weight", shape, zeros=True)

    def _matrix(self, layer: int, name: str, shape: tuple[int, int], *, zeros: bool) -> Tensor:
        real = layer < self._source.shape.layers

        def make() -> torch.Tensor:
            if zeros:
                return self._zero_around(name if real else None, *shape)
            return self._random_around(name if real else None, *shape, self._source.shape.hidden)

        return Tensor(name=name, shape=shape, make=make)

    def _norm(self, layer: int, name: str) -> Callable[[], torch.Tensor]:
        def make() -> torch.Tensor:
            small, large = self._source.shape.hidden, self._target.hidden
            weight = torch.ones(large)
            if layer < self._source.shape.layers:
                weight[:small] = self._source.read(f"{name}.weight").float()
            return (weight * math.sqrt(small / large)).to(self._source.dtype)

        return make

    def _zero_around(self, name: str | None, rows: int, columns: int) -> torch.Tensor:
        out = torch.zeros(rows, columns, dtype=self._source.dtype)
        if name is not None:
            corner = self._source.read(name)
            out[: corner.shape[0], : corner.shape[1]] = corner
        return out

    def _random_around(
        self, name: str | None, rows: int, columns: int, corner_columns: int
    ) -> torch.Tensor:
        out = self._filler.random(rows, columns)
        if name is not None:
            corner = self._source.read(name)
            out[: corner.shape[0], :corner_columns] = corner
        return out


def target_shape(source: Shape, args: argparse.Namespace) -> Shape:
    """Check the asked sizes against the source's.

    Raises:
        ConfigError: a size is smaller than the source's, or the heads do not divide as they must.
    """
    for option, least in (
        ("hidden", source.hidden),
        ("layers", source.layers),
        ("intermediate", source.intermediate),
        ("heads", source.heads),
    ):
        if (value := getattr(args, option)) < least:
            raise ConfigError(f"--{option} {value} is less than the source model's {least}")
    group = source.heads // source.kv_heads
    if args.heads % group:
        raise ConfigError(
            f"--heads {args.heads} is not a multiple of {group},"
            " the source model's query heads per KV head"
        )
    if args.hidden % args.heads:  # LlamaConfig.validate_architecture of transformers 5.23
        raise ConfigError(
            f"--hidden {args.hidden} is not a multiple of --heads {args.heads}: transformers"
            " would refuse the model"
        )
    return Shape(
        hidden=args.hidden,
        layers=args.layers,
        intermediate=args.intermediate,
        heads=args.heads,
        kv_heads=args.heads // group,
        head_size=source.head_size,
        vocab=source.vocab,
    )


def target_config(source: Source, target: Shape) -> dict[str, Any]:
    """The config.json of the padded model."""
    eps = source.config.get("rms_norm_eps", 1e-6)  # 1e-6: LlamaConfig's own default
    config = source.config | {
        "hidden_size": target.hidden,
        "num_hidden_layers": target.layers,
        "intermediate_size": target.intermediate,
        "num_attention_heads": target.heads,
        "num_key_value_heads": target.kv_heads,
        "head_dim": target.head_size,
        "rms_norm_eps": eps * source.shape.hidden / target.hidden,
        "tie_word_embeddings": not source.has_head,
    }
    config.pop("_model_name_or_path", None)
    return config


def cut_in_shards(
    tensors: Sequence[Tensor], item_size: int, limit_bytes: int
) -> list[list[Tensor]]:
    """Group tensors in order, each group within the limit unless one tensor alone exceeds it."""
    shards: list[list[Tensor]] = [[]]
    used = 0
    for tensor in tensors:
        nbytes = math.prod(tensor.shape) * item_size
        if shards[-1] and used + nbytes > limit_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += nbytes
    return shards


def in_order(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Sorted by name, as safetensors sorts those of one number format."""
    return sorted(tensors, key=lambda tensor: tensor.name)


def write_shard(path: Path, tensors: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Write a safetensors file with one tensor in memory at a time.

    The format: length of the header (8 bytes, little endian), JSON header padded with spaces to a
    multiple of 8, tensor bytes in the header's order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        end = at + math.prod(tensor.shape) * dtype.itemsize
        header[tensor.name] = {
            "dtype": DTYPES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            made = tensor.make()
            assert made.shape == tensor.shape and made.dtype == dtype
            file.write(made.view(-1).view(torch.uint8).numpy().data)


def write_shards(out: Path, shards: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> None:
    """Write safetensors files, and their index if they are several.

    Raises:
        ConfigError: the disk has no room for them.
    """
    total = sum(math.prod(tensor.shape) for tensor in chain(*shards)) * dtype.itemsize
    if total > (free := shutil.disk_usage(out).free):
        raise ConfigError(
            f"the model takes {format_size(total)}, {out} has {format_size(free)} free"
        )
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors"
        if len(shards) > 1:
            name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        say(f"writing {name} ({number} of {len(shards)}, {format_size(total)} in all)")
        write_shard(out / name, shard, dtype)
        weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copy the files of a model's tokenizer."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def write_checkpoint(out: Path, source: Source, target: Shape, seed: int, limit: int) -> None:
    """Write shards, index and tokenizer, then config.json: a folder with a config is complete."""
    tensors = list(Padding(source, target, seed).tensors())
    write_shards(out, cut_in_shards(tensors, source.dtype.itemsize, limit), source.dtype)
    copy_tokenizer(source.folder, out)
    config = json.dumps(target_config(source, target), indent=2) + "\n"
    (out / "config.json").write_text(config)


def make_room(out: Path, source: Path, *, force: bool) -> None:
    """Create the folder `out`; with `force`, remove the model files of an earlier run from it.

    Raises:
        ConfigError: `out` is not an empty folder and `force` is not given, or it is the source.
    """
    if out.resolve() == source.resolve():
        raise ConfigError(f"{out} is the source model itself: choose another folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file: choose another name")
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not force:
        raise ConfigError(f"{out} is not empty: choose another folder, or add --force")
    for pattern in ("config.json", "*.safetensors", "*.safetensors.index.json"):
        for old in out.glob(pattern):
            old.unlink()


def say(text: str) -> None:
    """Write a line of progress to stderr."""
    print(f"make_bench_model: {text}", file=sys.stderr, flush=True)


def _tensor_names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Write a large Llama checkpoint that computes the same function as a small one."
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    sizes = {"hidden": 3072, "layers": 30, "intermediate": 8192, "heads": 48, "seed": 0}
    for option, default in sizes.items():
        parser.add_argument(f"--{option}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--source", type=Path, help="folder of the small model; default: the demo")
    parser.add_argument("--shard-size", default="2GiB", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="replace the model files in OUT")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parse(argv)
    folder = demo_folder() if args.source is None else args.source
    try:
        limit = parse_size(args.shard_size)
        if args.source is None and not (folder / "config.json").is_file():
            raise ConfigError(
                f"no demo model in {folder}: run tools/fetch_demo_model.py, or name --source"
            )
        source = Source(folder)
        target = target_shape(source.shape, args)
        make_room(args.out, folder, force=args.force)
        write_checkpoint(args.out, source, target, args.seed, limit)
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
