"""The family's own configuration class, built from what `config.json` says."""

import logging
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from offload_rt.errors import CheckpointError
from offload_rt.model.config import ModelConfig
from offload_rt.model.sparing import import_models

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What the class calls a number that `config.py` has read without it.
_COMPARED = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_heads",
    "vocab_size": "vocab_size",
}


def build_hf_config(config: ModelConfig, folder: object) -> "PretrainedConfig":
    """Build transformers' configuration, of a text part that of the whole; imports torch.

    Raises:
        CheckpointError: the class refuses a value of the file, or reads another number than we did.
    """
    import_models()
    from transformers import AutoConfig

    if (library := logging.getLogger("transformers")).level != logging.ERROR:
        library.setLevel(logging.ERROR)  # goes through all loggers there are
    family = config.part_of or config.model_type
    raw = config.raw if config.whole is None else config.whole
    fields = {key: value for key, value in raw.items() if key != "model_type"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = AutoConfig.for_model(family, **fields)
    except Exception as error:
        raise CheckpointError(
            f"{folder}/config.json: transformers' {family} takes no such configuration: "
            f"{reason_of(error)}"
        ) from error
    text = made if config.whole is None else made.get_text_config()
    for theirs, ours in _COMPARED.items():
        found, read = getattr(text, theirs, None), getattr(config, ours)
        if isinstance(found, int) and found != read:
            raise CheckpointError(
                f"{folder}/config.json: {family} of transformers has {theirs} {found}, "
                f"here it was read as {read}: this family is not supported"
            )
    return made


def reason_of(error: Exception) -> str:
    """What an error of transformers says, on one line.

    Its first line may be an introduction that ends in a colon ("Class validation error ...:"),
    the next then is the reason. Python's words for what is None say nothing of a model: where
    that was needed does.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines.pop(0)
    text = lines[0] if lines else type(error).__name__
    if "NoneType" in text and (places := traceback.extract_tb(error.__traceback__)):
        last = places[-1]
        return f"{last.name} in {Path(last.filename).name} needs something that is not there"
    name, _, rest = text.partition(": ")
    return rest if name.endswith("Error") and name.isidentifier() and rest else text
