"""transformers' modules of a family, built without memory, and the tensors their files hold."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from offload_rt.errors import CheckpointError
from offload_rt.model.config import ModelConfig
from offload_rt.model.hf_config import build_hf_config, reason_of
from offload_rt.model.modelling import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    revert_weight_conversion,
)

_DRAWS = re.compile(r"[a-z]\w*_")  # functions of torch.nn.init that fill a tensor


def build_modules(
    config: ModelConfig, folder: Path, dtype: torch.dtype, *, attn_implementation: str = "eager"
) -> torch.nn.Module:
    """Build the modules: parameters on meta, computed buffers (rotary tables) real.

    Raises:
        CheckpointError: transformers cannot build it.
    """
    made = build_hf_config(config, folder)
    try:
        with _empty_weights(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: torch.nn.Module = _auto_class(made).from_config(
                made, dtype=dtype, attn_implementation=attn_implementation
            )
    except Exception as error:
        raise CheckpointError(
            f"{folder.name}: transformers cannot build a {config.model_type!r} model that "
            f"generates text from config.json: {reason_of(error)}"
        ) from error
    return model


@contextmanager
def _empty_weights() -> Iterator[None]:
    """Let modules be made with parameters on meta that count as filled; buffers are real.

    transformers then draws no first values for them, of which only shapes would be left, and torch
    none either: on meta some of its functions for that import its compiler (80 MiB). accelerate's
    `init_empty_weights` does the same, but a machine with a GPU alone may lack it.
    """

    def emptied(_: object, __: str, param: torch.nn.Parameter) -> torch.nn.Parameter:
        empty = torch.nn.Parameter(param.detach().to("meta"), param.requires_grad)
        empty.__dict__.update(param.__dict__, _is_hf_initialized=True)
        return empty

    # To change the class itself would have Python forget what it knows of all its subclasses.
    hook = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        with _nothing_drawn():
            yield
    finally:
        hook.remove()


@contextmanager
def _nothing_drawn() -> Iterator[None]:
    """Have the functions of torch.nn.init leave tensors on meta alone."""

    def passing(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def drawn(tensor: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
            return tensor if tensor.is_meta else draw(tensor, *args, **options)

        return drawn

    place = vars(torch.nn.init)
    saved = {name: draw for name, draw in place.items() if _DRAWS.fullmatch(name)}
    place.update({name: passing(draw) for name, draw in saved.items()})
    try:
        yield
    finally:
        place.update(saved)


def _auto_class(config: PretrainedConfig) -> Any:  # noqa: ANN401
    """Which of transformers' groups has the class that generates text, that of a whole if it can.

    Its own forward passes then decide what a prompt of text alone comes to.
    """
    if config.get_text_config() is not config:
        for group in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
            if type(config) in group._model_mapping:
                return group
    return AutoModelForCausalLM


def file_shapes(model: torch.nn.Module) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the tensors that files of this model hold.

    As transformers writes them: the experts of a layer one by one where files have them so.
    """
    state = revert_weight_conversion(model, model.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
