"""From headers and a placement to the work of a pass; from rates to what drafting yields."""

import json

import pytest
from test_families import FAMILIES, IDS
from test_outline import LLAMA_70B
from test_profile import PROJECT
from tiny import SHAPE

from offload_rt.config import DraftConfig, DraftWeights, KVPlace, RuntimeConfig
from offload_rt.costs.machine import seat_for
from offload_rt.costs.workload import pass_load, price
from offload_rt.errors import ConfigError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.outline import outline_checkpoint
from offload_rt.planning.expectation import Acceptance, expect, model_step_s, parse_ranks
from offload_rt.planning.run import RunLoad, place_run
from offload_rt.profiling.rates import disk_bytes_per_s
from offload_rt.profiling.store import load_profile

GPU = seat_for(load_profile(PROJECT / "profiles" / "rtx4090-pcie4x16.json"), "auto")
CPU = seat_for(load_profile(PROJECT / "profiles" / "cpu-2core-avx512bf16.json"), "auto")
CONTEXT = 256


def placed(checkpoint, seat, **config):
    made = RuntimeConfig(**config)
    load = RunLoad(capacities=[CONTEXT], prompt_tokens=CONTEXT)
    return made, place_run(checkpoint, made, seat.device, load=load, free=seat.free)


def load_of(checkpoint, seat, **config):
    made, placement = placed(checkpoint, seat, **config)
    load = pass_load(checkpoint, made, seat, placement, context_tokens=CONTEXT, tokens=1)
    return load, price(seat, made, placement)


def test_what_crosses_is_what_the_files_hold(tiny_model):
    checkpoint = open_checkpoint(tiny_model)
    load, _ = load_of(checkpoint, CPU, resident_layers=1)
    assert len(load.streamed) == 3
    for index in load.streamed:
        assert load.layers[index].home_bytes == checkpoint.layer_bytes(index)
    matrices = 2 * 64 * 16 * (4 + 2) + 3 * 64 * 128
    assert {layer.work.flops_per_token for layer in load.layers} == {2 * matrices}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_token_meets_the_experts_it_is_sent_to(make_tiny, name):
    family, config = FAMILIES[name]
    checkpoint = open_checkpoint(make_tiny(family, **(IDS | config)))
    some, _ = load_of(checkpoint, CPU)
    expected = sum(
        e.nbytes // 4 * (0.5 if ".experts." in e.name else 1.0)
        for e in checkpoint.layers[0]
        if len(e.shape) > 1
    )
    assert some.layers[0].work.flops_per_token == 2 * expected


def test_a_window_bounds_what_is_attended_to(make_tiny):
    family, config = FAMILIES["gemma2"]
    load, _ = load_of(open_checkpoint(make_tiny(family, **(IDS | config))), CPU)
    row_bytes = 2 * 2 * 16 * 4
    assert [layer.kv_bytes for layer in load.layers] == [6 * row_bytes, CONTEXT * row_bytes] * 2


def test_kv_on_disk_comes_at_the_disks_speed(tiny_model):
    load, cost = load_of(open_checkpoint(tiny_model), CPU, kv=KVPlace.DISK, readers=4)
    at_home = [layer.kv_home_bytes for layer in load.layers]
    assert all(nbytes > 0 for nbytes in at_home) and load.kv_slots and load.kv_block_bytes
    rate = disk_bytes_per_s(CPU.profile, 4).value
    assert cost(load).transfer_s == pytest.approx(sum(at_home) / rate)


def test_devices_are_those_of_the_profile():
    assert seat_for(CPU.profile, "cpu").free.device_bytes == CPU.profile.machine.ram_bytes
    assert GPU.free.device_bytes == GPU.profile.machine.gpus[0].memory_bytes
    assert seat_for(GPU.profile, "cpu").processor == "cpu"
    for seat, device in [(CPU, "cuda"), (GPU, "cuda:0"), (GPU, "tpu")]:
        with pytest.raises(ConfigError, match=f"--device {device}"):
            seat_for(seat.profile, device)


@pytest.fixture
def small(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": 2}))
    return outline_checkpoint(tmp_path)


def expected(draft, acceptance, model=None, nbytes=0, **config):
    made = DraftConfig(draft=draft, **config)
    return expect(
        made, acceptance, GPU, draft_model=model, heads_bytes=nbytes, context_tokens=CONTEXT
    )


def test_a_tree_takes_as_many_passes_as_the_drafter_makes(small):
    ranks = Acceptance(ranks=((0.6, 0.2), (0.5, 0.1)))
    tree = expected("model:x", ranks, small, draft_tokens=64)
    assert tree.steps == DraftConfig(draft="model:x", draft_tokens=64).tree_passes == 15
    assert tree.step_s == pytest.approx(
        model_step_s(small, GPU, CONTEXT, 8, DraftWeights.SAME), rel=0.05
    )
    chain = expected("model:x", Acceptance(ranks=((0.6,),)), small, draft_tokens=8)
    assert chain.steps == 8 and chain.tokens_per_pass == pytest.approx((1 - 0.6**9) / 0.4)


def test_heads_take_one_step_and_go_no_deeper_than_there_are_rates():
    made = expected("medusa:x", Acceptance(ranks=((0.6, 0.2), (0.5,))), nbytes=10**9)
    assert made.steps == 1 and made.step_s > 1e-4
    assert made.tokens_per_pass == pytest.approx(1 + 0.8 + 0.8 * 0.5)


def test_triforce_makes_fewer_passes_when_it_is_drafted_for(small):
    alone = expected("triforce", Acceptance(ranks=((0.9,),)), draft_tokens=8)
    assert alone.steps == 8 and alone.inner_s == 0
    helped = expected(
        "triforce:x", Acceptance(ranks=((0.9,),), inner=((1.0,),)), small, draft_tokens=8
    )
    assert helped.steps == 2 and helped.inner_s > 0  # 4 tokens drafted and one more, then 3
    assert helped.tokens_per_pass == alone.tokens_per_pass


def test_rates_are_read_as_they_are_written():
    assert parse_ranks("0.8,0.7", "--x") == ((0.8,), (0.7,))
    assert parse_ranks("0.6/0.2,0.5", "--x") == ((0.6, 0.2), (0.5,))
    for text in ("", "a", "0.5,,0.4", "0.5/", "-0.1", "inf"):
        with pytest.raises(ConfigError, match="--x is"):
            parse_ranks(text, "--x")


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", False), ("gemma2", True), ("qwen2", False), ("smollm3", True)]
)
def test_families_differ_in_what_they_leave_out(tmp_path, family, tied):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": family}))
    assert (outline_checkpoint(tmp_path).head is None) is tied
