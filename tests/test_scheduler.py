"""Sequences join and leave between sweeps, and what one answers does not depend on the others."""

import random
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engines import PROMPT, engine_for, generate
from hypothesis import given, settings
from hypothesis import strategies as st

from offload_rt.config import (
    DraftConfig,
    DType,
    Exact,
    GenerationConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.engine import NO_DRAFT, Engine, FinishReason, Request, Run
from offload_rt.engine.scheduler import Pace, Scheduler, shares
from offload_rt.errors import CapacityError, CheckpointError, ConfigError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.planning.controller import Controller, StepOutlook

LONGEST, SEQUENCES = 96, 4
NGRAM = DraftConfig(draft="ngram", draft_tokens=5)
DRAWN = SamplingConfig(temperature=0.9, top_p=0.95)


@contextmanager
def served(folder, *, sequences=SEQUENCES, kv_tokens=200, draft=NO_DRAFT, rows=64, **config):
    config = {
        "device": "cpu",
        "device_limit_bytes": 512 * 2**20,
        "prefill_chunk_tokens": 16,
    } | config
    with Engine(
        open_checkpoint(folder),
        RuntimeConfig(**config),
        capacities=[LONGEST] * sequences,
        prompt_tokens=rows,
        kv_tokens=kv_tokens,
        draft=draft,
    ) as engine:
        yield engine


def prompts(count, seed=0, longest=40):
    draw = random.Random(seed)
    return [[draw.randrange(300) for _ in range(draw.randrange(3, longest))] for _ in range(count)]


def finished(scheduler, most=2000):
    """Sweep until nothing is left to do; returns what ended, in that order."""
    over = []
    for _ in range(most):
        if not scheduler.busy:
            return over
        emitted = scheduler.sweep()
        over += [one.sequence for one in emitted if one.sequence.finish_reason is not None]
    raise AssertionError("it does not come to an end")


@pytest.fixture(scope="module")
def tiny(make_tiny):
    return make_tiny("llama")


@pytest.fixture(scope="module")
def alone(tiny):
    """What a prompt's answer is when nobody else is there, and nothing is left of those before."""
    known = {}
    with engine_for(tiny, prompts=[[0] * LONGEST], tokens=LONGEST) as engine:

        def answer(request):
            key = (tuple(request.ids), request.sampling, request.seed, request.max_tokens)
            if key not in known:
                engine.forget()
                options = GenerationConfig(max_tokens=request.max_tokens)
                run = Run.start(
                    engine, [request.ids], request.sampling, options, seeds=[request.seed]
                )
                run.prefill()
                while run.active:
                    run.step()
                known[key] = run.sequences[0].emitted
            return known[key]

        yield answer


def requests(count, seed=0):
    draw, found = random.Random(seed), []
    for place, ids in enumerate(prompts(count, seed)):
        sampling = draw.choice([SamplingConfig(), DRAWN, SamplingConfig(temperature=1.5, top_k=9)])
        found.append(
            Request(ids=ids, sampling=sampling, seed=place, max_tokens=draw.randrange(1, 16))
        )
    return found


HELD, STREAMED = {}, {"resident_layers": 0, "slots": 1}
WAYS = pytest.mark.parametrize(  # without drafts and held: in any memory, below
    ("draft", "streams"),
    [(NO_DRAFT, STREAMED), (NGRAM, HELD), (NGRAM, STREAMED)],
    ids=["plain-streamed", "ngram-held", "ngram-streamed"],
)


@WAYS
def test_an_answer_does_not_depend_on_who_else_is_there(tiny, alone, draft, streams):
    """14 of different kinds, of which some arrive while others are under way, and some leave."""
    asked = requests(14)
    with served(tiny, draft=draft, **streams) as engine:
        scheduler, joined = Scheduler(engine), []
        for sweep in range(400):
            if sweep % 2 == 0 and len(joined) < len(asked):
                joined.append(scheduler.join(asked[len(joined)]))
            if sweep == 9:
                scheduler.leave(joined[3])
            if not scheduler.busy:
                break
            scheduler.sweep()
        assert not scheduler.busy and len(joined) == len(asked)
    for request, sequence in zip(asked, joined, strict=True):
        expected = alone(request)
        if sequence.finish_reason is FinishReason.ABORT:
            assert sequence is joined[3]
            assert sequence.emitted == expected[: len(sequence.emitted)]
        else:
            assert sequence.finish_reason is FinishReason.LENGTH
            assert sequence.emitted == expected
    assert sum(s.finish_reason is FinishReason.ABORT for s in joined) <= 1


IN_BF16 = {"dtype": DType.BFLOAT16}


def arriving(engine, asked, *, together):
    """They come one every second sweep, one leaves; or each when the one before has ended."""
    scheduler, joined = Scheduler(engine), []
    for sweep in range(600):
        if len(joined) < len(asked) and (not sweep % 2 if together else not scheduler.busy):
            if not together:
                engine.forget()
            joined.append(scheduler.join(asked[len(joined)]))
        if together and sweep == 12:
            scheduler.leave(joined[2])
        if not scheduler.busy and len(joined) == len(asked):
            return joined
        scheduler.sweep()
    raise AssertionError("it does not come to an end")


@pytest.fixture(scope="module")
def in_bf16(tiny):
    """Requests, some of which begin alike, and what each is answered alone without drafts."""
    asked = [replace(request, logprobs=2) for request in requests(10, seed=8)]
    begun = prompts(1, seed=9, longest=40)[0] + PROMPT
    asked[2:8] = [replace(one, ids=[*begun, *one.ids[:9]]) for one in asked[2:8]]
    with served(tiny, exact=Exact.ON, **IN_BF16) as engine:
        return asked, arriving(engine, asked, together=False)


@WAYS
def test_in_bf16_too_where_passes_are_row_invariant(tiny, in_bf16, draft, streams):
    """Log-probabilities to the last bit: of who joins, leaves, and goes on with others' rows."""
    asked, expected = in_bf16
    with served(tiny, draft=draft, exact=Exact.ON, **IN_BF16, **streams) as engine:
        joined = arriving(engine, asked, together=True)
    assert sum(one.reused > 0 for one in joined) >= 3
    for one, alone in zip(joined, expected, strict=True):
        count = len(one.emitted) if one.finish_reason is FinishReason.ABORT else one.max_tokens
        assert one.emitted == alone.emitted[:count] and count > 0
        assert one.logprobs[:count] == alone.logprobs[:count]


def test_an_answer_does_not_depend_on_how_much_is_drafted_for_how_many(tiny, alone):
    """Measured times choose the size: with whom and when one runs decides what is drafted."""
    asked = [replace(r, max_tokens=16) for r in requests(40, seed=3) if r.sampling.greedy]
    assert len(asked) > 6
    sizes = [StepOutlook(nodes=n, tokens=1 + n, draft_s=0.0, pass_s=1.0) for n in (0, 1, 2, 4)]
    with served(tiny, draft=NGRAM) as engine:
        engine.controller = Controller(sizes, sequences=SEQUENCES)
        scheduler, joined, used = Scheduler(engine), [], set()
        real = engine.controller.observe

        def observe(asked, outcomes, *, running, rows, **took):
            used.add((running, asked))
            slow = 1.0 + (0.0 if running < 3 else float(rows))
            real(asked, outcomes, running=running, rows=rows, draft_s=0.0, pass_s=slow)

        engine.controller.observe = observe
        for request in asked:
            joined.append(scheduler.join(request))
            scheduler.sweep()
        finished(scheduler)
        assert engine.draft_sizes == engine.controller.chosen and len(engine.draft_sizes) > 1
    assert len({size for _, size in used}) > 1
    assert [s.emitted for s in joined] == [alone(request) for request in asked]


def test_drafting_is_timed_beside_sequences_nobody_drafts_for(tiny):
    """One failed, one answer asks for none, one has no room: others' drafts have their time."""
    took = []
    with served(tiny, draft=NGRAM) as engine:
        sizes = [StepOutlook(nodes=n, tokens=1 + n, draft_s=0.0, pass_s=1.0) for n in (0, 4)]
        engine.controller = Controller(sizes, 4, sequences=SEQUENCES)
        engine.controller.observe = lambda *_, **times: took.append(times)
        scheduler = Scheduler(engine)
        asked = Request(ids=PROMPT, max_tokens=30)
        others = replace(asked, draft_tokens=0), replace(asked, max_tokens=2), asked
        failed, *_ = map(scheduler.join, (asked, *others))
        while not took:
            scheduler.sweep()
            failed.drafter = None
        for _ in range(3):
            scheduler.sweep()
    assert all(times["draft_s"] > 0.0 for times in took)
    came = [tokens for times in took for tokens in times["came"]]
    assert sorted(came) == [0, 0, 0, len(PROMPT)]  # one drafter reads
    assert [times["unread"] for times in took] == [sum(times["came"]) for times in took]


def test_drafters_read_a_prompt_once_and_what_was_written_while_nobody_drafted(tiny):
    """What is read first is told beside its time, of passes too in which others read prompts."""
    took = []
    with served(tiny, draft=NGRAM) as engine:
        sizes = [StepOutlook(nodes=n, tokens=1 + n, draft_s=0.0, pass_s=1.0) for n in (0, 4)]
        engine.controller = Controller(sizes, 4, sequences=SEQUENCES)
        engine.controller.watched_size = lambda *_: 0  # whoever is watched reads all the time
        engine.controller.nodes_for = lambda running: 4 * (len(took) not in (1, 2, 3))
        engine.controller.observe = lambda asked, _, **times: took.append((asked, times))
        scheduler = Scheduler(engine)
        scheduler.join(Request(ids=PROMPT, max_tokens=40))
        while len(took) < 7:
            scheduler.sweep()
        scheduler.join(Request(ids=PROMPT[::-1], max_tokens=40))
        while not took[-1][1]["came"]:
            scheduler.sweep()
    told = [(asked, times["unread"], times["came"]) for asked, times in took]
    assert told[0] == (4, len(PROMPT), [len(PROMPT)])
    assert [asked for asked, _, _ in told[1:5]] == [0, 0, 0, 4]
    assert told[4][1] == 3  # drafted tokens that were not accepted are none it knows
    assert not any(came for _, _, came in told[1:5])
    assert told[-1] == (4, len(PROMPT), [len(PROMPT)])
    own = [times["pass_s"] is None for _, times in took]
    assert not any(own[:7]) and all(own[7:-1]) and not own[-1]


@contextmanager
def watching(folder, took):
    """An engine whose drafts nobody checks, and a sequence that joined it."""
    with served(folder, draft=NGRAM) as engine:
        sizes = [StepOutlook(nodes=n, tokens=1 + n, draft_s=0.0, pass_s=1.0) for n in (0, 4)]
        engine.controller = Controller(sizes, 0, sequences=SEQUENCES)
        engine.controller.nodes_for = lambda running: 0
        engine.controller.observe = lambda *_, **times: took.append(times)
        scheduler = Scheduler(engine)
        yield scheduler, scheduler.join(Request(ids=PROMPT, max_tokens=40))


def test_what_is_read_for_a_draft_nobody_checks_is_told_once_and_timed(tiny):
    took = []
    with watching(tiny, took) as (scheduler, _):
        while len(took) < 3:
            scheduler.sweep()
        assert scheduler.run.counts.draft_s > 0.0
    assert [times["came"] for times in took] == [[len(PROMPT)], [], []]
    assert took[0]["unread"] == 0


def test_a_drafter_that_fails_where_nobody_checks_is_left_out_with_a_word(tiny, caplog):
    took, asked = [], []
    with watching(tiny, took) as (scheduler, sequence):
        while not sequence.emitted:
            scheduler.sweep()
        sequence.drafter.propose = lambda *given: asked.append(given) or 1 / 0
        while len(took) < 3:
            scheduler.sweep()
        assert sequence.drafter is None
    assert len(asked) == 1 and caplog.text.count("goes on without it") == 1


@pytest.mark.parametrize("kv_tokens", [LONGEST, 150, 400])
def test_all_come_to_an_answer_in_any_memory(tiny, alone, kv_tokens):
    asked = requests(12, seed=4)
    with served(tiny, kv_tokens=kv_tokens) as engine:
        scheduler = Scheduler(engine)
        joined = [scheduler.join(request) for request in asked]
        most = 0
        while scheduler.busy:
            scheduler.sweep()
            used = sum(len(s.ids) for s in scheduler.running)
            most = max(most, len(scheduler.running))
            assert used <= kv_tokens
    assert [s.emitted for s in joined] == [alone(request) for request in asked]
    assert most == SEQUENCES or kv_tokens < 400


def test_what_can_never_fit_is_refused_and_the_rest_waits(tiny):
    with served(tiny, kv_tokens=110) as engine:
        scheduler = Scheduler(engine)
        with pytest.raises(
            CapacityError, match=r"40 tokens, its answer may have 57: 97 together, .* 96"
        ):
            scheduler.join(Request(ids=[1] * 40, max_tokens=57))
        with pytest.raises(CapacityError, match="prompt has 96 tokens, .* room for 96"):
            scheduler.join(Request(ids=[1] * 96, max_tokens=1))
        with pytest.raises(ConfigError, match="empty"):
            scheduler.join(Request(ids=[], max_tokens=1))
        with pytest.raises((ConfigError, CheckpointError), match="300"):
            scheduler.join(Request(ids=[300], max_tokens=1))
        assert not scheduler.busy
        first = scheduler.join(Request(ids=[1] * 40, max_tokens=40))
        second = scheduler.join(Request(ids=[2] * 30, max_tokens=10))
        scheduler.sweep()
        assert list(scheduler.running) == [first] and list(scheduler.waiting) == [second]
        assert [s for s in finished(scheduler)] == [first, second]


def test_the_first_of_the_queue_is_not_overtaken(tiny):
    """A large one waits for memory; small ones that would fit arrive all the time."""
    with served(tiny, kv_tokens=110) as engine:
        scheduler, admitted = Scheduler(engine), []
        small = [scheduler.join(Request(ids=[3, n], max_tokens=30)) for n in range(2)]
        scheduler.sweep()
        large = scheduler.join(Request(ids=[5] * 60, max_tokens=30))
        for n in range(100):
            if n < 40:
                small.append(scheduler.join(Request(ids=[4, n], max_tokens=2)))
            scheduler.sweep()
            admitted += [s for s in scheduler.running if s not in admitted]
            if large in admitted:
                break
        assert admitted[:3] == [*small[:2], large]
        finished(scheduler)
        assert all(s.finish_reason is FinishReason.LENGTH for s in (large, *small))


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def virtual(engine, monkeypatch, *, base_s, row_s, foreseen=False, **options):
    """A scheduler whose sweeps take a time by their rows, and no other; the plan may know it."""
    if foreseen:
        known = SimpleNamespace(step_s=base_s, pass_s=base_s)
        placed = SimpleNamespace(row_s=lambda tokens: row_s)
        engine.plan = replace(engine.plan, prediction=known, placed=placed)
    clock, real = Clock(), Run.sweep

    def sweep(self, reading, writing):
        emitted = real(self, reading, writing)
        clock.now += base_s + row_s * (sum(count for _, count in reading) + len(writing))
        return emitted

    monkeypatch.setattr(Run, "sweep", sweep)
    return Scheduler(engine, clock=clock, **options), clock


def test_nobody_starves_in_virtual_time(tiny, monkeypatch):
    """Prompts of up to 80 tokens come in all the time; who writes waits two sweeps at most."""
    base_s, row_s = 1.0, 0.05
    with served(tiny, sequences=6, kv_tokens=400, prefill_chunk_tokens=80, rows=100) as engine:
        times = {"base_s": base_s, "row_s": row_s, "foreseen": True}
        scheduler, clock = virtual(engine, monkeypatch, **times)
        draw, arrived, ended, last, waits = random.Random(1), {}, {}, {}, []
        due = 0.0
        while clock.now < 200.0 or scheduler.busy:
            while due <= clock.now and due < 200.0:
                length = draw.choice([4, 4, 4, 80])
                ids = [draw.randrange(300) for _ in range(length)]
                arrived[scheduler.join(Request(ids=ids, max_tokens=12))] = due
                due += 9.0
            if not scheduler.busy:
                clock.now = due
                continue
            for one in scheduler.sweep():
                if one.sequence in last:
                    waits.append(clock.now - last[one.sequence])
                last[one.sequence] = clock.now
                if one.sequence.finish_reason is not None:
                    ended[one.sequence] = clock.now
        plain = base_s + 6 * row_s
        assert ended.keys() == arrived.keys() and len(arrived) > 20
        assert max(waits) <= 2 * plain + 1e-9
        # Alone, one of 80 tokens takes about 20 sweeps; with five beside it, each twice as long.
        assert max(ended[s] - arrived[s] for s in arrived) < 20 * 2 * plain + 6 * 12 * plain


def test_a_first_token_comes_within_two_sweeps_and_its_own_prompt(tiny, monkeypatch):
    """40 chats of unequal length that arrive over time; a sweep of those who write is the unit."""
    base_s, row_s, draw = 1.0, 0.01, random.Random(5)
    with served(tiny, sequences=16, kv_tokens=1536, rows=400, prefill_chunk_tokens=64) as engine:
        scheduler, clock = virtual(engine, monkeypatch, base_s=base_s, row_s=row_s)
        arrived, first, due = {}, {}, 0.0
        while len(arrived) < 40 or scheduler.busy:
            while due <= clock.now and len(arrived) < 40:
                ids = [draw.randrange(300) for _ in range(draw.randrange(4, 60))]
                one = scheduler.join(Request(ids=ids, max_tokens=draw.randrange(4, 24)))
                arrived[one] = due
                due += draw.uniform(1.8, 3.0)
            if not scheduler.busy:
                clock.now = due
                continue
            for one in scheduler.sweep():
                first.setdefault(one.sequence, clock.now)
            assert not scheduler.waiting
    plain_s = base_s + 16 * row_s
    late = [
        first[s] - arrived[s] - 2 * plain_s - (base_s + row_s * s.prompt_tokens) for s in arrived
    ]
    assert len(late) == 40 and max(late) <= 1e-9 and max(late) > -2 * plain_s


def test_a_short_prompt_is_not_behind_a_long_one(tiny, monkeypatch):
    with served(tiny, kv_tokens=300) as engine:
        scheduler, _ = virtual(engine, monkeypatch, base_s=1.0, row_s=0.1)
        writer = scheduler.join(Request(ids=[1, 2], max_tokens=60))
        for _ in range(3):
            scheduler.sweep()
        long = scheduler.join(Request(ids=list(range(80)), max_tokens=4))
        for _ in range(2):
            scheduler.sweep()
        short = scheduler.join(Request(ids=[7, 8, 9], max_tokens=4))
        scheduler.sweep()
        assert len(short.emitted) == 1 and not long.emitted
        before = len(writer.emitted)
        scheduler.sweep()
        assert len(writer.emitted) == before + 1 and not long.emitted


@given(most=st.integers(0, 60), wants=st.lists(st.integers(0, 30), max_size=7))
def test_shares_are_equal_as_far_as_they_are_wanted(most, wants):
    given_ = shares(most, wants)
    assert all(0 <= g <= w for g, w in zip(given_, wants, strict=True))
    assert sum(given_) == min(most, sum(wants))
    cut = [g for g, w in zip(given_, wants, strict=True) if g < w]
    assert not cut or max(given_) <= min(cut) + 1


def test_the_pace_makes_a_sweep_twice_as_long_at_most():
    pace = Pace(first=64)
    assert pace.tokens(writes=True) == pace.tokens(writes=False) == 64
    for _ in range(20):
        pace.note(2.0, 0)
        pace.note(2.0 + 0.01 * 50, 50)
    assert pace.tokens(writes=True) == pytest.approx(200, abs=1)
    assert pace.tokens(writes=False) == pytest.approx(800, abs=4)
    pace.note(200.0, 0)  # somebody else was busy
    assert pace.tokens(writes=True) < 300


def test_the_first_sweeps_read_as_foreseen_and_seconds_correct_that():
    pace = Pace(512, plain_s=0.5, row_s=0.01)
    assert (pace.tokens(writes=True), pace.tokens(writes=False)) == (50, 200)
    pace.note(5.0, 0)  # ten times what was foreseen: that is how it is here
    pace.note(5.0 + 0.02 * 50, 50)
    assert pace.tokens(writes=True) == 250
    assert Pace(512, plain_s=0.01, row_s=0.0005).tokens(writes=False) == 500  # of 0.25 s


def test_rows_that_are_there_are_not_read_again(tiny, alone):
    """The next turn goes on in the same cache; another branch copies what it shares."""
    shared, rows = prompts(1, seed=8, longest=60)[0] * 3, []
    shared = shared[:50]
    with served(tiny, kv_tokens=384) as engine:
        scheduler, real = Scheduler(engine), engine.sweep

        def sweep(texts, drafts, whole=()):
            rows.append(sum(len(tokens) for _, tokens in texts))
            return real(texts, drafts, whole)

        engine.sweep = sweep
        first = scheduler.join(Request(ids=shared, max_tokens=4))
        finished(scheduler)
        later = [*first.ids, 11, 12]
        for ids, reused, index in [
            (later, len(first.ids) - 1, first.index),
            ([*shared, 77, 78, 79], 50, None),
            ([*shared[:40], 3], 40, None),
            ([*shared, 77, 78, 79], 52, None),
        ]:
            rows.clear()
            request = Request(ids=ids, max_tokens=4)
            sequence = scheduler.join(request)
            finished(scheduler)
            assert sequence.reused == reused and sum(rows) == len(ids) - reused
            assert index is None or sequence.index == index
            assert sequence.emitted == alone(request)
        scheduler.forget()
        assert scheduler.kept_tokens == 0


def stored(engine, index):
    (pool,) = engine._pools
    return [*pool.caches[index]._keys, *pool.caches[index]._values]


def read(scheduler, request):
    """Sweep until a prompt is read."""
    one = scheduler.join(request)
    while not one.emitted:
        scheduler.sweep()
    return one


def test_what_several_began_with_outlives_all_of_them(tiny, alone):
    """More ended than there are caches: each beginning is there once, and rows are as if fresh."""
    shared = (prompts(1, seed=8, longest=60)[0] * 20)[:40]
    tails = [[n, n + 1, n + 2] for n in range(100, 160, 6)]
    with served(tiny, sequences=2, kv_tokens=150) as engine, served(tiny, sequences=1) as fresh:
        scheduler, other = Scheduler(engine), Scheduler(fresh)
        for place, tail in enumerate([*tails, tails[3], tails[0]]):
            request = Request(ids=[*shared, *tail], max_tokens=2)
            one, again = read(scheduler, request), read(other, request)
            assert one.reused == (0 if not place else 40 if place < len(tails) else 42)
            assert again.reused == 0
            pairs = zip(stored(engine, one.index), stored(fresh, again.index), strict=True)
            for found, wanted in pairs:
                rows = slice(0, len(request.ids))
                torch.testing.assert_close(found[:, rows], wanted[:, rows], atol=1e-4, rtol=1e-3)
            finished(scheduler)
            finished(other)
            other.forget()
            assert one.emitted == alone(request)
        assert scheduler.kept_tokens == 40 + 4 * len(tails)  # of each answer the last is not read
        long = scheduler.join(Request(ids=list(range(60)), max_tokens=30))
        finished(scheduler)  # its memory was that of those that were longest unused
        assert long.finish_reason is FinishReason.LENGTH and scheduler.kept_tokens <= 150
        for tail, reused in ((tails[0], 42), (tails[1], 40)):
            one = scheduler.join(Request(ids=[*shared, *tail], max_tokens=2))
            finished(scheduler)
            assert one.reused == reused


def test_of_several_with_one_prompt_the_first_reads_it(tiny, alone):
    ids = prompts(1, seed=9, longest=70)[0]
    ids = (ids * 40)[:60]
    asked = [Request(ids=ids, sampling=DRAWN, seed=n, max_tokens=6) for n in range(3)]
    with served(tiny, kv_tokens=300, prefill_chunk_tokens=64) as engine:
        scheduler = Scheduler(engine)
        joined = [scheduler.join(request) for request in asked]
        finished(scheduler)
        assert [s.reused for s in joined] == [0, 59, 59]
        assert scheduler.totals.read_tokens == 62 and scheduler.totals.reused_tokens == 118
    assert [s.emitted for s in joined] == [alone(request) for request in asked]


def test_one_that_leaves_within_a_pass_takes_no_part_in_the_next_layer(tiny, alone):
    """Its rows are gone from the next layer on, and the others' answers stay what they are."""
    asked = requests(3, seed=2)
    asked = [replace(request, max_tokens=9) for request in asked]
    with served(tiny, kv_tokens=300, rows=200) as engine:
        scheduler, seen = Scheduler(engine, patient=True), []
        joined = [scheduler.join(request) for request in asked]
        long = scheduler.join(Request(ids=list(range(50)), max_tokens=20))
        network, layers = engine.network, []
        real = network._leave

        def leave(index, hidden, context):
            seen.append((index, sum(s.tokens for s in context.segments)))
            if index == 0 and not layers:
                layers.append(len(seen))
                scheduler.leave(long)
            return real(index, hidden, context)

        network._leave = leave
        scheduler.sweep()
        before, after = seen[0][1], seen[1][1]
        assert before - after >= 30 and [index for index, _ in seen[:2]] == [0, 1]
        assert long.finish_reason is FinishReason.ABORT and not long.emitted
        finished(scheduler)
    assert [s.emitted for s in joined] == [alone(request) for request in asked]


def test_a_pass_that_nobody_waits_for_ends(tiny, alone):
    request = Request(ids=PROMPT, max_tokens=5)
    with served(tiny) as engine:
        scheduler, polls = Scheduler(engine), []
        first = scheduler.join(request)
        network, poll = engine.network, engine.network.poll

        def leaving():
            polls.append(1)
            if len(polls) == 2:
                scheduler.leave(first)
            poll()

        network.poll = leaving
        emitted = scheduler.sweep()
        assert len(polls) == 2 and [e.sequence for e in emitted] == [first]
        assert first.finish_reason is FinishReason.ABORT and not scheduler.busy
        waiting = scheduler.join(request)
        scheduler.leave(waiting)
        assert [e.sequence for e in scheduler.sweep()] == [waiting] and not scheduler.busy
        again = scheduler.join(request)
        finished(scheduler)
        assert again.emitted == alone(request)


def test_a_sequence_that_fails_ends_alone(tiny, alone):
    """One's drafter breaks, one's logits are no numbers, one's rows make a pass fail."""
    asked = [replace(request, max_tokens=20) for request in requests(4, seed=6)]
    with served(tiny, draft=NGRAM, kv_tokens=300) as engine:
        scheduler = Scheduler(engine, patient=True)
        joined = [scheduler.join(request) for request in asked]
        while not all(len(s.emitted) >= 2 for s in joined):
            scheduler.sweep()
        real, bad, worse = engine.sweep, joined[1], joined[2]

        def sweep(texts, drafts, whole=()):
            if any(index == worse.index for index, _, _ in drafts):
                raise RuntimeError("no memory for this one")
            read, checked = real(texts, drafts, whole)
            pairs = zip(drafts, checked, strict=True)
            return read, [rows * (torch.nan if i == bad.index else 1) for (i, _, _), rows in pairs]

        def broken(*_):
            raise ValueError("broken")

        engine.sweep = sweep
        joined[0].drafter.propose = broken
        finished(scheduler)
        assert bad.finish_reason is FinishReason.ERROR and "NaN" in str(bad.error)
        assert worse.finish_reason is FinishReason.ERROR
        assert str(worse.error) == "a pass failed: no memory for this one"
        for place in (0, 3):
            assert joined[place].finish_reason is FinishReason.LENGTH
            assert joined[place].emitted == alone(asked[place])
        engine.sweep = real
        again = [scheduler.join(request) for request in asked]
        finished(scheduler)
        assert [s.emitted for s in again] == [alone(request) for request in asked]


def test_logprobs_are_those_of_transformers(tiny):
    from engines import reference_model

    ids = prompts(1, seed=3, longest=40)[0]
    with served(tiny, draft=NGRAM) as engine:
        scheduler = Scheduler(engine)
        warm = scheduler.join(Request(ids=ids, max_tokens=1))
        finished(scheduler)
        one = scheduler.join(Request(ids=ids, max_tokens=6, logprobs=3, scores=True))
        only = scheduler.join(Request(ids=ids, max_tokens=0, logprobs=1, scores=True))
        other = scheduler.join(Request(ids=PROMPT, max_tokens=9))
        finished(scheduler)
        assert warm.reused == one.reused == only.reused == 0
    with torch.inference_mode():
        logits = reference_model(tiny)(torch.tensor([one.ids])).logits[0].log_softmax(-1)
    assert [p.token for p in one.prompt_logprobs] == ids[1:] and not only.emitted
    assert only.finish_reason is FinishReason.LENGTH
    told = [*one.prompt_logprobs, *one.logprobs[:6]]
    for place, found in enumerate(told):
        expected = logits[place]
        assert found.token == one.ids[place + 1]
        assert found.logprob == pytest.approx(float(expected[found.token]), abs=1e-4)
        best = expected.topk(3)
        assert [t for t, _ in found.likeliest] == best.indices.tolist()
        assert [p for _, p in found.likeliest] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert [p.logprob for p in only.prompt_logprobs] == pytest.approx(
        [p.logprob for p in one.prompt_logprobs], abs=1e-5
    )
    assert [len(p.likeliest) for p in only.prompt_logprobs] == [1] * (len(ids) - 1)
    with engine_for(tiny) as engine:
        assert generate(engine, tokens=9)[0] == other.emitted


def test_without_shared_memory_caches_take_turns(tiny, alone):
    asked = requests(9, seed=12)
    with served(tiny, kv_tokens=None, kv="disk", **STREAMED) as engine:
        assert not engine.shares_kv
        scheduler = Scheduler(engine)
        joined = [scheduler.join(request) for request in asked]
        finished(scheduler)
        again = scheduler.join(Request(ids=[*joined[-1].ids, 5], max_tokens=3))
        finished(scheduler)
        assert again.reused == len(joined[-1].ids) - 1
    assert [s.emitted for s in joined] == [alone(request) for request in asked]


def test_memory_for_keys_and_values_is_what_is_planned(tiny):
    sizes = {}
    for kv_tokens in (100, 300):
        with served(tiny, kv_tokens=kv_tokens, draft=NGRAM) as engine:
            row = sum(s.numbers_per_token for s in engine.network.kv_shapes) * 4
            rows = kv_tokens + SEQUENCES * NGRAM.pending_rows
            assert engine.devices.ledger()["KV cache"] == rows * row
            sizes[kv_tokens] = engine.placement.kv_bytes
            assert engine.kv_tokens == kv_tokens
    assert sizes[300] - sizes[100] == 200 * row


@settings(deadline=None, max_examples=6)
@given(seed=st.integers(0, 10**6))
def test_any_history_of_joins_and_leaves(tiny, alone, seed):
    draw, asked = random.Random(seed), requests(6, seed % 5)
    with served(tiny, sequences=3, kv_tokens=140, draft=NGRAM) as engine:
        scheduler, joined = Scheduler(engine, patient=draw.random() < 0.5), []
        todo = list(asked)
        while todo or scheduler.busy:
            if todo and draw.random() < 0.5:
                joined.append(scheduler.join(todo.pop(0)))
            if joined and draw.random() < 0.05:
                scheduler.leave(draw.choice(joined))
            scheduler.sweep()
        assert scheduler.totals.emitted_tokens == sum(len(s.emitted) for s in joined)
    for request, sequence in zip(asked, joined, strict=True):
        expected = alone(request)
        if sequence.finish_reason is FinishReason.ABORT:
            expected = expected[: len(sequence.emitted)]
        assert sequence.emitted == expected


def test_the_pace_is_told_with_how_many_take_part(tiny):
    """And nothing of passes that read prompts."""
    with served(tiny, sequences=2) as engine:
        scheduler, counted = Scheduler(engine), []
        engine.pace = SimpleNamespace(add=counted.append)
        for ids, count in (([1, 2], 9), ([3, 4], 5)):
            scheduler.join(Request(ids=ids, max_tokens=count))
        finished(scheduler)
        assert {took.running for took in counted} == {1, 2}
        assert {took.rows for took in counted} == {1}


def test_a_broken_draft_is_left_out(tiny, alone, caplog):
    """As in a run of its own: a draft that spoils a pass costs one more pass of that sequence."""
    request = Request(ids=PROMPT, max_tokens=7)
    with served(tiny, draft=NGRAM) as engine:
        scheduler, real = Scheduler(engine), engine.sweep
        one, other = scheduler.join(request), scheduler.join(replace(request, ids=PROMPT[3:]))

        def sweep(texts, drafts, whole=()):
            read, checked = real(texts, drafts, whole)
            pairs = zip(drafts, checked, strict=True)
            return read, [rows * (torch.nan if len(tree) else 1) for (_, _, tree), rows in pairs]

        engine.sweep = sweep
        finished(scheduler)
        assert one.emitted == alone(request)
        assert other.emitted == alone(replace(request, ids=PROMPT[3:]))


@pytest.mark.parametrize("exact", [Exact.ON, Exact.OFF])
def test_measured_times_change_no_answer_of_a_seed(tiny, monkeypatch, exact):
    """Where passes are row-invariant they say how much is drafted; where not, nothing is."""
    sampling, ids = replace(DRAWN, temperature=0.3, seed=5), prompts(1, longest=12)[0] * 3
    answers, sizes = [], []
    observe = Controller.observe
    for draft_s in (0.0, 0.05, 5.0):  # of a step, where nothing and where much runs beside

        def measured(*args, taken_s=draft_s, **times):
            observe(*args, **times | {"draft_s": taken_s, "pass_s": 0.1})

        monkeypatch.setattr(Controller, "observe", measured)
        with served(tiny, draft=NGRAM, exact=exact, **STREAMED) as engine:
            expected = [
                StepOutlook(nodes=n, tokens=1 + n / 4, draft_s=0.01 * n, pass_s=0.1)
                for n in (0, 1, 3, 5)
            ]
            engine.controller = Controller(expected, 3, sequences=SEQUENCES)
            scheduler = Scheduler(engine)
            scheduler.join(Request(ids=ids, sampling=sampling, seed=5, max_tokens=20))
            answers.append(finished(scheduler)[0].emitted)
            sizes.append(scheduler.totals.drafted_tokens)
    assert answers.count(answers[0]) == len(answers)
    assert (len(set(sizes)) > 1) is (exact is Exact.ON)
    assert any(sizes) is (exact is Exact.ON)
