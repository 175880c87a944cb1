"""Tiny mixtures of experts, by how their files have the experts."""

from hybrids import DELTA
from tiny import DEEP

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"head_dim": 16, "moe_intermediate_size": 32}
SENT = {"num_experts_per_tok": 2}
NAMED = SMALL | SENT | {"num_experts": 8}
# a dense layer first, a shared expert, a router in groups, two layers of experts
ROUTED = SMALL | SENT | {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2}
ROUTED |= {"topk_group": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
}
TWO = {"num_hidden_layers": 2}
MIXTURES = {
    # w1, w2, w3 of each: gate and up are no neighbours
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    # gate_proj, up_proj, down_proj of each
    "qwen3_moe": ("qwen3_moe", SMALL | {"num_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3}),
    # a shared expert, which is computed before
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    # experts in every second layer only
    "every-second": (
        "qwen3_moe",
        SMALL | {"num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 2},
    ),
    # slices of a tensor, transposed, gate and up interleaved, biases
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    # slices of a tensor of another name
    "granitemoe": ("granitemoe", {"num_local_experts": 8, "num_experts_per_tok": 2}),
}
# Other families, whose experts come in one of these forms: what differs is beside them.
FAMILIES = {
    "aria_text": {"moe_num_experts": 8, "moe_topk": 2} | TWO,  # transposed, no biases
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 3,
    },
    "deepseek_v2": ROUTED | LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": ROUTED | LATENT,
    "glm4_moe": ROUTED,
    "glm4_moe_lite": ROUTED | LATENT | {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "solar_open": ROUTED | {"num_hidden_layers": 2},
    "dots1": ROUTED,
    "minimax_m2": SMALL | SENT | {"num_local_experts": 8} | TWO,
    "granitemoeshared": SENT | {"num_local_experts": 8, "shared_intermediate_size": 32} | TWO,
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 8, "moe_topk": 2} | TWO,
    "hy_v3": NAMED | {"num_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3},
    "flex_olmo": NAMED | TWO,
    "qwen3_next": DELTA
    | NAMED
    | {"shared_expert_intermediate_size": 32}
    | TWO
    | {"layer_types": ["linear_attention", "full_attention"]},
    "laguna": NAMED | {"num_hidden_layers": 3},
    "afmoe": NAMED | {"num_dense_layers": 1, "num_hidden_layers": 3},
    "exaone_moe": NAMED | {"n_group": 1, "topk_group": 1, "num_hidden_layers": 3},
    "cohere2_moe": NAMED | TWO,
}
MIXTURES |= {family: (family, own) for family, own in FAMILIES.items()}


def make_mixture(make_tiny, name="qwen3_moe", **config):
    """The folder of one of them."""
    family, own = MIXTURES[name]
    return make_tiny(family, **(IDS | DEEP | own | config))
