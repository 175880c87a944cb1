"""Medusa heads on a GPU that is not there: order of accesses, host syncs, allocations."""

import pytest
import torch
from fake_cuda import fake_gpu
from medusa_heads import random_heads, write_own, write_shared, write_vllm
from test_fake_cuda import PROMPTS, SAMPLED, gpu  # noqa: F401 - a fixture

from offload_rt.config import DraftConfig, GenerationConfig, HomeKind, RuntimeConfig, SamplingConfig
from offload_rt.engine import Engine, Run
from offload_rt.model.checkpoint import open_checkpoint

KINDS = {
    "shared": write_shared,
    "own": write_own,
    "truncated": lambda folder: write_vllm(
        folder, random_heads(own=True, rows=20), token_map=list(range(20))
    ),
}


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [("shared", SAMPLED), ("own", SamplingConfig()), ("truncated", SAMPLED)],
    ids=["shared-sampled", "own-greedy", "truncated-sampled"],
)
def test_a_step_with_heads_waits_twice_for_all_sequences(gpu, make_tiny, tmp_path, kind, sampling):  # noqa: F811
    """Once for the heads' tokens and once for the verifier's, however many sequences there are."""
    folder = make_tiny("llama", num_hidden_layers=2)
    draft = DraftConfig(draft=f"medusa:{KINDS[kind](tmp_path)}", draft_tokens=9)
    runtime = RuntimeConfig(
        device="cuda:0", home=HomeKind.HOST, resident_layers=0, slots=1, prefill_chunk_tokens=8
    )
    checkpoint = open_checkpoint(folder)
    with (
        fake_gpu(gpu),
        Engine(checkpoint, runtime, capacities=[60, 60], prompt_tokens=14, draft=draft) as engine,
    ):
        before, ledger = gpu.downloads, engine.device.ledger()
        assert ledger["Medusa heads"] >= 3 * (64 * 64 + 64) * 4
        assert all(p.device == torch.device("cuda:0") for p in engine.medusa._heads.parameters())
        run = Run.start(engine, PROMPTS, sampling, GenerationConfig(max_tokens=40))
        gpu.strict = True
        run.prefill()
        for step in range(1, 3):
            # Every number that comes down is 5: all heads guess it, and it always stands.
            assert [emitted.token_ids for emitted in run.step()] == [[5] * 4] * 2
            assert gpu.downloads - gpu.captures == before + 1 + 2 * step  # a recording is tried
            assert gpu.captures == 1
        gpu.strict = False
        ledger["recorded passes"] = 4096
        assert engine.device.ledger() == ledger
        assert gpu.unpinned_copies == 0
