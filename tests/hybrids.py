"""Tiny random models whose layers keep recurrent states, in the forms that families have."""

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
# Name: family of transformers, and its configuration on top of `tiny.SHAPE`.
HYBRIDS = {
    "qwen3_next": ("qwen3_next", IDS | DELTA | EXPERTS),
    "qwen3_next-dense": ("qwen3_next", IDS | DELTA | {"num_experts": 0}),
    "qwen3_5": ("qwen3_5_text", IDS | DELTA | ROPE),
    "qwen3_5_moe": ("qwen3_5_moe_text", IDS | DELTA | EXPERTS | ROPE),
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
    return make_tiny(model_type, **(own | config))
