"""What drafting adds to a step: passes of which model, and how many. No torch here."""

from dataclasses import dataclass, replace
from math import ceil

from offload_rt.config import DraftConfig
from offload_rt.costs.pass_cost import PassLoad
from offload_rt.costs.workload import PlacedModel
from offload_rt.model.checkpoint import Checkpoint

# Of several sequences, in one pass of a model that drafts: from 32 on a row costs no less (a 0.5B
# model in int8 by profiles/cpu-2core-avx512bf16.json, ms a row of 8, 32, 64: 3.0, 1.8, 1.7).
SHARED_ROWS = 64


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who drafts.

    Attributes:
        config: how much.
        checkpoint: headers of the draft model, if one drafts; or of the target's own module.
        heads_bytes: Medusa heads with what they compute, if they draft.
        sampled: answers are, for which some drafts are made one sequence after the other.
    """

    config: DraftConfig = DraftConfig()
    checkpoint: Checkpoint | None = None
    heads_bytes: int = 0
    sampled: bool = False

    @property
    def together(self) -> bool:
        """Whether a network makes drafts of several sequences in the same passes."""
        return self.config.is_made_together(sampled=self.sampled)


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


def shared_rows(rows: int, sequences: int) -> int:
    """The most rows in a pass of a model that drafts, which each sequence feeds so many."""
    return max(rows, min(rows * sequences, SHARED_ROWS))


def growing_pass(placed: PlacedModel, rows: int, *, together: bool) -> tuple[int, PassLoad]:
    """Passes in which all sequences are fed so many rows each by a model that drafts, and one.

    Args:
        placed: the model, and how many sequences it drafts for.
        rows: of each sequence.
        together: a pass may have rows of several sequences (`Drafting.together`).

    Returns:
        How many passes that is, and the load of each: recorded ones are of one sequence.
    """
    alone = replace(placed, sequences=1).draft_load(rows)
    if not together or alone.recorded or placed.sequences == 1:
        return placed.sequences, alone
    passes = ceil(placed.sequences / max(1, SHARED_ROWS // rows))
    return passes, replace(placed, sequences=ceil(placed.sequences / passes)).draft_load(rows)
