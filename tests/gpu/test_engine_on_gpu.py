"""The engine on a real GPU: same output streamed and resident, no hidden sync, planned memory.

What needs no real driver runs without a GPU, too, over CPU tensors (`test_cuda_numbers.py`).
"""

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate, reference_model
from tiny import DEEP

from offload_rt.config import HomeKind, SamplingConfig
from offload_rt.device.cuda.device import TorchDriver

DEVICE = "cuda:0"
ROOMY = 4 * 2**30
FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "phi3"]


def on_gpu(folder, **config):
    options = {"device": DEVICE, "device_limit_bytes": ROOMY, "home": HomeKind.HOST}
    return engine_for(folder, **(options | config))


def all_resident(folder):
    with on_gpu(folder, resident_layers=6, home=HomeKind.AUTO) as engine:
        return all_logits(engine)


@pytest.fixture
def resident(wide):
    return all_resident(wide)


@pytest.mark.parametrize("home", [HomeKind.HOST, HomeKind.DISK])
@pytest.mark.parametrize(("slots", "kept"), [(1, 0), (2, 0), (3, 0), (2, 1), (1, 3), (2, 4)])
def test_streamed_equals_resident(wide, resident, slots, kept, home):
    with on_gpu(wide, slots=slots, resident_layers=kept, home=home) as engine:
        assert torch.equal(all_logits(engine, steps=3), resident)


def test_many_streamed_steps_repeat_bit_for_bit(wide):
    answers = set()
    for slots in (1, 2, 3):
        with on_gpu(wide, slots=slots, resident_layers=0) as engine:
            answers.add(tuple(generate(engine)[0]))
    assert len(answers) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_transformers(make_tiny, family):
    folder = make_tiny(family, pad_token_id=0, **DEEP)
    model = reference_model(folder).to(DEVICE)
    with on_gpu(folder, slots=2, resident_layers=1) as engine:
        tokens = generate(engine, tokens=12)[0]
        first = all_logits(engine, steps=0)
    ids = torch.tensor([PROMPT], device=DEVICE)
    with torch.no_grad():
        wanted = model(ids).logits[0, -1:]
        for _ in range(12):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    torch.testing.assert_close(first, wanted, rtol=1e-4, atol=1e-4)
    assert tokens == ids[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("home", [HomeKind.HOST, HomeKind.DISK])
def test_a_pass_never_makes_the_host_wait(wide, home):
    with on_gpu(wide, slots=2, resident_layers=1, home=home) as engine:
        engine.forward([(0, PROMPT)], reuse=True)  # libraries set themselves up in their first use
        engine.forward([(0, [5])], reuse=False)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for token in (6, 7, 8):
                engine.forward([(0, [token])], reuse=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_sampling_repeats_with_its_seed(wide):
    sampling = SamplingConfig(temperature=0.9, top_k=50, top_p=0.95, seed=3)
    answers = []
    for _ in range(2):
        with on_gpu(wide, slots=2, resident_layers=2) as engine:
            answers.append(generate(engine, sampling=sampling))
    assert answers[0] == answers[1]


def test_memory_stays_within_the_plan(wide):
    with on_gpu(wide, slots=2, resident_layers=2) as engine:
        generate(engine)
        memory = engine.memory()
    assert sum(memory.ledger.values()) <= memory.device_peak_bytes <= memory.device_planned_bytes


def test_what_cannot_be_pinned_gives_the_same(wide, resident, monkeypatch, caplog):
    register = TorchDriver.register

    def refuse(self, address, nbytes):
        return "refused by the test" if nbytes > 2**24 else register(self, address, nbytes)

    monkeypatch.setattr(TorchDriver, "register", refuse)
    with on_gpu(wide, slots=2, resident_layers=0) as engine:
        assert torch.equal(all_logits(engine), resident)
    assert "refused by the test" in caplog.text


def test_nothing_pinned_at_all_gives_the_same(wide, resident, monkeypatch):
    monkeypatch.setattr(TorchDriver, "register", lambda *_: "refused by the test")
    for home in (HomeKind.HOST, HomeKind.DISK):
        with on_gpu(wide, slots=2, resident_layers=0, home=home) as engine:
            assert torch.equal(all_logits(engine), resident)


def test_a_failed_pass_leaves_the_engine_usable(wide, resident, monkeypatch):
    with on_gpu(wide, slots=2, resident_layers=1) as engine:
        forward = engine.network.forward

        def interrupted(batch):
            forward(batch)
            raise KeyboardInterrupt

        monkeypatch.setattr(engine.network, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.forward([(0, PROMPT)], reuse=True)
        monkeypatch.setattr(engine.network, "forward", forward)
        assert torch.equal(all_logits(engine), resident)
