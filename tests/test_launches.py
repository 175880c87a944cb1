"""How many kernels a step launches beside its passes does not grow with its draft."""

import pytest
import torch
from engines import what_rows_see
from torch.utils._python_dispatch import TorchDispatchMode

from offload_rt.device.cpu import CpuDevice
from offload_rt.kv.base import KVShape
from offload_rt.kv.resident import ResidentKV
from offload_rt.runner.tree import ROOT, TokenTree


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
