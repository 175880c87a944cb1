"""Tiny mixtures of experts, by how their files have the experts."""

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {"head_dim": 16, "moe_intermediate_size": 32}
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


def make_mixture(make_tiny, name="qwen3_moe", **config):
    """The folder of one of them."""
    family, own = MIXTURES[name]
    return make_tiny(family, **(IDS | own | config))
