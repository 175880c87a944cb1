"""transformers' modules of a family, built without memory, and the tensors their files hold."""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from offload_rt.errors import CheckpointError
from offload_rt.model.config import ModelConfig
from offload_rt.model.hf_config import build_hf_config, reason_of


def build_modules(
    config: ModelConfig, folder: Path, dtype: torch.dtype, *, attn_implementation: str = "eager"
) -> torch.nn.Module:
    """Build the modules: parameters on meta, computed buffers (rotary tables) real.

    Args:
        config: of the model.
        folder: names it in errors.
        dtype: of the computation.
        attn_implementation: name of a registered attention.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    made = build_hf_config(config, folder)
    try:
        with init_empty_weights(include_buffers=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                made, dtype=dtype, attn_implementation=attn_implementation
            )
    except Exception as error:
        raise CheckpointError(
            f"{folder.name}: transformers cannot build a {config.model_type!r} model that "
            f"generates text from config.json: {reason_of(error)}"
        ) from error
    return model


def file_shapes(model: torch.nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the tensors that files of this model hold.

    As transformers writes them: the experts of a layer one by one where files have them so.
    """
    state = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
