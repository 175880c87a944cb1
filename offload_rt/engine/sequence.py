"""One sequence of a run: its tokens, who drafts for it, and how it ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from offload_rt.config import SamplingConfig
from offload_rt.errors import OffloadError
from offload_rt.planning.yields import Outcome
from offload_rt.report import RetrievalCounts
from offload_rt.sampling import Dice
from offload_rt.speculative.base import Draft, Drafter


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """An answer that is wanted.

    Attributes:
        ids: the prompt.
        sampling: how its tokens are drawn. Given a seed there, nothing that was measured decides
            how it is made.
        seed: what drawing starts from.
        max_tokens: emitted tokens at which it ends; 0 only reads the prompt.
        end_tokens: tokens that end it.
        logprobs: log-probabilities are kept: of each token, and of so many likeliest ones besides;
            None keeps none.
        scores: the prompt's own tokens have theirs kept, too.
        draft_tokens: of a draft for it, at most; None: as many as the engine's plan drafts.
    """

    ids: Sequence[int]
    sampling: SamplingConfig = SamplingConfig()
    seed: int = 0
    max_tokens: int
    end_tokens: frozenset[int] = frozenset()
    logprobs: int | None = None
    scores: bool = False
    draft_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely a token was: by the model, as it is without temperature and the like.

    Attributes:
        likeliest: tokens and their log-probabilities, the likeliest first, as many as were asked
            for.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Unchecked:
    """A draft that no pass checks.

    Attributes:
        nodes: that were asked for.
        start: tokens of its sequence when it was made.
    """

    nodes: int
    start: int
    draft: Draft

    def outcome(self, ids: Sequence[int]) -> Outcome | None:
        """What would have become of it, by the tokens that came; None: more of them decide."""
        path, undecided = self.draft.tree.followed(ids[self.start :])
        if undecided:
            return None
        return Outcome(drafted=len(self.draft.tree), path=path, nested=self.draft.nested)


@dataclass(eq=False, slots=True)
class SequenceState:
    """One sequence of a run.

    Attributes:
        index: its place among the prompts, and the cache it uses; -1 while it has none.
        request: what is wanted.
        ids: prompt and emitted tokens.
        max_tokens: emitted tokens at which it ends.
        dice: its own source of randomness.
        drafter: who drafts for it; None decodes token by token.
        retrieval: with triforce, the counts of the drafting below its drafts.
        top_logprobs: log-probabilities are kept: of each token, and of so many likeliest ones;
            None keeps none.
        finish_reason: None while it is active.
        error: why there is no answer; the reason is `error` then.
        leaving: nobody waits for it any more; set from any thread, it ends between two layers.
        logprobs: of the emitted tokens, where they are asked for. There may be more than tokens,
            of a pass that went beyond.
        prompt_logprobs: of the prompt's tokens but the first, where they are asked for.
        drafter_knows: tokens of it that its drafter has seen, or proposed and seen accepted.
        unchecked: what its drafter would draft, if more were asked for.
        drafted: tokens proposed for it; `accepted` of them were kept.
        reused: tokens of its prompt whose rows were there.
    """

    index: int
    request: Request
    ids: list[int]
    max_tokens: int
    dice: Dice
    drafter: Drafter | None = None
    retrieval: RetrievalCounts | None = None
    top_logprobs: int | None = None
    finish_reason: FinishReason | None = None
    error: OffloadError | None = None
    leaving: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    drafter_knows: int = 0
    unchecked: Unchecked | None = None
    drafted: int = 0
    accepted: int = 0
    reused: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of its prompt."""
        return len(self.request.ids)

    @property
    def sampling(self) -> SamplingConfig:
        """How its tokens are drawn."""
        return self.request.sampling

    @property
    def emitted(self) -> list[int]:
        """Tokens generated so far."""
        return self.ids[self.prompt_tokens :]

    @property
    def remaining(self) -> int:
        """Tokens it may still emit."""
        return self.max_tokens - (len(self.ids) - self.prompt_tokens)

    @property
    def unread(self) -> int:
        """Tokens that its drafter has not seen, but for the one that the model added last."""
        return max(0, len(self.ids) - self.drafter_knows - 1)

    def finish(self, reason: FinishReason) -> None:
        """End the sequence; it takes part in no further pass."""
        self.finish_reason = self.finish_reason or reason

    def fail(self, error: OffloadError) -> None:
        """End the sequence without an answer."""
        if self.finish_reason is None:
            self.finish_reason, self.error = FinishReason.ERROR, error


@dataclass(frozen=True, slots=True)
class Emitted:
    """Tokens one sequence gained in a pass."""

    sequence: SequenceState
    token_ids: list[int]
