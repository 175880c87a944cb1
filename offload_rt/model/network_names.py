"""Which parameter of a network a tensor of the files is, by transformers' own rules.

Renamings and prefixes are those of its loader (core_model_loading.py, `rename_source_key`); where
they lead nowhere, the prefix of the files' layers is read as that of the network's. A tensor that
is missing is an error; one left over is named. What is the embedding and what the head was decided
when the files were opened (`checkpoint`): here it is only looked up.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from offload_rt.device.kinds import Packing
from offload_rt.errors import CheckpointError
from offload_rt.model.checkpoint import HEAD_DIFFERS, Checkpoint, TensorExtent
from offload_rt.model.expert_layout import (
    NO_EXPERTS,
    Experts,
    ExpertTensor,
    LayerExperts,
    check_alike,
    no_experts,
    slices_of,
)
from offload_rt.model.experts import MATRICES, WIRED, wire_experts
from offload_rt.model.family import any_of
from offload_rt.model.files import shown
from offload_rt.model.formats.stored import Stored
from offload_rt.model.formats.wired import WiredExpert, wire_linears
from offload_rt.model.layout import FUSED, LayerLayout, Placement, plan_layouts
from offload_rt.model.modelling import (
    WeightConverter,
    WeightRenaming,
    apply_converters,
    get_model_conversion_mapping,
    rename_source_key,
)
from offload_rt.model.names import EXPERT, EXPERT_MATRIX

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A part of an image, and the name of the parameter or buffer it is."""

    key: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class Places:
    """Where all tensors of a network lie.

    Attributes:
        layouts: the image of each layer.
        base: the image of what is in no layer.
        of_layers: what of each layer's image is which parameter.
        of_base: the same of the other image.
        tied: whether the embedding is the output head, too.
    """

    layouts: tuple[LayerLayout, ...]
    base: LayerLayout
    of_layers: tuple[tuple[Place, ...], ...]
    of_base: tuple[Place, ...]
    tied: bool


def find_places(  # noqa: PLR0913 - experts may be in one of two places
    model: Any,  # noqa: ANN401 - what transformers builds is not annotated
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    packing: Packing,
    container: str,
    apart: Experts = NO_EXPERTS,
    quantised: Experts = NO_EXPERTS,
) -> Places:
    """Pair the tensors of the files with the parameters of the network.

    Args:
        model: transformers' modules, embedding and head apart.
        checkpoint: headers of the files.
        dtype: of the computation.
        packing: what the images are for.
        container: what numbers the layers in the network, such as `model.layers`.
        apart: experts that are in no image of a layer.
        quantised: such that are in one.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    names = _Names(model, checkpoint, container)
    if checkpoint.stored:
        elsewhere = apart.taken | quantised.taken
        others = {each: None for n, each in checkpoint.stored.items() if n not in elsewhere}
        wire_linears(model, others, names.key_of, tied=checkpoint.head is None)
        keys = _wire_experts(model, quantised, dtype)
        names = _Names(model, checkpoint, container, keys)
    name = str(dtype).removeprefix("torch.")
    layouts = plan_layouts(checkpoint, name, packing, without=apart.taken)
    places = [names.places(layout) for layout in layouts]
    if dtype is not torch.float32:
        wide = _fp32_names(model, names.state, places, dtype) - checkpoint.stored.keys()
        planned = {p.name for layout in layouts for p in layout.placements if p.dtype == "float32"}
        if wide != planned - checkpoint.stored.keys():
            # A rule that only the classes know; the plan has counted a few bytes less.
            layouts = plan_layouts(checkpoint, name, packing, _exactly(wide), apart.taken)
            places = [names.places(layout) for layout in layouts]
    what = f"{checkpoint.folder.name}: the text part of {checkpoint.config.part_of}"
    what = "the model" if checkpoint.config.whole is None else what
    for index, found in enumerate(places[:-1]):
        needed = names.of_layer(index)
        own = {key: tensor for key, tensor in needed.items() if key not in apart.leaves}
        _check(f"layer {index} of {what}", own, found)
    base, tied = names.with_ends(places[-1])
    _check(what, names.of_base(tied), base)
    names.say_strays(layouts)
    return Places(layouts[:-1], layouts[-1], tuple(map(tuple, places[:-1])), tuple(base), tied)


def find_experts(
    model: Any,  # noqa: ANN401
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    container: str,
    calls: Mapping[str, int],
) -> Experts:
    """Which tensors of the files are experts that can be streamed one by one.

    Args:
        model: transformers' modules.
        checkpoint: headers of the files.
        dtype: of the computation.
        container: what numbers the layers in the network.
        calls: modules whose experts the registered function computes, and experts of a row.

    Raises:
        CheckpointError: experts of a layer are not alike, or a tensor of all does not divide.
    """
    if not calls:
        return no_experts("this family does not compute its experts by transformers' interface")
    names = _Names(model, checkpoint, container)
    found = dict[int, LayerExperts]()
    leaves, taken = set[str](), set[str]()
    for index, extents in enumerate(checkpoint.layers):
        module = next((m for m in calls if m.startswith(f"{container}.{index}.")), None)
        if module is None:
            continue
        own = {leaf: names.state[f"{module}.{leaf}"] for leaf in names.matrices_of(module)}
        if any(state.dtype is not dtype for state in own.values()):
            return no_experts("its experts are computed in another number format")
        parts = [part for e in extents if (part := names.expert_part(e, module)) is not None]
        if any(part.expert is None and part.extent.coded for part in parts):
            return no_experts("all experts of a layer are packed together")
        where = f"layer {index} of {checkpoint.folder.name}"
        tensors = _by_expert(where, parts, next(iter(own.values())).shape[0])
        _check_experts(where, model.get_submodule(module), own, tensors)
        leaves |= {f"{module}.{leaf}" for leaf in own}
        taken |= {part.extent.name for part in parts}
        found[index] = LayerExperts(
            module=module, per_token=calls[module], tensors=tuple(map(tuple, tensors))
        )
    if not found:
        return no_experts("its experts are not in its layers")
    return Experts(layers=found, leaves=frozenset(leaves), taken=frozenset(taken))


@dataclass(frozen=True, slots=True)
class _Part:
    """A tensor of the files that is of one expert, or of all (None); maybe a quantised one's."""

    name: str
    expert: int | None
    extent: TensorExtent
    stored: Stored | None = None
    word: str = ""


def _by_expert(where: str, parts: Sequence[_Part], count: int) -> list[list[ExpertTensor]]:
    """The tensors of each expert."""
    found: list[list[ExpertTensor]] = [[] for _ in range(count)]
    for part in parts:
        if part.expert is None:
            for own, piece in zip(found, slices_of(part.extent, count), strict=True):
                own.append(ExpertTensor(name=part.name, extent=piece))
        elif part.expert < count:
            tensor = ExpertTensor(
                name=part.name, extent=part.extent, stored=part.stored, word=part.word
            )
            found[part.expert].append(tensor)
        else:
            raise CheckpointError(
                f"{where} has an expert {part.expert}, config.json states {count}: files and "
                "config are not of one model"
            )
    return found


def _check_experts(
    where: str,
    module: Any,  # noqa: ANN401
    needed: Mapping[str, torch.Tensor],
    experts: Sequence[Sequence[ExpertTensor]],
) -> None:
    """See that each expert has what its module computes with, in the shapes of one."""
    check_alike(where, experts)
    for leaf, all_experts in needed.items():
        mine = [t for t in experts[0] if t.name.partition(".")[0] == leaf]
        shape = list(all_experts.shape[1:])
        stored = dict.fromkeys(t.stored for t in mine if t.stored is not None)
        shapes: list[tuple[int, ...]] = [(each.outputs, each.inputs) for each in stored]
        if not stored:
            shapes = [t.extent.shape for t in mine]
        elif module.is_transposed:
            shape.reverse()  # a quantised matrix is always [outputs, inputs]
        made = [sum(one[0] for one in shapes if one), *(shapes[0][1:] if shapes else ())]
        if made != shape or len({one[1:] for one in shapes}) > 1:
            raise CheckpointError(
                f"{where}: an expert's {leaf} is {made} in the files, config.json makes it {shape}"
            )
        if stored and any(t.stored is None for t in mine):
            raise CheckpointError(
                f"{where}: an expert's {leaf} is quantised in part: take the model it was made from"
            )
        if len(shapes) > 1 and not module.is_concatenated:
            raise CheckpointError(
                f"{where}: an expert's {leaf} is in two in the files, and this family has the rows "
                "of both in turns: take a model with one tensor of both"
            )


def _wire_experts(model: Any, experts: Experts, dtype: torch.dtype) -> dict[str, str]:  # noqa: ANN401
    """Give layers of experts modules for their quantised weights; says what their tensors are."""
    keys = dict[str, str]()
    for own in experts.layers.values():
        each = [[t for t in expert if t.stored is not None] for expert in own.tensors]
        matrices = [{t.name: t.stored for t in expert if t.stored} for expert in each]
        wire_experts(model.get_submodule(own.module), matrices, dtype)
        for index, expert in enumerate(each):
            start = f"{own.module}.{WIRED}.{index}"
            keys |= {
                t.extent.name: f"{start}.{WiredExpert.buffer_of(t.name, t.word)}" for t in expert
            }
    return keys


class _Names:
    """Pairs tensors of files with those of a network."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        checkpoint: Checkpoint,
        container: str,
        own_keys: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.state: dict[str, torch.Tensor] = dict(model.state_dict(keep_vars=True))
        self._model, self._checkpoint, self._container = model, checkpoint, container
        mapping = get_model_conversion_mapping(model)
        self._renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        self._converters = [each for each in mapping if isinstance(each, WeightConverter)]
        # A whole is loaded by transformers' rules alone: other files may be of another model.
        self._of_whole = checkpoint.config.whole is not None
        in_files = container if self._of_whole else checkpoint.container
        self._prefixes = _without_common_end(in_files, container)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        keys = {id(tensor): key for key, tensor in self.state.items()}
        ends = [keys.get(id(getattr(end, "weight", None))) for end in (head, embedding)]
        if None in ends:
            raise CheckpointError(
                f"{type(model).__name__} has no output head or no embedding: this family cannot be "
                "streamed layer by layer"
            )
        self._head, self._embedding = map(str, ends)
        self._keys = dict[str, str | None]()  # of parameters that are made of several tensors
        self._own_keys = own_keys  # of parts of quantised experts

    def key_of(self, name: str) -> str | None:
        """The network's name of a tensor; None if it has no place for it.

        Raises:
            CheckpointError: transformers changes the tensor's numbers while it loads it.
        """
        if name in self._own_keys:
            return self._own_keys[name]
        if name in self._checkpoint.stored:  # such names may have dots that no buffer's can
            stored = self._checkpoint.stored[name]
            word = next(w for w, extent in stored.parts.items() if extent.name == name)
            name = f"{stored.module}.{word}"
        ours, theirs = self._prefixes
        swapped = theirs + name.removeprefix(ours)
        base = self._model.base_model_prefix
        for candidate in dict.fromkeys((name, swapped)):
            renamed, _ = rename_source_key(candidate, self._renamings, [], base, self.state)
            for key in (renamed, candidate):
                if key in self.state:
                    if apply_converters(key, self._converters)[1] is not None:
                        raise CheckpointError(
                            f"tensor {shown(name)} is one that transformers converts while it is "
                            "loaded, which cannot be done while weights are streamed"
                        )
                    return key
        return None

    def matrices_of(self, module: str) -> list[str]:
        """Parameters of a module of experts that hold a matrix of each."""
        return [leaf for leaf in sorted(MATRICES) if f"{module}.{leaf}" in self.state]

    def expert_part(self, extent: TensorExtent, module: str) -> _Part | None:
        """What of a module's experts a tensor is, if it is one of theirs."""
        stored = self._checkpoint.stored.get(extent.name)
        match = EXPERT_MATRIX.match(stored.module) if stored else EXPERT.match(extent.name)
        if stored is not None and match is None:
            return None
        leaf, part = FUSED.get(match["part"], (match["part"], None)) if match else ("", None)
        name = f"{match['moe']}.{leaf}" if match else extent.name
        key = self._known_key(name)
        if key is None and match:  # of experts without a gate
            key = self._known_key(f"{match['moe']}.{match['part']}")
        owner, _, leaf = (key or "").rpartition(".")
        if owner != module or leaf not in MATRICES:
            return None
        if match is None:
            return _Part(leaf, None, extent)
        word = extent.name.removeprefix(f"{stored.module}.") if stored else ""
        name = f"{leaf}.{part}" if leaf == "gate_up_proj" and part is not None else leaf
        return _Part(name, int(match["expert"]), extent, stored, word)

    def _known_key(self, name: str) -> str | None:
        """The same as `key_of`, looked up once: experts share their parameters."""
        if name not in self._keys:
            self._keys[name] = self.key_of(name)
        return self._keys[name]

    def places(self, layout: LayerLayout) -> list[Place]:
        """What of an image has a place in the network."""
        pairs = [(self.key_of(placement.name), placement) for placement in layout.placements]
        return [Place(key, placement) for key, placement in pairs if key is not None]

    def of_layer(self, index: int) -> dict[str, torch.Tensor]:
        """What a layer needs."""
        start = f"{self._container}.{index}."
        return {key: tensor for key, tensor in self.state.items() if key.startswith(start)}

    def of_base(self, tied: bool) -> dict[str, torch.Tensor]:
        """What is needed besides the layers."""
        layers, head = f"{self._container}.", f"{self._head.rpartition('.')[0]}."
        text = f"{self._container.rpartition('.')[0]}." if self._of_whole else ""
        needed = {
            key: tensor
            for key, tensor in self.state.items()
            if not key.startswith(layers) and key.startswith((text, head))
        }
        if tied:
            del needed[self._head]
        if self._checkpoint.lent_ends:
            del needed[self._head], needed[self._embedding]
        return needed

    def with_ends(self, places: list[Place]) -> tuple[list[Place], bool]:
        """See that the network may share what the files share; returns whether they do, too.

        Raises:
            CheckpointError: config.json does not tie the embedding and the head, and one of them
                is not there.
        """
        checkpoint = self._checkpoint
        if checkpoint.lent_ends:
            return places, False
        pairs = self._model.get_expanded_tied_weights_keys(all_submodels=True).items()
        ties = bool(pairs & {(self._head, self._embedding), (self._embedding, self._head)})
        if checkpoint.head is not None:
            if ties and checkpoint.config.tie_word_embeddings is None:
                _log.warning(HEAD_DIFFERS, shown(checkpoint.head.name))
            return places, False
        stored = checkpoint.embedding.name
        copied = any(self.key_of(extent.name) == self._head for extent in checkpoint.left_out)
        if not (ties or copied):
            lacks = self._embedding if self.key_of(stored) == self._head else self._head
            raise CheckpointError(
                f"{lacks} is missing from the files although config.json does not tie the head to "
                "the embedding: download the checkpoint again"
            )
        if self.state[self._head].shape != self.state[self._embedding].shape:
            raise CheckpointError("the embedding cannot be the output head: it has another shape")
        return [
            Place(self._embedding, p.placement) if p.placement.name == stored else p for p in places
        ], True

    def say_strays(self, layouts: Iterable[LayerLayout]) -> None:
        """Tell of parts of the images that the network has no place for."""
        strays = [p for each in layouts for p in each.placements if self.key_of(p.name) is None]
        if strays:
            _log.warning(
                "%s: %d tensors are not used, as the network has no place for them, such as %s",
                shown(self._checkpoint.folder.name),
                len(strays),
                shown(strays[0].name),
            )


def _check(where: str, needed: dict[str, torch.Tensor], places: Sequence[Place]) -> None:
    """See that all tensors are there, once each, in the shapes of the network."""
    found = {place.key: place.placement for place in places}
    missing = sorted(needed.keys() - found.keys())
    if missing:
        raise CheckpointError(
            f"{where} lacks {len(missing)} tensors, such as {missing[0]}: the files are not of the "
            "architecture config.json names, or of a version transformers renames"
        )
    for place in places:
        if found[place.key] is not place.placement:
            raise CheckpointError(
                f"{where}: tensors {shown(place.placement.name)} and "
                f"{shown(found[place.key].name)} are both {place.key}: download the checkpoint "
                "again"
            )
        if place.key in needed and tuple(needed[place.key].shape) != place.placement.shape:
            raise CheckpointError(
                f"{where}: tensor {shown(place.placement.name)} is {list(place.placement.shape)} "
                f"in the files, config.json makes it {list(needed[place.key].shape)}"
            )


def _fp32_names(
    model: Any,  # noqa: ANN401
    state: dict[str, torch.Tensor],
    places: Iterable[Sequence[Place]],
    dtype: torch.dtype,
) -> set[str]:
    """Tensors that are in fp32 in a model of that format, by the names of the files."""
    stays = any_of(tuple(model._get_dtype_plan(dtype)))
    return {
        place.placement.name
        for group in places
        for place in group
        if state[place.key].dtype is torch.float32 or (stays and stays.search(place.key))
    }


def _exactly(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile(f"(?:{'|'.join(map(re.escape, sorted(names)))})$")


def _without_common_end(in_files: str, in_model: str) -> tuple[str, str]:
    """What precedes the part that two prefixes have in common at their ends."""
    ours, theirs = in_files.split("."), in_model.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    return "".join(f"{part}." for part in ours), "".join(f"{part}." for part in theirs)
