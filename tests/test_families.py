"""Law 2: equal to transformers, for every family we claim, streamed and prefilled in chunks.

And the same bits where its layers are on two nodes.
"""

import sys

import pytest
import torch
from accelerate import init_empty_weights
from engines import PROMPT, all_logits, engine_for, generate, reference_model
from nodes_double import nodes_engine
from tiny import DEEP
from transformers import AutoModelForCausalLM

from offload_rt.costs.sizes import kv_bytes_per_token
from offload_rt.device.kinds import Packing
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.hf_config import build_hf_config
from offload_rt.model.modules import build_modules
from offload_rt.model.network import Network

HEAD = {"head_dim": 16}
WINDOW = {"sliding_window": 6}
MIXED = {"layer_types": ["sliding_attention", "full_attention"] * 2}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | DEEP  # as `MIXED` has kinds


def rope(kind, **options):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **options}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
YARN = rope("yarn", factor=8.0, original_max_position_embeddings=64)
FAMILIES = {
    "llama": ("llama", {}),
    "llama-untied": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-llama3": ("llama", LLAMA3),
    "llama-yarn": ("llama", YARN),
    "llama-linear": ("llama", rope("linear", factor=4.0)),
    "mistral": ("mistral", WINDOW),
    "ministral": ("ministral", HEAD | WINDOW | MIXED),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", WINDOW | MIXED | {"use_sliding_window": True}),
    "qwen3": ("qwen3", HEAD),
    "gemma2": ("gemma2", HEAD | WINDOW | MIXED),
    "gemma3": ("gemma3_text", HEAD | WINDOW | MIXED),
    "phi": ("phi", {}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "granite-whole-number": ("granite", {"attention_multiplier": 1}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7},
    ),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "glm4": ("glm4", HEAD),
    "cohere2": ("cohere2", HEAD | WINDOW | MIXED),
    "starcoder2": ("starcoder2", WINDOW),
    "exaone4": ("exaone4", HEAD | WINDOW | MIXED),
    "hunyuan": ("hunyuan_v1_dense", HEAD),
    "seed_oss": ("seed_oss", HEAD),
    "apertus": ("apertus", rope("linear", factor=2.0)),
    "beam": (
        "beam",
        HEAD
        | WINDOW
        | {"layer_types": ["full_attention", "sliding_attention"] * 2}
        | {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        | {"n_group": 1, "topk_group": 1},
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        HEAD | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "gpt_oss": (
        "gpt_oss",
        HEAD
        | WINDOW
        | MIXED
        | rope("default")
        | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "gpt_oss", "gpt_neox"])
def test_modules_are_those_that_accelerate_makes_empty(make_tiny, monkeypatch, name):
    """Which is not asked: a machine with a GPU may lack it."""
    model_type, config = FAMILIES[name]
    checkpoint = open_checkpoint(make_tiny(model_type, **(IDS | config)))
    with init_empty_weights(include_buffers=False):
        made = build_hf_config(checkpoint.config, checkpoint.folder)
        theirs = AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    ours = build_modules(checkpoint.config, checkpoint.folder, torch.bfloat16)

    def parameters(model):
        found = model.named_parameters(remove_duplicate=False)
        return {n: (p.shape, p.dtype, p.device, p.requires_grad) for n, p in found}

    assert repr(ours) == repr(theirs)
    assert parameters(ours) == parameters(theirs)
    assert all(p.is_meta and p._is_hf_initialized for p in ours.parameters())
    buffers = dict(theirs.named_buffers())
    assert buffers.keys() == dict(ours.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[n]) for n, buffer in ours.named_buffers())


def with_two_layers(config):
    """One of each kind, that take the same slot in turn."""
    kinds = {name: value[:2] for name, value in config.items() if name.endswith("layer_types")}
    return IDS | config | {"num_hidden_layers": 2} | kinds


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, make_tiny):
    model_type, config = FAMILIES[request.param]
    return make_tiny(model_type, **with_two_layers(config))


def test_logits_and_tokens_equal_transformers_and_those_of_two_nodes(family):
    reference = reference_model(family)
    with engine_for(family, resident_layers=0, slots=1) as engine, torch.no_grad():
        assert engine.placement.streamed == (0, 1)
        ours = all_logits(engine, steps=2)
        ids = torch.tensor([PROMPT + PROMPT[:2]])
        theirs = reference(ids).logits[0, len(PROMPT) - 1 :]
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
        (answer,) = generate(engine, tokens=6)
        likeliest = reference(torch.tensor([PROMPT + answer[:-1]])).logits[0].argmax(-1)
    assert answer == likeliest[len(PROMPT) - 1 :].tolist()
    with nodes_engine(family, 2, resident_layers=1) as engine:
        assert torch.equal(all_logits(engine, steps=2), ours)


def test_planned_kv_bytes_are_the_networks(family):
    checkpoint = open_checkpoint(family)
    network = Network(checkpoint, "float32", Packing.FILE)
    numbers = sum(shape.numbers_per_token for shape in network.kv_shapes)
    assert kv_bytes_per_token(checkpoint.config, 4) == 4 * numbers


def test_several_sequences_in_one_pass_equal_each_alone(make_tiny):
    folder = make_tiny("qwen2", **IDS)
    prompts = [PROMPT, PROMPT[3:5], PROMPT[::-1]]
    with engine_for(folder, prompts=prompts, slots=1, resident_layers=0) as engine:
        together = generate(engine, prompts, tokens=9)
    reference = reference_model(folder)
    for prompt, answer in zip(prompts, together, strict=True):
        alone = reference.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None
        )
        assert answer == alone[0, len(prompt) :].tolist()


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("stablelm", {}, "do not pass keywords on to their attention"),
        ("gpt2", {}, "gpt2 models cannot be streamed"),
        ("mamba", {}, "cannot"),
        ("llama", rope("dynamic", factor=2.0), "does not run on shapes alone"),
        # these would run, and compute something else: their masks say more than their attention
        (
            "qwen2_moe",
            WINDOW | MIXED | {"use_sliding_window": True, "num_experts": 4, "max_window_layers": 0},
            "give a sliding mask to an attention with window None",
        ),
        ("llama4_text", HEAD | {"attention_chunk_size": 8}, "attend by create_chunked_causal_mask"),
        ("gemma3_text", HEAD | {"use_bidirectional_attention": True}, "cannot be streamed"),
        ("diffllama", {}, "attends more than once|cannot be streamed"),
    ],
)
def test_families_that_cannot_be_streamed_are_refused_by_name(
    make_tiny, model_type, config, reason
):
    folder = make_tiny(model_type, **(IDS | config))
    with pytest.raises(CheckpointError, match=reason) as caught:
        Network(open_checkpoint(folder), "auto", Packing.FILE)
    assert "\n" not in str(caught.value)


def test_more_kv_than_the_configuration_says_is_refused(make_tiny, monkeypatch):
    monkeypatch.setattr(
        "offload_rt.engine.engine.kv_bytes_per_token", lambda config, number: number
    )
    with (
        pytest.raises(
            CheckpointError, match="llama models cannot be streamed yet: they keep 1024 bytes"
        ),
        engine_for(make_tiny("llama", **IDS)),
    ):
        pass
