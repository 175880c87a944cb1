"""Everything here needs an NVIDIA GPU; `tools/gpu_check.sh` runs it."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="torch finds no CUDA GPU")
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(skip)


@pytest.fixture
def wide(make_tiny):
    """A Llama whose layers (51 MiB) are longer than a staging buffer."""
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 8}
    return make_tiny(**sizes, num_hidden_layers=6, num_key_value_heads=4)
