"""What drafting is expected to take and to yield, from numbers a user gives.

Nothing runs here, so how often drafted tokens stand has to be said; how long drafting takes follows
from the profile and the draft model's sizes. No torch here.
"""

import math
from dataclasses import dataclass, replace

from offload_rt.config import DraftConfig, DraftWeights
from offload_rt.costs.acceptance import chain_tokens, grow_tree, triforce_tokens
from offload_rt.costs.machine import Seat
from offload_rt.costs.pass_cost import LayerLoad, PassLoad, cost_of, pass_times
from offload_rt.costs.sizes import kv_bytes_per_token, layouts_of, number_bytes_of
from offload_rt.costs.workload import layer_works
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import Checkpoint
from offload_rt.planning.demand import draft_weights_of
from offload_rt.planning.simulate import DraftOutlook
from offload_rt.profiling.profile import LayerWork, Number, Obtained
from offload_rt.profiling.rates import layer_s

_KINDS = ("ngram", "model", "medusa", "triforce")

Ranks = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Acceptance:
    """How often drafted tokens stand.

    Attributes:
        ranks: by depth the rate of each rank; the last goes on.
        inner: the same below triforce, before its passes over the retrieval cache.
        tokens_per_pass: emitted, instead of `ranks`.
    """

    ranks: Ranks = ()
    inner: Ranks = ()
    tokens_per_pass: float | None = None


def parse_ranks(text: str, flag: str) -> Ranks:
    """Read `0.8,0.7` (a rate for each depth) or `0.6/0.2,0.5/0.1` (rates of ranks for each).

    Raises:
        ConfigError: it is neither.
    """
    try:
        rows = tuple(tuple(float(r) for r in row.split("/")) for row in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{flag} is {text!r}: write a rate for each depth, as 0.8,0.7, or for each rank of it, "
            "as 0.6/0.2,0.5/0.1"
        ) from error
    if not all(0.0 <= rate <= 1.0 for row in rows for rate in row):
        raise ConfigError(f"{flag} is {text!r}: rates are from 0 to 1")
    return rows


def expect(
    config: DraftConfig,
    acceptance: Acceptance,
    seat: Seat,
    *,
    draft_model: Checkpoint | None,
    heads_bytes: int,
    context_tokens: int,
) -> DraftOutlook:
    """Say what a drafter takes and yields per pass; triforce's own passes are priced elsewhere.

    Args:
        config: who drafts, and how much.
        acceptance: how often it is right.
        seat: where it runs.
        draft_model: headers of the draft model, if one drafts.
        heads_bytes: of Medusa heads, if they draft.
        context_tokens: of the sequence.

    Raises:
        ConfigError: acceptance is missing, or of the wrong kind.
    """
    if config.kind == "none":
        if acceptance != Acceptance():
            raise ConfigError("--acceptance and --tokens-per-pass have no effect without --draft")
        return DraftOutlook()
    _check(config, acceptance)
    if config.kind == "triforce":
        return _two_levels(config, acceptance, seat, draft_model, context_tokens)
    step_s, steps = 0.0, 1.0
    if draft_model is not None:
        breadth = config.tree_breadth if config.as_tree else 1
        weights = draft_weights_of(draft_model, config, seat.device)
        rows = config.cache_rows(context_tokens)
        step_s = model_step_s(draft_model, seat, rows, breadth, weights)
        steps = float(config.tree_passes if config.as_tree else config.nodes)
    elif config.heads:
        work = LayerWork(weight_bytes=heads_bytes, flops_per_token=heads_bytes)
        step_s = layer_s(seat.profile, work, 1, processor=seat.processor).value
    return DraftOutlook(tokens_per_pass=_tokens(config, acceptance), steps=steps, step_s=step_s)


def model_step_s(
    model: Checkpoint, seat: Seat, kv_rows: int, tokens: int, weights: DraftWeights
) -> float:
    """Seconds of a pass of a draft model, which lies on the device whole."""
    number_bytes = number_bytes_of(model, "auto")
    *layouts, _ = layouts_of(model, "auto", seat.device)
    row_bytes = kv_bytes_per_token(model.config, number_bytes) // model.config.num_layers
    head = model.head or model.embedding
    layers = [
        LayerLoad(work=cost, home_bytes=0, kv_bytes=kv_rows * row_bytes, weights=order)
        for work in layer_works(model, layouts)
        for cost, order in [seat.speeds.draft_work(work, weights)]
    ]
    whole_head = LayerWork(
        weight_bytes=math.prod(head.shape) * number_bytes,
        flops_per_token=2 * math.prod(head.shape),
    )
    load = PassLoad(
        layers=layers,
        streamed=(),
        slots=0,
        tokens=tokens,
        head=seat.speeds.draft_work(whole_head, weights)[0],
    )
    nothing = Number(value=1.0, obtained=Obtained.ASSUMED, source="no byte crosses a link")
    return cost_of(load, pass_times(seat.profile, load, seat.processor, nothing)).pass_s


def _check(config: DraftConfig, acceptance: Acceptance) -> None:
    if config.kind not in _KINDS:
        raise ConfigError(
            f"--draft {config.draft} is chosen by measuring, which a simulation does not: name one "
            f"of {', '.join(_KINDS)}"
        )
    given = (acceptance.ranks != ()) + (acceptance.tokens_per_pass is not None)
    if given != 1:
        raise ConfigError(
            f"--draft {config.draft} needs one of --acceptance and --tokens-per-pass, as nothing "
            f"runs here: {'both are' if given else 'none is'} given"
        )
    if acceptance.inner and config.kind != "triforce":
        raise ConfigError("--inner-acceptance is for --draft triforce")
    if config.kind == "triforce" and config.model and not acceptance.inner:
        raise ConfigError(
            f"--draft {config.draft} needs --inner-acceptance: how often the draft model is right "
            "decides how many passes over the retrieval cache there are"
        )
    chain = config.kind == "triforce" or (config.kind == "model" and not config.as_tree)
    if chain and any(len(row) > 1 for row in acceptance.ranks):
        raise ConfigError(
            f"--draft {config.draft} drafts chains: give --acceptance one rate for each depth"
        )
    if any(len(row) > 1 for row in acceptance.inner):
        raise ConfigError("--inner-acceptance takes one rate for each depth")


def _tokens(config: DraftConfig, acceptance: Acceptance) -> float:
    if acceptance.tokens_per_pass is not None:
        return acceptance.tokens_per_pass
    tree = config.kind == "ngram" or config.heads or (config.model and config.as_tree)
    if not tree or config.kind == "triforce":
        return chain_tokens([row[0] for row in acceptance.ranks], config.nodes)
    depths = {"medusa": len(acceptance.ranks), "model": config.tree_passes}
    depth = depths.get(config.kind, config.nodes)
    return grow_tree(acceptance.ranks, config.nodes, depth).tokens(config.nodes)


def _two_levels(
    config: DraftConfig,
    acceptance: Acceptance,
    seat: Seat,
    draft_model: Checkpoint | None,
    context_tokens: int,
) -> DraftOutlook:
    """Steps are passes over the retrieval cache; their seconds are those of the target."""
    inner, rates = config.inner, [row[0] for row in acceptance.inner] or [0.0]
    below = triforce_tokens([1.0], config.nodes, rates, inner.nodes)
    made = DraftOutlook(tokens_per_pass=_tokens(config, acceptance), steps=below.retrieval_passes)
    if draft_model is None:
        return made
    weights = draft_weights_of(draft_model, inner, seat.device)
    step_s = model_step_s(draft_model, seat, inner.cache_rows(context_tokens), 1, weights)
    return replace(made, inner_s=below.draft_steps * step_s)
