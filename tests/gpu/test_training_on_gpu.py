"""Training on a real GPU: the states the CPU reads, and heads that learn."""

import torch
from engines import PROMPT, engine_for
from test_training import trainer_for
from tiny import DEEP

from offload_rt.config import HomeKind, KVPlace


def test_states_are_those_of_the_cpu(make_tiny):
    folder, texts = make_tiny("llama", **DEEP), [PROMPT, PROMPT[3:9]]
    places = [range(len(text)) for text in texts]
    with engine_for(folder, prompts=texts, tokens=1, kv=KVPlace.NONE) as engine:
        expected = engine.hidden(texts, places)
    options = {"device": "cuda:0", "device_limit_bytes": 4 * 2**30, "home": HomeKind.HOST}
    options |= {"kv": KVPlace.NONE, "resident_layers": 1, "slots": 2}
    with engine_for(folder, prompts=texts, tokens=1, **options) as engine:
        found = engine.hidden(texts, places).cpu()
        memory = engine.memory()
        assert memory.device_peak_bytes <= memory.device_planned_bytes
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_heads_learn_on_the_gpu_and_go_on_from_their_state(tmp_path):
    trainer = trainer_for(tmp_path / "c", device="cuda:0")
    trainer.run()
    assert min(trainer.score(trainer.cache).top(1)) > 0.75
    again = trainer_for(tmp_path / "c", device="cuda:0")
    assert again.progress.step == again.steps
