"""TriForce as a kind of drafter (arXiv:2404.11912). No torch here."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from offload_rt.config import DraftConfig, DraftWeights, KVPlace, RuntimeConfig
from offload_rt.costs.acceptance import chain_tokens, triforce_tokens
from offload_rt.costs.drafters import Drafting, DraftPart, Expected
from offload_rt.costs.sizes import (
    decoding_bytes,
    head_bytes,
    kv_bytes_per_token,
    layouts_of,
    number_bytes_of,
    recorded_bytes,
)
from offload_rt.costs.workload import PlacedModel
from offload_rt.device.kinds import DeviceKind
from offload_rt.kv.sizes import retrieval_sizes
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.formats.base import layer_bytes, resolve_weights, rounded_kind
from offload_rt.model.layout import compute_dtype
from offload_rt.speculative.draft_model.kind import history
from offload_rt.speculative.kind import SIZES, DraftedRun, DrafterKind, DrafterSeat, DraftMemory
from offload_rt.speculative.kinds import draft_memory, draft_parts, kind_of

if TYPE_CHECKING:
    from offload_rt.speculative.base import Drafter

_RATE = 0.88  # 0.87 to 0.98 were seen (docs/RESULTS.md, "TriForce's prior acceptance rate")


def _variants(
    draft: DraftConfig, target: Checkpoint, dtype: str, device: DeviceKind
) -> Sequence[DraftConfig]:
    """With the weights that are asked for, else with the target's own and with rounded copies."""
    asked = draft.retrieval.retrieval_weights
    if asked is not DraftWeights.AUTO:
        return (draft,)
    name = compute_dtype(target, dtype)
    weights = filter(None, (DraftWeights.SAME, rounded_kind(name, device)))
    return [
        replace(draft, retrieval=replace(draft.retrieval, retrieval_weights=kept))
        for kept in weights
    ]


def _is_worth_a_look(
    draft: DraftConfig, runtime: RuntimeConfig, dtype: str, prompt_tokens: int
) -> bool:
    offloads = runtime.kv is not KVPlace.DEVICE
    return offloads and prompt_tokens > draft.retrieval.budget_tokens


def _parts(drafting: Drafting, target: PlacedModel, expected: Expected) -> tuple[DraftPart, ...]:
    """Passes over the retrieval cache, and what is drafted for them."""
    config, inner = drafting.config, drafting.config.inner
    alone = replace(target, sequences=1)
    rates = expected.inner or (0.0,)
    work = triforce_tokens([1.0], config.nodes, rates, inner.nodes if expected.inner else 0)
    rows = 1 + (min(inner.nodes, config.nodes - 1) if expected.inner else 0)
    load = alone.over_retrieval(rows, config.retrieval.budget_tokens, _copied(config))
    parts = [DraftPart(times=work.retrieval_passes, load=load)]
    below = draft_parts(replace(drafting, config=inner), alone, expected) if expected.inner else ()
    for part in below:
        chain = part.load is not None and not inner.as_tree
        times = work.draft_steps if chain else work.retrieval_passes * part.times
        parts.append(replace(part, times=times))
    return tuple(replace(part, times=part.times * target.sequences) for part in parts)


def _memory(drafting: Drafting, run: DraftedRun) -> DraftMemory:
    config = drafting.config
    below = draft_memory(replace(drafting, config=config.inner), run.behind(config.nodes))
    copies, head = rounded_copy_parts(run.target, config, run.dtype, run.device)
    beside, building_bytes = _retrieval_bytes(config, run)
    copied_bytes = sum(copies) + head
    number_bytes = number_bytes_of(run.target, run.dtype)
    recorded = recorded_bytes(run.target.config, number_bytes, run.device)
    return DraftMemory(
        kept_bytes=below.kept_bytes + building_bytes + sum(beside) + head + recorded,
        beside_bytes=tuple(beside),
        streamed_bytes=tuple(copies) if any(copies) else (),
        copies_all=True,
        building_bytes=building_bytes,
        copied_bytes=below.copied_bytes + copied_bytes,
        recorded_bytes=below.recorded_bytes + recorded,
        pass_bytes=below.pass_bytes,
        loading_bytes=below.loading_bytes,
        head_bytes=head_bytes(run.target, _copied(config), run.dtype),
        drawn_nodes=run.drawn_nodes(config) + below.drawn_nodes,
    )


def _retrieval_bytes(draft: DraftConfig, run: DraftedRun) -> tuple[list[int], int]:
    """Bytes of the retrieval caches in each layer, and of building one."""
    model, number_bytes = run.target.config, number_bytes_of(run.target, run.dtype)
    per_token = kv_bytes_per_token(model, number_bytes)
    row_bytes = [per_token // model.num_layers] * model.num_layers
    sizes = [retrieval_sizes(draft, row_bytes, capacity) for capacity in run.capacities]
    rows = sum(s.rows for s in sizes)
    building = max(s.build_bytes(host_computes=run.device.host_computes) for s in sizes)
    return [rows * nbytes for nbytes in row_bytes], building


def rounded_copy_parts(
    checkpoint: Checkpoint, draft: DraftConfig, dtype: str, device: DeviceKind
) -> tuple[list[int], int]:
    """Bytes of rounded copies of each layer of the target, and of its head; 0 where its own draft.

    The embedding, and what else is in no layer but the head, is the target's own.

    Raises:
        ConfigError: the device has no kernels for what is asked for.
    """
    weights = _copied(draft)
    if weights is DraftWeights.SAME:
        return [0] * checkpoint.config.num_layers, 0
    name = compute_dtype(checkpoint, dtype)
    resolve_weights(weights, name, device, "--retrieval-weights")
    *layers, _ = layouts_of(checkpoint, dtype, device)
    scratch = decoding_bytes(checkpoint, dtype, device)  # from which they are rounded
    head = head_bytes(checkpoint, weights, dtype) + scratch
    return [layer_bytes(layout, weights) for layout in layers], head


def _copied(draft: DraftConfig) -> DraftWeights:
    """How the copies are kept that draft; `same`: the target's own weights do."""
    kept = draft.retrieval
    return kept.retrieval_weights if kept.rounded else DraftWeights.SAME


def _inner_rates(draft: DraftConfig) -> tuple[float, ...]:
    rate = kind_of(draft.inner.kind).below
    return () if rate is None else (rate,)


def _history(draft: DraftConfig) -> Iterator[str]:
    kept = draft.retrieval
    yield from history(draft) if draft.model else ()
    yield f"{kept.budget_tokens} tokens in chunks of {kept.chunk_tokens}"
    if kept.rounded:
        yield f"target in {kept.retrieval_weights}"


def _in_memory(draft: DraftConfig) -> Iterator[str]:
    yield f"{draft.retrieval.budget_tokens} tokens of KV"
    if draft.retrieval.rounded:
        yield f"{draft.retrieval.retrieval_weights} copies of layers"


def _make(seat: DrafterSeat, draft: DraftConfig) -> "Drafter":
    from offload_rt.kv.followed import FollowedKV
    from offload_rt.speculative.triforce.drafter import TriForceDrafter

    inner = kind_of(draft.inner.kind).make(seat.behind(draft.nodes), draft.inner)
    cache = seat.cache
    assert isinstance(cache, FollowedKV)  # as allocated
    cache.choice.forget()
    triforce = TriForceDrafter(seat.device, seat.draft_pass, cache, inner, draft)
    triforce.begin(seat.sampling, seat.generator)
    cache.counts = triforce.counts
    return triforce


KIND = DrafterKind(
    label="retrieval",
    most_tokens=64,
    make=_make,
    parts=_parts,
    memory=_memory,
    prior=tuple((size, chain_tokens([_RATE], size) - 1.0) for size in SIZES),
    automatic=_is_worth_a_look,
    variants=_variants,
    inner_rates=_inner_rates,
    history=_history,
    in_memory=_in_memory,
)
