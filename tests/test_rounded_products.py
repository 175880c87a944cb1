"""Products with 8 bits by kernels of our own: a formula's numbers, for any count of rows."""

import pytest
import torch
from engines import engine_for, generate
from test_lean import WIDE, lean_layers

from offload_rt.config import DraftConfig, DraftWeights
from offload_rt.kernels import rounded
from offload_rt.model.formats.rounded import Int8Linear

pytestmark = pytest.mark.skipif(
    bool(rounded.problem()), reason=f"no kernels here: {rounded.problem()}"
)


def made(inputs, outputs, bias):
    torch.manual_seed(inputs)
    linear = torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    module = Int8Linear(linear)
    assert module.product is not None
    return linear, module


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (96, 320), (1552, 128)])
def test_the_numbers_are_a_formulas(inputs, outputs, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            linear, module = made(inputs, outputs, bias=outputs == 320)
            for count in (*range(1, 10), 16, 35):
                rows = torch.randn(1, count, inputs).to(torch.bfloat16)
                rows[0, 0] *= 1000  # each row has a scale of its own
                got = module(rows)
                assert torch.equal(got, module.product.by_formula(rows))
                plain = linear(rows)
                error = (got - plain).abs().amax(-1) / plain.abs().amax(-1)
                assert error.max() < 0.03
    finally:
        torch.set_num_threads(before)


def test_rows_do_not_know_each_other_and_may_be_nothing():
    _, module = made(96, 320, True)
    rows = torch.randn(12, 96).to(torch.bfloat16)
    rows[3] = 0
    with torch.inference_mode():
        together = module(rows)
        apart = torch.cat([module(row[None]) for row in rows])
    assert torch.equal(together, apart)
    assert torch.equal(together[3], module.product.bias)


def test_a_trace_has_the_formula():
    from torch.fx.experimental.proxy_tensor import make_fx

    _, module = made(96, 64, True)
    rows = torch.randn(2, 3, 96).to(torch.bfloat16)
    traced = make_fx(module)(rows[0])
    assert torch.equal(traced(rows[1]), module(rows[1]))


def test_a_draft_model_is_rounded_and_in_two_kernels(make_tiny):
    """What it drafts changes no token; its layers compute what transformers' forward does."""
    folder = make_tiny("qwen2", **WIDE, num_attention_heads=18, vocab_size=320)
    with engine_for(folder) as engine:
        expected = generate(engine)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=4, draft_weights=DraftWeights.INT8)
    with engine_for(folder, draft=draft) as engine:
        assert all(lean_layers(engine._draft_model))
        assert generate(engine) == expected
