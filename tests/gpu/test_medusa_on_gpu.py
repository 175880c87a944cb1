"""Medusa heads on a real GPU: the same greedy answers, memory within the plan."""

import pytest
from engines import engine_for, generate
from medusa_heads import random_heads, write_own, write_shared, write_vllm
from tiny import DEEP

from offload_rt.config import DraftConfig, HomeKind

KINDS = {
    "shared": write_shared,
    "own": write_own,
    "truncated": lambda folder: write_vllm(
        folder, random_heads(own=True, rows=20), token_map=list(range(20))
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resident", [0, 4])
def test_greedy_with_heads_equals_greedy_without(make_tiny, tmp_path, kind, resident):
    folder = make_tiny("llama", **DEEP)
    options = {"device": "cuda:0", "device_limit_bytes": 4 * 2**30, "home": HomeKind.HOST}
    options |= {"resident_layers": resident} | ({"slots": 2} if resident < 4 else {})
    if resident == 4:
        del options["home"]
    with engine_for(folder, tokens=24, **options) as engine:
        plain = generate(engine, tokens=24)
    draft = DraftConfig(draft=f"medusa:{KINDS[kind](tmp_path)}")
    with engine_for(folder, tokens=24, draft=draft, **options) as engine:
        assert generate(engine, tokens=24) == plain
        memory = engine.memory()
        assert memory.device_peak_bytes <= memory.device_planned_bytes
