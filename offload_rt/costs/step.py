"""From a pass and its drafting to seconds per token: the one road to a predicted second.

    s_per_token = (pass, with what of the drafting does not hide behind it) / tokens per pass

`plan`, `simulate MODEL`, `simulate --scenario` and what the controller expects all end here. The
ring goes on filling while a drafter works that streams nothing. Nothing fills it while the
drafter's own passes use it. No torch here.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from offload_rt.costs.drafters import DraftPart, Expected
from offload_rt.costs.pass_cost import Limit, PassCost, PassLoad
from offload_rt.costs.timeline import Span, SpanKind
from offload_rt.costs.workload import PlacedModel
from offload_rt.profiling.profile import Obtained
from offload_rt.trace import Lane, TraceEvent

STEP_S = 1e-3  # sampling and bookkeeping of a step, measured: 1 to 2 ms on a CPU
# More of it for each node of a draft: rows, positions and parents, the verdict, its download.
# Measured: 1.3 to 1.9 us (docs/RESULTS.md, "Host time of a step").
NODE_S = 2e-6
# The host's, to enqueue what a block of KV needs on a GPU, more of it where a retrieval cache is
# chosen meanwhile, and more again where several query heads ask for a KV head. Measured without
# launches: 41, 75 and 85 us (docs/RESULTS.md, "Host time of a block of KV"). 2 us for each of 3, 11
# and 15 launches are assumed.
KV_BLOCK_S, KV_CHOICE_S, KV_GROUPED_S = 50e-6, 100e-6, 115e-6

_CALLED = {
    SpanKind.WEIGHTS: (Lane.COPY, "weights of layer {}"),
    SpanKind.KV: (Lane.KV, "KV of layer {}"),
    SpanKind.KV_BACK: (Lane.KV_BACK, "new KV of layer {} goes home"),
    SpanKind.ATTENTION: (Lane.COMPUTE, "attention of layer {} to KV from home"),
    SpanKind.LAYER: (Lane.COMPUTE, "layer {}"),
    SpanKind.END: (Lane.COMPUTE, "output head"),
}

Price = Callable[[PassLoad], PassCost]
Events = list[TraceEvent]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """What a step has to do.

    Attributes:
        load: the pass that checks a draft.
        plain: the pass of a step for which no draft was found.
        expected: how often drafts are found and right.
        parts: drafting.
        host_s: of the program, beside passes and drafting.
    """

    load: PassLoad
    plain: PassLoad
    expected: Expected = Expected()
    parts: tuple[DraftPart, ...] = ()
    host_s: float = STEP_S

    def slowed(self, times: float) -> "StepWork":
        """The same where what is in no pass takes so many times as long."""
        parts = tuple(replace(part, seconds=times * part.seconds) for part in self.parts)
        return replace(self, parts=parts, host_s=times * self.host_s)

    @property
    def drafting_streams(self) -> bool:
        """Whether the drafter's passes use the ring."""
        return any(part.load is not None and part.load.streamed for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a step of the main loop should take, in the steady state.

    Attributes:
        s_per_token: seconds per token after the first.
        pass_s: from the end of drafting until the tokens of the pass are known.
        draft_s: drafting, while the ring may go on filling.
        draft_passes: passes it makes for a step that has a draft.
        tokens_per_pass: emitted per step.
        compute_s: of the pass, kernels.
        stall_s: of the pass, waiting for copies.
        transfer_s: of the step, in which the busiest link carries bytes, also beside kernels.
        home_bytes: weights that cross the link for the pass.
        kv_home_bytes: KV that does.
        kv_back_bytes: KV that goes home.
        resident_layers: whose weights stay on the devices.
        streamed_layers: whose do not.
        limit: what would have to be faster.
        obtained: how the worst number behind it is known.
        old_profile: a guess is among them, as the profile was made before a part was as it is.
        on_host_bytes: of `home_bytes`, experts that the processor computes meanwhile where they
            lie; they cross behind all others.
    """

    s_per_token: float
    pass_s: float
    draft_s: float
    draft_passes: float
    tokens_per_pass: float
    compute_s: float
    stall_s: float
    transfer_s: float
    home_bytes: int
    kv_home_bytes: int
    kv_back_bytes: int
    resident_layers: int
    streamed_layers: int
    limit: Limit
    obtained: Obtained
    on_host_bytes: int = 0
    old_profile: bool = False

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.pass_s + self.draft_s

    @property
    def bytes_per_pass(self) -> int:
        """Weights and KV that cross the links to the devices."""
        return self.home_bytes + self.kv_home_bytes


def choice_s(expected: Expected, rebuild_tokens: int | None, *, grouped: bool) -> float:
    """The host's for a block of KV where a retrieval cache is chosen anew; the average of passes.

    Args:
        expected: how often drafts are found and right.
        rebuild_tokens: after which it is, if there is one.
        grouped: whether several query heads share a KV head.
    """
    if rebuild_tokens is None:
        return 0.0
    share = min(1.0, expected.tokens_per_pass / rebuild_tokens)
    return share * (KV_GROUPED_S if grouped else KV_CHOICE_S)


def step_work(
    target: PlacedModel,
    nodes: int,
    expected: Expected,
    parts: tuple[DraftPart, ...],
    *,
    choice_s: float = 0.0,
    branches: float = 1.0,
) -> StepWork:
    """What a step has to do that checks drafts of so many nodes for this model.

    Args:
        target: the model.
        nodes: of a draft.
        expected: how often drafts are found and right.
        parts: drafting.
        choice_s: see `choice_s`.
        branches: paths down a draft, on average.
    """
    tokens = expected.tokens_per_pass
    block_s = 0.0 if target.speeds.device.host_computes else KV_BLOCK_S + choice_s
    return StepWork(
        load=target.load(1 + nodes, tokens, kv_block_s=block_s, branches=branches),
        plain=target.load(1, tokens, kv_block_s=block_s),
        expected=expected,
        parts=parts,
        host_s=STEP_S + expected.hits * target.sequences * nodes * NODE_S,
    )


def predict(work: StepWork, price: Price) -> Prediction:
    """Put a pass and its drafting together.

    Raises:
        ConfigError: something is streamed, but there is no slot, or no speed.
        ProfileError: the profile lacks a number.
    """
    cost, hits = _with_draft(work, price), work.expected.hits
    plain = price(work.plain) if hits < 1.0 else cost

    def mean(drafted: float, undrafted: float) -> float:
        return hits * drafted + (1.0 - hits) * undrafted

    draft_s = hits * cost.between_s
    seconds = mean(cost.pass_s, plain.pass_s) + work.host_s
    tokens = work.expected.tokens_per_pass
    streamed = len(work.load.streamed)
    return Prediction(
        s_per_token=seconds / tokens,
        pass_s=seconds - draft_s,
        draft_s=draft_s,
        draft_passes=sum(part.times for part in work.parts if part.load is not None),
        tokens_per_pass=tokens,
        compute_s=mean(cost.compute_s - cost.between_s, plain.compute_s),
        stall_s=mean(cost.stall_s, plain.stall_s),
        transfer_s=mean(cost.transfer_s, plain.transfer_s),
        home_bytes=cost.home_bytes,
        kv_home_bytes=cost.kv_home_bytes,
        kv_back_bytes=cost.kv_back_bytes,
        resident_layers=len(work.load.layers) - streamed,
        streamed_layers=streamed,
        limit=cost.limit,
        obtained=cost.obtained,
        old_profile=cost.old_profile or plain.old_profile,
        on_host_bytes=sum(layer.behind_bytes for layer in work.load.layers),
    )


def _with_draft(work: StepWork, price: Price) -> PassCost:
    """The cost of the pass that checks a draft, and of drafting before it."""
    cost = price(_with_drafting(work, price))
    if not work.drafting_streams:
        return cost
    drafting_s = _drafting_s(work, price)
    return replace(
        cost,
        pass_s=cost.pass_s + drafting_s,
        compute_s=cost.compute_s + drafting_s,
        between_s=drafting_s,
    )


def _with_drafting(work: StepWork, price: Price) -> PassLoad:
    """The pass that checks a draft, with drafting behind it that leaves the ring alone."""
    if work.drafting_streams:
        return work.load
    passes = round(sum(part.times for part in work.parts if part.load is not None))
    return replace(work.load, between_s=_drafting_s(work, price), between_passes=passes)


def _drafting_s(work: StepWork, price: Price) -> float:
    return sum(
        part.times * (part.seconds if part.load is None else price(part.load).pass_s)
        for part in work.parts
    )


def step_events(work: StepWork, price: Price, spans: Callable[[PassLoad], list[Span]]) -> Events:
    """What the streams are busy with in a step that has a draft, from the begin of its pass on.

    Drafting for the next step comes last.
    """
    load = _with_drafting(work, price)
    drafting_s = _with_draft(work, price).between_s
    events, end_s = [], 0.0
    for span in spans(load):
        if span.kind is SpanKind.DRAFTING:
            continue
        lane, name = _CALLED[span.kind]
        if span.layer < 0:
            end_s = span.end_s
        if span.end_s > span.start_s:
            details = {"layer": span.layer, "bytes": span.nbytes} if span.layer >= 0 else {}
            events.append(
                TraceEvent(
                    name=name.format(span.layer),
                    lane=f"{lane} {span.device}" if load.devices > 1 else lane,
                    start_s=span.start_s,
                    end_s=span.end_s,
                    details=details,
                )
            )
    if drafting_s:
        events.append(
            TraceEvent(
                name="drafting for the next step",
                lane=Lane.DRAFTING,
                start_s=end_s,
                end_s=end_s + drafting_s,
            )
        )
    return events
