"""A checkpoint's sizes from `config.json` alone, for planning a model one has not downloaded.

Names, shapes and formats are those the files have (a test compares them with what transformers
writes); where the bytes lie is made up, so nothing can be read through such a checkpoint: `files`
is empty. No torch here; other families than those of the table need it (`outline_modules.py`).
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path

from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import (
    DTYPE_BYTES,
    Checkpoint,
    TensorExtent,
    open_checkpoint,
    sort_checkpoint,
)
from offload_rt.model.config import ModelConfig, QuantisedError, load_model_config
from offload_rt.model.formats.methods import Method
from offload_rt.model.formats.stated import is_kept, one_form, say_unread, tensors_of
from offload_rt.model.formats.stored import Stored, StoredTensors
from offload_rt.model.packed_files import SUFFIX
from offload_rt.model.shards import PICKLES

Shapes = dict[str, tuple[int, ...]]

_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_DEFAULT_DTYPE = "bfloat16"
_IN_LAYER = re.compile(r"\.\d+\.")
_ROUTER = re.compile(r"\.(gate|router|shared_expert_gate)$")  # of experts; never quantised
_ALL_EXPERTS = re.compile(r"\.(experts\.(gate_up|up|down)_proj|(in|out)put_linear\.weight)$")
_FILE = "model.safetensors"
_WEIGHTS = (".safetensors", ".gguf", SUFFIX, *PICKLES)


@dataclass(frozen=True, slots=True)
class _Family:
    """What a layer has, and what of it the configuration may leave out.

    Attributes:
        norms: of the hidden size.
        attention: made from the configuration.
        mlp: made from the configuration.
    """

    norms: tuple[str, ...]
    attention: Callable[[ModelConfig], Shapes]
    mlp: Callable[[ModelConfig], Shapes]


def open_or_outline(folder: Path) -> tuple[Checkpoint, bool]:
    """Open a model folder; where it holds no weights, take the sizes from `config.json`.

    Returns:
        The checkpoint, and whether it was read from weight files.

    Raises:
        CheckpointError: what is there cannot be used, or the family's sizes are not known.
    """
    try:
        names = os.listdir(folder)
    except OSError:
        return open_checkpoint(folder), True  # it says what is wrong
    if "config.json" in names and not any(name.endswith(_WEIGHTS) for name in names):
        return outline_checkpoint(folder), False
    return open_checkpoint(folder), True


def outline_checkpoint(folder: Path) -> Checkpoint:
    """Derive names, shapes and formats of all tensors from `config.json`.

    Of the families in the table below at once; of any other from transformers' own modules, which
    takes the seconds that importing torch does, and refuses what could not be run.

    Raises:
        QuantisedError: the weights are quantised in several ways: sizes are in the files alone.
        CheckpointError: the file cannot be used, or the family cannot be streamed.
    """
    folder = Path(os.path.abspath(folder))
    config = load_model_config(folder)
    if config.quantised is not None and one_form(config.quantised) is None:
        raise QuantisedError(
            f"{folder}: its weights are quantised ({config.quantised.name}) in several ways, and "
            "their sizes are read from weight files, which are not here: download them",
            replace(config, quantised=None),
        )
    if (known := outline_known(config, folder)) is not None:
        return known
    from offload_rt.model.outline_modules import outline_modules

    of_shapes = partial(_checkpoint_of, folder, config)
    return outline_modules(config, folder, config.dtype or _DEFAULT_DTYPE, of_shapes)


def outline_known(config: ModelConfig, folder: Path) -> Checkpoint | None:
    """The same for the families of the table; None for others."""
    family = _FAMILIES.get(config.model_type)
    if family is None:
        return None
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        parts = {f"{name}.weight": (config.hidden_size,) for name in family.norms}
        for name, shape in (parts | family.attention(config) | family.mlp(config)).items():
            shapes[f"model.layers.{layer}.{name}"] = shape
    shapes["model.norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return _checkpoint_of(folder, config, shapes)


def _checkpoint_of(
    folder: Path, config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> Checkpoint:
    """A checkpoint of these tensors, one behind the other in the formats that config.json names."""
    tensors = dict[str, TensorExtent]()
    quantised = dict[str, Stored]()
    offset = 0

    def add(name: str, code: str, shape: tuple[int, ...]) -> TensorExtent:
        nonlocal offset
        nbytes = prod(shape) * DTYPE_BYTES[code]
        start = -(-offset // DTYPE_BYTES[code]) * DTYPE_BYTES[code]
        tensors[name] = TensorExtent(
            name=name, dtype=code, shape=shape, path=folder / _FILE, offset=start, nbytes=nbytes
        )
        offset = start + nbytes
        return tensors[name]

    code, method = _CODES[config.dtype or _DEFAULT_DTYPE], config.quantised
    if method is not None:
        say_unread(method, folder.name)
    for name, shape in shapes.items():
        if method is None or not (modules := _quantised(folder, method, name, shape)):
            add(name, code, shape)
            continue
        for module, matrix in modules:
            parts = _parts_of(folder, method, module, matrix)
            extents = {word: add(f"{module}.{word}", *part) for word, part in parts.items()}
            stored = _stored(method, module, matrix, extents)
            quantised |= {extent.name: stored for extent in extents.values()}
    if method is not None and not quantised:
        raise CheckpointError(
            f"{folder}: config.json says that weights are quantised ({method.name}), and this "
            "network has none that could be: it is not of this model"
        )
    found = None if method is None else StoredTensors(quantised, frozenset())
    return sort_checkpoint(folder, config, tensors, {}, found)


def _quantised(
    folder: Path, method: Method, name: str, shape: tuple[int, ...]
) -> Sequence[tuple[str, tuple[int, ...]]]:
    """Modules of quantised matrices [O, I] that a tensor is in the files; none if it is as it is.

    Raises:
        CheckpointError: they are of experts that no file known here has in one tensor.
    """
    module, _, word = name.rpartition(".")
    matrix = word == "weight" and len(shape) == 2 and not _ROUTER.search(module)
    experts = len(shape) == 3 and _ALL_EXPERTS.search(name) is not None
    inside = _IN_LAYER.search(module) is not None and not is_kept(method, module)
    if not inside or not (experts if method.fused else experts or matrix):
        return ()
    if not experts:
        return [(module, shape)]
    if not method.fused:
        raise _unknown(folder, name, shape, method)
    count, inputs, outputs = shape  # of gpt-oss, which has them transposed
    return [(f"{module}.{expert}.{word}", (outputs, inputs)) for expert in range(count)]


def _parts_of(
    folder: Path, method: Method, module: str, shape: tuple[int, ...]
) -> Mapping[str, tuple[str, tuple[int, ...]]]:
    one = one_form(method)
    parts = None if one is None else tensors_of(one, *shape)
    if parts is None:
        raise _unknown(folder, module, shape, method)
    return parts


def _unknown(folder: Path, name: str, shape: tuple[int, ...], method: Method) -> CheckpointError:
    return CheckpointError(
        f"{folder}: {name}, {list(shape)}, cannot be quantised as config.json says "
        f"({method.name}): sizes of such models are read from weight files, download them"
    )


def _stored(
    method: Method, module: str, shape: tuple[int, ...], parts: Mapping[str, TensorExtent]
) -> Stored:
    one = one_form(method)
    assert one is not None  # or its parts would not be known
    outputs, inputs = shape
    block = (one.block[0] or outputs, one.block[1] or inputs)
    return Stored(
        module=module,
        form=one.form,
        outputs=outputs,
        inputs=inputs,
        bits=one.bits,
        groups=-(-inputs // block[1]),
        parts=parts,
        block=block,
    )


def _flag(config: ModelConfig, name: str, default: bool = False) -> bool:
    value = config.setting(name)
    return default if value is None else bool(value)


def _attention(
    config: ModelConfig, *, bias: bool = False, out_bias: bool = False, head_norms: bool = False
) -> Shapes:
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Shapes = {}
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        shapes[f"self_attn.{name}.weight"] = (rows, config.hidden_size)
        if bias:
            shapes[f"self_attn.{name}.bias"] = (rows,)
    shapes["self_attn.o_proj.weight"] = (config.hidden_size, query)
    if out_bias:
        shapes["self_attn.o_proj.bias"] = (config.hidden_size,)
    if head_norms:
        shapes |= {f"self_attn.{name}.weight": (config.head_dim,) for name in ("q_norm", "k_norm")}
    return shapes


def _biased(config: ModelConfig) -> Shapes:
    """Biases on all projections, or on none."""
    bias = _flag(config, "attention_bias")
    return _attention(config, bias=bias, out_bias=bias)


def _normed(config: ModelConfig) -> Shapes:
    """The same, with norms of each head."""
    bias = _flag(config, "attention_bias")
    return _attention(config, bias=bias, out_bias=bias, head_norms=True)


def _plain(config: ModelConfig) -> Shapes:
    return _attention(config)


def _qwen2(config: ModelConfig) -> Shapes:
    return _attention(config, bias=True)


def _seed_oss(config: ModelConfig) -> Shapes:
    bias = _flag(config, "attention_bias", default=True)
    return _attention(config, bias=bias, out_bias=_flag(config, "attention_out_bias"))


def _olmo2(config: ModelConfig) -> Shapes:
    shapes = _biased(config)
    for name, heads in (("q_norm", config.num_heads), ("k_norm", config.num_kv_heads)):
        shapes[f"self_attn.{name}.weight"] = (heads * config.head_dim,)
    return shapes


def _phi3(config: ModelConfig) -> Shapes:
    query = config.num_heads * config.head_dim
    rows = query + 2 * config.num_kv_heads * config.head_dim
    return {
        "self_attn.qkv_proj.weight": (rows, config.hidden_size),
        "self_attn.o_proj.weight": (config.hidden_size, query),
    }


def _gated(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


def _gated_biased(config: ModelConfig) -> Shapes:
    """The same, with biases if the configuration says so."""
    shapes = _gated(config)
    if _flag(config, "mlp_bias"):
        shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items()}
    return shapes


def _fused_gate(config: ModelConfig) -> Shapes:
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "mlp.gate_up_proj.weight": (2 * inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }


_TWO = ("input_layernorm", "post_attention_layernorm")
_FOUR = (*_TWO, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_FAMILIES: Mapping[str, _Family] = {
    "llama": _Family(_TWO, _biased, _gated_biased),
    "mistral": _Family(_TWO, _plain, _gated),
    "ministral": _Family(_TWO, _plain, _gated),
    "qwen2": _Family(_TWO, _qwen2, _gated),
    "qwen3": _Family(_TWO, _normed, _gated),
    "gemma2": _Family(_FOUR, _biased, _gated),
    "gemma3_text": _Family(_FOUR, _normed, _gated),
    "granite": _Family(_TWO, _biased, _gated_biased),
    "olmo2": _Family(_AFTER, _olmo2, _gated),
    "phi3": _Family(_TWO, _phi3, _fused_gate),
    "seed_oss": _Family(_TWO, _seed_oss, _gated_biased),
    "smollm3": _Family(_TWO, _biased, _gated_biased),
}
