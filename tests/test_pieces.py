"""Passes over mixtures in pieces: the bits of passes that are made at once, with few launches."""

from dataclasses import replace

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate
from expert_models import make_mixture
from flash_double import flash_of_a_gpu
from quantised import CASES, write_gpt_oss, write_twins
from recorded import counts
from test_costs_one_road import MACHINES, SMALL, model_of
from test_cuda_numbers import ROOM
from value_double import open_double

from offload_rt.config import DraftConfig, DraftShape, HomeKind
from offload_rt.costs.pass_cost import cost_of, link_rates, pass_times
from offload_rt.costs.sizes import PIECED_ROWS
from offload_rt.costs.workload import PlacedModel, PooledExperts, Residence, parts_of
from offload_rt.model.formats.wired import RowEmbedding
from offload_rt.profiling.rates import PIECES_S
from offload_rt.runner import pieces

LAYERS = 2
SHORT = {"dtype": "bfloat16", "num_hidden_layers": LAYERS}


@pytest.fixture
def double(monkeypatch):
    """A GPU over CPU tensors that records at once."""
    monkeypatch.setattr(pieces, "EAGER_FIRST", 0)
    counts.clear()
    with flash_of_a_gpu(), pytest.MonkeyPatch.context() as inner:  # undone in this order
        yield open_double(inner)


def both(engine):
    """Logits of passes made at once, and in pieces."""
    made = engine.runner._pieces
    made._refused = True
    expected = all_logits(engine)
    assert not counts["recorded"]
    engine.forget()
    made._refused = False
    return expected, all_logits(engine)


@pytest.mark.parametrize("name", ["gpt_oss", "every-second"])
def test_pieces_have_the_bits_of_a_pass_made_at_once(make_tiny, double, name):
    """Biases, sinks and windows; layers without experts."""
    folder = make_mixture(make_tiny, name, **SHORT)
    with engine_for(folder, expert_slots=5, home=HomeKind.HOST, **ROOM) as engine:
        expected, found = both(engine)
        assert torch.equal(found, expected) and engine.placement.demand.in_pieces
        mixtures = len(engine.network.units)
        steps, passes = LAYERS + mixtures, len(expected)
        assert not engine.runner._pieces._refused
        # The prompt's rows are too many; of the others the first is noted while it is made.
        assert counts["recorded"] == steps + 1
        replayed = counts["replayed"]
        engine.forward([(0, [5])], reuse=False)
        assert counts["replayed"] - replayed == steps + 1
        assert passes > 2
        engine.trace()
        engine.forward([(0, [5])], reuse=False)  # whoever looks at layers sees them
        assert counts["replayed"] - replayed == steps + 1


def test_rows_of_drafts_and_of_several_sequences_are_replayed(make_tiny, double):
    folder = make_mixture(make_tiny, **SHORT)
    with engine_for(folder, prompts=[PROMPT, PROMPT], expert_slots=5, **ROOM) as engine:
        found = []
        for refused in (True, False):
            engine.runner._pieces._refused = refused
            for index in (0, 1):
                engine.forward([(index, PROMPT[: 9 + index])], reuse=True)
            for _ in range(2):
                found.append(engine.forward([(0, [7]), (1, [9])], reuse=False))
            engine.forget()
        assert all(torch.equal(a, b) for a, b in zip(found[:2], found[2:], strict=True))
        assert counts["replayed"] > 2 * LAYERS


def test_a_client_that_leaves_while_a_pass_is_noted_is_not_in_the_recording(make_tiny, double):
    """Later passes of as many rows are of all of them."""
    folder = make_mixture(make_tiny, **SHORT)
    with engine_for(folder, prompts=[PROMPT, PROMPT], expert_slots=5, **ROOM) as engine:
        found, left, leave = [], set(), engine.network._leave
        engine.leave_with(left.__contains__)

        def leaving(index, hidden, context):
            left.update([0] if index == 1 and not refused and len(found) == 2 else [])
            return leave(index, hidden, context)

        engine.network._leave = leaving
        for refused in (True, False):
            engine.runner._pieces._refused = refused
            for index in (0, 1):
                engine.forward([(index, PROMPT[: 9 + index])], reuse=True)
            for token in (7, 11):
                found.append(engine.forward([(0, [token]), (1, [9])], reuse=False))
                left.clear()
            engine.forget()
        assert all(torch.equal(a, b) for a, b in zip(found[:2], found[2:], strict=True))
        assert counts["replayed"] > 2 * LAYERS and not engine.runner._pieces._refused


def test_rows_of_an_embedding_are_found_in_each_pass(make_tiny, double):
    """Not those of the pass that was noted."""
    folder = make_mixture(make_tiny, **SHORT)
    with engine_for(folder, expert_slots=5, **ROOM) as engine:
        model = engine.network._model
        weight = model.get_input_embeddings().weight
        own = RowEmbedding(model.get_input_embeddings())
        own.rows = lambda ids: weight[ids]
        model.set_input_embeddings(own)
        expected, found = both(engine)
        assert torch.equal(found, expected) and not engine.runner._pieces._refused
    assert counts["replayed"]


def test_linears_that_share_memory_are_not_planned_in_pieces(make_tiny, double, tmp_path):
    """Attention in 4 bits is dequantised into it."""
    source = make_mixture(make_tiny, "qwen3_moe", **SHORT)
    case = CASES["W4 g32"]
    folder = write_twins(source, tmp_path, *case, dtype=torch.bfloat16, kept=("gate",)).folder
    with engine_for(folder, expert_slots=5, **ROOM) as engine:
        assert engine.runner._pieces is None and not engine.placement.demand.in_pieces


def test_pieces_are_planned_where_they_are_made(make_tiny, double):
    """Not where the device's kernels choose experts, nor where layers are streamed whole."""
    folder, found = make_mixture(make_tiny, **SHORT), []
    for options in ({"expert_slots": 5}, {}, {"resident_layers": 1, "home": HomeKind.HOST}):
        with pytest.MonkeyPatch.context() as inner:
            open_double(inner)
            with engine_for(folder, **options, **ROOM) as engine:
                demand = engine.placement.demand
                found.append((engine.runner._pieces is not None, demand.in_pieces))
                found.append(demand.workspace_bytes)
    assert [planned for _, planned in found[::2]] == [True, False, False]
    made = [made for made, _ in found[::2]]
    assert (made[0], made[2]) == (True, False)  # of the other, whose tensors are a CPU's here, too
    assert found[1] > found[3] == found[5]


def read_back(seen, hidden):
    seen.append(float(hidden.float().mean()))
    return hidden


def renamed(seen, hidden):
    seen.append(len(seen))
    return torch.nn.Parameter(hidden, False)  # another tensor, and no operator


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (read_back, "a value is read back between their steps"),
        (renamed, "no operator made a tensor that is in memory which they fill"),
    ],
)
def test_what_cannot_be_replayed_is_said_once_and_made_as_ever(
    make_tiny, double, monkeypatch, caplog, changed, why
):
    folder = make_mixture(make_tiny, **SHORT)
    with engine_for(folder, expert_slots=5, **ROOM) as engine:
        norm = engine.network._layers[1].post_attention_layernorm
        forward, seen = norm.forward, []
        monkeypatch.setattr(norm, "forward", lambda hidden: forward(changed(seen, hidden)))
        expected, found = both(engine)
        assert torch.equal(found, expected) and len(set(seen)) > 2
        assert engine.runner._pieces._refused
    said = [r.message for r in caplog.records if "kernel by kernel" in r.message]
    assert said == [f"passes over experts are launched kernel by kernel: {why}"]


def test_a_draft_model_is_recorded_whatever_becomes_of_pieces(make_tiny, double, monkeypatch):
    """A router that cannot be captured is no reason to launch drafts kernel by kernel."""
    folder = make_mixture(make_tiny, **SHORT)
    small = make_tiny("llama", num_hidden_layers=1, dtype="bfloat16")
    captured, capture = [], double._driver.capture

    def refusing(work, device):
        captured.append(work.__qualname__)
        if "_Recorder" in captured[-1]:
            raise RuntimeError("operation not permitted")
        return capture(work, device)

    monkeypatch.setattr(double._driver, "capture", refusing)
    draft = DraftConfig(draft=f"model:{small}", draft_tokens=3, shape=DraftShape.CHAIN)
    with engine_for(folder, tokens=16, draft=draft, expert_slots=5, **ROOM) as engine:
        engine.forward([(0, [5])], reuse=False)
        assert engine.runner._pieces._refused
        engine.forget()
        generate(engine, tokens=16)
    assert ["_Recorder" in name for name in captured[:2]] == [True, False]
    assert counts["replayed"] > counts["recorded"] > 0


def test_passes_over_two_gpus_are_not_in_pieces(make_tiny, double, tmp_path):
    """A recording has the kernels of one GPU's stream."""
    source = make_mixture(make_tiny, "gpt_oss", intermediate_size=64, **SHORT)
    folder = write_gpt_oss(source, tmp_path, torch.bfloat16).folder
    with engine_for(folder, **ROOM) as engine:
        assert engine.runner._pieces is not None and engine.placement.demand.in_pieces
        expected = all_logits(engine)
    assert counts["recorded"]
    counts.clear()
    with pytest.MonkeyPatch.context() as inner:  # undone before the fixture's
        open_double(inner, count=2)
        with engine_for(folder, device="cpu,cpu", **ROOM) as engine:
            assert engine.runner._pieces is None and not engine.placement.demand.in_pieces
            assert torch.equal(all_logits(engine), expected)
    assert not counts["recorded"]


def test_passes_in_pieces_cost_their_launches_and_bytes(tmp_path):
    config = SMALL | {"model_type": "qwen2_moe", "num_experts": 8, "num_experts_per_tok": 2}
    model = model_of(tmp_path, config | {"moe_intermediate_size": 1408})
    gpu = MACHINES["gpu"]
    parts = parts_of(model, "auto", gpu.device)
    experts = PooledExperts(
        counts=(8,) * len(parts.layers), per_token=2, held=8, home_bytes=1, image_bytes=1
    )

    def placed(**how):
        where = Residence(experts=experts)
        return PlacedModel(
            parts=parts, speeds=gpu, residence=where, context_tokens=9, in_pieces=True, **how
        )

    def seconds(load):
        rates = link_rates(gpu.profile, load)
        return cost_of(load, pass_times(gpu.profile, load, gpu.processor, rates)).pass_s

    load = placed().load(1)
    assert load.pieced and not placed(exact=True).load(1).pieced
    assert not placed().load(PIECED_ROWS + 1).pieced
    assert not replace(placed(), residence=Residence(streamed=(1,), slots=1)).load(1).pieced
    assert not replace(placed(), in_pieces=False).load(1).pieced
    recorded = replace(load, pieced=False, recorded=True)
    more = len(parts.layers) * PIECES_S
    assert seconds(load) == pytest.approx(seconds(recorded) + more)
    assert seconds(load) < 0.7 * seconds(replace(load, pieced=False))
