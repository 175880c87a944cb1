"""Scenario files: what is read, what is refused, what follows from them."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_profile import PROJECT

from offload_rt.errors import ConfigError, OffloadError, PlanError
from offload_rt.planning.scenarios.scenario import ModelShape, load_scenario, read_scenario
from offload_rt.planning.scenarios.simulate import simulate
from offload_rt.profiling.rates import disk_bytes_per_s
from offload_rt.profiling.records import MalformedError, to_json
from offload_rt.profiling.store import load_profile

GPU = load_profile(PROJECT / "profiles" / "rtx4090-pcie4x16.json")
TWO = load_profile(PROJECT / "profiles" / "2x-rtx4090-pcie4x16.json")
CPU = load_profile(PROJECT / "profiles" / "cpu-2core-avx512bf16.json")
LLAMA_7B = {
    "layers": 32,
    "hidden": 4096,
    "intermediate": 11008,
    "heads": 32,
    "kv_heads": 32,
    "head_dim": 128,
    "vocab": 32000,
}
LLAMA_70B = LLAMA_7B | {
    "layers": 80,
    "hidden": 8192,
    "intermediate": 28672,
    "heads": 64,
    "kv_heads": 8,
}
LAYER_70B = 2 * (2 * 8192 * 128 * (64 + 8) + 3 * 8192 * 28672)
CHAIN = {"kind": "chain", "gamma": 4, "acceptance": [0.8], "step_s": 0.01}


def tree_of(model=LLAMA_70B, **changed):
    return {"schema_version": 1, "name": "x", "profile": "p", "model": model} | changed


def scenario(**changed):
    return read_scenario(json.dumps(tree_of(**changed)))


def test_llama_2_70b_has_the_bytes_that_are_known():
    made = ModelShape(**LLAMA_70B)
    assert made.layer_work().weight_bytes == pytest.approx(1.711e9, rel=1e-3)
    assert made.kv_row_bytes == 4096
    assert ModelShape(**LLAMA_7B).kv_row_bytes * 32 == 512 * 1024


def test_a_pass_moves_what_is_streamed_and_no_more():
    made = simulate(scenario(placement={"resident_layers": 11}), GPU)
    assert made.bytes_per_pass == 69 * LAYER_70B
    assert made.s_per_token == made.step_s >= made.transfer_s
    assert (made.resident_layers, made.streamed_layers) == (11, 69)
    kv = {"resident_layers": 32, "kv_home_layers": 20}
    made = simulate(scenario(model=LLAMA_7B, context_tokens=100_000, placement=kv), GPU)
    assert made.bytes_per_pass == 20 * 100_000 * 16384
    assert made.kv_back_bytes == 20 * 16384


def test_as_many_layers_are_resident_as_fit():
    made = simulate(scenario(placement={"reserved_bytes": 10**9}), GPU)
    free = GPU.machine.gpus[0].memory_bytes - 10**9 - 2 * 2 * 32000 * 8192
    assert made.resident_layers == free // LAYER_70B - 2
    assert simulate(scenario(model=LLAMA_7B), GPU).streamed_layers == 0
    with pytest.raises(PlanError, match="needs .* of device memory at least"):
        simulate(scenario(placement={"device_memory_bytes": 10**9}), GPU)


def test_a_ring_of_many_slots_leaves_room_for_fewer_layers():
    usual = simulate(scenario(placement={"reserved_bytes": 10**9}), GPU)
    for slots in (1, 3, 5):
        made = simulate(scenario(placement={"reserved_bytes": 10**9, "slots": slots}), GPU)
        assert made.resident_layers == usual.resident_layers + 2 - slots
    room = 2 * 2 * 32000 * 8192 + 78 * LAYER_70B + 10**6  # two layers too few
    for slots in (2, 5, 64):
        made = simulate(scenario(placement={"device_memory_bytes": room, "slots": slots}), GPU)
        assert made.resident_layers == 78 - slots
    assert simulate(scenario(model=LLAMA_7B, placement={"slots": 5}), GPU).streamed_layers == 0


def test_two_gpus_share_the_one_disk():
    base = {"resident_layers": 0, "slots": 2, "home": "disk", "reads": 4}
    rate = disk_bytes_per_s(TWO, 4).value
    one = simulate(scenario(placement=base), TWO)
    assert one.step_s == pytest.approx(80 * LAYER_70B / rate, rel=0.01)
    for split in ("layers", "heads"):
        two = simulate(scenario(placement=base | {"devices": 2, "split": split}), TWO)
        assert two.step_s == pytest.approx(one.step_s, rel=0.02)
    few = base | {"resident_layers": 79, "devices": 2}  # only one of them reads
    assert simulate(scenario(placement=few), TWO).transfer_s == pytest.approx(LAYER_70B / rate)
    away = {"kv_home_layers": 32, "resident_layers": 32, "home": "disk", "reads": 4}
    long = {"model": LLAMA_7B, "context_tokens": 50_000}
    one = simulate(scenario(**long, placement=away), TWO)
    for split in ("layers", "heads"):
        both = away | {"devices": 2, "split": split}
        two = simulate(scenario(**long, placement=both), TWO)
        assert 0.8 * one.step_s < two.step_s < 1.05 * one.step_s  # not half


def test_drafting_is_the_pass_and_the_steps_over_the_tokens():
    place = {"resident_layers": 0, "slots": 1}
    plain = simulate(scenario(placement=place), GPU)
    drafted = simulate(scenario(placement=place, draft=CHAIN), GPU)
    assert drafted.tokens_per_pass == pytest.approx((1 - 0.8**5) / 0.2)
    assert drafted.draft_s == pytest.approx(0.04)
    # One slot is refilled while the drafter works: 0.04 s of the next pass's copies.
    assert plain.step_s <= drafted.step_s <= plain.step_s + 0.04
    assert drafted.s_per_token == pytest.approx(drafted.step_s / drafted.tokens_per_pass)
    near = scenario(model=LLAMA_7B), scenario(model=LLAMA_7B, draft=CHAIN)
    alone, with_it = (simulate(made, GPU) for made in near)
    assert with_it.step_s == pytest.approx(alone.step_s + 0.04, rel=0.01)


def test_a_tree_drafts_level_by_level():
    tree = {"kind": "tree", "gamma": 6, "ranks": [[0.6, 0.3], [0.5, 0.2]], "step_s": 0.01}
    made = simulate(scenario(draft=tree), GPU)
    assert made.draft_s == pytest.approx(0.02)
    # All six nodes: 0.6 + 0.3 and below each of the two 0.5 + 0.2.
    assert made.tokens_per_pass == pytest.approx(1 + 0.9 + 0.9 * 0.7)


def test_a_draft_model_takes_what_the_profile_says():
    model = {"kind": "chain", "gamma": 4, "acceptance": [0.8], "model": LLAMA_7B}
    small = simulate(scenario(draft=model | {"context_tokens": 0}), GPU)
    # tp_4090.csv: 18.8 to 19.4 ms a pass of Llama-2-7B
    assert small.draft_s / 4 == pytest.approx(0.0191, rel=0.05)
    long = simulate(scenario(draft=model, context_tokens=50_000), GPU)
    assert long.draft_s > small.draft_s


def test_triforce_with_streamed_weights_streams_them_for_every_draft_pass():
    draft = {"kind": "triforce", "gamma": 4, "acceptance": [0.9], "retrieval_tokens": 1024}
    streamed = {"resident_layers": 0, "kv_home_layers": 80}
    made = simulate(scenario(draft=draft, placement=streamed, context_tokens=10_000), GPU)
    assert made.draft_s == pytest.approx(4 * 80 * LAYER_70B / 26e9, rel=0.01)
    assert made.limit == "drafting"
    resident = {"resident_layers": 32, "kv_home_layers": 32}
    made = simulate(
        scenario(model=LLAMA_7B, draft=draft, placement=resident, context_tokens=100_000), GPU
    )
    assert made.draft_s < 0.2 and made.limit == "transfer"


def test_triforce_makes_fewer_passes_when_it_is_drafted_for():
    draft = {"kind": "triforce", "gamma": 8, "acceptance": [0.9], "step_s": 0.01}
    inner = {"inner_gamma": 1, "inner_acceptance": [1.0], "inner_step_s": 0.001}
    made = simulate(scenario(model=LLAMA_7B, draft=draft | inner), GPU)
    assert made.draft_s == pytest.approx(4 * 0.01 + 4 * 0.001)


@pytest.mark.parametrize("split", ["layers", "heads"])
def test_two_gpus_halve_the_transfer(split):
    base = {"resident_layers": 0, "slots": 2}
    one = simulate(scenario(placement=base), GPU)
    two = simulate(scenario(placement=base | {"devices": 2, "split": split}), TWO)
    assert two.step_s == pytest.approx(one.step_s / 2 * 26 / 25.4, rel=0.02)


def test_without_a_gpu_layers_come_from_the_disk():
    place = {"processor": "cpu", "home": "disk", "device_memory_bytes": 2 * 2**30, "reads": 4}
    small = LLAMA_7B | {"layers": 16, "hidden": 2048, "intermediate": 8192, "head_dim": 64}
    made = simulate(scenario(model=small, placement=place), CPU)
    assert made.streamed_layers
    rate = disk_bytes_per_s(CPU, 4).value
    assert made.transfer_s == pytest.approx(made.bytes_per_pass / rate)


def test_a_scenarios_own_changes_are_applied():
    half = scenario(placement={"resident_layers": 0}, set=["h2d_bytes_per_s=13e9"])
    assert simulate(half, GPU).step_s == pytest.approx(80 * LAYER_70B / 13e9, rel=0.01)


def test_what_is_written_is_read():
    made = scenario(draft=CHAIN, placement={"slots": 3}, context_tokens=5)
    assert read_scenario(to_json(made)) == made


def changed(path, value):
    made = json.loads(json.dumps(tree_of(draft=CHAIN, placement={"slots": 2})))
    *steps, last = path.split(".")
    here = made
    for step in steps:
        here = here[step]
    here[last] = value
    return json.dumps(made)


BAD = [
    ("schema_version", 2, "schema_version is 2, this program reads 1"),
    ("model.layers", 0, "model.layers is 0, must be at least 1"),
    ("model.layers", -3, "model.layers is -3"),
    ("model.layers", 1e400, "it holds Infinity|must be a whole number"),
    ("model.hidden", "wide", 'model.hidden is "wide", must be a number'),
    ("model.kv_heads", 7, "kv_heads is 7, which does not divide model.heads 64"),
    ("model.colour", 1, "model.colour is no key that a scenario has"),
    ("placement.resident_layers", 81, "resident_layers is 81, but the model has 80 layers"),
    ("placement.kv_home_layers", 81, "kv_home_layers is 81, but the model has 80 layers"),
    ("placement.processor", "tpu", 'processor is "tpu", must be one of cpu, cuda'),
    ("placement.processor", "cpu", "home is host, but the processor is the CPU"),
    ("placement.devices", 0, "devices is 0"),
    ("draft.kind", "none", "draft.gamma is given, but draft.kind is none"),
    ("draft.gamma", 0, "draft.gamma is 0, must be at least 1"),
    ("draft.acceptance", [], "needs one of .* it has none"),
    ("draft.acceptance", [1.2], r"draft.acceptance\[0\] is 1.2, must be at least 0 and at most 1"),
    ("draft.tokens_per_pass", 3, "it has acceptance and tokens_per_pass"),
    ("draft.step_s", -1, "draft.step_s is -1"),
    ("draft.step_s", None, "draft.step_s is missing"),
    ("draft.ranks", [[0.5]], "it has acceptance and ranks"),
    ("draft.inner_gamma", 1, "inner_gamma is of kind triforce, but draft.kind is chain"),
    ("draft.kind", "tree", "draft.acceptance is of chains"),
    ("draft.model", LLAMA_7B, "step_s and draft.model both say"),
    ("draft.depth", 3, "draft.depth is of kind tree"),
    (
        "inputs",
        [{"keys": ["placement.slot"], "obtained": "assumed", "source": "x"}],
        r"inputs\[0\].keys names 'placement.slot', which is not there",
    ),
]


@pytest.mark.parametrize(("path", "value", "says"), BAD)
def test_a_wrong_scenario_is_refused_by_its_key(path, value, says):
    with pytest.raises(MalformedError, match=says) as caught:
        read_scenario(changed(path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("draft", "says"),
    [
        ({"kind": "tree", "gamma": 9, "tokens_per_pass": 3, "step_s": 1}, "draft.depth is missing"),
        ({"kind": "triforce", "gamma": 9, "acceptance": [0.9]}, "draft.step_s is missing"),
        (
            {
                "kind": "triforce",
                "gamma": 9,
                "acceptance": [0.9],
                "retrieval_tokens": 64,
                "inner_gamma": 1,
            },
            "inner_acceptance is missing",
        ),
        (
            {"kind": "triforce", "gamma": 9, "acceptance": [0.9], "model": LLAMA_7B},
            "the target drafts for itself",
        ),
    ],
)
def test_drafting_that_lacks_something_is_refused(draft, says):
    with pytest.raises(MalformedError, match=says):
        scenario(draft=draft)


def test_two_devices_need_two_gpus_and_heads_that_divide():
    with pytest.raises(ConfigError, match="devices is 2, but profile rtx4090.* has 1 GPUs"):
        simulate(scenario(placement={"devices": 2}), GPU)
    with pytest.raises(MalformedError, match="devices is 3, which does not divide"):
        scenario(placement={"devices": 3, "split": "heads"})
    with pytest.raises(MalformedError, match="but the processor is the CPU"):
        scenario(placement={"devices": 2, "processor": "cpu", "home": "disk"})


def test_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "s.json"
    for text, says in [("[]", "not an object"), ("{", "not JSON"), ('{"name": NaN}', "NaN")]:
        path.write_text(text)
        with pytest.raises(ConfigError, match=says):
            load_scenario(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is no usable scenario"):
        load_scenario(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_scenario(tmp_path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_scenario(tmp_path / "none.json")


TRIFORCE = {
    "kind": "triforce",
    "gamma": 4,
    "acceptance": [0.9],
    "retrieval_tokens": 64,
    "inner_gamma": 1,
    "inner_acceptance": [0.5],
}
TREE = {"kind": "tree", "gamma": 6, "ranks": [[0.6, 0.3]], "depth": 2, "model": LLAMA_7B}
WHOLE = [
    tree_of(
        context_tokens=1000,
        draft=draft,
        placement={"slots": 2, "kv_slots": 2, "resident_layers": 40, "kv_home_layers": 20},
    )
    for draft in (CHAIN, TRIFORCE, TREE)
]
ODD = [None, True, "x", [], {}, [-1], -1, 0, 1, 2, 0.5, 1e-300, 1e308, 4096, 2**24, 2**50, 10**40]


def leaves(tree, path=()):
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))


@given(data=st.data(), whole=st.sampled_from(WHOLE), value=st.sampled_from(ODD))
@settings(max_examples=150, deadline=10_000)
def test_any_value_is_refused_in_a_sentence_or_gives_finite_numbers(data, whole, value):
    tree = json.loads(json.dumps(whole))
    *steps, last = data.draw(st.sampled_from(sorted(leaves(tree))))
    here = tree
    for step in steps:
        here = here[step]
    here[last] = value
    try:
        made = simulate(read_scenario(json.dumps(tree)), GPU)
    except (MalformedError, OffloadError) as error:
        assert str(error) and "\n" not in str(error)
    else:
        assert 0 < made.s_per_token < math.inf and made.tokens_per_pass >= 1


@given(
    slots=st.integers(1, 4),
    resident=st.integers(0, 79),
    gamma=st.integers(1, 64),
    rate=st.floats(0, 1),
    step_s=st.floats(0, 0.2),
)
@settings(max_examples=30, deadline=None)
def test_a_faster_link_a_better_or_a_faster_drafter_never_costs_more(
    slots, resident, gamma, rate, step_s
):
    draft = {"kind": "chain", "gamma": gamma, "acceptance": [rate], "step_s": step_s}
    place = {"slots": slots, "resident_layers": resident}
    base = simulate(scenario(placement=place, draft=draft), GPU)
    fast = simulate(scenario(placement=place, draft=draft, set=["h2d_bytes_per_s=52e9"]), GPU)
    assert fast.s_per_token <= base.s_per_token * (1 + 1e-9)
    quick = simulate(scenario(placement=place, draft=draft | {"step_s": step_s / 2}), GPU)
    assert quick.s_per_token <= base.s_per_token * (1 + 1e-9)
    better = draft | {"acceptance": [(1 + rate) / 2]}
    good = simulate(scenario(placement=place, draft=better), GPU)
    assert good.s_per_token <= base.s_per_token * (1 + 1e-9)


# ---- experts ----

MIXTURE = LLAMA_7B | {
    "intermediate": 0,
    "experts": 64,
    "experts_per_token": 4,
    "expert_intermediate": 2048,
}
ONE = 2 * 3 * 4096 * 2048


def test_experts_that_come_one_by_one_move_what_is_missed():
    place = {"expert_slots": 32 * 16, "expert_hit_rate": 0.75}
    made = simulate(scenario(model=MIXTURE, placement=place), GPU)
    assert made.bytes_per_pass == pytest.approx(32 * 4 * 0.25 * ONE)
    assert (made.resident_layers, made.streamed_layers) == (32, 0)
    more = simulate(scenario(model=MIXTURE, placement=place | {"expert_hit_rate": 0.95}), GPU)
    assert more.s_per_token < made.s_per_token
    whole = simulate(scenario(model=MIXTURE), GPU)
    assert whole.bytes_per_pass > 10 * made.bytes_per_pass
    guessed = simulate(scenario(model=MIXTURE, placement={"expert_slots": 32 * 16}), GPU)
    assert guessed.bytes_per_pass == pytest.approx(32 * 4 * (1 - 0.5875) * ONE, rel=1e-3)


def test_experts_of_two_homes_come_at_the_rates_of_both():
    place = {"expert_slots": 32 * 16, "expert_hit_rate": 0.0, "home": "disk"}
    disk, half, host = (
        simulate(scenario(model=MIXTURE, placement=place | {"expert_host_share": share}), GPU)
        for share in (0.0, 0.5, 1.0)
    )
    assert disk.transfer_s > half.transfer_s > host.transfer_s
    assert half.transfer_s == pytest.approx((disk.transfer_s + host.transfer_s) / 2, rel=1e-6)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": MIXTURE | {"experts_per_token": 65}}, "experts_per_token is 65"),
        ({"model": MIXTURE | {"expert_intermediate": 0}}, "go together"),
        ({"model": LLAMA_7B | {"intermediate": 0}}, "intermediate is 0"),
        ({"placement": {"expert_slots": 4}}, "from 0 .* to 0"),
        ({"model": MIXTURE, "placement": {"expert_slots": 3}}, "from 4 "),
        ({"model": MIXTURE, "placement": {"expert_hit_rate": 0.5}}, "no placement.expert_slots"),
        (
            {"model": MIXTURE, "placement": {"expert_slots": 8, "resident_layers": 1}},
            "one device that has all layers",
        ),
        (
            {"model": MIXTURE, "placement": {"expert_slots": 8, "expert_host_share": 0.5}},
            "placement.home is host",
        ),
    ],
)
def test_experts_that_cannot_be_are_named(changed, message):
    with pytest.raises(MalformedError, match=message):
        scenario(**changed)
