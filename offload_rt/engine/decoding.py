"""Answers in the making: draft, verify with one pass over the target, commit.

    run = Run.start(engine, prompts, sampling, generation)
    run.prefill()
    while run.active:
        run.step()

Plain decoding is the same loop with an empty draft. Each call returns the tokens it emitted;
whoever reads them may end a sequence (`finish`), as a stop string does.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from offload_rt.config import AcceptRule, GenerationConfig, SamplingConfig
from offload_rt.engine.counts import DraftCounts, Drafted
from offload_rt.engine.diagnosis import no_token
from offload_rt.engine.engine import Engine
from offload_rt.engine.sequence import Emitted, FinishReason, SequenceState
from offload_rt.engine.tracing import PASSES
from offload_rt.errors import CapacityError, ConfigError, NumbersError
from offload_rt.report import (
    Counters,
    RunReport,
    Speculation,
    Timings,
    Transfer,
    overlap_ratio,
)
from offload_rt.sampling import Dice, make_generator
from offload_rt.speculative.base import Draft, Verdict
from offload_rt.speculative.deciding import Checked, decide
from offload_rt.trace import Lane

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Run:
    """Answers in the making.

    Attributes:
        accept: when a drafted token is accepted.
        drafter: what the report calls whoever drafts.
        passes: target passes so far, the prompt's included.
        drafts: whether anybody drafts.
        logprobs: whether sequences keep the log-probabilities of their tokens.
    """

    engine: Engine
    sequences: list[SequenceState]
    sampling: SamplingConfig
    end_tokens: frozenset[int]
    accept: AcceptRule
    drafter: str
    passes: int = 0
    drafts: bool = True
    logprobs: bool = False
    counts: DraftCounts = field(init=False)
    _marks: list[Counters] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._marks = [self.engine.counters()]
        self.counts = DraftCounts(self.engine.tally)

    @classmethod
    def start(
        cls,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        generation: GenerationConfig,
        end_tokens: frozenset[int] = frozenset(),
        seeds: Sequence[int] | None = None,
    ) -> "Run":
        """Begin to answer prompts, all at once.

        Args:
            engine: makes the passes; rows its caches have of a prompt are not computed again.
            prompts: token ids, one list per sequence.
            sampling: how tokens are drawn; its seed must be set unless it is greedy.
            generation: when answers end.
            end_tokens: tokens that end an answer.
            seeds: of each answer; None: that of `sampling`, and one more for each.

        Raises:
            CapacityError: a prompt is longer than its KV cache.
            ConfigError: a prompt is empty, or the embedding has no row for a token of it.
        """
        capacities = engine.capacities
        if len(prompts) > len(capacities):
            raise CapacityError(f"{len(prompts)} prompts, room for {len(capacities)} sequences")
        for ids, capacity in zip(prompts, capacities, strict=False):
            if not ids:
                raise ConfigError("a prompt is empty: give at least one token")
            engine.checkpoint.require_rows(ids)
            if len(ids) >= capacity:
                raise CapacityError(
                    f"the prompt has {len(ids)} tokens, the KV cache has room for "
                    f"{capacity} with the answer: raise --context or shorten the prompt"
                )
        device = engine.device.torch_device
        seeds = seeds or [(sampling.seed or 0) + i for i in range(len(prompts))]
        sequences = [
            SequenceState(
                index=i,
                ids=list(ids),
                prompt_tokens=len(ids),
                max_tokens=min(generation.max_tokens, capacities[i] - len(ids)),
                dice=Dice(make_generator(seeds[i], device), device),
            )
            for i, ids in enumerate(prompts)
        ]
        for sequence in sequences:
            sequence.drafter = engine.drafter(sequence.index, sampling, sequence.dice.generator)
            sequence.retrieval = engine.retrieval_counts(sequence.index)
        ends = frozenset() if generation.ignore_eos else end_tokens
        return cls(engine, sequences, sampling, ends, engine.draft.accept, engine.draft.kind)

    @property
    def active(self) -> list[SequenceState]:
        """Sequences that have not ended."""
        return [s for s in self.sequences if s.finish_reason is None]

    def leave_out_drafts(self) -> None:
        """Decode token by token, whoever could draft."""
        self.drafts, self.drafter = False, "none"
        for sequence in self.sequences:
            sequence.drafter = sequence.retrieval = None

    def prefill(self) -> list[Emitted]:
        """Take the prompts through the model in one pass and emit the first tokens."""
        self._marks = [self.engine.counters()]
        try:
            with self.engine.traced(PASSES, "prompt"):
                logits = self.engine.forward([(s.index, s.ids) for s in self.sequences], reuse=True)
                rows = list(logits.split(1))
                verdicts = self._verify(self.sequences, [Draft()] * len(rows), rows)
        except NumbersError as error:
            raise self._explained(self.sequences[error.place]) from error
        return self._emit(self.sequences, [[verdict.token] for verdict in verdicts])

    def step(self) -> list[Emitted]:
        """Draft for all active sequences, check the drafts in one pass, emit what is accepted."""
        active, controller = self.active, self.engine.controller if self.drafts else None
        nodes = self.engine.draft.nodes if controller is None else controller.nodes
        nodes = nodes if self.drafts else 0
        start = time.perf_counter()
        drafts = [self._propose(sequence, nodes) for sequence in active]
        drafted_at = time.perf_counter()
        size = sum(len(draft.tree) for draft in drafts)
        with self.engine.traced(PASSES, f"pass, {size} drafted"):
            drafts, verdicts = self._check(active, drafts)
        emitted, drafted = [], []
        for sequence, draft, verdict in zip(active, drafts, verdicts, strict=True):
            path = [draft.tree.tokens[node] for node in verdict.path]
            self.engine.commit(sequence.index, [sequence.ids[-1], *path], verdict.rows)
            drafted.append(Drafted(draft, verdict, sequence.remaining - 1))
            if sequence.drafter is not None:
                sequence.drafter.observe(draft, verdict)
            emitted.append([*path, verdict.token])
        outcomes = self.counts.add(nodes, drafted)
        rows = max(len(draft.tree) for draft in drafts)
        pass_s = self._marks[-1].at_s - drafted_at
        if (expected_s := self.engine.plan.expected_pass_s(rows)) is not None:
            self.engine.pace.add(pass_s, expected_s)
        if controller is not None and outcomes:
            controller.observe(nodes, outcomes, draft_s=drafted_at - start, pass_s=pass_s)
        return self._emit(active, emitted)

    def _propose(self, sequence: SequenceState, nodes: int) -> Draft:
        """Ask the drafter; one that fails is not asked again, and decoding goes on without it."""
        if sequence.drafter is None or sequence.remaining <= 1 or not nodes:
            return Draft()
        start, crossed = time.perf_counter(), self.engine.link_bytes()
        try:
            with self.engine.traced(Lane.DRAFTING, sequence.drafter.name):
                return sequence.drafter.propose(sequence.ids, sequence.remaining - 1, nodes)
        except Exception as error:  # noqa: BLE001 - a drafter must never cost the answer
            name, sequence.drafter = sequence.drafter.name, None
            _log.warning("the %s drafter failed (%s): decoding goes on without it", name, error)
            return Draft()
        finally:
            self.counts.draft_s += time.perf_counter() - start
            self.counts.draft_link_bytes += self.engine.link_bytes() - crossed

    def _check(
        self, sequences: Sequence[SequenceState], drafts: list[Draft]
    ) -> tuple[list[Draft], list[Verdict]]:
        """Check drafts in one pass; in one more without any if they spoil it.

        A draft may hold a token after which a number format overflows although the answer never
        comes to it, and NaN reaches rows before it: masked is multiplied by zero.

        Returns:
            The drafts that were checked, and what became of them.

        Raises:
            NumbersError: the model's numbers are NaN or infinite.
        """
        rows = zip(sequences, drafts, strict=True)
        logits = self.engine.check([(s.index, s.ids[-1], draft.tree) for s, draft in rows])
        try:
            return drafts, self._verify(sequences, drafts, logits)
        except NumbersError as error:
            if not any(len(draft.tree) for draft in drafts):
                raise self._explained(sequences[error.place]) from error
        _log.warning("a draft led to NaN or infinite numbers: its pass is made again without it")
        for sequence in sequences:
            self.engine.truncate(sequence.index, len(sequence.ids) - 1)
        return self._check(sequences, [Draft()] * len(drafts))

    def _verify(
        self,
        sequences: Sequence[SequenceState],
        drafts: Sequence[Draft],
        logits: Sequence[torch.Tensor],
    ) -> list[Verdict]:
        """Decide about all drafts, and let drafters learn from them, with one host sync."""
        checked = [
            Checked(sequence.ids, draft, rows, sequence.dice, sequence.drafter)
            for sequence, draft, rows in zip(sequences, drafts, logits, strict=True)
        ]
        verdicts = decide(checked, self.engine.device, self.sampling, self.accept)
        if self.logprobs:
            for sequence, one, verdict in zip(sequences, checked, verdicts, strict=True):
                sequence.logprobs += _logprobs(one, verdict)
        self.passes += 1
        self._marks.append(self.engine.counters())
        return verdicts

    def _explained(self, sequence: SequenceState) -> NumbersError:
        """Why a sequence has no next token; it is named if there are several."""
        error, count = no_token(self.engine, sequence.index, sequence.ids), len(self.sequences)
        if count == 1:
            return error
        return type(error)(f"answer {sequence.index + 1} of {count}: {error}")

    def _emit(
        self, sequences: Sequence[SequenceState], tokens: Sequence[Sequence[int]]
    ) -> list[Emitted]:
        """Append tokens to their sequences, up to whatever ends them."""
        emitted = []
        for sequence, new in zip(sequences, tokens, strict=True):
            gained: list[int] = []
            for token in new:
                gained.append(token)
                if token in self.end_tokens:
                    sequence.finish(FinishReason.STOP)
                elif len(gained) >= sequence.remaining:
                    sequence.finish(FinishReason.LENGTH)
                if sequence.finish_reason is not None:
                    break
            sequence.ids += gained
            emitted.append(Emitted(sequence, gained))
        return emitted

    def report(self) -> RunReport:
        """What the run measured so far."""
        start = self._marks[0]
        first = self._marks[1] if self.passes else self.engine.counters()  # cut off in the prompt
        last = self._marks[-1] if self.passes else first
        whole, prefill, decode = last.since(start), first.since(start), last.since(first)
        later = self._later
        passes, timed = (self.passes - 1, decode) if self.passes > 1 else (self.passes, prefill)
        moved = passes * self.engine.bytes_per_pass
        return RunReport(
            timings=Timings(
                load_s=self.engine.load_s,
                ttft_s=prefill.at_s if self.passes else None,
                decode_s=decode.at_s,
                s_per_token=decode.at_s / later if later > 0 else None,
                tokens_per_s=later / decode.at_s if later > 0 else None,
            ),
            speculation=self._speculation(decode.at_s),
            transfer=Transfer(
                bytes_total=whole.bytes_copied + whole.kv_bytes_copied,
                kv_bytes_total=whole.kv_bytes_copied,
                bytes_per_pass=self.engine.bytes_per_pass,
                achieved_bytes_per_s=moved / timed.at_s if timed.at_s else 0.0,
                link_bytes_per_s=whole.bytes_copied / whole.busy_s if whole.busy_s else 0.0,
                stall_s=whole.stalled_s,
                overlap_ratio=overlap_ratio(whole),
            ),
            memory=self.engine.memory(),
            dequantising=self.engine.network.dequantising,
        )

    @property
    def _later(self) -> int:
        """Tokens emitted by the passes after the prompts'."""
        return max(0, sum(len(s.emitted) for s in self.sequences) - len(self.sequences))

    def _speculation(self, decode_s: float) -> Speculation:
        rule = self.accept
        if self.sampling.greedy and rule is AcceptRule.LOSSLESS:
            rule = AcceptRule.GREEDY
        return self.counts.speculation(
            self.drafter,
            rule,
            passes=self.passes,
            later_tokens=self._later,
            decode_s=decode_s,
            below=[c for s in self.sequences if (c := s.retrieval) is not None],
        )


def _logprobs(checked: Checked, verdict: Verdict) -> list[float]:
    """Log-probabilities of the tokens a verdict brings, in fp32."""
    tree = checked.draft.tree
    tokens = [*(tree.tokens[node] for node in verdict.path), verdict.token]
    rows = checked.logits[verdict.rows].float().log_softmax(-1)
    found: list[float] = rows[range(len(tokens)), tokens].tolist()  # host sync
    return found
