"""Models whose layers keep recurrent states: the laws of all others hold for them."""

import json
import random
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache
from types import SimpleNamespace

import pytest
import torch
from engines import PROMPT, all_logits, engine_for, generate, reference_model
from hybrids import HYBRIDS, IDS, JAMBA, make_hybrid, make_short, write_whole
from tiny import DEEP
from transformers.integrations.moe import ExpertsInterface
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from offload_rt.config import (
    DraftConfig,
    GenerationConfig,
    RuntimeConfig,
    SamplingConfig,
)
from offload_rt.device.kinds import Packing
from offload_rt.engine import Engine, FinishReason, Request, Run
from offload_rt.engine.scheduler import Scheduler
from offload_rt.errors import CheckpointError, ConfigError, PlanError
from offload_rt.kv.states import LayerState, MixerStates
from offload_rt.model.checkpoint import open_checkpoint
from offload_rt.model.kept import layers_keep
from offload_rt.model.mixing import PassStates
from offload_rt.model.network import Network
from offload_rt.model.probe_states import probe_mixers
from offload_rt.runner.runner import Rows
from offload_rt.runner.tree import TokenTree
from offload_rt.speculative.base import Draft, Unlearned

LONG = [(7 * i * i + 3 * i) % 290 + 3 for i in range(53)]  # crosses three anchors
NGRAMS = DraftConfig(draft="ngram", draft_tokens=7)


@pytest.fixture(params=HYBRIDS, scope="module")
def hybrid(request, make_tiny):
    """A layer of each kind, where one can choose; several with a state: `delta`."""
    return make_short(make_tiny, request.param)


@pytest.fixture(scope="module")
def delta(make_tiny):
    return make_hybrid(make_tiny, "qwen3_5")


reference = lru_cache(1)(reference_model)


def expected_answer(folder, prompt, tokens):
    answer = reference(folder).generate(
        torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    return answer[0, len(prompt) :].tolist()


class Oracle(Unlearned):
    """Drafts trees of which it knows a path that is right for some tokens."""

    name = "oracle"

    def __init__(self, whole, seed):
        self.whole, self.dice = whole, random.Random(seed)

    def propose(self, ids, max_depth, max_nodes=None):
        tokens, parents, right = [], [], -1
        follow = self.whole[len(ids) :][: min(max_depth, self.dice.randrange(5))]
        for token in follow:
            if self.dice.random() < 0.5 and len(follow) > 1:  # beside it, something else
                tokens.append((token + 1) % 290)
                parents.append(right)
            tokens.append(token)
            parents.append(right)
            right = len(tokens) - 1
        return Draft(TokenTree(tuple(tokens), tuple(parents)))

    def observe(self, draft, verdict):
        """Nothing."""

    def forget(self):
        """Nothing."""


def answered(engine, prompts, expected, seed=0):
    """Answers with drafts of whom they were expected by, and the passes they took."""
    longest = max(map(len, expected))
    run = Run.start(engine, prompts, SamplingConfig(), GenerationConfig(max_tokens=longest))
    for sequence, prompt, answer in zip(run.sequences, prompts, expected, strict=True):
        sequence.drafter = Oracle([*prompt, *answer], seed + sequence.index)
    run.prefill()
    while run.active:
        run.step()
    return [sequence.emitted for sequence in run.sequences], run.passes


def test_logits_and_tokens_equal_transformers(hybrid):
    """Streamed, in chunks, with trees for drafts, and once more behind a prompt that is there."""
    prompt = PROMPT + PROMPT[:11]
    answer = expected_answer(hybrid, prompt, 8)  # behind a prompt of 28: across an anchor
    room = {"prompts": [prompt], "tokens": 8}
    with engine_for(hybrid, draft=NGRAMS, resident_layers=0, slots=1, **room) as engine:
        assert len(engine.placement.streamed) == engine.checkpoint.config.num_layers
        ours = all_logits(engine, steps=3)
        with torch.no_grad():
            theirs = reference(hybrid)(torch.tensor([PROMPT + PROMPT[:3]])).logits[0]
        difference = (ours - theirs[len(PROMPT) - 1 :]).abs().max()
        assert difference <= 1e-3 * theirs.abs().max()  # its own two forms differ by 1e-4
        found, passes = answered(engine, [prompt], [answer])
        assert found == [answer]
        assert passes < 8
        turn = prompt + answer[:4]
        assert answered(engine, [turn], [answer[4:]])[0] == [answer[4:]]


def test_planned_bytes_are_the_networks(hybrid):
    checkpoint = open_checkpoint(hybrid)
    network = Network(checkpoint, "float32", Packing.FILE)
    kept = layers_keep(checkpoint.config)
    assert [each.kv_numbers for each in kept] == [s.numbers_per_token for s in network.kv_shapes]
    states = {mixer.layer: mixer.state_bytes for mixer in network.mixers}
    assert [each.state_bytes(4) for each in kept] == [states.get(i, 0) for i in range(len(kept))]


def test_streamed_equals_resident_and_chunks_change_nothing(delta):
    found = []
    for config in (
        {"resident_layers": 4, "prefill_chunk_tokens": 512},
        {"resident_layers": 0, "slots": 1, "prefill_chunk_tokens": 512},
        {"resident_layers": 2, "slots": 2, "prefill_chunk_tokens": 512},
    ):
        with engine_for(delta, prompts=[LONG], **config) as engine:
            found.append(all_logits(engine, LONG))
    assert all(torch.equal(found[0], other) for other in found[1:])
    with engine_for(delta, prompts=[LONG], prefill_chunk_tokens=7) as engine:
        cut = all_logits(engine, LONG)
    assert (cut - found[0]).abs().max() <= 1e-5 * found[0].abs().max()


def test_several_sequences_in_one_pass_equal_each_alone(delta):
    prompts = [LONG, PROMPT[3:5], PROMPT]
    expected = [expected_answer(delta, prompt, 12) for prompt in prompts]
    with engine_for(delta, prompts=prompts, draft=NGRAMS, slots=1, resident_layers=0) as engine:
        assert generate(engine, prompts, tokens=12) == expected
        for seed in range(3):
            engine.forget()
            found, passes = answered(engine, prompts, expected, seed)
            assert found == expected
            assert passes < 12


def test_sequences_that_join_and_leave_between_passes_equal_each_alone(delta):
    """Of one memory for rows; prompts that begin alike do not share a state."""
    asked = [LONG, LONG[:30], [*LONG[:40], 9], PROMPT, LONG[20:]]
    expected = [expected_answer(delta, prompt, 5) for prompt in asked]
    checkpoint, config = open_checkpoint(delta), RuntimeConfig(device="cpu", prefill_chunk_tokens=7)
    room = {"capacities": [72] * 2, "kv_tokens": 140, "prompt_tokens": 24, "draft": NGRAMS}
    with Engine(checkpoint, config, **room) as engine:
        scheduler = Scheduler(engine)
        requests = [Request(ids=ids, sampling=SamplingConfig(), max_tokens=5) for ids in asked]
        joined = [scheduler.join(request) for request in [*requests, *requests[::-1]]]
        for sweep in range(200):
            if sweep == 3:
                scheduler.leave(joined[1])
            if not scheduler.busy:
                break
            scheduler.sweep()
    assert joined[1].finish_reason is FinishReason.ABORT
    found = [sequence.emitted for sequence in joined]
    assert found[1] == expected[1][: len(found[1])]
    assert found[:1] + found[2:] == [expected[0], *expected[2:], *expected[::-1]]


def test_a_prompt_that_goes_on_is_continued_from_the_end_of_the_last(delta):
    turn = [*LONG, 5, 6]
    with engine_for(delta, prompts=[[*turn, *LONG]], tokens=40) as engine:
        fresh = generate(engine, [turn], tokens=20)
        engine.forget()
        generate(engine, [LONG], tokens=20)
        assert engine.cached_tokens(0, turn) == len(LONG)
        assert generate(engine, [turn], tokens=20) == fresh
        assert engine.cached_tokens(0, LONG[:20]) == 0  # further back there is no state
        assert generate(engine, [LONG[:20]], tokens=9) == [expected_answer(delta, LONG[:20], 9)]


def test_kv_of_the_layers_that_attend_may_be_elsewhere(delta):
    with engine_for(delta, prompts=[LONG], kv="disk", draft=NGRAMS) as engine:
        assert engine.placement.demand.kv is not None
        assert generate(engine, [LONG]) == [expected_answer(delta, LONG, 16)]


def test_another_model_drafts(delta, make_tiny):
    draft = DraftConfig(draft=f"model:{make_tiny('llama', **IDS)}", draft_tokens=4)
    with engine_for(delta, draft=draft, tokens=20) as engine:
        assert generate(engine, tokens=20) == [expected_answer(delta, PROMPT, 20)]


def test_the_text_part_of_a_model_with_vision_runs(tmp_path, caplog):
    model = write_whole(tmp_path)
    with torch.no_grad():
        answer = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=12, do_sample=False, eos_token_id=None
        )
    with engine_for(tmp_path, resident_layers=1, slots=2, draft=NGRAMS) as engine:
        assert generate(engine, tokens=12) == [answer[0, len(PROMPT) :].tolist()]
        left_out = {extent.name.split(".")[-2] for extent in engine.checkpoint.left_out}
    assert {"fc", "up_proj", "qkv"} <= left_out
    assert caplog.text.count("tensors") == caplog.text.count("are left out") == 1


def test_a_state_of_another_sequence_is_found(delta):
    prompts = [LONG, [*LONG[9:], *LONG[:9]]]  # their anchors are the same
    with engine_for(delta, prompts=prompts) as engine:
        expected = generate(engine, prompts)
        engine.forget()
        run = Run.start(engine, prompts, SamplingConfig(), GenerationConfig(max_tokens=16))
        run.prefill()
        one, other = engine._caches
        one.states, other.states = other.states, one.states
        while run.active:
            run.step()
    assert [sequence.emitted for sequence in run.sequences] != expected


def test_a_convolution_that_lacks_a_row_is_found(delta, monkeypatch):
    whole = PassStates.update_conv_state

    def short(self, *args, **options):
        full = whole(self, *args, **options)
        for kept in self._conv.values():
            kept[..., 1] = 0  # the oldest that the next row needs
        return full

    monkeypatch.setattr(PassStates, "update_conv_state", short)
    with engine_for(delta, prompts=[LONG]) as engine, torch.no_grad():
        ours = all_logits(engine, LONG, steps=0)
        theirs = reference(delta)(torch.tensor([LONG])).logits[0, -1:]
    assert (ours - theirs).abs().max() > 1e-3 * theirs.abs().max()


@pytest.mark.parametrize(
    ("model_type", "config", "reason"),
    [
        ("jamba", JAMBA, "ignores the state before them, that of its recurr"),
        ("minimax", {}, "ask their cache for get_linear_cache, which is not known here"),
    ],
)
def test_families_that_cannot_be_rolled_back_are_refused(make_tiny, model_type, config, reason):
    folder = make_tiny(model_type, **(IDS | DEEP | {"num_local_experts": 4} | config))
    with pytest.raises(CheckpointError, match=reason) as caught:
        Network(open_checkpoint(folder), "auto", Packing.FILE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["__init__", "forward"])
def test_a_family_that_needs_what_is_not_there_is_refused_in_words(name, make_tiny, monkeypatch):
    def needing(*_, **__):
        nothing = None
        return nothing[0]

    # Of other sizes than any test's, or it is known by now that the family fits.
    folder = make_tiny("llama", **IDS, intermediate_size=208, rms_norm_eps=3e-6)
    monkeypatch.setattr(LlamaRMSNorm, name, needing)
    reason = "needing in test_hybrids.py needs something that is not there"
    with pytest.raises(CheckpointError, match=reason):
        Network(open_checkpoint(folder), "auto", Packing.FILE)


class Mixing(torch.nn.Module):
    """Adds a state to its rows."""

    def forward(self, hidden_states, cache, mask=None, several=False):
        rows = hidden_states[0] if isinstance(hidden_states, list) else hidden_states
        rows = rows + cache.get_recurrent_state(0).sum()
        return (rows, rows) if several else rows


class MixingModel(torch.nn.Module):
    """One such module, called with more than it should be."""

    def __init__(self, asks, options):
        super().__init__()
        self.mixer, self.asks, self.options = Mixing(), asks, options

    def forward(self, hidden, cache):
        if self.asks:
            cache.get_conv_state(0)
        return self.mixer(**({"hidden_states": hidden, "cache": cache} | self.options))


ROWS = torch.zeros(1, 2, 4, device="meta")


@pytest.mark.parametrize(
    ("asks", "options", "reason"),
    [
        (False, {}, None),
        (True, {}, "2 modules of layer 0 ask for its state"),
        (False, {"several": True}, "their layers with a state return more than rows"),
        (False, {"mask": ROWS}, "their layers with a state are given mask"),
        (False, {"hidden_states": [ROWS]}, "their layers with a state are given no hidden states"),
    ],
)
def test_modules_that_mix_in_another_way_are_refused(asks, options, reason):
    made = {0: LayerState({}, {0: torch.zeros(1, 4, device="meta")})}
    model = MixingModel(asks, options)
    expected = nullcontext() if reason is None else pytest.raises(CheckpointError, match=reason)
    with expected:
        (mixer,) = probe_mixers(model, None, made, lambda states: model(ROWS, states))
        assert (mixer.path, mixer.keyword, mixer.state_bytes) == ("mixer", "cache", 16)


def test_what_states_cannot_do_is_refused_by_name(delta, make_tiny):
    llama = make_tiny("llama", **IDS)
    with pytest.raises(ConfigError, match="such models do not draft yet"):
        engine_for(llama, draft=DraftConfig(draft=f"model:{delta}", draft_tokens=2)).__enter__()
    for name in ("triforce", "self"):
        advice = f"--draft {name} drafts over the model's own keys.* or mtp where the files have"
        with pytest.raises(PlanError, match=advice):
            engine_for(delta, draft=DraftConfig(draft=name, draft_tokens=2)).__enter__()


def test_a_state_that_the_plan_has_not_counted_is_refused(delta, monkeypatch):
    monkeypatch.setattr("offload_rt.engine.engine.layers_keep", lambda config: ())
    with pytest.raises(CheckpointError, match="keep states of 18432 bytes where the sizes"):
        engine_for(delta).__enter__()


def test_a_state_that_does_not_fit_is_refused_with_its_size(delta):
    with pytest.raises(PlanError, match="recurrent states 73.5 KiB"):
        engine_for(delta, device_limit_bytes=2**20, resident_layers=0).__enter__()


def test_kernels_that_are_installed_are_not_used(delta, monkeypatch, caplog):
    """As where fla is there: transformers would have chosen it when the family was imported."""
    import transformers.models.qwen3_5.modeling_qwen3_5 as family
    from transformers.integrations import use_kernel_func_from_hub_with_fallback

    def kernel(*_, **__):
        raise AssertionError("it was used")

    kernel.__module__ = "fla_there.ops"
    there = SimpleNamespace(chunk_gated_delta_rule=kernel)
    monkeypatch.setitem(sys.modules, "fla_there", there)
    chooses = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla_there")
    own = family.torch_chunk_gated_delta_rule
    monkeypatch.setattr(family, "torch_chunk_gated_delta_rule", chooses(own))
    with pytest.raises(AssertionError, match="it was used"):
        expected_answer(delta, PROMPT, 2)
    with engine_for(delta, tokens=20) as engine:
        assert generate(engine, tokens=20) == [expected_answer(delta, PROMPT, 20)]
    assert "kernels of fla_there are not used" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("linear_num_value_heads", 0), ("layer_types", "x")])
def test_sizes_that_are_none_are_refused(delta, tmp_path, name, value):
    raw = json.loads((delta / "config.json").read_text()) | {name: value}
    shutil.copytree(delta, tmp_path / "bad")
    (tmp_path / "bad" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError) as caught:
        Network(open_checkpoint(tmp_path / "bad"), "auto", Packing.FILE)
        layers_keep(open_checkpoint(tmp_path / "bad").config)
    assert "\n" not in str(caught.value)


# The rest of a network made independent of how many rows a pass has, so that a state that differs
# by a bit shows: attention over as many keys, passes of whole tiles, experts one after the other.
TILE, KEYS = 64, 256
TEXT = [(11 * i * i + 5 * i) % 290 + 3 for i in range(2 * TILE)]


def exact_attention(query, keys, values, spec, tree):
    """Written out: query [H, S, D] over keys [K, T, D], padded to KEYS."""
    assert tree is None
    (heads, rows, _), (kv_heads, count, _) = query.shape, keys.shape
    k, v = (torch.nn.functional.pad(t.float(), (0, 0, 0, KEYS - count)) for t in (keys, values))
    q = query.reshape(kv_heads, heads // kv_heads * rows, -1).float()
    own = (count - rows + torch.arange(rows)).repeat(heads // kv_heads)[:, None]
    at = torch.arange(KEYS)[None]
    hidden = at > own if spec.window is None else (at > own) | (at <= own - spec.window)
    scores = (q @ k.transpose(1, 2) * spec.scaling).masked_fill(hidden, float("-inf"))
    out = scores.softmax(-1) @ v
    return out.reshape(heads, rows, -1).transpose(0, 1).to(query.dtype)


def exact_experts(self, hidden, chosen, weights):
    """Of each token the sum in the order of its own list; as many rows for each expert."""
    given = hidden.new_zeros(*chosen.shape, hidden.shape[1])
    for expert in range(self.num_experts):
        fused = getattr(self, "gate_up_proj", None)
        up = torch.nn.functional.linear(hidden, (self.up_proj if fused is None else fused)[expert])
        if fused is None:
            up = self.act_fn(up)
        else:
            gate, up = up.chunk(2, dim=-1)
            up = self.act_fn(gate.contiguous()) * up
        made = torch.nn.functional.linear(up, self.down_proj[expert])
        given = torch.where((chosen == expert)[..., None], made[:, None], given)
    total = torch.zeros_like(hidden)
    for place in range(chosen.shape[1]):
        total += given[:, place] * weights[:, place, None].to(hidden.dtype)
    return total


class Exact:
    """An engine whose passes are of whole tiles."""

    def __init__(self, engine):
        model = engine.network._model
        if model.config.get_text_config()._experts_implementation is not None:
            ExpertsInterface.register("exact_experts", exact_experts)
            model.set_experts_implementation("exact_experts")
        self.cache, self.runner = engine._caches[0], engine.runner

    def prompt(self, tokens):
        """Logits of all rows, which stay."""
        rows = self.runner.logits([Rows.text(self.cache, tokens, range(len(tokens)))])
        self.cache.commit(range(len(tokens)))
        return rows

    def check(self, tokens, keep):
        """Logits of tokens of which some stay; behind them are others that do not."""
        padded = [*tokens, *([1] * (-len(tokens) % TILE))]
        length = self.cache.length
        part = Rows(
            cache=self.cache,
            tokens=padded,
            places=range(length, length + len(padded)),
            wanted=range(len(tokens)),
        )
        rows = self.runner.logits([part])
        self.cache.commit(range(keep))
        return rows[:keep]


# Tokens of 8 that are accepted: none, up to an anchor, one more, all.
ACCEPTED = (0, 3, 4, 8)


def rollbacks(folder, monkeypatch, dtype, numbers=ACCEPTED):
    """For each number of accepted tokens of 8 whether all behind has the same bits."""
    monkeypatch.setattr("offload_rt.kv.resident.attend_rows", exact_attention)
    same = []
    room = {"prompts": [TEXT], "tokens": TILE, "dtype": dtype, "prefill_chunk_tokens": 512}
    with engine_for(folder, **room) as engine:
        made = Exact(engine)
        whole = made.prompt(TEXT)
        made.cache.truncate(0)
        made.prompt(TEXT[:TILE])
        for accepted in numbers:
            made.cache.truncate(TILE)
            assert made.cache.length == TILE
            first = TILE + 12  # what is drafted crosses an anchor
            rows = [made.check(TEXT[TILE:first], 12)]
            stand = TEXT[first : first + 1 + accepted]
            wrong = [(t + 1) % 290 for t in TEXT[first + 1 + accepted : first + 9]]
            rows.append(made.check(stand + wrong, len(stand)))
            rows.append(made.check(TEXT[first + len(stand) :], len(TEXT) - first - len(stand)))
            same.append(torch.equal(torch.cat(rows), whole[TILE:]))
    return same


@pytest.mark.parametrize("name", HYBRIDS)
def test_after_any_number_of_accepted_tokens_all_is_as_in_one_prompt(name, make_tiny, monkeypatch):
    numbers = range(9) if name == "qwen3_5" else ACCEPTED
    same = rollbacks(make_short(make_tiny, name), monkeypatch, "float32", numbers)
    assert same == [True] * len(numbers)


def test_a_model_whose_layers_all_keep_a_state_can_be_planned(make_tiny, offload_run):
    """No layer keeps keys and values, which then have no home."""
    folder = make_hybrid(make_tiny, "kimi_linear", layer_types=["linear_attention"] * 4)
    asked = ("plan", folder, "--context", 64, "--draft", "none")
    done = offload_run(*asked, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["kv_bytes"] == 0
    refused = offload_run(*asked, "--kv", "disk")
    assert refused.code == 2 and "--kv disk has no effect, as no layer" in refused.err


@pytest.mark.parametrize("name", HYBRIDS)
def test_in_bf16_too(name, make_tiny, monkeypatch):
    """Before an anchor and behind it: where it is, is no matter of the format."""
    same = rollbacks(make_short(make_tiny, name), monkeypatch, "bfloat16", (0, 4))
    assert same == [True] * 2


def test_rejected_rows_that_move_the_anchor_are_found(delta, monkeypatch):
    monkeypatch.setattr(MixerStates, "_standing", lambda self, kept, rows: rows)
    monkeypatch.setattr(MixerStates, "commit", _whatever_stands)
    assert not all(rollbacks(delta, monkeypatch, "float32"))


def _whatever_stands(self, keep):
    for kept in self._kept.values():
        kept.cut(self.length + len(keep))
    self.length += len(keep)
    if self.length == TILE:
        self._prompt = {layer: replace(kept) for layer, kept in self._kept.items()}
        self.prompt_length = TILE
