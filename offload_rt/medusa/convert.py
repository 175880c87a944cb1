"""Write Medusa heads in the layouts that others read.

`shared` is upstream's "version 2" (heads that use the model's output head), `tgi` what Hugging
Face's TGI loads (upstream's names, heads with or without output heads of their own), `vllm` what
vLLM loads (its own names and config.json). Biases are kept everywhere: vLLM is told of them, for it
leaves them out otherwise; upstream and TGI need them, so where there are none zeros are written.
Upstream and vLLM are Apache-2.0; only their formats are followed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import torch
from safetensors.torch import save_file

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.medusa.checkpoint import (
    CONFIG,
    FULL_MODEL,
    HEADS_FILE,
    HeadsSource,
    StoredTensor,
    base_model,
)
from offload_rt.medusa.names import COMMON_HEAD, TOKEN_MAP, HeadsShape, LmHead
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.files import open_inside
from offload_rt.model.header import TensorExtent
from offload_rt.writing import replacing, write_text, writing

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "I64": torch.int64,
    "I32": torch.int32,
}


class Layout(StrEnum):
    """How heads are written."""

    SHARED = "shared"
    TGI = "tgi"
    VLLM = "vllm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Heads in host memory.

    Attributes:
        tensors: by the names of `HeadsShape.tensors`; the token map too, if there is one.
        base: the model they were made for, if that is known.
    """

    shape: HeadsShape
    tensors: Mapping[str, torch.Tensor]
    base: str | None = None


def read_heads(source: HeadsSource) -> Heads:
    """Read heads whole, with output heads cut to the rows a token map names.

    Raises:
        CheckpointError: a file is damaged, or a number is not finite.
    """
    tensors = {}
    for name, stored in source.tensors.items():
        tensor = _tensor(source.read(name), stored)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{source.folder}: {name} holds numbers that are not finite: the heads' training "
                "went wrong or the file is damaged, get others"
            )
        tensors[name] = tensor
    heads = Heads(shape=source.names.shape, tensors=tensors, base=base_model(source.config))
    return _without_unused_rows(heads, source.folder) if TOKEN_MAP in tensors else heads


def read_output_head(model: Checkpoint) -> torch.Tensor:
    """The output head of a model, [V, E]."""
    return _of_model(model, model.head or model.embedding)


def read_output_bias(model: Checkpoint) -> torch.Tensor | None:
    """The bias of a model's output head, [V], if it has one."""
    return None if model.head_bias is None else _of_model(model, model.head_bias)


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


def write_heads(heads: Heads, folder: Path, layout: Layout) -> Path:
    """Write heads into a folder, made if it is missing; returns the file of the tensors.

    Raises:
        ConfigError: the layout cannot hold these heads, or the folder already has some.
    """
    _check_fits(heads.shape, layout)
    if layout is Layout.VLLM:
        name, tensors, config = FULL_MODEL, _vllm_tensors(heads), _vllm_config(heads)
    else:
        name, tensors, config = HEADS_FILE, _upstream_tensors(heads), _upstream_config(heads)
        if layout is Layout.SHARED:
            config = {"version": "2"} | config
    is_new = not folder.exists()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for taken in (folder / FULL_MODEL, folder / HEADS_FILE, folder / CONFIG):
        if os.path.lexists(taken):
            raise ConfigError(f"{taken} is already there: give a folder that is new or empty")
    try:
        with replacing(folder / name) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
            write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    except ConfigError:
        (folder / CONFIG).unlink(missing_ok=True)  # so that the same command may be run again
        if is_new:
            folder.rmdir()
        raise
    return folder / name


def _of_model(model: Checkpoint, extent: TensorExtent) -> torch.Tensor:
    with open_inside(model.folder, extent.path.name) as file:
        data = file.read(extent.nbytes, extent.offset)
    stored = StoredTensor(
        dtype=extent.dtype, shape=extent.shape, place=extent, file=extent.path.name
    )
    return _tensor(data, stored)


def _tensor(data: bytes, stored: StoredTensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[stored.dtype]).view(stored.shape)


def _without_unused_rows(heads: Heads, folder: Path) -> Heads:
    """Output heads of all tokens cut to those of the token map."""
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
            f"TGI takes heads without output heads of their own with 1 layer only, these have "
            f"{shape.layers}: use --to shared"
        )
    if layout is Layout.VLLM and shape.lm_head is LmHead.MODEL:
        raise ConfigError(
            "vLLM takes heads with an output head in the file, these use the model's: add --model "
            "MODEL to store its output head"
        )


def _upstream_tensors(heads: Heads) -> dict[str, torch.Tensor]:
    shape, found = heads.shape, {}
    for head in range(shape.heads):
        for layer in range(shape.layers):
            ours, theirs = f"blocks.{head}.{layer}.linear", f"{head}.{layer}.linear"
            weight = found[f"{theirs}.weight"] = heads.tensors[f"{ours}.weight"]
            zeros = weight.new_zeros(shape.hidden_size)
            found[f"{theirs}.bias"] = heads.tensors.get(f"{ours}.bias", zeros)
        if shape.lm_head is not LmHead.MODEL:
            own = COMMON_HEAD if shape.lm_head is LmHead.COMMON else f"lm_heads.{head}.weight"
            # A clone: tensors that share memory cannot be saved under two names.
            found[f"{head}.{shape.layers}.weight"] = heads.tensors[own].clone()
    return found


def _upstream_config(heads: Heads) -> dict[str, object]:
    return {
        "base_model_name_or_path": heads.base or "",
        "medusa_num_heads": heads.shape.heads,
        "medusa_num_layers": heads.shape.layers,
    }


def _vllm_tensors(heads: Heads) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in heads.tensors.items():
        if name.startswith("blocks."):
            _, head, layer, _, kind = name.split(".")
            found[f"blocks.{head}.layers.{layer}.{kind}"] = tensor
        else:
            found[name] = tensor
    return found


def _vllm_config(heads: Heads) -> dict[str, object]:
    shape = heads.shape
    tokens = int(heads.tensors[TOKEN_MAP].max()) + 1 if shape.truncated else shape.head_rows
    return {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "base_model_name_or_path": heads.base or "",
        "hidden_size": shape.hidden_size,
        "vocab_size": tokens,
        "truncated_vocab_size": shape.head_rows if shape.truncated else None,
        "num_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "medusa_fc_bias": shape.bias,
        "original_lm_head": shape.lm_head is LmHead.COMMON,
    }
