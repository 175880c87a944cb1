"""How many kernels a step launches beside its passes does not grow with its draft."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from engines import HOST, what_rows_see
from tool_runs import loaded
from torch.utils._python_dispatch import TorchDispatchMode

from offload_rt.config import AcceptRule, SamplingConfig
from offload_rt.costs.sizes import DRAW_ROWS, drawn_rows
from offload_rt.device.cpu import CpuDevice
from offload_rt.device.kinds import CPU, CUDA
from offload_rt.kv.base import KVShape
from offload_rt.kv.resident import ResidentKV
from offload_rt.runner.tree import ROOT, TokenTree
from offload_rt.sampling import Dice, make_generator
from offload_rt.speculative.base import Draft
from offload_rt.speculative.deciding import Checked, decide
from offload_rt.speculative.ngram.drafter import NgramDrafter


class Launches(TorchDispatchMode):
    """Counts what a GPU would launch: every operator that is no view."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def launched(work):
    with Launches() as launches:
        work()
    return len(launches.names)


def bushy(nodes, depth=30):
    """A chain with three children at each of its nodes, and so on below them."""
    chain = min(nodes, depth)
    parents = [*range(ROOT, chain - 1), *((node // 3) % chain for node in range(nodes - chain))]
    return TokenTree(tuple(node % 250 for node in range(nodes)), tuple(parents))


@pytest.mark.parametrize("nodes", [16, 256, 1024])
def test_what_rows_see_is_made_in_few_launches(nodes):
    parents = bushy(nodes).row_parents()
    assert launched(lambda: what_rows_see(parents)) <= 20


@pytest.mark.parametrize("layers", [2, 80])
def test_keeping_a_path_moves_the_rows_of_all_layers_at_once(layers):
    shapes = [KVShape(heads=2, key_dim=4, value_dim=4)] * layers
    device = CpuDevice(readers=1)
    try:
        cache = ResidentKV(device, shapes, torch.float32, capacity=8)
        for layer in range(layers):
            cache.append(layer, torch.randn(2, 6, 4), torch.randn(2, 6, 4))
        rows = [store[:, [0, 2, 5]].clone() for store in (*cache._keys, *cache._values)]
        assert launched(lambda: cache.commit([0, 2, 5])) <= 4
    finally:
        device.close()
    kept = [store[:, :3] for store in (*cache._keys, *cache._values)]
    assert all(torch.equal(one, other) for one, other in zip(kept, rows, strict=True))


EVERY_FILTER = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 0}
RULES = {
    "greedy": (SamplingConfig(), AcceptRule.LOSSLESS, 40),
    "sampling": (SamplingConfig(**EVERY_FILTER), AcceptRule.LOSSLESS, 80),
    "typical": (SamplingConfig(**EVERY_FILTER), AcceptRule.TYPICAL, 80),
}


@pytest.mark.parametrize("nodes", [0, 1, 16, 256, 1024])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", ["tree", "chain", "drawn chain"])
def test_a_verification_launches_few_kernels_whatever_its_size(nodes, rule, shape):
    """On a GPU, with every filter, in bf16; with what n-grams learn from it."""
    sampling, accept, most = RULES[rule]
    tree = bushy(nodes) if shape == "tree" else TokenTree.chain([7] * nodes)
    probs = None
    if shape == "drawn chain":
        probs = torch.full((nodes, 250), 1 / 250)
    uploads = Mock(side_effect=HOST.upload)
    gpu = SimpleNamespace(**vars(HOST) | {"kind": CUDA, "upload": uploads})
    logits = torch.randn(nodes + 1, 250).bfloat16()
    drafter = NgramDrafter(4, 99)
    dice = Dice(make_generator(0, "cpu"))
    checked = Checked([7], Draft(tree, probs), logits, dice, sampling, drafter)
    kernels = launched(lambda: decide([checked], gpu, accept))
    assert kernels + uploads.call_count <= most


def test_parts_of_a_gpu_are_large_and_within_what_is_planned():
    assert [drawn_rows(CUDA, rows, 128_000) for rows in (1, 17, 1025)] == [1, 17, 32]
    assert drawn_rows(CUDA, 1025, 2_000_000) == drawn_rows(CPU, 1025, 32_000) == DRAW_ROWS


def test_the_tool_counts_and_times_a_step(run_tool, monkeypatch):
    with loaded("bench_steps") as tool:
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
        monkeypatch.setattr(tool, "SIZES", (16,))
        row = json.loads(run_tool(tool))
    assert row["nodes"] == row["ngram_nodes"] == 16
    assert row["greedy_launches"] <= 40
    assert all(0 < row[f"{rule}_launches"] <= 80 for rule in ("sampling", "drawn", "typical"))
    assert min(row["see_ms"], row["grow_ms"], row["ngram_propose_ms"]) > 0
