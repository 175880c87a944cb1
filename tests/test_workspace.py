"""What a pass allocates and frees again is no more than the plan keeps free for it."""

import random
import weakref
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import engine_for
from flash_double import flash_of_a_gpu
from gguf_files import random_blocks
from hybrids import make_short
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from offload_rt.attention.blocks import SCORE_BYTES
from offload_rt.attention.rows import attend_rows
from offload_rt.attention.spec import AttentionSpec, PendingTree
from offload_rt.config import DraftConfig
from offload_rt.costs.sizes import (
    RUNTIME_BYTES,
    PassShape,
    attention_bytes,
    state_bytes,
    workspace_bytes,
)
from offload_rt.device.kinds import CPU, KINDS, Processor
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.rounded import RoundedEmbedding
from offload_rt.model.formats.stored import Stored, scratch_bytes
from offload_rt.model.formats.wired import RowEmbedding
from offload_rt.runner import loading
from offload_rt.runner.runner import Rows


class Live(TorchDispatchMode):
    """Follows the bytes of the tensors that are alive; what kernels take inside is not seen."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not func.is_view:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._known:
                    self._known.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key, size):
        self._known.discard(key)
        self.now -= size


SCORED = [(None, None), (None, 700), (2.0, None)]  # softcap and window


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("branching", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize(("softcap", "window"), SCORED)
@pytest.mark.parametrize(("count", "cached"), [(2, 3000), (100, 2100), (512, 5000)])
def test_attention_takes_no_more_than_is_planned(gpu, branching, softcap, window, count, cached):
    heads, kv_heads, size = 4, 2, 16
    config = SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_dim=size)
    config.sliding_window, config.writes_out_scores = window, softcap is not None
    shape = PassShape(rows=count, chunk_rows=512, logit_rows=1, longest=cached)
    planned = attention_bytes(config, 2, shape, KINDS[Processor.CUDA] if gpu else CPU)
    if window is None:  # as many keys as are there need no mask
        longer = replace(shape, longest=2**17)
        kind = KINDS[Processor.CUDA] if gpu else CPU
        assert attention_bytes(config, 2, longer, kind) <= planned + count * 4096 * 5
    query, key, value = (
        torch.zeros(number, rows, size, dtype=torch.bfloat16)
        for number, rows in ((heads, count), (kv_heads, cached), (kv_heads, cached))
    )
    tree = None
    if branching:
        pending = torch.arange(cached - count, cached)
        tree = PendingTree(torch.eye(count, dtype=torch.bool), pending)
    spec = AttentionSpec(scaling=0.4, window=window, softcap=softcap)
    with flash_of_a_gpu(torch.bfloat16) if gpu else nullcontext(), Live() as live:
        attend_rows(query, key, value, spec, tree)
    assert live.peak <= planned


FEW = [(False, *SCORED[0]), (False, *SCORED[1]), (True, *SCORED[2])]  # of large heads


@pytest.mark.parametrize(
    ("sizes", "branching", "softcap", "window"),
    [
        *(((4, 2, 16), tree, *scored) for tree in (False, True) for scored in SCORED),
        *((sizes, *case) for sizes in ((32, 8, 128), (14, 2, 64)) for case in FEW),
    ],
)
@pytest.mark.parametrize(("count", "cached"), [(2, 2600), (64, 3000), (512, 2000)])
def test_nor_does_row_invariant_attention(branching, softcap, window, sizes, count, cached):
    heads, kv_heads, size = sizes
    config = SimpleNamespace(num_heads=heads, num_kv_heads=kv_heads, head_dim=size)
    config.sliding_window, config.writes_out_scores = window, softcap is not None
    shape = PassShape(rows=count, chunk_rows=512, logit_rows=1, longest=cached)
    query, key, value = (
        torch.zeros(number, rows, size, dtype=torch.bfloat16)
        for number, rows in ((heads, count), (kv_heads, cached), (kv_heads, cached))
    )
    tree = None
    if branching:
        tree = PendingTree(torch.ones(count, count, dtype=torch.bool).tril(), torch.arange(count))
    spec = AttentionSpec(scaling=0.4, window=window, softcap=softcap, exact=True)
    with Live() as live:
        attend_rows(query, key, value, spec, tree)
    assert live.peak <= attention_bytes(config, 2, shape, CPU)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text"])
def test_a_long_prompt_takes_no_more_than_is_planned(make_tiny, family):
    sizes = {"hidden_size": 512, "intermediate_size": 64, "head_dim": 32}
    model = make_tiny(family, **sizes, num_hidden_layers=2, max_position_embeddings=4096)
    prompt = random.Random(1).choices(range(300), k=1500)
    options = {"prompts": [prompt], "prefill_chunk_tokens": 64, "dtype": "bfloat16"}
    with engine_for(model, **options) as engine, Live() as live:
        engine.forward([(0, prompt)], reuse=True)
        config = engine.checkpoint.config
    rows = PassShape(rows=1500, chunk_rows=64, logit_rows=1, longest=1516)
    planned = workspace_bytes(config, 2, rows, CPU) - RUNTIME_BYTES
    chunk = workspace_bytes(config, 2, replace(rows, rows=64), CPU) - RUNTIME_BYTES
    hidden = 1500 * 512 * 2
    assert hidden < planned - chunk < 3 * hidden  # as it was measured: hidden states and tables
    assert live.peak <= planned - (chunk - attention_bytes(config, 2, replace(rows, rows=64), CPU))


@pytest.mark.parametrize("branching", [False, True], ids=["beside each other", "branching"])
def test_nor_do_states_of_many_branches(make_tiny, branching):
    """States of 2 MiB, as of Qwen3-Next; those of all branches were alive once."""
    heads = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
    sizes = {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
    model = make_short(make_tiny, "qwen3_next-dense", **heads, **sizes)
    parents = [-1, *(at // 2 * 2 if branching else 0 for at in range(31))]
    draft = DraftConfig(draft="ngram", draft_tokens=31)
    with engine_for(model, dtype="bfloat16", draft=draft, tokens=80) as engine:
        config, cache = engine.checkpoint.config, engine._caches[0]
        engine.forward([(0, range(17))], reuse=True)
        drafted = {"tokens": range(32), "places": range(17, 49), "parents": parents}
        with Live() as live:
            engine.runner.logits([Rows(cache=cache, **drafted, wanted=range(32))])
    shape = PassShape(rows=32, chunk_rows=512, logit_rows=32, longest=97, tree_rows=32)
    kept = state_bytes(config, 2, rows=CPU.state_rows, pending=32)
    assert live.peak <= workspace_bytes(config, 2, shape, CPU) - RUNTIME_BYTES + sum(kept)


@pytest.mark.parametrize("kind", ["plain", "stored", "rounded"])
def test_rows_of_a_long_prompt_are_looked_up_within_it(kind):
    """A result and what becomes of it are planned: two hidden states of each row."""
    embedding = Gemma3TextScaledWordEmbedding(192, 512, 0, 3.0).bfloat16()
    weight, stored = embedding.weight.detach().clone(), None
    if kind == "rounded":
        made = RoundedEmbedding(embedding)
    else:
        blocks = random_blocks(Form.Q4_0, 192, 512, np.random.default_rng(1))
        extent = SimpleNamespace(shape=blocks.shape, dtype="U8")
        sizes = {"outputs": 192, "inputs": 512, "bits": 4, "groups": 16}
        if kind == "stored":
            weight = torch.from_numpy(blocks)
            stored = Stored(module="m", form=Form.Q4_0, parts={"weight": extent}, **sizes)
        made = RowEmbedding(embedding, stored)
        made.rows = lambda numbers: weight.index_select(0, numbers)
    ids = torch.randint(0, 192, (1, 16000))
    with torch.inference_mode(), Live() as live:
        found = made(ids)
    assert live.peak <= 2 * found.nbytes and found.shape == (1, 16000, 512)
    with torch.inference_mode():
        few = [made(part) for part in ids.split(1000, 1)]
    assert torch.equal(torch.cat(few, 1), found)


def test_a_gpu_packs_no_weight_and_decodes_12_bits_in_one_kernel(make_tiny, tmp_path):
    """What lies beside an image: there the weight that computes, here also what torch works in."""
    checkpoint = open_checkpoint(make_tiny("llama", dtype="bfloat16"))
    config, shape = checkpoint.config, PassShape(rows=8, chunk_rows=8, logit_rows=1, longest=64)
    gpu = SimpleNamespace(**{n: getattr(CPU, n) for n in CPU.__slots__} | {"own_memory": True})
    packed = 2 * config.intermediate_size * config.hidden_size
    here, there = (workspace_bytes(config, 2, shape, device) for device in (CPU, gpu))
    assert here - there == packed
    for form, beside in ((Form.CODED, False), (Form.PACKED, True)):
        sizes = {"outputs": 64, "inputs": 512, "bits": 4, "groups": 4, "parts": {}}
        stored = [Stored(module="m", form=form, **sizes)]
        assert (scratch_bytes(stored, 2, "cuda") > 2 * 64 * 512) is beside
        assert scratch_bytes(stored, 2, "cpu") > 2 * 64 * 512
    assert scratch_bytes([], 2, "cpu") == scratch_bytes([], 2, "cuda") == 0


def test_where_scores_are_written_out_freed_blocks_go_back_sooner(make_tiny, monkeypatch):
    """Elsewhere a prompt's products of 4 MiB and more would be cleared by the system each time."""
    borders = []
    monkeypatch.setattr(loading, "give_back_large_blocks", borders.append)
    for family, expected in (("llama", []), ("gemma2", [SCORE_BYTES // 2])):
        with engine_for(make_tiny(family)):
            assert borders == expected
