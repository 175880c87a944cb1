"""Small random Medusa heads in the layouts that are about."""

import json

import torch
from safetensors.torch import save_file

from offload_rt.speculative.medusa.heads import MedusaHeads


def random_heads(heads=3, layers=1, size=64, *, bias=True, rows=300, own=False, seed=1):
    """Tensors under upstream's names: `own` gives each head an output head."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale):
        return torch.randn(*shape, generator=generator) * scale

    found = {}
    for head in range(heads):
        for layer in range(layers):
            found[f"{head}.{layer}.linear.weight"] = normal(size, size, scale=size**-0.5)
            if bias:
                found[f"{head}.{layer}.linear.bias"] = normal(size, scale=0.5)
        if own:
            found[f"{head}.{layers}.weight"] = normal(rows, size, scale=size**-0.5)
    return found


def write_shared(folder, **options):
    """`version 2`: the model's output head serves all."""
    folder.mkdir(exist_ok=True, parents=True)
    tensors = random_heads(**options)
    save_file(tensors, folder / "medusa_lm_head.safetensors")
    config = {"version": "2", "medusa_num_heads": 2, "medusa_num_layers": 1}
    (folder / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": "tiny"}))
    return folder


def write_own(folder, **options):
    """v0.1's names with an output head each, as safetensors."""
    return write_shared(folder, own=True, **options)


def write_pickled(folder, tensors):
    """v0.1 as it was published: a pickle, and a config that says 2 heads."""
    folder.mkdir(exist_ok=True, parents=True)
    torch.save(tensors, folder / "medusa_lm_head.pt")
    config = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "tiny"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_vllm(folder, tensors, *, common=False, token_map=None, layers=1, **config):
    """vLLM's names from upstream's; `common` keeps only the first output head."""
    folder.mkdir(exist_ok=True, parents=True)
    found = {}
    for name, tensor in tensors.items():
        head, layer, *rest = name.split(".")
        if rest[0] == "linear":
            found[f"blocks.{head}.layers.{layer}.{rest[1]}"] = tensor
        elif not common or head == "0":
            found[f"lm_heads.{head}.weight"] = tensor
    if token_map is not None:
        found["token_map"] = torch.tensor(token_map)
    save_file(found, folder / "model.safetensors")
    options = {"model_type": "medusa", "original_lm_head": common} | config
    (folder / "config.json").write_text(json.dumps(options))
    return folder


def by_formula(tensors, hidden, model_head=None):
    """[K, R, V] from upstream's names: W2 (h + SiLU(W1 h + b)), block after block."""
    heads = 1 + max(int(name.split(".")[0]) for name in tensors)
    layers = 1 + max(int(n.split(".")[1]) for n in tensors if "linear" in n)
    logits = []
    for head in range(heads):
        state = hidden
        for layer in range(layers):
            inner = state @ tensors[f"{head}.{layer}.linear.weight"].T
            inner = inner + tensors.get(
                f"{head}.{layer}.linear.bias", torch.zeros(hidden.shape[-1])
            )
            state = state + inner * torch.sigmoid(inner)
        own = tensors.get(f"{head}.{layers}.weight", model_head)
        logits.append(state @ own.T)
    return torch.stack(logits)


def computed(heads, hidden, model_head=None):
    """[K, R, V] by the modules, from heads in host memory."""
    head = None if model_head is None else lambda states: states @ model_head.T
    module = MedusaHeads(heads.shape, head)
    state = {name: t for name, t in heads.tensors.items() if name != "token_map"}
    module.load_state_dict(state)
    with torch.no_grad():
        return module(hidden)
