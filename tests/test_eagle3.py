"""An EAGLE-3 head drafts: what it computes, what it keeps, and what is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eagle3_models import TAPS, counts_on, write_counting, write_head
from engines import PROMPT, ROOMY, engine_for, generate, reference_model
from mtp_models import IDS
from safetensors.torch import load_file
from test_mtp import answer, catch_up
from test_recorded_costs import placed
from test_speculation import likelihood_of_three_tokens
from tiny import DEEP
from tool_runs import TOOLS

from offload_rt.config import (
    DraftConfig,
    DraftShape,
    DraftWeights,
    Exact,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.costs.drafters import Drafting, Expected
from offload_rt.costs.sizes import RECORDED_ROWS, held_rows
from offload_rt.device.kinds import CPU
from offload_rt.engine import Engine
from offload_rt.engine.scheduler import Scheduler
from offload_rt.engine.sequence import Request
from offload_rt.errors import CheckpointError, PlanError
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.planning.fit import FreeMemory, RunLoad, place_run
from offload_rt.speculative.eagle3.checkpoint import CONVERT, PICKLED, layers_read, open_head
from offload_rt.speculative.kinds import kind_of

SOME = [t for t in range(300) if t % 3]  # of the vocabulary
HEADS = {
    "some tokens": {"tokens": SOME},
    "all tokens": {"norm_before_residual": True},
    "the target's head": {"own_head": False, "draft_vocab_size": None, "rope_theta": 500.0},
}


@pytest.fixture(scope="module")
def target(make_tiny):
    return make_tiny("llama", **DEEP, **IDS)


@pytest.fixture(scope="module")
def make_head(tmp_path_factory, target):
    made = {}

    def make(name):
        if name not in made:
            made[name] = write_head(tmp_path_factory.mktemp("head"), target, **HEADS[name])
        return made[name]

    return make


def chain(folder, tokens=4):
    return DraftConfig(draft=f"eagle3:{folder}", draft_tokens=tokens)


# --- what it computes ----------------------------------------------------------------------------


class Formula:
    """The head written plainly: rows of a hidden state and a token to logits and what it made."""

    def __init__(self, target, folder):
        self.model, self.raw = (
            reference_model(target),
            json.loads((folder / "config.json").read_text()),
        )
        self.of = load_file(folder / "model.safetensors")

    def norm(self, rows, name):
        return (
            rows * (rows.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt() * self.of[f"{name}.weight"]
        )

    def turned(self, rows):
        """[n, heads, D] by their places."""
        half = rows.shape[-1] // 2
        rates = self.raw.get("rope_theta", 10000.0) ** (-torch.arange(half) / half)
        angle = torch.arange(len(rows))[:, None, None] * rates
        one, other = rows[..., :half], rows[..., half:]
        turned = (one * angle.cos() - other * angle.sin(), other * angle.cos() + one * angle.sin())
        return torch.cat(turned, -1)

    def states(self, ids):
        """[n, E] hidden states of tokens, mixed."""
        with torch.no_grad():
            found = self.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            return torch.cat([found[layer + 1][0] for layer in TAPS], -1) @ self.of["fc.weight"].T

    @torch.no_grad()
    def __call__(self, hidden, tokens):
        heads, keys = self.raw["num_attention_heads"], self.raw["num_key_value_heads"]
        count, dim = len(tokens), hidden.shape[1] // heads
        embedded = self.model.model.embed_tokens(torch.tensor(tokens))
        normed = self.norm(hidden, "midlayer.hidden_norm")
        fed = torch.cat([self.norm(embedded, "midlayer.input_layernorm"), normed], -1)
        residual = normed if self.raw.get("norm_before_residual") else hidden

        def project(name, of):
            return (fed @ self.of[f"midlayer.self_attn.{name}_proj.weight"].T).view(count, of, dim)

        query, key, value = (
            self.turned(project("q", heads)),
            self.turned(project("k", keys)),
            project("v", keys),
        )
        key, value = (part.repeat_interleave(heads // keys, dim=1) for part in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) * dim**-0.5
        scores = scores + torch.full((count, count), float("-inf")).triu(1)
        attended = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).reshape(count, -1)
        made = residual + attended @ self.of["midlayer.self_attn.o_proj.weight"].T
        inner = self.norm(made, "midlayer.post_attention_layernorm")
        gate, up, down = (
            self.of[f"midlayer.mlp.{n}_proj.weight"].T for n in ("gate", "up", "down")
        )
        made = made + (torch.nn.functional.silu(inner @ gate) * (inner @ up)) @ down
        head = self.of.get("lm_head.weight", self.model.lm_head.weight)
        logits = self.norm(made, "norm") @ head.T
        if "d2t" in self.of:
            every = logits.new_full((count, self.raw["vocab_size"]), float("-inf"))
            every[:, torch.arange(len(head)) + self.of["d2t"]] = logits
            logits = every
        return logits, made


@pytest.mark.parametrize("name", HEADS)
def test_its_logits_are_those_of_the_formula_and_it_goes_on_from_its_own_results(
    target, make_head, name
):
    folder = make_head(name)
    formula = Formula(target, folder)
    with engine_for(target, draft=chain(folder), resident_layers=1, slots=2) as engine:
        drafter = engine.drafter(0, SamplingConfig(), torch.Generator())
        engine.forward([(0, PROMPT)], reuse=True)
        for token in (5, 200):  # the last one's row only, and of a prompt all of them
            ids = [*PROMPT, token]
            hidden, tokens = formula.states(PROMPT), ids[1:]
            assert torch.allclose(
                catch_up(drafter, ids)[0], formula(hidden, tokens)[0][-1], atol=1e-3
            )
            drafted = []
            for _ in range(4):
                logits, made = formula(hidden, tokens)
                drafted.append(int(logits[-1].argmax()))
                hidden, tokens = torch.cat([hidden, made[-1:]]), [*tokens, drafted[-1]]
            assert list(drafter.propose(ids, 4).tree.tokens) == drafted
            assert drafter._cache.length == len(ids) - 1


def test_each_node_of_a_tree_goes_on_from_what_its_parent_made(target, make_head):
    folder = make_head("all tokens")
    formula, ids = Formula(target, folder), [*PROMPT, 5]
    with engine_for(target, draft=chain(folder, 12)) as engine:
        drafter = engine.drafter(0, SamplingConfig(), torch.Generator())
        engine.forward([(0, PROMPT)], reuse=True)
        feed, tokens, found = drafter.feed, [], {}

        def watched(rows):
            logits = feed(rows)
            if rows.parents is None:  # of what the target read, not of the tree
                return logits
            for token, made in zip(rows.tokens, logits.clone(), strict=True):
                at, path = rows.parents[len(tokens)], [token]
                tokens.append(token)
                while at >= 0:
                    at, path = rows.parents[at], [tokens[at], *path]
                found[tuple(path)] = made
            return logits

        drafter.feed = watched
        drafter.propose(ids, 12)
    assert len({path[0] for path in found if len(path) == 2}) > 1  # siblings with children
    for path, logits in found.items():
        hidden = formula.states(PROMPT)
        for place in range(len(ids), len(ids) + len(path)):
            made = formula(hidden, [*ids, *path][1:place])[1]
            hidden = torch.cat([hidden, made[-1:]])
        assert torch.allclose(logits, formula(hidden, [*ids, *path][1:])[0][-1], atol=1e-3)


# --- what it is right about ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [DraftShape.CHAIN, DraftShape.TREE])
def test_a_head_that_is_right_is_accepted_at_every_depth(tmp_path, shape):
    """With rows of its output head in another order than tokens."""
    target, tokens = write_counting(tmp_path / "target"), [*range(63, -1, -1)]
    head = write_head(tmp_path / "head", target, tokens=tokens, change=counts_on(tokens))
    draft, prompt = replace(chain(head), shape=shape), [token % 64 for token in PROMPT]
    with engine_for(target, prompts=[prompt], tokens=21, draft=draft) as engine:
        speculation = answer(engine, 21, prompt).report().speculation
    assert speculation.passes == 1 + 4  # the prompt's, then 5 tokens each
    assert speculation.acceptance_per_depth == [1.0] * 4


# --- what it changes: nothing --------------------------------------------------------------------

THREE = [PROMPT, PROMPT[:4], PROMPT[::-1] * 2]
PLACES = {
    "resident": {},
    "streamed": {"resident_layers": 1, "slots": 2},
    "exact": {"resident_layers": 1, "slots": 2, "exact": Exact.ON},
    "kv": {"kv": "disk", "kv_block_tokens": 16},
}


@pytest.fixture(scope="module")
def plain(target):
    with engine_for(target, prompts=THREE, tokens=10) as engine:
        return generate(engine, THREE, tokens=10)


@pytest.mark.parametrize(
    ("place", "nodes"), [("resident", 4), ("streamed", 12), ("exact", 12), ("kv", 4)]
)
def test_greedy_with_a_head_equals_greedy_without(target, make_head, plain, nodes, place):
    """A chain or a tree in each place; both where bits are compared: `test_exact_texts.py`."""
    draft = chain(make_head("some tokens"), nodes)
    with engine_for(target, prompts=THREE, tokens=10, draft=draft, **PLACES[place]) as engine:
        for tokens in (10, 1):
            assert generate(engine, THREE, tokens=tokens) == [a[:tokens] for a in plain]
        assert engine.tally.seen().hits[0] > 0


@pytest.mark.parametrize("nodes", [4, 12], ids=["chain", "tree"])
def test_sampling_keeps_the_targets_distribution(target, make_head, nodes):
    """What its output head lacks is never drafted, and written as often as without."""
    draft = chain(make_head("some tokens"), nodes)
    assert likelihood_of_three_tokens(target, PROMPT, draft) > 1e-4


# --- what it keeps -------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", [4, 12], ids=["chain", "tree"])
def test_its_rows_after_an_answer_are_those_of_a_fresh_one(tmp_path, nodes):
    target, tokens = write_counting(tmp_path / "target"), [*range(40)]
    head = write_head(tmp_path / "head", target, tokens=tokens, change=counts_on(tokens))
    prompt = [token % 64 for token in PROMPT]
    with engine_for(target, prompts=[prompt], tokens=24, draft=chain(head, nodes)) as engine:
        run = answer(engine, 24, prompt)
        counts = run.report().speculation
        assert 5 < counts.accepted < counts.drafted  # it lacks a part of the tokens
        ids, drafter = run.sequences[0].ids, engine._drafters[0]
        ids = ids[: len(engine._cached_ids[0]) + 1]
        catch_up(drafter, ids)
        rows = len(ids) - 1
        kept = [layer[:, :rows].clone() for layer in drafter._cache.memory.keys]
        engine.forget()
        engine.forward([(0, ids[:-1])], reuse=True)
        catch_up(drafter, ids)
        for ours, fresh in zip(kept, drafter._cache.memory.keys, strict=True):
            assert torch.allclose(ours, fresh[:, :rows], atol=1e-4)


def test_its_bytes_are_the_planned_ones(make_tiny, tmp_path):
    """Rounded layers are counted as a checkpoint's own module is (tests/test_mtp.py)."""
    size, big = 256, {"hidden_size": 256, "intermediate_size": 512, "dtype": "bfloat16"}
    target = make_tiny("llama", **big, **DEEP, **IDS)
    head = write_head(tmp_path, target, tokens=SOME, torch_dtype="bfloat16")
    draft = replace(chain(head, 12), draft_weights=DraftWeights.SAME)
    with engine_for(target, tokens=20, draft=draft, resident_layers=1, slots=2) as engine:
        generate(engine, tokens=8)
        ledger, memory = engine.device.ledger(), engine.memory()
        assert memory.device_peak_bytes <= memory.device_planned_bytes
        planned = engine.placement.demand.drafter_bytes
        held = held_rows(draft.nodes, engine.capacities, len(PROMPT))
        states = 3 * (held + 1 + 2 * len(PROMPT)) * 2 * size
        made = (1 + draft.scratch_rows + RECORDED_ROWS + 3 * RECORDED_ROWS) * 2 * size
        kv = draft.cache_rows(engine.capacities[0]) * 2 * 2 * (size // 4) * 2
        assert ledger["hidden states of a draft"] == made
        assert planned - states - made - kv == ledger["draft model"]


def test_no_more_hidden_states_wait_for_drafts_than_are_planned(target, make_head):
    """Answers of one token are drafted for by nobody, so nobody reads them."""
    draft, prompt, seats = chain(make_head("some tokens")), (PROMPT * 4)[:60], 8
    runtime = RuntimeConfig(device="cpu", device_limit_bytes=ROOMY, prefill_chunk_tokens=16)
    load = {"capacities": [80] * seats, "prompt_tokens": 60, "draft": draft}
    with Engine(open_checkpoint(target), runtime, **load) as engine:
        held = held_rows(draft.nodes, engine.capacities, 60)
        assert held == 60 + seats * (4 + 3) < 60 * seats
        scheduler, most = Scheduler(engine), []
        for first in range(seats):
            scheduler.join(Request(ids=[first + 3, *prompt[1:]], max_tokens=1))
        while scheduler.busy:
            scheduler.sweep()
            most.append(engine.module.held_bytes)
        assert held * 3 * 64 * 4 <= most[-1] <= max(most) <= (held + seats) * 3 * 64 * 4
        ids, drafter = [*PROMPT, 5], engine.drafter(0, SamplingConfig(), torch.Generator())
        engine.forward([(0, PROMPT)], reuse=True)
        assert len(drafter.propose(ids, 4).tree) == 4


def test_sizes_from_the_configuration_alone_are_those_of_the_files(target, make_head, tmp_path):
    folder = make_head("some tokens")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    checkpoint = open_checkpoint(target)
    both = open_head(checkpoint, tmp_path, runs=False), open_head(checkpoint, folder)
    sizes = [{e.name: (e.shape, e.nbytes) for e in one.tensors.values()} for one in both]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"draft_vocab_size": -(10**9)}, "draft_vocab_size is -1000000000, .* from 1 to 300"),
        ({"draft_vocab_size": 0}, "draft_vocab_size is 0,"),
        ({"draft_vocab_size": 301}, "draft_vocab_size is 301,"),
        ({"draft_vocab_size": 9.5}, "draft_vocab_size is 9.5,"),
        ({"draft_vocab_size": True}, "draft_vocab_size is True,"),
        ({"draft_vocab_size": 301, "vocab_size": 400}, "head of 301 rows, the model has 300"),
    ],
)
def test_an_output_head_that_no_model_has_is_refused_by_the_configuration_alone(
    target, make_head, tmp_path, config, message
):
    raw = json.loads((make_head("some tokens") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | config))
    with pytest.raises(CheckpointError, match=message):
        open_head(open_checkpoint(target), tmp_path, runs=False)


def test_layers_are_counted_in_both_ways_that_are_about(make_tiny, tmp_path):
    target = open_checkpoint(make_tiny("llama", num_hidden_layers=8, **IDS))
    name, ways = "eagle_aux_hidden_state_layer_ids", {}
    for way, config in {
        "of the layer": {"eagle_config": {name: [1, 3, 4]}},
        "of what it goes into": {"eagle_config": None, name: [2, 4, 5]},
        "not at all": {"eagle_config": None},
    }.items():
        head = open_head(target, write_head(tmp_path / way, target.folder, **config))
        ways[way] = layers_read(head.folder, head.config, target)
    assert {*ways.values()} == {(1, 3, 4)}


@pytest.mark.parametrize("nodes", [4, 12], ids=["chain", "tree"])
def test_what_makes_its_inputs_is_priced_once_a_draft(target, make_head, nodes):
    checkpoint, folder = open_checkpoint(target), make_head("some tokens")
    draft = replace(chain(folder, nodes), draft_weights=DraftWeights.SAME)
    drafting, expected = Drafting(draft, open_head(checkpoint, folder)), Expected(made=0.5)
    part = kind_of("eagle3").parts(drafting, placed(checkpoint), expected)[0]
    assert part.times == (4 if nodes == 4 else draft.tree_passes / 2)
    numbers = len(SOME) * 64 + round(64 * 192 / part.times)  # of its head, and of `fc`
    assert part.load.head.flops_per_token == 2 * numbers
    assert part.load.head.weight_bytes == 4 * numbers


# --- what is refused -----------------------------------------------------------------------------


def without(*words):
    def change(tensors):
        for name in [n for n in tensors if any(word in n for word in words)]:
            del tensors[name]

    return change


def put(**made):
    return lambda tensors: tensors.update({n.replace("__", "."): t for n, t in made.items()})


BAD = {
    "half of it": (
        {"change": without("self_attn", "norm")},
        "lacks 8 of 13 tensors, such as midlayer",
    ),
    "a stray": (
        {"change": put(extra__weight=torch.zeros(3))},
        "1 tensors that such a head has not",
    ),
    "a shape": ({"change": put(fc__weight=torch.zeros(64, 64))}, r"has shape \[64, 64\]"),
    "two names": (
        {"change": put(model__fc__weight=torch.zeros(64, 192))},
        "a tensor under two names, 'fc.weight'",
    ),
    "two names of the layer": (
        {"change": put(layers__0__hidden_norm__weight=torch.zeros(64))},
        "a tensor under two names, 'midlayer.hidden_norm.weight'",
    ),
    "quantised": (
        {"change": put(fc__weight=torch.zeros(64, 192, dtype=torch.int8))},
        "is quantised",
    ),
    "a hidden size": ({"hidden_size": 32}, "hidden states of 32 numbers.* has 64"),
    "another target's": ({"target_hidden_size": 128}, "hidden states of 128 numbers"),
    "a vocabulary": ({"vocab_size": 9000}, "vocabulary of 9000 tokens.* has 300"),
    "out of range": (
        {"tokens": SOME, "change": put(d2t=torch.full((len(SOME),), 250))},
        "makes row 50 of its output head token 300",
    ),
    "below 0": (
        {"tokens": SOME, "change": put(d2t=torch.full((len(SOME),), -1))},
        "row 0.*token -1",
    ),
    "twice": (
        {"tokens": SOME, "change": put(d2t=-torch.arange(len(SOME)))},
        "199 rows of its output head tokens that others are",
    ),
    "a short map": (
        {"tokens": SOME, "change": put(d2t=torch.zeros(3))},
        r"d2t is F32 of shape \[3\]",
    ),
    "no map": ({"tokens": SOME, "change": without("d2t")}, "no d2t says which"),
    "no layers": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}}, "has 4"),
    "two layers": ({"num_hidden_layers": 2}, "2 layers of the family"),
    "another": ({"architectures": ["LlamaForCausalLM"]}, "is no EAGLE-3 head"),
    "speculators": ({"transformer_layer_config": {}}, "library speculators"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_head_that_is_not_this_models_is_refused_with_a_sentence(target, tmp_path, name):
    options, message = BAD[name]
    folder = write_head(tmp_path, target, **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_head(open_checkpoint(target), folder)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)


def test_a_pickle_is_refused_with_the_command_that_converts_it(
    target, make_head, tmp_path, monkeypatch, capsys
):
    folder, checkpoint = tmp_path / "pickled", open_checkpoint(target)
    folder.mkdir()
    theirs = make_head("some tokens")
    (folder / "config.json").write_bytes((theirs / "config.json").read_bytes())
    tensors = load_file(theirs / "model.safetensors")
    torch.save(tensors | {"embed_tokens.weight": torch.zeros(9, 9)}, folder / PICKLED)
    made = tmp_path / "made"
    with pytest.raises(CheckpointError, match=f"`{CONVERT} {folder} NEW_FOLDER`"):
        open_head(checkpoint, folder)
    monkeypatch.syspath_prepend(TOOLS)
    import convert_eagle3

    monkeypatch.setattr(sys, "argv", [convert_eagle3.__file__, str(folder), str(made)])
    assert convert_eagle3.main() == 0 and "KiB" in capsys.readouterr().out
    found = load_file(made / "model.safetensors")
    assert found.keys() == tensors.keys() - {"t2d"}
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    open_head(checkpoint, made)
    assert convert_eagle3.main() == 2 and "is already there" in capsys.readouterr().err


def test_over_several_machines_it_is_refused(target, make_head):
    """What leaves a layer of another machine never comes to the first one."""
    runtime = RuntimeConfig(machines=("here", "there"), device="cpu,cpu")
    checkpoint, draft = open_checkpoint(target), chain(make_head("some tokens"))
    drafting = Drafting(draft, open_head(checkpoint, Path(draft.module)))
    load = RunLoad(capacities=[60], prompt_tokens=17, drafting=drafting)
    free = FreeMemory(device_bytes=ROOMY, host_bytes=ROOMY, further_bytes=(ROOMY,))
    with pytest.raises(PlanError, match="between the model's layers, and with --nodes"):
        place_run(checkpoint, runtime, CPU, load=load, free=free)


def test_the_command_line_says_it_too(make_tiny, make_head, tmp_path, offload_run):
    target = make_tiny("llama", tokenizer=True, **DEEP, **IDS)
    write_head(tmp_path, target, tokens=SOME, hidden_size=32)
    for verb in (["generate", target, "hello"], ["plan", target], ["simulate", target]):
        done = offload_run(*verb, "--draft", f"eagle3:{tmp_path}")
        assert done.code == 4 and "hidden states of 32 numbers" in done.err
        assert "Traceback" not in done.err
