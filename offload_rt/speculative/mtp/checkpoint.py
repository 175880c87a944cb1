"""A checkpoint's own module for drafting, as a model of one layer. No torch here.

Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, 2.2). Two layouts are read:

- DeepSeek-V3, GLM-4-MoE: one more layer behind the last (`model.layers.61.*`), with `enorm`,
  `hnorm`, `eh_proj` and `shared_head.norm`, and copies of embedding and head, which are not used.
- Qwen3-Next, Qwen3.5: `mtp.fc`, `mtp.pre_fc_norm_embedding`, `mtp.pre_fc_norm_hidden`,
  `mtp.layers.0.*` and `mtp.norm`.

The module's layer is like one of the target's own, so names and shapes are compared with that one.
Its matrices may be quantised as the target's are (DeepSeek-V3 is published so). Where a checkpoint
has several modules, the first drafts for every depth.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import lru_cache
from math import prod
from types import MappingProxyType

from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.checkpoint import DTYPE_BYTES, Checkpoint, TensorExtent, in_file_order
from offload_rt.model.config import ModelConfig
from offload_rt.model.files import shown
from offload_rt.model.formats.stored import Stored
from offload_rt.model.layout import FLOATS
from offload_rt.model.names import below_module

CONTAINER = "model.layers"
PROJECTION = "mtp.fc.weight"
EMBEDDING_NORM, HIDDEN_NORM = "mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight"
FINAL_NORM = "model.norm.weight"
_LAYER = f"{CONTAINER}.0."

_DEEPSEEK = {
    "enorm.weight": EMBEDDING_NORM,
    "hnorm.weight": HIDDEN_NORM,
    "eh_proj.weight": PROJECTION,
    "shared_head.norm.weight": FINAL_NORM,
}
_COPIES = ("embed_tokens.", "shared_head.head.")
# How a configuration states how many modules there are.
_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers")
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_ANOTHER = "take the checkpoint as it was published, or another drafter"


def open_module(target: Checkpoint) -> Checkpoint:
    """The module of a model, as a checkpoint of one layer that lacks embedding and head.

    Raises:
        ConfigError: the model has none.
        CheckpointError: tensors of it are missing, of other shapes, or quantised in another way.
    """
    module = find_module(target)
    if module is None:
        raise ConfigError(
            f"--draft mtp: {target.name} has no module for drafting (tensors named mtp.* or "
            f"{target.container}.{target.config.num_layers}.*): {_ANOTHER}"
        )
    return module


@lru_cache(maxsize=8)
def find_module(target: Checkpoint) -> Checkpoint | None:
    """The same; None where the model has none.

    Raises:
        CheckpointError: tensors of it are missing, of other shapes, or quantised in another way.
    """
    found = _found(target) if target.files else _outlined(target)
    if not found:
        return None
    stored = _stored(target, found)
    whole = _whole(found, stored)
    _check_plain(target, [extent for name, extent in found.items() if name not in stored])
    layer = {name.removeprefix(_LAYER) for name in whole if name.startswith(_LAYER)}
    like = _like(target, layer)
    _check(target, found, whole, like)
    tensors = {name: replace(extent, name=name) for name, extent in found.items()}
    own = in_file_order(e for name, e in tensors.items() if name.startswith(_LAYER))
    others = in_file_order(e for name, e in tensors.items() if not name.startswith(_LAYER))
    return replace(
        target,
        config=_one_layer(target.config, like, experts=any(".experts." in name for name in layer)),
        tensors=MappingProxyType({e.name: e for e in (*own, *others)}),
        layers=(own,),
        others=others,
        container=CONTAINER,
        left_out=(),
        stored=MappingProxyType(stored),
        stored_ends=MappingProxyType({}),
        rounded=None,
        lent_ends=True,
    )


def _found(target: Checkpoint) -> dict[str, TensorExtent]:
    """The module's tensors by our names."""
    found = {}
    for extent in target.left_out:
        below = below_module(extent.name, target.container, target.config.num_layers)
        if not below:
            continue
        if extent.name.startswith(target.container):
            name = _of_deepseek(below)
        else:
            name = _of_qwen(below, extent, target)
        if name is not None:
            found[name] = extent
    return found


def _stored(target: Checkpoint, found: Mapping[str, TensorExtent]) -> dict[str, Stored]:
    """The quantised weights of the module's layer by our names of their tensors."""
    ours = {extent.name: name for name, extent in found.items()}
    made: dict[str, Stored] = {}
    for each in dict.fromkeys(target.stored_drafts.values()):
        names = {word: ours[e.name] for word, e in each.parts.items() if e.name in ours}
        if len(names) < len(each.parts) or not all(n.startswith(_LAYER) for n in names.values()):
            continue  # of a copy that is not used, or not in the layer: it is refused
        word, name = next(iter(names.items()))
        parts = {word: replace(each.parts[word], name=name) for word, name in names.items()}
        one = replace(each, module=name.removesuffix(f".{word}"), parts=MappingProxyType(parts))
        made |= dict.fromkeys(names.values(), one)
    return made


def _whole(
    found: Mapping[str, TensorExtent], stored: Mapping[str, Stored]
) -> dict[str, tuple[int, ...]]:
    """Names and shapes, those of quantised weights as they compute."""
    shapes = {name: extent.shape for name, extent in found.items() if name not in stored}
    weights = dict.fromkeys(stored.values())
    return shapes | {f"{s.module}.weight": (s.outputs, s.inputs) for s in weights}


def _of_qwen(rest: str, extent: TensorExtent, target: Checkpoint) -> str | None:
    kind, _, below = rest.partition(".")
    if kind == "layers":
        return f"{_LAYER}{below[2:]}" if below.startswith("0.") else None
    if kind == "norm":
        return f"{CONTAINER.partition('.')[0]}.{rest}"
    if kind in ("fc", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        return f"mtp.{rest}"
    raise CheckpointError(
        f"--draft mtp: {target.name} has tensor {shown(extent.name)}, and modules with parts "
        "besides a projection, norms and a layer are not read: use another drafter"
    )


def _of_deepseek(rest: str) -> str | None:
    if rest.startswith(_COPIES):
        return None
    return _DEEPSEEK.get(rest, f"{_LAYER}{rest}")


def _outlined(target: Checkpoint) -> dict[str, TensorExtent]:
    """What the module of a model would be of which only the configuration is here."""
    counts = (target.config.raw.get(name) for name in _COUNTS)
    if not any(isinstance(count, int) and count > 0 for count in counts):
        return {}
    size = target.config.hidden_size
    last = max(range(len(target.layers)), key=lambda i: (_attends_to_all(target.config, i), i))
    prefix = f"{target.container}.{last}."
    plain = [extent for extent in target.layers[last] if extent.name not in target.stored]
    found = {_LAYER + extent.name.removeprefix(prefix): extent for extent in plain}
    some, code = target.layers[last][0], target.embedding.dtype
    shapes = {_LAYER + name: shape for name, shape in _below(target, last).items()}
    shapes = {name: shape for name, shape in shapes.items() if name not in found}
    shapes[PROJECTION] = (size, 2 * size)
    shapes |= dict.fromkeys((EMBEDDING_NORM, HIDDEN_NORM, FINAL_NORM), (size,))
    for name, shape in shapes.items():
        nbytes = prod(shape) * DTYPE_BYTES[code]
        found[name] = replace(some, name=name, dtype=code, shape=shape, nbytes=nbytes)
    return found


def _kinds(config: ModelConfig) -> Sequence[object] | None:
    kinds = config.setting("layer_types")
    return kinds if isinstance(kinds, list) else None


def _attends_to_all(config: ModelConfig, layer: int) -> bool:
    kinds = _kinds(config)
    return kinds is None or kinds[layer] == "full_attention"


def _like(target: Checkpoint, layer: Set[str]) -> int:
    """The layer of the target that has most of the module's tensors; of several the last."""

    def alike(index: int) -> tuple[int, int]:
        names = _below(target, index).keys()
        return len(names & layer) - len(names ^ layer), index

    return max(range(len(target.layers)), key=alike)


def _below(target: Checkpoint, index: int) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of what is in a layer of the target."""
    prefix, below = f"{target.container}.{index}.", {}
    for extent in target.layers[index]:
        name, shape = extent.name, extent.shape
        if (stored := target.stored.get(name)) is not None:  # the module's may not be, or as well
            name, shape = f"{stored.module}.weight", (stored.outputs, stored.inputs)
        below[name.removeprefix(prefix)] = shape
    return below


def _check_plain(target: Checkpoint, extents: Iterable[TensorExtent]) -> None:
    """See that what is no part of a quantised weight is a plain one.

    Raises:
        CheckpointError: one is not.
    """
    for extent in extents:
        if extent.dtype not in FLOATS:
            raise CheckpointError(
                f"--draft mtp: the module of {target.name} is quantised ({shown(extent.name)} is "
                f"{extent.dtype}): only modules in {', '.join(FLOATS)} are read, or those whose "
                "layer is quantised as the model's are: use another drafter"
            )


def _check(
    target: Checkpoint,
    found: Mapping[str, TensorExtent],
    whole: Mapping[str, tuple[int, ...]],
    like: int,
) -> None:
    """Compare what there is with what a module has.

    Args:
        target: the model.
        found: the module's tensors by our names.
        whole: their shapes, those of quantised weights as they compute.
        like: the layer of the target that it is like.

    Raises:
        CheckpointError: it is not that.
    """
    size = target.config.hidden_size
    needed = {_LAYER + name: shape for name, shape in _below(target, like).items()}
    needed |= {PROJECTION: (size, 2 * size)}
    needed |= dict.fromkeys((EMBEDDING_NORM, HIDDEN_NORM, FINAL_NORM), (size,))
    where = f"--draft mtp: the module of {target.name}"
    for name, shape in whole.items():
        if name in needed and shape != needed[name]:
            called = found[name].name if name in found else name.removeprefix(_LAYER)
            raise CheckpointError(
                f"{where}: {shown(called)} has shape {list(shape)}, layer {like} of "
                f"the model and hidden_size {size} make it {list(needed[name])}: {_ANOTHER}"
            )
    if missing := sorted(needed.keys() - whole.keys()):
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(needed)} tensors, such as "
            f"{missing[0].removeprefix(_LAYER)}: {_ANOTHER}"
        )
    if strays := sorted(whole.keys() - needed.keys()):
        strays = [found[name].name if name in found else name for name in strays]
        raise CheckpointError(
            f"{where} has {len(strays)} tensors that layer {like} of the model has not, such as "
            f"{shown(strays[0])}: {_ANOTHER}"
        )


def _one_layer(config: ModelConfig, like: int, *, experts: bool) -> ModelConfig:
    """The configuration of a model of one layer, which is as that one of the model."""
    raw = dict(config.raw)

    def put(name: str, value: object) -> None:
        if name in raw or config.defaults.get(name) is not None:
            raw[name] = value

    for name in _LAYER_COUNTS:
        put(name, 1)
    kinds = _kinds(config)
    if kinds is not None or "layer_types" in config.defaults:
        raw["layer_types"] = ["full_attention" if kinds is None else kinds[like]]
    wide = config.setting("mlp_layer_types")
    if isinstance(wide, list):
        raw["mlp_layer_types"] = wide[like : like + 1]
    put("first_k_dense_replace", 0 if experts else 1)
    put("decoder_sparse_step", 1)
    put("mlp_only_layers", [] if experts else [0])
    return replace(
        config, num_layers=1, raw=MappingProxyType(raw), part_of=None, whole=None, quantised=None
    )
