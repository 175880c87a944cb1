"""bf16 on a CPU without instructions for it: fp32 blocks, the same results wherever weights lie."""

import pytest
import torch
from engines import all_logits, engine_for
from torch.nn.functional import linear

from offload_rt.model.formats import wide
from offload_rt.model.formats.packed import can_pack
from offload_rt.model.formats.wide import LEAST_ROWS, wide_linear, widen_linears, widens

CPU = torch.device("cpu")


@pytest.fixture
def no_bf16(monkeypatch):
    """A CPU that computes no bf16; returns how many rows went through blocks."""
    rows = []

    def counted(flat, weight, bias):
        rows.append(flat.reshape(-1, flat.shape[-1]).shape[0])
        return wide_linear(flat, weight, bias)

    monkeypatch.setattr(wide, "processor", lambda: ("some CPU", ""))
    monkeypatch.setattr(wide, "wide_linear", counted)
    return rows


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("outputs", [1, 48, 2000])
def test_rounds_an_fp32_sum_once(outputs, bias, monkeypatch):
    monkeypatch.setattr(wide, "BLOCK_NUMBERS", 96 * 100)  # the last block is a short one
    torch.manual_seed(0)
    layer = torch.nn.Linear(96, outputs, bias=bias, dtype=torch.bfloat16)
    rows = torch.randn(1, LEAST_ROWS + 3, 96, dtype=torch.bfloat16)
    exact = linear(rows.double(), layer.weight.double(), layer.bias.double() if bias else None)
    got = wide_linear(rows, layer.weight, layer.bias)
    assert got.dtype is torch.bfloat16 and got.shape == exact.shape
    assert torch.allclose(
        got.double(), exact, rtol=2**-8, atol=1e-5
    )  # half a step of bf16, doubled


def test_few_rows_are_left_to_the_library(monkeypatch):
    layer = torch.nn.Linear(64, 32, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: "the library's")
    rows = torch.randn(1, LEAST_ROWS, 64, dtype=torch.bfloat16)
    assert wide_linear(rows[:, 1:], layer.weight, layer.bias) == "the library's"
    assert wide_linear(rows, layer.weight, layer.bias).shape == (1, LEAST_ROWS, 32)


def test_only_where_bf16_has_no_instructions(no_bf16, monkeypatch):
    assert widens(torch.bfloat16, CPU) and not can_pack(torch.bfloat16, CPU)
    assert not widens(torch.float32, CPU)
    assert not widens(torch.bfloat16, torch.device("cuda:0"))
    monkeypatch.setattr(wide, "processor", lambda: ("some CPU", "avx512_bf16"))
    assert not widens(torch.bfloat16, CPU)


def test_every_linear_below_a_module_is_widened(no_bf16):
    module = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 16)).bfloat16()
    rows = torch.randn(LEAST_ROWS, 16, dtype=torch.bfloat16)
    before = module(rows)
    widen_linears(module)
    assert torch.allclose(module(rows), before, atol=0.05) and no_bf16 == [LEAST_ROWS] * 2


def test_streamed_equals_resident(no_bf16, make_tiny):
    folder = make_tiny("llama", dtype="bfloat16", num_hidden_layers=3)
    options = {"prefill_chunk_tokens": 512}
    with engine_for(folder, resident_layers=3, **options) as engine:
        resident = all_logits(engine)
    assert max(no_bf16) >= LEAST_ROWS
    with engine_for(folder, resident_layers=0, slots=2, **options) as engine:
        assert torch.equal(all_logits(engine), resident)


def test_weights_a_family_keeps_in_fp32_are_left_to_the_library(monkeypatch):
    layer = torch.nn.Linear(64, 32)
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *_: "the library's")
    rows = torch.randn(1, LEAST_ROWS, 64)
    assert wide_linear(rows, layer.weight, layer.bias) == "the library's"
