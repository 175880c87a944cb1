"""Acceptance rates that a user states: where nothing runs, none can be measured.

No torch here.
"""

from dataclasses import dataclass

from offload_rt.config import DraftConfig
from offload_rt.costs.acceptance import chain_tokens, grow_tree
from offload_rt.costs.drafters import Expected
from offload_rt.errors import ConfigError
from offload_rt.planning.yields import MADE
from offload_rt.speculative.kinds import NAMES, kind_of

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


def expect(config: DraftConfig, acceptance: Acceptance) -> Expected:
    """Say how often a drafter is right, from what a user states.

    Args:
        config: who drafts, and how much.
        acceptance: how often it is right.

    Raises:
        ConfigError: acceptance is missing, or of the wrong kind.
    """
    if not config.drafts:
        if acceptance != Acceptance():
            raise ConfigError("--acceptance and --tokens-per-pass have no effect without --draft")
        return Expected()
    _check(config, acceptance)
    return Expected(
        tokens=_tokens(config, acceptance),
        made=MADE,
        inner=tuple(row[0] for row in acceptance.inner),
    )


def _check(config: DraftConfig, acceptance: Acceptance) -> None:
    if config.automatic:
        raise ConfigError(
            f"--draft {config.draft} is chosen by measuring, which a simulation does not: name one "
            f"of {', '.join(NAMES)}"
        )
    given = (acceptance.ranks != ()) + (acceptance.tokens_per_pass is not None)
    if given != 1:
        raise ConfigError(
            f"--draft {config.draft} needs one of --acceptance and --tokens-per-pass, as nothing "
            f"runs here: {'both are' if given else 'none is'} given"
        )
    if acceptance.inner and not config.over_retrieval:
        raise ConfigError("--inner-acceptance is for --draft triforce")
    if config.over_retrieval and config.model and not acceptance.inner:
        raise ConfigError(
            f"--draft {config.draft} needs --inner-acceptance: how often the draft model is right "
            "decides how many passes over the retrieval cache there are"
        )
    chain = _tree_depth(config, acceptance) is None
    if chain and any(len(row) > 1 for row in acceptance.ranks):
        raise ConfigError(
            f"--draft {config.draft} drafts chains: give --acceptance one rate for each depth"
        )
    if any(len(row) > 1 for row in acceptance.inner):
        raise ConfigError("--inner-acceptance takes one rate for each depth")


def _tokens(config: DraftConfig, acceptance: Acceptance) -> float:
    if acceptance.tokens_per_pass is not None:
        return acceptance.tokens_per_pass
    depth = _tree_depth(config, acceptance)
    if depth is None:
        return chain_tokens([row[0] for row in acceptance.ranks], config.nodes)
    return grow_tree(acceptance.ranks, config.nodes, depth).tokens(config.nodes)


def _tree_depth(config: DraftConfig, acceptance: Acceptance) -> int | None:
    return kind_of(config.kind).tree_depth(config, len(acceptance.ranks))
