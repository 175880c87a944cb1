"""An EAGLE-3 head as a model of one layer. No torch here.

EAGLE-3 (arXiv:2503.01840) in the layout that is published for it (`LlamaForCausalLMEagle3`):
`midlayer.*` (or `layers.0.*`) is a Llama layer whose queries, keys and values are made of the
normed embedding and the normed hidden state side by side; `fc` makes a hidden state of those that
enter some layers of the target; `norm`; and `lm_head` over a part of the vocabulary, where `d2t`
says how much must be added to a row's number to have the token. Without `lm_head` the target's is
used, and so is its embedding always: one that the files hold is a copy.
"""

import os
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from types import MappingProxyType

from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import DTYPE_BYTES, Checkpoint, TensorExtent, in_file_order
from offload_rt.model.config import PADDING_TOKENS, ModelConfig, load_model_config
from offload_rt.model.files import read_json_object, read_part, shown
from offload_rt.model.layout import CODES, FLOATS, compute_dtype
from offload_rt.model.shards import find_weights, read_shards

CONTAINER = "model.layers"
MIXING, HEAD, FINAL_NORM = "eagle3.fc.weight", "eagle3.head.weight", "model.norm.weight"
MIXING_BIAS, TOKENS = "eagle3.fc.bias", "d2t"
_LAYER = f"{CONTAINER}.0."
UNUSED = ("t2d", "embed_tokens.weight")  # the same map the other way, and a copy
_PLAIN = {
    "fc.weight": MIXING,
    "fc.bias": MIXING_BIAS,
    "lm_head.weight": HEAD,
    "norm.weight": FINAL_NORM,
    TOKENS: TOKENS,
}
_INTEGERS = {"I64": "q", "I32": "i"}
ARCHITECTURE = "LlamaForCausalLMEagle3"
PICKLED, CONVERT = "pytorch_model.bin", "python tools/convert_eagle3.py"
_NAMED = "eagle_aux_hidden_state_layer_ids"
_WHERE = "--draft eagle3"
_ANOTHER = "take a head that was trained for this model, or another drafter"


def open_head(target: Checkpoint, folder: Path, *, runs: bool = True) -> Checkpoint:
    """The head that drafts for a model, as a checkpoint of one layer that lacks the ends.

    Args:
        target: the model.
        folder: of the head.
        runs: it will run; otherwise `config.json` is enough.

    Raises:
        CheckpointError: it was made for another model, or tensors are missing, quantised or of
            other shapes.
    """
    folder = Path(os.path.abspath(folder))
    config = _config_of(folder, target)
    taps = layers_read(folder, config, target)
    needed = _needed(config, len(taps))
    names = os.listdir(folder)
    stored = any(name.endswith(".safetensors") for name in names)
    if PICKLED in names and not stored:
        raise CheckpointError(
            f"{_WHERE}: {folder.name} is a pickle ({PICKLED}), which no run opens: convert it with "
            f"`{CONVERT} {folder} NEW_FOLDER`, a tool of the source repository"
        )
    if runs or stored:
        extents, files = read_shards(folder, find_weights(folder))
        found = {_name(name): replace(e, name=_name(name)) for name, e in extents.items()}
        if len(found) < len(extents):
            twice = next(n for n, many in Counter(map(_name, extents)).items() if many > 1)
            raise CheckpointError(
                f"{_WHERE}: {folder.name} has a tensor under two names, "
                f"{shown(_stored(twice))}: download it again"
            )
    else:
        found, files = _outlined(folder, needed, target), {}
    tokens = found.pop(TOKENS, None)
    tensors = {name: extent for name, extent in found.items() if name not in UNUSED}
    _check(folder, tensors, needed)
    module = replace(
        target,
        folder=folder,
        config=replace(
            config,
            dtype=compute_dtype(target, "auto"),
            quantised=None,
        ),
        tensors=MappingProxyType(tensors),
        layers=(in_file_order(e for n, e in tensors.items() if n.startswith(_LAYER)),),
        others=in_file_order(e for n, e in tensors.items() if not n.startswith(_LAYER)),
        container=CONTAINER,
        left_out=() if tokens is None else (tokens,),
        files=MappingProxyType(dict(files)),
        adapter=None,
        stored=MappingProxyType({}),
        stored_ends=MappingProxyType({}),
        rounded=None,
        lent_ends=True,
    )
    rows, known = tensors[HEAD].shape[0] if HEAD in tensors else 0, _tokens_known(module)
    if rows > known:
        raise CheckpointError(
            f"{_WHERE}: {folder.name} has an output head of {rows} rows, the model has {known} "
            f"tokens: {_ANOTHER}"
        )
    if files:
        tokens_of(module)
    return module


def layers_read(folder: Path, config: ModelConfig, target: Checkpoint) -> tuple[int, ...]:
    """Layers of the target of which a head reads what leaves them.

    Two ways of counting are about. `eagle_config` names the layers themselves; a list beside it,
    and the default 2, n/2 and n - 3, names those that what is read goes into.

    Raises:
        CheckpointError: the target has no such layers.
    """
    raw, layers = config.raw, target.config.num_layers
    own = raw.get("eagle_config")
    named = own.get(_NAMED) if isinstance(own, Mapping) else None
    entered = raw.get(_NAMED, [2, layers // 2, layers - 3]) if named is None else None
    numbers, less = (named, 0) if entered is None else (entered, 1)
    given = numbers if isinstance(numbers, list) else []
    found = tuple(n - less if type(n) is int else -1 for n in given)
    if not found or len({*found}) < len(found) or not all(0 <= n < layers for n in found):
        raise CheckpointError(
            f"{_WHERE}: {folder.name} reads hidden states between layers {shown(numbers)} of its "
            f"model, {target.name} has {layers}: {_ANOTHER}"
        )
    return found


def tokens_of(module: Checkpoint) -> Sequence[int] | None:
    """The token of each row of a head's output head; None: rows are the target's tokens.

    Raises:
        CheckpointError: they are no tokens of the model, or two rows are one.
    """
    if HEAD not in module.tensors:
        return None
    rows, known = module.tensors[HEAD].shape[0], _tokens_known(module)
    where = f"{_WHERE}: {module.folder.name}"
    if not module.left_out:
        if rows != module.config.vocab_size:
            raise CheckpointError(
                f"{where} has an output head of {rows} rows, and no {TOKENS} says which of the "
                f"model's {known} tokens they are: {_ANOTHER}"
            )
        return None if rows == known else range(rows)
    (extent,) = module.left_out
    if extent.dtype not in _INTEGERS or extent.shape != (rows,):
        raise CheckpointError(
            f"{where}: {TOKENS} is {extent.dtype} of shape {list(extent.shape)}, accepted is "
            f"{' or '.join(_INTEGERS)} of shape [{rows}], one for each row of the output head: "
            f"{_ANOTHER}"
        )
    offsets = array(_INTEGERS[extent.dtype])
    offsets.frombytes(read_part(module.folder, extent.path.name, extent.nbytes, extent.offset))
    tokens = [row + offset for row, offset in enumerate(offsets)]
    wrong = next((row for row, token in enumerate(tokens) if not 0 <= token < known), None)
    if wrong is not None:
        raise CheckpointError(
            f"{where}: {TOKENS} makes row {wrong} of its output head token {tokens[wrong]}, the "
            f"model has {known}: {_ANOTHER}"
        )
    if len({*tokens}) < rows:
        raise CheckpointError(
            f"{where}: {TOKENS} makes {rows - len({*tokens})} rows of its output head tokens that "
            f"others are: {_ANOTHER}"
        )
    return tokens


def _tokens_known(module: Checkpoint) -> int:
    """Tokens of the model that it drafts for."""
    return (module.head or module.embedding).shape[0]


def _config_of(folder: Path, target: Checkpoint) -> ModelConfig:
    """What `config.json` says, if it is of a head for this model.

    Raises:
        CheckpointError: it is not.
    """
    raw = read_json_object(folder, "config.json", 2**22, lenient=True)
    named, where = raw.get("architectures"), f"{_WHERE}: {folder.name}"
    if "transformer_layer_config" in raw:
        raise CheckpointError(
            f"{where} is in the layout of the library speculators, which is not read: take the "
            f"head as {ARCHITECTURE}"
        )
    if not (isinstance(named, list) and any(isinstance(a, str) and "Eagle3" in a for a in named)):
        raise CheckpointError(
            f"{where} is no EAGLE-3 head: its architectures are {shown(named)}, expected is "
            f"{ARCHITECTURE}"
        )
    config, theirs = load_model_config(folder), target.config
    if config.model_type != "llama" or config.num_layers != 1:
        raise CheckpointError(
            f"{where} has {config.num_layers} layers of the family {shown(config.model_type)}, "
            "and heads of one Llama layer are read: take such a one, or another drafter"
        )
    for size in (config.hidden_size, raw.get("target_hidden_size", config.hidden_size)):
        if size != theirs.hidden_size:
            raise CheckpointError(
                f"{where} is for hidden states of {shown(size)} numbers, {target.name} has "
                f"{theirs.hidden_size}: {_ANOTHER}"
            )
    if abs(config.vocab_size - theirs.vocab_size) > PADDING_TOKENS:
        raise CheckpointError(
            f"{where} is for a vocabulary of {config.vocab_size} tokens, {target.name} has "
            f"{theirs.vocab_size}: {_ANOTHER}"
        )
    rows = raw.get("draft_vocab_size")
    if rows is not None and (type(rows) is not int or not 1 <= rows <= config.vocab_size):
        raise CheckpointError(
            f"{where}: draft_vocab_size is {shown(rows)}, accepted is a whole number from 1 to "
            f"{config.vocab_size}: {_ANOTHER}"
        )
    return config


def _name(name: str) -> str:
    """Our name of a tensor."""
    name = name.removeprefix("model.")
    for start in ("midlayer.", "layers.0."):
        if name.startswith(start):
            return _LAYER + name.removeprefix(start)
    return _PLAIN.get(name, name)


def _needed(config: ModelConfig, taps: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors; an output head may be left out."""
    size, wide = config.hidden_size, config.intermediate_size
    queries, keys = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    linears = {
        "self_attn.q_proj": (queries, 2 * size),
        "self_attn.k_proj": (keys, 2 * size),
        "self_attn.v_proj": (keys, 2 * size),
        "self_attn.o_proj": (size, queries),
        "mlp.gate_proj": (wide, size),
        "mlp.up_proj": (wide, size),
        "mlp.down_proj": (size, wide),
    }
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": s for name, s in linears.items()}
    shapes |= {f"{name}.weight": (size,) for name in norms}
    for setting, part in (("attention_bias", "self_attn."), ("mlp_bias", "mlp.")):
        if config.setting(setting):
            shapes |= {f"{n}.bias": s[:1] for n, s in linears.items() if n.startswith(part)}
    needed = {_LAYER + name: shape for name, shape in shapes.items()}
    needed |= {MIXING: (size, taps * size), FINAL_NORM: (size,)}
    if config.raw.get("bias") is True:
        needed[MIXING_BIAS] = (size,)
    stated = config.raw.get("draft_vocab_size")
    needed[HEAD] = (stated if type(stated) is int else config.vocab_size, size)
    return needed


def _outlined(
    folder: Path, needed: Mapping[str, tuple[int, ...]], target: Checkpoint
) -> dict[str, TensorExtent]:
    """What the tensors of a head would be of which only the configuration is here."""
    code = CODES[compute_dtype(target, "auto")]
    return {
        name: TensorExtent(
            name=name,
            dtype=code,
            shape=shape,
            path=folder / "config.json",
            offset=0,
            nbytes=prod(shape) * DTYPE_BYTES[code],
        )
        for name, shape in needed.items()
    }


def _check(
    folder: Path, found: Mapping[str, TensorExtent], needed: Mapping[str, tuple[int, ...]]
) -> None:
    """Compare what there is with what a head has.

    Raises:
        CheckpointError: it is not that.
    """
    where = f"{_WHERE}: {folder.name}"
    for name, extent in found.items():
        if name in needed and extent.dtype not in FLOATS:
            raise CheckpointError(
                f"{where} is quantised ({shown(_stored(name))} is {extent.dtype}): only heads in "
                f"{', '.join(FLOATS)} are read, use another drafter"
            )
        if name in needed and extent.shape != needed[name]:
            raise CheckpointError(
                f"{where}: {shown(_stored(name))} has shape {list(extent.shape)}, config.json "
                f"makes it {list(needed[name])}: {_ANOTHER}"
            )
    if missing := sorted(needed.keys() - found.keys() - {HEAD}):
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(needed)} tensors, such as "
            f"{_stored(missing[0])}: download it again, or take another drafter"
        )
    if strays := sorted(found.keys() - needed.keys()):
        raise CheckpointError(
            f"{where} has {len(strays)} tensors that such a head has not, such as "
            f"{shown(_stored(strays[0]))}: {_ANOTHER}"
        )


def _stored(name: str) -> str:
    """What a tensor is called in most files."""
    if name.startswith(_LAYER):
        return f"midlayer.{name.removeprefix(_LAYER)}"
    return next((theirs for theirs, ours in _PLAIN.items() if ours == name), name)
