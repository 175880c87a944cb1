"""What a pass has to do: the only builder of a `PassLoad`.

A model is described by its parts, which come from a checkpoint's headers, from `config.json` alone
(`model/outline.py` makes headers of it) or from a scenario's shape. Where they are during a pass is
a `Residence`. The target's passes, those over a retrieval cache, those of rounded copies and those
of a draft model differ in these two only. No torch here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil, prod

from offload_rt.config import DraftWeights
from offload_rt.costs.experts import FETCH_S, ExpertUse, Split, split_of, union
from offload_rt.costs.machine import Speeds
from offload_rt.costs.pass_cost import Decoded, ExpertWork, LayerLoad, Mixing, PassLoad
from offload_rt.costs.sizes import (
    PIECED_ROWS,
    RECORDED_ROWS,
    kv_row_bytes,
    layer_windows,
    layouts_of,
    number_bytes_of,
)
from offload_rt.device.kinds import DeviceKind
from offload_rt.kernels.rows import ROW_TILE
from offload_rt.model.checkpoint import Checkpoint, TensorExtent
from offload_rt.model.formats.base import takes
from offload_rt.model.formats.left_plain import Shape
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import (
    HOST_ROWS,
    TOGETHER_ROWS,
    Stored,
    could_multiply,
    multiplied_together,
    suits_kernels,
    suits_triton,
)
from offload_rt.model.kept import layers_keep
from offload_rt.model.layout import compute_dtype
from offload_rt.model.names import EXPERT_MATRIX
from offload_rt.profiling.profile import Decoder, LayerWork, WeightOrder
from offload_rt.streaming.experts import NEARLY_ALL, MissRates

_EXPERT_MATRICES = 3  # gate, up and down


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerParts:
    """One layer.

    Attributes:
        image_bytes: of its weights as they compute.
        file_bytes: of them as they are stored.
        flops_per_token: two for each weight of a matrix that a token meets.
        kv_row_bytes: keys and values of one token.
        window: newest tokens it attends to; None: all.
        expert_bytes: of it as it computes, in experts.
        decoded: which are dequantised in each pass.
        experts_decoded: which are, of all experts.
        grown_bytes: that these have more as they compute than in the image.
        packed: weights that lie packed in the files.
        packed_bits: of their code.
        mixing: what it computes piece by piece, with a state; None: nothing.
        matrices: shapes of weights that are neither quantised nor in experts.
        experts: how many it has.
        sent: share of them that a token is sent to.
        expert_flops: of the flops, in experts.
    """

    image_bytes: int
    file_bytes: int
    flops_per_token: int
    kv_row_bytes: int
    window: int | None = None
    expert_bytes: int = 0
    matrices: tuple[Shape, ...] = ()
    experts: int = 0
    sent: float = 1.0
    decoded: tuple[Decoded, ...] = ()
    experts_decoded: tuple[Decoded, ...] = ()
    grown_bytes: int = 0
    packed: int = 0
    packed_bits: int = 0
    mixing: Mixing | None = None
    expert_flops: int = 0

    def part_in(self, shapes: frozenset[Shape]) -> float:
        """Of its matrices, those of some shapes, by their numbers."""
        sizes = [(shape in shapes, prod(shape)) for shape in self.matrices]
        return sum(size for inside, size in sizes if inside) / max(1, sum(s for _, s in sizes))

    def used(self, tokens: int) -> float:
        """Share of the experts that some token is sent to.

        Tokens choose independently of each other here; related ones choose fewer experts.
        """
        return 1.0 - (1.0 - self.sent) ** tokens

    def work(self, tokens: int, tile: int = 1) -> LayerWork:
        """What a pass of `tokens` computes with: of experts those that some token is sent to.

        Tokens choose independently of each other here; related ones choose fewer experts. Each
        expert fills the rows it has on average up to a multiple of `tile`.
        """
        used = self.used(tokens)
        flops = self.flops_per_token
        if tile > 1 and self.expert_flops:
            rows = tokens * self.sent / used  # of an expert that has any
            experts = self.expert_flops * tokens * tile * ceil(rows / tile) / rows
            whole = tile * ceil(tokens / tile)  # of the pass, which counts them all
            flops += round(experts / whole) - self.expert_flops
        idle_bytes = round((1.0 - used) * self.expert_bytes)
        return LayerWork(
            weight_bytes=self.image_bytes + self.grown_bytes - idle_bytes,
            flops_per_token=flops,
        )

    def expert_work(self, tokens: int) -> ExpertWork | None:
        """What of that are products with plain experts; None where it has none of these."""
        if not self.experts or self.experts_decoded:
            return None
        used = self.used(tokens)
        return ExpertWork(
            count=used * self.experts,
            nbytes=self.expert_bytes // self.experts,
            rows=tokens * self.sent / used,
            rest=LayerWork(
                weight_bytes=self.image_bytes + self.grown_bytes - self.expert_bytes,
                flops_per_token=self.flops_per_token - self.expert_flops,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """A model.

    Attributes:
        layers: in order.
        head: final projection.
        head_shape: of its weight: outputs and inputs.
        head_decoded: of it, what is dequantised in each pass.
        rounds: forms of rounded weights that the head can have.
        hidden_bytes: of a token's hidden state.
        dtype: number format it computes in.
    """

    layers: tuple[LayerParts, ...]
    head: LayerWork
    head_shape: Shape = (0, 0)
    head_decoded: tuple[Decoded, ...] = ()
    rounds: frozenset[DraftWeights] = frozenset()
    hidden_bytes: int = 0
    dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamedKV:
    """Keys and values that live outside the device and come in blocks.

    Attributes:
        layers: whose rows do.
        slots: device buffers for blocks, on each device.
        block_bytes: of a buffer.
        block_tokens: rows of a block.
        waiting_tokens: newest rows of these layers, which are still on the device.
    """

    layers: frozenset[int]
    slots: int
    block_bytes: int
    block_tokens: int = 1
    waiting_tokens: int = 0

    def rows(self, context_tokens: int, window: int | None) -> int:
        """Rows of a layer that come in: whole blocks, from the one the window begins in."""
        first = 0 if window is None else max(0, context_tokens - window + 1)
        start = first - first % self.block_tokens
        return max(0, context_tokens - self.waiting_tokens - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class PooledExperts:
    """Experts that come one by one.

    Attributes:
        counts: of each layer; 0 where it has none.
        per_token: that a token is sent to.
        held: of each layer that has some, experts the pool holds.
        home_bytes: of one at its home.
        image_bytes: of one as it lies on the device.
        use: what is known of those that tokens ask for.
        host_s: of a layer, until the host knows which a token asks for and their kernels are on
            their way.
        launch_s: for each expert that more rows are sent to.
        together_s: the same where few rows are multiplied with experts as they are stored, whatever
            these are.
        foreseen: of what a layer lacks, the share that is offered to the link a layer before, in
            passes that read no prompt and do not ask for nearly all experts.
        rates: of what a layer lacks, where the host may compute some of it; None: all of it comes.
        share: of all experts, those in host memory.
    """

    counts: tuple[int, ...]
    per_token: int
    held: float
    home_bytes: int
    image_bytes: int
    use: ExpertUse = ExpertUse()
    host_s: float = 0.0
    launch_s: float = 0.0
    together_s: float = 0.0
    foreseen: float = 0.0
    rates: MissRates | None = None
    share: float = 1.0

    def split(
        self, layer: int, rows: int, asked: float, *, prompt: bool = False, sequences: int = 1
    ) -> Split | None:
        """What becomes of experts that a layer lacks in a pass of few rows.

        None where all of them come. Of what they ask for, rows share some experts.
        """
        if self.rates is None or rows > HOST_ROWS:
            return None
        misses = self.misses(layer, rows, prompt=prompt, sequences=sequences)
        return split_of(misses, ceil(asked), self.share, self.rates)

    def nearly_all(self, layer: int, rows: int, sequences: int) -> bool:
        """Whether rows ask for so many experts of a layer that the next one's are copied ahead."""
        count = self.counts[layer]
        return union(rows, count, self.per_token, sequences) >= NEARLY_ALL * count

    def misses(self, layer: int, rows: int, *, prompt: bool = False, sequences: int = 1) -> float:
        """Experts of a layer that a pass of so many rows waits for, on average."""
        held, count = min(self.held, self.counts[layer]), self.counts[layer]
        return self.use.misses(
            rows, held, count, self.per_token, prompt=prompt, sequences=sequences
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Residence:
    """Where a model's weights and its KV are during a pass.

    Attributes:
        streamed: layers whose weights come from their home, ascending.
        slots: device buffers they share, on each device.
        from_files: they come as they are stored, else as they compute.
        in_files: of those in host memory, the layers that stay in their files and are read ahead.
        ahead_bytes: host memory they are read into.
        straight: of these, layers that go to the device at once, as their machine has no others.
        expert_share: of each layer's experts, so many are in host memory, the others in files.
        weights: all are kept rounded so.
        copied: only these layers are; None: all.
        shares_head: the output head is not.
        packs_head: the output head is kept reordered.
        left_plain: shapes of weights that are not.
        kv: rows that come from their home; None: all are on the device.
        device: that has each layer; empty: the first has them all.
        experts: that come one by one to layers that stay; None: they stay, too.
    """

    streamed: tuple[int, ...] = ()
    slots: int = 0
    from_files: bool = False
    in_files: tuple[int, ...] = ()
    ahead_bytes: int = 0
    straight: tuple[int, ...] = ()
    expert_share: float = 1.0
    weights: DraftWeights = DraftWeights.SAME
    copied: frozenset[int] | None = None
    shares_head: bool = False
    packs_head: bool = False
    left_plain: frozenset[Shape] = frozenset()
    kv: StreamedKV | None = None
    device: tuple[int, ...] = ()
    experts: PooledExperts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedModel:
    """A model in its place, from which passes are made.

    Attributes:
        parts: of the model.
        speeds: of the machine, which decide how weights lie.
        residence: where the parts are.
        context_tokens: cached tokens of each sequence.
        sequences: that run at once.
        dtype: number format it computes in; `auto` is its own.
        exact: passes are row-invariant (`model/exact.py`), but for those that draft.
        in_pieces: those of few rows may be recorded in pieces (`runner/pieces.py`).
    """

    parts: ModelParts
    speeds: Speeds
    residence: Residence
    context_tokens: int
    sequences: int = 1
    dtype: str = "auto"
    exact: bool = False
    in_pieces: bool = False

    def draft_load(self, tokens: int) -> PassLoad:
        """A pass that drafts, of one device's kept weights: recorded, where launches cost."""
        load = replace(self, exact=False).load(tokens)
        recorded = (
            self.speeds.device.records
            and load.tokens <= RECORDED_ROWS
            and load.devices == 1
            and not load.moved_bytes
            and self.residence.kv is None
            # Which experts compute is read back in each layer.
            and not any(layer.expert_bytes for layer in self.parts.layers)
        )
        return replace(load, recorded=recorded)

    def load(
        self,
        tokens: int,
        committed: float = 1.0,
        *,
        kv_block_s: float = 0.0,
        reads_prompt: bool = False,
        branches: float = 1.0,
    ) -> PassLoad:
        """A pass.

        Args:
            tokens: of each sequence, that go through the layers.
            committed: of them that are kept, on average.
            kv_block_s: see `PassLoad`.
            reads_prompt: some of them are a prompt's, so no layer foresees experts.
            branches: see `PassLoad`.
        """
        where, parts, rows = self.residence, self.parts, tokens * self.sequences
        kv = where.kv
        packs_head = where.packs_head
        if not self.exact:
            packs_head &= parts.head_shape not in where.left_plain
        head, order = parts.head, self.speeds.order(resident=packs_head)
        if where.weights in parts.rounds and not where.shares_head:
            head, order = self.speeds.draft_work(head, where.weights)
        return PassLoad(
            layers=tuple(
                self._layer(index, rows, committed, reads_prompt=reads_prompt)
                for index in range(len(parts.layers))
            ),
            streamed=where.streamed,
            slots=where.slots,
            tokens=rows,
            pieced=self._pieced(rows),
            tile=self._tile,
            dtype=parts.dtype,
            sequences=self.sequences,
            branches=branches,
            head=head,
            head_weights=order,
            head_decoded=parts.head_decoded,
            kv_slots=kv.slots if kv else 0,
            kv_block_bytes=kv.block_bytes if kv else 0,
            kv_block_s=kv_block_s if kv else 0.0,
            hop_bytes=rows * parts.hidden_bytes,
            ahead_bytes=where.ahead_bytes,
            expert_share=where.expert_share,
            straight=frozenset(where.device[layer] for layer in where.straight),
        )

    def over_retrieval(self, tokens: int, budget_tokens: int, weights: DraftWeights) -> PassLoad:
        """A pass over a retrieval cache, which is on the device.

        Args:
            tokens: of each sequence.
            budget_tokens: of the cache.
            weights: `same`: the model's own, wherever they are; else rounded copies in place of the
                streamed layers, or of all where none is.
        """
        where = replace(self.residence, kv=None)
        if weights.rounds:
            copied = frozenset(where.streamed) or None
            where = Residence(weights=weights, copied=copied, device=where.device)
        seen = min(budget_tokens, self.context_tokens)
        return replace(self, residence=where, context_tokens=seen).draft_load(tokens)

    def over_own_rows(self, weights: DraftWeights) -> "PlacedModel":
        """The same with rounded copies, kept so, in place of the streamed layers."""
        here = self.residence
        copied = frozenset(here.streamed)
        where = Residence(weights=weights, copied=copied, shares_head=True, device=here.device)
        return replace(self, residence=where)

    def _pieced(self, rows: int) -> bool:
        """Whether a pass is recorded in pieces: experts are chosen on the host, no layer comes."""
        where = self.residence
        chosen = where.experts is not None or any(e.experts_decoded for e in self.parts.layers)
        few = rows <= PIECED_ROWS and not self.exact
        return self.in_pieces and few and chosen and not where.streamed

    @property
    def _tile(self) -> int:
        return (self.speeds.device.tile_rows or ROW_TILE) if self.exact else 1

    def _dequantised_experts(
        self, layer: LayerParts, rows: int
    ) -> tuple[tuple[Decoded, ...], bool]:
        """What of a layer's experts a pass dequantises; and whether it multiplies all in one.

        Few rows are multiplied so where there are kernels, with what is stored in MXFP4 or not
        quantised, unless passes are row-invariant.
        """
        parts = layer.experts_decoded
        few = rows <= TOGETHER_ROWS and self._tile == 1 and self.speeds.device.multiplies_few
        if few and all(multiplied_together(each.form) for each in parts):
            return (), True
        used = layer.used(rows)
        return tuple(replace(each, numbers=round(each.numbers * used)) for each in parts), False

    def _choosing_s(self, experts: PooledExperts, layer: LayerParts, rows: int) -> float:
        """Of the host where experts are launched one by one, for each tile of a layer's rows."""
        tile = (self.exact and self.speeds.device.tile_rows) or rows
        more = layer.used(min(rows, tile)) * layer.experts - experts.per_token
        return ceil(rows / tile) * (experts.host_s + max(0.0, more) * experts.launch_s)

    def _layer(self, index: int, rows: int, committed: float, *, reads_prompt: bool) -> LayerLoad:
        where, layer = self.residence, self.parts.layers[index]
        resident, decoded = index not in where.streamed, layer.decoded
        work, order = (
            layer.work(rows, self._tile),
            # Experts are not reordered.
            self.speeds.order(resident=resident and not layer.grown_bytes + layer.expert_bytes),
        )
        expert_work = layer.expert_work(rows)
        if where.weights.rounds and (where.copied is None or index in where.copied):
            work, order = self.speeds.draft_work(work, where.weights)
            decoded, expert_work = (), None
        dequantised, together = self._dequantised_experts(layer, rows)
        pooled = where.experts if where.experts and where.experts.counts[index] else None
        misses = 0.0
        if pooled is not None:
            misses = pooled.misses(index, rows, prompt=reads_prompt, sequences=self.sequences)
            order = self.speeds.order(resident=False)
        whole = layer.image_bytes + layer.grown_bytes
        active = 1.0 - (whole - layer.expert_bytes) / max(1, work.weight_bytes)
        asked = layer.used(rows) * pooled.counts[index] if pooled else 0.0
        split = (
            pooled.split(index, rows, asked, prompt=reads_prompt, sequences=self.sequences)
            if pooled
            else None
        )
        link = misses if split is None else split.over_link
        choosing_s = 0.0
        if where.experts is not None and layer.expert_bytes:  # in layers that are whole, too
            one_by_one_s = self._choosing_s(where.experts, layer, rows)
            choosing_s = where.experts.together_s if together else one_by_one_s
        choosing_s += 0.0 if split is None else FETCH_S
        few = pooled is not None and not pooled.nearly_all(index, rows, self.sequences)
        kv = where.kv if where.kv and index in where.kv.layers else None
        context, window = self.context_tokens, layer.window
        home_rows = kv.rows(context, window) if kv else 0
        straight = where.from_files or index in where.straight
        here = min(context, kv.waiting_tokens) if kv else context
        row_bytes = self.sequences * layer.kv_row_bytes
        packed = order is WeightOrder.PACKED and bool(where.left_plain) and not self.exact
        return LayerLoad(
            work=work,
            plain_part=layer.part_in(where.left_plain) if packed else 0.0,
            mixing=layer.mixing,
            home_bytes=layer.file_bytes if straight else layer.image_bytes,
            read_bytes=layer.file_bytes if index in where.in_files and not straight else 0,
            kv_bytes=row_bytes * min(here, window or here),
            kv_home_bytes=row_bytes * home_rows,
            kv_back_bytes=round(row_bytes * committed) if kv else 0,
            device=where.device[index] if where.device else 0,
            weights=order,
            decoded=decoded,
            experts_decoded=dequantised,
            unpacked=layer.packed if straight else 0,
            unpacked_bits=layer.packed_bits,
            missed_bytes=round(link * pooled.home_bytes) if pooled else 0,
            expert_work=expert_work,
            expert_part=active if pooled else 0.0,
            missed_part=min(1.0, link / asked) if asked else 0.0,
            host_s=split.until_s if split and split.on_host else 0.0,
            behind_bytes=round(split.on_host * pooled.home_bytes) if pooled and split else 0,
            choosing_s=choosing_s,
            # Nothing is, where the host may compute: what it does crosses behind in that time.
            foreseen=pooled.foreseen
            if pooled and few and not reads_prompt and split is None
            else 0.0,
            expert_bytes=pooled.home_bytes if pooled else 0,
            ahead=pooled is not None and not few and split is None,
            in_turn=not together,
        )


def _decoded(stored: Iterable[Stored], dtype: str, device: DeviceKind) -> tuple[Decoded, ...]:
    """What of a layer is dequantised, and by whom where kernels can be compiled."""
    counts: dict[Decoded, int] = {}
    for each in stored:
        if device.host_computes:
            suits = suits_kernels(each, dtype) or each.form is Form.CODED
        else:
            suits = suits_triton(each.form, each.bits)
        kind = Decoded(
            numbers=0,
            form=each.form.value,
            bits=each.bits,
            decoder=Decoder.COMPILED if suits else Decoder.TORCH,
            direct=device.host_computes and could_multiply(each, dtype) and not each.of_expert,
        )
        counts[kind] = counts.get(kind, 0) + each.numbers
    return tuple(replace(kind, numbers=numbers) for kind, numbers in counts.items())


@lru_cache(maxsize=16)  # a search asks for the same ones hundreds of times
def parts_of(checkpoint: Checkpoint, dtype: str, device: DeviceKind) -> ModelParts:
    """The parts of a model, from its headers.

    Args:
        checkpoint: headers, of files or made from `config.json`.
        dtype: number format it computes in; `auto` is its own.
        device: that they are laid out for.
    """
    *layouts, _ = layouts_of(checkpoint, dtype, device)
    config, number_bytes = checkpoint.config, number_bytes_of(checkpoint, dtype)
    name = compute_dtype(checkpoint, dtype)
    row_bytes = kv_row_bytes(config, number_bytes)
    windows = layer_windows(config)
    layers = []
    each = zip(layouts, checkpoint.layers, windows, row_bytes, layers_keep(config), strict=True)
    for layout, extents, window, kv_row, kept in each:
        others, experts, count, sent = _weights(checkpoint, extents)
        inside = [each for each in layout.stored if each.of_expert]
        outside = [each for each in layout.stored if not each.of_expert]
        numbers = sum(each.numbers for each in layout.stored)
        packed_bytes = sum(each.nbytes for each in layout.stored)
        layers.append(
            LayerParts(
                image_bytes=layout.nbytes,
                file_bytes=layout.file_bytes,
                flops_per_token=round(2 * (others + sent * experts)),
                kv_row_bytes=kv_row,
                window=window,
                expert_bytes=experts * number_bytes,
                matrices=_matrices(checkpoint, extents),
                experts=count,
                sent=sent,
                expert_flops=round(2 * sent * experts),
                decoded=_decoded(outside, name, device),
                experts_decoded=_decoded(inside, name, device),
                grown_bytes=max(0, numbers * number_bytes - packed_bytes),
                packed=layout.packed_weights,
                packed_bits=layout.packed_bits,
                mixing=_mixing(extents, number_bytes, kept.state_numbers, device),
            )
        )
    head = checkpoint.head or checkpoint.embedding
    weights, stored = prod(head.shape), checkpoint.stored.get(head.name)
    return ModelParts(
        layers=tuple(layers),
        head=LayerWork(weight_bytes=weights * number_bytes, flops_per_token=2 * weights),
        head_shape=(head.shape[0], head.shape[1]),
        head_decoded=_decoded([] if stored is None else [stored], name, device),
        rounds=frozenset(w for w in DraftWeights if stored is None and takes(w, *head.shape)),
        hidden_bytes=config.hidden_size * number_bytes,
        dtype=name,
    )


def _mixing(
    layer: Sequence[TensorExtent], number_bytes: int, state_numbers: int, device: DeviceKind
) -> Mixing | None:
    """What the module computes that has a convolution, as all have that keep a state."""
    convolved = (e for e in layer if len(e.shape) == 3 and e.shape[1] == 1)
    if (conv := next(convolved, None)) is None:
        return None
    module = conv.name.rsplit(".", 2)[0] + "."
    own = [e for e in layer if e.name.startswith(module) and len(e.shape) == 2]
    weights = sum(prod(e.shape) for e in own)
    work = LayerWork(weight_bytes=weights * number_bytes, flops_per_token=2 * weights)
    return Mixing(work=work, rows=device.state_rows, state_numbers=state_numbers)


def _matrices(checkpoint: Checkpoint, layer: Sequence[TensorExtent]) -> tuple[Shape, ...]:
    found = (e for e in layer if len(e.shape) == 2 and e.name not in checkpoint.stored)
    return tuple((e.shape[0], e.shape[1]) for e in found if ".experts." not in e.name)


def _holds_experts(checkpoint: Checkpoint, extent: TensorExtent) -> bool:
    """Whether a tensor is a matrix of each of as many experts as there are."""
    return len(extent.shape) > 2 and extent.shape[0] == checkpoint.config.experts


def _weights(checkpoint: Checkpoint, layer: Sequence[TensorExtent]) -> tuple[int, int, int, float]:
    """Weights outside and inside of experts, how many these are, and the share a token meets."""
    stored = checkpoint.stored
    matrices = [e for e in layer if len(e.shape) > 1 and e.name not in stored]
    inside = [e for e in matrices if ".experts." in e.name or _holds_experts(checkpoint, e)]
    others = sum(prod(extent.shape) for extent in matrices) - sum(prod(e.shape) for e in inside)
    quantised = {stored[e.name] for e in layer if e.name in stored}
    others += sum(each.numbers for each in quantised if not each.of_expert)
    experts = sum(prod(extent.shape) for extent in inside)
    experts += sum(each.numbers for each in quantised if each.of_expert)
    sent = checkpoint.config.experts_per_token
    if not experts or not sent:
        return others, experts, 0, 1.0
    fused = [extent.shape[0] for extent in inside if len(extent.shape) > 2]
    each = {match["expert"] for s in quantised if (match := EXPERT_MATRIX.match(s.module))}
    count = len(each) or (fused[0] if fused else len(inside) // _EXPERT_MATRICES)
    return others, experts, count, min(1.0, sent / max(1, count))
