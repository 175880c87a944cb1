"""Cases of `tests/gpu` over the double: what is never run elsewhere would go stale unseen."""

import importlib
from pathlib import Path

import pytest
import torch
from flash_double import flash_of_a_gpu
from test_cuda_numbers import CASES, options_of
from test_cuda_numbers import folders as folders
from value_double import open_double

from offload_rt.config import Exact, ExpertMisses, HomeKind, LookAhead
from offload_rt.device.kinds import CUDA, named_devices


@pytest.fixture
def asked(monkeypatch):
    """Imports a module of `tests/gpu`, whose engines are then opened on the double."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "gpu")
    engines = importlib.import_module("test_engine_on_gpu")
    engine_for = importlib.import_module("engines").engine_for

    def opened(folder, **config):
        open_double(monkeypatch)
        return engine_for(folder, **config)

    monkeypatch.setattr(engines, "engine_for", opened)
    monkeypatch.setattr(engines, "DEVICE", "cpu")
    with flash_of_a_gpu(torch.float32):
        yield importlib.import_module
        monkeypatch.undo()  # kinds it put in meanwhile are to go before those that were


def test_streamed_layers(asked, make_tiny, monkeypatch):
    module = asked("test_engine_on_gpu")
    folder = make_tiny(num_hidden_layers=6)
    resident = module.all_resident(folder)
    module.test_streamed_equals_resident(folder, resident, 2, 1, HomeKind.DISK)
    module.test_a_failed_pass_leaves_the_engine_usable(folder, resident, monkeypatch)


def test_no_case_is_run_on_the_processor(asked, folders):
    module = asked("test_drafting_on_gpu")
    assert module.ON_GPUS.keys() == CASES.keys()
    for case in module.ON_GPUS.values():
        _, double, options = options_of(folders, **case)
        kind, indices = named_devices(options["device"])
        assert (kind, len(indices)) == (CUDA, double["count"])


@pytest.mark.parametrize(("kind", "nodes"), [("mtp", 4), ("eagle3", 12)])
def test_drafts_from_hidden_states(asked, tmp_path, kind, nodes):
    module = asked("test_drafting_on_gpu")
    place = module.STREAMED
    module.test_what_reads_hidden_states_drafts_what_nobody_does(tmp_path, kind, nodes, place)


def test_what_a_retrieval_cache_keeps(asked):
    for group in (1, 3):
        asked("test_drafting_on_gpu").test_a_retrieval_cache_keeps_what_the_slow_formula_does(group)


def test_experts(asked, make_tiny, tmp_path):
    module = asked("test_experts_on_gpu")
    module.test_experts_in_slots_have_the_bits_of_all_in_memory(
        make_tiny, "qwen3_moe", 13, HomeKind.DISK, LookAhead.ON
    )
    module.test_passes_in_pieces_have_the_bits_of_passes_made_at_once(make_tiny, "gpt_oss")
    module.test_what_the_processor_computes_of_experts_is_near(make_tiny, "qwen3_moe")
    module.test_mxfp4_is_multiplied_as_it_is_stored(make_tiny, tmp_path, ExpertMisses.LINK)


@pytest.mark.parametrize("exact", [Exact.OFF, Exact.ON])
def test_blocks(asked, make_tiny, tmp_path, monkeypatch, exact):
    module = asked("test_experts_on_gpu")
    module.test_blocks_of_gguf_are_the_plain_models(
        make_tiny, tmp_path, monkeypatch, "float32", exact
    )
