"""Products with 8 and 4 bits by kernels of our own: a formula's numbers, for any count of rows."""

import pytest
import torch
from engines import engine_for, generate
from test_lean import WIDE, lean_layers

from offload_rt.config import DraftConfig, DraftWeights
from offload_rt.kernels import rounded
from offload_rt.model.formats.rounded import Int4Linear, Int8Linear

pytestmark = pytest.mark.skipif(
    bool(rounded.problem()), reason=f"no kernels here: {rounded.problem()}"
)


KINDS = pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])


def made(kind, inputs, outputs, bias):
    torch.manual_seed(inputs)
    linear = torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)
    module = kind(linear)
    assert module.product is not None
    return linear, module


@KINDS
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (96, 320), (1568, 128)])
def test_the_numbers_are_a_formulas(inputs, outputs, threads, kind):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            linear, module = made(kind, inputs, outputs, bias=outputs == 320)
            for count in (*range(1, 10), 16, 35):
                rows = torch.randn(1, count, inputs).to(torch.bfloat16)
                rows[0, 0] *= 1000  # each row has a scale of its own
                got = module(rows)
                assert torch.equal(got, module.product.by_formula(rows))
                plain = linear(rows)
                error = (got - plain).abs().amax(-1) / plain.abs().amax(-1)
                assert error.max() < (0.03 if kind is Int8Linear else 0.15)
    finally:
        torch.set_num_threads(before)


@KINDS
def test_rows_do_not_know_each_other_and_may_be_nothing(kind):
    _, module = made(kind, 96, 320, True)
    rows = torch.randn(12, 96).to(torch.bfloat16)
    rows[3] = 0
    with torch.inference_mode():
        together = module(rows)
        apart = torch.cat([module(row[None]) for row in rows])
    assert torch.equal(together, apart)
    assert torch.equal(together[3], module.product.bias)


def test_weights_on_a_grid_of_four_bits_lose_nothing():
    """Steps of an eighth from a whole number: numbers, scales and offsets are exact in bf16."""
    torch.manual_seed(5)
    steps = torch.randint(0, 16, (64, 96))
    steps[:, ::32], steps[:, 1::32] = 0, 15  # each group has both ends
    linear = torch.nn.Linear(96, 64, bias=False, dtype=torch.bfloat16)
    linear.weight.data = (steps * 0.125 - 2).bfloat16()
    module = Int4Linear(linear)
    rows = torch.randint(-127, 128, (5, 96)).bfloat16()
    rows[:, 0] = 127  # so activations are whole numbers as they are, too
    with torch.inference_mode():
        expected = rows.double() @ linear.weight.double().t()
        assert torch.equal(module(rows), expected.bfloat16())


@KINDS
def test_a_trace_has_the_formula(kind):
    from torch.fx.experimental.proxy_tensor import make_fx

    _, module = made(kind, 96, 64, True)
    rows = torch.randn(2, 3, 96).to(torch.bfloat16)
    traced = make_fx(module)(rows[0])
    assert torch.equal(traced(rows[1]), module(rows[1]))


@pytest.mark.parametrize("weights", [DraftWeights.INT8, DraftWeights.INT4])
def test_a_draft_model_is_rounded_and_in_two_kernels(make_tiny, weights):
    """What it drafts changes no token; its layers compute what transformers' forward does."""
    folder = make_tiny("qwen2", **WIDE, num_attention_heads=18, vocab_size=320)
    with engine_for(folder) as engine:
        expected = generate(engine, tokens=6)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=4, draft_weights=weights)
    with engine_for(folder, draft=draft) as engine:
        assert all(lean_layers(engine._draft_model))
        assert generate(engine, tokens=6) == expected
