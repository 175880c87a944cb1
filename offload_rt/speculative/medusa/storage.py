"""Medusa heads in host memory: read from safetensors files, written in the layouts runs load.

- `shared` is upstream's "version 2": heads that use the model's output head.
- `tgi` is what Hugging Face's TGI loads: upstream's names, with or without output heads.
- `vllm` is what vLLM loads: its own names and config.json.

Biases are kept everywhere. vLLM is told of them, for it leaves them out otherwise. Upstream and TGI
need them, so where there are none zeros are written. Upstream and vLLM are Apache-2.0; only their
formats are followed.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
from safetensors.torch import save_file

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.files import read_part
from offload_rt.model.header import TensorExtent
from offload_rt.speculative.medusa.checkpoint import (
    CONFIG,
    FULL_MODEL,
    HEADS_FILE,
    HeadsCheckpoint,
    base_model,
)
from offload_rt.speculative.medusa.names import COMMON_HEAD, TOKEN_MAP, HeadsShape, LmHead
from offload_rt.writing import replacing, write_text, writing

# By the names that safetensors has for them.
DTYPES = {
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


def read_heads(checkpoint: HeadsCheckpoint) -> Heads:
    """Read heads whole.

    Raises:
        CheckpointError: a file changed, or a number is not finite.
    """
    tensors = {name: read_tensor(checkpoint.folder, e) for name, e in checkpoint.extents.items()}
    check_finite(tensors, checkpoint.folder)
    return Heads(shape=checkpoint.names.shape, tensors=tensors, base=base_model(checkpoint.config))


def check_finite(tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Refuse heads with numbers that are NaN or infinite.

    Raises:
        CheckpointError: there is one.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{folder}: {name} holds numbers that are not finite: the heads' training went "
                "wrong or the file is damaged, get others"
            )


def read_output_head(model: Checkpoint) -> torch.Tensor:
    """The output head of a model, [V, E]."""
    head = model.head or model.embedding
    if model.stored_ends and not head.nbytes:
        raise ConfigError(
            f"heads begin as the output head of {model.name}, which is quantised: train them with "
            "the model it was made from"
        )
    return read_tensor(model.folder, head)


def read_output_bias(model: Checkpoint) -> torch.Tensor | None:
    """The bias of a model's output head, [V], if it has one."""
    return None if model.head_bias is None else read_tensor(model.folder, model.head_bias)


def tensor_of(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor of stored bytes; `dtype` is a safetensors name."""
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]).view(shape)


def write_heads(heads: Heads, folder: Path, layout: Layout) -> Path:
    """Write heads into a folder, made if it is missing; returns the file of the tensors.

    The layout is one that holds these heads: only `vllm` has a place for a token map, and
    `shared` has none for output heads.

    Raises:
        ConfigError: the folder already has heads.
    """
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


def read_tensor(folder: Path, extent: TensorExtent) -> torch.Tensor:
    """A tensor of a folder's files.

    Raises:
        CheckpointError: a file cannot be read, or changed.
    """
    data = read_part(folder, extent.path.name, extent.nbytes, extent.offset)
    return tensor_of(data, extent.dtype, extent.shape)


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
