"""Tiny random models whose layers keep recurrent states, in the forms that families have."""

from tiny import DEEP

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
ROPE = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    }
}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 64,
}
# Name: family of transformers, and its configuration on top of `tiny.SHAPE` and `tiny.DEEP`.
HYBRIDS = {
    "qwen3_next": ("qwen3_next", IDS | DELTA | EXPERTS),
    "qwen3_next-dense": ("qwen3_next", IDS | DELTA | {"num_experts": 0}),
    "qwen3_5": ("qwen3_5_text", IDS | DELTA | ROPE),
    "qwen3_5_moe": ("qwen3_5_moe_text", IDS | DELTA | EXPERTS | ROPE),
    "olmo_hybrid": ("olmo_hybrid", IDS | DELTA | {"linear_key_head_dim": 12}),
    "kimi_linear": (
        "kimi_linear",
        IDS
        | {
            "num_key_value_heads": 4,
            "layer_types": [*(["linear_attention"] * 3), "full_attention"],
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        IDS
        | {
            "head_dim": 16,
            "num_hidden_layers": None,
            "layers_block_type": ["mamba", "moe", "mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 16,
            "n_groups": 2,
            "chunk_size": 64,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        IDS
        | MAMBA
        | {
            "layer_types": ["mamba", "mamba", "attention", "mamba"],
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
        },
    ),
    "bamba": ("bamba", IDS | MAMBA | {"attn_layer_indices": [2]}),
    "falcon_h1": (
        "falcon_h1",
        IDS | MAMBA | {"head_dim": 16, "mamba_d_ssm": 64, "mamba_n_heads": 4},
    ),
    "lfm3": ("lfm3", IDS | {"head_dim": 16}),
    "lfm2": (
        "lfm2",
        IDS
        | {
            "block_auto_adjust_ff_dim": False,
            "layer_types": ["conv", "full_attention", "conv", "conv"],
        },
    ),
}


def make_hybrid(make_tiny, name, **config):
    """Write the model of that name; the same arguments give the same folder."""
    model_type, own = HYBRIDS[name]
    return make_tiny(model_type, **(DEEP | own | config))


TWO = {"num_hidden_layers": 2}
BOTH = TWO | {"layer_types": ["linear_attention", "full_attention"]}
SHORT = {
    "granitemoehybrid": TWO | {"layer_types": ["mamba", "attention"]},
    "bamba": TWO | {"attn_layer_indices": [1]},
    "falcon_h1": TWO,
    "lfm2": TWO | {"layer_types": ["conv", "full_attention"]},
}


def one_of_each(name):
    """Of a model's configuration what gives it a layer of each kind, where one can choose."""
    return BOTH if name.startswith(("qwen3", "olmo", "kimi")) else SHORT.get(name, {})


def make_short(make_tiny, name, **config):
    """The same with those layers."""
    return make_hybrid(make_tiny, name, **(one_of_each(name) | config))


JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2}
# Families that cannot run, or not yet; what the reason is the probe says.
REFUSED = {
    "jamba": ("jamba", IDS | JAMBA),
    "minimax": ("minimax", IDS | {"num_local_experts": 4}),
    "mamba": ("mamba", IDS),
    "mamba2": ("mamba2", IDS | {"num_heads": 8, "head_dim": 16}),
    "stablelm": ("stablelm", IDS),
    "gpt2": ("gpt2", IDS),
    "diffllama": ("diffllama", IDS),
    "deepseek_v3": ("deepseek_v3", IDS),
    "gemma3n_text": ("gemma3n_text", IDS),
}


def write_whole(folder):
    """Write a Qwen3.5 with vision and the module for several tokens at once beside its text."""
    import torch
    from safetensors.torch import load_file, save_file
    from tiny import SHAPE
    from transformers import AutoConfig, AutoModelForImageTextToText

    model_type, config = HYBRIDS["qwen3_5"]
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": SHAPE["hidden_size"],
        "patch_size": 4,
        "num_position_embeddings": 16,
    }
    torch.manual_seed(0)
    made = AutoConfig.for_model(
        "qwen3_5",
        text_config=SHAPE | DEEP | config | {"model_type": model_type},
        vision_config=vision,
        image_token_id=290,
        video_token_id=291,
        vision_start_token_id=292,
        vision_end_token_id=293,
    )
    model = AutoModelForImageTextToText.from_config(made).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * 2)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    width = SHAPE["hidden_size"]
    more = {"mtp.fc.weight": (width, 2 * width), "mtp.layers.0.mlp.up_proj.weight": (96, width)}
    save_file(
        load_file(path) | {n: torch.zeros(s) for n, s in more.items()}, path, {"format": "pt"}
    )
    return model
