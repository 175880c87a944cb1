"""Experts one by one, passes in pieces, and formats that are multiplied as stored, on a real GPU.

Without one they run over CPU tensors, too (`test_cuda_numbers.py`).
"""

import pytest
import torch
from engines import all_logits
from expert_models import make_mixture
from gguf_files import write_gguf
from quantised import write_gpt_oss
from test_engine_on_gpu import on_gpu

from offload_rt.config import Exact, ExpertMisses, HomeKind, LookAhead
from offload_rt.device.kinds import CUDA
from offload_rt.model import ends
from offload_rt.model.ends import with_stored_ends
from offload_rt.model.locate import resolve_model
from offload_rt.planning import planner
from offload_rt.runner.static import EAGER_FIRST
from offload_rt.streaming.experts import MissRates

STEPS = EAGER_FIRST + 4
BLOCKS = {
    "q_proj": "Q8_0",
    "down_proj": "Q6_K",
    "embed": "Q8_0",
    "lm_head": "Q6_K",
    "_proj": "Q4_K",
}


def resident(folder, **config):
    """Logits with all in memory."""
    options = {"resident_layers": 4, "home": HomeKind.AUTO}
    with on_gpu(folder, **(options | config)) as engine:
        return all_logits(engine, steps=STEPS)


def near(found, expected, share=1e-3):
    """Whether sums were added up in another order, no more."""
    return (found - expected).abs().max() <= share * expected.abs().max()


@pytest.mark.parametrize("home", [HomeKind.HOST, HomeKind.DISK])
@pytest.mark.parametrize(
    ("name", "slots", "ahead"),
    [
        ("qwen3_moe", 13, LookAhead.ON),
        ("mixtral", 13, LookAhead.OFF),
        ("gpt_oss", 3, LookAhead.OFF),
    ],
)
def test_experts_in_slots_have_the_bits_of_all_in_memory(make_tiny, name, slots, home, ahead):
    folder = make_mixture(make_tiny, name, dtype="bfloat16")
    expected = resident(folder)
    with on_gpu(folder, expert_slots=slots, home=home, look_ahead=ahead) as engine:
        pool = engine.runner.experts
        pool.foresees |= ahead is LookAhead.ON
        assert torch.equal(all_logits(engine, steps=STEPS), expected)
        assert pool.counts.misses > 0 and (pool.counts.ahead > 0 or ahead is LookAhead.OFF)


@pytest.mark.parametrize("name", ["gpt_oss", "every-second"])
def test_passes_in_pieces_have_the_bits_of_passes_made_at_once(make_tiny, name):
    folder = make_mixture(make_tiny, name, dtype="bfloat16")
    with on_gpu(folder, expert_slots=9) as engine:
        pieces = engine.runner._pieces
        pieces._refused = True
        expected = all_logits(engine, steps=STEPS)
        engine.forget()
        pieces._refused = False
        assert torch.equal(all_logits(engine, steps=STEPS), expected)
        assert pieces._kept and not pieces._refused


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_what_the_processor_computes_of_experts_is_near(make_tiny, name):
    folder = make_mixture(make_tiny, name)
    expected = resident(folder)
    with on_gpu(folder, expert_slots=9, expert_misses=ExpertMisses.HOST) as engine:
        pool = engine.runner.experts
        pool.rates = MissRates(link_s=99.0, host_s=1.0)
        assert near(all_logits(engine, steps=STEPS), expected)
        assert pool.counts.on_host > 0


@pytest.mark.parametrize("misses", [ExpertMisses.LINK, ExpertMisses.HOST])
def test_mxfp4_is_multiplied_as_it_is_stored(make_tiny, tmp_path, misses):
    source = make_mixture(make_tiny, "gpt_oss", intermediate_size=64)
    twins = write_gpt_oss(source, tmp_path)
    expected = resident(twins.folder)
    assert near(expected, resident(twins.plain))
    with on_gpu(twins.folder, expert_slots=3, expert_misses=misses) as engine:
        found = all_logits(engine, steps=STEPS)
    assert near(found, expected) if misses is ExpertMisses.HOST else torch.equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("exact", [Exact.OFF, Exact.ON])
def test_blocks_of_gguf_are_the_plain_models(make_tiny, tmp_path, monkeypatch, dtype, exact):
    """Streamed in their blocks; then embedding and head stay in theirs, the head in parts."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    source = make_tiny(tie_word_embeddings=False, pad_token_id=0, **sizes)
    path, plain = write_gguf(source, tmp_path / "a.gguf", BLOCKS)
    options = {"dtype": dtype, "resident_layers": 0, "slots": 2, "exact": exact}
    with on_gpu(plain, **options) as engine:
        expected = all_logits(engine)
    folder = resolve_model(str(path))
    with on_gpu(folder, **options) as engine:
        assert torch.equal(all_logits(engine), expected)
    monkeypatch.setattr(planner, "forms_of_ends", lambda made, *_: (with_stored_ends(made),))
    monkeypatch.setattr(ends, "AT_ONCE", 256 * 256)  # two products make the logits
    with on_gpu(folder, **options) as engine:
        assert engine.network.dequantises and engine.devices[0].kind is CUDA
        assert near(all_logits(engine), expected, 1e-3 if dtype == "float32" else 0.02)
