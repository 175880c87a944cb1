"""Choose what lives where, who drafts, and how much, by predicted seconds per token. No torch here.

Each candidate must fit in memory (`fit.place_run`); then the seconds of its step are priced
(`costs/step.py`). The expected acceptance comes from earlier runs on this machine (`drafting`).
What the user fixed is fixed in all candidates.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypedDict, Unpack

from offload_rt.config import DraftConfig, DraftShape, ExpertMisses, LookAhead, RuntimeConfig
from offload_rt.costs.drafters import NO_DRAFTING, Drafting, Expected
from offload_rt.costs.experts import ExpertUse
from offload_rt.costs.machine import FreeMemory, Levels, Speeds
from offload_rt.costs.step import Prediction
from offload_rt.device.kinds import DeviceKind
from offload_rt.errors import ConfigError, PlanError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.model.ends import forms_of_ends
from offload_rt.model.layout import compute_dtype
from offload_rt.model.wire import wired, wires_of
from offload_rt.planning.controller import StepOutlook
from offload_rt.planning.fit import PlacedRun, RunLoad, miss_rates, place_run, splits_misses
from offload_rt.planning.placement import Placement
from offload_rt.planning.striping import smallest_limits
from offload_rt.planning.yields import Yield
from offload_rt.speculative.draft_model.kind import settled
from offload_rt.speculative.kind import SIZES
from offload_rt.speculative.kinds import NAMES, kind_of
from offload_rt.streaming.experts import MissRates, leaves_free, shares_of

SLOT_CHOICES = (2, 3, 4, 6, 8, 12)  # rings that are tried when drafting leaves time to fill them
_REFINED = 4  # candidates whose rings are varied
# Room is kept for that many times the first draft size, if it costs the run's first
# steps no more than that.
_MOST_ROOM, _ROOM_COST = 4, 1.02
_MOST_WATCHED = 16  # nodes that a run may come to which begins without drafts

_SHARES_WHOLE = (0.25, 0.5, 0.75, 1.0)  # of as many layers of experts as slots would hold
_SHARES_KEPT = (0.0, 0.25, 0.5, 0.75)  # of the layers that fit, where fewer may be better

_KNOWN_STEPS = 16  # after which a drafter is taken to be known


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
class Way:
    """A way for experts of a mixture to come that was looked at.

    Attributes:
        placement: what lives where.
        prediction: of the first steps.
        prompt_s: predicted seconds of the pass that reads the prompts; 0: none is counted, as where
            a plan takes the whole context for one prompt.
        answer_tokens: of each sequence; the first comes of that pass.
    """

    placement: Placement
    prediction: Prediction
    prompt_s: float = 0.0
    answer_tokens: int = 0

    @property
    def one_by_one(self) -> bool:
        """Whether experts come one by one; else layers are whole."""
        return self.placement.expert_slots > 0

    @property
    def s_per_token(self) -> float:
        """Seconds of prompts and answers together, by tokens of an answer."""
        if not self.answer_tokens:
            return self.prediction.s_per_token
        later_s = (self.answer_tokens - 1) * self.prediction.s_per_token
        return (self.prompt_s + later_s) / self.answer_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was chosen.

    Attributes:
        runtime: with slots and place of KV as chosen.
        drafting: who drafts, and how much at most.
        first_nodes: how much at first where all sequences take part.
        placement: what lives where.
        watches: nobody drafts at first, whoever `drafting` says.
        prediction: what a step should take, of the first ones; None without a profile.
        outlooks: what drafts of each size should give and take, for the controller; empty if the
            number of tokens is fixed.
        alone: the same where one of several sequences runs; empty if there is but one.
        expected: how often drafts of the first steps should be right.
        considered: the best way with each drafter and size.
        smallest_bytes: the lowest limit of device memory under which one of them fits.
        placed: the run that `prediction` is of, whose speeds are corrected by recent runs; None
            without a profile.
        level: its seconds of a pass over those of the profile alone.
        sequences: that may run at once.
        running: sequences of the steps that `prediction` is of; None: all.
        prompt_rows: tokens of a prompt that a pass reads at once.
        misses: what experts cost that no slot of a GPU holds, where the processor may compute them.
        ways: for experts of a mixture to come, the fastest first, which was chosen; empty where
            there was nothing to choose.
    """

    runtime: RuntimeConfig
    drafting: Drafting
    first_nodes: int
    placement: Placement
    watches: bool = False
    prediction: Prediction | None = None
    outlooks: tuple[StepOutlook, ...] = ()
    alone: tuple[StepOutlook, ...] = ()
    expected: Expected = Expected()
    considered: tuple[Considered, ...] = ()
    smallest_bytes: int = 0
    placed: PlacedRun | None = None
    level: float = 1.0
    sequences: int = 1
    running: int | None = None
    prompt_rows: int = 0
    misses: MissRates | None = None
    ways: tuple[Way, ...] = ()

    @property
    def first(self) -> Drafting:
        """Who drafts in the first steps, and how much."""
        config = self.drafting.config
        if config.drafts and not self.first_nodes:
            return NO_DRAFTING
        return replace(self.drafting, config=config.limited(self.first_nodes))

    @property
    def pass_share(self) -> float:
        """Predicted seconds of a draft pass by those of a token; 0 where none are predicted."""
        if self.prediction is None or not self.prediction.draft_passes:
            return 0.0
        pass_s = self.prediction.draft_s / self.prediction.draft_passes
        return pass_s / self.prediction.s_per_token

    @property
    def row_s(self) -> float:
        """Predicted seconds that a token of a prompt adds to a pass; 0 without a profile."""
        return 0.0 if self.placed is None else self.placed.row_s(self.prompt_rows)

    def foretold(
        self, nodes: int, running: int, levels: Levels, asked: ExpertUse | None = None
    ) -> Prediction:
        """A step of this plan, for which drafts were found.

        Args:
            nodes: of each draft that its pass checks, or some more that are planned for.
            running: sequences that take part.
            levels: by which the profile's seconds are corrected.
            asked: what is known of the experts that tokens ask for; None: what was planned with.
        """
        placed, config = self.placed, self.drafting.config
        assert placed is not None  # there are speeds
        placement = placed.placement
        if asked is not None:
            placement = replace(placement, demand=placement.demand.knowing(asked))
        speeds = replace(placed.speeds, levels=levels)
        run = replace(placed, placement=placement, speeds=speeds, sequences=running)
        size = next((s.nodes for s in self.outlooks if s.nodes >= nodes), config.nodes)
        drafting = replace(self.drafting, config=config.limited(size)) if nodes else NO_DRAFTING
        return run.predict(drafting, replace(self.expected, hits=1.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What the planner may use.

    Attributes:
        speeds: of the machine.
        yields: what drafts of a kind of drafter give.
        level: what recent runs say of the speeds, for runs that stream or do not, and so many
            sequences in a pass.
        asked: what is known of the experts that the model's tokens ask for.
        stated: how often drafts are right, if that is given; then `yields` says nothing.
        repeats: sampled answers are to be the same again, so `auto` looks at no draft they rest on;
            networks grow trees then, unless chains are asked for.
        sampled: answers are.
    """

    speeds: Speeds
    yields: Callable[[DraftConfig], Yield] = lambda draft: Yield(())
    level: Callable[[bool, int], Levels] = lambda streams, running: Levels()
    asked: ExpertUse = ExpertUse()
    stated: Callable[[DraftConfig], Expected] | None = None
    repeats: bool = False
    sampled: bool = False


class PlanInputs(TypedDict):
    """What a plan is made for, beside model, choices and device; as of `make_plan`."""

    load: RunLoad
    free: FreeMemory
    means: Means | None


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
    if load.drafting.config.automatic:
        raise ConfigError("--draft auto needs speeds of the machine: name a drafter, or none")
    load = replace(load, drafting=settled(load.drafting, device))
    config = _variants(load.drafting.config, checkpoint, runtime, device)[0]
    load = replace(load, drafting=replace(load.drafting, config=config))
    placement = place_run(checkpoint, runtime, device, load=load, free=free)
    return Plan(
        runtime=runtime,
        drafting=load.drafting,
        first_nodes=load.drafting.config.nodes,
        placement=placement,
        smallest_bytes=_smallest(placement, runtime),
        misses=miss_rates(checkpoint, placement, runtime, device, None),
    )


def plan_wires(
    checkpoint: Checkpoint, runtime: RuntimeConfig, device: DeviceKind, **more: Unpack[PlanInputs]
) -> tuple[Checkpoint, Plan]:
    """Plan a run in each form that its weights may have, its ends too; see `make_plan`.

    Returns:
        The model in the form that is predicted to be fastest, or, where nothing is predicted, in
        the first that fits; and its plan, which names the form.
    """
    found, refusals = list[tuple[Checkpoint, Plan]](), list[PlanError]()
    for wire in wires_of(checkpoint, runtime.wire, device):
        named = replace(runtime, wire=wire)
        for model in forms_of_ends(wired(checkpoint, wire), runtime, device):
            try:
                found.append((model, make_plan(model, named, device, **more)))
            except PlanError as refusal:
                refusals.append(refusal)
    if not found:
        raise _asking_least(refusals)
    best = min(found, key=lambda made: _s_per_token(made[1]))
    check_look_ahead(runtime, checkpoint, best[1].placement)
    check_expert_misses(runtime, checkpoint, best[1].placement, device)
    return best


def _asking_least(refusals: Sequence[PlanError]) -> PlanError:
    """The refusal to show: the one of the lowest limit of device memory.

    Args:
        refusals: of the way that asks for least first. Where that one names no limit, more device
            memory does not help it, nor then what asks for more: it is the one to show.
    """
    first, limits = refusals[0], [refusal for refusal in refusals if refusal.needed_bytes]
    return min(limits, key=lambda r: r.needed_bytes) if first.needed_bytes else first


def check_expert_misses(
    runtime: RuntimeConfig, checkpoint: Checkpoint, placement: Placement, device: DeviceKind
) -> None:
    """Refuse to have experts computed by the host where that has no effect.

    Raises:
        ConfigError: it is asked for, and the device is the host, or no experts come one by one
            from host memory.
    """
    splits = splits_misses(checkpoint, placement, runtime, device)
    if splits or runtime.expert_misses is not ExpertMisses.HOST:
        return
    why = f"no experts of {checkpoint.name} that it could compute come one by one from host memory"
    if not device.own_memory:
        why = "the CPU computes all of it"
    raise ConfigError(f"--expert-misses host has no effect here: {why}, leave it out")


def check_look_ahead(runtime: RuntimeConfig, checkpoint: Checkpoint, placement: Placement) -> None:
    """Refuse to look ahead where that has no effect.

    Raises:
        ConfigError: it is asked for, and no experts come one by one, or no slot is free for it.
    """
    if runtime.look_ahead is not LookAhead.ON:
        return
    experts, slots = placement.demand.experts, placement.expert_slots
    if experts is None or not slots:
        raise ConfigError(
            f"--look-ahead on has no effect on {checkpoint.name}: none of it comes expert by "
            "expert here, leave it out"
        )

    def suffice(count: int) -> bool:
        shares = shares_of(count, experts.layers, experts.per_token, foresees=True)
        return leaves_free(*shares, experts.per_token)

    if not suffice(slots):
        more = next(filter(suffice, itertools.count(slots)))
        raise ConfigError(
            f"--look-ahead on has no effect with {slots} --expert-slots: none is free while a "
            f"layer computes; give {more}, or leave it out"
        )


def _leaves_ways_open(runtime: RuntimeConfig) -> bool:
    """Whether it is left open how experts come, and nothing is asked for that is of one way."""
    asked = runtime.look_ahead is LookAhead.ON or runtime.expert_misses is ExpertMisses.HOST
    return runtime.expert_slots is None and not asked


def _s_per_token(plan: Plan) -> float:
    return 0.0 if plan.prediction is None else plan.prediction.s_per_token


def _smallest(placement: Placement, runtime: RuntimeConfig) -> int:
    if runtime.resident is not None:
        return placement.device_bytes
    return sum(
        smallest_limits(
            placement,
            slots=runtime.slots,
            resident_layers=runtime.resident_layers,
            expert_slots=runtime.expert_slots,
        )
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
    drafting = replace(settled(load.drafting, device), sampled=means.sampled)
    load = replace(load, drafting=drafting, asked=means.asked)
    draft = drafting.config
    search = _Search(checkpoint, runtime, device, load, free, means)
    found: list[_Candidate] = []
    refusals: list[tuple[DraftConfig, PlanError]] = []
    for config in _drafts(draft, checkpoint, runtime, device, load):
        if draft.automatic and means.repeats:
            if config.grows and config.shape is DraftShape.AUTO:
                config = replace(config, shape=DraftShape.TREE)
            if config.answers_rest_on_it:
                continue
        if _is_bold(config, means) and not _is_fixed(draft):
            continue
        try:
            found.append(search.candidate(config, runtime))
        except PlanError as refusal:
            refusals.append((config, refusal))
    if not found:
        # Of `auto` the first is of no drafts, which asks for least.
        several = refusals[:1] if draft.automatic else refusals
        raise _asking_least([refusal for _, refusal in several])
    if draft.automatic:  # what no memory would change says nothing of one not asked for
        refusals = [(config, refusal) for config, refusal in refusals if refusal.needed_bytes]
    best = min(search.refined(found), key=lambda c: (c.s_per_token, c.draft.nodes))
    fixed, sequences = _is_fixed(draft), len(load.capacities)
    chosen = best if fixed else search.with_room(best)
    outlooks = () if fixed else tuple(search.outlooks(chosen, sequences))
    first_nodes = best.draft.nodes
    if outlooks and (load.running or sequences) != sequences:  # all is not what was chosen for
        first_nodes = min(outlooks, key=lambda outlook: outlook.s_per_token).nodes
    considered = [Considered(draft=c.draft, prediction=c.prediction) for c in found]
    considered += [Considered(draft=config, refusal=str(why)) for config, why in refusals]
    placed = search.placed(chosen.placement)
    return Plan(
        runtime=chosen.runtime,
        drafting=chosen.drafting,
        first_nodes=first_nodes,
        placement=chosen.placement,
        watches=chosen.draft.drafts and not (best.draft.drafts or first_nodes),
        prediction=chosen.prediction,
        outlooks=outlooks,
        alone=() if fixed or sequences == 1 else tuple(search.outlooks(chosen, 1)),
        expected=search.expected(best.draft),
        considered=tuple(considered),
        smallest_bytes=min(
            *(_smallest(c.placement, runtime) for c in found),
            *(refusal.needed_bytes for _, refusal in refusals if refusal.needed_bytes),
            chosen.placement.device_bytes,
        ),
        placed=placed,
        level=search.level(best.drafting, chosen),
        sequences=sequences,
        running=load.running if load.running != sequences else None,
        prompt_rows=min(runtime.prefill_chunk_tokens, load.prompt_tokens),
        misses=placed.misses,
        ways=chosen.ways,
    )


def _is_bold(config: DraftConfig, means: Means) -> bool:
    """Whether a draft of that size would rest on an expectation alone."""
    first = kind_of(config.kind).first_tokens if config.drafts else None
    bold = first is not None and config.nodes > first
    return bold and means.yields(config).steps < _KNOWN_STEPS


def _is_fixed(draft: DraftConfig) -> bool:
    return not draft.drafts or draft.draft_tokens is not None


def _variants(
    draft: DraftConfig, checkpoint: Checkpoint, runtime: RuntimeConfig, device: DeviceKind
) -> Sequence[DraftConfig]:
    """The ways in which a drafter may draft so much, the usual one first."""
    if not draft.drafts:
        return (draft,)
    return kind_of(draft.kind).variants(draft, checkpoint, runtime.dtype, device)


def _drafts(
    draft: DraftConfig,
    checkpoint: Checkpoint,
    runtime: RuntimeConfig,
    device: DeviceKind,
    load: RunLoad,
) -> Iterator[DraftConfig]:
    """Every drafter, size and variant to look at."""
    dtype = compute_dtype(checkpoint, runtime.dtype)
    for config in _sized_drafts(draft, runtime, dtype, device, load):
        yield from _variants(config, checkpoint, runtime, device)


def _sized_drafts(
    draft: DraftConfig, runtime: RuntimeConfig, dtype: str, device: DeviceKind, load: RunLoad
) -> Iterator[DraftConfig]:
    if _is_fixed(draft):
        yield draft
        return
    names: Sequence[str] = (draft.draft,)
    if draft.automatic:
        yield draft.chosen("none")
        tokens = load.prompt_tokens
        names = [name for name in NAMES if kind_of(name).automatic(draft, runtime, dtype, tokens)]
        names += [f"model:{draft.model}"] if draft.model else []
    for name in names:
        yield from _in_sizes(draft, name, device, load)


def _in_sizes(
    draft: DraftConfig, name: str, device: DeviceKind, load: RunLoad
) -> Iterator[DraftConfig]:
    """Drafts of that drafter in each size it may be asked for, ascending."""
    most = min(kind_of(name.partition(":")[0]).most_on(device), max(load.capacities))
    for size in SIZES:
        if size > most:
            return
        with suppress(ConfigError):  # a window too small for that size
            yield draft.chosen(name, size) if draft.automatic else replace(draft, draft_tokens=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    runtime: RuntimeConfig
    drafting: Drafting
    placement: Placement
    prediction: Prediction
    s_per_token: float = math.inf
    ways: tuple[Way, ...] = ()

    @property
    def draft(self) -> DraftConfig:
        return self.drafting.config

    def of(self, ways: Sequence[Way]) -> "_Candidate":
        """The same in the fastest of these ways."""
        ways = sorted(ways, key=lambda way: way.s_per_token)
        first, looked_at = ways[0], tuple(ways) if len(ways) > 1 else ()
        return replace(
            self,
            placement=first.placement,
            prediction=first.prediction,
            s_per_token=first.s_per_token,  # with its prompt, whatever ways there are
            ways=looked_at,
        )


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

    def candidate(
        self, draft: DraftConfig, runtime: RuntimeConfig, like: Placement | None = None
    ) -> _Candidate:
        """Place one and price it; of a mixture in each way experts may come, or `like` that."""
        given = self._load.drafting
        own = given.checkpoint if draft.model or not given.config.automatic else None
        drafting = replace(given, config=draft, checkpoint=own)
        experts = None if like is None else like.demand.experts
        if like is None or experts is None:
            ways = [self._way(drafting, runtime)]
        else:
            count = len(experts.whole)
            whole = not like.expert_slots
            ways = [self._way(drafting, runtime, whole=whole, whole_layers=count)]
        if like is None and ways[0].one_by_one and _leaves_ways_open(runtime):
            with suppress(PlanError):  # no ring fits
                ways.append(self._way(drafting, runtime, whole=True))
        first = ways[0]
        return _Candidate(
            runtime=runtime,
            drafting=drafting,
            placement=first.placement,
            prediction=first.prediction,
        ).of(ways)

    def _mixed(self, candidate: _Candidate) -> _Candidate:
        """The same, or with some layers whole and experts of the others one by one."""
        placement = next((w.placement for w in candidate.ways if w.one_by_one), None)
        experts = None if placement is None else placement.demand.experts
        if placement is None or experts is None:
            return candidate
        room = placement.expert_slots * experts.layers // experts.count
        counts = {round(share * min(room, experts.layers - 1)) for share in _SHARES_WHOLE} - {0}
        ways = list(candidate.ways)
        for count in sorted(counts):
            with suppress(PlanError):  # a slot for each of a token's experts is left to no layer
                way = self._way(candidate.drafting, candidate.runtime, whole_layers=count)
                ways += [way] if way.one_by_one else []
        return candidate.of(ways)

    def _way(
        self,
        drafting: Drafting,
        runtime: RuntimeConfig,
        *,
        whole: bool = False,
        whole_layers: int = 0,
    ) -> Way:
        placement = place_run(
            self._checkpoint,
            runtime,
            self._device,
            load=replace(self._load, drafting=drafting, whole=whole, whole_layers=whole_layers),
            free=self._free,
            speeds=self._corrected(streams=True, sequences=self._running),
        )
        made = Way(placement=placement, prediction=self._predict(drafting, placement))
        most, prompt = len(self._load.capacities), self._load.prompt_tokens
        answers = (sum(self._load.capacities) - prompt) // most
        if answers <= 0 or not self._checkpoint.has_experts:
            return made
        prompt_s = self.placed(placement).prompt_s(max(1, prompt // most))
        return replace(made, prompt_s=prompt_s, answer_tokens=answers)

    def refined(self, found: Sequence[_Candidate]) -> list[_Candidate]:
        """The same, and the best of them with fewer layers resident and with other rings."""
        best = [*map(self._mixed, sorted(found, key=lambda c: c.s_per_token)[:_REFINED])]
        more = [made for candidate in best for made in self._with_fewer(candidate)]
        for candidate in sorted([*best, *more], key=lambda c: c.s_per_token)[:_REFINED]:
            streamed = len(candidate.placement.streamed)
            if self._runtime.slots is not None or not candidate.prediction.draft_s:
                continue
            for slots in SLOT_CHOICES:
                if slots > streamed or slots == candidate.placement.slots:
                    continue
                try:
                    runtime = replace(candidate.runtime, slots=slots)
                    more.append(self.candidate(candidate.draft, runtime))
                except (PlanError, ConfigError):  # the ring is larger than what it would stream
                    continue
        return [*found, *best, *more]

    def _with_fewer(self, candidate: _Candidate) -> Iterator[_Candidate]:
        """The same with fewer layers resident, where copies of the streamed ones draft.

        Each draft pass reads a resident layer whole and a copy in a part of that time, so as many
        resident layers as fit need not be best.
        """
        given = self._runtime.resident_layers is not None or self._runtime.resident is not None
        most = len(candidate.placement.resident)
        if given or not candidate.placement.copy_bytes:
            return
        for count in sorted({round(most * share) for share in _SHARES_KEPT} - {most}):
            try:
                runtime = replace(candidate.runtime, resident_layers=count)
                yield self.candidate(candidate.draft, runtime)
            except PlanError:  # in the ring's least form it is larger than what was found
                continue

    def with_room(self, best: _Candidate) -> _Candidate:
        """The same with room for larger drafts, which the controller may come to, if it is cheap.

        Where experts come one by one drafts seldom pay, and where they do it is the text that
        decides: of `auto` n-grams are there although none are to be checked at first. Its
        prediction is that of the first steps, whose drafts are as large as before.
        """
        draft, given = best.draft, self._load.drafting.config
        if draft.drafts:
            sizes, most = _in_sizes(draft, draft.draft, self._device, self._load), _MOST_ROOM
        elif given.automatic and best.placement.expert_slots and self._means.stated is None:
            sizes, most = _in_sizes(given, "ngram", self._device, self._load), _MOST_WATCHED
        else:
            return best
        for sized in reversed([*sizes]):
            if not draft.nodes < sized.nodes <= most * max(1, draft.nodes):
                continue
            try:
                roomy = self.candidate(sized, best.runtime, best.placement)
            except (PlanError, ConfigError):  # the ring is larger than what it would stream
                continue
            prediction = self._predict(best.drafting, roomy.placement)
            if prediction.s_per_token <= _ROOM_COST * best.prediction.s_per_token:
                return replace(roomy, prediction=prediction, ways=best.ways)
        return best

    def outlooks(self, chosen: _Candidate, sequences: int) -> Iterator[StepOutlook]:
        """What drafts of the sizes there is room for should give and take, of so many sequences."""
        draft = chosen.draft
        limits = [0, *(size for size in SIZES if size < draft.nodes), draft.nodes]
        for size in limits if draft.drafts else []:
            sized = replace(chosen.drafting, config=draft.limited(size)) if size else NO_DRAFTING
            step = self._predict(sized, chosen.placement, found=True, sequences=sequences)
            yield StepOutlook(
                nodes=size,
                tokens=step.tokens_per_pass,
                draft_s=step.draft_s,
                pass_s=step.pass_s,
            )

    def _predict(
        self,
        drafting: Drafting,
        placement: Placement,
        *,
        found: bool = False,
        sequences: int | None = None,
    ) -> Prediction:
        """A step's costs; `found`: of those only for which a draft is found."""
        return self._costs(self.placed(placement, sequences), drafting, found=found)

    def _costs(self, run: PlacedRun, drafting: Drafting, *, found: bool = False) -> Prediction:
        expected = self.expected(drafting.config)
        return run.predict(drafting, replace(expected, hits=1.0) if found else expected)

    def level(self, drafting: Drafting, chosen: _Candidate) -> float:
        """Seconds of its pass over those of the profile alone."""
        run = self.placed(chosen.placement)
        if run.speeds.levels == self._means.speeds.levels:
            return 1.0
        bare = self._costs(replace(run, speeds=self._means.speeds), drafting)
        return self._costs(run, drafting).pass_s / bare.pass_s

    def placed(self, placement: Placement, sequences: int | None = None) -> PlacedRun:
        """The run there, of so many sequences; None: of those that usually run."""
        sequences = sequences or self._running
        return PlacedRun(
            checkpoint=self._checkpoint,
            config=self._runtime,
            speeds=self._corrected(streams=placement.streams, sequences=sequences),
            placement=placement,
            context_tokens=self._load.cached_tokens,
            sequences=sequences,
        )

    @property
    def _running(self) -> int:
        return self._load.running or len(self._load.capacities)

    def _corrected(self, *, streams: bool, sequences: int) -> Speeds:
        """The machine's speeds as recent runs found them."""
        return replace(self._means.speeds, levels=self._means.level(streams, sequences))

    def expected(self, draft: DraftConfig) -> Expected:
        """How often a drafter should be right."""
        if self._means.stated is not None:
            return self._means.stated(draft)
        if not draft.nodes:
            return Expected()
        gives = self._means.yields(draft)
        below = kind_of(draft.kind).inner_rates(draft)
        return Expected(
            tokens=1.0 + gives.accepted(draft.nodes), hits=gives.hits, made=gives.made, inner=below
        )
