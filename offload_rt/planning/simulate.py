"""What a scenario's run would take: its pass and its drafting, put together.

    s_per_token = (pass, with what of the drafting does not hide behind it) / tokens per pass

Tokens per pass follow from acceptance (`costs/acceptance.py`), the pass from the real pipelines in
virtual time (`costs/pass_cost.py`), drafting from the profile or from seconds that are given. Not
modelled: the all-reduces of a model split by heads, host syncs, the time a verifier takes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from offload_rt.config import DraftWeights
from offload_rt.costs.acceptance import (
    chain_tokens,
    grow_tree,
    rate_of_share,
    triforce_tokens,
)
from offload_rt.costs.machine import Speeds
from offload_rt.costs.pass_cost import (
    LayerLoad,
    Limit,
    LinkRates,
    PassCost,
    PassLoad,
    cost_of,
    link_rates,
    pass_times,
)
from offload_rt.device.kinds import KINDS
from offload_rt.errors import ConfigError
from offload_rt.kv.sizes import block_tokens_for, spread_layers
from offload_rt.planning.placement import Demand, Placement, place
from offload_rt.planning.scenario import (
    DrafterShape,
    DraftKind,
    Home,
    ModelShape,
    Order,
    PlacementShape,
    Scenario,
    Split,
)
from offload_rt.profiling.adjust import adjust_profile
from offload_rt.profiling.profile import HardwareProfile, Obtained
from offload_rt.profiling.rates import attention_s, disk_bytes_per_s, layer_s

_HIDDEN_BYTES = 2  # of a number of the hidden state that hops


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a run would take, per pass over the target in the steady state.

    Attributes:
        tokens_per_pass: emitted.
        bytes_per_pass: weights and KV that cross the links to the devices.
        back_bytes_per_pass: KV that crosses the other way.
        transfer_s: in which the busiest link carries those bytes.
        compute_s: in which kernels of the target run.
        stall_s: in which none runs, nor a drafter.
        drafting_s: in which the drafter works.
        resident_layers: whose weights stay on the devices.
        streamed_layers: whose do not.
        limit: what would have to be faster.
        obtained: how the worst number of the profile behind it is known.
    """

    s_per_token: float
    s_per_pass: float
    tokens_per_pass: float
    bytes_per_pass: int
    back_bytes_per_pass: int
    transfer_s: float
    compute_s: float
    stall_s: float
    drafting_s: float
    resident_layers: int
    streamed_layers: int
    limit: Limit
    obtained: Obtained


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftOutlook:
    """What drafting for a pass takes and yields.

    Attributes:
        tokens_per_pass: emitted.
        steps: one after another.
        step_s: of one.
        inner_s: of what is done below the steps, all together.
    """

    tokens_per_pass: float = 1.0
    steps: float = 0.0
    step_s: float = 0.0
    inner_s: float = 0.0

    @property
    def seconds(self) -> float:
        """Per pass."""
        return self.steps * self.step_s + self.inner_s


def simulate(scenario: Scenario, profile: HardwareProfile) -> Prediction:
    """Predict a scenario's run.

    Args:
        scenario: what runs.
        profile: of the machine, before the scenario's own changes (`set`).

    Raises:
        ConfigError: the scenario asks for what the profile's machine has not.
        PlanError: nothing fits the device memory.
        ProfileError: the profile lacks a number.
    """
    made = adjust_profile(profile, scenario.set)
    _check_devices(scenario.placement, made)
    load = _load(scenario, made)
    step = None
    if scenario.draft.kind is DraftKind.TRIFORCE and scenario.draft.step_s is None:
        step = _retrieval_pass(scenario, load)
    return predict(load, _drafting(scenario, made), partial(_cost, scenario, made), step)


def predict(
    load: PassLoad,
    drafting: DraftOutlook,
    price: Callable[[PassLoad], PassCost],
    step: PassLoad | None = None,
) -> Prediction:
    """Put a pass and its drafting together.

    Args:
        load: the pass, without drafting.
        drafting: what that takes and yields.
        price: tells the cost of a pass.
        step: the pass over the target's own weights that a step of drafting is; None if its
            seconds are known.
    """
    cost = price(load)
    if step is not None:
        drafting = replace(drafting, step_s=price(step).pass_s)
        if load.streamed:  # a step uses the ring itself, so nothing comes in ahead meanwhile
            return _together(load, cost, drafting, cost.pass_s + drafting.seconds)
    if drafting.seconds:
        cost = price(replace(load, between_s=drafting.seconds))
    return _together(load, cost, drafting, cost.pass_s)


def _together(load: PassLoad, cost: PassCost, drafting: DraftOutlook, step_s: float) -> Prediction:
    whole = replace(cost, pass_s=step_s, between_s=drafting.seconds)
    kernels_s = cost.compute_s - cost.between_s
    whole = replace(whole, compute_s=kernels_s + drafting.seconds)
    return Prediction(
        s_per_token=step_s / drafting.tokens_per_pass,
        s_per_pass=step_s,
        tokens_per_pass=drafting.tokens_per_pass,
        bytes_per_pass=cost.home_bytes + cost.kv_home_bytes,
        back_bytes_per_pass=cost.kv_back_bytes,
        transfer_s=cost.transfer_s,
        compute_s=kernels_s,
        stall_s=max(0.0, step_s - kernels_s - drafting.seconds),
        drafting_s=drafting.seconds,
        resident_layers=len(load.layers) - len(load.streamed),
        streamed_layers=len(load.streamed),
        limit=whole.limit,
        obtained=cost.obtained,
    )


def _check_devices(shape: PlacementShape, profile: HardwareProfile) -> None:
    gpus = len(profile.machine.gpus)
    if KINDS[shape.processor].own_memory and shape.devices > gpus:
        raise ConfigError(
            f"placement.devices is {shape.devices}, but profile {profile.name} has {gpus} GPUs: "
            "lower it or choose another profile"
        )


def _load(scenario: Scenario, profile: HardwareProfile) -> PassLoad:
    """The pass, without drafting."""
    model, shape = scenario.model, scenario.placement
    share = shape.devices if shape.split is Split.HEADS else 1
    striped = shape.devices // share
    row_bytes = model.kv_row_bytes // share
    away = _away(model.layers, shape.kv_home_layers, shape.order)
    work = model.layer_work(share)
    streamed = _streamed(scenario, profile, share)
    kv_bytes = scenario.context_tokens * row_bytes
    layers = [
        LayerLoad(
            work=work,
            home_bytes=work.weight_bytes,
            kv_bytes=0 if index in away else kv_bytes,
            kv_home_bytes=kv_bytes if index in away else 0,
            kv_back_bytes=row_bytes if index in away else 0,
            device=index % striped,
        )
        for index in range(model.layers)
    ]
    block_tokens = shape.kv_block_tokens or block_tokens_for(row_bytes)
    return PassLoad(
        layers=layers,
        streamed=streamed,
        slots=shape.slots,
        tokens=1 + scenario.draft.gamma,
        head=model.head_work,
        kv_slots=shape.kv_slots,
        kv_block_bytes=block_tokens * row_bytes if away and kv_bytes else 0,
        hop_bytes=(1 + scenario.draft.gamma) * model.hidden * _HIDDEN_BYTES,
    )


def _away(layers: int, count: int, order: Order) -> frozenset[int]:
    """Which layers are not resident, if so many are not."""
    kept = layers - count
    if order is Order.FIRST:
        return frozenset(range(kept, layers))
    return frozenset(range(layers)) - (spread_layers(kept, layers) if kept else frozenset())


def _streamed(scenario: Scenario, profile: HardwareProfile, share: int) -> tuple[int, ...]:
    """Layers whose weights are copied: the given number, or what does not fit."""
    model, shape = scenario.model, scenario.placement
    resident = shape.resident_layers
    if resident is None:
        resident = _fitting_layers(scenario, profile, share)
    return tuple(sorted(_away(model.layers, model.layers - resident, shape.order)))


def _fitting_layers(scenario: Scenario, profile: HardwareProfile, share: int) -> int:
    """How many layers' weights fit on the devices, as `place` decides it for each."""
    model, shape = scenario.model, scenario.placement
    machine, row_bytes = profile.machine, model.kv_row_bytes // share
    striped = shape.devices // share
    on_device = model.layers - shape.kv_home_layers
    limit = shape.device_memory_bytes
    if limit is None and KINDS[shape.processor].own_memory:
        limit = min(gpu.memory_bytes for gpu in machine.gpus)
    found = 0
    for device in range(striped):
        layers = len(range(device, model.layers, striped))
        blocks = shape.kv_block_tokens or block_tokens_for(row_bytes)
        ring = shape.kv_slots * blocks * row_bytes if shape.kv_home_layers else 0
        demand = Demand(
            layer_bytes=(model.layer_work(share).weight_bytes,) * layers,
            base_bytes=0 if device else 2 * model.head_work.weight_bytes,
            kv_bytes=-(-on_device // striped) * scenario.context_tokens * row_bytes + ring,
            workspace_bytes=shape.reserved_bytes,
        )
        found += len(_placed(demand, limit or machine.ram_bytes, shape.slots).resident)
    return found


def _placed(demand: Demand, limit: int, slots: int) -> Placement:
    """Place all layers, or as many as fit beside a ring of so many slots."""
    freely = place(demand, limit)
    return place(demand, limit, slots=slots) if freely.streamed else freely


def _cost(scenario: Scenario, profile: HardwareProfile, load: PassLoad) -> PassCost:
    """What a pass of the scenario costs."""
    shape = scenario.placement
    rates = _rates(shape, profile, load)
    return cost_of(load, pass_times(profile, load, shape.processor, rates))


def _rates(shape: PlacementShape, profile: HardwareProfile, load: PassLoad) -> LinkRates:
    if shape.home is Home.DISK:
        disk = disk_bytes_per_s(profile, shape.reads)
        # Layers come in on all devices at once. A ring of KV blocks reaches but a little ahead of
        # the layer at work, so of striped layers one reads at a time.
        by_head = shape.devices if shape.split is Split.HEADS else 1
        readers = max(by_head, len({load.layers[index].device for index in load.streamed}))
        home = replace(disk, value=disk.value / readers)
        kv = replace(disk, value=disk.value / by_head)
        return LinkRates(home=(home,) * load.devices, kv=kv, back=kv)
    return link_rates(profile, load, together=shape.devices > 1)


def _drafting(scenario: Scenario, profile: HardwareProfile) -> DraftOutlook:
    draft = scenario.draft
    if draft.kind is DraftKind.NONE:
        return DraftOutlook()
    step_s = draft.step_s or 0.0
    if draft.model is not None:
        step_s = _model_step_s(draft, draft.model, scenario, profile)
    rates = draft.acceptance
    if draft.accepted_share is not None:
        rates = (rate_of_share(draft.accepted_share, draft.gamma),)
    if draft.kind is DraftKind.TRIFORCE:
        return _two_levels(draft, rates, step_s)
    steps, tokens = float(draft.gamma), draft.tokens_per_pass
    if draft.kind is DraftKind.TREE:
        grown = grow_tree(draft.ranks, draft.gamma, draft.depth)
        steps = float(draft.depth or grown.depth(draft.gamma))
        tokens = tokens or grown.tokens(draft.gamma)
    return DraftOutlook(
        tokens_per_pass=tokens or chain_tokens(rates, draft.gamma), steps=steps, step_s=step_s
    )


def _two_levels(draft: DrafterShape, rates: tuple[float, ...], step_s: float) -> DraftOutlook:
    below = triforce_tokens(
        rates or (1.0,), draft.gamma, draft.inner_acceptance or (0.0,), draft.inner_gamma
    )
    return DraftOutlook(
        tokens_per_pass=draft.tokens_per_pass or below.tokens,
        steps=below.retrieval_passes,
        step_s=step_s,
        inner_s=below.draft_steps * draft.inner_step_s,
    )


def _model_step_s(
    draft: DrafterShape, model: ModelShape, scenario: Scenario, profile: HardwareProfile
) -> float:
    """A pass of the draft model, which lies on the device whole."""
    processor = scenario.placement.processor
    context = draft.context_tokens
    tokens = scenario.context_tokens if context is None else context
    seconds = layer_s(profile, model.layer_work(), draft.width, processor=processor).value
    if tokens:
        kv_bytes = tokens * model.kv_row_bytes
        seconds += attention_s(profile, kv_bytes, draft.width, processor=processor).value
    head = layer_s(profile, model.head_work, draft.width, processor=processor).value
    return model.layers * seconds + head


def _retrieval_pass(scenario: Scenario, load: PassLoad) -> PassLoad:
    """A pass of the target's weights over the retrieval cache."""
    shape = scenario.placement
    share = shape.devices if shape.split is Split.HEADS else 1
    kv_bytes = scenario.draft.retrieval_tokens * scenario.model.kv_row_bytes // share
    return over_retrieval(load, kv_bytes, 1 + scenario.draft.inner_gamma)


def over_retrieval(load: PassLoad, kv_bytes: int, tokens: int) -> PassLoad:
    """The same pass for so many tokens over a cache on the device, of `kv_bytes` in each layer."""
    layers = [
        replace(layer, kv_bytes=kv_bytes, kv_home_bytes=0, kv_back_bytes=0) for layer in load.layers
    ]
    return replace(load, layers=layers, tokens=tokens, kv_block_bytes=0)


def in_copies(load: PassLoad, speeds: Speeds, weights: DraftWeights) -> PassLoad:
    """The same pass with rounded copies of all weights, which lie on the device whole."""
    works = [speeds.draft_work(layer.work, weights) for layer in load.layers]
    layers = [
        replace(layer, work=work, weights=order)
        for layer, (work, order) in zip(load.layers, works, strict=True)
    ]
    head = load.head and speeds.draft_work(load.head, weights)[0]
    return replace(load, layers=layers, head=head, streamed=(), slots=0)
