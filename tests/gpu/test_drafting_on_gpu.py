"""Drafting, offloaded KV, 16 and 4 bits, two GPUs: the cases of the double, for real."""

import pytest
import test_engine_on_gpu as engines_on_gpu
import torch
from eagle3_models import write_head
from engines import all_logits, engine_for, generate
from mtp_models import IDS, write_mtp
from test_cuda_numbers import CASES, PROMPTS, STREAMED, TOKENS, folders, llama, options_of  # noqa: F401
from test_engine_on_gpu import ROOMY, on_gpu
from test_rounded import by_hand, linear
from test_triforce import DIM, HEADS, SHAPE, SPEC, best_chunks, numbered, rows_of, sizes_for
from tiny import DEEP, write_model

from offload_rt.config import (
    DraftConfig,
    DraftWeights,
    HomeKind,
    RetrievalConfig,
    RuntimeConfig,
)
from offload_rt.device.cuda.device import TorchDriver
from offload_rt.device.opening import open_device
from offload_rt.engine import NO_DRAFT
from offload_rt.kv.retrieval import RetrievalKV
from offload_rt.model.formats.rounded import rounded_linear


@pytest.fixture(scope="module")
def plain(llama):  # noqa: F811
    answers = {}
    for many, prompts in PROMPTS.items():
        options = {"device": "cuda:0", "device_limit_bytes": ROOMY}
        with engine_for(llama, prompts=prompts, tokens=TOKENS, **options) as engine:
            answers[many] = generate(engine, prompts, tokens=TOKENS)
    return answers


ON_GPUS = {
    name: case | {"device": ",".join(f"cuda:{i}" for i in range(case.get("gpus", 1)))}
    for name, case in CASES.items()
}


@pytest.mark.parametrize("case", ON_GPUS)
def test_same_answers_as_drafted_by_nobody(llama, folders, plain, monkeypatch, case):  # noqa: F811
    needed = ON_GPUS[case].get("gpus", 1)
    if torch.cuda.device_count() < needed:
        pytest.skip(f"torch finds no {needed} GPUs")
    many, driver, options = options_of(folders, **ON_GPUS[case])
    if not driver.get("pin", True):
        monkeypatch.setattr(TorchDriver, "register", lambda *_: "refused by the test")
        monkeypatch.setattr(TorchDriver, "allocate_pinned", lambda *_: None)
    with on_gpu(llama, prompts=PROMPTS[many], tokens=TOKENS, **options) as engine:
        assert generate(engine, PROMPTS[many], tokens=TOKENS) == plain[many]


@pytest.mark.parametrize("nodes", [4, 12], ids=["chain", "tree"])
@pytest.mark.parametrize("kind", ["mtp", "eagle3"])
@pytest.mark.parametrize("place", [{"resident_layers": 4, "home": HomeKind.AUTO}, STREAMED])
def test_what_reads_hidden_states_drafts_what_nobody_does(tmp_path, kind, nodes, place):
    """A module of the model's own and a head, whose passes are recorded after the first."""
    target, name = tmp_path / "target", kind
    if kind == "mtp":
        write_mtp(target, **DEEP)
    else:
        write_model(target, **DEEP, **IDS)
        name = f"eagle3:{write_head(tmp_path / 'head', target)}"
    draft = DraftConfig(draft=name, draft_tokens=nodes)
    answers = []
    for drafts in (NO_DRAFT, draft):
        with on_gpu(target, tokens=TOKENS, draft=drafts, **place) as engine:
            answers.append(generate(engine, tokens=TOKENS))
            if drafts is draft:
                assert engine.tally.seen().hits[0] > 0
    assert answers[0] == answers[1]


@pytest.mark.parametrize("group", [1, 3])
def test_a_retrieval_cache_keeps_what_the_slow_formula_does(group):
    """In blocks where one head asks: the share of several is known at the end."""
    config = RetrievalConfig(budget_tokens=48, chunk_tokens=4, recent_share=0.25)
    sizes, length = sizes_for(config), 150
    keys, values = numbered(length, 4)
    noise = torch.Generator().manual_seed(2)
    query = 3 * torch.randn(group * HEADS, 1, DIM, generator=noise)
    device = open_device(RuntimeConfig(device=engines_on_gpu.DEVICE))
    there = device.torch_device
    retrieval = RetrievalKV(device, [SHAPE], torch.float32, sizes)
    retrieval.begin_build(length, config.shares[0])
    retrieval.begin_layer(0, query.to(there), SPEC)
    rows = 16 if group == 1 else length
    for first in range(0, length, rows):
        block = slice(first, first + rows)
        retrieval.see(0, first, keys[:, block].to(there), values[:, block].to(there))
    retrieval.end_build()
    held = [set(positions) for positions in rows_of(retrieval)]
    device.close()
    assert held == best_chunks(config, sizes, keys, query, length)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_streamed_equals_resident_in_16_bits(make_tiny, family, dtype):
    folder = make_tiny(family, dtype=dtype, **DEEP)
    with on_gpu(folder, resident_layers=4, home=HomeKind.AUTO) as engine:
        resident = all_logits(engine)
    with on_gpu(folder, **STREAMED) as engine:
        assert torch.equal(all_logits(engine), resident)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 9])
def test_4_bits_compute_what_rounding_by_hand_does(bias, rows):
    layer = linear(320, 96, bias).to("cuda:0")
    x = torch.randn(1, rows, 96, dtype=torch.bfloat16, device="cuda:0")
    weight = by_hand(layer, DraftWeights.INT4)
    expected = x.double() @ weight.t() + (layer.bias.double() if bias else 0)
    with torch.inference_mode():
        got = rounded_linear(layer, DraftWeights.INT4)(x)
    assert (got.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds no second GPU")
def test_two_gpus_compute_what_one_does(wide):
    with on_gpu(wide, resident_layers=0, slots=2) as engine:
        alone = all_logits(engine)
    both = {"device": "cuda:0,cuda:1", "device_limit_bytes": None}
    with on_gpu(wide, resident_layers=0, slots=2, **both) as engine:
        assert torch.equal(all_logits(engine), alone)
