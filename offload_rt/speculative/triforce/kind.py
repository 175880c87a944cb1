"""TriForce as a kind of drafter (arXiv:2404.11912). No torch here."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from offload_rt.config import DraftConfig, DraftWeights, KVPlace, RuntimeConfig
from offload_rt.costs.acceptance import chain_tokens
from offload_rt.device.kinds import DeviceKind
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.formats.base import rounded_kind
from offload_rt.model.layout import compute_dtype
from offload_rt.speculative.draft_model.kind import history
from offload_rt.speculative.kind import SIZES, DrafterKind
from offload_rt.speculative.kinds import kind_of

_RATE = 0.88  # 0.87 to 0.98 were seen (docs/RESULTS.md, "TriForce's prior acceptance rate")


def _variants(
    draft: DraftConfig, target: Checkpoint, dtype: str, device: DeviceKind
) -> Sequence[DraftConfig]:
    """With the weights that are asked for, else with the target's own and with rounded copies."""
    asked = draft.retrieval.retrieval_weights
    if asked is not DraftWeights.AUTO:
        return (draft,)
    name = compute_dtype(target.config.dtype, target.tensors.values(), dtype)
    weights = filter(None, (DraftWeights.SAME, rounded_kind(name, device)))
    return [
        replace(draft, retrieval=replace(draft.retrieval, retrieval_weights=kept))
        for kept in weights
    ]


def _is_worth_a_look(draft: DraftConfig, runtime: RuntimeConfig, prompt_tokens: int) -> bool:
    offloads = runtime.kv is not KVPlace.DEVICE
    return offloads and prompt_tokens > draft.retrieval.budget_tokens


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
        yield f"{draft.retrieval.retrieval_weights} copies of all layers"


KIND = DrafterKind(
    label="retrieval",
    most_tokens=64,
    prior=tuple((size, chain_tokens([_RATE], size) - 1.0) for size in SIZES),
    automatic=_is_worth_a_look,
    variants=_variants,
    inner_rates=_inner_rates,
    history=_history,
    in_memory=_in_memory,
)
