"""The hybrid model for benchmarks: its module is right about every token, drafted after any."""

import sys

import pytest
from engines import PROMPT, engine_for, generate
from hybrids import DELTA, EXPERTS
from tiny import SHAPE
from tool_runs import TOOLS, loaded

from offload_rt.config import DraftConfig, GenerationConfig, SamplingConfig
from offload_rt.engine import Run


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    try:
        with loaded("make_bench_model"), loaded("make_bench_hybrid") as module:
            yield module
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.parametrize("experts", [EXPERTS["num_experts"], 0])
def test_every_drafted_token_is_accepted(tool, make_tiny, tmp_path, experts):
    sizes = SHAPE | DELTA | EXPERTS | {"num_experts": experts, "num_hidden_layers": 4}
    source = make_tiny("llama", tokenizer=True)
    tool.write_hybrid(tmp_path, source, {**tool.SHAPE, **sizes}, seed=1, limit=200 * 2**10)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    streamed = {"resident_layers": 2, "slots": 1}
    with engine_for(tmp_path, tokens=16, **streamed) as engine:
        expected = generate(engine, tokens=16)
    assert len(set(expected[0])) > 8
    draft = DraftConfig(draft="mtp", draft_tokens=4)
    with engine_for(tmp_path, tokens=16, draft=draft, **streamed) as engine:
        run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=16))
        run.prefill()
        while run.active:
            run.step()
        assert [sequence.emitted for sequence in run.sequences] == expected
        assert run.report().speculation.acceptance_per_depth == [1.0] * 4
