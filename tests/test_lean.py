"""Resident layers in two kernels: the bits of transformers' forward, or transformers' forward."""

import pytest
import torch
from engines import PROMPT, all_logits, engine_for

from offload_rt.kernels import layers, products
from offload_rt.kernels.layers import LayerSizes, adds_as_torch
from offload_rt.model import lean, network
from offload_rt.model.lean import LeanLayer
from offload_rt.runner.tree import ROOT, TokenTree

pytestmark = pytest.mark.skipif(
    bool(products.problem()), reason=f"no kernels here: {products.problem()}"
)
# More inputs than oneDNN adds up in one block, and heads of one and of two panels.
WIDE = {"hidden_size": 1152, "intermediate_size": 1280, "num_hidden_layers": 2, "dtype": "bfloat16"}
FAMILIES = {
    "llama": {"head_dim": 128},
    "qwen2": {"num_attention_heads": 18},
    "mistral": {"head_dim": 64, "sliding_window": 6},
}


def lean_layers(engine):
    return [isinstance(layer.forward.args[1], LeanLayer) for layer in engine.network._layers]


def some_passes(engine):
    """Logits of a prompt, of single tokens, of a chain and of a tree; all rows below 8 and more."""
    found = [all_logits(engine)]
    chain = TokenTree.chain([5, 9, 200, 31])
    tree = TokenTree((5, 9, 200, 31, 7, 8, 10), (ROOT, ROOT, 0, 0, 1, 4, 5))
    for draft in (chain, tree):
        (logits,) = engine.check([(0, 44, draft)])
        found.append(logits.clone())
        engine.commit(0, [44], [0])
    return torch.cat(found)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_resident_in_two_kernels(family, make_tiny):
    folder = make_tiny(family, **WIDE, **FAMILIES[family])
    with engine_for(folder) as engine:
        assert lean_layers(engine) == [True, True]
        resident = some_passes(engine)
    with engine_for(folder, resident_layers=1, slots=1) as engine:
        assert sorted(lean_layers(engine)) == [False, True]
        assert torch.equal(some_passes(engine), resident)
    if family == "llama":  # one layer of each has shown it
        with engine_for(folder, resident_layers=0, slots=1) as engine:
            assert torch.equal(some_passes(engine), resident)


def test_several_sequences_share_a_pass(make_tiny):
    folder, prompts = make_tiny("qwen2", **WIDE, **FAMILIES["qwen2"]), (PROMPT, PROMPT[3:9])
    found = []
    for resident in (2, 0):
        with engine_for(folder, prompts=prompts, resident_layers=resident) as engine:
            engine.forward([(0, PROMPT), (1, PROMPT[3:9])], reuse=True)
            found.append(engine.forward([(0, [7]), (1, [8, 9])], reuse=False).clone())
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_parts_that_are_not_known_are_left_to_transformers(family, make_tiny):
    with engine_for(make_tiny(family, **WIDE, head_dim=64)) as engine:
        assert not any(lean_layers(engine))


@pytest.mark.parametrize("broken", ["_table", "_float", "_add"])
def test_other_bits_are_noticed(broken, make_tiny, monkeypatch):
    folder = make_tiny("llama", **WIDE, **FAMILIES["llama"])
    layers.assembled.cache_clear()
    if broken == "_table":
        monkeypatch.setattr(lean, "_table", lambda _: torch.zeros(2**16, dtype=torch.bfloat16))
    elif broken == "_float":  # the mean is that of one number more
        monkeypatch.setattr(layers, "_float", lambda x, was=layers._float: was(x + (x == 1152)))
    else:
        monkeypatch.setattr(layers, "_add", lambda was=layers._add: was().replace("fadd", "fsub"))
    try:
        with engine_for(folder) as engine:
            assert not any(lean_layers(engine))
    finally:
        layers.assembled.cache_clear()


@pytest.mark.parametrize("hidden", [64, 576, 896, 1536, 2048, 8192])
def test_squares_are_added_as_torch_does(hidden):
    sizes = LayerSizes(hidden=hidden, heads=1, kv_heads=1, head_dim=64, products=64, eps=1e-6)
    assert adds_as_torch(sizes)


def test_without_kernels_transformers_computes(make_tiny, monkeypatch):
    monkeypatch.setattr(network, "lean_layer", lambda *_, **__: None)
    with engine_for(make_tiny("llama", **WIDE, **FAMILIES["llama"])) as engine:
        assert not any(lean_layers(engine))
        expected = some_passes(engine)
    monkeypatch.undo()
    with engine_for(make_tiny("llama", **WIDE, **FAMILIES["llama"])) as engine:
        assert all(lean_layers(engine)) and torch.equal(some_passes(engine), expected)
