"""Which tensors of a folder are the text network's, by what their names are below.

As in transformers, what the network has no place for is left out, and what it lacks is an error.
Prefixes differ: a backbone saved alone has none, a text part keeps that of the whole.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from offload_rt.errors import CheckpointError
from offload_rt.model.family import Family
from offload_rt.model.files import shown
from offload_rt.model.formats.found import STATE
from offload_rt.model.formats.unstated import refuse_unstated
from offload_rt.model.header import TensorExtent

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embedding.weight",
    "embeddings.weight",
)
HEADS = ("lm_head", "embed_out")
# An expert of a layer; transformers makes one parameter of all of them (`layout`).
EXPERT = re.compile(
    r"(?P<moe>.*\.experts)\.(?P<expert>\d+)\.(?P<part>w[123]|(?:gate|up|down)_proj)\.weight$"
)
# A matrix of one whose weights are quantised.
EXPERT_MATRIX = re.compile(
    r"(?P<moe>.*\.experts)\.(?P<expert>\d+)\.(?P<part>w[123]|(?:gate|up|gate_up|down)_proj)$"
)
_CONTAINERS = ("layers", "h", "blocks", "layer", "block")
_LAYER = re.compile(r"(?P<prefix>[^.]+(?:\.[^.]+)*?)\.(?P<index>0|[1-9][0-9]{0,5})\..+")
_NUMBER = re.compile(r"\.\d+(?=\.)")
# What old files carry although every family computes it itself; transformers ignores it, too.
_COMPUTED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
_NOT_WEIGHTS = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"}

NO_PARTS: Mapping[str, str] = MappingProxyType({})

Groups = Mapping[str, Mapping[int, list[TensorExtent]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sorted:
    """The tensors of a folder, told apart.

    Attributes:
        container: what numbers the layers in the files, such as `model.layers`.
        layers: tensors of each decoder layer.
        others: tensors of the text network that are in no layer.
        left_out: tensors the text network has no place for.
    """

    container: str
    layers: tuple[Sequence[TensorExtent], ...]
    others: list[TensorExtent]
    left_out: list[TensorExtent]


def sort_tensors(
    folder: Path,
    extents: Iterable[TensorExtent],
    num_layers: int,
    family: Family,
    parts: Mapping[str, str] = NO_PARTS,
) -> Sorted:
    """Tell apart the layers, the rest of the text network, and what it has no place for.

    Args:
        folder: the model folder.
        extents: its tensors.
        num_layers: of the network.
        family: whose names they have.
        parts: of tensors that make up a quantised weight, the name it would have unquantised.

    Raises:
        CheckpointError: no names, or those of several networks, number all layers.
    """
    extents = list(extents)
    groups: dict[str, dict[int, list[TensorExtent]]] = {}
    for extent in extents:
        if match := _LAYER.fullmatch(extent.name):
            by_index = groups.setdefault(match["prefix"], {})
            by_index.setdefault(int(match["index"]), []).append(extent)
    embeddings = [e.name for e in extents if ends_in(e.name, EMBEDDINGS)]
    container = _container(folder, groups, num_layers, embeddings, family)
    text = _TextNames(_backbone(container, embeddings), family, parts)
    layers = tuple([e for e in groups[container][i] if text.has(e)] for i in range(num_layers))
    outside = [e for e in extents if not e.name.startswith(f"{container}.")]
    others = [e for e in outside if text.has(e)]
    kept = {id(extent) for group in (*layers, others) for extent in group}
    left_out = [extent for extent in extents if id(extent) not in kept]
    stray = [e for e in left_out if e.name not in parts]
    _refuse_quantised(folder, extents, stray, text, family)
    return Sorted(container=container, layers=layers, others=others, left_out=left_out)


def worth_saying(extents: Iterable[TensorExtent], family: Family) -> list[TensorExtent]:
    """Those that are not merely what old files carry besides."""
    return [e for e in extents if not (_COMPUTED.search(e.name) or _is_mask(e, family))]


def below_module(name: str, container: str, num_layers: int) -> str:
    """What follows the prefix of a module for drafting, of which the tensor is; "" for others.

    Such a module is named `mtp`, or lies behind the last layer as one more.
    """
    for prefix in ("mtp.", f"{container}.{num_layers}."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return ""


def drafting_module(
    extents: Iterable[TensorExtent], container: str, num_layers: int
) -> frozenset[str]:
    """Names of a module for drafting, as `--draft mtp` reads it; none of what is merely named so.

    It joins a state and a token by a matrix, and attends.
    """
    parts = {e.name: part for e in extents if (part := below_module(e.name, container, num_layers))}
    joins = any(part in ("fc.weight", "eh_proj.weight") for part in parts.values())
    attends = any("self_attn." in part for part in parts.values())
    return frozenset(parts) if joins and attends else frozenset()


def examples(extents: Sequence[TensorExtent], count: int = 2) -> str:
    """A few of their names, no two that differ by numbers only."""
    kinds: dict[str, str] = {}
    for extent in extents:
        kinds.setdefault(_NUMBER.sub(".0", extent.name), extent.name)
    return " and ".join(shown(name) for name in list(kinds.values())[:count])


class _TextNames:
    """Knows the names of a text network.

    Args:
        backbone: what the names of the files begin with, "" for nothing.
        family: whose names may follow.
        parts: names that stand for another.
    """

    def __init__(self, backbone: str, family: Family, parts: Mapping[str, str]) -> None:
        self._prefix = f"{backbone}." if backbone else ""
        self._family, self._parts = family, parts
        self._heads = {head.partition(".")[0] for head in family.heads.union(HEADS)}
        self._known: dict[str, bool] = {}

    def has(self, extent: TensorExtent) -> bool:
        """Whether the network has a place for a tensor of that name."""
        name = self._parts.get(extent.name, extent.name)
        kind = _NUMBER.sub(".0", name)
        if kind not in self._known:
            self._known[kind] = self._has(name)
        return self._known[kind] and not _is_mask(extent, self._family)

    def is_below(self, name: str) -> bool:
        """Whether a name is one of the text network's or a stray among them."""
        return name.startswith(self._prefix)

    def _has(self, name: str) -> bool:
        if not name.startswith(self._prefix):
            return self._is_head(name)
        if _COMPUTED.search(name):
            return False
        below = name.removeprefix(self._prefix)
        if EXPERT.fullmatch(f".{below}"):
            return True
        return _is_known(below, "", self._family)

    def _is_head(self, name: str) -> bool:
        """Whether it is beside the backbone, or beside what the backbone is a part of."""
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part in self._heads), None)
        return at is not None and self._prefix.startswith("".join(f"{p}." for p in parts[:at]))


def _is_known(name: str, prefix: str, family: Family) -> bool:
    """Whether all of a name behind a prefix is what the family calls something."""
    words = name.removeprefix(prefix).split(".")
    return all(family.knows(word) for word in words if word and not word.isdigit())


def _is_mask(extent: TensorExtent, family: Family) -> bool:
    """Whether it is a mask or counter that the family says is of no use."""
    return extent.dtype in _NOT_WEIGHTS and family.ignores(extent.name)


def _refuse_quantised(
    folder: Path,
    extents: Sequence[TensorExtent],
    left_out: Iterable[TensorExtent],
    text: _TextNames,
    family: Family,
) -> None:
    """Refuse numbers that make up weights together with scales; one in a row is no weight.

    Raises:
        CheckpointError: there are such.
    """
    for extent in left_out:
        whole = extent.dtype in _NOT_WEIGHTS - {"BOOL"} and len(extent.shape) > 1
        packed = whole or extent.dtype.startswith("F8") or STATE in extent.name
        computed = _COMPUTED.search(extent.name) or _is_mask(extent, family)
        if packed and text.is_below(extent.name) and not computed:
            raise refuse_unstated(folder, extent, extents)


def ends_in(name: str, endings: Iterable[str]) -> bool:
    """Whether a name is one of these, or one of these below something."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def _parents(container: str) -> Iterator[str]:
    while container:
        container = container.rpartition(".")[0]
        yield container


def _backbone(container: str, embeddings: Sequence[str]) -> str:
    """What the names of the text network begin with: as far as the embedding's and its layers'."""
    for parent in _parents(container):
        if any(name.startswith(f"{parent}." if parent else "") for name in embeddings):
            return parent
    return container.rpartition(".")[0]


def _container(
    folder: Path, groups: Groups, num_layers: int, embeddings: Sequence[str], family: Family
) -> str:
    """The one prefix that numbers all layers, and lies nearest to an embedding."""
    wanted = set(range(num_layers))
    complete = [prefix for prefix, by_index in groups.items() if by_index.keys() >= wanted]
    named = [prefix for prefix in complete if _is_container(prefix)] or complete
    if not named:
        raise CheckpointError(f"{folder}: {_why_no_layers(groups, num_layers)}")

    def distance(prefix: str) -> tuple[int, int]:
        backbone = _backbone(prefix, embeddings)
        return _depth(prefix) - _depth(backbone), _depth(prefix)

    nearest = min(map(distance, named))
    chosen = [prefix for prefix in named if distance(prefix) == nearest]
    if not embeddings:  # which could tell: names of the family may
        known = [p for p in chosen if all(_is_known(e.name, p, family) for e in groups[p][0])]
        chosen = known or chosen
    if len(chosen) > 1:
        raise CheckpointError(
            f"{folder}: {len(chosen)} groups of tensors are numbered as the {num_layers} layers "
            f"({shown(chosen[0])}, {shown(chosen[1])}): this kind of model is not supported"
        )
    return chosen[0]


def _depth(name: str) -> int:
    return name.count(".") + 1 if name else 0


def _is_container(prefix: str) -> bool:
    return prefix.rpartition(".")[2] in _CONTAINERS


def _why_no_layers(groups: Groups, num_layers: int) -> str:
    if not groups:
        return (
            f"config.json says {num_layers} layers, but no tensor is named like model.layers.0.x: "
            "files and config are not of one model"
        )
    prefix = max(groups, key=lambda name: (_is_container(name), len(groups[name])))
    found = groups[prefix].keys()
    missing = [i for i in range(num_layers) if i not in found]
    some = f"{', '.join(map(str, missing[:5]))}{' and more' if len(missing) > 5 else ''}"
    return (
        f"config.json says {num_layers} layers, the files have {len(found)} under "
        f"{shown(prefix)} (missing are {some}): files and config are not of one model"
    )
