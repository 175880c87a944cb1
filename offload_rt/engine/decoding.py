"""Answers in the making: draft, verify with one pass over the target, commit.

    run = Run.start(engine, prompts, sampling, generation)
    run.prefill()
    while run.active:
        run.step()

Plain decoding is the same loop with an empty draft. Each call returns the tokens it emitted;
whoever reads them may end a sequence (`finish`), as a stop string does.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from offload_rt.config import AcceptRule, GenerationConfig, SamplingConfig
from offload_rt.engine.counts import DraftCounts, Drafted
from offload_rt.engine.diagnosis import no_token
from offload_rt.engine.engine import Engine
from offload_rt.engine.sequence import (
    Emitted,
    FinishReason,
    Request,
    SequenceState,
    TokenLogprob,
    Unchecked,
)
from offload_rt.engine.tracing import PASSES
from offload_rt.errors import CapacityError, ConfigError
from offload_rt.planning.controller import Controller
from offload_rt.planning.levels import Took
from offload_rt.planning.yields import Outcome
from offload_rt.report import (
    Counters,
    ExpertUse,
    RunReport,
    Speculation,
    Timings,
    Transfer,
    overlap_ratio,
)
from offload_rt.runner.tree import TokenTree
from offload_rt.sampling import Dice, make_generator
from offload_rt.speculative.base import Draft, Verdict
from offload_rt.speculative.deciding import Checked, decide
from offload_rt.speculative.kinds import kind_of
from offload_rt.speculative.together import Asked, propose_all
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
    """

    engine: Engine
    sequences: list[SequenceState]
    accept: AcceptRule
    drafter: str
    passes: int = 0
    drafts: bool = True
    counts: DraftCounts = field(init=False)
    _start: Counters = field(init=False)
    _first: Counters | None = None
    _last: Counters = field(init=False)

    def __post_init__(self) -> None:
        self._start = self._last = self.engine.counters()
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
            check_prompt(engine, ids, capacity)
        seeds = seeds or sampling.seeds(len(prompts))
        sequences = [
            new_sequence(
                engine,
                Request(
                    ids=ids,
                    sampling=sampling,
                    seed=seeds[i],
                    max_tokens=min(generation.max_tokens, capacities[i] - len(ids)),
                    end_tokens=frozenset() if generation.ignore_eos else end_tokens,
                ),
            )
            for i, ids in enumerate(prompts)
        ]
        for index, sequence in enumerate(sequences):
            seat(engine, sequence, index)
        return cls(engine, sequences, engine.draft.accept, engine.draft.kind)

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
        self._start = self.engine.counters()
        reading = []
        for sequence in self.sequences:
            common = self.engine.cached_tokens(sequence.index, sequence.ids)
            self.engine.truncate(sequence.index, common)
            reading.append((sequence, len(sequence.ids) - common))
        return self._or_raise(self.sweep(reading, ()))

    def step(self) -> list[Emitted]:
        """Draft for all active sequences, check the drafts in one pass, emit what is accepted."""
        return self._or_raise(self.sweep((), self.active))

    def sweep(
        self, reading: Sequence[tuple[SequenceState, int]], writing: Sequence[SequenceState]
    ) -> list[Emitted]:
        """Make one pass: some sequences read more of their prompts, others go on writing.

        One that fails ends with its `error`, and one that is `leaving` when the pass is over ends,
        too; the others go on as if it had not been there.

        Args:
            reading: sequences, and how many tokens they read; one that comes to the end of its
                prompt emits its first token.
            writing: sequences with a last token that was not fed yet.

        Returns:
            What those gained that the pass decided about.
        """
        controller = self.engine.controller if self.drafts else None
        most = self.engine.draft.nodes
        if controller is not None:
            most = controller.nodes_for(len(writing))
        came = [self._unread(s) for s in writing if len(s.emitted) == 1]
        if controller is not None:
            self._watch(controller, writing, most)
        unread = sum(self._unread(s) for s in writing)
        start = time.perf_counter()
        drafted = self._proposed(writing, most if self.drafts else 0)
        drafted_at, stalled_s = time.perf_counter(), self.engine.stalled_s
        texts = [(s, self._next_part(s, count)) for s, count in reading]
        rows = sum(1 + len(one.draft.tree) for one in drafted)
        self.engine.announce(0 if texts else rows)
        with self.engine.traced(PASSES, _label(texts, drafted)):
            read, checked = self.engine.sweep(
                [(s.index, part) for s, part in texts],
                [(one.sequence.index, one.sequence.ids[-1], one.draft.tree) for one in drafted],
                whole=[s.index for s, _ in texts if s.request.scores],
            )
            left = {s for s in (*(s for s, _ in texts), *writing) if s.leaving}
            for sequence in left:
                self.engine.truncate(sequence.index, self.engine.kept_tokens(sequence.index))
                sequence.finish(FinishReason.ABORT)
            deciding = [
                _Step(s, logits[-1:])
                for (s, part), logits in zip(texts, read, strict=True)
                if s not in left and self._took_in(s, part, logits)
            ]
            for one, logits in zip(drafted, checked, strict=True):
                one.logits = logits
            deciding += [one for one in drafted if one.sequence not in left]
            self._decide(deciding)
        outcomes = self._count(drafted, most)
        if not texts:
            pass_s = self._last.at_s - drafted_at
            self.engine.foresight.observe(rows, pass_s)
            waited_s = min(pass_s, self._last.stalled_s - stalled_s)
            each = -(-rows // len(drafted))  # on average: rows are what takes time
            self.engine.pace.add(Took(len(drafted), each, pass_s, waited_s))
        if controller is not None and outcomes:
            controller.observe(
                most,
                outcomes,
                draft_s=drafted_at - start,
                pass_s=None if texts else self._last.at_s - drafted_at,
                rows=rows,
                running=len(drafted),
                unread=unread,
                came=came,
            )
        return self._emit([one.sequence for one in deciding], [one.gained for one in deciding])

    def _or_raise(self, emitted: list[Emitted]) -> list[Emitted]:
        """Let the first answer that failed be the failure of all; it is named if there are several.

        Raises:
            NumbersError: the model's numbers are NaN or infinite.
        """
        for place, sequence in enumerate(self.sequences):
            if (error := sequence.error) is not None:
                if len(self.sequences) == 1:
                    raise error
                raise type(error)(f"answer {place + 1} of {len(self.sequences)}: {error}")
        return emitted

    def _proposed(self, writing: Sequence[SequenceState], most: int) -> "list[_Step]":
        """Ask the drafters."""
        steps, asked = [], []
        for sequence in writing:
            own = sequence.request.draft_tokens
            nodes = most if own is None else min(most, own)
            step = _Step(sequence, nodes=nodes)
            steps.append(step)
            drafter, depth = sequence.drafter, sequence.remaining - 1
            if drafter is not None and depth > 0 and nodes:
                asked.append((sequence, Asked(drafter, sequence.ids, depth, nodes)))
        made = self._made(asked)
        for step in steps:
            step.draft = made.get(step.sequence, step.draft)
        return steps

    def _made(self, asked: Sequence[tuple[SequenceState, Asked]]) -> dict[SequenceState, Draft]:
        """Drafts of those asked for, timed and counted.

        A drafter that fails is not asked again, and decoding goes on without it.
        """
        found: dict[SequenceState, Draft] = {}
        if not asked:
            return found
        start, crossed = time.perf_counter(), self.engine.link_bytes()
        try:
            with self.engine.traced(Lane.DRAFTING, asked[0][1].drafter.name):
                made = propose_all([one for _, one in asked])
        finally:
            self.counts.draft_s += time.perf_counter() - start
            self.counts.draft_link_bytes += self.engine.link_bytes() - crossed
        for (sequence, one), draft in zip(asked, made, strict=True):
            if isinstance(draft, Draft):
                sequence.drafter_knows = len(sequence.ids)
                found[sequence] = draft
                continue
            sequence.drafter, name = None, one.drafter.name
            _log.warning("the %s drafter failed (%s): decoding goes on without it", name, draft)
        return found

    def _watch(
        self, controller: Controller, writing: Sequence[SequenceState], checked: int
    ) -> None:
        """Compare what would be drafted, if more were checked, with the tokens that come.

        Where that is found in memory it costs no pass, and a text for which more drafting would pay
        is noticed at once.
        """
        if not kind_of(self.engine.draft.kind).looks_up:
            return
        nodes, asked = controller.watched_size(checked, len(writing)), []
        for sequence in writing:
            if (held := sequence.unchecked) is not None:
                if (outcome := held.outcome(sequence.ids)) is None:
                    continue
                controller.watched(held.nodes, outcome)
                self.counts.history.add(held.nodes, outcome)
            sequence.unchecked = None
            drafter, room = sequence.drafter, sequence.remaining - 1
            if drafter is None or sequence.request.draft_tokens == 0 or not 0 < nodes <= room:
                continue
            asked.append((sequence, Asked(drafter, sequence.ids, room, nodes)))
        for sequence, draft in self._made(asked).items():
            sequence.unchecked = Unchecked(nodes, len(sequence.ids), draft)

    def _unread(self, sequence: SequenceState) -> int:
        """Tokens of a sequence that its drafter would read before it drafts."""
        if sequence.drafter is None or sequence.request.draft_tokens == 0:
            return 0
        if sequence.remaining < 2:
            return 0  # nobody is asked for a draft that has no room
        return min(sequence.unread, self.engine.draft.window_tokens or len(sequence.ids))

    def _next_part(self, sequence: SequenceState, count: int) -> list[int]:
        """The next tokens of its prompt."""
        first = self.engine.kept_tokens(sequence.index)
        return sequence.ids[first : first + count]

    def _took_in(self, sequence: SequenceState, part: list[int], logits: torch.Tensor) -> bool:
        """Keep rows of a prompt; returns whether its first token is to be decided."""
        first = self.engine.kept_tokens(sequence.index)
        self.engine.commit(sequence.index, part, range(len(part)))
        if sequence.request.scores:
            following = sequence.ids[first + 1 : sequence.prompt_tokens][: len(part)]
            top = sequence.top_logprobs or 0
            found = _logprobs(logits[: len(following)], following, top)
            sequence.prompt_logprobs += found
            if not all(math.isfinite(one.logprob) for one in found):
                sequence.fail(no_token(self.engine, sequence.index, sequence.ids))
        if first + len(part) < len(sequence.ids) or sequence.finish_reason is not None:
            return False
        if not sequence.max_tokens:
            sequence.finish(FinishReason.LENGTH)
        return bool(sequence.max_tokens)

    def _decide(self, steps: "Sequence[_Step]") -> None:
        """Decide about all steps; in one more pass about those whose drafts spoilt them.

        A draft may hold a token after which a number format overflows although the answer never
        comes to it, and NaN reaches rows before it: masked is multiplied by zero.
        """
        if steps:
            self._judge(steps)
        else:  # or the host would run ahead of the device
            self.engine.device.compute.record().synchronize()
        again = [one for one in steps if one.verdict is None and len(one.draft.tree)]
        if again:
            _log.warning(
                "a draft led to NaN or infinite numbers: its pass is made again without it"
            )
            for one in again:
                self.engine.truncate(one.sequence.index, len(one.sequence.ids) - 1)
                one.draft = Draft()
            rows = [(one.sequence.index, one.sequence.ids[-1], TokenTree()) for one in again]
            for one, logits in zip(again, self.engine.check(rows), strict=True):
                one.logits = logits
            self._judge(again)
        for one in steps:
            if one.verdict is None:
                one.sequence.fail(no_token(self.engine, one.sequence.index, one.sequence.ids))
        self.passes += 1

    def _judge(self, steps: "Sequence[_Step]") -> None:
        """Decide with one host sync, commit what is accepted, and let drafters learn from it."""
        checked = [
            Checked(s.ids, one.draft, one.logits, s.dice, s.sampling, s.drafter)
            for one in steps
            for s in (one.sequence,)
        ]
        verdicts = decide(checked, self.engine.device, self.accept)
        self._last = self.engine.counters()
        self._first = self._first or self._last
        for one, verdict in zip(steps, verdicts, strict=True):
            one.verdict = verdict
            if verdict is None:
                continue
            sequence = one.sequence
            if sequence.top_logprobs is not None:
                kept = one.logits[verdict.rows]
                sequence.logprobs += _logprobs(kept, one.gained, sequence.top_logprobs)
            if one.nodes is None:
                continue  # the prompt's rows are kept already
            self.engine.commit(sequence.index, [sequence.ids[-1], *one.path], verdict.rows)
            if sequence.drafter is not None:
                sequence.drafter.observe(one.draft, verdict)

    def _count(self, drafted: "Sequence[_Step]", most: int) -> list[Outcome]:
        """Count what became of drafts; returns what tells of drafts of `most` nodes."""
        known: dict[int, list[Drafted]] = {}
        for one in drafted:
            if one.verdict is not None and one.nodes is not None:
                room = one.sequence.remaining - 1
                known.setdefault(one.nodes, []).append(Drafted(one.draft, one.verdict, room))
                one.sequence.drafted += len(one.draft.tree)
                one.sequence.accepted += len(one.verdict.path)
                one.sequence.drafter_knows += len(one.verdict.path)
        counted = {nodes: self.counts.add(nodes, some) for nodes, some in known.items()}
        return counted.get(most if self.drafts else 0, [])

    def _emit(
        self, sequences: Sequence[SequenceState], tokens: Sequence[Sequence[int]]
    ) -> list[Emitted]:
        """Append tokens to their sequences, up to whatever ends them."""
        emitted = []
        for sequence, new in zip(sequences, tokens, strict=True):
            gained: list[int] = []
            for token in new:
                gained.append(token)
                if token in sequence.request.end_tokens:
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
        start = self._start
        first = self._first or self.engine.counters()  # cut off in the prompt
        last = self._last if self._first is not None else first
        whole, prefill, decode = last.since(start), first.since(start), last.since(first)
        later = self._later
        passes, timed = (self.passes - 1, decode) if self.passes > 1 else (self.passes, prefill)
        per_pass = self.engine.bytes_per_pass
        if self.engine.placement.expert_slots:  # what comes depends on the tokens
            per_pass = _asked_bytes(timed) // max(1, passes)
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
                bytes_per_pass=per_pass,
                achieved_bytes_per_s=passes * per_pass / timed.at_s if timed.at_s else 0.0,
                link_bytes_per_s=whole.bytes_copied / whole.busy_s if whole.busy_s else 0.0,
                stall_s=whole.stalled_s,
                overlap_ratio=overlap_ratio(whole),
            ),
            memory=self.engine.memory(),
            dequantising=self.engine.network.dequantising,
            experts=self._experts(prefill, decode),
            exact=self.engine.exact,
        )

    def _experts(self, prefill: Counters, decode: Counters) -> ExpertUse | None:
        placement = self.engine.placement
        facts, slots = placement.demand.experts, placement.expert_slots
        if facts is None or not slots:
            return None
        pool = self.engine.runner.experts
        assert pool is not None  # there are slots
        asked = decode.expert_hits + decode.expert_misses
        copied_bytes = _asked_bytes(decode)
        return ExpertUse(
            slots=slots,
            slot_bytes=facts.slot_bytes,
            experts=facts.count,
            per_token=facts.per_token,
            hits=decode.expert_hits,
            misses=decode.expert_misses,
            ahead=decode.expert_ahead,
            on_host=decode.expert_on_host,
            unused=decode.expert_unused,
            unused_bytes=decode.expert_unused_bytes,
            filled=prefill.expert_filled + decode.expert_filled,
            filled_bytes=pool.filled_bytes,
            host_bytes=decode.expert_host_bytes,
            file_bytes=decode.expert_file_bytes,
            looked_ahead=self.engine.foresight.share,
            hit_rate=decode.expert_hits / asked if asked else None,
            union=asked / decode.expert_calls if decode.expert_calls else None,
            bytes_per_token=copied_bytes / self._later if self._later else None,
            prompt_misses=prefill.expert_misses,
            prompt_asked=prefill.expert_hits + prefill.expert_misses,
            prompt_ahead=prefill.expert_ahead,
            prompt_unused=prefill.expert_unused,
            distances=tuple(pool.counts.distances.get(0, ())),
        )

    @property
    def _later(self) -> int:
        """Tokens emitted by the passes after the prompts'."""
        return max(0, sum(len(s.emitted) for s in self.sequences) - len(self.sequences))

    def _speculation(self, decode_s: float) -> Speculation:
        rule = self.accept
        if all(s.sampling.greedy for s in self.sequences) and rule is AcceptRule.LOSSLESS:
            rule = AcceptRule.GREEDY
        found = self.counts.speculation(
            self.drafter,
            rule,
            passes=self.passes,
            later_tokens=self._later,
            decode_s=decode_s,
            below=[c for s in self.sequences if (c := s.retrieval) is not None],
        )
        return replace(found, draft_sizes=self.engine.draft_sizes if self.drafts else {})


@dataclass(eq=False, slots=True)
class _Step:
    """What a sequence takes part in a pass with, and what is decided.

    Attributes:
        logits: [N + 1, V] after the root and after each node; of a prompt [1, V] after its end.
        nodes: asked of its drafter; None at the end of a prompt.
    """

    sequence: SequenceState
    logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    nodes: int | None = None
    draft: Draft = field(default_factory=Draft)
    verdict: Verdict | None = None

    @property
    def path(self) -> list[int]:
        """Drafted tokens that are accepted."""
        found = () if self.verdict is None else self.verdict.path
        return [self.draft.tree.tokens[node] for node in found]

    @property
    def gained(self) -> list[int]:
        """All tokens that follow from the pass."""
        return [] if self.verdict is None else [*self.path, self.verdict.token]


def check_prompt(engine: Engine, ids: Sequence[int], capacity: int) -> None:
    """Refuse a prompt that cannot be answered.

    Raises:
        CapacityError: it is longer than its KV cache.
        ConfigError: it is empty, or the embedding has no row for a token of it.
    """
    if not ids:
        raise ConfigError("a prompt is empty: give at least one token")
    engine.checkpoint.require_rows(ids)
    if len(ids) >= capacity:
        raise CapacityError(
            f"the prompt has {len(ids)} tokens, the KV cache has room for {capacity} with the "
            "answer: raise --context or shorten the prompt"
        )


def new_sequence(engine: Engine, request: Request) -> SequenceState:
    """A sequence that has no cache yet."""
    device = engine.device.torch_device
    return SequenceState(
        index=-1,
        request=request,
        ids=list(request.ids),
        max_tokens=request.max_tokens,
        dice=Dice(make_generator(request.seed, device), device),
        top_logprobs=request.logprobs,
    )


def seat(engine: Engine, sequence: SequenceState, index: int) -> None:
    """Give a sequence a cache, and a drafter for it."""
    sequence.index = index
    sequence.drafter = engine.drafter(index, sequence.sampling, sequence.dice.generator)
    sequence.retrieval = engine.retrieval_counts(index)


def _label(texts: Sequence[object], drafted: Sequence[_Step]) -> str:
    """What a pass is called in a trace."""
    if not drafted:
        return "prompt"
    size = sum(len(one.draft.tree) for one in drafted)
    return f"pass, {size} drafted" + (f", {len(texts)} prompts" if texts else "")


_TOLD_ROWS = 32  # whose log-probabilities are in memory at once; within a plan's workspace


def _logprobs(logits: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of tokens after rows [R, V], in fp32; and of the `top` likeliest ones."""
    found: list[TokenLogprob] = []
    for start in range(0, len(tokens), _TOLD_ROWS):
        told = tokens[start : start + _TOLD_ROWS]
        rows = logits[start : start + len(told)].float().log_softmax(-1)
        own = rows[range(len(told)), told]
        best = rows.topk(min(top, rows.shape[-1]), dim=-1)
        ids, values = best.indices.tolist(), best.values.tolist()  # host sync
        for token, logprob, *likeliest in zip(told, own.tolist(), ids, values, strict=True):
            found.append(TokenLogprob(token, logprob, tuple(zip(*likeliest, strict=True))))
    return found


def _asked_bytes(counters: Counters) -> int:
    """Copied bytes without those of filling slots, which count from when a step of it begins."""
    return max(0, counters.bytes_copied - counters.expert_filled_bytes)
