"""The tiny random models. Not in conftest.py: there are two of those."""

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def write_model(folder, model_type="llama", *, dtype="float32", **config):
    """Write a random model of a family transformers knows; sizes it does not take are ignored."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, **(SHAPE | config))
    model = AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype))
    for name, parameter in model.named_parameters():
        if "norm" in name:  # away from one, so that a norm that is left out shows
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif parameter.dim() == 2:  # wide enough that the tokens of an answer differ
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    model.save_pretrained(folder)
    return folder
