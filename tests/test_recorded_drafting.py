"""What holds of drafting holds where its passes are recorded."""

import pytest
from eagle3_models import counts_on, write_counting, write_head
from engines import PROMPT, engine_for, generate
from mtp_models import nearly_of_the_token, write_mtp
from test_medusa import (  # noqa: F401 - fixtures
    heads,
    llama,
    plain,
)
from test_medusa import test_heads_that_know_the_answer_are_always_right as knowing_heads
from test_speculation import (  # noqa: F401
    IDS,
    REPEATS,
    SELF,
    STREAMED,
    TWO,
    drafts,
    start,
    test_a_drafter_that_is_the_target_is_always_right,
)

from offload_rt.config import DraftConfig, RetrievalConfig, SamplingConfig

pytestmark = pytest.mark.usefixtures("recording")
NAMES = ["chain", "tree", "windowed-chain", "triforce-model", "triforce-copies", *SELF]
TOKENS = 10


@pytest.mark.parametrize("name", NAMES)
def test_greedy_with_a_recorded_drafter_equals_greedy_without(make_tiny, drafts, recording, name):  # noqa: F811
    folder = make_tiny("llama", **TWO)
    with engine_for(folder, prompts=[REPEATS], tokens=TOKENS) as engine:
        plain = generate(engine, [REPEATS], tokens=TOKENS)
    options = {"draft": drafts[name]} | STREAMED.get(name, {})
    with engine_for(folder, prompts=[REPEATS], tokens=TOKENS, **options) as engine:
        assert generate(engine, [REPEATS], tokens=TOKENS) == plain
    assert recording["replayed"] >= recording["recorded"] > 0


DRAWN = SamplingConfig(temperature=0.7, seed=3)


@pytest.mark.parametrize(
    ("name", "sampling"),
    [
        *(("tree", SamplingConfig()), ("tree", DRAWN), ("windowed-chain", DRAWN)),
        *(("self-tree", SamplingConfig()), ("windowed-chain", SamplingConfig())),
    ],
)
def test_recorded_passes_draft_what_eager_ones_do(make_tiny, drafts, recording, name, sampling):  # noqa: F811
    """In fp32 the likeliest tokens are the same, and so is what is accepted of them."""
    folder, reports = make_tiny("llama", **TWO), []
    for records in (True, False):
        options = {"draft": drafts[name]} | STREAMED.get(name, {})
        with engine_for(folder, tokens=TOKENS, **options) as engine:
            (engine._draft_model or engine._rounded_copy)._records = records
            run = start(engine, TOKENS, sampling)
            reports.append((run.sequences[0].emitted, run.report().speculation))
    (tokens, ours), (others, theirs) = reports
    assert tokens == others and recording["replayed"] > 0
    assert (ours.drafted, ours.accepted) == (theirs.drafted, theirs.accepted)


@pytest.mark.parametrize(
    ("kind", "nodes", "sampling"),
    [  # each two of the three
        ("mtp", 4, SamplingConfig()),
        ("mtp", 12, DRAWN),
        ("eagle3", 4, DRAWN),
        ("eagle3", 12, SamplingConfig()),
    ],
)
def test_a_recorded_module_drafts_what_an_eager_one_does(
    tmp_path, recording, kind, nodes, sampling
):
    """Hidden states go from pass to pass on the device; rows of a tree continue their parents'."""
    folder, reports, name, prompt = tmp_path / "target", [], kind, [t % 64 for t in PROMPT]
    if kind == "mtp":
        write_mtp(folder, change=nearly_of_the_token)
    else:
        write_counting(folder)
        tokens = [*range(50, -1, -1)]
        head = write_head(tmp_path / "h", folder, tokens=tokens, change=counts_on(tokens))
        name = f"eagle3:{head}"
    draft = DraftConfig(draft=name, draft_tokens=nodes)
    for records in (True, False):
        with engine_for(folder, tokens=24, draft=draft) as engine:
            engine.module.module._records = records
            run = start(engine, 24, sampling, prompt=prompt)
            reports.append((run.sequences[0].emitted, run.report().speculation))
    (tokens, ours), (others, theirs) = reports
    assert tokens == others and recording["replayed"] > recording["recorded"] > 0
    assert (ours.drafted, ours.accepted) == (theirs.drafted, theirs.accepted)
    assert 0 < ours.accepted < ours.drafted


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_recorded_passes_over_a_retrieval_cache_are_the_eager_ones(make_tiny, recording, family):
    """Soft caps, sinks and windows; as many drafted tokens are accepted."""
    types = ["sliding_attention", "full_attention"]
    sizes = {"head_dim": 16, "sliding_window": 6, "num_hidden_layers": 2}
    folder = make_tiny(family, layer_types=types, **sizes, **IDS)
    retrieval = RetrievalConfig(budget_tokens=32, chunk_tokens=5, rebuild_tokens=11)
    draft = DraftConfig(draft="triforce", draft_tokens=6, retrieval=retrieval)
    prompt, reports = PROMPT * 4, []
    for records in (True, False):
        with engine_for(folder, prompts=[prompt], tokens=TOKENS, draft=draft) as engine:
            if family == "gpt_oss":  # as on a GPU: ours looks at where rows are sent
                assert not engine.runner._records
                engine.network._model.set_experts_implementation("batched_mm")
            engine.runner._records = records
            run = start(engine, TOKENS, prompt=prompt)
            reports.append((run.sequences[0].emitted, run.report().speculation))
    (tokens, ours), (others, theirs) = reports
    assert tokens == others and recording["replayed"] > 0
    assert (ours.drafted, ours.accepted) == (theirs.drafted, theirs.accepted)


def test_recorded_heads_that_know_the_answer_are_always_right(llama, plain, heads, recording):  # noqa: F811
    knowing_heads(llama, plain, heads, {})
    assert recording["replayed"] >= recording["recorded"] > 0
