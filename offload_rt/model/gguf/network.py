"""What network a GGUF file holds: its `config.json`, and what transformers calls its tensors.

llama.cpp numbers layers as `blk.N` and says sizes by the name of an architecture. It keeps the rows
of queries and keys of `llama` in another order than transformers: one of each half of a head by
turns (`Stored.heads`). Factors of rotary frequencies are tensors there and numbers here. Matrices
of all experts of a layer are one tensor there, and so of many names here. Norms of Gemma have the
one in them that transformers adds.
"""

import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.files import read_part, shown
from offload_rt.model.gguf.container import GgufTensor, Value
from offload_rt.model.gguf.types import READ_TYPES
from offload_rt.units import format_size

ARCHITECTURE = "general.architecture"
_CONFIG = Mapping[str, object]

_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_TOP = {
    _EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    _HEAD: "lm_head.weight",
}
_FREQUENCIES = "rope_freqs.weight"  # of llama
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"  # of phi3
_SETTINGS = (_FREQUENCIES, _LONG, _SHORT)
_LAYER = re.compile(
    r"blk\.(?P<layer>0|[1-9][0-9]{0,3})\.(?P<part>\w+)(?:\.(?P<expert>0|[1-9][0-9]{0,3}))?"
    r"\.(?P<word>weight|bias)"
)
_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_GATED = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PLAIN = _NORMS | _ATTENTION | _GATED
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_EACH = "{}"  # the number of an expert
_OF_EXPERTS = "_exps."  # in the name of a tensor of all
_EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": f"mlp.experts.{_EACH}.gate_proj",
    "ffn_up_exps": f"mlp.experts.{_EACH}.up_proj",
    "ffn_down_exps": f"mlp.experts.{_EACH}.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": f"block_sparse_moe.experts.{_EACH}.w1",
    "ffn_up_exps": f"block_sparse_moe.experts.{_EACH}.w3",
    "ffn_down_exps": f"block_sparse_moe.experts.{_EACH}.w2",
}
_SHARED = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_GEMMA = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Layers of the largest Gemma of each kind, whose queries are scaled by another size than others'.
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
_GEMMA_LOCAL_BASE = 10000.0  # of Gemma 3's rotary positions in sliding layers
_EXPERTS_LIMIT = 2**12
_FACTORS_LIMIT = 2**13
_PATTERN_LIMIT, _LAYERS_LIMIT = 2**10, 10**4
_SCALING = ("type", "factor", "original_context_length", "finetuned")  # what is known of it
# Llama 3.1 and 3.2: what their published configurations have, from which files have factors only.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_NEAR = 1e-5  # of factors that went through fp32


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family that is read.

    Attributes:
        model_type: as transformers names it.
        parts: of a layer, by their names there.
        biased: those that have a bias.
        paired: rows of queries and keys come in pairs.
        raised: norms have the one in them that transformers adds.
        more: settings beyond those of all.
    """

    model_type: str
    parts: Mapping[str, str] = field(default_factory=lambda: _PLAIN)
    biased: Sequence[str] = ()
    paired: bool = False
    raised: bool = False
    more: Callable[["_Settings"], _CONFIG] = lambda settings: {}


class _Settings:
    """A file's metadata, with checks that name key and value."""

    def __init__(
        self, path: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]
    ) -> None:
        self.path, self.metadata = path, metadata
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.architecture = self.text(ARCHITECTURE)

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what}")

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self.error(f"{key} is {shown(value)}, expected a name: take another conversion")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number of the architecture; its range is checked with all of `config.json`."""
        value = self._of(key, default)
        if type(value) is not int:
            words = "one for each layer" if isinstance(value, tuple) else shown(value)
            raise self.error(
                f"{self.architecture}.{key} is {words}, read is one whole number: this network is "
                "not supported"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._of(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(f"{self.architecture}.{key} is {shown(value)}, expected a number")
        return value

    def has(self, key: str) -> bool:
        return self._of(key, None) is not None

    def scaling(self) -> str:
        """The kind of rotary scaling.

        Raises:
            CheckpointError: there are settings of it that are not known here.
        """
        begin = f"{self.architecture}.rope.scal"
        for key in self.metadata:
            if key.startswith(begin) and key.rpartition(".")[2] not in _SCALING:
                raise self.error(f"has {shown(key)}, which is not known here: not supported")
        return self.text(f"{self.architecture}.rope.scaling.type", "none")

    def sliding(self, layers: int, default: int) -> list[bool]:
        """Which layers have a window: stated of each, or all but one in so many."""
        key = "attention.sliding_window_pattern"
        stated = self._of(key, default)
        if isinstance(stated, tuple) and len(stated) == layers:
            return [bool(each) for each in stated]
        every = self.whole(key, default)
        if not 1 <= every <= _PATTERN_LIMIT or layers > _LAYERS_LIMIT:
            raise self.error(f"has one layer in {every} of {layers} that sees all: not supported")
        return [(layer + 1) % every > 0 for layer in range(layers)]

    def factors(self, name: str, count: int) -> list[float]:
        """The numbers of a small tensor.

        Raises:
            CheckpointError: it is of another size, or holds what is no factor.
        """
        tensor = self.tensors[name]
        if tensor.type.dtype != "F32" or tensor.shape != (count,) or count > _FACTORS_LIMIT:
            raise self.error(
                f"tensor {name} is {tensor.type.name} {list(tensor.shape)}, expected are {count} "
                "of F32"
            )
        data = read_part(tensor.path.parent, tensor.path.name, tensor.nbytes, tensor.offset)
        found = list(struct.unpack(f"<{count}f", data))
        if not all(math.isfinite(each) and each > 0 for each in found):
            raise self.error(f"tensor {name} holds what is no factor: the file is damaged")
        return found

    def _of(self, key: str, default: Value | None) -> Value | None:
        return self.metadata.get(f"{self.architecture}.{key}", default)


def describe(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[GgufTensor]
) -> dict[str, object]:
    """The `config.json` of the network that files hold, without what is said of its text.

    Args:
        path: of the first file.
        metadata: of it.
        tensors: of all files.

    Raises:
        CheckpointError: the network or a type of its weights is not read, or something is missing.
    """
    settings = _Settings(path, metadata, tensors)
    family = _family(settings)
    _check_types(settings)
    embedding = settings.tensors.get(_EMBEDDING)
    if embedding is None or len(embedding.shape) != 2:
        raise settings.error(f"has no {_EMBEDDING} that is a matrix: it holds no whole text model")
    heads = settings.whole("attention.head_count")
    hidden = settings.whole("embedding_length")
    if heads < 1:
        raise settings.error(f"{settings.architecture}.attention.head_count is {heads}")
    size = settings.whole("attention.key_length", hidden // heads)
    if settings.whole("attention.value_length", size) != size:
        raise settings.error("its keys and values are of different sizes: not supported")
    config: dict[str, object] = {
        "model_type": family.model_type,
        "num_hidden_layers": settings.whole("block_count"),
        "hidden_size": hidden,
        "intermediate_size": settings.whole(
            "feed_forward_length",
            settings.whole("expert_feed_forward_length")
            if settings.has("expert_feed_forward_length")
            else None,
        ),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.whole("attention.head_count_kv", heads),
        "head_dim": size,
        "rms_norm_eps": settings.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": settings.whole("context_length"),
        "rope_theta": settings.number("rope.freq_base", 10000.0),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": _HEAD not in settings.tensors,
        "dtype": _dtype(tensors),
    }
    config |= family.more(settings)
    if types := sorted({each.type.name for each in tensors if each.type.form is not None}):
        config["quantization_config"] = {"quant_method": "gguf", "types": types}
    return config


def family_of(metadata: Mapping[str, Value]) -> Family | None:
    """The family of a file's network; None: it is not read."""
    name = str(metadata.get(ARCHITECTURE))
    return (_MIXTURES if metadata.get(f"{name}.expert_count") else _FAMILIES).get(name)


def names_of(path: Path, family: Family, tensor: GgufTensor) -> list[str]:
    """What transformers calls a tensor, or each of the equal parts it consists of.

    Returns:
        Nothing for a setting; of a tensor of all experts a name of each.

    Raises:
        CheckpointError: the network of this family has no such tensor.
    """
    if tensor.name in _SETTINGS:
        return []
    if tensor.name in _TOP:
        return [_TOP[tensor.name]]
    match = _LAYER.fullmatch(tensor.name)
    part, count = None, 1
    if match and match["expert"]:  # a tensor of each, as files of the first months have them
        part = family.parts.get(f"{match['part']}_exps", "").replace(_EACH, match["expert"])
    elif match:
        part = family.parts.get(match["part"])
    if match is None or not part or (match["word"] == "bias" and part not in family.biased):
        raise CheckpointError(
            f"{path}: tensor {shown(tensor.name)} is none of those that {family.model_type} is "
            "known to have here: this network is not supported, take the model it was made from"
        )
    if _EACH in part:
        count = tensor.shape[0]
        if len(tensor.shape) != 3 or count > _EXPERTS_LIMIT:
            raise CheckpointError(
                f"{path}: tensor {shown(tensor.name)} is {list(tensor.shape)}, expected are up to "
                f"{_EXPERTS_LIMIT} matrices: the file is damaged, download it again"
            )
    begin = f"model.layers.{match['layer']}."
    return [f"{begin}{part.replace(_EACH, str(n))}.{match['word']}" for n in range(count)]


def _family(settings: _Settings) -> Family:
    family = family_of(settings.metadata)
    if family is None:
        mixture = settings.has("expert_count") and settings.whole("expert_count") > 0
        what = f"{settings.architecture} with experts" if mixture else settings.architecture
        size = format_size(sum(tensor.nbytes for tensor in settings.tensors.values()))
        raise settings.error(
            f"holds a network of kind {shown(what)} ({size}): read from GGUF are "
            f"{', '.join(_FAMILIES)}, and with experts {', '.join(_MIXTURES)}, so take the model "
            "it was made from, as safetensors"
        )
    return family


def _check_types(settings: _Settings) -> None:
    """Refuse types that are not read, with their bytes."""
    unread: dict[str, int] = {}
    for tensor in settings.tensors.values():
        kind = tensor.type
        sides = len(tensor.shape) - (_OF_EXPERTS in tensor.name)
        if not kind.is_read or (kind.form is not None and sides != 2):
            unread[kind.name] = unread.get(kind.name, 0) + tensor.nbytes
    if unread:
        found = ", ".join(f"{name} ({format_size(n)})" for name, n in sorted(unread.items()))
        total = format_size(sum(tensor.nbytes for tensor in settings.tensors.values()))
        raise settings.error(
            f"has weights of type {found} among its {total}, read are {READ_TYPES}: take the "
            "Q4_K_M, Q5_K_M, Q6_K or Q8_0 file of this model, or the model it was made from"
        )


def _dtype(tensors: Sequence[GgufTensor]) -> str:
    """The number format to compute in: that of most plain matrices, of blocks bf16."""
    nbytes: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) > 1:
            code = tensor.type.dtype or "BF16"
            nbytes[code] = nbytes.get(code, 0) + tensor.nbytes
    names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return names[max(nbytes, key=lambda code: nbytes[code])]


def _whole_heads(settings: _Settings) -> None:
    """Refuse rotary positions of a part of a head."""
    heads = max(1, settings.whole("attention.head_count"))
    size = settings.whole("attention.key_length", settings.whole("embedding_length") // heads)
    turned = settings.whole("rope.dimension_count", size)
    if turned != size:
        raise settings.error(
            f"turns {turned} of the {size} numbers of a head by position: not supported"
        )


def _scaled(settings: _Settings) -> _CONFIG:
    """Rotary scaling as transformers has it."""
    _whole_heads(settings)
    kind = settings.scaling()
    _refuse_factors(settings, _LONG, _SHORT)
    if _FREQUENCIES in settings.tensors:
        return {"rope_scaling": _of_frequencies(settings)}
    if kind == "none":
        return {}
    if kind not in ("linear", "yarn"):
        raise settings.error(f"scales rotary positions by {shown(kind)}: not supported")
    scaling: dict[str, object] = {
        "rope_type": kind,
        "factor": settings.number("rope.scaling.factor"),
    }
    if kind == "yarn":
        original = settings.whole("rope.scaling.original_context_length")
        scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling}


def _refuse_factors(settings: _Settings, *names: str) -> None:
    """Refuse factors of rotary positions that this network is not known to have."""
    for name in names:
        if name in settings.tensors:
            raise settings.error(
                f"has {name}, which {settings.architecture} is not known to have: not supported"
            )


def _of_frequencies(settings: _Settings) -> _CONFIG:
    """What divides each frequency: as Llama 3.1 says it where it is that, else number by number."""
    heads = max(1, settings.whole("attention.head_count"))
    size = settings.whole("attention.key_length", settings.whole("embedding_length") // heads)
    factors = settings.factors(_FREQUENCIES, size // 2)
    base = settings.number("rope.freq_base", 10000.0)
    if base <= 0.0:
        raise settings.error(f"has a rope.freq_base of {base}, which is none: download it again")
    llama3 = {"rope_type": "llama3", "factor": max(factors), **_LLAMA3}
    if all(
        math.isclose(one, other, rel_tol=_NEAR)
        for one, other in zip(factors, _llama3_factors(base, size, max(factors)), strict=True)
    ):
        return llama3
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": settings.whole("context_length"),
    }


def _llama3_factors(base: float, size: int, factor: float) -> list[float]:
    """Llama 3.1's rule: long waves are divided, short ones are not, those between in part."""
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    context = _LLAMA3["original_max_position_embeddings"]
    found = []
    for index in range(size // 2):
        turns = context / (2 * math.pi * base ** (2 * index / size))
        share = min(max((turns - low) / (high - low), 0.0), 1.0)
        found.append(1 / ((1 - share) / factor + share))
    return found


def _phi3(settings: _Settings) -> _CONFIG:
    """Partial rotary positions, factors for short and long texts, and a sliding window."""
    heads = max(1, settings.whole("attention.head_count"))
    size = settings.whole("attention.key_length", settings.whole("embedding_length") // heads)
    turned = settings.whole("rope.dimension_count", size)
    original = settings.whole(
        "rope.scaling.original_context_length", settings.whole("context_length")
    )
    config: dict[str, object] = {
        "partial_rotary_factor": turned / max(1, size),
        "original_max_position_embeddings": original,
        "sliding_window": settings.whole("attention.sliding_window", 0) or None,
        "pad_token_id": None,  # the class has one, which other vocabularies lack
    }
    if (kind := settings.scaling()) not in ("none", "longrope"):
        raise settings.error(f"scales rotary positions by {shown(kind)}: not supported")
    _refuse_factors(settings, _FREQUENCIES)
    if there := {_LONG, _SHORT} & settings.tensors.keys():
        if len(there) == 1:
            raise settings.error(f"has {there.pop()} alone, of two: download it again")
        config["rope_scaling"] = {
            "type": "longrope",
            "long_factor": settings.factors(_LONG, turned // 2),
            "short_factor": settings.factors(_SHORT, turned // 2),
        }
    return config


def _gemma(settings: _Settings) -> _CONFIG:
    """Sliding layers, soft caps, and what queries are scaled by."""
    _whole_heads(settings)
    _refuse_factors(settings, _FREQUENCIES, _LONG, _SHORT)
    third = settings.architecture == "gemma3"
    layers, hidden = settings.whole("block_count"), settings.whole("embedding_length")
    heads = max(1, settings.whole("attention.head_count"))
    size = settings.whole("attention.key_length", hidden // heads)
    sliding = settings.sliding(layers, 6 if third else 2)
    largest = layers == _LARGEST_GEMMA[settings.architecture]
    kinds = ("sliding_attention", "full_attention")
    config: dict[str, object] = {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if largest else size,
        "sliding_window": settings.whole("attention.sliding_window"),
        "layer_types": [kinds[not slides] for slides in sliding],
        "attn_logit_softcapping": None if third else settings.number("attn_logit_softcapping"),
        "final_logit_softcapping": settings.number("final_logit_softcapping")
        if settings.has("final_logit_softcapping")
        else None,
        "pad_token_id": None,  # the class has one, which other vocabularies lack
    }
    kind = settings.scaling()
    if kind not in (("none", "linear") if third else ("none",)):
        raise settings.error(f"scales rotary positions by {shown(kind)}: not supported")
    if third:
        config["rope_theta"] = settings.number("rope.freq_base", 1e6)
        config["rope_local_base_freq"] = settings.number("rope.freq_base_swa", _GEMMA_LOCAL_BASE)
    if kind == "linear":
        config["rope_scaling"] = {
            "rope_type": "linear",
            "factor": settings.number("rope.scaling.factor"),
        }
    return config


def _of_experts(count: str, normalised: bool | None) -> Callable[[_Settings], _CONFIG]:
    """Numbers of experts.

    Args:
        count: what transformers calls it.
        normalised: the weights of a token's experts add up to one; None: always.
    """

    def more(settings: _Settings) -> _CONFIG:
        config = {
            **_scaled(settings),
            count: settings.whole("expert_count"),
            "num_experts_per_tok": settings.whole("expert_used_count"),
        }
        if normalised is None:
            return config
        inner = settings.whole("expert_feed_forward_length")
        config |= {"moe_intermediate_size": inner, "norm_topk_prob": normalised}
        shared = settings.whole("expert_shared_feed_forward_length", 0)
        return config | ({"shared_expert_intermediate_size": shared} if shared else {})

    return more


_QKV = [_ATTENTION[f"attn_{part}"] for part in "qkv"]
_FAMILIES: Mapping[str, Family] = {
    "llama": Family(model_type="llama", paired=True, more=_scaled),
    "qwen2": Family(model_type="qwen2", biased=_QKV, more=_scaled),
    "qwen3": Family(model_type="qwen3", parts=_PLAIN | _HEAD_NORMS, more=_scaled),
    "gemma2": Family(
        model_type="gemma2", parts=_ATTENTION | _GATED | _GEMMA, raised=True, more=_gemma
    ),
    "gemma3": Family(
        model_type="gemma3_text",
        parts=_ATTENTION | _GATED | _GEMMA | _HEAD_NORMS,
        raised=True,
        more=_gemma,
    ),
    "phi3": Family(
        model_type="phi3",
        parts=_NORMS
        | {
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        more=_phi3,
    ),
}
_MIXTURES: Mapping[str, Family] = {
    "llama": Family(
        model_type="mixtral",
        parts=_NORMS | _ATTENTION | _MIXTRAL,
        paired=True,
        more=_of_experts("num_local_experts", None),
    ),
    "qwen2moe": Family(
        model_type="qwen2_moe",
        parts=_NORMS | _ATTENTION | _EXPERTS | _SHARED,
        biased=_QKV,
        more=_of_experts("num_experts", normalised=False),
    ),
    "qwen3moe": Family(
        model_type="qwen3_moe",
        parts=_NORMS | _ATTENTION | _HEAD_NORMS | _EXPERTS,
        more=_of_experts("num_experts", normalised=True),
    ),
}
