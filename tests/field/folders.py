"""Copies of tiny models with other names, heads and configuration."""

import json

from safetensors.torch import load_file, save_file


def rewritten(folder, into, edit=lambda tensors: tensors, **config):
    """The same model with its tensors edited; a configured None takes the key away."""
    into.mkdir(parents=True, exist_ok=True)
    tensors = edit(load_file(folder / "model.safetensors"))
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text()) | config
    values = {key: value for key, value in values.items() if value is not None}
    (into / "config.json").write_text(json.dumps(values))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).exists():
            (into / name).write_bytes((folder / name).read_bytes())
    return into


def loaded(folder, **options):
    """The model as transformers loads it, and the names it had no tensors for."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True, **options
    )
    return model.eval(), report["missing_keys"]
