"""Read Medusa heads in any layout that is about, and write them in another.

Usage: python tools/convert_medusa.py HEADS [FOLDER] [--to shared|tgi|vllm] [--model MODEL]

HEADS is a folder with heads, a full model that has them inside, or a hub id in the local cache.
This is the one way to use heads that come as PyTorch files: they are read without unpickling them
(`medusa_pickles.py`). Without FOLDER it only says what the heads are made of.

`shared` is upstream's version 2, for heads that use the model's output head; `tgi` upstream's names
in safetensors, with or without output heads; `vllm` vLLM's names. vLLM wants the output head of
`--model` stored where heads have none. Exit codes are those of `offload-run`.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from medusa_pickles import PickledTensor, open_pickled

from offload_rt.errors import CheckpointError, ConfigError, OffloadError
from offload_rt.model.checkpoint import MEDUSA_PREFIX, open_checkpoint, resolve_model
from offload_rt.model.files import read_json_object, shown
from offload_rt.printable import printable
from offload_rt.speculative.medusa.checkpoint import (
    FULL_INDEX,
    FULL_MODEL,
    HEADS_FILE,
    PICKLED_HEADS,
    PICKLED_INDEX,
    PICKLED_MODEL,
    base_model,
    open_heads,
    recognise,
)
from offload_rt.speculative.medusa.names import COMMON_HEAD, TOKEN_MAP, HeadsShape, LmHead, Names
from offload_rt.speculative.medusa.storage import (
    Heads,
    Layout,
    check_finite,
    read_heads,
    read_output_head,
    tensor_of,
    write_heads,
)
from offload_rt.units import format_size

_INDEX_LIMIT_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PickledHeads:
    """Heads in PyTorch files of which the descriptions were read.

    Attributes:
        tensors: by our names; the file, and where it lies there.
        config: `config.json`; empty if there is none.
    """

    folder: Path
    names: Names
    tensors: Mapping[str, tuple[str, PickledTensor]]
    config: Mapping[str, object]

    def read(self) -> Heads:
        """Read heads whole.

        Raises:
            CheckpointError: a file is damaged, or a number is not finite.
        """
        tensors = {}
        for name, (file, place) in self.tensors.items():
            with open_pickled(self.folder, file) as archive:
                data = archive.read(self.names.stored[name])
            tensors[name] = tensor_of(data, place.dtype, place.shape)
        check_finite(tensors, self.folder)
        return Heads(shape=self.names.shape, tensors=tensors, base=base_model(self.config))


def read_any(folder: Path) -> Heads:
    """Read heads of any layout, with output heads cut to the rows a token map names.

    Raises:
        CheckpointError: there are none, or something is wrong with them.
    """
    folder = Path(os.path.abspath(folder))
    pickles = pickled_files(folder)
    heads = open_pickles(folder, pickles).read() if pickles else read_heads(open_heads(folder))
    return without_unused_rows(heads, folder) if TOKEN_MAP in heads.tensors else heads


def pickled_files(folder: Path) -> list[str]:
    """PyTorch files that hold the heads, when no safetensors file does."""
    if os.path.lexists(folder / HEADS_FILE):
        return []
    if os.path.lexists(folder / PICKLED_HEADS):
        return [PICKLED_HEADS]
    if any(os.path.lexists(folder / name) for name in (FULL_MODEL, FULL_INDEX)):
        return []
    if os.path.lexists(folder / PICKLED_INDEX):
        return _indexed_pickles(folder)
    return [PICKLED_MODEL] if os.path.lexists(folder / PICKLED_MODEL) else []


def open_pickles(folder: Path, pickles: Sequence[str]) -> PickledHeads:
    """Read what PyTorch files say of their tensors.

    Raises:
        CheckpointError: they hold no heads, or something else than tensors.
    """
    found: dict[str, tuple[str, PickledTensor]] = {}
    file_bytes = 0
    for name in pickles:
        with open_pickled(folder, name) as file:
            file_bytes += file.identity.size
            for tensor, place in file.tensors.items():
                if tensor in found:
                    raise CheckpointError(
                        f"{folder}: tensor {shown(tensor)} is in {found[tensor][0]} and in {name}: "
                        "download the heads again"
                    )
                found[tensor] = (name, place)
    names, config = recognise(folder, {n: (p.shape, p.dtype) for n, (_, p) in found.items()})
    tensors = {ours: found[stored] for ours, stored in names.stored.items()}
    claimed = sum(place.nbytes for _, place in tensors.values())
    if claimed > file_bytes:  # a small file must not make a large one
        raise CheckpointError(
            f"{folder}: the heads' tensors claim {claimed} bytes of files that have {file_bytes}: "
            "some share theirs, download the heads again"
        )
    return PickledHeads(folder=folder, names=names, tensors=tensors, config=config)


def without_unused_rows(heads: Heads, folder: Path) -> Heads:
    """Output heads of all tokens cut to those of the token map.

    Raises:
        CheckpointError: the map names rows that are not there.
    """
    shape, tensors = heads.shape, dict(heads.tensors)
    rows = tensors[TOKEN_MAP].to(torch.int64)
    if shape.head_rows == len(rows):
        return heads
    if rows.numel() == 0 or int(rows.min()) < 0 or int(rows.max()) >= shape.head_rows:
        raise CheckpointError(
            f"{folder}: token_map names rows the output heads of {shape.head_rows} rows do not "
            "have: get the heads again"
        )
    for name in tensors:
        if name.startswith("lm_head"):
            tensors[name] = tensors[name][rows].clone()
    return replace(heads, shape=replace(shape, head_rows=len(rows)), tensors=tensors)


def with_output_head(heads: Heads, output_head: torch.Tensor) -> Heads:
    """The same heads with the model's output head, [V, E], stored for all of them.

    Raises:
        ConfigError: it is that of another model.
    """
    if output_head.shape[1] != heads.shape.hidden_size:
        raise ConfigError(
            f"the heads are for a hidden state of {heads.shape.hidden_size} numbers, --model has "
            f"{output_head.shape[1]}: take the model they were made for"
        )
    shape = replace(heads.shape, lm_head=LmHead.COMMON, head_rows=output_head.shape[0])
    tensors = {**heads.tensors, COMMON_HEAD: output_head}
    return Heads(shape=shape, tensors=tensors, base=heads.base)


def convert(heads: Heads, folder: Path, layout: Layout) -> Path:
    """Write heads into a folder; returns the file of the tensors.

    Raises:
        ConfigError: the layout cannot hold these heads, or the folder already has some.
    """
    _check_fits(heads.shape, layout)
    return write_heads(heads, folder, layout)


def _check_fits(shape: HeadsShape, layout: Layout) -> None:
    """Refuse a layout that would lose something."""
    if shape.truncated and layout is not Layout.VLLM:
        raise ConfigError(
            f"the heads know {shape.head_rows} tokens by a token map, for which the {layout} "
            "layout has no place: use --to vllm"
        )
    if layout is Layout.SHARED and shape.lm_head is not LmHead.MODEL:
        raise ConfigError(
            f"the heads have output heads of their own ({shape.head_rows} rows), which the shared "
            "layout leaves out: use --to tgi or --to vllm"
        )
    if layout is Layout.TGI and shape.lm_head is LmHead.MODEL and shape.layers > 1:
        raise ConfigError(
            f"TGI loads heads without output heads of their own with 1 layer only, these have "
            f"{shape.layers}: use --to shared"
        )
    if layout is Layout.VLLM and shape.lm_head is LmHead.MODEL:
        raise ConfigError(
            "vLLM loads heads with an output head in the file, these use the model's: add --model "
            "MODEL to store its output head"
        )


def _indexed_pickles(folder: Path) -> list[str]:
    """The shards of a full model in PyTorch files that hold its heads."""
    index = read_json_object(folder, PICKLED_INDEX, _INDEX_LIMIT_BYTES).get("weight_map")
    if not isinstance(index, dict):
        raise CheckpointError(f"{folder / PICKLED_INDEX} has no weight_map: download it again")
    shards = {shard for name, shard in index.items() if name.startswith(MEDUSA_PREFIX)}
    if not shards:
        raise CheckpointError(
            f"{folder / PICKLED_INDEX} lists no tensor {MEDUSA_PREFIX}*: this model has no Medusa "
            "heads"
        )
    odd = [
        shard for shard in shards if not isinstance(shard, str) or os.path.basename(shard) != shard
    ]
    if odd:
        raise CheckpointError(f"{folder / PICKLED_INDEX} names {shown(odd[0])}, not a file name")
    return sorted(shards)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("heads")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--to", choices=list(Layout), type=Layout, default=Layout.TGI)
    parser.add_argument("--model")
    return parser.parse_args()


def _made_of(shape: HeadsShape) -> str:
    output = {
        LmHead.MODEL: "the model's output head",
        LmHead.COMMON: f"one output head of {shape.head_rows} rows for all",
        LmHead.OWN: f"an output head of {shape.head_rows} rows each",
    }[shape.lm_head]
    biases = "with" if shape.bias else "no"
    return (
        f"{shape.heads} heads of {shape.layers} layers, hidden size {shape.hidden_size}, {biases} "
        f"biases, {output}"
    )


def run(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        OffloadError: the heads cannot be read, or not be written so.
    """
    heads = read_any(resolve_model(options.heads))
    wants_head = options.to is Layout.VLLM and heads.shape.lm_head is LmHead.MODEL
    if options.model is not None and not (wants_head and options.folder is not None):
        raise ConfigError(
            "--model has no effect: it is for --to vllm of heads that use the model's output head"
        )
    print(_made_of(heads.shape))
    if options.folder is None:
        return
    if options.model is not None:
        output_head = read_output_head(open_checkpoint(resolve_model(options.model)))
        heads = with_output_head(heads, output_head)
    path = convert(heads, options.folder, options.to)
    print(f"{printable(str(path))} ({format_size(path.stat().st_size)})")


def main() -> int:
    """Run the command line; returns the exit code."""
    try:
        run(_parse())
    except OffloadError as error:
        print(f"convert_medusa: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
