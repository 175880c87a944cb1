"""A checkpoint's sizes from transformers' own modules, for any family that can be streamed."""

from collections.abc import Callable
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


def outline_modules(
    config: ModelConfig,
    folder: Path,
    dtype: str,
    outline: Callable[[dict[str, tuple[int, ...]]], Checkpoint],
) -> Checkpoint:
    """Derive names and shapes of all tensors from the modules that would compute with them.

    Args:
        config: of the model.
        folder: where its config.json lies.
        dtype: torch's name of the tensors' format.
        outline: makes a checkpoint of shapes.

    Raises:
        CheckpointError: the family cannot be built, or not be streamed.
    """
    number = getattr(torch, dtype)
    model = build_modules(config, folder, number, attn_implementation=ATTENTION_NAME)
    shapes = dict(file_shapes(model))
    if config.tie_word_embeddings:
        heads = [f"{h}.weight" for h in read_family(config.model_type).heads.union(HEADS)]
        shapes = {name: shape for name, shape in shapes.items() if not ends_in(name, heads)}
    checkpoint = outline(shapes)
    Network(checkpoint, "auto", Packing.FILE, model)  # refuses what could not be run
    return checkpoint
