"""What drafting adds to a step: passes of which model, and how many. No torch here."""

from dataclasses import dataclass, replace

from offload_rt.config import DraftConfig, DraftWeights
from offload_rt.costs.acceptance import triforce_tokens
from offload_rt.costs.pass_cost import PassLoad
from offload_rt.costs.workload import PlacedModel, Residence, parts_of
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.profiling.profile import LayerWork

NGRAM_S = 3e-4  # a look-up, measured: 0.1 to 0.5 ms


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who drafts.

    Attributes:
        config: how much.
        checkpoint: headers of the draft model, if one drafts.
        heads_bytes: Medusa heads with what they compute, if they draft.
    """

    config: DraftConfig = DraftConfig()
    checkpoint: Checkpoint | None = None
    heads_bytes: int = 0


NO_DRAFTING = Drafting()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """How often drafts are expected to be right.

    Attributes:
        tokens: emitted by a step with a draft, the target's own included.
        hits: share of the steps for which a draft is found.
        made: share of the passes a draft model may make for a tree that it makes.
        inner: below triforce, how often the token at each depth is accepted by its passes; empty:
            nothing is drafted there.
    """

    tokens: float = 1.0
    hits: float = 1.0
    made: float = 1.0
    inner: tuple[float, ...] = ()

    @property
    def tokens_per_pass(self) -> float:
        """Emitted per step, those without a draft included."""
        return 1.0 + self.hits * (self.tokens - 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPart:
    """Something that is done for a draft.

    Attributes:
        times: how often, one after another.
        load: the pass it is; None: `seconds` are known.
        seconds: of each.
    """

    times: float
    load: PassLoad | None = None
    seconds: float = 0.0


def draft_parts(
    drafting: Drafting, target: PlacedModel, expected: Expected
) -> tuple[DraftPart, ...]:
    """What a drafter does for the drafts of one step.

    Args:
        drafting: who drafts, and how much; `draft_weights` are settled.
        target: that it drafts for.
        expected: how often it is right.
    """
    config = drafting.config
    if not config.nodes:
        return ()
    if config.kind == "medusa":
        heads = LayerWork(weight_bytes=drafting.heads_bytes, flops_per_token=drafting.heads_bytes)
        return (DraftPart(times=1, load=PassLoad(layers=(), streamed=(), slots=0, head=heads)),)
    parts = (
        _triforce(drafting, target, expected)
        if config.kind == "triforce"
        else _one_level(drafting, target, expected)
    )
    return tuple(replace(part, times=part.times * target.sequences) for part in parts)


def _one_level(
    drafting: Drafting, target: PlacedModel, expected: Expected
) -> tuple[DraftPart, ...]:
    """A draft of n-grams, or of a model that is on the device whole, for one sequence."""
    config, model = drafting.config, drafting.checkpoint
    if model is None:
        return (DraftPart(times=1, seconds=NGRAM_S),)
    context = target.context_tokens
    placed = PlacedModel(
        parts=parts_of(model, "auto", target.speeds.device),
        speeds=target.speeds,
        residence=Residence(weights=config.draft_weights),
        context_tokens=min(context, config.window_tokens or context),
    )
    if config.as_tree:
        passes = config.tree_passes * expected.made
        return (DraftPart(times=passes, load=placed.load(config.tree_breadth)),)
    return (DraftPart(times=config.nodes, load=placed.load(1)),)


def _triforce(drafting: Drafting, target: PlacedModel, expected: Expected) -> tuple[DraftPart, ...]:
    """Passes over the retrieval cache, and what is drafted for them, for one sequence."""
    config, inner = drafting.config, drafting.config.inner
    alone = replace(target, sequences=1)
    rates = expected.inner or (0.0,)
    work = triforce_tokens([1.0], config.nodes, rates, inner.nodes if expected.inner else 0)
    rows = 1 + (min(inner.nodes, config.nodes - 1) if expected.inner else 0)
    kept = config.retrieval
    weights = kept.retrieval_weights if kept.rounded else DraftWeights.SAME
    load = alone.over_retrieval(rows, kept.budget_tokens, weights)
    parts = [DraftPart(times=work.retrieval_passes, load=load)]
    if not expected.inner:
        return tuple(parts)
    for part in _one_level(replace(drafting, config=inner), alone, expected):
        chain = part.load is not None and not inner.as_tree
        times = work.draft_steps if chain else work.retrieval_passes * part.times
        parts.append(replace(part, times=times))
    return tuple(parts)
