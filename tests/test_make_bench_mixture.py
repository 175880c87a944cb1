"""The mixture of experts for benchmarks computes what its source computes, however it routes."""

import json
import sys

import pytest
import torch
from engines import all_logits, engine_for
from safetensors.torch import load_file
from tool_runs import TOOLS, loaded
from transformers import AutoModelForCausalLM

from offload_rt.model.checkpoint import open_checkpoint

EXPERTS, TOP_K = 6, 2


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    try:
        with loaded("make_bench_model"), loaded("make_bench_mixture") as module:
            yield module
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def source(make_tiny):
    return make_tiny("llama", tokenizer=True, tie_word_embeddings=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Words in an order that repeats itself."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and the dog looks up " * 20)
    return path


def make(tool, source, text, out, *more):
    """A mixture; returns its folder."""
    sizes = ("--experts", str(EXPERTS), "--top-k", str(TOP_K), "--shard-size", "200KiB")
    options = ("--source", str(source), "--text", str(text), *sizes, *more)
    assert tool.main([str(out), *options]) == 0
    return out


def logits(folder, tokens=(5, 77, 150, 9, 201, 3, 44)):
    """Of transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("routing", ["easy", "hard"])
def test_any_routing_computes_the_source(tool, source, text, tmp_path, routing):
    made = make(tool, source, text, tmp_path, "--routing", routing)
    found, expected = logits(made), logits(source)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_experts_that_differ_compute_something_else(tool, source, text, tmp_path):
    made = make(tool, source, text, tmp_path, "--differ", "0.1")
    found, expected = logits(made), logits(source)
    assert 1e-3 < (found - expected).abs().max() / expected.abs().max() < 1.0
    parts = open_checkpoint(made).layers[0]
    assert sum(".experts." in extent.name for extent in parts) == 3 * EXPERTS


def test_its_experts_come_one_by_one(tool, source, text, tmp_path):
    """As files of the hub have them: neighbours, but where a shard ends."""
    made = make(tool, source, text, tmp_path, "--differ", "0.1")
    with engine_for(made) as engine:
        expected = all_logits(engine)
    with engine_for(made, expert_slots=5) as engine:
        assert torch.equal(all_logits(engine), expected)
        runs = [len(unit.runs) for own in engine.network.units.values() for unit in own]
    assert max(runs) <= 3 and sum(runs) < 2.9 * len(runs)  # fp32: some are copied into place


def test_routers_send_rows_of_a_text_to_several_experts(tool, source, text, tmp_path):
    made = make(tool, source, text, tmp_path)
    states, begins = tool.mlp_inputs(source, [text.read_text()], 100)
    gates = {}
    for path in made.glob("*.safetensors"):
        gates |= {name: t for name, t in load_file(path).items() if name.endswith("gate.weight")}
    assert len(gates) == len(states) == 2 and begins.tolist() == [True] + [False] * 99
    for layer, own in enumerate(states):
        router = gates[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        chosen = (own.float() @ router.T).topk(TOP_K).indices
        assert torch.bincount(chosen.flatten(), minlength=EXPERTS).count_nonzero() >= 4


def test_a_hard_routing_follows_each_token_more_than_an_easy_one(tool):
    """States of which a quarter changes slowly, the rest anew with each token."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 16, generator=generator)
    states = noise.clone()
    for row in range(1, len(states)):
        states[row, :4] = 0.98 * states[row - 1, :4] + 0.2 * noise[row, :4]
    states += 1.0  # a mean, which routers are not to hear
    begins = torch.zeros(len(states), dtype=torch.bool)
    repeated = {}
    for name, features in (("easy", 4), ("hard", None)):
        routing = tool.Routing(features=features, skew=tool.ROUTINGS[name].skew)
        mixture = tool.Mixture(experts=16, top_k=2, routing=routing, differ=0.0)
        chosen = (states @ tool.make_router(states, begins, mixture, 1).T).topk(TOP_K).indices
        same = (chosen[1:, :, None] == chosen[:-1, None, :]).any(2)
        repeated[name] = same.float().mean().item()
    assert repeated["easy"] > 0.7 and repeated["hard"] < repeated["easy"] / 2


def test_what_cannot_be_made_is_said(tool, source, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "a"), "--experts", "4", "--top-k", "5"])
    assert "--top-k 5 is not 1 to --experts 4" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert tool.main([str(tmp_path / "b"), "--source", str(other), "--text", str(text)]) == 2
    assert "'qwen2'" in capsys.readouterr().err
