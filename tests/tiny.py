"""The tiny random models. Not in conftest.py: there are two of those."""

import json
from contextlib import nullcontext

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
# What a pass costs is its layers: more of them only where a law is of several in turn, several
# slots, or patterns of layers.
DEEP = {"num_hidden_layers": 4}


def write_model(folder, model_type="llama", *, dtype="float32", large=False, **config):
    """Write a random model of a family transformers knows; sizes it does not take are ignored.

    A `large` one is drawn once, else torch, transformers and we draw it in turn.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, **(SHAPE | config))
    with no_init_weights() if large else nullcontext():
        model = AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype))
    if large:
        model.tie_weights()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # away from one, so that a norm that is left out shows
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
        elif parameter.dim() == 2 or large:  # wide enough that the tokens of an answer differ
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    model.save_pretrained(folder)
    return folder


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_tokenizer(folder, vocab_size=SHAPE["vocab_size"]):
    """Write a byte-level tokenizer with a chat template and make `<|im_end|>` end an answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 9], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    ends = {"eos_token_id": SPECIAL.index("<|im_end|>")}
    (folder / "generation_config.json").write_text(json.dumps(ends))
    return folder
