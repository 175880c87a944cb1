"""Resident layers in matrix registers: the bits of streamed ones, in the quickest passes there are.

The kernels are used here though the library is kept from the registers (`conftest.py`).
"""

from dataclasses import replace

import pytest
import torch
from engines import all_logits, engine_for
from test_exact import SIZES, STREAMED, TEXT, agree, attend_in_registers, engines
from test_lean import FAMILIES, WIDE, lean_layers, some_passes
from test_measure import QUICK
from test_workload import CPU
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from offload_rt.config import DraftConfig, DraftWeights, Exact
from offload_rt.costs.drafters import Drafting, Expected
from offload_rt.device.cpu import CpuDevice
from offload_rt.kernels import registers, stored
from offload_rt.kernels.layers import MANY_ROWS, REGISTER_ROWS
from offload_rt.kernels.registers import ROWS_LYING
from offload_rt.kernels.rows import fits_registers
from offload_rt.model import exact, exactness, lean, network
from offload_rt.model.formats import packed
from offload_rt.model.formats.packed import PackedLinear
from offload_rt.model.lean import LeanLayer
from offload_rt.planning.fit import PlacedRun
from offload_rt.profiling.compute import TimedLayer
from offload_rt.profiling.profile import WeightOrder

pytestmark = pytest.mark.skipif(bool(registers.problem()), reason=registers.problem())


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """Of what is compared here, which is not known before, and which others must not take over."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def in_registers(monkeypatch, own_cache):
    monkeypatch.setenv("OFFLOAD_RT_CACHE", str(own_cache))
    for module in (exact, lean, packed, stored):
        monkeypatch.setattr(module, "multiplies_in_registers", fits_registers)
    monkeypatch.setattr(exactness, "takes_matrix_registers", lambda _: True)
    monkeypatch.setattr(exact, "goes_by_count", lambda _: True)
    attend_in_registers(True, monkeypatch)


def linears_of(engine):
    layers = engine.network._layers
    return [m for layer in layers for m in layer.modules() if isinstance(m, PackedLinear)]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_resident(family, make_tiny):
    folder = make_tiny(family, **WIDE, **FAMILIES[family])
    found = []
    for resident, how in ((2, {}), (1, {"slots": 1}), (0, {"slots": 1})):
        with engine_for(folder, exact=Exact.ON, resident_layers=resident, **how) as engine:
            assert sorted(lean_layers(engine)) == [False] * (2 - resident) + [True] * resident
            assert not linears_of(engine)  # as they lie
            found.append(some_passes(engine))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_row_has_the_same_logits_in_any_pass(make_tiny):
    with engines(make_tiny("llama", **WIDE, **FAMILIES["llama"])) as engine:
        assert all(lean_layers(engine)) and agree(engine)


@pytest.mark.parametrize("rows", [MANY_ROWS, REGISTER_ROWS])
def test_the_two_kernels_of_a_layer_have_the_bits_of_its_modules(rows, make_tiny, monkeypatch):
    folder, found, by_modules = make_tiny("qwen2", **WIDE, **FAMILIES["qwen2"]), [], []
    real = Qwen2DecoderLayer.forward
    monkeypatch.setattr(
        Qwen2DecoderLayer, "forward", lambda *a, **o: by_modules.append(0) or real(*a, **o)
    )
    for in_two in (True, False):
        if not in_two:
            monkeypatch.setattr(network, "lean_layer", lambda *_, **__: None)
        with engines(folder, prefill_chunk_tokens=rows) as engine:
            assert lean_layers(engine) == [in_two] * 2
            by_modules.clear()
            found.append(engine.forward([(0, TEXT[:rows])], reuse=True).clone())
            assert len(by_modules) == (0 if in_two else 2)
    assert torch.equal(*found)


def test_what_rows_become_in_a_layer_is_there_once_for_all(make_tiny):
    with engines(make_tiny("llama", **WIDE, **FAMILIES["llama"])) as engine:
        one, other = (layer.forward.args[1] for layer in engine.network._layers)
        assert one._products is other._products and one._summed is other._summed
        assert one._products.shape[0] == REGISTER_ROWS
    for wide in (replace(one._sizes, hidden=2**14), replace(one._sizes, heads=128)):
        widest = max(wide.hidden, wide.heads * wide.head_dim)
        assert wide.suit and wide.most_rows * widest <= 2**19


def test_shapes_that_do_not_fit_are_left_to_the_library(make_tiny):
    """1,419 products are no whole panels; the other matrices stay as they lie."""
    sizes = SIZES | {"hidden_size": 384, "head_dim": 64}
    folder, found = make_tiny("llama", **sizes, dtype="bfloat16"), []
    for config in ({}, STREAMED):
        with engines(folder, **config) as engine:
            kept = linears_of(engine)
            assert kept and all(linear.outputs % 64 or linear.inputs % 32 for linear in kept)
            found.append(all_logits(engine))
    assert torch.equal(*found)


def test_what_is_traced_are_torch_s_kernels(monkeypatch):
    linear = torch.nn.Linear(128, 192, dtype=torch.bfloat16)
    made, rows = PackedLinear(linear, exact=True), torch.randn(3, 128).to(torch.bfloat16)
    assert made.in_registers
    expected = made(rows).float()
    monkeypatch.setattr(packed, "traced", lambda: True)
    monkeypatch.setattr(made, "product", None)
    torch.testing.assert_close(made(rows).float(), expected, atol=0.02, rtol=0.02)


def test_a_draft_model_takes_them_whatever_its_target_does(make_tiny):
    folder = make_tiny("llama", **WIDE, **FAMILIES["llama"])
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=4, draft_weights=DraftWeights.SAME)
    with engine_for(folder, draft=draft) as engine:  # without row-invariant passes
        network = engine._draft_model.network
        kept = [m for m in network._model.modules() if isinstance(m, PackedLinear)]
        fits = [linear.in_registers for linear in kept if linear.outputs % 64 == 0]
        assert len(kept) == 15 and fits == [True] * 14  # all but the head
        assert not any(linear.in_registers for linear in linears_of(engine))


def test_auto_is_on_where_they_are_the_quickest(make_tiny, monkeypatch):
    folder = make_tiny("llama", **WIDE, **FAMILIES["llama"])
    with engine_for(folder, exact=Exact.AUTO) as engine:
        assert engine.exact.on and all(lean_layers(engine))
    for way, config in (("fp32", {"dtype": "float32"}), ("no kernels", {})):
        if way == "no kernels":
            monkeypatch.setattr(exactness, "kernels_multiply_plain", lambda: False)
        with engine_for(folder, exact=Exact.AUTO, **config) as engine:
            assert engine.exact.why == "all is on the device and nobody drafts", way


def test_plans_know_it(make_tiny):
    machine = replace(CPU.profile.machine, kernels=None, matrix_registers=True)
    speeds = replace(CPU, profile=replace(CPU.profile, machine=machine))
    for dtype in ("bfloat16", "float32"):
        folder = make_tiny("llama", dtype=dtype)
        with engine_for(folder, exact=Exact.AUTO) as engine:
            run = PlacedRun(
                checkpoint=engine.checkpoint,
                config=engine.config,
                speeds=speeds,
                placement=engine.placement,
                context_tokens=16,
            )
            load = run.work(Drafting(engine.draft), Expected()).load
            assert load.tile == (engine.exact.rows or 1)
            assert engine.exact.on == (dtype == "bfloat16")


def test_a_layer_is_timed_so():
    effort = replace(QUICK, shapes=((64, 128, 1, 1, 64),))
    (shape,) = effort.layer_shapes("bfloat16", 2)
    layer = TimedLayer(shape, CpuDevice(), torch.bfloat16, WeightOrder.PACKED, effort)
    kept = [m for one in layer._layers for m in one.modules() if isinstance(m, PackedLinear)]
    assert kept and all(linear.in_registers for linear in kept)
    assert isinstance(next(layer._turns), LeanLayer)
    streamed = TimedLayer(shape, CpuDevice(), torch.bfloat16, WeightOrder.PLAIN, effort)
    assert not isinstance(next(streamed._turns), LeanLayer)


def test_no_matrix_is_copied(make_tiny):
    """Layers that stay have their images for good, and the head is the embedding."""
    folder = make_tiny("llama", **WIDE, **FAMILIES["llama"], vocab_size=320)
    for way in (Exact.AUTO, Exact.OFF):
        with engine_for(folder, exact=way) as engine:
            weights = [[*layer.parameters()] for layer in engine.network._layers]
            images = {len({w.untyped_storage().data_ptr() for w in own}) for own in weights}
            head = engine.network._model.get_output_embeddings()
            copied = isinstance(head, PackedLinear)
            assert copied == engine.placement.packs_head == (way is Exact.OFF), way
            assert (images == {1}) == (way is Exact.AUTO), way


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 128), (1056, 64), (2112, 192)])
def test_a_matrix_as_it_lies_gives_any_number_of_rows_the_same_bits(inputs, outputs):
    """Of one, which is not turned, of groups of 16, and of more than are turned at once."""
    generator = torch.Generator().manual_seed(0)
    weight, rows = (
        torch.randn(n, inputs, generator=generator).to(torch.bfloat16) for n in (outputs, 131)
    )
    bias = torch.linspace(-1, 1, outputs).to(torch.bfloat16)
    product = stored.product_for(stored.How.PLAIN, inputs, outputs, exact=True)
    for added in (None, bias):
        whole = product(rows, weight, added)
        close = torch.nn.functional.linear(
            rows.float(), weight.float(), None if added is None else added.float()
        )
        torch.testing.assert_close(whole.float(), close, rtol=0.02, atol=0.05)
        for count in (1, 2, 15, 16, 17, 31, 33, 48, 63, ROWS_LYING, ROWS_LYING + 1):
            assert torch.equal(product(rows[-count:], weight, added), whole[-count:]), count
