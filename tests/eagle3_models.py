"""Tiny EAGLE-3 heads beside tiny models, in the published layout."""

import json

import torch
from mtp_models import IDS, quiet
from safetensors.torch import load_file, save_file
from tiny import DEEP, write_model

TAPS = [0, 1, 2]  # transformers has what leaves the last one normed


def write_head(folder, target, *, change=None, tokens=None, seed=11, own_head=True, **config):
    """Write a random head for a model in `target`.

    Args:
        folder: of the head, made.
        target: folder of the model.
        change: may replace tensors, by the names of the files.
        tokens: which tokens its output head knows; None: all, and there is no map.
        seed: of the numbers.
        own_head: it has an output head.
        config: goes into config.json.
    """
    theirs = json.loads((target / "config.json").read_text())
    size, wide = theirs["hidden_size"], theirs["intermediate_size"]
    heads, keys = theirs["num_attention_heads"], theirs["num_key_value_heads"]
    dim, known = size // heads, theirs["vocab_size"]
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    raw = {name: theirs[name] for name in (*names, "vocab_size", "max_position_embeddings")}
    raw |= {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "draft_vocab_size": known if tokens is None else len(tokens),
        "torch_dtype": "float32",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": TAPS},
    }
    raw = {name: value for name, value in (raw | config).items() if value is not None}
    taps = 3
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) * 2 * columns**-0.5

    def norm():
        return 1 + 0.2 * torch.randn(size, generator=generator)

    tensors = {
        "fc.weight": matrix(size, taps * size),
        "norm.weight": norm(),
        "lm_head.weight": matrix(raw.get("draft_vocab_size", known), size),
        "midlayer.input_layernorm.weight": norm(),
        "midlayer.hidden_norm.weight": norm(),
        "midlayer.post_attention_layernorm.weight": norm(),
        "midlayer.self_attn.q_proj.weight": matrix(heads * dim, 2 * size),
        "midlayer.self_attn.k_proj.weight": matrix(keys * dim, 2 * size),
        "midlayer.self_attn.v_proj.weight": matrix(keys * dim, 2 * size),
        "midlayer.self_attn.o_proj.weight": matrix(size, heads * dim),
        "midlayer.mlp.gate_proj.weight": matrix(wide, size),
        "midlayer.mlp.up_proj.weight": matrix(wide, size),
        "midlayer.mlp.down_proj.weight": matrix(size, wide),
    }
    if tokens is not None:
        tensors["d2t"] = torch.tensor(tokens) - torch.arange(len(tokens))
        tensors["t2d"] = torch.zeros(known, dtype=torch.bool).index_fill(0, torch.tensor(tokens), 1)
    if not own_head:
        del tensors["lm_head.weight"]
    if change is not None:
        change(tensors)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    dtype = getattr(torch, raw["torch_dtype"])
    made = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(made, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_counting(folder, size=64):
    """A target that counts through a permutation: hidden states are unit vectors of the tokens."""
    sizes = {"vocab_size": size, "hidden_size": size, "intermediate_size": size}
    write_model(folder, "llama", tie_word_embeddings=False, **sizes, **DEEP, **IDS)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    quiet(tensors, "model.layers.")
    tensors["model.embed_tokens.weight"] = torch.eye(size)
    tensors["lm_head.weight"] = _step(size).clone()
    tensors["model.norm.weight"].fill_(1.0)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def counts_on(tokens, size=64):
    """Changes a head into one that knows how such a target counts.

    Of a hidden state, which is a unit vector, its MLP makes the next one: normed, that is 8 where
    it is not 0, and so silu(8) times 8 behind the gate.
    """

    def change(tensors):
        quiet(tensors, "midlayer.")
        step, one = _step(size), torch.eye(size)
        tensors["fc.weight"] = torch.cat([one, *[torch.zeros(size, size)] * 2], dim=1)
        tensors["midlayer.post_attention_layernorm.weight"].fill_(1.0)
        tensors["norm.weight"].fill_(1.0)
        tensors["midlayer.mlp.gate_proj.weight"] = one.clone()
        tensors["midlayer.mlp.up_proj.weight"] = one.clone()
        made = torch.nn.functional.silu(torch.tensor(size**0.5)) * size**0.5
        tensors["midlayer.mlp.down_proj.weight"] = (step - one) / made
        tensors["lm_head.weight"] = step[tokens].clone()

    return change


def _step(size):
    """[E, E]: takes the unit vector of a token to that of the next one."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(5))
    return torch.eye(size)[:, order]
