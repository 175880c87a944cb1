"""Rounded weights of draft models: what they compute, what they take, what they change."""

import ctypes
import json

import psutil
import pytest
import torch
from engines import PROMPT, engine_for, generate
from fake_cuda import build_for_real, fake_gpu
from test_fake_cuda import gpu  # noqa: F401 - a fixture
from test_speculation import IDS

from offload_rt.config import DraftConfig, DraftWeights, GenerationConfig, RuntimeConfig
from offload_rt.costs.sizes import draft_base_bytes
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.engine import Engine, Run
from offload_rt.errors import ConfigError, OffloadError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats import rounded as quantized
from offload_rt.model.formats.base import GROUP, in_panels, matrix_bytes, resolve_weights
from offload_rt.model.formats.packed import replace_linears
from offload_rt.model.formats.rounded import rounded_linear
from offload_rt.runner import loading
from offload_rt.speculative.draft_model.kind import draft_weight_bytes

INT4, INT8 = DraftWeights.INT4, DraftWeights.INT8
ROUNDED = [INT8, INT4]


def linear(outputs, inputs, bias):
    torch.manual_seed(outputs)
    return torch.nn.Linear(inputs, outputs, bias=bias, dtype=torch.bfloat16)


def by_hand(layer, weights):
    """The weight in fp64, rounded number by number."""
    weight = layer.weight.detach().double()
    if weights is INT8:
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        return torch.round(weight / scale) * scale
    made = torch.empty_like(weight)
    for start in range(0, weight.shape[1], GROUP):
        group = weight[:, start : start + GROUP]
        low, high = group.min(dim=1, keepdim=True)[0], group.max(dim=1, keepdim=True)[0]
        scale = (high - low) / 15
        made[:, start : start + GROUP] = low + torch.round((group - low) / scale) * scale
    return made


@pytest.mark.parametrize("weights", ROUNDED)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
def test_computes_with_weights_rounded_by_hand(weights, bias, rows, monkeypatch):
    monkeypatch.setattr(quantized, "_BLOCK_NUMBERS", 128 * 96)  # the last block is a short one
    layer = linear(320, 96, bias)
    x = torch.randn(1, rows, 96).bfloat16()
    expected = x.double() @ by_hand(layer, weights).t() + (layer.bias.double() if bias else 0)
    with torch.inference_mode():
        got = rounded_linear(layer, weights)(x)
    assert got.dtype is torch.bfloat16 and got.shape == (1, rows, 320)
    error = (got.double() - expected).abs().max() / expected.abs().max()
    # int8 rounds the activations too, int4 its scales and offsets to bf16; plain rounding is 0.06
    assert error < 0.02
    with torch.inference_mode():
        assert (layer(x).double() - expected).abs().max() / expected.abs().max() > error / 4


@pytest.mark.parametrize("weights", ROUNDED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_given_weight_is_left_alone(weights, dtype):
    """A tied head is the embedding, too."""
    layer, x = linear(64, 96, True).to(dtype), torch.randn(3, 96).to(dtype)
    before = layer.weight.detach().clone()
    with torch.inference_mode():
        got, plain = rounded_linear(layer, weights)(x), layer(x)
    assert torch.equal(layer.weight, before)
    assert got.dtype is dtype and (got - plain).abs().max() < 0.15 * plain.abs().max()


@pytest.mark.parametrize("weights", ROUNDED)
def test_blocks_change_nothing(weights, monkeypatch):
    layer, x = linear(320, 96, False), torch.randn(5, 96).bfloat16()
    with torch.inference_mode():
        whole = rounded_linear(layer, weights)(x)
        monkeypatch.setattr(quantized, "_BLOCK_NUMBERS", 1)
        assert torch.equal(rounded_linear(layer, weights)(x), whole)


def test_what_kernels_do_not_take_stays_as_it_is():
    assert rounded_linear(linear(32, 40, False), INT4) is None  # 40 is not in groups of 32
    assert rounded_linear(linear(24, 64, False), INT4) is None
    module = torch.nn.Sequential(linear(32, 40, True), linear(32, 32, True))
    odd = module[0].weight
    replace_linears(module, lambda layer: rounded_linear(layer, INT4))
    assert torch.equal(module[0].weight, odd) and module[0].weight.data_ptr() != odd.data_ptr()
    assert type(module[1]) is quantized.Int4Linear


class Scaled(torch.nn.Embedding):
    """As Gemma's: what a row gives is scaled."""

    def forward(self, ids):
        return super().forward(ids) * 3.0


@pytest.mark.parametrize("kind", [torch.nn.Embedding, Scaled])
@pytest.mark.parametrize("shape", [(1, 7), (3,)])
def test_looks_up_rows_rounded_by_hand(kind, shape, monkeypatch):
    monkeypatch.setattr(quantized, "_BLOCK_NUMBERS", 128 * 96)  # the last block is a short one
    torch.manual_seed(3)
    embedding = kind(320, 96, padding_idx=300, dtype=torch.bfloat16)
    weight, factor = embedding.weight.detach().clone(), 3.0 if kind is Scaled else 1.0
    ids = torch.randint(0, 320, shape)
    scale = weight.double().abs().amax(dim=1, keepdim=True) / 127
    expected = (torch.round(weight.double() / scale) * scale).bfloat16()[ids] * factor
    rounded = quantized.RoundedEmbedding(embedding)
    with torch.inference_mode():
        got = rounded(ids)
    assert got.dtype is torch.bfloat16 and got.shape == (*shape, 96)
    assert torch.allclose(got, expected, rtol=2**-7, atol=1e-6)
    assert not torch.equal(got, weight[ids] * factor)  # it is rounded
    assert all(p.numel() == 0 for p in rounded.parameters())  # and nothing else is kept


def test_an_embedding_that_is_a_head_of_4_bits_has_its_rows_there(monkeypatch):
    if not quantized.fours.takes(96, 320):
        pytest.skip("kernels of our own are not here")
    monkeypatch.setattr(quantized, "_BLOCK_NUMBERS", 128 * 96)
    embedding, head = Scaled(320, 96, dtype=torch.bfloat16), linear(320, 96, False)
    embedding.weight = head.weight
    groups = head.weight.detach().double().unflatten(1, (-1, GROUP))
    made = rounded_linear(head, INT4)
    shared = quantized.RoundedEmbedding(embedding, made)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = (high - low) / 15
    expected = ((groups - low) / scale).round() * scale.bfloat16() + low.bfloat16()
    with torch.inference_mode():
        for ids in (torch.tensor([[0, 319, 64, 63, 64, 17, 33]]), torch.tensor([50])):
            hand = expected.flatten(1)[ids].bfloat16() * 3.0
            assert torch.allclose(shared(ids), hand, rtol=2**-7, atol=1e-6)
        row = torch.randn(1, 96, dtype=torch.bfloat16)
        product = row.float() @ shared(torch.arange(320)).float().t() / 3.0
        assert torch.allclose(made(row).float(), product, rtol=0.02, atol=0.05)
    assert not [t for t in shared.__dict__.values() if isinstance(t, torch.Tensor)]


def test_an_embedding_that_is_the_head_has_its_rows_there(monkeypatch):
    """The same numbers, bit for bit, as of rows of its own; and nothing is kept twice."""
    monkeypatch.setattr(quantized, "_BLOCK_NUMBERS", 128 * 96)
    embedding, head = Scaled(320, 96, dtype=torch.bfloat16), linear(320, 96, False)
    embedding.weight = head.weight
    made, weight = rounded_linear(head, INT8), head.weight.detach().clone()
    shared = quantized.RoundedEmbedding(embedding, made)
    own = Scaled(320, 96, dtype=torch.bfloat16, _weight=weight)
    own = quantized.RoundedEmbedding(own)
    with torch.inference_mode():
        for ids in (torch.tensor([[0, 319, 64, 63, 64]]), torch.tensor([5])):
            assert torch.equal(shared(ids), own(ids))
    if quantized.suits(96, 320):
        assert not [t for t in shared.__dict__.values() if isinstance(t, torch.Tensor)]
        assert in_panels(320, 96, dtype="bfloat16") and not in_panels(323, 96, dtype="bfloat16")
    assert not in_panels(320, 96, dtype="float32")


@pytest.mark.parametrize("weights", ROUNDED)
@pytest.mark.parametrize("nodes", [3, 12], ids=["chain", "tree"])
def test_answers_do_not_change(make_tiny, weights, nodes):
    """Law 3, and the draft model is used: the target's own weights, rounded, are often right."""
    folder = make_tiny("llama", **(IDS | {"vocab_size": 320}))
    with engine_for(folder, tokens=24) as engine:
        plain = generate(engine, tokens=24)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=nodes, draft_weights=weights)
    with engine_for(folder, tokens=24, draft=draft, resident_layers=1) as engine:
        kinds = {type(m) for m in engine._draft_model.network._model.modules()}
        assert {INT8: quantized.Int8Linear, INT4: quantized.Int4Linear}[weights] in kinds
        assert torch.nn.Linear not in kinds  # the head is rounded too
        run = Run.start(engine, [PROMPT], engine_sampling(), GenerationConfig(max_tokens=24))
        run.prefill()
        while run.active:
            run.step()
        assert [s.emitted for s in run.sequences] == plain
        assert run.report().speculation.accepted > 2  # a random model: nearly all tokens are close


def engine_sampling():
    from offload_rt.config import SamplingConfig

    return SamplingConfig()


def test_what_is_planned_is_what_is_kept(make_tiny):
    shape = {"hidden_size": 512, "intermediate_size": 2048, "dtype": "bfloat16", "vocab_size": 3200}
    shape["large"] = True
    shape["num_hidden_layers"] = 8  # freed memory between what is kept would add up
    folder = make_tiny("llama", tie_word_embeddings=True, **shape)
    checkpoint = open_checkpoint(folder)
    sizes = {}
    for weights in (DraftWeights.SAME, *ROUNDED):
        draft = DraftConfig(draft=f"model:{folder}", draft_tokens=4, draft_weights=weights)
        sizes[weights] = draft_weight_bytes(checkpoint, draft, CPU)
        with engine_for(folder, draft=draft, resident_layers=0, slots=2) as engine:
            network = engine._draft_model.network
            held = sum(module_bytes(m) for m in network._model.modules())
            assert held <= sizes[weights] <= held * 1.02 + 2**16
            generate(engine, tokens=6)
            memory = engine.memory()
            assert memory.device_peak_bytes <= memory.device_planned_bytes
    assert sizes[INT4] < sizes[INT8] < sizes[DraftWeights.SAME]


FITS, ODD = 320, 323  # of a vocabulary; each with either weights, and in every family


@pytest.mark.parametrize(
    ("family", "weights", "vocabulary"),
    [
        *(("llama", INT8, FITS), ("llama", INT4, ODD), ("phi", INT8, FITS), ("phi", INT4, ODD)),
        *(("gpt_neox", INT8, ODD), ("gpt_neox", INT4, FITS)),
        *(("gemma2", INT8, ODD), ("gemma2", INT4, FITS)),
    ],
)
def test_ends_take_what_is_planned_in_every_family(make_tiny, family, weights, vocabulary):
    """Untied heads, heads with a bias or another name in the files, embeddings that scale."""
    more = {"llama": {"tie_word_embeddings": False}, "gpt_neox": {"num_key_value_heads": 4}}
    own = more.get(family, {})
    folder = make_tiny(family, dtype="bfloat16", vocab_size=vocabulary, num_hidden_layers=1, **own)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=12, draft_weights=weights)
    planned = draft_base_bytes(open_checkpoint(folder), weights, CPU)
    with engine_for(folder, draft=draft) as engine:
        model = engine._draft_model.network._model
        layers = {id(p) for p in engine._draft_model.network._layers for p in p.modules()}
        outside = [m for m in model.modules() if id(m) not in layers]
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        if type(head) is torch.nn.Linear and head.weight is embedding.weight:
            outside.remove(head)
        held = sum(map(module_bytes, outside))
        assert abs(held - planned) < 2**14  # pages of images; a bias is fp32 beside int8
        generate(engine, tokens=3)


def module_bytes(module):
    """Bytes of a module's own tensors, rounded or not."""
    if isinstance(module, quantized.Int8Linear):
        if (product := module.product) is not None:
            nbytes = product.memory.nbytes
            assert nbytes == matrix_bytes(INT8, module.outputs, module.inputs, dtype="bfloat16")
            return nbytes + (0 if product.bias is None else product.bias.nbytes)
        weight, bias = torch.ops.quantized.linear_unpack(module._packed)
        return matrix_bytes(INT8, *weight.shape) + (0 if bias is None else bias.nbytes)
    if isinstance(module, quantized.RoundedEmbedding):
        own = [] if module._product is not None else [module._rounded, module._scales]
        return sum(tensor.nbytes for tensor in own)
    tensors = [*module._parameters.values()]
    if isinstance(module, torch.nn.Linear) and module.weight.shape[0] == 3200:
        tensors = []  # the embedding's
    if isinstance(module, quantized.Int4Linear):
        weight = [module.weight, module.affine] if module.product is None else []
        tensors = [*weight, *(p.memory for p in [module.product] if p), module.bias]
    if type(module).__name__ == "PackedLinear":
        return module.weight.numel() * 2
    return sum(t.nbytes for t in tensors if t is not None)


@pytest.mark.parametrize("inputs", [2048, 608])  # of the latter int8 kernels fill up a block
@pytest.mark.parametrize("weights", ROUNDED)
def test_nothing_else_is_kept(weights, inputs):
    """Of the process, too: a kernel's library may keep a weight beside its packed form."""
    layer = linear(4096, inputs, False)
    with torch.inference_mode():
        rounded_linear(layer, weights)(torch.randn(1, inputs).bfloat16())  # libraries start up
        ctypes.CDLL(None).malloc_trim(0)
        before = psutil.Process().memory_info().rss
        made = [rounded_linear(layer, weights) for _ in range(12)]
        for one in made:
            one(torch.randn(1, inputs).bfloat16())
        ctypes.CDLL(None).malloc_trim(0)
    grown = psutil.Process().memory_info().rss - before
    kept = len(made) * matrix_bytes(weights, 4096, inputs, dtype="bfloat16")
    assert 0.5 * kept < grown < 1.1 * kept + 2**22


@pytest.mark.parametrize("flags", [frozenset(), frozenset({"avx2", "avx512bw"})])
def test_activations_have_seven_bits_where_products_would_overflow(flags, monkeypatch):
    """255 levels times 127, twice, is more than 16 bits hold; it is what FBGEMM adds up there."""
    monkeypatch.setattr(quantized, "processor_flags", lambda: flags)
    monkeypatch.setattr(quantized, "suits", lambda *_: False)
    layer, x = linear(64, 96, False), torch.randn(1, 96).bfloat16()
    seen = []
    real = torch.ops.quantized.linear_dynamic
    monkeypatch.setattr(
        torch.ops.quantized, "linear_dynamic", lambda *a: seen.append(a[2]) or real(*a)
    )
    with torch.inference_mode():
        rounded_linear(layer, INT8)(x)
        monkeypatch.setattr(quantized, "processor_flags", lambda: frozenset({"avx512_vnni"}))
        rounded_linear(layer, INT8)(x)
    assert seen == [True, False]


def test_auto_is_int8_for_bf16_on_a_cpu():
    auto = DraftWeights.AUTO
    assert resolve_weights(auto, "bfloat16", CPU) is INT8
    assert resolve_weights(auto, "float32", CPU) is DraftWeights.SAME
    assert resolve_weights(auto, "bfloat16", CUDA) is DraftWeights.SAME
    assert resolve_weights(INT4, "float32", CPU) is INT4
    with pytest.raises(ConfigError, match="int8 is for the CPU"):
        resolve_weights(INT8, "bfloat16", CUDA)
    with pytest.raises(ConfigError, match="the one that drafts is float16"):
        resolve_weights(INT4, "float16", CUDA)


def test_the_flag_reaches_the_draft_model_and_nothing_else(offload_run, tiny_model, tmp_path):
    common = ("generate", tiny_model, "-p", "the quick brown", "-n", 8, "--device-memory", "256MiB")
    for draft in ("ngram", "triforce", "none", "auto"):
        done = offload_run(*common, "--draft", draft, "--draft-weights", "int4")
        assert done.code == 2 and "--draft-weights is for drafting with a MODEL" in done.err
    done = offload_run(
        *common, "--draft", f"model:{tiny_model}", "--draft-weights", "int4", "--json"
    )
    assert done.code == 0 and json.loads(done.out)["plan"]["draft_weights"] == "int4"
    plan = tmp_path / "plan.json"
    done = offload_run(
        "plan", tiny_model, "--draft", f"model:{tiny_model}", "--draft-weights", "int4",
        "--device", "cpu", "--device-memory", "256MiB", "--context", 64, "--output", plan,
    )  # fmt: skip
    assert done.code == 0
    assert json.loads(plan.read_text())["options"]["draft_weights"] == "int4"


def test_int4_on_a_gpu(gpu, make_tiny, monkeypatch):  # noqa: F811
    """The whole path on fake tensors: packing, passes of the draft model, no hidden host sync."""
    monkeypatch.setattr(loading, "Network", build_for_real(loading.Network))
    folder = make_tiny("llama", dtype="bfloat16", num_hidden_layers=2, vocab_size=320)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=3, draft_weights=INT4)
    runtime = RuntimeConfig(device="cuda:0", resident_layers=1, slots=1, prefill_chunk_tokens=8)
    with (
        fake_gpu(gpu),
        Engine(
            open_checkpoint(folder), runtime, capacities=[40], prompt_tokens=9, draft=draft
        ) as engine,
    ):
        run = Run.start(engine, [PROMPT[:9]], engine_sampling(), GenerationConfig(max_tokens=12))
        run.prefill()
        run.step()
        kinds = {type(m) for m in engine._draft_model.network._model.modules()}
        assert {quantized.Int4Linear, quantized.RoundedEmbedding} <= kinds
        assert torch.nn.Linear not in kinds


def test_int8_on_a_gpu_is_refused_before_weights_are_read(gpu, make_tiny):  # noqa: F811
    folder = make_tiny("llama", dtype="bfloat16", num_hidden_layers=2)
    draft = DraftConfig(draft=f"model:{folder}", draft_tokens=3, draft_weights=INT8)
    runtime = RuntimeConfig(device="cuda:0")
    refused = pytest.raises(OffloadError, match="int8 is for the CPU")
    with fake_gpu(gpu), refused:
        Engine(open_checkpoint(folder), runtime, capacities=[40], prompt_tokens=9, draft=draft)
