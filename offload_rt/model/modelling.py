"""transformers' modelling as far as it is used here: the one door through which it is imported."""

from offload_rt.model.sparing import compiler_spared, import_models

with compiler_spared():
    import_models()
    from transformers import (
        AttentionInterface,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        LlamaConfig,
        PretrainedConfig,
        PreTrainedModel,
        masking_utils,
    )
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        apply_converters,
        rename_source_key,
        revert_weight_conversion,
    )
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # What families' modules import, now: once a device is open it would count as its memory.
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

__all__ = [
    "ALL_EXPERTS_FUNCTIONS",
    "AttentionInterface",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "LlamaConfig",
    "LlamaDecoderLayer",
    "LlamaRotaryEmbedding",
    "PreTrainedModel",
    "PretrainedConfig",
    "WeightConverter",
    "WeightRenaming",
    "apply_converters",
    "get_model_conversion_mapping",
    "masking_utils",
    "rename_source_key",
    "revert_weight_conversion",
]
