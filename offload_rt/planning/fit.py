"""What lives where for one run, from headers, limits and what is free. No torch here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from offload_rt.config import (
    MOST_READ,
    DraftConfig,
    DrafterWords,
    Exact,
    ExpertMisses,
    HomeKind,
    KVPlace,
    LookAhead,
    RuntimeConfig,
)
from offload_rt.costs.drafters import NO_DRAFTING, Drafting, Expected
from offload_rt.costs.experts import (
    FORESEEN,
    SEND_BACK_S,
    ExpertUse,
    choosing_s,
    launching_s,
    unknown_rates,
)
from offload_rt.costs.machine import FreeMemory, Speeds
from offload_rt.costs.pass_cost import (
    LinkRates,
    PassCost,
    PassLoad,
    PassTimes,
    cost_of,
    home_rates,
    pass_times,
    spans_of,
)
from offload_rt.costs.sizes import (
    PassShape,
    ahead_bytes,
    kv_row_bytes,
    number_bytes_of,
)
from offload_rt.costs.step import (
    Events,
    Prediction,
    StepWork,
    choice_s,
    predict,
    step_events,
    step_work,
)
from offload_rt.costs.workload import (
    PlacedModel,
    PooledExperts,
    Residence,
    StreamedKV,
    parts_of,
)
from offload_rt.device.kinds import FREE_SHARE, DeviceKind
from offload_rt.errors import ConfigError, PlanError
from offload_rt.kv.sizes import KVPlan, kv_places, plan_kv, spread_layers
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.exactness import are_quickest, passes_problem
from offload_rt.model.formats.stored import HOST_ROWS
from offload_rt.model.kept import keeps_states
from offload_rt.model.layout import compute_dtype
from offload_rt.planning.memory import demand_of, may_be_apart
from offload_rt.planning.placement import Demand, Placement
from offload_rt.planning.striping import Stripe, place_striped, with_spare_blocks
from offload_rt.profiling.decoding import in_registers
from offload_rt.profiling.rates import disk_bytes_per_s
from offload_rt.speculative.kinds import branches_of, completed, draft_parts
from offload_rt.streaming.experts import MissRates, leaves_free, shares_of
from offload_rt.units import format_size


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLoad:
    """What a run must be able to do.

    Attributes:
        capacities: tokens of each sequence that runs at once, answer included.
        prompt_tokens: tokens of the largest prompt pass, all sequences together.
        drafting: who drafts.
        kv_tokens: tokens of all sequences together, where they share one memory for KV on the
            device; None: each has its own.
        running: sequences that usually run, for whom the fastest is chosen; memory is for all of
            them either way. None: all.
        asked: what is known of the experts that the model's tokens ask for.
        context_tokens: of each sequence, that passes attend to; None: as many as of the largest
            prompt pass.
        whole: layers are streamed whole, even where experts could come one by one.
        whole_layers: so many layers have their experts in them where those of others come one by
            one.
    """

    capacities: Sequence[int]
    prompt_tokens: int
    drafting: Drafting = NO_DRAFTING
    kv_tokens: int | None = None
    running: int | None = None
    asked: ExpertUse = ExpertUse()
    context_tokens: int | None = None
    whole: bool = False
    whole_layers: int = 0

    @classmethod
    def alike(cls, sequences: int, context_tokens: int, drafting: Drafting) -> "RunLoad":
        """Of sequences of so many tokens each, which are counted as prompts."""
        several = min(sequences * context_tokens, MOST_READ)
        return cls(
            capacities=[context_tokens] * sequences,
            prompt_tokens=context_tokens if sequences == 1 else several,
            drafting=drafting,
            context_tokens=context_tokens,
        )

    @property
    def cached_tokens(self) -> int:
        """Of each sequence, that passes attend to."""
        return self.context_tokens or self.prompt_tokens // len(self.capacities)


def place_run(
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    device: DeviceKind,
    *,
    load: RunLoad,
    free: FreeMemory,
    speeds: Speeds | None = None,
) -> Placement:
    """Decide what lives where for a run of this shape.

    Args:
        checkpoint: headers of the model.
        config: limits and choices of the user.
        device: what computes.
        load: what the run must be able to do.
        free: memory that is free now.
        speeds: of the machine, for what each of several links is given; None: as if they were
            alike.

    Raises:
        ConfigError: an option does not go with the home of the streamed layers.
        PlanError: it does not fit the device limit, or its home the host limit.
    """
    _check_nodes(config, load.drafting.config)
    if keeps_states(checkpoint.config):
        _check_states(checkpoint, load.drafting.config)
    checked_rows = len(load.capacities) * (1 + load.drafting.config.nodes)
    shape = PassShape(
        rows=max(load.prompt_tokens, checked_rows),
        chunk_rows=config.prefill_chunk_tokens,
        logit_rows=checked_rows,
        longest=max(load.capacities),
        tile=device.tile_rows if config.exact is Exact.ON else 0,
        tree_rows=load.drafting.config.nodes and 1 + load.drafting.config.nodes,
    )

    def demanded(*, apart: bool = False) -> Demand:
        found = demand_of(
            checkpoint,
            config,
            device,
            capacities=load.capacities,
            shape=shape,
            drafting=load.drafting,
            apart=apart,
        ).knowing(load.asked)
        found = found.keeping(config.whole_layers or load.whole_layers)
        return _with_kv_of(found, checkpoint, config, load)

    demand = demanded()
    _check_copies(demand, config, load.drafting.config)
    stripes = _stripes(config, free, device, max(demand.layer_bytes), speeds)
    places = _kv_places(config, device, load.drafting.config)
    kv_plans = [_plan_kv(kv, checkpoint, config, device, load) for kv in places]
    host_limit = host_limits(config, free)[0]
    homed = partial(
        _homes_within,
        config=config,
        device=device,
        free=free,
        host_limit=host_limit,
        speeds=speeds,
    )
    bare = demanded(apart=True) if may_be_apart(checkpoint, config, device) else None
    if bare is not None and bare.host_base_bytes <= host_limit:
        demand = replace(demand, spare_base_bytes=max(0, demand.fixed_bytes - bare.fixed_bytes))
    try:
        placement = _place_ends(
            lambda apart: _place_with_kv(
                bare if apart and bare is not None else demand,
                stripes,
                replace(config, expert_slots=0) if load.whole else config,
                device,
                kv_plans,
            ),
            homed,
            may_be_apart=bare is not None,
        )
    except PlanError as refusal:
        if config.device_limit_bytes is None and refusal.needed_bytes > free.device_bytes:
            raise _not_free(refusal.needed_bytes, free.device_bytes) from refusal
        raise
    if demand.copy_bytes and not placement.copied:
        raise PlanError(
            f"--draft {load.drafting.config.kind} drafts with copies of streamed layers, and all "
            f"{len(placement.resident)} stay on the device: use another drafter, or lower "
            "--device-memory or --resident-layers"
        )
    if placement.device_bytes > free.device_bytes:  # a reordered head is for memory to spare
        placement = replace(placement, demand=replace(placement.demand, packed_head_bytes=0))
    _check_effects(placement, config, free)
    placement = homed(placement)
    home = placement.home
    chosen = device.home is HomeKind.DISK or config.home is HomeKind.DISK
    reads = home is HomeKind.DISK or placement.in_files
    if reads and placement.streamed and checkpoint.rounded is not None:
        raise _rounded_from_disk(checkpoint, config, device, placement, host_limit)
    unused = home is HomeKind.DISK and chosen  # else the limit may be why the home is the disk
    if unused and not _kept_in_host(placement, host_limit) and config.host_limit_bytes is not None:
        raise ConfigError("--host-memory limits streamed layers in host memory: add --home host")
    return placement


def _with_kv_of(
    demand: Demand, checkpoint: Checkpoint, config: RuntimeConfig, load: RunLoad
) -> Demand:
    """The same with KV as the run has it: shared by all, or of one layer after the other."""
    if load.kv_tokens is not None:
        spare = load.drafting.config.pending_rows * len(load.capacities)
        rows, whole = load.kv_tokens + spare, sum(load.capacities) + spare
        layers = tuple(nbytes // whole * rows for nbytes in demand.kv_layer_bytes)
        shared_bytes = demand.kv_bytes // whole * rows
        demand = replace(demand, kv_bytes=shared_bytes, kv_layer_bytes=layers)
    if config.kv is KVPlace.NONE:
        sizes = kv_row_bytes(checkpoint.config, number_bytes_of(checkpoint, config.dtype))
        largest = demand.kv_bytes // sum(sizes) * max(sizes)
        demand = replace(demand, kv_bytes=largest, kv_passes=True)
    return demand


def _place_ends(
    place_with: Callable[[bool], Placement],
    homed: Callable[[Placement], Placement],
    *,
    may_be_apart: bool,
) -> Placement:
    """Have the embedding apart where that leaves room for layers, else on the device.

    Apart it is in host memory, or of a device that computes there in its file. A pass reads a row
    of it for each of its rows, a layer all of its own bytes.

    Args:
        place_with: places a run, with the embedding apart or not.
        homed: decides where a placement's streamed layers live.
        may_be_apart: the embedding may be apart.

    Raises:
        PlanError: it fits in neither way.
    """
    whole = None
    try:
        whole = place_with(False)
    except PlanError:
        if not may_be_apart:
            raise
    if whole is not None and not (may_be_apart and whole.streams):
        return whole
    try:
        made = place_with(True)
        home = homed(made).home
    except PlanError:
        if whole is None:
            raise
        return whole
    if whole is None:
        return made
    if made.demand.copy_bytes and not made.copied:
        return whole
    # Host memory is the home of layers before it is the embedding's.
    try:
        there = homed(whole).home
    except PlanError:
        return made
    gains = home is HomeKind.HOST is not there
    same = home is there is not HomeKind.SPLIT
    return made if same or gains or not made.streams else whole


def _homes_within(
    placement: Placement,
    *,
    config: RuntimeConfig,
    device: DeviceKind,
    free: FreeMemory,
    host_limit: int,
    speeds: Speeds | None,
) -> Placement:
    """Decide where streamed layers live beside what else is in host memory.

    Raises:
        PlanError: that does not fit, or kernels cannot read an embedding there.
    """
    in_host = placement.demand.host_base_bytes
    if speeds is not None and speeds.pinned_bytes(config, in_host) < in_host:
        raise PlanError(
            f"the embedding's {format_size(in_host)} cannot be pinned in host memory: use a larger "
            "--device-memory"
        )
    left = host_limit - _kept_in_host(placement, host_limit)
    return _with_homes(placement, config, device, free, left)


def _with_homes(
    placement: Placement,
    config: RuntimeConfig,
    device: DeviceKind,
    free: FreeMemory,
    host_limit: int,
) -> Placement:
    """Decide where streamed layers live, on every machine by its own host memory.

    Raises:
        PlanError: host memory was asked for and they do not fit.
    """
    if not config.machines:
        return with_home(placement, config, device, host_limit)
    others = host_limits(config, free)[1:]
    shares = list[Placement]()
    for share, limit in zip(placement.shares, [host_limit, *others], strict=True):
        try:
            shares.append(with_home(share, config, device, limit))
        except PlanError as error:
            raise PlanError(f"{config.machines[len(shares)]}: {error}") from error
    placement = replace(placement, shares=tuple(shares))
    homes = {share.home for share in shares if share.streams} or {shares[0].home}
    if homes == {HomeKind.DISK} or homes == {HomeKind.HOST}:
        return replace(placement, home=homes.pop())
    return replace(
        placement,
        home=HomeKind.SPLIT,
        in_files=tuple(sorted(i for share in shares for i in share.layers_in_files)),
        ahead_bytes=sum(share.ahead_bytes for share in shares),
    )


def host_limits(config: RuntimeConfig, free: FreeMemory) -> list[int]:
    """Host memory that each machine may use: what is said of it, else of all, else what is free."""
    there = (free.host_bytes, *free.further_host_bytes)
    stated = config.machine_host_bytes or (None,) * len(there)
    return [
        min(own, free_bytes) if own else config.host_limit_bytes or int(free_bytes * FREE_SHARE)
        for own, free_bytes in zip(stated, there, strict=True)
    ]


def _check_copies(demand: Demand, config: RuntimeConfig, draft: DraftConfig) -> None:
    """Refuse copies of layers that draft where experts are to come one by one.

    Raises:
        PlanError: they are.
    """
    if not (config.expert_slots and demand.copy_bytes):
        return
    if draft.over_retrieval:
        raise PlanError(
            f"--draft {draft.kind} --retrieval-weights {draft.copies} drafts with rounded copies "
            "of whole layers, and with --expert-slots layers are without their experts: use "
            "--retrieval-weights same, or leave out --expert-slots"
        )
    raise PlanError(
        f"--draft {draft.kind} drafts with copies of streamed layers, and with --expert-slots none "
        "is streamed: use another drafter, or leave out --expert-slots"
    )


def drafts_with_states(words: DrafterWords) -> bool:
    """Whether a drafter needs no keys and values, or writes to them, that layers do not have."""
    return not (words.over_retrieval or words.over_own_rows)


def _check_states(checkpoint: Checkpoint, draft: DraftConfig) -> None:
    """Refuse what recurrent states cannot do.

    Raises:
        PlanError: the drafter reads or writes the target's own caches.
    """
    if not drafts_with_states(draft.words):
        raise PlanError(
            f"--draft {draft.kind} drafts over the model's own keys and values, and layers of "
            f"{checkpoint.name} keep recurrent states instead: use --draft ngram, a draft model, "
            "or mtp where the files have a module"
        )


def _check_nodes(config: RuntimeConfig, draft: DraftConfig) -> None:
    """Refuse what needs all layers, or all rows, on one machine.

    Raises:
        ConfigError: KV is to be elsewhere than on each node's device.
        PlanError: the drafter reads the target's own rows or weights, or what is between layers.
    """
    if not config.machines:
        return
    if config.kv not in (KVPlace.AUTO, KVPlace.DEVICE):
        raise ConfigError(
            f"--kv {config.kv}: with --nodes each node keeps the KV of its layers on its device: "
            "leave --kv out"
        )
    if draft.over_retrieval or draft.words.over_own_rows:
        raise PlanError(
            f"--draft {draft.kind} drafts with the model's own layers, and with --nodes those are "
            "on several machines: use --draft ngram, or a draft model"
        )
    if draft.words.within:
        raise PlanError(
            f"--draft {draft.kind} reads hidden states between the model's layers, and with "
            "--nodes those stay on other machines: use --draft ngram, mtp, or a draft model"
        )


def _kv_places(config: RuntimeConfig, device: DeviceKind, draft: DraftConfig) -> Sequence[KVPlace]:
    """Where KV may be, in this order.

    Raises:
        ConfigError: the drafter reads the target's rows in each of its passes, and they are to be
            elsewhere.
    """
    places = kv_places(config, device)
    if not draft.words.over_own_rows:
        return places
    if config.kv not in (KVPlace.AUTO, KVPlace.DEVICE):
        raise ConfigError(
            f"--draft {draft.kind} reads the model's keys and values in each of its passes, and "
            f"--kv {config.kv} would have them copied each time: use --kv device, or another "
            "drafter, as --draft triforce"
        )
    return (KVPlace.DEVICE,)


def _stripes(
    config: RuntimeConfig,
    free: FreeMemory,
    device: DeviceKind,
    layer_bytes: int,
    speeds: Speeds | None,
) -> list[Stripe]:
    """The devices of a run, with their limits and links."""
    each = config.each_device()
    rates = [float(one.only_link_bytes_per_s or 1.0) for one in each]
    if (
        len(each) > 1
        and speeds is not None
        and (config.machines or config.home is not HomeKind.DISK)
    ):
        home = device.home if config.home is HomeKind.AUTO else config.home
        found = speeds.home_bytes_per_s(
            home if config.machines else HomeKind.HOST, config, layer_bytes
        )
        rates = [number.value for number in found]
    parts = zip(each, free.devices, rates, strict=True)
    return [
        Stripe(
            name=_called(config, number),
            limit_bytes=one.only_limit_bytes or device.usable_bytes(free_bytes),
            link_bytes_per_s=rate,
            apart=bool(config.machines),
        )
        for number, (one, free_bytes, rate) in enumerate(parts)
    ]


def _called(config: RuntimeConfig, number: int) -> str:
    """A device in sentences."""
    if config.machines:
        return config.machines[number]
    name = config.device_names[number]
    return name if config.device_names.count(name) == 1 else f"{name} number {number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedRun:
    """A run whose parts have their places.

    Attributes:
        checkpoint: headers of the model.
        config: choices of the user.
        speeds: of the machine.
        placement: what lives where.
        context_tokens: cached tokens of each sequence.
        sequences: that run at once.
    """

    checkpoint: Checkpoint
    config: RuntimeConfig
    speeds: Speeds
    placement: Placement
    context_tokens: int
    sequences: int = 1

    @property
    def model(self) -> PlacedModel:
        """What passes are made of."""
        placement = self.placement
        return PlacedModel(
            parts=parts_of(self.checkpoint, self.config.dtype, self.speeds.device),
            speeds=self.speeds,
            residence=Residence(
                streamed=placement.streamed,
                slots=placement.slots,
                from_files=placement.home is HomeKind.DISK,
                in_files=placement.in_files,
                ahead_bytes=placement.ahead_bytes,
                straight=placement.straight,
                expert_share=placement.expert_share,
                packs_head=placement.packs_head,
                left_plain=self.speeds.left_plain,
                kv=_streamed_kv(placement.demand.kv, self.context_tokens),
                device=placement.device,
                experts=pooled_experts(
                    placement,
                    self.speeds.device,
                    self.config.look_ahead,
                    self.misses,
                ),
            ),
            context_tokens=self.context_tokens,
            sequences=self.sequences,
            dtype=self.config.dtype,
            in_pieces=placement.demand.in_pieces,
        )

    @property
    def misses(self) -> MissRates | None:
        """What experts that a GPU lacks cost, where a processor may compute them."""
        device = self.speeds.device
        return miss_rates(self.checkpoint, self.placement, self.config, device, self.speeds)

    def rates(self, load: PassLoad) -> LinkRates:
        """Speeds of the homes for a pass."""
        kv = self.placement.demand.kv
        away = None if kv is None else HomeKind.DISK if kv.place is KVPlace.DISK else HomeKind.HOST
        placement = self.placement
        return home_rates(
            self.speeds, self.config, load, placement.home, away, placement.host_bytes
        )

    def times(self, load: PassLoad) -> PassTimes:
        """How long the parts of a pass take."""
        speeds, rates = self.speeds, self.rates(load)
        found = pass_times(speeds.profile, load, speeds.processor, rates)
        others = [pass_times(node.profile, load, node.processor, rates) for node in speeds.further]
        found = found.with_others(others, [layer.device for layer in load.layers])
        return found.slowed(speeds.levels)

    def cost(self, load: PassLoad) -> PassCost:
        """What a pass costs."""
        return cost_of(load, self.times(load))

    def predict(self, drafting: Drafting, expected: Expected) -> Prediction:
        """What a step takes that drafts so."""
        return predict(self.work(drafting, expected), self.cost)

    def events(self, drafting: Drafting, expected: Expected) -> Events:
        """What the streams are busy with in such a step."""
        work = self.work(drafting, expected)
        return step_events(work, self.cost, lambda load: spans_of(load, self.times(load)))

    def prompt_s(self, tokens: int) -> float:
        """Seconds of a pass that reads a prompt of so many tokens for each sequence."""
        return self.cost(self._target(drafts=False).load(tokens, reads_prompt=True)).pass_s

    def row_s(self, tokens: int) -> float:
        """Seconds that each of so many tokens of a prompt adds to a pass."""
        model = replace(self._target(drafts=False), sequences=1)
        long_s, short_s = (
            self.cost(model.load(rows, reads_prompt=rows > 1)).pass_s for rows in (tokens + 1, 1)
        )
        return (long_s - short_s) / tokens

    def work(self, drafting: Drafting, expected: Expected) -> StepWork:
        """What such a step has to do."""
        drafting = completed(drafting, self.checkpoint)
        config = drafting.config
        target = self._target(drafts=config.nodes > 0)
        parts = draft_parts(drafting, target, expected)
        rebuild = config.retrieval.rebuild_tokens if config.over_retrieval else None
        heads = self.checkpoint.config
        work = step_work(
            target,
            config.nodes,
            expected,
            parts,
            choice_s=choice_s(expected, rebuild, grouped=heads.num_heads > heads.num_kv_heads),
            branches=branches_of(config),
        )
        return work.slowed(self.speeds.levels.computing)

    def _target(self, *, drafts: bool) -> PlacedModel:
        kv, device = self.placement.demand.kv, self.speeds.device
        needed = self.placement.streams or kv is not None or drafts or self._quickest()
        problem = passes_problem(self.config, device, needed=needed, kv_away=kv is not None)
        return replace(self.model, exact=not problem)

    def _quickest(self) -> bool:
        dtype = compute_dtype(self.checkpoint, self.config.dtype)
        there = in_registers(self.speeds.profile)
        return are_quickest(dtype, self.speeds.device, in_registers=there)


def splits_misses(
    checkpoint: Checkpoint, placement: Placement, config: RuntimeConfig, device: DeviceKind
) -> bool:
    """Whether a processor may compute experts that a GPU lacks: some are in host memory.

    Not those that have a norm of what they make, whose weight is on the GPU.
    """
    comes = placement.expert_slots > 0 and placement.home.in_memory
    may = config.misses_on_host and device.own_memory and comes
    return may and not any(".post_expert_norm." in name for name in checkpoint.tensors)


def miss_rates(
    checkpoint: Checkpoint,
    placement: Placement,
    config: RuntimeConfig,
    device: DeviceKind,
    speeds: Speeds | None,
) -> MissRates | None:
    """What experts that a GPU lacks cost, where a processor may compute them; else None.

    Unless it is to, only if that saves time where most are lacking, so that no layer fetches rows
    in vain. Where nothing is known of the machine it is not known to: then what is assumed of any.
    """
    experts = placement.demand.experts
    if experts is None or not splits_misses(checkpoint, placement, config, device):
        return None
    nbytes = experts.image_bytes // experts.count
    asked = config.expert_misses is ExpertMisses.HOST
    if speeds is None:
        return unknown_rates(nbytes) if asked else None
    link = speeds.home_bytes_per_s(HomeKind.HOST, config, nbytes, placement.host_bytes)[0].value
    files = disk_bytes_per_s(speeds.profile, config.readers).value if speeds.profile.disk else link
    stored = (each for each in checkpoint.stored.values() if each.of_expert)
    reading, computing = speeds.levels.reading, speeds.levels.computing
    products = speeds.products_bytes_per_s(link, stored, config.threads)
    rates = MissRates(
        link_s=reading * nbytes / link,
        host_s=computing * nbytes / products,
        file_s=reading * (nbytes / link + experts.file_bytes / experts.count / files),
        begin_s=computing * SEND_BACK_S,
    )
    most = min(max(experts.counts), HOST_ROWS * experts.per_token)
    fewest = most if placement.expert_share == 1.0 else 1  # in host memory, of the most that lack
    return rates if asked or any(rates.on_host(most, there) for there in (fewest, most)) else None


def pooled_experts(
    placement: Placement,
    device: DeviceKind,
    look_ahead: LookAhead,
    rates: MissRates | None = None,
) -> PooledExperts | None:
    """Experts that come one by one, and what is known of those that tokens ask for."""
    experts, slots = placement.demand.experts, placement.expert_slots
    if experts is None or not slots:
        return None
    total_bytes = experts.file_bytes if placement.home is HomeKind.DISK else experts.image_bytes
    foresees = look_ahead is LookAhead.ON
    share, spare = shares_of(slots, experts.layers, experts.per_token, foresees=foresees)
    return PooledExperts(
        counts=experts.counts,
        per_token=experts.per_token,
        held=share + spare / experts.layers,
        home_bytes=total_bytes // experts.count,
        image_bytes=experts.image_bytes // experts.count,
        use=experts.use,
        host_s=choosing_s(device, experts.per_token),
        launch_s=launching_s(device),
        together_s=choosing_s(device, experts.per_token, together=True),
        rates=rates,
        share=placement.expert_share,
        foreseen=FORESEEN if foresees and leaves_free(share, spare, experts.per_token) else 0.0,
    )


def _streamed_kv(plan: KVPlan | None, context_tokens: int) -> StreamedKV | None:
    if plan is None or plan.attend_on_host:
        return None
    sizes = plan.sizes[0]
    return StreamedKV(
        layers=frozenset(sizes.offloaded),
        slots=sizes.slots,
        block_bytes=sizes.slot_bytes,
        block_tokens=sizes.block_tokens,
        waiting_tokens=context_tokens - sizes.home_rows(context_tokens),
    )


def _check_effects(placement: Placement, config: RuntimeConfig, free: FreeMemory) -> None:
    """Refuse options that would do nothing, and limits the machine cannot keep."""
    if not placement.streams:
        link = None if config.kv is KVPlace.HOST else config.link_bytes_per_s
        for flag, value in (("--link-bandwidth", link), ("--home", config.home)):
            if value is not None and value != HomeKind.AUTO:
                raise ConfigError(
                    f"{flag} has no effect, all layers fit on the device: lower --device-memory or "
                    "--resident-layers"
                )
    for share, free_bytes in zip(placement.of_devices, free.devices, strict=True):
        if share.device_bytes > free_bytes:
            raise _not_free(share.device_bytes, free_bytes)


def _not_free(needed_bytes: int, free_bytes: int) -> PlanError:
    """More than the machine, or the group this process is in, has left."""
    return PlanError(
        f"needs {format_size(needed_bytes)} of device memory, {format_size(free_bytes)} are free: "
        "end other programs, raise the limit of the container or job if it has one (`offload-run "
        "doctor` names it), or use less: a smaller --device-memory, --max-tokens or --context",
        needed_bytes,
    )


def _plan_kv(
    kv: KVPlace,
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    device: DeviceKind,
    load: RunLoad,
) -> KVPlan | None:
    model, rows = checkpoint.config, load.drafting.config.pending_rows
    return plan_kv(
        kv,
        config,
        device,
        row_bytes=kv_row_bytes(model, number_bytes_of(checkpoint, config.dtype)),
        capacities=[capacity + rows for capacity in load.capacities],
        scratch_tokens=1 + rows,
    )


def _place_with_kv(
    demand: Demand,
    stripes: Sequence[Stripe],
    config: RuntimeConfig,
    device: DeviceKind,
    kv_plans: Sequence[KVPlan | None],
) -> Placement:
    """Take the first place for KV with which it fits; else the refusal that asks for least.

    Nothing else has use for what is left of a GPU's memory then, so the ring of KV has it, unless
    its blocks are asked for.
    """
    refusals = []
    for kv in kv_plans:
        if kv is not None:
            demand = replace(demand, kv_bytes=kv.device_bytes, kv=kv)
        try:
            placement = place_striped(
                demand,
                stripes,
                slots=config.slots,
                resident_layers=config.resident_layers,
                resident=config.resident,
                expert_slots=config.expert_slots,
            )
            if kv is None or not device.own_memory or config.kv_block_tokens is not None:
                return placement
            return with_spare_blocks(placement, device.buffer_bytes)
        except PlanError as refusal:
            refusals.append(refusal)
    raise min(refusals, key=lambda refusal: refusal.needed_bytes)


def _kept_in_host(placement: Placement, host_limit: int) -> int:
    """Host memory that KV takes as its home, and an embedding that rows are read of.

    Raises:
        PlanError: it is more than the limit.
    """
    kv = placement.demand.kv
    host_bytes = 0 if kv is None else kv.host_bytes
    if host_bytes > host_limit:
        raise PlanError(
            f"the KV cache needs {format_size(host_bytes)} of host memory, the limit is "
            f"{format_size(host_limit)}: raise --host-memory or lower --context"
        )
    base_bytes = placement.demand.host_base_bytes
    if host_bytes + base_bytes > host_limit:
        raise PlanError(
            f"the embedding needs {format_size(base_bytes)} of host memory, the limit is "
            f"{format_size(host_limit)}: raise --host-memory"
        )
    return host_bytes + base_bytes


def _rounded_from_disk(
    checkpoint: Checkpoint,
    config: RuntimeConfig,
    device: DeviceKind,
    placement: Placement,
    host_limit: int,
) -> PlanError:
    """What is said where layers that are rounded at load would be read in each pass."""
    wire, needed = checkpoint.rounded, format_size(placement.streamed_bytes)
    advice = f"--home host ({needed} of host memory)"
    if device.home is HomeKind.HOST and config.home is HomeKind.AUTO:
        limit = format_size(host_limit)
        advice = f"a larger --host-memory ({needed} are needed, the limit is {limit})"
    return PlanError(
        f"--wire {wire} rounds layers once, when they are loaded, and {len(placement.streamed)} of "
        f"them would be read from the files in each pass, with all their bytes: use {advice} or a "
        f"larger --device-memory, or make a folder of rounded weights with `offload-run pack "
        f"--wire {wire}` and stream from that"
    )


def choose_home(
    home: HomeKind, device: DeviceKind, placement: Placement, host_limit: int
) -> HomeKind:
    """Where streamed layers live when the user leaves it open.

    Where the device would have them, if they fit there, else in the files.

    Raises:
        PlanError: host memory was asked for and they do not fit.
    """
    host_bytes = placement.streamed_bytes
    fits = host_bytes <= host_limit
    if home is HomeKind.AUTO:
        return device.home if fits else HomeKind.DISK
    if home is HomeKind.HOST and not fits:
        raise PlanError(
            f"the streamed layers need {format_size(host_bytes)} of host memory, the limit is "
            f"{format_size(host_limit)}: raise --host-memory or use --home split or --home disk"
        )
    return home


def with_home(
    placement: Placement, config: RuntimeConfig, device: DeviceKind, host_limit: int
) -> Placement:
    """The same with a home, which is split where host memory has room for a part.

    So it is where that is asked for, and of itself where the device would have all there.

    Raises:
        PlanError: host memory was asked for and they do not fit, or none of them.
    """
    wanted = config.home
    home = choose_home(wanted, device, placement, host_limit)
    if home is HomeKind.SPLIT and placement.streamed_bytes <= host_limit:
        home = HomeKind.HOST
    lacks = wanted is HomeKind.AUTO and device.home is HomeKind.HOST and home is HomeKind.DISK
    if not placement.streams or not (lacks or home is HomeKind.SPLIT):
        return replace(placement, home=home)
    split = _split(placement, host_limit, config.readers)
    if split is not None:
        return split
    if home is HomeKind.SPLIT:
        raise PlanError(
            f"--home split: host memory of {format_size(host_limit)} has no room for a layer and "
            "what others are read into, or an expert of each layer: raise --host-memory or use "
            "--home disk"
        )
    return replace(placement, home=home)


def _split(placement: Placement, host_limit: int, readers: int) -> Placement | None:
    """As much in host memory as fits; None if that is nothing."""
    experts, streamed = placement.demand.experts, placement.streamed
    if experts is not None and placement.expert_slots:
        share = host_limit / experts.image_bytes
        if not (held := experts.held_bytes(share)):
            return None
        # What whole experts come to, and a little for how numbers are rounded.
        share = min(1.0, held / experts.image_bytes + 1e-9)
        return replace(placement, home=HomeKind.SPLIT, expert_share=share)
    largest = max(placement.layer_bytes[i] for i in streamed)
    ahead = len(placement.of_devices) * ahead_bytes(largest, readers)
    for count in range(1, len(streamed)):
        staying = tuple(streamed[i] for i in sorted(spread_layers(count, len(streamed))))
        split = replace(placement, home=HomeKind.SPLIT, in_files=staying, ahead_bytes=ahead)
        if split.held_bytes + ahead <= host_limit:
            return split
    return None
