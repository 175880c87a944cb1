"""Output heads of draft models that are reordered, and embeddings that are looked up in them."""

from contextlib import closing

import pytest
import torch

from offload_rt.config import DraftWeights
from offload_rt.device.cpu import CpuDevice
from offload_rt.kernels import products
from offload_rt.kv.base import KVShape
from offload_rt.kv.resident import ResidentKV
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats import packed
from offload_rt.model.network import Network, Segment, TokenBatch
from offload_rt.runner.loading import load_drafting

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": 320}
FAMILIES = [("llama", True), ("llama", False), ("gemma2", True)]  # the last scales its embedding

needs_kernels = pytest.mark.skipif(
    bool(products.problem()), reason=f"no kernels here: {products.problem()}"
)


def loaded(folder, device):
    checkpoint = open_checkpoint(folder)
    return load_drafting(
        checkpoint, device, chunk_tokens=64, target_ids=320, weights=DraftWeights.SAME
    )


def logits_of(runner, folder, device, count=6):
    config = open_checkpoint(folder).config
    shape = KVShape(heads=config.num_kv_heads, key_dim=config.head_dim, value_dim=config.head_dim)
    cache = ResidentKV(device, [shape] * config.num_layers, torch.bfloat16, 32)
    ids = torch.tensor([3, 319, 64, 63, 0, 128][:count])  # from the ends of panels, too
    batch = TokenBatch(ids, torch.arange(count), [Segment(cache, count)], torch.arange(count))
    with torch.inference_mode():
        return runner.network.forward(batch)


@needs_kernels
@pytest.mark.parametrize(("family", "tied"), FAMILIES)
def test_the_same_logits_and_no_plain_head(make_tiny, monkeypatch, family, tied):
    folder = make_tiny(family, dtype="bfloat16", tie_word_embeddings=tied, **IDS)
    with closing(CpuDevice(readers=1)) as device:
        runner = loaded(folder, device)
        modules = list(runner.network._model.modules())
        assert any(type(m) is packed.PackedEmbedding for m in modules) == tied
        assert torch.nn.Linear not in {type(m) for m in modules}
        plain = [p for m in modules for p in m.parameters(recurse=False) if p.shape[:1] == (320,)]
        assert len(plain) == (not tied)  # the embedding
        found, counted = logits_of(runner, folder, device), device.ledger()["draft model"]
    monkeypatch.setattr(Network, "pack_ends", lambda self: False)
    with closing(CpuDevice(readers=1)) as device:
        assert torch.equal(logits_of(loaded(folder, device), folder, device), found)
        assert device.ledger()["draft model"] == counted


def test_without_kernels_a_tied_head_stays_plain(make_tiny, monkeypatch):
    """Else it would be there twice."""
    folder = make_tiny("llama", dtype="bfloat16", tie_word_embeddings=True, **IDS)
    monkeypatch.setattr(packed, "blocks_of", lambda *_: None)
    with closing(CpuDevice(readers=1)) as device:
        runner = loaded(folder, device)
        assert torch.nn.Linear in {type(m) for m in runner.network._model.modules()}
        assert logits_of(runner, folder, device).isfinite().all()


@needs_kernels
def test_rows_are_found_where_the_head_has_them():
    linear = torch.nn.Linear(96, 192, bias=False, dtype=torch.bfloat16)
    embedding = torch.nn.Embedding(192, 96, dtype=torch.bfloat16)
    embedding.weight = linear.weight
    wanted = linear.weight.detach().clone()
    found = packed.PackedEmbedding(embedding, packed.PackedLinear(linear))
    ids = torch.tensor([[0, 63, 64], [191, 100, 64]])
    with torch.inference_mode():
        assert torch.equal(found(ids), wanted[ids])
    assert all(parameter.numel() == 0 for parameter in found.parameters())
