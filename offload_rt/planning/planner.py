"""Choose what lives where, who drafts, and how much, by predicted seconds per token. No torch here.

Every candidate is placed within the memory there is (`run.place_run`), its pass is run by the real
pipeline on the simulated device with the profile's times (`cost.cost_of`), and what a draft gives
comes from what drafting gave before (`drafting`). What the user fixed is fixed in all candidates.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from offload_rt.config import DraftConfig, DraftWeights, HomeKind, KVPlace, RuntimeConfig
from offload_rt.costs.acceptance import triforce_tokens
from offload_rt.costs.machine import FreeMemory, Speeds
from offload_rt.costs.pass_cost import (
    LayerLoad,
    LinkRates,
    PassCost,
    PassLoad,
    cost_of,
    pass_times,
)
from offload_rt.costs.sizes import image_bytes, kv_bytes_per_token, number_bytes_of
from offload_rt.device.kinds import DeviceKind
from offload_rt.errors import ConfigError, PlanError
from offload_rt.kv.sizes import KVPlan, KVSizes
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.formats.base import rounded_kind
from offload_rt.model.layout import compute_dtype
from offload_rt.planning.controller import StepOutlook
from offload_rt.planning.demand import Drafting, draft_weights_of, rounded_copy_weights, settled
from offload_rt.planning.drafting import SIZES, Yield
from offload_rt.planning.placement import Placement, smallest_bytes
from offload_rt.planning.run import RunLoad, place_run
from offload_rt.profiling.profile import LayerWork, Obtained

MAX_SIZES = {"ngram": 64, "model": 256, "medusa": 256, "triforce": 64}
SLOT_CHOICES = (2, 3, 4, 6, 8, 12)  # rings that are tried when drafting leaves time to fill them
_REFINED = 4  # candidates whose rings are varied
# A run may draft up to so many times the tokens it begins with, if room for them costs its first
# steps no more than that.
_MOST_ROOM, _ROOM_COST = 4, 1.02

# N-grams of which nothing was seen yet begin small: how many tokens they give depends on the text
# more than on anything that is known before it. The controller goes up as soon as it pays. Over 60
# simulated answers each, beginning with 8 instead of 32 took 2.4 % off where little was accepted
# and added 5 % where half of the tokens came from drafts.
_FIRST_NGRAMS, _KNOWN_STEPS = 8, 16
NGRAM_S = 3e-4  # a look-up, measured: 0.1 to 0.5 ms
_STEP_S = 1e-3  # sampling and bookkeeping of a step, measured: 1 to 2 ms on a CPU
_INNER_RATES = {"ngram": 0.4, "model": 0.7}  # below triforce; assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a step of the main loop should take.

    Attributes:
        s_per_token: seconds per token after the first.
        pass_s: the pass over the target, from the end of drafting to its logits.
        draft_s: drafting, while the ring goes on filling.
        tokens_per_pass: emitted per step.
        compute_s: of the pass, kernels.
        stall_s: of the pass, waiting for copies.
        home_bytes: that cross the link in it.
        obtained: how the worst number behind it is known.
        transfer_s: of the step, in which the link carries them, also beside kernels.
    """

    s_per_token: float
    pass_s: float
    draft_s: float
    tokens_per_pass: float
    compute_s: float
    stall_s: float
    home_bytes: int
    obtained: Obtained
    transfer_s: float = 0.0

    @property
    def limit(self) -> str:
        """What takes most of the step."""
        parts = {"drafting": self.draft_s, "compute": self.compute_s, "transfer": self.transfer_s}
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True, slots=True, kw_only=True)
class Considered:
    """A way to run that was looked at.

    Attributes:
        draft: who drafts, and how much.
        prediction: of its best placement; None where it does not fit.
        refusal: why it does not.
    """

    draft: DraftConfig
    prediction: Prediction | None = None
    refusal: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was chosen.

    Attributes:
        runtime: with slots and place of KV as chosen.
        drafting: who drafts, and how much at most.
        first_nodes: how much at first.
        placement: what lives where.
        prediction: what a step should take, of the first ones; None without a profile.
        outlooks: what drafts of each size should give and take, for the controller; empty if the
            number of tokens is fixed.
        considered: the best way with each drafter and size.
        smallest_bytes: the lowest limit of device memory under which one of them fits.
        level: times of recent runs over the profile's, by which all predicted ones are corrected.
    """

    runtime: RuntimeConfig
    drafting: Drafting
    first_nodes: int
    placement: Placement
    prediction: Prediction | None = None
    outlooks: tuple[StepOutlook, ...] = ()
    considered: tuple[Considered, ...] = ()
    smallest_bytes: int = 0
    level: float = 1.0

    def expected_pass_s(self, nodes: int) -> float | None:
        """What a pass that checks so many drafted tokens should take; None without a profile."""
        if self.prediction is None:
            return None
        near = (step.pass_s for step in self.outlooks if step.nodes >= nodes)
        return next(near, self.prediction.pass_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What the planner may use.

    Attributes:
        speeds: of the machine.
        yields: what drafts of a kind of drafter give.
        level: times of recent runs over those of the speeds, for runs that stream or do not.
    """

    speeds: Speeds
    yields: Callable[[DraftConfig], Yield]
    level: Callable[[bool], float] = lambda streams: 1.0


def make_plan(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    device: DeviceKind,
    *,
    load: RunLoad,
    free: FreeMemory,
    means: Means | None,
) -> Plan:
    """Plan a run: `plan_run`, or, where nothing is known of the machine, as it is asked for.

    Raises:
        ConfigError: an option has no effect; or nothing is known, and the drafter is left open.
        PlanError: it does not fit.
        ProfileError: the profile lacks a number.
    """
    if means is not None:
        return plan_run(checkpoint, runtime, device, load=load, free=free, means=means)
    if load.drafting.config.kind == "auto":
        raise ConfigError("--draft auto needs speeds of the machine: name a drafter, or none")
    load = replace(load, drafting=settled(load.drafting, device))
    config = load.drafting.config
    if config.kind == "triforce":
        weights = _retrieval_weights(config, checkpoint, runtime, device)[0]
        config = _drafting_in(config, weights)
        load = replace(load, drafting=replace(load.drafting, config=config))
    placement = place_run(checkpoint, runtime, device, load=load, free=free)
    return Plan(
        runtime=runtime,
        drafting=load.drafting,
        first_nodes=load.drafting.config.nodes,
        placement=placement,
        smallest_bytes=_smallest(placement, runtime),
    )


def _smallest(placement: Placement, runtime: RuntimeConfig) -> int:
    if runtime.resident is not None:
        return placement.device_bytes
    return smallest_bytes(
        placement.demand, slots=runtime.slots, resident_layers=runtime.resident_layers
    )


def plan_run(
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    device: DeviceKind,
    *,
    load: RunLoad,
    free: FreeMemory,
    means: Means,
) -> Plan:
    """Search for the fastest way to run.

    Args:
        checkpoint: headers of the model.
        runtime: limits and choices of the user.
        device: what computes.
        load: capacities, prompt, and the user's choice of drafting: `auto` leaves the drafter open,
            no tokens their number.
        free: memory that is free now.
        means: speeds of the machine, and what drafting gives.

    Raises:
        ConfigError: an option has no effect or contradicts another.
        PlanError: nothing fits; the refusal that asks for least.
        ProfileError: the profile lacks a number.
    """
    load = replace(load, drafting=settled(load.drafting, device))
    draft = load.drafting.config
    search = _Search(checkpoint, runtime, device, load, free, means)
    found: list[_Candidate] = []
    refusals: list[tuple[DraftConfig, PlanError]] = []
    weights = _retrieval_weights(draft, checkpoint, runtime, device)
    for config in _drafts(draft, runtime, load, weights):
        if _is_bold(config, means) and not _is_fixed(draft):
            continue
        try:
            found.append(search.candidate(config, runtime))
        except PlanError as refusal:
            refusals.append((config, refusal))
    if not found:
        # One about other memory than the device's names no bytes of it.
        raise min((r for _, r in refusals), key=lambda r: r.needed_bytes or math.inf)
    best = min(search.refined(found), key=lambda c: (c.s_per_token, c.draft.nodes))
    chosen = best if _is_fixed(draft) else search.with_room(best)
    considered = [Considered(draft=c.draft, prediction=c.prediction) for c in found]
    considered += [Considered(draft=config, refusal=str(why)) for config, why in refusals]
    return Plan(
        runtime=chosen.runtime,
        drafting=chosen.drafting,
        first_nodes=best.draft.nodes,
        placement=chosen.placement,
        prediction=chosen.prediction,
        outlooks=() if _is_fixed(draft) else tuple(search.outlooks(chosen)),
        considered=tuple(considered),
        smallest_bytes=min(
            *(_smallest(c.placement, runtime) for c in found),
            *(refusal.needed_bytes for _, refusal in refusals if refusal.needed_bytes),
            chosen.placement.device_bytes,
        ),
        level=means.level(bool(chosen.placement.streamed)),
    )


def _is_bold(config: DraftConfig, means: Means) -> bool:
    """Whether so many n-grams would be drafted on an expectation alone."""
    bold = config.kind == "ngram" and config.nodes > _FIRST_NGRAMS
    return bold and means.yields(config).steps < _KNOWN_STEPS


def _is_fixed(draft: DraftConfig) -> bool:
    return draft.kind == "none" or draft.draft_tokens is not None


def _retrieval_weights(
    draft: DraftConfig, checkpoint: Checkpoint, runtime: RuntimeConfig, device: DeviceKind
) -> tuple[DraftWeights, ...]:
    """Weights triforce may draft with: as asked for, or the target's own and rounded copies."""
    asked = draft.retrieval.retrieval_weights
    if asked is not DraftWeights.AUTO:
        return (asked,)
    dtype = compute_dtype(checkpoint.config.dtype, checkpoint.tensors.values(), runtime.dtype)
    rounded = rounded_kind(dtype, device)
    return (DraftWeights.SAME, *([rounded] if rounded else ()))


def _drafting_in(draft: DraftConfig, weights: DraftWeights) -> DraftConfig:
    """The same with those weights over the retrieval cache."""
    return replace(draft, retrieval=replace(draft.retrieval, retrieval_weights=weights))


def _drafts(
    draft: DraftConfig, runtime: RuntimeConfig, load: RunLoad, weights: Sequence[DraftWeights]
) -> Iterator[DraftConfig]:
    """Every drafter and size to look at; triforce with each of `weights`."""
    for config in _sized_drafts(draft, runtime, load):
        if config.kind == "triforce":
            yield from (_drafting_in(config, kind) for kind in weights)
        else:
            yield config


def _sized_drafts(
    draft: DraftConfig, runtime: RuntimeConfig, load: RunLoad
) -> Iterator[DraftConfig]:
    if _is_fixed(draft):
        yield draft
        return
    kinds = [draft.draft]
    if draft.kind == "auto":
        yield replace(draft, draft="none")
        kinds = ["ngram"]
        offloads = runtime.kv is not KVPlace.DEVICE
        if offloads and load.prompt_tokens > draft.retrieval.budget_tokens:
            kinds.append("triforce")
    for name in kinds:
        sized = replace(draft, draft=name)
        for size in _sizes(sized, load):
            yield replace(sized, draft_tokens=size)


def _sizes(draft: DraftConfig, load: RunLoad) -> Sequence[int]:
    """Numbers of tokens a drafter may be asked for."""
    if draft.kind == "none":
        return ()
    most = min(MAX_SIZES[draft.kind], max(load.capacities))
    return [size for size in SIZES if size <= most and _has_room(draft, size)]


def _has_room(draft: DraftConfig, size: int) -> bool:
    try:
        replace(draft, draft_tokens=size)
    except ConfigError:  # a window too small for so many
        return False
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    runtime: RuntimeConfig
    drafting: Drafting
    placement: Placement
    prediction: Prediction

    @property
    def draft(self) -> DraftConfig:
        return self.drafting.config

    @property
    def s_per_token(self) -> float:
        return self.prediction.s_per_token


class _Search:
    """Places and prices candidates."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        runtime: RuntimeConfig,
        device: DeviceKind,
        load: RunLoad,
        free: FreeMemory,
        means: Means,
    ) -> None:
        self._checkpoint, self._runtime, self._device = checkpoint, runtime, device
        self._load, self._free, self._means = load, free, means
        self._model = _ModelWork.of(checkpoint, runtime.dtype, device)

    def candidate(self, draft: DraftConfig, runtime: RuntimeConfig) -> _Candidate:
        """Place one and price it."""
        drafting = replace(self._load.drafting, config=draft)
        load = replace(self._load, drafting=drafting)
        placement = place_run(self._checkpoint, runtime, self._device, load=load, free=self._free)
        prediction = self._predict(drafting, placement, draft.nodes)
        return _Candidate(
            runtime=runtime, drafting=drafting, placement=placement, prediction=prediction
        )

    def refined(self, found: Sequence[_Candidate]) -> list[_Candidate]:
        """The same, and the best of them with other rings."""
        best = sorted(found, key=lambda c: c.s_per_token)[:_REFINED]
        more = []
        for candidate in best:
            streamed = len(candidate.placement.streamed)
            if self._runtime.slots is not None or not candidate.prediction.draft_s:
                continue
            for slots in SLOT_CHOICES:
                if slots > streamed or slots == candidate.placement.slots:
                    continue
                try:
                    runtime = replace(self._runtime, slots=slots)
                    more.append(self.candidate(candidate.draft, runtime))
                except (PlanError, ConfigError):  # the ring is larger than what it would stream
                    continue
        return [*found, *more]

    def with_room(self, best: _Candidate) -> _Candidate:
        """The same with room for larger drafts, which the controller may come to, if it is cheap.

        Its prediction is that of the first steps, whose drafts are as large as before.
        """
        for size in reversed(_sizes(best.draft, self._load)):
            if not best.draft.nodes < size <= _MOST_ROOM * best.draft.nodes:
                continue
            try:
                roomy = self.candidate(replace(best.draft, draft_tokens=size), best.runtime)
            except (PlanError, ConfigError):  # the ring is larger than what it would stream
                continue
            prediction = self._predict(best.drafting, roomy.placement, best.draft.nodes)
            if prediction.s_per_token <= _ROOM_COST * best.s_per_token:
                return replace(roomy, prediction=prediction)
        return best

    def outlooks(self, chosen: _Candidate) -> Iterator[StepOutlook]:
        """What drafts of the sizes there is room for should give and take."""
        draft = chosen.draft
        limits = [0, *(size for size in SIZES if size < draft.nodes), draft.nodes]
        for size in limits if draft.kind != "none" else []:
            drafting = replace(chosen.drafting, config=draft.limited(size) if size else draft)
            gives = self._means.yields(draft).accepted(size) if size else 0.0
            draft_s = self._draft_s(drafting, chosen.placement, size)
            cost = self._pass(chosen.placement, size + 1, self._context, draft_s)
            level = self._means.level(bool(chosen.placement.streamed))
            yield StepOutlook(
                nodes=size,
                tokens=1.0 + gives,
                draft_s=level * draft_s,
                pass_s=level * (cost.pass_s - draft_s + _STEP_S),
            )

    def _predict(self, drafting: Drafting, placement: Placement, nodes: int) -> Prediction:
        draft_s = self._draft_s(drafting, placement, nodes)
        cost = self._pass(placement, nodes + 1, self._context, draft_s)
        hits, tokens, seconds = 1.0, 1.0, cost.pass_s
        if nodes:
            gives = self._means.yields(drafting.config)
            hits, tokens = gives.hits, gives.tokens(nodes)
        if hits < 1.0:
            plain = self._pass(placement, 1, self._context, 0.0)
            seconds = hits * cost.pass_s + (1.0 - hits) * plain.pass_s
        level = self._means.level(bool(placement.streamed))
        return Prediction(
            s_per_token=level * (seconds + _STEP_S) / tokens,
            pass_s=level * (seconds - hits * draft_s),
            draft_s=level * hits * draft_s,
            tokens_per_pass=tokens,
            compute_s=level * (cost.compute_s - draft_s),
            stall_s=level * cost.stall_s,
            home_bytes=cost.home_bytes,
            obtained=cost.obtained,
            transfer_s=level * cost.transfer_s,
        )

    @property
    def _context(self) -> int:
        """Cached tokens of all sequences a pass attends to, about."""
        return self._load.prompt_tokens

    def _draft_s(self, drafting: Drafting, placement: Placement, nodes: int) -> float:
        """Time to draft that many nodes for each sequence."""
        config, sequences = drafting.config, len(self._load.capacities)
        if not nodes or config.kind == "none":
            return 0.0
        if config.kind == "triforce":
            return sequences * self._triforce_s(drafting, placement, nodes)
        if config.kind == "medusa":
            work = LayerWork(
                weight_bytes=drafting.heads_bytes, flops_per_token=drafting.heads_bytes
            )
            return self._means.speeds.layer_s(work, 1, resident=False).value
        return sequences * self._plain_draft_s(drafting, config.limited(nodes))

    def _plain_draft_s(self, drafting: Drafting, config: DraftConfig) -> float:
        if drafting.checkpoint is None:
            return NGRAM_S
        model = _ModelWork.of(drafting.checkpoint, "auto", self._device)
        context = min(self._context, config.window_tokens or self._context)
        passes, rows = float(config.nodes), 1
        if config.as_tree:
            made = self._means.yields(drafting.config).made
            passes, rows = config.tree_passes * made, config.tree_breadth
        weights = draft_weights_of(drafting.checkpoint, config, self._device)
        return passes * model.resident_pass_s(self._means.speeds, rows, context, weights)

    def _triforce_s(self, drafting: Drafting, placement: Placement, nodes: int) -> float:
        config = drafting.config
        inner = config.inner
        work = triforce_tokens([1.0], nodes, [_INNER_RATES[inner.kind]], inner.nodes)
        budget = min(config.retrieval.budget_tokens, self._context)
        rows = min(inner.nodes, nodes) + 1
        if (weights := rounded_copy_weights(config)) is not DraftWeights.SAME:
            each = self._model.resident_pass_s(self._means.speeds, rows, budget, weights)
        else:
            # It reads the retrieval cache, which is on the device, whatever holds the full one.
            demand = replace(placement.demand, kv=None)
            each = self._pass(replace(placement, demand=demand), rows, budget, 0.0).pass_s
        inner_s = self._plain_draft_s(drafting, inner)
        return work.retrieval_passes * (each + inner_s)

    def _pass(self, placement: Placement, rows: int, context: int, between_s: float) -> PassCost:
        """A pass of so many rows per sequence over so many cached tokens."""
        speeds, model, kv = self._means.speeds, self._model, placement.demand.kv
        tokens, kv_bytes = rows * len(self._load.capacities), model.kv_row_bytes * context
        sizes = None if kv is None or kv.attend_on_host else kv.sizes[0]
        resident = set(placement.resident)
        kept_kv = range(len(model.layers)) if sizes is None else sizes.resident
        load = PassLoad(
            layers=[
                LayerLoad(
                    work=work,
                    home_bytes=placement.demand.layer_bytes[i],
                    kv_bytes=kv_bytes if i in kept_kv else 0,
                    kv_home_bytes=0 if i in kept_kv else kv_bytes,
                    weights=speeds.order(resident=i in resident),
                )
                for i, work in enumerate(model.layers)
            ],
            streamed=placement.streamed,
            slots=placement.slots,
            tokens=tokens,
            head=model.head,
            between_s=between_s,
            kv_slots=sizes.slots if sizes else 0,
            kv_block_bytes=sizes.slot_bytes if sizes else 0,
        )
        rates = self._rates(placement, kv, sizes)
        return cost_of(load, pass_times(speeds.profile, load, speeds.processor, rates))

    def _rates(self, placement: Placement, kv: KVPlan | None, sizes: KVSizes | None) -> LinkRates:
        speeds, runtime = self._means.speeds, self._runtime
        layers = placement.demand.layer_bytes
        block = max((layers[i] for i in placement.streamed), default=max(layers))
        home = speeds.home_bytes_per_s(placement.home, runtime, block)
        if kv is None or sizes is None:
            return LinkRates(home=(home,))
        where = HomeKind.HOST if kv.place is KVPlace.HOST else HomeKind.DISK
        rate = speeds.home_bytes_per_s(where, runtime, sizes.slot_bytes)
        return LinkRates(home=(home,), kv=rate, back=rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ModelWork:
    """What a token asks of a model's parts."""

    layers: tuple[LayerWork, ...]
    head: LayerWork
    kv_row_bytes: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str, device: DeviceKind) -> "_ModelWork":
        number_bytes = number_bytes_of(checkpoint, dtype)
        *layers, _ = image_bytes(checkpoint, dtype, device)
        config = checkpoint.config
        rows = (checkpoint.head or checkpoint.embedding).shape[0]
        head = number_bytes * rows * config.hidden_size
        return cls(
            layers=tuple(_work(nbytes, number_bytes) for nbytes in layers),
            head=_work(head, number_bytes),
            kv_row_bytes=kv_bytes_per_token(config, number_bytes) // config.num_layers,
        )

    def resident_pass_s(
        self, speeds: Speeds, rows: int, context: int, weights: DraftWeights
    ) -> float:
        """A pass of this model where all of it is on the device, to draft."""
        layers = sum(speeds.draft_layer_s(work, rows, weights).value for work in self.layers)
        attention = speeds.attention_s(self.kv_row_bytes * context, rows).value * len(self.layers)
        if weights is DraftWeights.SAME:
            return layers + attention + speeds.layer_s(self.head, rows, resident=False).value
        return layers + attention + speeds.draft_layer_s(self.head, rows, weights).value


def _work(nbytes: int, number_bytes: int) -> LayerWork:
    """All weights take part in every token; of a layer of experts that is too much."""
    return LayerWork(weight_bytes=nbytes, flops_per_token=2 * nbytes // number_bytes)
