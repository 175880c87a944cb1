"""Seconds and bytes of a scenario's run: its pass and its drafting, as `costs` prices them.

Not modelled: the all-reduces of a model split by heads, host syncs, the seconds of a verifier.
"""

from dataclasses import replace
from functools import partial

from offload_rt.config import DraftWeights
from offload_rt.costs.acceptance import chain_tokens, grow_tree, rate_of_share, triforce_tokens
from offload_rt.costs.drafters import DraftPart, Expected
from offload_rt.costs.experts import Distances, ExpertUse, choosing_s, launching_s
from offload_rt.costs.machine import Speeds
from offload_rt.costs.pass_cost import (
    LinkRates,
    PassCost,
    PassLoad,
    cost_of,
    link_rates,
    pass_times,
)
from offload_rt.costs.step import Prediction, StepWork, predict
from offload_rt.costs.workload import PlacedModel, PooledExperts, Residence, StreamedKV
from offload_rt.device.kinds import KINDS
from offload_rt.errors import ConfigError
from offload_rt.kv.sizes import block_tokens_for, spread_layers
from offload_rt.planning.placement import Demand, Placement, place
from offload_rt.planning.scenarios.scenario import (
    DrafterShape,
    DraftKind,
    Home,
    Order,
    PlacementShape,
    Scenario,
    Split,
)
from offload_rt.profiling.adjust import adjust_profile
from offload_rt.profiling.profile import HardwareProfile
from offload_rt.profiling.rates import disk_bytes_per_s


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
    target = _placed_model(scenario, made)
    expected, parts = _drafting(scenario, target)
    work = StepWork(
        load=target.load(1 + scenario.draft.gamma, expected.tokens),
        plain=target.load(1),
        expected=expected,
        parts=parts,
        host_s=0.0,  # another program's is not known
    )
    return predict(work, partial(_cost, scenario, made))


def _check_devices(shape: PlacementShape, profile: HardwareProfile) -> None:
    gpus = len(profile.machine.gpus)
    if KINDS[shape.processor].own_memory and shape.devices > gpus:
        raise ConfigError(
            f"placement.devices is {shape.devices}, but profile {profile.name} has {gpus} GPUs: "
            "lower it or choose another profile"
        )


def _placed_model(scenario: Scenario, profile: HardwareProfile) -> PlacedModel:
    model, shape = scenario.model, scenario.placement
    share = _share(shape)
    row_bytes = model.kv_row_bytes // share
    away = _away(model.layers, shape.kv_home_layers, shape.order)
    kv = None
    if away and scenario.context_tokens:
        block_tokens = shape.kv_block_tokens or block_tokens_for(row_bytes, KINDS[shape.processor])
        kv = StreamedKV(layers=away, slots=shape.kv_slots, block_bytes=block_tokens * row_bytes)
    return PlacedModel(
        parts=model.parts(share),
        speeds=Speeds(profile=profile, processor=shape.processor, packs=False),
        residence=Residence(
            streamed=_streamed(scenario, profile, share),
            slots=shape.slots,
            kv=kv,
            device=tuple(i % (shape.devices // share) for i in range(model.layers)),
            experts=_experts(scenario),
        ),
        context_tokens=scenario.context_tokens,
    )


def _experts(scenario: Scenario) -> PooledExperts | None:
    model, shape = scenario.model, scenario.placement
    if shape.expert_slots is None:
        return None
    use, host_s, launch_s = ExpertUse(), shape.expert_host_s, 0.0
    if shape.expert_hit_rate is not None:  # what is not there was never there
        missed = model.experts_per_token * (1.0 - shape.expert_hit_rate)
        use = ExpertUse(seen={0: Distances(calls=1, counts=(*[0.0] * model.experts, missed))})
    if host_s is None:
        device = KINDS[shape.processor]
        host_s, launch_s = choosing_s(device, model.experts_per_token), launching_s(device)
    return PooledExperts(
        counts=(model.experts,) * model.layers,
        per_token=model.experts_per_token,
        held=shape.expert_slots / model.layers,
        home_bytes=model.expert_bytes,
        image_bytes=model.expert_bytes,
        use=use,
        host_s=host_s,
        launch_s=launch_s,
    )


def _share(shape: PlacementShape) -> int:
    """Devices that have each layer together."""
    return shape.devices if shape.split is Split.HEADS else 1


def _away(layers: int, count: int, order: Order) -> frozenset[int]:
    """Which layers are not resident, by how many are not."""
    kept = layers - count
    if order is Order.FIRST:
        return frozenset(range(kept, layers))
    return frozenset(range(layers)) - (spread_layers(kept, layers) if kept else frozenset())


def _streamed(scenario: Scenario, profile: HardwareProfile, share: int) -> tuple[int, ...]:
    """Layers whose weights are copied: the given number, or what does not fit."""
    model, shape = scenario.model, scenario.placement
    resident = shape.resident_layers
    if shape.expert_slots is not None:
        return ()
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
        blocks = shape.kv_block_tokens or block_tokens_for(row_bytes, KINDS[shape.processor])
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
    """Place all layers, or as many as fit beside the ring's slots."""
    freely = place(demand, limit)
    return place(demand, limit, slots=slots) if freely.streamed else freely


def _cost(scenario: Scenario, profile: HardwareProfile, load: PassLoad) -> PassCost:
    """What a pass of the scenario costs."""
    shape = scenario.placement
    load = replace(load, recorded=load.recorded or shape.recorded)
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
        if (shared := shape.expert_host_share) > 0.0:
            link = link_rates(profile, load, together=False).home[0]
            mixed = 1.0 / (shared / link.value + (1.0 - shared) / home.value)
            home = replace(home, value=mixed)
        kv = replace(disk, value=disk.value / by_head)
        each = (kv,) * load.devices
        return LinkRates(home=(home,) * load.devices, kv=each, back=each, readers=shape.reads)
    return link_rates(profile, load, together=shape.devices > 1)


def _drafting(scenario: Scenario, target: PlacedModel) -> tuple[Expected, tuple[DraftPart, ...]]:
    draft = scenario.draft
    if draft.kind is DraftKind.NONE:
        return Expected(), ()
    rates = draft.acceptance
    if draft.accepted_share is not None:
        rates = (rate_of_share(draft.accepted_share, draft.gamma),)
    if draft.kind is DraftKind.TRIFORCE:
        return _two_levels(draft, rates, target)
    steps, tokens = float(draft.gamma), draft.tokens_per_pass
    if draft.kind is DraftKind.TREE:
        grown = grow_tree(draft.ranks, draft.gamma, draft.depth)
        steps = float(draft.depth or grown.depth(draft.gamma))
        tokens = tokens or grown.tokens(draft.gamma)
    expected = Expected(tokens=tokens or chain_tokens(rates, draft.gamma))
    return expected, (_step(draft, steps, target),)


def _step(draft: DrafterShape, steps: float, target: PlacedModel) -> DraftPart:
    """What is done for each token of a chain or level of a tree."""
    if draft.model is None:
        return DraftPart(times=steps, seconds=draft.step_s or 0.0)
    context = draft.context_tokens
    placed = PlacedModel(
        parts=draft.model.parts(),
        speeds=target.speeds,
        residence=Residence(),
        context_tokens=target.context_tokens if context is None else context,
    )
    return DraftPart(times=steps, load=placed.load(draft.width))


def _two_levels(
    draft: DrafterShape, rates: tuple[float, ...], target: PlacedModel
) -> tuple[Expected, tuple[DraftPart, ...]]:
    below = triforce_tokens(
        rates or (1.0,), draft.gamma, draft.inner_acceptance or (0.0,), draft.inner_gamma
    )
    step = DraftPart(times=below.retrieval_passes, seconds=draft.step_s or 0.0)
    if draft.step_s is None:
        # What is retrieved is given, and need not be less than the context.
        cached = replace(target, context_tokens=draft.retrieval_tokens)
        load = cached.over_retrieval(
            1 + draft.inner_gamma, draft.retrieval_tokens, DraftWeights.SAME
        )
        step = replace(step, load=replace(load, recorded=False))  # as far as is known
    inner = DraftPart(times=below.draft_steps, seconds=draft.inner_step_s)
    return Expected(tokens=draft.tokens_per_pass or below.tokens), (step, inner)
