"""What drafting adds to a step: passes of which model, and how many. No torch here."""

from dataclasses import dataclass

from offload_rt.config import DraftConfig
from offload_rt.costs.pass_cost import PassLoad
from offload_rt.model.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Drafting:
    """Who drafts.

    Attributes:
        config: how much.
        checkpoint: headers of the draft model, if one drafts; or of the target's own module.
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
