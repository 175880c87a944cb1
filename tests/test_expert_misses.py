"""Experts that a GPU lacks and the processor computes where they lie: `--expert-misses`."""

import json
import random
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate
from expert_models import make_mixture
from flash_double import flash_of_a_gpu
from quantised import CASES, write_gpt_oss, write_twins
from test_cuda_numbers import ROOM
from test_experts import lend, lru_hits, pool_of, traced
from test_workload import GPU
from value_double import open_double
from waits import wait_until

from offload_rt.config import Exact, ExpertMisses, HomeKind, LookAhead, RuntimeConfig
from offload_rt.costs.experts import FETCH_S, split_of
from offload_rt.costs.machine import FreeMemory, Levels
from offload_rt.costs.timeline import TimedLayer, TimedPass, steady_pass
from offload_rt.device.kinds import CUDA
from offload_rt.errors import ConfigError
from offload_rt.kernels import pairs
from offload_rt.model import experts as experts_module
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.formats import direct
from offload_rt.model.formats.fours import DECODERS
from offload_rt.model.formats.methods import Form
from offload_rt.model.formats.stored import Stored
from offload_rt.model.formats.wired import Bringer
from offload_rt.planning.fit import RunLoad, miss_rates, splits_misses
from offload_rt.planning.placement import ExpertDemand
from offload_rt.planning.planner import Means, plan_run
from offload_rt.streaming.experts import Asked, MissRates

ON_HOST = {"expert_misses": ExpertMisses.HOST, "home": HomeKind.HOST} | ROOM
RATES = MissRates(link_s=2.0, host_s=1.0)
GIB = 2**30


@pytest.fixture(autouse=True)
def flash(monkeypatch):
    """What attends on a GPU, in fp32 too."""
    with flash_of_a_gpu(torch.float32):
        yield
        monkeypatch.undo()  # kinds it put in meanwhile are to go before those that were


@pytest.fixture
def opened(monkeypatch):
    """Engines on a double of a GPU, whose link takes twice as long as its processor."""

    @contextmanager
    def open_one(folder, rates=RATES, pin=True, **config):
        open_double(monkeypatch, pin=pin)
        with engine_for(folder, **(ON_HOST | config)) as engine:
            engine.runner.experts.rates = rates
            yield engine

    return open_one


def resident_answers(folder, monkeypatch):
    open_double(monkeypatch)
    with engine_for(folder, resident_layers=4, **ROOM) as engine:
        logits = all_logits(engine)
        engine.forget()
        return logits, generate(engine, tokens=6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("qwen3_moe", "bfloat16"), ("mixtral", "float32"), ("gpt_oss", "float32")],
)
def test_answers_are_those_of_all_in_memory(make_tiny, monkeypatch, opened, name, dtype):
    """The processor has the same arithmetic as this double of a GPU, so to the last bit."""
    folder = make_mixture(make_tiny, name, dtype=dtype)
    logits, answer = resident_answers(folder, monkeypatch)
    for more in (
        {"expert_slots": 9},
        {"expert_slots": 9, "rates": MissRates(link_s=99.0, host_s=1.0)},  # all that is lacking
        {"expert_slots": 13, "look_ahead": LookAhead.ON, "pin": False},
    ):
        with opened(folder, **more) as engine:
            assert generate(engine, tokens=6) == answer
            engine.forget()
            assert torch.equal(all_logits(engine), logits)
            counts = engine.runner.experts.counts
            assert 0 < counts.on_host <= counts.misses


@pytest.fixture(scope="module")
def mxfp4(make_tiny, tmp_path_factory):
    source = make_mixture(make_tiny, "gpt_oss", intermediate_size=64)
    return write_gpt_oss(source, tmp_path_factory.mktemp("gpt-oss")).folder


@pytest.mark.parametrize("compiles", [True, False])
def test_quantised_experts_are_multiplied_as_they_are_stored(mxfp4, monkeypatch, opened, compiles):
    """One sum in fp32 each, of other bits than the dequantised product; or that product."""
    if compiles and pairs.problem():
        pytest.skip(pairs.problem())
    logits, _ = resident_answers(mxfp4, monkeypatch)
    if not compiles:
        monkeypatch.setattr(direct, "multiplies_fours", lambda stored: False)
    with opened(mxfp4, expert_slots=9) as engine:
        found = all_logits(engine)
        assert engine.runner.experts.counts.on_host > 0
    assert torch.equal(found, logits) != compiles
    assert (found - logits).abs().max() <= 1e-4 * logits.abs().max()


def test_nothing_is_assembled_or_taken_for_dequantising_in_a_pass(mxfp4, monkeypatch, opened):
    """Kernels for any number of rows are there before; what needs no scratch has none."""
    if pairs.problem():
        pytest.skip(pairs.problem())
    made, lend = pairs._kernel.cache_info().misses, Bringer.lend
    rows, scales = torch.ones(8, 32), torch.zeros(16, 1, dtype=torch.uint8)
    codes = torch.zeros(16, 16, dtype=torch.uint8)
    for count in range(1, 9):
        pairs.multiply(rows[:count], codes, scales, torch.ones(256))
    assert pairs._kernel.cache_info().misses == made
    with opened(mxfp4, expert_slots=9) as engine:
        lent = []
        monkeypatch.setattr(
            Bringer,
            "lend",
            lambda self, room, **_: lent.append(room.numel()) or lend(self, room, **_),
        )
        network = engine.runner.network
        network.compute_at_home(frozenset())
        assert lent and not any(lent)
        monkeypatch.setattr(direct, "multiplies_fours", lambda stored: False)
        network.compute_at_home(frozenset())
        assert lent[-1] > 0


def test_halves_of_a_matrix_are_multiplied_as_they_are_stored(
    make_tiny, tmp_path, monkeypatch, opened
):
    """Gate and up of each expert, which these files have apart."""
    if pairs.problem():
        pytest.skip(pairs.problem())
    source = make_mixture(make_tiny, dtype="float32")
    folder = write_twins(source, tmp_path, *CASES["MXFP4"], kept=("gate", "router")).folder
    logits, _ = resident_answers(folder, monkeypatch)
    with opened(folder, expert_slots=9) as engine:
        products, multiply = [], pairs.multiply
        monkeypatch.setattr(
            pairs, "multiply", lambda *given: products.append(given) or multiply(*given)
        )
        found = all_logits(engine)
        assert len(products) == 3 * engine.runner.experts.counts.on_host > 0
    assert (found - logits).abs().max() <= 1e-4 * logits.abs().max()


def test_what_has_a_norm_of_its_own_is_not_computed_by_the_host(make_tiny, opened):
    """The norm's weight is in memory of the GPU."""
    with opened(make_mixture(make_tiny), expert_slots=9) as engine:
        for module in engine.runner.network._model.modules():
            if hasattr(module, "has_post_expert_norm"):
                module.has_post_expert_norm, module.post_expert_norm = True, torch.nn.Identity()
        generate(engine, tokens=2)
        assert engine.runner.experts.counts.on_host == 0 < engine.runner.experts.counts.misses
    placement = SimpleNamespace(expert_slots=9, home=HomeKind.HOST)
    for name in ("down_proj", "post_expert_norm.weight"):
        checkpoint = SimpleNamespace(tensors={f"model.layers.0.mlp.experts.{name}": None})
        found = splits_misses(checkpoint, placement, RuntimeConfig(exact=Exact.OFF), CUDA)
        assert found == (name == "down_proj")


def test_a_row_sent_to_no_expert_takes_no_bias_from_beyond():
    """It is refused when the host has the router's choice; and a matrix may have no bias."""
    module = SimpleNamespace(
        has_gate=True, num_experts=4, _parameters={"gate_up_proj_bias": torch.arange(12).view(4, 3)}
    )
    host, rows = SimpleNamespace(fetch=lambda data: data), torch.ones(1, 2)
    sent, there = experts_module._OnHost.fetched(module, host, torch.tensor([9, 1]), rows)
    assert sent == [9, 1] and there.biases.keys() == {"gate_up_proj"}
    assert there.biases["gate_up_proj"].tolist() == [[9, 10, 11], [3, 4, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_fours_are_those_of_what_torch_dequantises(dtype):
    """All codes and scales, to the last bit where sums are exact."""
    if pairs.problem():
        pytest.skip(pairs.problem())
    stored = Stored(
        module="m",
        form=Form.MXFP4,
        outputs=70,
        inputs=160,
        bits=4,
        groups=5,
        block=(1, 32),
        parts={},
    )
    parts = {
        "weight_packed": torch.arange(70 * 80).to(torch.uint8).view(70, 80),
        "weight_scale": torch.randint(124, 131, (70, 5), dtype=torch.uint8),
    }
    weight = torch.empty(70, 160)
    DECODERS[Form.MXFP4](stored, parts, weight)
    rows, bias = torch.randint(-8, 9, (11, 160)).to(dtype), torch.randint(-8, 9, (70,)).to(dtype)
    multiply = direct.at_home(stored, dtype, in_order=True)
    for own in (None, bias):
        exact = rows.double() @ weight.double().t() + (0.0 if own is None else own.double())
        assert torch.equal(multiply(rows, parts, own), exact.float().to(dtype))


def test_a_failure_leaves_nothing_behind(make_tiny, monkeypatch, opened):
    folder = make_mixture(make_tiny, dtype="float32")
    logits, _ = resident_answers(folder, monkeypatch)
    with opened(folder, expert_slots=9) as engine:
        pool = engine.runner.experts
        with monkeypatch.context() as broken:
            broken.setattr(experts_module._OnHost, "compute", fail)
            with pytest.raises(ZeroDivisionError):
                for _ in range(9):
                    engine.forward([(0, PROMPT[:1])], reuse=False)
        assert sum(len(pool.held(layer)) for layer in range(4)) + len(pool._free) == 9
        engine.forget()
        assert torch.equal(all_logits(engine), logits)


def fail(*_):
    return 1 // 0


def slots_of(pool):
    return [slot for own in pool._held.values() for slot in own.values()]


def test_slots_hold_what_they_hold_without(make_tiny, opened):
    """Where the link has time: what the host computed comes afterwards, into the same slots."""
    folder = make_mixture(make_tiny)
    with opened(folder, expert_slots=16, look_ahead=LookAhead.OFF) as engine:
        pool, trace = engine.runner.experts, traced(engine)
        for token in PROMPT:
            engine.forward([(0, [token])], reuse=False)
            wait_until(  # a thread of its own copies what is offered
                lambda: not any(s.offer and s.offer.begun_bytes < 1 for s in slots_of(pool))
            )
        assert pool.counts.hits == lru_hits(trace, pool.share) > 0


def test_no_slot_is_overwritten_whatever_the_host_computes():
    dice = random.Random(5)
    for slots in (3, 7, 12, 22):
        pool, copy, compute = pool_of({0: 8, 1: 8, 2: 4}, slots, per_token=2)
        pool.rates = RATES
        for _ in range(60):
            for layer, count in ((0, 8), (1, 8), (2, 4)):
                parts = dice.choice([1, 1, 3])
                pool.begin(layer, parts)
                for _ in range(parts):
                    needed = dice.sample(range(count), dice.randint(1, 4))
                    away = pool.on_host(layer, needed, lambda expert: expert != 3)
                    assert 3 not in away and not (away and parts > 1)
                    foreseen = dice.sample(range(4 if layer else 8), dice.randint(0, 3))
                    # A pass that the host has a part of foresees nothing; the pool can do both.
                    foresee = foreseen.copy if dice.random() < 0.5 else None
                    lent = lend(pool, layer, needed, 1, foresee, frozenset(away))
                    got = set()
                    for expert, buffer in lent:
                        compute.kernel(reads=[buffer], writes=[], seconds=0.5)
                        got.add(expert)
                        if dice.random() < 0.02:
                            lent.close()
                            break
                    else:
                        assert got == {*needed} - {*away}
            held = [len(pool.held(layer)) for layer in range(3)]
            assert sum(held) + len(pool._free) == slots
        assert 0 < pool.counts.on_host < pool.counts.misses


@pytest.mark.parametrize("together", [True, False])
def test_the_host_computes_before_it_waits(monkeypatch, together):
    """A wait for what is on its way may block the host: what it can do until then, it does."""
    pool, _, compute = pool_of({0: 8}, 6, per_token=4)
    order = [expert for expert, _ in lend(pool, 0, [0, 1])]
    wait = compute.wait
    monkeypatch.setattr(compute, "wait", lambda event: (order.append("wait"), wait(event)))
    order.clear()
    away, meanwhile = frozenset([3]), partial(order.append, "host")
    asked = Asked([0, 1, 2, 3], 1, None, away, meanwhile, there=4 if together else 1)
    for group in pool.lend(0, asked):
        order.extend(expert for expert, _ in group)
    assert order == [0, 1, "host", "wait", 2]
    order.clear()
    assert len([*lend(pool, 0, [0, 1], 1, None, frozenset(), meanwhile)]) == 2
    assert order == ["host"]  # nothing is waited for: afterwards


def test_nothing_is_foreseen_where_the_host_may_compute(make_tiny, opened):
    """As it is predicted; passes of more rows look ahead."""
    folder = make_mixture(make_tiny)
    with opened(folder, expert_slots=13, look_ahead=LookAhead.ON) as engine:
        pool = engine.runner.experts
        generate(engine, tokens=12)
        assert pool.may_foresee and pool.counts.on_host > 0 == engine.foresight.share
        assert pool.counts.ahead == pool.counts.unused == 0
        for rows in (8, 9):
            engine.announce(rows)
            assert pool.foresees == (rows > 8)
    for meanwhile in (None, list):
        pool, copy, _ = pool_of({0: 4, 1: 4}, 8, per_token=2)
        for _ in lend(pool, 0, range(4), 4, None, frozenset(), meanwhile):
            pass
        assert copy.statistics().bytes_copied == (4000 if meanwhile else 8000)


def test_what_is_copied_behind_in_vain_is_counted():
    """All that is read was asked for, or is counted as read in vain."""
    pool, copy, _ = pool_of({0: 8}, 4, per_token=2)
    for needed, away in (([0, 1], [1]), ([2, 3], []), ([4, 5], [])):
        for _ in lend(pool, 0, needed, on_host=frozenset(away)):
            pass
    counts, read = pool.counts, copy.statistics().bytes_copied
    assert (counts.misses, counts.on_host, counts.unused, counts.unused_bytes) == (6, 1, 0, 1000)
    assert read == 1000 * (counts.misses - counts.on_host) + counts.unused_bytes


def test_link_and_host_end_together_by_their_rates():
    """Of any split the soonest; a file is no place to compute from."""
    rates = MissRates(link_s=2.0, host_s=1.0, file_s=5.0, begin_s=0.5)
    assert [rates.on_host(misses, misses) for misses in range(7)] == [0, 1, 1, 2, 3, 3, 4]
    assert rates.on_host(3, 2) == 2 and rates.on_host(3, 0) == 0
    assert MissRates(link_s=1.0, host_s=9.0).on_host(8, 8) == 0
    for mean in (0.0, 0.7, 2.4):
        split = split_of(mean, 4, 1.0, rates)
        assert split.on_host + split.over_link == pytest.approx(mean)
        assert split.until_s <= mean * rates.link_s
    assert split_of(2.4, 4, 0.0, rates).on_host == 0


def test_rows_are_not_fetched_where_no_layer_would_gain(make_tiny):
    """Of a fast link for the most that may lack: only if it is asked for."""
    experts = ExpertDemand(
        rest_bytes=(1,),
        slot_bytes=10**7,
        counts=(8, 8),
        per_token=2,
        image_bytes=16 * 10**7,
        file_bytes=16 * 10**7,
    )
    placement = SimpleNamespace(
        expert_slots=3,
        home=HomeKind.HOST,
        expert_share=1.0,
        host_bytes=0,
        demand=SimpleNamespace(experts=experts),
    )
    checkpoint = SimpleNamespace(tensors={}, stored={})
    config = RuntimeConfig(exact=Exact.OFF)
    for rate, is_there in ((25e9, True), (1e13, False)):
        links = [
            replace(link, bytes_per_s=replace(link.bytes_per_s, value=rate))
            for link in GPU.profile.links
        ]
        speeds = replace(GPU, profile=replace(GPU.profile, links=tuple(links)))
        found = miss_rates(checkpoint, placement, config, CUDA, speeds)
        assert (found is not None) == is_there
        asked = replace(config, expert_misses=ExpertMisses.HOST)
        assert miss_rates(checkpoint, placement, asked, CUDA, speeds) is not None


def test_a_pool_splits_by_the_hours_seconds_as_its_plan_does(make_tiny):
    """Where recent runs found that reading and computing are unlike what the profile says."""
    runtime = RuntimeConfig(expert_slots=9, exact=Exact.OFF, **ON_HOST)
    means = Means(speeds=GPU, level=lambda streams, running: Levels(reading=3.0, computing=0.5))
    plan = plan_run(
        open_checkpoint(make_mixture(make_tiny)),
        runtime,
        CUDA,
        load=RunLoad(capacities=[64], prompt_tokens=17),
        free=FreeMemory(device_bytes=8 * GIB, host_bytes=8 * GIB),
        means=means,
    )
    plain = replace(plan.placed, speeds=GPU).misses
    assert plan.misses == plan.placed.misses
    assert plan.misses.link_s == pytest.approx(3.0 * plain.link_s)
    assert plan.misses.host_s == pytest.approx(0.5 * plain.host_s)


def test_a_layer_waits_for_the_later_of_host_and_link():
    for host_s in (0.0, 0.5, 7.0):
        layer = TimedLayer(
            kernel_s=1.0, missed_bytes=300, experts_s=0.8, missed_s=0.4, host_s=host_s
        )
        one = TimedPass(layers=[layer] * 3, slots=0, home_bytes_per_s=(100.0,))
        assert steady_pass(one).pass_s == pytest.approx(3 * (0.2 + max(3.0, host_s) + 0.4))
        behind = replace(layer, behind_bytes=3000)  # the link is never done sooner
        busy = TimedPass(layers=[behind] * 3, slots=0, home_bytes_per_s=(100.0,))
        assert steady_pass(busy).pass_s == pytest.approx(3 * 33.0)


def test_it_is_never_part_of_row_invariant_passes(make_tiny, monkeypatch):
    for exact in (Exact.AUTO, Exact.ON):
        with pytest.raises(ConfigError, match="add --exact off"):
            RuntimeConfig(expert_misses=ExpertMisses.HOST, exact=exact)
        assert not RuntimeConfig(exact=exact).misses_on_host
    assert RuntimeConfig(exact=Exact.OFF).misses_on_host
    link = RuntimeConfig(exact=Exact.OFF, expert_misses=ExpertMisses.LINK)
    assert not link.misses_on_host
    open_double(monkeypatch)
    folder = make_mixture(make_tiny)
    with engine_for(folder, expert_slots=9, exact=Exact.AUTO, home=HomeKind.HOST, **ROOM) as engine:
        assert engine.plan.misses is None is engine.runner.experts.rates


def test_where_it_has_no_effect_it_is_refused(make_tiny, tiny_model, monkeypatch):
    with pytest.raises(ConfigError, match="with --expert-slots 0 layers are whole"):
        RuntimeConfig(expert_slots=0, expert_misses=ExpertMisses.HOST, exact=Exact.OFF)
    folder = make_mixture(make_tiny)
    with pytest.raises(ConfigError, match="no effect here: the CPU computes all of it"):
        engine_for(folder, expert_slots=9, **(ON_HOST)).__enter__()
    for name, config in ((folder, {"home": HomeKind.DISK, "expert_slots": 9}), (tiny_model, {})):
        open_double(monkeypatch)
        with pytest.raises(ConfigError, match="come one by one from host memory"):
            engine_for(name, **(ON_HOST | {"home": HomeKind.AUTO} | config)).__enter__()


def test_a_simulation_prices_what_the_host_computes(make_tiny, offload_run):
    """On a machine whose link is slow; `plan` ends on the same road."""
    folder = make_mixture(make_tiny)
    more = ["--profile", "rtx4090-pcie4x16", "--context", 64, "--draft", "none", "--json"]
    more += ["--expert-slots", 9, "--profile-set", "h2d_bytes_per_s=1e7"]
    found = {}
    for misses, exact in (("link", "off"), ("auto", "off"), ("host", "off"), ("auto", "auto")):
        asked = ["--expert-misses", misses, "--exact", exact]
        done = offload_run("simulate", folder, *more, *asked)
        assert done.code == 0, done.err
        found[misses, exact] = json.loads(done.out)
    link, host = found["link", "off"], found["host", "off"]
    assert host == found["auto", "off"]
    assert link["on_host_bytes_per_pass"] == found["auto", "auto"]["on_host_bytes_per_pass"] == 0
    assert 0 < host["on_host_bytes_per_pass"] <= host["bytes_per_pass"]
    assert host["bytes_per_pass"] == pytest.approx(link["bytes_per_pass"], rel=0.01)
    assert host["stall_s"] < link["stall_s"]
    asked = ("link", "host")  # of a fast link none is computed so, and each layer brings rows
    fast = [
        offload_run("simulate", folder, *more[:-2], "--exact", "off", "--expert-misses", m)
        for m in asked
    ]
    plain, fetched = (json.loads(done.out)["s_per_token"] for done in fast)
    assert fetched - plain == pytest.approx(4 * FETCH_S)
