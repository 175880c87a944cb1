"""What a user sets for training, as frozen records; no torch here.

There are two records, because their results are kept apart. What the corpus settings decide
(answers, hidden states) is expensive to make, and serves any number of trainings.
"""

from dataclasses import dataclass
from enum import StrEnum

from offload_rt.errors import ConfigError

ANSWER_TOKENS = 256


def _require(ok: bool, flag: str, value: object, accepted: str) -> None:
    if not ok:
        raise ConfigError(f"{flag} is {value}, accepted is {accepted}")


class Method(StrEnum):
    """Whether the model stays as it is (Medusa-1) or is trained along with its heads (Medusa-2)."""

    MEDUSA_1 = "medusa-1"
    MEDUSA_2 = "medusa-2"


class WarmUp(StrEnum):
    """How Medusa-2 spares the model untrained heads (arXiv:2401.10774, 2.2.2).

    `two-stage` trains the heads alone first, as Medusa-1 does; with `sine` their weight grows from
    0.
    """

    TWO_STAGE = "two-stage"
    SINE = "sine"


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusConfig:
    """What is trained on.

    Attributes:
        heads: how many tokens beyond the next one are labels.
        self_distill: the model answers the prompts itself.
        temperature: of those answers; held-out prompts are always answered greedily.
        answer_tokens: of each, at most; None is `ANSWER_TOKENS` where the model answers.
        sequences: prompts that are answered at once.
        pass_tokens: tokens that are read in one pass, at least one text.
        holdout: share of the prompts that is not trained on.
        raw: prompts are given as they are, without the chat template.
        seed: decides which prompts are held out, and draws answers.
    """

    heads: int = 5
    self_distill: bool = False
    temperature: float = 0.0
    answer_tokens: int | None = None
    sequences: int = 16
    pass_tokens: int = 8192
    holdout: float = 0.1
    raw: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        _require(1 <= self.heads <= 16, "--heads", self.heads, "1 to 16")
        _require(0.0 <= self.temperature <= 100.0, "--temperature", self.temperature, "0 to 100")
        tokens_ok = self.answer_tokens is None or 3 <= self.answer_tokens <= 2**20
        _require(tokens_ok, "--answer-tokens", self.answer_tokens, f"3 to {2**20}")
        _require(1 <= self.sequences <= 1024, "--sequences", self.sequences, "1 to 1024")
        _require(1 <= self.pass_tokens <= 2**24, "--pass-tokens", self.pass_tokens, f"1 to {2**24}")
        _require(0.0 <= self.holdout <= 0.9, "--holdout", self.holdout, "0 to 0.9")
        _require(0 <= self.seed < 2**63, "--seed", self.seed, "0 to 2^63 - 1")
        if not self.self_distill and self.temperature:
            raise ConfigError("--temperature is for answers the model writes: add --self-distill")
        if not self.self_distill and self.answer_tokens is not None:
            raise ConfigError("--answer-tokens is for answers the model writes: add --self-distill")

    @property
    def most_answer_tokens(self) -> int:
        """Tokens the model writes at most."""
        return self.answer_tokens or ANSWER_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True)
class JointConfig:
    """What Medusa-2 has besides (arXiv:2401.10774, 2.2.2 and B).

    Attributes:
        warm_up: how the model is spared untrained heads.
        lora_rank: of the adapters through which the model is trained.
        heads_weight: lambda_0, what the heads' loss counts beside the model's.
    """

    warm_up: WarmUp = WarmUp.TWO_STAGE
    lora_rank: int = 32
    heads_weight: float = 0.2

    def __post_init__(self) -> None:
        _require(1 <= self.lora_rank <= 1024, "--lora-rank", self.lora_rank, "1 to 1024")
        weight = self.heads_weight
        _require(0.0 < weight <= 10.0, "--heads-weight", weight, "above 0, up to 10")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How heads are trained.

    Attributes:
        method: with a frozen model, or together with it.
        layers: residual blocks of each head.
        vocabulary: rows of the output head each head gets, those of the commonest tokens; 0 is all
            tokens, None lets heads use the model's own output head.
        epochs: times each place is seen.
        lr: highest learning rate of the heads; Medusa-2 trains the model at a quarter of it.
        batch_tokens: places of a step.
        joint: with Medusa-2.
    """

    method: Method = Method.MEDUSA_1
    layers: int = 1
    vocabulary: int | None = 8192
    epochs: int = 4
    lr: float = 1e-3
    batch_tokens: int = 1024
    joint: JointConfig = JointConfig()

    def __post_init__(self) -> None:
        _require(1 <= self.layers <= 4, "--layers", self.layers, "1 to 4")
        rows = self.vocabulary
        rows_ok = rows is None or rows == 0 or 64 <= rows <= 2**20
        _require(rows_ok, "--vocabulary", rows, f"shared, full or 64 to {2**20}")
        _require(1 <= self.epochs <= 1000, "--epochs", self.epochs, "1 to 1000")
        _require(0.0 < self.lr <= 1.0, "--lr", self.lr, "above 0, up to 1")
        tokens = self.batch_tokens
        _require(32 <= tokens <= 2**20, "--batch-tokens", tokens, f"32 to {2**20}")
        if self.method is Method.MEDUSA_1 and self.joint != JointConfig():
            raise ConfigError(
                "--warm-up, --lora-rank and --heads-weight are for --method medusa-2: add it"
            )
