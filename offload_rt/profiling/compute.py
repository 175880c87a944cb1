"""Times of a real decoder layer and of attention, through the code that runs models.

The layer is transformers' own Llama layer with our attention function and a cache of ours, run as
a network runs it: by our kernels, where there are some for it. What it does besides the matrix
products (norms, rotary embedding, appending keys) is in its time.
"""

import copy
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any, TypeVar

import torch

from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec
from offload_rt.config import DraftWeights
from offload_rt.device.base import Device
from offload_rt.device.system import cache_bytes
from offload_rt.kv.base import KVShape
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.static import StaticKV, StaticRows, StaticShape
from offload_rt.model.attention_function import (
    ATTENTION_NAME,
    CONTEXT_KEYWORD,
    PassContext,
    Segment,
)
from offload_rt.model.exact import make_exact
from offload_rt.model.exactness import are_quickest
from offload_rt.model.formats.packed import pack_linears, replace_linears
from offload_rt.model.formats.rounded import rounded_linear
from offload_rt.model.formats.wide import widen_linears, widens
from offload_rt.model.layout import DEVICE_ALIGN_BYTES
from offload_rt.model.lean import lean_layer
from offload_rt.model.modelling import LlamaConfig, LlamaDecoderLayer, LlamaRotaryEmbedding
from offload_rt.profiling.curves import Place
from offload_rt.profiling.effort import Effort
from offload_rt.profiling.profile import (
    AttentionSpeed,
    DiskSlowdown,
    HeadCurve,
    LayerCurve,
    LayerShape,
    LayerTime,
    Number,
    ReadSlowdown,
    RecordedCurve,
    ReplayTime,
    WeightOrder,
)
from offload_rt.profiling.run_memory import RunMemory
from offload_rt.profiling.timing import Curve, Sample, Tick, typical

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)
Reading = Callable[[], AbstractContextManager[Callable[[], int]]]  # see `disk.open_for_reading`

_RANDOM_NUMBERS, _SEED = 2**18, 0
_RECORDED_LAYERS = 8
_REST_S, _LONGEST_S = 1e-3, 5.0
_LAYERS = 30  # of a model
_ROOM_PART = 4  # of free memory, which layers that are timed in turns may take
_ROUNDED = {WeightOrder(weights): weights for weights in DraftWeights if weights.rounds}
_HEADS, _KV_HEADS, _HEAD_DIM = 32, 8, 128  # attention of Llama-3.1-8B


class TimedLayer:
    """Copies of one random layer, used in turn so that no cache holds their weights.

    Args:
        shape: its sizes.
        device: where it computes.
        dtype: number format.
        weights: plain, packed or rounded.
        effort: how many bytes the copies have together, and the largest pass.
        memory: that plain weights lie in.

    Attributes:
        shape, weights: the same.
    """

    def __init__(
        self,
        shape: LayerShape,
        device: Device,
        dtype: torch.dtype,
        weights: WeightOrder,
        effort: Effort,
        memory: RunMemory | None = None,
    ) -> None:
        self.shape, self.weights, self._device = shape, weights, device
        config = _config(shape)
        self._rotary = LlamaRotaryEmbedding(config).to(device.torch_device)
        kv = KVShape(heads=shape.kv_heads, key_dim=shape.head_dim, value_dim=shape.head_dim)
        self._cache = ResidentKV(device, [kv], dtype, max(effort.tokens))
        first = _random_layer(config, device.torch_device, dtype)
        count = _cold_bytes(shape, weights, device, effort) // shape.weight_bytes
        # As passes multiply by default where their kernels take matrix registers.
        exact = are_quickest(shape.dtype, device.kind)
        if weights is WeightOrder.PACKED:
            self._layers = [_again(first) for _ in range(count)]
            for layer in self._layers:
                if exact:
                    make_exact(layer)
                pack_linears(layer, exact=exact)
        elif weights in _ROUNDED:
            replace_linears(first, partial(rounded_linear, weights=_ROUNDED[weights]))
            self._layers = [first, *(copy.deepcopy(first) for _ in range(count - 1))]
        else:
            self._layers = _copies(first, count, partial((memory or RunMemory()).take, device))
            for layer in self._layers:
                if exact:
                    make_exact(layer)
                if widens(dtype, device.torch_device):
                    widen_linears(layer)
        # As a network runs layers that stay on its device (`Network.attach`); plain ones stand for
        # those that are streamed.
        plain = weights is WeightOrder.PLAIN
        lean = None if plain else lean_layer(self._layers[0], {}, first=True)
        turns: list[Any] = [lean.of(layer) for layer in self._layers] if lean else [*self._layers]
        # In no order, but always the same: some places of memory are read more slowly than others,
        # and passes of all counts of rows are to meet these as often.
        random.Random(_SEED).shuffle(turns)
        self._turns = cycle(turns)
        self._inputs = torch.randn(
            1, max(effort.tokens), shape.hidden, dtype=dtype, device=device.torch_device
        )

    def recorded_pass(self, tokens: int) -> Callable[[], None] | None:
        """The same of a recorded pass through `recorded_layers`, one after the other.

        None: the device does not record it.
        """
        pass_ = StaticRows.chain(self._inputs.device, tokens)
        shape = StaticShape(rows=tokens, width=pass_.places.numel(), floor=0)
        angles = self._rotary(self._inputs[:, :tokens], pass_.at[None])
        hidden = self._inputs[:, :tokens].clone()

        def work() -> torch.Tensor:
            rows = hidden
            for layer in islice(cycle(self._layers), self.recorded_layers):
                cache = StaticKV(self._cache, shape, pass_)
                context = PassContext([Segment(cache, tokens)])
                rows = layer(rows, position_embeddings=angles, **{CONTEXT_KEYWORD: context})
            return rows

        replay = self._device.record(work, hidden.neg_)
        if replay is None:
            return None

        def run() -> None:
            replay()
            self._device.compute.record().synchronize()

        return run

    @property
    def recorded_layers(self) -> int:
        """Of a recorded pass: so many that its launch adds little to each."""
        return max(_RECORDED_LAYERS, len(self._layers))

    def pass_over(self, tokens: int) -> Callable[[], None]:
        """Prepare a pass of some tokens; calling it runs the pass and waits for it."""
        hidden = self._inputs[:, :tokens]
        positions = torch.arange(tokens, device=hidden.device)[None]
        angles = self._rotary(hidden, positions)

        def run() -> None:
            context = PassContext([Segment(self._cache, tokens)])
            options = {"position_embeddings": angles, CONTEXT_KEYWORD: context}
            next(self._turns)(hidden, **options)
            self._cache.commit([])
            self._device.compute.record().synchronize()

        return run


@torch.inference_mode()
def measure_layers(
    shapes: Sequence[LayerShape],
    device: Device,
    weights: WeightOrder,
    curve: Curve,
    tick: Tick,
    *,
    then: Callable[[LayerShape, TimedLayer], None] = lambda shape, layer: None,
) -> list[LayerCurve]:
    """Time layers by tokens in the pass, all sizes in turns; weights lie on the device.

    Args:
        shapes: by size, ascending.
        device: where they compute.
        weights: plain, packed or rounded.
        curve: how much is measured, and what could not be.
        tick: called after each number.
        then: measures more of each, while it is there.
    """
    curve = curve.for_part()
    effort = curve.effort
    counts = effort.tokens if weights is WeightOrder.PLAIN else effort.packed_tokens
    computes = device.kind.host_computes  # else it goes on while its host thread waits
    taken: dict[Place, list[float]] = {}
    cold = {shape: _cold_bytes(shape, weights, device, effort) for shape in shapes}
    for group in _together(cold, device.free_bytes()):
        curve.memory.begin()
        layers = {
            shape: TimedLayer(
                shape, device, getattr(torch, shape.dtype), weights, effort, curve.memory
            )
            for shape in group
        }
        taken |= curve.take(
            {
                (shape.weight_bytes, tokens): curve.timed(
                    layer.pass_over(tokens), effort.compute_sample_s, computes=computes
                )
                for shape, layer in layers.items()
                for tokens in counts
            }
        )
        for _ in range(len(group) * len(counts)):
            tick()
        for shape, layer in layers.items():
            then(shape, layer)
        del layers, layer  # before the next group's
    numbers = curve.numbers(taken)
    return [
        LayerCurve(
            processor=device.kind.processor,
            weights=weights,
            shape=shape,
            times=_times(numbers, shape.weight_bytes, counts),
        )
        for shape in shapes
    ]


@torch.inference_mode()
def measure_recorded(
    shapes: Sequence[LayerShape], device: Device, weights: WeightOrder, curve: Curve, tick: Tick
) -> list[RecordedCurve]:
    """Time layers within recorded passes; each is the pass's seconds over its layers.

    Args:
        shapes: by size, ascending.
        device: where they compute; one that records.
        weights: plain or rounded.
        curve: how much is measured, and what could not be.
        tick: called after each number.

    Returns:
        None of any size that the device cannot record.
    """
    curve = curve.for_part()
    effort, found = curve.effort, list[RecordedCurve]()
    counts = effort.recorded_tokens
    for shape in shapes:
        layer = TimedLayer(shape, device, getattr(torch, shape.dtype), weights, effort)
        passes: dict[Place, Sample] = {}
        for tokens in counts:
            run = layer.recorded_pass(tokens)
            if run is None:
                return found
            passes[shape.weight_bytes, tokens] = curve.timed(
                run, effort.compute_sample_s, computes=device.kind.host_computes
            )
        taken = {
            place: [s / layer.recorded_layers for s in seconds]
            for place, seconds in curve.take(passes).items()
        }
        found.append(
            RecordedCurve(
                processor=device.kind.processor,
                weights=weights,
                shape=shape,
                times=_times(curve.numbers(taken), shape.weight_bytes, counts),
            )
        )
        for _ in counts:
            tick()
    return found


@torch.inference_mode()
def measure_replay(device: Device, curve: Curve, tick: Tick) -> list[ReplayTime]:
    """Time a recorded pass that does next to nothing: its upload, its launch and the round trip.

    Nothing where the device cannot record it.
    """
    numbers = device.upload([1]).clone()
    replay = device.record(lambda: numbers + 1, numbers.neg_)
    if replay is None:
        return []

    def run() -> None:
        numbers.copy_(device.upload([1]))
        device.download(replay())

    sample = curve.timed(run, curve.effort.compute_sample_s, computes=device.kind.host_computes)
    number = curve.numbers(curve.take({(0,): sample}))[(0,)]
    tick()
    return [ReplayTime(processor=device.kind.processor, replay_s=number)]


@torch.inference_mode()
def measure_heads(
    device: Device, dtype_name: str, weights: WeightOrder, curve: Curve, tick: Tick
) -> tuple[HeadCurve, ...]:
    """Time output heads by rows; weights lie on the device, plain or packed."""
    curve = curve.for_part()
    effort = curve.effort
    dtype: torch.dtype = getattr(torch, dtype_name)
    taken: dict[Place, list[float]] = {}
    for hidden, vocabulary in effort.heads:
        nbytes = hidden * vocabulary * dtype.itemsize
        head = torch.nn.Linear(hidden, vocabulary, bias=False, device="meta", dtype=dtype)
        head = head.to_empty(device=device.torch_device)
        _fill(head, hidden)
        cold_bytes = beyond_caches(device, effort, _model_bytes(hidden, nbytes, dtype, effort))
        count, exact = -(-cold_bytes // nbytes), are_quickest(dtype_name, device.kind)
        if weights is WeightOrder.PACKED:
            copies = torch.nn.ModuleList(_again(head) for _ in range(count))
        else:
            curve.memory.begin()
            take = partial(curve.memory.take, device)
            copies = torch.nn.ModuleList(_copies(head, count, take))
        if exact:
            make_exact(copies)
        if weights is WeightOrder.PACKED:
            pack_linears(copies, exact=exact)
        elif widens(dtype, device.torch_device):
            widen_linears(copies)
        taken |= curve.take(
            {
                (nbytes, rows): curve.timed(
                    _head_pass(cycle(copies), device, hidden, rows, dtype),
                    effort.compute_sample_s,
                    computes=device.kind.host_computes,
                )
                for rows in effort.head_rows
            }
        )
        del head, copies  # before the next head's
        for _ in effort.head_rows:
            tick()
    numbers = curve.numbers(taken)
    return tuple(
        HeadCurve(
            processor=device.kind.processor,
            weights=weights,
            weight_bytes=nbytes,
            times=_times(numbers, nbytes, effort.head_rows),
        )
        for nbytes in sorted({place[0] for place in numbers})
    )


def beyond_caches(device: Device, effort: Effort, most_bytes: int = sys.maxsize) -> int:
    """Bytes that are used in turn so that no cache has them when they are used again.

    The largest cache counts whole, also where a virtual machine shares it with others: no more of
    it can be ours. They take a part of the memory that is free at most.

    Args:
        device: that computes.
        effort: how much that is.
        most_bytes: that are ever used so: a model's.
    """
    if not device.kind.host_computes:
        return effort.cold_bytes
    most_bytes = min(most_bytes, device.free_bytes() // _ROOM_PART)
    return max(effort.cold_bytes, min(most_bytes, effort.caches * cache_bytes()))


def _cold_bytes(shape: LayerShape, weights: WeightOrder, device: Device, effort: Effort) -> int:
    """Of all copies of a layer: whole ones.

    Those of a target that stays are in no cache either, if the model is larger. Rounded ones draft,
    pass after pass, and a draft model's may well be in one.
    """
    nbytes, cold_bytes = shape.weight_bytes, effort.cold_bytes
    if weights not in _ROUNDED:
        cold_bytes = beyond_caches(device, effort, _LAYERS * nbytes)
    return -(-cold_bytes // nbytes) * nbytes


def _model_bytes(hidden: int, head_bytes: int, dtype: torch.dtype, effort: Effort) -> int:
    """Of a model with such a head, before which all its layers compute: timed ones."""
    shapes = effort.layer_shapes(str(dtype).removeprefix("torch."), dtype.itemsize)
    layers = (shape.weight_bytes for shape in shapes if shape.hidden == hidden)
    return head_bytes + _LAYERS * max(layers, default=0)


def laid_out(parts: Sequence[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
    """Copies of tensors in memory of `laid_bytes`, one behind the other."""
    places = memory.split([_whole(part.nbytes) for part in parts])
    views = (
        place[: part.nbytes].view(part.dtype).view(part.shape)
        for place, part in zip(places, parts, strict=True)
    )
    return [view.copy_(part) for view, part in zip(views, parts, strict=True)]


def laid_bytes(parts: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors that lie one behind the other."""
    return sum(_whole(part.nbytes) for part in parts)


def _whole(nbytes: int) -> int:
    return -(-nbytes // DEVICE_ALIGN_BYTES) * DEVICE_ALIGN_BYTES


def _again(module: ModuleT) -> ModuleT:
    """The module once more, with the same memory for its weights."""
    return copy.deepcopy(module, {id(each): each for each in module.parameters()})


def _copies(module: ModuleT, count: int, take: Callable[[int], torch.Tensor]) -> list[ModuleT]:
    """So many of the module; the weights of each lie in memory that is taken for them."""
    found = [_again(module) for _ in range(count)]
    weights = [parameter.detach() for parameter in module.parameters()]
    for each in found:
        own = laid_out(weights, take(laid_bytes(weights)))
        instead = {id(p): q for p, q in zip(module.parameters(), own, strict=True)}
        for part in each.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = torch.nn.Parameter(instead[id(parameter)], False)
    return found


def _times(
    numbers: Mapping[Place, Number], nbytes: int, counts: Sequence[int]
) -> tuple[LayerTime, ...]:
    return tuple(LayerTime(tokens=count, layer_s=numbers[nbytes, count]) for count in counts)


def _head_pass(
    heads: Iterator[torch.nn.Module], device: Device, hidden: int, rows: int, dtype: torch.dtype
) -> Callable[[], None]:
    inputs = torch.randn(rows, hidden, dtype=dtype, device=device.torch_device)

    def run() -> None:
        next(heads)(inputs)
        device.compute.record().synchronize()

    return run


@torch.inference_mode()
def measure_beside_reads(
    layer: TimedLayer, reading: Reading, curve: Curve, tick: Tick
) -> list[DiskSlowdown]:
    """Time a layer of the CPU alone and while the disk is read, in turns.

    Args:
        layer: plain or packed.
        reading: reads the disk while the `with` of its result lasts.
        curve: how much is measured, and what could not be.
        tick: called after each number.
    """
    effort = curve.effort
    # A sample is many runs already, of which the disturbed ones do not count.
    few = (effort.least_samples + effort.most_samples) // 2
    fewer = replace(effort, most_samples=few, scattered_samples=few)
    curve = replace(curve, effort=fewer)
    found = []
    samples: dict[Place, Sample] = {}
    for tokens in effort.beside_tokens:
        alone = typical(layer.pass_over(tokens), effort.beside_sample_s)
        samples[tokens, 0] = alone
        samples[tokens, 1] = partial(_beside, reading, alone)
    numbers = curve.numbers(curve.take(samples))
    for tokens in effort.beside_tokens:
        alone_s, beside_s = numbers[tokens, 0], numbers[tokens, 1]
        spread = (beside_s.spread or 0.0) / alone_s.value
        factor = replace(beside_s, value=beside_s.value / alone_s.value, spread=spread)
        found.append(
            DiskSlowdown(
                weights=layer.weights,
                weight_bytes=layer.shape.weight_bytes,
                tokens=tokens,
                factor=factor,
            )
        )
        tick()
    return found


def _beside(reading: Reading, sample_s: Sample) -> float:
    with reading():
        return sample_s()


@torch.inference_mode()
def measure_reads_beside(
    layer: TimedLayer, reading: Reading, curve: Curve, tick: Tick
) -> ReadSlowdown:
    """Time reads alone and while a layer computes one token over and over, in turns.

    Args:
        layer: on the CPU.
        reading: as of `measure_beside_reads`.
        curve: how much is measured, and what could not be.
        tick: called after the number.
    """
    effort = curve.effort
    whiles: dict[int, Callable[[], None]] = {0: partial(time.sleep, _REST_S), 1: layer.pass_over(1)}
    samples: dict[Place, Sample] = {
        (busy,): partial(_s_per_byte, reading, meanwhile, effort.beside_sample_s)
        for busy, meanwhile in whiles.items()
    }
    numbers = curve.numbers(curve.take(samples))
    alone_s, beside_s = numbers[0,], numbers[1,]
    tick()
    spread = (beside_s.spread or 0.0) / alone_s.value
    return ReadSlowdown(
        factor=replace(beside_s, value=beside_s.value / alone_s.value, spread=spread)
    )


def _s_per_byte(reading: Reading, meanwhile: Callable[[], None], least_s: float) -> float:
    """Seconds in which a byte is read while something is done over and over."""
    with reading() as come:
        start, before = time.perf_counter(), come()
        while (spent_s := time.perf_counter() - start) < _LONGEST_S:
            if spent_s > least_s and come() > before:
                break
            meanwhile()
        return spent_s / max(1, come() - before)


def _together(cold: Mapping[LayerShape, int], free_bytes: int) -> Iterator[list[LayerShape]]:
    """Layers whose copies there is room for at once; each alone where memory is short."""
    group: list[LayerShape] = []
    left = most = free_bytes // _ROOM_PART
    for shape, needed in cold.items():
        if group and needed > left:
            yield group
            group, left = [], most
        group.append(shape)
        left -= needed
    yield group


@torch.inference_mode()
def measure_attention(
    device: Device, dtype_name: str, curve: Curve, tick: Tick, *, exact: bool = False
) -> tuple[AttentionSpeed, ...]:
    """Time attention of a few rows to many cached ones, by the fast or the row-invariant way."""
    effort = curve.effort
    dtype: torch.dtype = getattr(torch, dtype_name)
    row_bytes = 2 * _KV_HEADS * _HEAD_DIM * dtype.itemsize
    cached = max(max(effort.query_tokens), effort.kv_bytes // row_bytes)
    draw = partial(torch.randn, dtype=dtype, device=device.torch_device)
    layer_bytes = cached * row_bytes
    cold_bytes = beyond_caches(device, effort, _LAYERS * layer_bytes)
    first = [draw(_KV_HEADS, cached, _HEAD_DIM) for _ in range(2)]
    count = -(-cold_bytes // layer_bytes)
    curve.memory.begin()
    places = (curve.memory.take(device, laid_bytes(first)) for _ in range(count))
    layers = cycle([laid_out(first, place) for place in places])
    spec = AttentionSpec(scaling=_HEAD_DIM**-0.5, exact=exact)
    passes: dict[Place, Sample] = {}
    for rows in effort.query_tokens:
        query = draw(_HEADS, rows, _HEAD_DIM)

        def run(query: torch.Tensor = query) -> None:
            key, value = next(layers)
            attend_rows(query, key, value, spec)
            device.compute.record().synchronize()

        passes[(rows,)] = curve.timed(
            run, effort.compute_sample_s, computes=device.kind.host_computes
        )
    taken = {
        place: [s / layer_bytes for s in seconds] for place, seconds in curve.take(passes).items()
    }
    speeds = []
    for (rows,), s_per_kv_byte in curve.numbers(taken).items():
        speeds.append(
            AttentionSpeed(
                processor=device.kind.processor,
                query_tokens=rows,
                queries_per_head=_HEADS // _KV_HEADS,
                kv_bytes=layer_bytes,
                s_per_kv_byte=s_per_kv_byte,
                exact=exact,
            )
        )
        tick()
    return tuple(speeds)


def _config(shape: LayerShape) -> LlamaConfig:
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        num_hidden_layers=1,
    )
    config._attn_implementation = ATTENTION_NAME
    return config


def _random_layer(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype
) -> LlamaDecoderLayer:
    """A layer whose weights are one random block over and over: drawing all would be too slow."""
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0)
    layer = layer.to(dtype).to_empty(device=device).requires_grad_(False)
    _fill(layer, config.hidden_size)
    return layer.eval()


def _fill(module: torch.nn.Module, hidden: int) -> None:
    first = next(module.parameters())
    block = (torch.randn(_RANDOM_NUMBERS) * hidden**-0.5).to(first.dtype).to(first.device)
    for parameter in module.parameters():
        flat = parameter.detach().view(-1)
        for start in range(0, flat.numel(), _RANDOM_NUMBERS):
            part = flat[start : start + _RANDOM_NUMBERS]
            part.copy_(block[: part.numel()])
