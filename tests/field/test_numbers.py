"""F-06: results that are no numbers end a run in a sentence; a drafter's end its drafting.

The law: a run whose logits hold NaN or +inf at a place of the answer, or nothing but -inf, gives no
token for it; whoever drafts, the answer up to there and the error are those of the run without.
"""

import dataclasses
import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from engines import PROMPT, engine_for, generate
from medusa_heads import write_shared
from safetensors.torch import load_file, save_file

from offload_rt.config import (
    AcceptRule,
    DraftConfig,
    DraftShape,
    GenerationConfig,
    KVPlace,
    RetrievalConfig,
    SamplingConfig,
)
from offload_rt.device.cpu import CpuDevice
from offload_rt.engine import Run
from offload_rt.errors import NumbersError, WeightsError
from offload_rt.runner.tree import TokenTree
from offload_rt.sampling import NO_TOKEN, Dice, make_generator
from offload_rt.speculative.base import Draft
from offload_rt.speculative.deciding import Checked, decide
from offload_rt.speculative.ngram.drafter import NgramDrafter
from offload_rt.speculative.ngram.followers import Likely, pack_likely
from offload_rt.training.job import _round

IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
WEIGHT = "model.layers.1.mlp.up_proj.weight"
SAMPLED = SamplingConfig(temperature=0.8, top_p=0.9, seed=3)
LITTLE = RetrievalConfig(budget_tokens=20, chunk_tokens=3, recent_share=0.4, rebuild_tokens=6)
NAMES = ["none", "ngram", "chain", "tree", "medusa", "triforce", "triforce-model"]


@pytest.fixture(scope="module")
def cpu():
    device = CpuDevice(readers=1)
    yield device
    device.close()


@pytest.fixture(scope="module")
def model(make_tiny):
    return make_tiny("llama", tokenizer=True, num_hidden_layers=3, **IDS)


@pytest.fixture(scope="module")
def edited(model, tmp_path_factory):
    """Copies of the model with other tensors."""

    def edit(change):
        folder = shutil.copytree(model, tmp_path_factory.mktemp("edited") / "model")
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return edit


@pytest.fixture(scope="module")
def broken(edited):
    """One weight of the middle layer is NaN."""
    return edited(lambda tensors: tensors[WEIGHT][3, 3:4].fill_(torch.nan))


@pytest.fixture(scope="module")
def growing(edited):
    """Numbers that fp32 holds and fp16 does not, from weights that both do."""

    def grow(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"] *= 2e4
        tensors["model.layers.1.mlp.down_proj.weight"] *= 2e4

    return edited(grow)


@pytest.fixture(scope="module")
def drafts(model, tmp_path_factory):
    heads = write_shared(tmp_path_factory.mktemp("heads"))
    small = f"model:{model}"
    return {
        "none": DraftConfig(),
        "ngram": DraftConfig(draft="ngram", draft_tokens=4),
        "chain": DraftConfig(draft=small, draft_tokens=3),
        "tree": DraftConfig(draft=small, draft_tokens=6, shape=DraftShape.TREE),
        "medusa": DraftConfig(draft=f"medusa:{heads}", draft_tokens=4),
        "triforce": DraftConfig(draft="triforce", draft_tokens=4, retrieval=LITTLE),
        "triforce-model": DraftConfig(
            draft=f"triforce:{model}", draft_tokens=4, inner_tokens=2, retrieval=LITTLE
        ),
    }


@pytest.mark.parametrize(
    ("name", "sampling"),
    [*((name, SamplingConfig()) for name in NAMES), ("none", SAMPLED), ("tree", SAMPLED)]
    + [("medusa", SAMPLED), ("triforce", SAMPLED)],
)
def test_a_weight_that_is_no_number_is_named(broken, drafts, name, sampling):
    told = pytest.raises(WeightsError, match=f"from layer 1 on: '{WEIGHT}' in model.safe")
    with engine_for(broken, draft=drafts[name]) as engine, told:
        generate(engine, sampling=sampling)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.embed_tokens.weight", "from layer 0 on"),
        ("model.layers.0.input_layernorm.weight", "from layer 0 on"),
        ("model.norm.weight", "behind the last layer"),
        ("lm_head.weight", "behind the last layer"),
    ],
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_so_is_one_of_any_place(edited, offload_run, name, where, bad):
    folder = edited(lambda tensors: tensors[name].fill_(bad))
    done = offload_run("generate", folder, "-p", "the", "--raw", "-n", 2, "--draft", "none")
    assert (done.code, done.out) == (4, "")
    assert f"are NaN or infinite {where}: '{name}' in model.safetensors holds" in done.err


@pytest.mark.parametrize("more", [[], ["--temperature", "0.8"], ["--draft", "ngram"]])
def test_overflow_of_a_format_names_another(growing, offload_run, more):
    options = ["generate", growing, "-p", "the", "--raw", "-n", 2, "--draft", "none", *more]
    assert offload_run(*options).code == 0
    done = offload_run(*options, "--dtype", "float16")
    assert (done.code, done.out) == (2, "")
    assert "from layer 1 on: they grow beyond 65,504, the largest of float16" in done.err
    assert "use --dtype float32" in done.err


def test_a_weight_too_large_for_the_format_is_told_from_a_broken_one(edited):
    folder = edited(lambda tensors: tensors[WEIGHT][0, :2].fill_(1e5))
    told = pytest.raises(NumbersError, match=f"2 of the weights of '{WEIGHT}'.*float16")
    with engine_for(folder, dtype="float16") as engine, told:
        generate(engine)


def test_the_answer_that_failed_is_named_and_the_next_starts_afresh(edited):
    """Only what comes after a token whose embedding is NaN is no number."""
    bad = 250
    folder = edited(lambda tensors: tensors["model.embed_tokens.weight"][bad].fill_(torch.nan))
    prompts = [PROMPT, [*PROMPT, bad], PROMPT[:5]]
    with engine_for(folder, prompts=prompts) as engine:
        first = generate(engine, [PROMPT])
        with pytest.raises(WeightsError, match="answer 2 of 3: .*embed_tokens"):
            generate(engine, prompts)
        assert generate(engine, [PROMPT, PROMPT])[1] == first[0]


class Proposes:
    """Drafts what it is told."""

    name, learns = "fixed", False

    def __init__(self, make):
        self.make = make

    def propose(self, ids, max_depth, max_nodes=None):
        return Draft(self.make(len(ids), max_depth))

    def observe(self, draft, verdict):
        """Nothing."""


@pytest.mark.parametrize("kv", [KVPlace.DEVICE, KVPlace.DISK])
@pytest.mark.parametrize("parents", [(-1, 0), (-1, -1)], ids=["chain", "tree"])
def test_a_draft_the_answer_does_not_come_to_changes_nothing(edited, model, caplog, kv, parents):
    """Masked rows are multiplied by zero, and zero times NaN is NaN."""
    with engine_for(model) as engine:
        plain = generate(engine)
    bad = next(token for token in range(300) if token not in plain[0] + PROMPT)
    folder = edited(lambda tensors: tensors["model.embed_tokens.weight"][bad].fill_(torch.nan))
    draft = DraftConfig(draft="ngram", draft_tokens=2)
    with engine_for(folder, draft=draft, kv=kv) as engine:
        engine.drafter = lambda *_: Proposes(lambda *_: TokenTree((bad, 7), parents))
        assert generate(engine) == plain


def test_an_answer_that_fails_with_drafts_fails_as_without(edited, model):
    with engine_for(model) as engine:
        (plain,) = generate(engine)
    bad = plain[9]
    folder = edited(lambda tensors: tensors["model.embed_tokens.weight"][bad].fill_(torch.nan))

    def rightly(length, max_depth):
        return TokenTree.chain(plain[length - len(PROMPT) :][:max_depth])

    answers = []
    for make in (lambda *_: TokenTree(), rightly):
        with engine_for(folder, draft=DraftConfig(draft="ngram", draft_tokens=6)) as engine:
            engine.drafter = lambda *_, make=make: Proposes(make)
            run = Run.start(engine, [PROMPT], SamplingConfig(), GenerationConfig(max_tokens=16))
            run.prefill()
            with pytest.raises(WeightsError, match="embed_tokens"):
                while run.active:
                    run.step()
            answers.append(run.sequences[0].emitted)
    assert answers[0] == answers[1] == plain[: plain.index(bad) + 1]


KINDS = {
    "greedy": (SamplingConfig(), AcceptRule.LOSSLESS, False),
    "chosen": (SAMPLED, AcceptRule.LOSSLESS, False),
    "drawn": (SAMPLED, AcceptRule.LOSSLESS, True),
    "typical": (SAMPLED, AcceptRule.TYPICAL, False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_only_rows_the_answer_goes_through_count(cpu, kind, bad):
    """The model is sure of 1, 2, 3, 4; drafted are 1, 2 and, beside it, 9 with 5 behind."""
    sampling, rule, drawn = KINDS[kind]
    tree, vocab = TokenTree((1, 2, 9, 5), (-1, 0, 0, 2)), 300
    logits = torch.zeros(5, vocab)
    for row, token in enumerate((1, 2, 3, 5, 6)):
        logits[row, token] = 60.0
    probs = torch.full((4, vocab), 1 / vocab) if drawn else None

    def verdict(place):
        rows = logits.clone()
        rows[place, 77] = bad
        dice = Dice(make_generator(0, "cpu"))
        one = Checked([0], Draft(tree, probs), rows, dice, sampling)
        fine = Checked([0], Draft(), logits[:1], Dice(make_generator(0, "cpu")), sampling)
        (other, found) = decide([fine, one], cpu, rule)
        assert other is not None
        return found

    for place in (3, 4):
        assert (verdict(place).path, verdict(place).token) == ((0, 1), 3)
    for place in (0, 1, 2) if rule is not AcceptRule.TYPICAL else (0,):
        assert verdict(place) is None


@pytest.fixture(scope="module")
def undrafted(model):
    """Answers of each sampling."""
    with engine_for(model, tokens=24) as engine:
        return {
            one: generate(engine, tokens=24, sampling=one) for one in (SamplingConfig(), SAMPLED)
        }


@pytest.mark.parametrize("name", ["chain", "tree", "triforce-model"])
@pytest.mark.parametrize("sampling", [SamplingConfig(), SAMPLED], ids=["greedy", "sampled"])
def test_a_broken_draft_model_ends_drafting_and_not_the_answer(
    model, broken, drafts, undrafted, caplog, name, sampling
):
    draft = drafts[name]
    draft = dataclasses.replace(draft, draft=draft.draft.replace(str(model), str(broken)))
    with engine_for(model, draft=draft, tokens=24) as engine:
        found = generate(engine, tokens=24, sampling=sampling)
    assert found == undrafted[sampling]
    told = [r.getMessage() for r in caplog.records if "are NaN or infinite" in r.getMessage()]
    assert len(told) == 1 and "goes on without it" in told[0]


def huge_heads(folder):
    """Heads of finite numbers whose products are not."""
    path = write_shared(folder) / "medusa_lm_head.safetensors"
    save_file({name: tensor * 1e38 for name, tensor in load_file(path).items()}, path)
    return folder


def test_broken_heads_end_drafting_and_not_the_answer(model, tmp_path, caplog):
    draft = DraftConfig(draft=f"medusa:{huge_heads(tmp_path)}", draft_tokens=4)
    with engine_for(model) as engine:
        plain = generate(engine)
    with engine_for(model, draft=draft) as engine:
        assert generate(engine) == plain
    assert "the medusa drafter failed (the logits of a head are NaN or inf" in caplog.text


def test_a_chat_from_a_pipe_goes_on_and_its_exit_code_tells(broken, offload_run):
    lines = b"the fox\na dog\n/context\n"
    done = offload_run("chat", broken, "--draft", "none", "-n", 2, stdin=lines)
    assert done.code == 4 and done.err.count(WEIGHT) == 2 and "0 turns" in done.err


def test_bench_and_calibration_tell_it_too(model, broken, offload_run, prompt_file, tmp_path):
    shared = ["--prompts", prompt_file]
    done = offload_run("bench", broken, *shared, "-n", 2, "--draft", "none")
    assert (done.code, done.out) == (4, "") and WEIGHT in done.err
    heads = write_shared(tmp_path / "heads")
    done = offload_run("medusa", "calibrate", heads, broken, *shared, "-n", 4, "--raw")
    assert done.code == 4 and WEIGHT in done.err
    done = offload_run(
        "medusa", "calibrate", huge_heads(tmp_path / "huge"), model, *shared, "-n", 4, "--raw"
    )
    assert done.code == 2 and "head 1 are NaN or infinite" in done.err
    assert not list(tmp_path.glob("*/medusa_calibration.json"))


@pytest.fixture
def workers(monkeypatch):
    """What a comparison runs in processes of their own; stdout stays where it is."""
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    from offload_rt.baselines.workers import generation, run_offload_rt

    return SimpleNamespace(generation=generation, run_offload_rt=run_offload_rt)


def test_workers_of_a_comparison_refuse_logits_that_are_no_numbers(broken, workers):
    own = workers.run_offload_rt.OffloadRt()
    with engine_for(broken) as own.engine, pytest.raises(NumbersError, match="NaN or infinite"):
        own.gap(PROMPT, [1, 2])

    def model(**_):
        return SimpleNamespace(logits=torch.full((1, 1, 9), torch.nan), past_key_values=None)

    clock = SimpleNamespace(tick=lambda _: None)
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        workers.generation.greedy(model, "cpu", [PROMPT], 3, frozenset(), clock)
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        workers.generation.last_logits(model, "cpu", PROMPT, [1])


def training(model, tmp_path, *more):
    data = tmp_path / "talks.jsonl"
    turns = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "a lazy dog"}]
    talks = [turns, [turns[0] | {"content": "the dog"}, turns[1]]]
    data.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    usual = ["--epochs", 1, "--heads", 2, "--seed", 3, "--vocabulary", "full", "--holdout", 0.5]
    return ["train-medusa", model, "--output", tmp_path / "out", "--data", data, *usual, *more]


@pytest.mark.parametrize("more", [[], ["--self-distill", "--answer-tokens", 4]])
def test_training_on_a_broken_model_names_its_weight(broken, offload_run, tmp_path, more):
    done = offload_run(*training(broken, tmp_path, *more))
    assert done.code == 4 and f"from layer 1 on: '{WEIGHT}'" in done.err


def test_training_the_broken_model_itself_ends_before_it_begins(broken, offload_run, tmp_path):
    more = ["--method", "medusa-2", "--warm-up", "sine", "--lora-rank", 2]
    done = offload_run(*training(broken, tmp_path, *more))
    assert done.code == 2 and "loss on held-out answers is nan" in done.err


def test_heads_that_are_no_numbers_once_stored_are_not_written():
    heads = torch.nn.Linear(3, 3)
    _round(heads, torch.float16)
    heads.weight.data[1, 1] = 1e5  # the loss is finite, fp16 ends at 65,504
    with pytest.raises(NumbersError, match="weight is NaN or infinite in float16.*lower --lr"):
        _round(heads, torch.float16)


def test_nothing_is_learnt_of_rows_that_are_no_numbers():
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    logits[1, 4] = torch.nan
    likely = Likely.read(pack_likely(logits).tolist(), [5, NO_TOKEN, 2])
    assert (likely.tokens[1], likely.probs[1]) == ([], [])
    assert likely.tokens[::2] == logits.topk(8).indices[::2].tolist()
    drafter = NgramDrafter(4, 100)
    drafter.learn([1, 2], TokenTree.chain([3, 4]), likely)
    assert drafter._followers.after([2, 3])[0] == 0
    assert drafter._followers.after([3, 4])[0] == 2
