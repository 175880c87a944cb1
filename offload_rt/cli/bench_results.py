"""What `bench` measured: answers, prompts and categories as records."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median, stdev

from offload_rt.cli.prompt_set import PromptItem
from offload_rt.config import DraftConfig
from offload_rt.planning.placement import Placement
from offload_rt.report import Memory, Speculation, Timings
from offload_rt.session.settings import Settings

BASELINE, DRAFTED = "without drafting", "with drafting"
_TOTAL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One answer to one prompt.

    Attributes:
        phase: BASELINE or DRAFTED.
        round: from 0.
    """

    phase: str
    round: int
    item: PromptItem
    prompt_tokens: int
    token_ids: tuple[int, ...]
    finish_reason: str
    timings: Timings
    speculation: Speculation


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What a phase ran on.

    Attributes:
        draft: who drafted, and how much at most, as planned.
        memory: after the phase's last answer.
    """

    draft: DraftConfig
    device: str
    dtype: str
    placement: Placement
    memory: Memory
    bytes_per_pass: int
    load_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchReport:
    """Everything `bench` has to say.

    Attributes:
        engines: facts by phase; the phases are its keys.
        runs: all finished answers.
    """

    model: str
    settings: Settings
    prompt_file: str
    prompts_in_file: int
    prompts_chosen: int
    rounds: int
    interrupted: bool
    versions: dict[str, str]
    engines: dict[str, EngineFacts]
    runs: Sequence[Measured]

    @property
    def phase(self) -> str:
        """What the table is about: with drafting where that was measured."""
        return DRAFTED if DRAFTED in self.engines else BASELINE

    @property
    def draft(self) -> DraftConfig:
        """Who drafted, as planned."""
        return self.engines[self.phase].draft

    @property
    def compares(self) -> bool:
        """Whether both phases were measured."""
        return len(self.engines) == 2

    def rows(self) -> "list[PromptRow]":
        """One row per prompt that was answered, in the order of the file."""
        by_item: dict[PromptItem, list[Measured]] = {}
        for run in self.runs:
            by_item.setdefault(run.item, []).append(run)
        return [PromptRow(item, runs) for item, runs in by_item.items()]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """All answers to one prompt."""

    item: PromptItem
    runs: Sequence[Measured]

    def of(self, phase: str) -> list[Measured]:
        """Its answers of one phase."""
        return [run for run in self.runs if run.phase == phase]

    def tokens_per_s(self, phase: str) -> float | None:
        """Median over the rounds; None where an answer has one token."""
        rates = [r.timings.tokens_per_s for r in self.of(phase)]
        known = [rate for rate in rates if rate is not None]
        return median(known) if known else None

    @property
    def ratio(self) -> float | None:
        """Decode tokens/s with drafting over those without."""
        drafted, plain = self.tokens_per_s(DRAFTED), self.tokens_per_s(BASELINE)
        return drafted / plain if drafted is not None and plain else None

    @property
    def first_difference(self) -> int | None:
        """Where the answers of the first round differ, as a token's index; None if they do not."""
        drafted, plain = self.of(DRAFTED)[:1], self.of(BASELINE)[:1]
        if not drafted or not plain:
            return None
        ours, theirs = drafted[0].token_ids, plain[0].token_ids
        if ours == theirs:
            return None
        pairs = enumerate(zip(ours, theirs, strict=False))
        shorter = min(len(ours), len(theirs))
        return next((i for i, (one, other) in pairs if one != other), shorter)

    @property
    def compared(self) -> bool:
        """Whether it was answered in both phases."""
        return bool(self.of(DRAFTED)) and bool(self.of(BASELINE))


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Some prompts together.

    Attributes:
        tokens: emitted, all rounds together.
        tokens_per_pass: emitted tokens / target passes, first tokens and prompts' passes left out;
            None if no pass is left.
        acceptance_rate: accepted / drafted tokens.
        tokens_per_s: mean over prompts, in decoding.
        tokens_per_s_spread: standard deviation over prompts.
        baseline_tokens_per_s: the mean without drafting.
        ratio: median over prompts.
        same: prompts whose answer is the same without drafting.
        compared: prompts that were answered with and without.
    """

    category: str
    prompts: int
    tokens: int
    tokens_per_pass: float | None
    acceptance_rate: float | None
    tokens_per_s: float | None
    tokens_per_s_spread: float | None
    baseline_tokens_per_s: float | None
    ratio: float | None
    same: int
    compared: int


def summaries(report: BenchReport) -> list[Summary]:
    """One summary per category in the order of the file, then one of all."""
    rows = [row for row in report.rows() if row.of(report.phase)]
    groups: dict[str, list[PromptRow]] = {}
    for row in rows:
        groups.setdefault(row.item.category, []).append(row)
    made = [_summary(category, group, report) for category, group in groups.items()]
    return [*made, _summary(_TOTAL, rows, report)]


def _summary(category: str, rows: Sequence[PromptRow], report: BenchReport) -> Summary:
    runs = [run for row in rows for run in row.of(report.phase)]
    drafted = sum(run.speculation.drafted for run in runs)
    accepted = sum(run.speculation.accepted for run in runs)
    steps = sum(max(0, run.speculation.passes - 1) for run in runs)
    later = sum(max(0, len(run.token_ids) - 1) for run in runs)
    rates = _known([row.tokens_per_s(report.phase) for row in rows])
    plain = _known([row.tokens_per_s(BASELINE) for row in rows])
    ratios = _known([row.ratio for row in rows])
    compared = [row for row in rows if row.compared]
    return Summary(
        category=category,
        prompts=len(rows),
        tokens=sum(len(run.token_ids) for run in runs),
        tokens_per_pass=later / steps if steps else None,
        acceptance_rate=accepted / drafted if drafted else None,
        tokens_per_s=mean(rates) if rates else None,
        tokens_per_s_spread=stdev(rates) if len(rates) > 1 else None,
        baseline_tokens_per_s=mean(plain) if plain and report.compares else None,
        ratio=median(ratios) if ratios else None,
        same=sum(row.first_difference is None for row in compared),
        compared=len(compared),
    )


def _known(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]
