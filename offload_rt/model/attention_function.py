"""The attention function registered with transformers: one segment per sequence.

A pass packs the new tokens of all sequences into one row [1, S]. Linear layers see them together;
here they part: each segment appends its keys and values to its own cache and attends to that.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import torch

from offload_rt.attention.exact import is_assembled
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.errors import CheckpointError
from offload_rt.kv.base import KVCache
from offload_rt.kv.together import PackedRows
from offload_rt.model.modelling import AttentionInterface

ATTENTION_NAME = "offload_rt"
CONTEXT_KEYWORD = "offload_context"

Hop = Callable[[torch.Tensor, int, int], torch.Tensor]  # from one device to another
# A part of a pass that Python decides about: of the pass and what it is given, what it makes.
Step = Callable[["PassContext", Sequence[torch.Tensor]], torch.Tensor]
Apart = Callable[[Step, Sequence[torch.Tensor]], torch.Tensor]  # makes a step, and notes it

# Keywords of HF's attention call that we honour, or that cannot change what inference computes.
_KNOWN_OPTIONS = frozenset(
    {CONTEXT_KEYWORD, "scaling", "sliding_window", "softcap", "s_aux", "dropout", "is_causal"}
    | {"position_ids", "position_embeddings", "use_cache", "past_key_values", "layer_past"}
    | {"output_attentions", "output_hidden_states", "output_router_logits"}
)


def row_axis(shape: Sequence[int], rows: int) -> int:
    """Where a tensor that layers are given has one entry per row: [1, S, ...] or [1, 1, S, ...].

    0 where it has none. Only such tensors are cut with the rows of a pass. Of one row both may be
    meant: [1, 1, 1, 1] is taken to be a number for each row beside heads [1, H, S, D].
    """
    if len(shape) > 1 and shape[1] == rows and tuple(shape) != (1, 1, 1, 1):
        return 1
    return 2 if len(shape) > 2 and (*shape[:3],) == (1, 1, rows) else 0


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of the packed batch that belong to one sequence.

    Attributes:
        tree: which pending rows they see; None: all before them.
        parents: of a tree, what each of all pending rows continues, as of `runner.Rows`.
    """

    cache: KVCache
    tokens: int
    tree: PendingTree | None = None
    parents: Sequence[int] | None = None


class PassContext:
    """What the attention function must know about the pass; travels as a keyword of HF's forward.

    Args:
        segments: the sequences, in the order their rows are packed.
        wanted: [R] int64, packed rows that go on behind the last layer; None: all.
        strict: refuse options of HF's attention call that we do not know.
        exact: attention is row-invariant (`attention/exact.py`).
        tiles: layers are given whole tiles of so many rows (`tiles.py`); 0: as many as there are.
        apart: makes what may differ from pass to pass though rows are as many (`runner/pieces.py`).

    Attributes:
        rows: the packed rows that are being computed now, of those that have not left.
        all_rows: packed rows the pass began with.
        kept: [rows] int64, which of them have not left; None: none has.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        wanted: torch.Tensor | None = None,
        strict: bool = False,
        exact: bool = False,
        tiles: int = 0,
        apart: Apart | None = None,
    ) -> None:
        self.segments, self.wanted, self.strict = segments, wanted, strict
        self.apart = apart
        self.all_rows = sum(segment.tokens for segment in segments)
        self.rows = range(self.all_rows)
        self.kept: torch.Tensor | None = None
        self.exact, self.tiles = exact, tiles
        self._brought: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._others: dict[int, PassContext] = {}
        self._packed: dict[range, PackedRows | None] = {}

    def leave(self, gone: Callable[[KVCache], bool], hidden: torch.Tensor) -> torch.Tensor:
        """Take the rows of sequences out of a pass that nobody waits for any more; never all.

        Args:
            gone: whether that is so of a cache's.
            hidden: [1, S, E] of the rows that are there.

        Returns:
            The same of those that stay.
        """
        staying = [segment for segment in self.segments if not gone(segment.cache)]
        if not staying or len(staying) == len(self.segments):
            return hidden
        start, places = 0, list[int]()
        for segment in self.segments:
            if segment in staying:
                places += range(start, start + segment.tokens)
            start += segment.tokens
        stay = torch.tensor(places, device=hidden.device)
        self.segments, self.rows, self._packed = staying, range(len(places)), {}
        self.kept = stay if self.kept is None else self.kept[stay]
        return hidden[:, stay]

    def with_all(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, S, E] of all rows the pass began with: zeros for those that have left."""
        if self.kept is None:
            return hidden
        return hidden.new_zeros(1, self.all_rows, hidden.shape[2]).index_copy_(1, self.kept, hidden)

    def brought(self, value: object, *, device: int, hop: Hop) -> object:
        """A tensor of the first device on another one, copied once per pass; else what is given."""
        if not isinstance(value, torch.Tensor):
            return value
        key = id(value), device
        if key not in self._brought:  # with the original, whose number is taken while it lives
            self._brought[key] = value, hop(value, 0, device)
        return self._brought[key][1]

    def on(self, device: int, hop: Hop) -> "PassContext":
        """The same for layers of another device than the first."""
        if device not in self._others:

            def bring(tensor: torch.Tensor) -> torch.Tensor:
                return hop(tensor, 0, device)

            trees = [
                s.tree
                and replace(
                    s.tree, visible=bring(s.tree.visible), positions=bring(s.tree.positions)
                )
                for s in self.segments
            ]
            segments = [replace(s, tree=t) for s, t in zip(self.segments, trees, strict=True)]
            wanted = None if self.wanted is None else bring(self.wanted)
            self._others[device] = PassContext(
                segments,
                wanted=wanted,
                strict=self.strict,
                exact=self.exact,
                tiles=self.tiles,
            )
        return self._others[device]

    def whole_tile(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """What was made of the segments' rows [n, ...], side by side, filled up to whole tiles."""
        missing = -len(self.rows) % self.tiles if self.tiles else 0
        if missing:
            parts = [*parts, parts[-1][-1:].expand(missing, *parts[-1].shape[1:])]
        return parts[0] if len(parts) == 1 else torch.cat([*parts])

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spec: AttentionSpec,
    ) -> list[torch.Tensor]:
        """Have each sequence append the rows that are being computed now, and attend from them.

        Args:
            layer: layer index.
            query: [H, S, D] rotated.
            key: [K, S, D] rotated.
            value: [K, S, D].
            spec: how the layer attends.

        Returns:
            [n, H, D] of sequences, or of all of them, in their order.
        """
        if is_assembled(query, value.shape[2], spec):
            if self.rows not in self._packed:
                self._packed[self.rows] = PackedRows.of(layer, self.parts())
            if (packed := self._packed[self.rows]) is not None:
                return [packed.attend(layer, query, key, value, spec)]
        made = []
        for cache, rows, tree in self.parts():
            cache.append(layer, key[:, rows], value[:, rows])
            made.append(cache.attend(layer, query[:, rows], spec, tree))
        return made

    def parts(self) -> Iterator[tuple[KVCache, slice, PendingTree | None]]:
        """Caches and their rows, counted within the rows that are being computed now."""
        for segment, rows, behind in self.segment_rows():
            high = segment.tokens - behind
            low = high - (rows.stop - rows.start)
            yield segment.cache, rows, segment.tree and _rows_of_tree(segment.tree, low, high)

    def segment_rows(self) -> Iterator[tuple[Segment, slice, int]]:
        """Segments, their rows among those that are computed now, and how many come later."""
        start = 0
        for segment in self.segments:
            stop = start + segment.tokens
            low, high = max(start, self.rows.start), min(stop, self.rows.stop)
            if low < high:
                yield segment, slice(low - self.rows.start, high - self.rows.start), stop - high
            start = stop


def _rows_of_tree(tree: PendingTree, low: int, high: int) -> PendingTree:
    """The part of a tree for its newest rows `low` to `high`, when later ones are not there yet."""
    rows = tree.visible.shape[0]
    if (low, high) == (0, rows):
        return tree
    pending = tree.visible.shape[1] - rows + high
    parents = tree.parents and tree.parents[:pending]
    return PendingTree(tree.visible[low:high, :pending], tree.positions[:pending], parents)


def attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attend for one layer; called by the attention modules of transformers.

    Args:
        module: HF's attention module; its `layer_idx` says which cache layer this is.
        query: [1, H, S, D] rotated.
        key: [1, K, S, D] rotated.
        value: [1, K, S, D].
        attention_mask: None, since no mask function is registered under our name.
        options: what HF passes besides; those that change the result are honoured.

    Returns:
        [1, S, H, D] and no weights.
    """
    context = options.get(CONTEXT_KEYWORD)
    if not isinstance(context, PassContext):
        raise CheckpointError("their layers do not pass keywords on to their attention")
    layer = module.layer_idx
    assert isinstance(layer, int)
    spec = read_spec(query.shape[-1], options)
    if context.exact:
        spec = replace(spec, exact=True, fixed=context.tiles > 0)
    if context.strict:
        _check_options(attention_mask, options, spec)
    step, given = partial(_attended, layer, spec), (query, key, value)
    if context.apart is not None:
        return context.apart(step, given), None
    return step(context, given), None


def _attended(
    layer: int, spec: AttentionSpec, context: PassContext, given: Sequence[torch.Tensor]
) -> torch.Tensor:
    """What `attend_packed` returns for queries, keys and values."""
    query, key, value = (rows[0] for rows in given)
    return context.whole_tile(context.attend(layer, query, key, value, spec)).unsqueeze(0)


class MaskKind(StrEnum):
    """The mask HF would have given to a layer; the probe passes it in place of one."""

    CAUSAL = "causal"
    SLIDING = "sliding"


def _check_options(attention_mask: object, options: dict[str, object], spec: AttentionSpec) -> None:
    """In the probe: see that what we attend to is what HF's mask would have allowed."""
    unknown = sorted(k for k, v in options.items() if v is not None and k not in _KNOWN_OPTIONS)
    if unknown:
        raise CheckpointError(f"their attention is given {', '.join(unknown)}")
    if not isinstance(attention_mask, MaskKind):
        raise CheckpointError("they make an attention mask of their own")
    if (attention_mask is MaskKind.SLIDING) != (spec.window is not None):
        raise CheckpointError(
            f"they give a {attention_mask} mask to an attention with window {spec.window}"
        )


def read_spec(head_dim: int, options: dict[str, object]) -> AttentionSpec:
    """Pick from HF's keywords those that change the result.

    Raises:
        CheckpointError: one is of a kind we would misread.
    """
    window, sinks = options.get("sliding_window"), options.get("s_aux")
    scaling = _number(options, "scaling")
    if not (window is None or type(window) is int):
        raise CheckpointError(f"their attention is given sliding_window={window!r}")
    if not (sinks is None or isinstance(sinks, torch.Tensor)):
        raise CheckpointError(f"their attention is given s_aux={sinks!r}")
    return AttentionSpec(
        scaling=head_dim**-0.5 if scaling is None else scaling,
        window=window,
        softcap=_number(options, "softcap"),
        sinks=sinks,
    )


def _number(options: dict[str, object], name: str) -> float | None:
    value = options.get(name)
    if value is None or type(value) in (int, float):
        return value  # type: ignore[return-value]
    raise CheckpointError(f"their attention is given {name}={value!r}")


AttentionInterface.register(ATTENTION_NAME, attend_packed)
