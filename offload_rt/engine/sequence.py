"""One sequence of a run: its tokens, who drafts for it, and how it ended."""

from dataclasses import dataclass, field
from enum import StrEnum

from offload_rt.report import RetrievalCounts
from offload_rt.sampling import Dice
from offload_rt.speculative.base import Drafter


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(slots=True)
class SequenceState:
    """One sequence of a run.

    Attributes:
        index: its place among the prompts, and the cache it uses.
        ids: prompt and emitted tokens.
        prompt_tokens: how many of them are the prompt's.
        max_tokens: emitted tokens at which it ends.
        dice: its own source of randomness.
        drafter: who drafts for it; None decodes token by token.
        retrieval: with triforce, the counts of the drafting below its drafts.
        finish_reason: None while it is active.
        logprobs: of the emitted tokens, where the run keeps them: by the model, as it is without
            temperature and the like. There may be more than tokens, of a pass that went beyond.
    """

    index: int
    ids: list[int]
    prompt_tokens: int
    max_tokens: int
    dice: Dice
    drafter: Drafter | None = None
    retrieval: RetrievalCounts | None = None
    finish_reason: FinishReason | None = None
    logprobs: list[float] = field(default_factory=list)

    @property
    def emitted(self) -> list[int]:
        """Tokens generated so far."""
        return self.ids[self.prompt_tokens :]

    @property
    def remaining(self) -> int:
        """Tokens it may still emit."""
        return self.max_tokens - (len(self.ids) - self.prompt_tokens)

    def finish(self, reason: FinishReason) -> None:
        """End the sequence; it takes part in no further pass."""
        self.finish_reason = self.finish_reason or reason


@dataclass(frozen=True, slots=True)
class Emitted:
    """Tokens one sequence gained in a pass."""

    sequence: SequenceState
    token_ids: list[int]
