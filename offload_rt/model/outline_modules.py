"""A checkpoint's sizes from transformers' own modules, for any family that can be streamed."""

from pathlib import Path

import torch

from offload_rt.device.kinds import Packing
from offload_rt.model.attention_function import ATTENTION_NAME
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.config import ModelConfig
from offload_rt.model.family import read_family
from offload_rt.model.modules import build_modules, file_shapes
from offload_rt.model.names import HEADS, ends_in
from offload_rt.model.network import Network
from offload_rt.model.outline import DEFAULT_DTYPE, checkpoint_of


def outline_modules(config: ModelConfig, folder: Path) -> Checkpoint:
    """Derive names and shapes of all tensors from the modules that would compute with them.

    Raises:
        CheckpointError: the family cannot be built, or not be streamed.
    """
    dtype = getattr(torch, config.dtype or DEFAULT_DTYPE)
    model = build_modules(config, folder, dtype, attn_implementation=ATTENTION_NAME)
    shapes = dict(file_shapes(model))
    if config.tie_word_embeddings:
        heads = [f"{h}.weight" for h in read_family(config.model_type).heads.union(HEADS)]
        shapes = {name: shape for name, shape in shapes.items() if not ends_in(name, heads)}
    checkpoint = checkpoint_of(folder, config, shapes)
    Network(checkpoint, "auto", Packing.FILE, model)  # refuses what could not be run
    return checkpoint
