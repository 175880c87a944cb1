"""A draft model with a bounded context: what it sees, what it computes, what it takes."""

import dataclasses
import json

import pytest
import torch
from engines import PROMPT, engine_for, generate
from hypothesis import given
from hypothesis import strategies as st
from test_speculation import likelihood_of_three_tokens

from offload_rt.config import SINK_TOKENS, DraftConfig, GenerationConfig, SamplingConfig
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.sizes import PassShape
from offload_rt.device.kinds import CPU
from offload_rt.engine import Run
from offload_rt.kv.resident import ResidentKV
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.runner.runner import Rows
from offload_rt.speculative.base import Draft
from offload_rt.speculative.draft_model import kind
from offload_rt.speculative.draft_model.drafter import DraftModelDrafter
from offload_rt.speculative.draft_model.window import seen_tokens
from offload_rt.speculative.kind import DraftedRun

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {
    "llama": {},
    "gemma2": {"head_dim": 16, "sliding_window": 6},  # the second window: the model's own
    "gpt_neox": {},  # rotates a part of a head
}
LONG = [(7 * i * i + i // 5) % 290 + 3 for i in range(120)]


@given(length=st.integers(1, 400), window=st.integers(SINK_TOKENS + 1, 120))
def test_the_first_and_the_newest_tokens_are_seen_and_none_twice(length, window):
    seen = seen_tokens(range(length), window)
    assert len(seen) <= window and seen[-1] == length - 1
    if length <= window:
        assert seen == list(range(length))
        return
    newest = seen[SINK_TOKENS:]
    assert seen[:SINK_TOKENS] == list(range(SINK_TOKENS))
    assert newest == list(range(newest[0], length)) and newest[0] > SINK_TOKENS
    assert len(newest) > (window - SINK_TOKENS) * 3 / 4 - 1


def test_the_window_stands_still_and_then_jumps_by_a_quarter():
    """Of 256 tokens 240 are not sinks: it jumps by 60, at 257, 317, 377 tokens, ..."""
    starts = [seen_tokens(range(length), 256)[SINK_TOKENS] for length in range(200, 500)]
    jumps = [200 + i for i in range(1, len(starts)) if starts[i] != starts[i - 1]]
    assert jumps == [257, 317, 377, 437, 497]
    assert sorted(set(starts)) == [16, 76, 136, 196, 256, 316]


def test_full_sees_everything():
    assert seen_tokens(LONG, None) == LONG
    assert DraftConfig(draft="model:m", draft_window=0).window_tokens is None
    assert DraftConfig(draft="model:m").window_tokens is None


class Watched(DraftModelDrafter):
    """A drafter that keeps the logits it drafts from and the rows of its passes."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.logits, self.rows = None, []

    def _unread(self, ids):
        self.logits = None
        return super()._unread(ids)

    def _recorded_chain(self, ids, depth):
        """None: the logits that a chain is chosen from in one recording are kept nowhere."""

    def feed(self, rows):
        self.rows.append(len(rows.tokens))
        logits = super().feed(rows)
        if self.logits is None:  # those that a draft begins from
            self.logits = logits.clone()
        return logits


@pytest.fixture(params=FAMILIES, scope="module")
def drafting(make_tiny, request):
    """An engine with a draft model of each family, and how it drafts: it sees 40 tokens."""
    small = make_tiny(request.param, **IDS, **FAMILIES[request.param])
    draft = DraftConfig(draft=f"model:{small}", draft_tokens=3, draft_window=40)
    with engine_for(make_tiny("llama", **IDS), draft=draft) as engine:
        yield engine, draft


@pytest.fixture
def drafter(drafting):
    """A drafter that knows nothing yet, with room for a sequence of 200."""
    engine, draft = drafting
    made = Watched(engine._draft_model, draft, 200)
    made.begin(SamplingConfig(), torch.Generator())
    return made


def fresh_logits(drafter, tokens):
    """What the draft model computes of these tokens alone, at positions 0, 1, 2, ..."""
    model = drafter._model
    network = model.network
    cache = ResidentKV(model.device, network.kv_shapes, network.dtype, len(tokens))
    return model.logits([Rows.text(cache, tokens)])


def test_after_any_step_the_logits_are_a_fresh_pass_over_what_is_seen(drafter):
    length = 30
    while length < len(LONG):
        before = len(drafter.rows)
        drafter.propose(LONG[:length], 3)
        seen = seen_tokens(LONG[:length], 40)
        assert torch.allclose(drafter.logits, fresh_logits(drafter, seen), atol=1e-4)
        assert max(drafter.rows[before:]) <= 40
        length += 1 + length % 4
    assert sum(rows > 4 for rows in drafter.rows) == 1 + 14  # the prompt; jumps by 6 up to 120


def test_a_long_prompt_is_not_run_through_the_draft_model(drafter):
    drafter.propose(LONG, 3)
    assert drafter.rows[0] == len(seen_tokens(LONG, 40)) <= 40
    assert sum(drafter.rows) <= 40 + 2


@pytest.mark.parametrize(
    "other", [LONG[:60], LONG[:20], LONG[40:], LONG[:50] + LONG[10:40], [*LONG, 9, 8, 7]]
)
def test_another_sequence_after_a_long_one_is_drafted_as_if_it_came_first(drafter, other):
    for length in (100, 104, len(LONG)):
        drafter.propose(LONG[:length], 3)
    drafter.propose(other, 3)
    seen = seen_tokens(other, 40)
    assert torch.allclose(drafter.logits, fresh_logits(drafter, seen), atol=1e-4)


def test_conversations_go_on_with_other_prompts(make_tiny):
    """A second run with a longer, a shorter and a different prompt gives the plain answers."""
    folder = make_tiny("llama", num_hidden_layers=2, **IDS)
    small = make_tiny("llama", num_hidden_layers=1, hidden_size=32, **IDS)
    draft = DraftConfig(draft=f"model:{small}", draft_tokens=4, draft_window=24)
    prompts = [LONG[:60], LONG[:90], LONG[:40], PROMPT, LONG[30:100]]
    room = {"prompts": [LONG[:90]], "tokens": 30}
    with engine_for(folder, **room) as engine:
        plain = [generate(engine, [p], tokens=12) for p in prompts]
    with engine_for(folder, draft=draft, **room) as engine:
        assert [generate(engine, [p], tokens=12) for p in prompts] == plain
        assert engine._draft_model is not None


@pytest.fixture
def near_sighted(make_tiny):
    """A target that mostly looks at near tokens, and itself as drafter that sees 30 of 52 tokens.

    Of about half of the drafts the first token is accepted.
    """
    folder = make_tiny("mistral", sliding_window=8, num_hidden_layers=2, **IDS)

    def draft(tokens):
        return DraftConfig(draft=f"model:{folder}", draft_tokens=tokens, draft_window=30)

    return folder, draft


@pytest.mark.parametrize("tokens", [3, 12])
def test_sampling_with_a_window_shorter_than_the_prompt_is_lossless(
    near_sighted, monkeypatch, tokens
):
    """Law 4 end to end, with a chain and with a tree."""
    folder, draft = near_sighted
    runs, start = [], Run.start
    monkeypatch.setattr(Run, "start", lambda *asked: runs.append(start(*asked)) or runs[-1])
    assert likelihood_of_three_tokens(folder, LONG[:51], draft(tokens)) > 1e-4
    kept, reached = sum(r.counts.kept[0] for r in runs), sum(r.counts.reached[0] for r in runs)
    assert 0.2 < kept / reached < 0.8  # the window changes the draft, but not too much


def test_wrong_probabilities_of_a_windowed_draft_fail_the_same_test(near_sighted, monkeypatch):
    """The negative control: the drafter says what it drew was the least likely of three."""
    folder, draft = near_sighted
    honest = DraftModelDrafter.propose

    def liar(self, ids, max_depth, max_nodes=None):
        told = honest(self, ids, max_depth, max_nodes)
        if told.probs is None:
            return told
        likeliest = told.probs.topk(3)
        return Draft(told.tree, told.probs.scatter(1, likeliest.indices, likeliest.values.flip(1)))

    monkeypatch.setattr(DraftModelDrafter, "propose", liar)
    assert likelihood_of_three_tokens(folder, LONG[:51], draft(3)) < 1e-6


def test_memory_for_the_cache_is_the_windows(make_tiny):
    folder = make_tiny("llama", **IDS)
    full = DraftConfig(draft=f"model:{folder}", draft_tokens=4)
    capacity, row_bytes = len(LONG) + 200, 2 * 2 * 2 * 16 * 4  # layers, K and V, heads, D, fp32
    found = {}
    for window in (None, 0, 64, 5000):
        draft = dataclasses.replace(full, draft_window=window)
        with engine_for(folder, prompts=[LONG], tokens=200, draft=draft) as engine:
            before = engine.device.ledger()["KV cache"]
            run = Run.start(engine, [LONG], SamplingConfig(), GenerationConfig(max_tokens=3))
            taken = engine.device.ledger()["KV cache"] - before
            found[window] = (taken, engine.placement.demand.drafter_bytes)
            assert run.sequences[0].drafter is not None
    for window, rows in ((None, capacity), (0, capacity), (64, 64), (5000, capacity)):
        assert found[window][0] == (rows + 4) * row_bytes
    saved = found[None][1] - found[64][1]
    assert saved >= (capacity - 64) * row_bytes  # shorter passes need less workspace, too
    assert found[None][1] == found[0][1] and found[5000][1] >= found[None][1]


def test_memory_for_passes_is_that_of_all_they_draft_for(make_tiny, monkeypatch):
    """Rows of several sequences may be more than a window; below triforce each has its own pass."""
    shapes, checkpoint = [], open_checkpoint(make_tiny("llama", **IDS))
    monkeypatch.setattr(kind, "workspace_bytes", lambda m, n, shape, d: shapes.append(shape) or 0)
    draft = DraftConfig(draft="model:x", draft_tokens=4, draft_window=24)
    run = DraftedRun(
        target=checkpoint,
        dtype="auto",
        device=CPU,
        capacities=[90] * 40,
        shape=PassShape(rows=200, chunk_rows=200, logit_rows=40, longest=90),
    )
    for each in (run, run.behind(4)):
        kind.KIND.memory(Drafting(draft, checkpoint), each)
    assert [(shape.rows, shape.logit_rows) for shape in shapes] == [(40, 40), (24, 1)]


def test_memory_with_a_window_stays_within_the_plan(make_tiny):
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    folder = make_tiny("llama", **sizes, dtype="bfloat16", **IDS)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=4, draft_window=64)
    room = {"prompts": [LONG], "tokens": 40, "resident_layers": 1, "slots": 2}
    with engine_for(folder, draft=draft, **room) as engine:
        generate(engine, [LONG], tokens=8)
        memory = engine.memory()
        assert memory.device_peak_bytes <= memory.device_planned_bytes


def test_the_flag_reaches_the_plan_and_answers_stay(tiny_model, offload_run):
    base = ("-p", "hello " * 20, "-n", 12, "--json")
    draft = ("--draft", f"model:{tiny_model}", "--draft-tokens", 4)
    plain = json.loads(offload_run("generate", tiny_model, *base).out)
    for flag, window in (("auto", None), ("full", None), ("24", 24)):
        done = offload_run("generate", tiny_model, *base, *draft, "--draft-window", flag)
        record = json.loads(done.out)
        assert record["token_ids"] == plain["token_ids"]
        assert record["plan"]["draft_window"] == window
    plan = offload_run("plan", tiny_model, *draft, "--draft-window", "24", "--json")
    assert json.loads(plan.out)["draft_window"] == 24


@pytest.mark.parametrize(
    ("window", "message"),
    [("0", "neither auto nor full"), ("x", "neither auto nor full"), ("20", "full or 21 or more")],
)
def test_a_window_that_is_too_small_is_refused(tiny_model, offload_run, window, message):
    draft = ("--draft", f"model:{tiny_model}", "--draft-tokens", 4, "--draft-window", window)
    done = offload_run("generate", tiny_model, "-p", "x", *draft)
    assert done.code == 2 and message in done.err
