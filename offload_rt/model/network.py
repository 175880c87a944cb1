"""The target network: transformers' own modules on the meta device, weights borrowed per layer.

Nothing of a family is rewritten. The modules are built without memory, each decoder layer's forward
is wrapped so that it borrows its weights from a store for as long as it runs, and HF's own forward
is called: masks, rotary tables and per-layer types stay theirs. What a family must do for this is
checked by one pass over meta tensors (`probe.py`), not by a list of names.

A prompt is prefilled layer-major: the wrapped layer works through the rows in chunks before the
next layer is touched, so weights are borrowed once per pass, whatever its length.
"""

import logging
import os
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, pairwise
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch.utils._pytree import tree_map

from offload_rt.config import DraftWeights
from offload_rt.device.base import DeviceBuffer
from offload_rt.device.kinds import Packing
from offload_rt.errors import CheckpointError
from offload_rt.kernels import attending
from offload_rt.kv.base import NO_KV, KVCache
from offload_rt.model import fits
from offload_rt.model.attention_function import (
    ATTENTION_NAME,
    CONTEXT_KEYWORD,
    Apart,
    PassContext,
    Segment,
    row_axis,
)
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.exact import (
    Looks,
    Regular,
    attention_problem,
    looks_of,
    make_exact,
    multiply_few_rows_at_once,
    product_shapes,
    products_problem,
)
from offload_rt.model.expert_layout import NO_EXPERTS, Experts, no_experts, plan_units
from offload_rt.model.experts import (
    EXPERTS_NAME,
    ExpertLender,
    ExpertWeights,
    Host,
    Matrix,
    NextRouter,
    experts_apart,
    follow,
    lend_experts,
    lend_host,
    multiply_at_once,
    multiply_together,
)
from offload_rt.model.formats import together
from offload_rt.model.formats.direct import at_home, direct_for
from offload_rt.model.formats.left_plain import note_left_plain
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.packed import (
    HEAD_ROWS,
    PackedEmbedding,
    pack_linears,
    packed_exactly,
    quickest,
    replace_linears,
    unlike_when_packed,
)
from offload_rt.model.formats.rounded import (
    Int4Linear,
    Int8Linear,
    RoundedEmbedding,
    rounded_linear,
)
from offload_rt.model.formats.stored import Stored
from offload_rt.model.formats.wide import wide_linear, widen_linears, widens
from offload_rt.model.formats.wired import (
    Bringer,
    RowEmbedding,
    StoredMatrix,
    WiredLinear,
    bringers_below,
    wired_linears,
)
from offload_rt.model.layout import LayerLayout, Placement, compute_dtype
from offload_rt.model.lean import Rooms, lean_layer
from offload_rt.model.mixing import STATES_KEYWORD, AnchoredMixer, PassStates
from offload_rt.model.modules import build_modules
from offload_rt.model.network_names import Place, find_experts, find_places
from offload_rt.model.probe import probe, run_on_shapes
from offload_rt.model.tiles import filled, places_problem, tile_outside
from offload_rt.report import Dequantising

MatricesOf = Callable[[LayerLayout, DeviceBuffer], ExpertWeights]
NOBODY: Mapping[int, ExpertLender] = MappingProxyType({})
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Base:
    """What is in no layer, where it computes.

    Attributes:
        images: hold it, and what lies where in each.
        rows: reads rows of the embedding of its file, [N] numbers to [N, ...]; None: it is in an
            image.
    """

    images: Sequence[tuple[LayerLayout, DeviceBuffer]]
    rows: Callable[[torch.Tensor], torch.Tensor] | None = None


class Weights(Protocol):
    """Whoever lends the image of a layer on the device."""

    def lend(self, layer: int, /) -> AbstractContextManager[DeviceBuffer]:
        """Lend the image of `layer`."""


class Crossing(Protocol):
    """Several devices that have the layers in turn; what is in no layer is on the first."""

    @property
    def device(self) -> Sequence[int]:
        """The number of each layer's device."""

    @property
    def here(self) -> int | None:
        """The only device of this process, where each has one; None: all of them are.

        Every process then makes the pass, and only its own layers of it.
        """

    def place(self, device: int, /) -> torch.device:
        """Where tensors of a device live."""

    def hop(self, tensor: torch.Tensor, source: int, target: int, /) -> torch.Tensor:
        """Bring a tensor from one device to another."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """The new tokens of a pass.

    Attributes:
        token_ids: [S] int64, all sequences packed.
        positions: [S] int64, the place of each token in its own sequence.
        segments: the sequences, in packed order.
        logit_rows: [R] int64, packed rows whose logits are wanted.
        hidden: [S, E] of a network that reads hidden states beside its tokens, or in place of
            them if nothing says how they mix; else None.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    segments: Sequence[Segment]
    logit_rows: torch.Tensor
    hidden: torch.Tensor | None = None


class Network:
    """A decoder-only network whose weights are elsewhere.

    Args:
        checkpoint: headers of the model folder.
        dtype: `auto` or torch's name of a number format.
        packing: how layer images are laid out.
        model: its modules (`build_modules`), if they are there already.
        experts_apart: layers whose experts are lent one by one, and have images of their own
            (`units`).

    Attributes:
        layouts: the image of each layer, without experts that are apart.
        units: the image of each expert that is apart, by layer.
        base: the image of what is in no layer (embedding, final norm, head).
        kv_shapes: cache sizes of each layer; `NO_KV` of one that does not attend.
        mixers: what has a recurrent state.
        apart: why layers cannot be on several devices; empty if they can.
        sorts_on_host: rows are sorted by expert on the host, if there are experts (`experts.py`).
        dtype: number format of the computation.
        kept: layers that have their weights for good.
        poll: called before each layer and chunk of a pass; may raise to end the pass there.
        gone: whether nobody waits for a cache's rows any more; asked before each layer, which then
            goes on without them. Where layers are on several devices they stay to the end.
        pass_rows: rows of the newest pass.
        rows_done: rows that went through a layer, of all passes and layers.
        chunk_tokens: rows that go through a layer at once.
        watched: who looks at what passes compute, or at layers while they run.
        dequantising: who does that; None where no weight is quantised.
        exact: what is computed of a row does not depend on the pass it is in (`exact.py`); set
            before weights are kept, if at all.
        tiles: where it is: rows of the tiles that layers are given (`tiles.py`); 0: linears and
            activations see to it (`exact.py`).

    Raises:
        CheckpointError: transformers does not know the family, the family cannot be streamed, or
            its tensors are not those the network needs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: str,
        packing: Packing,
        model: torch.nn.Module | None = None,
        *,
        experts_apart: Collection[int] = (),
    ) -> None:
        name = compute_dtype(checkpoint, dtype)
        self.dtype: torch.dtype = getattr(torch, name)
        self._model = _with_own_head(model or _build(checkpoint, self.dtype))
        container, layers = _find_layers(self._model, checkpoint.config.num_layers)
        self._container, self._layers = container, layers
        self._config = checkpoint.config
        self.poll: Callable[[], None] = lambda: None
        self.gone: Callable[[KVCache], bool] | None = None
        self.pass_rows = self.rows_done = self.watched = self.chunk_tokens = 0
        self.exact, self.tiles = False, 0
        self._looks = Looks()
        self._instead_of_layers: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._tapped: dict[int, torch.Tensor | None] = {}
        self._mixes: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
        self._goes_on = ""
        self._crossing: Crossing | None = None
        self.kept: set[int] = set()
        self.dequantising: Dequantising | None = None
        apart = inside = NO_EXPERTS
        quantised = any(each.of_expert for each in checkpoint.stored.values())
        if experts_apart or quantised:
            calls = probe(self._model, layers, checkpoint.config).experts
            found = find_experts(self._model, checkpoint, self.dtype, container, calls)
            if quantised and found.reason:
                raise CheckpointError(
                    f"{checkpoint.folder.name}: its experts are quantised, and can be computed one "
                    f"by one only, but {found.reason}: take the model it was made from"
                )
            apart = found.of(experts_apart)
            inside = found.of(found.layers.keys() - experts_apart) if quantised else NO_EXPERTS
        self._experts, self.units = apart, plan_units(apart, name, packing)
        self._bringers = {
            stored: Bringer(stored, self.dtype)
            for own in self.units.values()
            for unit in own
            for stored in unit.stored
        }
        self._places = find_places(
            self._model, checkpoint, self.dtype, packing, container, apart, inside
        )
        self._wires_experts = quantised
        self.layouts, self.base = self._places.layouts, self._places.base
        self._lenders: Mapping[int, ExpertLender] = {}
        self._place = torch.device("meta")  # until it is attached
        fit = probe(self._model, layers, checkpoint.config)
        self.kv_shapes, self.mixers, self._in_tuples = fit.kv, fit.mixers, fit.in_tuples
        self.apart = fit.apart
        self.sorts_on_host = False
        self._mixtures = tuple(fit.experts)
        self._mixing = [self._model.get_submodule(mixer.path) for mixer in fit.mixers]
        for module, mixer in zip(self._mixing, fit.mixers, strict=True):
            module.forward = AnchoredMixer(module, mixer)
        self._holes = [_holes(self._model, places) for places in self._places.of_layers]
        self._bindings: dict[tuple[int, int], list[tuple[_Hole, torch.Tensor]]] = {}

    def keep(
        self,
        index: int,
        image: DeviceBuffer,
        *,
        pack: frozenset[tuple[int, int]] = frozenset(),
        weights: DraftWeights = DraftWeights.SAME,
        drafts: bool = False,
    ) -> None:
        """Let a layer have its weights for good.

        Args:
            index: layer index.
            image: holds them.
            pack: keep reordered copies of linears of these outputs and inputs
                (`formats/packed.py`).
            weights: keep rounded copies (`formats/rounded.py`). Nothing refers to `image` after
                either.
            drafts: as of `pack_linears`.
        """
        for hole, tensor in _bind(self._holes[index], image):
            hole.fill(tensor)
        if weights is not DraftWeights.SAME:
            make = partial(rounded_linear, weights=weights)
            replace_linears(self._layers[index], make)
            replace_linears(self._layers[index], lambda wired: make(wired.as_linear()), WiredLinear)
        elif pack:
            pack_linears(self._layers[index], pack, exact=self.exact, drafts=drafts)
        if pack or weights is not DraftWeights.SAME:
            self._holes[index] = []
        self.kept.add(index)

    def borrow(self, other: "Network", layers: Iterable[int]) -> None:
        """Use another network's own modules for these layers; after both are attached.

        Args:
            other: of the same model, which has these layers for good.
            layers: their indices.
        """
        own = self._model.get_submodule(self._container)
        assert isinstance(own, torch.nn.ModuleList)  # as it was found
        found = list(self._layers)
        for index in layers:
            assert index in other.kept
            own[index] = found[index] = other._layers[index]
            self._holes[index] = []
            self.kept.add(index)
        self._layers = found

    def round_ends(self, weights: DraftWeights) -> None:
        """Use rounded copies of the output head and the embedding, where the head can be rounded.

        After `attach`; then nothing refers to the image of `base`.
        """
        head, embedding = _ends(self._model)
        made = rounded_linear(head, weights) if type(head) is torch.nn.Linear else None
        if made is None or not isinstance(embedding, torch.nn.Embedding):
            return
        tied = isinstance(made, Int8Linear | Int4Linear) and made.product is not None
        tied = tied and head.weight.data_ptr() == embedding.weight.data_ptr()
        self._replace_ends(made, RoundedEmbedding(embedding, made if tied else None))

    def pack_ends(self) -> bool:
        """Have what drafts use a reordered output head, as the embedding too where both are one.

        After `attach`; then nothing refers to the image of `base`.

        Returns:
            whether there is one: a head that is the embedding too must lie where rows can be found.
        """
        head, embedding = _ends(self._model)
        if type(head) is not torch.nn.Linear or not isinstance(embedding, torch.nn.Embedding):
            return False
        if head.weight.dtype is not torch.bfloat16:
            return False
        made, found = quickest(head), None
        if head.weight.data_ptr() == embedding.weight.data_ptr():
            if made.product is None:
                return False
            found = PackedEmbedding(embedding, made)
        self._replace_ends(made, found)
        return True

    def _replace_ends(self, made: torch.nn.Module, found: torch.nn.Module | None) -> None:
        """Put others in place of output head and embedding; all else gets memory of its own.

        Args:
            made: the output head.
            found: the embedding; None: as it is.
        """
        head, embedding = _ends(self._model)
        ends = [head] if found is None else [head, embedding]
        for hole in _holes(self._model, self._places.of_base):
            if not any(hole.tensors is end._parameters for end in ends):
                copy = hole.meta.detach().clone()
                is_parameter = isinstance(hole.meta, torch.nn.Parameter)
                hole.fill(torch.nn.Parameter(copy, False) if is_parameter else copy)
        self._model.set_output_embeddings(made)  # type: ignore[operator]
        if found is not None:
            self._model.set_input_embeddings(found)  # type: ignore[operator]
        head._parameters.clear()

    def round_head(self, weights: DraftWeights) -> None:
        """Use a rounded copy of the output head, where it can be rounded; after `attach`."""
        head, _ = _ends(self._model)
        made = rounded_linear(head, weights) if type(head) is torch.nn.Linear else None
        if made is not None:
            self._model.set_output_embeddings(made)  # type: ignore[operator]
            head._parameters.clear()

    def pack_head(self) -> bool:
        """Use a reordered copy of the output head if that gives the same numbers; after `attach`.

        The plain one stays: it is the embedding, or lies in the image of `base` with that.

        Returns:
            whether there is one now.
        """
        head, _ = _ends(self._model)
        if type(head) is not torch.nn.Linear or head.weight.dtype is not torch.bfloat16:
            return False
        made = packed_exactly(head, HEAD_ROWS, exact=self.exact)
        shape = [(head.out_features, head.in_features)]
        if not self.exact:
            note_left_plain(shape if made is None else (), shape)
        if made is None:
            return False
        self._model.set_output_embeddings(made)  # type: ignore[operator]
        head._parameters.clear()
        return True

    @property
    def dequantises(self) -> bool:
        """Whether layers keep weights as they are stored, dequantised in each pass."""
        return bool(wired_linears(self._model)) or any(bringers_below(self._model))

    def matrices_of(self, unit: LayerLayout, image: DeviceBuffer) -> ExpertWeights:
        """The matrices of an expert that is in `image`."""
        return self._matrices(unit, image, self._bringers)

    def compute_at_home(self, in_order: Container[Stored]) -> MatricesOf:
        """Prepare the host to compute experts that are apart; returns their matrices there.

        Args:
            in_order: quantised weights of which inputs of a group follow each other.
        """
        stored = [s for own in self.units.values() for unit in own for s in unit.stored]
        host = {each: Bringer(each, self.dtype) for each in stored}
        for each, bringer in host.items():
            bringer.direct = at_home(each, self.dtype, in_order=each in in_order)
        decoded = [s for s in host if host[s].direct is None or s.form is Form.CODED]
        numbers = max((each.numbers for each in decoded), default=0)
        scratch = torch.empty(numbers * self.dtype.itemsize, dtype=torch.uint8)
        for each, bringer in host.items():
            bringer.lend(scratch, in_order=each in in_order)
        return lambda unit, image: self._matrices(unit, image, host)

    def _matrices(
        self, unit: LayerLayout, image: DeviceBuffer, bringers: Mapping[Stored, Bringer]
    ) -> ExpertWeights:
        found, stored = dict[str, Matrix](), iter(unit.stored)
        parts = dict[str, dict[str, torch.Tensor]]()
        for place in unit.placements:
            data = image.tensor[place.offset : place.offset + place.nbytes]
            tensor = data.view(getattr(torch, place.dtype)).view(place.shape)
            name, _, word = place.name.partition(":")
            if not word:
                found[name] = tensor
                continue
            if name not in parts:
                parts[name] = {}
                found[name] = StoredMatrix(bringers[next(stored)], parts[name])
            parts[name][word] = tensor
        return found

    def lend_scratch(
        self, layers: Sequence[int], memory: DeviceBuffer, in_order: Container[Stored]
    ) -> None:
        """Let weights of layers be dequantised there; before any computes or is rounded.

        Args:
            layers: their indices.
            memory: room for one weight.
            in_order: weights of which inputs of a group follow each other.

        Output head and embedding are where it is lent first.
        """
        head, embedding = _ends(self._model)
        if isinstance(head, WiredLinear) and not head.scratch.numel():
            head.lend(memory.tensor, in_order=True, exact=self.exact)
        if isinstance(embedding, RowEmbedding):
            embedding.lend(memory.tensor.device)
        for index in layers:
            for linear in wired_linears(self._layers[index]):
                in_order_too = linear.stored in in_order
                linear.lend(memory.tensor, in_order=in_order_too, exact=self.exact)
            units = [self._bringers[s] for u in self.units.get(index, ()) for s in u.stored]
            for bringer in chain(bringers_below(self._layers[index]), units):
                ordered = bringer.stored in in_order
                bringer.lend(memory.tensor, in_order=ordered)
                bringer.direct = direct_for(
                    *(bringer.stored, self.dtype, memory.tensor.device),
                    exact=self.exact,
                    in_order=ordered,
                )

    @property
    def attending(self) -> tuple[int, ...]:
        """Layers that keep keys and values."""
        return tuple(i for i, shape in enumerate(self.kv_shapes) if shape.heads)

    def linear_shapes(self, index: int) -> frozenset[tuple[int, int]]:
        """Shapes of a layer's linears, by which kinds of layers are told apart."""
        linears = (m for m in self._layers[index].modules() if isinstance(m, torch.nn.Linear))
        return frozenset((linear.out_features, linear.in_features) for linear in linears)

    def unlike_when_packed(self, index: int, image: DeviceBuffer) -> frozenset[tuple[int, int]]:
        """Shapes of linears that compute other numbers packed; the layer's weights in `image`."""
        pairs = _bind(self._holes[index], image)
        for hole, tensor in pairs:
            hole.fill(tensor)
        with torch.inference_mode():
            unlike = unlike_when_packed(self._layers[index], exact=self.exact)
        for hole, _ in pairs:
            hole.fill(hole.meta)
        return unlike

    def exact_problem(
        self, device: torch.device, tiles: int = 0, *, limit_bytes: int, ends: bool = True
    ) -> str:
        """Why passes there cannot be row-invariant; empty if they can. Before `attach`.

        Args:
            device: where passes are made.
            tiles: of so many rows; 0: linears and activations see to it.
            limit_bytes: planned there, of which nothing is used yet.
            ends: the output head is there, too.
        """
        heads, kv = self._config.num_heads, {*self.kv_shapes} - {NO_KV}
        attention = {(heads, each.heads, each.key_dim, each.value_dim) for each in kv}
        if tiles:
            parts = [self._model] if ends else self._layers
            products = {shape for part in parts for shape in product_shapes(part)}
            widths = [self._config.hidden_size]
            return places_problem(
                products, attention, widths, self.dtype, device, tiles, limit_bytes
            )
        run = partial(run_on_shapes, self._model)
        find = partial(looks_of, self._model, run, self._mixing)
        self._looks = fits.looks(self._model, self._config, find)
        capped = self._config.setting("attn_logit_softcapping") is not None
        for shape in kv:  # now, as LLVM takes memory for a moment
            attending.takes(self.dtype, shape.key_dim, shape.value_dim, capped=capped)
        wide = widens(self.dtype, device)
        found = self._looks.problem
        below = {bringer.stored for bringer in bringers_below(self._model)} | {*self._bringers}
        experts = frozenset((one.inputs, one.outputs) for one in below if one.of_expert)
        looks = replace(self._looks, shapes=self._looks.shapes | experts)
        found = found or products_problem(
            self._model, looks, self.dtype, widens=wide, limit_bytes=limit_bytes
        )
        return found or attention_problem(attention, self.dtype, capped=capped)

    def attach(
        self,
        weights: Weights | None,
        base: Base | None,
        device: torch.device,
        chunk_tokens: int,
        crossing: Crossing | None = None,
        experts: Mapping[int, ExpertLender] = NOBODY,
    ) -> None:
        """Connect the network to its memory.

        Args:
            weights: lends the image of each layer but those that have theirs (`keep`); None if
                all have.
            base: what is in `self.base`; None: embedding and head are on another machine,
                and the rest was brought (`bring_rest`).
            device: where passes begin and end.
            chunk_tokens: rows that go through a layer at once.
            crossing: says where layers are, if they are on several devices.
            experts: lend those that are apart, by layer.
        """
        assert experts.keys() == self.units.keys()
        for index, own in self._experts.layers.items():
            lend_experts(self._model.get_submodule(own.module), experts[index])
        apart = bool(experts)
        config: Any = self._model.config
        ours = device.type == "cpu" or self._wires_experts or apart or self.tiles > 0
        if ours and config.get_text_config()._experts_implementation is not None:
            self._model.set_experts_implementation(EXPERTS_NAME)  # type: ignore[operator]
            self.sorts_on_host = True
        self._lenders, self._place, self.chunk_tokens = experts, device, chunk_tokens
        if base is not None:
            self._have_base(base)
        self._settle_products(device)  # by their shapes, of experts that are apart too
        self._leave_out_other_parts(device)
        _move_buffers(self._model, device)
        self._crossing, rooms = crossing, Rooms()
        for index, layer in enumerate(self._layers):
            if crossing is not None and crossing.here is None:
                _move_buffers(layer, crossing.place(crossing.device[index]))
            lender, forward = (None if index in self.kept else weights), layer.forward
            lean = index in self.kept and not self.mixers and not self.tiles
            if lean and (made := lean_layer(layer, rooms, first=index == min(self.kept))):
                forward = made
            run = partial(
                self._run_layer,
                index,
                partial(_first_of, forward) if self._in_tuples else forward,
                weights=lender,
                chunk_tokens=chunk_tokens,
            )
            layer.forward = partial(_in_tuple, run, self._in_tuples) if self._in_tuples else run

    def _have_base(self, base: Base) -> None:
        """Connect what is in no layer."""
        of_base = {h.placement.name: h for h in _holes(self._model, self._places.of_base)}
        for layout, image in base.images:
            holes = [replace(of_base[p.name], placement=p) for p in layout.placements]
            for hole, tensor in _bind(holes, image):
                hole.fill(tensor)
        head, embedding = _ends(self._model)
        if self._places.tied:
            head.weight = embedding.weight
        if base.rows is None:
            return
        if not isinstance(embedding, RowEmbedding):
            embedding = RowEmbedding(embedding)
            self._model.set_input_embeddings(embedding)  # type: ignore[operator]
        embedding.rows = base.rows

    def foresee(self) -> int:
        """Let experts that are apart know the next layer's router; after `attach`.

        A part of a layer that asks for more than rows, as where router and experts are in the layer
        itself, is not asked.

        Returns:
            how many layers can say what the next one will ask for.
        """
        count, layers = 0, sorted(self._experts.layers.items())
        for (_, own), (index, other) in pairwise(layers):
            path = other.module.rpartition(".")[0]
            if path == f"{self._container}.{index}":
                continue
            module, experts = map(self._model.get_submodule, (own.module, other.module))
            router = NextRouter(self._model.get_submodule(path), experts)
            rows = torch.zeros(1, self._config.hidden_size, dtype=self.dtype, device=self._place)
            try:
                with torch.inference_mode():
                    router(rows)
            except Exception as error:  # noqa: BLE001 - a family's own code, asked in another way
                _log.debug("the router of layer %d is not asked ahead: %s", index, error)
                continue
            follow(module, router)
            count += 1
        return count

    def bring_rest(self, read: Callable[[str], torch.Tensor], device: torch.device) -> None:
        """Have what is in no layer but for embedding and head: norms, and learned positions.

        Args:
            read: gives a tensor of the files, by name.
            device: where it goes.
        """
        ends = [end._parameters for end in _ends(self._model)]
        for hole in _holes(self._model, self._places.of_base):
            if not any(hole.tensors is end for end in ends):
                dtype: torch.dtype = getattr(torch, hole.placement.dtype)
                made = read(hole.placement.name).to(device, dtype)
                is_parameter = isinstance(hole.meta, torch.nn.Parameter)
                hole.fill(torch.nn.Parameter(made, False) if is_parameter else made)

    def _settle_products(self, device: torch.device) -> None:
        """Have linears compute as the device and `exact` need it."""
        if widens(self.dtype, device):
            widen_linears(self._model)
            for linear in wired_linears(self._model):
                linear.compute_by(wide_linear)
        if self.tiles:
            tile_outside(self._model, self._layers, self.tiles)
        elif self.exact:
            make_exact(self._model)
            for name in self._mixtures:
                multiply_at_once(self._model.get_submodule(name))
        elif device.type == "cpu" and self.dtype is torch.bfloat16:
            for name in self._mixtures:
                multiply_few_rows_at_once(self._model.get_submodule(name))

    def _leave_out_other_parts(self, device: torch.device) -> None:
        """Give parameters of no part of the text network nothing, where passes run.

        A whole asks its first parameters where it is; the text of a prompt does not go through
        them, and a pass that uses one fails.
        """
        placed = {place.key for group in self._places.of_layers for place in group}
        placed |= {place.key for place in self._places.of_base}
        head = _ends(self._model)[0]  # of a node that lacks it, it keeps its shape
        for name, parameter in list(self._model.named_parameters(remove_duplicate=False)):
            path, _, leaf = name.rpartition(".")
            owner = self._model.get_submodule(path)
            if parameter.is_meta and name not in placed and owner is not head:
                nothing = torch.empty(0, dtype=parameter.dtype, device=device)
                owner._parameters[leaf] = torch.nn.Parameter(nothing, False)

    def lend_host(self, host: Host, layers: Iterable[int]) -> None:
        """Let experts of layers ask there which of them rows are sent to; a CPU is one itself."""
        mine = tuple(f"{self._container}.{index}." for index in layers)
        for name in self._mixtures:
            if name.startswith(mine):
                module = self._model.get_submodule(name)
                lend_host(module, host)
                if not self.exact and together.is_there(self._place):
                    multiply_together(module)

    def release(self) -> None:
        """Let go of all weights now, not when Python finds the cycles; no pass can run after it."""
        for layer in self._layers:
            layer.__dict__.pop("forward", None)  # refers to the layer and to this network
        for module in self._mixing:
            module.__dict__.pop("forward", None)
        self._model, self._layers, self._holes, self._mixing = torch.nn.Module(), (), [], []
        self._bindings.clear()
        self._crossing = self.gone = None
        self._lenders = {}
        self.poll = lambda: None

    @property
    def lends_scratch(self) -> bool:
        """Whether linears outside experts dequantise into memory that they share."""
        return bool(wired_linears(self._model))

    @property
    def crosses(self) -> bool:
        """Whether layers are on several devices or machines."""
        return self._crossing is not None

    @property
    def per_token(self) -> int:
        """Experts of a layer that a token is sent to, of those that are apart."""
        return self._experts.per_token

    @property
    def hidden_size(self) -> int:
        """E."""
        return self._config.hidden_size

    @property
    def head_rows(self) -> int:
        """Rows of the output head: ids the model can answer with."""
        return int(_ends(self._model)[0].weight.shape[0])

    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output head alone: [..., E] after the final norm to [..., V], before any scaling."""
        head = _ends(self._model)[0]
        logits: torch.Tensor = type(head).forward(head, hidden)  # without what watches passes
        return logits

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of rows that `hidden` gave, scaled or squashed as the family does: [R, V].

        The modules are run over one token with the layers left out, and the head is fed the rows.
        """
        head = _ends(self._model)[0]
        zero = torch.zeros(1, dtype=torch.long, device=hidden.device)
        saved = head.forward
        head.forward = lambda _: saved(hidden[None])
        self._instead_of_layers = lambda given: given
        try:
            return self.forward(TokenBatch(zero, zero, [], zero))
        finally:
            head.forward, self._instead_of_layers = saved, None

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output head would be fed for rows [R, E] that leave the last layer: [R, E]."""
        zero = torch.zeros(1, dtype=torch.long, device=hidden.device)
        self._instead_of_layers = lambda _: hidden[None]
        try:
            return self.hidden(TokenBatch(zero, zero, [], zero))
        finally:
            self._instead_of_layers = None

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The embedding alone: [S] int64 to [S, E]."""
        embedded: torch.Tensor = _ends(self._model)[1](token_ids)
        return embedded

    def lend_ends(self, other: "Network") -> None:
        """Let a network have this one's embedding and output head (`Checkpoint.lent_ends`)."""
        other._model.set_input_embeddings(_Lent(self.embed))  # type: ignore[operator]
        other._model.set_output_embeddings(_Lent(self.head_logits))  # type: ignore[operator]

    def answer_with(self, work: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Have this make logits [..., V] of what the output head is fed, [..., E]."""
        self._model.set_output_embeddings(_Lent(work))  # type: ignore[operator]

    def mix_with(
        self, mixes: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], goes_on: str = ""
    ) -> None:
        """Read hidden states beside tokens, as a part of the modules says.

        Args:
            mixes: of embedded tokens [S, E] and hidden states [S, E], what the first layer is fed.
            goes_on: the module whose input is what it goes on from; empty: the output head.
        """
        self._mixes, self._goes_on = mixes, goes_on

    def watch_head(self, watch: Callable[[torch.Tensor], None]) -> None:
        """Have each pass call `watch` with [R, E], what the output head is fed."""
        self.watched += 1
        head = _ends(self._model)[0]
        head.register_forward_pre_hook(lambda _, fed: watch(fed[0][0]))

    def tap(self, layers: Sequence[int]) -> None:
        """Have each pass keep what leaves these layers, until `tapped` fetches it."""
        self.watched += 1
        self._tapped = dict.fromkeys(layers)

    def tapped(self) -> list[torch.Tensor]:
        """Of the newest pass, [S, E] for each tapped layer: all rows, before the final norm."""
        found = []
        for index, rows in self._tapped.items():
            assert rows is not None  # every pass goes through every layer
            found.append(rows)
            self._tapped[index] = None
        return found

    def context(self, batch: TokenBatch, apart: Apart | None = None) -> PassContext:
        """What layers know of a pass."""
        return PassContext(
            batch.segments,
            wanted=batch.logit_rows,
            exact=self.exact,
            tiles=self.tiles,
            apart=apart,
        )

    def passed(self, rows: int) -> None:
        """A pass of so many rows was made of steps that were noted."""
        self.pass_rows = rows
        self.rows_done += rows * len(self._layers)

    def forward(self, batch: TokenBatch, context: PassContext | None = None) -> torch.Tensor:
        """Run one pass; rows are appended to the caches and stay pending.

        Args:
            batch: the rows.
            context: of it, if its steps are made apart.

        Returns:
            [R, V] logits of the wanted rows.
        """
        context = context or self.context(batch)
        states = {STATES_KEYWORD: PassStates(context)} if self.mixers else {}
        given = {"input_ids": batch.token_ids[None]}
        if (hidden := batch.hidden) is not None:
            if self._mixes is not None:
                hidden = self._mixes(self.embed(batch.token_ids), hidden)
            given = {"inputs_embeds": hidden[None]}
        regular = bool(self._mixtures) if self.tiles else self.exact and self._looks.regular
        mixtures = experts_apart(map(self._model.get_submodule, self._mixtures), context.apart)
        with mixtures, Regular(self.tiles) if regular else nullcontext():
            output = self._model(
                **given,
                position_ids=batch.positions[None],
                use_cache=False,
                **{CONTEXT_KEYWORD: context},
                **states,
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def logits_and_hidden(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one pass.

        Returns:
            [R, V] logits of the wanted rows, and [R, E] what the network goes on from behind them.
        """
        fed: list[torch.Tensor] = []
        ahead = _ends(self._model)[0]
        if self._goes_on:
            ahead = self._model.get_submodule(self._goes_on)
        handle = ahead.register_forward_pre_hook(lambda _, given: fed.append(given[0][0]))
        try:
            logits = self.forward(batch)
        finally:
            handle.remove()
        (rows,) = fed
        return logits, rows

    def hidden(self, batch: TokenBatch) -> torch.Tensor:
        """Run one pass that leaves the output head out.

        Returns:
            [R, E] what the output head would be fed for the wanted rows.
        """
        head, fed = _ends(self._model)[0], []

        def keep(rows: torch.Tensor) -> torch.Tensor:
            fed.append(rows[0])
            return rows[..., :0]  # families scale or squash logits: they may do so with none

        saved, head.forward = head.forward, keep
        try:
            self.forward(batch)
        finally:
            head.forward = saved
        (rows,) = fed
        return rows

    def watch_layers(self, enter: Callable[[int], None], leave: Callable[[int], None]) -> None:
        """Have passes call `enter` and `leave` with the index of each layer, around it."""
        self.watched += 1
        for index, layer in enumerate(self._layers):
            layer.register_forward_pre_hook(lambda *_, index=index: enter(index))
            layer.register_forward_hook(lambda *_, index=index: leave(index))

    @contextmanager
    def noting_finite(self) -> Iterator[list[torch.Tensor]]:
        """Have passes of the body note of each layer whether all that leaves it is finite, [] bool.

        For the search after a failure: a pass reads all it computes once more. Of a layer on
        another machine (`is_elsewhere`) it is what this one has of the layers before it.
        """
        notes: list[torch.Tensor] = []

        def note(index: int, made: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
            rows = made[0] if isinstance(made, tuple) else made
            finite, crossing = rows.isfinite().all(), self._crossing
            # What leaves the last layer is on the first device; other machines send no notes.
            if crossing is not None and crossing.here is None and index < len(self._layers) - 1:
                at = crossing.device[index]
                finite = crossing.hop(finite, at, 0) if at else finite
            notes.append(finite)

        handles = [
            layer.register_forward_hook(lambda _, given, made, index=index: note(index, made))
            for index, layer in enumerate(self._layers)
        ]
        self.watched += 1
        try:
            yield notes
        finally:
            self.watched -= 1
            for handle in handles:
                handle.remove()

    def _run_layer(
        self,
        index: int,
        forward: Callable[..., torch.Tensor],
        hidden: torch.Tensor,
        *,
        weights: Weights | None,
        chunk_tokens: int,
        **options: object,
    ) -> torch.Tensor:
        """Borrow the weights of a layer and take all rows [1, S, E] through it, chunk by chunk."""
        context = options[CONTEXT_KEYWORD]
        assert isinstance(context, PassContext)
        if self._instead_of_layers is not None:
            return self._instead_of_layers(hidden)
        chunk_tokens = self.tiles or chunk_tokens
        self.poll()
        if self.gone is not None and self._crossing is None:
            hidden = context.leave(self.gone, hidden)
            if context.kept is not None:
                cut_all = partial(_rows_of, rows=context.all_rows, part=context.kept)
                options = tree_map(cut_all, options)
        self.pass_rows = rows = hidden.shape[1]
        hidden, context, options = self._cross(index, hidden, context, options)
        if self.is_elsewhere(index):
            return self._leave(index, hidden, context)
        if (lender := self._lenders.get(index)) is not None:
            lender.begin(-(-rows // chunk_tokens))
        with self._lent(index, weights):
            if rows <= chunk_tokens:
                hidden = self._in_tile(forward, hidden, options)
                self.rows_done += rows
                return self._leave(index, hidden, context)
            for start in range(0, rows, chunk_tokens):
                self.poll()
                context.rows = range(start, min(start + chunk_tokens, rows))
                cut = partial(_rows_of, rows=rows, part=slice(start, context.rows.stop))
                # A chunk depends on nothing after it, so its result may replace its input.
                part = hidden[:, start : context.rows.stop]
                part.copy_(self._in_tile(forward, part, tree_map(cut, options)))
                self.rows_done += len(context.rows)
            context.rows = range(rows)
            return self._leave(index, hidden, context)

    def _in_tile(
        self, forward: Callable[..., torch.Tensor], hidden: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """Take rows [1, S, E] through a layer, filled up to a tile where there are tiles."""
        rows = hidden.shape[1]
        missing = -rows % self.tiles if self.tiles else 0
        if not missing:
            return forward(hidden, **options)

        def fill(value: Any) -> Any:  # noqa: ANN401
            axis = row_axis(value.shape, rows) if isinstance(value, torch.Tensor) else 0
            return filled(rows, missing, value, axis) if axis else value

        return forward(fill(hidden), **tree_map(fill, options))[:, :rows]

    def is_elsewhere(self, index: int) -> bool:
        """Whether another machine makes a layer."""
        crossing = self._crossing
        return crossing is not None and crossing.here not in (None, crossing.device[index])

    def _cross(
        self, index: int, hidden: torch.Tensor, context: PassContext, options: dict[str, Any]
    ) -> tuple[torch.Tensor, PassContext, dict[str, Any]]:
        """What a layer is given, on its device: hidden states from the layer before it."""
        if (crossing := self._crossing) is None:
            return hidden, context, options
        before, here = crossing.device[index - 1] if index else 0, crossing.device[index]
        if before != here:
            hidden = crossing.hop(hidden, before, here)
        if here and crossing.here is None:
            options = tree_map(partial(context.brought, device=here, hop=crossing.hop), options)
            context = options[CONTEXT_KEYWORD] = context.on(here, crossing.hop)
            if self.mixers:
                options[STATES_KEYWORD] = PassStates(context)
        return hidden, context, options

    def _leave(self, index: int, hidden: torch.Tensor, context: PassContext) -> torch.Tensor:
        """What a layer made; of the last one the wanted rows, on the first device.

        Norm and head work row by row, and the norm in fp32: of a whole prompt it would take five
        times the prompt's hidden states.
        """
        last = 0 if self._crossing is None else self._crossing.device[index]
        at_end = index == len(self._layers) - 1
        if self._crossing is not None and self._crossing.here is not None and last and at_end:
            hidden, last = self._crossing.hop(hidden, last, 0), 0
        if index in self._tapped:
            rows = context.with_all(hidden)[0]
            self._tapped[index] = self._brought_home(rows, index, last)
        if not at_end:
            return hidden
        hidden = context.with_all(hidden)
        if context.wanted is not None:
            hidden = hidden[:, context.wanted]
        return self._crossing.hop(hidden, last, 0) if self._crossing and last else hidden

    def _brought_home(self, rows: torch.Tensor, index: int, device: int) -> torch.Tensor:
        """What leaves a layer, where nothing replaces it, on the first device."""
        if self._crossing is not None and device:
            return self._crossing.hop(rows, device, 0)
        return rows if index == len(self._layers) - 1 else rows.clone()  # the next one works on it

    @contextmanager
    def _lent(self, index: int, weights: Weights | None) -> Iterator[None]:
        """Have the weights of a layer in its modules."""
        if weights is None:
            yield
            return
        with weights.lend(index) as image, self._bound(index, image):
            yield

    @contextmanager
    def _bound(self, index: int, image: DeviceBuffer) -> Iterator[None]:
        """Put the weights in `image` into the modules of a layer, and take them out again."""
        key = (index, id(image))
        if key not in self._bindings:
            self._bindings[key] = _bind(self._holes[index], image)
        for hole, tensor in self._bindings[key]:
            hole.fill(tensor)
        try:
            yield
        finally:
            for hole, _ in self._bindings[key]:
                hole.fill(hole.meta)


class _Lent(torch.nn.Module):
    """Another network's embedding or output head; it has no parameters of its own."""

    def __init__(self, work: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._work = work

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        """What the other one makes of it."""
        return self._work(given)


@dataclass(frozen=True, slots=True)
class _Hole:
    """A place in a module where a parameter or buffer goes.

    Attributes:
        placement: what goes there.
        meta: what was there when it was looked up. For a layer that is what is there while nothing
            is lent: a use outside the loan then fails instead of reading stale bytes.
    """

    tensors: dict[str, torch.Tensor]
    name: str
    placement: Placement
    meta: torch.Tensor

    def fill(self, tensor: torch.Tensor) -> None:
        """Put a tensor there."""
        self.tensors[self.name] = tensor


def modules_and_tensors(
    checkpoint: Checkpoint, dtype: torch.dtype
) -> tuple[torch.nn.Module, dict[str, tuple[TensorExtent, torch.dtype]]]:
    """Transformers' modules without weights, and the tensor of the files that each parameter is.

    Left out are parameters that are not one tensor, or that share theirs with another. With a
    tensor comes the number format it is computed with.
    """
    model = _with_own_head(_build(checkpoint, dtype))
    container, _ = _find_layers(model, checkpoint.config.num_layers)
    places = find_places(model, checkpoint, dtype, Packing.FILE, container)
    stored = dict(checkpoint.tensors)
    if places.tied:
        del stored[checkpoint.embedding.name]
    return model, {
        place.key: (stored[place.placement.name], getattr(torch, place.placement.dtype))
        for place in chain(*places.of_layers, places.of_base)
        if place.placement.name in stored
    }


def experts_of(checkpoint: Checkpoint, dtype: str) -> Experts:
    """The experts of a model that can be streamed one by one; why not, where there are none.

    Args:
        checkpoint: headers of the files.
        dtype: torch's name of the number format of the computation.

    Raises:
        CheckpointError: experts of a layer are not alike, or a tensor of all does not divide.
    """
    number: torch.dtype = getattr(torch, dtype)
    try:
        model = _with_own_head(_build(checkpoint, number))
        container, layers = _find_layers(model, checkpoint.config.num_layers)
        calls = probe(model, layers, checkpoint.config).experts
    except CheckpointError as error:
        return no_experts(str(error))
    return find_experts(model, checkpoint, number, container, calls)


def _build(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.nn.Module:
    folder = checkpoint.folder
    return build_modules(checkpoint.config, folder, dtype, attn_implementation=ATTENTION_NAME)


def _with_own_head(model: torch.nn.Module) -> torch.nn.Module:
    """The modules with embedding and head apart; `find_places` says whether they are one."""
    head, embedding = _ends(model)
    if head is not None and head.weight is embedding.weight:
        head.weight = torch.nn.Parameter(torch.empty_like(embedding.weight), False)
    return model.eval()


def _find_layers(model: torch.nn.Module, num_layers: int) -> tuple[str, Sequence[torch.nn.Module]]:
    """The list of decoder layers, the one nearest to the embedding, and its name."""
    embedding = _ends(model)[1]
    beside = next((name for name, module in model.named_modules() if module is embedding), "")
    lists = {
        name: list(module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == num_layers
    }
    if not lists:
        raise CheckpointError(
            f"{type(model).__name__} has no list of {num_layers} decoder layers: this family "
            "cannot be streamed layer by layer"
        )
    name = max(lists, key=lambda name: len(os.path.commonprefix([name, beside])))
    return name, lists[name]


def _ends(model: torch.nn.Module) -> tuple[Any, Any]:
    """The output head and the embedding, as modules with a `weight`."""
    return model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]


def _first_of(forward: Callable[..., tuple[torch.Tensor, ...]], *args: Any, **options: Any) -> Any:  # noqa: ANN401
    return forward(*args, **options)[0]


def _in_tuple(
    forward: Callable[..., torch.Tensor],
    length: int,
    *args: Any,  # noqa: ANN401
    **options: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    return (forward(*args, **options), *[None] * (length - 1))


def _move_buffers(model: torch.nn.Module, device: torch.device) -> None:
    for module in model.modules():
        for key, buffer in list(module._buffers.items()):
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(device)


def _holes(model: torch.nn.Module, places: Sequence[Place]) -> list[_Hole]:
    holes = []
    for place in places:
        path, _, leaf = place.key.rpartition(".")
        owner = model.get_submodule(path)
        tensors: dict[str, Any] = owner._buffers
        if leaf in owner._parameters:
            tensors = owner._parameters
        holes.append(_Hole(tensors, leaf, place.placement, tensors[leaf]))
    return holes


def _bind(holes: Sequence[_Hole], image: DeviceBuffer) -> list[tuple[_Hole, torch.Tensor]]:
    """Pair each hole with its part of an image."""
    pairs = []
    for hole in holes:
        placement = hole.placement
        dtype: torch.dtype = getattr(torch, placement.dtype)
        data = image.tensor[placement.offset : placement.offset + placement.nbytes]
        view = data.view(dtype).view(placement.shape)
        is_parameter = isinstance(hole.meta, torch.nn.Parameter)
        pairs.append((hole, torch.nn.Parameter(view, False) if is_parameter else view))
    return pairs


def _rows_of(value: object, *, rows: int, part: slice | torch.Tensor) -> object:
    """Cut a tensor that has one entry per row; leave everything else."""
    if not isinstance(value, torch.Tensor) or not (at := row_axis(value.shape, rows)):
        return value
    return value[:, part] if at == 1 else value[:, :, part]
