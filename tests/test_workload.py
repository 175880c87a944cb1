"""From headers and a placement to the work of a pass; from rates to what drafting yields."""

import json
import shutil
from dataclasses import replace
from math import prod

import pytest
from engines import PROMPT, engine_for
from expert_models import make_mixture
from hybrids import make_hybrid
from test_families import FAMILIES, IDS
from test_outline import LLAMA_70B
from test_profile import PROJECT
from tiny import SHAPE

from offload_rt.config import DraftConfig, DraftWeights, Exact, HomeKind, KVPlace, RuntimeConfig
from offload_rt.costs.acceptance import grow_tree
from offload_rt.costs.drafters import Drafting, Expected
from offload_rt.costs.machine import speeds_there
from offload_rt.costs.pass_cost import home_rates, pass_times
from offload_rt.costs.sizes import layer_windows
from offload_rt.costs.step import KV_BLOCK_S
from offload_rt.costs.workload import PlacedModel, Residence, StreamedKV, parts_of
from offload_rt.errors import ConfigError
from offload_rt.kv.resident import ResidentKV
from offload_rt.kv.states import _pieces
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.outline import outline_checkpoint
from offload_rt.planning.fit import PlacedRun, RunLoad, place_run
from offload_rt.planning.given_rates import Acceptance, expect, parse_ranks
from offload_rt.planning.yields import MADE
from offload_rt.profiling.profile import MemoryUse, WeightOrder
from offload_rt.profiling.rates import (
    disk_bytes_per_s,
    layer_s,
    link_bytes_per_s,
    memory_bytes_per_s,
    scan_s,
)
from offload_rt.profiling.store import load_profile
from offload_rt.speculative.draft_model.kind import GROWTH_S, settled
from offload_rt.speculative.kinds import branches_of, draft_parts

GPU = speeds_there(load_profile(PROJECT / "profiles" / "rtx4090-pcie4x16.json"), "auto")
CPU = speeds_there(load_profile(PROJECT / "profiles" / "cpu-2core-avx512bf16.json"), "auto")
CONTEXT = 256


def load_of(checkpoint, speeds, context=CONTEXT, **config):
    """A pass over a placed model, and what prices it."""
    made = RuntimeConfig(**config)
    load = RunLoad(capacities=[context], prompt_tokens=context)
    placement = place_run(checkpoint, made, speeds.device, load=load, free=speeds.free)
    run = PlacedRun(
        checkpoint=checkpoint,
        config=made,
        speeds=speeds,
        placement=placement,
        context_tokens=context,
    )
    return run.model.load(1), run.cost


def test_a_retrieval_cache_is_chosen_for_the_query_heads_that_share_a_kv_head(tmp_path):
    """Of offloaded KV a block costs the host more where several ask (measured: 85 us for 75)."""
    drafting, context, found = Drafting(DraftConfig(draft="triforce", draft_tokens=8)), 8192, []
    for kv_heads in (64, 8):
        (folder := tmp_path / str(kv_heads)).mkdir()
        sizes = {"num_hidden_layers": 4, "num_key_value_heads": kv_heads}
        (folder / "config.json").write_text(json.dumps(LLAMA_70B | sizes))
        checkpoint, made = outline_checkpoint(folder), RuntimeConfig(kv=KVPlace.HOST)
        load = RunLoad(capacities=[context], prompt_tokens=context, drafting=drafting)
        run = PlacedRun(
            checkpoint=checkpoint,
            config=made,
            speeds=GPU,
            placement=place_run(checkpoint, made, GPU.device, load=load, free=GPU.free),
            context_tokens=context,
        )
        found.append(run.work(drafting, Expected()).load.kv_block_s - KV_BLOCK_S)
    alone, together = found
    assert together / alone == pytest.approx(1.15) and alone > 0


def test_weights_that_stay_plain_among_reordered_ones_are_priced_plain(make_tiny):
    """By their part of the layer; where passes are row-invariant they are others."""
    checkpoint = open_checkpoint(make_tiny("llama", dtype="bfloat16"))
    shapes = {e.shape for e in checkpoint.layers[0] if len(e.shape) == 2}
    down, head = (64, 128), (checkpoint.head or checkpoint.embedding).shape
    assert down in shapes

    def priced(left, exact=False):
        speeds, config = replace(CPU, left_plain=frozenset(left)), RuntimeConfig()
        load = RunLoad(capacities=[CONTEXT], prompt_tokens=CONTEXT)
        run = PlacedRun(
            checkpoint=checkpoint,
            config=config,
            speeds=speeds,
            placement=place_run(checkpoint, config, CPU.device, load=load, free=CPU.free),
            context_tokens=CONTEXT,
        )
        load = replace(run.model, exact=exact).load(1)
        times = pass_times(CPU.profile, load, CPU.processor, run.rates(load))
        return times.layer_s[0], load.head_weights

    packed_s, packed_head = priced([])
    plain_s, plain_head = priced([*shapes, head])
    assert packed_s < plain_s
    assert (packed_head, plain_head) == (WeightOrder.PACKED, WeightOrder.PLAIN)
    numbers = sum(prod(e.shape) for e in checkpoint.layers[0] if len(e.shape) == 2)
    part_s = packed_s + (plain_s - packed_s) * prod(down) / numbers
    assert priced([down]) == (pytest.approx(part_s), packed_head)
    assert priced([*shapes, head], exact=True) == priced([], exact=True)


def test_where_pinning_was_refused_links_are_as_fast_as_without():
    pageable = tuple(link for link in GPU.profile.links if not link.pinned)
    speeds = replace(GPU, profile=replace(GPU.profile, links=pageable, pinning=None))
    found = speeds.link_bytes_per_s(2**28, 0)
    assert found == link_bytes_per_s(GPU.profile, 2**28, pinned=False)
    assert found.value < GPU.link_bytes_per_s(2**28, 0).value


@pytest.mark.parametrize("readers", [1, 4])
def test_what_cannot_be_pinned_crosses_as_fast_as_it_is_copied(readers):
    config, gib = RuntimeConfig(readers=readers), 2**30

    def rate(most_bytes, host_bytes=16 * gib):
        pinning = replace(GPU.profile.pinning, most_bytes=most_bytes)
        speeds = replace(GPU, profile=replace(GPU.profile, pinning=pinning))
        home = (HomeKind.HOST, config, gib, host_bytes)
        assert speeds.home_bytes_per_s(*home)[0].value <= link
        return speeds.home_bytes_per_s(*home)[0].value

    link = GPU.link_bytes_per_s(gib, 0).value
    copied = memory_bytes_per_s(GPU.profile, MemoryUse.COPY, readers).value
    slow = min(link, copied)
    assert rate(None) == rate(17 * gib) == rate(gib // 2, host_bytes=gib // 8) == link
    assert rate(0) == pytest.approx(slow)
    half = rate(8 * gib)
    assert slow <= half <= link and rate(gib) <= half
    assert (copied > link) or slow < half < link


def test_what_crosses_is_what_the_files_hold(deep_model):
    checkpoint = open_checkpoint(deep_model)
    load, _ = load_of(checkpoint, CPU, resident_layers=1)
    assert len(load.streamed) == 3
    for index in load.streamed:
        assert load.layers[index].home_bytes == checkpoint.layer_bytes(index)
    matrices = 2 * 64 * 16 * (4 + 2) + 3 * 64 * 128
    assert {layer.work.flops_per_token for layer in load.layers} == {2 * matrices}


@pytest.mark.parametrize("family", ["hunyuan_v1_moe", "ernie4_5_moe", "aria_text", "dots1"])
def test_a_token_meets_the_experts_of_its_family_however_they_are_called(make_tiny, family):
    """Two of eight, in the last layer."""
    checkpoint = open_checkpoint(make_mixture(make_tiny, family))
    layer = parts_of(checkpoint, "float32", CPU.device).layers[-1]
    assert layer.used(1) == pytest.approx(0.25)


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


WINDOWED = [name for name, (_, config) in FAMILIES.items() if "sliding_window" in config]
PATTERNS = [name for name in WINDOWED if "layer_types" in FAMILIES[name][1]]


@pytest.mark.parametrize("speeds", [CPU, GPU])
def test_sequences_attend_each_to_their_own(tiny_model, speeds):
    def attending_s(sequences, context):
        placed = PlacedModel(
            parts=parts_of(open_checkpoint(tiny_model), "auto", speeds.device),
            speeds=speeds,
            residence=Residence(),
            context_tokens=context,
            sequences=sequences,
        )
        load = placed.load(9)
        rates = home_rates(speeds, RuntimeConfig(), load, HomeKind.DISK, None)
        return sum(pass_times(speeds.profile, load, speeds.processor, rates).layer_s)

    one, four = (attending_s(n, 2**20) - attending_s(n, 0) for n in (1, 4))
    assert four == pytest.approx(4 * one)


def test_row_invariant_passes_fill_tiles_up(tiny_model):
    def placed(*, exact):
        parts = parts_of(open_checkpoint(tiny_model), "auto", CPU.device)
        return PlacedModel(
            parts=parts, speeds=CPU, residence=Residence(), context_tokens=0, exact=exact
        )

    def seconds(load, order):
        layers = [replace(layer, weights=order) for layer in load.layers]
        load = replace(load, layers=layers, head_weights=order)
        times = pass_times(CPU.profile, load, CPU.processor, disk_bytes_per_s(CPU.profile, 4))
        return *times.layer_s, times.head_s

    plain, packed = WeightOrder.PLAIN, WeightOrder.PACKED
    for order, tokens, rows in (
        *((plain, 1, 16), (plain, 16, 16), (plain, 17, 32)),
        *((packed, 1, 1), (packed, 8, 8), (packed, 9, 16)),  # kernels for few rows fill nothing up
    ):
        made = seconds(placed(exact=True).load(tokens), order)
        assert made == seconds(placed(exact=False).load(rows), order)
    drafting = placed(exact=True).draft_load(1)
    assert seconds(drafting, plain) == seconds(placed(exact=False).load(1), plain)


@pytest.mark.parametrize(
    ("config", "draft"),
    [
        ({}, DraftConfig()),
        ({"resident_layers": 1}, DraftConfig()),
        ({"resident_layers": 1, "exact": Exact.OFF}, DraftConfig()),
        ({"exact": Exact.ON}, DraftConfig()),
        ({}, DraftConfig(draft="ngram", draft_tokens=4)),
    ],
)
def test_plans_fill_tiles_up_where_engines_do(config, draft, tiny_model):
    checkpoint, config = open_checkpoint(tiny_model), {"exact": Exact.AUTO} | config
    with engine_for(tiny_model, draft=draft, **config) as engine:
        run = PlacedRun(
            checkpoint=checkpoint,
            config=engine.config,
            speeds=CPU,
            placement=engine.placement,
            context_tokens=CONTEXT,
        )
        load = run.work(Drafting(draft), Expected()).load
        assert load.tile == (engine.exact.rows or 1)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [(name, "") for name in WINDOWED] + [(name, "layer_types") for name in PATTERNS],
)
def test_windows_are_those_of_the_network(make_tiny, tmp_path, monkeypatch, name, left_out):
    family, config = FAMILIES[name]
    folder = tmp_path / "model"
    shutil.copytree(make_tiny(family, **(IDS | config)), folder)
    if left_out:
        tree = json.loads((folder / "config.json").read_text())
        del tree[left_out]
        (folder / "config.json").write_text(json.dumps(tree))
    seen, attend = {}, ResidentKV.attend

    def look(self, layer, query, spec, *rest):
        seen[layer] = spec.window
        return attend(self, layer, query, spec, *rest)

    monkeypatch.setattr(ResidentKV, "attend", look)
    with engine_for(folder) as engine:
        engine.forward([(0, PROMPT)], reuse=True)
    assert layer_windows(open_checkpoint(folder).config) == tuple(seen[i] for i in range(4))


def test_of_a_window_at_the_home_whole_blocks_come_in():
    kv = StreamedKV(
        layers=frozenset({0}), slots=2, block_bytes=1, block_tokens=512, waiting_tokens=20
    )
    assert kv.rows(4096, None) == 4096 - 20
    first = 4096 - 1024 + 1  # the window of a token behind them
    assert kv.rows(4096, 1024) == 4096 - 20 - first // 512 * 512
    assert kv.rows(15, 1024) == 0


def test_experts_nobody_is_sent_to_are_not_computed_with(make_tiny):
    family, config = FAMILIES["mixtral"]  # 2 of 4 experts
    checkpoint = open_checkpoint(make_tiny(family, **(IDS | config)))
    layer = parts_of(checkpoint, "auto", CPU.device).layers[0]
    experts = sum(e.nbytes for e in checkpoint.layers[0] if ".experts." in e.name)
    assert layer.expert_bytes == experts
    for tokens, idle in ((1, 0.5), (2, 0.25), (50, 0.0)):
        assert layer.image_bytes - layer.work(tokens).weight_bytes == round(idle * experts)
    others = layer.flops_per_token - layer.expert_flops
    assert layer.expert_flops == 2 * 0.5 * experts / 4
    # 16 tokens in an exact pass: 8 rows for each of 4 experts, which compute 16.
    for tokens, factor in ((1, 1), (16, 2), (64, 1)):
        flops = layer.work(tokens, tile=16).flops_per_token
        assert flops == pytest.approx(others + factor * layer.expert_flops, rel=1e-3)
    load, _ = load_of(checkpoint, CPU, resident_layers=0)  # but all are copied
    assert load.layers[0].home_bytes == checkpoint.layer_bytes(0)


def test_kv_on_disk_comes_at_the_disks_speed(tiny_model):
    load, cost = load_of(open_checkpoint(tiny_model), CPU, kv=KVPlace.DISK, readers=4)
    at_home = [layer.kv_home_bytes for layer in load.layers]
    assert all(nbytes > 0 for nbytes in at_home) and load.kv_slots and load.kv_block_bytes
    rate = disk_bytes_per_s(CPU.profile, 4).value
    assert cost(load).transfer_s == pytest.approx(sum(at_home) / rate)


def test_devices_are_those_of_the_profile():
    assert speeds_there(CPU.profile, "cpu").free.device_bytes == CPU.profile.machine.ram_bytes
    assert GPU.free.device_bytes == GPU.profile.machine.gpus[0].memory_bytes
    assert speeds_there(GPU.profile, "cpu").processor == "cpu"
    for seat, device in [(CPU, "cuda"), (GPU, "cuda:0"), (GPU, "tpu")]:
        with pytest.raises(ConfigError, match=f"--device {device}"):
            speeds_there(seat.profile, device)


@pytest.fixture
def small(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B | {"num_hidden_layers": 2}))
    return outline_checkpoint(tmp_path)


def parts_for(draft, expected, model=None, nbytes=0, speeds=GPU, target=None, **config):
    drafting = settled(Drafting(DraftConfig(draft=draft, **config), model, nbytes), speeds.device)
    placed = PlacedModel(
        parts=parts_of(target or model, "auto", speeds.device),
        speeds=speeds,
        residence=Residence(),
        context_tokens=CONTEXT,
    )
    return draft_parts(drafting, placed, expected)


def test_a_tree_takes_as_many_passes_as_the_drafter_makes(small):
    tree, growing = parts_for("model:x", Expected(made=0.8), small, draft_tokens=64)
    assert DraftConfig(draft="model:x", draft_tokens=64).tree_passes == 15
    assert tree.times == pytest.approx(0.8 * 15) and tree.load.tokens == 8
    assert growing.times == 0.8 and growing.seconds == pytest.approx(64 * GROWTH_S)
    (chain,) = parts_for("model:x", Expected(), small, draft_tokens=8)
    assert chain.times == 8 and chain.load.tokens == 1


def test_what_a_user_states_of_a_drafter_is_what_is_expected():
    ranks = Acceptance(ranks=((0.6,),))
    chain = expect(DraftConfig(draft="model:x", draft_tokens=8), ranks)
    assert chain.tokens == pytest.approx((1 - 0.6**9) / 0.4) and chain.made == MADE
    heads = Acceptance(ranks=((0.6, 0.2), (0.5,)))  # they go no deeper than there are rates
    made = expect(DraftConfig(draft="medusa:x"), heads)
    assert made.tokens == pytest.approx(1 + 0.8 + 0.8 * 0.5)


def test_heads_take_one_step(small):
    (made,) = parts_for("medusa:x", Expected(), nbytes=10**9, target=small)
    assert made.times == 1 and made.load.head.weight_bytes == 10**9 and not made.load.layers


def test_triforce_makes_fewer_passes_when_it_is_drafted_for(small):
    (alone,) = parts_for("triforce", Expected(), target=small, draft_tokens=8)
    assert alone.times == 8 and alone.load.tokens == 1
    helped, inner = parts_for("triforce:x", Expected(inner=(1.0,)), small, draft_tokens=8)
    assert helped.times == 2 and helped.load.tokens == 5  # 4 drafted and one more, then 3
    assert inner.times == 4 + 2 and inner.load.tokens == 1


@pytest.mark.parametrize("weights", [DraftWeights.INT8, DraftWeights.INT4])
def test_a_rounded_head_is_priced_as_rounded(small, weights):
    """Where a form of weights was timed the work is whole and in its order, else it is smaller."""
    (made,) = parts_for(
        "model:x", Expected(), small, speeds=CPU, draft_tokens=1, draft_weights=weights
    )
    (plain,) = parts_for(
        "model:x", Expected(), small, speeds=CPU, draft_tokens=1, draft_weights=DraftWeights.SAME
    )
    timed = {curve.weights for curve in CPU.profile.layers}
    assert (made.load.head_weights == weights) is (str(weights) in timed)
    rates = home_rates(CPU, RuntimeConfig(), made.load, HomeKind.DISK, None)
    times = [
        pass_times(CPU.profile, part.load, CPU.processor, rates).head_s for part in (made, plain)
    ]
    assert times[0] < 0.75 * times[1]


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


@pytest.mark.parametrize("speeds", [CPU, GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("rates", [(0.8, 0.08, 0.03), (0.5, 0.15, 0.08)])
@pytest.mark.parametrize("nodes", [7, 15, 31, 63])
def test_pieces_of_trees_are_counted_as_they_are_computed(speeds, rates, nodes, make_tiny):
    """Half as many to twice as many: whose tokens are seldom right branch more."""
    paths = grow_tree([list(rates)], nodes, 20).choices
    place = {path: row for row, path in enumerate([(), *paths], 0)}
    parents = [-1, *(place[path[:-1]] for path in paths)]
    mixing = parts_of(open_checkpoint(make_hybrid(make_tiny, "lfm2")), "auto", speeds.device)
    (mixing,) = {layer.mixing for layer in mixing.layers} - {None}
    size, committed = mixing.rows, range(speeds.device.state_rows)
    made = [len(_pieces(n, nodes + 1, n, parents, size)) for n in committed]
    draft = DraftConfig(draft="ngram", draft_tokens=nodes)
    counted = mixing.pieces(nodes + 1, branches_of(draft))
    assert 0.5 < counted / (sum(made) / size) < 2.1
    made = [len(_pieces(n, nodes + 1, n, None, size)) for n in committed]
    assert mixing.pieces(nodes + 1, 1.0) == pytest.approx(sum(made) / size, abs=0.1)


def test_a_branch_costs_what_a_piece_does(make_tiny):
    """Its products, which read their weights again, and its scan."""
    checkpoint = open_checkpoint(make_hybrid(make_tiny, "qwen3_next-dense"))
    parts = parts_of(checkpoint, "auto", CPU.device)
    placed = PlacedModel(parts=parts, speeds=CPU, residence=Residence(), context_tokens=CONTEXT)
    rate = disk_bytes_per_s(CPU.profile, 4)

    def seconds(**options):
        load = placed.load(32, **options)
        return pass_times(CPU.profile, load, CPU.processor, rate).layer_s

    mixing = parts.layers[0].mixing
    piece = layer_s(
        CPU.profile, mixing.work, 16, processor=CPU.processor, weights=CPU.order(resident=True)
    )
    scan = scan_s(CPU.profile, 4 * 16 * 16, CPU.processor)
    added = [b - a for a, b in zip(seconds(), seconds(branches=5.0), strict=True)]
    assert added == pytest.approx([4 * (piece.value + scan.value)] * 3 + [0.0])
    hidden, heads = 64, 4 * 16
    width = 2 * 32 + 2 * heads + 2 * 4  # queries, keys, values, gates, and two numbers of each head
    assert mixing.work.weight_bytes == 4 * (hidden * width + heads * hidden)
    load = replace(placed, sequences=3).load(1)
    three = pass_times(CPU.profile, load, CPU.processor, rate).layer_s[0]
    one = pass_times(CPU.profile, placed.load(3), CPU.processor, rate).layer_s[0]
    assert three - one == pytest.approx((3 - 1 - 2 / 16) * (piece.value + scan.value))
