"""Drafting, offloaded KV, 16 and 4 bits, two GPUs: the cases of the double, for real."""

import pytest
import torch
from engines import all_logits, engine_for, generate
from test_cuda_numbers import CASES, PROMPTS, STREAMED, TOKENS, folders, llama, options_of  # noqa: F401
from test_engine_on_gpu import ROOMY, on_gpu
from test_rounded import by_hand, linear

from offload_rt.config import DraftWeights, HomeKind
from offload_rt.device.cuda.device import TorchDriver
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


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_streamed_equals_resident_in_16_bits(make_tiny, family, dtype):
    folder = make_tiny(family, dtype=dtype)
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
