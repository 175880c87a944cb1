"""The checkpoint's own module drafts: what it computes, what it keeps, and what is refused."""

import json
import shutil
from dataclasses import replace
from functools import lru_cache

import pytest
import quantised
import torch
from engines import PROMPT, engine_for, generate, reference_model
from fake_cuda import build_for_real, fake_gpu
from mtp_models import (
    BEHIND,
    FAMILIES,
    nearly_of_the_token,
    of_the_hidden_state,
    of_the_token,
    stored_name,
    write_mtp,
)
from safetensors.torch import load_file, save_file
from test_fake_cuda import PROMPTS, gpu  # noqa: F401 - a fixture

from offload_rt.config import (
    DraftConfig,
    DraftShape,
    DraftWeights,
    GenerationConfig,
    HomeKind,
    RuntimeConfig,
    SamplingConfig,
    Wire,
)
from offload_rt.costs.sizes import RECORDED_ROWS, held_rows
from offload_rt.engine import Engine, Run
from offload_rt.errors import CheckpointError, ConfigError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.outline import open_or_outline
from offload_rt.runner import static
from offload_rt.speculative.hidden import NewestRows
from offload_rt.speculative.mtp import module
from offload_rt.speculative.mtp.checkpoint import find_module, open_module

CHAIN = DraftConfig(draft="mtp", draft_tokens=4)
TREE = DraftConfig(draft="mtp", draft_tokens=12)
PLACES = {"resident": {}, "streamed": {"resident_layers": 0, "slots": 1}}
HYBRID = {"qwen3_5_text", "qwen3_next", "qwen3_5_moe_text"}
STATES = {"layer_types": ["linear_attention", "full_attention"]}


@pytest.fixture(scope="module")
def make_mtp(tmp_path_factory):
    made = {}

    def make(model_type="qwen3", **options):
        options = (STATES if model_type in HYBRID else {}) | options
        key = json.dumps([model_type, sorted(map(str, options.items()))])
        if key not in made:
            made[key] = write_mtp(tmp_path_factory.mktemp(model_type), model_type, **options)
        return made[key]

    return make


def answer(engine, tokens=20, prompt=PROMPT, sampling=None):
    run = Run.start(
        engine, [prompt], sampling or SamplingConfig(), GenerationConfig(max_tokens=tokens)
    )
    run.prefill()
    while run.active:
        run.step()
    return run


def catch_up(drafter, ids):
    """[1, V] logits of the module after the last of these tokens."""
    unread = drafter._unread(ids)
    logits = drafter.feed(unread)
    drafter._read(unread, ids)
    return logits


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, make_mtp):
    return make_mtp(request.param)


# --- what it computes ----------------------------------------------------------------------------


def text_of(model):
    """The network of text alone of a model that may have others beside it."""
    return getattr(model.model, "language_model", model.model)


@lru_cache(1)
def formula(folder):
    """Of len(ids) ids [len(ids) - 1, V] logits of the module: of row i, what follows i + 1."""
    model, target = reference_model(folder), text_of(reference_model(folder))
    config, inner = model.config.get_text_config(), text_of(model)
    tensors, behind = load_file(folder / "model.safetensors"), config.model_type in BEHIND

    def of(name):
        return tensors[stored_name(f"module.{name}", config.num_hidden_layers, behind)]

    def norm(rows, weight):
        made = type(inner.norm)(len(weight), eps=config.rms_norm_eps)
        made.load_state_dict({"weight": weight})
        return made(rows)

    layer = inner.layers[-1]
    prefix = stored_name("module.layer.", config.num_hidden_layers, behind)
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    names = set(layer.state_dict()) & set(own)
    layer.load_state_dict({n: own[n] for n in names}, strict=False)
    if "mlp.experts.0.up_proj.weight" in own:  # transformers has those of a layer as one parameter
        experts = layer.mlp.experts
        for e in range(len(experts.down_proj)):
            parts = {p: own[f"mlp.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")}
            experts.gate_up_proj.data[e] = torch.cat([parts["gate"], parts["up"]])
            experts.down_proj.data[e] = parts["down"]

    @torch.no_grad()
    def logits(ids):
        row = torch.tensor([ids])
        seen = target(row).last_hidden_state[:, :-1]
        parts = [norm(inner.embed_tokens(row[:, 1:]), of("enorm.weight"))]
        parts.append(norm(seen, of("hnorm.weight")))
        fed = torch.cat(parts, -1) @ of("eh_proj.weight").T
        places = torch.arange(len(ids) - 1)[None]
        mask = torch.full((len(ids) - 1,) * 2, float("-inf")).triu(1)[None, None]
        turned = inner.rotary_emb(fed, places)
        out = layer(fed, attention_mask=mask, position_ids=places, position_embeddings=turned)
        return model.lm_head(norm(out, of("shared_head.norm.weight")))[0]

    return logits


def test_its_logits_are_those_of_the_formula(family):
    has_logits_of_the_formula(family, "streamed")


def test_its_logits_are_those_of_the_formula_where_all_is_resident(make_mtp):
    has_logits_of_the_formula(make_mtp("qwen3"), "resident")


def has_logits_of_the_formula(family, place):
    with engine_for(family, draft=CHAIN, **PLACES[place]) as engine:
        drafter = engine.drafter(0, SamplingConfig(), torch.Generator())
        engine.forward([(0, PROMPT)], reuse=True)
        for token in (5, 9, 200):  # the last one's row only, and of a prompt all of them
            ids = [*PROMPT, token]
            expected = formula(family)(ids)
            logits = catch_up(drafter, ids)
            assert torch.allclose(logits[0], expected[-1], atol=1e-3)
            assert drafter._cache.length == len(ids) - 1


# --- what it is right about ----------------------------------------------------------------------

RIGHT = {
    "token": ("qwen3", of_the_token, {}),
    "token-behind": ("glm4_moe", of_the_token, {"first_k_dense_replace": 4}),
    "hidden": ("llama", of_the_hidden_state, {"vocab_size": 64, "tie_word_embeddings": False}),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("draft", [CHAIN, replace(CHAIN, shape=DraftShape.TREE)])
def test_a_module_that_is_right_is_accepted_at_every_depth(make_mtp, name, draft):
    model_type, change, config = RIGHT[name]
    folder = make_mtp(model_type, change=change, **config)
    prompt = [token % 64 for token in PROMPT]
    with engine_for(folder, prompts=[prompt], tokens=21, draft=draft) as engine:
        speculation = answer(engine, 21, prompt).report().speculation
    if draft.as_tree and change is of_the_token:  # which is seldom sure, so trees are broad
        assert speculation.acceptance_per_depth[0] == 1.0
    else:
        assert speculation.passes == 1 + 4  # the prompt's, then 5 tokens each
        assert speculation.acceptance_per_depth == [1.0] * 4


# --- what it changes: nothing --------------------------------------------------------------------


THREE, WRITTEN = [PROMPT, PROMPT[:4], PROMPT[::-1] * 2], 8


@pytest.fixture(scope="module")
def plain(family):
    """Answers without drafts of a model all of which is on the device."""
    with engine_for(family, prompts=THREE, tokens=WRITTEN) as engine:
        return generate(engine, THREE, tokens=WRITTEN)


@pytest.mark.parametrize(("draft", "place"), [(CHAIN, "resident"), (TREE, "streamed")])
def test_greedy_with_the_module_equals_greedy_without(family, plain, draft, place):
    """Each way of drafting in one place; the others of both: `test_exact_texts.py`."""
    prompts = THREE if place == "resident" else THREE[1:]  # for time
    options = PLACES[place] | {"prompts": prompts, "tokens": WRITTEN}
    with engine_for(family, draft=draft, **options) as engine:
        for tokens in (1, WRITTEN):
            found = generate(engine, prompts, tokens=tokens)
            assert found == [answer[:tokens] for answer in plain[-len(prompts) :]]
        assert engine.tally.seen().hits[0] > 0


def test_a_rounded_target_has_its_module_as_stored(make_mtp):
    folder = make_mtp("qwen3")
    with engine_for(folder, tokens=12, wire=Wire.INT8) as engine:
        plain = generate(engine, tokens=12)
    with engine_for(folder, tokens=12, draft=CHAIN, wire=Wire.INT8) as engine:
        assert generate(engine, tokens=12) == plain
        assert not engine.module.module.network.dequantises and engine.network.dequantises


@pytest.mark.parametrize("name", ["chain", "tree"])
def test_sampling_keeps_the_targets_distribution(make_mtp, name):
    from test_speculation import likelihood_of_three_tokens

    draft = {"chain": CHAIN, "tree": TREE}[name]
    assert likelihood_of_three_tokens(make_mtp("qwen3"), PROMPT, draft) > 1e-4


@pytest.mark.parametrize("draft", ["mtp", "self", "model:x"])
def test_a_sampled_answer_rests_on_a_chain_that_is_drawn_and_on_no_tree(draft):
    rests = [DraftConfig(draft=draft, shape=shape).answers_rest_on_it for shape in DraftShape]
    assert dict(zip(DraftShape, rests, strict=True)) == {
        DraftShape.AUTO: True,
        DraftShape.CHAIN: True,
        DraftShape.TREE: False,
    }


# --- what it keeps -------------------------------------------------------------------------------


@pytest.mark.parametrize("draft", [CHAIN, TREE], ids=["chain", "tree"])
def test_its_rows_after_an_answer_are_those_of_a_fresh_one(make_mtp, draft):
    """Accepted tokens are fed again with the target's hidden states, one by one or at once."""
    folder = make_mtp("qwen3", change=nearly_of_the_token, num_hidden_layers=4)
    with engine_for(folder, tokens=24, draft=draft) as engine:
        run = answer(engine, 24)
        counts = run.report().speculation
        assert 5 < counts.accepted < counts.drafted
        ids, drafter = run.sequences[0].ids, engine._drafters[0]
        ids = ids[: len(engine._cached_ids[0]) + 1]
        catch_up(drafter, ids)
        rows = len(ids) - 1
        kept = [layer[:, :rows].clone() for layer in drafter._cache.memory.keys]
        assert drafter._cache.length == rows
        engine.forget()
        engine.forward([(0, ids[:-1])], reuse=True)
        catch_up(drafter, ids)
        for ours, fresh in zip(kept, drafter._cache.memory.keys, strict=True):
            assert torch.allclose(ours, fresh[:, :rows], atol=1e-4)


def test_a_prompt_that_goes_on_from_another_is_drafted_for_as_if_it_were_the_first(make_mtp):
    folder = make_mtp("qwen3")
    other = [*PROMPT[:9], 8, 8, 8]
    with engine_for(folder, tokens=30, draft=CHAIN) as engine:
        first = answer(engine, 10)
        for prompt in (other, [*PROMPT, *first.sequences[0].emitted, 5], PROMPT):
            drafter = engine.drafter(0, SamplingConfig(), torch.Generator())
            engine.forward([(0, prompt)], reuse=True)
            logits = catch_up(drafter, [*prompt, 7]).clone()
            assert drafter._first == 0 and drafter._cache.length == len(prompt)
            engine.forget()
            engine.forward([(0, prompt)], reuse=True)
            assert torch.allclose(catch_up(drafter, [*prompt, 7]), logits, atol=1e-4)


def test_newest_rows_are_found_by_their_places():
    rows = NewestRows()
    states = torch.arange(40.0)[:, None]
    rows.add(states[:5], 5)
    rows.add(states[5:6], 6)
    assert torch.equal(rows.between(3, 6), states[3:6])
    rows.truncate(4)
    rows.add(states[4:8], 8)
    assert (rows.first, rows.end) == (0, 8) and torch.equal(rows.between(0, 8), states[:8])
    rows.add(states[8:11], 11)
    rows.forget_before(4)
    assert rows.first == 4 and torch.equal(rows.between(4, 11), states[4:11])
    rows.forget_before(9)
    assert rows.first == 9 and torch.equal(rows.between(9, 11), states[9:11])
    rows.add(states[20:21], 21)  # what lies between was never seen
    assert (rows.first, rows.end) == (20, 21)
    rows.add(states[21:24], 24, text=True)
    rows.add(states[24:30], 30)
    rows.forget_before(29)
    assert rows.has(23) and rows.has(29) and not rows.has(25)
    rows.truncate(24)  # the end of the text that was given
    assert (rows.first, rows.end) == (23, 24) and torch.equal(rows.between(23, 24), states[23:24])
    rows.truncate(15)
    rows.add(states[15:16], 16)
    assert rows.first == 15 and torch.equal(rows.between(15, 16), states[15:16])


# --- what it takes -------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [DraftWeights.SAME, DraftWeights.INT8])
def test_its_bytes_are_the_planned_ones(make_mtp, weights):
    big = {"hidden_size": 256, "intermediate_size": 512, "dtype": "bfloat16"}
    folder = make_mtp("qwen3", **big)
    draft = DraftConfig(draft="mtp", draft_tokens=12, draft_weights=weights)
    with engine_for(folder, tokens=20, draft=draft, resident_layers=1, slots=1) as engine:
        generate(engine, tokens=20)
        ledger, one = engine.device.ledger(), find_module(engine.checkpoint)
        memory = engine.memory()
        assert memory.device_peak_bytes <= memory.device_planned_bytes
        size, rows = 256, draft.cache_rows(engine.capacities[0])
        planned = engine.placement.demand.drafter_bytes
        held = held_rows(draft.nodes, engine.capacities, len(PROMPT))
        states = 2 * (held + 1 + 2 * len(PROMPT)) * size
        kv = rows * 2 * 2 * one.config.head_dim * 2
        made = 2 * (1 + draft.scratch_rows + 2 * RECORDED_ROWS) * size
        assert ledger["hidden states of a draft"] == made
        assert planned - states - kv - made == ledger["draft model"]


def test_sizes_from_the_configuration_alone_are_those_of_the_files(family, tmp_path):
    (tmp_path / "config.json").write_text((family / "config.json").read_text())
    outlined = find_module(open_or_outline(tmp_path)[0])
    one = find_module(open_checkpoint(family))
    assert outlined.config == one.config
    sizes = [{e.name: (e.shape, e.nbytes) for e in m.tensors.values()} for m in (outlined, one)]
    assert sizes[0] == sizes[1]


def launches(gpu, folder, monkeypatch, sampling, steps):  # noqa: F811
    """Of drafts on a GPU that is not there: kernels, replays, host syncs, tokens."""
    monkeypatch.setattr(module, "_network", build_for_real(module._network))
    runtime = RuntimeConfig(
        device="cuda:0", home=HomeKind.HOST, resident_layers=1, slots=1, prefill_chunk_tokens=8
    )
    made, at = [], {"capacities": [90], "prompt_tokens": 9, "draft": CHAIN}
    with fake_gpu(gpu), Engine(open_checkpoint(folder), runtime, **at) as engine:
        run = Run.start(engine, PROMPTS[:1], sampling, GenerationConfig(max_tokens=70))
        gpu.strict = True
        run.prefill()
        propose = run.sequences[0].drafter.propose

        def watched(*arguments):
            gpu.trace.clear()
            before = gpu.downloads
            drafted = propose(*arguments)
            kinds = [entry[0] for entry in gpu.trace]
            counts = kinds.count("kernel"), kinds.count("replay"), gpu.downloads - before
            made.append((*counts, len(drafted.tree)))
            return drafted

        run.sequences[0].drafter.propose = watched
        for _ in range(steps):
            run.step()
        gpu.strict = False
        assert gpu.unpinned_copies == 0
    return made


def test_on_a_gpu_a_chain_is_launched_at_once_and_waited_for_once(gpu, make_mtp, monkeypatch):  # noqa: F811
    """What is put where the graph reads it is beside it: numbers, and hidden states."""
    first, *_, last = launches(gpu, make_mtp("qwen3"), monkeypatch, SamplingConfig(), 5)
    kernels, *counts = last
    assert counts == [1, 1, CHAIN.nodes] and kernels == 3
    assert first[1:] == (0, CHAIN.nodes, CHAIN.nodes) and first[0] > 100 * kernels


def test_on_a_gpu_each_pass_of_a_sampled_chain_is_launched_at_once(gpu, make_mtp, monkeypatch):  # noqa: F811
    monkeypatch.setattr(static, "EAGER_FIRST", 0)
    sampling = SamplingConfig(temperature=0.7, seed=1)
    kernels, replays, downloads, drafted = launches(
        gpu, make_mtp("qwen3"), monkeypatch, sampling, 3
    )[-1]
    assert replays == downloads == drafted == CHAIN.nodes
    assert kernels <= 20 * replays  # of choosing tokens, whatever the layer


# --- what is refused -----------------------------------------------------------------------------


def test_a_module_is_not_said_to_be_left_out(family, tmp_path, caplog):
    checkpoint = open_checkpoint(family)
    vision = ".visual." in caplog.text  # which is
    assert checkpoint.left_out and (vision or "left out" not in caplog.text)
    assert "mtp." not in caplog.text and "enorm" not in caplog.text
    folder = shutil.copytree(family, tmp_path / "more")
    tensors = load_file(folder / "model.safetensors") | {"mtpx.fc.weight": torch.zeros(8, 8)}
    save_file(tensors, folder / "model.safetensors")
    open_checkpoint(folder)
    assert vision or "1 tensors (256 B) are left out" in caplog.text
    assert vision or "mtpx.fc.weight" in caplog.text


def test_a_model_without_a_module_is_refused_with_a_sentence(make_tiny, offload_run):
    folder = make_tiny("llama", tokenizer=True)
    with pytest.raises(ConfigError, match="has no module for drafting"):
        open_module(open_checkpoint(folder))
    for verb in (["generate", folder, "hello"], ["plan", folder], ["simulate", folder]):
        done = offload_run(*verb, "--draft", "mtp")
        assert done.code == 2 and "has no module for drafting" in done.err
        assert "Traceback" not in done.err


def without(*words):
    def change(tensors):
        for name in [n for n in tensors if n.startswith("module.") and any(w in n for w in words)]:
            del tensors[name]

    return change


def reshaped(name, shape):
    def change(tensors):
        tensors[name] = torch.zeros(shape)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("mlp."), "lacks 3 of 15 tensors, such as mlp.down_proj.weight"),
        (without("eh_proj"), "lacks 1 of 15 tensors, such as mtp.fc.weight"),
        (reshaped("module.eh_proj.weight", (64, 64)), r"shape \[64, 64\].*make it \[64, 128\]"),
        (reshaped("module.layer.mlp.up_proj.weight", (64, 9)), r"shape \[64, 9\], layer 1 of"),
        (reshaped("module.layer.mlp.extra.weight", (4, 4)), "has 1 tensors that layer 1"),
    ],
)
def test_half_a_module_is_refused_with_a_sentence(tmp_path, change, message):
    checkpoint = open_checkpoint(write_mtp(tmp_path, "qwen3", change=change))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_module(checkpoint)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


OUTSIDE = ("eh_proj", "embed_tokens", "head", "gate")  # of the module: what stays as it is


def test_a_module_that_is_quantised_as_the_layers_drafts_as_the_plain_one(tmp_path):
    """As DeepSeek-V3 is published: FP8 in blocks, behind the last layer too."""
    (tmp_path / "source").mkdir()
    source = write_mtp(tmp_path / "source", "deepseek_v3")
    pair = quantised.write_twins(source, tmp_path, *quantised.fp8((32, 32)), kept=OUTSIDE)
    found = []
    for folder in (pair.plain, pair.folder):
        with engine_for(folder, tokens=12, draft=CHAIN, **PLACES["streamed"]) as engine:
            drafter = engine.drafter(0, SamplingConfig(), torch.Generator())
            engine.forward([(0, PROMPT)], reuse=True)
            logits = catch_up(drafter, [*PROMPT, 5])
            engine.forget()
            found.append((logits, generate(engine, tokens=12)))
            memory = engine.memory()
            assert memory.device_peak_bytes <= memory.device_planned_bytes
    stored = find_module(engine.checkpoint).stored
    assert len(set(stored.values())) == 3 * 5 + 5  # five experts with the shared one, attention
    assert torch.allclose(found[0][0], found[1][0], atol=1e-4)
    assert found[0][1] == found[1][1]


def test_a_quantised_projection_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    source = write_mtp(tmp_path / "source", "deepseek_v3")
    pair = quantised.write_twins(source, tmp_path, *quantised.fp8((32, 32)), kept=OUTSIDE[1:])
    with pytest.raises(CheckpointError, match="or those whose layer is quantised"):
        open_module(open_checkpoint(pair.folder))


def test_a_quantised_module_is_refused(tmp_path):
    folder = write_mtp(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.fc.weight"] = tensors["mtp.fc.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is quantised"):
        open_module(open_checkpoint(folder))
