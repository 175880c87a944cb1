"""Law 8: `plan`, `simulate` and the controller say the same of the same run, within 1 %.

Every family of the tests, one with recurrent states and one that is quantised, at the size of a
model people run (from `config.json` alone, so that the time of a step is not the host's), with
every second drafter, on a CPU and a GPU: on one with 4k and on the other with 32k tokens, in turn
from family to family, and with the other drafters in every third and fourth.
"""

import dataclasses
import json
from itertools import islice

import pytest
from hybrids import DELTA
from test_families import FAMILIES, IDS
from test_profile import PROJECT

from offload_rt.cli.headline import prediction_record
from offload_rt.cli.simulate import Question, simulated
from offload_rt.config import (
    DRAFTERS,
    DraftConfig,
    DraftShape,
    DraftWeights,
    Exact,
    HomeKind,
    KVPlace,
    RetrievalConfig,
    RuntimeConfig,
)
from offload_rt.costs.drafters import Drafting
from offload_rt.costs.machine import FreeMemory, speeds_there
from offload_rt.costs.step import STEP_S
from offload_rt.errors import PlanError
from offload_rt.model.outline import outline_checkpoint
from offload_rt.planning.fit import RunLoad
from offload_rt.planning.given_rates import Acceptance, expect
from offload_rt.planning.planner import Means, plan_run, plan_wires
from offload_rt.planning.scenarios.scenario import Home, ModelShape, PlacementShape, Scenario
from offload_rt.planning.scenarios.simulate import simulate
from offload_rt.planning.yields import MADE, SIZES, Yield
from offload_rt.profiling.store import load_profile
from offload_rt.speculative.draft_model.kind import settled
from offload_rt.speculative.eagle3.checkpoint import open_head
from offload_rt.speculative.kinds import kind_of

GIB = 2**30
SAME = 0.01
CONTEXTS = 4096, 32768
FREE = FreeMemory(device_bytes=256 * GIB, host_bytes=256 * GIB)
LAYERS, WINDOW = 4, 1024
LARGE = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
SMALL = LARGE | {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
# Where they lie and how frequencies are made changes no time.
ALIKE = {"llama-tied", "llama-llama3", "llama-yarn", "llama-linear", "granite-whole-number"}
# Drafters that a model cannot have: over rows that are states, or copies no smaller than it.
REFUSED = {"states": {"triforce", "self"}, "awq": {"self"}}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
STATES = {**DELTA, "head_dim": 128, "num_experts": 0} | {
    f"linear_{name}": 128 for name in ("key_head_dim", "value_head_dim")
}
CASES = {name: FAMILIES[name] for name in FAMILIES if name not in ALIKE} | {
    "states": ("qwen3_next", STATES | {"linear_num_key_heads": 16, "linear_num_value_heads": 32}),
    "awq": ("llama", {"quantization_config": AWQ}),
}
HEAD = LARGE | {
    "architectures": ["LlamaForCausalLMEagle3"],
    "model_type": "llama",
    "num_hidden_layers": 1,
    "draft_vocab_size": 32000,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
}
MACHINES = {
    "gpu": speeds_there(load_profile(PROJECT / "profiles" / "rtx4090-pcie4x16.json"), "auto"),
    "cpu": speeds_there(load_profile(PROJECT / "profiles" / "cpu-2core-avx512bf16.json"), "auto"),
}
ROUNDED = {"gpu": DraftWeights.INT4, "cpu": DraftWeights.INT8}
KV = {"gpu": KVPlace.HOST, "cpu": KVPlace.DISK}
CHAIN = Acceptance(ranks=((0.8,), (0.7,)))
TREE = Acceptance(ranks=((0.6, 0.2), (0.5, 0.1)))


def model_of(folder, config):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return outline_checkpoint(folder)


@pytest.fixture(scope="module", params=CASES)
def family(request, tmp_path_factory):
    """A model of a family, as large as one that is streamed, with a module that drafts."""
    model_type, config = CASES[request.param]
    large = LARGE | IDS | {"model_type": model_type} | config
    large |= {"layer_types": config["layer_types"][:2] * 2} if "layer_types" in config else {}
    large |= {"sliding_window": WINDOW} if "sliding_window" in config else {}
    large |= {"head_dim": 128} if "head_dim" in config else {}
    large |= {"num_key_value_heads": 32} if model_type == "gpt_neox" else {}
    large |= {"moe_intermediate_size": 1408} if "moe_intermediate_size" in config else {}
    large |= {"mtp_num_hidden_layers": 1}
    return model_of(tmp_path_factory.mktemp(request.param), large), request.param


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return model_of(tmp_path_factory.mktemp("small"), SMALL)


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Of an EAGLE-3 head its configuration."""
    folder = tmp_path_factory.mktemp("head")
    (folder / "config.json").write_text(json.dumps(HEAD))
    return folder


def drafters(machine):
    """Every drafter, with what a user may state of it."""
    rounded = ROUNDED[machine]
    retrieval = {w: RetrievalConfig(retrieval_weights=w) for w in (DraftWeights.SAME, rounded)}
    chain, tree = DraftShape.CHAIN, DraftShape.TREE
    yield DraftConfig(), Acceptance()
    yield DraftConfig(draft="ngram", draft_tokens=16), TREE
    for weights in (DraftWeights.SAME, rounded):
        known = {"draft": "model:x", "draft_weights": weights}
        yield DraftConfig(**known, draft_tokens=4, shape=chain), CHAIN
        yield DraftConfig(**known, draft_tokens=64, shape=tree), TREE
    yield DraftConfig(draft="model:x", draft_tokens=4, draft_window=128), CHAIN
    yield DraftConfig(draft="medusa:x", draft_tokens=63), TREE
    yield DraftConfig(draft=f"self:{rounded}", draft_tokens=4, shape=chain), CHAIN
    yield DraftConfig(draft=f"self:{rounded}", draft_tokens=64, shape=tree), TREE
    yield DraftConfig(draft="mtp", draft_tokens=4, shape=chain), CHAIN
    yield DraftConfig(draft="eagle3:x", draft_tokens=32, shape=tree), TREE
    for weights, kept in retrieval.items():
        known = {"draft_tokens": 8, "retrieval": kept}
        alone = DraftConfig(draft="triforce", **known)
        helped = DraftConfig(draft="triforce:x", draft_weights=weights, **known)
        for draft in (alone, helped):
            rates = kind_of(draft.kind).inner_rates(draft)  # what the planner assumes
            yield draft, dataclasses.replace(CHAIN, inner=tuple((rate,) for rate in rates))


def drafting_of(draft, small, speeds, eagle3=None):
    model = small if draft.model else eagle3 if draft.module else None
    return settled(Drafting(draft, model, 10**9 if draft.heads else 0), speeds.device)


def planned(checkpoint, config, speeds, drafting, acceptance, context):
    """What `plan` says, where drafts gave before what is stated of them."""
    tokens = expect(drafting.config, acceptance).tokens

    def yields(draft):
        return Yield(((draft.nodes, tokens - 1.0),), made=MADE)

    load = RunLoad(capacities=[context], prompt_tokens=context, drafting=drafting)
    means = Means(speeds=speeds, yields=yields)
    return plan_wires(checkpoint, config, speeds.device, load=load, free=FREE, means=means)[1]


def asked_of_simulate(checkpoint, config, speeds, drafting, acceptance, context):
    """What `simulate` says."""
    question = Question(
        checkpoint=checkpoint,
        from_files=False,
        own=True,
        speeds=speeds,
        draft=drafting.config,
        acceptance=acceptance,
        context_tokens=context,
    )
    return simulated(question, config, FREE, drafting).prediction


def told(call, *case):
    """What a verb says, or why it says nothing."""
    try:
        return call(*case)
    except PlanError as refusal:
        return str(refusal)


@pytest.mark.parametrize("machine", MACHINES)
def test_plan_and_simulate_say_the_same(family, small, head, machine):
    (model, name), number = family, [*CASES].index(family[1])
    context = CONTEXTS[(number + [*MACHINES].index(machine)) % 2]
    speeds, refused = MACHINES[machine], set()
    eagle3 = open_head(model, head, runs=False)
    for draft, acceptance in islice(drafters(machine), number // 2 % 2, None, 2):
        own_rows = draft.words.over_own_rows  # such drafts are of rows on the device
        kv = KVPlace.DEVICE if own_rows else KV[machine]
        config = RuntimeConfig(resident_layers=1, slots=2, kv=kv)
        drafting = drafting_of(draft, small, speeds, eagle3)
        case = (model, config, speeds, drafting, acceptance, context)
        plan, other = told(planned, *case), told(asked_of_simulate, *case)
        if isinstance(plan, str):
            assert plan == other
            refused.add(draft.kind)
            continue
        one = prediction_record(plan.prediction)
        for key, value in prediction_record(other).items():
            same = value if isinstance(value, str) else pytest.approx(value, rel=SAME)
            assert one[key] == same, (draft, key)
        assert one["s_per_token"] > 4 * STEP_S  # else nothing but the host's time is compared
    assert refused == REFUSED.get(name, set())


def test_every_drafter_is_tried():
    tried = {draft.kind for machine in MACHINES for draft, _ in drafters(machine)}
    assert tried == DRAFTERS.keys() - {"auto"}


@pytest.mark.parametrize("machine", MACHINES)
def test_the_controller_expects_what_the_plan_says(tmp_path, small, machine):
    speeds, context = MACHINES[machine], 4096
    checkpoint = model_of(tmp_path, LARGE | {"model_type": "llama"})
    config = RuntimeConfig(resident_layers=1, slots=2)
    for name in ("ngram", "model:x"):
        drafting = drafting_of(DraftConfig(draft=name), small, speeds)
        means = Means(
            speeds=speeds,
            yields=lambda c: Yield(tuple((n, 0.5 * n**0.5) for n in SIZES), made=MADE),
        )
        load = RunLoad(capacities=[context], prompt_tokens=context, drafting=drafting)
        made = plan_run(checkpoint, config, speeds.device, load=load, free=FREE, means=means)
        (step,) = [step for step in made.outlooks if step.nodes == made.first_nodes]
        assert step.pass_s == pytest.approx(made.prediction.pass_s, rel=SAME)
        assert step.draft_s == pytest.approx(made.prediction.draft_s, rel=SAME)
        assert step.s_per_token == pytest.approx(made.prediction.s_per_token, rel=SAME)


def test_trees_may_be_as_large_as_rows_are_free(tmp_path, small):
    """1,024 nodes on a GPU, 256 on a CPU; more nodes take more of the host's time."""
    checkpoint = model_of(tmp_path, LARGE | {"model_type": "llama"})
    for machine, most in (("gpu", 1024), ("cpu", 256)):
        speeds = MACHINES[machine]
        drafting = drafting_of(DraftConfig(draft="model:x"), small, speeds)
        load = RunLoad(capacities=[4096], prompt_tokens=4096, drafting=drafting)
        means = Means(speeds=speeds, yields=lambda c: Yield(((1024, 40.0),), made=MADE))
        config = RuntimeConfig(resident_layers=1, slots=2, kv=KV[machine])
        made = plan_run(checkpoint, config, speeds.device, load=load, free=FREE, means=means)
        assert max(way.draft.nodes for way in made.considered) == most
        if most == 1024:
            assert made.drafting.config.nodes > 256


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("slots", [1, 2])  # one waits for the end of a copy: 5 % on the CPU
def test_a_scenario_of_the_same_sizes_says_the_same(tmp_path, small, machine, context, slots):
    """But for the host's time of a step, which of another program is not known."""
    speeds = MACHINES[machine]
    speeds = dataclasses.replace(speeds, packs=False)
    sizes = {"hidden_size": 1024, "head_dim": 128, "tie_word_embeddings": False}
    checkpoint = model_of(tmp_path, LARGE | {"model_type": "llama"} | sizes)
    home = {"gpu": HomeKind.HOST, "cpu": HomeKind.DISK}[machine]
    kept = {"kv": KVPlace.DEVICE, "exact": Exact.OFF}  # others' passes are not row-invariant
    config = RuntimeConfig(resident_layers=0, slots=slots, **kept)
    case = (checkpoint, config, speeds, drafting_of(DraftConfig(), small, speeds), Acceptance())
    one = asked_of_simulate(*case, context)
    shape = ModelShape(
        layers=LAYERS,
        hidden=1024,
        intermediate=11008,
        heads=32,
        kv_heads=8,
        head_dim=128,
        vocab=32000,
    )
    placed = PlacementShape(
        processor=speeds.processor, resident_layers=0, slots=slots, home=Home(home)
    )
    scenario = Scenario(
        schema_version=1,
        name="the same",
        profile=speeds.profile.name,
        model=shape,
        context_tokens=context,
        placement=placed,
    )
    other = simulate(scenario, speeds.profile)
    assert other.step_s == pytest.approx(one.step_s - STEP_S, rel=SAME)
    assert other.bytes_per_pass == pytest.approx(one.bytes_per_pass, rel=SAME)
    assert other.limit == one.limit
