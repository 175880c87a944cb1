"""Tiny models that carry a module for drafting, in the two layouts that are published."""

import json
import re

import torch
from hybrids import HYBRIDS, write_whole
from safetensors.torch import load_file, save_file
from tiny import write_model

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
}
FAMILIES = {
    "qwen3": {"head_dim": 16},
    "llama": {},
    "glm4_moe": EXPERTS,
    "deepseek_v3": EXPERTS | LATENT,
    "qwen3_5_text": HYBRIDS["qwen3_5"][1],
    "qwen3_5": {},  # whole, with vision
    "qwen3_next": HYBRIDS["qwen3_next"][1],
    "qwen3_5_moe_text": HYBRIDS["qwen3_5_moe"][1],
}
WHOLE = {"qwen3_5"}  # families whose files have more than text, and text below a name of its own
BEHIND = {
    "glm4_moe",
    "deepseek_v3",
}  # families whose module is one more layer; the others' is named mtp.*
_WORDS = {
    "enorm": "pre_fc_norm_embedding",
    "hnorm": "pre_fc_norm_hidden",
    "eh_proj": "fc",
    "shared_head.norm": "norm",
}


def write_mtp(folder, model_type="qwen3", *, change=None, seed=9, **config):
    """Write a random model with a random module; `change` may replace tensors of both.

    `change` is given all tensors by name, the module's as `module.enorm.weight` or, of its layer,
    `module.layer.self_attn.q_proj.weight`.
    """
    if model_type in WHOLE:
        write_whole(folder)
    else:
        write_model(folder, model_type, **(IDS | FAMILIES.get(model_type, {}) | config))
    raw = json.loads((folder / "config.json").read_text())
    text = raw["text_config"] if model_type in WHOLE else raw
    layers, size = text["num_hidden_layers"], text["hidden_size"]
    path = folder / "model.safetensors"
    files = {n: t for n, t in load_file(path).items() if not n.startswith("mtp.")}
    tensors = {of_text(name): tensor for name, tensor in files.items()}
    generator = torch.Generator().manual_seed(seed)

    def like(tensor):
        if tensor.dim() == 1:
            return 1 + 0.2 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        scale = 2 * tensor.shape[-1] ** -0.5
        return (scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)

    last = f"model.layers.{layers - 1}."
    made = {
        f"module.layer.{name.removeprefix(last)}": like(tensor)
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    norm = tensors["model.norm.weight"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        made[f"module.{name}.weight"] = like(norm)
    made["module.eh_proj.weight"] = like(norm.new_empty(size, 2 * size))
    tensors |= made
    if change is not None:
        change(tensors)
    behind = model_type in BEHIND
    names = {of_text(name): name for name in files}
    stored = {
        names.get(name) or stored_name(name, layers, behind): tensor
        for name, tensor in tensors.items()
    }
    if behind:
        copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
        for name, of in copies.items():
            if f"{of}.weight" in tensors:
                stored[f"model.layers.{layers}.{name}.weight"] = tensors[f"{of}.weight"].clone()
    save_file(stored, path, metadata={"format": "pt"})
    text |= {"num_nextn_predict_layers": 1} if behind else {"mtp_num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def of_text(name):
    """What a tensor is called where there is text alone."""
    return name.replace("model.language_model.", "model.")


def stored_name(name, layers, behind):
    """What a tensor is called in the files."""
    if not name.startswith("module."):
        return name
    below = name.removeprefix("module.")
    if behind:
        return f"model.layers.{layers}.{below.removeprefix('layer.')}"
    if below.startswith("layer."):
        return f"mtp.layers.0.{below.removeprefix('layer.')}"
    word = below.removesuffix(".weight")
    return f"mtp.{_WORDS[word]}.weight"


def quiet(tensors, start):
    """Have layers add nothing to the hidden state."""
    for name, tensor in tensors.items():
        if name.startswith(start) and re.search(r"\.(o_proj|down_proj)\.weight$", name):
            tensor.zero_()


def of_the_token(tensors):
    """A target whose next token depends on the last one alone, and a module that knows it.

    The module reads the token it is fed; its hidden state is then the target's.
    """
    quiet(tensors, "model.layers.")
    quiet(tensors, "module.layer.")
    size = len(tensors["module.enorm.weight"])
    tensors["module.enorm.weight"].fill_(1.0)
    both = torch.cat([torch.eye(size), torch.zeros(size, size)], dim=1)
    tensors["module.eh_proj.weight"] = both.to(tensors["module.eh_proj.weight"].dtype)
    tensors["module.shared_head.norm.weight"] = tensors["model.norm.weight"].clone()


def nearly_of_the_token(tensors):
    """The same with a module that reads hidden states too, and so is wrong now and then."""
    of_the_token(tensors)
    size = len(tensors["module.enorm.weight"])
    noise = torch.randn(size, size, generator=torch.Generator().manual_seed(2)) * 0.5 / size**0.5
    tensors["module.eh_proj.weight"][:, size:] = noise


def of_the_hidden_state(tensors):
    """A target that counts through a permutation, and a module that goes on from hidden states.

    Embeddings are unit vectors, so a hidden state is its token; the module's projection is the
    permutation, once more with each row.
    """
    quiet(tensors, "model.layers.")
    quiet(tensors, "module.layer.")
    size = len(tensors["module.enorm.weight"])
    generator = torch.Generator().manual_seed(5)
    order = torch.randperm(size, generator=generator)
    step = torch.eye(size)[:, order]  # row i of the head is hit by the token before i
    tensors["model.embed_tokens.weight"] = torch.eye(size)
    tensors["lm_head.weight"] = step.clone()
    for name in ("model.norm", "module.hnorm", "module.shared_head.norm"):
        tensors[f"{name}.weight"].fill_(1.0)
    tensors["module.eh_proj.weight"] = torch.cat([torch.zeros(size, size), step], dim=1)
