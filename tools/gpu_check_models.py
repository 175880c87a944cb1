"""Random models for `gpu_check.py`, made on the spot, on whose drafts something depends.

A draft model is the target's first layers: what the later layers add is scaled by `late`, from 1
(drafts are right by chance) to 0 (always). In a model that looks back, keys are the queries' own
projection, so that a token attends to its earlier occurrences, wherever they are: a retrieval cache
that lacks their chunks drafts wrongly.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

LOGIT_STD = 5.0  # of the output head: less, and the likeliest token is noise
LOOK_BACK = 2.0  # keys and queries times this: attention logits with a standard deviation of 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """Sizes of a Llama, and what its layers do.

    Attributes:
        late: what layers from `first` on add to the residual stream, times this.
        first: layers that a draft model has.
        looks_back: keys are made as queries are.
    """

    hidden: int = 64
    layers: int = 4
    intermediate: int = 128
    heads: int = 4
    kv_heads: int = 4
    vocab: int = 320
    positions: int = 1024
    dtype: str = "float32"
    late: float = 1.0
    first: int = 2
    looks_back: bool = False

    @property
    def head_dim(self) -> int:
        """D."""
        return self.hidden // self.heads


def write_model(folder: Path, made: Made, device: str = "cpu", layers: int | None = None) -> Path:
    """Write a checkpoint, a file for each layer; `layers` writes only the first ones.

    The same sizes give the same numbers on the same device.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = made.layers if layers is None else layers
    dtype, places = getattr(torch, made.dtype), {}

    def normal(name: str, rows: int, columns: int, scale: float) -> torch.Tensor:
        generator = torch.Generator(device).manual_seed(hash_of(name))
        found = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        return (found * scale).to(dtype)

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file({name: t.contiguous().cpu() for name, t in tensors.items()}, folder / file)
        places.update(dict.fromkeys(tensors, file))

    scale = made.hidden**-0.5
    ones = torch.ones(made.hidden, dtype=dtype)
    save(
        "ends.safetensors",
        {
            "model.embed_tokens.weight": normal("embed", made.vocab, made.hidden, 1.0),
            "model.norm.weight": ones,
            "lm_head.weight": normal("head", made.vocab, made.hidden, LOGIT_STD * scale),
        },
    )
    for layer in range(count):
        save(f"layer-{layer}.safetensors", _layer(made, layer, normal, ones))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(made, count)))
    return folder


def hash_of(name: str) -> int:
    """A seed that is the same in every process."""
    return int.from_bytes(name.encode()[-7:].ljust(7, b"."), "big")


def _layer(
    made: Made,
    layer: int,
    normal: Callable[[str, int, int, float], torch.Tensor],
    ones: torch.Tensor,
) -> dict[str, torch.Tensor]:
    kv, scale = made.kv_heads * made.head_dim, made.hidden**-0.5
    adds = scale * (made.late if layer >= made.first else 1.0)
    at = f"{layer:02d}"
    queries = normal(f"q{at}", made.hidden, made.hidden, scale)
    keys = normal(f"k{at}", kv, made.hidden, scale)
    if made.looks_back:
        queries = queries * LOOK_BACK
        keys = queries.clone()
    down = adds * (made.hidden / made.intermediate) ** 0.5
    tensors = {
        "self_attn.q_proj": queries,
        "self_attn.k_proj": keys,
        "self_attn.v_proj": normal(f"v{at}", kv, made.hidden, scale),
        "self_attn.o_proj": normal(f"o{at}", made.hidden, made.hidden, adds),
        "mlp.gate_proj": normal(f"g{at}", made.intermediate, made.hidden, scale),
        "mlp.up_proj": normal(f"u{at}", made.intermediate, made.hidden, scale),
        "mlp.down_proj": normal(f"d{at}", made.hidden, made.intermediate, down),
        "input_layernorm": ones.clone(),
        "post_attention_layernorm": ones.clone(),
    }
    return {f"model.layers.{layer}.{name}.weight": t for name, t in tensors.items()}


def _config(made: Made, layers: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": made.hidden,
        "intermediate_size": made.intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": made.heads,
        "num_key_value_heads": made.kv_heads,
        "head_dim": made.head_dim,
        "vocab_size": made.vocab,
        "max_position_embeddings": made.positions,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": made.dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
