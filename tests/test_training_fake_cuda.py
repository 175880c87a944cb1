"""Reading hidden states on a GPU that is not there: order of accesses, host syncs, allocations."""

import torch
from fake_cuda import fake_gpu
from test_fake_cuda import PROMPTS, gpu  # noqa: F401 - a fixture

from offload_rt.config import HomeKind, KVPlace, RuntimeConfig
from offload_rt.engine import Engine
from offload_rt.model.checkpoint import open_checkpoint


def test_a_reading_pass_waits_for_nothing(gpu, make_tiny):  # noqa: F811
    checkpoint = open_checkpoint(make_tiny("llama", num_hidden_layers=3))
    runtime = RuntimeConfig(
        device="cuda:0",
        home=HomeKind.HOST,
        resident_layers=1,
        slots=2,
        prefill_chunk_tokens=3,
        kv=KVPlace.NONE,
    )
    capacities = [max(map(len, PROMPTS))] * len(PROMPTS)
    total = sum(map(len, PROMPTS))
    with (
        fake_gpu(gpu),
        Engine(checkpoint, runtime, capacities=capacities, prompt_tokens=total) as engine,
    ):
        ledger, before = engine.device.ledger(), gpu.downloads
        assert ledger["KV of one layer"] == sum(capacities) * 2 * 2 * 16 * 4
        gpu.strict = True
        hidden = engine.hidden(PROMPTS, [range(len(p)) for p in PROMPTS])
        gpu.strict = False
        assert hidden.shape == (total, 64) and hidden.device == torch.device("cuda:0")
        assert gpu.downloads == before and engine.device.ledger() == ledger
        assert gpu.unpinned_copies == 0
